"""What the audit logs of both gateways have after moves, and what they never have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace

from ikectx.errors import LinkError
from ikectx.sa.context import Secret
from ikectx.wire.cxtp import Ctd
from tests.hand_loop import run
from tests.peers import a_context, losing
from tests.worlds import FAST, one_move, world


def secrets_in(value: object) -> Iterator[Secret]:
    """All keys of a context."""
    if isinstance(value, Secret):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from secrets_in(getattr(value, field.name))
    elif isinstance(value, tuple):
        for one in value:
            yield from secrets_in(one)


def test_a_move_is_two_lines_at_each_gateway() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa, report = await one_move(w, asked_by="operator (uid 1000)")
            await w.quiet()
            done, let_go = w.a.agent.audit()
            owned, taken = w.b.agent.audit()
            for line in (done, let_go, owned, taken):
                assert (line["from"], line["to"], line["transfer"]) == ("a", "b", report.transfer_id)
                assert line["sa"] == {"spi_i": sa.spi_i.hex(), "spi_r": sa.spi_r.hex()}
                assert (line["status"], line["mn"]) == ("OK", report.mn)
            outcomes = [one["outcome"] for one in (let_go, taken, owned, done)]
            assert outcomes == ["let go", "taken", "moved", "moved"]
            assert {let_go["asked_by"], done["asked_by"]} == {"operator (uid 1000)"}
            assert {taken["asked_by"], owned["asked_by"]} == {"gateway a"}
            assert let_go["epoch"] == taken["epoch"] == {"before": 0, "after": 1}
            assert let_go["counters"]["after"] == taken["counters"]["after"]
            assert (
                let_go["counters"]["before"]["children"].keys()
                == let_go["counters"]["after"]["children"].keys()
            )
            assert "requests" in owned["exchange"]
            for agent in (w.a.agent, w.b.agent):
                assert agent.verify().findings == ()
            logs = json.dumps([w.a.agent.audit(), w.b.agent.audit()])
            secrets = {one.reveal() for one in secrets_in(a_context())} - {b""}
            assert secrets
            assert not [one for one in secrets if one.hex() in logs]

    run(scenario())


def test_a_pull_was_asked_for_by_the_operator_there_and_the_gateway_here() -> None:
    async def scenario() -> None:
        async with world(rights=frozenset({"push", "pull"})) as w:
            sa = w.a.daemon.serve(a_context())
            await w.b.agent.pull("a", a_context().remote.address, sa=sa, asked_by="operator (uid 0)")
            await w.quiet()
            assert w.owner(sa) == "b"
            assert {one["asked_by"] for one in w.a.agent.audit()} == {"gateway b (pull)"}
            assert {one["asked_by"] for one in w.b.agent.audit()} == {"operator (uid 0)"}

    run(scenario())


def test_what_was_never_let_go_is_no_move() -> None:
    async def scenario() -> None:
        async with world() as w:
            w.b.daemon.fail["prepare"] = [LinkError("no")]
            await one_move(w)
            await w.quiet()
            assert w.a.agent.history() and w.a.agent.audit() == w.b.agent.audit() == []

    run(scenario())


def test_a_move_that_is_undone_says_why() -> None:
    async def scenario() -> None:
        async with world() as w:
            w.b.daemon.fail["move"] = [LinkError("no answer to 5 requests")]
            await one_move(w)
            await w.quiet()
            kept, let_go = w.a.agent.audit()
            aborted, taken = w.b.agent.audit()
            assert [one["outcome"] for one in (let_go, kept)] == ["let go", "kept"]
            assert [one["outcome"] for one in (taken, aborted)] == ["taken", "aborted"]
            assert "no answer to 5 requests" in str(aborted["reason"])
            assert kept["status"] == "PEER_SILENT"
            assert kept["epoch"]["after"] == 2

    run(scenario())


def test_agents_that_die_leave_logs_that_are_whole() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, in_doubt=0.02)) as w:
            sa = w.a.daemon.serve(a_context())
            w.network.fate = losing(Ctd)
            doubt = await w.a.agent.transfer(sa, "b", asked_by="operator (uid 0)")
            assert doubt.result == "in-doubt"
            await w.a.kill()
            w.network.fate = lambda message: "deliver"
            await w.a.start()
            await w.quiet()
            assert w.owner(sa) == "b"
            done, let_go = w.a.agent.audit()
            assert (let_go["asked_by"], done["asked_by"]) == ("operator (uid 0)", "")
            assert w.a.agent.verify().findings == w.b.agent.verify().findings == ()

    run(scenario())
