"""Work with a limit of time: with and without waiting, cancelled, and too long."""

from __future__ import annotations

import asyncio

import pytest

from ikectx.within import within


async def result(pauses: int, error: Exception | None = None) -> int:
    for _ in range(pauses):
        await asyncio.sleep(0.001)
    if error is not None:
        raise error
    return pauses


@pytest.mark.parametrize("pauses", [0, 1, 3])
def test_the_result_and_the_error_are_those_of_the_work(pauses: int) -> None:
    assert asyncio.run(within(5.0, result(pauses))) == pauses
    with pytest.raises(ValueError, match="its own"):
        asyncio.run(within(5.0, result(pauses, ValueError("its own"))))


def test_work_that_takes_too_long_is_cancelled() -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    with pytest.raises(TimeoutError):
        asyncio.run(within(0.01, endless()))
    assert ended == ["ended"]


def test_a_limit_within_a_limit_ends_only_its_own_work() -> None:
    async def outer() -> str:
        try:
            return str(await within(0.01, result(1000)))
        except TimeoutError:
            return await within(5.0, asyncio.sleep(0.001, "goes on"))

    assert asyncio.run(within(5.0, outer())) == "goes on"


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

    asyncio.run(scenario())
