"""Whether a machine on a network of ours answers, and the way to it. I/O, bounded in time.

Nothing here needs root: if no ICMP socket may be opened, a datagram to the discard port makes the kernel look
for the neighbour, and the result is in its neighbour table.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ikectx.sa.context import Address

PATIENCE = 2.0
"""Seconds to wait for an answer; a neighbour that is not there is given up by the kernel after three."""

AGAIN = 0.5
"""Seconds between requests."""

_ECHO = {4: (8, 0), 6: (128, 129)}
"""ICMP types of an echo request and its reply (RFC 792, RFC 4443), by IP version."""

_DISCARD = 9
_THERE = {"REACHABLE", "PERMANENT", "NOARP"}
_GONE = {"FAILED", "INCOMPLETE"}


@dataclass(frozen=True, slots=True)
class PacketWay:
    """The way of packets for an address. `device`: empty if there is no way. `direct`: without a router."""

    device: str = ""
    direct: bool = False
    local: bool = False


def way_to(address: Address) -> PacketWay:
    """The kernel's way to an address; no way if the kernel or `ip` does not answer."""
    found = _ip("route", "get", str(address), version=address.version)
    if not found:
        return PacketWay()
    route = found[0]
    local = route.get("type") == "local" or route.get("dev") == "lo"
    return PacketWay(str(route.get("dev", "")), not local and not {"gateway", "via"} & set(route), local)


def device_of(address: Address) -> str:
    """The interface that has an address of this machine; empty if none has."""
    found = _ip("addr", "show", "to", str(address), version=address.version)
    return next((str(entry["ifname"]) for entry in found if "ifname" in entry), "")


def answers(address: Address, patience: float = PATIENCE) -> bool | None:
    """Whether a machine with that address answers. None: not known.

    An echo reply is an answer; without one, a neighbour that has just sent its link-layer address.
    """
    limit = time.monotonic() + patience
    nonce = os.urandom(16)
    sock, raw = _socket(address.version)
    with sock:
        while (left := limit - time.monotonic()) > 0:
            _ask(sock, address, nonce, echo=raw is not None)
            again = time.monotonic() + min(AGAIN, left)
            while (wait := again - time.monotonic()) > 0:
                if raw is None:
                    time.sleep(wait)
                elif select.select([sock], [], [], wait)[0] and _replied(sock, address, nonce, raw=raw):
                    return True
            if raw is None and neighbour(_ip("neigh", "show", str(address), version=address.version)):
                return True
    return neighbour(_ip("neigh", "show", str(address), version=address.version))


def neighbour(entries: Sequence[Mapping[str, Any]]) -> bool | None:
    """Whether the neighbour answers, from `ip neigh show` of one address; None if it is not known."""
    states = {str(state) for entry in entries for state in entry.get("state", ())}
    if states & _THERE:
        return True
    return False if states & _GONE else None


def request(version: int, nonce: bytes) -> bytes:
    """An ICMP echo request. The kernel fills in ICMPv6's checksum, and an unprivileged one's identifier."""
    kind = _ECHO[version][0]
    data = struct.pack("!BBHHH", kind, 0, 0, 0x494B, 1) + nonce
    if version == 6:
        return data
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return data[:2] + struct.pack("!H", ~total & 0xFFFF) + data[4:]


def is_reply(packet: bytes, version: int, nonce: bytes, *, raw: bool) -> bool:
    """Whether this is the answer. A raw IPv4 socket returns the IP header, too."""
    start = (packet[0] & 15) * 4 if raw and version == 4 and packet else 0
    return len(packet) > start and packet[start] == _ECHO[version][1] and packet.endswith(nonce)


def _socket(version: int) -> tuple[socket.socket, bool | None]:
    """A socket for echo requests and whether it is a raw one; if neither is permitted, one for UDP and
    None."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    protocol = socket.IPPROTO_ICMP if version == 4 else socket.IPPROTO_ICMPV6
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            return socket.socket(family, kind, protocol), kind == socket.SOCK_RAW
        except OSError:
            continue
    return socket.socket(family, socket.SOCK_DGRAM), None


def _ask(sock: socket.socket, address: Address, nonce: bytes, *, echo: bool) -> None:
    data, port = (request(address.version, nonce), 0) if echo else (b"", _DISCARD)
    try:
        sock.sendto(data, (str(address), port))
    except OSError:
        return  # the next one may be sent; the neighbour table decides in the end


def _replied(sock: socket.socket, address: Address, nonce: bytes, *, raw: bool) -> bool:
    try:
        packet, source = sock.recvfrom(2048)
    except OSError:
        return False
    from_there = str(source[0]).partition("%")[0] == str(address)
    return from_there and is_reply(packet, address.version, nonce, raw=raw)


def _ip(*words: str, version: int) -> list[dict[str, Any]]:
    """iproute2's answer as JSON; empty if there is none."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            ["ip", f"-{version}", "-j", *words],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env={**os.environ, "PATH": path},
        )
        found: list[dict[str, Any]] = json.loads(done.stdout or "[]")
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return found
