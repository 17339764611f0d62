"""Whom a handover is about: the SA that moves, this host, and where the gateways take CTARs. I/O."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Protocol

from ikectx.errors import LinkError, UnknownSaError
from ikectx.node.mobility import Router
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.sa.name import SaName
from vici_bridge.vici.views import SaView

from .node import GatewayEntry, MobileNode


class Outside(Protocol):
    """The host's functions that a handover needs: its SAs and its addresses (`CharonHost`,
    `OuterAddresses`)."""

    async def views(self) -> list[SaView]: ...

    def known(self) -> list[SaView] | None:
        """The same without asking charon; None: it must be asked."""

    def changed(self) -> None:
        """charon's SAs have been changed from here, of which charon reports nothing."""

    def has(self, address: Address) -> bool:
        """Whether this host has the address."""

    def addresses(self) -> list[Address]:
        """The host's addresses that packets to other networks may come from. Errors: KernelError."""

    def towards(
        self, remote: Address, *, avoid: Sequence[Address] = (), among: Sequence[Address] = ()
    ) -> Address | None: ...

    def nudge(self, remote: Address) -> None: ...


def inner_addresses(outside: Outside, context: IkeContext) -> tuple[Address, ...]:
    """The host's addresses that are reached through the SA: its virtual IPs, and those of its own networks
    in a traffic selector, unless the outer address is in that, too. A new place has another one; Linux takes
    one of these for packets to a gateway, though, while a link has a route and no address yet. Errors:
    KernelError."""
    outer = context.local.address
    ranges = [(ts.start, ts.end) for child in context.children for ts in child.local_ts]
    own = [ends for ends in ranges if not _within(outer, *ends)]
    found = [one for one in outside.addresses() if any(_within(one, *ends) for ends in own)]
    return (*context.local_vips, *found)


def _within(address: Address, start: Address, end: Address) -> bool:
    return address.version == start.version and int(start) <= int(address) <= int(end)


class Routers:
    """The gateways for CXTP. Names are kept, because at a new place the name server may be out of reach, as
    one behind the tunnel is, or take seconds to say nothing."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], Router] = {}

    async def of(self, gateway: GatewayEntry, version: int) -> Router:
        """The gateway, preferably by that IP version, as it is known. Errors: LinkError for an unknown
        name."""
        return self._known.get((gateway.name, version)) or await self.anew(gateway, version)

    async def anew(self, gateway: GatewayEntry, version: int) -> Router:
        """The same after its name was looked up again; what was known if that fails. Errors: as of `of`."""
        try:
            found = self._known[gateway.name, version] = await _looked_up(gateway, version)
        except LinkError:
            if (known := self._known.get((gateway.name, version))) is not None:
                return known
            raise
        return found


def router_unasked(gateway: GatewayEntry, version: int) -> Router:
    """A gateway that is only named in messages to another one."""
    address = gateway.address(version) or gateway.addresses[0]
    return Router(gateway.name, address, Endpoint(address, gateway.ask(version).port))


async def _looked_up(gateway: GatewayEntry, version: int) -> Router:
    """Errors: LinkError for an unknown name."""
    where = gateway.ask(version)
    address = gateway.address(version) or gateway.addresses[0]
    try:
        return Router(gateway.name, address, Endpoint(ip_address(where.host), where.port))
    except ValueError:
        pass
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            where.host, where.port, type=socket.SOCK_DGRAM, flags=socket.AI_ADDRCONFIG
        )
    except OSError as error:
        raise LinkError(f"{where.host} cannot be found: {error.strerror}") from None
    every = [ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    best = next((one for one in every if one.version == version), every[0])
    return Router(gateway.name, address, Endpoint(best, where.port))


def sa_of(views: Sequence[SaView], sa: SaName | None, config: MobileNode) -> SaView:
    """The named SA among charon's, or the only one that may move. Errors: UnknownSaError."""
    found = [view for view in views if view.state not in ("CONNECTING", "DELETING")]
    if sa is not None:
        found = [view for view in found if view.spis == sa]
    elif len(found) > 1:
        # other SAs may lead to gateways that are not in this configuration
        found = [view for view in found if config.gateway_at(view.remote.address) is not None]
    if len(found) != 1:
        what = "is no IKE_SA" if not found else f"are {len(found)} IKE_SAs: say which"
        hint = "`swanctl --initiate` sets one up" if not found else "see --ike and --ike-id"
        raise UnknownSaError(f"there {what}", hint=hint)
    return found[0]


def is_idle(view: SaView) -> bool:
    """Whether it is up, and charon has no exchange under way."""
    return view.state == "ESTABLISHED" and not view.tasks
