"""What an attacker gets from gateways that serve MNs' handovers: real agents, daemons in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address

import pytest

from ikectx.engine.arrivals import AT_ONCE
from ikectx.engine.journaled import MobileConfig
from ikectx.node.mobility import Handover, HandoverMode, MobileState, Route, Router
from ikectx.sa.context import Endpoint, Secret
from ikectx.sa.name import SaName
from ikectx.timing import Timing
from ikectx.wire.cxtp import Ctaa, Ctar
from ikectx.wire.tokens import Purpose, make_ctar, open_ctaa, token_key
from tests.hand_loop import run, wall
from tests.peers import a_context
from tests.worlds import FAST, World, world

MN = ip_address("198.51.100.7")
OLD, NEW = Endpoint(MN, 6000), Endpoint.of("203.0.113.7", 6001)
ELSEWHERE = Endpoint.of("203.0.113.66", 6001)
A = Router("a", ip_address("192.0.2.1"), Endpoint.of("192.0.2.1", 5091))
B = Router("b", ip_address("192.0.2.2"), Endpoint.of("192.0.2.2", 5091))
GENERATION = a_context().current
SEQUENCE = 0x1234
KEY = token_key(GENERATION, SEQUENCE)


def ctar(purpose: Purpose = Purpose.ARRIVE, *, key: Secret = KEY, life: float = 60, nsg: str = "b") -> Ctar:
    """The MN's, unless another key makes it a forgery."""
    return make_ctar(
        key,
        mn=MN,
        router=A.address if purpose is Purpose.ARRIVE else B.address,
        sequence=SEQUENCE,
        purpose=purpose,
        spis=a_context().spis,
        psg="a",
        nsg=nsg,
        expiry=int(wall() + life),
        care_of=Endpoint(NEW.address, 4500) if purpose is Purpose.ARRIVE else None,
    )


FORGER = Secret(bytes(32))


@asynccontextmanager
async def served(
    names: tuple[str, ...] = ("a", "b"), timing: Timing = FAST
) -> AsyncIterator[tuple[World, SaName]]:
    async with world(names=names, timing=timing) as w:
        # no NAT: where the MN says it is counts
        yield w, w.a.daemon.serve(a_context())


async def until_settled(w: World) -> None:
    await w.quiet()
    await asyncio.sleep(0)


def accepted(octets: bytes | None, purpose: Purpose) -> bool:
    assert octets is not None
    ctaa = Ctaa.parse(octets)
    return open_ctaa(KEY, ctaa, SEQUENCE, purpose=purpose) and not ctaa.statuses


@pytest.mark.parametrize("mode", [HandoverMode.PREDICTIVE, HandoverMode.REACTIVE])
def test_a_handover_by_the_mn(mode: HandoverMode) -> None:
    """The machine of the MN and two real agents."""

    async def scenario() -> None:
        async with served() as (w, sa):
            care_of = Endpoint(NEW.address, 4500)
            machine = Handover(
                GENERATION,
                mode,
                Route(MN, A, B),
                sequence=SEQUENCE,
                unix=wall(),
                care_of=care_of if mode is HandoverMode.REACTIVE else None,
            )
            while not machine.done:
                for octets, to in machine.to_send(0):
                    side, source = (w.a, OLD) if to == A.cxtp else (w.b, NEW)
                    answer = await side.agent.ctar(Ctar.parse(octets), source)
                    assert answer is not None
                    machine.receive(answer, to, 0)
                if machine.state is MobileState.PREPARED:
                    machine.moved(care_of, 0)
            await until_settled(w)
            assert machine.outcome.state is MobileState.ACTIVATED
            assert machine.outcome.announced == (mode is HandoverMode.PREDICTIVE)
            assert w.owner(sa) == "b"
            assert w.b.daemon.served[sa].remote.address == NEW.address
            assert w.b.daemon.moves == []

    run(scenario())


@pytest.mark.parametrize("announced", [True, False])
def test_a_forged_arrival_does_not_stand_in_the_way_of_the_right_one(announced: bool) -> None:
    """Who saw the announcement knows the sequence number, and is at nSG first."""

    async def scenario() -> None:
        async with served() as (w, sa):
            if announced:
                assert accepted(await w.a.agent.ctar(ctar(Purpose.ANNOUNCE), OLD), Purpose.ANNOUNCE)
            for source in (ELSEWHERE, NEW):
                assert await w.b.agent.ctar(ctar(key=FORGER), source) is None
            assert accepted(await w.b.agent.ctar(ctar(), NEW), Purpose.ARRIVE)
            await until_settled(w)
            assert w.owner(sa) == "b"

    run(scenario())


def test_a_forged_announcement_does_not_stand_in_the_way_of_the_right_one() -> None:
    async def scenario() -> None:
        async with served() as (w, _):
            assert await w.a.agent.ctar(ctar(Purpose.ANNOUNCE, key=FORGER), OLD) is None
            assert accepted(await w.a.agent.ctar(ctar(Purpose.ANNOUNCE), OLD), Purpose.ANNOUNCE)

    run(scenario())


def test_a_flood_of_forgeries_fills_no_memory() -> None:
    async def scenario() -> None:
        async with served() as (w, sa):
            for number in range(MobileConfig().memory + 10):
                forged = replace(ctar(Purpose.ANNOUNCE, key=FORGER, life=1e8), sequence=number)
                assert await w.a.agent.ctar(forged, ELSEWHERE) is None
            assert accepted(await w.a.agent.ctar(ctar(Purpose.ANNOUNCE), OLD), Purpose.ANNOUNCE)
            assert sa in w.a.daemon.served

    run(scenario())


def test_forgeries_do_not_queue_up_while_psg_is_silent() -> None:
    async def scenario() -> None:
        async with served() as (w, _):
            w.network.kill("a")
            began = wall()
            forged = [replace(ctar(key=FORGER), sequence=number) for number in range(50)]
            answers = await asyncio.gather(*(w.b.agent.ctar(one, ELSEWHERE) for one in forged))
            assert sum(answer is not None for answer in answers) <= AT_ONCE
            assert wall() - began < (AT_ONCE + 1) * FAST.request

    run(scenario())


@pytest.mark.parametrize("announced", [True, False])
def test_a_replay_gets_the_same_answer_or_none(announced: bool) -> None:
    async def scenario() -> None:
        async with served() as (w, sa):
            first: bytes | None = None
            if announced:
                first = await w.a.agent.ctar(ctar(Purpose.ANNOUNCE), OLD)
            arrival = ctar()
            second = await w.b.agent.ctar(arrival, NEW)
            assert accepted(second, Purpose.ARRIVE)
            await until_settled(w)
            messages = len(w.network.seen)
            if announced:
                again = replace(ctar(Purpose.ANNOUNCE), acknowledge=True)
                assert await w.a.agent.ctar(again, ELSEWHERE) is None
                assert await w.a.agent.ctar(again, OLD) in (first, None)
            assert await w.b.agent.ctar(arrival, ELSEWHERE) is None
            assert await w.b.agent.ctar(arrival, NEW) == second
            assert len(w.network.seen) == messages
            assert w.owner(sa) == "b"

    run(scenario())


def test_a_token_for_another_gateway_or_too_old_or_too_young_gets_nothing() -> None:
    async def scenario() -> None:
        async with served(("a", "b", "c")) as (w, sa):
            c = w.sides["c"].agent
            for agent, message in (
                (c, ctar()),
                (w.b.agent, ctar(nsg="c")),
                (w.b.agent, ctar(life=-31)),
                (w.b.agent, ctar(life=400)),
                (w.a.agent, ctar(Purpose.ANNOUNCE, life=-31)),
                (w.a.agent, ctar(Purpose.ANNOUNCE, life=400)),
                (w.b.agent, ctar(Purpose.ANNOUNCE)),
                (w.a.agent, ctar()),
            ):
                assert await agent.ctar(message, NEW) is None
            assert w.owner(sa) == "a"

    run(scenario())


def test_another_mn_cannot_move_it() -> None:
    async def scenario() -> None:
        async with served() as (w, sa):
            other = a_context(2)
            w.a.daemon.serve(other)
            key = token_key(other.current, SEQUENCE)
            assert await w.a.agent.ctar(ctar(Purpose.ANNOUNCE, key=key), OLD) is None
            assert await w.b.agent.ctar(ctar(key=key), NEW) is None
            assert w.owner(sa) == "a"

    run(scenario())


def test_what_an_authentic_refusal_says_stays_so() -> None:
    """nSG's patience ends while it is still taking the SA over: it must not say that it never will."""

    async def scenario() -> None:
        async with served(timing=replace(FAST, in_doubt=0.2, request=0.2, step=5.0)) as (w, sa):
            w.b.daemon.wait["take"] = asyncio.Event()
            asked = asyncio.create_task(w.b.agent.ctar(ctar(), NEW))
            await asyncio.sleep(0.5)
            w.b.daemon.wait["take"].set()
            octets = await asked
            await until_settled(w)
            assert w.owner(sa) == "b"
            if octets is not None:
                refused = Ctaa.parse(octets)
                sure = open_ctaa(KEY, refused, SEQUENCE, purpose=Purpose.ARRIVE)
                assert not (sure and refused.statuses)

    run(scenario())
