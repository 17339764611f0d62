"""What callers read of a transfer: the words for every state, phases, and the report as JSON."""

from __future__ import annotations

import json

import pytest

from ikectx.engine.hints import advice
from ikectx.engine.report import (
    SOURCE_STANDS,
    TARGET_STANDS,
    TransferReport,
    source_phases,
    source_words,
    target_phases,
)
from ikectx.engine.tables import SOURCE_SERVES, SourceState, TargetState
from ikectx.errors import IkectxError, KernelError, LinkError, RefusedError
from ikectx.numbers import Fpt, Status
from ikectx.sa.verdict import Verdict
from tests.peers import a_context


def test_every_state_says_who_serves_and_every_status_what_to_do() -> None:
    assert set(SOURCE_STANDS) == set(SourceState)
    for state, (result, here, there) in SOURCE_STANDS.items():
        assert here
        assert there
        assert (result in ("kept", "refused")) == (state in SOURCE_SERVES - {SourceState.THAWING})
    assert set(TARGET_STANDS) == set(TargetState)
    for target, (result, here, there) in TARGET_STANDS.items():
        assert here
        assert there
        assert (result == "moved") == (target is TargetState.OWNED)


def test_a_report_is_plain_json() -> None:
    report = TransferReport(
        "00" * 8,
        a_context().spis,
        "alice",
        "192.0.2.1",
        "psg",
        "nsg",
        "refused",
        Status.NO_CONNECTION,
        verdicts=(Verdict(Fpt.PAD, Status.NO_CONNECTION, "rw"),),
        phases_ms={"export": 1.5},
    )
    there_and_back = json.loads(json.dumps(report.to_json()))
    assert there_and_back["status"]["name"] == "NO_CONNECTION"
    assert there_and_back["sa"]["spi_i"] == report.sa[0].hex()
    assert there_and_back["verdicts"][0]["context"] == "PAD"
    assert there_and_back["phases_ms"] == {"export": 1.5}
    assert {"result", "from", "to", "epoch", "attempts", "cxtp_messages", "cxtp_octets"} <= set(
        there_and_back
    )


def words(
    state: SourceState, error: IkectxError | None = None, clean_up: IkectxError | None = None
) -> tuple[str, str, int]:
    return source_words(state, error, clean_up, mn="alice", peer="nsg", ident="0a0b")


def test_words_of_a_transfer_at_its_source() -> None:
    assert words(SourceState.DONE) == ("nsg serves alice now", "", 0)
    failed = KernelError("no memory", hint="free some")
    assert words(SourceState.KEPT, failed) == ("no memory", "free some", failed.exit_code)
    unhinted = LinkError("nsg is away")
    assert words(SourceState.REFUSED, unhinted) == (
        "nsg is away",
        advice(unhinted.status),
        unhinted.exit_code,
    )


def test_words_of_a_clean_up_that_fails() -> None:
    text, hint, code = words(SourceState.CLEANING, None, KernelError("no memory"))
    assert text.startswith("nsg serves alice now")
    assert text.endswith("tried again: no memory")
    assert (hint, code) == ("", 0)
    text, hint, code = words(SourceState.THAWING, LinkError("lost"), KernelError("no memory"))
    assert (text, code) == ("no memory", KernelError.exit_code)
    assert hint.startswith("look at charon")


def test_words_in_doubt_name_the_way_out() -> None:
    text, hint, code = words(SourceState.RELEASED)
    assert (text, code) == ("", LinkError.exit_code)
    assert "`ikectx resolve 0a0b --reclaim`" in hint


def test_connecting_is_no_part_of_preparing() -> None:
    spent = {"offered": 5.0, "new": 1.0, "done": 9.0}
    assert source_phases(spent, 0.0) == {"export": 1.0, "prepare": 5.0}
    found = source_phases(spent, 2.0)
    assert found == {"export": 1.0, "connect": 2.0, "prepare": 3.0}
    assert list(found) == ["export", "connect", "prepare"]
    assert source_phases(spent, 7.0)["prepare"] == 0.0


def test_states_of_one_phase_add_up_at_the_target() -> None:
    spent = {"preparing": 2.0, "checking": 1.0, "announced": 0.5, "owned": 9.0}
    assert target_phases(spent, None) == {"check": 1.5, "prepare": 2.0}
    assert target_phases(spent, 3.0) == {"request": 3.0, "check": 1.5, "prepare": 2.0}


def test_b31_a_gateway_that_lost_its_store_is_told_how_its_sas_move_again() -> None:
    *_, hint, _ = words(SourceState.REFUSED, RefusedError("stale", status=Status.STALE_EPOCH))
    assert "swanctl --rekey --ike" in hint


@pytest.mark.parametrize(
    ("phases", "steps"),
    [
        (
            {"export": 1.0, "connect": 2.04, "prepare": 3.0, "freeze": 0.5, "confirm": 4.0, "release": 1.0},
            [
                ("export", "psg"),
                ("connect", "psg"),
                ("prepare", "nsg"),
                ("freeze", "psg"),
                ("confirm", "nsg"),
                ("release", "psg"),
            ],
        ),
        (
            {"request": 1.0, "check": 2.0, "prepare": 3.0, "wait": 0.5, "take": 4.0, "move": 1.0},
            [
                ("request", "psg"),
                ("check", "nsg"),
                ("prepare", "nsg"),
                ("wait", "psg"),
                ("take", "nsg"),
                ("move", "carol"),
            ],
        ),
    ],
)
def test_each_step_says_who_was_waited_for_and_when(
    phases: dict[str, float], steps: list[tuple[str, str]]
) -> None:
    report = TransferReport(
        "id", a_context().spis, "carol", "", "psg", "nsg", "moved", Status.OK, phases_ms=phases
    )
    path = report.path
    assert [(one["step"], one["host"]) for one in path] == steps
    assert path[0]["start_ms"] == 0.0 and path[2]["start_ms"] == path[1]["end_ms"] == 3.0
    assert report.to_json()["path"] == path
