"""`doctor` about relays: whether this host would pass on the packets of a mobile node that stays here."""

from __future__ import annotations

from collections.abc import Iterator

from .findings import Outcome
from .world import World


def relay(world: World) -> Iterator[Outcome]:
    """Forwarding, and chains of the firewall that drop what they do not know."""
    versions = sorted({address.version for address in world.config.gateway.addresses})
    off = [version for version in versions if not world.forwards(version)]
    names = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}
    if off:
        which = " and ".join(f"IPv{version}" for version in off)
        yield (
            "warn",
            f"this host does not forward {which}: mobile nodes behind a NAT cannot move",
            "; ".join(f"sysctl -w {names[version]}=1" for version in off),
        )
        return
    drops = world.forward_drops()
    if drops is None:
        yield "note", "whether the firewall would let relayed packets through is not known"
    elif drops:
        yield (
            "note",
            f"the firewall drops what it does not know when it is forwarded ({', '.join(drops)})",
            "let IKE and ESP pass there between mobile nodes and the other gateways' outer addresses, both "
            "ways (UDP 500 and 4500, protocol 50): relayed mobile nodes need that, and connection tracking "
            "does not see these packets",
        )
    else:
        yield "ok", "packets of mobile nodes behind a NAT can be passed on"
