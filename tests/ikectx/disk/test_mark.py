"""A store that was lost, or is an older copy, is told from the one that the last agent wrote."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ikectx.disk.journal_rows import ABORTED
from ikectx.disk.mark import MarkedStore
from ikectx.disk.place import open_store
from ikectx.disk.store import HISTORY
from ikectx.engine.journal import JournalEntry
from ikectx.errors import StoreError
from ikectx.sa.name import SaName

NOW = 1_795_000_000.0
SA = SaName(b"initiato", b"responde")


def entry(number: int, state: str, updated: float, result: str = "") -> JournalEntry:
    return JournalEntry(
        transfer_id=number.to_bytes(8),
        role="source",
        peer="nsg",
        sa=SA,
        mn="mn.example",
        mn_address="198.51.100.1",
        state=state,
        epoch=0,
        started=updated,
        updated=updated,
        result=result,
    )


class Place:
    """A store's directory, and the mark beside it."""

    def __init__(self, folder: Path) -> None:
        self.state, self.mark, self.backup = folder / "state", folder / "ikectx.mark", folder / "backup"
        self.now = NOW

    def open(self) -> MarkedStore:
        with open_store(self.state, now=self.now):
            pass
        key = (self.state / "state.key").read_bytes()
        return MarkedStore(self.state / "state.db", key, self.mark, wall=lambda: self.now)

    def has(self) -> str:
        with self.open() as store:
            return store.has

    def write(self, *entries: JournalEntry) -> None:
        with self.open() as store:
            for one in entries:
                store.write(one)

    def copy(self) -> None:
        shutil.copytree(self.state, self.backup)

    def restore(self) -> None:
        shutil.rmtree(self.state)
        shutil.copytree(self.backup, self.state)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_same_store_is_whole(place: Place) -> None:
    assert place.has() == "whole"
    place.write(entry(1, "offered", NOW), entry(1, "kept", NOW + 1, "kept"))
    assert place.has() == "whole"


def test_a_lost_store_has_gaps_for_as_long_as_the_journal_goes_back(place: Place) -> None:
    place.write(entry(1, "offered", NOW))
    shutil.rmtree(place.state)
    assert place.has() == "old"
    assert place.has() == "old"  # the agent was killed before it had done what is to be done
    with place.open() as store:
        store.believed()
        store.write(entry(2, "offered", NOW + 5))
    assert place.has() == "gaps"
    place.now += HISTORY + 1
    assert place.has() == "whole"


def test_an_older_copy_is_found(place: Place) -> None:
    place.write(entry(1, "done", NOW, "moved"))
    place.copy()
    place.write(entry(2, "offered", NOW + 1))
    place.restore()
    assert place.has() == "old"


def test_a_copy_from_the_middle_of_a_transfer_is_found(place: Place) -> None:
    place.write(entry(1, "freezing", NOW))
    place.copy()
    place.write(entry(1, "released", NOW + 0.01))
    place.restore()
    with place.open() as store:
        assert store.has == "old"
        store.believed()
        store.write(entry(2, "offered", NOW + 5))
    assert place.has() == "old"  # as long as a transfer is open of which the copy tells
    with place.open() as store:
        store.believed()
        store.write(entry(1, "lost", NOW + 6, "lost"), entry(2, "kept", NOW + 6, "kept"))
    assert place.has() == "gaps"


def test_a_copy_of_what_is_there_now_is_the_store(place: Place) -> None:
    place.write(entry(1, "offered", NOW))
    place.copy()
    place.restore()
    assert place.has() == "whole"


def test_a_store_that_is_ahead_of_its_mark_is_whole(place: Place) -> None:
    """The agent was killed between the two."""
    place.write(entry(1, "offered", NOW))
    with open_store(place.state) as store:
        store.write(entry(1, "freezing", NOW + 1), entry(2, "offered", NOW + 1))
    assert place.has() == "whole"


def test_after_a_start_of_the_machine_nothing_is_known(place: Place) -> None:
    place.write(entry(1, "offered", NOW))
    place.mark.unlink()
    shutil.rmtree(place.state)
    assert place.has() == "whole"


def test_what_the_journal_has_forgotten_is_not_missed(place: Place) -> None:
    place.write(entry(1, "kept", NOW, "kept"))
    place.now += HISTORY + 1
    assert place.has() == "whole"


@pytest.mark.parametrize("octets", [b"", b"x", b"source 00 y", b"\xff" * 64])
def test_a_damaged_mark_says_nothing(place: Place, octets: bytes) -> None:
    place.mark.write_bytes(octets)
    assert place.has() == "whole"


def test_a_mark_that_cannot_be_written_is_an_error(place: Place) -> None:
    place.mark.mkdir()
    with pytest.raises(StoreError, match=r"ikectx\.mark"):
        place.open()


def test_the_lock_is_given_back_once_when_a_store_cannot_be_opened(place: Place) -> None:
    place.mark.mkdir()
    for _ in range(2):
        with pytest.raises(StoreError, match=r"ikectx\.mark"):
            open_store(place.state, mark=place.mark)


def test_a_lost_store_is_believed_once(place: Place) -> None:
    place.write(entry(1, "kept", NOW, "kept"))
    shutil.rmtree(place.state)
    with place.open() as store:
        assert store.has == "old"
        store.believed()  # and nothing is written before the agent ends
    assert place.has() == "gaps"
    place.write(entry(2, "kept", NOW + 1, "kept"))
    shutil.rmtree(place.state)
    assert place.has() == "old"


def test_what_was_written_last_is_not_pruned(place: Place) -> None:
    with place.open() as store:
        for number in range(ABORTED + 2):
            store.write(replace(entry(number, "aborted", NOW, "aborted"), role="target"))
        store.write(replace(entry(0, "aborted", NOW + 1, "aborted"), role="target"))
        store.prune(NOW - HISTORY)
    assert place.has() == "whole"


def test_a_write_that_fails_leaves_the_mark(place: Place) -> None:
    with place.open() as store:
        store.write(entry(1, "offered", NOW))
        before = place.mark.read_bytes()
        with pytest.raises(StoreError):
            store.write(replace(entry(2, "offered", NOW), epoch=1 << 70))
        assert place.mark.read_bytes() == before


def test_open_store_takes_the_mark(place: Place) -> None:
    with open_store(place.state, mark=place.mark) as store:
        store.write(entry(1, "offered", time.time()))
    shutil.rmtree(place.state)
    with open_store(place.state, mark=place.mark) as store:
        assert store.has == "old"
