"""Whether a store is the one that the last agent wrote: a mark outside it, which no backup has (I/O).

A store can be lost, or an older copy of it restored, while charon and the kernel go on. Its mark is a file
in `/run`, whose content is lost with the SAs when the machine starts anew: which entry of the journal was
written last, and when. A store that does not have that entry, or an older state of it, lacks transfers.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from ikectx.engine.journal import JournalEntry, JournalHas, Role
from ikectx.errors import StoreError

from .store import HISTORY, SqliteStore

_GAPS = "gaps"
"""The row of `meta` that says since when transfers may be missing (seconds since 1970)."""
_SIZE = 64
"""Octets of the file; each mark is written over the last one."""


class MarkedStore(SqliteStore):
    """A store with a mark. `has`: what its journal is worth, see `JournalHas`.

    As long as that is "old" the mark stays, so that an agent that starts next finds the same: until
    `believed` was called, and all transfers that were open at the start have ended.
    """

    def __init__(
        self,
        path: Path | str,
        key: bytes,
        mark: Path,
        *,
        lock: int | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Errors: StoreError."""
        super().__init__(path, key, lock=lock)
        self.has: JournalHas = "whole"
        self._open: set[tuple[bytes, Role]] = set()
        self._believed = True
        try:
            self._mark = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._lock = None  # the caller's, until there is a store
            super().close()
            raise StoreError(f"{mark}: {error.strerror}") from None
        try:
            if self._is_old(wall()):
                self._note_gaps(wall())
                self.has, self._believed = "old", False
                self._open = {(one.transfer_id, one.role) for one in self.open_transfers()}
            elif self._has_gaps(wall()):
                self.has = "gaps"
        except BaseException:
            self._lock = None
            self.close()
            raise

    def _is_old(self, now: float) -> bool:
        try:
            role, ident, updated = os.pread(self._mark, _SIZE, 0).decode().split()
            transfer_id, written = bytes.fromhex(ident), float(updated)
        except ValueError:
            return False  # there is no mark yet
        if written < now - HISTORY:
            return False  # such old entries are pruned
        if role == _GAPS:
            return self._gaps() < written
        entry = self.find("source" if role == "source" else "target", transfer_id)
        # if the agent was killed before it could set the mark, the entry may be newer
        return entry is None or entry.updated < written

    def _note_gaps(self, now: float) -> None:
        value = self._sealer.seal(f"meta|{_GAPS}", repr(now).encode())
        with self._errors():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_GAPS, value))

    def _has_gaps(self, now: float) -> bool:
        """Transfers are asked about for no longer than the journal has them."""
        return self._gaps() >= now - HISTORY

    def _gaps(self) -> float:
        with self._errors():
            row = self._db.execute("SELECT value FROM meta WHERE name = ?", (_GAPS,)).fetchone()
        return 0.0 if row is None else float(self._sealer.open(f"meta|{_GAPS}", row[0]))

    def believed(self) -> None:
        """All that was to be done once, because the store is old, is done."""
        self._believed = True
        if self.has == "old" and not self._open:
            self._put_mark(_GAPS, b"\0", self._gaps())

    def write(self, *entries: JournalEntry, durable: bool = True, soon: bool = False) -> None:
        """As `SqliteStore.write`."""
        super().write(*entries, durable=durable, soon=soon)
        if soon:
            return
        self._open -= {(one.transfer_id, one.role) for one in entries if one.result}
        if entries and self._believed and not self._open:
            last = entries[-1]
            self._put_mark(last.role, last.transfer_id, last.updated)

    def _put_mark(self, role: str, ident: bytes, updated: float) -> None:
        line = f"{role} {ident.hex()} {updated!r}".ljust(_SIZE - 1) + "\n"
        with contextlib.suppress(OSError):  # a full /run: the mark is an older one
            os.pwrite(self._mark, line.encode(), 0)

    def close(self) -> None:
        """Give database, lock and mark back; closing twice is harmless."""
        super().close()
        if self._mark >= 0:
            os.close(self._mark)
            self._mark = -1
