"""Proposals as swanctl.conf writes them, or charon reports them, and whether an SA's algorithms are among
them. Pure.

charon before 6.0.7 does not report the proposals of a connection, so an operator who wants to allow more,
or less, than the floor repeats them in ikectx.toml. Source of the keywords: strongSwan's
proposal_keywords_static.txt, 6.0.6. Source of the reported form: proposal_printf_hook of 6.0.6 (proposal.c)
and its test_proposal.c; that `list-conns` has it is from strongSwan's pull request 3067, and was tried with
no charon."""

from __future__ import annotations

from dataclasses import dataclass

from ikectx.numbers import Encr, Integ, KeMethod, Prf
from ikectx.sa.context import ChildContext, IkeGeneration

_ICV = {"8": 8, "64": 8, "12": 12, "96": 12, "16": 16, "128": 16, "": 16}
"""Keywords' length of the integrity check value, in octets or bits, and its octets."""
_CCM = {8: Encr.AES_CCM_8, 12: Encr.AES_CCM_12, 16: Encr.AES_CCM_16}
_GCM = {8: Encr.AES_GCM_8, 12: Encr.AES_GCM_12, 16: Encr.AES_GCM_16}
_DES = Encr(2)
_MD5_128 = Integ(6)

_ENCR: dict[str, tuple[Encr, int]] = {
    "null": (Encr.NULL, 0),
    "des": (_DES, 0),
    "3des": (Encr.DES3, 0),
    "aes": (Encr.AES_CBC, 128),
    "camellia": (Encr.CAMELLIA_CBC, 128),
    "chacha20poly1305": (Encr.CHACHA20_POLY1305, 0),
    "chacha20poly1305compat": (Encr.CHACHA20_POLY1305, 0),
}
for _bits in (128, 192, 256):
    _ENCR[f"aes{_bits}"] = (Encr.AES_CBC, _bits)
    _ENCR[f"aes{_bits}ctr"] = (Encr.AES_CTR, _bits)
    _ENCR[f"aes{_bits}gmac"] = (Encr.NULL_AES_GMAC, _bits)
    _ENCR[f"camellia{_bits}"] = (Encr.CAMELLIA_CBC, _bits)
    _ENCR[f"camellia{_bits}ctr"] = (Encr.CAMELLIA_CTR, _bits)
    for _word, _octets in _ICV.items():
        _ENCR[f"aes{_bits}ccm{_word}"] = (_CCM[_octets], _bits)
        _ENCR[f"aes{_bits}gcm{_word}"] = (_GCM[_octets], _bits)

_INTEG = {
    "md5": Integ.HMAC_MD5_96,
    "md5_128": _MD5_128,
    "sha": Integ.HMAC_SHA1_96,
    "sha1": Integ.HMAC_SHA1_96,
    "sha1_160": Integ.HMAC_SHA1_160,
    "sha256": Integ.HMAC_SHA2_256_128,
    "sha2_256": Integ.HMAC_SHA2_256_128,
    "sha384": Integ.HMAC_SHA2_384_192,
    "sha2_384": Integ.HMAC_SHA2_384_192,
    "sha512": Integ.HMAC_SHA2_512_256,
    "sha2_512": Integ.HMAC_SHA2_512_256,
    "aesxcbc": Integ.AES_XCBC_96,
    "aescmac": Integ.AES_CMAC_96,
}
_PRF = {
    "prfmd5": Prf.HMAC_MD5,
    "prfsha1": Prf.HMAC_SHA1,
    "prfsha256": Prf.HMAC_SHA2_256,
    "prfsha384": Prf.HMAC_SHA2_384,
    "prfsha512": Prf.HMAC_SHA2_512,
    "prfaesxcbc": Prf.AES128_XCBC,
    "prfaescmac": Prf.AES128_CMAC,
}
_PRF_OF = {
    Integ.HMAC_MD5_96: Prf.HMAC_MD5,
    _MD5_128: Prf.HMAC_MD5,
    Integ.HMAC_SHA1_96: Prf.HMAC_SHA1,
    Integ.HMAC_SHA1_160: Prf.HMAC_SHA1,
    Integ.HMAC_SHA2_256_128: Prf.HMAC_SHA2_256,
    Integ.HMAC_SHA2_384_192: Prf.HMAC_SHA2_384,
    Integ.HMAC_SHA2_512_256: Prf.HMAC_SHA2_512,
    Integ.AES_XCBC_96: Prf.AES128_XCBC,
    Integ.AES_CMAC_96: Prf.AES128_CMAC,
}
"""The PRF that charon uses for a proposal without one."""
_KE = {
    "none": KeMethod.NONE,
    "modpnone": KeMethod.NONE,
    "modp768": KeMethod(1),
    "modp1024": KeMethod.MODP_1024,
    "modp1536": KeMethod.MODP_1536,
    "modp2048": KeMethod.MODP_2048,
    "modp3072": KeMethod.MODP_3072,
    "modp4096": KeMethod.MODP_4096,
    "modp6144": KeMethod.MODP_6144,
    "modp8192": KeMethod.MODP_8192,
    "modp1024s160": KeMethod(22),
    "modp2048s224": KeMethod(23),
    "modp2048s256": KeMethod(24),
    "ecp192": KeMethod.ECP_192,
    "ecp224": KeMethod.ECP_224,
    "ecp256": KeMethod.ECP_256,
    "ecp384": KeMethod.ECP_384,
    "ecp521": KeMethod.ECP_521,
    "ecp224bp": KeMethod(27),
    "ecp256bp": KeMethod.BRAINPOOL_256,
    "ecp384bp": KeMethod(29),
    "ecp512bp": KeMethod(30),
    "curve25519": KeMethod.CURVE_25519,
    "x25519": KeMethod.CURVE_25519,
    "curve448": KeMethod.CURVE_448,
    "x448": KeMethod.CURVE_448,
    "mlkem512": KeMethod.ML_KEM_512,
    "mlkem768": KeMethod.ML_KEM_768,
    "mlkem1024": KeMethod.ML_KEM_1024,
}
_ESN = {"esn": True, "noesn": False}

_TOLD_ENCR = {one.name: one for one in Encr} | {"3DES_CBC": Encr.DES3, "DES_CBC": _DES}
_ENCR_BITS = {"CHACHA20_POLY1305": 0}
"""Where charon's key length is not one of the transform's attributes."""
_TOLD_INTEG = {one.name: one for one in Integ} | {"HMAC_MD5_128": _MD5_128}
_TOLD_PRF = {f"PRF_{one.name}": one for one in Prf}
_TOLD_KE = {one.name: one for one in KeMethod} | {
    "ECP_224_BP": KeMethod(27),
    "ECP_256_BP": KeMethod.BRAINPOOL_256,
    "ECP_384_BP": KeMethod(29),
    "ECP_512_BP": KeMethod(30),
}
_TOLD_ESN = {"EXT_SEQ": True, "NO_EXT_SEQ": False}

_AEAD = frozenset({*_CCM.values(), *_GCM.values(), Encr.NULL_AES_GMAC, Encr.CHACHA20_POLY1305})
_PLAIN = frozenset({Encr.NULL, Encr.NULL_AES_GMAC})
_BROKEN_ENCR = frozenset({Encr(1), _DES, Encr.DES3})
_BROKEN_INTEG = frozenset({Integ.HMAC_MD5_96, Integ(3), Integ(4), _MD5_128})


@dataclass(frozen=True, slots=True)
class ConfiguredProposal:
    """One proposal; an SA uses one algorithm of each kind. Empty: no algorithm of that kind is named.

    `encr`: with the key's bits, 0 if the cipher has one size only. `esn`: empty means that extended sequence
    numbers are not proposed (charon's default).
    """

    text: str
    encr: frozenset[tuple[Encr, int]]
    integ: frozenset[Integ] = frozenset()
    prf: frozenset[Prf] = frozenset()
    ke: frozenset[KeMethod] = frozenset()
    esn: frozenset[bool] = frozenset()

    @classmethod
    def parse(cls, text: str) -> ConfiguredProposal:
        """As in `proposals` and `esp_proposals` of swanctl.conf: aes256-sha256-x25519.

        Additional key exchanges (ke1_mlkem768) are passed over, because they only add to the first. Errors:
        ValueError, also for "default", which is different in each version of strongSwan.
        """
        encr: set[tuple[Encr, int]] = set()
        integ: set[Integ] = set()
        prf: set[Prf] = set()
        ke: set[KeMethod] = set()
        esn: set[bool] = set()
        for word in text.lower().split("-"):
            if word in _ENCR:
                encr.add(_ENCR[word])
            elif word in _INTEG:
                integ.add(_INTEG[word])
            elif word in _PRF:
                prf.add(_PRF[word])
            elif word in _KE:
                ke.add(_KE[word])
            elif word in _ESN:
                esn.add(_ESN[word])
            elif not (word[:2] == "ke" and word[2:3].isdigit() and word[3:4] == "_" and word[4:] in _KE):
                raise ValueError(f"{text!r} is no proposal, because {word!r} is no algorithm known here")
        if not encr:
            raise ValueError(f"{text!r} is no proposal, because it names no encryption")
        prf = prf or {_PRF_OF[each] for each in integ}
        return cls(text, frozenset(encr), frozenset(integ), frozenset(prf), frozenset(ke), frozenset(esn))

    @classmethod
    def told(cls, text: str) -> ConfiguredProposal:
        """As charon prints one: ESP:AES_CBC_128/HMAC_SHA2_256_128/MODP_3072/NO_EXT_SEQ.

        Algorithms that are not known here are passed over: no SA that comes in can have them. Errors:
        ValueError, also for one without encryption (AH)."""
        protocol, _, algorithms = text.partition(":")
        words = algorithms.split("/")
        # charon prints a key's length behind the name, and some names end with a number
        sized = [
            (name, int(bits)) for name, _, bits in (word.rpartition("_") for word in words) if bits.isdigit()
        ]
        encr = {(_TOLD_ENCR[name], _ENCR_BITS.get(name, bits)) for name, bits in sized if name in _TOLD_ENCR}
        encr |= {(_TOLD_ENCR[word], 0) for word in words if word in _TOLD_ENCR}
        if protocol not in ("IKE", "ESP") or not encr:
            raise ValueError(f"{text[:60]!r} is no proposal of IKE or ESP that is known here")
        return cls(
            text,
            frozenset(encr),
            frozenset(_TOLD_INTEG[word] for word in words if word in _TOLD_INTEG),
            frozenset(_TOLD_PRF[word] for word in words if word in _TOLD_PRF),
            frozenset(_TOLD_KE[word] for word in words if word in _TOLD_KE),
            frozenset(_TOLD_ESN[word] for word in words if word in _TOLD_ESN),
        )

    def __str__(self) -> str:
        return self.text

    def has_ike(self, one: IkeGeneration) -> bool:
        """Whether charon would have chosen that IKE_SA's algorithms from this proposal."""
        return (
            self._protects(one.encr, one.encr_bits, one.integ)
            and (not self.prf or one.prf in self.prf)
            and (not self.ke or one.ke in {*self.ke, KeMethod.NONE})
        )

    def has_esp(self, child: ChildContext) -> bool:
        """The same for a CHILD_SA. One that IKE_AUTH made has no key exchange, even if one is proposed."""
        return (
            self._protects(child.encr, child.encr_bits, child.integ)
            and child.ke in {*self.ke, KeMethod.NONE}
            and child.esn in (self.esn or {False})
        )

    def _protects(self, encr: Encr, bits: int, integ: Integ) -> bool:
        known = {(encr, bits), (encr, 0)} & self.encr
        checked = integ is Integ.NONE if encr in _AEAD else integ in self.integ
        return bool(known) and checked


def below_floor(encr: Encr, integ: Integ, prf: Prf | None = None) -> str:
    """Why such an SA is taken only if a proposal of the operator's names it; empty: it is above the floor.

    The floor: encryption that is not NULL, DES or 3DES, integrity, and nothing with MD5. charon proposes none
    of these by itself (RFC 8247 and 8221 have them as MUST NOT, 3DES as MAY and SHOULD NOT).
    """
    if encr in _PLAIN:
        return f"{encr.name} does not encrypt"
    if encr in _BROKEN_ENCR:
        return f"the encryption {encr.name} is too weak"
    if encr.name.startswith("UNKNOWN"):
        return f"encryption {int(encr)} is not known here"
    if integ in _BROKEN_INTEG:
        return f"the integrity algorithm {integ.name} is too weak"
    if integ is Integ.NONE and encr not in _AEAD:
        return f"{encr.name} has no integrity"
    if prf is Prf.HMAC_MD5:
        return f"the PRF {prf.name} is too weak"
    return ""
