"""`Changes`: reports when links, addresses or routes of this network namespace changed. I/O."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from ikectx.errors import KernelError

from .netlink import ROUTE

LINKS = 0x1
"""RTMGRP_LINK (linux/rtnetlink.h)."""
ADDRESSES = 0x10 | 0x100
"""RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR."""
ROUTES = 0x40 | 0x400
"""RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE."""


class Changes:
    """Calls `changed` after changes of these groups, in the running loop, until `close`.

    It is called at once, because a handover waits for it, and once for all changes that are known by then. A
    link that comes up brings several, so what is there after the first one need not be all."""

    def __init__(self, groups: int, changed: Callable[[], None]) -> None:
        """Errors: KernelError."""
        self._changed = changed
        self._loop = asyncio.get_running_loop()
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
        self._loop.remove_reader(self._events)
        self._events.close()

    def _readable(self) -> None:
        with contextlib.suppress(OSError):  # ENOBUFS, too: something changed, whatever it was
            while self._events.recv(65536):
                pass
        self._changed()
