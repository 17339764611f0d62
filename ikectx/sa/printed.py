"""Identities as strongSwan prints them (`%Y`): for people, scripts, and comparisons with what charon reports.

Pure. Source: identification.c, asn1.c and oid.txt of strongSwan 5.9.8 to 6.1. Every octet string has such a
form, of printable ASCII only; two may have the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from ipaddress import ip_address

from ikectx.numbers import IdType

LONGEST = 511
"""Characters that strongSwan prints at most."""
_KEY_DIGEST = 20
"""A KEY_ID of that length is shown in hexadecimal: it is a SHA-1 of a key."""
_SEQUENCE, _SET, _OID = 0x30, 0x31, 0x06
_SUBNET4, _SUBNET6, _RANGE4, _RANGE6 = 4, 6, 7, 8
"""Identities of IKEv1 (RFC 2407, 4.6.2)."""
_SHOWN = bytes(octet if 0x20 <= octet < 0x7F else ord("?") for octet in range(256))
"""What each octet is shown as."""
_URI = 201
"""strongSwan's own type for a URI."""

RDN_NAMES = {
    bytes((0x55, 4, number)): name
    for number, name in {
        3: "CN",
        4: "SN",
        5: "serialNumber",
        6: "C",
        7: "L",
        8: "ST",
        9: "STREET",
        10: "O",
        11: "OU",
        12: "T",
        13: "D",
        16: "postalAddress",
        17: "postalCode",
        41: "N",
        42: "G",
        43: "I",
        45: "ID",
        46: "dnQualifier",
        54: "dmdName",
        65: "pseudonym",
        72: "role",
        97: "organizationIdentifier",
    }.items()
} | {
    bytes.fromhex("0992268993f22c640101"): "UID",
    bytes.fromhex("0992268993f22c640119"): "DC",
    bytes.fromhex("2a864886f70d010901"): "E",
    bytes.fromhex("2a864886f70d010902"): "unstructuredName",
    bytes.fromhex("2a864886f70d010908"): "unstructuredAddress",
}
"""The names by which strongSwan prints the attribute types of a DN."""


@lru_cache(maxsize=256)
def printed(kind: int, data: bytes) -> str:
    """The identity of that type (RFC 7296, 3.5) as strongSwan prints it. Cached, because that of an SA that
    moves is asked for dozens of times."""
    if kind == IdType.ANY:
        text = "%any"
    elif kind in (IdType.FQDN, IdType.RFC822_ADDR, _URI):
        text = printable(data)
    elif kind in (IdType.IPV4_ADDR, IdType.IPV6_ADDR, _SUBNET4, _SUBNET6, _RANGE4, _RANGE6):
        text = _addresses(kind, data)
    elif kind == IdType.DER_ASN1_DN:
        text = _dn(data)
    elif kind == IdType.DER_ASN1_GN:
        text = "(ASN.1 general name)"
    elif kind == IdType.KEY_ID:
        plain = len(data) != _KEY_DIGEST and data.translate(_SHOWN) == data
        text = data.decode("ascii") if plain else data.hex(":")
    else:
        text = f"(unknown ID type: {kind})"
    return text[:LONGEST]


def printable(data: bytes) -> str:
    """The octets as ASCII, those that are not printable as question marks."""
    return data.translate(_SHOWN).decode("ascii")


_ADDRESSES = {
    IdType.IPV4_ADDR: ("ID_IPV4_ADDR", 4, ""),
    _SUBNET4: ("ID_IPV4_ADDR_SUBNET", 4, "/"),
    _RANGE4: ("ID_IPV4_ADDR_RANGE", 4, "-"),
    IdType.IPV6_ADDR: ("ID_IPV6_ADDR", 16, ""),
    _SUBNET6: ("ID_IPV6_ADDR_SUBNET", 16, "/"),
    _RANGE6: ("ID_IPV6_ADDR_RANGE", 16, "-"),
}


def _addresses(kind: int, data: bytes) -> str:
    name, size, between = _ADDRESSES[IdType(kind)]
    if len(data) < (2 * size if between else size):
        return f"(invalid {name})"
    first, second = data[:size], data[size : 2 * size]
    if not between:
        return str(ip_address(first))
    if between == "-":
        return f"{ip_address(first)}-{ip_address(second)}"
    ones = 0
    for octet in second.split(b"\0")[0]:  # as strongSwan counts them
        ones += 8 - (octet ^ 0xFF).bit_length()
    return f"{ip_address(first)}/{ones}"


class _Cut:
    """DER that is read as far as it goes: the octets of `data` from `at` to `end`."""

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def take(self, tag: int | None = None) -> _Cut | None:
        """The content of the next element; None: there is none of that tag (None: any)."""
        if self.end - self.at < 2:
            return None
        found, size = self.data[self.at], self.data[self.at + 1]
        self.at += 2
        if size & 0x80:
            more = size & 0x7F
            if not 0 < more <= min(8, self.end - self.at):
                return None
            size = int.from_bytes(self.data[self.at : self.at + more])
            self.at += more
        if size > self.end - self.at:
            return None
        inner = _Cut(self.data, self.at, self.at + size)
        self.at += size
        return inner if tag in (None, found) else None

    @property
    def octets(self) -> bytes:
        return self.data[self.at : self.end]


def _rdns(data: bytes) -> Iterator[tuple[bytes, _Cut, bool]]:
    """(attribute type, value, whether the value is missing at the very end of its element) of each RDN."""
    sets = _Cut(data, 0, len(data)).take(_SEQUENCE)
    several: _Cut | None = None
    while sets is not None:
        if several is None or several.at == several.end:
            several = sets.take(_SET)
            if several is None:
                return
        pair = several.take(_SEQUENCE)
        oid = None if pair is None else pair.take(_OID)
        value = None if pair is None or oid is None else pair.take()
        if pair is None or oid is None or value is None:
            return
        yield oid.octets, value, value.at == value.end == pair.end


def _dn(data: bytes) -> str:
    """charon writes into a buffer, and what does not fit ends the text at the place where it began."""
    text, finished, parts = "", False, False
    for oid, value, missing in _rdns(data):
        words = [f"{RDN_NAMES.get(oid) or oid.hex(':')}=", printable(value.octets)]
        if finished:
            words.insert(0, ", ")
        parts, finished, fits = True, False, True
        for word in words:
            fits = fits and len(text) + len(word) <= LONGEST
            text += word if fits else ""
        if not fits:
            break
        if missing:
            finished = True
        elif value.end == len(data):
            finished = True
            break
        elif len(text) + 2 <= LONGEST:
            text += ", "
        else:
            break
    return text if finished or not parts else text + "(invalid ID_DER_ASN1_DN)"
