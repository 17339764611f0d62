"""Whether a connection allows an identity, as strongSwan matches it with the connection's `id`. Pure.

Source: strongSwan's identification.c, 5.9.8 and 6.0.6. VICI reports a connection's identities only as text,
without their type, so the type is the one that strongSwan reads from such a text. If strongSwan prints two
types alike (a KEY_ID in ASCII and an FQDN), either matches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

from ikectx.errors import WireError
from ikectx.numbers import IdType
from ikectx.sa.context import Identity
from ikectx.sa.printed import RDN_NAMES

from .reader import Reader

ANY = ("%any", "%any6", "*", "")
"""Patterns that allow every identity."""
_TEXT = (IdType.FQDN, IdType.RFC822_ADDR)
_ADDRESS = {IdType.IPV4_ADDR: 4, IdType.IPV6_ADDR: 6}
_SEQUENCE, _SET, _OID, _PRINTABLE, _IA5 = 0x30, 0x31, 0x06, 0x13, 0x16


def allows(pattern: str, identity: Identity) -> bool:
    """True if `pattern`, the `id` or `eap_id` of a connection as VICI reports it, allows that identity.

    %any allows all; *.example.org and *@example.org allow what ends so; an RDN of a DN may be an asterisk
    (CN=*), and all RDNs are there in the same order (charon.rdn_matching = strict, the default); a network or
    range allows its addresses; ^...$ is a regular expression (strongSwan 6). Text compares without case.
    """
    if pattern in ANY:
        return True
    if pattern.startswith("^") and pattern.endswith("$"):
        return _fits_expression(pattern, identity)
    if identity.type in _ADDRESS:
        return _among_addresses(pattern, identity)
    if identity.type is IdType.DER_ASN1_DN:
        return _fits_dn(pattern, identity)
    if identity.type is IdType.KEY_ID:
        same = pattern == _printed(identity.data) or pattern.lower() == identity.data.hex(":")
        return same and not _is_address(pattern)
    return identity.type in _TEXT and identity.type is _kind(pattern) and _fits_text(pattern, identity.data)


def _kind(pattern: str) -> IdType:
    """The type that strongSwan reads from a text."""
    if _is_address(pattern):
        return IdType.IPV4_ADDR if ip_address(pattern).version == 4 else IdType.IPV6_ADDR
    if "=" in pattern:
        return IdType.DER_ASN1_DN
    return IdType.RFC822_ADDR if "@" in pattern else IdType.FQDN


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _printed(data: bytes) -> str | None:
    """As strongSwan shows text: octets that are not printable ASCII as "?".

    None for control characters: nobody configures those, so no text stands for them.
    """
    if any(octet < 0x20 or octet == 0x7F for octet in data):
        return None
    return data.decode("ascii", "replace").replace("\ufffd", "?")


def _fits_text(pattern: str, data: bytes) -> bool:
    text = _printed(data)
    if text is None:
        return False
    wanted, text = pattern.lower(), text.lower()
    if wanted.startswith("*"):
        return len(text) >= len(wanted) and text.endswith(wanted[1:])
    return text == wanted


def _fits_expression(pattern: str, identity: Identity) -> bool:
    if identity.type in (*_TEXT, IdType.KEY_ID):
        text = _printed(identity.data)
    elif identity.type is IdType.DER_ASN1_DN:
        text = dn_text(identity.data)
    else:
        text = None
    try:
        return text is not None and re.search(pattern, text, re.IGNORECASE) is not None
    except re.error:
        return False


def _among_addresses(pattern: str, identity: Identity) -> bool:
    if len(identity.data) != (4 if identity.type is IdType.IPV4_ADDR else 16):
        return False
    address = ip_address(identity.data)
    try:
        if "-" in pattern:
            first, last = (ip_address(part) for part in pattern.split("-", 1))
            return first.version == address.version and int(first) <= int(address) <= int(last)
        return address in ip_network(pattern, strict=False)
    except ValueError:
        return False


# Distinguished names.


def _rdns(octets: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """(attribute type, kind of string, value) of each RDN of a DN in DER. Errors: WireError."""
    outer = Reader(octets, "DN")
    names = Reader(_element(outer, _SEQUENCE), "DN")
    outer.end()
    while names.left:
        several = Reader(_element(names, _SET), "RDN")
        while several.left:
            pair = Reader(_element(several, _SEQUENCE), "RDN")
            oid = _element(pair, _OID)
            kind = pair.u8("kind of string")
            yield oid, kind, _content(pair)
            pair.end()


def _element(reader: Reader, tag: int) -> bytes:
    """The content of the next element, whose tag must be that one."""
    found = reader.u8("tag")
    if found != tag:
        raise reader.fail(f"tag {found:#04x} is not {tag:#04x},")
    return _content(reader)


def _content(reader: Reader) -> bytes:
    size = reader.u8("length")
    if size & 0x80:
        size = int.from_bytes(reader.octets(size & 0x7F, "length"))
    return reader.octets(size, "content")


def dn_text(octets: bytes) -> str | None:
    """A DN as strongSwan writes it: C=CH, O=strongSwan, CN=moon. None for octets that are no DN."""
    parts = _dn_parts(octets)
    return None if parts is None else ", ".join(f"{name}={value}" for name, value, _ in parts)


def _dn_parts(octets: bytes) -> list[tuple[str, str, bool]] | None:
    """(attribute type, value, whether it compares without case) of each RDN; None: it is no DN."""
    parts = []
    try:
        for oid, kind, data in _rdns(octets):
            name, value = RDN_NAMES.get(oid, oid.hex(":")), _printed(data)
            if value is None:
                return None
            parts.append((name, value, kind == _PRINTABLE or (kind == _IA5 and name == "E")))
    except WireError:
        return None
    return parts


def _fits_dn(pattern: str, identity: Identity) -> bool:
    """The pattern is compared as text, because a comma in a value looks like one between RDNs."""
    parts = _dn_parts(identity.data)
    if not parts:
        return False
    each = [
        rf"(?i:{re.escape(name)})=(?{'i' if caseless else ''}:\*|{re.escape(value)})"
        for name, value, caseless in parts
    ]
    return re.fullmatch(", ".join(each), pattern) is not None
