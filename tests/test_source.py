"""pSG's side, where it can be tried without a charon."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

from vici_bridge.charon import sa_view
from vici_bridge.host import DETOUR
from vici_bridge.source import CharonSource

from .test_charon import VIEW
from .test_deadlines import MemoryStore


class Routes:
    def __init__(self, *prefixes: str) -> None:
        self.prefixes = set(prefixes)

    def remove(self, prefixes: list[str]) -> None:
        self.prefixes -= set(prefixes)


def test_the_end_of_one_detour_leaves_what_another_needs() -> None:
    """An MN moved, connected to pSG again with the same virtual IP, and is moved again within the time."""
    store, routes = MemoryStore(), Routes("10.4.0.10/32", "10.4.0.11/32")
    store.put(DETOUR, "first", json.dumps(["10.4.0.10/32", "10.4.0.11/32"]).encode())
    store.put(DETOUR, "second", json.dumps(["10.4.0.10/32"]).encode())
    host: Any = SimpleNamespace(store=store, detour=routes)
    source = CharonSource(host, None)  # type: ignore[arg-type]
    source._drop_detour("first")
    assert routes.prefixes == {"10.4.0.10/32"}
    source._drop_detour("second")
    source._drop_detour("second")
    assert routes.prefixes == set()


def test_sas_are_found_by_the_address_of_their_mn() -> None:
    served = replace(sa_view("mn", {**VIEW, "tasks-active": []}), state="ESTABLISHED")
    prepared = replace(served, spi_i=bytes(8), state="PASSIVE")

    async def views() -> list[Any]:
        return [served, prepared]

    source = CharonSource(SimpleNamespace(views=views), None)  # type: ignore[arg-type]
    assert asyncio.run(source.find(served.remote.address)) == [served.spis]
    assert asyncio.run(source.find(ip_address("203.0.113.99"))) == []
