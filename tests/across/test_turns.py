"""Who has the turn of an SA at pSG: nobody whose request proves nothing, and an operator waits for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from ikectx.errors import BusyError, UnknownSaError
from ikectx.numbers import Status
from ikectx.sa.context import Secret
from ikectx.wire.cxtp import Ctar, CtReq
from ikectx.wire.tokens import Purpose, make_ctar
from tests.across.test_by_packet import HERE, NEW, probe
from tests.hand_loop import run, wall
from tests.mobile_nodes import AWAY, MobileNode, requests, serve
from tests.peers import a_context
from tests.worlds import ALL, FAST, World, until, world

FORGER = Secret(bytes(32))


def forged(mn: MobileNode, purpose: Purpose, sequence: int, /, **other: Any) -> Ctar:
    """As the MN's, with its SPIs, under a key that somebody made up."""
    told: dict[str, Any] = {
        "mn": mn.home,
        "router": mn.home,
        "sequence": sequence,
        "purpose": purpose,
        "spis": mn.sa,
        "psg": "a",
        "nsg": "b",
        "expiry": round(wall() + 60),
        "care_of": AWAY if purpose is Purpose.ARRIVE else None,
        **other,
    }
    return make_ctar(FORGER, **told)


async def ask(w: World, message: Ctar) -> None:
    """b asks a, with what it says is an MN's token; until a has answered."""
    before = len(w.network.seen)
    link = await w.b.agent._running().get(w.b.agent._peer("a"))
    link.send(CtReq(message.mn, message.sequence, message.token, message.blocks))
    await until(lambda: len(w.network.seen) > before + 1)


def test_a_forged_ctar_has_nothing_exported() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            mn = serve(w, a_context())
            for number in range(20):
                assert await w.a.agent.ctar(forged(mn, Purpose.ANNOUNCE, number), AWAY) is None
                assert await w.b.agent.ctar(forged(mn, Purpose.ARRIVE, number), AWAY) is None
                await ask(w, forged(mn, Purpose.ARRIVE, 1000 + number))
            torn = bytearray(probe(mn.context))
            torn[-1] ^= 1
            for datagram in (torn, probe(mn.context, mid=99)[:-1] + b"?", probe(mn.context, mid=1)):
                await w.b.agent.packet(bytes(datagram), HERE, NEW, ["a"])
            assert len(requests(w)) == 43
            assert w.a.daemon.calls == []
            assert w.a.agent.history() == []

    run(scenario())


def test_a_transfer_goes_on_beside_forged_ctars() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())

            async def flood() -> None:
                for number in range(1 << 20):
                    back = forged(mn, Purpose.ARRIVE, number, psg="b", nsg="a")
                    await w.b.agent.ctar(forged(mn, Purpose.ARRIVE, number), AWAY)
                    await w.a.agent.ctar(back, AWAY)
                    await w.a.agent.ctar(forged(mn, Purpose.ANNOUNCE, number), AWAY)
                    await asyncio.sleep(0.0001)

            storm = asyncio.create_task(flood())
            for there, back in (("a", "b"), ("b", "a")) * 10:
                await asyncio.sleep(0.005)
                report = await w.sides[there].agent.transfer(mn.sa, back)
                assert (report.result, report.attempts) == ("moved", 1)
                await w.quiet()
            storm.cancel()
            assert len(requests(w)) > 20

    run(scenario())


def test_a_token_that_has_served_has_nothing_exported() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            arriving = asyncio.create_task(w.b.agent.ctar(*mn.arrive()))
            await w.b.reaches("prepare")
            # somebody has heard the MN, and repeats what it said a little otherwise: the A bit is not covered
            message, _ = mn.arrive()
            await ask(w, replace(message, mn=message.mn))
            gate.set()
            assert mn.says(await arriving) is Status.OK
            assert w.a.daemon.calls.count("export") == 1

    run(scenario())


def test_an_operator_waits_for_the_turn_of_an_sa() -> None:
    async def scenario() -> None:
        async with world(names=("a", "b", "c")) as w:
            # another command's transfer is refused: then it is this one's turn
            sa = w.a.daemon.serve(a_context())
            gate = w.b.daemon.wait["check"] = asyncio.Event()
            w.b.daemon.fail["prepare"] = [UnknownSaError("b does not like it")]
            first = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await w.b.reaches("check")
            waiting = [asyncio.create_task(w.a.agent.transfer(sa, "c")) for _ in range(2)]
            await asyncio.sleep(0.1)
            assert not any(one.done() for one in (first, *waiting))
            gate.set()
            assert (await first).result == "refused"
            assert (await waiting[0]).result == "moved"
            # the other one is told where the SA has gone
            with pytest.raises(UnknownSaError, match="has just brought that IKE_SA to c"):
                await waiting[1]
            assert w.owner(sa) == "c"

    run(scenario())


def test_an_operator_waits_no_longer_than_that() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, predictive=5.0, turn=0.2)) as w:
            mn = serve(w, a_context())
            await w.a.agent.ctar(*mn.announce())
            began = wall()
            with pytest.raises(BusyError, match=r"within 0.2 s: transfer .* to b is awaiting") as caught:
                await w.a.agent.transfer(mn.sa, "b")
            assert wall() - began == pytest.approx(0.2, abs=0.01)
            assert "ikectx cancel" in caught.value.hint
            assert w.owner(mn.sa) == "a"

    run(scenario())


def test_what_was_heard_of_an_sa_is_enough_to_check_a_packet() -> None:
    """The record may lag behind: what is the MN's, and beyond what was heard, is judged by the export."""

    async def scenario() -> None:
        async with world(rights=ALL) as w:
            context = a_context()
            sa = w.a.daemon.serve(context)
            old = replace(context, mid_responder=context.mid_responder - 2)
            w.a.daemon.recorded = lambda name: old  # type: ignore[method-assign]
            report = await w.b.agent.packet(probe(context), HERE, NEW, ["a"])
            assert report is not None
            assert report.result == "moved"
            await w.quiet()
            assert w.owner(sa) == "b"

    run(scenario())
