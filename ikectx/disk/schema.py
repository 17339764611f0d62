"""The tables of `state.db`, and what a store of the schema before does not have. Pure."""

from __future__ import annotations

SCHEMA = 3
"""Version of the tables (3: with the audit log, see `audit`); stores of versions 1 and 2 are taken over when
they are opened."""

TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE items (kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
                    PRIMARY KEY (kind, key)) WITHOUT ROWID;
CREATE TABLE ledger (role TEXT NOT NULL, key TEXT NOT NULL, row BLOB NOT NULL,
                     PRIMARY KEY (role, key)) WITHOUT ROWID;
CREATE TABLE aside (number INTEGER PRIMARY KEY, place TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
                    why TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE journal (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    transfer_id BLOB NOT NULL, role TEXT NOT NULL, peer TEXT NOT NULL,
    spi_i BLOB NOT NULL, spi_r BLOB NOT NULL, mn TEXT NOT NULL, mn_address TEXT NOT NULL,
    state TEXT NOT NULL, epoch INTEGER NOT NULL, context BLOB, final BLOB,
    started REAL NOT NULL, updated REAL NOT NULL,
    detail TEXT NOT NULL, result TEXT NOT NULL, status INTEGER NOT NULL,
    phases TEXT NOT NULL, moved TEXT NOT NULL,
    UNIQUE (transfer_id, role));
CREATE INDEX journal_sa ON journal (spi_i, spi_r);
CREATE INDEX journal_open ON journal (result) WHERE result = '';
CREATE VIEW history AS
    SELECT number, hex(transfer_id) AS transfer_id, role, peer, hex(spi_i) AS spi_i, hex(spi_r) AS spi_r,
           mn, mn_address, state, epoch, result, status, detail, started, updated, phases, moved
    FROM journal ORDER BY number DESC;
"""

SINCE_2 = [one for one in TABLES.split(";\n") if "TABLE ledger" in one or "TABLE aside" in one]
"""What a store of schema 1 does not have."""
PLACES = {
    "items": (
        "SELECT value FROM items WHERE kind = ? AND key = ?",
        "DELETE FROM items WHERE kind = ? AND key = ?",
    ),
    "ledger": (
        "SELECT row FROM ledger WHERE role = ? AND key = ?",
        "DELETE FROM ledger WHERE role = ? AND key = ?",
    ),
}
"""By table: how one row is read, and how it is taken out."""
SEALED = (
    (
        "SELECT 'meta|' || name, value, name FROM meta",
        "UPDATE meta SET value = ? WHERE name = ?",
    ),
    (
        "SELECT 'items|' || kind || '|' || key, value, kind, key FROM items",
        "UPDATE items SET value = ? WHERE kind = ? AND key = ?",
    ),
    (
        "SELECT 'ledger|' || role || '|' || key, row, role, key FROM ledger",
        "UPDATE ledger SET row = ? WHERE role = ? AND key = ?",
    ),
    (
        "SELECT 'journal|' || role || '|' || lower(hex(transfer_id)) || '|context', context, number"
        " FROM journal WHERE context IS NOT NULL",
        "UPDATE journal SET context = ? WHERE number = ?",
    ),
    (
        "SELECT 'journal|' || role || '|' || lower(hex(transfer_id)) || '|final', final, number"
        " FROM journal WHERE final IS NOT NULL",
        "UPDATE journal SET final = ? WHERE number = ?",
    ),
)
"""Sealed values: their place, the value and the row's key; and how one is replaced."""
