"""The audit log of a store: rows that are chained, so that nobody changes one unseen (I/O: SQLite).

Row n has HMAC-SHA256(key, MAC of row n - 1 | n as 64 bits | text). The key is random, made with the table,
and sealed in `meta` like everything else, so it stays the same when the store gets another key. Two anchors
have MACs of their own: the row before the first one that is kept, because old rows are pruned, and the last
row, because otherwise nobody would miss rows at the end.

Not detected: a whole store that was replaced by an older copy of itself (compare with a `head` that was noted
elsewhere), and rows by somebody who has the store's key.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ikectx.errors import StoreError, UsageError
from ikectx.mac import equal, hmac_sha256

from .seal import Sealer

log = logging.getLogger(__name__)

TABLES = """
CREATE TABLE audit (number INTEGER PRIMARY KEY, line TEXT NOT NULL, mac BLOB NOT NULL);
CREATE TABLE audit_ends (name TEXT PRIMARY KEY, number INTEGER NOT NULL, mac BLOB NOT NULL, tag BLOB NOT NULL)
    WITHOUT ROWID;
"""
KEPT = 400 * 86400
"""Seconds that a row is kept, and"""
ROWS = 100_000
"""rows at most: the oldest go."""
_KEY = "meta|audit"
_NONE = bytes(32)
"""The MAC before row 1."""
_SHOWN = 20
"""Findings at most of a verification."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What a verification found. `head`: number and MAC of the last row; `findings`: what is wrong, in
    words."""

    rows: int
    first: int
    pruned: int
    head: str
    findings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "ok": not self.findings,
            "rows": self.rows,
            "first": self.first,
            "pruned": self.pruned,
            "head": self.head,
            "findings": list(self.findings),
        }


def make(db: sqlite3.Connection, sealer: Sealer) -> None:
    """The tables, and a key. In the caller's transaction."""
    for statement in TABLES.split(";\n"):
        db.execute(statement)
    db.execute("INSERT INTO meta VALUES ('audit', ?)", (sealer.seal(_KEY, secrets.token_bytes(32)),))
    Audit(db, sealer).begin()


class Audit:
    """The log of one open store. Every method may raise sqlite3.Error."""

    def __init__(self, db: sqlite3.Connection, sealer: Sealer) -> None:
        """Errors: StoreError when the log's key does not open."""
        self._db = db
        found = db.execute("SELECT value FROM meta WHERE name = 'audit'").fetchone()
        if found is None:
            raise StoreError(
                "the key of the audit log is gone from the store", hint="restore the store from a backup"
            )
        self._key = sealer.open(_KEY, found[0])

    def begin(self) -> None:
        """Anchor the end of a log that has no rows yet."""
        self._put("head", 0, _NONE)

    def append(self, *lines: Mapping[str, object]) -> None:
        """Add rows, and move the end. In the caller's transaction, because one without the other is no log.

        If the end was tampered with, a number is left out, so that each later verification finds a row gone.
        """
        end, last = self._end("head"), self._last()
        number, mac = last if end is None else max(end, last)
        number += 0 if end == last else 1
        for line in lines:
            number += 1
            text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
            mac = self._mac(mac, number, text.encode("utf-8", "replace"))
            self._db.execute("INSERT INTO audit VALUES (?, ?, ?)", (number, text, mac))
        self._put("head", number, mac)

    def lines(self, limit: int) -> list[dict[str, Any]]:
        """The newest rows, newest first, with their `number`. Errors: StoreError."""
        newest = "SELECT number, CAST(line AS BLOB) FROM audit ORDER BY number DESC LIMIT ?"
        found = self._db.execute(newest, (limit,))
        try:
            return [{"number": number, **json.loads(line)} for number, line in found]
        except (ValueError, TypeError, RecursionError):
            raise StoreError(
                "the audit log has a row that makes no sense", hint="`ikectx history --verify` names it"
            ) from None

    def prune(self, before: float) -> None:
        """Forget the first rows as far as they are from before that time (seconds since 1970), and what is
        more than `ROWS`. One row of a clock that was wrong takes none of those before it along."""
        last = self._db.execute("SELECT max(number) FROM audit").fetchone()[0]
        if last is None:
            return
        kept = self._db.execute(
            "SELECT number FROM audit WHERE number > ? AND ifnull(CASE WHEN json_valid(line)"
            " THEN json_extract(line, '$.at') >= ? END, 1) ORDER BY number LIMIT 1",
            (last - ROWS, before),
        ).fetchone()
        end = last + 1 if kept is None else kept[0]
        row = self._db.execute(
            "SELECT number, mac FROM audit WHERE number < ? ORDER BY number DESC LIMIT 1", (end,)
        ).fetchone()
        if row is None:
            return
        self._put("start", row[0], row[1] if isinstance(row[1], bytes) else b"")
        self._db.execute("DELETE FROM audit WHERE number < ?", (end,))

    def verify(self, head: str = "") -> Verified:
        """Check every row. `head`: that of an earlier verification, whose row must still be as it was.

        Errors: UsageError when `head` is none.
        """
        noted = _read_head(head) if head else None
        self._db.execute("BEGIN")  # all as of one moment: an agent may write, or prune, meanwhile
        try:
            return self._verify(noted)
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _verify(self, noted: tuple[int, bytes] | None) -> Verified:
        findings: list[str] = []
        number, mac = 0, _NONE
        if (start := self._end("start", findings)) is not None:
            number, mac = start
        first = number + 1
        rows = 0
        # as octets, because what somebody has put there need not be UTF-8
        every = (
            "SELECT number, typeof(line) = 'text' AND typeof(mac) = 'blob', CAST(line AS BLOB),"
            " CAST(mac AS BLOB) FROM audit ORDER BY number"
        )
        for found, typed, line, found_mac in self._db.execute(every):
            if found != number + 1:
                findings.append(f"{_these(number + 1, found - 1)} gone")
            elif not typed:
                findings.append(f"row {found} was changed")
            elif not equal(found_mac, self._mac(mac, found, line)):
                findings.append(f"row {found} was changed, or is in the place of another one")
            if noted is not None and noted[0] == found and noted[1] != found_mac:
                findings.append(f"row {found} is not the one of the head that was noted")
            number, mac = found, found_mac
            rows += 1
        end = self._end("head", findings)
        if end is not None and end[0] > number:
            findings.append(f"{_these(number + 1, end[0])} gone: the end of the log was cut off")
        elif end is not None and end[0] < number:
            findings.append(f"{_these(end[0] + 1, number)} not the agent's: the log ended before")
        if noted is not None and noted[0] > number:
            findings.append(f"the log ends at row {number}, and the head that was noted is row {noted[0]}")
        return Verified(rows, first, first - 1, f"{number}:{mac.hex()}", tuple(findings[:_SHOWN]))

    def _last(self) -> tuple[int, bytes]:
        last = "SELECT number, CAST(mac AS BLOB) FROM audit ORDER BY number DESC LIMIT 1"
        found: tuple[int, bytes] | None = self._db.execute(last).fetchone()
        return self._end("start") or (0, _NONE) if found is None else found

    def _end(self, name: str, findings: list[str] | None = None) -> tuple[int, bytes] | None:
        found = self._db.execute("SELECT number, mac, tag FROM audit_ends WHERE name = ?", (name,)).fetchone()
        if found is None and name == "start":
            return None  # nothing was pruned yet
        with contextlib.suppress(TypeError, OverflowError, AttributeError):
            number, mac, tag = found
            if equal(tag, self._tag(name, number, mac)):
                return number, mac
        if findings is not None:
            findings.append(f"the anchor of the log's {'end' if name == 'head' else 'beginning'} was changed")
        return None

    def _put(self, name: str, number: int, mac: bytes) -> None:
        tag = self._tag(name, number, mac)
        self._db.execute("INSERT OR REPLACE INTO audit_ends VALUES (?, ?, ?, ?)", (name, number, mac, tag))

    def _mac(self, before: bytes, number: int, line: bytes) -> bytes:
        return hmac_sha256(self._key, before + number.to_bytes(8, signed=True) + line)

    def _tag(self, name: str, number: int, mac: bytes) -> bytes:
        return hmac_sha256(self._key, f"{name}|{number}|{mac.hex()}".encode())


def _these(first: int, last: int) -> str:
    return f"row {first} is" if first == last else f"rows {first} to {last} are"


def _read_head(text: str) -> tuple[int, bytes]:
    number, _, mac = text.partition(":")
    with contextlib.suppress(ValueError):
        if len(found := bytes.fromhex(mac)) == 32:
            return int(number), found
    raise UsageError(
        "the head is no NUMBER:MAC", hint="name the `head` that `ikectx history --verify` has printed before"
    )


def opened_or_anew(db: sqlite3.Connection, sealer: Sealer) -> Audit:
    """The log of a store that opens. If its key was damaged it goes on with another one, because an
    agent must start all the same; each verification then tells of the rows before."""
    try:
        return Audit(db, sealer)
    except StoreError as error:
        log.error("the audit log cannot be verified any more, and goes on with another key: %s", error)
    sealed = sealer.seal(_KEY, secrets.token_bytes(32))
    db.execute("INSERT OR REPLACE INTO meta VALUES ('audit', ?)", (sealed,))
    return Audit(db, sealer)


@contextlib.contextmanager
def opened(path: Path, key: bytes) -> Iterator[Audit]:
    """The log of the database at `path`, whether its agent runs or not. Errors: StoreError, also for what is
    done with it."""
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=1.0)) as db:
            db.execute("PRAGMA query_only = ON")
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'audit'").fetchall():
                raise StoreError(f"{path} is the store of a version without audit log")
            yield Audit(db, Sealer(key))
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be read: {error}", hint="is it whole, and a store's?") from None
