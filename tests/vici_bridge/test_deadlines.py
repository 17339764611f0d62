"""Deadlines: the earlier of two, durable, dropped when charon is early enough itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ikectx.clock import steady_wall
from ikectx.sa.name import SaName
from tests.vici_bridge.vici.test_views import VIEW
from vici_bridge import deadlines as clocks
from vici_bridge.deadlines import Deadlines
from vici_bridge.vici.views import sa_view


class MemoryStore:
    def __init__(self) -> None:
        self.values: dict[tuple[str, str], bytes] = {}
        self.waiting: dict[tuple[str, str], bytes | None] = {}
        self.aside: list[tuple[str, str, str]] = []

    def put(self, kind: str, key: str, value: bytes, *, soon: bool = False) -> None:
        self.waiting[kind, key] = value
        if not soon:
            self.flush()

    def get(self, kind: str, key: str) -> bytes | None:
        return self.waiting.get((kind, key), self.values.get((kind, key)))

    def delete(self, kind: str, key: str, *, soon: bool = False) -> None:
        self.waiting[kind, key] = None
        if not soon:
            self.flush()

    def items(self, kind: str) -> list[tuple[str, bytes]]:
        self.flush()
        return [(key, value) for (k, key), value in self.values.items() if k == kind]

    def rows(self, role: str) -> list[tuple[str, bytes]]:
        return self.items(f"ledger {role}")

    def keep(self, role: str, key: str, row: bytes | None, *, soon: bool = False) -> None:
        self.waiting[f"ledger {role}", key] = row
        if not soon:
            self.flush()

    def flush(self) -> None:
        """What was to be written soon is written: by the next row or note, or with the journal."""
        for place, row in self.waiting.items():
            if row is None:
                self.values.pop(place, None)
            else:
                self.values[place] = row
        self.waiting.clear()

    def set_aside(self, place: str, key: str, why: str) -> None:
        self.values.pop((place.replace("items|", "").replace("|", " "), key), None)
        self.aside.append((place, key, why))


SA = sa_view("mn", {**VIEW, "tasks-active": []})


def test_the_earlier_deadline_stays_and_survives_a_restart() -> None:
    store = MemoryStore()
    deadlines = Deadlines(store)
    deadlines.keep(SA.spis, None, 500.0)
    deadlines.keep(SA.spis, None, 900.0)
    assert Deadlines(store).next_due() == 500.0


def test_b8_a_due_deadline_is_returned_until_charon_was_asked() -> None:
    deadlines = Deadlines(MemoryStore())
    deadlines.keep(SA.spis, None, 500.0)
    assert deadlines.due(499.0) == []
    (entry,) = deadlines.due(501.0)
    assert entry.child == "" and deadlines.settle(entry, SA, 501.0)
    deadlines.later(entry, 506.0)  # charon could not be asked
    assert deadlines.due(505.0) == []
    (entry,) = deadlines.due(507.0)
    deadlines.asked(entry)
    assert deadlines.next_due() is None


def test_a_deadline_is_dropped_where_charon_rekeys_before_it() -> None:
    deadlines = Deadlines(MemoryStore())
    deadlines.keep(SA.spis, None, 500.0)
    (entry,) = deadlines.due(500.0)
    assert not deadlines.settle(entry, replace(SA, rekey=5), 500.0)
    assert deadlines.next_due() is None


def test_deadlines_of_what_is_gone_are_forgotten() -> None:
    deadlines = Deadlines(MemoryStore())
    deadlines.keep(SA.spis, b"\x01\x02\x03\x04", 500.0)
    deadlines.keep(SaName(bytes(8), bytes(8)), None, 500.0)
    child, ike = deadlines.due(600.0)
    assert not deadlines.settle(child, SA, 600.0)
    assert not deadlines.settle(ike, None, 600.0)
    assert deadlines.next_due() is None


def test_a_child_has_a_deadline_of_its_own() -> None:
    deadlines = Deadlines(MemoryStore())
    deadlines.keep(SA.spis, SA.children[0].spi_in, 500.0)
    (entry,) = deadlines.due(501.0)
    assert entry.child == "c1234567" and deadlines.settle(entry, SA, 501.0)


def test_a_child_whose_rekey_charon_forgot_is_due_at_once() -> None:
    deadlines = Deadlines(MemoryStore())
    (child,) = SA.children
    overdue = replace(SA, children=(replace(child, rekey=-4),))
    deadlines.missed(SA, 500.0)
    assert deadlines.next_due() is None
    deadlines.missed(overdue, 500.0)
    (entry,) = deadlines.due(500.0)
    assert entry.child == child.spi_in.hex()
    assert deadlines.settle(entry, overdue, 500.0), "charon's own timer has passed"
    begun = replace(overdue, children=(replace(child, rekey=-4, state="REKEYING"),))
    assert not deadlines.settle(entry, begun, 500.0), "charon rekeys it"


def test_the_timer_of_an_sa_is_noted_once_when_it_is_active() -> None:
    deadlines = Deadlines(MemoryStore())
    deadlines.note(replace(SA, state="PASSIVE"), 1000.0)
    assert deadlines.next_due() is None
    deadlines.note(SA, 1000.0)
    assert deadlines.next_due() == 1000.0 + 13012
    deadlines.note(replace(SA, rekey=10), 1000.0)  # a toggle has started it anew
    assert deadlines.next_due() == 1000.0 + 13012


def test_an_agent_that_starts_takes_the_earlier_of_two_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock was set back by an hour: the deadline came an hour late."""
    store, wall = MemoryStore(), steady_wall()
    Deadlines(store).keep(SaName(b"i" * 8, b"r" * 8), None, wall + 60)
    monkeypatch.setattr(clocks, "steady_wall", lambda: wall - 3600)
    found = Deadlines(store).next_due()
    assert found is not None and abs(found - (wall - 3600 + 60)) < 5
    monkeypatch.setattr(clocks, "this_start", lambda: "another")
    assert Deadlines(store).next_due() == wall + 60
    monkeypatch.setattr(clocks, "steady_wall", lambda: wall + 3600)
    assert Deadlines(store).next_due() == wall + 60


def test_the_earliest_one_is_known_whatever_came_and_went() -> None:
    deadlines, wall = Deadlines(MemoryStore()), steady_wall()
    sas = [SaName(bytes([number]) * 8, bytes(8)) for number in range(4)]
    assert deadlines.next_due() is None
    for sa, due in zip(sas, (30.0, 10.0, 20.0, 40.0), strict=True):
        deadlines.keep(sa, None, wall + due)
    assert deadlines.next_due() == wall + 10
    (first,) = deadlines.due(wall + 10)
    deadlines.asked(first)
    assert deadlines.next_due() == wall + 20
    (second,) = deadlines.due(wall + 20)
    deadlines.later(second, wall + 35)
    assert deadlines.next_due() == wall + 30
    deadlines.keep(sas[3], None, wall + 5)
    assert deadlines.next_due() == wall + 5
    for entry in deadlines.due(wall + 100):
        deadlines.asked(entry)
    assert deadlines.next_due() is None
