"""Toggles of charon's segments: what they ask of charon, and whom they activate."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from typing import Any

import pytest

from ikectx.errors import CharonError
from ikectx.sa.name import SaName
from tests import hand_loop
from tests.vici_bridge.test_deadlines import SA, MemoryStore
from vici_bridge.deadlines import Deadlines
from vici_bridge.ha.messages import HaMessage, HaType
from vici_bridge.segments import FEW, SOON, Segments
from vici_bridge.vici.views import SaView

NEW = SaName(b"new new ", b"sa sa sa")


class Side:
    """A charon with one SA of its own."""

    def __init__(self) -> None:
        self.deadlines = Deadlines(MemoryStore())
        self.asked: list[str] = []
        self.sent: list[HaType] = []
        self.setting_up = 0
        self.sas: list[SaView] = [SA]
        self.unknown: set[SaName] = set()
        """SAs whose unique IDs are not known."""
        self.error: CharonError | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    async def half_open(self) -> int:
        self.asked.append("half-open")
        self.setting_up -= bool(self.setting_up)
        return self.setting_up

    async def views(self) -> list[SaView]:
        self.asked.append("all")
        return self.sas

    async def view(self, sa: SaName, *, search: bool = True) -> SaView | None:
        assert not search
        self.asked.append("one")
        return next((view for view in self.sas if view.spis == sa and sa not in self.unknown), None)

    async def version(self) -> int:
        return 3

    async def send(self, messages: Iterable[HaMessage]) -> None:
        if self.error is not None:
            raise self.error
        self.sent += [message.type for message in messages]

    def served(self) -> list[SaName]:
        return [view.spis for view in self.sas]

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def more(number: int) -> list[SaView]:
    return [replace(SA, spi_i=n.to_bytes(8)) for n in range(1, number + 1)]


def test_only_sas_that_came_up_since_the_last_toggle_are_asked_for() -> None:
    async def scenario() -> None:
        side = Side()
        segments = Segments(side)
        side.sas += more(FEW - 1)
        for _ in range(3):
            await segments.activate()
        assert [side.asked.count(what) for what in ("one", "all")] == [FEW, 0]
        assert side.sent == [HaType.SEGMENT_TAKE, HaType.SEGMENT_DROP] * 3
        side.sas.append(replace(SA, spi_i=NEW.spi_i, spi_r=NEW.spi_r))
        await segments.activate()
        await segments.activate()
        assert [side.asked.count(what) for what in ("one", "all")] == [FEW + 1, 0]
        assert side.deadlines.unseen(side.served()) == []

    asyncio.run(scenario())


def test_all_sas_are_listed_where_many_came_up_or_one_cannot_be_asked_for() -> None:
    async def scenario() -> None:
        side = Side()
        side.sas += more(FEW)
        segments = Segments(side)
        await segments.activate()
        await segments.activate()
        assert [side.asked.count(what) for what in ("one", "all")] == [0, 1]
        side.sas.append(replace(SA, spi_i=NEW.spi_i, spi_r=NEW.spi_r))
        side.unknown.add(NEW)
        await segments.activate()
        await segments.activate()
        assert [side.asked.count(what) for what in ("one", "all")] == [1, 2]
        assert side.deadlines.unseen(side.served()) == []

    asyncio.run(scenario())


def test_half_open_sas_are_waited_for() -> None:
    async def scenario() -> None:
        side = Side()
        side.setting_up = 3
        await Segments(side).pause()
        assert side.asked.count("half-open") == 3
        assert side.sent == [HaType.SEGMENT_DROP, HaType.SEGMENT_TAKE]

    asyncio.run(scenario())


def test_one_toggle_is_for_all_that_came_before_it() -> None:
    async def scenario() -> None:
        side = Side()
        segments = Segments(side)
        many = [SaName(bytes([number]) * 8, bytes(8)) for number in range(20)]
        for sa in many:
            segments.came(sa)
        await asyncio.gather(*map(segments.activate, many[:10]))
        assert len(side.sent) == 2
        for sa in many[10:]:
            await segments.activate(sa)
        assert len(side.sent) == 2, "they are active already"
        await segments.activate(many[0])
        assert len(side.sent) == 4, "whoever asks again has found it PASSIVE"
        segments.came(NEW)
        segments.gone(NEW)
        await segments.activate(NEW)
        assert len(side.sent) == 6

    asyncio.run(scenario())


def test_only_a_toggle_soon_after_another_one_waits() -> None:
    async def scenario() -> None:
        loop, segments = asyncio.get_running_loop(), Segments(Side())
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
        segments = Segments(side)
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
        segments = Segments(side)
        other = SaName(bytes(8), bytes(8))
        for sa in (NEW, other):
            segments.came(sa)
        side.error = CharonError("charon has not read its HA socket for a second")
        with pytest.raises(CharonError):
            await segments.activate(NEW)
        side.error = None
        await segments.activate(NEW)
        assert len(side.sent) == 2
        await segments.activate(other)
        assert len(side.sent) == 2, "the toggle that was sent was for both"

    asyncio.run(scenario())
