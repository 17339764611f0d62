"""Key exchange methods of IKEv2 (transform type 4): public value and shared secret from fresh octets.

    CURVE_25519, CURVE_448   RFC 8031      the octets are the private key
    ECP, Brainpool           RFC 5903, 6954; x | y on the wire, the secret is x
    MODP                     RFC 2409, 3526, generator 2; values padded to the prime's size (RFC 7296, 3.4)

The private value is made of octets that the caller drew, so that a machine repeats itself after a crash. MODP
is Python's own arithmetic, because `cryptography` is dropping it. It does not run in constant time, and each
exponent is for one exchange. Errors: `RefusedError` with ALGORITHM for a method that is not known here,
`WireError` for an invalid public value of the peer. Neither has key material.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from cryptography.hazmat.primitives.asymmetric import ec, x448, x25519

from ikectx.errors import RefusedError, UsageError, WireError
from ikectx.numbers import KeMethod, Status
from ikectx.sa.context import Secret

_CURVES: dict[KeMethod, Callable[[], ec.EllipticCurve]] = {
    KeMethod.ECP_192: ec.SECP192R1,
    KeMethod.ECP_224: ec.SECP224R1,
    KeMethod.ECP_256: ec.SECP256R1,
    KeMethod.ECP_384: ec.SECP384R1,
    KeMethod.ECP_521: ec.SECP521R1,
    KeMethod.BRAINPOOL_256: ec.BrainpoolP256R1,
}

_MODP = {
    KeMethod.MODP_1024: (1024, 129093),
    KeMethod.MODP_1536: (1536, 741804),
    KeMethod.MODP_2048: (2048, 124476),
    KeMethod.MODP_3072: (3072, 1690314),
    KeMethod.MODP_4096: (4096, 240904),
    KeMethod.MODP_6144: (6144, 929484),
    KeMethod.MODP_8192: (8192, 4743158),
}
"""Bits, and what is added to the digits of pi: 2^n - 2^(n-64) - 1 + 2^64 * ([2^(n-130) pi] + added)."""

_EXPONENT = 64
"""Octets of a MODP exponent: twice the strength of the largest group and more (RFC 3526, 8)."""


def known(method: KeMethod) -> bool:
    """This method can be used here."""
    return method in _CURVES or method in _MODP or method in (KeMethod.CURVE_25519, KeMethod.CURVE_448)


def fresh_length(method: KeMethod) -> int:
    """Fresh random octets that `KeyPair` needs. RefusedError for an unknown method."""
    if method is KeMethod.CURVE_25519:
        return 32
    if method is KeMethod.CURVE_448:
        return 56
    if method in _CURVES:
        return (_CURVES[method]().key_size + 7) // 8
    if method in _MODP:
        return _EXPONENT
    raise RefusedError(f"key exchange method {method.name} is not known here", status=Status.ALGORITHM)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One side of one exchange: `public` goes into the KE payload."""

    method: KeMethod
    public: bytes
    _private: Secret

    @classmethod
    def of(cls, method: KeMethod, fresh: bytes) -> KeyPair:
        """The pair made from `fresh_length` fresh random octets. UsageError for another number of them."""
        if len(fresh) != fresh_length(method):
            raise UsageError(f"{method.name} wants {fresh_length(method)} octets, not {len(fresh)}")
        if method is KeMethod.CURVE_25519:
            public = x25519.X25519PrivateKey.from_private_bytes(fresh).public_key().public_bytes_raw()
        elif method is KeMethod.CURVE_448:
            public = x448.X448PrivateKey.from_private_bytes(fresh).public_key().public_bytes_raw()
        elif method in _CURVES:
            numbers = _ec_private(method, fresh).public_key().public_numbers()
            size = (numbers.curve.key_size + 7) // 8
            public = numbers.x.to_bytes(size) + numbers.y.to_bytes(size)
        else:
            public = _modp_power(method, fresh)
        return cls(method, public, Secret(fresh))

    def shared(self, theirs: bytes) -> Secret:
        """g^ir with the peer's public value. WireError if that is invalid for this method."""
        fresh = self._private.reveal()
        try:
            if self.method is KeMethod.CURVE_25519:
                mine = x25519.X25519PrivateKey.from_private_bytes(fresh)
                return Secret(mine.exchange(x25519.X25519PublicKey.from_public_bytes(theirs)))
            if self.method is KeMethod.CURVE_448:
                other = x448.X448PrivateKey.from_private_bytes(fresh)
                return Secret(other.exchange(x448.X448PublicKey.from_public_bytes(theirs)))
            if self.method in _CURVES:
                curve = _CURVES[self.method]()
                if len(theirs) != 2 * ((curve.key_size + 7) // 8):
                    raise ValueError
                point = ec.EllipticCurvePublicKey.from_encoded_point(curve, b"\4" + theirs)
                return Secret(_ec_private(self.method, fresh).exchange(ec.ECDH(), point))
            return self._modp_shared(theirs)
        except ValueError:
            raise WireError(f"{len(theirs)} octets are no public value of {self.method.name}") from None

    def _modp_shared(self, theirs: bytes) -> Secret:
        prime = modp_prime(self.method)
        size = prime.bit_length() // 8
        number = int.from_bytes(theirs)
        if len(theirs) != size or not 1 < number < prime - 1:
            raise ValueError
        return Secret(pow(number, int.from_bytes(self._private.reveal()), prime).to_bytes(size))


def _ec_private(method: KeMethod, fresh: bytes) -> ec.EllipticCurvePrivateKey:
    curve = _CURVES[method]()
    # below the order of each of these curves, which lies between 2^(bits-1) and 2^bits
    return ec.derive_private_key(int.from_bytes(fresh) % (1 << (curve.key_size - 1)) + 1, curve)


@cache
def modp_prime(method: KeMethod) -> int:
    """The prime of a MODP group, from pi as the RFCs define it."""
    bits, added = _MODP[method]
    return (1 << bits) - (1 << (bits - 64)) - 1 + ((_pi(bits - 130) + added) << 64)


def _pi(bits: int) -> int:
    """The integer part of 2^bits * pi, by Machin's formula."""
    guard = 64
    one = 1 << (bits + guard)
    return 4 * (4 * _arctan_of_inverse(5, one) - _arctan_of_inverse(239, one)) >> guard


def _arctan_of_inverse(number: int, one: int) -> int:
    power = total = one // number
    square, divisor, sign = number * number, 1, 1
    while power:
        power //= square
        divisor, sign = divisor + 2, -sign
        total += sign * (power // divisor)
    return total


def _modp_power(method: KeMethod, fresh: bytes) -> bytes:
    prime = modp_prime(method)
    return pow(2, int.from_bytes(fresh), prime).to_bytes(prime.bit_length() // 8)
