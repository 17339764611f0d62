"""What strangers send to nSG is forgotten with its answer, and takes no place that a mobile node needs."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from ipaddress import ip_address

import pytest

from ikectx.engine.arrivals import AT_ONCE, OF_A_PEER, Arrival
from ikectx.engine.journaled import MobileConfig
from ikectx.engine.requests import Request
from ikectx.errors import LinkError
from ikectx.net.links import Stream
from ikectx.numbers import Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import Endpoint
from ikectx.wire.cxtp import Ctaa, Ctar, Ctc, Ctd, Message
from ikectx.wire.tokens import Purpose
from tests.across.test_turns import forged
from tests.hand_loop import run, wall
from tests.mobile_nodes import AWAY, kinds, requests, serve
from tests.peers import Fate, a_context
from tests.worlds import FAST, World, until, world

ATTACKER = Endpoint.of("203.0.113.66", 5091)


def unknown(w: World, number: int, psg: str = "a") -> tuple[Ctar, Endpoint]:
    """A forged arrival for an SA that nobody has, each from a source of its own."""
    mn = serve(w, a_context(90))
    del w.a.daemon.served[mn.sa]
    spis = (number.to_bytes(8), mn.sa[1])
    source = Endpoint(ip_address("10.9.0.0") + number, 5091)
    return forged(mn, Purpose.ARRIVE, number, spis=spis, psg=psg), source


def test_answers_to_what_nobody_knows_are_not_remembered() -> None:
    """1,024 of them made nSG deaf to every mobile node, until they had expired."""

    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            for number in range(MobileConfig().memory + 10):
                answer = await w.b.agent.ctar(*unknown(w, number))
                assert answer is not None
                assert [block.status for block in Ctaa.parse(answer).statuses] == [Status.UNKNOWN_SA]
            assert w.b.engine.arrivals is not None
            assert len(w.b.engine.arrivals._known) == 0
            gc.collect()
            assert not any(isinstance(each, Request | Arrival) for each in gc.get_objects())
            assert w.a.daemon.calls == []
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"

    run(scenario())


def lost_while_forged(message: Message) -> Fate:
    """A slow pSG: what is forged gets no answer for a while."""
    return "lose" if 1000 <= getattr(message, "sequence", 0) < 2000 else "deliver"


def test_a_forged_ctar_does_not_draw_the_context_that_the_mn_asked_for() -> None:
    """It names the MN's SPIs and a care-of address of the forger's, and waits at nSG as the MN's own does."""

    async def scenario() -> None:
        async with world() as w:
            w.network.fate = lost_while_forged
            mn = serve(w, a_context())
            there = {"care_of": Endpoint(ATTACKER.address, 4500)}
            waiting = [
                asyncio.create_task(w.b.agent.ctar(forged(mn, Purpose.ARRIVE, number, **told), ATTACKER))
                for number, told in ((1000, there), (1001, {**there, "mn": ip_address("192.0.2.77")}))
            ]
            await until(lambda: len(requests(w)) == 2)
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert w.b.daemon.served[mn.sa].remote == AWAY
            for one in waiting:
                answer = await one
                assert answer is None or mn.says(answer) is None
                assert answer is None or Ctaa.parse(answer).statuses[0].status is not Status.OK

    run(scenario())


def test_giving_up_what_was_forged_cancels_nothing_of_the_mn() -> None:
    """A CTC names the mobile node alone, and pSG takes it for all that it does for that node."""

    async def scenario() -> None:
        async with world(timing=replace(FAST, unproven=0.05)) as w:
            w.network.fate = lost_while_forged
            mn = serve(w, a_context())
            gate = w.a.daemon.wait["freeze"] = asyncio.Event()
            waiting = asyncio.create_task(w.b.agent.ctar(forged(mn, Purpose.ARRIVE, 1000), ATTACKER))
            await asyncio.sleep(0.03)
            arriving = asyncio.create_task(w.b.agent.ctar(*mn.arrive()))
            await w.a.reaches("freeze")
            await waiting
            assert not any(isinstance(message, Ctc) for message in w.network.seen)
            gate.set()
            assert mn.says(await arriving) is Status.OK

    run(scenario())


def test_what_is_under_way_is_bounded_by_source_and_by_gateway() -> None:
    async def scenario() -> None:
        async with world(names=("a", "b", "c")) as w:
            w.network.kill("c")  # and so every CTAR that names it waits
            mn = serve(w, a_context())
            one_source = [w.b.agent.ctar(unknown(w, n, "c")[0], ATTACKER) for n in range(50)]
            many = [w.b.agent.ctar(*unknown(w, n, "c")) for n in range(2 * OF_A_PEER)]
            began = wall()
            flood = asyncio.gather(*one_source, *many)
            await asyncio.sleep(0.01)
            assert w.b.engine.arrivals is not None
            known = w.b.engine.arrivals._known
            assert len(known) == OF_A_PEER
            assert sum(each.source == ATTACKER for each in known.values()) == AT_ONCE
            # the mobile node comes from the other gateway
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            answers = await flood
            assert wall() - began < 2 * FAST.unproven
            assert sum(answer is not None for answer in answers) == OF_A_PEER
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert len(known) == 1

    run(scenario())


def test_a_gateway_that_answers_no_connection_holds_nobody_up_for_longer() -> None:
    """Each request waits until those before it have dialled in vain; together that would be for minutes."""

    async def scenario() -> None:
        async with world(names=("a", "b", "c")) as w:

            async def hang(peer: PeerConfig) -> Stream:
                await asyncio.sleep(1.0)
                raise LinkError(f"{peer.name} did not answer within 1 s")

            w.b.agent._running()._dial = hang
            began = wall()
            flood = asyncio.gather(*(w.b.agent.ctar(*unknown(w, n, "c")) for n in range(50)))
            assert all(answer is not None for answer in await flood)
            assert wall() - began < FAST.unproven + 0.1

    run(scenario())


@pytest.mark.parametrize("source", [AWAY, ATTACKER])
def test_a_copy_that_was_changed_where_the_token_covers_nothing_is_a_copy(source: Endpoint) -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            message, home = mn.arrive()
            home = Endpoint(home.address, AWAY.port)
            first = await w.b.agent.ctar(message, home)
            assert mn.says(first) is Status.OK
            for number in range(20):
                changed = replace(message, router=ip_address("10.0.0.0") + number, acknowledge=True)
                assert await w.b.agent.ctar(changed, source) == (first if source == home else None)
            await w.quiet()
            assert len(requests(w)) == 1
            assert kinds(w).count(Ctd) == 1
            assert w.owner(mn.sa) == "b"

    run(scenario())


def test_mobile_nodes_behind_one_nat_do_not_stand_in_each_other_s_way() -> None:
    async def scenario() -> None:
        async with world() as w:
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            mns = [serve(w, a_context(n, mn=f"198.51.100.{n}"), sequence=n) for n in range(1, 4 * AT_ONCE)]
            arriving = []
            for number, mn in enumerate(mns, 1):
                arriving.append(asyncio.create_task(w.b.agent.ctar(*mn.arrive())))
                await until(lambda number=number: w.b.daemon.calls.count("prepare") == number)  # type: ignore[misc]
            gate.set()
            answers = await asyncio.gather(*arriving)
            assert [mn.says(answer) for mn, answer in zip(mns, answers, strict=True)] == [Status.OK] * len(
                mns
            )

    run(scenario())
