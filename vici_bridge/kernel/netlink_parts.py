"""The octets that all netlink messages have in common: header, attributes, flags. Pure.

Source: linux/netlink.h (uapi).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, number, port of the sender."""
REQUEST, ACK, REPLACE, EXCL, DUMP, CREATE = 0x1, 0x4, 0x100, 0x200, 0x300, 0x400
"""Flags of requests."""
NESTED = 0x8000
"""Flag of an attribute's number: it consists of attributes."""

_ATTRIBUTE = struct.Struct("=HH")
"""struct nlattr: length, number."""


def attribute(number: int, value: bytes) -> bytes:
    """One attribute, padded to 4 octets."""
    return _ATTRIBUTE.pack(4 + len(value), number) + value + bytes(-len(value) % 4)


def attributes(data: bytes, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Number (without flags) and value of each attribute from that place on. Errors: ValueError for one that
    is cut short."""
    while at + 4 <= len(data):
        length, number = _ATTRIBUTE.unpack_from(data, at)
        if length < 4 or at + length > len(data):
            raise ValueError("an attribute is longer than its message")
        yield number & 0x3FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3


def messages(data: bytes) -> list[bytes]:
    """The messages of a datagram, with their headers; an empty one in place of what is cut short."""
    found: list[bytes] = []
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("=I", data, at) if at + HEADER.size <= len(data) else (0,)
        if length < HEADER.size or at + length > len(data):
            return [*found, b""]
        found.append(data[at : at + length])
        at += (length + 3) & ~3
    return found
