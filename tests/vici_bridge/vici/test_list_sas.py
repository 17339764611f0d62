"""How often charon is asked for how much: counted, since time tells little."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import pytest

from ikectx.errors import CharonError
from tests.hand_loop import run
from vici_bridge.vici import list_sas as listing_module
from vici_bridge.vici.codec import Message, parse_message, serialize_message
from vici_bridge.vici.list_sas import Listing
from vici_bridge.vici.views import SaView

_T = TypeVar("_T")

SPIS = [(bytes([number]) * 8, b"\x99" * 7 + bytes([number])) for number in range(1, 6)]


class Charon:
    """`list-sas` of five SAs; `gate`, where it is not open, keeps the answer back."""

    def __init__(self) -> None:
        self.asked: list[int | None] = []
        self.sas = {number: spis for number, spis in enumerate(SPIS, 1)}
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: CharonError | None = None
        self.more: dict[str, str] = {}

    async def read_sas(self, read: Callable[[bytes], _T], *, ike_ids: Sequence[int] = ()) -> list[_T]:
        self.asked += ike_ids or [None]
        told = [
            _message(number, *spis, self.more)
            for number, spis in self.sas.items()
            if not ike_ids or number in ike_ids
        ]
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [read(octets) for octets in told]


def _message(number: int, spi_i: bytes, spi_r: bytes, more: Mapping[str, str] | None = None) -> bytes:
    sa = {
        **(more or {}),
        "uniqueid": str(number),
        "state": "ESTABLISHED",
        "initiator-spi": spi_i.hex(),
        "responder-spi": spi_r.hex(),
        "local-host": "192.0.2.1",
        "remote-host": "198.51.100.7",
    }
    return serialize_message({"mn": sa})


def test_one_sa_is_asked_for_by_its_id_as_soon_as_that_is_known() -> None:
    async def scenario() -> None:
        charon = Charon()
        listing = Listing(charon.read_sas)
        for _ in range(3):
            view = await listing.view(SPIS[2])
            assert view is not None and (view.spis, view.unique_id) == (SPIS[2], 3)
        assert charon.asked == [None, 3, 3]
        charon.asked.clear()
        await listing.views()
        assert [await listing.view(spis) is not None for spis in SPIS] == [True] * 5
        assert charon.asked == [None, 1, 2, 3, 4, 5]

    asyncio.run(scenario())


def test_one_whose_id_is_forgotten_just_then_is_searched() -> None:
    """A listing that had begun before it came ends between the question and its turn."""

    async def scenario() -> None:
        charon = Charon()
        listing = Listing(charon.read_sas)
        assert await listing.view(SPIS[0]) is not None
        asking = asyncio.create_task(listing.view(SPIS[0]))
        await asyncio.sleep(0)
        listing._seen.clear()
        assert await asking is not None

    asyncio.run(scenario())


def test_a_recent_listing_of_all_tells_of_one() -> None:
    async def scenario() -> None:
        charon = Charon()
        listing = Listing(charon.read_sas)
        assert listing.recent(SPIS[0]) is None
        await listing.views()
        found = [listing.recent(spis) for spis in SPIS]
        assert [view and view.spis for view in found] == SPIS
        assert listing.recent((bytes(8), bytes(8))) is None
        await asyncio.sleep(listing_module.MOMENT + 0.1)
        assert listing.recent(SPIS[0]) is None
        assert charon.asked == [None]

    run(scenario())


def test_what_was_asked_before_charon_told_of_it_is_neither_recent_nor_unchanged() -> None:
    async def scenario() -> None:
        charon = Charon()
        listing = Listing(charon.read_sas)
        assert listing.unchanged(SPIS[0]) is None
        await listing.views()
        await asyncio.sleep(0.01)
        listing.outdate(SPIS[:2])
        assert [listing.recent(spis) is None for spis in SPIS] == [True, True, False, False, False]
        assert [listing.unchanged(spis) is None for spis in SPIS] == [True, True, False, False, False]
        # the number by which it is asked for stays
        charon.asked.clear()
        assert await listing.view(SPIS[0]) is not None and charon.asked == [1]
        assert listing.recent(SPIS[0]) is not None and listing.unchanged(SPIS[0]) is not None

    asyncio.run(scenario())


def test_an_answer_to_a_question_from_before_charon_told_of_an_sa_is_not_its_present_state() -> None:
    async def scenario() -> None:
        charon = Charon()
        listing = Listing(charon.read_sas)
        charon.gate.clear()
        asking = asyncio.create_task(listing.view(SPIS[0]))
        await asyncio.sleep(0.01)
        listing.outdate([SPIS[0]])
        charon.gate.set()
        assert await asking is not None
        assert listing.unchanged(SPIS[0]) is None and listing.recent(SPIS[0]) is None

    asyncio.run(scenario())


def test_one_that_is_unchanged_has_less_time_left() -> None:
    async def scenario() -> None:
        charon = Charon()
        charon.more = {"rekey-time": "100", "established": "7"}
        listing = Listing(charon.read_sas)
        await listing.views()
        await asyncio.sleep(30.5)
        view = listing.unchanged(SPIS[0])
        assert view is not None and (view.rekey, view.established) == (70, 37)

    run(scenario())


def test_only_what_is_said_in_other_octets_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[bytes] = []

    def counted(octets: bytes, **options: bool) -> Message:
        reads.append(octets)
        return parse_message(octets, **options)

    async def scenario() -> None:
        charon = Charon()
        monkeypatch.setattr(listing_module, "parse_message", counted)
        listing = Listing(charon.read_sas)
        first = await listing.views()
        assert [view.spis for view in first] == SPIS and len(reads) == 5
        charon.sas[2] = (SPIS[1][0], bytes(8))
        charon.sas.pop(4)
        second = await listing.views()
        assert [view.spis for view in second] == [SPIS[0], charon.sas[2], SPIS[2], SPIS[4]]
        assert len(reads) == 6
        # one that is looked for costs nothing but its own reading; what is gone is not remembered
        assert await listing.view(SPIS[3]) is None and len(reads) == 6
        charon.sas[4] = SPIS[3]
        assert await listing.view(SPIS[3]) is not None and len(reads) == 7
        await listing.views()
        assert len(reads) == 8

    asyncio.run(scenario())


def test_an_id_that_is_gone_or_another_sas_is_not_believed() -> None:
    async def scenario() -> None:
        charon = Charon()
        listing = Listing(charon.read_sas)
        await listing.views()
        charon.sas = {1: SPIS[3], 7: SPIS[0]}  # a charon that began anew
        view = await listing.view(SPIS[0])
        assert view is not None and view.unique_id == 7
        assert await listing.view(SPIS[1]) is None
        charon.asked.clear()
        assert await listing.view(SPIS[1]) is None
        assert charon.asked == [8, None], "it is no new one either"

    asyncio.run(scenario())


def test_those_that_are_wanted_at_once_are_asked_for_at_once() -> None:
    async def scenario() -> None:
        charon = Charon()
        listing = Listing(charon.read_sas)
        await listing.views()
        charon.asked.clear()
        new = [(bytes([number]) * 8, bytes([number]) * 8) for number in (0x61, 0x62)]
        charon.sas |= {6: new[1], 7: new[0]}
        found = await asyncio.gather(*map(listing.view, (SPIS[0], *new, SPIS[3])))
        assert [view and view.unique_id for view in found] == [1, 7, 6, 4]
        assert charon.asked == [1, 4, 6, 7]

    asyncio.run(scenario())


def test_many_who_want_all_share_a_listing_that_begins_after_they_asked() -> None:
    async def scenario() -> None:
        charon = Charon()
        charon.gate.clear()
        listing = Listing(charon.read_sas)
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
        listing = Listing(charon.read_sas)
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


def test_a_number_that_charon_has_told_is_not_guessed() -> None:
    """1,000 SAs came up since the last listing: the number of the next one was a thousand higher."""

    async def scenario() -> None:
        charon = Charon()
        listing = Listing(charon.read_sas)
        await listing.views()
        charon.asked.clear()
        charon.sas[900], charon.sas[1000], charon.sas[1001] = (
            (bytes([n]) * 8, bytes(8)) for n in (9, 10, 11)
        )
        up = parse_message(_message(900, *charon.sas[900]))
        new = parse_message(_message(1000, *charon.sas[1000]))["mn"]
        assert [one.unique_id for one in listing.heard({"up": "yes", **up})] == [900]
        assert [one.unique_id for one in listing.heard({"mn": {"old": up["mn"], "new": new}})] == [1000]
        assert listing.heard(up) == [], "it goes down"
        assert listing.heard({"up": "yes", "mn": {**up["mn"], "version": "1"}}) == []
        for number in (900, 1000, 1001):
            found = await listing.view(charon.sas[number])
            assert found is not None and found.unique_id == number
        assert charon.asked == [900, 1000, 1001]
        listing.gone(charon.sas[900])
        assert charon.sas[900] not in listing._seen

    asyncio.run(scenario())


def test_a_number_that_is_told_while_all_are_listed_is_kept() -> None:
    """The list is from before, and the SA with the highest number of it may have gone."""

    async def scenario() -> None:
        charon = Charon()
        listing = Listing(charon.read_sas)
        await listing.views()
        charon.gate.clear()
        everything = asyncio.create_task(listing.views())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        charon.sas[7], charon.sas[8] = (bytes([7]) * 8, bytes(8)), (bytes([8]) * 8, bytes(8))
        listing.heard({"up": "yes", **parse_message(_message(7, *charon.sas[7]))})
        charon.gate.set()
        assert len(await everything) == 5
        charon.asked.clear()
        for number in (7, 8):
            assert await listing.view(charon.sas[number]) is not None
        assert charon.asked == [7, 8]
        del charon.sas[8]
        await listing.views()
        charon.asked.clear()
        charon.sas[9] = (bytes([9]) * 8, bytes(8))
        assert await listing.view(charon.sas[9]) is not None
        assert charon.asked == [9], "no number comes again"

    asyncio.run(scenario())
