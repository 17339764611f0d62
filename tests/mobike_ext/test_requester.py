"""nSG asks for an SA: pulls by the operator, repeated, refused, lost, and what pSG makes of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address

import pytest

from ikectx.engine.report import TransferEvent
from ikectx.engine.requests import name_sa, named_sa, refuse_request, refused_request
from ikectx.errors import BusyError, CharonError, LinkError, StateError, UsageError
from ikectx.numbers import Fpt, Status
from ikectx.sa.verdict import Verdict
from ikectx.wire.cxtp import Ctd, Ctdr, CtReq, Pctd, parse_message
from tests.hand_loop import run
from tests.mobile_nodes import requests
from tests.peers import Fate, a_context, fate_at
from tests.worlds import ALL, FAST, world

MN = ip_address("198.51.100.7")


# -- how an SA is named ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sa", [None, (b"initiate", b"response")])
@pytest.mark.parametrize("check", [False, True])
def test_an_sa_is_named_in_a_request_and_read_again(sa: tuple[bytes, bytes] | None, check: bool) -> None:
    message = parse_message(CtReq(MN, 7, 0, name_sa(sa, check=check)).serialize())
    assert isinstance(message, CtReq)
    assert named_sa(message.blocks) == (sa, check)


@pytest.mark.parametrize("sequence", [0, 1, 0x11223344, (1 << 32) - 1])
def test_a_refusal_says_of_what(sequence: int) -> None:
    no = parse_message(refuse_request(CtReq(MN, sequence), Status.BUSY).serialize())
    assert isinstance(no, Ctdr)
    assert refused_request(no) == (Status.BUSY, sequence)
    for other in (Ctdr(MN), replace(no, complete=True), replace(no, statuses=no.statuses[1:])):
        assert refused_request(other) == (Status.OK, 0)


# -- pulls -----------------------------------------------------------------------------------------------


def test_an_sa_is_pulled() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            sa = w.a.daemon.serve(a_context())
            seen: list[TransferEvent] = []
            report = await w.b.agent.pull("a", MN, progress=seen.append)
            await w.quiet()
            assert w.owner(sa) == "b"
            assert (report.result, report.status, report.exit_code) == ("moved", Status.OK, 0)
            assert (report.from_, report.to, report.sa) == ("a", "b", sa)
            assert (report.mn, report.mn_address) == ("mn1.example", "198.51.100.7")
            assert report.text == "b serves mn1.example now"
            assert (report.state_here, report.state_there) == ("b serves the MN", "a has let go")
            assert (report.epoch, report.attempts, report.address) == (1, 1, "update")
            assert report.transfer_id == w.b.agent.history()[0]["transfer_id"]
            # CT-Req, and then an ordinary push
            kinds = [CtReq, Pctd, Ctdr, Ctd, Ctdr]
            assert [type(message) for message in w.network.seen] == kinds
            assert report.cxtp_messages == 5
            assert report.cxtp_octets == sum(len(message.serialize()) for message in w.network.seen)
            assert requests(w)[0].token == 0
            assert set(report.phases_ms) == {
                *("request", "check", "prepare", "wait", "take", "move", "activate")
            }
            assert [event.state for event in seen] == [
                *("checking", "preparing", "prepared", "owning", "moving", "activating", "owned")
            ]
            assert len(w.network._wires) == 2  # one connection
            assert w.b.daemon.moves == [sa]  # nSG tells the MN, as after a push

    run(scenario())


def test_a_pull_names_one_of_several() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            sas = [w.a.daemon.serve(a_context(number)) for number in (1, 2)]
            report = await w.b.agent.pull("a", MN)
            assert (report.result, report.status) == ("refused", Status.AMBIGUOUS)
            assert "SPIs" in report.hint
            assert report.exit_code == 6
            report = await w.b.agent.pull("a", MN, sa=sas[1])
            assert (report.result, report.sa) == ("moved", sas[1])
            await w.quiet()
            assert [w.owner(sa) for sa in sas] == ["a", "b"]

    run(scenario())


def test_a_pull_that_is_not_allowed_or_names_nothing_is_refused() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa = w.a.daemon.serve(a_context())
            report = await w.b.agent.pull("a", MN)
            assert (report.result, report.status, report.exit_code) == ("refused", Status.NOT_ALLOWED, 4)
            assert "`pull`" in report.hint
            assert (report.state_here, report.state_there) == ("b knows nothing of it", "a serves the MN")
            assert w.a.daemon.calls == []
            assert w.owner(sa) == "a"
        async with world(rights=ALL) as w:
            report = await w.b.agent.pull("a", MN)
            assert (report.result, report.status, report.exit_code) == ("refused", Status.UNKNOWN_SA, 6)
            assert report.state_there == "a has no such SA"
            report = await w.b.agent.pull("a", MN, sa=(bytes(7) + b"1", bytes(7) + b"2"))
            assert report.status is Status.UNKNOWN_SA
            with pytest.raises(UsageError, match="no peer is called 'x'"):
                await w.b.agent.pull("x", MN)
            await w.b.agent.stop()
            with pytest.raises(StateError, match="does not run"):
                await w.b.agent.pull("a", MN)

    run(scenario())


def test_who_was_asked_for_may_be_pushed_without_the_right_to_push() -> None:
    async def scenario() -> None:
        async with world(rights=frozenset({"pull"})) as w:
            sa = w.a.daemon.serve(a_context())
            assert (await w.a.agent.transfer(sa, "b")).status is Status.NOT_ALLOWED
            assert (await w.b.agent.pull("a", MN)).result == "moved"
            await w.quiet()
            assert w.owner(sa) == "b"

    run(scenario())


def test_a_dry_pull_asks_both_ends_and_touches_nothing() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            sa = w.a.daemon.serve(a_context())
            report = await w.b.agent.pull("a", MN, dry_run=True)
            assert (report.result, report.status, report.dry_run, report.sa) == ("kept", Status.OK, True, sa)
            assert (report.text, report.exit_code) == ("b would take it", 0)
            w.b.daemon.verdicts = [Verdict(Fpt.PAD, Status.NO_CONNECTION, "home")]
            report = await w.b.agent.pull("a", MN, sa=sa, dry_run=True)
            assert (report.result, report.status) == ("refused", Status.NO_CONNECTION)
            assert report.verdicts == tuple(w.b.daemon.verdicts)
            report = await w.b.agent.pull("a", ip_address("198.51.100.9"), dry_run=True)
            assert (report.result, report.status) == ("refused", Status.UNKNOWN_SA)
            assert w.a.daemon.calls == ["export"] * 2
            assert w.b.daemon.calls == ["check"] * 2
            assert w.a.agent.history() == w.b.agent.history() == []
            assert w.owner(sa) == "a"

    run(scenario())


def test_a_busy_sa_is_asked_for_again_with_the_same_sequence_number() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            w.a.daemon.fail["freeze"] = [BusyError("an exchange is in flight") for _ in range(7)]
            sa = w.a.daemon.serve(a_context())
            report = await w.b.agent.pull("a", MN)
            assert (report.result, report.attempts) == ("moved", 2)  # each was tried five times there
            assert len({request.sequence for request in requests(w)}) == 1
            await w.quiet()
            assert w.owner(sa) == "b"

    run(scenario())


def test_an_sa_that_stays_busy_is_given_up_in_time() -> None:
    async def scenario() -> None:
        async with world(rights=ALL, timing=replace(FAST, request=0.1)) as w:
            w.a.daemon.fail["freeze"] = [BusyError("an exchange is in flight") for _ in range(1000)]
            sa = w.a.daemon.serve(a_context())
            report = await w.b.agent.pull("a", MN)
            assert (report.result, report.status, report.exit_code) == ("refused", Status.BUSY, 7)
            assert report.hint.startswith("try again")
            w.a.daemon.fail.clear()
            await w.quiet()
            assert w.owner(sa) == "a"

    run(scenario())


def test_what_nsg_cannot_take_is_reported_there() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            sa = w.a.daemon.serve(a_context())
            w.b.daemon.verdicts = [Verdict(Fpt.PAD, Status.NO_CONNECTION, "home")]
            report = await w.b.agent.pull("a", MN)
            assert (report.result, report.status, report.text) == ("refused", Status.NO_CONNECTION, "home")
            assert report.verdicts == tuple(w.b.daemon.verdicts)
            assert report.state_there == "a serves the MN"
            w.b.daemon.verdicts = []
            w.b.daemon.fail["move"] = [LinkError("silent")]
            report = await w.b.agent.pull("a", MN)
            assert (report.result, report.status) == ("kept", Status.PEER_SILENT)
            assert report.exit_code == LinkError.exit_code
            await w.quiet()
            assert w.owner(sa) == "a"
            w.a.daemon.fail["export"] = [CharonError("VICI is gone")]
            report = await w.b.agent.pull("a", MN)
            assert (report.result, report.status) == ("refused", Status.CHARON)
            assert (await w.b.agent.pull("a", MN)).result == "moved"

    run(scenario())


def test_psg_is_down() -> None:
    async def scenario() -> None:
        async with world(rights=ALL, timing=replace(FAST, request=0.05)) as w:
            sa = w.a.daemon.serve(a_context())
            await w.a.kill()
            report = await w.b.agent.pull("a", MN)
            assert (report.result, report.status, report.exit_code) == ("kept", Status.UNREACHABLE, 5)
            assert "as far as is known here" in report.state_there
            await w.a.start()
            assert (await w.b.agent.pull("a", MN)).result == "moved"
            await w.quiet()
            assert w.owner(sa) == "b"

    run(scenario())


# -- requests that are lost, repeated, late --------------------------------------------------------------


@pytest.mark.parametrize("fate", ["lose-cut", "deliver-cut"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_link_that_breaks_at_any_message_of_a_pull(number: int, fate: Fate) -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            sa = w.a.daemon.serve(a_context())
            w.network.fate = fate_at(number, fate)
            report = await w.b.agent.pull("a", MN)
            await w.quiet()
            assert report.result == "moved"
            assert w.owner(sa) == "b"
            assert len({request.sequence for request in requests(w)}) == 1

    run(scenario())


def test_copies_of_a_request_begin_nothing() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            sa = w.a.daemon.serve(a_context())
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            pulling = asyncio.create_task(w.b.agent.pull("a", MN))
            await w.b.reaches("prepare")
            link = await w.b.agent._running().get(w.b.agent._peers["a"])
            link.send(requests(w)[0])
            gate.set()
            assert (await pulling).result == "moved"
            await w.quiet()
            # and one that comes late, when the SA is at b, even when it has come back
            link.send(requests(w)[0])
            assert (await w.b.agent.transfer(sa, "a")).result == "moved"
            link.send(requests(w)[0])
            await asyncio.sleep(0.02)
            await w.quiet()
            assert w.owner(sa) == "a"
            assert sum(isinstance(message, Pctd) for message in w.network.seen) == 2

    run(scenario())


def test_two_gateways_pull_the_same_sa_and_one_gets_it() -> None:
    async def scenario() -> None:
        async with world(names=("a", "b", "c"), rights=ALL) as w:
            sa = w.a.daemon.serve(a_context())
            reports = await asyncio.gather(
                w.b.agent.pull("a", MN, sa=sa), w.sides["c"].agent.pull("a", MN, sa=sa)
            )
            assert sorted(report.result for report in reports) == ["moved", "refused"]
            await w.quiet()
            assert w.owner(sa) == ("b" if reports[0].result == "moved" else "c")

    run(scenario())


def test_sas_behind_one_nat_are_pulled_one_after_the_other() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            sas = [w.a.daemon.serve(a_context(number)) for number in (1, 2, 3)]
            back = w.b.daemon.serve(a_context(4))
            reports = await asyncio.gather(
                *(w.b.agent.pull("a", MN, sa=sa) for sa in sas), w.a.agent.pull("b", MN, sa=back)
            )
            assert {report.result for report in reports} == {"moved"}
            await w.quiet()
            assert [w.owner(sa) for sa in (*sas, back)] == [*"bbba"]

    run(scenario())
