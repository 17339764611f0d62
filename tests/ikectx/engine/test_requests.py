"""What another gateway may ask, and how often: a peer that asks too much takes nothing from the others."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.engine.grants import RATE, UNDER_WAY
from ikectx.engine.requests import refused_request
from ikectx.net.links import RATE as MESSAGES
from ikectx.numbers import Status
from ikectx.wire.cxtp import Ctc, Ctdr, CtReq
from ikectx.wire.packet_proof import encode
from ikectx.wire.tokens import Purpose
from tests.across.test_by_packet import probe
from tests.across.test_turns import forged
from tests.hand_loop import run, wall
from tests.mobile_nodes import AWAY, serve
from tests.peers import a_context
from tests.worlds import ALL, World, until, world


async def ask(w: World, messages: list[CtReq], name: str = "b") -> list[Status]:
    """What a answers to these, sent by that gateway at once, in the order of their numbers."""
    answers: dict[int, Status] = {}
    side = w.sides[name]

    def heard(link: Any, message: Ctdr) -> bool:
        status, sequence = refused_request(message)
        answers[sequence] = status
        return True

    side.engine.requests.refused = heard  # type: ignore[method-assign]
    link = await side.agent._running().get(side.agent._peer("a"))
    for message in messages:
        link.send(message)
    await until(lambda: len(answers) == len(messages))
    return [answers[number] for number in sorted(answers)]


@pytest.mark.parametrize("what", ["pull", "packet"])
def test_without_the_right_nothing_is_looked_up(what: str) -> None:
    async def scenario() -> None:
        async with world() as w:
            context = a_context()
            w.a.daemon.serve(context)
            w.a.daemon.find = None  # type: ignore[assignment, method-assign]
            blocks = encode([probe(context)]) if what == "packet" else ()
            request = CtReq(context.remote.address, 1, 0, blocks)
            assert await ask(w, [request]) == [Status.NOT_ALLOWED]
            assert (w.a.daemon.calls, w.a.daemon.looks) == ([], 0)

    run(scenario())


def test_a_token_for_another_gateway_has_nothing_looked_up() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            other = forged(mn, Purpose.ARRIVE, 1, nsg="c")
            assert await ask(w, [CtReq(other.mn, 1, other.token, other.blocks)]) == [Status.NOT_ALLOWED]
            assert w.a.daemon.looks == 0

    run(scenario())


def test_a_peer_that_asks_all_the_time_is_told_so() -> None:
    async def scenario() -> None:
        async with world(names=("a", "b", "c"), rights=ALL) as w:
            mn = serve(w, a_context(), nsg="c")
            made = [forged(mn, Purpose.ARRIVE, number) for number in range(1000)]
            said = await ask(w, [CtReq(each.mn, each.sequence, each.token, each.blocks) for each in made])
            looked = said.count(Status.NOT_ALLOWED)
            assert 2 * RATE <= looked <= 2 * RATE + 10
            assert said.count(Status.BUSY) == 1000 - looked
            assert w.a.daemon.looks == looked
            assert w.a.daemon.calls == []
            assert w.a.engine.grants._askers["b"].served == {}
            # what it asks for other reasons, and what others ask, is heard
            pull = CtReq(ip_address("192.0.2.99"), 5000, 0)
            assert await ask(w, [pull]) == [Status.UNKNOWN_SA]
            assert mn.says(await w.sides["c"].agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "c"

    run(scenario())


def test_so_many_requests_of_a_peer_are_under_way() -> None:
    async def scenario() -> None:
        async with world(names=("a", "b", "c"), rights=ALL) as w:
            gate = w.a.daemon.wait["export"] = asyncio.Event()
            for number in range(UNDER_WAY + 10):
                w.a.daemon.serve(a_context(number + 1, mn=f"198.51.100.{number + 1}"))
            asking = asyncio.create_task(
                ask(w, [CtReq(ip_address("198.51.100.0") + n + 1, n, 0) for n in range(UNDER_WAY + 10)])
            )
            await until(lambda: w.a.daemon.calls.count("export") == UNDER_WAY)
            await asyncio.sleep(0.01)
            assert sum(one.open for one in w.a.engine.grants._askers["b"].served.values()) == UNDER_WAY
            asking.cancel()
            gate.set()
            mn = serve(w, a_context(500, mn="198.51.101.1"), at=AWAY, nsg="c")
            assert mn.says(await w.sides["c"].agent.ctar(*mn.arrive())) is Status.OK

    run(scenario())


def test_a_peer_that_sends_without_end_is_read_slowly() -> None:
    """Whatever it sends: here cancellations of nothing, which are answered by nothing."""

    async def scenario() -> None:
        async with world() as w:
            link = await w.b.agent._running().get(w.b.agent._peer("a"))
            began, heard = wall(), []
            w.a.engine.transfers.cancelled = lambda peer, message: heard.append(wall() - began)  # type: ignore[method-assign]
            for _ in range(4 * MESSAGES):
                link.send(Ctc(ip_address("198.51.100.7")))
            await until(lambda: len(heard) == 4 * MESSAGES)
            assert heard[2 * MESSAGES - 1] < 0.1
            assert heard[-1] == pytest.approx(2.0, abs=0.1)

    run(scenario())
