"""Agents that die at every moment, and what their next start makes of the journal.

Throughout: never two senders for one SA, no sequence number used twice, and in the end exactly one owner.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from ikectx.errors import CharonError, LinkError
from ikectx.wire.cxtp import Ctd
from tests.hand_loop import run
from tests.peers import a_context, losing, lossy
from tests.worlds import FAST, one_move, quietly, until, until_dead_or_done, world


async def _moments(fails: str) -> dict[str, int]:
    """How many moments each agent has in this transfer at which it could die."""
    async with world() as w:
        if fails:
            w.b.daemon.fail[fails] = [LinkError("silent")]
        await one_move(w)
        await w.quiet()
        return {name: side.fuse.count for name, side in w.sides.items()}


@pytest.mark.parametrize("fails", ["", "move", "prepare"])
@pytest.mark.parametrize("victim", ["a", "b"])
def test_an_agent_that_dies_at_any_moment(victim: str, fails: str) -> None:
    """Before and after each write of the journal, and before and after each step takes effect."""

    async def crash_at(moment: int) -> str:
        async with world(crash=(victim, moment)) as w:
            if fails:
                w.b.daemon.fail[fails] = [LinkError("silent")]
            sa = w.a.daemon.serve(a_context())
            side = w.sides[victim]
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await until_dead_or_done(side, moving)
            assert side.fuse.blown
            assert w.ether.slips == []
            await side.restart()
            await w.quiet()
            moving.cancel()
            await asyncio.gather(moving, return_exceptions=True)
            return w.owner(sa)

    async def scenario() -> None:
        moments = (await _moments(fails))[victim]
        assert moments >= 6
        owners = [await crash_at(moment) for moment in range(1, moments + 1)]
        # it may end either way, but both gateways stay of one mind: once b, never a again
        assert owners == sorted(owners) or fails

    with quietly():
        run(scenario())


STEPS = ("check", "prepare", "take", "move", "activate", "undo", "freeze", "thaw", "release")


@pytest.mark.parametrize("seed", range(12))
def test_anything_may_happen(seed: int) -> None:
    """Links break, steps fail and agents die, all by dice: in the end there is one owner who is sane."""

    async def scenario() -> None:
        dice = random.Random(seed)
        async with world() as w:
            sa = w.a.daemon.serve(a_context())
            at = "a"
            for turn in range(4):
                w.network.fate = lossy(dice.randrange(1000), 0.25)
                for side in w.sides.values():
                    for step in STEPS:
                        some = [CharonError("by dice")] * (dice.random() < 0.15)
                        side.daemon.fail[dice.choice([step, f"after:{step}"])] = list(some)
                victim = dice.choice(["a", "b", ""])
                if victim:
                    await w.sides[victim].kill()
                    await w.sides[victim].start(dice.randint(1, 25))
                to = "b" if at == "a" else "a"
                moving = asyncio.create_task(w.sides[at].agent.transfer(sa, to))
                if victim:
                    await until_dead_or_done(w.sides[victim], moving)
                    w.network.fate = lambda message: "deliver"
                    await w.sides[victim].restart()
                await asyncio.wait({moving}, timeout=0.3)
                w.network.fate = lambda message: "deliver"
                await w.quiet()
                moving.cancel()
                await asyncio.gather(moving, return_exceptions=True)
                at = w.owner(sa)
                assert turn < 4

    with quietly():
        run(scenario())


def test_recovery_says_what_it_does() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa = w.a.daemon.serve(a_context())
            w.network.fate = losing(Ctd)
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await until(lambda: any(isinstance(message, Ctd) for message in w.network.seen))
            await w.a.kill()
            await w.b.kill()
            moving.cancel()
            await w.b.start()
            w.network.up.clear()
            await w.a.start()
            assert await w.a.agent.recover() == []  # start did it
            open_one = w.a.only_open()
            assert open_one["state"] == "released"
            w.network.up["b"] = w.b.agent
            w.network.fate = lambda m: "deliver"
            await w.quiet()
            assert w.owner(sa) == "a"  # b's new agent had undone what was prepared

    run(scenario())


def test_a_peer_gone_from_the_configuration_does_not_stop_the_start() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, in_doubt=0.02)) as w:
            w.network.fate = losing(Ctd)
            sa, doubt = await one_move(w)
            await w.a.kill()
            w.names = ("a",)
            await w.a.start()
            w.network.kill("b")
            report = await w.a.agent.resolve(doubt.transfer_id, "reclaim")
            assert report.result == "kept"
            await w.quiet()
            assert w.owner(sa) == "a"

    run(scenario())
