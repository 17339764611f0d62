"""`within`: a limit of time for work that mostly ends without waiting (asyncio, no sockets)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


async def within(seconds: float, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of the work. Errors: its own; TimeoutError after so many seconds.

    The work begins without a timer, and gets one when it waits for the first time. An agent runs some thirty
    steps for each SA that moves, few of which wait, and a timer costs as much as a short step.
    """
    try:
        waits = work.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    async with asyncio.timeout(seconds):
        return await _Rest(work, waits)


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
