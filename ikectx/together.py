"""`Together`, `Gather`: what comes at about the same time from several is gone on with once (asyncio)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Generic, TypeVar, cast

_T = TypeVar("_T")
_R = TypeVar("_R")


class Crowd:
    """How many SAs there is work on: a context manager around the work on each."""

    __slots__ = ("_many",)

    def __init__(self) -> None:
        self._many = 0

    def __enter__(self) -> None:
        self._many += 1

    def __exit__(self, *_: object) -> None:
        self._many -= 1

    @property
    def alone(self) -> bool:
        """Whether there is work on one SA only, which has no others to wait for."""
        return self._many == 1


class Together(Generic[_T, _R]):
    """`do` gets all items of one round, and returns a result for each. Its error is everybody's.

    SAs that move together come to the same effect in the same round, and one call of the kernel or the disk
    for all of them costs little more than one for a single SA. One that is alone in the `crowd` waits for no
    others: a wait takes two to four rounds, of some 100 that a move takes.
    """

    def __init__(
        self,
        do: Callable[[Sequence[_T]], Awaitable[Sequence[_R]] | Sequence[_R]],
        crowd: Crowd | None = None,
    ) -> None:
        self._do = do
        self._crowd = crowd
        self._items: list[_T] = []
        self._waiting: list[asyncio.Future[_R]] = []

    async def join(self, item: _T) -> _R:
        """The result for the item. Who does not wait any longer stops nothing that is for others, too."""
        if self._crowd is not None and self._crowd.alone and not self._items:
            found = self._do([item])
            results = found if isinstance(found, list | tuple) else await cast(Awaitable[Sequence[_R]], found)
            return results[0]
        loop = asyncio.get_running_loop()
        if not self._items:
            loop.call_soon(self._all)
        future: asyncio.Future[_R] = loop.create_future()
        self._items.append(item)
        self._waiting.append(future)
        return await future

    def _all(self) -> None:
        items, self._items = self._items, []
        waiting, self._waiting = self._waiting, []
        try:
            found = self._do(items)
        except BaseException as error:
            _fail(waiting, error)
            return
        if isinstance(found, list | tuple):  # the test for a Sequence takes as long as a short step
            _end(waiting, found)
        else:
            assert isinstance(found, Awaitable)
            asyncio.ensure_future(found).add_done_callback(partial(_ended, waiting))


def _ended(waiting: list[asyncio.Future[_R]], task: asyncio.Future[Sequence[_R]]) -> None:
    if task.cancelled():
        for future in waiting:
            future.cancel()
    elif (error := task.exception()) is not None:
        _fail(waiting, error)
    else:
        _end(waiting, task.result())


def _end(waiting: list[asyncio.Future[_R]], results: Sequence[_R]) -> None:
    for future, result in zip(waiting, results, strict=True):
        if not future.done():
            future.set_result(result)


def _fail(waiting: list[asyncio.Future[_R]], error: BaseException) -> None:
    for future in waiting:
        if not future.done():
            future.set_exception(error)


class Gather(Generic[_T]):
    """`give` gets together what ends within `seconds` (s) of the first, while more is under way. What ends
    last, or alone, goes on at once."""

    def __init__(self, seconds: float, give: Callable[[Sequence[_T]], None]) -> None:
        self._seconds = seconds
        self._give = give
        self._under_way = 0
        self._ended: list[_T] = []
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """One more is under way."""
        self._under_way += 1

    def end(self, item: _T) -> None:
        """One has ended, with this."""
        self._under_way -= 1
        self._ended.append(item)
        if not self._under_way:
            self._all()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._all)

    def close(self) -> None:
        """Drop what ended and was not given yet. The caller has cancelled what is under way."""
        self._ended = []
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _all(self) -> None:
        self._stop_timer()
        ended, self._ended = self._ended, []
        self._give(ended)
