"""Journal and escrow: what is kept, what is sealed, who may open it."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from ikectx.disk.journal_rows import ABORTED
from ikectx.disk.place import open_store
from ikectx.disk.store import (
    CHECKPOINT,
    HISTORY,
    LOG_PAGES,
    LOG_SIZE,
    SPARE_PAGES,
    Sealer,
    SqliteStore,
)
from ikectx.engine.journal import JournalEntry
from ikectx.engine.ledger import Ledger, TargetFacts
from ikectx.engine.ports import Store
from ikectx.errors import StoreError
from ikectx.numbers import Status
from ikectx.sa.name import SaName

SECRET = b"a secret that nobody may find on the disk"
SA = SaName(b"initiato", b"responde")
OTHER = SaName(b"another.", b"responde")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def store(place: Path) -> Iterator[SqliteStore]:
    opened = open_store(place)
    yield opened
    opened.close()


def entry(number: int = 1, **more: object) -> JournalEntry:
    made = JournalEntry(
        transfer_id=number.to_bytes(8),
        role="source",
        peer="nsg",
        sa=SA,
        mn="mn1.example",
        mn_address="198.51.100.7",
        state="released",
        epoch=1,
        started=1000.0 + number,
        updated=1000.0 + number,
        context=SECRET,
        final=b"final",
    )
    return replace(made, **more)  # type: ignore[arg-type]


# -- items -----------------------------------------------------------------------------------------------


def test_items_are_kept_by_kind_and_key(store: SqliteStore) -> None:
    kept: Store = store  # it is one of the ports
    assert kept.get("record", "a") is None
    kept.put("record", "b", b"2")
    kept.put("record", "a", b"1")
    kept.put("other", "a", b"3")
    kept.put("record", "a", b"1, newer")
    assert kept.get("record", "a") == b"1, newer"
    assert kept.items("record") == [("a", b"1, newer"), ("b", b"2")]
    kept.delete("record", "a")
    kept.delete("record", "a")
    assert kept.items("record") == [("b", b"2")]
    assert kept.get("other", "a") == b"3"


def test_items_outlive_the_agent(place: Path) -> None:
    first = open_store(place)
    first.put("record", "a", SECRET)
    first.close()
    first.close()
    second = open_store(place)
    assert second.get("record", "a") == SECRET
    second.close()


# -- secrets ---------------------------------------------------------------------------------------------


def test_nothing_secret_is_on_the_disk_in_the_clear(place: Path, store: SqliteStore) -> None:
    store.put("record", "a", SECRET)
    store.write(entry())
    key = (place / "state.key").read_bytes()
    for file in place.iterdir():
        if file.name == "state.key":
            continue
        octets = file.read_bytes()
        assert SECRET not in octets
        assert key not in octets
    assert SECRET.decode() not in repr(entry())


def test_files_are_for_the_owner_only(place: Path, store: SqliteStore) -> None:
    store.put("record", "a", b"1")
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    names = {file.name for file in place.iterdir()}
    assert names >= {"state.db", "state.key", "state.lock"}
    for file in place.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_a_file_others_can_read_is_refused(place: Path) -> None:
    open_store(place).close()
    (place / "state.key").chmod(0o640)
    with pytest.raises(StoreError, match="mode 640") as caught:
        open_store(place)
    assert "chmod 600" in caught.value.hint
    (place / "state.key").chmod(0o600)
    place.chmod(0o755)
    with pytest.raises(StoreError, match="mode 755"):
        open_store(place)
    place.chmod(0o700)
    open_store(place).close()


def test_a_sealed_value_opens_only_in_its_place() -> None:
    sealer = Sealer(bytes(32))
    sealed = sealer.seal("items|record|a", SECRET)
    assert sealer.open("items|record|a", sealed) == SECRET
    assert sealer.seal("items|record|a", SECRET) != sealed
    for place, octets in (
        ("items|record|b", sealed),
        ("items|record|a", sealed[:-1]),
        ("items|record|a", b""),
        ("items|record|a", bytes(40)),
    ):
        with pytest.raises(StoreError, match="does not open"):
            sealer.open(place, octets)
    with pytest.raises(StoreError, match="does not open"):
        Sealer(bytes([1]) * 32).open("items|record|a", sealed)
    with pytest.raises(StoreError, match="16 octets instead of 32"):
        Sealer(bytes(16))


def test_the_wrong_key_is_told_at_once(place: Path) -> None:
    open_store(place).close()
    (place / "state.key").write_bytes(bytes(32))
    with pytest.raises(StoreError, match="the key is another one"):
        open_store(place)
    (place / "state.key").write_bytes(bytes(31))
    with pytest.raises(StoreError, match="31 octets instead of 32"):
        open_store(place)


def test_a_lost_key_is_not_replaced(place: Path) -> None:
    open_store(place).close()
    (place / "state.key").unlink()
    with pytest.raises(StoreError, match=r"state\.key is gone"):
        open_store(place)
    assert not (place / "state.key").exists()


def test_a_key_made_before_a_crash_is_used(place: Path) -> None:
    place.mkdir(mode=0o700)
    (place / "state.new").write_bytes(b"half a k")  # the crash came while it was written
    open_store(place).close()
    key = (place / "state.key").read_bytes()
    assert len(key) == 32
    for file in place.glob("state.db*"):
        file.unlink()  # the crash came before the database
    open_store(place).close()
    assert (place / "state.key").read_bytes() == key


# -- who may use it --------------------------------------------------------------------------------------


def test_two_agents_cannot_share_it(place: Path, store: SqliteStore) -> None:
    with pytest.raises(StoreError, match="another agent uses"):
        open_store(place)
    store.close()
    open_store(place).close()


def test_a_failed_opening_gives_the_lock_back(place: Path) -> None:
    open_store(place).close()
    key = (place / "state.key").read_bytes()
    (place / "state.key").write_bytes(bytes(32))
    with pytest.raises(StoreError):
        open_store(place)
    (place / "state.key").write_bytes(key)
    open_store(place).close()


def test_what_is_no_database_is_refused(place: Path) -> None:
    open_store(place).close()
    (place / "state.db").write_bytes(b"this is a text file, not a database " * 100)
    with pytest.raises(StoreError, match="cannot be used"):
        open_store(place)


def test_a_database_of_another_time_is_refused(place: Path) -> None:
    open_store(place).close()
    other = sqlite3.connect(place / "state.db")
    other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(StoreError, match="schema 99"):
        open_store(place)


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        open_store(tmp_path / "file" / "state")


def test_a_damaged_value_is_told(place: Path, store: SqliteStore) -> None:
    store.put("record", "a", b"1")
    store.write(entry())
    store.close()
    other = sqlite3.connect(place / "state.db")
    other.execute("UPDATE items SET value = zeroblob(40)")
    other.execute("UPDATE journal SET context = zeroblob(40)")
    other.commit()
    other.close()
    again = open_store(place)
    with pytest.raises(StoreError, match=r"items\|record\|a does not open"):
        again.get("record", "a")
    assert len(again.history()) == 1  # the list needs no key
    again.close()


@pytest.mark.parametrize(
    ("damage", "places"),
    [
        ("UPDATE items SET value = zeroblob(40) WHERE key = 'a'", ["items|record"]),
        ("UPDATE journal SET context = zeroblob(40) WHERE number = 1", ["journal|source"]),
        ("UPDATE journal SET epoch = 'many' WHERE number = 1", ["journal|source"]),
        ("UPDATE ledger SET row = zeroblob(40) WHERE key LIKE '69%'", ["ledger|target"]),
    ],
)
def test_b23_what_cannot_be_read_is_set_aside_and_the_rest_is_used(
    place: Path, store: SqliteStore, damage: str, places: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    store.put("record", "a", b"1")
    store.put("record", "b", b"2")
    store.write(entry(1))
    store.write(entry(2))
    ledger: Ledger[TargetFacts] = Ledger(store, "target")
    ledger.note(SA, drawn="done")
    ledger.note(OTHER, drawn="done")
    store.close()
    other = sqlite3.connect(place / "state.db")
    other.execute(damage)
    other.commit()
    other.close()
    again = open_store(place)
    left = (
        [key for key, _ in again.items("record")],
        [one.transfer_id[-1] for one in again.open_transfers()],
        [row.sa for row in Ledger[TargetFacts](again, "target").all()],
    )
    whole = (["a", "b"], [1, 2], [OTHER, SA])
    assert [len(one) for one in left].count(1) == 1
    assert all(set(some) <= set(every) for some, every in zip(left, whole, strict=True))
    assert [one.place for one in again.aside()] == places
    assert again.aside()[0].why
    assert places[0] in caplog.text
    again.close()
    # it stays there, and is told as long as it does
    once_more = open_store(place)
    assert [one.place for one in once_more.aside()] == places
    once_more.close()


def test_a_closed_store_raises_its_own_error(store: SqliteStore) -> None:
    store.close()
    with pytest.raises(StoreError, match="cannot be used"):
        store.put("record", "a", b"1")


# -- the journal -----------------------------------------------------------------------------------------


def test_an_entry_comes_back_as_it_was(store: SqliteStore) -> None:
    first = entry(detail="waits", phases={"export": 1.5}, moved={"messages": 2}, status=Status.PEER_SILENT)
    store.write(first)
    assert store.find("source", first.transfer_id) == first
    assert store.find("target", first.transfer_id) is None
    assert store.open_transfers() == [first]


@pytest.mark.parametrize("durable", [True, False])
def test_an_entry_is_replaced_but_for_its_beginning(store: SqliteStore, durable: bool) -> None:
    store.write(entry())
    later = entry(
        state="done", epoch=2, context=None, final=None, started=5000.0, updated=6000.0, result="moved"
    )
    store.write(later, durable=durable)
    found = store.find("source", later.transfer_id)
    assert found == replace(later, started=1001.0)
    assert store.open_transfers() == []
    # the same id in the other role is another entry: both gateways of a test may share a store
    store.write(entry(role="target"))
    assert [found.role for found in store.open_transfers()] == ["target"]


def test_several_are_written_at_once_or_none(store: SqliteStore) -> None:
    with pytest.raises(StoreError):
        store.write(entry(1), entry(2, epoch=1 << 63))
    assert store.history() == []
    store.write(entry(1), entry(2))
    assert {found.transfer_id for found in store.history()} == {entry(1).transfer_id, entry(2).transfer_id}


def test_what_is_written_soon_goes_with_what_is_written_next(place: Path, store: SqliteStore) -> None:
    def on_disk() -> list[str]:
        with closing(sqlite3.connect(place / "state.db")) as db:
            return [row[0] for row in db.execute("SELECT state FROM journal ORDER BY number")]

    store.write(entry(1, state="checking"), soon=True)
    found = store.find("source", entry(1).transfer_id)
    assert found is not None and found.state == "checking" and on_disk() == []
    store.write(entry(1, state="preparing"))
    assert on_disk() == ["preparing"]
    store.write(entry(1, state="prepared"), soon=True)
    assert on_disk() == ["preparing"]
    store.put("record", "one", SECRET)
    assert on_disk() == ["prepared"]
    store.write(entry(2, state="cleaning"), soon=True)
    assert [one.state for one in store.open_transfers()] == on_disk() == ["prepared", "cleaning"]


def test_history_is_newest_first_and_without_secrets(place: Path, store: SqliteStore) -> None:
    for number in range(5):
        store.write(entry(number, result="moved"))
    found = store.history(3)
    assert [one.started for one in found] == [1004.0, 1003.0, 1002.0]
    assert all(one.context is None and one.final is None for one in found)
    other = sqlite3.connect(f"file:{place / 'state.db'}?mode=ro", uri=True)
    columns = [column[0] for column in other.execute("SELECT * FROM history").description]
    other.close()
    assert "context" not in columns
    assert "final" not in columns


def test_epochs_are_remembered_by_sa(store: SqliteStore) -> None:
    assert store.epochs(SA) == (0, -1)
    store.write(entry(1, epoch=3, result="moved", state="done"))
    store.write(entry(2, epoch=2, result="moved", state="owned", role="target"))
    store.write(entry(3, epoch=9, sa=(b"anotheri", b"anotherr")))
    assert store.epochs(SA) == (3, 2)


def test_the_newest_transfer_of_an_sa_is_one_that_is_open_or_moved_it(store: SqliteStore) -> None:
    assert store.latest(SA) is None
    store.write(entry(1, state="thawing"))
    first = store.latest(SA)
    assert first is not None and first[0] == "source"
    store.write(entry(2, result="moved", state="owned", role="target"))
    store.write(entry(3, result="aborted", state="aborted", role="target"))
    store.write(entry(1, state="thawing"))
    newest = store.latest(SA)
    assert newest is not None and newest[0] == "target" and newest != first


def test_it_knows_what_it_took_from_whom(store: SqliteStore) -> None:
    store.write(entry(1, role="target", state="prepared"))
    store.write(entry(4, role="target", state="preparing"))
    store.write(entry(2, role="target", state="aborted", result="kept"))
    store.write(entry(3, role="source", state="done", result="moved"))
    assert not store.owned_from("nsg", "198.51.100.7")
    store.write(entry(1, role="target", state="owning"))
    assert store.owned_from("nsg", "198.51.100.7")
    assert not store.owned_from("psg", "198.51.100.7")
    assert not store.owned_from("nsg", "198.51.100.8")


def test_pruning_forgets_only_what_has_ended(store: SqliteStore) -> None:
    store.write(entry(1, result="moved"))
    store.write(entry(2))
    store.write(entry(3, result="moved", updated=9000.0))
    assert store.prune(5000.0) == 1
    assert [one.transfer_id[-1] for one in store.history()] == [3, 2]


def test_opening_prunes_what_is_very_old(place: Path, store: SqliteStore) -> None:
    store.write(entry(1, result="moved"))
    store.close()
    open_store(place).close()
    for now, left in ((1001.0, 1), (1001.0 + HISTORY, 1), (1002.0 + HISTORY, 0)):
        again = open_store(place, now=now)
        assert len(again.history()) == left
        again.close()


def test_a_checkpoint_empties_the_log_while_others_write(place: Path, store: SqliteStore) -> None:
    for _ in range(CHECKPOINT + 1):
        store.put("record", "a", bytes(1000))
    log = place / "state.db-wal"
    assert store.wants_checkpoint
    with ThreadPoolExecutor(1) as thread:
        checkpoint = thread.submit(store.checkpoint)
        store.put("record", "a", b"last")
        checkpoint.result()
    assert not store.wants_checkpoint
    store.checkpoint()
    assert log.stat().st_size >= LOG_SIZE  # given back already if the other wrote last
    for _ in range(10):
        store.put("record", "a", b"last")
    assert log.stat().st_size == LOG_SIZE  # written from its start again, and what was beyond given back
    assert store.get("record", "a") == b"last"


def sealed_values(place: Path) -> list[bytes]:
    """The context, the final state, a note and a row of the ledger, as they are on the disk."""
    with closing(sqlite3.connect(place / "state.db")) as db:
        return [
            value
            for select in (
                "SELECT context FROM journal",
                "SELECT final FROM journal",
                "SELECT value FROM items",
                "SELECT row FROM ledger",
            )
            for (value,) in db.execute(select)
        ]


def found_in(place: Path, value: bytes) -> list[str]:
    return [path.name for path in place.iterdir() if value in path.read_bytes()]


def test_what_was_deleted_is_in_no_file_after_the_log_was_emptied(place: Path, store: SqliteStore) -> None:
    store.keep("source", "sa", b"row with keys" * 20)
    store.put("record", "sa", b"keys of the SA" * 20)
    moving = replace(entry(), context=b"context" * 50, final=b"final" * 50, result="")
    store.write(moving)
    values = sealed_values(place)
    store.checkpoint()  # some in the database, and in its log as well
    store.write(replace(moving, state="done", result="moved", context=None, final=None))
    store.keep("source", "sa", None)
    store.delete("record", "sa")
    assert len(values) == 4 and all(found_in(place, value) for value in values)
    store.erase()
    assert [found_in(place, value) for value in values] == [[]] * 4
    assert store.history()[0].result == "moved"


def test_a_log_that_nobody_empties_is_bounded(place: Path, store: SqliteStore) -> None:
    """What the HA socket tells is stored while no transfer ends: 36,000 messages took 325 MB."""
    log = place / "state.db-wal"
    for number in range(4000):
        store.put("record", str(number % 10), bytes(9000))
    assert log.stat().st_size < (LOG_PAGES + 100) * 4200


def test_the_disk_gets_back_what_is_deleted(place: Path, store: SqliteStore) -> None:
    for number in range(1000):
        store.put("record", str(number), bytes(9000))
    store.checkpoint()
    assert (place / "state.db").stat().st_size > 9_000_000
    for number in range(1000):
        store.delete("record", str(number))
    store.checkpoint()
    assert (place / "state.db").stat().st_size < (SPARE_PAGES + 64) * 4096


def test_a_database_of_before_gives_back_too(place: Path, store: SqliteStore) -> None:
    store.put("record", "a", b"kept")
    store.close()
    with closing(sqlite3.connect(place / "state.db")) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("PRAGMA auto_vacuum = 0")
        db.execute("VACUUM")
        db.execute("PRAGMA journal_mode = WAL")
        assert db.execute("PRAGMA auto_vacuum").fetchone() == (0,)
    with open_store(place) as again:
        assert again.get("record", "a") == b"kept"
    with closing(sqlite3.connect(place / "state.db")) as db:
        assert db.execute("PRAGMA auto_vacuum").fetchone() == (2,)


def in_vain(transfer_id: bytes) -> JournalEntry:
    """What a peer offered, and was refused."""
    return replace(
        entry(), transfer_id=transfer_id, role="target", peer="rogue", state="aborted", result="aborted"
    )


def test_b22_a_checkpoint_prunes_the_journal_of_a_running_agent(store: SqliteStore) -> None:
    for number in range(ABORTED + 50):
        store.write(in_vain(number.to_bytes(8)))
    others = (
        replace(in_vain(b"another."), peer="psg"),
        replace(in_vain(b"taken..."), state="owned", result="moved"),
        replace(in_vain(b"open...."), state="held", result=""),
    )
    for other in others:
        store.write(other)
    store.checkpoint(2000.0)
    left = [one.transfer_id for one in store.history(10_000)]
    assert len(left) == ABORTED + len(others)
    assert (49).to_bytes(8) not in left and (50).to_bytes(8) in left
    assert all(other.transfer_id in left for other in others)
    store.checkpoint(2000.0 + HISTORY)
    assert [one.transfer_id for one in store.history()] == [b"open...."]


def test_a_number_too_large_is_a_store_error(store: SqliteStore) -> None:
    with pytest.raises(StoreError, match="too large"):
        store.write(entry(epoch=1 << 63))


def test_a_full_disk_is_a_store_error(store: SqliteStore) -> None:
    store._db.execute("PRAGMA max_page_count = 1")  # as small as it already is: it cannot grow
    with pytest.raises(StoreError, match="cannot be used"):
        store.put("record", "a", os.urandom(1 << 20))


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE journal SET mn = CAST(x'6dee' AS TEXT) WHERE transfer_id = x'7474747474747474'",
        "UPDATE journal SET detail = CAST(x'ff' AS TEXT) WHERE transfer_id = x'7474747474747474'",
        "UPDATE items SET key = CAST(x'ff' AS TEXT) WHERE key = 'k1'",
        "UPDATE ledger SET key = CAST(x'ff' AS TEXT) WHERE key = 'k1'",
    ],
)
def test_an_octet_that_is_no_text_hides_no_other_row(place: Path, damage: str) -> None:
    with open_store(place) as store:
        for ident in (b"t" * 8, b"u" * 8):
            store.write(JournalEntry(ident, "source", "b", SA, "mn", "192.0.2.1", "released", 1, 1e9, 1e9))
        for key in ("k1", "k2"):
            store.put("detour", key, b"v")
            store.keep("source", key, b"row")
    with closing(sqlite3.connect(place / "state.db")) as database:
        database.execute(damage)
        database.commit()
    with open_store(place) as store:
        assert len(store.open_transfers()) == len(store.history()) == 2
        assert ("k2", b"v") in store.items("detour") and "k2" in str(store.rows("source"))


def test_the_log_is_written_back_before_writers_wait(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Noted(sqlite3.Connection):
        def execute(self, *args: object) -> sqlite3.Cursor:
            said.append(str(args[0]))
            return super().execute(*args)  # type: ignore[arg-type]

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: connect(*args, factory=Noted, **more))
    store.erase()
    assert [line for line in said if "checkpoint" in line] == [
        "PRAGMA wal_checkpoint(PASSIVE)",
        "PRAGMA wal_checkpoint(TRUNCATE)",
    ]


def test_nothing_stays_under_the_old_key(
    place: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("note", "k", b"value")
    (sealed,) = store._db.execute("SELECT value FROM items").fetchone()
    assert sealed in (place / "state.db-wal").read_bytes()
    store.rekey(bytes(range(32)))
    assert not any(sealed in (place / name).read_bytes() for name in ("state.db", "state.db-wal"))
    assert store.get("note", "k") == b"value"

    def refuses(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(sqlite3, "connect", refuses)
    store.rekey(bytes(32))  # the new key holds, whatever becomes of the log
    assert store.get("note", "k") == b"value"
