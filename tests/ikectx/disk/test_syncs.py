"""When the store's log is synced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from ikectx.disk.store import SqliteStore
from ikectx.disk.syncs import REST, Syncs
from tests.hand_loop import HandLoop, run


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Beginning and end of each sync, which takes half a second, by the event loop's clock."""
    found: list[tuple[float, float]] = []

    async def sync(loop: asyncio.AbstractEventLoop) -> None:
        began = loop.time()
        await asyncio.sleep(0.5)
        found.append((began, loop.time()))

    def thread(
        loop: asyncio.AbstractEventLoop, _executor: None, _work: Callable[..., Any]
    ) -> asyncio.Future[None]:
        return loop.create_task(sync(loop))

    monkeypatch.setattr(HandLoop, "run_in_executor", thread)
    return found


def rounded(took: list[tuple[float, float]], start: float) -> list[tuple[float, float]]:
    return [(round(began - start, 3), round(ended - start, 3)) for began, ended in took]


def test_the_earliest_time_counts_and_one_runs_at_a_time(took: list[tuple[float, float]]) -> None:
    async def scenario() -> None:
        with SqliteStore(":memory:", bytes(32)) as store:
            syncs, start = Syncs(store), asyncio.get_running_loop().time()
            syncs.within(1.0)
            syncs.within(0.1)
            syncs.within(3.0)
            await asyncio.sleep(0.2)
            syncs.within(0.0)  # what is written while one runs is in the next
            await asyncio.sleep(2.0)
            assert rounded(took, start) == [(0.1, 0.6), (0.6, 1.1)]
            syncs.within(0.0)
            await asyncio.sleep(1.0)
            assert rounded(took, start)[2:] == [(2.2, 2.7)]

    run(scenario())


def test_who_waits_for_a_sync_waits_for_one_that_began_after_it_asked(
    took: list[tuple[float, float]],
) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with SqliteStore(":memory:", bytes(32)) as store:
            syncs, start = Syncs(store), loop.time()
            await syncs.now()
            assert rounded(took, start) == [(0.0, 0.5)]
            syncs.within(0.0)
            await asyncio.sleep(0.1)
            await asyncio.gather(syncs.now(), syncs.now())  # one for both, behind the one that has begun
            assert rounded(took, start)[1:] == [(0.5, 1.0), (1.0, 1.5)]
            syncs.within(5.0)
            await syncs.now()
            await asyncio.sleep(10.0)
            assert rounded(took, start)[3:] == [(1.5, 2.0)]
            syncs.close()
            await syncs.now()
            assert len(took) == 4

    run(scenario())


def test_none_begins_behind_the_end(took: list[tuple[float, float]]) -> None:
    async def scenario() -> None:
        with SqliteStore(":memory:", bytes(32)) as store:
            syncs = Syncs(store)
            syncs.within(0.1)
            syncs.close()
            syncs.within(0.0)
            await asyncio.sleep(1.0)
            assert took == []

    run(scenario())


def test_any_note_is_synced_soon_and_so_is_that_it_was_deleted(took: list[tuple[float, float]]) -> None:
    """A gateway that lost its power sent packets on to another one that had no SA for them any more."""

    async def scenario() -> None:
        with SqliteStore(":memory:", bytes(32)) as store:
            syncs, start = Syncs(store), asyncio.get_running_loop().time()
            store.put("away", "a", b"note")
            store.put("away", "b", b"note")
            await asyncio.sleep(3.0)
            store.delete("away", "a")
            await asyncio.sleep(3.0)
            assert rounded(took, start) == [(REST, REST + 0.5), (3 + REST, 3.5 + REST)]
            syncs.close()
            store.delete("away", "b")
            await asyncio.sleep(3.0)
            assert len(took) == 2

    run(scenario())
