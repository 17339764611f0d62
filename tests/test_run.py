"""What both ends of a transfer share."""

from __future__ import annotations

import asyncio

import pytest

from ikectx.run import Turn

from .hand_loop import run


def test_b26_a_transfer_that_is_cancelled_frees_no_other_ones_turn() -> None:
    async def scenario() -> None:
        lock = asyncio.Lock()
        gone = asyncio.Event()

        async def waits_for_its_mn() -> None:
            """As `Outgoing._await` in `Moves._in_turn`."""
            turn = Turn(lock)
            async with turn:
                turn.give()
                try:
                    gone.set()
                    await asyncio.sleep(0)
                finally:
                    await turn.take()

        waiting = asyncio.create_task(waits_for_its_mn())
        await gone.wait()
        other = Turn(lock)
        async with other:
            await asyncio.sleep(0.01)  # the first one wants its turn back now
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert lock.locked()  # it is the other one's
        assert not lock.locked()

    run(scenario())


def test_a_turn_comes_back_to_who_gave_it() -> None:
    async def scenario() -> None:
        lock = asyncio.Lock()
        turn = Turn(lock)
        async with turn:
            turn.give()
            turn.give()  # nothing is held
            assert not lock.locked()
            await turn.take()
            assert lock.locked()
        assert not lock.locked()

    run(scenario())
