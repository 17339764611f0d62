"""`Leading`: what the kernel does with the packets of SAs that left: blocks, ways to other gateways. I/O.

It keeps nothing: each call is given a `Departure`, and what `absences` stores is what it returns.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ikectx.errors import KernelError
from ikectx.sa.context import Address
from vici_bridge.kernel.detour import Detour
from vici_bridge.kernel.kernel import Kernel
from vici_bridge.kernel.xfrm_parts import Network

from .departures import SENT_ON, Departure, allow_of, within
from .pairs import networks

log = logging.getLogger(__name__)

Ways = dict[tuple[str, int], int]
"""Devices by gateway and IP version, 0: there is no way."""


class Leading:
    """For one gateway. `kernel` is None if ESP is in user space. `ways`: as in `Away`."""

    def __init__(self, kernel: Kernel | None, detour: Detour, ways: Mapping[str, Sequence[Address]]) -> None:
        self._kernel = kernel
        self._detour = detour
        self._ways = ways

    def way(self, network: Network, name: str, known: Ways) -> int:
        """Index of the device by which packets for a network get to that gateway now, 0: there is no way.

        The kernel is asked once for each gateway and IP version, unless the way depends on the network.
        `known`: ways that were found just now. Errors: KernelError.
        """
        if any(gateway in network for gateway in self._ways.get(name, ())):
            return 0
        if (name, network.version) not in known:
            known[name, network.version] = self._detour.device_to(network, self._ways.get(name, ()))
        return known[name, network.version]

    def led(self, row: Departure, known: Ways | None = None) -> Departure:
        """The departure with the present way to the gateway that has the SA, and the policies for that way.

        If there is no way to that gateway, packets go to the one that the SA was given to. `known`: ways that
        were found just now for other departures. Errors: KernelError.
        """
        known = {} if known is None else known
        if row.stage not in SENT_ON:
            return replace(row, led=(), via=(), allows=())
        led: dict[Network, int] = {}
        via: tuple[Address, ...] = ()
        for name in dict.fromkeys((row.at, row.peer)):
            ways = {network: self.way(network, name, known) for network in networks(row.prefixes)}
            if any(ways.values()):
                led, via = {network: way for network, way in ways.items() if way}, tuple(self._ways[name])
                break
        allows = {
            allow_of(block, device).raw: allow_of(block, device)
            for block in row.blocks
            for network, device in led.items()
            if within(block.destination, network) and block.selector.ifindex in (0, device)
        }
        own = zip(row.prefixes, networks(row.prefixes), strict=True)
        texts = tuple(prefix for prefix, network in own if network in led)
        return replace(row, led=texts, via=via, allows=tuple(allows.values()))

    def closing(self, row: Departure) -> Departure:
        """The departure with those prefixes in `closed` whose packets leave by the same device without the
        detour. Only before they are sent on. Errors: KernelError.

        No policy can tell these packets from others there, so an unreachable route is their block, as if ESP
        were in user space.
        """
        allowed = {policy.selector.ifindex for policy in row.allows}
        same = [prefix for prefix in row.led if allowed and self._detour.device_now(prefix) in allowed]
        return replace(row, closed=tuple(dict.fromkeys((*row.closed, *same))))

    def renewed(self, row: Departure) -> Departure:
        """The departure with the present index of the device towards the mobile node in its blocks.

        Another daemon may have made the device anew since (PPP), or the host was started anew.
        Errors: KernelError.
        """
        bare = {block for block in row.blocks if block.selector.ifindex and not (block.mark or block.if_id)}
        if row.outer is None or not bare or len(bare) == len(row.blocks):
            return row
        device = self._detour.device_now(str(row.outer))
        if not device:
            return row
        now = (
            replace(block, selector=replace(block.selector, ifindex=device)) if block in bare else block
            for block in row.blocks
        )
        return replace(row, blocks=tuple({block.raw: block for block in now}.values()))

    def shut(self, row: Departure) -> None:
        """Put its blocks into the kernel. Errors: KernelError."""
        if self._kernel is not None:
            self._kernel.replace_policies(row.blocks)
        if row.closed:
            self._detour.shut(row.closed)

    def send_on(self, row: Departure) -> None:
        """Let its packets leave by the device towards the gateway that has the SA, and lead them there.
        Errors: KernelError."""
        if not row.sent_on or not row.via:
            return
        if self._kernel is not None:
            self._kernel.replace_policies(row.allows)
        self.add(row.sent_on, row.via, row.inside)

    def add(self, texts: Sequence[str], via: Sequence[Address], inside: Collection[Network]) -> None:
        """Lead packets for these prefixes to a gateway; a failure is logged."""
        if texts and via:
            try:
                self._detour.add(texts, via, inside)
            except KernelError as error:
                log.warning("packets for %s are not sent on: %s", ", ".join(texts[:3]), error)
