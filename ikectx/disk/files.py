"""The files beside a store's database: its key, and the lock of the one agent that may use it (I/O).

Errors: StoreError, and OSError if the disk does not let us.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from pathlib import Path

from ikectx.errors import StoreError

from .seal import KEY_SIZE


def private(path: Path) -> None:
    """Errors: StoreError if others can read it."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        only = "700" if path.is_dir() else "600"
        raise StoreError(f"{path} has mode {mode:o}: others can get at it", hint=f"chmod {only} {path}")


def lock_of(path: Path) -> int:
    """A descriptor of the file, locked. Errors: StoreError if another agent has locked it."""
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


def key_of(path: Path, *, may_make: bool) -> bytes:
    """The key in the file. `may_make`: a file that is not there is made. Errors: StoreError."""
    if may_make and not path.exists():
        # whole or not at all: a crash must not leave a short key behind
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_SIZE))
            file.flush()
            os.fsync(file.fileno())
        os.link(fresh, path)  # fails where a key is: never overwrite one
        os.unlink(fresh)
    try:
        private(path)
        key = path.read_bytes()
    except FileNotFoundError:
        raise StoreError(
            f"{path} is gone, and without it state.db cannot be read",
            hint="restore state.key from a backup, or move state.db away to start anew",
        ) from None
    if len(key) != KEY_SIZE:
        raise StoreError(
            f"{path} has {len(key)} octets instead of {KEY_SIZE}", hint="restore it from a backup"
        )
    return key
