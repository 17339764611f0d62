"""A store's log after a loss of power: what was synced stays, and the store opens."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from ikectx_cli.lab.store_cut import HEADER, cut, valid_end


def written(path: Path, rows: int, *, old: int = 0) -> sqlite3.Connection:
    """A database with a log; `old`: rows of a round of the log before this one."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE t (n INTEGER)")
    if old:
        for number in range(old):
            db.execute("INSERT INTO t VALUES (?)", (-number,))
        db.execute("PRAGMA wal_checkpoint(RESTART)")
    for number in range(rows):
        db.execute("INSERT INTO t VALUES (?)", (number,))
    return db


def test_no_log(tmp_path: Path) -> None:
    assert valid_end(tmp_path / "none") == ("", 0)
    assert cut(tmp_path / "none", ("", 0), random.Random(1)) == 0


def test_frames_of_an_earlier_round_are_not_valid(tmp_path: Path) -> None:
    db = written(tmp_path / "a.db", 2, old=20)
    log = tmp_path / "a.db-wal"
    salt, end = valid_end(log)
    assert len(salt) == 16
    assert HEADER < end < log.stat().st_size
    db.close()


@pytest.mark.parametrize("seed", range(20))
def test_what_was_synced_stays(tmp_path: Path, seed: int) -> None:
    db = written(tmp_path / "a.db", 5)
    synced = valid_end(tmp_path / "a.db-wal")
    for number in range(5, 12):
        db.execute("INSERT INTO t VALUES (?)", (number,))
    for name in ("a.db", "a.db-wal"):
        shutil.copy(tmp_path / name, tmp_path / f"cut-{name}")
    db.close()
    lost = cut(tmp_path / "cut-a.db-wal", synced, random.Random(seed))
    assert (tmp_path / "cut-a.db-wal").stat().st_size >= synced[1]
    after = sqlite3.connect(tmp_path / "cut-a.db")
    numbers = [number for (number,) in after.execute("SELECT n FROM t")]
    assert numbers == list(range(len(numbers)))
    assert 5 <= len(numbers) <= 12
    assert len(numbers) == 12 or lost > 0
    after.close()
