"""`ikectx.trace`: spans and messages as lines of a file, or nothing at all."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ikectx import trace
from ikectx.errors import BusyError, UsageError
from tests import hand_loop
from tests.worlds import one_move, world

ID = bytes(range(8))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "trace.jsonl"
    trace.begin(str(path))
    yield path
    trace.end()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_nothing_is_noted_before_it_is_asked_for() -> None:
    """And what is not noted costs next to nothing: every span is the same object."""
    assert trace.span("freeze") is trace.span("take")
    trace.message("sent", "Pctd", "nsg", 4)
    trace.ended("freeze", 0)


def test_a_span_is_a_line_when_it_has_ended(file: Path) -> None:
    before = time.time_ns()
    with trace.span("freeze"):
        with trace.span("charon idle", "part"):
            pass
        assert [line["step"] for line in lines(file)] == ["charon idle"]
    part, step = lines(file)
    assert (part["kind"], step["kind"]) == ("part", "step")
    assert before <= step["begin"] <= part["begin"] <= part["end"] <= step["end"] <= time.time_ns()
    assert step["of"] == "" and "failed" not in step


def test_what_ends_a_span_is_named_and_goes_on(file: Path) -> None:
    with pytest.raises(BusyError), trace.span("freeze"):
        raise BusyError("an exchange with 10.1.0.10 is in flight")
    (line,) = lines(file)
    assert line["failed"] == "BusyError"
    assert "10.1.0.10" not in file.read_text()


def test_tasks_and_threads_belong_to_the_transfer_they_were_begun_for(file: Path) -> None:
    def blocking() -> None:
        with trace.span("thread", "call"):
            pass

    async def one(ident: bytes, step: str) -> None:
        with trace.about(ident):
            await asyncio.sleep(0)
            with trace.span(step):
                await asyncio.to_thread(blocking)

    async def both() -> None:
        await asyncio.gather(one(ID, "first"), one(bytes(8), "second"))
        with trace.span("neither"):
            pass

    asyncio.run(both())
    found = [(line["step"], line["of"]) for line in lines(file)]
    assert sorted(found) == sorted(
        [
            *(("first", ID.hex()), ("second", bytes(8).hex()), ("neither", "")),
            *(("thread", ID.hex()), ("thread", bytes(8).hex())),
        ]
    )


def test_functions_and_coroutine_functions_are_spanned(file: Path) -> None:
    @trace.spanned("adds")
    def add(one: int, two: int) -> int:
        return one + two

    @trace.spanned("waits", "call")
    async def wait(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    assert add(1, two=2) == 3
    assert asyncio.run(wait(0.01)) == "done"
    adds, waits = lines(file)
    assert (adds["step"], adds["kind"], waits["step"], waits["kind"]) == ("adds", "part", "waits", "call")
    assert waits["end"] - waits["begin"] >= 10_000_000


def test_each_step_of_a_transfer_is_a_span(file: Path) -> None:
    async def scenario() -> None:
        async with world() as w:
            _, report = await one_move(w)
            await w.quiet()
            of = {line["step"]: line["of"] for line in lines(file) if line.get("kind") == "step"}
            steps = ("freeze", "release", "check", "prepare", "take", "move", "activate")
            assert {step: of.get(step) for step in steps} == dict.fromkeys(steps, report.transfer_id)

    hand_loop.run(scenario())


def test_messages_have_their_moment_their_peer_and_a_length(file: Path) -> None:
    trace.message("sent", "Pctd", "nsg", 408)
    trace.message("received", "Ctdr", "nsg")
    sent, received = lines(file)
    assert {key: sent[key] for key in ("message", "way", "peer", "octets")} == {
        "message": "Pctd",
        "way": "sent",
        "peer": "nsg",
        "octets": 408,
    }
    assert "octets" not in received and received["at"] >= sent["at"]


def test_only_its_owner_may_read_it(file: Path) -> None:
    assert file.stat().st_mode & 0o777 == 0o600


def test_lines_are_added_to_those_of_an_agent_before(file: Path) -> None:
    trace.ended("first", 1)
    trace.begin(str(file))
    trace.ended("second", 2)
    assert [line["step"] for line in lines(file)] == ["first", "second"]


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"IKECTX_TRACE: .*/none/trace: No such file"):
        trace.begin(str(tmp_path / "none" / "trace"))
    assert trace.span("freeze") is trace.span("take")


def test_a_full_disk_ends_the_trace_and_not_the_handover(caplog: pytest.LogCaptureFixture) -> None:
    if not os.path.exists("/dev/full"):
        pytest.fail("there is no /dev/full")
    trace.begin("/dev/full")
    with trace.span("freeze"):
        pass
    assert "nothing is traced any more: No space left on device" in caplog.text
    assert trace.span("freeze") is trace.span("take")
