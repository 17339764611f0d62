"""When the store's log is synced, so that it survives a loss of power (I/O: asyncio)."""

from __future__ import annotations

import asyncio

from .store import SqliteStore

REST = 1.0
"""Seconds from any write until the log is synced, with all writes of that time. A note that was deleted must
not come back: after a loss of power packets are sent on, or blocked, by what the store says."""


class Syncs:
    """The syncs of one store, each in another thread, because a disk may take long."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._due: float | None = None
        """The event loop's time at which the next one is to begin; None: all is synced, or being synced."""
        self._timer: asyncio.TimerHandle | None = None
        self._running: asyncio.Future[None] | None = None
        self._closed = False
        self._count = 0
        """Syncs that have begun."""
        store.wrote = self._wrote

    async def now(self) -> None:
        """Have what was written until now survive a loss of power, and wait for that. One that is under way
        may have begun before it was written."""
        wanted = self._count + 1
        while self._count < wanted and not self._closed:
            if self._running is None:
                self._cancel()
                self._begin()
            else:
                await asyncio.wait([self._running])
        if self._running is not None:
            await asyncio.wait([self._running])

    def within(self, seconds: float) -> None:
        """What was written is to be synced within so many seconds; 0: the sync begins before this returns, if
        none is under way."""
        due = asyncio.get_running_loop().time() + seconds
        if self._due is None or due < self._due:
            self._due = due
            self._arm()

    def _wrote(self) -> None:
        self.within(REST)

    def close(self) -> None:
        """Begin none any more."""
        self._closed = True
        self._store.wrote = None
        self._cancel()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        """One sync at a time, because those of a slow disk would take all threads, which others need, too."""
        self._cancel()
        if self._due is None or self._running is not None or self._closed:
            return
        loop = asyncio.get_running_loop()
        if self._due <= loop.time():
            self._begin()
        else:
            self._timer = loop.call_at(self._due, self._begin)

    def _begin(self) -> None:
        self._timer = self._due = None
        self._count += 1
        self._running = asyncio.get_running_loop().run_in_executor(None, self._store.sync)
        self._running.add_done_callback(self._ended)

    def _ended(self, _: asyncio.Future[None]) -> None:
        self._running = None
        self._arm()
