"""`CharonSource`: pSG's side. Export an SA, let go of it without losing a packet, or take it back.

Letting go is done below charon, because charon can freeze only whole segments: nftables keeps its IKE
messages for this one SA from the wire, and the kernel loses the outbound policies. Inbound SAs stay: late
packets are decrypted until the SA is released.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace

from ikectx import trace
from ikectx.context import (
    Address,
    ChildContext,
    FinalChild,
    FinalState,
    IkeContext,
    PeerContext,
)
from ikectx.errors import BusyError, CharonError, LinkError, RefusedError, UnknownSaError
from ikectx.keys import esp_keys
from ikectx.name import SaName
from ikectx.numbers import Status
from ikectx.ports import SENDING_PACKETS, SENDING_SECONDS
from ikectx.relocate import relocate

from . import ha
from .charon import (
    ChildView,
    SaView,
    child_lifetime,
    departing_view,
    ike_lifetime,
    peer_context,
)
from .host import CharonHost, Mover
from .obstacles import check_context, check_kernel, check_kind, check_told
from .xfrm import KernelPolicy, KernelSa

log = logging.getLogger(__name__)

_LOOK = 0.1
"""Seconds between two looks at how much of it has left."""
ABOUT_ADDRESSES = frozenset({"IKE_MOBIKE", "IKE_DPD"})
"""charon's tasks whose request says nothing of CHILD_SAs: if one gateway is silent, another may answer, and
if an MN has left, another gateway may go on with the next request."""
_LIVING = ("INSTALLED",)
_LEAVING = ("REKEYED", "DELETING", "DELETED")
IDLE_TIMEOUT = 3.0
"""Seconds to wait for charon to finish an exchange that is under way when it is frozen."""


Ender = Callable[[IkeContext, Sequence[int]], Awaitable[bool]]
"""Deletes the SA of a context at its MN, under that of the message IDs which is the next; did it answer?"""


class CharonSource:
    """A `ContextSource` on a running charon."""

    def __init__(self, host: CharonHost, mover: Mover, ender: Ender | None = None) -> None:
        """`mover` and `ender` must get through to the MN while the SA is muted: `mute.MARK`."""
        self._host = host
        self._mover = mover
        self._ender = ender
        self.departing: set[SaName] = set()
        """SAs charon is destroying (their updown script runs): not listed, still in the kernel."""
        self._reqids: dict[SaName, frozenset[int]] = {}
        """Request ids of the CHILD_SAs of those that charon is destroying."""
        self._handed: set[SaName] = set()
        """SAs that go to a gateway which has nothing of them yet."""
        self._sending: set[SaName] = set()
        """SAs whose ESP goes on though they are frozen, and is counted."""

    async def _view(self, sa: SaName) -> SaView | None:
        if sa in self.departing:
            return departing_view(self._host.context(sa))
        return await self._host.view(sa)

    def departing_by_reqid(
        self, reqid: int, connections: Collection[str]
    ) -> tuple[SaName, IkeContext, float] | None:
        """The IKE_SA whose CHILD_SA has that request id, its context, and how long it was quiet (seconds).

        charon names a child so to its updown script, and has told its deletion over HA by then. Only SAs of
        `connections` are looked at, each once in the kernel: when charon stops it calls the script for
        thousands, and waits for each answer.
        """
        departed = self._host.departed()
        self._reqids = {sa: known for sa, known in self._reqids.items() if sa in departed}
        for name, (context, quiet) in departed.items():
            if context.connection not in connections:
                continue
            if name not in self._reqids:
                self._reqids[name] = self._reqids_of(context)
            if reqid in self._reqids[name]:
                return name, context, quiet
        return None

    def _reqids_of(self, context: IkeContext) -> frozenset[int]:
        kernel, ours = self._host.kernel, {context.local.address, *self._host.config.addresses}
        if kernel is None:
            return frozenset()
        names = [(address, child.spi_in) for child in context.children for address in ours]
        found = (kernel.get_sa(*name) for name in names)
        return frozenset(sa.reqid for sa in found if sa is not None)

    async def find(self, mn: Address) -> list[SaName]:
        """See `ContextSource.find`. What is PASSIVE, or being made or deleted, is not served."""
        views = await self._host.views()
        return [view.spis for view in views if view.remote.address == mn and view.state == "ESTABLISHED"]

    def recorded(self, sa: SaName) -> IkeContext:
        """See `ContextSource.recorded`. Known from the HA messages of charon alone."""
        return self._host.context(sa)

    async def export(self, sa: SaName, *, away: bool = False) -> IkeContext:
        """See `ContextSource.export`. Keys are derived and compared with those the kernel holds."""
        host = self._host
        view = await self._view(sa)
        host.ha_version.check()
        if view is not None:
            check_kind(view)
        await host.catch_up(sa)
        if view is None:
            raise UnknownSaError(f"charon has no IKE_SA {sa}")
        _refuse_busy(view, away)
        context = relocate(host.context(sa), local=view.local, remote=view.remote)
        if not host.config.mobile_node:
            check_context(context)
        check_told(view, context)
        if away and view.tasks:
            context = replace(context, mid_initiator=_last(context), unsure=True)
        # a resync after an IKE rekey tells no virtual IPs (5.9.8, 6.0.6); nSG wants them for the selectors
        vips = view.remote_vips or context.remote_vips
        context = replace(context, lifetime=ike_lifetime(view), remote_vips=vips)
        living = {child.spi_in: child for child in view.children if child.state in _LIVING}
        children = []
        for child in context.children:
            seen = living.get(child.spi_in)
            if seen is not None:
                children.append(self._measured(context, child, seen))
        context = replace(context, children=tuple(children))
        conn = (await host.connections()).get(context.connection)
        peer = None if conn is None else _admitted(context, peer_context(context.connection, conn))
        return replace(context, peer=peer, update_spi=host.has_agent(context))

    def _measured(self, context: IkeContext, child: ChildContext, view: ChildView) -> ChildContext:
        """The child with what only the kernel knows: counters, windows, limits."""
        kernel = self._host.kernel
        lifetime = child_lifetime(view)
        if kernel is None:
            return replace(child, lifetime=lifetime)
        inbound, outbound = self._host.kernel_pair(context, child)
        if inbound is None or outbound is None:
            raise BusyError(f"the kernel does not hold both ESP SAs of CHILD_SA {child.name} now")
        for kept in (inbound, outbound):
            check_kernel(child.name, kept)
        self._compare_keys(context, child, inbound, outbound)
        state_in, used_in = kernel.get_replay(inbound, outbound=False)
        state_out, used_out = kernel.get_replay(outbound, outbound=True)
        limits = inbound.limits
        return replace(
            child,
            inbound=state_in,
            outbound=state_out,
            lifetime=replace(
                lifetime,
                bytes_limit=limits.hard_bytes,
                packets_limit=limits.hard_packets,
                # one figure for both: either of them has the CHILD_SA rekeyed when it reaches its limit
                bytes_used=max(used_in.bytes, used_out.bytes),
                packets_used=max(used_in.packets, used_out.packets),
            ),
        )

    @staticmethod
    def _compare_keys(
        context: IkeContext, child: ChildContext, inbound: KernelSa, outbound: KernelSa
    ) -> None:
        derived = esp_keys(context.generations[child.generation], child)
        for sa, (encr, integ), way in ((inbound, derived[0], "inbound"), (outbound, derived[1], "outbound")):
            if sa.encr_key != encr or sa.auth_key != integ:
                raise CharonError(
                    f"the kernel's {way} keys of CHILD_SA {child.name} are not those of its IKE_SA",
                    hint="the SA uses something the ha plugin does not tell (a PPK, for example) and "
                    "cannot be moved; rekey it without, or let the MN connect anew",
                    status=Status.NOT_COVERED,
                )

    async def freeze(
        self,
        context: IkeContext,
        to: str = "",
        *,
        away: bool = False,
        sending: bool = False,
        renaming: bool = False,
    ) -> FinalState:
        """See `ContextSource.freeze`. `to` names the peer whose inner addresses take packets for the MN.

        charon tells over HA the ID after that of a request when it sends it, not when it is answered. With
        the SA muted no answer comes any more, so the MN expects that ID or the one before it.
        """
        host = self._host
        spis = context.spis
        kernel = host.kernel
        mute = host.mute
        unprepared = spis in self._handed
        self._handed.discard(spis)
        await asyncio.to_thread(mute.mute_in, spis)
        jump = 0
        try:
            await self._idle(context, away)
            await asyncio.to_thread(mute.mute_out, spis)
            view = await self._same(context)
            _, dropped = await asyncio.to_thread(mute.counters, spis)
            unsure = bool(away and view.tasks)
            if in_the_way(view, away) or (dropped and not unsure):
                raise BusyError("charon began an exchange while it was being frozen")
            await host.catch_up(spis)
            known = host.context(spis)
            if unsure:
                known = replace(known, mid_initiator=_last(known), unsure=True)
            # from here on packets may leave through the other gateway, prepared with our numbers plus a jump
            jump = 2 * host.config.oseq_jump
            if sending and kernel is not None:
                host.leaving.note(spis, sends_to=to)
            else:
                self._stop_outbound(context, to, unprepared=unprepared)
            final = []
            for child in context.children:
                inbound, outbound = child.inbound, child.outbound
                if kernel is not None:
                    sa_in, sa_out = host.kernel_pair(context, child)
                    if sa_in is None or sa_out is None:
                        raise BusyError(f"CHILD_SA {child.name} went away while it was being frozen")
                    inbound = kernel.get_replay(sa_in, outbound=False)[0]
                    outbound = kernel.get_replay(sa_out, outbound=True)[0]
                final.append(FinalChild(child.spi_in, inbound, outbound))
            host.leaving.note(spis, renaming=renaming, request=known.mid_initiator, unsure=unsure)
        except BaseException:
            await self.thaw(context, jump)
            raise
        if sending and kernel is not None:
            self._sending.add(spis)
            host.spawn(self._go_on(context, final))
        return FinalState(
            spi_i=spis[0],
            spi_r=spis[1],
            # an MN that charon gave up never saw the last request: its ID is still the next one
            mid_initiator=max(known.mid_initiator - (spis in self.departing), 0),
            mid_responder=known.mid_responder,
            epoch=context.epoch + 1,
            children=tuple(final),
            unsure=known.unsure,
        )

    @trace.spanned("charon idle")
    async def _idle(self, context: IkeContext, away: bool) -> SaView:
        """Wait until charon has no exchange in flight. New requests of the MN do not reach it any more.

        `away`: one that an MN that has left does not answer may be, if it is there at a second look, too.
        """
        end = time.monotonic() + IDLE_TIMEOUT
        before: tuple[str, ...] = ()
        while True:
            view = await self._same(context)
            if not view.tasks or (view.tasks == before and not in_the_way(view, away)):
                return view
            before = view.tasks
            if time.monotonic() > end:
                raise BusyError(f"an exchange is in flight: {', '.join(view.tasks)}")
            await asyncio.sleep(0.05)

    async def _same(self, context: IkeContext) -> SaView:
        """The SA's view, if it is still what was exported. Errors: BusyError."""
        view = await self._view(context.spis)
        if view is None:
            raise BusyError("the IKE_SA was rekeyed or deleted meanwhile")
        if view.state != "ESTABLISHED":
            raise BusyError(f"the IKE_SA is {view.state} now")
        if (view.local, view.remote) != (context.local, context.remote):
            raise BusyError("the MN moved meanwhile")
        living = {(child.spi_in, child.spi_out) for child in view.children if child.state in _LIVING}
        if living != {(child.spi_in, child.spi_out) for child in context.children}:
            raise BusyError("a CHILD_SA was rekeyed, made or deleted meanwhile")
        return view

    @trace.spanned("stop outbound")
    def _stop_outbound(self, context: IkeContext, to: str, *, unprepared: bool = False) -> None:
        """No ESP leaves any more: packets for the MN go to nSG if a way is known, else nowhere."""
        host = self._host
        if host.kernel is None:
            host.away.leave(context, to, (), unprepared=unprepared)
            return
        reqids = self._outbound_reqids(context)
        every = [p for p in host.kernel.policies_about(reqids) if p.direction == "out"]
        # of two SAs with the same selectors one has the policy; it goes, or stays, with that one
        outbound = [p for p in every if _leads_to(p, reqids, context.remote.address)]
        host.leaving.note(context.spis, policies=tuple(policy.raw for policy in outbound))
        host.away.leave(context, to, every, unprepared=unprepared)
        for policy in outbound:
            host.kernel.delete_policy(policy)

    async def _go_on(self, context: IkeContext, final: Sequence[FinalChild]) -> None:
        """Let ESP leave until the other gateway does that, or for as long and as much as it may."""
        end = time.monotonic() + SENDING_SECONDS
        start = {child.spi_in: child.outbound.seq for child in final}
        while context.spis in self._sending:
            if time.monotonic() > end or self._sent(context, start) >= SENDING_PACKETS:
                log.warning("%s: no more ESP from here, the MN has not been told yet", context.connection)
                self._end_sending(context)
            await asyncio.sleep(_LOOK)

    def _sent(self, context: IkeContext, start: Mapping[bytes, int]) -> int:
        """The most that a CHILD_SA has sent since."""
        kernel = self._host.kernel
        sent = [0]
        for child in context.children if kernel is not None else ():
            _, outbound = self._host.kernel_pair(context, child)
            if kernel is not None and outbound is not None:
                state, _ = kernel.get_replay(outbound, outbound=True)
                sent.append(state.seq - start[child.spi_in])
        return max(sent)

    def _end_sending(self, context: IkeContext) -> None:
        """As any other freeze has done, unless that is so; then there is a note of the policies."""
        self._sending.discard(context.spis)
        known = self._host.leaving.of(context.spis).facts
        if known.sends_to and known.policies is None:
            self._stop_outbound(context, known.sends_to)

    def _outbound_reqids(self, context: IkeContext) -> set[int]:
        pairs = [self._host.kernel_pair(context, child) for child in context.children]
        return {outbound.reqid for _, outbound in pairs if outbound is not None}

    async def thaw(self, context: IkeContext, oseq_jump: int) -> None:
        """See `ContextSource.thaw`. Where charon lost the SA meanwhile, only the leftovers are cleared."""
        host = self._host
        known = host.leaving.of(context.spis).facts
        view = await host.view(context.spis)
        if known.sends_to:
            # the other gateway may have sent under these keys, from twice as far on
            oseq_jump = max(oseq_jump, 4 * SENDING_PACKETS)
            self._sending.discard(context.spis)
        if view is not None and host.kernel is not None:
            if oseq_jump:
                for child in context.children:
                    _, outbound = host.kernel_pair(context, child)
                    if outbound is not None:
                        state, _ = host.kernel.get_replay(outbound, outbound=True)
                        top = (1 << (64 if child.esn else 32)) - 1
                        jumped = replace(state, seq=min(state.seq + oseq_jump, top))
                        host.kernel.set_replay(outbound, jumped, outbound=True)
            for raw in known.policies or ():
                host.kernel.replace_policy(KernelPolicy.parse(raw))
        host.away.back(context.spis)
        if view is None:
            await host.scripts.finish(context)
        if view is not None and known.request is not None and view.state == "DELETING":
            await self._end(context, view, known.request)
        elif view is not None and known.request is not None:
            # the other's script may have drawn the MN's packets there, where nobody takes them any more
            reqids = {child.spi_in: child.reqid for child in view.children}
            for up in (False, True):
                await host.updown(context, up=up, reqids=reqids, unique_id=view.unique_id)
            ids = 3 if known.unsure else 2
            if known.renaming:
                # for each child CREATE_CHILD_SA, INFORMATIONAL D; and one to begin with
                ids += 1 + 2 * len(context.children)
            await self._call_back(context, known.request, ids)
        await asyncio.to_thread(host.mute.unmute, context.spis)
        renamed = known.request is not None and known.renaming
        if view is not None and view.state != "DELETING" and renamed:
            await self._renew(view)
        host.leaving.drop(context.spis, soon=True)

    async def _end(self, context: IkeContext, view: SaView, mid: int) -> None:
        """Somebody ended the SA here, and the other gateway did not get it: the MN is to hear of that.

        charon's Delete has the message ID `mid`, which the other gateway may have used, and the one after it.
        So the agent says it, under each that can be the next, and has charon drop what it waits with in vain.
        """
        host = self._host
        log.warning("%s was ended here while it was to leave: its MN is told", context.connection)
        if self._ender is None or not await self._ender(context, (mid, mid + 1, mid + 2)):
            log.warning("%s: the MN at %s did not answer the Delete", context.connection, context.remote)
        reqids = {child.spi_in: child.reqid for child in view.children}
        await host.delete(context)
        await host.updown(context, up=False, reqids=reqids, unique_id=view.unique_id)

    async def _renew(self, view: SaView) -> None:
        """Have CHILD_SAs rekeyed that the MN may have under other names, or not at all.

        It then says CHILD_SA_NOT_FOUND, and charon makes another (child_rekey, strongSwan 5.9.8, 6.0.6).
        """
        for child in view.children:
            if child.state in _LIVING:
                log.info("%s: CHILD_SA %s is rekeyed: the MN may have other SPIs", view.name, child.name)
                try:
                    await self._host.ask(self._host.vici.rekey, child_id=child.unique_id)
                except CharonError as error:
                    log.warning("CHILD_SA %s of %s is not rekeyed: %s", child.name, view.name, error)

    @trace.spanned("call back")
    async def _call_back(self, context: IkeContext, mid: int, ids: int) -> None:
        """The MN may have heard the other gateway, whether or not that heard it: tell it where its SA is.

        What the other gateway sent had the message ID `mid`. An MN that has seen it takes a request with that
        ID for a copy and answers to the other gateway; then the next ID is the right one, for charon, too.
        `ids`: as many can be the right one, beginning with `mid`.
        """
        host = self._host
        for used in range(1, ids + 1):
            final = FinalState(*context.spis, mid + used - 1, context.mid_responder, context.epoch + 1)
            try:
                await self._mover(context, final, lambda: False)
            except RefusedError as error:
                log.warning("%s: %s", context.connection, error)
            except LinkError:
                continue
            ike = ha.IkeId.of(context.current)
            message = ha.ike_mid(await host.version(), ike, initiator=True, mid=mid + used)
            await host.send([message])
            host.record.feed(message)
            host.save()
            return
        log.warning("%s: the MN at %s is silent here, too", context.connection, context.remote)

    async def release(self, context: IkeContext) -> None:
        """See `ContextSource.release`. Late packets are decrypted for `late` seconds more."""
        host = self._host
        view = await host.view(context.spis)
        if view is not None:
            if view.state == "DELETING":
                host.leaving.note(context.spis, ended=True)
            reqids = {child.spi_in: child.reqid for child in view.children}
            self._end_sending(context)
            await host.delete(context, host.late_packets(context, context.children))
            await host.updown(context, up=False, reqids=reqids, unique_id=view.unique_id)
        else:
            await host.scripts.finish(context)
        await asyncio.to_thread(host.mute.unmute, context.spis)
        departure = host.away.left(context.spis)
        if departure is not None:
            host.origins.left(departure)
            if host.leaving.of(context.spis).facts.ended:
                log.warning("%s was ended here while it left: %s is told", context.connection, departure.peer)
                host.origins.end(departure)
        host.leaving.drop(context.spis, soon=True)

    def hands_over(self, sa: SaName) -> None:
        """See `ikectx.ports.Follower`."""
        self._handed.add(sa)

    def not_taken(self, sa: SaName) -> None:
        """See `ikectx.ports.Follower`."""
        self._host.leaving.note(sa, request=None)

    def stays(self, sa: SaName) -> None:
        """See `ikectx.ports.Follower`."""
        self._host.origins.stays(sa)

    def resume(self) -> None:
        """After a start: what has left stays shut and is sent on as before, whatever became of the kernel.

        What an SA goes on sending ends: nobody has counted it meanwhile.
        """
        for row in self._host.leaving.all():
            if not row.facts.sends_to:
                continue
            with contextlib.suppress(UnknownSaError):
                self._end_sending(self._host.context(row.sa))
        self._host.away.restore()


def _leads_to(policy: KernelPolicy, reqids: Collection[int], mn: Address) -> bool:
    return any(one.reqid in reqids and one.destination == mn for one in policy.templates)


def in_the_way(view: SaView, away: bool) -> tuple[str, ...]:
    """charon's tasks that keep an SA where it is; `away`: not those whose request stays without an answer."""
    return tuple(task for task in view.tasks if not (away and task in ABOUT_ADDRESSES))


def _last(context: IkeContext) -> int:
    """Message ID of charon's last request: what HA told is the one after it."""
    return max(context.mid_initiator - 1, 0)


def _refuse_busy(view: SaView, away: bool) -> None:
    if view.state != "ESTABLISHED":
        raise BusyError(f"the IKE_SA {view.name} is {view.state}, not ESTABLISHED")
    if in_the_way(view, away):
        raise BusyError(f"the IKE_SA {view.name} has an exchange in flight: {', '.join(view.tasks)}")
    for child in view.children:
        if child.state not in (*_LIVING, *_LEAVING):
            raise BusyError(f"the CHILD_SA {child.name} is {child.state}")


def _admitted(context: IkeContext, peer: PeerContext) -> PeerContext:
    """What of the PAD entry nSG looks at: how the MN was authenticated. The rest is this gateway's own."""
    names = tuple(dict.fromkeys(child.name for child in context.children))
    return PeerContext(peer.connection, remote_auth=peer.remote_auth, children=names)
