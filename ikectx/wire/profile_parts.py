"""Codecs of the small parts of the profiles: `x_out` makes the CBOR that `x` reads.

Endpoints, identities, selectors, nonces and replay windows have compact forms, given in docs/protocol.md.
Readers take a decoded value and the name of its place; what is wrong raises WireError.
"""

from __future__ import annotations

from dataclasses import fields
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from ikectx.errors import WireError
from ikectx.numbers import IdType
from ikectx.sa.context import (
    Address,
    Endpoint,
    Identity,
    Lifetime,
    ReplayState,
    Secret,
    Tags,
    TrafficSelector,
)

from . import cbor


def secret(value: Any, where: str) -> Secret:
    """An octet string that must not be shown."""
    return Secret(cbor.octets()(value, where))


def seconds(value: Any, where: str) -> int | None:
    """Seconds left; negative if the time is over."""
    if value is not None and (type(value) is not int or not -(1 << 63) <= value < 1 << 63):
        raise WireError(f"{where}: not a number of seconds")
    return value


def limit(value: Any, where: str) -> int | None:
    """A limit of 64 bits, or null."""
    return None if value is None else cbor.u64(value, where)


def address(value: Any, where: str) -> Address:
    """4 or 16 octets."""
    packed = cbor.octets(4, 16)(value, where)
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


MAX_VIRTUAL_IPS = 16
"""Of one side of an IKE_SA: each is a selector of each CHILD_SA that has no others, and all are compared."""
addresses = cbor.array(address, most=MAX_VIRTUAL_IPS)


def endpoint(value: Any, where: str) -> Endpoint:
    """Address, then the port in 2 octets unless it is 500."""
    packed = cbor.octets(4, 6, 16, 18)(value, where)
    split = len(packed) // 4 * 4
    port = int.from_bytes(packed[split:]) if len(packed) > split else 500
    return Endpoint(address(packed[:split], where), port)


endpoints = cbor.array(endpoint)


def endpoint_out(value: Endpoint) -> bytes:
    """See `endpoint`."""
    return value.address.packed + (b"" if value.port == 500 else value.port.to_bytes(2))


def identity(value: Any, where: str) -> Identity:
    """Type in one octet, then the data (RFC 7296, 3.5)."""
    data = cbor.octets()(value, where)
    if not data:
        raise WireError(f"{where}: an identity without its type")
    return Identity(IdType(data[0]), data[1:])


def identity_out(value: Identity) -> bytes:
    """See `identity`. Errors: WireError for a type above 255."""
    if value.type > 255:
        raise WireError(f"identity type {int(value.type)} does not fit in an octet")
    return bytes([value.type]) + value.data


_SELECTOR = (0, 0, 65535, False)
_SELECTOR_ROW = cbor.row(
    (cbor.octets(4, 5, 8, 16, 17, 32), cbor.u8, cbor.u16, cbor.u16, cbor.boolean), _SELECTOR
)


def selector(value: Any, where: str) -> TrafficSelector:
    """[host, prefix or range, protocol, start port, end port, dynamic], or the first item alone.

    A host is an address, a prefix an address and its length in one octet, a range two addresses.
    """
    if type(value) is bytes:
        value = [value]
    packed, *rest = _SELECTOR_ROW(value, where)
    size = 4 if len(packed) <= 8 else 16
    start = address(packed[:size], where)
    bits, first = 8 * size, int(start)
    if len(packed) == 2 * size:
        end = address(packed[size:], where)
    else:
        length = packed[size] if len(packed) > size else bits
        if length > bits or first & ((1 << (bits - length)) - 1):
            raise WireError(f"{where}: not a prefix")
        end = type(start)(first | ((1 << (bits - length)) - 1))
    return cbor.build(TrafficSelector, where, start, end, *rest)


selectors = cbor.array(selector)


def selector_out(ts: TrafficSelector) -> Any:
    """See `selector`; the shortest form."""
    packed = ts.start.packed
    first, span = int(ts.start), int(ts.end) - int(ts.start)
    if span and (span < 0 or span & (span + 1) or first & span):
        packed += ts.end.packed
    elif span:
        packed += bytes([8 * len(packed) - span.bit_length()])
    row = cbor.trim([packed, ts.protocol, ts.start_port, ts.end_port, ts.dynamic], _SELECTOR)
    return row if len(row) > 1 else packed


_LIFETIME = (None, None, None, None, None, 0, 0)
_LIFETIME_ROW = cbor.row((seconds, seconds, seconds, limit, limit, cbor.u64, cbor.u64), _LIFETIME)


def lifetime(value: Any, where: str) -> Lifetime:
    """[rekey, reauth, hard, bytes limit, packets limit, bytes used, packets used]."""
    return Lifetime(*_LIFETIME_ROW(value, where))


def lifetime_out(value: Lifetime) -> list[Any]:
    """See `lifetime`."""
    return cbor.trim([getattr(value, field.name) for field in fields(value)], _LIFETIME)


_TAGS_ROW = cbor.row((cbor.u32,) * 6, (0,) * 6)


def tags(value: Any, where: str) -> Tags:
    """[if_id in, if_id out, mark in, its mask, mark out, its mask]."""
    if_in, if_out, *marks = _TAGS_ROW(value, where)
    return Tags((marks[0], marks[1]), (marks[2], marks[3]), if_in, if_out)


def tags_out(value: Tags) -> list[Any]:
    """See `tags`."""
    return cbor.trim([value.if_id_in, value.if_id_out, *value.mark_in, *value.mark_out], (0,) * 6)


_REPLAY = (0, 0, False, b"")
_REPLAY_ROW = cbor.row((cbor.u64, cbor.u16, cbor.boolean, cbor.octets()), _REPLAY)


def replay(value: Any, where: str) -> ReplayState:
    """[seq, window, ESN, holes].

    Holes: the bitmap, exclusive-or'ed with the full one (all of 1..seq received as far as the window
    reaches), without leading zero octets; so a window without a hole costs nothing.
    """
    seq, window, esn, holes = _REPLAY_ROW(value, where)
    if holes[:1] == b"\0" or len(holes) > 512:
        raise WireError(f"{where}: a bitmap that is not the shortest or too long")
    bitmap = int.from_bytes(holes) ^ ((1 << min(seq, window, 4096)) - 1)
    return cbor.build(ReplayState, where, seq, window, bitmap, esn)


def replay_out(value: ReplayState) -> list[Any]:
    """See `replay`."""
    holes = value.bitmap ^ ((1 << min(value.seq, value.window)) - 1)
    packed = holes.to_bytes((holes.bit_length() + 7) // 8)
    return cbor.trim([value.seq, value.window, value.esn, packed], _REPLAY)


_NONCE_ROW = cbor.row((cbor.octets(), cbor.octets()))


def nonces_out(nonce_i: bytes, nonce_r: bytes) -> Any:
    """See `nonces`."""
    return nonce_i + nonce_r if len(nonce_i) == len(nonce_r) else [nonce_i, nonce_r]


def nonces(value: Any, where: str) -> tuple[bytes, bytes]:
    """One string of two halves, or an array where the lengths differ."""
    if type(value) is bytes and len(value) % 2 == 0:
        value = [value[: len(value) // 2], value[len(value) // 2 :]]
    nonce_i, nonce_r = _NONCE_ROW(value, where)
    return nonce_i, nonce_r
