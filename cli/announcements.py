"""Mobile nodes whose agents know UPDATE_SPI say so once, to the gateway that serves them: heard here.

    MN -> pSG   INFORMATIONAL  N(UPDATE_SPI_SUPPORTED)     charon answers it, as it must, and does not know it

A packet socket hears IKE requests beside charon. Those of an SA that is here, whose MN has not been heard,
are opened; what is heard is noted by the MN's identity, and goes along with its context to other gateways.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Sequence

from ikectx.context import Address, IkeContext
from ikectx.errors import IkectxError, StoreError, WireError
from ikectx.ikev2 import IkeHeader, Message, Reassembly
from ikectx.keys import seal_key
from ikectx.numbers import Exchange
from mobike_ext.naming import supported_by
from mobike_ext.watch import open_ear, parse_packet
from vici_bridge.host import CharonHost

log = logging.getLogger("ikectx")

RATE = 200
"""Messages opened in a second; what comes beyond that is not heard."""
AGAIN = 3600.0
"""Seconds until a mobile node that was heard is heard again."""
_MAX_DATAGRAM = 65535


class Announcements:
    """Listens at `addresses` from `start` to `close`."""

    def __init__(self, host: CharonHost, addresses: Sequence[Address]) -> None:
        self._host = host
        self._addresses = addresses
        self._ears: list[socket.socket] = []
        self._heard: dict[str, float] = {}
        self._second = 0
        self._opened = 0

    def start(self) -> None:
        """Open the sockets. Errors: LinkError."""
        loop = asyncio.get_running_loop()
        for version in (4, 6):
            mine = [address for address in self._addresses if address.version == version]
            if mine:
                ear = open_ear(mine)
                self._ears.append(ear)
                loop.add_reader(ear, self._readable, ear)

    def close(self) -> None:
        """Stop listening."""
        for ear in self._ears:
            asyncio.get_running_loop().remove_reader(ear)
            ear.close()
        self._ears.clear()

    def _readable(self, ear: socket.socket) -> None:
        try:
            packet, sender = ear.recvfrom(_MAX_DATAGRAM)
        except OSError:  # a device went down, which is no matter of ours
            return
        if sender[2] == socket.PACKET_HOST:
            self.hear(packet, time.monotonic())

    def hear(self, packet: bytes, now: float) -> None:
        """One IP packet. Raises nothing."""
        found = parse_packet(packet)
        if found is None or found[1].address not in self._addresses:
            return
        datagram = found[0]
        try:
            header = IkeHeader.parse(datagram)
            if header.exchange != Exchange.INFORMATIONAL or header.response:
                return
            context = self._host.record.context((header.spi_i, header.spi_r))
            node = str(context.remote_id)
            if now - self._heard.get(node, -AGAIN) < AGAIN or not self._may_open(now):
                return
            message = _open(context, datagram)
        except IkectxError:
            return
        if message is not None and supported_by(message):
            self._heard = {one: when for one, when in self._heard.items() if now - when < AGAIN}
            self._heard[node] = now
            log.info("%s knows UPDATE_SPI", context.remote_id)
            try:
                self._host.note_update_spi(context.remote_id, True)
            except StoreError as error:
                log.warning("this is not noted: %s", error)

    def _may_open(self, now: float) -> bool:
        if int(now) != self._second:
            self._second, self._opened = int(now), 0
        self._opened += 1
        return self._opened <= RATE


def _open(context: IkeContext, datagram: bytes) -> Message | None:
    """What the MN says in one datagram; a message in fragments says more than is looked for here."""
    current = context.current
    message = Reassembly(seal_key(current, by_initiator=not current.initiator)).add(datagram)
    if message is not None and message.header.initiator == current.initiator:
        raise WireError("our own message")
    return message
