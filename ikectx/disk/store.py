"""Journal and escrow on disk: SQLite, every secret value sealed (I/O).

Values, contexts and final states are sealed with AES-256-GCM (nonce 12 octets, random), with table
and key as additional data, so that a sealed value cannot be moved to another row. Names of
items, SPIs, identities and states are in the clear: they are what `history` shows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ikectx.engine.journal import JournalEntry, JournalHas, Role
from ikectx.engine.ledger import NOTES, dumps, from_notes
from ikectx.errors import StoreError
from ikectx.sa.name import SaName

from . import audit, journal_rows
from .journal_rows import epoch_of
from .schema import PLACES, SCHEMA, SEALED, SINCE_2, TABLES
from .seal import Sealer

log = logging.getLogger(__name__)

HISTORY = 90 * 86400
"""Seconds that an ended transfer is remembered. While it is, no late message can revive it."""
CHECKPOINT = 500
"""Writes between two checkpoints of the log."""
LOG_PAGES = 4000
"""Pages of 4 KiB in the write-ahead log at which it is emptied even in the middle of a transfer."""
LOG_SIZE = 4 * 1024 * 1024
"""Octets that the file of the log keeps when it has been emptied."""
SPARE_PAGES = 256
"""Empty pages that the database keeps; the disk gets back what is more, when something is deleted."""
_CHECK = b"ikectx store"
_NOT_TAKEN = "('installing', 'preparing', 'prepared', 'aborted')"
"""States in the journal of a transfer to here that has taken nothing."""
_INCREMENTAL = 2
"""SQLite's auto_vacuum that gives empty pages back when it is told to."""

_KEPT_ASIDE = 1000
"""Rows of `aside`, at most: the oldest go."""


@dataclass(frozen=True, slots=True)
class Aside:
    """Something that could not be read. `place`: the table and kind it stood in; `at`: seconds since 1970."""

    place: str
    key: str
    why: str
    at: float


class _Errors:
    """A context manager that raises SQLite's errors as StoreError. (A generator would take six calls.)"""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, sqlite3.Error | OverflowError):
            raise StoreError(
                f"the journal cannot be used: {error}", hint="check disk space and state.db"
            ) from None


_ERRORS = _Errors()


class SqliteStore:
    """`ports.Store` and the journal of transfers in one database.

    Not for use by two agents at once: `open_store` sees to that. Every method raises StoreError when the
    disk or the database will not do it.
    """

    has: JournalHas = "whole"
    """Whether its journal has all transfers, see `mark.MarkedStore`."""

    def believed(self) -> None:
        """All that is to be done once for a store that is old is done."""

    def __init__(self, path: Path | str, key: bytes, *, lock: int | None = None) -> None:
        """`path` may be ":memory:"; `lock`: a file descriptor to close with the store."""
        self._sealer = Sealer(key)
        self._lock = lock
        self._path = str(path)
        self._durable: bool | None = None
        self._written = 0
        self.wrote: Callable[[], None] | None = None
        """Is called after each write, which survives the process then, but not the power, if it is not
        durable."""
        self._waiting: dict[tuple[str, str, str], bytes | None] = {}
        """Rows of the ledger that are to be written with whatever is written next."""
        self._soon: dict[tuple[bytes, Role], JournalEntry] = {}
        """Entries of the journal that are, by ID and role."""
        self._sealed: dict[tuple[bytes, Role], journal_rows.Secrets] = {}
        """Context and final state that the journal has of transfers that are open, by ID and role."""
        try:
            self._db = sqlite3.connect(str(path), isolation_level=None, timeout=1.0)
        except sqlite3.Error as error:
            raise StoreError(f"{path} does not open: {error}") from None
        try:
            # a damaged octet must not make every row unreadable; what is sealed under that name does not open
            self._db.text_factory = lambda raw: raw.decode(errors="replace")
            with self._errors():
                self._set_up(Path(path).name)
        except StoreError:
            self._db.close()
            raise

    def _set_up(self, name: str) -> None:
        run = self._db.execute
        version = run("PRAGMA user_version").fetchone()[0]
        if version != 1 and run("PRAGMA auto_vacuum").fetchone()[0] != _INCREMENTAL:
            run(f"PRAGMA auto_vacuum = {_INCREMENTAL}")
            with contextlib.suppress(sqlite3.OperationalError):  # a full disk: then the file only grows
                run("VACUUM")  # without it the setting counts for new files only
        run("PRAGMA journal_mode = WAL")
        # not in the middle of a transfer, as long as one ends now and then: see `checkpoint`
        run(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        run(f"PRAGMA journal_size_limit = {LOG_SIZE}")
        run("PRAGMA secure_delete = ON")
        if version == 0:
            run("BEGIN IMMEDIATE")
            for statement in TABLES.split(";\n"):
                run(statement)
            run("INSERT INTO meta VALUES ('check', ?)", (self._sealer.seal("meta|check", _CHECK),))
            audit.make(self._db, self._sealer)
            run(f"PRAGMA user_version = {SCHEMA}")
            run("COMMIT")
        elif version not in (1, 2, SCHEMA):
            raise StoreError(f"{name} has schema {version}, this version knows {SCHEMA}")
        row = run("SELECT value FROM meta WHERE name = 'check'").fetchone()
        if row is None or self._sealer.open("meta|check", row[0]) != _CHECK:
            raise StoreError(f"{name} is not a store of this program")
        if version == 1:
            self._migrate()
        elif version == 2:
            with self._transaction():
                audit.make(self._db, self._sealer)
                run(f"PRAGMA user_version = {SCHEMA}")
        self._audit = audit.opened_or_anew(self._db, self._sealer)

    def _migrate(self) -> None:
        """From schema 1, all of it or nothing: notes about SAs that move become rows of the ledger."""
        with self._transaction():
            audit.make(self._db, self._sealer)
            for statement in SINCE_2:
                self._db.execute(statement)
            notes = [(kind, key, value) for kind in NOTES for key, value in self.items(kind)]
            rows, bad = from_notes(notes)
            for kind, key, why in bad:
                self.set_aside(f"items|{kind}", key, why)
            for role, made in rows:
                self._put_row(role, made.sa.key, dumps(made))
            for kind in NOTES:
                self._db.execute("DELETE FROM items WHERE kind = ?", (kind,))
            # the record of charon's SAs was kept under SPIs with a colon between them
            for key, value in self.items("record"):
                self._db.execute("DELETE FROM items WHERE kind = 'record' AND key = ?", (key,))
                self._put_item("record", key.replace(":", ""), value)
            self._db.execute(f"PRAGMA user_version = {SCHEMA}")
        log.info("the store of an older version was taken over, with %d SAs that move", len(rows))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the block or nothing of it. Errors: StoreError."""
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:  # SQLite has ended it already where the disk is full
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _errors(self) -> _Errors:
        return _ERRORS

    def close(self) -> None:
        """Give database and lock back; closing twice is harmless."""
        with contextlib.suppress(StoreError):
            self._flush()
        self._db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def rekey(self, key: bytes) -> int:
        """Seal every value with `key` from now on, all or none; returns how many. Errors: StoreError.

        A value that does not open is left as it is, and set aside when it is read.
        """
        self._flush()
        fresh, many = Sealer(key), 0
        with self._transaction():
            for select, update in SEALED:
                for place, sealed, *row in self._db.execute(select).fetchall():
                    with contextlib.suppress(StoreError):
                        value = fresh.seal(place, self._sealer.open(place, sealed))
                        self._db.execute(update, (value, *row))
                        many += 1
        self._sealer = fresh
        try:
            self.erase()
        except StoreError as error:  # the new key holds all the same
            log.warning("what was sealed with the old key stays in the log of the store for now: %s", error)
        return many

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- ports.Store -------------------------------------------------------------------------------------

    def put(self, kind: str, key: str, value: bytes, *, soon: bool = False) -> None:
        """Keep `value`, replacing what was there. Survives the process, not the power: nor does any SA."""
        self._keep(("items", kind, key), value, soon)

    def _put_item(self, kind: str, key: str, value: bytes) -> None:
        sealed = self._sealer.seal(f"items|{kind}|{key}", value)
        self._db.execute("INSERT OR REPLACE INTO items VALUES (?, ?, ?)", (kind, key, sealed))

    def get(self, kind: str, key: str) -> bytes | None:
        """The value, None when there is none."""
        if ("items", kind, key) in self._waiting:
            return self._waiting["items", kind, key]
        with self._errors():
            found = self._db.execute(
                "SELECT value FROM items WHERE kind = ? AND key = ?", (kind, key)
            ).fetchone()
        return None if found is None else self._sealer.open(f"items|{kind}|{key}", found[0])

    def delete(self, kind: str, key: str, *, soon: bool = False) -> None:
        """See `ikectx.engine.ports.Store`."""
        self._keep(("items", kind, key), None, soon)
        if soon:
            return
        with self._errors():
            if self._db.execute("PRAGMA freelist_count").fetchone()[0] > SPARE_PAGES:
                # `execute` ends the statement after its first step, which gives back one page
                self._db.executescript("PRAGMA incremental_vacuum(16)")

    def items(self, kind: str) -> Sequence[tuple[str, bytes]]:
        """All (key, value) of a kind, by key."""
        self._flush()
        with self._errors():
            rows = self._db.execute(
                "SELECT key, value FROM items WHERE kind = ? ORDER BY key", (kind,)
            ).fetchall()
        return self._opened(f"items|{kind}", rows)

    def _opened(self, place: str, rows: Iterable[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        """What opens of these; the rest is set aside, because one damaged value must not stop an agent."""
        found = []
        for key, sealed in rows:
            try:
                found.append((key, self._sealer.open(f"{place}|{key}", sealed)))
            except StoreError as error:
                self.set_aside(place, key, str(error))
        return found

    # -- the ledger --------------------------------------------------------------------------------------

    def rows(self, role: str) -> Sequence[tuple[str, bytes]]:
        """All (key, row) of a role, by key."""
        self._flush()
        with self._errors():
            rows = self._db.execute(
                "SELECT key, row FROM ledger WHERE role = ? ORDER BY key", (role,)
            ).fetchall()
        return self._opened(f"ledger|{role}", rows)

    def keep(self, role: str, key: str, row: bytes | None, *, soon: bool = False) -> None:
        """See `ikectx.engine.ports.Store`."""
        self._keep(("ledger", role, key), row, soon)

    def _keep(self, place: tuple[str, str, str], value: bytes | None, soon: bool) -> None:
        """`soon`: with the next row or note that is written, or with the journal's next entry."""
        if soon:
            self._waiting[place] = value
            return
        before = dict(self._waiting)
        self._waiting[place] = value
        try:
            self._sync(False)
            self._flush()
        except StoreError:
            self._waiting = before
            raise

    def _flush(self, *entries: JournalEntry) -> None:
        """Write these, and what waits; where that fails it goes on waiting."""
        due = {**self._soon, **{(one.transfer_id, one.role): one for one in entries}}
        lines = [one.audit for one in entries if one.audit]
        many = len(self._waiting) + len(due) + len(lines)
        if not many:
            return
        with self._transaction() if many > 1 else self._errors():
            self._write_rows()
            for ident, entry in due.items():
                journal_rows.write(self._db, self._sealer, entry, self._sealed.get(ident))
            if lines:
                self._audit.append(*lines)
        self._waiting.clear()
        self._soon.clear()
        for ident, entry in due.items():
            if entry.result:
                self._sealed.pop(ident, None)
            else:
                self._sealed[ident] = entry.context, entry.final
        if self.wrote is not None:
            self.wrote()

    def _write_rows(self) -> None:
        for (table, kind, key), value in self._waiting.items():
            if value is None:
                self._db.execute(PLACES[table][1], (kind, key))
            elif table == "items":
                self._put_item(kind, key, value)
            else:
                self._put_row(kind, key, value)

    def _put_row(self, role: str, key: str, row: bytes) -> None:
        sealed = self._sealer.seal(f"ledger|{role}|{key}", row)
        self._db.execute("INSERT OR REPLACE INTO ledger VALUES (?, ?, ?)", (role, key, sealed))

    # -- what cannot be read -----------------------------------------------------------------------------

    def set_aside(self, place: str, key: str, why: str) -> None:
        """See `ikectx.engine.ports.Store`."""
        table, _, kind = place.partition("|")
        select, delete = PLACES[table]
        with self._errors():
            found = self._db.execute(select, (kind, key)).fetchone()
            if found is not None:
                self._put_aside(place, key, found[0], why)
            self._db.execute(delete, (kind, key))

    def _put_aside(self, place: str, key: str, value: bytes, why: str) -> None:
        log.error("%s of %s cannot be used and was set aside in the store: %s", place, key, why)
        self._db.execute(
            "INSERT INTO aside (place, key, value, why, at) VALUES (?, ?, ?, ?, ?)",
            (place, key, value, why, time.time()),
        )
        self._db.execute(
            "DELETE FROM aside WHERE number <= (SELECT max(number) FROM aside) - ?", (_KEPT_ASIDE,)
        )

    def aside(self) -> list[Aside]:
        """All that was set aside, the newest first."""
        with self._errors():
            rows = self._db.execute("SELECT place, key, why, at FROM aside ORDER BY number DESC").fetchall()
        return [Aside(*row) for row in rows]

    def _sync(self, durable: bool) -> None:
        self._written += 1
        if self._durable is not durable:
            with self._errors():
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable

    @property
    def wants_checkpoint(self) -> bool:
        """Has the write-ahead log grown long?"""
        return self._written > CHECKPOINT

    def checkpoint(self, now: float | None = None) -> None:
        """Move the log into the database. Slow (it syncs), but writers go on: for another thread.

        With `now` (seconds since 1970) the journal is pruned before, see `prune`. Errors: StoreError.
        """
        self._written = 0
        with self._errors(), contextlib.closing(sqlite3.connect(self._path, timeout=1.0)) as other:
            if now is not None:
                other.execute("PRAGMA secure_delete = ON")
                journal_rows.prune(other, now - HISTORY)
                audit.Audit(other, self._sealer).prune(now - audit.KEPT)
                other.commit()
            other.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def sync(self) -> None:
        """Have all that was written so far survive a loss of power. Slow: for another thread."""
        with contextlib.suppress(OSError), open(f"{self._path}-wal", "rb") as log:
            os.fsync(log.fileno())

    def erase(self) -> None:
        """Empty the write-ahead log: sealed values that were deleted or replaced are in no file any more.

        Slow (it syncs): for another thread, between transfers. If somebody writes just then it is left for
        the next time. Errors: StoreError.
        """
        with self._errors(), contextlib.closing(sqlite3.connect(self._path, timeout=1.0)) as other:
            other.execute("PRAGMA wal_checkpoint(PASSIVE)")  # most of the work, during which others may write
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # -- the journal -------------------------------------------------------------------------------------

    def write(self, *entries: JournalEntry, durable: bool = True, soon: bool = False) -> None:
        """Put each entry where (transfer_id, role) is; the moment of the first write stays its `started`.

        All of them, what was to be written soon, and what the audit log is to say, are written in one
        transaction.

        `durable`: on the disk itself when this returns; else it survives the process, not the power. `soon`:
        with whatever is written next, instead of now; those have neither a result nor an audit line.
        """
        if soon:
            self._soon.update({(one.transfer_id, one.role): one for one in entries})
            return
        self._sync(durable)
        self._flush(*entries)

    def find(self, role: Role, transfer_id: bytes) -> JournalEntry | None:
        """That transfer, open or ended."""
        if (transfer_id, role) in self._soon:
            return self._soon[transfer_id, role]
        return next(iter(self._select("role = ? AND transfer_id = ?", (role, transfer_id))), None)

    def open_transfers(self) -> list[JournalEntry]:
        """All that have no result yet, oldest first."""
        with contextlib.suppress(StoreError):  # a full disk: then as they were
            self._flush()
        return self._select("result = ''", ())[::-1]

    def history(self, limit: int = 100) -> list[JournalEntry]:
        """The newest transfers, newest first, without `context` and `final`."""
        with contextlib.suppress(StoreError):
            self._flush()
        return self._select("1", (), limit=limit, sealed=False)

    def audit_lines(self, limit: int) -> list[dict[str, Any]]:
        """The newest rows of the audit log, newest first."""
        with self._errors():
            return self._audit.lines(limit)

    def audit_verify(self, head: str = "") -> audit.Verified:
        """Check the audit log, see `Audit.verify`."""
        with self._errors():
            return self._audit.verify(head)

    def epochs(self, sa: SaName) -> tuple[int, int]:
        """The highest epoch of this SA that any transfer told us of, 0: none did; and the highest in which we
        took it over from somebody, -1: we never did."""
        owned = "CASE WHEN role = 'target' AND state = 'owned' THEN epoch END"
        with self._errors():
            found = self._db.execute(
                f"SELECT max(epoch), max({owned}) FROM journal WHERE spi_i = ? AND spi_r = ?",  # noqa: S608
                sa,
            ).fetchone()
        return epoch_of(found[0] or 0), -1 if found[1] is None else epoch_of(found[1])

    def latest(self, sa: SaName) -> tuple[str, bytes] | None:
        """Role and ID of the newest transfer of this SA that is open, or has moved it."""
        with self._errors():
            found = self._db.execute(
                "SELECT role, transfer_id FROM journal WHERE spi_i = ? AND spi_r = ?"
                " AND result IN ('', 'moved') ORDER BY number DESC LIMIT 1",
                sa,
            ).fetchone()
        if found is None:
            return None
        if not isinstance(found[1], bytes):
            raise StoreError("the journal holds a transfer ID that makes no sense")
        return str(found[0]), found[1]

    def owned_from(self, peer: str, mn_address: str) -> bool:
        """Do we own, or did we take, anything that this peer pushed for this MN?"""
        took = f"role = 'target' AND peer = ? AND mn_address = ? AND state NOT IN {_NOT_TAKEN}"
        return bool(self._select(took, (peer, mn_address), limit=1, sealed=False))

    def prune(self, before: float) -> int:
        """Forget ended transfers last touched before `before` (seconds since 1970); how many went.

        And those to here that came to nothing, but for the last `journal_rows.ABORTED` of each peer.
        """
        with self._transaction():
            self._audit.prune(before + HISTORY - audit.KEPT)
            return journal_rows.prune(self._db, before)

    def _select(
        self, where: str, values: tuple[object, ...], *, limit: int = -1, sealed: bool = True
    ) -> list[JournalEntry]:
        with self._errors():
            rows = self._db.execute(
                f"SELECT {journal_rows.COLUMNS} FROM journal WHERE {where} ORDER BY number DESC LIMIT ?",  # noqa: S608
                (*values, limit),
            ).fetchall()
        return [entry for row in rows if (entry := self._entry(row, sealed)) is not None]

    def _entry(self, row: tuple[object, ...], sealed: bool) -> JournalEntry | None:
        """None: it cannot be read, and was set aside."""
        try:
            return journal_rows.parse(row, self._sealer if sealed else None)
        except (StoreError, ValueError, TypeError, RecursionError) as error:
            why = str(error) if isinstance(error, StoreError) else f"it makes no sense: {error}"
        ident, role = row[0], row[1]
        key = ident.hex() if isinstance(ident, bytes) else repr(ident)
        with self._transaction():
            self._put_aside(f"journal|{role}", key, journal_rows.shown(row), why)
            self._db.execute("DELETE FROM journal WHERE transfer_id IS ? AND role IS ?", (ident, role))
        return None


def opens(path: Path, key: bytes) -> bool:
    """Whether the database at `path` is sealed with `key`. Errors: StoreError, where it cannot be read."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as db:
            row = db.execute("SELECT value FROM meta WHERE name = 'check'").fetchone()
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be read, to see which key it needs: {error}") from None
    try:
        return row is not None and Sealer(key).open("meta|check", row[0]) == _CHECK
    except StoreError:
        return False
