"""ESP in the kernel's terms: names of algorithms, and replay windows.

Pure. Sources: IANA's IKEv2 transforms; Linux crypto API names as XFRM takes them; RFC 4303 (3.4.3, appendix
A) and the kernel's three replay layouts (linux/xfrm.h).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ikectx.errors import UsageError, WireError
from ikectx.numbers import Encr, Integ
from ikectx.sa.context import ReplayState


@dataclass(frozen=True, slots=True)
class Cipher:
    """The kernel's name of an encryption transform, and its sizes.

    `salt`: octets after the key that belong to the nonce (part of the key for XFRM and of IKEv2's KEYMAT
    alike). `icv`: bits of an AEAD's integrity check value, 0: not an AEAD. `sizes`: key sizes in bits,
    without the salt.
    """

    name: str
    sizes: tuple[int, ...]
    salt: int = 0
    icv: int = 0


_AES = (128, 192, 256)

CIPHERS: Mapping[Encr, Cipher] = {
    Encr.DES3: Cipher("cbc(des3_ede)", (192,)),
    Encr.NULL: Cipher("ecb(cipher_null)", (0,)),
    Encr.AES_CBC: Cipher("cbc(aes)", _AES),
    Encr.AES_CTR: Cipher("rfc3686(ctr(aes))", _AES, salt=4),
    Encr.AES_CCM_8: Cipher("rfc4309(ccm(aes))", _AES, salt=3, icv=64),
    Encr.AES_CCM_12: Cipher("rfc4309(ccm(aes))", _AES, salt=3, icv=96),
    Encr.AES_CCM_16: Cipher("rfc4309(ccm(aes))", _AES, salt=3, icv=128),
    Encr.AES_GCM_8: Cipher("rfc4106(gcm(aes))", _AES, salt=4, icv=64),
    Encr.AES_GCM_12: Cipher("rfc4106(gcm(aes))", _AES, salt=4, icv=96),
    Encr.AES_GCM_16: Cipher("rfc4106(gcm(aes))", _AES, salt=4, icv=128),
    Encr.NULL_AES_GMAC: Cipher("rfc4543(gcm(aes))", _AES, salt=4, icv=128),
    Encr.CAMELLIA_CBC: Cipher("cbc(camellia)", _AES),
    Encr.CHACHA20_POLY1305: Cipher("rfc7539esp(chacha20,poly1305)", (256,), salt=4, icv=128),
}

INTEGRITY: Mapping[Integ, tuple[str, int, int]] = {
    Integ.HMAC_MD5_96: ("hmac(md5)", 96, 128),
    Integ.HMAC_SHA1_96: ("hmac(sha1)", 96, 160),
    Integ.HMAC_SHA1_160: ("hmac(sha1)", 160, 160),
    Integ.AES_XCBC_96: ("xcbc(aes)", 96, 128),
    Integ.AES_CMAC_96: ("cmac(aes)", 96, 128),
    Integ.HMAC_SHA2_256_128: ("hmac(sha256)", 128, 256),
    Integ.HMAC_SHA2_384_192: ("hmac(sha384)", 192, 384),
    Integ.HMAC_SHA2_512_256: ("hmac(sha512)", 256, 512),
}
"""Integrity transform -> (kernel name, ICV bits, key bits)."""


def encryption_of(name: str, key_octets: int, icv_bits: int) -> tuple[Encr, int] | None:
    """(transform, key bits; 0 if the cipher has one size) of a kernel algorithm, None: not known."""
    for encr, cipher in CIPHERS.items():
        bits = 8 * (key_octets - cipher.salt)
        if cipher.name == name and cipher.icv == icv_bits and bits in cipher.sizes:
            return (encr, bits if len(cipher.sizes) > 1 else 0)
    return None


def integrity_of(name: str, trunc_bits: int) -> Integ | None:
    """The integrity transform of a kernel algorithm; "" is NONE; None: not known."""
    if not name:
        return Integ.NONE
    for integ, (known, bits, _) in INTEGRITY.items():
        if (known, bits) == (name, trunc_bits):
            return integ
    return None


_MASK32 = 0xFFFFFFFF
MAX_WORDS = 128
"""The kernel's longest window: 4096 packets."""


@dataclass(frozen=True, slots=True)
class KernelReplay:
    """Replay state of one SA as the kernel has it: both directions' counters in one struct.

    An inbound SA uses `seq`, `window` and `bitmap`, an outbound one `oseq`. `bitmap` has bit n set if `seq -
    n` was received (as in `ReplayState`). `esn`: numbers have 64 bits.

    `words` is the form. None is the short one, with one 32-bit map (windows up to 32, no ESN). A number is
    the long one, with so many u32s of a ring; 0 if the SA only sends, which charon from 6.0.0 on uses if the
    kernel knows directions (6.10). An SA keeps the form that it was made with, and a kernel that is given the
    other one answers 0 and changes nothing.
    """

    oseq: int = 0
    seq: int = 0
    window: int = 0
    bitmap: int = 0
    esn: bool = False
    words: int | None = None

    def __post_init__(self) -> None:
        words = 1 if self.words is None else self.words
        if not 0 <= words <= MAX_WORDS:
            raise ValueError(f"a replay bitmap of {words} words")
        if not 0 <= self.window <= 32 * words:
            raise ValueError(f"a replay window of {self.window} does not fit {words} words")
        if self.esn and self.words is None:
            raise ValueError("extended sequence numbers need the long form")
        limit = 1 << (64 if self.esn else 32)
        if not (0 <= self.oseq < limit and 0 <= self.seq < limit):
            raise ValueError("a sequence number does not fit")
        if self.bitmap < 0 or self.bitmap >> self.window:
            raise ValueError("the bitmap is wider than the window")

    @property
    def inbound(self) -> ReplayState:
        """The state of an inbound SA."""
        return ReplayState(self.seq, self.window, self.bitmap, self.esn)

    @property
    def outbound(self) -> ReplayState:
        """The state of an outbound SA; it has no window."""
        return ReplayState(self.oseq, 0, 0, self.esn)

    @classmethod
    def from_short(cls, oseq: int, seq: int, bitmap: int, window: int) -> KernelReplay:
        """From struct xfrm_replay_state and the SA's window. Errors: WireError.

        The kernel shifts the map without cutting it to the window, so bits beyond are dropped here.
        """
        return _checked(oseq=oseq, seq=seq, window=window, bitmap=known(bitmap, seq, window))

    @classmethod
    def from_long(cls, head: tuple[int, int, int, int, int, int], ring: bytes, *, esn: bool) -> KernelReplay:
        """From struct xfrm_replay_state_esn and its ring. Errors: WireError.

        `head`: bmp_len, oseq, seq, oseq_hi, seq_hi, replay_window.
        """
        words, oseq, seq, oseq_hi, seq_hi, window = head
        if words > MAX_WORDS or len(ring) < 4 * words:
            raise WireError(f"a replay bitmap of {words} words in {len(ring)} octets")
        if window > 32 * words:
            raise WireError(f"a replay window of {window} in {words} words")
        bits = 0
        for index, word in enumerate(struct.unpack_from(f"={words}I", ring)):
            bits |= word << (32 * index)
        top = _position(seq, window)
        bitmap = 0
        if bits and window:
            for back in range(window):
                bitmap |= (bits >> ((top - back) % window) & 1) << back
        full = seq | seq_hi << 32
        return _checked(
            oseq=oseq | oseq_hi << 32,
            seq=full,
            window=window,
            bitmap=known(bitmap, full, window),
            esn=esn,
            words=words,
        )

    def long_head(self) -> tuple[int, int, int, int, int, int]:
        """The fixed part of struct xfrm_replay_state_esn, for a state in the long form."""
        return (
            self.words or 0,
            self.oseq & _MASK32,
            self.seq & _MASK32,
            self.oseq >> 32,
            self.seq >> 32,
            self.window,
        )

    def ring(self) -> bytes:
        """The kernel's bitmap: bit (number - 1) modulo window, in u32 words of host byte order."""
        top = _position(self.seq & _MASK32, self.window)
        bits = 0
        for back in range(self.window if self.bitmap else 0):
            bits |= (self.bitmap >> back & 1) << ((top - back) % self.window)
        words = self.words or 0
        return struct.pack(f"={words}I", *(bits >> (32 * word) & _MASK32 for word in range(words)))


def _position(low: int, window: int) -> int:
    """The position of the highest number's bit in the kernel's ring: u32 arithmetic, also at 0."""
    return ((low - 1) & _MASK32) % window if window else 0


def known(bitmap: int, seq: int, window: int) -> int:
    """The bits of a replay bitmap that stand for numbers: inside the window and not below 1."""
    return bitmap & ((1 << min(window, seq)) - 1)


def _checked(
    *, oseq: int, seq: int, window: int, bitmap: int, esn: bool = False, words: int | None = None
) -> KernelReplay:
    try:
        return KernelReplay(oseq, seq, window, bitmap, esn, words)
    except ValueError as error:
        raise WireError(f"replay state: {error}") from None


def fit_replay(state: ReplayState, window: int) -> ReplayState:
    """`state` for a window of another size.

    Numbers that only the wider window covers count as received, because the old one could not tell them from
    replays.
    """
    bitmap = state.bitmap & ((1 << window) - 1)
    if state.window and window > state.window:
        everything = (1 << min(window, state.seq)) - 1
        bitmap |= everything & ~((1 << state.window) - 1)
    return ReplayState(state.seq, window, bitmap, state.esn)


def merge_replay(a: ReplayState, b: ReplayState) -> ReplayState:
    """The numbers that two gateways received together: highest number, aligned maps OR-ed, wider window.

    A number counts as received if either side received it or had it already behind its window. A side without
    a window (an outbound SA) contributes only its number. Commutative, idempotent, and associative among
    states with a window. Errors: UsageError for ESN with and without.
    """
    if a.esn != b.esn and a.seq and b.seq:
        raise UsageError("replay states of an SA with and one without extended sequence numbers")
    top = max(a.seq, b.seq)
    window = max(a.window, b.window)
    bitmap = 0
    for side in (a, b):
        # this side's bits that reach below the common top
        reach = fit_replay(side, max(window - (top - side.seq), 0)) if side.window else side
        bitmap |= reach.bitmap << (top - side.seq) if reach.bitmap else 0
    return ReplayState(top, window, bitmap & ((1 << window) - 1), a.esn or b.esn)
