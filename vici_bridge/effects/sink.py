"""`CharonSink`: the new gateway's side. Installs an SA in charon and the kernel, owns it, and activates it.

The order is the one that the ha plugin needs: checks, IKE_ADD(s), IKE_UPDATE, CHILD_ADDs while PASSIVE,
replay state into the kernel, then (when the other side has let go) final counters, routes and updown, the
exchange with the mobile node, message IDs, and the segment toggle. Each step is verified, not assumed. A
mobile node that waits for an answer does not wait for updown (`activate`).

The toggle activates every PASSIVE SA, also those that are not ours yet or whose mobile node is just being
asked. So an SA is muted before charon has it, until all of this is done: charon neither receives nor sends
anything.

An SA whose SPIs are taken here is installed under others (`renames`), and the mobile node is told them
together with the address. The methods' `context` has the other gateway's SPIs; `shape` is the SA in charon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ikectx.engine.ports import ContextSink, Evidence, MoveReport
from ikectx.errors import (
    CharonError,
    IkectxError,
    KernelError,
    LinkError,
    RefusedError,
    WireError,
)
from ikectx.numbers import STATUS_TEXT, Fpt, Status
from ikectx.sa.context import Address, Endpoint, FinalState, IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from ikectx.wire.cxtp import ContextDataBlock
from vici_bridge.ha.record import uncovered
from vici_bridge.host import ESP as ESP_PROTOCOL
from vici_bridge.host import CharonHost, Mover, Settler
from vici_bridge.kernel.xfrm import KernelPolicy
from vici_bridge.kernel.xfrm_parts import INET as AF_INET
from vici_bridge.kernel.xfrm_parts import INET6 as AF_INET6
from vici_bridge.policy.checks import check_esp_spis, check_ike_spis, still_here
from vici_bridge.policy.new_names import (
    Clash,
    Plan,
    SpiRenamer,
    Taken,
    Wish,
    clash,
    without_exchange,
)
from vici_bridge.vici.views import SaView

from .activate import ACTIVATE
from .beside import keep_packets
from .coming import Coming, Listen, Memory, keep
from .early import Early
from .looks import Looks, Seen, conflicts, objections
from .prepare import PREPARE
from .renames import Renames
from .runner import Runner
from .take import TAKE
from .undo import UNDO

log = logging.getLogger(__name__)

_IMPORTED_FOR = 600.0
"""Seconds in which an agent that was killed at that moment comes back, and activates again; and in which a
mobile node asks again for its SA's new SPIs."""
_AGAIN = 5.0
"""Seconds until charon is asked again."""
_SWEEP = 60
"""Seconds between two searches for notes that are older than that."""


class CharonSink(ContextSink):
    """A `ContextSink` on a running charon."""

    def __init__(
        self,
        host: CharonHost,
        mover: Mover,
        renamer: SpiRenamer | None = None,
        settler: Settler | None = None,
        listen: Listen | None = None,
    ) -> None:
        """`mover`, `renamer`, `settler` must reach the mobile node while the SA is muted, by the mark
        `mute.MARK`.

        Without `renamer` an SA whose SPIs are taken is refused, unless the mobile node is told in an answer;
        without `settler` one whose next message ID is not known. Requests of the mobile node while its SA is
        muted are lost without `listen`, and repeated after seconds.
        """
        self._host = host
        self._mover = mover
        self._renamer = renamer
        self._settler = settler
        self._listen = listen
        self._memory = Memory()
        self._renames = Renames(host)
        self._renames.load()
        self._looks = Looks(host)
        self._early = Early(host)
        host.on_change = self._early.heed
        self._runner: Runner[Coming] = Runner(
            host.coming, host.spawn, host.listing.crowd, PREPARE, TAKE, ACTIVATE, UNDO
        )
        self._swept = 0
        self._undoing: set[SaName] = set()
        """SAs that do not come and could not be removed yet."""

    def resume(self) -> None:
        """After a start: finish work that an agent before this one left open."""
        if self._host.kernel is not None:
            keep_packets()
        self._early.sweep()
        self._renames.resume()
        self._runner.resume(lambda sa, shape: self._coming(shape, shape, sa=sa, gone=shape))

    def came_from(self, context: IkeContext, peer: str) -> None:
        """See `ContextSink.came_from`."""
        self._memory.givers[context.spis] = peer

    def _here(self, context: IkeContext) -> IkeContext:
        """The context at this gateway, with our outer address instead of the other's."""
        if context.remote.address in self._host.config.addresses:
            mn = self._host.away.passing.of(context.remote)
            if mn is not None:  # the mobile node never left: this gateway relayed it
                return replace(context, local=mn.ours, remote=mn.mn)
        ports = self._host.config.ports
        port = context.local.port if context.local.port in ports else ports[1]
        local = Endpoint(self._host.address_for(context), port)
        if self._relayed(context.spis):
            return replace(
                context, local=local
            )  # it still knows the other gateway's address, as do selectors
        return self._memory.relocated(context, local)

    def _relayed(self, sa: SaName) -> bool:
        facts = self._host.coming.of(sa).facts  # what is left of an earlier move is "imported"
        return sa in self._memory.relayed or (facts.relayed and facts.stage in ("installing", "active"))

    def relayed(self, context: IkeContext, peer: str) -> None:
        """See `ContextSink.relayed`."""
        if peer:
            self._memory.relayed[context.spis] = peer
        else:
            self._memory.relayed.pop(context.spis, None)

    def heard_at(self, context: IkeContext) -> Address | None:
        """See `ContextSink.heard_at`."""
        return self._here(context).local.address

    def _coming(
        self, context: IkeContext, here: IkeContext | None = None, sa: SaName | None = None, **more: Any
    ) -> Coming:
        here = here or self._here(context)
        sa = sa or context.spis
        return Coming(self._host, self._renames, self._memory, self._early, sa, context, here, **more)

    async def check(self, context: IkeContext, keep_address: bool) -> list[Verdict]:
        """See `ContextSink.check`: every reason is listed, not only the first."""
        return (await self._judged(context, keep_address))[1]

    async def _judged(self, context: IkeContext, keep_address: bool) -> tuple[Seen, list[Verdict], Taken]:
        """charon's state, all reasons against the SA, and the names that are taken. SAs that are in its way
        are looked at again, because they may be known no better than from a list of long ago."""
        seen = await self._looks.look(context)
        try:
            here = self._here(context)
        except IkectxError as error:
            return seen, [Verdict(Fpt.IKEV2_SA, error.status, str(error))], Taken()
        verdicts, taken = self._judge(context, here, keep_address, seen)
        if clash(here, taken) or any(one.status is not Status.OK for one in verdicts):
            await self._looks.again(here)
            verdicts, taken = self._judge(context, here, keep_address, seen)
        return seen, verdicts, taken

    def _judge(
        self, context: IkeContext, here: IkeContext, keep_address: bool, seen: Seen
    ) -> tuple[list[Verdict], Taken]:
        """All reasons against the SA, and the names that are taken."""
        host = self._host
        rivals = seen.present.rivals(here)
        taken = self._renames.taken(here, seen.present)
        verdicts = self._objections(context, here, keep_address, seen)
        verdicts += self._check_spis(context, here, taken, rivals)
        verdicts += conflicts(here, seen, rivals)
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

    def _objections(
        self, context: IkeContext, here: IkeContext, keep_address: bool, seen: Seen
    ) -> list[Verdict]:
        """See `objections`. An SA is prepared some milliseconds after its check, and judged alike then if
        charon has told nothing new."""
        relayed_by = self._memory.relayed.get(context.spis, "")
        told = seen.version, seen.listening, seen.connections, seen.pools, seen.algorithms
        case = context, here, told, keep_address, relayed_by
        known = self._memory.judged.pop(context.spis, None)
        if known is None or known[0] != case:
            covered = uncovered(here, seen.version) is Status.OK
            messages = self._memory.messages(context.spis, here, seen.version) if covered else ()
            found = objections(
                *(context, here, seen, self._host.config, messages),
                keep_address=keep_address,
                relayed_by=relayed_by,
            )
            known = case, found
        keep(self._memory.judged, context.spis, known)
        return list(known[1])

    async def still_here(self, final: FinalState, mn: Address, who: str) -> Evidence:
        """See `ContextSink.still_here`."""
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
        words = still_here(final, mn, views, host.record.names(), esp, who)
        muted = {one.spis for one in await asyncio.to_thread(host.mute.listing)}
        for view in views:
            # an SA that is being taken, or was let go, is PASSIVE or mute until all of that has ended
            served = (
                view.state in ("ESTABLISHED", "REKEYING")
                and view.spis not in muted
                and not host.importing(view.spis)
            )
            if view.spis == (final.spi_i, final.spi_r):
                node = view.remote_eap_id or view.remote_id if served else ""
                return Evidence(words, served, node, idle=not served)
        return Evidence(words)

    def _check_spis(
        self, context: IkeContext, here: IkeContext, taken: Taken, views: Sequence[SaView]
    ) -> list[Verdict]:
        """SPIs that are taken and cannot be replaced."""
        reason = self._unresolvable(context, here, clash(here, taken))
        if not reason:
            return []
        verdicts = [*check_ike_spis(here, taken, views), *check_esp_spis(here, taken)]
        return [replace(one, detail=f"{one.detail}; {reason}") for one in verdicts]

    def _unresolvable(self, context: IkeContext, here: IkeContext, found: Clash) -> str:
        """Why taken SPIs prevent the import; empty: they do not."""
        if not found:
            return ""
        if self._host.config.collision == "refuse":
            return "transfer.collision is refuse here"
        if context.spis in self._memory.asked:
            return without_exchange(here, found)
        if self._renamer is None:
            return "nobody here can ask the MN for other SPIs"
        return ""

    def tell_later(self, context: IkeContext, later: bool = True) -> None:
        """Called before `check` and `prepare`; `later`: the mobile node moves by itself and waits for an
        answer.

        The answer will have the new SPIs: see `new_names`. `move_peer` is then not called.
        """
        if later:
            self._memory.asked.add(context.spis)
        else:
            self._memory.asked.discard(context.spis)

    def must_tell(self, context: IkeContext) -> bool:
        """True if the SA has new SPIs that no answer tells the mobile node, so that `move_peer` must."""
        plan = self._renames.plan_of(self._here(context))
        return plan is not None and not plan.later

    def renames(self, context: IkeContext) -> bool:
        """See `ContextSink.renames`."""
        plan = self._renames.plan_of(self._here(context))
        return plan is not None and bool(plan.children)

    def cannot_send(self, context: IkeContext) -> bool:
        """See `ContextSink.cannot_send`."""
        return self._renames.others_send(self._here(context))

    def new_names(self, context: IkeContext) -> tuple[ContextDataBlock, ...]:
        """The SPIs of the SA here that the mobile node does not know yet, as a block of a CTAA; empty: no
        change."""
        names = self._host.coming.of(context.spis).facts.new_names
        return (ContextDataBlock(Fpt.NEW_SPIS, names),) if names else ()

    async def ready(self, context: IkeContext, keep_address: bool, *, leaving: bool = False) -> bool:
        """See `ContextSink.ready`. charon has the SA for a moment. An SA that is PASSIVE for long would be
        activated together with others, and given up because its mobile node does not answer."""
        hushed: list[KernelPolicy] = []
        if context.spis in self._undoing:
            return False
        try:
            hushed = self._early.hush(self._here(context)) if self._host.kernel is not None else []
            if not hushed:
                return False
            await self.prepare(context, keep_address)
            work = self._coming(context)
            copies = () if work.plan is not None else self._early.read(work.here)
            await self._runner.run(UNDO, work)
            self._early.speak(hushed)
            self._early.wait(context.spis, copies, held=leaving)
        except (CharonError, KernelError, RefusedError, WireError) as error:
            self._early.end(context.spis)
            log.warning("%s is installed when its MN arrives, not before: %s", context.connection, error)
            if self._installed(context.spis):
                await self.undo(context)
            with contextlib.suppress(KernelError):
                self._early.speak(hushed)
            return False
        return leaving and bool(copies)

    def not_coming(self, context: IkeContext) -> None:
        """See `ContextSink.not_coming`."""
        self.tell_later(context, False)
        self._early.end(context.spis)
        self._memory.erase(context.spis)
        self._memory.relayed.pop(context.spis, None)
        if self._installed(context.spis) and context.spis not in self._undoing:
            self._undoing.add(context.spis)
            self._host.spawn(self._undo_at_last(context))

    def _installed(self, sa: SaName) -> bool:
        return self._host.coming.of(sa).facts.stage in ("installing", "active")

    async def _undo_at_last(self, context: IkeContext) -> None:
        """An SA that was got ready is still here, because charon could not be asked: the other gateway serves
        it, under the same keys. Until it is gone `prepare` refuses it."""
        try:
            while self._installed(context.spis):
                try:
                    await self.undo(context)
                except IkectxError as error:
                    log.error("%s is here, and another gateway serves it: %s", context.connection, error)
                    await asyncio.sleep(_AGAIN)
        finally:
            self._undoing.discard(context.spis)

    def _lead(self, context: IkeContext) -> None:
        """Send what comes for the mobile node to where it is now, before charon is asked for anything."""
        if context.spis not in self._early:
            return
        try:
            self._early.lead(self._here(context))
        except IkectxError as error:
            log.warning("%s: its ESP waits for charon: %s", context.connection, error)
            self._early.end(context.spis)

    async def prepare(self, context: IkeContext, keep_address: bool) -> None:
        """See `ContextSink.prepare`. After a failure nothing of the SA is left."""
        if context.spis in self._undoing:
            raise CharonError("what was got ready of the SA before is still being removed here")
        self._lead(context)
        async with self._host.import_lock:
            seen, verdicts, taken = await self._judged(context, keep_address)
            here = self._here(context)
            while rivals := self._looks.coming(here):
                await self._looks.over(rivals)  # which of both it is that comes decides about the other
                seen, verdicts, taken = await self._judged(context, keep_address)
            bad = [v for v in verdicts if v.status is not Status.OK]
            if bad:
                raise RefusedError(
                    f"{STATUS_TEXT.get(bad[0].status, '')}: {bad[0].detail}", status=bad[0].status
                )
            work = self._coming(context, here, look=seen, taken=taken)
            if clash(here, taken):
                await self._install(work)  # nobody else may choose a name until it has some of its own
                return
            self._looks.comes(here)
        try:
            await self._install(work)
        finally:
            self._looks.came_or_not(here)

    async def _install(self, work: Coming) -> None:
        try:
            await self._runner.run(PREPARE, work)
        except BaseException:
            await self.undo(work.context)
            raise

    async def take(self, context: IkeContext, final: FinalState) -> None:
        """See `ContextSink.take`."""
        await self._runner.run(TAKE, self._coming(context, final=final))

    async def settle(self, context: IkeContext, final: FinalState) -> FinalState:
        """See `ContextSink.settle`."""
        if self._settler is None:
            raise RefusedError(
                "nobody here can ask the MN for the next message ID", status=Status.NOT_COVERED
            )
        return replace(final, mid_initiator=await self._settler(self._here(context), final), unsure=False)

    async def move_peer(self, context: IkeContext, final: FinalState) -> MoveReport:
        """See `ContextSink.move_peer`. There is nothing to tell if the gateway's address and all SPIs
        stay."""
        here = self._here(context)
        plan = self._renames.plan_of(here)
        if plan is None and (here.local == context.local or self._relayed(context.spis)):
            return MoveReport()
        self._hear(context, here)
        if plan is not None:
            return await self._rename(context, here, plan, final)
        if context.spis not in self._memory.seen and await self._host.view(here.spis) is None:
            raise CharonError("charon lost the prepared SA meanwhile")  # before the MN is told
        base = self._received(here)
        return await self._mover(here, final, lambda: self._received(here) > base)

    def shown(self, context: IkeContext, request: tuple[bytes, ...]) -> None:
        """See `ContextSink.shown`."""
        if request:
            self._memory.shown.add(context.spis)
            self._hear(context, self._here(context), request)

    def _hear(self, context: IkeContext, here: IkeContext, request: tuple[bytes, ...] = ()) -> None:
        if self._listen is None or context.spis in self._memory.recorders:
            return
        try:
            self._memory.recorders[context.spis] = self._listen(here, request)
        except (LinkError, KernelError) as error:
            log.info("%s: what it asks now waits for its next try: %s", here.remote_id, error)

    async def _rename(
        self, context: IkeContext, here: IkeContext, plan: Plan, final: FinalState
    ) -> MoveReport:
        """Tell the mobile node new SPIs and our address, by UPDATE_SPI or, if it does not know that, by
        rekeys."""
        host = self._host
        if context.spis not in self._memory.seen:
            # an agent before this one may have stopped in the middle
            await self._renames.converge(here)
            plan = await self._finished(here, plan)
        left, ike = plan.left(here), plan.ike_left(here)
        moves = here.local != context.local and not plan.moved and not self._relayed(context.spis)
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
            seed=plan.seed,
            agent=host.agents.has(context),
        )
        if moves:
            await self._renames.relay_old(here, context.local.address)
        talk = self._renamer(start, wish)
        while (agreed := await talk.next()) is not None:
            try:
                plan = await self._renames.become(here, agreed)
            except IkectxError as error:
                await talk.give_up(str(error))
                raise
            if agreed.supports:
                host.agents.note(here.remote_id)
        return plan.report

    async def _finished(self, here: IkeContext, plan: Plan) -> Plan:
        """The plan with our next message ID made certain: the mobile node is asked, if a rekey was cut off.

        Its last messages may have been sent under that ID, and then the mobile node takes another one for a
        copy.
        """
        if not plan.unfinished or plan.told is None or self._settler is None:
            return plan
        told = plan.told
        last = FinalState(*told.spis, told.mid_initiator, told.mid_responder, told.epoch)
        told = replace(told, mid_initiator=await self._settler(told, last))
        plan = replace(plan, told=told, unfinished=False)
        self._renames.save(here, plan)
        return plan

    def _received(self, here: IkeContext) -> int:
        """ESP packets that arrived here on the SA's children."""
        pairs = [self._host.kernel_pair(here, child) for child in here.children]
        return sum(inbound.usage.packets for inbound, _ in pairs if inbound is not None)

    async def activate(self, context: IkeContext, final: FinalState, report: MoveReport) -> None:
        """See `ContextSink.activate`."""
        if self._host.coming.of(context.spis).facts.stage == "imported":
            return  # message IDs have advanced since
        work = self._coming(context, final=final, report=report)
        await self._runner.run(ACTIVATE, work)
        self._memory.forget(context.spis)
        self._early.end_soon(context.spis)
        self._sweep(int(time.time()))

    def _sweep(self, now: int) -> None:
        """Forget rows that nobody will ask for any more; not for each of a thousand SAs."""
        if now < self._swept + _SWEEP:
            return
        self._swept = now
        for row in self._host.coming.all():
            known = row.facts
            over = known.stage == "imported" and now - known.since > _IMPORTED_FOR
            if over and known.relay is None and not row.later:
                self._host.coming.drop(row.sa)

    async def undo(self, context: IkeContext) -> None:
        """See `ContextSink.undo`."""
        work = self._coming(context)
        if work.plan is not None and work.plan.told is not None:
            log.warning(
                "%s: the MN has new SPIs of ours already; it may have to connect anew", work.here.remote_id
            )
        self._memory.forget(context.spis)
        if self._installed(context.spis):
            await self._runner.run(UNDO, work)
            self._early.end(context.spis)
            return
        self._early.end(context.spis)
        # we installed no part of it, so an SA of that name is another one
        self._renames.forget(work.here, undone=True)
        self._host.away.stays(work.here)
        if work.facts.stage == "":
            self._host.coming.drop(context.spis, soon=True)
