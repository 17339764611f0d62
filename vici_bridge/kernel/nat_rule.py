"""`NatRule`: one mobile node that this gateway stands in for, and what that means for nftables. Pure.

`nat_relay` puts it into the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from ikectx.sa.context import Address, Endpoint

HEADS = {4: "ip", 6: "ip6"}
"""Header by IP version, in the language of nft."""


@dataclass(frozen=True, slots=True)
class NatRule:
    """One mobile node. `mn`: its address and port as this gateway sees them.

    `ours`: the address and port that it sends to. `port`: the UDP port here that stands for it. `to`: the
    address of the gateway that serves it. `plain`: its ESP is not in UDP; `spis`: those that it receives (4
    octets each). `esp`: whether the ESP that it sends is passed on, too, or only its IKE. `alone`: no other
    mobile node of ours has plain ESP at that gateway.
    """

    mn: Endpoint
    ours: Endpoint
    port: int
    to: Address
    spis: tuple[bytes, ...] = ()
    plain: bool = False
    esp: bool = True
    alone: bool = False


def rule_to_json(rule: NatRule) -> dict[str, Any]:
    """The stored form of a relay."""
    return {
        "mn": [str(rule.mn.address), rule.mn.port],
        "ours": [str(rule.ours.address), rule.ours.port],
        "port": rule.port,
        "to": str(rule.to),
        "spis": [spi.hex() for spi in rule.spis],
        "plain": rule.plain,
    }


def rule_from_json(found: Any) -> NatRule:
    """Read that. Errors: KeyError, TypeError, ValueError."""
    mn, ours = (Endpoint(ip_address(address), int(port)) for address, port in (found["mn"], found["ours"]))
    spis = tuple(bytes.fromhex(spi) for spi in found["spis"])
    return NatRule(mn, ours, int(found["port"]), ip_address(found["to"]), spis, bool(found["plain"]))


def maps() -> dict[str, str]:
    """All maps: what each one leads from and to."""
    found = {}
    for version, head in HEADS.items():
        both, source = f"{head} saddr . {head} daddr", f"{head} saddr . udp sport . {head} daddr"
        for name, kind in (
            ("ike", f"{source} : {head} daddr"),
            ("esp", f"{source} : {head} daddr"),
            ("port", f"{source} : udp sport"),
            ("from", f"{source} : {head} saddr"),
            ("back", f"{head} saddr . udp dport . {head} daddr : {head} daddr"),
            ("toport", f"{head} saddr . udp dport : udp dport"),
            ("as", f"{head} saddr . {head} daddr . udp dport : {head} saddr"),
            ("plain", f"{both} : {head} daddr"),
            ("plainfrom", f"{both} : {head} saddr"),
            ("plainback", f"{head} saddr . @th,0,32 . {head} daddr : {head} daddr"),
            ("plainone", f"{both} : {head} daddr"),
            ("plainas", f"{both} : {head} saddr"),
        ):
            found[f"{name}{version}"] = kind
    return found


def difference(
    there: Mapping[tuple[str, bytes], bytes], after: Mapping[tuple[str, bytes], bytes]
) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes, bytes]]]:
    """The elements to remove, and those to add."""
    gone = [place for place in there if after.get(place) != there[place]]
    come = [(name, key, data) for (name, key), data in after.items() if there.get((name, key)) != data]
    return gone, come


def elements(rules: Iterable[NatRule]) -> dict[tuple[str, bytes], bytes]:
    """The elements of these rules: value by map and key, as in a packet, each part filled up to 4 octets."""
    found: dict[tuple[str, bytes], bytes] = {}
    for rule in rules:
        version = rule.mn.address.version
        mn, ours, to = (address.packed for address in (rule.mn.address, rule.ours.address, rule.to))
        mn_port, port = (number.to_bytes(2) for number in (rule.mn.port, rule.port))

        def put(name: str, *key: bytes, data: bytes, version: int = version) -> None:
            filled = b"".join(part + bytes(-len(part) % 4) for part in key)
            found[f"{name}{version}", filled] = data

        put("ike", mn, mn_port, ours, data=to)
        put("port", mn, mn_port, to, data=port)
        put("from", mn, port, to, data=ours)
        put("back", to, port, ours, data=mn)
        put("toport", to, port, data=mn_port)
        put("as", to, mn, mn_port, data=ours)
        if not rule.plain and rule.esp:
            put("esp", mn, mn_port, ours, data=to)
        if rule.plain:
            put("plainas", to, mn, data=ours)
            for spi in rule.spis:
                put("plainback", to, spi, ours, data=mn)
            if rule.alone:
                put("plainone", to, ours, data=mn)
            if rule.esp:
                put("plain", mn, ours, data=to)
                put("plainfrom", mn, to, data=ours)
    return found
