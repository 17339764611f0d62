"""What an old gateway still has of an SA's keys when the new one serves it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from ikectx import driver
from ikectx.sa.context import Secret
from tests.hand_loop import run
from tests.peers import a_context
from tests.worlds import Side, one_move, world

FOREIGN = (ModuleType, FunctionType, CodeType, type)


def reachable(root: object, *without: object) -> Iterator[Any]:
    """All objects that can be reached from this one, but not by way of those."""
    seen, left = {id(one) for one in without}, [root]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, FOREIGN):
            continue
        seen.add(id(one))
        yield one
        left += gc.get_referents(one)


def holds(side: Side, secret: bytes) -> list[str]:
    """Which objects of this agent have the secret. charon, kernel and network are others."""
    others = (side.daemon, side.world, asyncio.get_running_loop(), side.events)
    return [
        type(one).__name__
        for one in reachable(side.agent, *others)
        if (isinstance(one, Secret) and one.reveal() == secret) or (isinstance(one, bytes) and secret in one)
    ]


def test_the_old_gateways_agent_has_no_object_with_a_key_of_an_sa_that_it_gave_away() -> None:
    async def scenario() -> None:
        async with world() as w:
            secret = a_context().current.secret.reveal()
            assert len(secret) > 8
            sa, report = await one_move(w)
            await w.quiet()
            assert (w.owner(sa), report.result) == ("b", "moved")
            w.network.seen.clear()
            await asyncio.sleep(driver.ERASE_AFTER + 1)
            assert holds(w.a, secret) == []
            log = w.folder / "a.db-wal"
            assert not log.exists() or log.stat().st_size == 0

    run(scenario())


def test_while_it_moves_the_agent_has_its_keys() -> None:
    """The search finds what is there."""

    async def scenario() -> None:
        async with world() as w:
            secret = a_context().current.secret.reveal()
            w.b.daemon.wait["take"] = asyncio.Event()
            moving = asyncio.create_task(one_move(w))
            await w.b.reaches("take")
            assert holds(w.a, secret)
            w.b.daemon.wait["take"].set()
            await moving

    run(scenario())
