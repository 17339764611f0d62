"""Transfers whose end could not be journaled, and what a later start makes of them if the SA moved since."""

from __future__ import annotations

import asyncio

import pytest

from ikectx.errors import KernelError, LinkError
from tests.hand_loop import run
from tests.worlds import one_move, world


def test_a_transfer_that_was_undone_is_not_undone_again_when_its_sa_came_later() -> None:
    """The SA was lost: after the next start the agent deleted what it had taken since."""

    async def scenario() -> None:
        async with world() as w:
            w.b.daemon.fail["prepare"] = [KernelError("no such algorithm", errno=38)]
            w.b.store.broken = "aborted"  # the disk is full just then
            sa, report = await one_move(w)
            assert report.result == "refused"
            assert w.b.store.refused
            w.b.store.broken = ""
            assert (await w.a.agent.transfer(sa, "b")).result == "moved"
            await w.b.restart()
            await w.quiet()
            assert w.owner(sa) == "b"
            assert [one["result"] for one in w.b.agent.history()] == ["moved", "aborted"]

    run(scenario())


@pytest.mark.parametrize("fails", ["freeze", "move"])
def test_a_transfer_that_was_kept_is_not_thawed_again_when_its_sa_left_later(fails: str) -> None:
    """The agent tried for ever to thaw an SA that another gateway serves."""

    async def scenario() -> None:
        async with world() as w:
            daemon = w.a.daemon if fails == "freeze" else w.b.daemon
            daemon.fail[fails] = [LinkError("silent")]
            w.a.store.broken = "kept"
            sa, report = await one_move(w)
            assert report.result == "kept"
            assert w.a.store.refused
            w.a.store.broken = ""
            assert (await w.a.agent.transfer(sa, "b")).result == "moved"
            await w.quiet_but(1)
            thaws = w.a.daemon.calls.count("thaw")
            await w.a.restart()
            await w.quiet()
            await asyncio.sleep(0.1)
            assert w.a.daemon.calls.count("thaw") == thaws
            assert w.owner(sa) == "b"
            assert w.a.store.open_transfers() == []

    run(scenario())


def test_a_late_copy_revives_nothing_that_was_undone() -> None:
    """It asked for a transfer that the journal still had open, whose SA had come in another one since."""

    async def scenario() -> None:
        async with world() as w:
            w.b.daemon.fail["prepare"] = [KernelError("no such algorithm", errno=38)]
            w.b.store.broken = "aborted"
            sa, _ = await one_move(w)
            offer = w.network.seen[0]
            w.b.store.broken = ""
            assert (await w.a.agent.transfer(sa, "b")).result == "moved"
            undone = w.b.daemon.calls.count("undo")
            link = await w.a.agent._running().get(w.a.agent._peer("b"))
            link.send(offer)
            await w.quiet()
            assert w.b.daemon.calls.count("undo") == undone
            assert w.owner(sa) == "b"

    run(scenario())
