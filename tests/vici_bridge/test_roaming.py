"""ESP of relayed mobile nodes from other places: who is followed, and who is not."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.errors import KernelError
from ikectx.sa.context import Endpoint
from tests.vici_bridge.away.test_absences import Gateway, places, relay
from vici_bridge import roaming
from vici_bridge.away.passing import Passing
from vici_bridge.kernel.nat_relay import Stranger

TO = ip_address("192.0.2.9")
SPI, OURS = b"\xc1\2\3\4", b"\xc1\2\3\5"


def test_one_new_place_at_a_time_and_none_for_an_spi_that_is_used_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roaming, "LOOK", 0.001)
    monkeypatch.setattr(Passing, "in_udp", True)
    gateway = Gateway()
    here = relay(gateway)
    gateway.away.left(here.spis)
    at = [Endpoint.of("203.0.113.9", port) for port in (6000, 6001, 6002, 6003, 6004)]
    known = ((here.remote, TO),)
    looks: list[Any] = [
        [
            Stranger(at[0], here.local, SPI, ()),  # nobody knows whose that is
            Stranger(at[1], here.local, OURS, known),
            Stranger(at[2], here.local, SPI, known),
            Stranger(at[3], here.local, SPI, known),
        ],
        KernelError("no"),
        [Stranger(at[4], here.local, SPI, ((at[2], TO),))],  # from its newest place on
    ]

    class Host:
        """The gateway's, whose kernel has an SA of its own."""

        nat: Any
        kernel: Any
        away = gateway.away

        def strangers(self) -> list[Stranger]:
            found = looks.pop(0) if looks else []
            if isinstance(found, KernelError):
                raise found
            return list(found)

        def get_sa(self, address: object, spi: bytes) -> object:
            return "an SA" if spi == OURS else None

    host: Any = Host()
    host.nat = host.kernel = host

    async def scenario() -> None:
        task = asyncio.create_task(roaming.follow_esp(host))
        while looks or str(at[4]) not in str(places(gateway)):
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 10))
    assert [mn for mn, _ in places(gateway)] == [str(here.remote), str(at[2]), str(at[4])]
