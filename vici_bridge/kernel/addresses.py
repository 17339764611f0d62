"""Outer addresses of a mobile node: which of them leads to a gateway, and when they change. I/O.

The routing table's choice of a source address may be the virtual IP, because a tunnel may catch all packets
(strongSwan's table 220 has a route for each remote selector, with the virtual IP as source). So the choice is
used only if it is no virtual IP.

Not every address is usable: a link-local one is not, because no router forwards its packets, nor is one whose
uniqueness is still being probed or was found wrong (RFC 4862, 5.4), nor a deprecated one (5.5.4).
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Callable, Collection, Sequence
from ipaddress import IPv4Address, IPv6Address

from ikectx.errors import KernelError
from ikectx.sa.context import Address, Secret

from .detour import is_local, stir, way_to
from .kernel_events import KernelEvents, changes_of_addresses
from .netlink import ROUTE, Netlink
from .netlink_parts import DUMP, HEADER, REQUEST, attributes
from .xfrm_parts import XfrmRequest

log = logging.getLogger(__name__)

_GETADDR = 22
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_UNUSABLE = 0x04 | 0x08 | 0x20 | 0x40
"""IFA_F_OPTIMISTIC, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE (linux/if_addr.h)."""


class OuterAddresses:
    """The outer addresses in the network namespace that this object was made in. Calls take some 100 us."""

    def __init__(self) -> None:
        self._route = Netlink(ROUTE, "routes")
        self._changes: KernelEvents | None = None

    def close(self) -> None:
        """Close the socket, and stop watching."""
        if self._changes is not None:
            self._changes.close()
            self._changes = None
        self._route.close()

    def is_local(self, address: Address) -> bool:
        """Whether `address` is one of this host. Errors: KernelError."""
        return is_local(self._route, address)

    def listed(self) -> list[Address]:
        """The addresses of this host that packets to other networks may come from. Errors: KernelError."""
        return [*self._usable(4), *self._usable(6)]

    def towards(
        self, remote: Address, *, avoid: Collection[Address] = (), among: Sequence[Address] = ()
    ) -> Address | None:
        """The local address from which to reach `remote`; None: there is no route.

        `among`: only these addresses are possible, in the order of preference; `avoid`: addresses that are
        not, such as virtual IPs. Errors: KernelError.
        """
        # Linux lists and announces an address before it routes to it: a socket bound in between fails
        usable = [one for one in self._usable(remote.version) if one not in avoid and self.is_local(one)]
        if among:
            usable = [one for one in among if one in usable]
        elif (chosen := _chosen_source(remote)) in usable:
            return chosen
        return next((one for one in usable if self._leads(one, remote)), None)

    def _leads(self, source: Address, remote: Address) -> bool:
        """Whether the kernel has a route to `remote` for packets from that address."""
        inside, device = way_to(self._route, source, remote)
        return inside or bool(device)

    def _usable(self, version: int) -> list[Address]:
        """The addresses of this host that packets to other networks may come from."""
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        header = HEADER.pack(24, _GETADDR, REQUEST | DUMP, 0, 0)
        body = struct.pack("=BBBBI", family, 0, 0, 0, 0)
        answers = self._route.ask(XfrmRequest(Secret(header + body), "list this host's addresses"))
        return [address for answer in answers if (address := _address(answer)) is not None]

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` at once whenever addresses or routes have changed. Errors: KernelError."""
        self._changes = changes_of_addresses(changed)

    def nudge(self, remote: Address) -> None:
        """Make charon check whether its paths are still good (`detour.stir`).

        charon is told of changes by the kernel and ignores them for passive SAs, and it is not told again
        when they become active (strongSwan 5.9.8, 6.0.6). Raises nothing.
        """
        try:
            _, device = way_to(self._route, self.towards(remote) or remote, remote)
            stir(self._route, device, remote.version)
        except KernelError as error:
            log.debug("charon is not told that addresses have changed: %s", error)


def _chosen_source(remote: Address) -> Address | None:
    """The source address that the kernel would choose."""
    family = socket.AF_INET if remote.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((str(remote), 500))
        except OSError:
            return None
        host = sock.getsockname()[0].partition("%")[0]
    return IPv4Address(host) if remote.version == 4 else IPv6Address(host)


def _address(answer: bytes) -> Address | None:
    """The address of an RTM_NEWADDR, if packets to other networks may come from it."""
    if len(answer) < 24:
        return None
    family, _, flags, scope, _ = struct.unpack_from("=BBBBI", answer, 16)
    try:
        found = dict(attributes(answer, 24))
    except ValueError:
        return None
    if len(more := found.get(_IFA_FLAGS, b"")) == 4:  # the header has room for eight of them
        (flags,) = struct.unpack("=I", more)
    if scope or flags & _UNUSABLE:
        return None
    raw = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS, b""))
    if len(raw) != (4 if family == socket.AF_INET else 16):
        return None
    address = IPv4Address(raw) if family == socket.AF_INET else IPv6Address(raw)
    return None if address.is_link_local else address
