"""Events of the kernel after which what the agent put there may be gone. I/O.

A reloaded firewall flushes our tables. A device that goes down removes its routes, and nobody restores ours;
systemd-networkd removes routes that it does not know when it starts (ManageForeignRoutes). `ip xfrm policy
flush` removes the policies that block packets of SAs that left.

Source: linux/netlink.h, rtnetlink.h, xfrm.h, netfilter/nf_tables.h, nfnetlink.h (uapi).
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable, Collection

from ikectx.errors import KernelError
from mobike_ext import bpf

from .detour import PROTOCOL
from .netlink import NETFILTER, ROUTE, XFRM, event_socket
from .netlink_parts import HEADER, messages

_NFTABLES = (7,)
"""NFNLGRP_NFTABLES."""
_SUBSYSTEM = 10
_REMOVALS = (2, 5, 8, 11, 14)
"""NFT_MSG_DELTABLE, DELCHAIN, DELRULE, DELSET, DELSETELEM."""
_NAME_AT = 4
"""Where the first attribute begins, which is the name of the table (NFTA_*_TABLE), behind struct nfgenmsg."""
_FIREWALL_SOON = 0.02

_WAYS = (1, 5, 7, 9, 11)
"""RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE."""
_ADDRESSES = (5, 7, 9, 11)
"""The same without devices."""
_DEVICE_OR_ADDRESS = (16, 17, 20, 21)
"""RTM_NEWLINK, DELLINK, NEWADDR, DELADDR."""
_NEWROUTE, _DELROUTE = 24, 25
_MAKER = 5
"""Position of the protocol that made a route in struct rtmsg."""
_WAYS_SOON = 0.2


_KIND_AT, _PORT_AT = 4, 12
"""Where type and sender's netlink port stand in a message (struct nlmsghdr)."""
_ALL, _NOTHING = (bpf.RET, 0xFFFFFFFF), (bpf.RET, 0)


def _word(number: int, kind: str = "=I") -> int:
    """A number of the kernel's as a filter sees it, which loads octets in the order of the network."""
    return int.from_bytes(struct.pack(kind, number))


def _by_others(ports: Collection[int]) -> list[bpf.Instruction]:
    """Only datagrams that report what others than these netlink ports have changed. Each has the changes of
    one of them only. Each move of an SA changes rules and routes, and the agent does not read all that."""
    own: list[bpf.Line] = [(bpf.JEQ, _word(port), "own", "") for port in ports if port]
    return bpf.assemble([(bpf.LD, _PORT_AT), *own, _ALL, "own", _NOTHING])


def _of_ways(own: int) -> list[bpf.Instruction]:
    """Only datagrams with what `changes_ways` looks for; the kernel reports each change of a route in one."""
    return bpf.assemble(
        [
            (bpf.LDH, _KIND_AT),
            (bpf.JEQ, _word(_NEWROUTE, "=H"), "other", ""),
            (bpf.JEQ, _word(_DELROUTE, "=H"), "", "all"),
            (bpf.LDB, HEADER.size + _MAKER),
            (bpf.JEQ, PROTOCOL, "", "other"),
            (bpf.LD, _PORT_AT),
            (bpf.JEQ, _word(own), "other", "all"),
            "all",
            _ALL,
            "other",
            _NOTHING,
        ]
    )


def _messages(data: bytes) -> list[tuple[int, int, bytes]] | None:
    """Type, sender's netlink port and body of each message of a datagram; None if it cannot be read."""
    found = messages(data)
    if b"" in found:
        return None
    heads = [HEADER.unpack_from(message) for message in found]
    return [(head[1], head[4], message[HEADER.size :]) for head, message in zip(heads, found, strict=True)]


def removes_table(data: bytes, tables: Collection[str], own: Collection[int]) -> bool:
    """Whether a datagram of the kernel's reports a removal from one of these tables of nftables. So
    does one that cannot be read.

    `own`: the netlink ports by which this process changes them itself.
    """
    found = _messages(data)
    return found is None or any(
        kind >> 8 == _SUBSYSTEM and kind & 0xFF in _REMOVALS and port not in own and _names(body, tables)
        for kind, port, body in found
    )


def _names(body: bytes, tables: Collection[str]) -> bool:
    if len(body) < _NAME_AT + 4:
        return True
    size, number = struct.unpack_from("=HH", body, _NAME_AT)
    name = body[_NAME_AT + 4 : _NAME_AT + size].rstrip(b"\0")
    return number & 0x3FFF != 1 or name in [table.encode() for table in tables]


def changes_ways(data: bytes, own: int) -> bool:
    """Whether a datagram of the kernel's reports a change that may lead our packets elsewhere. So does
    one that cannot be read.

    `own`: the netlink port by which this process changes routes itself.
    """
    found = _messages(data)
    return found is None or any(
        kind in _DEVICE_OR_ADDRESS
        or (kind == _DELROUTE and port != own and len(body) > _MAKER and body[_MAKER] == PROTOCOL)
        for kind, port, body in found
    )


_POLICIES = (4,)
"""XFRMNLGRP_POLICY."""
_FLUSHPOLICY = 0x1D
_POLICIES_SOON = 0.02
_ONLY_FLUSHES = bpf.assemble(
    [(bpf.LDH, _KIND_AT), (bpf.JEQ, _word(_FLUSHPOLICY, "=H"), "", "other"), _ALL, "other", _NOTHING]
)
"""Each move changes policies, and the agent does not read all these events."""


class KernelEvents:
    """The events in the network namespace that this object was made in, from now on."""

    def __init__(
        self,
        family: int,
        groups: Collection[int],
        matters: Callable[[bytes], bool],
        changed: Callable[[], None],
        soon: float,
    ) -> None:
        """`changed` is called `soon` (seconds) after each datagram that `matters`, for all of that time.

        Errors: KernelError.
        """
        self._matters = matters
        self._changed = changed
        self._soon = soon
        self._pending: asyncio.TimerHandle | None = None
        self._events = event_socket(family, groups, "changes of the kernel's tables")
        asyncio.get_running_loop().add_reader(self._events, self._readable)

    def narrow(self, program: list[bpf.Instruction]) -> None:
        """From now on the kernel gives us only datagrams that pass this filter, if it can."""
        with contextlib.suppress(OSError):
            bpf.attach(self._events, program)

    def close(self) -> None:
        """Stop watching."""
        if self._pending is not None:
            self._pending.cancel()
        asyncio.get_running_loop().remove_reader(self._events)
        self._events.close()

    def _readable(self) -> None:
        matters = False
        try:
            while data := self._events.recv(1 << 16):
                matters |= self._matters(data)
        except BlockingIOError:
            pass
        except OSError:
            matters = True  # ENOBUFS: there were too many events to report
        if matters and self._pending is None:
            self._pending = asyncio.get_running_loop().call_later(self._soon, self._fire)

    def _fire(self) -> None:
        self._pending = None
        with contextlib.suppress(KernelError):  # the next event tries again
            self._changed()


def table_removals(
    tables: Collection[str], own: Callable[[], Collection[int]], changed: Callable[[], None]
) -> KernelEvents:
    """`changed` after each removal from these tables of nftables by another process. Errors: KernelError."""
    events = KernelEvents(
        NETFILTER, _NFTABLES, lambda data: removes_table(data, tables, own()), changed, _FIREWALL_SOON
    )
    events.narrow(_by_others(own()))
    return events


def changes_of_ways(own: int, changed: Callable[[], None]) -> KernelEvents:
    """`changed` after changes of devices, addresses and our routes. Errors: KernelError."""
    events = KernelEvents(ROUTE, _WAYS, lambda data: changes_ways(data, own), changed, _WAYS_SOON)
    events.narrow(_of_ways(own))
    return events


def changes_of_addresses(changed: Callable[[], None]) -> KernelEvents:
    """`changed` after changes of addresses and routes, at once, because a handover waits for it. Errors:
    KernelError."""
    return KernelEvents(ROUTE, _ADDRESSES, lambda data: True, changed, 0.0)


def flushes_of_policies(changed: Callable[[], None]) -> KernelEvents:
    """`changed` after somebody has removed all IPsec policies. Errors: KernelError."""

    def flush(data: bytes) -> bool:
        return any(kind == _FLUSHPOLICY for kind, _, _ in _messages(data) or ())

    events = KernelEvents(XFRM, _POLICIES, flush, changed, _POLICIES_SOON)
    events.narrow(_ONLY_FLUSHES)
    return events
