"""Events of nftables that remove our tables, or parts of them: a reloaded firewall flushes all of them. I/O.

Source: linux/netfilter/nf_tables.h, nfnetlink.h (uapi).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Collection

from ikectx.errors import KernelError

from .netlink import NETFILTER

_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_NFTABLES = 7
"""NFNLGRP_NFTABLES."""
_SUBSYSTEM = 10
_REMOVALS = (2, 5, 8, 11, 14)
"""NFT_MSG_DELTABLE, DELCHAIN, DELRULE, DELSET, DELSETELEM."""
_HEADER = struct.Struct("=IHHII")
_NAME_AT = 20
"""Where the first attribute begins, which is the name of the table (NFTA_*_TABLE), behind struct nfgenmsg."""
_SOON = 0.02
"""Seconds from an event until `changed` is called, for all events of that time."""


def removes(data: bytes, tables: Collection[str], own: Collection[int]) -> bool:
    """Whether a datagram of the kernel's tells of a removal from one of these tables.

    `own`: the netlink ports by which this process changes them itself.
    """
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, port = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            return True  # it cannot be read
        message = data[at : at + length]
        at += (length + 3) & ~3
        if kind >> 8 == _SUBSYSTEM and kind & 0xFF in _REMOVALS and port not in own:
            if len(message) < _NAME_AT + 4:
                return True
            size, number = struct.unpack_from("=HH", message, _NAME_AT)
            name = message[_NAME_AT + 4 : _NAME_AT + size].rstrip(b"\0")
            if number & 0x3FFF != 1 or name in [table.encode() for table in tables]:
                return True
    return False


class NftEvents:
    """The events in the network namespace that this object was made in, from now on."""

    def __init__(
        self, tables: Collection[str], own: Callable[[], Collection[int]], changed: Callable[[], None]
    ) -> None:
        """`own`: see `removes`. `changed` is called soon after each removal. Errors: KernelError."""
        self._tables = tuple(tables)
        self._own = own
        self._changed = changed
        self._pending: asyncio.TimerHandle | None = None
        try:
            self._events = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETFILTER
            )
            self._events.bind((0, 0))
            self._events.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _NFTABLES)
        except OSError as error:
            raise KernelError(
                f"changes of nftables cannot be watched: {error.strerror}", errno=error.errno or 0
            ) from None
        asyncio.get_running_loop().add_reader(self._events, self._readable)

    def close(self) -> None:
        """Stop watching."""
        if self._pending is not None:
            self._pending.cancel()
        asyncio.get_running_loop().remove_reader(self._events)
        self._events.close()

    def _readable(self) -> None:
        gone = False
        try:
            while data := self._events.recv(1 << 16):
                gone |= removes(data, self._tables, self._own())
        except BlockingIOError:
            pass
        except OSError:
            gone = True  # ENOBUFS: there were too many events to report
        if gone and self._pending is None:
            self._pending = asyncio.get_running_loop().call_later(_SOON, self._fire)

    def _fire(self) -> None:
        self._pending = None
        self._changed()
