"""Messages about routes to and from the kernel: struct rtmsg with its attributes. Pure.

Packed here, because a transfer asks for several ways and changes several routes, and a library that builds
any kind of message field by field takes half a millisecond for each.

Source: linux/rtnetlink.h (uapi). Errors: KernelError for an answer that cannot be read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

from ikectx.errors import KernelError
from ikectx.sa.context import Address, Secret

from .netlink_parts import ACK, HEADER, REQUEST, attribute, attributes
from .xfrm_parts import XfrmRequest, family_of

NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
UNICAST, LOCAL, UNREACHABLE = 1, 2, 7
_DST, _SRC, _OIF, _GATEWAY, _PRIORITY, _PREFSRC, _TABLE, _VIA = 1, 2, 4, 5, 6, 7, 15, 18

_RTMSG = struct.Struct("=BBBBBBBBI")
"""family, dst_len, src_len, tos, table, protocol, scope, type, flags."""


@dataclass(frozen=True, slots=True)
class KernelRoute:
    """A route, or a question about one. 0 and None: left out.

    kind: its type, such as `UNICAST`. maker: its protocol number. device: index of the device. own: the
    address of this host that its own packets get as their source.
    """

    family: int
    destination: Address | None = None
    length: int = 0
    source: Address | None = None
    gateway: Address | None = None
    device: int = 0
    metric: int = 0
    table: int = 0
    maker: int = 0
    scope: int = 0
    kind: int = 0
    own: Address | None = None

    def request(self, number: int, flags: int, what: str) -> XfrmRequest:
        """The message about it; a change is to be acknowledged, a question has its answer."""
        flags |= REQUEST if number == GETROUTE else REQUEST | ACK
        source = 0 if self.source is None else self.source.max_prefixlen
        places = (self.family, self.length, source, 0, 0, self.maker, self.scope, self.kind, 0)
        body = _RTMSG.pack(*places)
        for kind, address in ((_DST, self.destination), (_SRC, self.source), (_PREFSRC, self.own)):
            if address is not None:
                body += attribute(kind, address.packed)
        numbers = ((_OIF, self.device), (_PRIORITY, self.metric), (_TABLE, self.table))
        body += b"".join(attribute(kind, struct.pack("=I", value)) for kind, value in numbers if value)
        if self.gateway is not None:
            family = family_of(self.gateway)
            if family == self.family:
                body += attribute(_GATEWAY, self.gateway.packed)
            else:
                body += attribute(_VIA, struct.pack("=H", family) + self.gateway.packed)
        return XfrmRequest(Secret(HEADER.pack(HEADER.size + len(body), number, flags, 0, 0) + body), what)

    @classmethod
    def parse(cls, answer: bytes) -> KernelRoute:
        """What the kernel says of a route."""
        try:
            family, length, _, _, table, maker, scope, kind, _ = _RTMSG.unpack_from(answer, HEADER.size)
            found = dict(attributes(answer, HEADER.size + _RTMSG.size))
            numbers = [
                struct.unpack("=I", found[kind])[0] if kind in found else 0
                for kind in (_OIF, _PRIORITY, _TABLE)
            ]
            gateway = _address(found.get(_GATEWAY)) or _address(found.get(_VIA, b"")[2:])
            destination, source = _address(found.get(_DST)), _address(found.get(_SRC))
            own = _address(found.get(_PREFSRC))
        except (struct.error, ValueError):
            raise KernelError("the kernel's answer about a route cannot be read") from None
        device, metric, named = numbers
        return cls(
            family=family,
            destination=destination,
            length=length,
            source=source,
            gateway=gateway,
            device=device,
            metric=metric,
            table=named or table,
            maker=maker,
            scope=scope,
            kind=kind,
            own=own,
        )


@lru_cache(maxsize=1 << 10)
def text_of(address: Address) -> str:
    """An address of a gateway as text: kept, because that takes 20 us for one of IPv6, and gateways are
    few."""
    return str(address)


def _address(octets: bytes | None) -> Address | None:
    """Errors: ValueError."""
    if not octets:
        return None
    return IPv4Address(octets) if len(octets) == 4 else IPv6Address(octets)
