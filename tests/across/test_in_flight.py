"""A request of pSG's that the MN has not answered, because it has left: its message ID is found out."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from ikectx.engine.ports import ContextSink
from ikectx.engine.report import TransferReport
from ikectx.errors import LinkError, RefusedError
from ikectx.numbers import Status
from ikectx.sa.context import Endpoint, FinalState, IkeContext
from ikectx.wire.cxtp import Ctaa, Ctd
from ikectx.wire.full_ctd import decode_last, final_of, merge
from ikectx.wire.profile import decode_final, encode, encode_final
from ikectx.wire.tokens import Purpose, expected_by, token_key
from mobike_ext.probe import MidProbe
from tests.gateway_world import OURS, Mobiles, Place
from tests.hand_loop import run
from tests.ikectx.wire.test_packet_proof import request
from tests.mobile_nodes import MobileNode, serve
from tests.peers import Ether, MemoryGateway, a_context
from tests.profile_samples import TRANSFER
from tests.vici_bridge.test_deadlines import MemoryStore
from tests.worlds import ALL, World, until, world
from vici_bridge import exchanges

NEW = Endpoint.of("203.0.113.5", 4500)
HERE = Endpoint.of("192.0.2.2", 4500)
M = 2
"""Message ID of the request without an answer (`a_context`)."""


async def by_packet(w: World, context: IkeContext) -> TransferReport | None:
    return await w.b.agent.packet(request(context, mid=context.mid_responder), HERE, NEW, ["a"])


def asleep(w: World, context: IkeContext) -> IkeContext:
    """It is served at a, whose liveness check the MN did not answer."""
    w.a.daemon.unanswered.add(w.a.daemon.serve(context))
    return context


# -- on the wire ----------------------------------------------------------------------------------------


def test_unsure_is_told_in_every_kind_of_message() -> None:
    context = replace(a_context(), unsure=True)
    final = FinalState(*context.spis, M, 5, 1, (), unsure=True)
    assert decode_final(encode_final(final, bytes(8))) == (final, bytes(8))
    assert decode_last(encode(context, transfer=TRANSFER)) == (context, TRANSFER)
    assert final_of(context).unsure
    last = replace(final_of(context), unsure=False)
    assert not merge(context, last).unsure
    # what is certain costs no octet
    certain, doubtful = (encode(one, transfer=TRANSFER)[0].data for one in (a_context(), context))
    assert len(certain) == len(doubtful) - 2


# -- by packet ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settles", [M + 1, M + 2])
def test_by_packet_nsg_asks_the_mn(settles: int) -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            context = asleep(w, a_context())
            w.b.daemon.settles = settles
            report = await by_packet(w, context)
            assert report is not None
            assert report.result == "moved"
            whole = next(message for message in w.network.seen if isinstance(message, Ctd))
            sent, _ = decode_last(whole.blocks)
            assert isinstance(sent, IkeContext)
            assert (sent.unsure, sent.mid_initiator) == (True, M)
            await w.quiet()
            assert w.owner(context.spis) == "b"
            assert w.b.daemon.calls == ["check", "prepare", "take", "settle", "activate"]
            served = w.b.daemon.served[context.spis]
            assert (served.mid_initiator, served.unsure) == (settles, False)

    run(scenario())


def test_by_packet_a_silent_mn_stays_at_psg() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            context = asleep(w, a_context())
            w.b.daemon.fail["settle"] = [LinkError("silent")]
            report = await by_packet(w, context)
            assert report is not None
            assert (report.result, report.status) == ("kept", Status.PEER_SILENT)
            await w.quiet()
            assert w.owner(context.spis) == "a"
            assert w.b.daemon.calls[-1] == "undo"

    run(scenario())


def test_a_gateway_that_cannot_ask_takes_nothing_that_is_not_certain() -> None:
    async def scenario() -> None:
        context = a_context()
        unsure = final_of(replace(context, unsure=True))
        with pytest.raises(RefusedError) as caught:
            await ContextSink.settle(MemoryGateway("b", Ether()), context, unsure)
        assert caught.value.status is Status.NOT_COVERED

    run(scenario())


def test_a_crash_at_any_moment_leaves_one_owner_with_a_certain_number() -> None:
    async def crash_at(moment: int) -> bool:
        async with world(rights=ALL, crash=("b", moment)) as w:
            context = asleep(w, a_context())
            w.b.daemon.settles = M + 1
            showing = asyncio.create_task(by_packet(w, context))
            await until(lambda: w.b.fuse.blown or showing.done())
            blown = w.b.fuse.blown
            if blown:
                await w.b.kill()
                await w.b.start()
            await w.quiet()
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            if w.owner(context.spis) == "b":
                assert w.b.daemon.served[context.spis].mid_initiator == M + 1
            return blown

    async def scenario() -> None:
        moment = 1
        while await crash_at(moment):
            moment += 1
        assert moment > 10

    run(scenario())


# -- by the MN ------------------------------------------------------------------------------------------


async def arrives(mn: MobileNode, w: World, **more: Any) -> tuple[Status | None, bytes | None]:
    message, source = mn.arrive(**more)
    answer = await w.b.agent.ctar(message, source)
    return mn.says(answer), answer


@pytest.mark.parametrize("expects", [M, M + 1])
def test_reactive_the_mn_says_what_it_expects(expects: int) -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            mn = MobileNode(asleep(w, a_context()))
            status, answer = await arrives(mn, w, expects=expects)
            assert status is Status.OK
            assert answer is not None
            assert expected_by(Ctaa.parse(answer)) == mn.context.mid_responder
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert "settle" not in w.b.daemon.calls
            assert w.b.daemon.served[mn.sa].mid_initiator == expects

    run(scenario())


@pytest.mark.parametrize("expects", [M - 1, M + 3])
def test_reactive_what_cannot_be_is_refused(expects: int, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            mn = MobileNode(asleep(w, a_context()))
            _, answer = await arrives(mn, w, expects=expects)
            assert answer is not None
            assert [block.status for block in Ctaa.parse(answer).statuses] == [Status.FAILED]
            assert f"expects request {expects} next" in caplog.text
            assert "freeze" not in w.a.daemon.calls
            await w.quiet()
            assert w.owner(mn.sa) == "a"

    run(scenario())


def test_reactive_without_a_word_of_it_the_sa_is_busy() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            mn = MobileNode(asleep(w, a_context()))
            await arrives(mn, w)
            assert "freeze" not in w.a.daemon.calls
            await w.quiet()
            assert w.owner(mn.sa) == "a"

    run(scenario())


def test_where_nothing_is_in_flight_psg_knows_best() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            mn = serve(w, a_context())
            status, _ = await arrives(mn, w, expects=99)
            assert status is Status.OK
            await w.quiet()
            assert w.b.daemon.served[mn.sa].mid_initiator == M

    run(scenario())


def test_predictive_the_mn_left_after_the_announcement() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            mn = serve(w, a_context())
            message, source = mn.announce(expects=M)
            answer = await w.a.agent.ctar(message, source)
            assert mn.says(answer, Purpose.ANNOUNCE) is Status.OK
            w.a.daemon.unanswered.add(mn.sa)
            status, answer = await arrives(mn, w, expects=M + 1)
            assert status is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert w.b.daemon.served[mn.sa].mid_initiator == M + 1
            assert answer is not None
            assert expected_by(Ctaa.parse(answer)) == mn.context.mid_responder

    run(scenario())


def test_a_forged_number_moves_nothing() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            mn = MobileNode(asleep(w, a_context()))
            other = token_key(a_context(9).current, mn.sequence)
            assert other != token_key(mn.context.current, mn.sequence)
            message, source = mn.arrive(expects=M)
            block = message.blocks[-1]
            data = bytearray(block.data)
            data[11] ^= 1
            forged = replace(message, blocks=(*message.blocks[:-1], replace(block, data=bytes(data))))
            assert await w.b.agent.ctar(forged, source) is None
            assert "freeze" not in w.a.daemon.calls

    run(scenario())


# -- by the operator -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pull", [False, True])
def test_push_and_pull_wait_for_the_answer(pull: bool) -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            context = asleep(w, a_context())
            if pull:
                report = await w.b.agent.pull("a", context.remote.address, sa=context.spis)
            else:
                report = await w.a.agent.transfer(context.spis, "b")
            assert report.status is Status.BUSY
            assert "freeze" not in w.a.daemon.calls

    run(scenario())


# -- at nSG, with charon --------------------------------------------------------------------------------


def test_the_sink_asks_under_its_own_address() -> None:
    asked: list[tuple[Endpoint, int]] = []

    async def scenario() -> None:
        place = Place(MemoryStore(), Mobiles(0xC000_0000, 0xCFFF_FFFF))
        context = a_context()
        final = replace(final_of(context), unsure=True)
        with pytest.raises(RefusedError) as caught:
            await place.sink.settle(context, final)
        assert caught.value.status is Status.NOT_COVERED

        async def settler(here: IkeContext, last: FinalState) -> int:
            asked.append((here.local, last.mid_initiator))
            return M + 2

        place.sink._settler = settler
        settled = await place.sink.settle(context, final)
        assert settled == replace(final, mid_initiator=M + 2, unsure=False)

    asyncio.run(scenario())
    assert asked == [(OURS, M)]


def test_the_same_octets_after_a_crash_and_no_iv_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[bytes]] = []

    async def no_socket(machine: MidProbe, *, mark: int) -> int:
        assert mark == 5
        sent.append([request[0] for request in machine._requests])
        return M + 1

    monkeypatch.setattr(exchanges, "run_mid_probe", no_socket)

    async def scenario() -> None:
        settler = exchanges.MnSettler(5, 0.5, 5)
        context = a_context()
        moved = replace(context, remote=NEW)
        later = replace(final_of(context), mid_initiator=M + 1)
        for here, final in (
            (context, final_of(context)),
            (context, final_of(context)),
            (moved, final_of(context)),
            (context, later),
        ):
            assert await settler(here, final) == M + 1

    asyncio.run(scenario())
    first, again, elsewhere, later = sent
    assert first == again
    # one message ID, one IV at one place
    assert first[1] == later[0]
    assert len({*first, *elsewhere, *later}) == 5
