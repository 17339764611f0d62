"""Work with a limit of time: with and without waiting, cancelled, and too long."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from ikectx.within import within
from tests.hand_loop import HandLoop

_T = TypeVar("_T")


def run(work: Coroutine[Any, Any, _T]) -> _T:
    with asyncio.Runner(loop_factory=HandLoop) as runner:
        return runner.run(work)


async def result(pauses: int, error: Exception | None = None) -> int:
    for _ in range(pauses):
        await asyncio.sleep(0.001)
    if error is not None:
        raise error
    return pauses


@pytest.mark.parametrize("pauses", [0, 1, 3])
def test_the_result_and_the_error_are_those_of_the_work(pauses: int) -> None:
    assert run(within(5.0, result(pauses))) == pauses
    with pytest.raises(ValueError, match="its own"):
        run(within(5.0, result(pauses, ValueError("its own"))))


def test_work_that_takes_too_long_is_cancelled() -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    with pytest.raises(TimeoutError):
        run(within(0.01, endless()))
    assert ended == ["ended"]


def test_a_limit_within_a_limit_ends_only_its_own_work() -> None:
    async def outer() -> str:
        try:
            return str(await within(0.01, result(1000)))
        except TimeoutError:
            return await within(5.0, asyncio.sleep(0.001, "goes on"))

    assert run(within(5.0, outer())) == "goes on"


def test_who_is_cancelled_cancels_the_work() -> None:
    async def scenario() -> None:
        ended = asyncio.Event()

        async def endless() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.set()
                raise

        task = asyncio.create_task(within(5.0, endless()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    run(scenario())


def test_limits_that_share_a_timer_end_none_too_early() -> None:
    async def scenario() -> None:
        begun = asyncio.get_running_loop().time()

        async def ended_after(seconds: float) -> float:
            with pytest.raises(TimeoutError):
                await within(seconds, result(1 << 20))
            return asyncio.get_running_loop().time() - begun

        ended = await asyncio.gather(*(ended_after(seconds) for seconds in (0.3, 0.1, 0.2)))
        assert ended == pytest.approx([0.3, 0.1, 0.2])

    run(scenario())


def test_work_that_ends_in_time_leaves_the_limits_of_others_alone() -> None:
    async def scenario() -> None:
        endless = asyncio.create_task(within(0.05, result(1 << 20)))
        assert await within(5.0, result(1)) == 1
        with pytest.raises(TimeoutError):
            await endless

    run(scenario())


def test_who_is_cancelled_when_the_time_is_over_is_cancelled() -> None:
    async def scenario() -> None:
        async def stubborn() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                task.cancel()  # from elsewhere, just when the limit ends the work
                await asyncio.sleep(0)
                raise

        task = asyncio.create_task(within(0.01, stubborn()))
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())


def test_a_loop_that_has_ended_is_not_kept() -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(within(5.0, result(1)))
    loop.close()
    gone = weakref.ref(loop)
    del loop
    gc.collect()
    assert gone() is None
