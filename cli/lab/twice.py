"""Looks for what no key may protect twice: ESP sequence numbers, and IVs of different IKE messages.

    python -I -S twice.py OUTPUT LINK...

runs until SIGTERM, then writes OUTPUT, a list of what was seen twice, in words. LINK are links of the router
to a mobile node: what leaves there was sent by a gateway, what comes by the mobile node. An IKE message that
is sent again is the same octet for octet (RFC 7296, section 2.1). The IKE_SAs have AES-GCM, whose IV are the
first 8 octets of the SK payload (RFC 5282, section 3). Standard library only, for a fast start.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
from collections import Counter

ETH_P_ALL = 3
OUTGOING = 4
ESP, UDP = 50, 17
SK, IV = 46, 8
"""The payload that has the others, and octets of its IV."""
INITIATOR = 0x08
IKE = struct.Struct("!8s8sBBBBII")


class SeenNumbers:
    """All that was seen by now."""

    def __init__(self) -> None:
        self.esp: Counter[tuple[bool, bytes, int]] = Counter()
        self.ike: dict[tuple[bool, bytes, int, bytes], bytes] = {}
        self.twice: Counter[str] = Counter()

    def packet(self, packet: bytes, *, sent: bool) -> None:
        """An IP packet that was `sent` to the mobile node, or came from it."""
        if len(packet) < 20:
            return
        if packet[0] >> 4 == 4:
            size, protocol = (packet[0] & 15) * 4, packet[9]
            if struct.unpack_from("!H", packet, 6)[0] & 0x1FFF:
                return
        else:
            size, protocol = 40, packet[6]
        payload = packet[size:]
        if protocol == ESP and len(payload) >= 8:
            self._esp(payload, sent)
        elif protocol == UDP and len(payload) >= 16:
            ports = struct.unpack_from("!HH", payload)
            if 500 in ports:
                self._ike(payload[8:], sent)
            elif payload[8:12] == bytes(4):
                self._ike(payload[12:], sent)
            elif 5091 not in ports:
                self._esp(payload[8:], sent)

    def _esp(self, payload: bytes, sent: bool) -> None:
        spi, number = payload[:4], struct.unpack_from("!I", payload, 4)[0]
        self.esp[sent, spi, number] += 1
        if self.esp[sent, spi, number] == 2:
            self.twice[f"ESP {'to' if sent else 'from'} the MN, SPI {spi.hex()}"] += 1

    def _ike(self, message: bytes, sent: bool) -> None:
        if len(message) < IKE.size + 4 + IV:
            return
        one, other, payload, _version, exchange, flags, number, _length = IKE.unpack_from(message)
        if payload != SK:
            return
        iv = message[IKE.size + 4 : IKE.size + 4 + IV]
        # both ends have a key of their own, whichever of them asks
        if self.ike.setdefault((sent, one + other, flags & INITIATOR, iv), message) != message:
            self.twice[f"IKE IV {'to' if sent else 'from'} the MN, message {number} of {exchange}"] += 1

    def told(self) -> list[str]:
        """In words, for people."""
        return [f"{what}: {count}" for what, count in sorted(self.twice.items())]


def main() -> None:
    output, *names = sys.argv[1:]
    links = {}
    for name in names:
        link = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        link.bind((name, ETH_P_ALL))
        link.setblocking(False)
        links[link.fileno()] = link
    stopping, wake = os.pipe()
    signal.signal(signal.SIGTERM, lambda _number, _frame: os.write(wake, b"x") and None)
    with open(output + ".ready", "w"):
        pass
    seen, poller = SeenNumbers(), select.poll()
    for descriptor in (*links, stopping):
        poller.register(descriptor, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _event in poller.poll()]
        for link in links.values():
            with contextlib.suppress(BlockingIOError, OSError):
                while True:
                    packet, address = link.recvfrom(2048)
                    if address[1] in (0x0800, 0x86DD):
                        seen.packet(packet, sent=address[2] == OUTGOING)
        if stopping in ready:
            break
    with open(output + ".part", "w", encoding="ascii") as file:
        json.dump(seen.told(), file)
    os.rename(output + ".part", output)


if __name__ == "__main__":
    main()
