"""What a connection of this gateway allows: charon's answers over VICI in a form that can be compared. Pure.

Source: `list-conns` and `get-pools` of strongSwan 5.9.8 and 6.0.6 (vici_query.c, traffic_selector.c,
mem_pool.c), and for proposals strongSwan's pull request 3067. charon reports neither the pools of a
connection nor, before 6.0.7, its proposals; `Rules` has the operator's configuration of those from
ikectx.toml."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address, ip_network

from ikectx.errors import WireError
from ikectx.numbers import Mode
from ikectx.sa.context import Address, TrafficSelector
from vici_bridge.vici.answers import View, sections, texts

from .proposals import ConfiguredProposal

Lookup = Callable[[str, str], int]
"""The number of a protocol by its name ("" as second), or of a port by name and protocol. Errors: OSError."""

_MODES = {
    "TUNNEL": frozenset({Mode.TUNNEL}),
    "TRANSPORT": frozenset({Mode.TRANSPORT, Mode.TUNNEL}),
    "TRANSPORT_PROXY": frozenset({Mode.TRANSPORT, Mode.TUNNEL}),
    "BEET": frozenset({Mode.BEET, Mode.TUNNEL}),
}
"""Modes that a child of that mode can have: charon takes tunnel mode if the peer wants no other mode."""
_ICMP = (1, 58)


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses from `start` to `end`, both of one family."""

    start: Address
    end: Address

    @classmethod
    def parse(cls, text: str) -> Range:
        """10.4.0.0/24, 10.4.0.7, or 10.4.0.1-10.4.0.9 (charon writes two dots). Errors: ValueError."""
        first, *rest = re.split(r"\.\.|-", text, maxsplit=1)
        if rest:
            found = cls(ip_address(first.strip()), ip_address(rest[0].strip()))
            if found.start.version != found.end.version or int(found.start) > int(found.end):
                raise ValueError(f"{text!r} is not a range of addresses")
            return found
        net = ip_network(text, strict=False)
        return cls(net.network_address, net.broadcast_address)

    def __contains__(self, address: Address) -> bool:
        return address.version == self.start.version and int(self.start) <= int(address) <= int(self.end)

    def covers(self, other: TrafficSelector) -> bool:
        """Whether all addresses of that selector are in this range."""
        return other.start in self and other.end in self

    def overlaps(self, other: Range) -> bool:
        """Whether some address is in both."""
        return self.start.version == other.start.version and (
            int(self.start) <= int(other.end) and int(other.start) <= int(self.end)
        )

    @property
    def everything(self) -> bool:
        """Whether the range has all addresses of its family."""
        return int(self.start) == 0 and int(self.end) == (1 << self.start.max_prefixlen) - 1

    def __str__(self) -> str:
        return f"{self.start}-{self.end}" if self.start != self.end else str(self.start)


@dataclass(frozen=True, slots=True)
class AllowedSelector:
    """One of a child's `local_ts` or `remote_ts`; `range` None: "dynamic", the host's own address."""

    text: str
    range: Range | None
    protocol: int = 0
    start_port: int = 0
    end_port: int = 65535

    @classmethod
    def parse(cls, text: str, lookup: Lookup) -> AllowedSelector:
        """As charon writes it: 10.3.0.0/24[tcp/http], dynamic[udp], 10.0.0.1..10.0.0.9. Errors: WireError."""
        match = re.fullmatch(r"([^\[]+)(?:\[([^\]/]+)(?:/([^\]]+))?\])?", text.strip())
        try:
            if match is None:
                raise ValueError(text)
            words, protocol = match[1], match[2] or "0"
            number = int(protocol) if protocol.isdigit() else lookup(protocol, "")
            ports = _ports(match[3], number, protocol, lookup)
            return cls(text, None if words == "dynamic" else Range.parse(words), number, *ports)
        except (ValueError, OSError):
            raise WireError(f"charon's traffic selector {text[:60]!r} cannot be read") from None

    def limits(self, other: TrafficSelector) -> bool:
        """Whether the other's protocol and ports are within these."""
        if self.protocol not in (0, other.protocol):
            return False
        if (self.start_port, self.end_port) == (0, 65535):
            return True
        return self.start_port <= other.start_port <= other.end_port <= self.end_port or (
            (self.start_port, self.end_port) == (other.start_port, other.end_port) == (65535, 0)
        )


def _ports(text: str | None, number: int, protocol: str, lookup: Lookup) -> tuple[int, int]:
    """Errors: ValueError, OSError."""
    if text is None:
        return 0, 65535
    if text == "OPAQUE":
        return 65535, 0
    first, dash, last = text.partition("-")
    if not dash and not text[0].isdigit():
        return (lookup(text, protocol),) * 2
    if not all(part[:1].isdigit() for part in ((first, last) if dash else (first,))):
        port = lookup(text, protocol)  # the name of a service may have a dash
        return port, port
    low = _port(first, number)
    return low, _port(last, number) if dash else low


def _port(text: str, protocol: int) -> int:
    """A number; of ICMP the type, with the code in parentheses where there is one."""
    kind, _, code = text.rstrip(")").partition("(")
    return int(kind) << 8 | int(code or 0) if protocol in _ICMP else int(kind)


@dataclass(frozen=True, slots=True)
class AllowedChild:
    """One child of a connection. `rekey`: seconds, 0: it is not rekeyed. `esp`: its proposals, where charon
    reports them."""

    name: str
    modes: frozenset[Mode]
    local_ts: tuple[AllowedSelector, ...]
    remote_ts: tuple[AllowedSelector, ...]
    rekey: int = 0
    esp: tuple[ConfiguredProposal, ...] = ()


@dataclass(frozen=True, slots=True)
class AllowedRound:
    """One authentication round. Empty identities: any is allowed. `eap`: it is an EAP round."""

    id: str = ""
    eap_id: str = ""
    eap: bool = False


@dataclass(frozen=True, slots=True)
class AllowedConnection:
    """A connection of `list-conns`. `rekey`, `reauth`: seconds, 0: never. `ike`: its proposals, where charon
    reports them."""

    name: str
    local: tuple[AllowedRound, ...]
    remote: tuple[AllowedRound, ...]
    children: Mapping[str, AllowedChild]
    rekey: int = 0
    reauth: int = 0
    remote_port: int = 500
    ike: tuple[ConfiguredProposal, ...] = ()

    @classmethod
    def read(cls, name: str, view: View, lookup: Lookup) -> AllowedConnection:
        """Errors: WireError."""
        children = sections(view, "children")
        return cls(
            name,
            _rounds(view, "local"),
            _rounds(view, "remote"),
            {name: _child(name, child, lookup) for name, child in children.items()},
            _number(view, "rekey_time"),
            _number(view, "reauth_time"),
            _number(view, "remote_port") or 500,
            _proposals(view, "proposals"),
        )


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of a connection in ikectx.toml, for properties that charon does not report.

    `local_ids`: identities under which other gateways authenticate to mobile nodes, beside our own.
    `virtual_ips`: virtual IPs that mobile nodes may have; empty: those of charon's pools here. `ike`, `esp`:
    the proposals; empty: those that charon reports, else anything above the floor.
    """

    local_ids: tuple[str, ...] = ()
    virtual_ips: tuple[Range, ...] = ()
    ike: tuple[ConfiguredProposal, ...] = ()
    esp: tuple[ConfiguredProposal, ...] = ()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The addresses around a gateway. `own`: its own; `peers`: those of its peers; `inside`: those it
    protects."""

    own: frozenset[Address] = frozenset()
    peers: frozenset[Address] = frozenset()
    inside: tuple[Range, ...] = field(default=())


def inside_of(connections: Iterable[AllowedConnection]) -> tuple[Range, ...]:
    """The networks behind this gateway, as far as `local_ts` of its connections name them."""
    found: dict[Range, None] = {}
    for connection in connections:
        for child in connection.children.values():
            ranges = (each.range for each in child.local_ts)
            found.update((one, None) for one in ranges if one is not None and not one.everything)
    return tuple(found)


def pool_ranges(pools: Mapping[str, View]) -> Mapping[str, Range]:
    """The addresses of each of charon's pools that has some, from `get-pools`: `size` addresses from `base`
    on. Errors: WireError."""
    found = {}
    for name, pool in sections({"get-pools": pools}, "get-pools").items():
        size = _number(pool, "size")
        try:
            base = ip_address(str(pool.get("base", "")))
        except ValueError:
            raise WireError(f"charon's pool {name!r} has no base address") from None
        if size < 0 or int(base) + size > 1 << base.max_prefixlen:
            raise WireError(f"charon's pool {name!r} has {size} addresses from {base} on")
        if size:
            found[name] = Range(base, base + (size - 1))
    return found


def leased(pools: Mapping[str, View]) -> int:
    """How many addresses of charon's pools mobile nodes have. Errors: WireError."""
    return sum(_number(pool, "online") for pool in sections({"get-pools": pools}, "get-pools").values())


@lru_cache(maxsize=1 << 16)
def _selector(text: str, lookup: Lookup) -> AllowedSelector:
    """Cached, because each SA that comes in needs the same hundreds of selectors that charon reported
    before."""
    return AllowedSelector.parse(text, lookup)


def _child(name: str, view: View, lookup: Lookup) -> AllowedChild:
    local, remote = (
        tuple(_selector(text, lookup) for text in texts(view, key)) for key in ("local-ts", "remote-ts")
    )
    modes = _MODES.get(str(view.get("mode", "")), frozenset())
    rekey, esp = _number(view, "rekey_time"), _proposals(view, "esp_proposals")
    return AllowedChild(name, modes, local, remote, rekey, esp)


def _proposals(view: View, key: str) -> tuple[ConfiguredProposal, ...]:
    """Those that can be read. Without any the floor holds, as with a charon that reports none: another form
    than the known one must not keep all SAs out."""
    told = view.get(key, ())
    found = []
    for text in (told,) if isinstance(told, str) else told:
        with suppress(ValueError):
            found.append(ConfiguredProposal.told(str(text)))
    return tuple(found)


def _rounds(view: View, side: str) -> tuple[AllowedRound, ...]:
    """The rounds of one side; charon numbers them from 1 on in their order."""
    found: list[AllowedRound] = []
    while isinstance(entry := view.get(f"{side}-{len(found) + 1}"), Mapping):
        eap = entry.get("class") == "EAP"
        found.append(AllowedRound(str(entry.get("id", "")), str(entry.get("eap_id", "")), eap))
    return tuple(found)


def _number(view: View, key: str) -> int:
    text = str(view.get(key) or "0")
    try:
        return int(text)
    except ValueError:
        raise WireError(f"charon's {key} is not a number: {text[:40]!r}") from None
