"""Waits for a mobile node's local address at its new place, while its links come up. I/O."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from typing import Protocol

from ikectx.errors import ConfigError, LinkError
from ikectx.sa.context import Address

from .node import GatewayEntry, MobileNode
from .place import OTHER_KIND, LocalPlace


class Leads(Protocol):
    """`OuterAddresses.towards`, or a stand-in."""

    def __call__(
        self, remote: Address, *, avoid: Sequence[Address] = (), among: Sequence[Address] = ()
    ) -> Address | None: ...


class Search:
    """The search for all handovers of a node. Times are those of the running loop, in seconds."""

    def __init__(self, config: MobileNode, leads: Leads) -> None:
        self._config = config
        self._leads = leads
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """The host's addresses or routes have changed."""
        self._changed.set()

    def from_now(self) -> None:
        """Ignore changes until now."""
        self._changed.clear()

    def named(self, gateway: GatewayEntry, address: Address | None) -> Address | None:
        """The address that was given for the new place. Errors: ConfigError if it leads nowhere."""
        if address is not None and gateway.address(address.version) is None:
            raise ConfigError(f"{gateway.name} has no IPv{address.version} address in {self._config.path}")
        return address

    def place(
        self, gateway: GatewayEntry, version: int, vips: Sequence[Address], left: Address | None = None
    ) -> LocalPlace:
        """The search from which `gateway` is reached, for an SA of that IP version; `left`: the old
        address."""
        among = self._config.settings.addresses

        def towards(remote: Address, avoid: Collection[Address]) -> Address | None:
            return self._leads(remote, avoid=tuple(avoid), among=among)

        return LocalPlace(towards, gateway.addresses, version, avoid=vips, left=left)

    async def find(
        self, place: LocalPlace, until: float | None = None, *, at_once: bool = True
    ) -> Address | None:
        """The node's address, as soon as it has one; None: there was none by `until`.

        Without `at_once` the search begins only after a change.
        """
        loop = asyncio.get_running_loop()
        if not at_once:
            await self._changed.wait()
        while True:
            self._changed.clear()
            if (found := place.look(loop.time())) is not None:
                return found
            if place.due is None and until is not None and loop.time() >= until:
                return None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until if place.due is None else place.due):
                    await self._changed.wait()

    async def arrived(self, place: LocalPlace, gateway: GatewayEntry) -> Address:
        """The address of a node that has arrived; it may come in a moment. Errors: LinkError."""
        found = await self.find(place, asyncio.get_running_loop().time() + OTHER_KIND)
        if found is None:
            raise LinkError(
                f"no address of this host leads to {gateway.name}",
                hint="is the new link up? `--address` names its address",
            )
        return found
