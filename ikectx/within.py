"""`within` and `Limit`: limits of time for work that mostly ends soon (asyncio, no sockets)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar
from weakref import WeakKeyDictionary

_T = TypeVar("_T")


async def within(seconds: float, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of the work. Errors: its own; TimeoutError after so many seconds.

    The work begins without a limit, and gets one when it waits for the first time. An agent runs some thirty
    steps for each SA that moves, few of which wait.
    """
    try:
        waits = work.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    with Limit(seconds):
        return await _Rest(work, waits)


class Limit:
    """A context manager whose block raises TimeoutError after so many seconds, as `asyncio.timeout` does.

    All limits of an event loop share one timer, because a timer of its own costs as much as a short step, and
    nearly all blocks end long before their limit.
    """

    __slots__ = ("_before", "_running", "_seconds", "_task", "due", "over")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.over = False
        """Whether its time was over."""

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None:
            raise RuntimeError("a limit of time outside of a task")
        self._task, self._before = task, task.cancelling()
        running = _limits.get(loop)
        if running is None:
            running = _limits[loop] = _Running()
        self._running = running
        self.due = loop.time() + self._seconds
        running.add(self, loop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.limits.discard(self)
        if self.over and self._task.uncancel() <= self._before and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def end(self) -> None:
        """Its time is over."""
        self.over = True
        self._task.cancel()


class _Running:
    """The limits that are running on one event loop. It does not hold the loop, which ends with its work."""

    def __init__(self) -> None:
        self.limits: set[Limit] = set()
        self._due: float | None = None
        """When the next timer ends, by the loop's clock."""

    def add(self, limit: Limit, loop: asyncio.AbstractEventLoop) -> None:
        self.limits.add(limit)
        if self._due is None or limit.due < self._due:
            self._arm(limit.due, loop)

    def _arm(self, due: float, loop: asyncio.AbstractEventLoop) -> None:
        self._due = due
        loop.call_at(due, self._look, loop, due)

    def _look(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        """End those whose time is over. A timer stays for a limit that has ended before its time, and for one
        that has become the second."""
        if due != self._due:
            return
        self._due, now = None, loop.time()
        for limit in [limit for limit in self.limits if limit.due <= now]:
            self.limits.discard(limit)
            limit.end()
        if self.limits:
            self._arm(min(limit.due for limit in self.limits), loop)


_limits: WeakKeyDictionary[asyncio.AbstractEventLoop, _Running] = WeakKeyDictionary()


class _Rest(Generic[_T]):
    """What is left of work that waits for `waits`."""

    __slots__ = ("_waits", "_work")

    def __init__(self, work: Coroutine[Any, Any, _T], waits: Any) -> None:
        self._work = work
        self._waits = waits

    def __await__(self) -> Generator[Any, Any, _T]:
        waits = self._waits
        try:
            while True:
                try:
                    value = yield waits
                except BaseException as error:
                    waits = self._work.throw(error)
                else:
                    waits = self._work.send(value)
        except StopIteration as end:
            result: _T = end.value
            return result
