"""New SPIs in an answer: the octets, what is refused."""

from __future__ import annotations

import pytest

from ikectx.errors import WireError
from ikectx.wire.spis import ESP, IKE, NewSpi, parse_new_spis, serialize_new_spis

VECTOR = (
    bytes.fromhex("0304")  # ESP, SPIs of 4 octets
    + bytes.fromhex("c0000001c0000002")  # old, new
    + bytes.fromhex("0108")  # IKE, SPIs of 8 octets
    + bytes.fromhex("11111111111111112222222222222222")
)
SPIS = (
    NewSpi(ESP, bytes.fromhex("c0000001"), bytes.fromhex("c0000002")),
    NewSpi(IKE, b"\x11" * 8, b"\x22" * 8),
)


def test_the_octets() -> None:
    assert serialize_new_spis(SPIS) == VECTOR
    assert parse_new_spis(VECTOR) == SPIS
    assert parse_new_spis(VECTOR + bytes(6)) == SPIS  # padded to a multiple of 8, as in a block
    assert parse_new_spis(b"") == ()


@pytest.mark.parametrize(
    "data",
    [
        VECTOR[:-1],
        VECTOR + b"\x00\x01",
        b"\x07\x04" + bytes(8),  # no such protocol
        b"\x03\x08" + bytes(range(16)),  # ESP SPIs have 4 octets
        b"\x03\x04\xc0\x00\x00\x01\x00\x00\x00\xff",  # reserved by IANA
        b"\x01\x08" + b"\x11" * 8 + bytes(8),
        (b"\x03\x04" + b"\xc0\x00\x00\x01" * 2) * 65,
    ],
)
def test_what_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        parse_new_spis(data)
