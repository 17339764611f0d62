"""The ledger's rows: as octets, in the store, in one transaction with the journal; and stores of before."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ikectx.disk.place import open_store
from ikectx.disk.schema import SCHEMA
from ikectx.disk.store import SqliteStore
from ikectx.engine.ledger import (
    FACTS,
    Ledger,
    MobileFacts,
    Relayed,
    Role,
    Row,
    SourceFacts,
    TargetFacts,
    dumps,
    from_notes,
    loads,
)
from ikectx.errors import StoreError, WireError
from ikectx.sa.context import Endpoint
from ikectx.sa.name import SaName
from ikectx.wire import cbor
from tests import peers
from tests.ikectx.disk.test_store import entry
from vici_bridge.effects.mobile_move import MobileMove
from vici_bridge.ha.record import Record
from vici_bridge.policy.new_names import Plan

SCHEMA_1 = Path(__file__).parent.parent.parent / "fixtures" / "schema_1"
SA = SaName(b"initiato", b"responde")

spis = st.binary(min_size=4, max_size=4)
blobs = st.lists(st.binary(min_size=1, max_size=40), max_size=4).map(tuple)
numbers = st.lists(st.tuples(spis, st.integers(0, 2**64 - 1)), max_size=3).map(tuple)
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
words = st.text("abcdefgh -", min_size=1, max_size=12)
facts = {
    "source": st.builds(
        SourceFacts,
        policies=st.none() | blobs,
        sends_to=words | st.just(""),
        request=st.none() | st.integers(0, 2**32 - 1),
        unsure=st.booleans(),
        renaming=st.booleans(),
        ended=st.booleans(),
        counters=numbers,
        reqids=numbers,
        unique_id=st.integers(0, 2**32),
        numbers=st.none() | numbers,
    ),
    "target": st.builds(
        TargetFacts,
        stage=st.sampled_from(["", "installing", "active", "imported"]),
        since=st.integers(0, 2**40),
        plan=st.binary(max_size=80),
        guards=blobs,
        relay=st.none()
        | st.builds(
            Relayed,
            st.builds(Endpoint, addresses, st.integers(0, 65535)),
            st.lists(spis, max_size=3).map(tuple),
            addresses,
        ),
        drawn=st.sampled_from(["", "begun", "done"]),
        new_names=st.binary(max_size=40),
        named=st.integers(0, 2**40),
        reqids=numbers,
        unique_id=st.integers(0, 2**32),
    ),
    "mobile": st.builds(
        MobileFacts, quiet=st.booleans(), move=st.binary(max_size=80), mirror=st.binary(max_size=80)
    ),
}


def rows(role: str) -> st.SearchStrategy[Row[Any]]:
    return st.builds(
        Row,
        sa=st.builds(SaName, st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8)),
        facts=facts[role],
        transfer_id=st.sampled_from([b"", bytes(8)]),
        step=words | st.just(""),
        done=st.lists(words, max_size=3).map(tuple),
        begun=words | st.just(""),
        later=st.lists(words, max_size=2).map(tuple),
        context=st.lists(st.tuples(st.integers(0, 65535), st.binary(max_size=20)), max_size=2).map(tuple),
    )


@pytest.mark.parametrize("role", list(FACTS))
@given(data=st.data())
def test_a_row_comes_back_as_it_was(role: Role, data: st.DataObject) -> None:
    row = data.draw(rows(role))
    assert loads(role, dumps(row)) == row


def test_what_a_later_version_wrote_is_not_half_read() -> None:
    row: Row[Any] = Row(SA, MobileFacts(quiet=True))
    head = cbor.loads(dumps(row))
    for later in ([2, *head[1:]], [*head[:-1], {**head[-1], 99: True}], [*head, 1]):
        with pytest.raises(StoreError):
            loads("mobile", cbor.dumps(later))
    with pytest.raises(StoreError):
        loads("source", dumps(Row(SA, TargetFacts(plan=b"1"))))


def test_a_row_shows_no_secret() -> None:
    secret = b"the key of a renamed SA"
    for known in (TargetFacts(plan=secret), MobileFacts(mirror=secret, move=secret)):
        assert secret.decode() not in repr(Row(SA, known))


# --- in the store ---------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = open_store(tmp_path / "state")
    yield opened
    opened.close()


def kept(store: SqliteStore) -> dict[SaName, Row[SourceFacts]]:
    """What the disk has."""
    other = sqlite3.connect(store._path)
    found = other.execute("SELECT role, key, row FROM ledger").fetchall()
    other.close()
    opened = [loads(role, store._sealer.open(f"ledger|{role}|{key}", row)) for role, key, row in found]
    return {row.sa: row for row in opened}


def test_a_row_that_may_wait_is_written_with_the_next_one(store: SqliteStore) -> None:
    ledger: Ledger[SourceFacts] = Ledger(store, "source")
    row = ledger.note(SA, soon=True, renaming=True)
    assert ledger.get(SA) == row
    assert kept(store) == {}
    other = ledger.note(SaName(bytes(8), bytes(8)), ended=True)
    assert kept(store) == {SA: row, other.sa: other}
    ledger.drop(SA)
    assert kept(store) == {other.sa: other}
    assert Ledger[SourceFacts](store, "source").all() == [other]


def test_row_and_journal_are_written_in_one_transaction(store: SqliteStore) -> None:
    ledger: Ledger[SourceFacts] = Ledger(store, "source")
    row = ledger.note(SA, soon=True, renaming=True)
    store._db.execute("CREATE TRIGGER full BEFORE INSERT ON journal BEGIN SELECT RAISE(ABORT, 'full'); END")
    with pytest.raises(StoreError, match="full"):
        store.write(entry())
    assert kept(store) == {}
    store._db.execute("DROP TRIGGER full")
    store.write(entry())
    assert kept(store) == {SA: row}
    assert len(store.history()) == 1


def test_a_row_that_cannot_be_written_is_as_it_was(store: SqliteStore) -> None:
    ledger: Ledger[SourceFacts] = Ledger(store, "source")
    row = ledger.note(SA, renaming=True)
    store._db.execute("CREATE TRIGGER full BEFORE INSERT ON ledger BEGIN SELECT RAISE(ABORT, 'full'); END")
    with pytest.raises(StoreError, match="full"):
        ledger.note(SA, ended=True)
    store._db.execute("DROP TRIGGER full")
    assert ledger.get(SA) == row
    store.write(entry())
    assert kept(store) == {SA: row}


def test_what_waits_is_written_when_the_store_is_closed(tmp_path: Path) -> None:
    with open_store(tmp_path / "state") as store:
        row = Ledger[SourceFacts](store, "source").note(SA, soon=True, renaming=True)
    with open_store(tmp_path / "state") as store:
        assert Ledger[SourceFacts](store, "source").get(SA) == row


def test_nothing_of_a_row_is_on_the_disk_in_the_clear(store: SqliteStore) -> None:
    secret = b"the key of a renamed SA"
    Ledger[TargetFacts](store, "target").note(SA, plan=secret)
    for file in Path(store._path).parent.iterdir():
        assert secret not in file.read_bytes()


# --- stores of before -----------------------------------------------------------------------------------


def a_store_of_before(tmp_path: Path) -> Path:
    place = tmp_path / "state"
    shutil.copytree(SCHEMA_1, place)
    place.chmod(0o700)
    for file in place.iterdir():
        file.chmod(0o600)
    return place


def test_a_store_of_schema_1_is_taken_over(tmp_path: Path) -> None:
    place = a_store_of_before(tmp_path)
    for turn in ("migrated", "opened again"):
        with open_store(place) as store:
            check(store, turn)
    other = sqlite3.connect(place / "state.db")
    assert other.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
    kinds = {kind for (kind,) in other.execute("SELECT DISTINCT kind FROM items")}
    other.close()
    assert kinds == {"record", "origin", "doubt", "token", "update-spi", "last-handover"}


def check(store: SqliteStore, turn: str) -> None:
    assert store.aside() == [], turn
    assert [one.result for one in store.history()] == ["moved", ""]

    source = Ledger[SourceFacts](store, "source")
    frozen, sending, ended = (peers.a_context(number).spis for number in (1, 2, 3))
    known = source.of(frozen).facts
    assert known == replace(SourceFacts(), policies=known.policies, request=7, unsure=True, renaming=True)
    assert known.policies is not None and len(known.policies) == 2
    assert source.of(sending).facts == SourceFacts(sends_to="nsg", request=9)
    assert source.of(ended).facts == SourceFacts(request=11, ended=True)
    assert len(source) == 3

    target = Ledger[TargetFacts](store, "target")
    installing, active, came = (peers.a_context(number).spis for number in (11, 12, 13))
    known_t = target.of(installing).facts
    assert (known_t.stage, known_t.drawn, len(known_t.guards)) == ("installing", "done", 1)
    plan = Plan.loads(known_t.plan)
    assert (plan.spis, plan.ike, plan.children[0].new_in) == (installing, b"newname1", b"\xc0\0\0\1")
    spi = peers.a_context(11).children[0].spi_in
    relay = Relayed(Endpoint.of("198.51.100.7", 4500), (spi,), ip_address("203.0.113.1"))
    assert known_t.relay == relay
    assert target.of(active).facts == TargetFacts(stage="active", relay=relay)
    known_t = target.of(came).facts
    assert (known_t.stage, known_t.since, known_t.named) == ("imported", 1_700_000_000, 1_700_000_000)
    assert known_t.new_names
    assert len(target) == 3

    mobile = Ledger[MobileFacts](store, "mobile")
    moving, asking = (peers.a_context(number).spis for number in (21, 22))
    move = MobileMove.loads(mobile.of(moving).facts.move)
    assert move.ike == SaName(b"otherini", b"otherres")
    assert mobile.of(moving).facts.quiet
    assert b"fresh" in mobile.of(asking).facts.mirror
    assert len(mobile) == 2

    record = Record()
    record.load(store.items("record"))
    assert record.names()


def test_a_note_that_cannot_be_read_is_set_aside_and_the_rest_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = a_store_of_before(tmp_path)
    other = sqlite3.connect(place / "state.db")
    other.execute("UPDATE items SET value = zeroblob(40) WHERE kind = 'let-go'")
    other.execute("UPDATE items SET key = 'no name of an SA' WHERE kind = 'move'")
    other.commit()
    other.close()
    with open_store(place) as store:
        assert [one.place for one in store.aside()] == ["items|move", *["items|let-go"] * 3]
        frozen = peers.a_context(1).spis
        assert Ledger[SourceFacts](store, "source").of(frozen).facts.policies is not None
        assert Ledger[SourceFacts](store, "source").of(frozen).facts.request is None
    assert "was set aside" in caplog.text


def test_a_migration_that_fails_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    place = a_store_of_before(tmp_path)
    other = sqlite3.connect(place / "state.db")
    other.execute("CREATE TRIGGER full BEFORE DELETE ON items BEGIN SELECT RAISE(ABORT, 'full'); END")
    other.commit()
    with pytest.raises(StoreError, match="full"):
        open_store(place)
    assert other.execute("PRAGMA user_version").fetchone() == (1,)
    assert other.execute("SELECT count(*) FROM items WHERE kind = 'let-go'").fetchone() == (3,)
    assert not other.execute("SELECT * FROM sqlite_master WHERE name = 'ledger'").fetchall()
    other.execute("DROP TRIGGER full")
    other.commit()
    other.close()
    with open_store(place) as store:
        check(store, "at the second start")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["frozen", "let-go", "sending", "import", "relay", "new-names", "plan-guards"]),
            st.sampled_from([SA.key, "no key"]),
            st.binary(max_size=30) | st.sampled_from([b"[]", b"[1,2,3,4]", b'["a",1,["zz"],"b"]', b"null"]),
        ),
        max_size=6,
    )
)
def test_noise_in_notes_stops_no_migration(notes: list[tuple[str, str, bytes]]) -> None:
    made, bad = from_notes(notes)
    assert len(made) + len(bad) <= len(notes)
    for role, row in made:
        try:
            assert loads(role, dumps(row)) == row
        except WireError:
            raise AssertionError("a row that cannot be written") from None
