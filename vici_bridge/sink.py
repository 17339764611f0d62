"""`CharonSink`: nSG's side. Take an SA in behind charon's back, own it, and activate it in charon.

The order is the one the ha plugin needs: checks, IKE_ADD(s), IKE_UPDATE, CHILD_ADDs while PASSIVE,
replay state into the kernel, then (when the other side has let go) final counters, routes and updown, the
exchange with the MN, message IDs, and the segment toggle. Each step is seen done, not assumed.

The toggle activates every PASSIVE SA, those that are not ours yet or whose MN is just being asked among them.
So an SA is mute from before charon has it until all of this is done: charon neither hears nor says anything.

An SA whose SPIs are taken here is installed under others (`renames`), and the MN is told them together with
the address. The methods' `context` names the SA as the other gateway does; `shape` is what stands in charon.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from ikectx import trace
from ikectx.context import Address, Endpoint, FinalState, IkeContext
from ikectx.cxtp import ContextDataBlock
from ikectx.errors import (
    CharonError,
    IkectxError,
    KernelError,
    LinkError,
    RefusedError,
    StoreError,
    WireError,
)
from ikectx.name import SaName
from ikectx.numbers import STATUS_TEXT, Fpt, Status
from ikectx.ports import MoveReport, Verdict
from ikectx.relocate import relocate
from ikectx.spis import ESP, IKE, NewSpi, serialize_new_spis

from . import ha
from .chain import import_messages
from .charon import SaView
from .checks import check_esp_spis, check_ike_spis, still_here
from .host import ESP as ESP_PROTOCOL
from .host import CharonHost, Mover, Settler
from .looks import Looks, Seen, objections
from .names import Clash, Plan, Renamer, Taken, Told, Wish, clash, own_spi, without_exchange
from .renames import INSTALL_TIMEOUT, Renames
from .updown import NotStarted
from .xfrm_parts import INET as AF_INET
from .xfrm_parts import INET6 as AF_INET6

log = logging.getLogger(__name__)

_IMPORTED_FOR = 600.0
"""Seconds in which an agent that was killed just then comes back, and activates what is active; and in which
an MN asks again what its SA is called."""
_SWEEP = 60
"""Seconds between two looks for notes that are older than that."""


class Ear(Protocol):
    """What the MN says while charon may not hear it (`mobike_ext.held`)."""

    async def deliver(self) -> int:
        """Give it to charon."""

    def close(self) -> None: ...


Listen = Callable[[IkeContext], Ear]
"""Begin to hear the MN of a context, as it stands here. Errors: LinkError."""


class CharonSink:
    """A `ContextSink` on a running charon."""

    def __init__(
        self,
        host: CharonHost,
        mover: Mover,
        renamer: Renamer | None = None,
        settler: Settler | None = None,
        listen: Listen | None = None,
    ) -> None:
        """`mover`, `renamer`, `settler` must get through to the MN while the SA is muted: `mute.MARK`.

        Without `renamer` an SA whose SPIs are taken is refused, unless the MN is told in an answer; without
        `settler` one whose next message ID is not known. What the MN asks while its SA is mute is lost
        without `listen`, and asked again after seconds.
        """
        self._host = host
        self._mover = mover
        self._renamer = renamer
        self._settler = settler
        self._listen = listen
        self._ears: dict[str, Ear] = {}
        self._renames = Renames(host)
        self._renames.load()
        self._looks = Looks(host)
        self._later: set[str] = set()
        """SAs whose MN will be told by an answer it waits for (CTAA)."""
        self._seen: set[str] = set()
        """SAs that charon had when they were taken, in this life of the agent."""
        self._swept = 0
        self._givers: dict[str, str] = {}
        """Which gateway gives an SA that is being taken in."""

    def resume(self) -> None:
        """After a start: end what an agent before this one had no time to end."""
        self._renames.resume()

    def came_from(self, context: IkeContext, peer: str) -> None:
        """See `ikectx.ports.Follower`."""
        self._givers[context.spis.key] = peer

    def _here(self, context: IkeContext) -> IkeContext:
        """The context as it stands at this gateway: our outer address instead of the other's."""
        address = self._host.address_for(context)
        return relocate(context, local=Endpoint(address, context.local.port))

    async def check(self, context: IkeContext, keep_address: bool) -> list[Verdict]:
        """See `ContextSink.check`: every reason is listed, not only the first."""
        async with self._looks.look() as seen:
            return self._judge(context, keep_address, seen)[0]

    def _judge(self, context: IkeContext, keep_address: bool, seen: Seen) -> tuple[list[Verdict], Taken]:
        """All that speaks against it, and the names that are taken."""
        host = self._host
        try:
            here = self._here(context)
        except IkectxError as error:
            return [Verdict(Fpt.IKEV2_SA, error.status, str(error))], Taken()
        taken = self._renames.taken(here, seen.views)
        spis = self._check_spis(context, here, taken, seen.views)
        verdicts = objections(context, here, seen, host.config, spis, keep_address=keep_address)
        if host.kernel is not None:
            family = AF_INET6 if here.local.address.version == 6 else AF_INET
            for child in here.children:
                if not host.kernel.supports(child.encr, child.encr_bits, child.integ, family):
                    verdicts.append(
                        Verdict(
                            Fpt.SAD,
                            Status.ALGORITHM,
                            f"the kernel cannot do {child.encr.name}/{child.encr_bits} {child.integ.name}",
                        )
                    )
        return verdicts, taken

    async def still_here(self, final: FinalState, mn: Address, who: str) -> str:
        """See `ikectx.ports.Witness`."""
        host, kernel = self._host, self._host.kernel
        views = await host.views()
        esp: list[bytes] = []
        if kernel is not None:
            late = {sa.spi for sa in kernel.late_sas()}
            theirs = [child.spi_in for child in final.children if child.spi_in not in late]
            esp = [
                spi
                for spi in theirs
                if any(
                    kernel.get_sa(address, spi, ESP_PROTOCOL) is not None for address in host.config.addresses
                )
            ]
        return still_here(final, mn, views, host.record.names(), esp, who)

    def _check_spis(
        self, context: IkeContext, here: IkeContext, taken: Taken, views: Sequence[SaView]
    ) -> list[Verdict]:
        """What is taken and cannot be given another name."""
        reason = self._unresolvable(context, here, clash(here, taken))
        if not reason:
            return []
        verdicts = [*check_ike_spis(here, taken, views), *check_esp_spis(here, taken)]
        return [replace(one, detail=f"{one.detail}; {reason}") for one in verdicts]

    def _unresolvable(self, context: IkeContext, here: IkeContext, found: Clash) -> str:
        """Why SPIs that are taken stand against it; empty: they do not."""
        if not found:
            return ""
        if self._host.config.collision == "refuse":
            return "transfer.collision is refuse here"
        if context.spis.key in self._later:
            return without_exchange(here, found)
        if self._renamer is None:
            return "nobody here can ask the MN for other SPIs"
        return ""

    def tell_later(self, context: IkeContext, later: bool = True) -> None:
        """To be called before `check` and `prepare`; `later`: the MN moves by itself and waits for an answer.

        The answer will tell it the new SPIs: see `new_names`. `move_peer` is then not called.
        """
        if later:
            self._later.add(context.spis.key)
        else:
            self._later.discard(context.spis.key)

    def must_tell(self, context: IkeContext) -> bool:
        """Has the SA new SPIs that no answer tells the MN? `move_peer` must, though it moves by itself."""
        plan = self._renames.plan_of(self._here(context))
        return plan is not None and not plan.later

    def renames(self, context: IkeContext) -> bool:
        """See `ikectx.ports.Renamer`."""
        plan = self._renames.plan_of(self._here(context))
        return plan is not None and bool(plan.children)

    def cannot_send(self, context: IkeContext) -> bool:
        """See `ikectx.ports.Renamer`."""
        return self._renames.others_send(self._here(context))

    def new_names(self, context: IkeContext) -> tuple[ContextDataBlock, ...]:
        """The SPIs that the SA has here and the MN does not know yet, as a block of a CTAA; none: the old."""
        names = self._host.coming.of(context.spis).facts.new_names
        return (ContextDataBlock(Fpt.NEW_SPIS, names),) if names else ()

    async def prepare(self, context: IkeContext, keep_address: bool) -> None:
        """See `ContextSink.prepare`. On any failure nothing of the SA stays."""
        host = self._host
        async with self._looks.look() as seen, host.import_lock:
            verdicts, taken = self._judge(context, keep_address, self._looks.now(seen))
            bad = [v for v in verdicts if v.status is not Status.OK]
            if bad:
                raise RefusedError(
                    f"{STATUS_TEXT.get(bad[0].status, '')}: {bad[0].detail}", status=bad[0].status
                )
            here = self._here(context)
            if host.kernel is not None:
                ours = {child.spi_in for child in here.children}
                clashes = clash(here, taken)
                ours -= {here.children[place].spi_in for place in clashes.inbound}
                host.kernel.drop_late([sa for sa in host.kernel.late_sas() if sa.spi in ours])
            host.away.comes(here)
            later = context.spis.key in self._later
            await self._renames.end_relay(here.spis, 0.0)
            self._renames.forget(here, undone=True)
            plan = self._renames.plan(here, taken, told_later=later)
            host.coming.note(context.spis, stage="installing", since=0, drawn="", new_names=b"", named=0)
            try:
                shape = self._renames.shape(here)
                messages = import_messages(shape, seen.version)
                host.expected.add(shape.spis)
                await asyncio.to_thread(host.mute.mute_in, shape.spis)
                await asyncio.to_thread(host.mute.mute_out, shape.spis)
                if plan is not None:
                    self._renames.ready(here, plan)
                await host.send(messages)
                view = await self._installed(shape)
                self._looks.came(view)
                host.away.awaits(here, {child.reqid for child in view.children})
                host.record.learn(shape, seen.version)
                self._write_replay(shape, here, host.config.oseq_jump)
                if plan is not None:
                    self._renames.hold(here, plan)
            except BaseException:
                await self.undo(context)
                raise
            host.save()

    @trace.spanned("charon installs")
    async def _installed(self, here: IkeContext) -> SaView:
        """Wait until charon lists the SA with its children, and the kernel has their ESP SAs.

        It is PASSIVE, or ESTABLISHED already by the toggle of another SA.
        """
        host = self._host
        end = time.monotonic() + INSTALL_TIMEOUT
        pause = 0.01
        while True:
            view = await host.view(here.spis)
            listed = set() if view is None else {(child.spi_in, child.spi_out) for child in view.children}
            wanted = {(child.spi_in, child.spi_out) for child in here.children}
            if view is not None and view.state in ("PASSIVE", "ESTABLISHED") and wanted <= listed:
                pairs = [host.kernel_pair(here, child) for child in here.children]
                if host.kernel is None or all(a is not None and b is not None for a, b in pairs):
                    return view
            if time.monotonic() > end:
                seen = "nothing" if view is None else f"{view.state} with {len(listed)} CHILD_SAs"
                raise CharonError(
                    f"charon did not install the SA: wanted PASSIVE with {len(wanted)} CHILD_SAs, saw {seen}",
                    hint="see charon's log (the ha plugin logs why at level 1)",
                )
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.1)

    @trace.spanned("counters")
    def _write_replay(self, shape: IkeContext, counters: IkeContext, jump: int) -> None:
        """Sequence numbers and windows into the kernel before a packet leaves; children in the same order.

        Outbound goes on after a jump, never back; inbound windows are joined with what arrived here already.
        """
        kernel = self._host.kernel
        if kernel is None:
            return
        for child, given in zip(shape.children, counters.children, strict=True):
            inbound, outbound = self._host.kernel_pair(shape, child)
            if inbound is None or outbound is None:
                raise KernelError(f"an ESP SA of CHILD_SA {child.name} has gone")
            if (child.nonce_i, child.nonce_r) != (given.nonce_i, given.nonce_r):
                continue  # rekeyed here: other keys, numbers of their own
            if child.spi_in == given.spi_in:
                kernel.set_replay(inbound, given.inbound, outbound=False)
            sent = given.outbound
            ahead, _ = kernel.get_replay(outbound, outbound=True)
            if sent.seq + jump > ahead.seq:
                kernel.set_replay(outbound, replace(sent, seq=sent.seq + jump), outbound=True)

    async def take(self, context: IkeContext, final: FinalState) -> None:
        """See `ContextSink.take`."""
        host = self._host
        here = self._here(context)
        counters = {child.spi_in: child for child in final.children}
        finals = replace(
            here,
            children=tuple(
                replace(
                    child, inbound=counters[child.spi_in].inbound, outbound=counters[child.spi_in].outbound
                )
                if child.spi_in in counters
                else child
                for child in here.children
            ),
        )
        shape = await self._renames.converge(here)
        self._write_replay(shape, finals, host.config.oseq_jump)
        view = await host.view(shape.spis)
        if view is None:
            raise CharonError("charon lost the prepared SA")
        self._seen.add(context.spis.key)
        peer = self._givers.get(context.spis.key)
        if peer is not None:
            host.origins.came(context, peer, shape.spis)
        if not self._renames.others_send(here):
            await self._draw(context, shape, view)

    async def _draw(self, context: IkeContext, shape: IkeContext, view: SaView) -> None:
        """Packets for the MN come here from now on."""
        self._host.away.opens(shape)
        coming, sa = self._host.coming, context.spis
        before = coming.of(sa).facts.drawn
        coming.note(sa, drawn="begun")
        reqids = {child.spi_in: child.reqid for child in view.children}
        try:
            await self._host.updown(shape, up=True, reqids=reqids, unique_id=view.unique_id)
        except NotStarted as error:
            if not error.began:
                coming.note(sa, drawn=before)  # there is nothing to take back
            raise
        coming.note(sa, drawn="done")

    async def settle(self, context: IkeContext, final: FinalState) -> FinalState:
        """See `ikectx.ports.Settler`."""
        if self._settler is None:
            raise RefusedError(
                "nobody here can ask the MN for the next message ID", status=Status.NOT_COVERED
            )
        return replace(final, mid_initiator=await self._settler(self._here(context), final), unsure=False)

    async def move_peer(self, context: IkeContext, final: FinalState) -> MoveReport:
        """See `ContextSink.move_peer`. Nothing to tell where the gateway's address and all SPIs stay."""
        here = self._here(context)
        plan = self._renames.plan_of(here)
        if plan is None and here.local == context.local:
            return MoveReport()
        self._hear(context, here)
        if plan is not None:
            return await self._rename(context, here, plan, final)
        if context.spis.key not in self._seen and await self._host.view(here.spis) is None:
            raise CharonError("charon lost the prepared SA meanwhile")  # before the MN is told
        base = self._received(here)
        return await self._mover(here, final, lambda: self._received(here) > base)

    def _hear(self, context: IkeContext, here: IkeContext) -> None:
        self._close_ear(context)
        if self._listen is None:
            return
        try:
            self._ears[context.spis.key] = self._listen(here)
        except (LinkError, KernelError) as error:
            log.info("%s: what it asks now waits for its next try: %s", here.remote_id, error)

    def _close_ear(self, context: IkeContext) -> None:
        ear = self._ears.pop(context.spis.key, None)
        if ear is not None:
            ear.close()

    async def _rename(
        self, context: IkeContext, here: IkeContext, plan: Plan, final: FinalState
    ) -> MoveReport:
        """Tell the MN new SPIs and our address, by UPDATE_SPI or, where it does not know that, by rekeys."""
        host = self._host
        if context.spis.key not in self._seen:
            await self._renames.converge(here)  # an agent before this one may have ended in the middle
        left, ike = plan.left(here), plan.ike_left(here)
        moves = here.local != context.local and not plan.moved
        if not left and not ike and not moves:
            return plan.report
        if self._renamer is None:
            raise RefusedError("nobody here can ask the MN for other SPIs", status=Status.ESP_SPI_IN_USE)
        start = plan.told or replace(
            here, mid_initiator=final.mid_initiator, mid_responder=final.mid_responder
        )
        wish = Wish(
            children=tuple((child.spi_in, child.new_in) for child in left),
            ike=ike,
            addresses=moves,
            update=host.config.collision == "update" and plan.how != "rekey",
            rekey=True,
            seed=plan.seed,
            agent=host.has_agent(context),
        )
        base = self._renames.arrived(here)
        if moves:
            await self._renames.relay_old(here, context.local.address)

        async def made(now: IkeContext, *, moved: bool, how: str, report: MoveReport) -> None:
            await self._renames.become(
                here, now, moved=moved or plan.moved, how=how, report=plan.report + report
            )

        told: Told = await self._renamer(
            start,
            wish,
            lambda: self._renames.arrived(here) > base,
            made,
        )
        if told.supports:
            host.note_update_spi(here.remote_id)
        return plan.report + told.report

    def _received(self, here: IkeContext) -> int:
        """ESP packets that arrived here on the SA's children."""
        kernel = self._host.kernel
        if kernel is None:
            return 0
        total = 0
        for child in here.children:
            inbound, _ = self._host.kernel_pair(here, child)
            if inbound is not None:
                total += kernel.get_replay(inbound, outbound=False)[1].packets
        return total

    async def activate(self, context: IkeContext, final: FinalState, report: MoveReport) -> None:
        """See `ContextSink.activate`."""
        host = self._host
        here = self._here(context)
        plan = self._renames.plan_of(here)
        known = host.coming.of(context.spis).facts
        if known.stage == "imported":
            return  # message IDs have gone on since
        if known.stage != "active":
            shape = await self._renames.converge(here)
            view = await host.view(shape.spis)
            if view is None:
                raise CharonError("charon lost the prepared SA")
            if known.drawn != "done":
                await self._draw(context, shape, view)
            version = await host.version()
            ike = ha.IkeId.of(shape.current)
            mids = [
                ha.ike_mid(version, ike, initiator=initiator, mid=mid)
                for initiator, mid in zip((True, False), _mids(here, plan, final, report), strict=True)
            ]
            await host.send(mids)
            for message in mids:
                host.record.feed(message)
            view = await host.view(shape.spis)
            if view is None:
                raise CharonError("charon lost the prepared SA")
            if view.state == "PASSIVE":
                await host.activate_segment()
                await self._established(shape)
            self._looks.came(view)  # its names may have changed since it came in
            self._note_lifetimes(shape)
            self._count_on(shape, here)
            if host.config.rekey_after:
                host.fresh.want(shape.spis, [child.spi_in for child in shape.children])
            host.save()
            self._note_names(here, plan)
            host.origins.serves(context, shape.spis)
            host.follow.serves(shape.spis, here)
            host.away.behind.stand(here, {child.reqid for child in view.children})
            host.coming.note(context.spis, stage="active")
        for shape in self._renames.names(here):
            await asyncio.to_thread(host.mute.unmute, shape.spis)
            host.expected.discard(shape.spis)
        ear = self._ears.pop(context.spis.key, None)
        if ear is not None and await ear.deliver():
            log.debug("%s: charon has what the MN asked meanwhile", here.remote_id)
        self._seen.discard(context.spis.key)
        asked = context.spis.key in self._later
        self._later.discard(context.spis.key)
        self._givers.pop(context.spis.key, None)
        try:
            # without its plan an SA of that name is somebody else's: nothing may be undone from here on
            self._renames.forget(here)
            self._imported(context.spis)
            if asked:
                host.note_update_spi(here.remote_id)  # an MN with an agent, and agents know UPDATE_SPI
        except StoreError as error:
            log.error("%s serves, but notes of its move are left: %s", here.remote_id, error)

    def _imported(self, sa: SaName) -> None:
        now = int(time.time())
        self._sweep(now)
        self._host.coming.note(sa, soon=True, stage="imported", since=now, drawn="")

    def _sweep(self, now: int) -> None:
        """Forget rows that nobody will ask for any more; not once for each of a thousand SAs."""
        if now < self._swept + _SWEEP:
            return
        self._swept = now
        for row in self._host.coming.all():
            known = row.facts
            if known.stage == "imported" and now - known.since > _IMPORTED_FOR and known.relay is None:
                self._host.coming.drop(row.sa)

    def _note_names(self, here: IkeContext, plan: Plan | None) -> None:
        """What an answer is to tell the MN, where nobody has asked it."""
        now = time.time()
        if plan is None or plan.told is not None:
            return
        spis = [NewSpi(ESP, child.spi_in, child.new_in) for child in plan.children]
        if plan.ike:
            spis.append(NewSpi(IKE, own_spi(here.current), plan.ike))
        self._host.coming.note(here.spis, new_names=serialize_new_spis(spis), named=int(now))

    @trace.spanned("charon activates")
    async def _established(self, here: IkeContext) -> None:
        end = time.monotonic() + INSTALL_TIMEOUT
        while True:
            view = await self._host.view(here.spis)
            if view is not None and view.state in ("ESTABLISHED", "REKEYING"):
                return
            if time.monotonic() > end:
                raise CharonError(
                    "charon did not activate the SA", hint="is charon.segments the ha plugin's segment_count?"
                )
            await asyncio.sleep(0.01)

    def _note_lifetimes(self, here: IkeContext) -> None:
        """Original deadlines that may come before charon's new timers."""
        wall = time.time()
        left = [seconds for seconds in (here.lifetime.rekey, here.lifetime.reauth) if seconds is not None]
        if left:
            self._host.deadlines.keep(here.spis, None, wall + min(left))
        for child in here.children:
            soft, hard = child.lifetime.rekey, child.lifetime.hard
            if soft is not None or hard is not None:
                # without a soft lifetime the rekey is asked for at nine tenths of the hard one
                due = float(soft) if soft is not None else 0.9 * float(hard or 0)
                self._host.deadlines.keep(here.spis, child.spi_in, wall + due)

    def _count_on(self, shape: IkeContext, here: IkeContext) -> None:
        """Limits of octets and packets go on where they were. Not before charon is active: a limit that is
        reached makes it begin a rekey, which nobody would hear."""
        kernel = self._host.kernel
        for child, given in zip(shape.children, here.children, strict=True):
            used = given.lifetime
            rekeyed = (child.nonce_i, child.nonce_r) != (given.nonce_i, given.nonce_r)
            if kernel is None or rekeyed or not (used.bytes_used or used.packets_used):
                continue
            try:
                for sa in self._host.kernel_pair(shape, child):
                    if sa is not None:
                        kernel.count_on(sa, used.bytes_used, used.packets_used)
            except (KernelError, WireError) as error:
                log.warning("octets and packets of CHILD_SA %s are counted anew: %s", child.name, error)

    async def undo(self, context: IkeContext) -> None:
        """See `ContextSink.undo`."""
        host = self._host
        here = self._here(context)
        row = host.coming.get(context.spis)
        if row is None or row.facts.stage in ("", "imported"):
            self._renames.forget(here, undone=True)
            return
        plan = self._renames.plan_of(here)
        if plan is not None and plan.told is not None:
            log.warning(
                "%s: the MN has new SPIs of ours already; it may have to connect anew", here.remote_id
            )
        view = None
        for shape in self._renames.names(here):
            if host.listening():
                view = await host.view(shape.spis) or view
                await host.delete(
                    shape
                )  # also where it is not listed: an import that stopped leaves ancestors
            else:
                # without charon nothing of it is there: its SAs end with it
                host.record.forget(shape.spis)
                host.save_soon()
            await asyncio.to_thread(host.mute.unmute, shape.spis)
            host.expected.discard(shape.spis)
        self._close_ear(context)
        self._seen.discard(context.spis.key)
        self._later.discard(context.spis.key)
        self._givers.pop(context.spis.key, None)
        if row.facts.drawn:
            shape = self._renames.shape(here)
            reqids = {} if view is None else {child.spi_in: child.reqid for child in view.children}
            unique_id = 0 if view is None else view.unique_id
            if not await host.scripts.finish(shape):
                await host.updown(shape, up=False, reqids=reqids, unique_id=unique_id)
        self._renames.forget(here, undone=True)
        await self._renames.end_relay(here.spis, 0.0)
        host.away.stays(here)
        host.origins.undone(context)
        host.coming.drop(context.spis, soon=True)


def _mids(here: IkeContext, plan: Plan | None, final: FinalState, report: MoveReport) -> tuple[int, int]:
    """Message IDs of our next request and of the one we expect."""
    if plan is not None and plan.told is not None:
        return plan.told.mid_initiator, plan.told.mid_responder
    if plan is not None and plan.ike:
        return 0, 0
    return final.mid_initiator + report.requests, final.mid_responder + report.answered
