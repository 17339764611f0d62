"""MNs that hand over while agents die, links break and steps fail: one owner, and no wrong word."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from ikectx.engine.journal import JournalEntry
from ikectx.errors import CharonError, LinkError
from ikectx.numbers import Status
from ikectx.wire.cxtp import Ctc
from ikectx.wire.tokens import Purpose
from tests.across.test_by_packet import HERE, NEW, probe
from tests.hand_loop import run
from tests.mobile_nodes import AWAY, MobileNode, serve
from tests.peers import CountedStore, a_context, lossy
from tests.worlds import ALL, FAST, World, quietly, until, until_dead_or_done, world

SOON = replace(FAST, predictive=0.08, request=0.15, offer=0.1, confirm=0.05, hold=0.08)


async def predictive(w: World, mn: MobileNode) -> bytes | None:
    await w.a.agent.ctar(*mn.announce())
    await asyncio.sleep(0.002)
    return await w.b.agent.ctar(*mn.arrive())


async def reactive(w: World, mn: MobileNode) -> bytes | None:
    return await w.b.agent.ctar(*mn.arrive())


async def packet(w: World, mn: MobileNode) -> bytes | None:
    await w.b.agent.packet(probe(mn.context), HERE, NEW, ["a"])
    return None


async def pull(w: World, mn: MobileNode) -> bytes | None:
    await w.b.agent.pull("a", mn.home)
    return None


Way = Callable[[World, MobileNode], Awaitable[bytes | None]]
WAYS: list[Way] = [predictive, reactive, packet, pull]


async def _moments(way: Way, fails: str) -> dict[str, int]:
    async with world(timing=SOON, rights=ALL) as w:
        if fails:
            w.b.daemon.fail[fails] = [LinkError("silent")]
        await way(w, serve(w, a_context()))
        await w.quiet()
        return {name: side.fuse.count for name, side in w.sides.items()}


@pytest.mark.parametrize("fails", ["", "activate"])
@pytest.mark.parametrize("victim", ["a", "b"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_agent_that_dies_at_any_moment(way: Way, victim: str, fails: str) -> None:
    """Before and after each write of the journal, and before and after each step takes effect."""

    async def crash_at(moment: int) -> str:
        async with world(timing=SOON, rights=ALL, crash=(victim, moment)) as w:
            if fails:
                w.b.daemon.fail[fails] = [LinkError("silent")]
            mn = serve(w, a_context())
            side = w.sides[victim]
            moving = asyncio.ensure_future(way(w, mn))
            await until_dead_or_done(side, moving)
            assert w.ether.slips == []
            await side.restart()
            if victim == "b":
                moving.cancel()
            answer = (await asyncio.gather(moving, return_exceptions=True))[0]
            await w.quiet()
            owner = w.owner(mn.sa)
            said = mn.says(answer) if isinstance(answer, bytes) else None
            if said is not None:
                assert (said is Status.OK) == (owner == "b")
            if owner == "b" and way is not pull:
                assert w.b.daemon.served[mn.sa].remote == AWAY
            # nothing is left in the way of the next try
            mn.sequence += 1
            mn.psg, mn.nsg = (owner, "b" if owner == "a" else "a")
            mn.context = w.sides[owner].daemon.served[mn.sa]
            w.b.daemon.fail.clear()
            assert mn.says(await w.sides[mn.nsg].agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == mn.nsg
            return owner

    async def scenario() -> None:
        moments = (await _moments(way, fails))[victim]
        assert moments >= 4
        for moment in range(1, moments + 1):
            await crash_at(moment)

    with quietly():
        run(scenario(), 100)


@pytest.mark.parametrize("seed", range(8))
def test_anything_may_happen(seed: int) -> None:
    """Links break, steps fail and agents die, all by dice: in the end there is one owner who is sane."""

    async def scenario() -> None:
        dice = random.Random(seed)
        async with world(timing=SOON, rights=ALL) as w:
            mn = serve(w, a_context())
            at = "a"
            for turn in range(4):
                to = "b" if at == "a" else "a"
                mn = replace(mn, sequence=turn, psg=at, nsg=to, context=w.sides[at].daemon.served[mn.sa])
                w.network.fate = lossy(dice.randrange(1000), 0.2)
                for side in w.sides.values():
                    step = dice.choice(["check", "prepare", "take", "activate", "undo", "freeze", "thaw"])
                    some = [CharonError("by dice")] * (dice.random() < 0.2)
                    side.daemon.fail[dice.choice([step, f"after:{step}"])] = list(some)
                victim = dice.choice(["a", "b", ""])
                if victim:
                    await w.sides[victim].kill()
                    await w.sides[victim].start(dice.randint(1, 25))
                moving = asyncio.ensure_future(_somehow(w, mn, dice, to))
                if victim:
                    await until_dead_or_done(w.sides[victim], moving)
                    await w.sides[victim].kill()
                    w.network.fate = lambda message: "deliver"
                    await w.sides[victim].start()
                await asyncio.wait({moving}, timeout=1.0)
                w.network.fate = lambda message: "deliver"
                moving.cancel()
                await asyncio.gather(moving, return_exceptions=True)
                await w.quiet()
                at = w.owner(mn.sa)

    with quietly():
        run(scenario(), 100)


async def _somehow(w: World, mn: MobileNode, dice: random.Random, to: str) -> None:
    kind = dice.choice(["predictive", "reactive", "packet", "pull"])
    agent = w.sides[to].agent
    if kind == "packet":
        await agent.packet(probe(mn.context), HERE, NEW, [mn.psg])
    elif kind == "pull":
        await agent.pull(mn.psg, mn.home)
    else:
        if kind == "predictive":
            await w.sides[mn.psg].agent.ctar(*mn.announce())
            await asyncio.sleep(dice.random() * 0.02)
        await agent.ctar(*mn.arrive())
        await agent.ctar(*mn.arrive())


# -- what a restart finds --------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["a", "b"])
def test_what_was_announced_vanishes_with_either_agent(victim: str) -> None:
    async def scenario() -> None:
        async with world(timing=SOON) as w:
            mn = serve(w, a_context())
            assert mn.says(await w.a.agent.ctar(*mn.announce()), Purpose.ANNOUNCE) is Status.OK
            await w.sides[victim].restart()
            if victim == "a":
                # and b need not wait for it
                await until(lambda: any(isinstance(message, Ctc) for message in w.network.seen))
            await w.quiet()
            assert w.owner(mn.sa) == "a"
            assert w.b.daemon.calls == ["check"]
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"

    run(scenario())


def test_an_mn_that_arrives_while_psg_still_waits_at_a_restarted_nsg() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            assert mn.says(await w.a.agent.ctar(*mn.announce()), Purpose.ANNOUNCE) is Status.OK
            await w.b.restart()
            assert w.a.only_open()["state"] == "awaiting"
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"

    run(scenario())


def test_the_mn_s_place_survives_a_restart() -> None:
    async def scenario() -> None:
        for way in (predictive, reactive):
            async with world(timing=SOON) as w:
                mn = serve(w, a_context())
                gate = w.b.daemon.wait["activate"] = asyncio.Event()
                moving = asyncio.ensure_future(way(w, mn))
                await w.b.reaches("activate")
                await w.b.kill()
                moving.cancel()
                gate.set()
                await w.b.start()
                await w.quiet()
                assert w.owner(mn.sa) == "b"
                assert w.b.daemon.served[mn.sa].remote == AWAY

    run(scenario())


def test_an_mn_whose_answer_was_lost_with_its_gateway_gets_one_from_the_next_agent() -> None:
    async def scenario() -> None:
        for way in (predictive, reactive):
            async with world() as w:
                mn = serve(w, a_context())
                if way is predictive:
                    await w.a.agent.ctar(*mn.announce())
                ctar = mn.arrive()
                gate = w.b.daemon.wait["activate"] = asyncio.Event()
                moving = asyncio.ensure_future(w.b.agent.ctar(*ctar))
                await w.b.reaches("activate")
                await w.b.kill()
                moving.cancel()
                gate.set()
                await w.b.start()
                await w.quiet()
                assert w.owner(mn.sa) == "b"
                assert mn.says(await w.b.agent.ctar(*ctar)) is Status.OK
                # but no other CTAR does
                forged = replace(ctar[0], token=1)
                assert await w.b.agent.ctar(forged, ctar[1]) is None
                assert w.a.daemon.calls.count("freeze") == 1

    run(scenario())


def test_a_psg_killed_while_it_offers_tells_nsg_when_it_is_back() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa = w.a.daemon.serve(a_context())
            w.a.daemon.wait["freeze"] = asyncio.Event()
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await w.b.reaches("prepare")
            await w.a.kill()
            moving.cancel()
            gate.set()
            await until(lambda: sa in w.b.daemon.passive)
            began = asyncio.get_running_loop().time()
            await w.a.start()
            await w.quiet()
            assert asyncio.get_running_loop().time() - began < FAST.hold
            assert w.owner(sa) == "a"

    run(scenario())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_journal_that_cannot_be_written_lets_nothing_slip(way: Way, side: str) -> None:
    async def scenario() -> None:
        states = await _states(way, side)
        assert len(states) > 2
        for state in states:
            async with world(timing=SOON, rights=ALL) as w:
                mn = serve(w, a_context())
                store = w.sides[side].store
                store.broken = state
                moving = asyncio.ensure_future(way(w, mn))
                await refused_or_done(store, moving)
                await asyncio.sleep(0.01)
                assert w.ether.slips == []
                store.broken = ""
                answer = await moving
                await asyncio.sleep(0.01)
                await w.sides[side].restart()
                await w.quiet()
                owner = w.owner(mn.sa)
                said = mn.says(answer)
                assert said is None or (said is Status.OK) == (owner == "b"), state

    with quietly():
        run(scenario(), 100)


async def refused_or_done(store: CountedStore, work: asyncio.Future[Any]) -> None:
    await until(lambda: work.done() or store.refused)


async def _states(way: Way, side: str) -> list[str]:
    """All that the journal of that side is told."""
    found: list[str] = []
    async with world(timing=SOON, rights=ALL) as w:
        store = w.sides[side].store
        write = store.write

        def noted(entry: JournalEntry, *, durable: bool = True) -> None:
            found.append(entry.state)
            write(entry, durable=durable)

        store.write = noted  # type: ignore[method-assign]
        await way(w, serve(w, a_context()))
        await w.quiet()
    return found
