"""Opens the way through a NAT to a gateway, before the gateway's first packet comes. I/O.

A NAT lets in answers only. The gateway that is asked for an SA sends ESP at once, from port 4500, but this
node's own first packet to that port may come later. So it sends a NAT-keepalive (RFC 3948, 2.3) from its own
port to it, which gateways ignore.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable

from ikectx.errors import KernelError
from ikectx.net.bypass import bypass
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.wire.ikev2 import IKE_PORT
from vici_bridge.vici.views import COND_NAT_HERE

_KEEPALIVE = b"\xff"
ESP_IN_UDP = 4500
_CHECKSUM_AT = 6
_IPV6_CHECKSUM = 7


def open_nat(context: IkeContext, own: Endpoint, gateway: Iterable[Address]) -> None:
    """Open the way from our IKE endpoint `own` to the gateway's addresses, if charon knows of a NAT here.

    One that cannot be sent is no loss, because the first ESP opens the way. It needs CAP_NET_RAW.
    """
    if not context.conditions & COND_NAT_HERE:
        return
    # that of the gateway before: the gateways of an SA have the same
    port = ESP_IN_UDP if context.remote.port == IKE_PORT else context.remote.port
    for address in gateway:
        if address.version == own.address.version:
            with contextlib.suppress(OSError, KernelError):
                _send(own, address, port)


def _send(own: Endpoint, gateway: Address, port: int) -> None:
    six = gateway.version == 6
    family = socket.AF_INET6 if six else socket.AF_INET
    # from a raw socket, because charon has the port
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_UDP) as sock:
        bypass(sock)
        sock.bind((str(own.address), 0))
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, _CHECKSUM_AT)
        # RFC 768: source port, destination port, length, no checksum
        head = struct.pack("!HHHH", own.port, port, 8 + len(_KEEPALIVE), 0)
        sock.sendto(head + _KEEPALIVE, (str(gateway), 0))
