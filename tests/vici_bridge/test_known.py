"""What a gateway knows of charon's SAs without asking for all of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from ikectx.errors import CharonError
from ikectx.sa.name import SaName
from tests.hand_loop import run
from tests.vici_bridge.effects.test_sink import a_context
from tests.vici_bridge.test_deadlines import MemoryStore
from vici_bridge.deadlines import Deadlines
from vici_bridge.ha.record import Record
from vici_bridge.known import AGAIN, FEW, LISTED, SETTLE, Known
from vici_bridge.vici.views import SaView, arriving_view, reported_view


def view(number: int, state: str = "ESTABLISHED") -> SaView:
    return replace(reported_view(a_context(number)), unique_id=number, rekey=1000, state=state)


class Side:
    """A charon with these SAs. `hidden`: those whose unique IDs are not guessed."""

    def __init__(self, *numbers: int) -> None:
        self.record = Record()
        self.store = MemoryStore()
        self.deadlines = Deadlines(self.store)
        self.sas = {view(number).spis: view(number) for number in numbers}
        self.hidden: set[SaName] = set()
        self.tags = False
        self.lost = 0
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: CharonError | None = None
        for number in numbers:
            self.record.learn(a_context(number), 3)

    def up(self, known: Known, *numbers: int) -> None:
        """These come up, and charon reports it."""
        for number in numbers:
            self.sas[view(number).spis] = view(number)
            self.record.learn(a_context(number), 3)
        known.heed(view(number).spis for number in numbers)

    def down(self, known: Known, *numbers: int, told: bool = True) -> None:
        for number in numbers:
            del self.sas[view(number).spis]
            if told:
                self.record.forget(view(number).spis)
        known.heed(view(number).spis for number in numbers if told)

    def hear(self) -> int:
        return self.lost

    def marked(self) -> bool:
        return self.tags

    async def views(self) -> list[SaView]:
        self.asked.append("all")
        if self.error is not None:
            raise self.error
        told = list(self.sas.values())
        await self.gate.wait()
        return told

    async def view(self, sa: SaName, *, search: bool = True) -> SaView | None:
        self.asked.append("search" if search else "one")
        return self.sas.get(sa) if search or sa not in self.hidden else None


def names(known: Known) -> set[int]:
    """The numbers of the SAs that are known."""
    return {int.from_bytes(sa.spi_i[-4:]) for sa in known.present.names()}


def test_all_are_listed_once_and_then_those_with_news_are_asked_for() -> None:
    async def scenario() -> None:
        side = Side(1, 2)
        known = Known(side)
        for _ in range(3):
            assert (await known.now()) is known.present
        assert (names(known), side.asked) == ({1, 2}, ["all"])
        side.up(known, 3)
        side.down(known, 1)
        await known.now()
        assert (names(known), side.asked) == ({2, 3}, ["all", "one", "one"])
        assert not side.deadlines.due(0) and side.deadlines.next_due() is not None
        await known.now()
        assert len(side.asked) == 3

    run(scenario())


def test_news_are_asked_for_in_the_background_too() -> None:
    async def scenario() -> None:
        side = Side(1)
        known = Known(side)
        await known.now()
        watching = asyncio.create_task(known.watch())
        side.up(known, 2)
        side.up(known, 2)
        await asyncio.sleep(2 * SETTLE)
        assert (names(known), side.asked) == ({1, 2}, ["all", "one"])
        watching.cancel()

    run(scenario())


def test_of_many_or_of_unknown_numbers_what_was_reported_will_do_until_all_are_listed() -> None:
    async def scenario() -> None:
        side = Side(1)
        known = Known(side)
        await known.now()
        watching = asyncio.create_task(known.watch())
        side.up(known, *range(2, FEW + 3))
        await known.now()
        assert (names(known), side.asked) == (set(range(1, FEW + 3)), ["all"])
        assert known.present.taken(a_context(2)).pairs and not known.present.rivals(a_context(2))[0].unique_id
        await asyncio.sleep(LISTED + 2 * SETTLE)
        assert side.asked == ["all", "all"] and known.present.rivals(a_context(2))[0].unique_id == 2
        side.hidden.add(view(99).spis)
        side.up(known, 99)
        await known.now()
        assert side.asked[2:] == ["one"] and 99 in names(known)
        await asyncio.sleep(LISTED + 2 * SETTLE)
        assert side.asked[2:] == ["one", "all"] and known.present.rivals(a_context(99))[0].unique_id == 99
        await asyncio.sleep(3 * LISTED)
        assert side.asked[4:] == []
        watching.cancel()

    run(scenario(), seconds=600)


def test_marks_are_not_reported_so_an_sa_whose_number_is_unknown_is_searched() -> None:
    async def scenario() -> None:
        side = Side(1)
        side.tags = True
        known = Known(side)
        await known.now()
        side.hidden.add(view(2).spis)
        side.up(known, 2)
        await known.now()
        assert side.asked == ["all", "search"] and known.present.rivals(a_context(2))[0].unique_id == 2
        side.up(known, *range(3, FEW + 4))
        await known.now()
        assert side.asked[2:] == ["all"] and FEW + 3 in names(known)

    run(scenario())


def test_one_that_is_being_set_up_has_its_name() -> None:
    async def scenario() -> None:
        side = Side(1)
        known = Known(side)
        await known.now()
        side.up(known, 2)
        side.hidden.add(view(2).spis)
        side.record._sas[view(2).spis] = replace(side.record._sas[view(2).spis], connection=None)
        await known.now()
        assert known.present.taken(a_context(2)).ike and names(known) == {1, 2}

    run(scenario())


def test_what_changes_while_all_are_listed_counts() -> None:
    """charon's answer is from before."""

    async def scenario() -> None:
        side = Side(1, 2, 3)
        known = Known(side)
        await known.now()
        side.gate.clear()
        listing = asyncio.create_task(known.list_all())
        await asyncio.sleep(0.1)
        side.down(known, 1)
        side.up(known, 4)
        await known.now()  # which waits for no list
        assert names(known) == {2, 3, 4}
        known.put(view(5))
        known.comes(arriving_view(a_context(6)))
        known.drop(view(2).spis)
        side.down(known, 3)
        side.gate.set()
        await listing
        assert names(known) == {3, 4, 5, 6}
        await known.now()
        assert names(known) == {4, 5, 6}

    run(scenario())


def test_an_sa_that_is_being_installed_is_known_until_it_came_or_not() -> None:
    async def scenario() -> None:
        known = Known(Side())
        await known.now()
        for number in (1, 2):
            known.comes(arriving_view(a_context(number)))
        known.heed([view(1).spis, view(2).spis])  # whoever installs it knows more
        await known.list_all()
        assert names(known) == {1, 2}
        known.put(view(1))
        for number in (1, 2):
            known.came_or_not(view(number).spis)
        assert names(known) == {1}

    run(scenario())


def test_the_sas_of_a_charon_that_has_ended_are_not_known_any_more() -> None:
    async def scenario() -> None:
        side = Side(1, 2)
        known = Known(side)
        side.gate.clear()
        asking = asyncio.create_task(known.now())
        await asyncio.sleep(0.1)
        side.sas.clear()
        known.forget()  # while it listed them
        side.gate.set()
        await asking
        assert (names(known), side.asked) == (set(), ["all", "all"])

    run(scenario())


def test_sas_in_the_way_that_went_without_a_report_are_found_out() -> None:
    async def scenario() -> None:
        side = Side(*range(1, FEW + 3))
        known = Known(side)
        await known.now()
        side.down(known, 1, told=False)
        side.record.forget(view(1).spis)
        await known.again([view(1).spis, view(2).spis])
        assert 1 not in names(known) and side.asked == ["all", "one", "one"]
        side.down(known, 2, told=False)
        everybody = list(known.present.names())
        await known.again(everybody)
        assert 2 in names(known) and len(side.asked) == 3
        await asyncio.sleep(AGAIN)
        await known.again(everybody)
        assert 2 not in names(known) and side.asked[3:] == ["all"]

    run(scenario())


def test_after_an_error_the_background_asks_again() -> None:
    async def scenario() -> None:
        side = Side(1)
        known = Known(side)
        side.error = CharonError("busy")
        watching = asyncio.create_task(known.watch())
        known.heed([view(1).spis])
        await asyncio.sleep(2 * SETTLE)
        side.error = None
        await asyncio.sleep(LISTED)
        assert names(known) == {1} and len(side.asked) >= 2
        watching.cancel()

    run(scenario())


def test_all_are_listed_again_when_reports_were_lost() -> None:
    async def scenario() -> None:
        side = Side(1, 2)
        known = Known(side)
        await known.now()
        side.asked.clear()
        side.up(Known(side), 3)  # this one hears nothing of it
        side.down(Known(side), 1)
        await known.now()
        assert (names(known), side.asked) == ({1, 2}, [])
        side.lost += 2
        await known.now()
        await known.now()
        assert (names(known), side.asked) == ({2, 3}, ["all"])

    run(scenario())


def test_an_sa_is_settled_while_there_is_no_news_of_it_and_none_was_lost() -> None:
    async def scenario() -> None:
        side = Side(1, 2)
        known = Known(side)
        sa = view(1).spis
        assert not known.settled(sa)  # charon has not been asked yet
        await known.now()
        assert known.settled(sa)
        known.heed([sa])
        assert not known.settled(sa) and known.settled(view(2).spis)
        await known.now()
        assert known.settled(sa)
        known.comes(view(1))
        assert not known.settled(sa)
        known.put(view(1))
        known.came_or_not(sa)
        assert known.settled(sa)
        side.lost += 1
        assert not known.settled(sa)
        await known.now()
        assert known.settled(sa)

    run(scenario())


def test_reports_that_were_lost_are_made_up_for_in_the_background() -> None:
    async def scenario() -> None:
        side = Side(1, 2)
        known = Known(side)
        watch = asyncio.create_task(known.watch())
        await known.now()
        await asyncio.sleep(LISTED)
        side.asked.clear()
        side.up(Known(side), 3)
        side.lost += 1
        side.up(known, 4)
        await asyncio.sleep(SETTLE + 0.1)
        assert (names(known), side.asked) == ({1, 2, 3, 4}, ["all"])
        watch.cancel()

    run(scenario())


def test_one_of_many_that_ha_does_not_tell_of_stays_known_until_all_are_listed() -> None:
    async def scenario() -> None:
        side = Side(1, 2)
        side.record.forget(view(1).spis)
        known = Known(side)
        await known.now()
        watching = asyncio.create_task(known.watch())
        side.down(known, 2)
        known.heed([view(1).spis])  # charon told of it over VICI
        side.up(known, *range(3, FEW + 4))
        await known.now()
        assert 1 in names(known)
        await asyncio.sleep(LISTED + 2 * SETTLE)
        assert names(known) == {1, *range(3, FEW + 4)} and side.asked == ["all", "all"]
        watching.cancel()

    run(scenario())
