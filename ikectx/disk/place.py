"""The directory of a store: who may use it, the key of its database, and another key instead (I/O).

One directory (0700) holds

- `state.db`: the database, 0600 (`store`);
- `state.key`: the database's key, 32 octets, 0600, made once; not there if the key comes from elsewhere;
- `state.key.new`: the next key, while the database is sealed anew;
- `state.lock`: locked by the one agent that may use the directory.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import struct
from pathlib import Path

from ikectx.errors import StoreError

from .mark import MarkedStore
from .seal import KEY_SIZE
from .store import HISTORY, SqliteStore, opens

_KEY = "state.key"
_NEW = "state.key.new"
_ACL_OWNER, _ACL_USER, _ACL_MASK = 1, 2, 0x10
"""Kinds of entries of an access control list."""


def open_store(
    directory: Path | str,
    *,
    now: float | None = None,
    key_file: Path | None = None,
    mark: Path | None = None,
) -> SqliteStore:
    """The store in `directory`, made when it is not there.

    With `now` (seconds since 1970) what is older than HISTORY is forgotten. `key_file`: where the database's
    key is, 32 octets; None: in the directory, made with it. `mark`: the file by which a lost store, or an
    older copy, is found, see `MarkedStore`; None: neither is.

    Errors: StoreError when another agent uses it, when files are readable by others, when key and
    database do not belong together, or when the disk does not let us.
    """
    place = Path(directory)
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _private(place)
        lock = _lock(place / "state.lock")
    except OSError as error:
        raise StoreError(f"{place}: {error.strerror}") from None
    try:
        database = place / "state.db"
        if key_file is not None:
            key = read_key(key_file)
        else:
            _end_rotation(place)
            key = _own_key(place / _KEY, may_make=not database.exists())
        # made here and not by SQLite, which knows no mode; its -wal and -shm copy the mode of the database
        os.close(os.open(database, os.O_RDWR | os.O_CREAT, 0o600))
        _private(database)
        store = (
            SqliteStore(database, key, lock=lock)
            if mark is None
            else MarkedStore(database, key, mark, lock=lock)
        )
        if now is not None:
            store.prune(now - HISTORY)
        return store
    except OSError as error:
        os.close(lock)
        raise StoreError(f"{place}: {error.strerror}") from None
    except BaseException:
        os.close(lock)
        raise


def rotate_key(store: SqliteStore, directory: Path, key_file: Path | None = None) -> int:
    """Seal everything in the store anew; returns how many values.

    `key_file`: the key from now on, which its owner has made; None: a fresh one, in the directory. It is all
    or nothing, also after a crash: the new key is on the disk before the database needs it, and the old one
    until then. Errors: StoreError; the store then has its old key, or the new one is on the disk as well.
    """
    try:
        if key_file is not None:
            many = store.rekey(read_key(key_file))
            old = directory / _KEY
            if old.exists() and not old.samefile(key_file):
                old.unlink()
        else:
            fresh = directory / _NEW
            _end_rotation(directory)  # an earlier try may have failed when the database had its key already
            _write_key(fresh)
            many = store.rekey(fresh.read_bytes())
            fresh.replace(directory / _KEY)
        _sync(directory)
    except OSError as error:
        raise StoreError(f"{error.filename or directory}: {error.strerror}") from None
    return many


def read_key(path: Path) -> bytes:
    """A key of the store. Errors: StoreError when it is not there, readable by others, or of another size."""
    try:
        _private(path)
        key = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}, the store's key: {error.strerror}") from None
    if len(key) != KEY_SIZE:
        raise StoreError(
            f"{path} has {len(key)} octets instead of {KEY_SIZE}", hint="restore it from a backup"
        )
    return key


def _private(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077 and not _ours_by_acl(path):
        only = "700" if path.is_dir() else "600"
        raise StoreError(f"{path} has mode {mode:o}: others can get at it", hint=f"chmod {only} {path}")


def _ours_by_acl(path: Path) -> bool:
    """Whether an access control list (acl(5)) lets nobody but its owner and this user get at it.

    systemd gives a service with a user of its own its credentials so. stat(2) has the list's mask then where
    the group's permissions are, so mode 440 says nothing about the group. Source: linux/posix_acl_xattr.h.
    """
    try:
        octets = os.getxattr(path, "system.posix_acl_access")
    except OSError:
        return False
    entries = list(struct.iter_unpack("<HHI", octets[4:]))
    return bool(entries) and all(
        not may or tag in (_ACL_OWNER, _ACL_MASK) or (tag == _ACL_USER and who in (0, os.geteuid()))
        for tag, may, who in entries
    )


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreError(
            f"another agent uses {path.parent}",
            hint="stop it, or give this one a `state` directory of its own",
        ) from None
    return descriptor


def _own_key(path: Path, *, may_make: bool) -> bytes:
    if may_make and not path.exists():
        # whole or not at all: a crash must not leave a short key behind
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        _write_key(fresh)
        os.link(fresh, path)  # fails where a key is: never overwrite one
        os.unlink(fresh)
    if not path.exists():
        raise StoreError(
            f"{path} is gone, and without it state.db cannot be read",
            hint="restore state.key from a backup, name the key that is used instead (state_key), or move "
            "state.db away to start anew",
        )
    return read_key(path)


def _write_key(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(KEY_SIZE))
        file.flush()
        os.fsync(file.fileno())


def _end_rotation(place: Path) -> None:
    """After `rotate_key` was cut off: the key that the database is sealed with is the key. Errors: StoreError
    if it cannot be looked at; then all keys stay. OSError."""
    fresh = place / _NEW
    if not fresh.exists():
        return
    key, database = fresh.read_bytes(), place / "state.db"
    if len(key) == KEY_SIZE and database.exists() and opens(database, key):
        fresh.replace(place / _KEY)
        _sync(place)
    else:
        fresh.unlink()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
