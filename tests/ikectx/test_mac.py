"""HMACs and hashes against published vectors."""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes

from ikectx.mac import digest, equal, hmac_of, hmac_sha256


def test_hmac_sha256() -> None:
    """RFC 4231, test case 2."""
    tag = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert hmac_sha256(b"Jefe", b"what do ya want for nothing?").hex() == tag


def test_hmac_sha1() -> None:
    """RFC 2202, section 3, test case 2."""
    tag = hmac_of(hashes.SHA1, b"Jefe", b"what do ya want for nothing?")
    assert tag.hex() == "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79"


def test_digest() -> None:
    """FIPS 180-2, appendix B.1."""
    assert digest(b"abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_equal() -> None:
    assert equal(b"abc", b"abc")
    assert not equal(b"abc", b"abd")
    assert not equal(b"abc", b"ab")
