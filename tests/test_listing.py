"""How often charon is asked for how much: counted, since time tells little."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from ikectx.errors import CharonError
from vici_bridge.charon import SaView
from vici_bridge.listing import Listing

SPIS = [(bytes([number]) * 8, b"\x99" * 7 + bytes([number])) for number in range(1, 6)]


class Charon:
    """`list-sas` of five SAs; `gate`, where it is not open, keeps the answer back."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.sas = {number: spis for number, spis in enumerate(SPIS, 1)}
        self.gate = threading.Event()
        self.gate.set()
        self.error: CharonError | None = None

    def list_sas(self, **wanted: Any) -> list[dict[str, Any]]:
        self.asked.append(wanted)
        found = [_view(number, *spis) for number, spis in self.sas.items()]
        assert self.gate.wait(5)
        if self.error is not None:
            raise self.error
        if "ike_id" in wanted:
            return [view for view in found if view["uniqueid"] == str(wanted["ike_id"])]
        return [view for view in found if wanted.get("holding", "") in view["initiator-spi"]]


def _view(number: int, spi_i: bytes, spi_r: bytes) -> dict[str, Any]:
    return {
        "name": "mn",
        "uniqueid": str(number),
        "state": "ESTABLISHED",
        "initiator-spi": spi_i.hex(),
        "responder-spi": spi_r.hex(),
        "local-host": "192.0.2.1",
        "remote-host": "198.51.100.7",
    }


def test_one_sa_is_asked_for_by_its_id_as_soon_as_that_is_known() -> None:
    async def scenario() -> None:
        charon = Charon()
        listing = Listing(charon.list_sas)
        for _ in range(3):
            view = await listing.view(SPIS[2])
            assert view is not None and (view.spis, view.unique_id) == (SPIS[2], 3)
        assert charon.asked == [{"holding": SPIS[2][0].hex()}, {"ike_id": 3}, {"ike_id": 3}]
        charon.asked.clear()
        await listing.views()
        assert [await listing.view(spis) is not None for spis in SPIS] == [True] * 5
        assert charon.asked == [{}, *({"ike_id": number} for number in range(1, 6))]

    asyncio.run(scenario())


def test_an_id_that_is_gone_or_another_sas_is_not_believed() -> None:
    async def scenario() -> None:
        charon = Charon()
        listing = Listing(charon.list_sas)
        await listing.views()
        charon.sas = {1: SPIS[3], 7: SPIS[0]}  # a charon that began anew
        view = await listing.view(SPIS[0])
        assert view is not None and view.unique_id == 7
        assert await listing.view(SPIS[1]) is None
        charon.asked.clear()
        assert await listing.view(SPIS[1]) is None
        assert charon.asked == [{"holding": SPIS[1][0].hex()}]

    asyncio.run(scenario())


def test_many_who_want_all_share_a_listing_that_begins_after_they_asked() -> None:
    async def scenario() -> None:
        charon = Charon()
        charon.gate.clear()
        listing = Listing(charon.list_sas)
        first = asyncio.create_task(listing.views())
        while not charon.asked:
            await asyncio.sleep(0.001)
        del charon.sas[1]  # after what the first gets was read
        later = [asyncio.create_task(listing.views()) for _ in range(50)]
        await asyncio.sleep(0)
        charon.gate.set()
        assert len(await first) == 5
        assert [len(await one) for one in later] == [4] * 50
        assert len(charon.asked) == 2
        one, two = await asyncio.gather(listing.views(), listing.views())
        assert one == two and one is not two

    asyncio.run(scenario())


def test_an_error_is_everybodys_and_the_next_listing_goes_on() -> None:
    async def scenario() -> None:
        charon = Charon()
        charon.error = CharonError("away")
        listing = Listing(charon.list_sas)
        gone = asyncio.create_task(listing.views())
        waiting = [asyncio.create_task(listing.views()) for _ in range(3)]
        await asyncio.sleep(0)
        gone.cancel()
        for task in waiting:
            with pytest.raises(CharonError, match="away"):
                await task
        charon.error = None
        found: list[SaView] = await listing.views()
        assert len(found) == 5

    asyncio.run(scenario())
