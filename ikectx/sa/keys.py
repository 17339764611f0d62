"""Keys of IKEv2: prf, prf+, SKEYSEED, SK_*, KEYMAT, and the sealing of SK payloads. Pure functions.

Sources: RFC 7296 (2.13, 2.14, 2.17, 2.18, 3.14), RFC 9370 (2.2.4) for additional key exchanges,
RFC 4434 and 4615 for the AES prfs, RFC 5282, 4106, 4309, 7634 for AEAD, RFC 5930 for AES-CTR, RFC 5529 for
Camellia. Where charon (strongSwan 5.9.8, 6.0.x) and an RFC differ, charon is followed, since its
keys are the ones in use; each such place says so.

Errors: `RefusedError` with `Status.ALGORITHM` for an algorithm or key size that is not known here;
`WireError` for a sealed message that does not open. Neither ever holds key material.

IVs of sealed messages. An agent seals messages under an SK_e that charon has used before (and uses
again afterwards), and it cannot ask charon which IVs those were. In a counter mode (GCM, CCM, CTR,
ChaCha20-Poly1305) one IV used twice under one key is fatal. charon 5.9.8 and 6.0.x make the 8 octets as
salt XOR number, the salt 64 fresh random bits for each SA, direction and process (so two charons that
share an SA by `ha` already rely on random salts). So the agent takes 64 fresh random bits as well: with k
messages of the agent and n of charons under one key, the probability that any two meet is below
(k*n + k*k/2) / 2^64: 2^-44 for k = 100 and n = 10000, more than an SA sees. A counter of the agent's own
would be no better and would have to survive a crash. Retransmissions repeat the octets, not the
sealing. In CBC the IV must not be predictable (RFC 7296, 3.14): random again. The bytes come in
as an argument; `iv_length` says how many.

An agent that was killed in the middle of an exchange builds its message again from the same octets, because
the MN may have answered the first one. Its configuration may be another one by then, so the text may be, too.
Such octets are handed over as `DrawnIvs`, and `synthetic_ivs` makes the IVs of them and of all that is sealed
(as SIV does, RFC 5297): the same message is the same on the wire, and another message has another IV.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives import constant_time, hashes
from cryptography.hazmat.primitives.ciphers import Cipher, CipherAlgorithm, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.cmac import CMAC

from ikectx.errors import RefusedError, UsageError, WireError
from ikectx.mac import hmac_of
from ikectx.numbers import Encr, Integ, OpenEnum, Prf, Protocol, Status

from .context import NO_SECRET, ChildContext, IkeGeneration, Secret

try:
    from cryptography.hazmat.decrepit.ciphers.algorithms import Camellia
except ImportError:  # pragma: no cover  # before it moved
    from cryptography.hazmat.primitives.ciphers.algorithms import Camellia

_BLOCK = 16
"""Block of AES and Camellia; 3DES has 8."""


@dataclass(frozen=True, slots=True)
class _CipherFacts:
    """`bits`: key sizes. In octets: `iv`, `block` (to pad to), `salt` at the key's end, `icv` (AEAD only)."""

    bits: tuple[int, ...]
    iv: int
    block: int = 1
    salt: int = 0
    icv: int = 0


_AES = (128, 192, 256)

_ENCR: dict[Encr, _CipherFacts] = {
    Encr.DES3: _CipherFacts((192,), iv=8, block=8),
    Encr.NULL: _CipherFacts((0,), iv=0, block=4),
    Encr.AES_CBC: _CipherFacts(_AES, iv=16, block=16),
    Encr.AES_CTR: _CipherFacts(_AES, iv=8, salt=4),
    Encr.AES_CCM_8: _CipherFacts(_AES, iv=8, salt=3, icv=8),
    Encr.AES_CCM_12: _CipherFacts(_AES, iv=8, salt=3, icv=12),
    Encr.AES_CCM_16: _CipherFacts(_AES, iv=8, salt=3, icv=16),
    Encr.AES_GCM_8: _CipherFacts(_AES, iv=8, salt=4, icv=8),
    Encr.AES_GCM_12: _CipherFacts(_AES, iv=8, salt=4, icv=12),
    Encr.AES_GCM_16: _CipherFacts(_AES, iv=8, salt=4, icv=16),
    Encr.NULL_AES_GMAC: _CipherFacts(_AES, iv=8, block=4, salt=4, icv=16),
    Encr.CAMELLIA_CBC: _CipherFacts(_AES, iv=16, block=16),
    Encr.CAMELLIA_CTR: _CipherFacts(_AES, iv=8, salt=4),
    Encr.CHACHA20_POLY1305: _CipherFacts((256,), iv=8, salt=4, icv=16),
}

_IKE_ENCR = frozenset(_ENCR) - {Encr.NULL, Encr.NULL_AES_GMAC, Encr.CAMELLIA_CTR}
"""Ciphers that can seal IKE messages here. `cryptography` offers no Camellia-CTR of OpenSSL."""

_HASH: dict[OpenEnum, type[hashes.HashAlgorithm]] = {
    Prf.HMAC_MD5: hashes.MD5,
    Prf.HMAC_SHA1: hashes.SHA1,
    Prf.HMAC_SHA2_256: hashes.SHA256,
    Prf.HMAC_SHA2_384: hashes.SHA384,
    Prf.HMAC_SHA2_512: hashes.SHA512,
}

_INTEG: dict[Integ, tuple[type[hashes.HashAlgorithm] | None, int, int]] = {
    Integ.NONE: (None, 0, 0),
    Integ.HMAC_MD5_96: (hashes.MD5, 16, 12),
    Integ.HMAC_SHA1_96: (hashes.SHA1, 20, 12),
    Integ.AES_XCBC_96: (None, 16, 12),
    Integ.HMAC_SHA1_160: (hashes.SHA1, 20, 20),
    Integ.AES_CMAC_96: (None, 16, 12),
    Integ.HMAC_SHA2_256_128: (hashes.SHA256, 32, 16),
    Integ.HMAC_SHA2_384_192: (hashes.SHA384, 48, 24),
    Integ.HMAC_SHA2_512_256: (hashes.SHA512, 64, 32),
}
"""Hash (None: a block cipher MAC, or nothing), octets of key, octets of ICV."""


def _unknown(what: str, number: object) -> RefusedError:
    return RefusedError(f"{what} {number} is not known here", status=Status.ALGORITHM)


# --- prf -----------------------------------------------------------------------------------------


def prf_length(alg: Prf) -> int:
    """Octets of the prf's output, which is also its preferred key size (RFC 7296, 2.13)."""
    if alg in (Prf.AES128_XCBC, Prf.AES128_CMAC):
        return 16
    if alg not in _HASH:
        raise _unknown("prf", alg.name)
    return _HASH[alg]().digest_size


def prf(alg: Prf, key: bytes, data: bytes) -> bytes:
    """prf(key, data). AES prfs take keys of any length (RFC 4434, 2; RFC 4615, 3)."""
    if alg is Prf.AES128_XCBC:
        if len(key) > _BLOCK:
            key = _xcbc(bytes(_BLOCK), key)
        return _xcbc(key.ljust(_BLOCK, b"\0"), data)
    if alg is Prf.AES128_CMAC:
        if len(key) != _BLOCK:
            key = _cmac(bytes(_BLOCK), key)
        return _cmac(key, data)
    if alg not in _HASH:
        raise _unknown("prf", alg.name)
    return hmac_of(_HASH[alg], key, data)


def prf_plus(alg: Prf, key: bytes, seed: bytes, length: int) -> bytes:
    """The first `length` octets of prf+(key, seed) (RFC 7296, 2.13); at most 255 outputs of the prf."""
    if not 0 <= length <= 255 * prf_length(alg):
        raise UsageError(f"prf+ cannot give {length} octets")
    out = last = b""
    number = 1
    while len(out) < length:
        last = prf(alg, key, last + seed + bytes([number]))
        out += last
        number += 1
    return out[:length]


def _cmac(key: bytes, data: bytes) -> bytes:
    mac = CMAC(algorithms.AES(key))
    mac.update(data)
    return mac.finalize()


def _xcbc(key: bytes, data: bytes) -> bytes:
    """AES-XCBC-MAC, all 16 octets (RFC 3566, 4)."""
    single = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 the block cipher itself
    key1, key2, key3 = (single.update(bytes([n]) * _BLOCK) for n in (1, 2, 3))
    start = max(0, len(data) - 1) // _BLOCK * _BLOCK
    last = data[start:]
    if len(last) < _BLOCK:
        last, mask = (last + b"\x80").ljust(_BLOCK, b"\0"), key3
    else:
        mask = key2
    chain = Cipher(algorithms.AES(key1), modes.CBC(bytes(_BLOCK))).encryptor()
    return chain.update(data[:start] + _xor(last, mask))[-_BLOCK:]


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


# --- key derivation --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SkKeys:
    """The keys of one IKE_SA (RFC 7296, 2.14). `sk_ai`, `sk_ar` are empty with AEAD; salts end `sk_e*`."""

    sk_d: Secret
    sk_ai: Secret
    sk_ar: Secret
    sk_ei: Secret
    sk_er: Secret
    sk_pi: Secret
    sk_pr: Secret


@dataclass(frozen=True, slots=True)
class ChildKeys:
    """KEYMAT of one CHILD_SA (RFC 7296, 2.17), by the roles in the exchange that made it.

    `encr_i`, `integ_i` protect what the exchange's initiator sends. Salts end `encr_*`, as the kernel wants.
    """

    encr_i: Secret
    integ_i: Secret
    encr_r: Secret
    integ_r: Secret


def skeyseed(generation: IkeGeneration) -> Secret:
    """SKEYSEED of an IKE_SA, from its nonces and shared secrets.

    Without `old_skd`: prf(Ni | Nr, g^ir) (RFC 7296, 2.14); the AES prfs get the first 8 octets of each
    nonce as their key. With it: prf_old(SK_d old, g^ir | Ni | Nr | SK(1) | ... | SK(n)) (RFC 7296, 2.18;
    RFC 9370, 2.2.4); `add_secret` is SK(1) | ... | SK(n), as charon's ADD_SECRET gives it.

    An IKE_SA whose additional key exchanges ran in IKE_INTERMEDIATE (RFC 9370, 2.2.2) has the same
    form: each gives SKEYSEED(n) = prf(SK_d(n-1), SK(n) | Ni | Nr), so its generation has `secret` SK(n),
    `old_skd` SK_d(n-1) and `old_prf` the same prf (charon sends one more IKE_ADD of the same SPIs, without
    algorithms, for each). `add_secret` has no meaning without `old_skd`: refused.
    """
    nonces = generation.nonce_i + generation.nonce_r
    if generation.old_skd is None or generation.old_prf is None:
        if len(generation.add_secret):
            raise UsageError("an IKE_SA with additional secrets needs the SK_d they are combined with")
        key = nonces
        if generation.prf in (Prf.AES128_XCBC, Prf.AES128_CMAC):
            key = generation.nonce_i[:8] + generation.nonce_r[:8]
        return Secret(prf(generation.prf, key, generation.secret.reveal()))
    data = generation.secret.reveal() + nonces + generation.add_secret.reveal()
    return Secret(prf(generation.old_prf, generation.old_skd.reveal(), data))


def sk_keys(generation: IkeGeneration) -> SkKeys:
    """All SK_* of an IKE_SA: prf+(SKEYSEED, Ni | Nr | SPIi | SPIr) cut up (RFC 7296, 2.14).

    After a rekey that changed the prf, RFC 7296 (2.18) says prf+ is the new SA's; charon uses the old SA's
    for prf+ too (sizes are the new one's), and so does this function. The two agree whenever the prf stayed.
    """
    sizes = _sk_sizes(generation)
    return SkKeys(*_cut(_sk_octets(generation, sum(sizes)), sizes))


def sk_d(generation: IkeGeneration) -> Secret:
    """SK_d alone, which is the first of SK_*: two outputs of the prf instead of nine."""
    return Secret(_sk_octets(generation, _sk_sizes(generation)[0]))


def _sk_sizes(generation: IkeGeneration) -> tuple[int, ...]:
    size = prf_length(generation.prf)
    integ = integ_key_length(generation.encr, generation.integ)
    encr = encr_key_length(generation.encr, generation.encr_bits)
    return (size, integ, integ, encr, encr, size, size)


def _sk_octets(generation: IkeGeneration, length: int) -> bytes:
    """The first octets of what SK_* are cut from."""
    outer = generation.prf if generation.old_prf is None else generation.old_prf
    seed = generation.nonce_i + generation.nonce_r + generation.spi_i + generation.spi_r
    return prf_plus(outer, skeyseed(generation).reveal(), seed, length)


def child_keys(generation: IkeGeneration, child: ChildContext) -> ChildKeys:
    """KEYMAT of a CHILD_SA made under `generation` (RFC 7296, 2.17; with PFS and RFC 9370 secrets).

    prf+(SK_d, [g^ir] | Ni | Nr | [SK(1) | ... | SK(n)]), with the nonces of the
    exchange that made the child.
    """
    if child.protocol is not Protocol.ESP:
        raise RefusedError("only ESP can be moved", status=Status.NOT_COVERED)
    encr = encr_key_length(child.encr, child.encr_bits)
    integ = integ_key_length(child.encr, child.integ)
    seed = child.secret.reveal() + child.nonce_i + child.nonce_r + child.add_secret.reveal()
    sizes = (encr, integ, encr, integ)
    keymat = prf_plus(generation.prf, sk_d(generation).reveal(), seed, sum(sizes))
    return ChildKeys(*_cut(keymat, sizes))


EspKeys = tuple[Secret, Secret]
"""(encryption key with its salt, integrity key: empty with AEAD)."""


def esp_keys(generation: IkeGeneration, child: ChildContext) -> tuple[EspKeys, EspKeys]:
    """(inbound, outbound) keys of a CHILD_SA as the gateway sees it."""
    keys = child_keys(generation, child)
    by_initiator = (keys.encr_i, keys.integ_i)
    by_responder = (keys.encr_r, keys.integ_r)
    return (by_responder, by_initiator) if child.initiator else (by_initiator, by_responder)


def encr_key_length(alg: Encr, bits: int) -> int:
    """Octets of an encryption key in KEYMAT, salt included. `bits` 0: the algorithm's only size."""
    facts = _facts(alg)
    if bits == 0 and len(facts.bits) == 1:
        bits = facts.bits[0]
    if bits not in facts.bits:
        raise RefusedError(f"{alg.name} has no key of {bits} bits", status=Status.ALGORITHM)
    return bits // 8 + facts.salt


def integ_key_length(encr: Encr, integ: Integ) -> int:
    """Octets of an integrity key in KEYMAT: 0 with AEAD."""
    if integ not in _INTEG:
        raise _unknown("integrity algorithm", integ.name)
    aead = _facts(encr).icv > 0
    if aead and integ is not Integ.NONE:
        raise RefusedError(f"{encr.name} does not go with {integ.name}", status=Status.ALGORITHM)
    return _INTEG[integ][1]


def _facts(alg: Encr) -> _CipherFacts:
    if alg not in _ENCR:
        raise _unknown("cipher", alg.name)
    return _ENCR[alg]


def _cut(octets: bytes, sizes: tuple[int, ...]) -> list[Secret]:
    cut, at = [], 0
    for size in sizes:
        cut.append(Secret(octets[at : at + size]) if size else NO_SECRET)
        at += size
    return cut


# --- SK payloads -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SealKey:
    """The algorithms and keys that protect the IKE messages of one side of one IKE_SA."""

    encr: Encr
    integ: Integ
    encr_key: Secret
    integ_key: Secret = NO_SECRET

    def __post_init__(self) -> None:
        if self.encr not in _IKE_ENCR:
            raise _unknown("IKE cipher", self.encr.name)
        if _facts(self.encr).icv == 0 and self.integ is Integ.NONE:
            raise RefusedError(f"{self.encr.name} needs an integrity algorithm", status=Status.ALGORITHM)


def seal_key(generation: IkeGeneration, *, by_initiator: bool, keys: SkKeys | None = None) -> SealKey:
    """The key for messages that the IKE_SA's original initiator (or its responder) sends.

    `keys`: those of `sk_keys(generation)`, if the caller has them already.
    """
    keys = keys or sk_keys(generation)
    if by_initiator:
        return SealKey(generation.encr, generation.integ, keys.sk_ei, keys.sk_ai)
    return SealKey(generation.encr, generation.integ, keys.sk_er, keys.sk_ar)


def iv_length(encr: Encr) -> int:
    """Octets of IV that `seal` needs. They must be random and fresh: see this module's docstring."""
    return _facts(encr).iv


@dataclass(frozen=True, slots=True)
class DrawnIvs:
    """Octets in place of IVs, for a message that may be built again after a crash: see `synthetic_ivs`."""

    octets: Secret

    @classmethod
    def of(cls, octets: bytes) -> DrawnIvs:
        return cls(Secret(octets))

    def __len__(self) -> int:
        return len(self.octets)


def synthetic_ivs(key: SealKey, drawn: DrawnIvs, text: bytes) -> bytes:
    """As many octets of IV as were drawn, different for each `text`; unpredictable without the key.

    `text`: all that is sealed with them, and what is in the clear in front of it, because an AEAD
    authenticates that under the same IV.
    """
    secret = prf(Prf.HMAC_SHA2_256, key.encr_key.reveal(), b"ikectx IVs")
    seed = len(drawn).to_bytes(4) + drawn.octets.reveal() + text
    return prf_plus(Prf.HMAC_SHA2_256, secret, seed, len(drawn))


def sealed_length(key: SealKey, inner: int) -> int:
    """Octets that `seal` makes of `inner` octets: IV, ciphertext with padding, ICV."""
    return iv_length(key.encr) + inner + len(_padding(key, inner)) + _icv_length(key)


def _icv_length(key: SealKey) -> int:
    return _facts(key.encr).icv or _INTEG[key.integ][2]


def _padding(key: SealKey, inner: int) -> bytes:
    """Padding and its length octet; zeros, as RFC 7296 (3.14) leaves the content open."""
    block = _facts(key.encr).block
    count = -(inner + 1) % block
    return bytes(count) + bytes([count])


def seal(key: SealKey, head: bytes, inner: bytes, iv: bytes) -> bytes:
    """The body of an SK (or SKF) payload: IV, ciphertext, ICV.

    `head`: everything in front of the body, from the IKE header (with its final length) to the SK payload's
    generic header (SKF: and the fragment numbers). `inner`: the payloads. `iv`: `iv_length` fresh octets.
    """
    if len(iv) != iv_length(key.encr):
        raise UsageError(f"an IV of {key.encr.name} has {iv_length(key.encr)} octets, not {len(iv)}")
    plain = inner + _padding(key, len(inner))
    if _facts(key.encr).icv:
        return iv + _aead_seal(key, head, plain, iv)
    encryptor = _cipher(key, iv).encryptor()
    body = iv + encryptor.update(plain) + encryptor.finalize()
    return body + _icv(key, head + body)


def open_(key: SealKey, head: bytes, body: bytes) -> bytes:
    """The payloads that `seal` sealed, without padding. WireError if the ICV is wrong or a length is
    impossible."""
    facts = _facts(key.encr)
    icv_length = _icv_length(key)
    size = len(body) - facts.iv - icv_length
    if size < 1 or size % facts.block:
        raise WireError(f"SK payload: {len(body)} octets cannot be {key.encr.name}")
    iv, cipher, icv = body[: facts.iv], body[facts.iv : -icv_length], body[-icv_length:]
    if facts.icv:
        plain = _aead_open(key, head, cipher, icv, iv)
    else:
        if not constant_time.bytes_eq(_icv(key, head + iv + cipher), icv):
            raise WireError("SK payload: the ICV is wrong")
        decryptor = _cipher(key, iv).decryptor()
        plain = decryptor.update(cipher) + decryptor.finalize()
    padding = plain[-1] + 1
    if padding > len(plain):
        raise WireError("SK payload: more padding than octets")
    return plain[:-padding]


def _icv(key: SealKey, data: bytes) -> bytes:
    kind, _, length = _INTEG[key.integ]
    secret = key.integ_key.reveal()
    if kind is not None:
        return hmac_of(kind, secret, data)[:length]
    return (_xcbc if key.integ is Integ.AES_XCBC_96 else _cmac)(secret, data)[:length]


def _cipher(key: SealKey, iv: bytes) -> Cipher[modes.CBC] | Cipher[modes.CTR]:
    secret = key.encr_key.reveal()
    algorithm: CipherAlgorithm
    if key.encr is Encr.AES_CTR:
        # RFC 5930, 2.1: nonce, IV and a block counter that starts at 1
        counter = secret[-4:] + iv + (1).to_bytes(4)
        return Cipher(algorithms.AES(secret[:-4]), modes.CTR(counter))
    if key.encr is Encr.AES_CBC:
        algorithm = algorithms.AES(secret)
    elif key.encr is Encr.CAMELLIA_CBC:
        algorithm = Camellia(secret)
    else:
        algorithm = TripleDES(secret)
    return Cipher(algorithm, modes.CBC(iv))


def _aead_seal(key: SealKey, head: bytes, plain: bytes, iv: bytes) -> bytes:
    secret, nonce, icv = _aead_parts(key, iv)
    if key.encr is Encr.CHACHA20_POLY1305:
        return ChaCha20Poly1305(secret).encrypt(nonce, plain, head)
    if key.encr in (Encr.AES_CCM_8, Encr.AES_CCM_12, Encr.AES_CCM_16):
        return AESCCM(secret, tag_length=icv).encrypt(nonce, plain, head)
    sealer: Cipher[modes.ModeWithAuthenticationTag] = Cipher(algorithms.AES(secret), modes.GCM(nonce))
    encryptor = sealer.encryptor()
    encryptor.authenticate_additional_data(head)
    cipher = encryptor.update(plain) + encryptor.finalize()
    return cipher + encryptor.tag[:icv]


def _aead_open(key: SealKey, head: bytes, cipher: bytes, icv: bytes, iv: bytes) -> bytes:
    secret, nonce, length = _aead_parts(key, iv)
    try:
        if key.encr is Encr.CHACHA20_POLY1305:
            return ChaCha20Poly1305(secret).decrypt(nonce, cipher + icv, head)
        if key.encr in (Encr.AES_CCM_8, Encr.AES_CCM_12, Encr.AES_CCM_16):
            return AESCCM(secret, tag_length=length).decrypt(nonce, cipher + icv, head)
        mode = modes.GCM(nonce, icv, min_tag_length=length)
        opener: Cipher[modes.ModeWithAuthenticationTag] = Cipher(algorithms.AES(secret), mode)
        decryptor = opener.decryptor()
        decryptor.authenticate_additional_data(head)
        return decryptor.update(cipher) + decryptor.finalize()
    except (InvalidTag, InvalidSignature):
        raise WireError("SK payload: the ICV is wrong") from None


def _aead_parts(key: SealKey, iv: bytes) -> tuple[bytes, bytes, int]:
    """(key, nonce, octets of ICV): the salt at the key's end goes in front of the IV."""
    facts = _facts(key.encr)
    secret = key.encr_key.reveal()
    return secret[: -facts.salt], secret[-facts.salt :] + iv, facts.icv


__all__ = [
    "ChildKeys",
    "DrawnIvs",
    "EspKeys",
    "SealKey",
    "SkKeys",
    "child_keys",
    "encr_key_length",
    "esp_keys",
    "integ_key_length",
    "iv_length",
    "open_",
    "prf",
    "prf_length",
    "prf_plus",
    "seal",
    "seal_key",
    "sealed_length",
    "sk_keys",
    "skeyseed",
    "synthetic_ivs",
]
