"""pSG's side, where it can be tried without a charon."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

from ikectx.name import SaName
from vici_bridge.charon import SaView, sa_view
from vici_bridge.source import CharonSource

from .test_charon import VIEW
from .test_go_on import served


def test_sas_are_found_by_the_address_of_their_mn() -> None:
    active = replace(sa_view("mn", {**VIEW, "tasks-active": []}), state="ESTABLISHED")
    prepared = replace(active, spi_i=bytes(8), state="PASSIVE")

    async def views() -> list[Any]:
        return [active, prepared]

    source = CharonSource(SimpleNamespace(views=views), None)  # type: ignore[arg-type]
    assert asyncio.run(source.find(active.remote.address)) == [active.spis]
    assert asyncio.run(source.find(ip_address("203.0.113.99"))) == []


def test_virtual_ips_are_those_that_charon_lists() -> None:
    """After an IKE rekey a resync tells none of them, and the other gateway would refuse the selectors."""

    async def scenario() -> None:
        async with served() as (here, source, context):
            (view,) = here.charon.views()

            async def listed(sa: SaName) -> SaView:
                return replace(view, remote_vips=(ip_address("10.3.9.9"),))

            here.host.view = listed  # type: ignore[method-assign]
            assert (await source.export(context.spis)).remote_vips == (ip_address("10.3.9.9"),)

    asyncio.run(scenario())
