"""Identities against the texts of a connection, as strongSwan matches them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from ikectx.numbers import IdType
from ikectx.sa.context import Identity
from ikectx.wire.identity import allows, dn_text


def fqdn(text: str) -> Identity:
    return Identity(IdType.FQDN, text.encode())


def email(text: str) -> Identity:
    return Identity(IdType.RFC822_ADDR, text.encode())


def address(text: str) -> Identity:
    found = ip_address(text)
    return Identity(IdType.IPV4_ADDR if found.version == 4 else IdType.IPV6_ADDR, found.packed)


def dn(*pairs: tuple[x509.ObjectIdentifier, str]) -> Identity:
    name = x509.Name([x509.NameAttribute(kind, value) for kind, value in pairs])
    return Identity(IdType.DER_ASN1_DN, name.public_bytes())


CAROL = dn(
    (NameOID.COUNTRY_NAME, "CH"),
    (NameOID.ORGANIZATION_NAME, "Linux, strongSwan"),
    (NameOID.COMMON_NAME, "carol"),
)


@pytest.mark.parametrize(
    ("pattern", "identity"),
    [
        ("%any", fqdn("root.evil")),
        ("", fqdn("root.evil")),
        ("mn.example", fqdn("MN.Example")),
        ("*.example.org", fqdn("mn.example.org")),
        ("*@example.org", email("mn@example.org")),
        ("mn@example.org", email("MN@example.org")),
        ("j??rgen", fqdn("jürgen")),
        ("192.0.2.7", address("192.0.2.7")),
        ("192.0.2.0/24", address("192.0.2.7")),
        ("192.0.2.1-192.0.2.9", address("192.0.2.7")),
        ("2001:db8::7", address("2001:db8::7")),
        ("carol", Identity(IdType.KEY_ID, b"carol")),
        ("01:02:FF", Identity(IdType.KEY_ID, b"\x01\x02\xff")),
        ("01:02:ff", Identity(IdType.KEY_ID, b"\x01\x02\xff")),
        ("C=CH, O=Linux, strongSwan, CN=carol", CAROL),
        ("C=CH, O=Linux, strongSwan, CN=*", CAROL),
        ("C=*, O=*, CN=*", CAROL),
        ("^.*@example\\.(org|com)$", email("mn@example.com")),
    ],
)
def test_allowed(pattern: str, identity: Identity) -> None:
    assert allows(pattern, identity)


@pytest.mark.parametrize(
    ("pattern", "identity"),
    [
        ("mn.example", fqdn("root.evil")),
        ("mn.example", email("mn.example")),  # another type is another identity
        ("mn@example.org", fqdn("mn@example.org")),
        ("*.example.org", fqdn("example.org")),
        ("*.example.org", fqdn("mn.example.org.evil")),
        ("*@example.org", email("mn@evil.example.org.evil")),
        ("mn.*", fqdn("mn.example")),  # an asterisk counts at the front only
        ("mn.example", fqdn("mn.example\0")),
        ("a?b", fqdn("a\nb")),
        ("192.0.2.7", address("192.0.2.8")),
        ("192.0.2.7", fqdn("192.0.2.7")),
        ("192.0.2.7", Identity(IdType.KEY_ID, b"192.0.2.7")),
        ("192.0.2.0/24", address("2001:db8::7")),
        ("192.0.2.7", Identity(IdType.IPV4_ADDR, b"\xc0\x00\x02")),
        ("mn.example", address("192.0.2.7")),
        ("C=CH, O=Linux, strongSwan, CN=carol", fqdn("C=CH, O=Linux, strongSwan, CN=carol")),
        ("O=Linux, strongSwan, C=CH, CN=carol", CAROL),  # the order counts
        ("C=CH, CN=carol", CAROL),
        ("C=CH, O=Linux, strongSwan, OU=x, CN=carol", CAROL),
        ("C=CH, O=Linux, strongSwan, CN=Carol", CAROL),  # UTF8String compares with case
        ("C=CH, O=Linux, strongSwan, CN=car*", CAROL),
        ("^.*@example\\.org$", email("mn@example.org.evil")),
        ("^($", fqdn("a")),
        ("CN=*", Identity(IdType.DER_ASN1_DN, b"\x30\x80")),
        ("mn.example", Identity(IdType.ANY, b"")),
    ],
)
def test_not_allowed(pattern: str, identity: Identity) -> None:
    assert not allows(pattern, identity)


def test_a_dn_reads_as_strongswan_writes_it() -> None:
    assert dn_text(CAROL.data) == "C=CH, O=Linux, strongSwan, CN=carol"
    assert dn_text(dn((NameOID.EMAIL_ADDRESS, "a@b.c")).data) == "E=a@b.c"
    assert dn_text(b"\x30\x03\x31\x01\x30") is None
