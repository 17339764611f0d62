"""Notes the IKE and CXTP messages on a host's interfaces, or who asks there for a neighbour's address.

    python -I -S lab_capture.py

A line on standard input is a run: messages|neighbours INTERFACE,INTERFACE... OUTPUT; OUTPUT.ready says that
it has begun. Packet sockets with BPF programs, which let IKE and CXTP through and neither ESP, ESP in UDP nor
NAT keepalives; or ARP (RFC 826) and neighbour discovery (RFC 4861) alone. Runs until SIGTERM, then writes
OUTPUT: a list of {time (ns, CLOCK_REALTIME), sent (leaving this interface), interface}, each with

    octets (of the whole IP packet), far (the other end's address), sum (a checksum of the UDP payload, by
    which a packet is known again at another host), and
        for IKE   exchange (number), response, message_id, spi_i, fragment
        for CXTP  cxtp (its message type, 0 where it cannot be read)
    neighbour (the address whose link address is asked for or told), asks

Standard library only.
"""

import ctypes
import errno
import json
import os
import select
import signal
import socket
import struct
import sys
import time
import zlib

EXCHANGES = {
    34: "IKE_SA_INIT",
    35: "IKE_AUTH",
    36: "CREATE_CHILD_SA",
    37: "INFORMATIONAL",
    38: "IKE_SESSION_RESUME",
    43: "IKE_INTERMEDIATE",
}
"""Exchange types by number (RFC 7296 section 3.1, RFC 5723, RFC 9242)."""

ETH_P_ALL = 3
SO_ATTACH_FILTER = 26
SO_TIMESTAMPNS = 35
PAYLOAD_SKF = 53
"""Encrypted and authenticated fragment (RFC 7383)."""

CXTP_PORT = 5091
CXTP = {1: "CTAR", 2: "CTAA", 3: "CTD", 4: "PCTD", 5: "CTDR", 6: "CTC", 7: "CT-Req"}
"""Message types of RFC 4067 section 2.5."""

# tcpdump -y RAW -ddd of: (ip and udp and (port 500 or port 5091 or (port 4500 and udp[8:4]=0)))
# or (ip6 and ip6[6]=17 and (udp port 500 or udp port 5091 or (udp port 4500 and ip6[48:4]=0)))
PROGRAM = """
48 0 0 0;84 0 0 240;21 0 16 64;48 0 0 9;21 0 32 17;40 0 0 6;69 30 0 8191;177 0 0 0;
72 0 0 0;21 26 0 500;21 25 0 5091;72 0 0 2;21 23 0 500;21 22 0 5091;21 2 0 4500;72 0 0 0;
21 0 20 4500;64 0 0 8;21 17 18 0;48 0 0 0;84 0 0 240;21 0 15 96;48 0 0 6;21 0 13 17;
21 0 12 17;40 0 0 40;21 9 0 500;21 8 0 5091;40 0 0 42;21 6 0 500;21 5 0 5091;21 2 0 4500;
40 0 0 40;21 0 3 4500;32 0 0 48;21 0 1 0;6 0 0 65535;6 0 0 0
"""
"""Classic BPF on a packet that starts at its IP header: code, jump if true, jump if false, value."""

# EtherType (SKF_AD_PROTOCOL) 0x0806, or 0x86dd with ICMPv6 of type 135 or 136. A socket for one EtherType
# alone would not be given what is sent.
NEIGHBOURS = """
40 0 0 4294963200;21 6 0 2054;21 0 6 34525;48 0 0 6;21 0 4 58;48 0 0 40;21 1 0 135;21 0 1 136;6 0 0 65535;
6 0 0 0
"""
KINDS = {"messages": PROGRAM, "neighbours": NEIGHBOURS}
"""What a run can note, and the filter for it."""


def parse(packet: bytes) -> dict[str, int | str | bool] | None:
    """What an IP packet with IKE or CXTP in it says, or None where it is none or too short."""
    if len(packet) < 20:
        return None
    version = packet[0] >> 4
    udp = (packet[0] & 15) * 4 if version == 4 else 40
    if len(packet) < udp + 8:
        return None
    octets = (
        struct.unpack_from("!H", packet, 2)[0]
        if version == 4
        else 40 + struct.unpack_from("!H", packet, 4)[0]
    )
    ports = struct.unpack_from("!HH", packet, udp)
    ike = udp + 8
    if CXTP_PORT in ports:
        # version in the upper four bits of the first octet, type in the lower (RFC 4067 section 2.5)
        return {"octets": octets, "cxtp": 0 if len(packet) == ike else packet[ike] & 15}
    if packet[ike : ike + 4] == bytes(4) and 500 not in ports:
        ike += 4
    if len(packet) < ike + 28:
        return None
    spi_i, _spi_r, following, _version, exchange, flags, message_id, _length = struct.unpack_from(
        "!8s8sBBBBII", packet, ike
    )
    return {
        "octets": octets,
        "exchange": exchange,
        "response": bool(flags & 0x20),
        "message_id": message_id,
        "spi_i": spi_i.hex(),
        "fragment": following == PAYLOAD_SKF,
    }


def known_again(packet: bytes, *, sent: bool) -> dict[str, int | str]:
    """A packet's other end, and a checksum that it has on every host. For packets that `parse` reads."""
    four = packet[0] >> 4 == 4
    size, source = (4, 12) if four else (16, 8)
    start = source + size if sent else source
    payload = ((packet[0] & 15) * 4 if four else 40) + 8
    far = socket.inet_ntop(socket.AF_INET if four else socket.AF_INET6, packet[start : start + size])
    return {"far": far, "sum": zlib.crc32(packet[payload:])}


def parse_neighbour(packet: bytes) -> dict[str, int | str | bool] | None:
    """What an ARP packet for IPv4, or a neighbour solicitation or advertisement, says; None for others."""
    if packet[:1] == b"\x00" and len(packet) >= 28 and packet[2:6] == b"\x08\x00\x06\x04":
        asks = packet[7] == 1
        address = packet[24:28] if asks else packet[14:18]
        return {"neighbour": socket.inet_ntop(socket.AF_INET, address), "asks": asks}
    if len(packet) >= 64 and packet[0] >> 4 == 6 and packet[6] == 58 and packet[40] in (135, 136):
        return {"neighbour": socket.inet_ntop(socket.AF_INET6, packet[48:64]), "asks": packet[40] == 135}
    return None


def _attach(packets: socket.socket, program: str) -> None:
    words = [tuple(int(word) for word in line.split()) for line in program.replace("\n", "").split(";")]
    code = b"".join(struct.pack("=HBBI", *line) for line in words)
    buffer = ctypes.create_string_buffer(code)
    # struct sock_fprog of linux/filter.h: a count, padding up to a pointer, the pointer
    packets.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(words), ctypes.addressof(buffer))
    )


def main() -> None:
    for line in sys.stdin:
        kind, interfaces, output = line.split()
        run(kind, interfaces.split(","), output)


def run(kind: str, interfaces: list[str], output: str) -> None:
    listening: list[socket.socket] = []
    for interface in interfaces:
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        _attach(packets, KINDS[kind])
        packets.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        packets.bind((interface, ETH_P_ALL))
        packets.setblocking(False)
        listening.append(packets)
    stopping, wake = os.pipe()
    signal.signal(signal.SIGTERM, lambda _number, _frame: os.write(wake, b"x") and None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(output + ".ready", "w"):
        pass
    notes: list[dict[str, int | str | bool]] = []
    poller = select.poll()
    for packets in listening:
        poller.register(packets, select.POLLIN)
    poller.register(stopping, select.POLLIN)
    ended = False
    while not ended:
        ended = any(descriptor == stopping for descriptor, _event in poller.poll())
        for packets in listening:
            notes += _noted(packets)
    notes.sort(key=lambda note: note["time"])
    with open(output + ".part", "w", encoding="ascii") as file:
        json.dump(notes, file)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor in (stopping, wake):
        os.close(descriptor)
    for packets in listening:
        packets.close()
    os.rename(output + ".part", output)


def _stamp(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The kernel's time of a packet, ns: this process may come to read it later."""
    for _level, kind, value in ancillary:
        if kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("=qq", value[:16])
            return int(seconds * 1_000_000_000 + nanoseconds)
    return time.clock_gettime_ns(time.CLOCK_REALTIME)


def _noted(packets: socket.socket) -> list[dict[str, int | str | bool]]:
    """All that waits at one socket. A link that is down says so once."""
    notes: list[dict[str, int | str | bool]] = []
    while True:
        try:
            packet, ancillary, _flags, source = packets.recvmsg(65535, 64)
        except OSError as error:
            if error.errno == errno.ENETDOWN:
                continue
            return notes
        note = parse_neighbour(packet) or parse(packet)
        if note is not None:
            note["interface"] = source[0]
            note["time"] = _stamp(ancillary)
            note["sent"] = source[2] == socket.PACKET_OUTGOING
            if "neighbour" not in note:
                note.update(known_again(packet, sent=bool(note["sent"])))
            notes.append(note)


if __name__ == "__main__":
    main()
