"""pSG's side, where it can be tried without a charon."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

from vici_bridge.charon import sa_view
from vici_bridge.source import CharonSource

from .test_charon import VIEW


def test_sas_are_found_by_the_address_of_their_mn() -> None:
    served = replace(sa_view("mn", {**VIEW, "tasks-active": []}), state="ESTABLISHED")
    prepared = replace(served, spi_i=bytes(8), state="PASSIVE")

    async def views() -> list[Any]:
        return [served, prepared]

    source = CharonSource(SimpleNamespace(views=views), None)  # type: ignore[arg-type]
    assert asyncio.run(source.find(served.remote.address)) == [served.spis]
    assert asyncio.run(source.find(ip_address("203.0.113.99"))) == []
