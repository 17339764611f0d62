"""Changes of links and addresses in a network namespace, told at once."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest

from ikectx.errors import KernelError
from tests.netns import Namespace, namespaces
from vici_bridge.kernel.changes import ADDRESSES, LINKS, Changes


async def told(space: Namespace, groups: int, *commands: str) -> int:
    """How often a listener of these groups is told of the commands, one burst each."""
    count, done = 0, asyncio.Event()

    def changed() -> None:
        nonlocal count
        count += 1
        done.set()

    with space.entered():
        changes = Changes(groups, changed)
    try:
        for command in commands:
            done.clear()
            space.ip(command)
            try:
                async with asyncio.timeout(1):
                    await done.wait()
            except TimeoutError:
                continue
    finally:
        changes.close()
    space.ip("link set lo down", "link set lo up")
    await asyncio.sleep(0.1)
    return count


def test_changes_are_told() -> None:
    with namespaces(1) as (space,):
        space.ip("link add lan0 type bridge")
        assert asyncio.run(told(space, LINKS, "link set lan0 up", "link set lan0 down")) >= 2
        assert asyncio.run(told(space, ADDRESSES, "addr add 10.3.0.2/24 dev lan0")) >= 1
        assert asyncio.run(told(space, ADDRESSES, "link set lan0 mtu 1400")) == 0


def test_a_kernel_that_lets_nobody_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(socket.socket):
        def bind(self, address: Any) -> None:
            raise OSError(1, os.strerror(1))

    async def listens() -> None:
        Changes(LINKS, lambda: None)

    monkeypatch.setattr("vici_bridge.kernel.changes.socket.socket", Closed)
    with pytest.raises(KernelError, match="cannot be watched: Operation not permitted"):
        asyncio.run(listens())
