"""The audit log: what it has, and what its verification finds."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ikectx.disk import audit
from ikectx.disk.place import open_store, read_key, rotate_key
from ikectx.disk.store import HISTORY, SqliteStore
from ikectx.errors import StoreError, UsageError

from .test_store import entry


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def store(place: Path) -> Iterator[SqliteStore]:
    opened = open_store(place)
    yield opened
    opened.close()


def moved(store: SqliteStore, number: int, at: float = 1000.0) -> None:
    store.write(entry(number, audit={"at": at, "transfer": f"{number:016x}", "mn": "mn1.example"}))


def tampered(place: Path, *statements: str) -> audit.Verified:
    """What a verification finds after these; offline, as of a store whose agent is down."""
    with closing(sqlite3.connect(place / "state.db", isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)
    return offline(place)


def offline(place: Path, head: str = "") -> audit.Verified:
    with audit.opened(place / "state.db", read_key(place / "state.key")) as log:
        return log.verify(head)


def test_rows_are_written_with_the_journal_and_are_as_they_were(store: SqliteStore, place: Path) -> None:
    assert store.audit_verify() == audit.Verified(0, 1, 0, f"0:{bytes(32).hex()}")
    store.write(entry(1))
    assert store.audit_lines(10) == [], "a write without a line for the log"
    moved(store, 1)
    moved(store, 2)
    assert [(one["number"], one["transfer"][-1]) for one in store.audit_lines(10)] == [(2, "2"), (1, "1")]
    assert [one["number"] for one in store.audit_lines(1)] == [2]
    found = store.audit_verify()
    assert (found.rows, found.first, found.findings) == (2, 1, ())
    assert offline(place) == found, "while the agent runs, too"
    store.close()
    with open_store(place) as again:
        moved(again, 3)
        assert again.audit_verify(found.head).findings == ()


def test_a_write_that_fails_leaves_neither_row(store: SqliteStore) -> None:
    store._db.execute("CREATE TRIGGER full BEFORE INSERT ON journal BEGIN SELECT RAISE(ABORT, 'full'); END")
    with pytest.raises(StoreError):
        moved(store, 1)
    assert store.audit_lines(10) == [] and store.audit_verify().rows == 0
    store._db.execute("DROP TRIGGER full")
    moved(store, 1)
    assert store.audit_verify().findings == ()


@pytest.mark.parametrize(
    "statements, finding",
    [
        (["UPDATE audit SET line = replace(line, 'mn1', 'mn2') WHERE number = 2"], "row 2 was changed"),
        (["UPDATE audit SET mac = zeroblob(32) WHERE number = 2"], "row 2 was changed"),
        (["UPDATE audit SET mac = 'text' WHERE number = 2"], "row 2 was changed"),
        (["UPDATE audit SET mac = CAST(x'ff' AS TEXT) WHERE number = 4"], "row 4 was changed"),
        (["UPDATE audit SET line = CAST(x'ff' AS TEXT) WHERE number = 2"], "row 2 was changed"),
        (["INSERT INTO audit SELECT number - 9, line, mac FROM audit"], "row -7 was changed"),
        (["DELETE FROM audit WHERE number = 2"], "row 2 is gone"),
        (["DELETE FROM audit WHERE number < 3"], "rows 1 to 2 are gone"),
        (["DELETE FROM audit"], "rows 1 to 4 are gone: the end of the log was cut off"),
        (["DELETE FROM audit WHERE number = 4"], "row 4 is gone: the end of the log was cut off"),
        (
            [
                "UPDATE audit SET number = 9 WHERE number = 2",
                "UPDATE audit SET number = 2 WHERE number = 3",
                "UPDATE audit SET number = 3 WHERE number = 9",
            ],
            "in the place of another one",
        ),
        (
            ["DELETE FROM audit WHERE number = 2", "UPDATE audit SET number = number - 1 WHERE number > 2"],
            "row 2 was changed",
        ),
        (["INSERT INTO audit SELECT number + 1, line, mac FROM audit WHERE number = 4"], "row 5 was changed"),
        (["UPDATE audit_ends SET number = 3 WHERE name = 'head'"], "anchor of the log's end was changed"),
        (["DELETE FROM audit_ends"], "anchor of the log's end was changed"),
        (["DELETE FROM audit_ends", "DELETE FROM audit WHERE number = 4"], "end was changed"),
        (
            [
                "INSERT INTO audit_ends VALUES ('start', 1, x'00', x'00')",
                "DELETE FROM audit WHERE number = 1",
            ],
            "row 1 is gone",
        ),
    ],
)
def test_whatever_was_changed_is_found(
    store: SqliteStore, place: Path, statements: list[str], finding: str
) -> None:
    for number in range(1, 5):
        moved(store, number)
    store.close()
    found = tampered(place, *statements)
    assert any(finding in one for one in found.findings), found.findings
    with open_store(place) as again:  # an agent that goes on does not cover it up
        moved(again, 5)
        assert again.audit_verify().findings


def test_rows_that_are_removed_while_the_agent_runs_are_found(store: SqliteStore, place: Path) -> None:
    for number in range(1, 4):
        moved(store, number)
    assert tampered(place, "DELETE FROM audit WHERE number = 3", "DELETE FROM audit_ends").findings
    moved(store, 4)
    assert any("gone" in one for one in store.audit_verify().findings)


def test_an_older_copy_of_the_store_is_found_by_a_head_that_was_noted(
    store: SqliteStore, place: Path
) -> None:
    moved(store, 1)
    store.close()
    backup = place.with_name("backup")
    shutil.copytree(place, backup)
    with open_store(place) as again:
        moved(again, 2)
        head = again.audit_verify().head
    assert offline(backup).findings == ()
    assert offline(backup, head).findings == ("the log ends at row 1, and the head that was noted is row 2",)
    with open_store(backup) as restored:
        moved(restored, 3)
    assert offline(backup, head).findings == ("row 2 is not the one of the head that was noted",)
    with pytest.raises(UsageError, match="NUMBER:MAC"):
        offline(place, "nonsense")


def test_another_key_of_the_store_changes_no_row(store: SqliteStore, place: Path) -> None:
    moved(store, 1)
    head = store.audit_verify().head
    before = read_key(place / "state.key")
    rotate_key(store, place)
    moved(store, 2)
    assert store.audit_verify(head).findings == ()
    store.close()
    assert offline(place, head).rows == 2
    with pytest.raises(StoreError, match="does not open"), audit.opened(place / "state.db", before):
        pass


def test_pruned_rows_leave_an_anchor(
    store: SqliteStore, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 6):
        moved(store, number, at=1000.0 * number)
    head = store.audit_verify().head
    store.prune(3500.0 + audit.KEPT - HISTORY)
    found = store.audit_verify(head)
    assert (found.rows, found.first, found.pruned, found.findings) == (2, 4, 3, ())
    monkeypatch.setattr(audit, "ROWS", 1)
    store.checkpoint(6000.0)
    assert store.audit_verify(head).rows == 1
    moved(store, 6)
    store.close()
    assert offline(place).findings == ()
    found = tampered(place, "DELETE FROM audit WHERE number = 5")
    assert found.findings == ("row 5 is gone",)


def test_a_row_of_a_wrong_clock_takes_no_others_along(store: SqliteStore) -> None:
    for number, at in enumerate((1000.0, 5000.0, 6.0, 5001.0), 1):
        moved(store, number, at)
    store.prune(3500.0 + audit.KEPT - HISTORY)
    assert [one["number"] for one in store.audit_lines(9)] == [4, 3, 2]
    assert store.audit_verify().findings == ()


def test_a_damaged_row_keeps_no_agent_from_starting(store: SqliteStore, place: Path) -> None:
    moved(store, 1)
    tampered(place, "UPDATE audit SET mac = 'none'")
    store.prune(9e9)
    assert store.audit_lines(5) == []


def test_a_row_that_is_written_during_a_verification_is_no_finding(
    store: SqliteStore, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved(store, 1)
    with audit.opened(place / "state.db", read_key(place / "state.key")) as log:
        end = log._end

        def later(name: str, findings: list[str] | None = None) -> tuple[int, bytes] | None:
            if name == "head":
                moved(store, 2)
            return end(name, findings)

        monkeypatch.setattr(log, "_end", later)
        assert log.verify().findings == ()
    assert store.audit_verify().rows == 2


def test_everything_may_be_pruned(store: SqliteStore) -> None:
    moved(store, 1)
    store.prune(9e9)
    assert store.audit_verify().findings == () and store.audit_verify().rows == 0
    moved(store, 2)
    assert [one["number"] for one in store.audit_lines(5)] == [2]
    assert store.audit_verify().findings == ()


def damage(name: str) -> Callable[[Path], None]:
    def done(place: Path) -> None:
        with closing(sqlite3.connect(place / "state.db", isolation_level=None)) as db:
            db.execute(name)

    return done


@pytest.mark.parametrize(
    "how", ["DELETE FROM meta WHERE name = 'audit'", "UPDATE meta SET value = x'00' WHERE name = 'audit'"]
)
def test_an_agent_starts_though_the_key_of_its_log_is_damaged(
    store: SqliteStore, place: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    moved(store, 1)
    store.close()
    damage(how)(place)
    with pytest.raises(StoreError):
        offline(place)
    with open_store(place) as again:
        moved(again, 2)
        assert any("row 1 was changed" in one for one in again.audit_verify().findings)
    assert "cannot be verified any more" in caplog.text


def test_a_row_that_makes_no_sense_is_an_error_and_no_more(store: SqliteStore, place: Path) -> None:
    moved(store, 1)
    for line in ("'[1]'", "CAST(x'ff' AS TEXT)"):
        tampered(place, f"UPDATE audit SET line = {line}")
        with pytest.raises(StoreError, match="makes no sense"):
            store.audit_lines(5)
    store.prune(9e9)


def test_a_store_of_schema_2_gets_a_log(store: SqliteStore, place: Path) -> None:
    store.write(entry(1))
    store.close()
    with closing(sqlite3.connect(place / "state.db", isolation_level=None)) as db:
        db.executescript("DROP TABLE audit; DROP TABLE audit_ends; DELETE FROM meta WHERE name = 'audit'")
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(StoreError, match="without audit log"):
        offline(place)
    with open_store(place) as migrated:
        assert len(migrated.history()) == 1
        moved(migrated, 2)
    assert json.loads(json.dumps(offline(place).to_json()))["ok"] is True
