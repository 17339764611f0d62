"""`Changes`: reports when links, addresses or routes of this network namespace changed and settled. I/O."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable

from ikectx import trace
from ikectx.errors import KernelError

from .netlink import ROUTE

LINKS = 0x1
"""RTMGRP_LINK (linux/rtnetlink.h)."""
ADDRESSES = 0x10 | 0x100
"""RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR."""
ROUTES = 0x40 | 0x400
"""RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE."""
_SETTLE = 0.02
"""Seconds without a further change until the network counts as settled; charon itself looks for its gateway
100 ms after the first change (ROAM_DELAY, strongSwan 5.9.8)."""


class Changes:
    """Calls `changed` after each burst of changes of these groups, in the running loop, until `close`."""

    def __init__(self, groups: int, changed: Callable[[], None]) -> None:
        """Errors: KernelError."""
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._pending: asyncio.TimerHandle | None = None
        self._since = 0
        try:
            self._events = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, ROUTE
            )
            self._events.bind((0, groups))
        except OSError as error:
            raise KernelError(
                f"changes of addresses cannot be watched: {error.strerror}", errno=error.errno or 0
            ) from None
        self._loop.add_reader(self._events, self._readable)

    def close(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        self._loop.remove_reader(self._events)
        self._events.close()

    def _readable(self) -> None:
        if self._pending is None:
            self._since = time.time_ns()
        with contextlib.suppress(OSError):  # ENOBUFS, too: something changed, whatever it was
            while self._events.recv(65536):
                pass
        if self._pending is not None:
            self._pending.cancel()
        self._pending = self._loop.call_later(_SETTLE, self._fire)

    def _fire(self) -> None:
        self._pending = None
        trace.ended("addresses settle", self._since, "part")
        self._changed()
