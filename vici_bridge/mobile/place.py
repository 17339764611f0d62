"""Chooses the local address from which a mobile node goes on with an SA after a move. Pure.

A link that comes up does not have its addresses at once. Linux has `fe80::` as soon as there is a carrier, an
IPv6 address with the first router advertisement, an IPv4 address when DHCP has finished: some milliseconds
later on a fast link, up to seconds later on others. The SA keeps its own IP version if possible, because its
gateways need nothing new for that. So an address of another kind is used only after `OTHER_KIND` seconds in
which none of the right kind has come.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from ipaddress import IPv6Network

from ikectx.sa.context import Address

OTHER_KIND = 1.0
"""Seconds for which an address of the right kind is waited for while there is one of another kind. DHCP takes
less on most links, and a node that was too early is refused, and tries the next address (`Handovers`)."""
_ULA = IPv6Network("fc00::/7")
"""Unique local addresses (RFC 4193): a router may take packets from them to a gateway on the Internet, but
the answer is not routed back."""

Towards = Callable[[Address, Collection[Address]], Address | None]
"""(address of the gateway, local addresses to avoid) -> local address that leads there."""


class LocalPlace:
    """The search for the local address from which one gateway is reached.

    gateway: its addresses. version: the SA's IP version, 4 or 6. avoid: local addresses that are not usable
    (virtual IPs). left: the address of the old place; as long as packets still go by it, the node has not
    moved. `now` is seconds, monotonic.
    """

    def __init__(
        self,
        towards: Towards,
        gateway: Sequence[Address],
        version: int,
        *,
        avoid: Collection[Address] = (),
        left: Address | None = None,
    ) -> None:
        self._towards = towards
        self._gateway = sorted(gateway, key=lambda address: address.version != version)
        self._version = version
        self._avoid = set(avoid)
        self._left = left
        self._due: float | None = None

    @property
    def due(self) -> float | None:
        """When `look` should be called again even without a change; None: only after a change."""
        return self._due

    def refuse(self, address: Address) -> None:
        """The gateway refuses the SA at this address: look for another."""
        self._avoid.add(address)
        self._due = None

    def look(self, now: float) -> Address | None:
        """The address that the node has at its new place, if it is known by now."""
        other: Address | None = None
        for remote in self._gateway:
            found = self._towards(remote, self._avoid)
            if found is None:
                continue
            if found == self._left:
                other = None
                break
            if self._fits(found, remote):
                self._due = None
                return found
            other = other or found
        if other is None:
            self._due = None
            return None
        if self._due is None:
            self._due = now + OTHER_KIND
        return other if now >= self._due else None

    def _fits(self, local: Address, remote: Address) -> bool:
        """Whether it is of the SA's kind: its IP version, and no ULA towards a gateway that has none."""
        return local.version == self._version and (local not in _ULA or remote in _ULA)
