"""`Early`: ESP of an SA whose mobile node has announced itself, in the kernel before charon has the SA. I/O.

    hush      charon has the SA for a moment, because only it knows which ESP SAs and policies it makes of it:
              nothing may leave by them meanwhile
    read      copies of these
    wait      the mobile node has not come: decrypt its packets, wherever it sends them from
    lead      it has come: send to its new address, too
    give_way  charon is about to get the SA: its packets are held, the pair is deleted, its numbers are kept
    go_on     charon's pair has these numbers: held packets leave, and all others
    end       nothing of it is left

An inbound SA in tunnel mode does not look at the outer source address (Linux 6.1, 7.2), so the pair that was
made for the mobile node's old address takes packets from its new one. Only the outbound SA needs that
address. The policies stand beside charon's (`beside`), and have a reqid that charon never gives.

While the old gateway serves the SA, packets that it has decrypted must not be decrypted here once more, if
somebody sends copies. So the window begins `oseq_jump` above the exported number, as if all below had been
received: a mobile node's agent leaves out as many numbers when it moves.

Nothing of this is stored. The kernel drops it after `HostConfig.early` seconds, agent or not, and an agent
that starts removes what one before it has left (`Early.sweep`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ikectx.errors import KernelError, WireError
from ikectx.sa.context import IkeContext, ReplayState
from ikectx.sa.name import SaName
from vici_bridge.ha.record import ChildAdded, RecordChange
from vici_bridge.host import CharonHost
from vici_bridge.kernel.kernel import LATE
from vici_bridge.kernel.xfrm import KernelPolicy, KernelSa, policies_of
from vici_bridge.kernel.xfrm_parts import TUNNEL, KernelLimits, XfrmRequest

from .beside import WANTED, beside, forget_wanted, held_back, led_to
from .hush import HUSH, hushing

log = logging.getLogger(__name__)

EARLY = int.from_bytes(b"IKEE")
"""The `user` of these policies' selectors, as `departures.OURS` is that of departures."""
HUSHED = 15
"""Seconds after which the kernel lets packets pass again, if an agent died at that moment."""
LINGER = 0.5
"""Seconds for which policies stay whose packets leave by charon's pair."""
MARGIN = 1024
"""Outbound numbers left out when charon's pair goes on, because a packet may be on its way on another CPU."""


def is_early(sa: KernelSa) -> bool:
    """Whether the kernel's SA is one of these."""
    return sa.sequence == LATE and sa.reqid >> 16 == WANTED >> 16


def is_late(sa: KernelSa) -> bool:
    """Whether it decrypts late packets of an SA that has left."""
    return sa.sequence == LATE and not is_early(sa)


@dataclass(frozen=True, slots=True)
class EarlyChild:
    """One CHILD_SA: its pair, its policies, and the number below which nothing is decrypted (`floor`)."""

    inbound: KernelSa
    outbound: KernelSa
    inward: tuple[KernelPolicy, ...]
    outward: tuple[KernelPolicy, ...]
    floor: int
    sent: int | None = None
    received: ReplayState | None = None


class Early:
    """All early pairs of one gateway, by the SA's name."""

    def __init__(self, host: CharonHost) -> None:
        self._host = host
        self._known: dict[SaName, tuple[EarlyChild, ...]] = {}
        self._ending: dict[SaName, tuple[EarlyChild, ...]] = {}
        self._handed_over: set[SaName] = set()
        """Those whose packets leave by charon's pair."""
        self._reqids = itertools.cycle(range(WANTED + 1, WANTED + 0x10000))

    def __contains__(self, sa: SaName) -> bool:
        return sa in self._known

    def hush(self, here: IkeContext) -> list[KernelPolicy]:
        """Drop packets for the mobile node until `speak`, see `hush`. None: it cannot be done for this SA.

        The old gateway serves it, with lower sequence numbers than a packet would have that left here.
        Errors: KernelError.
        """
        kernel, found = self._host.kernel, hushing(here, EARLY, KernelLimits(hard_add=HUSHED))
        outer = (here.local.address, here.remote.address)
        if any(address in policy.destination for policy in found for address in outer):
            return []
        if kernel is not None and found:
            kernel.batch([policy.put() for policy in found])
        return found

    def speak(self, hushed: Iterable[KernelPolicy]) -> None:
        """End `hush`. Errors: KernelError."""
        if self._host.kernel is not None:
            self._host.kernel.delete_policies(hushed)

    def read(self, here: IkeContext) -> tuple[EarlyChild, ...]:
        """Copies of what charon has installed; none if this SA is not one that can be early.

        With ESP in UDP the kernel would tell charon of the new address. Errors: KernelError, WireError.
        """
        kernel, found = self._host.kernel, list[EarlyChild]()
        if kernel is None:
            return ()
        for child in here.children:
            inbound, outbound = self._host.kernel_pair(here, child)
            if inbound is None or outbound is None or _unfit(inbound) or _unfit(outbound):
                return ()
            floor = child.inbound.seq + self._host.config.oseq_jump
            if floor >> (63 if inbound.esn else 31):
                return ()
            policies = kernel.policies_about({inbound.reqid, outbound.reqid})
            inward = policies_of(policies, inbound, "in", "fwd")
            outward = policies_of(policies, outbound, "out")
            if not inward or not outward:
                return ()
            reqid, limits = next(self._reqids), KernelLimits(hard_add=self._host.config.early)
            seen = replace(inbound.replay, seq=floor, bitmap=(1 << inbound.replay.window) - 1)
            found.append(
                EarlyChild(
                    replace(inbound, reqid=reqid, limits=limits, sequence=LATE, replay=seen),
                    replace(outbound, reqid=reqid, limits=limits, sequence=LATE),
                    # charon's own precede, as soon as they are there
                    tuple(beside(one, EARLY, reqid, limits, one.priority + 1) for one in inward),
                    tuple(beside(one, EARLY, reqid, limits, max(one.priority - 1, 0)) for one in outward),
                    floor,
                )
            )
        return tuple(found)

    def wait(self, sa: SaName, children: tuple[EarlyChild, ...], *, held: bool = False) -> None:
        """Decrypt packets of the mobile node. Packets of its addresses that come in the clear, because the
        old gateway has decrypted them, pass as before. `held`: the kernel keeps packets for it, up to 100 for
        each policy. Errors: KernelError."""
        kernel = self._host.kernel
        if kernel is None or not children:
            return
        self.end(sa)
        self._known[sa] = children
        requests = [child.inbound.add() for child in children]
        for child in children:
            requests += [_optional(policy).put() for policy in child.inward]
            requests += [held_back(policy).put() for policy in child.outward if held]
        kernel.batch(requests)

    def lead(self, here: IkeContext) -> None:
        """The mobile node is at `here.remote` now. Errors: KernelError."""
        kernel, children = self._host.kernel, self._known.get(here.spis, ())
        if kernel is None or not children:
            return
        to = here.remote.address
        children = tuple(
            replace(child, outbound=replace(child.outbound, destination=to)) for child in children
        )
        self._known[here.spis] = children
        requests: list[XfrmRequest] = []
        for child in children:
            requests.append(child.outbound.add())
            requests += [led_to(policy, child.outbound).put() for policy in child.outward]
            requests += [policy.put() for policy in child.inward]
        kernel.batch(requests)

    def give_way(self, sa: SaName) -> None:
        """Hold its packets and delete the pair, just before charon adds its own. Errors: KernelError."""
        kernel, children = self._host.kernel, self._known.get(sa, ())
        if kernel is None or not children:
            return
        kernel.batch([held_back(policy).put() for child in children for policy in child.outward])
        last = kernel.take_out([one for child in children for one in (child.inbound, child.outbound)])
        found = []
        for child, incoming, outgoing in zip(children, last[::2], last[1::2], strict=True):
            received = None if incoming is None or incoming.seq <= child.floor else incoming.inbound
            sent = child.sent if outgoing is None else outgoing.oseq + MARGIN
            found.append(replace(child, sent=sent, received=received or child.received))
        self._known[sa] = tuple(found)

    def number(self, sa: SaName, shape: IkeContext) -> None:
        """Have charon's pair, which may have other SPIs, go on where this one stopped. Errors: KernelError,
        StateError."""
        kernel = self._host.kernel
        for child, one in zip(shape.children, self._known.get(sa, ()), strict=False):
            inbound, outbound = self._host.kernel_pair(shape, child)
            if kernel is None or inbound is None or outbound is None:
                raise KernelError(f"an ESP SA of CHILD_SA {child.name} has gone")
            if one.received is not None and child.spi_in == one.inbound.spi:
                kernel.set_replay(inbound, one.received, outbound=False)
            if one.sent is not None:
                ahead = outbound.replay.outbound
                if one.sent > ahead.seq:
                    kernel.set_replay(outbound, replace(ahead, seq=one.sent), outbound=True)

    def go_on(self, sa: SaName, shape: IkeContext) -> None:
        """Let packets leave by charon's pair, those that were held first. Errors: KernelError."""
        kernel, requests = self._host.kernel, list[XfrmRequest]()
        for child, one in zip(shape.children, self._known.get(sa, ()), strict=False):
            _, outbound = self._host.kernel_pair(shape, child)
            if outbound is not None:
                requests += [led_to(policy, outbound).put() for policy in one.outward]
        if kernel is not None and requests:
            kernel.batch(requests)
            self._handed_over.add(sa)
            self._forget_wanted(self._known.get(sa, ()))

    def _forget_wanted(self, children: Iterable[EarlyChild]) -> None:
        kernel = self._host.kernel
        for child in children:
            if kernel is not None:
                forget_wanted(kernel, child.outward[0], child.outbound)

    def heed(self, change: RecordChange | None) -> None:
        """charon has added a CHILD_SA: the policies that lead to the pair of the one before it go at once,
        because charon deletes that pair, and its own policies follow the rekey. Raises nothing."""
        if isinstance(change, ChildAdded):
            if change.sa in self._handed_over:
                self.end(change.sa)
            self._drop(change.sa, self._ending.pop(change.sa, ()))

    def end(self, sa: SaName) -> None:
        """Remove what there is of it. Raises nothing: what stays ends by itself."""
        self._handed_over.discard(sa)
        self._drop(sa, self._known.pop(sa, ()))

    def _drop(self, sa: SaName, children: Sequence[EarlyChild]) -> None:
        try:
            self._remove(
                [one for child in children for one in (child.outbound, child.inbound)],
                [policy for child in children for policy in (*child.outward, *child.inward)],
            )
            self._forget_wanted(children)
        except (KernelError, WireError) as error:
            log.warning("early ESP of %s stays for up to %d s: %s", sa, self._host.config.early, error)

    def end_soon(self, sa: SaName) -> None:
        """Remove it in `LINGER` seconds, because the kernel lets held packets go at its next tick."""
        self._handed_over.discard(sa)
        children = self._known.pop(sa, ())
        if children:
            self._ending[sa] = children
            asyncio.get_running_loop().call_later(LINGER, self._end, sa, children)

    def _end(self, sa: SaName, children: tuple[EarlyChild, ...]) -> None:
        if self._ending.get(sa) is children:
            del self._ending[sa]
            if sa not in self._known:
                self._drop(sa, children)

    def sweep(self) -> None:
        """Remove what an agent before this one has left. Raises nothing."""
        kernel = self._host.kernel
        if kernel is None:
            return
        try:
            present = kernel.dump_policies()
            old = [policy for policy in present if policy.selector.user == EARLY]
            # those of an SA that is still to be undone stay until charon has dropped it
            known = {raw for row in self._host.coming.all() for raw in row.facts.guards}
            hushed = [policy for policy in present if policy.selector.user == HUSH]
            old += [policy for policy in hushed if replace(policy, index=0).raw not in known]
            self._remove([sa for sa in kernel.late_sas() if is_early(sa)], old)
        except (KernelError, WireError) as error:
            log.warning("early ESP that an agent before this one left stays: %s", error)

    def _remove(self, sas: Iterable[KernelSa], policies: Iterable[KernelPolicy]) -> None:
        kernel = self._host.kernel
        if kernel is None:
            return
        for sa in sas:
            now = kernel.get_sa(sa.destination, sa.spi, sa.proto, sa.mark)
            if now is not None and is_early(now):
                kernel.delete_sa(now)
        kernel.delete_policies(policies)


def _unfit(sa: KernelSa) -> bool:
    return sa.mode != TUNNEL or sa.encap is not None or sa.offloaded or sa.cpu is not None


def _optional(policy: KernelPolicy) -> KernelPolicy:
    return replace(policy, templates=tuple(replace(one, optional=1) for one in policy.templates))
