"""Message authentication codes, their comparison, and hashes, by the package cryptography; no I/O."""

from __future__ import annotations

from cryptography.hazmat.primitives import constant_time, hashes
from cryptography.hazmat.primitives.hmac import HMAC


def hmac_of(kind: type[hashes.HashAlgorithm], key: bytes, data: bytes) -> bytes:
    """The whole HMAC of `data` (RFC 2104) with that hash."""
    mac = HMAC(key, kind())
    mac.update(data)
    return mac.finalize()


def hmac_sha256(key: bytes, data: bytes) -> bytes:
    """HMAC-SHA-256 of `data`, 32 octets (RFC 4868)."""
    return hmac_of(hashes.SHA256, key, data)


def digest(data: bytes) -> bytes:
    """The SHA-256 of `data`, 32 octets."""
    made = hashes.Hash(hashes.SHA256())
    made.update(data)
    return made.finalize()


def equal(one: bytes, other: bytes) -> bool:
    """Whether they are the same octets; the time that this takes does not tell where they differ."""
    return constant_time.bytes_eq(one, other)
