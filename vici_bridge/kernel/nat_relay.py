"""`NatRelay`: this gateway stands in for a mobile node's NAT, for an SA that another gateway serves. I/O.

The mobile node goes on sending IKE and ESP to this gateway's address, and the gateway that serves its SA
takes this gateway for the mobile node's NAT: packets that the mobile node sends here leave for the other
gateway from an address and port of this one, and those that come back to that port leave for the mobile node
from the address that it knows. nftables rewrites them without state, and charon here is not involved.

The destination is rewritten in prerouting, before conntrack, and the source in postrouting, because a source
of this host's own would be refused by the look-up of routes between the two (as a martian).

- IKE and ESP in UDP are known by the mobile node's address and port, so that rekeys of its SAs change
  nothing, and on the way back by a port of this gateway, one for each mobile node. The exchanges that begin
  an IKE_SA (RFC 7296, 1.2) are not passed on, because with them the mobile node asks for an SA with this
  gateway.
  The SPIs of that ESP are noted. ESP under one of them that comes from another place is noted as well,
  because a NAT may give its mobile node another port at any time (`strangers`), and is not passed on.
- ESP without UDP is known by the mobile node's address, and on the way back by its SPI, or, if the other
  gateway serves only one such mobile node of ours, by that gateway's address.

RFC 7296, 3.1 (exchange types); RFC 3948, 2.1 and 2.2 (in UDP); RFC 4303, 2.1.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from ikectx.errors import KernelError
from ikectx.sa.context import Address, Endpoint

from .nat_rule import HEADS, NatRule, difference, elements, maps
from .nftables import NftTable, run_nft

TABLE = "ikectx_nat"
_PRE, _POST = "pre", "post"
_PRE_RULES, _POST_RULES = 18, 10
_DONE = "counter notrack accept"
_LATER = "36, 37, 44"
"""CREATE_CHILD_SA, INFORMATIONAL, IKE_FOLLOWUP_KE: exchanges of an IKE_SA that is there."""
_SPI = "@th,64,32"
"""That of ESP in UDP."""
_SIZES = {4: 4, 6: 16}
"""Octets of an address by IP version."""
_NOTED, _STRANGERS, _ANSWERED = 16384, 256, "answered"
"""SPIs, also as many ports, and strangers that are noted, at most; the set of these ports."""


@dataclass(frozen=True, slots=True)
class Stranger:
    """ESP in UDP has come from `mn` to this gateway's address `ours`, a place that is not passed on, under
    `spi`, which has been used from the places `known`, each with the gateway that it was passed on to."""

    mn: Endpoint
    ours: Endpoint
    spi: bytes
    known: tuple[tuple[Endpoint, Address], ...]


class NatRelay:
    """The relays in the network namespace in which its calls run; they outlive the agent.

    For any thread. The first call that adds one runs `nft` (some 20 ms). Errors: KernelError.
    """

    def __init__(self, ports: Sequence[int] = (500, 4500)) -> None:
        """ports: charon.port and charon.port_nat_t."""
        self._plain, self._marked = ports
        self._lock = threading.Lock()
        self._table = NftTable(TABLE)

    @property
    def port(self) -> int:
        """The netlink port by which it changes the table: its own changes are no news."""
        with self._lock:
            return self._table.port

    def close(self) -> None:
        """Stop; the relays go on."""
        with self._lock:
            self._table.close()

    def change(self, old: Iterable[NatRule], new: Iterable[NatRule]) -> None:
        """From the elements of `old`, as far as they are there, to those of `new`, in one transaction."""
        before, after = elements(old), elements(new)
        with self._lock:
            if after and not self._stands():
                self._build()
            there = {
                (name, key): element.data
                for name, key in {**before, **after}
                for element in self._table.elements(name, key)
                if element.key == key
            }
            self._change(there, after)

    def set(self, rules: Iterable[NatRule]) -> None:
        """Have exactly these relays, whatever an agent before this one left; those that stay never stop."""
        after = elements(rules)
        with self._lock:
            if not after:
                self._table.drop()
                return
            if not self._stands():
                self._build()
            there = {
                (name, element.key): element.data for name in maps() for element in self._table.elements(name)
            }
            self._change(there, after)

    def _change(
        self, there: Mapping[tuple[str, bytes], bytes], after: Mapping[tuple[str, bytes], bytes]
    ) -> None:
        """Change the maps, then forget what was heard from places that are passed on no more."""
        gone, come = difference(there, after)
        self._table.change(gone, come)
        over = {(name, key) for name, key in gone if (name, key) not in after}
        ports = {key[-4:-2] for name, key in over if name.startswith("toport")}
        if ports:
            self._forget(_ANSWERED, {key for key in self._held(_ANSWERED) if key[:2] in ports})
        for version, size in _SIZES.items():
            # the place, and the gateway that its ESP was passed on to
            ended = {key[: size + 4] + there[name, key] for name, key in over if name == f"esp{version}"}
            if not ended:
                continue
            heard = self._held(f"heard{version}")
            past = {key for key in heard if key[:-4] in ended}
            spis = {key[-4:] for key in past} - {key[-4:] for key in heard if key not in past}
            self._forget(f"heard{version}", past)
            self._forget(f"spis{version}", self._held(f"spis{version}") & spis if spis else ())
            self._forget(f"strange{version}", self._held(f"strange{version}"))

    def _held(self, name: str) -> frozenset[bytes]:
        return frozenset(element.key for element in self._table.elements(name))

    def _forget(self, name: str, keys: Collection[bytes]) -> None:
        """Remove keys that were in the set just now: one that is not costs the kernel ten milliseconds."""
        if keys:
            self._table.remove([name], sorted(keys))

    def strangers(self) -> list[Stranger]:
        """Those that came since this was asked last; some, if there were many."""
        found = []
        with self._lock:
            for version in _SIZES:
                name = f"strange{version}"
                keys = [element.key for element in self._table.elements(name)]
                if not keys:
                    continue
                self._table.remove([name], keys)
                known: dict[bytes, list[bytes]] = {key[-4:]: [] for key in keys}
                for element in self._table.elements(f"heard{version}"):
                    if (places := known.get(element.key[-4:])) is not None:
                        places.append(element.key)
                for key in keys:
                    (mn, ours), spi = places_of(key), key[-4:]
                    seen = tuple(map(places_of, known[spi]))
                    found.append(Stranger(mn, Endpoint(ours, self._marked), spi, seen))
        return found

    def answered(self) -> Collection[int]:
        """The ports to which the other gateways have sent within five minutes: they have authenticated who is
        behind these."""
        with self._lock:
            return {int.from_bytes(element.key[:2]) for element in self._table.elements(_ANSWERED)}

    def _stands(self) -> bool:
        return self._table.rules(_PRE, _POST) == [_PRE_RULES, _POST_RULES]

    def _build(self) -> None:
        table = f"inet {TABLE}"
        lines = [f"add table {table}"]
        lines += [f"add map {table} {name} {{ typeof {kind}; }}" for name, kind in maps().items()]
        for version, head in HEADS.items():
            place = f"{head} saddr . udp sport . {head} daddr . {_SPI}"
            for name, key, size, timeout in (
                (f"heard{version}", place, _NOTED, "1h"),
                (f"spis{version}", _SPI, _NOTED, "1h"),
                (f"strange{version}", place, _STRANGERS, "1m"),
            ):
                lines.append(
                    f"add set {table} {name} {{ typeof {key}; flags dynamic,timeout; size {size}; "
                    f"timeout {timeout}; }}"
                )
        lines += [
            f"add set {table} {_ANSWERED} {{ typeof udp dport; flags dynamic,timeout; size {_NOTED}; "
            "timeout 5m; }",
            # before conntrack, which must not take such a packet for a connection of its own
            f"add chain {table} {_PRE} {{ type filter hook prerouting priority -310; policy accept; }}",
            f"add chain {table} {_POST} {{ type filter hook postrouting priority 310; policy accept; }}",
            f"flush chain {table} {_PRE}",
            f"flush chain {table} {_POST}",
        ]
        ports, heeded = f"{{ {self._plain}, {self._marked} }}", f"update @{_ANSWERED} {{ udp dport }}"
        for version, head in HEADS.items():
            pre, post = (f"add rule {table} {chain}" for chain in (_PRE, _POST))
            both, source = f"{head} saddr . {head} daddr", f"{head} saddr . udp sport . {head} daddr"
            place = f"{source} . {_SPI}"
            onward = f"{head} daddr set {source} map"
            lines += [
                f"{pre} udp dport {self._plain} @th,208,8 {{ {_LATER} }} {onward} @ike{version} {_DONE}",
                f"{pre} udp dport {self._marked} @th,64,32 0 @th,240,8 {{ {_LATER} }} "
                f"{onward} @ike{version} {_DONE}",
                # where a set is full the packet goes on all the same
                f"{pre} udp dport {self._marked} {_SPI} != 0 {onward} @esp{version} counter notrack "
                f"update @heard{version} {{ {place} }} update @spis{version} {{ {_SPI} }} accept",
                f"{pre} udp dport {self._marked} {_SPI} @spis{version} "
                f"update @strange{version} {{ {place} }}",
                f"{pre} meta l4proto esp {head} daddr set {both} map @plain{version} {_DONE}",
                f"{pre} meta l4proto esp {head} daddr set {head} saddr . @th,0,32 . {head} daddr "
                f"map @plainback{version} {_DONE}",
                f"{pre} meta l4proto esp {head} daddr set {both} map @plainone{version} {_DONE}",
                f"{post} udp sport {ports} {head} saddr set "
                f"{head} saddr . {head} daddr . udp dport map @as{version} accept",
                f"{post} meta l4proto esp {head} saddr set {both} map @plainfrom{version} accept",
                f"{post} meta l4proto esp {head} saddr set {both} map @plainas{version} accept",
            ]
            # ESP in UDP may have no checksum (RFC 3948, 2.1), and the kernel would make a wrong one of none
            for test, then in (("udp checksum 0 ", "udp checksum set 0 "), ("", "")):
                lines += [
                    f"{pre} udp sport {ports} {test}{head} daddr set "
                    f"{head} saddr . udp dport . {head} daddr map @back{version} "
                    f"{heeded} udp dport set {head} saddr . udp dport map @toport{version} {then}{_DONE}",
                    # the port first, because the second map is asked for what is in the packet by then
                    f"{post} udp dport {ports} {test}udp sport set {source} map @port{version} "
                    f"{head} saddr set {source} map @from{version} {then}accept",
                ]
        run_nft("\n".join(lines) + "\n")


def places_of(key: bytes) -> tuple[Endpoint, Address]:
    """The source and the destination in saddr . sport . daddr . SPI, as a set has them. Errors:
    KernelError."""
    size = (len(key) - 8) // 2
    if size not in _SIZES.values() or len(key) % 2:
        raise KernelError(
            f"nftables' table inet {TABLE} holds something that is not ours",
            hint=f"look at `nft list table inet {TABLE}`",
        )
    source, port, destination = key[:size], key[size : size + 2], key[size + 4 : 2 * size + 4]
    return Endpoint(ip_address(source), int.from_bytes(port)), ip_address(destination)


def forwards_packets(version: int) -> bool:
    """Whether this host forwards packets of that IP version. Reads /proc."""
    name = "ipv4/ip_forward" if version == 4 else "ipv6/conf/all/forwarding"
    try:
        return Path(f"/proc/sys/net/{name}").read_text().strip() != "0"
    except OSError:
        return False
