"""I/O: keeps requests of a mobile node while charon may not receive them, and gives them to charon later.

A mobile node that was told another address may send a request at once: one with ESP in user space rekeys all
its CHILD_SAs (kernel-libipsec, strongSwan 5.9.8 and 6.0.6; the Android client is such a node). The gateway is
mute until it has the answer and its message IDs, and charon repeats a request only after 4 s. So a packet
socket records the SA's IKE messages, starting before the address update is sent; the kernel buffers them, and
when charon serves the SA the requests among them are sent to it once more, from the mobile node's address to
ours, through the loopback device. A request that brought the SA here (`watch`) is one of them.

Messages that charon must not answer are left out (`skip`). A request of the mobile node's agent (UPDATE_SPI)
that was not answered in time has the message ID of one of its charon's, which takes an answer to the other
one for an error and destroys the SA (5.9.8).

Nothing here is authenticated: charon gets the same octets that it would have got from the network a moment
later.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence

from ikectx.errors import WireError
from ikectx.net.bypass import bypass
from ikectx.sa.context import Address, Endpoint
from ikectx.sa.name import SaName
from ikectx.wire.ikev2 import IkeHeader, add_marker, strip_marker

from .packet_io import IP4_HEADER, open_raw, udp_datagram

log = logging.getLogger(__name__)

MOST = 16
"""Datagrams that are given to charon: a mobile node has one request under way (RFC 7296, 2.3), perhaps in
fragments."""


class Held:
    """Records IKE of one IKE_SA from its mobile node, from its construction to `deliver` or `close`.

    local: our end. remote: the mobile node's; its port may differ. mark: of packets that a mute SA may send
    and hear (SO_MARK), 0: none. skip: recognizes requests that are not given to charon (IKE datagram without
    marker). request: datagrams without marker of one that came from `remote` before. Errors: LinkError if the
    socket is not available.
    """

    def __init__(
        self,
        spis: SaName,
        local: Endpoint,
        remote: Endpoint,
        *,
        mark: int,
        skip: Callable[[bytes], bool] = lambda datagram: False,
        request: Sequence[bytes] = (),
    ) -> None:
        self._spis = spis
        self._skip = skip
        self._local = local
        self._mark = mark
        self._before = [(one, remote) for one in request]
        self._raw = open_raw(local, remote, spis, mark=mark)

    def close(self) -> None:
        """Drop everything that was recorded."""
        self._raw.close()

    async def deliver(self) -> int:
        """Give charon the recorded requests, and close; returns the number of datagrams."""
        questions: dict[Endpoint, list[bytes]] = {}
        heard: set[bytes] = set()
        try:
            recorded = [(self._plain(payload, source), source) for payload, source in self._raw.drain()]
        finally:
            self.close()
        for datagram, source in (*self._before, *recorded):
            if datagram not in heard and len(heard) < MOST and self._is_request(datagram):
                heard.add(datagram)
                questions.setdefault(source, []).append(datagram)
        for source, datagrams in questions.items():
            try:
                deliver(datagrams, self._local, source, mark=self._mark)
            except OSError as error:  # a firewall of this host: the mobile node will send it again
                log.info("the MN's request could not be given to charon: %s", error.strerror)
        return len(heard)

    def _plain(self, payload: bytes, source: Endpoint) -> bytes:
        """Its IKE message; empty: it has none."""
        try:
            return strip_marker(payload, self._local, source)
        except WireError:
            return b""

    def _is_request(self, datagram: bytes) -> bool:
        """Whether charon is to get it."""
        try:
            header = IkeHeader.parse(datagram)
        except WireError:
            return False
        ours = (header.spi_i, header.spi_r) == self._spis
        return ours and not header.response and not self._skip(datagram)


def deliver(datagrams: Sequence[bytes], local: Endpoint, remote: Endpoint, *, mark: int = 0) -> None:
    """Send the mobile node's datagrams once more, from its address to ours, inside this host: as quick as a
    thread begins. Errors: OSError.

    `mark` (SO_MARK) distinguishes them from packets that leave this host; 0: none.
    """
    six = local.address.version == 6
    family = socket.AF_INET6 if six else socket.AF_INET
    # IPPROTO_RAW: we make the IP header, so the source may be another host's
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        bypass(raw)
        if mark:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        for datagram in datagrams:
            udp = udp_datagram(remote, local, add_marker(datagram, local, remote))
            head = _ip_header(remote.address, local.address, len(udp))
            raw.sendto(head + udp, (str(local.address), 0))


def _ip_header(source: Address, target: Address, length: int) -> bytes:
    if source.version == 6:
        first = (6 << 28).to_bytes(4) + length.to_bytes(2) + bytes((socket.IPPROTO_UDP, 64))
        return first + source.packed + target.packed
    # the kernel fills in length, identification and checksum
    first = bytes((0x45, 0)) + (IP4_HEADER + length).to_bytes(2) + bytes(4) + bytes((64, socket.IPPROTO_UDP))
    return first + bytes(2) + source.packed + target.packed
