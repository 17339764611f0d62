"""dh.py: both ends get one secret, as the RFCs want it on the wire."""

from __future__ import annotations

import hashlib
import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import RefusedError, UsageError, WireError
from ikectx.numbers import KeMethod, Status
from mobike_ext.dh import KeyPair, fresh_length, known, modp_prime

SIZES = {
    KeMethod.CURVE_25519: (32, 32),
    KeMethod.CURVE_448: (56, 56),
    KeMethod.ECP_192: (48, 24),
    KeMethod.ECP_224: (56, 28),
    KeMethod.ECP_256: (64, 32),
    KeMethod.ECP_384: (96, 48),
    KeMethod.ECP_521: (132, 66),
    KeMethod.BRAINPOOL_256: (64, 32),
    KeMethod.MODP_1024: (128, 128),
    KeMethod.MODP_1536: (192, 192),
    KeMethod.MODP_2048: (256, 256),
    KeMethod.MODP_3072: (384, 384),
    KeMethod.MODP_4096: (512, 512),
    KeMethod.MODP_6144: (768, 768),
    KeMethod.MODP_8192: (1024, 1024),
}
"""Octets of the public value and of the secret."""

PRIMES = {
    KeMethod.MODP_1024: "3f35a3f5f6c4376a744acad409bb22f8d897f949d2311d885adaa890981b67a0",
    KeMethod.MODP_1536: "64fcc83ec403930bf18393dbc883ccaa1fbb08ac876f77f7aa99748ca945019b",
    KeMethod.MODP_2048: "d66436f79bbd6b2e38c0ffbd079be904d2641415e2e67140e09448be9a60890e",
    KeMethod.MODP_3072: "48cf8b092fbce4359d9871abf74f98e25b6163379eaa15cd9087e800c6d1c55c",
    KeMethod.MODP_4096: "4ee95187682bcb230ad26a95205f6920e84708f6251b3894329b09ec23919e33",
    KeMethod.MODP_6144: "d1bfe6d0925ce7e4da262b62861514a7755e35831e429f343e7b864848657efd",
    KeMethod.MODP_8192: "39ab4feab950a3128fb71accb9fc3965d857012e081998a85996e3ea8b3c3bcf",
}
"""SHA-256 of the primes, which from 1536 bits on are those of OpenSSL 3."""


def pair(method: KeMethod) -> KeyPair:
    return KeyPair.of(method, secrets.token_bytes(fresh_length(method)))


@pytest.mark.parametrize("method", SIZES, ids=lambda m: m.name)
def test_both_ends_get_the_same(method: KeMethod) -> None:
    assert known(method)
    mine, theirs = pair(method), pair(method)
    public, size = SIZES[method]
    assert len(mine.public) == len(theirs.public) == public
    secret = mine.shared(theirs.public)
    assert secret == theirs.shared(mine.public)
    assert len(secret) == size
    assert secret.reveal().hex() not in repr((mine, theirs, secret))


@pytest.mark.parametrize("method", PRIMES, ids=lambda m: m.name)
def test_primes(method: KeMethod) -> None:
    prime = modp_prime(method)
    octets = prime.to_bytes(prime.bit_length() // 8)
    assert octets.startswith(b"\xff" * 8)
    assert octets.endswith(b"\xff" * 8)
    assert hashlib.sha256(octets).hexdigest() == PRIMES[method]


def test_curve_25519_of_rfc_7748() -> None:
    # section 6.1, Bob's side
    bob = KeyPair.of(
        KeMethod.CURVE_25519,
        bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"),
    )
    assert bob.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    secret = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert bob.shared(alice).reveal().hex() == secret


def test_the_same_octets_make_the_same_pair() -> None:
    for method in SIZES:
        octets = bytes(range(fresh_length(method)))
        assert KeyPair.of(method, octets).public == KeyPair.of(method, octets).public


@pytest.mark.parametrize("method", SIZES, ids=lambda m: m.name)
def test_what_is_no_public_value(method: KeMethod) -> None:
    mine = pair(method)
    size = len(mine.public)
    wrong = [b"", bytes(size), mine.public[:-1], mine.public + b"\0"]
    if method in PRIMES:
        prime = modp_prime(method)
        wrong += [number.to_bytes(size) for number in (1, prime - 1, prime)]
    for octets in wrong:
        with pytest.raises(WireError):
            mine.shared(octets)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([m for m in SIZES if m not in PRIMES]), st.binary(max_size=140))
def test_foreign_values_raise_only_wire_errors(method: KeMethod, octets: bytes) -> None:
    try:
        pair(method).shared(octets)
    except WireError:
        return


def test_what_is_not_known() -> None:
    for method in (KeMethod.NONE, KeMethod.ML_KEM_768, KeMethod(1024)):
        assert not known(method)
        with pytest.raises(RefusedError) as caught:
            fresh_length(method)
        assert caught.value.status is Status.ALGORITHM
    with pytest.raises(UsageError):
        KeyPair.of(KeMethod.CURVE_25519, b"short")
