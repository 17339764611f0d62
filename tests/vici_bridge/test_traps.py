"""Traps of SAs that are at another gateway: out, back, and out again after charon has loaded its files."""

from __future__ import annotations

import asyncio

import pytest

from ikectx.errors import StoreError
from ikectx.sa.name import SaName
from tests.peers import a_context
from tests.vici_bridge.test_deadlines import MemoryStore
from vici_bridge.traps import Trap, Traps


class Charon:
    def __init__(self, *traps: Trap) -> None:
        self.there = set(traps)

    async def traps(self) -> list[Trap]:
        return sorted(self.there)

    async def trap(self, connection: str, child: str, *, install: bool) -> None:
        (self.there.add if install else self.there.remove)((connection, child))


def test_a_trap_is_out_while_its_sa_is_elsewhere() -> None:
    store, context = MemoryStore(), a_context()
    ours = (context.connection, context.children[0].name)
    charon, away = Charon(ours, ("other", "net")), set[SaName]()

    async def scenario() -> None:
        traps = Traps(store, charon, lambda: away)
        await traps.leave(context)
        assert charon.there == {("other", "net")}
        away.add(context.spis)
        charon.there.add(ours)  # its configuration was loaded again
        later = Traps(store, charon, lambda: away)
        await later._look()
        assert charon.there == {("other", "net")}
        away.clear()
        await later._look()
        assert charon.there == {("other", "net"), ours} and not store.values

    asyncio.run(scenario())


def test_a_trap_comes_back_although_the_disk_was_full() -> None:
    class Full(MemoryStore):
        full = False

        def delete(self, kind: str, key: str, *, soon: bool = False) -> None:
            if self.full:
                raise StoreError("the disk is full")
            super().delete(kind, key, soon=soon)

    store, context = Full(), a_context()
    ours = (context.connection, context.children[0].name)
    charon, away = Charon(ours), {context.spis}

    async def scenario() -> None:
        traps = Traps(store, charon, lambda: away)
        await traps.leave(context)
        away.clear()
        store.full = True
        with pytest.raises(StoreError):
            await traps._look()
        store.full = False
        await traps._look()
        assert charon.there == {ours} and not store.values

    asyncio.run(scenario())


def test_an_sa_without_a_trap_leaves_nothing() -> None:
    store = MemoryStore()
    asyncio.run(Traps(store, Charon(("other", "net")), set).leave(a_context()))
    assert not store.values
