"""`CharonSource`: the old gateway's side. Exports an SA, lets it go without losing a packet, or takes it
back.

An SA is let go below charon, because charon can freeze only whole segments: nftables mutes the IKE messages
of this one SA, and the outbound policies are removed from the kernel. Inbound SAs stay, so that late packets
are decrypted until the SA is released.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ikectx.engine.ports import SENDING_PACKETS, SENDING_SECONDS, ContextSource, RelayTo, Stand, Way
from ikectx.engine.ports import Address as Wish
from ikectx.engine.tables import OSEQ_JUMP
from ikectx.errors import (
    BusyError,
    CharonError,
    IkectxError,
    LinkError,
    RefusedError,
    UnknownSaError,
)
from ikectx.numbers import Status
from ikectx.sa.context import NO_TAGS, Address, ChildContext, FinalChild, FinalState, IkeContext, PeerContext
from ikectx.sa.keys import esp_keys
from ikectx.sa.name import SaName
from ikectx.sa.relocate import relocate
from mobike_ext.address_update import further
from mobike_ext.notify import Invitation
from vici_bridge.away.passing import rule_for
from vici_bridge.host import CharonHost, Mover
from vici_bridge.kernel.nat_relay import forwards_packets
from vici_bridge.kernel.nat_rule import NatRule
from vici_bridge.kernel.xfrm import KernelSa
from vici_bridge.policy.obstacles import (
    check_alone,
    check_context,
    check_kernel,
    check_kind,
    check_ports,
    check_told,
)
from vici_bridge.policy.ways import behind_nat, caution, check_relay, forgetful, reason, wanted
from vici_bridge.vici.views import (
    EXT_MOBIKE,
    ChildView,
    SaView,
    child_lifetime,
    departing_view,
    ike_lifetime,
    peer_context,
)

from .freeze import DIVERT, FREEZE, Freezing, goes_on_still, stop_at_last
from .invite import INVITE, SPEAKS, UNHEARD
from .leaving import LIVING, Ender, Leaving, Teller, in_the_way, last_request
from .release import RELEASE
from .runner import Runner, context_of
from .thaw import CALLS_BACK, THAW

log = logging.getLogger(__name__)

_STEPS = (DIVERT, FREEZE, THAW, RELEASE, INVITE, UNHEARD)
_INVITES = (INVITE.name, UNHEARD.name)
_LOOK = 0.1
"""Seconds between two checks how much ESP the SA has sent."""
AGAIN = 2.0
"""Seconds until the end of an invitation is tried again, while charon is away or the store is full."""
_LEAVING = ("REKEYED", "DELETING", "DELETED")


class CharonSource(ContextSource):
    """A `ContextSource` on a running charon."""

    def __init__(
        self,
        host: CharonHost,
        mover: Mover,
        ender: Ender | None = None,
        teller: Teller | None = None,
    ) -> None:
        """`mover`, `ender` and `teller` must reach the mobile node while the SA is muted, by the mark
        `mute.MARK`."""
        self._host = host
        self._mover = mover
        self._ender = ender
        self._teller = teller
        self._runner: Runner[Any] = Runner(host.leaving, host.spawn, host.listing.crowd, *_STEPS)
        self.departing: set[SaName] = set()
        """SAs charon is destroying (their updown script runs): not listed, still in the kernel."""
        self._reqids: dict[SaName, frozenset[int]] = {}
        """reqids of the CHILD_SAs of SAs that charon is destroying."""
        self._handed: set[SaName] = set()
        """SAs that go to a gateway which has no part of them yet."""
        self._silent: set[SaName] = set()
        """SAs whose mobile node was being called back when they were exported."""
        self._sending: set[SaName] = set()
        """SAs whose ESP is still sent and counted although they are frozen."""

    async def _view(self, sa: SaName) -> SaView | None:
        if sa in self.departing:
            return departing_view(self._host.context(sa))
        return await self._host.view(sa)

    async def _unchanged_view(self, sa: SaName) -> SaView | None:
        """The view for an export. charon is not asked if it has told nothing of the SA since it showed it
        last, because a freeze compares the export with its present state. One by which the SA cannot be moved
        is looked at again."""
        host, view = self._host, None
        if sa not in self.departing:
            settled = host.known.settled(sa)
            view = host.listing.unchanged(sa) if settled else host.listing.recent(sa)
        if view is None or view.state != "ESTABLISHED" or view.tasks:
            view = await self._view(sa)
        return view

    def departing_by_reqid(
        self, reqid: int, connections: Collection[str]
    ) -> tuple[SaName, IkeContext, float] | None:
        """The IKE_SA whose CHILD_SA has that reqid, its context, and the seconds since its last IKE request.

        charon gives its updown script the reqid, and has reported the SA's deletion over HA by then. Only SAs
        of `connections` are considered, each once in the kernel, because a charon that stops calls the script
        for thousands, and waits for each answer.
        """
        departed = self._host.heard.departed()
        self._reqids = {sa: known for sa, known in self._reqids.items() if sa in departed}
        # the last one first: charon gives the reqid again to a mobile node that has connected anew
        for name, (context, quiet) in reversed(departed.items()):
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
        return frozenset(sa.reqid for sa in kernel.get_sas(names) if sa is not None)

    async def find(self, mn: Address) -> list[SaName]:
        """See `ContextSource.find`. SAs that are PASSIVE, or being made or deleted, do not count as
        served."""
        known = self._host.known
        await known.again(view.spis for view in (await known.now()).at(mn))
        return [view.spis for view in known.present.at(mn) if view.state == "ESTABLISHED"]

    async def stands(self, sa: SaName, let_go: bool) -> Stand:
        """See `ContextSource.stands`."""
        host = self._host
        if sa in {one.spis for one in await asyncio.to_thread(host.mute.listing)}:
            return "frozen"
        view = await host.view(sa)
        if view is None:
            return "gone"
        if host.kernel is None:
            return "unknown"
        reqids = {child.reqid for child in view.children}
        if any(policy.direction == "out" for policy in host.kernel.policies_about(reqids)):
            return "served"
        if not (let_go and reqids):
            return "unknown"
        log.warning("%s was let go, and is made mute again: somebody has emptied nftables", view.name)
        host.mute.mute_in(sa)
        host.mute.mute_out(sa)
        return "frozen"

    def recorded(self, sa: SaName) -> IkeContext:
        """See `ContextSource.recorded`. Uses only the HA messages of charon."""
        return self._host.context(sa)

    async def export(self, sa: SaName, *, away: bool = False) -> IkeContext:
        """See `ContextSource.export`. Keys are derived and compared with those in the kernel."""
        host = self._host
        view = await self._unchanged_view(sa)
        host.ha_version.check()
        host.orphans.check(sa)
        if view is not None:
            check_kind(view)
            if not host.config.mobile_node:
                check_ports(view, host.config.ports)
        await host.catch_up(sa)
        if view is None and sa in host.rekeyed:
            raise BusyError(f"the IKE_SA {sa} was rekeyed meanwhile", hint="try again: it has other SPIs now")
        if view is None:
            raise UnknownSaError(f"charon has no IKE_SA {sa}")
        _refuse_busy(view, away)
        if not (away or host.config.mobile_node):
            check_alone(view, await host.alike(sa))
        row = host.leaving.of(sa)
        # what was to follow an invitation may not have begun yet after a start
        invited = row.step in _INVITES and row.facts.request is not None
        called = invited or CALLS_BACK in row.later
        (self._silent.add if called else self._silent.discard)(sa)
        if called and not away:
            raise BusyError(
                "the MN has not answered since a move that failed: nobody knows which message ID it expects",
                hint="it is asked again and again; try again when it has answered",
            )
        context = relocate(host.context(sa), local=view.local, remote=view.remote)
        if not host.config.mobile_node:
            check_context(context)
        check_told(view, context)
        if called and row.facts.request is not None:
            context = replace(context, mid_initiator=row.facts.request, unsure=True)
        elif away and view.tasks:
            context = replace(context, mid_initiator=last_request(context), unsure=True)
        # a resync after an IKE rekey reports no virtual IPs (5.9.8, 6.0.6); the new gateway needs them for
        # selectors
        vips = view.remote_vips or context.remote_vips
        context = replace(context, lifetime=ike_lifetime(view), remote_vips=vips)
        living = {child.spi_in: child for child in view.children if child.state in LIVING}
        children = []
        for child in context.children:
            seen = living.get(child.spi_in)
            if seen is not None:
                children.append(self._measured(context, child, seen))
        context = replace(context, children=tuple(children))
        conn = await host.vici.connection(context.connection)
        peer = None if conn is None else _admitted(context, peer_context(context.connection, conn))
        return replace(context, peer=peer, update_spi=host.agents.has(context))

    def _measured(self, context: IkeContext, child: ChildContext, view: ChildView) -> ChildContext:
        """The child with the values that only the kernel has: counters, windows, limits."""
        lifetime = child_lifetime(view)
        if self._host.kernel is None:
            return replace(child, lifetime=lifetime, tags=view.tags)
        inbound, outbound = self._host.kernel_pair(context, child)
        if inbound is None or outbound is None:
            raise BusyError(f"the kernel does not hold both ESP SAs of CHILD_SA {child.name} now")
        for kept in (inbound, outbound):
            check_kernel(child.name, kept)
        self._compare_keys(context, child, inbound, outbound)
        limits, used = inbound.limits, (inbound.usage, outbound.usage)
        return replace(
            child,
            inbound=inbound.replay.inbound,
            outbound=outbound.replay.outbound,
            tags=view.tags,
            lifetime=replace(
                lifetime,
                bytes_limit=limits.hard_bytes,
                packets_limit=limits.hard_packets,
                # one figure for both, because either SA has the CHILD_SA rekeyed when it reaches its limit
                bytes_used=max(one.bytes for one in used),
                packets_used=max(one.packets for one in used),
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

    async def divert(self, context: IkeContext, to: str) -> None:
        """See `ContextSource.divert`. With ESP in user space nothing is done, because outbound packets there
        have no policy that could be removed."""
        if self._host.kernel is not None:
            look = partial(self._view, context.spis)
            await self._runner.run(DIVERT, Freezing(self._host, context, self._mover, look, to=to))

    def way(self, view: SaView) -> tuple[str, str]:
        """How its mobile node would get to another gateway, and why, by charon's HA messages alone."""
        host = self._host
        with contextlib.suppress(IkectxError):
            context = relocate(host.context(view.spis), local=view.local, remote=view.remote)
            if self.invites(view.spis, "auto"):
                return "invite", "it is behind a NAT, and has an agent"
            relayed_by = host.origins.relayed_by(context)
            if wanted(context, "", "auto", relayed_by, kernel_esp=host.kernel is not None) == "relay":
                return "relay", reason(context, "", relayed_by)
        return "move", ""

    async def choose(self, context: IkeContext, to: str, address: Wish) -> Way:
        """See `ContextSource.choose`."""
        host = self._host
        if address == "invite":
            return Way("mn", "its agent is invited")
        relayed_by = host.origins.relayed_by(context)
        way = wanted(context, to, address, relayed_by, kernel_esp=host.kernel is not None)
        if way != "relay":
            return Way(way, caution(context, way))
        why = reason(context, to, relayed_by)
        if relayed_by == to:
            return Way(way, why, context.remote)
        passing = host.away.passing
        forwards = forwards_packets(context.remote.address.version)
        others = (await host.known.now()).at(context.remote.address)
        check_relay(context, others, forwards=forwards, able=passing.able)
        return Way(way, why, passing.seen_at(context))

    def invites(self, sa: SaName, address: Wish) -> bool:
        """See `ContextSource.invites`."""
        if address not in ("invite", "auto"):
            return False
        host = self._host
        try:
            context = host.context(sa)
        except IkectxError:
            return False  # the export says why it cannot be moved
        able = self._teller is not None and host.agents.has(context)
        if address == "invite" and not able:
            raise RefusedError(
                "the MN is not known to have an agent, so nobody there would understand an invitation",
                hint="--address relay; or agents = true for its connection, if its MNs have one",
                status=Status.NOT_COVERED,
            )
        if address == "invite":
            return True
        return able and host.kernel is not None and behind_nat(context)

    async def invite(self, sa: SaName, to: str) -> None:
        """See `ContextSource.invite`."""
        host = self._host
        context = await self.export(sa)
        if to:
            told = [Invitation(to).serialize()]
        elif context.extensions & EXT_MOBIKE and not forgetful(context):
            told = further(host.config.addresses)
        else:
            raise RefusedError("the MN does not speak MOBIKE", status=Status.NO_MOBIKE)
        look = partial(self._view, sa)
        work = Freezing(host, context, self._mover, look, to=to, teller=self._teller, told=told)
        try:
            await self._runner.run(INVITE, work)
        except BaseException as error:
            try:
                await self._unheard(context)
            except IkectxError:
                host.spawn(self._end_invitation(sa, speaks=False))
            if not isinstance(error, LinkError):
                raise
            log.warning("%s: the MN did not answer what it was told: %s", context.connection, error)
            if not to:  # one that is invited may have been told, and come to the other gateway
                silent = f"the MN at {context.remote} did not answer"
                raise LinkError(silent, status=Status.PEER_SILENT) from None

    async def _unheard(self, context: IkeContext) -> None:
        """An invitation has failed."""
        await self._runner.run(UNHEARD, self._leaving(context))

    async def _end_invitation(self, sa: SaName, speaks: bool) -> None:
        """An agent before this one was ended while it invited, or charon was, or the store could not be
        written: charon is to speak again, if it has the SA still and does not yet. That is tried until it
        succeeds, or another step of the SA begins."""
        host, logged = self._host, False
        while True:
            try:
                view = await host.view(sa)
                if host.leaving.of(sa).step not in _INVITES:
                    return
                if view is None or speaks or sa not in host.record:
                    host.mute.unmute(sa)
                    host.leaving.drop(sa)
                    return
                await self._unheard(relocate(host.context(sa), local=view.local, remote=view.remote))
                return
            except IkectxError as error:
                if not logged:
                    log.warning("SA %s: charon is silent since an invitation, because of this: %s", sa, error)
                logged = True
                await asyncio.sleep(AGAIN)

    async def freeze(
        self,
        context: IkeContext,
        to: str = "",
        *,
        away: bool = False,
        sending: bool = False,
        renaming: bool = False,
        relay: RelayTo | None = None,
    ) -> FinalState:
        """See `ContextSource.freeze`. `to` names the peer whose inner addresses get packets for the mobile
        node.

        charon reports the next message ID over HA when it sends a request, not when that is answered. With
        the SA muted no answer arrives any more, so the mobile node expects that ID or the one before it.
        """
        work = Freezing(
            self._host,
            context,
            self._mover,
            partial(self._view, context.spis),
            to=to,
            away=away,
            sending=sending,
            renaming=renaming,
            unprepared=context.spis in self._handed,
            departing=context.spis in self.departing,
            relay=self._rule(context, relay),
        )
        self._handed.discard(context.spis)
        try:
            await self._runner.run(FREEZE, work)
        except BaseException:
            # packets may have left through the other gateway since it prepared the SA
            await self._take_back(context, 0 if work.unprepared else 2 * OSEQ_JUMP)
            raise
        if work.goes_on:
            self._sending.add(context.spis)
            self._host.spawn(self._go_on(context, work.final))
        return work.result()

    def _rule(self, context: IkeContext, relay: RelayTo | None) -> NatRule | None:
        """None also for a mobile node that the other gateway relays: it goes back there."""
        if relay is None or relay.seen_at == context.remote:
            return None
        return rule_for(context, relay.seen_at.port, relay.to, in_udp=self._host.kernel is None)

    async def _go_on(self, context: IkeContext, final: Sequence[FinalChild]) -> None:
        """Let ESP leave until the other gateway sends it, or until a limit of time or packets is reached."""
        end = asyncio.get_running_loop().time() + SENDING_SECONDS
        start = {child.spi_in: child.outbound.seq for child in final}
        while context.spis in self._sending:
            try:
                if asyncio.get_running_loop().time() > end or self._sent(context, start) >= SENDING_PACKETS:
                    log.warning("%s: no more ESP from here, the MN has not been told yet", context.connection)
                    self._end_sending(context)
            except IkectxError as error:  # its numbers must not come to those of the other gateway
                log.error("%s: ESP still leaves here, it is tried again: %s", context.connection, error)
            await asyncio.sleep(_LOOK)

    def _sent(self, context: IkeContext, start: Mapping[bytes, int]) -> int:
        """The largest number of packets that a CHILD_SA has sent since `start`."""
        sent = [0]
        for child in context.children:
            _, outbound = self._host.kernel_pair(context, child)
            if outbound is not None:
                sent.append(outbound.replay.oseq - start[child.spi_in])
        return max(sent)

    def _end_sending(self, context: IkeContext) -> None:
        """Stop the ESP that goes on, unless that was done; then its policies are noted."""
        work = self._leaving(context)
        if goes_on_still(work):
            stop_at_last(work)
        self._sending.discard(context.spis)

    def _leaving(self, context: IkeContext, view: SaView | None = None, *, jump: int = 0) -> Leaving:
        look = partial(self._view, context.spis)
        return Leaving(self._host, context, self._mover, look, self._ender, view, jump=jump)

    async def thaw(self, context: IkeContext, oseq_jump: int) -> None:
        """See `ContextSource.thaw`."""
        if await self._take_back(context, oseq_jump):
            raise UnknownSaError(
                f"charon has lost the IKE_SA {context.spis} while it was frozen",
                hint="nobody serves the MN; it connects anew when it notices",
            )

    async def _take_back(self, context: IkeContext, oseq_jump: int) -> bool:
        """Thaw; returns whether charon has lost the SA while the other gateway had it."""
        self._sending.discard(context.spis)
        view = await self._host.view(context.spis)
        if view is not None:
            context = relocate(context, local=view.local, remote=view.remote)
        work = self._leaving(context, view, jump=oseq_jump)
        facts = work.facts
        await self._runner.run(THAW, work)
        return work.view is None and facts.request is not None and not facts.ended

    async def release(self, context: IkeContext) -> None:
        """See `ContextSource.release`. Late packets are decrypted for `late` seconds more."""
        self._sending.discard(context.spis)
        await self._runner.run(RELEASE, self._leaving(context, await self._last_view(context)))

    async def _last_view(self, context: IkeContext) -> SaView | None:
        """charon's view of an SA that has left. The freeze's will do if charon has wanted to say nothing
        since: it does when somebody ends the SA."""
        host, facts = self._host, self._host.leaving.of(context.spis).facts
        if not facts.unique_id or context.spis not in host.record or host.mute.dropped(context.spis):
            return await host.view(context.spis)
        view, reqids, tags = departing_view(context), dict(facts.reqids), dict(facts.tags)
        children = tuple(
            replace(child, reqid=reqids.get(child.spi_in, 0), tags=tags.get(child.spi_in, NO_TAGS))
            for child in view.children
        )
        return replace(view, unique_id=facts.unique_id, children=children)

    def hands_over(self, sa: SaName, *, held: bool = False) -> None:
        """See `ContextSource.hands_over`. Nothing can be made ready of ESP in user space: packets that were
        sent on would leave the other gateway in the clear."""
        if not held or self._host.kernel is None:
            self._handed.add(sa)

    def not_taken(self, sa: SaName) -> None:
        """See `ContextSource.not_taken`."""
        if sa not in self._silent:  # that gateway asked nothing, but another one did before
            self._host.leaving.note(sa, request=None)

    def stays(self, sa: SaName) -> None:
        """See `ContextSource.stays`."""
        self._host.away.passing.given_up(sa)
        self._host.origins.stays(sa)

    def resume(self) -> None:
        """After a restart: restore blocks and detours of SAs that left, whatever the kernel still has, and
        stop SAs that were still sending, because their packets were not counted while the agent was down."""
        for row in self._host.leaving.all():
            if not row.facts.sends_to or row.step:
                continue  # a step that is open goes on, and sees to it itself
            try:
                self._end_sending(context_of(row) if row.context else self._host.context(row.sa))
            except IkectxError as error:
                log.error("SA %s: ESP that goes on is not ended by the agent's start: %s", row.sa, error)
        for row in self._host.leaving.all():
            if row.step in _INVITES:
                self._host.spawn(self._end_invitation(row.sa, SPEAKS in (row.begun, *row.done)))
        self._host.away.restore()
        self._runner.resume(lambda sa, context: self._leaving(context))


def _refuse_busy(view: SaView, away: bool) -> None:
    if view.state != "ESTABLISHED":
        raise BusyError(f"the IKE_SA {view.name} is {view.state}, not ESTABLISHED")
    if in_the_way(view, away):
        raise BusyError(f"the IKE_SA {view.name} has an exchange in flight: {', '.join(view.tasks)}")
    for child in view.children:
        if child.state not in (*LIVING, *_LEAVING):
            raise BusyError(f"the CHILD_SA {child.name} is {child.state}")


def _admitted(context: IkeContext, peer: PeerContext) -> PeerContext:
    """The part of the PAD entry that the new gateway checks: how the mobile node was authenticated."""
    names = tuple(dict.fromkeys(child.name for child in context.children))
    return PeerContext(peer.connection, remote_auth=peer.remote_auth, children=names)
