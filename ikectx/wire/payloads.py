"""IKEv2 payloads: parse and serialize. Payloads that this project does not interpret keep their octets.

Source: RFC 7296 (3.2-3.13). Errors: only `WireError` for foreign octets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import TypeVar

from ikectx.errors import WireError
from ikectx.numbers import Encr, KeMethod, Notify, OpenEnum, Payload, Protocol
from ikectx.sa.context import Address, TrafficSelector

from .reader import Reader, Writer

MAX_PAYLOADS = 128
"""Payloads in one message: no IKE implementation sends more."""
_CRITICAL = 0x80
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RawPayload:
    """A payload that this project does not interpret; its octets are kept (RFC 7296, 3.2)."""

    type: Payload
    body: bytes
    critical: bool = False

    def serialize(self) -> bytes:
        return self.body


@dataclass(frozen=True, slots=True)
class NotifyPayload:
    """Notify (RFC 7296, 3.10). `spi` is empty unless the notify names an SA."""

    notify: Notify
    data: bytes = b""
    protocol: Protocol = Protocol.NONE
    spi: bytes = b""
    type = Payload.NOTIFY

    @property
    def is_error(self) -> bool:
        """Error types are below 16384 (RFC 7296, 3.10.1)."""
        return self.notify < 16384

    @classmethod
    def parse(cls, reader: Reader) -> NotifyPayload:
        protocol, size, notify = Protocol(reader.u8()), reader.u8(), Notify(reader.u16("type"))
        return cls(protocol=protocol, notify=notify, spi=reader.octets(size, "SPI"), data=reader.rest())

    def serialize(self) -> bytes:
        writer = Writer().u8(self.protocol).u8(len(self.spi), "SPI size").u16(self.notify, "notify")
        return writer.octets(self.spi).octets(self.data).done()


@dataclass(frozen=True, slots=True)
class DeletePayload:
    """Delete (RFC 7296, 3.11): SPIs on which the sender receives; none for the IKE_SA itself."""

    protocol: Protocol
    spis: tuple[bytes, ...] = ()
    type = Payload.DELETE

    @classmethod
    def parse(cls, reader: Reader) -> DeletePayload:
        protocol, size, count = Protocol(reader.u8()), reader.u8("SPI size"), reader.u16("SPI count")
        if (count and not size) or size * count != reader.left:
            raise reader.fail(f"{count} SPIs of {size} octets in {reader.left}")
        return cls(protocol, tuple(reader.octets(size) for _ in range(count)))

    def serialize(self) -> bytes:
        size = len(self.spis[0]) if self.spis else 0
        if any(len(spi) != size for spi in self.spis):
            raise WireError("the SPIs of a Delete have different sizes")
        writer = Writer().u8(self.protocol).u8(size).u16(len(self.spis), "SPI count")
        return writer.octets(b"".join(self.spis)).done()


@dataclass(frozen=True, slots=True)
class NoncePayload:
    """Nonce (RFC 7296, 3.9): 16 to 256 octets."""

    nonce: bytes
    type = Payload.NONCE

    @classmethod
    def parse(cls, reader: Reader) -> NoncePayload:
        if not 16 <= reader.left <= 256:
            raise reader.fail(f"a nonce of {reader.left} octets")
        return cls(reader.rest())

    def serialize(self) -> bytes:
        return self.nonce


@dataclass(frozen=True, slots=True)
class KePayload:
    """Key Exchange (RFC 7296, 3.4): the public value."""

    method: KeMethod
    data: bytes
    type = Payload.KE

    @classmethod
    def parse(cls, reader: Reader) -> KePayload:
        method = KeMethod(reader.u16("method"))
        reader.u16("reserved")
        return cls(method, reader.rest())

    def serialize(self) -> bytes:
        return Writer().u16(self.method, "method").u16(0).octets(self.data).done()


class TransformType(OpenEnum):
    """Transform types (RFC 7296, 3.3.2; 6 to 12 are RFC 9370's ADDKE1 to ADDKE7)."""

    ENCR = 1
    PRF = 2
    INTEG = 3
    KE = 4
    ESN = 5


KEY_LENGTH = 14
"""The transform attribute Key Length, in bits (RFC 7296, 3.3.5)."""


@dataclass(frozen=True, slots=True)
class Transform:
    """One transform (RFC 7296, 3.3.2). Attributes: (type, number) where short, (type, octets) where long."""

    type: TransformType
    id: int
    attributes: tuple[tuple[int, int | bytes], ...] = ()

    @classmethod
    def encr(cls, alg: Encr, bits: int = 0) -> Transform:
        """A cipher; `bits` 0 where it has one key size only."""
        return cls(TransformType.ENCR, alg, ((KEY_LENGTH, bits),) if bits else ())

    @property
    def key_bits(self) -> int:
        """Key Length, 0 where there is none."""
        return next((v for t, v in self.attributes if t == KEY_LENGTH and isinstance(v, int)), 0)

    @classmethod
    def parse(cls, reader: Reader) -> Transform:
        kind = TransformType(reader.u8("transform type"))
        reader.u8("reserved")
        number = reader.u16("transform ID")
        attributes: list[tuple[int, int | bytes]] = []
        while reader.left:
            head, value = reader.u16("attribute"), reader.u16("attribute")
            attributes.append((head & 0x7FFF, value if head & 0x8000 else reader.octets(value, "attribute")))
        return cls(kind, number, tuple(attributes))

    def serialize(self) -> bytes:
        writer = Writer().u8(self.type).u8(0).u16(self.id, "transform ID")
        for kind, value in self.attributes:
            if isinstance(value, int):
                writer.u16(kind | 0x8000).u16(value, "attribute")
            else:
                writer.u16(kind).u16(len(value), "attribute").octets(value)
        return writer.done()


@dataclass(frozen=True, slots=True)
class Proposal:
    """One proposal (RFC 7296, 3.3.1). `number` counts from 1; `spi` is the sender's inbound SPI."""

    number: int
    protocol: Protocol
    transforms: tuple[Transform, ...]
    spi: bytes = b""

    @classmethod
    def parse(cls, reader: Reader) -> Proposal:
        number, protocol = reader.u8("number"), Protocol(reader.u8("protocol"))
        size, count = reader.u8("SPI size"), reader.u8("transform count")
        spi = reader.octets(size, "SPI")
        transforms = tuple(_structures(reader, Transform.parse, 3))
        if len(transforms) != count:
            raise reader.fail(f"{count} transforms announced, {len(transforms)} there,")
        return cls(number, protocol, transforms, spi)

    def serialize(self) -> bytes:
        writer = Writer().u8(self.number, "number").u8(self.protocol).u8(len(self.spi), "SPI size")
        writer.u8(len(self.transforms), "transform count").octets(self.spi)
        return writer.octets(_chain((t.serialize() for t in self.transforms), 3)).done()


@dataclass(frozen=True, slots=True)
class SaPayload:
    """Security Association (RFC 7296, 3.3): proposals, or the one chosen."""

    proposals: tuple[Proposal, ...]
    type = Payload.SA

    @classmethod
    def parse(cls, reader: Reader) -> SaPayload:
        return cls(tuple(_structures(reader, Proposal.parse, 2)))

    def serialize(self) -> bytes:
        return _chain((p.serialize() for p in self.proposals), 2)


def _structures(reader: Reader, parse: Callable[[Reader], _T], more: int) -> list[_T]:
    """Substructures: an octet that is `more`, or 0 in the last one, a reserved one, a length."""
    found: list[_T] = []
    follows = more
    while reader.left:
        if follows != more:
            raise reader.fail("something after the last substructure")
        follows = reader.u8("substructure")
        if follows not in (0, more):
            raise reader.fail(f"substructure marker {follows}")
        reader.u8("reserved")
        with reader.sub(max(reader.u16("length") - 4, 0), "substructure") as inner:
            found.append(parse(inner))
    if not found or follows:
        raise reader.fail("the last substructure is missing")
    return found


def _chain(bodies: Iterable[bytes], more: int) -> bytes:
    listed = list(bodies)
    writer = Writer()
    for left, body in zip(range(len(listed) - 1, -1, -1), listed, strict=True):
        writer.u8(more if left else 0).u8(0).u16(len(body) + 4, "length").octets(body)
    return writer.done()


@dataclass(frozen=True, slots=True)
class RawSelector:
    """A traffic selector of an unknown type; `body` is what follows its length field."""

    type: int
    protocol: int
    body: bytes


_SELECTOR_TYPES: dict[int, tuple[type[Address], int]] = {7: (IPv4Address, 4), 8: (IPv6Address, 16)}


@dataclass(frozen=True, slots=True)
class TsPayload:
    """Traffic Selectors (RFC 7296, 3.13); `type` is TSI or TSR. On the wire no selector is dynamic."""

    type: Payload
    selectors: tuple[TrafficSelector | RawSelector, ...]

    @classmethod
    def parse(cls, reader: Reader, kind: Payload) -> TsPayload:
        count = reader.u8("count")
        reader.octets(3, "reserved")
        selectors = tuple(_parse_selector(reader) for _ in range(count))
        return cls(kind, selectors)

    def serialize(self) -> bytes:
        writer = Writer().u8(len(self.selectors), "count").octets(bytes(3))
        for selector in self.selectors:
            _write_selector(writer, selector)
        return writer.done()


def _parse_selector(reader: Reader) -> TrafficSelector | RawSelector:
    kind, protocol = reader.u8("selector type"), reader.u8("protocol")
    with reader.sub(max(reader.u16("length") - 4, 0), "selector") as inner:
        if kind not in _SELECTOR_TYPES:
            return RawSelector(kind, protocol, inner.rest())
        family, size = _SELECTOR_TYPES[kind]
        start_port, end_port = inner.u16("port"), inner.u16("port")
        start, end = family(inner.octets(size, "address")), family(inner.octets(size, "address"))
        return TrafficSelector(start, end, protocol, start_port, end_port)


def _write_selector(writer: Writer, selector: TrafficSelector | RawSelector) -> None:
    if isinstance(selector, RawSelector):
        writer.u8(selector.type).u8(selector.protocol).u16(len(selector.body) + 4, "length")
        writer.octets(selector.body)
        return
    start, end = selector.start.packed, selector.end.packed
    writer.u8(7 if len(start) == 4 else 8).u8(selector.protocol).u16(8 + len(start) + len(end))
    writer.u16(selector.start_port).u16(selector.end_port).octets(start).octets(end)


AnyPayload = RawPayload | NotifyPayload | DeletePayload | NoncePayload | KePayload | SaPayload | TsPayload

_PARSERS: dict[Payload, Callable[[Reader], AnyPayload]] = {
    Payload.NOTIFY: NotifyPayload.parse,
    Payload.DELETE: DeletePayload.parse,
    Payload.NONCE: NoncePayload.parse,
    Payload.KE: KePayload.parse,
    Payload.SA: SaPayload.parse,
    Payload.TSI: lambda reader: TsPayload.parse(reader, Payload.TSI),
    Payload.TSR: lambda reader: TsPayload.parse(reader, Payload.TSR),
}


def parse_payloads(first: Payload, data: bytes) -> tuple[AnyPayload, ...]:
    """A chain of payloads to its end; it cannot contain SK or SKF."""
    reader = Reader(data, "payloads")
    payloads: list[AnyPayload] = []
    kind = first
    while kind != Payload.NONE:
        if kind in (Payload.SK, Payload.SKF):
            raise reader.fail("an encrypted payload inside another")
        if len(payloads) == MAX_PAYLOADS:
            raise reader.fail(f"more than {MAX_PAYLOADS} payloads")
        following, flags = Payload(reader.u8("next payload")), reader.u8("flags")
        with reader.sub(max(reader.u16("length") - 4, 0), f"payload {kind.name}") as inner:
            if kind in _PARSERS:
                payloads.append(_PARSERS[kind](inner))
            else:
                payloads.append(RawPayload(kind, inner.rest(), bool(flags & _CRITICAL)))
        kind = following
    reader.end()
    return tuple(payloads)


def serialize_payloads(payloads: Iterable[AnyPayload]) -> tuple[Payload, bytes]:
    """(type of the first one, the chain's octets)."""
    listed = list(payloads)
    types = [*(payload.type for payload in listed), Payload.NONE]
    writer = Writer()
    for payload, following in zip(listed, types[1:], strict=True):
        body = payload.serialize()
        writer.u8(following).u8(_CRITICAL if isinstance(payload, RawPayload) and payload.critical else 0)
        writer.u16(len(body) + 4, "payload length").octets(body)
    return types[0], writer.done()
