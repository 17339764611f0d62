"""Toggles of charon's segments: what they ask of charon, and whom they activate."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.errors import CharonError
from ikectx.sa.name import SaName
from tests import hand_loop
from vici_bridge.ha.messages import Attr, HaMessage, HaType
from vici_bridge.segments import SOON, Segments

NEW = SaName(b"new new ", b"sa sa sa")
PEER = ip_address("198.51.100.7")
OTHERS = ip_address("10.32.0.1")
"""In segments 5 and 9 of 16."""


class Side:
    """A charon, which notes what it is asked and told."""

    def __init__(self) -> None:
        self.known = self
        self.asked: list[str] = []
        self.sent: list[HaType] = []
        self.of: list[int] = []
        self.setting_up = 0
        self.error: CharonError | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    async def now(self) -> None:
        self.asked.append("known")

    async def half_open(self) -> int:
        self.asked.append("half-open")
        self.setting_up -= bool(self.setting_up)
        return self.setting_up

    async def version(self) -> int:
        return 3

    async def send(self, messages: Iterable[HaMessage]) -> None:
        if self.error is not None:
            raise self.error
        sent = list(messages)
        self.sent += [message.type for message in sent]
        self.of += [message.need(Attr.SEGMENT, int) for message in sent]

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def test_timers_are_noted_before_a_toggle_starts_them_anew() -> None:
    async def scenario() -> None:
        side = Side()
        segments = Segments(side, 1)
        await segments.activate()
        assert side.asked == ["known", "half-open"]
        assert side.sent == [HaType.SEGMENT_TAKE, HaType.SEGMENT_DROP]

    asyncio.run(scenario())


def test_half_open_sas_are_waited_for() -> None:
    async def scenario() -> None:
        side = Side()
        side.setting_up = 3
        await Segments(side, 1).pause()
        assert side.asked.count("half-open") == 3
        assert side.sent == [HaType.SEGMENT_DROP, HaType.SEGMENT_TAKE]

    asyncio.run(scenario())


def test_one_toggle_is_for_all_that_came_before_it() -> None:
    async def scenario() -> None:
        side = Side()
        segments = Segments(side, 1)
        many = [SaName(bytes([number]) * 8, bytes(8)) for number in range(20)]
        for sa in many:
            segments.came(sa, PEER)
        await asyncio.gather(*map(segments.activate, many[:10]))
        assert len(side.sent) == 2
        for sa in many[10:]:
            await segments.activate(sa)
        assert len(side.sent) == 2, "they are active already"
        await segments.activate(many[0])
        assert len(side.sent) == 4, "whoever asks again has found it PASSIVE"
        segments.came(NEW, PEER)
        segments.gone(NEW)
        await segments.activate(NEW)
        assert len(side.sent) == 6

    asyncio.run(scenario())


def test_only_a_toggle_soon_after_another_one_waits() -> None:
    async def scenario() -> None:
        loop, segments = asyncio.get_running_loop(), Segments(Side(), 1)
        began = loop.time()
        await segments.activate()
        assert loop.time() == began
        await segments.activate()
        assert loop.time() == pytest.approx(began + SOON)
        await asyncio.sleep(1)
        await segments.activate()
        assert loop.time() == pytest.approx(began + SOON + 1)

    hand_loop.run(scenario())


def test_a_toggle_that_fails_is_everybodys_and_the_next_goes_on() -> None:
    async def scenario() -> None:
        side = Side()
        segments = Segments(side, 1)
        side.error = CharonError("away")
        for task in [asyncio.create_task(segments.activate(NEW)) for _ in range(3)]:
            with pytest.raises(CharonError, match="away"):
                await task
        side.error = None
        await segments.activate(NEW)
        assert len(side.sent) == 2

    asyncio.run(scenario())


def test_a_toggle_that_fails_has_activated_nobody() -> None:
    async def scenario() -> None:
        side = Side()
        segments = Segments(side, 1)
        other = SaName(bytes(8), bytes(8))
        for sa in (NEW, other):
            segments.came(sa, PEER)
        side.error = CharonError("charon has not read its HA socket for a second")
        with pytest.raises(CharonError):
            await segments.activate(NEW)
        side.error = None
        await segments.activate(NEW)
        assert len(side.sent) == 2
        await segments.activate(other)
        assert len(side.sent) == 2, "the toggle that was sent was for both"

    asyncio.run(scenario())


def test_of_several_segments_only_that_of_the_sa_is_toggled() -> None:
    """A toggle starts the timers of all SAs of a segment anew, and none of them answers IKE meanwhile."""

    async def scenario() -> None:
        side = Side()
        segments = Segments(side, 16)
        first, second, third = (SaName(bytes([number]) * 8, bytes(8)) for number in range(3))
        for sa, peer in ((first, PEER), (second, OTHERS), (third, PEER)):
            segments.came(sa, peer)
        await segments.activate(first)
        assert (side.sent, side.of) == ([HaType.SEGMENT_TAKE, HaType.SEGMENT_DROP], [5, 5])
        await segments.activate(third)
        assert side.of == [5, 5], "it is active already"
        segments.came(first, PEER)
        await asyncio.gather(segments.activate(second), segments.activate(first))
        assert side.of == [5, 5, 5, 5, 9, 9]
        assert side.sent == 3 * [HaType.SEGMENT_TAKE, HaType.SEGMENT_DROP]
        await segments.activate(NEW)
        assert side.of[6:] == [0, 0], "all, for one that came to an agent before this one"
        await segments.pause()
        assert side.of[8:] == [0, 0]

    hand_loop.run(scenario())


def test_a_toggle_that_fails_is_repeated_for_its_segment() -> None:
    async def scenario() -> None:
        side = Side()
        segments = Segments(side, 16)
        segments.came(NEW, OTHERS)
        side.error = CharonError("away")
        with pytest.raises(CharonError):
            await segments.activate(NEW)
        side.error = None
        await segments.activate(NEW)
        assert side.of == [9, 9]

    hand_loop.run(scenario())
