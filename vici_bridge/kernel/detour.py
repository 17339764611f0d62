"""`Detour`: routes packets for a mobile node that left on to the gateway that serves it now. I/O.

The routes are in the kernel's table `local`, which is consulted before all others, also before strongSwan's.
They have a protocol number and metrics of their own, so that no other route is touched, and all of ours can
be found and removed. A table of our own would serve the packets as well, but charon (5.9.8 to 6.1.0,
kernel-netlink) looks for the best path of each of its IKE_SAs whenever a route changes in any table but
`local` and its own: with a thousand SAs, moving one would cost a thousand look-ups.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from ikectx.errors import KernelError
from ikectx.sa.context import Address

from . import routes
from .netlink import ROUTE, Netlink
from .netlink_parts import CREATE, DUMP, REPLACE
from .routes import GETROUTE, LOCAL, UNICAST, UNREACHABLE, KernelRoute, text_of
from .xfrm_parts import INET, INET6, Network, XfrmRequest, family_of

log = logging.getLogger(__name__)

TABLE = 255
"""RT_TABLE_LOCAL."""
PROTOCOL = 91
"""Protocol number of our routes; Linux leaves numbers from 5 on to routing daemons."""

_STIRRED, _LINK = 4068, 253
"""The table of a route that is for charon's eyes only (`stir`), and its scope, RT_SCOPE_LINK."""
_NOBODY: dict[int, Address] = {4: IPv4Address("192.0.2.255"), 6: IPv6Address("2001:db8::ffff")}
_METRIC = 1024
"""Metric of our routes: behind the kernel's own for an address of this host, which has 0."""
_BEHIND = 1 << 20
"""Metric of the unreachable routes: behind every route that leads somewhere."""


class Detour:
    """Routes by way of another gateway, in the network namespace this object was made in.

    Calls take some 100 us; threads may share it. Routes stay when the agent ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._route = Netlink(ROUTE, "routes")

    def close(self) -> None:
        self._route.close()

    @property
    def port(self) -> int:
        """The netlink port by which routes are changed here."""
        return self._route.port

    def add(
        self,
        prefixes: Iterable[str | Network],
        via: Sequence[Address],
        inside: Collection[Network] = (),
    ) -> list[Network]:
        """KernelRoute `prefixes` by way of the first of `via` of the same family; IPv4 also over IPv6.

        Packets of this host itself keep the source that they have at present, if it is in one of the networks
        `inside`: with another one the SA would not protect them at the other gateway.

        Returns those left out, each with a line in the log: a prefix of length 0 (all packets would be sent
        there), one that contains the gateway itself, one without a gateway of a fitting family. Idempotent.
        Errors: KernelError (the gateway's inner address is not reachable, for one).
        """
        skipped: list[Network] = []
        wanted: list[XfrmRequest] = []
        nets = list(map(_network, prefixes))
        for prefix, own in zip(nets, self._sources(nets, inside), strict=True):
            gateway = _gateway(prefix, via)
            why = _unfit(prefix, gateway)
            if why or gateway is None:
                log.warning("packets for %s are not sent on to another gateway: %s", prefix, why)
                skipped.append(prefix)
                continue
            wanted.append(_route_request(routes.NEWROUTE, prefix, gateway, own=own))
        self._make(wanted)
        return skipped

    def _sources(self, prefixes: Sequence[Network], inside: Collection[Network]) -> Sequence[Address | None]:
        """The source of this host's own packets for each of these prefixes, where it is `inside`."""
        if not inside:
            return [None] * len(prefixes)
        ways = self._ways([prefix.network_address for prefix in prefixes])
        found = [None if way is None else way.own for way in ways]
        # Linux keeps routes whose source is no address of this host any more, and refuses new ones
        fit = {own for own in found if own is not None and any(own in net for net in inside)}
        here = {own for own, way in zip(fit, self._ways(list(fit)), strict=True) if way and way.kind == LOCAL}
        return [own if own in here else None for own in found]

    def _ways(self, to: Sequence[Address]) -> list[KernelRoute | None]:
        outcomes = self._route.transact([_way_request(address) for address in to])
        return [KernelRoute.parse(one.answers[0]) if one.answers else None for one in outcomes]

    def remove(self, prefixes: Iterable[str | Network]) -> None:
        """Undo `add` for these prefixes, whatever their gateway. Idempotent. Errors: KernelError."""
        wanted = [prefix for prefix in map(_network, prefixes) if prefix.prefixlen]
        with self._lock:
            self._delete(wanted)

    def shut(self, prefixes: Iterable[str | Network]) -> list[Network]:
        """Make `prefixes` unreachable if `add` leads them nowhere. Returns those left out: all addresses.

        Idempotent. Errors: KernelError.
        """
        wanted = list(map(_network, prefixes))
        skipped = [prefix for prefix in wanted if not prefix.prefixlen]
        for prefix in skipped:
            log.warning("packets for %s may leave in the clear: a block for them would block all", prefix)
        kept = [prefix for prefix in wanted if prefix.prefixlen]
        self._make([_route_request(routes.NEWROUTE, prefix, None, shut=True) for prefix in kept])
        return skipped

    def open_up(self, prefixes: Iterable[str | Network]) -> None:
        """Undo `shut` for these prefixes. Idempotent. Errors: KernelError."""
        wanted = [prefix for prefix in map(_network, prefixes) if prefix.prefixlen]
        with self._lock:
            self._delete(wanted, shut=True)

    def listing(self, *, shut: bool = False) -> list[Network]:
        """All prefixes that are sent on, or those that are shut. Errors: KernelError."""
        with self._lock:
            return self._listing(shut=shut)

    def device_to(self, prefix: str | Network, via: Sequence[Address]) -> int:
        """Index of the device by which `add` would send packets for `prefix` on; 0: there is no way."""
        gateway = _gateway(_network(prefix), via)
        if gateway is None or _unfit(_network(prefix), gateway):
            return 0
        device, direct = self._way_to(gateway)
        return device if direct else 0

    def device_now(self, prefix: str | Network) -> int:
        """Index of the device by which packets for `prefix` leave at present; 0: there is no way."""
        return self._way_to(_network(prefix).network_address)[0]

    def device_name(self, destination: Address, source: Address) -> str:
        """The device by which packets between these two leave at present; empty: there is no way."""
        _, device = way_to(self._route, source, destination)
        try:
            return socket.if_indextoname(device) if device else ""
        except OSError:  # it went away just now
            return ""

    def is_here(self, address: Address) -> bool:
        """Whether an address is one of this host. Errors: KernelError."""
        return is_local(self._route, address)

    def stir(self, towards: Address) -> None:
        """Have charon look for the best path of each of its IKE_SAs (`stir`). Errors: KernelError."""
        stir(self._route, self._way_to(towards)[0], towards.version)

    def _way_to(self, address: Address) -> tuple[int, bool]:
        """The device towards an address, and whether it is on that link itself."""
        way = ask_way(self._route, address)
        if way is None or way.kind != UNICAST:
            return 0, False
        return way.device, way.gateway is None

    def _make(self, wanted: Sequence[XfrmRequest]) -> None:
        with self._lock:
            self._route.attempt(wanted, errno.EEXIST)

    def _delete(self, prefixes: Sequence[Network], *, shut: bool = False) -> None:
        requests = [_route_request(routes.DELROUTE, prefix, None, shut=shut) for prefix in prefixes]
        self._route.attempt(requests, errno.ESRCH)

    def _listing(self, *, shut: bool = False) -> list[Network]:
        found: list[Network] = []
        for route in own_routes(self._route, UNREACHABLE if shut else UNICAST, "list the detours"):
            # a route for everything has no destination in the kernel's answer
            everything = "0.0.0.0" if route.family == INET else "::"  # noqa: S104
            found.append(_network(f"{route.destination or everything}/{route.length}"))
        return found


def own_routes(link: Netlink, kind: int, what: str) -> list[KernelRoute]:
    """The agent's routes of that kind, of both IP versions. Errors: KernelError."""
    found: list[KernelRoute] = []
    for family in (INET, INET6):
        asked = KernelRoute(family, table=TABLE, maker=PROTOCOL)
        try:
            answers = link.ask(asked.request(GETROUTE, DUMP, what))
        except KernelError as error:
            # the answer of strict listings if the table was never made, or there is no IPv6
            if error.errno in (errno.ENOENT, errno.EAFNOSUPPORT):
                continue
            raise
        every = map(KernelRoute.parse, answers)
        ours = (TABLE, PROTOCOL, family, kind)
        found += [one for one in every if (one.table, one.maker, one.family, one.kind) == ours]
    return found


def _route_request(
    number: int, prefix: Network, gateway: Address | None, *, shut: bool = False, own: Address | None = None
) -> XfrmRequest:
    new = number == routes.NEWROUTE
    where = "nowhere" if gateway is None else f"via {text_of(gateway)}"
    what = f"route {prefix} {where}" if new else f"remove the route to {prefix}"
    route = KernelRoute(
        _family(prefix),
        prefix.network_address,
        prefix.prefixlen,
        gateway=gateway,
        metric=_BEHIND if shut else _METRIC,
        table=TABLE,
        maker=PROTOCOL,
        scope=0 if new else 255,  # RT_SCOPE_NOWHERE: whatever its scope is
        kind=UNREACHABLE if shut else UNICAST,
        own=own,
    )
    return route.request(number, CREATE | REPLACE if new else 0, what)


def ask_way(route: Netlink, destination: Address, source: Address | None = None) -> KernelRoute | None:
    """The way that packets between these two take at present, None: there is none. Errors: KernelError."""
    outcome = route.transact([_way_request(destination, source)])[0]
    return KernelRoute.parse(outcome.answers[0]) if outcome.answers else None


@lru_cache(maxsize=1 << 10)
def _way_request(destination: Address, source: Address | None = None) -> XfrmRequest:
    wanted = KernelRoute(family_of(destination), destination, destination.max_prefixlen, source)
    return wanted.request(GETROUTE, 0, f"find the way to {destination}")


def is_local(route: Netlink, address: Address) -> bool:
    """Whether `address` is one of this host. Errors: KernelError where the kernel cannot be asked."""
    way = ask_way(route, address)
    return way is not None and way.kind == LOCAL


def way_to(route: Netlink, source: Address, destination: Address) -> tuple[bool, int]:
    """Whether packets between these two stay on this host, and the device they leave by (0: no way there).

    Errors: KernelError.
    """
    way = ask_way(route, destination, source)
    return (False, 0) if way is None else (way.kind == LOCAL, way.device)


def stir(link: Netlink, device: int, version: int) -> None:
    """Have charon look for the best path of each of its IKE_SAs, as it does when a route changes.

    The route that comes and goes is in a table that no rule leads to, for an address of no host (RFC 5737,
    RFC 3849), by a device of which charon has an SA: charon (5.9.8 to 6.0.6, kernel-netlink) heeds routes by
    devices that it uses, in any table but two. `device`: 0, there is no way; charon looks when there is one.
    Errors: KernelError.
    """
    nobody = _NOBODY[version]
    for number, flags, scope in ((routes.NEWROUTE, CREATE | REPLACE, _LINK), (routes.DELROUTE, 0, 255)):
        route = KernelRoute(
            family_of(nobody),
            nobody,
            nobody.max_prefixlen,
            device=device,
            metric=_METRIC,
            table=_STIRRED,
            maker=PROTOCOL,
            scope=scope,
            kind=UNICAST,
        )
        request = route.request(number, flags, "have charon look for its ways")
        if device:
            link.attempt([request], errno.ESRCH)


@lru_cache(maxsize=1 << 12)
def _network(prefix: str | Network) -> Network:
    """Cached, because the prefixes of an SA that leaves come here several times."""
    return ip_network(prefix, strict=False) if isinstance(prefix, str) else prefix


def _family(prefix: Network) -> int:
    return INET if isinstance(prefix, IPv4Network) else INET6


def _gateway(prefix: Network, gateways: Sequence[Address]) -> Address | None:
    same = next((gateway for gateway in gateways if family_of(gateway) == _family(prefix)), None)
    if same is None and isinstance(prefix, IPv4Network):
        return next((gateway for gateway in gateways if not isinstance(gateway, IPv4Address)), None)
    return same


def _unfit(prefix: IPv4Network | IPv6Network, gateway: Address | None) -> str:
    if prefix.prefixlen == 0:
        return "that would be everything"
    if gateway is None:
        return "no inner address of its family is known for that gateway"
    if gateway in prefix:
        return f"the gateway {gateway} is inside"
    return ""
