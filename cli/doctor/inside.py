"""`doctor` on the inside: the way of packets for a mobile node that has moved, and the use of its address.

Its inner address is still routed to the gateway that it has left. That gateway sends its packets on to the
other one's inner address (`forward_via`), which the kernel can do only for an address on a network that both
are on. Without that address the network inside has to follow by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..config import PeerSection
from ..leases import ADVICE, used
from .findings import Outcome
from .world import World

SECTION = "see `How the network inside follows` in the README"


def inside(world: World) -> Iterator[Outcome]:
    """Each peer's `forward_via`; for peers without one, whether scripts announce the way to the network."""
    outer = {world.device_of(str(address)) for address in world.config.gateway.addresses} - {""}
    for peer in world.config.peers:
        yield from _ways(world, peer, outer) if peer.forward_via else _no_way(world, peer)


def _no_way(world: World, peer: PeerSection) -> Iterator[Outcome]:
    ours = world.config.connections
    announced = sorted(name for name, conn in ours.items() if conn.announces)
    names = sorted({str(conn.get("name")) for conn in world.charon("conns")} - set(announced))
    if not names:
        yield "ok", f"{peer.name} has no forward_via, and the scripts of {', '.join(announced)} announce"
        return
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    yield (
        "warn",
        f"{peer.name} has no forward_via: SAs of {shown} are not moved there, since packets for their mobile "
        "nodes would be dropped here",
        f'write the inner address of {peer.name} in its [[peer]], forward_via = ["…"]; or, where an updown '
        "script has the network inside follow, announces = true in [connections.NAME]; or move with "
        f"--no-detour: {SECTION}",
    )


def _ways(world: World, peer: PeerSection, outer: set[str]) -> Iterator[Outcome]:
    for address in peer.forward_via:
        key, way = f"{peer.name}: forward_via {address}", world.way_to(address)
        if way.local:
            yield "fail", f"{key} is an address of this gateway", f"write the inner address of {peer.name}"
        elif not way.direct:
            why = "is behind a router" if way.device else "cannot be reached: no route leads there"
            yield (
                "fail",
                f"{key} {why}",
                "a detour needs an address on a network that both gateways are on (a tunnel will do)",
            )
        elif way.device in outer:
            yield (
                "warn",
                f"{key} is reached by {way.device}, where mobile nodes come from: packets for those that "
                "moved go there in the clear",
                "name an address on a network that only gateways and servers are on",
            )
        elif (there := world.is_there(address)) is None:
            yield "note", f"{key} did not answer, and may be there all the same (ICMP filtered?)"
        elif there and address.version == 4 and world.redirects(way.device):
            yield (
                "warn",
                f"{key} answers by {way.device}, where this host sends ICMP redirects: servers whose packets "
                f"take the detour send to {peer.name} for minutes, even for mobile nodes that are here again",
                f"sysctl -w net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.{way.device}.send_redirects=0",
            )
        elif there:
            yield "ok", f"{key} answers by {way.device}"
        else:
            yield (
                "fail",
                f"{key} does not answer: packets for mobile nodes that moved there would be lost",
                f"is {peer.name} up, and its inner interface? is the address right?",
            )


def pools(world: World) -> Iterator[Outcome]:
    """Pools in which charon will soon assign addresses again that mobile nodes have taken along."""
    for name, pool in world.charon("pools").items():
        given, size = used(pool)
        found = f"pool {name} (from {pool.get('base', '?')}): {given} of {size} addresses were given out"
        if given >= size:
            yield (
                "warn",
                f"{found}: the next mobile node may get one that another still uses elsewhere",
                ADVICE,
            )
        elif given * 4 >= size * 3:
            yield "note", found, ADVICE
        else:
            yield "ok", found
