"""Common parts of XFRM's messages for SAs and policies: data types, and their codecs.

Sans-IO. Source: linux/xfrm.h (uapi). Foreign bytes raise only `WireError`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from ikectx.errors import WireError
from ikectx.sa.context import NO_SECRET, Address, Secret

from . import xfrm_wire as wire
from .algorithms import KernelReplay

Network = IPv4Network | IPv6Network

ESP = 50
INET, INET6 = 2, 10
TRANSPORT, TUNNEL, BEET = 0, 1, 4
"""XFRM's modes (strongSwan and IKE number them differently)."""
_INFINITE = (1 << 64) - 1
_NO_ADDRESS = bytes(16)


@dataclass(frozen=True, slots=True)
class Mark:
    """XFRMA_MARK."""

    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class Encap:
    """UDP encapsulation of ESP (XFRMA_ENCAP); type 2 is RFC 3948's."""

    source_port: int
    destination_port: int
    type: int = 2
    original: bytes = field(default=_NO_ADDRESS, repr=False)


@dataclass(frozen=True, slots=True)
class KernelLimits:
    """Lifetime configuration; None: no such limit. Octets, packets, seconds since added or first used."""

    soft_bytes: int | None = None
    hard_bytes: int | None = None
    soft_packets: int | None = None
    hard_packets: int | None = None
    soft_add: int | None = None
    hard_add: int | None = None
    soft_use: int | None = None
    hard_use: int | None = None


@dataclass(frozen=True, slots=True)
class KernelUsage:
    """Usage of an SA or policy. `add_time`, `use_time`: wall clock, seconds since 1970, 0: not yet."""

    bytes: int = 0
    packets: int = 0
    add_time: int = 0
    use_time: int = 0


NO_LIMITS = KernelLimits()
NO_USAGE = KernelUsage()


@dataclass(frozen=True, slots=True)
class Selector:
    """struct xfrm_selector. Ports with masks (0: any). `family` 0: unspecified, as tunnel SAs have it."""

    source: Address
    source_prefix: int
    destination: Address
    destination_prefix: int
    protocol: int = 0
    source_port: int = 0
    source_mask: int = 0
    destination_port: int = 0
    destination_mask: int = 0
    ifindex: int = 0
    user: int = 0
    family: int = INET

    @classmethod
    def between(cls, source: Network, destination: Network, protocol: int = 0) -> Selector:
        """All ports between two networks of one family."""
        return cls(
            source.network_address,
            source.prefixlen,
            destination.network_address,
            destination.prefixlen,
            protocol,
            family=family_of(source.network_address),
        )

    @property
    def opposite(self) -> Selector:
        """Of the packets that come back."""
        return replace(
            self,
            source=self.destination,
            source_prefix=self.destination_prefix,
            source_port=self.destination_port,
            source_mask=self.destination_mask,
            destination=self.source,
            destination_prefix=self.source_prefix,
            destination_port=self.source_port,
            destination_mask=self.source_mask,
        )


@dataclass(frozen=True, slots=True)
class Template:
    """struct xfrm_user_tmpl: the SA that a policy requires. `share`: 0 any; `optional`: 1 may be left out."""

    source: Address
    destination: Address
    reqid: int = 0
    spi: bytes = bytes(4)
    proto: int = ESP
    mode: int = TUNNEL
    share: int = 0
    optional: int = 0
    algorithms: tuple[int, int, int] = (_INFINITE >> 32,) * 3
    """Allowed (auth, encryption, compression) algorithms as bit masks."""


@dataclass(frozen=True, slots=True)
class XfrmRequest:
    """A message for the kernel, its sequence number still 0. `what` describes the request to an operator."""

    message: Secret
    what: str


def family_of(address: Address) -> int:
    return INET if isinstance(address, IPv4Address) else INET6


def packed(address: Address) -> bytes:
    return address.packed.ljust(16, b"\0")


def address_of(octets: bytes, family: int) -> Address:
    if family == INET:
        return IPv4Address(octets[:4])
    if family == INET6:
        return IPv6Address(octets)
    raise WireError(f"address family {family}")


def network_of(address: Address, prefix: int) -> Network:
    if isinstance(address, IPv4Address):
        return IPv4Network((address, prefix), strict=False)
    return IPv6Network((address, prefix), strict=False)


def octets16(number: int) -> bytes:
    if not 0 <= number < 1 << 16:
        raise WireError(f"port {number} does not fit")
    return number.to_bytes(2)


def any_selector(address: Address) -> Selector:
    """The selector of an SA that has none of its own."""
    nowhere = type(address)(0)
    return Selector(nowhere, 0, nowhere, 0, family=0)


def selector_of(message: Any, family: int) -> Selector:
    """`family`: that of the addresses of a selector without one."""
    own = message["sel_family"]
    read_as = own or family
    selector = Selector(
        source=address_of(message["sel_saddr"], read_as),
        source_prefix=message["sel_prefixlen_s"],
        destination=address_of(message["sel_daddr"], read_as),
        destination_prefix=message["sel_prefixlen_d"],
        protocol=message["sel_proto"],
        source_port=int.from_bytes(message["sel_sport"]),
        source_mask=int.from_bytes(message["sel_sport_mask"]),
        destination_port=int.from_bytes(message["sel_dport"]),
        destination_mask=int.from_bytes(message["sel_dport_mask"]),
        ifindex=message["sel_ifindex"],
        user=message["sel_user"],
        family=own,
    )
    if max(selector.source_prefix, selector.destination_prefix) > selector.source.max_prefixlen:
        raise WireError("a selector's prefix is longer than its addresses")
    return selector


def selector_values(selector: Selector) -> dict[str, Any]:
    return {
        "sel_saddr": packed(selector.source),
        "sel_prefixlen_s": selector.source_prefix,
        "sel_daddr": packed(selector.destination),
        "sel_prefixlen_d": selector.destination_prefix,
        "sel_proto": selector.protocol,
        "sel_sport": octets16(selector.source_port),
        "sel_sport_mask": octets16(selector.source_mask),
        "sel_dport": octets16(selector.destination_port),
        "sel_dport_mask": octets16(selector.destination_mask),
        "sel_ifindex": selector.ifindex,
        "sel_user": selector.user,
        "sel_family": selector.family,
    }


_LIMITS: Mapping[str, int] = {
    "soft_bytes": _INFINITE,
    "hard_bytes": _INFINITE,
    "soft_packets": _INFINITE,
    "hard_packets": _INFINITE,
    "soft_add": 0,
    "hard_add": 0,
    "soft_use": 0,
    "hard_use": 0,
}
"""The kernel's value for "no limit"."""


def limits_of(message: Any) -> KernelLimits:
    return KernelLimits(
        **{
            name: None if (value := message[f"lft_{name}"]) == none else value
            for name, none in _LIMITS.items()
        }
    )


def limit_values(limits: KernelLimits) -> dict[str, int]:
    return {
        f"lft_{name}": none if (value := getattr(limits, name)) is None else value
        for name, none in _LIMITS.items()
    }


def usage_of(message: Any, prefix: str) -> KernelUsage:
    return KernelUsage(*(message[prefix + name] for name in ("bytes", "packets", "add_time", "use_time")))


def algo(name: str, key: Secret, icv_bits: int | None = None) -> dict[str, Any]:
    raw = name.encode("ascii", "replace")
    if len(raw) > 63:
        raise WireError(f"algorithm name {name!r} is too long")
    values: dict[str, Any] = {"name": raw, "key_bits": 8 * len(key), "key": key}
    return values if icv_bits is None else {**values, "icv_bits": icv_bits}


def algorithm_of(attribute: Any) -> tuple[str, Secret]:
    if attribute is None:
        return ("", NO_SECRET)
    try:
        name = attribute["name"].split(b"\0", 1)[0].decode("ascii")
    except UnicodeDecodeError:
        raise WireError("an algorithm's name is not ASCII") from None
    bits, key = attribute["key_bits"], attribute["key"]
    if bits % 8 or bits // 8 > len(key):
        raise WireError(f"a key of {bits} bits in {len(key)} octets")
    return (name, Secret(key.reveal()[: bits // 8]))


def replay_of(found: Mapping[str, Any], window: int, *, esn: bool) -> KernelReplay:
    """`window`: that of the SA, because the old form does not have it."""
    long_form = found.get("XFRMA_REPLAY_ESN_VAL")
    if long_form is not None:
        names = ("bmp_len", "oseq", "seq", "oseq_hi", "seq_hi", "window")
        head = tuple(long_form[name] for name in names)
        return KernelReplay.from_long(head, long_form["words"], esn=esn)
    short = found.get("XFRMA_REPLAY_VAL")
    if short is None:
        return KernelReplay(window=min(window, 32))
    return KernelReplay.from_short(short["oseq"], short["seq"], short["bitmap"], min(window, 32))


def encap_of(attribute: Any) -> Encap | None:
    if attribute is None:
        return None
    sport, dport = (int.from_bytes(attribute[name]) for name in ("sport", "dport"))
    return Encap(sport, dport, type=attribute["type"], original=attribute["oa"])


def mark_of(attribute: Any) -> Mark | None:
    return None if attribute is None else Mark(attribute["value"], attribute["mask"])


def mark_attribute(mark: Mark | None) -> list[tuple[str, Any]]:
    return [] if mark is None else [("XFRMA_MARK", {"value": mark.value, "mask": mark.mask})]


def templates_of(octets: bytes) -> tuple[Template, ...]:
    if len(octets) % wire.TMPL.size:
        raise WireError(f"{len(octets)} octets are no row of templates")
    out = []
    for values in wire.TMPL.iter_unpack(octets):
        part = dict(zip(wire.TMPL_NAMES, values, strict=True))
        out.append(
            Template(
                source=address_of(part["saddr"], part["family"]),
                destination=address_of(part["daddr"], part["family"]),
                reqid=part["reqid"],
                spi=part["spi"],
                proto=part["proto"],
                mode=part["mode"],
                share=part["share"],
                optional=part["optional"],
                algorithms=(part["aalgos"], part["ealgos"], part["calgos"]),
            )
        )
    return tuple(out)


def template_octets(template: Template) -> bytes:
    try:
        return wire.TMPL.pack(
            packed(template.destination),
            template.spi,
            template.proto,
            family_of(template.destination),
            packed(template.source),
            template.reqid,
            template.mode,
            template.share,
            template.optional,
            *template.algorithms,
        )
    except struct.error:
        raise WireError("a number of a template does not fit its field") from None
