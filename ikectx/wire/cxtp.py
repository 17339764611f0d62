"""The seven messages of CXTP, their blocks, the token and the framing of a stream (RFC 4067).

A message is a frozen dataclass; `parse` takes exactly one message, `serialize` gives
it back bit for bit, with reserved bits zero. `mn` is the MN's previous address, the name
of a transfer; its family sets the V bit. What comes from outside raises only
`WireError`; a value no message can hold raises ValueError where the message is built.

Octets of blocks and keys are kept out of every repr: they hold key material.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import ClassVar

from cryptography.hazmat.primitives import hashes

from ikectx.errors import WireError
from ikectx.mac import equal, hmac_of
from ikectx.numbers import Cxtp, Fpt, OpenEnum, Status

from .reader import Reader, Writer

Address = IPv4Address | IPv6Address

VERSION = 1
PORT = 5091
"""`cxtp`, RFC 4065."""
HEADER_SIZE = 4
MAX_MESSAGE = 65535
BLOCK_UNIT = 8
BLOCK_HEADER = 4
MAX_BLOCK_DATA = 255 * BLOCK_UNIT - BLOCK_HEADER
"""Data octets of the largest Context Data Block without a presence vector: 2036."""

_V4, _FLAG, _PRESENCE = 0x80, 0x40, 0x80
_STATUS = 4
"""Octets of a status."""


class TokenAlgorithm(OpenEnum):
    """Algorithm field of a PCTD (RFC 4065). Ours: NONE goes with an empty key, no MN takes part;
    HMAC_SHA256_128 is the token of `tokens`."""

    NONE = 0
    HMAC_SHA1 = 1
    HMAC_SHA256_128 = 0xFF01


def _unsigned(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} {value} does not fit in {bits} bits")


@dataclass(frozen=True, slots=True)
class ContextDataBlock:
    """One Context Data Block (RFC 4067, 2.4).

    `data` is padded with zeros to a multiple of 8 octets on sending; as parsed it includes
    the padding, so a profile must know its own end. `presence` is the presence
    vector, None where the P bit is 0. A block without data and presence vector is its
    first 4 octets, with length 0: how a CTAR or CT-Req names a context.
    """

    fpt: Fpt
    data: bytes = field(default=b"", repr=False)
    presence: int | None = None
    size: int = field(init=False, repr=False, compare=False)
    """Octets on the wire."""

    def __post_init__(self) -> None:
        _unsigned("feature profile type", self.fpt, 16)
        used = BLOCK_HEADER + len(self.data)
        if self.presence is not None:
            _unsigned("presence vector", self.presence, 32)
            used += 4
        if used > 255 * BLOCK_UNIT:
            raise ValueError(f"{len(self.data)} octets are too many for one context data block")
        object.__setattr__(
            self, "size", used if used == BLOCK_HEADER else -(-used // BLOCK_UNIT) * BLOCK_UNIT
        )

    @classmethod
    def read(cls, reader: Reader) -> ContextDataBlock:
        """The next block of a message."""
        head = reader.u32("header of a block")
        units, flags = head >> 8 & 0xFF, head & 0xFF
        presence = None
        size = max(units * BLOCK_UNIT, BLOCK_HEADER)
        if flags & _PRESENCE:
            if units == 0:
                raise reader.fail("a block of length 0 has no room for its presence vector")
            presence = reader.u32("presence vector")
            size -= 4
        return cls(Fpt(head >> 16), reader.octets(size - BLOCK_HEADER, "block data"), presence)

    def serialize(self) -> bytes:
        """The block, padded with zero octets to whole units of `BLOCK_UNIT` octets."""
        head = self.fpt << 16 | self.size // BLOCK_UNIT << 8
        if self.presence is None:
            out = head.to_bytes(4) + self.data
        else:
            out = (head | _PRESENCE).to_bytes(4) + self.presence.to_bytes(4) + self.data
        return out.ljust(self.size, b"\0")


Blocks = tuple[ContextDataBlock, ...]


@dataclass(frozen=True, slots=True)
class StatusBlock:
    """The result for one context (CTAA, CTDR): FPT u16, status u8, reserved u8."""

    fpt: Fpt
    status: Status = Status.OK

    def __post_init__(self) -> None:
        _unsigned("feature profile type", self.fpt, 16)
        _unsigned("status", self.status, 8)

    @classmethod
    def read(cls, reader: Reader) -> StatusBlock:
        """The next status of a message; the reserved octet is ignored."""
        whole = reader.u32("status")
        return cls(Fpt(whole >> 16), Status(whole >> 8 & 0xFF))

    def serialize(self) -> bytes:
        """Feature profile type and status, in 4 octets."""
        return (self.fpt << 16 | self.status << 8).to_bytes(4)


@dataclass(frozen=True, slots=True)
class _Header:
    type: Cxtp
    v4: bool
    flag: bool
    length: int

    @classmethod
    def read(cls, reader: Reader) -> _Header:
        head = reader.u32("header")
        if head >> 28 != VERSION:
            raise reader.fail(f"CXTP version {head >> 28} is not {VERSION},")
        kind, flags, length = Cxtp(head >> 24 & 0x0F), head >> 16 & 0xFF, head & 0xFFFF
        if kind not in MESSAGES:
            raise reader.fail(f"CXTP has no message type {int(kind)},")
        if length < HEADER_SIZE:
            raise reader.fail(f"message length {length} is shorter than the header,")
        return cls(kind, bool(flags & _V4), bool(flags & _FLAG), length)


def _open(data: bytes, kind: Cxtp, header: _Header | None) -> tuple[_Header, Reader]:
    """The header of the message in `data`, unless it was read before, and a reader of its body."""
    reader = Reader(data, kind.name)
    if header is None:
        header = _Header.read(reader)
    else:
        reader.octets(HEADER_SIZE)
    if header.type is not kind:
        raise reader.fail(f"the message is a {header.type.name}")
    if header.length != len(data):
        raise reader.fail(f"message length {header.length} with {len(data)} octets,")
    return header, reader


def _address(reader: Reader, header: _Header, name: str = "MN's previous address") -> Address:
    if header.v4:
        return IPv4Address(reader.octets(4, name))
    return IPv6Address(reader.octets(16, name))


def _blocks(reader: Reader) -> Blocks:
    found = []
    while reader.left:
        found.append(ContextDataBlock.read(reader))
    return tuple(found)


def _statuses(reader: Reader, data: bytes, ends: frozenset[Fpt]) -> tuple[StatusBlock, ...]:
    """Those before the first block, which is of one of the FPTs `ends`. `data`: what the reader reads."""
    found = []
    while reader.left and not _begins_with(data[reader.pos : reader.pos + 2], ends):
        found.append(StatusBlock.read(reader))
    return tuple(found)


def _begins_with(rest: bytes, fpts: frozenset[Fpt]) -> bool:
    return len(rest) > 1 and int.from_bytes(rest[:2]) in fpts


def _apart(statuses: Sequence[StatusBlock], blocks: Blocks, fpts: frozenset[Fpt], name: str) -> None:
    """Errors: ValueError, where statuses and blocks would not be told apart."""
    if any(status.fpt in fpts for status in statuses):
        raise ValueError(f"a {name} has no status for what is no context")
    if blocks and blocks[0].fpt not in fpts:
        raise ValueError(f"the blocks of a {name} cannot begin with FPT {blocks[0].fpt:#06x}")


def _finish(
    kind: Cxtp,
    mn: Address,
    flag: bool,
    body: Writer,
    parts: Sequence[ContextDataBlock | StatusBlock] = (),
) -> bytes:
    """Header, body and the blocks or statuses at its end."""
    octets = b"".join((body.done(), *(part.serialize() for part in parts)))
    flags = (_V4 if mn.version == 4 else 0) | (_FLAG if flag else 0)
    if HEADER_SIZE + len(octets) > MAX_MESSAGE:
        raise WireError(f"{kind.name}: message length {HEADER_SIZE + len(octets)} does not fit in 2 octets")
    head = (VERSION << 4 | kind) << 24 | flags << 16 | HEADER_SIZE + len(octets)
    return head.to_bytes(4) + octets


@dataclass(frozen=True, slots=True)
class Ctar:
    """CT Activate Request, MN to either gateway (RFC 4067, 2.5.1).

    `router`: the other gateway, seen from the one it is sent to. `blocks`: the contexts
    wanted, none for all. `acknowledge`: the A bit, a CTAA is wanted.
    """

    TYPE: ClassVar = Cxtp.CTAR

    mn: Address
    router: Address
    sequence: int
    token: int
    blocks: Blocks = ()
    acknowledge: bool = False

    def __post_init__(self) -> None:
        if self.mn.version != self.router.version:
            raise ValueError("a CTAR holds addresses of one family")
        _unsigned("sequence number", self.sequence, 32)
        _unsigned("token", self.token, 32)

    @classmethod
    def parse(cls, data: bytes, header: _Header | None = None) -> Ctar:
        header, reader = _open(data, cls.TYPE, header)
        mn = _address(reader, header)
        router = _address(reader, header, "other router's address")
        sequence = reader.u32("sequence number")
        token = reader.u32("token")
        return cls(mn, router, sequence, token, _blocks(reader), header.flag)

    def serialize(self) -> bytes:
        body = Writer().octets(self.mn.packed).octets(self.router.packed)
        body.u32(self.sequence).u32(self.token)
        return _finish(self.TYPE, self.mn, self.acknowledge, body, self.blocks)


CTAA_BLOCKS = frozenset({Fpt.MN_TOKEN, Fpt.NEW_SPIS, Fpt.COOKIE})
"""FPTs that carry data in a CTAA. None of them has a status, so the first of them ends the statuses."""
CTDR_BLOCKS = frozenset({Fpt.REASON, Fpt.RELAY})
"""The same of a CTDR."""


@dataclass(frozen=True, slots=True)
class Ctaa:
    """CT Activate Acknowledge, gateway to MN: the contexts that failed (RFC 4067, 2.5.2).

    `blocks` (ours, for a MN whose CTAR had a MN_TOKEN, or that asks for a COOKIE) follow the statuses; the
    first is of `CTAA_BLOCKS`.
    Without them the message is the RFC's; a parser that knows only the RFC reads them as statuses.
    """

    TYPE: ClassVar = Cxtp.CTAA

    mn: Address
    statuses: tuple[StatusBlock, ...] = ()
    blocks: Blocks = ()

    def __post_init__(self) -> None:
        _apart(self.statuses, self.blocks, CTAA_BLOCKS, "CTAA")

    @classmethod
    def parse(cls, data: bytes, header: _Header | None = None) -> Ctaa:
        header, reader = _open(data, cls.TYPE, header)
        mn = _address(reader, header)
        statuses = _statuses(reader, data, CTAA_BLOCKS)
        return cls(mn, statuses, _blocks(reader))

    def serialize(self) -> bytes:
        body = Writer().octets(self.mn.packed)
        return _finish(self.TYPE, self.mn, False, body, (*self.statuses, *self.blocks))


@dataclass(frozen=True, slots=True)
class Ctd:
    """Context Transfer Data, pSG to nSG (RFC 4067, 2.5.3).

    `elapsed`: milliseconds since the first CTD for this MN. `acknowledge`: a CTDR is wanted.
    """

    TYPE: ClassVar = Cxtp.CTD

    mn: Address
    blocks: Blocks = ()
    elapsed: int = 0
    acknowledge: bool = True

    def __post_init__(self) -> None:
        _unsigned("elapsed time", self.elapsed, 32)

    @classmethod
    def parse(cls, data: bytes, header: _Header | None = None) -> Ctd:
        header, reader = _open(data, cls.TYPE, header)
        elapsed = reader.u32("elapsed time")
        mn = _address(reader, header)
        return cls(mn, _blocks(reader), elapsed, header.flag)

    def serialize(self) -> bytes:
        body = Writer().u32(self.elapsed).octets(self.mn.packed)
        return _finish(self.TYPE, self.mn, self.acknowledge, body, self.blocks)


@dataclass(frozen=True, slots=True)
class Pctd:
    """Predictive Context Transfer Data, pSG to nSG (RFC 4067, 2.5.4).

    `algorithm` and `key` let nSG verify the token of the CTAR to come; NONE and no key in a
    push by the network, which the MN does not take part in.
    """

    TYPE: ClassVar = Cxtp.PCTD

    mn: Address
    blocks: Blocks = ()
    elapsed: int = 0
    algorithm: TokenAlgorithm = TokenAlgorithm.NONE
    key: bytes = field(default=b"", repr=False)
    acknowledge: bool = True

    def __post_init__(self) -> None:
        _unsigned("elapsed time", self.elapsed, 32)
        _unsigned("token algorithm", self.algorithm, 16)
        _unsigned("key length", len(self.key), 16)

    @classmethod
    def parse(cls, data: bytes, header: _Header | None = None) -> Pctd:
        header, reader = _open(data, cls.TYPE, header)
        elapsed = reader.u32("elapsed time")
        mn = _address(reader, header)
        algorithm = TokenAlgorithm(reader.u16("token algorithm"))
        key = reader.octets(reader.u16("key length"), "key")
        return cls(mn, _blocks(reader), elapsed, algorithm, key, header.flag)

    def serialize(self) -> bytes:
        body = Writer().u32(self.elapsed).octets(self.mn.packed)
        body.u16(self.algorithm).u16(len(self.key)).octets(self.key)
        return _finish(self.TYPE, self.mn, self.acknowledge, body, self.blocks)


@dataclass(frozen=True, slots=True)
class Ctdr:
    """Context Transfer Data Reply, nSG to pSG (RFC 4067, 2.5.5). `complete`: the S bit, all went well.

    `blocks` (ours) follow the statuses, as in a CTAA; the first is of `CTDR_BLOCKS`.
    """

    TYPE: ClassVar = Cxtp.CTDR

    mn: Address
    statuses: tuple[StatusBlock, ...] = ()
    complete: bool = False
    blocks: Blocks = ()

    def __post_init__(self) -> None:
        _apart(self.statuses, self.blocks, CTDR_BLOCKS, "CTDR")

    @classmethod
    def parse(cls, data: bytes, header: _Header | None = None) -> Ctdr:
        header, reader = _open(data, cls.TYPE, header)
        mn = _address(reader, header)
        statuses = _statuses(reader, data, CTDR_BLOCKS)
        return cls(mn, statuses, header.flag, _blocks(reader))

    def serialize(self) -> bytes:
        body = Writer().octets(self.mn.packed)
        return _finish(self.TYPE, self.mn, self.complete, body, (*self.statuses, *self.blocks))


@dataclass(frozen=True, slots=True)
class Ctc:
    """Context Transfer Cancel, nSG to pSG (RFC 4067, 2.5.6)."""

    TYPE: ClassVar = Cxtp.CTC

    mn: Address

    @classmethod
    def parse(cls, data: bytes, header: _Header | None = None) -> Ctc:
        header, reader = _open(data, cls.TYPE, header)
        mn = _address(reader, header)
        reader.end()
        return cls(mn)

    def serialize(self) -> bytes:
        return _finish(self.TYPE, self.mn, False, Writer().octets(self.mn.packed))


@dataclass(frozen=True, slots=True)
class CtReq:
    """Context Transfer Request, nSG to pSG (RFC 4067, 2.5.7).

    `sequence`, `token` and `blocks` are those of the MN's CTAR; token 0: there was none yet.
    """

    TYPE: ClassVar = Cxtp.CT_REQ

    mn: Address
    sequence: int
    token: int = 0
    blocks: Blocks = ()

    def __post_init__(self) -> None:
        _unsigned("sequence number", self.sequence, 32)
        _unsigned("token", self.token, 32)

    @classmethod
    def parse(cls, data: bytes, header: _Header | None = None) -> CtReq:
        header, reader = _open(data, cls.TYPE, header)
        mn = _address(reader, header)
        sequence = reader.u32("sequence number")
        token = reader.u32("token")
        return cls(mn, sequence, token, _blocks(reader))

    def serialize(self) -> bytes:
        body = Writer().octets(self.mn.packed).u32(self.sequence).u32(self.token)
        return _finish(self.TYPE, self.mn, False, body, self.blocks)


Message = Ctar | Ctaa | Ctd | Pctd | Ctdr | Ctc | CtReq

MESSAGES: dict[Cxtp, Callable[[bytes, _Header], Message]] = {
    Cxtp.CTAR: Ctar.parse,
    Cxtp.CTAA: Ctaa.parse,
    Cxtp.CTD: Ctd.parse,
    Cxtp.PCTD: Pctd.parse,
    Cxtp.CTDR: Ctdr.parse,
    Cxtp.CTC: Ctc.parse,
    Cxtp.CT_REQ: CtReq.parse,
}
"""The class that parses each message type."""


def parse_message(data: bytes) -> Message:
    """The one message that `data` holds. Errors: WireError."""
    header = _Header.read(Reader(data, "CXTP"))
    return MESSAGES[header.type](data, header)


def size(message: Message) -> int:
    """Octets of the message on the wire."""
    mn = len(message.mn.packed)
    match message:
        case Ctar():
            fields = mn + 8
        case Pctd():
            fields = 8 + len(message.key)
        case CtReq():
            fields = 8
        case Ctd():
            fields = 4
        case _:
            fields = 0
    blocks = () if isinstance(message, Ctc) else message.blocks
    statuses = message.statuses if isinstance(message, Ctaa | Ctdr) else ()
    return HEADER_SIZE + mn + fields + _STATUS * len(statuses) + sum(block.size for block in blocks)


class StreamDecoder:
    """Cuts a stream of octets into messages by the header's length field.

    It holds at most one unfinished message. After a WireError it has lost the framing, so every further
    `feed` raises the same error.
    """

    __slots__ = ("_buffer", "_error")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._error: WireError | None = None

    @property
    def error(self) -> WireError | None:
        """Why the decoder has stopped; None while it works."""
        return self._error

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes.

        Errors: WireError for a bad message. Messages in front of it are given out first: then
        the error waits in `error` and is raised by the next call.
        """
        if self._error is not None:
            raise self._error
        self._buffer += data
        found: list[Message] = []
        try:
            while len(self._buffer) >= HEADER_SIZE:
                header = _Header.read(Reader(bytes(self._buffer[:HEADER_SIZE]), "CXTP stream"))
                if len(self._buffer) < header.length:
                    break
                found.append(MESSAGES[header.type](bytes(self._buffer[: header.length]), header))
                del self._buffer[: header.length]
        except WireError as error:
            self._error = error
            self._buffer.clear()
            if not found:
                raise
        return found


def compute_token(key: bytes, mn: Address, sequence: int, blocks: Sequence[ContextDataBlock] = ()) -> int:
    """The MN's authorization token: the first 32 bits of HMAC-SHA1 (RFC 4067, 2.5.1).

    Over the MN's previous address, the sequence number and the blocks of the CTAR.
    """
    text = mn.packed + sequence.to_bytes(4) + b"".join(block.serialize() for block in blocks)
    return int.from_bytes(hmac_of(hashes.SHA1, key, text)[:4])


def verify_token(
    key: bytes, mn: Address, sequence: int, token: int, blocks: Sequence[ContextDataBlock] = ()
) -> bool:
    """Whether `token` is right, in constant time. Call it before anything of the transfer is touched.

    With an empty key (a PCTD without a mobile node) no token is right, because everyone could make it.
    """
    if not key:
        return False
    right = compute_token(key, mn, sequence, blocks)
    return 0 <= token < 1 << 32 and equal(right.to_bytes(4), token.to_bytes(4))
