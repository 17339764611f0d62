"""An agent as a process: logging, signals, its store, systemd's readiness notification (I/O).

Also work that goes on while a client is told of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ikectx import trace
from ikectx.disk.place import open_store, rotate_key
from ikectx.disk.store import SqliteStore
from ikectx.errors import UsageError
from ikectx.escape import Escaping
from ikectx.log_limit import LogLimit
from ikectx.mistakes import log_mistake
from vici_bridge.vici.codec import Message, with_json

from .memory import protect_memory

log = logging.getLogger("ikectx")

CREDENTIAL = "ikectx.state-key"
"""The store's key as a credential of systemd (LoadCredential=, LoadCredentialEncrypted=)."""

T = TypeVar("T")


class Service(Protocol):
    """A service that runs until it is stopped."""

    async def start(self) -> None:
        """Errors: IkectxError; `stop` is called all the same."""

    async def stop(self) -> None: ...


def run(
    state_dir: Path,
    make: Callable[[SqliteStore], Service],
    state_key: Path | None = None,
    mark: Path | None = None,
) -> int:
    """Run the service from `make` until SIGTERM or SIGINT. Errors: IkectxError if it cannot start.

    `state_key`: as for `key_file`; `mark`: as for `open_store`.
    """
    level = os.environ.get("IKECTX_LOG") or "info"
    if level.upper() not in logging.getLevelNamesMapping():
        raise UsageError(
            f"IKECTX_LOG is no log level: {level!r}", hint="one of debug, info, warning, error, critical"
        )
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(log_format())
    logging.basicConfig(level=level.upper(), handlers=[stream])
    limits: list[tuple[logging.Handler, LogLimit]] = []
    for handler in logging.getLogger().handlers:
        limits.append((handler, LogLimit(handler, time.monotonic)))
        handler.addFilter(limits[-1][1])
        handler.addFilter(Escaping())
    os.umask(0o077)
    protect_memory()
    if path := os.environ.get(trace.VARIABLE):
        trace.begin(path)
        log.warning("when each step begins and ends is written to %s", path)
    try:
        if sys.version_info < (3, 12):
            # as later versions do; else each updown script takes a thread that waits for its end
            asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
        asyncio.run(_serve(state_dir, make, key_file(state_key), mark))
    finally:
        for handler, limit in limits:
            limit.end()
            handler.removeFilter(limit)  # it counts no more, and would drop what is logged from now on
    return 0


class JournalFormatter(logging.Formatter):
    """Begins each line with its priority in angle brackets, as systemd's journal reads it (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        level = next((number for least, number in _PRIORITIES if record.levelno >= least), 7)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""syslog's priorities by the least level of logging."""


def log_format() -> logging.Formatter:
    """The form of the log's lines on standard error: for the journal, for a terminal, or for a file."""
    plain = "%(levelname)s %(name)s: %(message)s"
    if _is_journal():
        return JournalFormatter(plain)
    return logging.Formatter(f"%(asctime)s {plain}" if sys.stderr.isatty() else plain)


def _is_journal() -> bool:
    """Whether standard error is the journal's stream, which systemd names in the environment."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def key_file(configured: Path | None) -> Path | None:
    """Where the store's key is: as configured, else systemd's credential; None: in the store's directory."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if configured is None and folder:
        given = Path(folder) / CREDENTIAL
        return given if given.exists() else None
    return configured


def rotate(store: SqliteStore, state_dir: Path, state_key: Path | None, request: Message) -> Message:
    """`rotate-key`: seal the store with another key. Errors: StoreError, UsageError."""
    given = request.get("key", "")
    present = key_file(state_key)
    if present is not None and not given:
        raise UsageError(
            f"the store's key comes from {present}, so the agent cannot make another one",
            hint="make 32 octets, say with `head -c 32 /dev/urandom`, and name their file with --key",
        )
    many = rotate_key(store, state_dir, Path(given) if given else None)
    log.warning("the store has another key now: %d values were sealed anew", many)
    return with_json({"sealed": many, "key": given or str(state_dir / "state.key")})


async def _serve(
    state_dir: Path,
    make: Callable[[SqliteStore], Service],
    state_key: Path | None,
    mark: Path | None,
) -> None:
    store = open_store(state_dir, now=time.time(), key_file=state_key, mark=mark)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_mistake)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        service = make(store)
        try:
            await service.start()
            _collect_less()
            _notify_ready()
            await stop.wait()
            log.info("stopping")
        finally:
            await service.stop()
    finally:
        store.close()


def _collect_less() -> None:
    """Look for cycles of objects less often, and not among those of the program itself.

    Contexts and messages have no cycles, so a move of an SA spent some 4 % of its time on looking.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _mistake(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an exception that was not caught: its place only, because its text may contain a callback's
    arguments."""
    error = context.get("exception")
    if isinstance(error, OSError):  # for instance no descriptor for a connection, which is no mistake of ours
        log.error("the event loop: %s", error.strerror or type(error).__name__)
    elif isinstance(error, BaseException):
        log_mistake(log, "a callback", error)
    else:
        log.error("the event loop: %s", str(context.get("message")).partition(":")[0])


def _notify_ready() -> None:
    """systemd's readiness protocol (sd_notify): one datagram, nothing without NOTIFY_SOCKET."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.send(b"READY=1")


async def until_done(work: asyncio.Task[Any], items: asyncio.Queue[T]) -> AsyncIterator[T]:
    """The items until the work has ended and the queue is empty. A client that leaves stops nothing."""
    while not work.done() or not items.empty():
        getter = asyncio.ensure_future(items.get())
        try:
            await asyncio.wait({getter, work}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not getter.done():
                getter.cancel()
        if getter.done() and not getter.cancelled():
            yield getter.result()
