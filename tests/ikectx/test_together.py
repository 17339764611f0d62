"""What several want in one round is done once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Sequence

import pytest

from ikectx.together import Crowd, Gather, Together
from tests.hand_loop import run

Doubled = Callable[[Sequence[int]], Sequence[int]]


def doubling() -> tuple[list[list[int]], Doubled, Callable[[Sequence[int]], Awaitable[Sequence[int]]]]:
    """What was done, and what does it: at once, or in another round."""
    done: list[list[int]] = []

    def both(items: Sequence[int]) -> Sequence[int]:
        done.append(list(items))
        return [item * 2 for item in items]

    async def slowly(items: Sequence[int]) -> Sequence[int]:
        await asyncio.sleep(0)
        return both(items)

    return done, both, slowly


def test_all_items_of_one_round_are_done_at_once() -> None:
    done, both, slowly = doubling()

    async def scenario() -> None:
        for together in (Together(both), Together(slowly)):
            done.clear()
            assert await asyncio.gather(*map(together.join, range(3))) == [0, 2, 4]
            assert await together.join(5) == 10
            assert done == [[0, 1, 2], [5]]

    asyncio.run(scenario())


def test_one_that_is_alone_waits_for_no_others() -> None:
    done, both, slowly = doubling()

    def rounds(work: Coroutine[None, None, int]) -> int:
        """In how many rounds of an event loop it is done: those of coroutines that wait for nothing else."""
        for number in itertools.count():
            try:
                work.send(None)
            except StopIteration as end:
                assert end.value == 10
                return number
        raise AssertionError

    crowd = Crowd()
    with crowd:
        assert rounds(Together(both, crowd).join(5)) == 0
        assert rounds(Together(slowly, crowd).join(5)) == 1
    assert done == [[5], [5]] and not crowd.alone

    async def scenario() -> None:
        done.clear()
        together = Together(both, crowd)
        with crowd, crowd:
            assert await asyncio.gather(*map(together.join, range(3))) == [0, 2, 4]
        assert await asyncio.gather(*map(together.join, range(3))) == [0, 2, 4], "not known how many come"
        assert done == [[0, 1, 2]] * 2

    asyncio.run(scenario())


def test_an_error_is_everybody_s_and_who_leaves_stops_nothing() -> None:
    done: list[int] = []

    def fails(items: Sequence[int]) -> Sequence[None]:
        done.extend(items)
        raise ValueError(len(items))

    async def scenario() -> None:
        together = Together(fails)
        leaves = asyncio.create_task(together.join(1))
        stay = [asyncio.create_task(together.join(number)) for number in (2, 3)]
        await asyncio.sleep(0)
        leaves.cancel()
        for task in stay:
            with pytest.raises(ValueError, match="3"):
                await task
        assert done == [1, 2, 3]

    asyncio.run(scenario())


def test_what_ends_at_about_the_same_time_is_given_together() -> None:
    given: list[tuple[float, list[int]]] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        gather: Gather[int] = Gather(0.03, lambda ended: given.append((loop.time() - began, list(ended))))

        async def one(seconds: float, number: int) -> None:
            gather.begin()
            await asyncio.sleep(seconds)
            gather.end(number)

        # the fourth is late, and ends alone
        await asyncio.gather(*(one(seconds, n) for n, seconds in enumerate((0.001, 0.002, 0.02, 0.5))))
        await one(0.5, 4)
        gather.begin()
        gather.begin()
        gather.end(5)
        gather.close()
        await asyncio.sleep(1.0)

    run(scenario())
    assert given == [
        (pytest.approx(0.031), [0, 1, 2]),
        (pytest.approx(0.5), [3]),
        (pytest.approx(1.0), [4]),
    ]
