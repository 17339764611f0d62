"""The store's directory: its key from elsewhere, and another key instead."""

from __future__ import annotations

import os
import sqlite3
import stat
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ikectx.disk.place import open_store, rotate_key
from ikectx.disk.store import SqliteStore, opens
from ikectx.engine.ledger import Ledger, TargetFacts
from ikectx.errors import StoreError

from .test_store import SA, SECRET, entry

SEALED = replace(entry(), context=b"a context", final=b"a final state")


def a_key(path: Path, octets: bytes = b"k" * 32) -> Path:
    path.write_bytes(octets)
    path.chmod(0o600)
    return path


def fill(store: SqliteStore) -> None:
    store.put("record", "a", SECRET)
    store.write(SEALED)
    ledger: Ledger[TargetFacts] = Ledger(store, "target")
    ledger.note(SA, stage="active")


def all_there(store: SqliteStore) -> bool:
    [found] = store.history()
    kept = store.find("source", found.transfer_id)
    assert kept is not None
    assert (kept.context, kept.final) == (SEALED.context, SEALED.final)
    ledger: Ledger[TargetFacts] = Ledger(store, "target")
    assert ledger.of(SA).facts.stage == "active"
    return store.get("record", "a") == SECRET and not store.aside()


def test_another_key_seals_everything_from_now_on(tmp_path: Path) -> None:
    place = tmp_path / "state"
    with open_store(place) as store:
        fill(store)
        old = (place / "state.key").read_bytes()
        assert rotate_key(store, place) >= 5
        assert all_there(store)
        store.put("record", "b", b"later")
    new = (place / "state.key").read_bytes()
    assert new != old
    assert opens(place / "state.db", new)
    assert not opens(place / "state.db", old)
    assert not (place / "state.key.new").exists()
    with open_store(place) as store:
        assert all_there(store)
        assert store.get("record", "b") == b"later"


@pytest.mark.parametrize("sealed_already", [False, True])
def test_a_crash_between_two_keys_leaves_the_one_that_opens(tmp_path: Path, *, sealed_already: bool) -> None:
    place = tmp_path / "state"
    with open_store(place) as store:
        fill(store)
        new = a_key(place / "state.key.new")
        if sealed_already:
            store.rekey(new.read_bytes())
    with open_store(place) as store:
        assert all_there(store)
    assert ((place / "state.key").read_bytes() == b"k" * 32) is sealed_already
    assert not (place / "state.key.new").exists()


def test_the_key_may_be_elsewhere(tmp_path: Path) -> None:
    place, key = tmp_path / "state", a_key(tmp_path / "key")
    with open_store(place, key_file=key) as store:
        fill(store)
    assert not (place / "state.key").exists()
    with pytest.raises(StoreError, match="gone") as caught:
        open_store(place)
    assert "state_key" in caught.value.hint
    with open_store(place, key_file=key) as store:
        assert all_there(store)
        rotate_key(store, place, a_key(tmp_path / "next", b"n" * 32))
    with pytest.raises(StoreError, match="does not open"):
        open_store(place, key_file=key)
    with open_store(place, key_file=tmp_path / "next") as store:
        assert all_there(store)


def test_from_a_key_of_its_own_to_one_from_elsewhere(tmp_path: Path) -> None:
    place, key = tmp_path / "state", a_key(tmp_path / "key")
    with open_store(place) as store:
        fill(store)
        rotate_key(store, place, key)
    assert not (place / "state.key").exists()
    with open_store(place, key_file=key) as store:
        assert all_there(store)


def acl(path: Path, *entries: tuple[int, int, int]) -> Path:
    """Give it an access control list: (kind, permissions, user or group)."""
    octets = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", octets)
    return path


NOBODY = 0xFFFFFFFF
OWNER, GROUP, MASK, OTHERS = (1, 4, NOBODY), (4, 0, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY)


def test_a_credential_that_systemd_gives_the_agents_own_user_is_private(tmp_path: Path) -> None:
    """It is root's, and has an entry for that user; its mode is 440 (systemd 254 and later, with User=)."""
    key = acl(a_key(tmp_path / "key"), OWNER, (2, 4, os.geteuid()), GROUP, MASK, OTHERS)
    assert stat.S_IMODE(key.stat().st_mode) == 0o440
    with open_store(tmp_path / "state", key_file=key) as store:
        fill(store)


@pytest.mark.parametrize(
    "more", [[(2, 4, 4711)], [(8, 4, 4711)], [(4, 4, NOBODY)]], ids=["another user", "a group", "its group"]
)
def test_a_key_that_others_get_by_an_access_control_list(tmp_path: Path, more: list[Any]) -> None:
    entries = sorted([OWNER, MASK, OTHERS, *more, *([] if more[0][0] == 4 else [GROUP])])
    key = acl(a_key(tmp_path / "key"), *entries)
    with pytest.raises(StoreError, match="others can get at it"):
        open_store(tmp_path / "state", key_file=key)


@pytest.mark.parametrize(("octets", "mode"), [(b"k" * 31, 0o600), (b"k" * 32, 0o644)])
def test_a_key_that_is_none_changes_nothing(tmp_path: Path, octets: bytes, mode: int) -> None:
    place, key = tmp_path / "state", a_key(tmp_path / "key", octets)
    key.chmod(mode)
    with open_store(place) as store:
        fill(store)
        with pytest.raises(StoreError):
            rotate_key(store, place, key)
        with pytest.raises(StoreError):
            rotate_key(store, place, tmp_path / "none")
        assert all_there(store)
    with open_store(place) as store:
        assert all_there(store)


def test_a_disk_that_is_full_leaves_the_old_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "state"

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    with open_store(place) as store:
        fill(store)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            rotate_key(store, place)
        monkeypatch.undo()
        assert all_there(store)
    with open_store(place) as store:
        assert all_there(store)


def test_a_second_try_does_not_lose_the_key_that_the_first_one_has_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first failed when the database had its new key already; the second removed the only copy of it."""
    place = tmp_path / "state"
    store = open_store(place)
    store.put("note", "k", b"value")
    rekey = store.rekey

    def late(key: bytes) -> int:
        rekey(key)
        raise StoreError("no descriptor is left for the checkpoint")

    with monkeypatch.context() as first:
        first.setattr(store, "rekey", late)
        with pytest.raises(StoreError):
            rotate_key(store, place)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as second:
        second.setattr(os, "fsync", full)
        with pytest.raises(StoreError):
            rotate_key(store, place)
    store.close()
    again = open_store(place)
    assert again.get("note", "k") == b"value"
    again.close()


def test_while_the_database_cannot_be_read_no_key_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "state"
    with open_store(place) as store:
        (place / "state.key.new").write_bytes(bytes(32))

        def none_left(_path: Path) -> sqlite3.Connection:
            raise sqlite3.OperationalError("unable to open database file")

        with monkeypatch.context() as short:
            short.setattr(sqlite3, "connect", none_left)
            with pytest.raises(StoreError, match="which key it needs"):
                rotate_key(store, place)
        assert (place / "state.key.new").exists()
        rotate_key(store, place)
        assert not (place / "state.key.new").exists()
    open_store(place).close()


def test_a_key_that_was_put_in_the_place_of_the_old_one_stays(tmp_path: Path) -> None:
    """`rotate-key --key STATE_DIR/state.key` removed that very file, and the store was lost."""
    place = tmp_path / "state"
    with open_store(place) as store:
        store.put("note", "k", b"value")
        (place / "state.key").write_bytes(bytes(range(32)))
        rotate_key(store, place, place / "state.key")
    with open_store(place) as again:
        assert again.get("note", "k") == b"value"
