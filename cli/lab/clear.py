"""Counts packets for the mobile nodes' inner addresses that leave a gateway in the clear.

    python -I -S lab_clear.py

A line on standard input is a run: MAC MODE OUTPUT; OUTPUT.ready says that it has begun. It runs until
SIGTERM, then writes OUTPUT: a list of {interface, from, to, protocol (number), packets}, empty where nothing
left.

eth0 and eth1 are the outside. Whatever leaves there with a mobile node's inner address as its source or
destination is in the clear, since of an ESP packet in tunnel mode only the outer addresses can be seen (mode
`tunnel`). Where the mobile node's address is the outer one (mode `transport`), ESP, AH, IKE, CXTP and what
ICMP tells about them are no such packets.

lan0 and lan1 are the inside. Packets for an inner address may leave there only for the other gateway, whose
link-layer address is MAC: that is the detour. Packets that come from an inner address are the mobile node's
own and belong there.

A BPF program has the kernel drop everything else, so that nothing of a run's traffic wakes this process.
Standard library only, for a fast start.
"""

import ctypes
import errno
import ipaddress
import json
import os
import select
import signal
import socket
import struct
import sys
from collections import Counter

ETH_P_ALL = 3
SO_ATTACH_FILTER = 26
PACKET_OUTGOING = 4
_PKTTYPE = 0xFFFFF000 + 4
"""Where BPF loads the direction from (SKF_AD_OFF + SKF_AD_PKTTYPE of linux/filter.h)."""

PREFIXES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tunnel": ((0x0A04, 0x0A30), (0xFD04,)),
    "transport": ((0x0A01, 0x0A05), (0xFD01, 0xFD05)),
}
"""The first 16 bits of the mobile nodes' addresses, and of a fleet's, by mode: of IPv4, of IPv6. Those of
transport mode are the outer ones."""

OUTSIDE, INSIDE = ("eth0", "eth1"), ("lan0", "lan1")
"""A gateway's interfaces."""

ESP, AH, UDP, ICMP, ICMPV6 = 50, 51, 17, 1, 58
SPOKEN = (500, 4500, 5091)
"""UDP ports of IKE and CXTP."""

_LDB, _LDH, _LD, _JEQ, _RET = 48, 40, 32, 21, 6

Seen = tuple[str, str, str, int]
"""Interface, source, destination, protocol."""

Line = tuple[int, int, int, int]


def program(mode: str, gateway: bytes | None) -> list[Line]:
    """Classic BPF on an Ethernet frame: code, jump if true, jump if false, value.

    `gateway`: the link-layer address to which packets may go on (inside); None: to nobody (outside).
    """
    ipv4, ipv6 = PREFIXES[mode]
    # each test: where to load 16 bits from, and with which values the packet is one that counts
    tests4 = [(30, ipv4)] + ([] if gateway else [(26, ipv4)])
    tests6 = [(38, ipv6)] + ([] if gateway else [(22, ipv6)])
    lines: list[tuple[int, str, str, int]] = [(_LDB, "", "", _PKTTYPE), (_JEQ, "", "drop", PACKET_OUTGOING)]
    if gateway is not None:
        high, low = struct.unpack("!IH", gateway)
        # three lines on, where the first four octets already differ
        lines += [(_LD, "", "", 0), (_JEQ, "", "+2", high), (_LDH, "", "", 4), (_JEQ, "drop", "", low)]
    lines += [(_LDH, "", "", 12), (_JEQ, "", f"+{1 + sum(1 + len(v) for _, v in tests4)}", 0x0800)]
    for at, values in tests4:
        lines += [(_LDH, "", "", at), *((_JEQ, "keep", "", value) for value in values)]
    lines += [(_RET, "", "", 0), (_JEQ, "", "drop", 0x86DD)]
    for at, values in tests6:
        lines += [(_LDH, "", "", at), *((_JEQ, "keep", "", value) for value in values)]
    lines += [(_RET, "", "", 0), (_RET, "", "", 65535)]
    ends = {"drop": len(lines) - 2, "keep": len(lines) - 1}

    def jump(label: str, here: int) -> int:
        if label.startswith("+"):
            return int(label)
        return ends[label] - here - 1 if label else 0

    return [
        (code, jump(true, here), jump(false, here), value)
        for here, (code, true, false, value) in enumerate(lines)
    ]


def parse(frame: bytes, mode: str) -> tuple[str, str, int] | None:
    """Source, destination and protocol of a frame that was kept; None where it is protected, or none."""
    packet = frame[14:]
    if len(packet) < 20:
        return None
    if packet[0] >> 4 == 4:
        size, protocol = (packet[0] & 15) * 4, packet[9]
        source, target = ipaddress.ip_address(packet[12:16]), ipaddress.ip_address(packet[16:20])
    elif len(packet) >= 40:
        size, protocol = 40, packet[6]
        source, target = ipaddress.ip_address(packet[8:24]), ipaddress.ip_address(packet[24:40])
    else:
        return None
    if mode == "transport" and _spoken(protocol, packet[size:]):
        return None
    return str(source), str(target), protocol


def _spoken(protocol: int, payload: bytes) -> bool:
    """What gateways and mobile nodes say to each other beside, or by, a tunnel in transport mode."""
    if protocol in (ESP, AH):
        return True
    if protocol == UDP and len(payload) >= 4:
        return bool(set(struct.unpack_from("!HH", payload)) & set(SPOKEN))
    # errors, and of ICMPv6 what neighbours tell each other; not echo requests and replies
    if protocol == ICMP and payload:
        return payload[0] in (3, 4, 5, 11, 12)
    return protocol == ICMPV6 and bool(payload) and (payload[0] < 128 or payload[0] >= 130)


def main() -> None:
    for line in sys.stdin:
        mac, mode, output = line.split()
        run(bytes.fromhex(mac.replace(":", "")), mode, output)


def run(gateway: bytes, mode: str, output: str) -> None:
    links = [_listener(name, program(mode, None)) for name in OUTSIDE]
    links += [_listener(name, program(mode, gateway)) for name in INSIDE]
    stopping, wake = os.pipe()
    signal.signal(signal.SIGTERM, lambda _number, _frame: os.write(wake, b"x") and None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(output + ".ready", "w"):
        pass
    seen: Counter[Seen] = Counter()
    poller = select.poll()
    for link in links:
        poller.register(link, select.POLLIN)
    poller.register(stopping, select.POLLIN)
    ended = False
    while not ended:
        ended = any(descriptor == stopping for descriptor, _event in poller.poll())
        for link in links:
            _take(link, mode, seen)
    with open(output + ".part", "w", encoding="ascii") as file:
        json.dump(told(seen), file)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor in (stopping, wake):
        os.close(descriptor)
    for link in links:
        link.close()
    os.rename(output + ".part", output)


def told(seen: Counter[Seen]) -> list[dict[str, int | str]]:
    """What was counted, as the output has it."""
    names = ("interface", "from", "to", "protocol")
    return [{**dict(zip(names, one, strict=True)), "packets": count} for one, count in sorted(seen.items())]


def _listener(interface: str, lines: list[Line]) -> socket.socket:
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    # struct sock_fprog of linux/filter.h: a count, padding up to a pointer, the pointer
    filtering = struct.pack("@HP", len(lines), ctypes.addressof(buffer))
    link.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filtering)
    link.bind((interface, ETH_P_ALL))
    link.setblocking(False)
    return link


def _take(link: socket.socket, mode: str, seen: Counter[Seen]) -> None:
    """Counts all that waits at one socket. A link that is down says so once."""
    while True:
        try:
            frame, source = link.recvfrom(256)
        except OSError as error:
            if error.errno == errno.ENETDOWN:
                continue
            return
        if (found := parse(frame, mode)) is not None:
            seen[source[0], *found] += 1


if __name__ == "__main__":
    main()
