"""Times at which steps of this process began and ended, for a picture of a handover over all hosts (I/O).

It is an aid for developers: without `begin`, nothing is recorded and a span costs one comparison. With it,
each span that has ended and each message becomes a line of JSON at the end of a file:

    {"step": "freeze", "kind": "step", "begin": NS, "end": NS, "of": "9f31…", "failed": "BusyError"}
    {"message": "PCTD", "way": "sent", "peer": "nsg", "at": NS, "octets": 402}

Times are nanoseconds of CLOCK_REALTIME, which hosts on one kernel share. `of` is the transfer that the work
is for, empty if it is for none; `failed` is the name of the exception that ended the span, and only present
then. The lines contain names from this program, transfers' ids, peers' names, and lengths: never a key, an
SPI or an octet of a message.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import time
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar, cast

from .errors import UsageError

log = logging.getLogger("ikectx.trace")

VARIABLE = "IKECTX_TRACE"
"""The environment variable with the name of the file. An agent that finds it calls `begin`."""

Kind = Literal["step", "part", "call"]
"""A step of a handover; a part of a step; one request to charon or the kernel."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Output:
    """The destination of the lines: one trace for each process."""

    file: int | None = None
    """Descriptor of the open file; None: nothing is recorded."""


_output = _Output()
_of: ContextVar[bytes] = ContextVar("ikectx-trace-of", default=b"")


def begin(path: str) -> None:
    """Record from now on, at the end of this file. Errors: UsageError if it cannot be written."""
    end()
    try:
        # O_APPEND and one write for each line keep the lines of several processes and threads apart
        _output.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"{VARIABLE}: {path}: {error.strerror}") from None


def end() -> None:
    """Record nothing any more."""
    if _output.file is not None:
        os.close(_output.file)
    _output.file = None


def _write(line: dict[str, object]) -> None:
    if _output.file is None:
        return
    try:
        os.write(_output.file, json.dumps(line).encode() + b"\n")
    except OSError as error:
        # a full disk must not end a handover
        log.warning("nothing is traced any more: %s", error.strerror)
        end()


class _Span:
    """A context manager that records how long its block took."""

    __slots__ = ("_began", "_kind", "_step")

    def __init__(self, step: str, kind: Kind) -> None:
        self._step = step
        self._kind = kind
        self._began = 0

    def __enter__(self) -> None:
        self._began = time.time_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended(self._step, self._began, self._kind, "" if kind is None else kind.__name__)


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def span(step: str, kind: Kind = "step") -> contextlib.AbstractContextManager[None]:
    """Record how long the block takes, and whether an exception ends it."""
    return _NOTHING if _output.file is None else _Span(step, kind)


def ended(step: str, began: int, kind: Kind = "step", failed: str = "") -> None:
    """Record a span that began then (ns of CLOCK_REALTIME) and ends now."""
    if _output.file is None:
        return
    line: dict[str, object] = {"step": step, "kind": kind, "begin": began, "end": time.time_ns()}
    line["of"] = _of.get().hex()
    if failed:
        line["failed"] = failed
    _write(line)


def spanned(step: str, kind: Kind = "part") -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """`span` around each call of a function, or each run of a coroutine function."""

    def wrap(function: Callable[_P, _R]) -> Callable[_P, _R]:
        if inspect.iscoroutinefunction(function):

            async def traced(*args: _P.args, **kwargs: _P.kwargs) -> Any:
                with span(step, kind):
                    return await function(*args, **kwargs)

            @functools.wraps(function)
            def run(*args: _P.args, **kwargs: _P.kwargs) -> Any:
                # without a trace the coroutine runs without another one around it
                return (function if _output.file is None else traced)(*args, **kwargs)

            return cast(Callable[_P, _R], run)

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if _output.file is None:
                return function(*args, **kwargs)
            with span(step, kind):
                return function(*args, **kwargs)

        return call

    return wrap


class about:
    """Spans and messages in the block, and in tasks and threads begun in it, are recorded for this
    transfer."""

    __slots__ = ("_before", "_transfer_id")

    def __init__(self, transfer_id: bytes) -> None:
        self._transfer_id = transfer_id

    def __enter__(self) -> None:
        self._before = _of.set(self._transfer_id)

    def __exit__(self, *_: object) -> None:
        _of.reset(self._before)


def transfer_id() -> bytes:
    """The transfer that what happens now is for, see `about`; empty: none."""
    return _of.get()


def message(way: Literal["sent", "received"], name: str, peer: str, octets: int | None = None) -> None:
    """Record a message to or from the gateway of that name; `octets`: its length, if it is known."""
    if _output.file is not None:
        line: dict[str, object] = {"message": name, "way": way, "peer": peer, "at": time.time_ns()}
        _write(line if octets is None else {**line, "octets": octets})
