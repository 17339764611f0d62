"""Events after which the ways of detours may have changed: devices, addresses, our routes. I/O.

A device that goes down removes its routes, and nobody restores ours; systemd-networkd removes routes that it
does not know when it starts (ManageForeignRoutes).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterator

from ikectx.errors import KernelError

from .detour import PROTOCOL
from .netlink import ROUTE

_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_GROUPS = (1, 5, 7, 9, 11)
"""RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE."""
_HEADER = struct.Struct("=IHHII")
_DEVICE_OR_ADDRESS = (16, 17, 20, 21)
"""RTM_NEWLINK, DELLINK, NEWADDR, DELADDR."""
_DELROUTE = 25
_MAKER = 5
"""Position of the protocol that made a route in struct rtmsg."""
_SOON = 0.2
"""Seconds from a change until `changed` is called, for all changes in that time."""


def matters(data: bytes, own: int) -> bool:
    """Whether a datagram of the kernel's reports a change that may lead our packets elsewhere.

    `own`: the netlink port by which this process changes routes itself.
    """
    for kind, port, body in _messages(data):
        if kind in _DEVICE_OR_ADDRESS:
            return True
        if kind == _DELROUTE and port != own and len(body) > _MAKER and body[_MAKER] == PROTOCOL:
            return True
    return False


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, port = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield kind, port, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


class RouteEvents:
    """The events in the network namespace that this object was made in."""

    def __init__(self, own: int, changed: Callable[[], None]) -> None:
        """`changed` is called soon after each change that `matters`. Errors: KernelError."""
        self._own = own
        self._changed = changed
        self._pending: asyncio.TimerHandle | None = None
        try:
            self._events = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, ROUTE
            )
            self._events.bind((0, 0))
            for group in _GROUPS:
                self._events.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except OSError as error:
            raise KernelError(
                f"changes of the ways inside cannot be watched: {error.strerror}", errno=error.errno or 0
            ) from None
        asyncio.get_running_loop().add_reader(self._events, self._readable)

    def close(self) -> None:
        """Stop watching."""
        if self._pending is not None:
            self._pending.cancel()
        asyncio.get_running_loop().remove_reader(self._events)
        self._events.close()

    def _readable(self) -> None:
        new = False
        try:
            while data := self._events.recv(1 << 16):
                new |= matters(data, self._own)
        except BlockingIOError:
            pass
        except OSError:
            new = True  # ENOBUFS: there were too many events to report
        if new and self._pending is None:
            self._pending = asyncio.get_running_loop().call_later(_SOON, self._fire)

    def _fire(self) -> None:
        self._pending = None
        with contextlib.suppress(KernelError):
            self._changed()
