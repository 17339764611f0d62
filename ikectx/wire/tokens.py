"""The mobile node's token: proof that a CTAR is of the mobile node whose IKE_SA it moves, and of its CTAA.

The RFC's token (32 bits of HMAC-SHA1, `cxtp.compute_token`) is short, names neither gateway, never expires,
and the RFC leaves open where its key comes from. The token here is derived from the IKE_SA, so nothing has to
be provisioned: both the mobile node and the gateway that serves it derive

    key = prf+(SK_d, "ikectx CXTP token 1" | SPIi | SPIr | sequence number u32), 32 octets

with the IKE_SA's prf. One key serves one transfer, because the sequence number is in it. IKE itself uses SK_d
with seeds that are nonces and shared secrets (RFC 7296, 2.17, 2.18); whoever could choose one of those to
begin like this label knows SK_d already. The new gateway gets the key with the PCTD, or the old gateway
checks the token for it.

The MN_TOKEN block of a CTAR (and of the CT-Req it becomes) holds, as data:

    purpose u8 (1 announce, 2 arrive) · care-of family u8 (0: none, 4, 6) · care-of port u16 (0 without)
    · expiry u32 · next request ID that the MN expects of its gateway u32 · SPIi 8 · SPIr 8
    · length u8 and UTF-8 of pSG's name · the same of nSG's · care-of address 0, 4 or 16 · tag 16

    tag = HMAC-SHA-256(key, "ikectx CXTP request 1" | family u8 (4, 6) | MN's previous address
          | sequence number u32 | the data in front of the tag
          | all other blocks of the message, in order, reserved bits 0, padding included)

cut to its first 16 octets. The message's own token field is the first 4 octets of the tag, or 1 where they
are all zero, since 0 means "no token" in a CT-Req. The router's address and the A bit are not covered: a
CT-Req does not hold them, and the names say which gateways are meant.

The MN_TOKEN block of a CTAA, its last one, holds: purpose u8 of the CTAR it answers · reserved 3 · next
request ID that nSG expects of the MN u32 · tag 16,

    tag = HMAC-SHA-256(key, "ikectx CXTP reply 1" | purpose u8 | next request ID u32 | family u8
          | MN's previous address | sequence number u32 | number of statuses u16 | statuses
          | all other blocks), first 16 octets.

A next request ID of 2^32 - 1 says nothing.

Tags are compared in constant time, and before anything else of the token is used. The caller checks that the
token names the SA that it moves, and that it is used once (until its expiry).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address

from ikectx.errors import RefusedError, WireError
from ikectx.mac import equal, hmac_sha256
from ikectx.numbers import Fpt, OpenEnum, Status
from ikectx.sa.context import Address, Endpoint, IkeGeneration, Secret
from ikectx.sa.keys import prf_plus, sk_d
from ikectx.sa.name import SaName

from .cxtp import Blocks, ContextDataBlock, Ctaa, Ctar, CtReq, StatusBlock, verify_token
from .reader import Reader, Writer

KEY_LENGTH = 32
TAG_LENGTH = 16
MAX_NAME = 255
"""Octets of a gateway's name in UTF-8."""
MAX_LIFETIME = 300
"""Longest lifetime of a token in seconds: a later expiry means a wrong clock, or a token to be kept."""

NOT_SAID = 0xFFFFFFFF
"""Stands for a next request ID that is not known."""

_KEY_LABEL = b"ikectx CXTP token 1"
_REQUEST_LABEL = b"ikectx CXTP request 1"
_REPLY_LABEL = b"ikectx CXTP reply 1"
_REPLY_RESERVED = bytes(3)


class Purpose(OpenEnum):
    """The purpose of a token's CTAR."""

    ANNOUNCE = 1
    """To the old gateway: the mobile node is about to move, send its context ahead (predictive)."""
    ARRIVE = 2
    """To the new gateway: the mobile node has arrived."""


class TokenError(RefusedError):
    """A token that is not accepted. The text says why, for the log alone, because its sender gets no
    answer."""

    status = Status.NOT_ALLOWED


def token_key(generation: IkeGeneration, sequence: int) -> Secret:
    """The key of one transfer's tokens: see this module's text. `sequence` is the CTAR's, 32 bits.

    Errors: RefusedError for a prf or cipher that is not known here.
    """
    seed = Writer().octets(_KEY_LABEL).octets(generation.spi_i).octets(generation.spi_r)
    seed.u32(sequence, "sequence number")
    secret = sk_d(generation)
    return Secret(prf_plus(generation.prf, secret.reveal(), seed.done(), KEY_LENGTH))


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """The MN_TOKEN block of a CTAR or CT-Req.

    spi_i, spi_r: the IKE_SA to move, 8 octets each. expiry: seconds since 1970. psg, nsg: names of the
    gateways. care_of: the mobile node's outer IKE endpoint at the new gateway, None if it does not know it
    (yet). tag: 16 octets. expects: message ID of the gateway's next request as the mobile node expects it,
    None: not said.
    """

    purpose: Purpose
    spi_i: bytes
    spi_r: bytes
    expiry: int
    psg: str
    nsg: str
    care_of: Endpoint | None
    tag: bytes = bytes(TAG_LENGTH)
    expects: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.purpose <= 255:
            raise ValueError(f"purpose {int(self.purpose)} does not fit in an octet")
        if len(self.spi_i) != 8 or len(self.spi_r) != 8:
            raise ValueError("an IKE SPI has 8 octets")
        if not 0 <= self.expiry < 1 << 32:
            raise ValueError(f"expiry {self.expiry} does not fit in 32 bits")
        if not 0 <= (self.expects or 0) < NOT_SAID:
            raise ValueError(f"message ID {self.expects} does not fit in 32 bits")
        for name in (self.psg, self.nsg):
            if not 1 <= len(name.encode()) <= MAX_NAME:
                raise ValueError(f"a gateway's name has 1 to {MAX_NAME} octets")
        if len(self.tag) != TAG_LENGTH:
            raise ValueError(f"a tag has {TAG_LENGTH} octets")

    @property
    def spis(self) -> SaName:
        """(initiator SPI, responder SPI)."""
        return SaName(self.spi_i, self.spi_r)

    @property
    def token(self) -> int:
        """The message's 32-bit token field that goes with this block."""
        return int.from_bytes(self.tag[:4]) or 1

    @classmethod
    def from_block(cls, block: ContextDataBlock) -> TokenBlock:
        """Errors: WireError."""
        reader = _data(block)
        purpose = Purpose(reader.u8("purpose"))
        family, port = reader.u8("care-of family"), reader.u16("care-of port")
        expiry, expects = reader.u32("expiry"), reader.u32("next request ID")
        spi_i, spi_r = reader.octets(8, "SPI"), reader.octets(8, "SPI")
        psg, nsg = _name(reader, "pSG's name"), _name(reader, "nSG's name")
        care_of: Endpoint | None = None
        if family == 4:
            care_of = Endpoint(IPv4Address(reader.octets(4, "care-of address")), port)
        elif family == 6:
            care_of = Endpoint(IPv6Address(reader.octets(16, "care-of address")), port)
        elif family or port:
            raise reader.fail(f"a care-of address of family {family} with port {port}")
        tag = reader.octets(TAG_LENGTH, "tag")
        _padding(reader)
        return cls(purpose, spi_i, spi_r, expiry, psg, nsg, care_of, tag=tag, expects=_said(expects))

    def to_block(self) -> ContextDataBlock:
        """The block as it goes into a message."""
        return ContextDataBlock(Fpt.MN_TOKEN, self._covered() + self.tag)

    def _covered(self) -> bytes:
        """The data in front of the tag."""
        out = Writer().u8(self.purpose)
        if self.care_of is None:
            out.u8(0).u16(0)
        else:
            out.u8(self.care_of.address.version).u16(self.care_of.port)
        out.u32(self.expiry).u32(_not_said(self.expects)).octets(self.spi_i).octets(self.spi_r)
        for name in (self.psg.encode(), self.nsg.encode()):
            out.u8(len(name)).octets(name)
        return out.octets(b"" if self.care_of is None else self.care_of.address.packed).done()

    def _right_tag(self, key: Secret, mn: Address, sequence: int, others: Blocks) -> bytes:
        text = Writer().octets(_REQUEST_LABEL).u8(mn.version).octets(mn.packed)
        text.u32(sequence, "sequence number").octets(self._covered())
        return _tag(key, text, others)


def find(blocks: Iterable[ContextDataBlock]) -> TokenBlock | None:
    """The token of a CTAR or CT-Req; None if it has none of ours. WireError if it is malformed, or for
    two."""
    found = [block for block in blocks if block.fpt == Fpt.MN_TOKEN]
    if len(found) > 1:
        raise WireError("two tokens in one message")
    return TokenBlock.from_block(found[0]) if found else None


def make_ctar(
    key: Secret,
    *,
    mn: Address,
    router: Address,
    sequence: int,
    purpose: Purpose,
    spis: SaName,
    psg: str,
    nsg: str,
    expiry: int,
    care_of: Endpoint | None,
    blocks: Sequence[ContextDataBlock] = (),
    acknowledge: bool = True,
    expects: int | None = None,
) -> Ctar:
    """A CTAR with its token, which comes last. `key`: `token_key` of the IKE_SA and this sequence number.

    router: address of the other gateway. blocks: the contexts wanted, none for all. expects: as in
    `TokenBlock`. Errors: ValueError.
    """
    others = tuple(blocks)
    made = TokenBlock(purpose, *spis, expiry, psg, nsg, care_of, expects=expects)
    made = replace(made, tag=made._right_tag(key, mn, sequence, others))
    return Ctar(mn, router, sequence, made.token, (*others, made.to_block()), acknowledge)


def verify(
    key: Secret,
    message: Ctar | CtReq,
    *,
    purpose: Purpose,
    psg: str,
    nsg: str,
    now: float,
    skew: float,
    rfc: bool,
) -> TokenBlock | None:
    """The token of a CTAR or CT-Req, if it is good; None: it has the RFC's, right and allowed by `rfc`.

    now: seconds since 1970. skew: seconds that the mobile node's clock may be wrong. The caller has to know
    whether the token was used before. Errors: TokenError.
    """
    try:
        token = find(message.blocks)
    except WireError as error:
        raise TokenError(str(error)) from None
    if token is None:
        right = rfc and verify_token(
            key.reveal(), message.mn, message.sequence, message.token, message.blocks
        )
        if not right or message.token == 0:
            raise TokenError("the token is wrong" if rfc else "the CTAR has no token of 128 bits")
        return None
    others = _others(message.blocks)
    right_tag = token._right_tag(key, message.mn, message.sequence, others)
    # both parts are always compared, so that the time it takes reveals nothing
    good = equal(token.tag, right_tag)
    good &= equal(token.token.to_bytes(4), message.token.to_bytes(4))
    if not (good and len(key)):
        raise TokenError("the token is wrong")
    check_claims(token, purpose=purpose, psg=psg, nsg=nsg, now=now, skew=skew)
    return token


def check_claims(token: TokenBlock, *, purpose: Purpose, psg: str, nsg: str, now: float, skew: float) -> None:
    """Check the token's own claims, as for `verify`. They are proven only by its tag, but a wrong claim
    refuses the token without a look at its SA. Errors: TokenError."""
    if token.purpose != purpose:
        raise TokenError(f"the token is for {token.purpose.name.lower()}, not for {purpose.name.lower()}")
    if (token.psg, token.nsg) != (psg, nsg):
        raise TokenError(f"the token is for a move from {token.psg!r} to {token.nsg!r}")
    if token.expiry + skew < now:
        raise TokenError(f"the token expired {now - token.expiry:.0f} s ago")
    if token.expiry > now + MAX_LIFETIME + skew:
        raise TokenError(f"the token is valid for {token.expiry - now:.0f} s, more than {MAX_LIFETIME}")


def seal_ctaa(
    key: Secret,
    mn: Address,
    sequence: int,
    statuses: Sequence[StatusBlock] = (),
    blocks: Sequence[ContextDataBlock] = (),
    *,
    purpose: Purpose,
    expects: int | None = None,
) -> Ctaa:
    """The answer to the CTAR of that sequence number and purpose, with a tag of the same key.

    The purpose keeps the answer to an announcement from being taken for that to an arrival. expects: message
    ID of the mobile node's next request as the new gateway expects it, None: not said. Errors: ValueError.
    """
    said = _not_said(expects)
    tag = _reply_tag(key, mn, sequence, purpose, said, statuses, tuple(blocks))
    data = Writer().u8(purpose, "purpose").octets(_REPLY_RESERVED).u32(said).octets(tag).done()
    return Ctaa(mn, tuple(statuses), (*blocks, ContextDataBlock(Fpt.MN_TOKEN, data)))


def open_ctaa(key: Secret, ctaa: Ctaa, sequence: int, *, purpose: Purpose) -> bool:
    """True if `ctaa` is the gateway's own answer to the CTAR of that sequence number and purpose."""
    found = [block for block in ctaa.blocks if block.fpt == Fpt.MN_TOKEN]
    if len(found) != 1 or ctaa.blocks[-1] is not found[0] or not len(key):
        return False
    try:
        reader = _data(found[0])
        stated = reader.u8("purpose")
        reader.octets(len(_REPLY_RESERVED), "reserved octets")
        expects = reader.u32("next request ID")
        tag = reader.octets(TAG_LENGTH, "tag")
        _padding(reader)
    except WireError:
        return False
    right = _reply_tag(key, ctaa.mn, sequence, purpose, expects, ctaa.statuses, _others(ctaa.blocks))
    return equal(tag, right) and stated == purpose


def expected_by(ctaa: Ctaa) -> int | None:
    """The next request ID that the new gateway expects, from a CTAA that `open_ctaa` accepted; None: not
    said."""
    reader = _data(ctaa.blocks[-1])
    reader.octets(1 + len(_REPLY_RESERVED), "purpose and reserved octets")
    return _said(reader.u32("next request ID"))


def _said(number: int) -> int | None:
    return None if number == NOT_SAID else number


def _not_said(number: int | None) -> int:
    return NOT_SAID if number is None else number


def _reply_tag(
    key: Secret,
    mn: Address,
    sequence: int,
    purpose: Purpose,
    expects: int,
    statuses: Sequence[StatusBlock],
    others: Blocks,
) -> bytes:
    text = Writer().octets(_REPLY_LABEL).u8(purpose, "purpose").u32(expects, "next request ID")
    text.u8(mn.version).octets(mn.packed)
    text.u32(sequence, "sequence number").u16(len(statuses), "number of statuses")
    for status in statuses:
        text.octets(status.serialize())
    return _tag(key, text, others)


def _tag(key: Secret, text: Writer, others: Blocks) -> bytes:
    for block in others:
        text.octets(block.serialize())
    return hmac_sha256(key.reveal(), text.done())[:TAG_LENGTH]


def _others(blocks: Blocks) -> Blocks:
    return tuple(block for block in blocks if block.fpt != Fpt.MN_TOKEN)


def _data(block: ContextDataBlock) -> Reader:
    if block.fpt != Fpt.MN_TOKEN or block.presence is not None:
        raise WireError("token: the block is not a MN_TOKEN without presence vector")
    return Reader(block.data, "token")


def _padding(reader: Reader) -> None:
    """Check that zeros fill the block, and nothing follows."""
    if reader.left > 7 or any(reader.rest()):
        raise reader.fail("octets that are not padding")


def _name(reader: Reader, what: str) -> str:
    raw = reader.octets(reader.u8(f"length of {what}"), what)
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise reader.fail(f"{what} is not UTF-8") from None
    if not name:
        raise reader.fail(f"{what} is empty")
    return name


__all__ = [
    "MAX_LIFETIME",
    "NOT_SAID",
    "Purpose",
    "TokenBlock",
    "TokenError",
    "check_claims",
    "expected_by",
    "find",
    "make_ctar",
    "open_ctaa",
    "seal_ctaa",
    "token_key",
    "verify",
]
