"""The journal's table: how a transfer becomes a row of it and back, and which rows are forgotten.

Context and final state are sealed for the row that they stand in; the rest is in the clear.
"""

from __future__ import annotations

import functools
import json
import math
import sqlite3
from dataclasses import replace
from typing import Any

from ikectx.engine.journal import JournalEntry
from ikectx.errors import StoreError
from ikectx.numbers import Status
from ikectx.sa.name import SaName

from .seal import Sealer

ABORTED = 1000
"""Transfers of one peer to here that came to nothing and are remembered: it offers as many as it likes."""

COLUMNS = (
    "transfer_id, role, peer, spi_i, spi_r, mn, mn_address, state, epoch, context, final,"
    " started, updated, detail, result, status, phases, moved"
)
_CHANGE = ("state", "epoch", "updated", "detail", "result", "status", "phases", "moved")
"""Columns that each write has."""
_INSERT = (
    f"INSERT INTO journal ({COLUMNS}) VALUES ({', '.join('?' * len(COLUMNS.split(',')))})"  # noqa: S608
    " ON CONFLICT (transfer_id, role) DO UPDATE SET state = excluded.state,"
    " epoch = excluded.epoch, context = excluded.context, final = excluded.final,"
    " updated = excluded.updated, detail = excluded.detail, result = excluded.result,"
    " status = excluded.status, phases = excluded.phases, moved = excluded.moved"
)

Secrets = tuple[bytes | None, bytes | None]
"""Context and final state of a row."""


def write(db: sqlite3.Connection, sealer: Sealer, entry: JournalEntry, kept: Secrets | None) -> None:
    """Put the entry where (transfer_id, role) is. `kept`: what the row has; None: not known. What stays the
    same is not written again, because an SA that moves goes through a dozen states."""
    numbers = [json.dumps(dict(one)) if one else "{}" for one in (entry.phases, entry.moved)]
    state = entry.state, entry.epoch, entry.updated, entry.detail, entry.result, int(entry.status), *numbers
    if kept is not None:
        sealed = {
            name: _sealed(sealer, entry, name, value)
            for name, value, before in zip(
                ("context", "final"), (entry.context, entry.final), kept, strict=True
            )
            if value != before
        }
        values = (*state, *sealed.values(), entry.transfer_id, entry.role)
        if db.execute(_update(tuple(sealed)), values).rowcount:
            return
    row = (
        *(entry.transfer_id, entry.role, entry.peer, *entry.sa, entry.mn, entry.mn_address),
        *(entry.state, entry.epoch),
        *(_sealed(sealer, entry, "context", entry.context), _sealed(sealer, entry, "final", entry.final)),
        *(entry.started, *state[2:]),
    )
    db.execute(_INSERT, row)


@functools.cache
def _update(sealed: tuple[str, ...]) -> str:
    columns = ", ".join(f"{name} = ?" for name in (*_CHANGE, *sealed))
    return f"UPDATE journal SET {columns} WHERE transfer_id = ? AND role = ?"  # noqa: S608


def _sealed(sealer: Sealer, entry: JournalEntry, name: str, value: bytes | None) -> bytes | None:
    return None if value is None else sealer.seal(_place(entry, name), value)


def parse(row: tuple[object, ...], sealer: Sealer | None) -> JournalEntry:
    """The entry of a row of `COLUMNS`; without `sealer` it has no context and no final state.

    Errors: StoreError, ValueError, TypeError, RecursionError.
    """
    # sqlite gives what was put in; `Any` ends here
    (ident, role, peer, spi_i, spi_r, mn, mn_address, state, epoch, context, final, *rest) = row
    started, updated, detail, result, status, phases, moved = rest
    entry = JournalEntry(
        transfer_id=_octets(ident),
        role="source" if role == "source" else "target",
        peer=str(peer),
        sa=SaName(_octets(spi_i), _octets(spi_r)),
        mn=str(mn),
        mn_address=str(mn_address),
        state=str(state),
        epoch=int(str(epoch)),
        started=float(str(started)),
        updated=float(str(updated)),
        detail=str(detail),
        result=str(result),
        status=Status(int(str(status))),
        phases=_numbers(str(phases)),
        moved=_numbers(str(moved)),
    )
    if not (math.isfinite(entry.started) and math.isfinite(entry.updated)):
        raise ValueError("a time that is none")
    if sealer is None:
        return entry
    return replace(
        entry,
        context=None if context is None else sealer.open(_place(entry, "context"), _octets(context)),
        final=None if final is None else sealer.open(_place(entry, "final"), _octets(final)),
    )


def shown(row: tuple[object, ...]) -> bytes:
    """A row that cannot be parsed, as text to keep."""
    return json.dumps([value.hex() if isinstance(value, bytes) else value for value in row]).encode()


def prune(db: sqlite3.Connection, before: float) -> int:
    """Delete ended transfers last touched before that (seconds since 1970), and those to here that came to
    nothing, but for the last `ABORTED` of each peer; how many."""
    old = db.execute("DELETE FROM journal WHERE result <> '' AND updated < ?", (before,))
    many = db.execute(
        "DELETE FROM journal WHERE number IN (SELECT number FROM (SELECT number,"
        " row_number() OVER (PARTITION BY peer ORDER BY updated DESC, number DESC) AS place"
        " FROM journal WHERE role = 'target' AND result = 'aborted') WHERE place > ?)",
        (ABORTED,),
    )
    return old.rowcount + many.rowcount


def epoch_of(value: object) -> int:
    """An epoch that the journal has. Errors: StoreError."""
    if not isinstance(value, int):
        raise StoreError("the journal holds an epoch that makes no sense")
    return value


def _place(entry: JournalEntry, what: str) -> str:
    return f"journal|{entry.role}|{entry.transfer_id.hex()}|{what}"


def _numbers(text: str) -> dict[str, Any]:
    """A JSON object of numbers. Errors: ValueError, RecursionError."""
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(one, int | float) for one in found.values()):
        raise ValueError("an object of numbers is wanted")
    return found


def _octets(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} instead of octets")
    return value
