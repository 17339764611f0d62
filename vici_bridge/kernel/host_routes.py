"""`HostRoutes`: addresses that are this host's only by a route of the agent's in the table `local`. I/O."""

from __future__ import annotations

import errno

from ikectx.sa.context import Address

from . import routes
from .detour import PROTOCOL, TABLE, ask_way, is_local, own_routes
from .netlink import ROUTE, Netlink
from .netlink_parts import CREATE, DUMP, REPLACE
from .routes import GETROUTE, LOCAL, KernelRoute
from .xfrm_parts import XfrmRequest, family_of

_METRIC = 1024
"""Behind the kernel's own route for an address of this host, which has 0."""
_HOST, _NOWHERE = 254, 255
"""Scopes (linux/rtnetlink.h): of an address of this host, and whichever it is."""
_LOOPBACK = 1
"""Index of `lo`, in each network namespace."""


class HostRoutes:
    """In the network namespace that this object was made in. Routes stay when the agent ends. Errors:
    KernelError."""

    def __init__(self) -> None:
        self._route = Netlink(ROUTE, "routes")

    def close(self) -> None:
        self._route.close()

    def is_own(self, address: Address) -> bool:
        """Whether the address is one of this host, for whichever reason."""
        return is_local(self._route, address)

    def is_neighbours(self, address: Address) -> bool:
        """Whether the address belongs to a link of this host, so that somebody else there may have it."""
        way = ask_way(self._route, address)
        return way is not None and way.gateway is None

    def device_of(self, address: Address) -> int:
        """Index of the device that has the address; 0: none has it."""
        asked = KernelRoute(family_of(address), table=TABLE)
        for answer in self._route.ask(asked.request(GETROUTE, DUMP, "look for an address")):
            route = KernelRoute.parse(answer)
            if (route.table, route.kind, route.destination) == (TABLE, LOCAL, address):
                return route.device
        return 0

    def add(self, address: Address, device: int = _LOOPBACK) -> None:
        """Make it one of this host. If `device` loses the address then, routes that have it as their source
        stay (Linux, fib_del_ifaddr)."""
        self._route.ask(_request(routes.NEWROUTE, address, device))

    def remove(self, address: Address, device: int = _LOOPBACK) -> None:
        """Undo `add`. Idempotent."""
        self._route.attempt([_request(routes.DELROUTE, address, device)], errno.ESRCH)

    def clear(self) -> None:
        """Undo each `add`, also of an agent before this one."""
        for route in own_routes(self._route, LOCAL, "list addresses of the agent's"):
            if route.destination is not None:
                self.remove(route.destination, route.device)


def _request(number: int, address: Address, device: int) -> XfrmRequest:
    new = number == routes.NEWROUTE
    route = KernelRoute(
        family_of(address),
        address,
        address.max_prefixlen,
        device=device,
        metric=_METRIC,
        table=TABLE,
        maker=PROTOCOL,
        scope=_HOST if new else _NOWHERE,
        kind=LOCAL,
    )
    what = f"{'make' if new else 'end making'} {address} an address of this host"
    return route.request(number, CREATE | REPLACE if new else 0, what)
