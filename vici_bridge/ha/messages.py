"""Messages of charon's `ha` socket (UDP 4510): bytes to values and back, no socket.

A message is version u8, type u8 and attributes; an attribute is its number u8 and a body
whose length follows from the number alone. There is no length to skip by, so one unknown
number makes the rest unreadable: WireError.

    wire version 3   strongSwan up to 6.0.0      TABLE_A
    wire version 4   strongSwan 6.0.1            TABLE_B (ADD_SECRET and ADD_KES inserted)
    wire version 5   strongSwan 6.0.2 and later  TABLE_B; an IKE_UPDATE carries CONDITIONS and
                                                 EXTENSIONS twice, see `MARKER`

Three kinds of number are not in network order although the format says so: charon passes
values that are already in network order through htonl or htons once more. They are the ESP
SPIs and the CPIs, and they stand reversed on little-endian hosts. As the socket never
leaves the host, this host's byte order is charon's.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum, auto
from ipaddress import IPv4Address, IPv6Address
from types import MappingProxyType
from typing import Any, Self, TypeVar

from ikectx.errors import WireError
from ikectx.numbers import IdType, OpenEnum
from ikectx.sa.context import (
    Address,
    ChildContext,
    Endpoint,
    Identity,
    IkeGeneration,
    Secret,
    TrafficSelector,
)
from ikectx.wire.reader import Reader, Writer

from .ike_id import IkeId

PORT = 4510
"""UDP port of both ends."""

LONGEST = 65507
"""Octets of the longest datagram."""
BUFLEN = 2048
"""`charon.plugins.ha.buflen` as delivered: charon drops a longer message unread."""

MARKER = 1 << 31
"""Wire version 5: set in the second CONDITIONS and the second EXTENSIONS, which have the private bits."""

_AF_INET, _AF_INET6 = 2, 10
_TS_IPV4, _TS_IPV6 = 7, 8


class HaType(OpenEnum):
    """Message types, the same in every wire version."""

    IKE_ADD = 1
    IKE_UPDATE = 2
    IKE_MID_INITIATOR = 3
    IKE_MID_RESPONDER = 4
    IKE_DELETE = 5
    CHILD_ADD = 6
    CHILD_DELETE = 7
    SEGMENT_DROP = 8
    SEGMENT_TAKE = 9
    STATUS = 10
    RESYNC = 11
    IKE_IV = 12


class Attr(IntEnum):
    """Attributes by name, with the numbers of wire versions 4 and 5; those of 3 are in `TABLE_A`."""

    IKE_ID = auto()
    IKE_REKEY_ID = auto()
    LOCAL_ID = auto()
    REMOTE_ID = auto()
    REMOTE_EAP_ID = auto()
    LOCAL_ADDR = auto()
    REMOTE_ADDR = auto()
    CONFIG_NAME = auto()
    CONDITIONS = auto()
    EXTENSIONS = auto()
    LOCAL_VIP = auto()
    REMOTE_VIP = auto()
    PEER_ADDR = auto()
    INITIATOR = auto()
    NONCE_I = auto()
    NONCE_R = auto()
    SECRET = auto()
    ADD_SECRET = auto()
    OLD_SKD = auto()
    ALG_PRF = auto()
    ALG_OLD_PRF = auto()
    ALG_ENCR = auto()
    ALG_ENCR_LEN = auto()
    ALG_INTEG = auto()
    ALG_KE = auto()
    ALG_ADD_KES = auto()
    IPSEC_MODE = auto()
    IPCOMP = auto()
    INBOUND_SPI = auto()
    OUTBOUND_SPI = auto()
    INBOUND_CPI = auto()
    OUTBOUND_CPI = auto()
    LOCAL_TS = auto()
    REMOTE_TS = auto()
    MID = auto()
    SEGMENT = auto()
    ESN = auto()
    IKE_VERSION = auto()
    LOCAL_DH = auto()
    REMOTE_DH = auto()
    PSK = auto()
    IV = auto()
    AUTH_METHOD = auto()


Value = IkeId | Identity | Endpoint | TrafficSelector | Secret | str | bytes | int
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Body:
    """One kind of attribute body: the type of its value, and how it is read and written."""

    kind: type[Value]
    read: Callable[[Reader, str], Value]
    write: Callable[[Any, str], bytes]


def _flag(reader: Reader, name: str) -> bool:
    value = reader.u8(name)
    if value > 1:
        raise reader.fail(f"{name} is {value}, not 0 or 1,")
    return value == 1


def _address(reader: Reader, size: int, name: str) -> Address:
    raw = reader.octets(size, name)
    return IPv4Address(raw) if size == 4 else IPv6Address(raw)


def _read_ike_id(reader: Reader, name: str) -> IkeId:
    version = reader.u8(name)
    spi_i, spi_r = reader.octets(8, name), reader.octets(8, name)
    return IkeId(spi_i, spi_r, _flag(reader, name), version)


def _write_ike_id(value: IkeId, name: str) -> bytes:
    return _u8(value.version, name) + value.spi_i + value.spi_r + (b"\1" if value.initiator else b"\0")


def _read_identity(reader: Reader, name: str) -> Identity:
    kind = IdType(reader.u8(name))
    return Identity(kind, reader.octets(reader.u8(name), name))


def _write_identity(value: Identity, name: str) -> bytes:
    return _u8(value.type, name) + _u8(len(value.data), f"length of {name}") + value.data


def _read_host(reader: Reader, name: str) -> Endpoint:
    port, family = reader.u16(name), reader.u8(name)
    if family not in (_AF_INET, _AF_INET6):
        raise reader.fail(f"{name} is of address family {family}")
    return Endpoint(_address(reader, 4 if family == _AF_INET else 16, name), port)


def _write_host(value: Endpoint, name: str) -> bytes:
    octets = value.address.packed
    family = _AF_INET if len(octets) == 4 else _AF_INET6
    return _u16(value.port, name) + bytes((family,)) + octets


def _read_selector(reader: Reader, name: str) -> TrafficSelector:
    kind = reader.u8(name)
    if kind not in (_TS_IPV4, _TS_IPV6):
        raise reader.fail(f"{name} is of type {kind}")
    protocol, start_port, end_port = reader.u8(name), reader.u16(name), reader.u16(name)
    dynamic, size = _flag(reader, name), 4 if kind == _TS_IPV4 else 16
    start, end = _address(reader, size, name), _address(reader, size, name)
    return TrafficSelector(start, end, protocol, start_port, end_port, dynamic)


def _write_selector(value: TrafficSelector, name: str) -> bytes:
    kind = _TS_IPV4 if value.start.version == 4 else _TS_IPV6
    head = kind.to_bytes() + _u8(value.protocol, name) + _u16(value.start_port, name)
    head += _u16(value.end_port, name) + (b"\1" if value.dynamic else b"\0")
    return head + value.start.packed + value.end.packed


def _read_chunk(reader: Reader, name: str) -> bytes:
    return reader.octets(reader.u16(name), name)


def _write_chunk(value: bytes, name: str) -> bytes:
    return _u16(len(value), f"length of {name}") + value


def _turn(raw: bytes) -> bytes:
    """Network order after one htonl or htons too many."""
    return raw[::-1] if sys.byteorder == "little" else raw


def _write_spi(value: bytes, name: str) -> bytes:
    if len(value) != 4:
        raise WireError(f"{name} has {len(value)} octets, not 4")
    return _turn(value)


def _write_text(value: str, name: str) -> bytes:
    return Writer().cstring(value, name).done()


def _number(size: int) -> Callable[[int, str], bytes]:
    """Writes an unsigned number of so many octets. Errors: WireError if it does not fit."""

    def write(value: int, name: str) -> bytes:
        try:
            return value.to_bytes(size)
        except OverflowError:
            raise WireError(f"{name} {value} does not fit in {size} octets") from None

    return write


_u8, _u16, _u32 = _number(1), _number(2), _number(4)


_IKE_ID = Body(IkeId, _read_ike_id, _write_ike_id)
_ID = Body(Identity, _read_identity, _write_identity)
_HOST = Body(Endpoint, _read_host, _write_host)
_TS = Body(TrafficSelector, _read_selector, _write_selector)
_TEXT = Body(str, Reader.cstring, _write_text)
_U8 = Body(int, Reader.u8, _u8)
_U16 = Body(int, Reader.u16, _u16)
_U32 = Body(int, Reader.u32, _u32)
_CHUNK = Body(bytes, _read_chunk, _write_chunk)
_SECRET = Body(
    Secret,
    lambda reader, name: Secret(_read_chunk(reader, name)),
    lambda value, name: _write_chunk(value.reveal(), name),
)
_SPI = Body(bytes, lambda reader, name: _turn(reader.octets(4, name)), _write_spi)
_CPI = Body(
    int,
    lambda reader, name: int.from_bytes(_turn(reader.octets(2, name))),
    lambda value, name: _turn(_u16(value, name)),
)

Table = Mapping[int, tuple[Attr, Body]]

_BODIES: Mapping[Attr, Body] = {
    Attr.IKE_ID: _IKE_ID,
    Attr.IKE_REKEY_ID: _IKE_ID,
    Attr.LOCAL_ID: _ID,
    Attr.REMOTE_ID: _ID,
    Attr.REMOTE_EAP_ID: _ID,
    Attr.LOCAL_ADDR: _HOST,
    Attr.REMOTE_ADDR: _HOST,
    Attr.CONFIG_NAME: _TEXT,
    Attr.CONDITIONS: _U32,
    Attr.EXTENSIONS: _U32,
    Attr.LOCAL_VIP: _HOST,
    Attr.REMOTE_VIP: _HOST,
    Attr.PEER_ADDR: _HOST,
    Attr.INITIATOR: _U8,
    Attr.NONCE_I: _CHUNK,
    Attr.NONCE_R: _CHUNK,
    Attr.SECRET: _SECRET,
    Attr.ADD_SECRET: _SECRET,
    Attr.OLD_SKD: _SECRET,
    Attr.ALG_PRF: _U16,
    Attr.ALG_OLD_PRF: _U16,
    Attr.ALG_ENCR: _U16,
    Attr.ALG_ENCR_LEN: _U16,
    Attr.ALG_INTEG: _U16,
    Attr.ALG_KE: _U16,
    Attr.ALG_ADD_KES: _CHUNK,
    Attr.IPSEC_MODE: _U8,
    Attr.IPCOMP: _U8,
    Attr.INBOUND_SPI: _SPI,
    Attr.OUTBOUND_SPI: _SPI,
    Attr.INBOUND_CPI: _CPI,
    Attr.OUTBOUND_CPI: _CPI,
    Attr.LOCAL_TS: _TS,
    Attr.REMOTE_TS: _TS,
    Attr.MID: _U32,
    Attr.SEGMENT: _U16,
    Attr.ESN: _U16,
    Attr.IKE_VERSION: _U8,
    Attr.LOCAL_DH: _CHUNK,
    Attr.REMOTE_DH: _CHUNK,
    Attr.PSK: _SECRET,
    Attr.IV: _CHUNK,
    Attr.AUTH_METHOD: _U16,
}

TABLE_B: Table = MappingProxyType({int(attr): (attr, body) for attr, body in _BODIES.items()})
TABLE_A: Table = MappingProxyType(
    dict(enumerate((row for row in TABLE_B.values() if row[0] not in (Attr.ADD_SECRET, Attr.ALG_ADD_KES)), 1))
)

TABLES: Mapping[int, Table] = MappingProxyType({3: TABLE_A, 4: TABLE_B, 5: TABLE_B})
"""Wire version to attribute table; other versions are refused."""

_NUMBERS: Mapping[int, Mapping[Attr, tuple[bytes, type[Value], Callable[[Any, str], bytes]]]] = {
    version: {attr: (number.to_bytes(), body.kind, body.write) for number, (attr, body) in table.items()}
    for version, table in TABLES.items()
}


@dataclass(frozen=True, slots=True)
class HaMessage:
    """One datagram of the HA socket; attributes keep their order, and may repeat."""

    version: int
    type: HaType
    attributes: tuple[tuple[Attr, Value], ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a whole datagram; WireError for anything that charon would not have written."""
        reader = Reader(data, "HA message")
        version, kind = reader.u8("version"), HaType(reader.u8("type"))
        table = TABLES.get(version)
        if table is None:
            raise reader.fail(f"wire version {version} is not known")
        attributes: list[tuple[Attr, Value]] = []
        while reader.left:
            number = reader.u8("attribute")
            if number not in table:
                raise reader.fail(f"attribute {number} of wire version {version} is not known")
            attr, body = table[number]
            attributes.append((attr, body.read(reader, attr.name)))
        return cls(version, kind, tuple(attributes))

    def serialize(self, limit: int = BUFLEN) -> bytes:
        """The datagram. Errors: WireError if a value does not fit its field or the whole is over `limit`
        octets; ValueError for attributes that this wire version does not have, or of another type."""
        numbers = _NUMBERS.get(self.version)
        if numbers is None:
            raise ValueError(f"HA wire version {self.version} is not known")
        parts = [bytes((self.version, self.type))]
        for attr, value in self.attributes:
            known = numbers.get(attr)
            if known is None:
                raise ValueError(f"{attr.name} is not in HA wire version {self.version}")
            number, kind, write = known
            if not isinstance(value, kind):
                raise ValueError(f"{attr.name} cannot be a {type(value).__name__}")
            parts += number, write(value, attr._name_)  # `name` is a function of Enum's
        octets = b"".join(parts)
        if len(octets) > limit:
            raise WireError(f"HA message of {len(octets)} octets, charon reads at most {limit}")
        return octets

    def get(self, attr: Attr) -> Value | None:
        """The last value of an attribute, which is the one that charon uses; None if there is none."""
        found: Value | None = None
        for name, value in self.attributes:
            if name is attr:
                found = value
        return found

    def all(self, attr: Attr) -> tuple[Value, ...]:
        """Every value of an attribute, in order."""
        return tuple(value for name, value in self.attributes if name is attr)

    def find(self, attr: Attr, kind: builtins.type[T]) -> T | None:
        """`get` with its type; the table defines the type, so another one is a mistake of the caller."""
        value = self.get(attr)
        assert value is None or isinstance(value, kind)
        return value

    def every(self, attr: Attr, kind: builtins.type[T]) -> tuple[T, ...]:
        """`all` with its type."""
        return tuple(value for value in self.all(attr) if isinstance(value, kind))

    def need(self, attr: Attr, kind: builtins.type[T]) -> T:
        """`find`; WireError if the attribute is missing."""
        value = self.find(attr, kind)
        if value is None:
            raise WireError(f"HA message {self.type.name} has no {attr.name}")
        return value

    def number(self, attr: Attr, default: int = 0) -> int:
        """The last value of a numeric attribute."""
        value = self.find(attr, int)
        return default if value is None else value


# What we send. Order is charon's own: IKE_ID must come first in an IKE_UPDATE.


def ike_add(
    version: int, generation: IkeGeneration, remote: Endpoint | None, *, replaces: IkeId | None = None
) -> HaMessage:
    """IKE_ADD of one generation; `replaces` hands its children, ids and addresses to the new one."""
    out: list[tuple[Attr, Value]] = [(Attr.IKE_VERSION, 2), (Attr.IKE_ID, IkeId.of(generation))]
    if replaces is not None:
        out.append((Attr.IKE_REKEY_ID, replaces))
    if generation.old_skd is not None and generation.old_prf is not None:
        out += [(Attr.ALG_OLD_PRF, int(generation.old_prf)), (Attr.OLD_SKD, generation.old_skd)]
    out += _algorithms(generation.encr, generation.encr_bits, generation.integ)
    out.append((Attr.ALG_PRF, int(generation.prf)))
    out += _exchange(generation.ke, generation.add_kes)
    out += [(Attr.NONCE_I, generation.nonce_i), (Attr.NONCE_R, generation.nonce_r)]
    out += _secrets(generation.secret, generation.add_secret)
    if remote is not None:
        out.append((Attr.REMOTE_ADDR, remote))
    return HaMessage(version, HaType.IKE_ADD, tuple(out))


def ike_update(
    version: int,
    ike: IkeId,
    *,
    local_id: Identity | None = None,
    remote_id: Identity | None = None,
    remote_eap_id: Identity | None = None,
    local: Endpoint | None = None,
    remote: Endpoint | None = None,
    conditions: tuple[int, int] | None = None,
    extensions: tuple[int, int] | None = None,
    name: str | None = None,
    peer_addresses: Iterable[Endpoint] = (),
    local_vips: Iterable[Address] = (),
    remote_vips: Iterable[Address] = (),
) -> HaMessage:
    """IKE_UPDATE with the given attributes. `conditions`, `extensions`: (public, private) bits.

    Private bits are sent on wire version 5 only; older charons have none.
    """
    out: list[tuple[Attr, Value]] = [(Attr.IKE_ID, ike)]
    single: tuple[tuple[Attr, Value | None], ...] = (
        (Attr.LOCAL_ID, local_id),
        (Attr.REMOTE_ID, remote_id),
        (Attr.REMOTE_EAP_ID, remote_eap_id),
        (Attr.LOCAL_ADDR, local),
        (Attr.REMOTE_ADDR, remote),
    )
    out += [(attr, value) for attr, value in single if value is not None]
    for attr, bits in ((Attr.CONDITIONS, conditions), (Attr.EXTENSIONS, extensions)):
        if bits is not None:
            out.append((attr, bits[0] & ~MARKER))
            if version >= 5:
                out.append((attr, bits[1] | MARKER))
    if name is not None:
        out.append((Attr.CONFIG_NAME, name))
    out += [(Attr.PEER_ADDR, peer) for peer in peer_addresses]
    out += [(Attr.LOCAL_VIP, Endpoint(vip, 0)) for vip in local_vips]
    out += [(Attr.REMOTE_VIP, Endpoint(vip, 0)) for vip in remote_vips]
    return HaMessage(version, HaType.IKE_UPDATE, tuple(out))


def ike_mid(version: int, ike: IkeId, *, initiator: bool, mid: int) -> HaMessage:
    """Message ID of the next request charon sends (`initiator`) or expects. charon ignores 0."""
    kind = HaType.IKE_MID_INITIATOR if initiator else HaType.IKE_MID_RESPONDER
    return HaMessage(version, kind, ((Attr.IKE_ID, ike), (Attr.MID, mid)))


def ike_delete(version: int, ike: IkeId) -> HaMessage:
    """Remove the IKE_SA with its children; nothing reaches the peer."""
    return HaMessage(version, HaType.IKE_DELETE, ((Attr.IKE_ID, ike),))


def child_add(version: int, ike: IkeId, child: ChildContext) -> HaMessage:
    """CHILD_ADD below `ike`, whose SK_d its keys are derived from. Never send one twice."""
    out: list[tuple[Attr, Value]] = [
        (Attr.IKE_ID, ike),
        (Attr.INITIATOR, int(child.initiator)),
        (Attr.INBOUND_SPI, child.spi_in),
        (Attr.OUTBOUND_SPI, child.spi_out),
        (Attr.INBOUND_CPI, child.cpi_in),
        (Attr.OUTBOUND_CPI, child.cpi_out),
        (Attr.IPSEC_MODE, int(child.mode)),
        (Attr.IPCOMP, child.ipcomp),
        (Attr.CONFIG_NAME, child.name),
    ]
    out += _algorithms(child.encr, child.encr_bits, child.integ)
    out += _exchange(child.ke, child.add_kes)
    out += [(Attr.ESN, int(child.esn)), (Attr.NONCE_I, child.nonce_i), (Attr.NONCE_R, child.nonce_r)]
    if child.secret:
        out += _secrets(child.secret, child.add_secret)
    out += [(Attr.LOCAL_TS, ts) for ts in child.local_ts]
    out += [(Attr.REMOTE_TS, ts) for ts in child.remote_ts]
    return HaMessage(version, HaType.CHILD_ADD, tuple(out))


def child_delete(version: int, ike: IkeId, spi_in: bytes) -> HaMessage:
    """Remove the ESP CHILD_SA with that inbound SPI (4 octets); nothing reaches the peer."""
    return HaMessage(version, HaType.CHILD_DELETE, ((Attr.IKE_ID, ike), (Attr.INBOUND_SPI, spi_in)))


def segment_take(version: int, segment: int) -> HaMessage:
    """ "We take it": charon makes its ESTABLISHED SAs of the segment PASSIVE. 0: all segments."""
    return HaMessage(version, HaType.SEGMENT_TAKE, ((Attr.SEGMENT, segment),))


def segment_drop(version: int, segment: int) -> HaMessage:
    """ "We let it go": charon makes its PASSIVE SAs of the segment ESTABLISHED. 0: all segments."""
    return HaMessage(version, HaType.SEGMENT_DROP, ((Attr.SEGMENT, segment),))


def nothing(version: int) -> HaMessage:
    """A message without a name: charon carries out nothing. See `sockets.HaSocket.read`."""
    return HaMessage(version, HaType.IKE_MID_INITIATOR, ())


def resync(version: int, segments: Iterable[int]) -> HaMessage:
    """Ask charon to replay the IKE_SAs of segments; it also rekeys every CHILD_SA of them."""
    return HaMessage(version, HaType.RESYNC, tuple((Attr.SEGMENT, segment) for segment in segments))


def _algorithms(encr: int, bits: int, integ: int) -> list[tuple[Attr, Value]]:
    out: list[tuple[Attr, Value]] = [(Attr.ALG_ENCR, int(encr))]
    if bits:
        out.append((Attr.ALG_ENCR_LEN, bits))
    if integ:
        out.append((Attr.ALG_INTEG, int(integ)))
    return out


def _exchange(ke: int, additional: bytes) -> list[tuple[Attr, Value]]:
    out: list[tuple[Attr, Value]] = [(Attr.ALG_KE, int(ke))] if ke else []
    if additional:
        out.append((Attr.ALG_ADD_KES, additional))
    return out


def _secrets(secret: Secret, additional: Secret) -> list[tuple[Attr, Value]]:
    out: list[tuple[Attr, Value]] = [(Attr.SECRET, secret)]
    if additional:
        out.append((Attr.ADD_SECRET, additional))
    return out
