"""Relayed mobile nodes are told the addresses of the gateway that serves them, once each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ikectx.errors import BusyError, LinkError
from ikectx.sa.name import SaName
from vici_bridge import announcing


class Host:
    """Two relayed mobile nodes."""

    def __init__(self) -> None:
        self.origins: Any = self
        self.left = [SaName(b"busy....", b"responde"), SaName(b"silent..", b"responde")]

    def unannounced(self, seconds: float) -> list[SaName]:
        assert seconds == 7
        return list(self.left)

    def announced(self, sa: SaName) -> None:
        self.left.remove(sa)


def test_one_that_is_busy_is_told_later_and_one_that_is_silent_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(announcing, "LOOK", 0.001)
    asked: list[bytes] = []
    host: Any = Host()

    async def announce(sa: SaName) -> None:
        asked.append(sa.spi_i)
        if sa.spi_i == b"silent..":
            raise LinkError("silent")
        if asked.count(sa.spi_i) < 3:
            raise BusyError("an exchange is in flight")

    async def scenario() -> None:
        task = asyncio.create_task(announcing.announce_to_relayed(host, 7, announce))
        while host.left:
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 10))
    assert asked.count(b"busy....") == 3 and asked.count(b"silent..") == 1
