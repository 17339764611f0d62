"""`Shelter`: packets of a mobile node's SA are not lost while charon gives the SA other addresses. I/O.

When its gateway has sent UPDATE_SA_ADDRESSES, charon deletes the SA's policies, ESP SAs and virtual IPs and
makes them anew (5.9.8 to 6.0.6), and drops outbound packets meanwhile. So for that time

- policies beside charon's, which precede them, have the kernel hold outbound packets (`beside`), and let
  inbound ones come by the old SAs and the new ones. What was held leaves by the new outbound SA, as soon as
  it is there;
- the virtual IPs are addresses of this host by routes, too, because nothing is sent from an address that is
  none of this host, nor received for it, and the kernel deletes routes that have it as their source.

Nothing of this is stored, and no key or number is used twice, because charon's SAs are the only ones. The
kernel drops the policies after `HOLD` seconds, agent or not, and an agent that starts removes the routes
(`HostRoutes.clear`). A packet that comes between charon's deletion of its inbound SA and the new one, which
follows at once, is still lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace

from ikectx import trace
from ikectx.errors import IkectxError
from ikectx.sa.context import Address
from ikectx.sa.name import SaName
from vici_bridge.ha.record import ChildAdded, RecordChange
from vici_bridge.host import CharonHost
from vici_bridge.kernel.host_routes import HostRoutes
from vici_bridge.kernel.xfrm import KernelPolicy, KernelSa, policies_of
from vici_bridge.kernel.xfrm_parts import TUNNEL, KernelLimits
from vici_bridge.vici.views import SaView

from .beside import beside, forget_wanted, held_back, led_to

SHELTER = int.from_bytes(b"IKEP")
"""The `user` of these policies' selectors."""
HOLD = 2
"""Seconds after which the kernel ends this, if the agent has died."""
PATIENCE = 1.0
"""Seconds for charon to change the SA."""
LINGER = 0.3
"""Seconds for which policies stay whose packets leave by charon's new SA: charon is not done with its own."""
_LIMITS = KernelLimits(hard_add=HOLD)


@dataclass(frozen=True, slots=True)
class ShelteredChild:
    """One CHILD_SA: its outbound SA before the change, and the policies beside charon's."""

    outbound: KernelSa
    inward: tuple[KernelPolicy, ...]
    outward: tuple[KernelPolicy, ...]


@dataclass(frozen=True, slots=True)
class Sheltered:
    """One IKE_SA. `vips`: its virtual IPs, with the index of the device that has each."""

    sa: SaName
    children: tuple[ShelteredChild, ...]
    vips: tuple[tuple[Address, int], ...]


class Shelter:
    """For all SAs of one charon, in the network namespace that it was made in."""

    def __init__(self, host: CharonHost) -> None:
        self._host = host
        self._routes = HostRoutes()
        self._lingering: dict[SaName, asyncio.Event] = {}
        """By SA: set when its packets are to leave by charon's policies alone."""

    def close(self) -> None:
        """Close the socket."""
        self._routes.close()

    def begin(self, view: SaView) -> Sheltered:
        """Hold the SA's outbound packets. `end` must follow. Errors: KernelError, WireError."""
        children, kernel = self._children(view), self._host.kernel
        devices = [(vip, self._routes.device_of(vip)) for vip in view.local_vips if children]
        sheltered = Sheltered(view.spis, children, tuple((vip, device) for vip, device in devices if device))
        try:
            for vip, device in sheltered.vips:
                self._routes.add(vip, device)
            if kernel is not None:
                inward = [policy for one in children for policy in one.inward]
                held = [held_back(policy) for one in children for policy in one.outward]
                kernel.batch([policy.put() for policy in (*inward, *held)])
        except IkectxError:
            self._remove(sheltered)
            raise
        return sheltered

    def _children(self, view: SaView) -> tuple[ShelteredChild, ...]:
        kernel, found = self._host.kernel, list[ShelteredChild]()
        for child in view.children if kernel is not None else ():
            assert kernel is not None
            names = ((view.local.address, child.spi_in), (view.remote.address, child.spi_out))
            inbound, outbound = kernel.get_sas(names)
            if inbound is None or outbound is None or outbound.mode != TUNNEL:
                continue
            policies = kernel.policies_about({inbound.reqid, outbound.reqid})
            inward = [_before(policy, inbound) for policy in policies_of(policies, inbound, "in", "fwd")]
            outward = [_before(policy, outbound) for policy in policies_of(policies, outbound, "out")]
            found.append(ShelteredChild(outbound, tuple(map(_from_anywhere, inward)), tuple(outward)))
        return tuple(found)

    def heed(self, change: RecordChange | None) -> None:
        """charon has added a CHILD_SA: it deletes the one before, to which policies here may lead."""
        if isinstance(change, ChildAdded) and (event := self._lingering.get(change.sa)) is not None:
            event.set()

    @trace.spanned("charon changes addresses", "step")
    async def end(self, sheltered: Sheltered, remote: Address) -> None:
        """Let packets leave as soon as charon has SAs to `remote`, or has not made any. Errors: KernelError,
        WireError."""
        kernel, children = self._host.kernel, sheltered.children
        rekeyed = self._lingering[sheltered.sa] = asyncio.Event()
        try:
            if kernel is None or not children:
                return
            new = await self._new([(remote, one.outbound.spi) for one in children])
            put = [
                led_to(policy, sa).put()
                for one, sa in zip(children, new, strict=True)
                if sa is not None
                for policy in one.outward
            ]
            kernel.batch(put)
            for one in children:
                for policy in one.outward[:1]:
                    forget_wanted(kernel, policy, one.outbound)
            if put:
                loop = asyncio.get_running_loop()
                end = loop.time() + LINGER
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(end):
                        await rekeyed.wait()
                    kernel.delete_policies([policy for one in children for policy in one.outward])
                await asyncio.sleep(end - loop.time())
        finally:
            if self._lingering.get(sheltered.sa) is rekeyed:
                del self._lingering[sheltered.sa]
            self._remove(sheltered)

    async def _new(self, names: list[tuple[Address, bytes]]) -> list[KernelSa | None]:
        """charon's outbound SAs of these names, as soon as all are there."""
        kernel, loop = self._host.kernel, asyncio.get_running_loop()
        assert kernel is not None
        end, pause = loop.time() + PATIENCE, 0.002
        while None in (found := kernel.get_sas(names)) and loop.time() < end:
            await asyncio.sleep(pause)  # on a host with one CPU each look keeps charon from its work
            pause = min(pause * 1.2, 0.02)
        return found

    def _remove(self, sheltered: Sheltered) -> None:
        children = sheltered.children
        if self._host.kernel is not None:
            self._host.kernel.delete_policies(
                [policy for one in children for policy in (*one.inward, *one.outward)]
            )
        for vip, device in sheltered.vips:
            self._routes.remove(vip, device)


def _before(policy: KernelPolicy, sa: KernelSa) -> KernelPolicy:
    """The policy under another name, ahead of charon's."""
    return beside(policy, SHELTER, sa.reqid, _LIMITS, max(policy.priority - 1, 0))


def _from_anywhere(policy: KernelPolicy) -> KernelPolicy:
    """Of a template without a source the kernel compares no address."""
    return replace(
        policy, templates=tuple(replace(one, source=type(one.source)(0)) for one in policy.templates)
    )
