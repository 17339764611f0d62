"""I/O: keeps requests of a mobile node while charon may not receive them, and gives them to charon later.

A mobile node that was told another address may send a request at once: one with ESP in user space rekeys all
its CHILD_SAs (kernel-libipsec, strongSwan 5.9.8 and 6.0.6; the Android client is such a node). The gateway is
mute until it has the answer and its message IDs, and charon repeats a request only after 4 s. So a packet
socket records the SA's IKE messages, starting before the address update is sent; the kernel buffers them, and
when charon serves the SA the requests among them are sent to it once more (`watch.deliver`).

Messages that charon must not answer are left out (`skip`). A request of the mobile node's agent (UPDATE_SPI)
that was not answered in time has the message ID of one of its charon's, which takes an answer to the other
one for an error and destroys the SA (5.9.8).

Nothing here is authenticated: charon gets the same octets that it would have got from the network a moment
later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ikectx.errors import WireError
from ikectx.sa.context import Endpoint
from ikectx.sa.name import SaName
from ikectx.wire.ikev2 import IkeHeader, strip_marker

from .packet_io import open_raw
from .unknown import UnknownMessage
from .watch import deliver

log = logging.getLogger(__name__)

MOST = 16
"""Datagrams that are given to charon: a mobile node has one request under way (RFC 7296, 2.3), perhaps in
fragments."""


class Held:
    """Records IKE of one IKE_SA from its mobile node, from its construction to `deliver` or `close`.

    local: our end. remote: the mobile node's; its port may differ. mark: as of `open_raw` and `deliver`; not
    0 if the SA is mute. skip: recognizes requests that are not given to charon (IKE datagram without marker).
    Errors: LinkError if the socket is not available.
    """

    def __init__(
        self,
        spis: SaName,
        local: Endpoint,
        remote: Endpoint,
        *,
        mark: int,
        skip: Callable[[bytes], bool] = lambda datagram: False,
    ) -> None:
        self._spis = spis
        self._skip = skip
        self._local = local
        self._mark = mark
        self._raw = open_raw(local, remote, spis, mark=mark)

    def close(self) -> None:
        """Drop everything that was recorded."""
        self._raw.close()

    async def deliver(self) -> int:
        """Give charon the recorded requests, and close; returns the number of datagrams."""
        questions: dict[Endpoint, list[bytes]] = {}
        heard: set[bytes] = set()
        try:
            for payload, source in self._raw.drain():
                datagram = self._request(payload, source)
                if datagram and datagram not in heard and len(heard) < MOST:
                    heard.add(datagram)
                    questions.setdefault(source, []).append(datagram)
        finally:
            self.close()
        for source, datagrams in questions.items():
            question = UnknownMessage(self._spis, tuple(datagrams), self._local, source)
            try:
                deliver(question, mark=self._mark)  # over the loopback interface, as quick as a thread begins
            except OSError as error:  # a firewall of this host: the mobile node will send it again
                log.info("the MN's request could not be given to charon: %s", error.strerror)
        return len(heard)

    def _request(self, payload: bytes, source: Endpoint) -> bytes:
        """Its IKE message, if it is a request; else empty."""
        try:
            datagram = strip_marker(payload, self._local, source)
            header = IkeHeader.parse(datagram)
        except WireError:
            return b""
        ours = (header.spi_i, header.spi_r) == self._spis
        return datagram if ours and not header.response and not self._skip(datagram) else b""
