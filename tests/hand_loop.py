"""An event loop whose clock jumps to the next timer when nothing else is left to do.

What waits costs no time, and a slow machine makes no timer come early. For what is all in memory: a loop
with sockets would not wait for them.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any


class _Jumping(selectors.DefaultSelector):
    """Looks what is ready, and lets the loop's clock jump where the loop would sleep."""

    loop: HandLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self.loop.threads:
            return super().select(None)  # what they do takes no time, and wakes the loop
        assert timeout is not None, "nothing will ever happen any more"
        self.loop.now += max(0.0, timeout)
        return []


class HandLoop(asyncio.SelectorEventLoop):
    """`now`: seconds, not since anything."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.threads = 0
        selector = _Jumping()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:
        self.threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_ended)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Waits for its threads, which a loop that jumps must not take for nothing; without limit."""
        self.threads += 1
        await super().shutdown_default_executor()
        self.threads -= 1

    def _thread_ended(self, _: object) -> None:
        self.threads -= 1


class StandingLoop(asyncio.SelectorEventLoop):
    """For what has sockets: the clock stands until the test puts it on, so that no limit of time is over
    because the machine is busy. What waits for time alone waits for `now`, in seconds, not since anything."""

    now = 1000.0

    def time(self) -> float:
        return self.now


def run_standing(scenario: Callable[[StandingLoop], Awaitable[None]]) -> None:
    """Only pytest's limit of time bounds it."""
    with asyncio.Runner(loop_factory=StandingLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, StandingLoop)

        async def whole() -> None:
            await scenario(loop)

        runner.run(whole())


async def comes(there: Callable[[], object]) -> None:
    """Wait until it is so while the clock stands."""
    while not there():
        await asyncio.sleep(0)


class LoopClock:
    """`ports.Clock`: the time of the loop that runs."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()


def wall() -> float:
    """Seconds since 1970 by the same clock: whole ones when the loop begins."""
    return 1_795_000_000 + asyncio.get_running_loop().time()


def run(scenario: Awaitable[None], seconds: float = 60) -> None:
    """So many seconds of the loop's own clock at the most."""

    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await scenario

    with asyncio.Runner(loop_factory=HandLoop) as runner:
        runner.run(bounded())


def run_bounded(scenario: Awaitable[None], seconds: float = 30) -> None:
    """By a loop with the real clock, for what has sockets."""

    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await scenario

    asyncio.run(bounded())
