"""A mobile node's handovers: from the request for a gateway to the report, one at a time.

It joins the machine (`ikectx.node.mobility`), its sockets (`ikectx.net.mn_udp`) and the SA's side
(`vici_bridge.effects.mobile`):

    reactive     CTAR to the new gateway .. CTAA · readdress · loud
                 ahead · quiet (beside)
    predictive   CTAR to the old gateway .. CTAA; then, at the new place: ahead, and as above, same sequence
                 number; if refused there for a reason that another address can cure: as above, at each
                 further one

Without an authentic grant the SA is not changed: it is active again as it was. If charon is just looking for
its gateway by itself (MOBIKE), the SA stays active until the new gateway has it, so that the request goes on.

The SA becomes passive beside the request if nothing can come to charon by the old address any more, and
charon has no exchange under way; else before it. Otherwise the request could not say which message IDs are
used."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

from ikectx.engine.ports import Store
from ikectx.errors import (
    BusyError,
    CharonError,
    ConfigError,
    IkectxError,
    UnknownSaError,
    WireError,
)
from ikectx.net.mn_udp import run_handover
from ikectx.node.agreement import agreed
from ikectx.node.mobility import (
    Handover,
    HandoverEvent,
    HandoverMode,
    HandoverOutcome,
    HandoverPrepared,
    Limits,
    MobileState,
    Retry,
    Route,
)
from ikectx.numbers import Status
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.sa.name import SaName
from vici_bridge.effects.mobile import CharonMobile, EndedUnheardError
from vici_bridge.vici.views import SaView

from .farewell import Farewells
from .node import MobileNode
from .notes import Notes
from .opening import open_nat
from .parties import Outside, is_idle, router_of, sa_of
from .place import LocalPlace
from .report import MobileReport
from .run import HandoverRun, Progress
from .search import Search

log = logging.getLogger("ikectx")

LOOKING = 0.5
"""Seconds in which charon may finish an exchange, before a handover goes on beside it (or gives up)."""

Runner = Callable[..., Awaitable[HandoverOutcome]]
"""`ikectx.net.mn_udp.run_handover`, or a stand-in."""
Answering = Callable[
    [SaName, Endpoint, Collection[Address]], AbstractAsyncContextManager[asyncio.Future[IkeContext]]
]
"""`spis.SpiWatch.answering`, or a stand-in."""
AFTER_IKE = 1.0
"""Seconds to wait for the new gateway's CTAA after it has sent an IKE request that only the serving gateway
can make."""


class Handovers:
    """Runs handovers, one at a time, because all SAs of the node are passive while one of them moves."""

    def __init__(
        self,
        config: MobileNode,
        outside: Outside,
        mobile: CharonMobile,
        store: Store,
        run: Runner = run_handover,
        answering: Answering | None = None,
        farewells: Farewells | None = None,
    ) -> None:
        """`answering`: answers the new gateway's IKE requests while the SA is passive. `farewells`: deletes
        at gateways an SA that is ended here while it is passive."""
        self._config = config
        self._outside = outside
        self._mobile = mobile
        self._search = Search(config, outside.towards)
        self.notes = Notes(store)
        self._run = run
        self.answering = answering
        self._farewells = farewells
        self.lock = asyncio.Lock()
        """Held while an SA is passive, by a handover or for a moment by other tasks."""
        self._moving = False
        self._pending: HandoverRun | None = None
        """An announced move."""

    # What may be asked.

    async def announce(
        self,
        to: str,
        sa: SaName | None = None,
        *,
        leaving: bool = False,
        tell: Progress = lambda item: None,
    ) -> MobileReport:
        """Have the old gateway send the context ahead, and return when that has succeeded or failed.

        `leaving`: this node leaves as soon as that has succeeded, and until it arrives its packets are held
        at the new gateway. `arrive` or `addresses_changed` complete the move. Errors: those of `arrive`.
        """
        self._config.gateway(to)  # checked first, because a wrong name must not end an announced move
        if self._pending is not None:
            if self._pending.nsg.name == to:
                return self._pending.report
            await self.cancel()
        if self._moving:
            raise BusyError("another handover is under way", hint="see `ikectx mobile status`")
        run = await self._begin(to, sa, HandoverMode.PREDICTIVE, None, tell)
        if isinstance(run, MobileReport):
            return run
        run.machine.leaves = leaving
        loop = asyncio.get_running_loop()
        run.moved, run.prepared = loop.create_future(), loop.create_future()
        self._pending = run
        self._search.from_now()
        run.task = loop.create_task(self._predictive(run))
        waiting: set[asyncio.Future[Any]] = {run.prepared, run.task}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return run.report if run.prepared.done() and not run.task.done() else await run.task

    async def arrive(
        self,
        to: str,
        sa: SaName | None = None,
        *,
        address: Address | None = None,
        anew: bool = False,
        tell: Progress = lambda item: None,
    ) -> MobileReport:
        """Move to gateway `to` now, from the local `address` (None: as packets are routed).

        An announced move to it is completed, unless `anew`; else the new gateway is asked to get the SA from
        the old one. Errors: ConfigError and UnknownSaError for unknown names; BusyError; LinkError if there
        is no way to it.
        """
        self._config.gateway(to)  # checked first, because a wrong name must not end an announced move
        pending = self._pending
        if pending is not None and pending.nsg.name == to and pending.task is not None and not anew:
            pending.tell = tell
            await self._complete(pending, address)
            return await asyncio.shield(pending.task)
        if pending is not None:
            await self.cancel()
        if self._moving:
            raise BusyError("another handover is under way", hint="see `ikectx mobile status`")
        with self._busy():
            return await self._reactive(to, sa, await self._where(to, sa, address), tell)

    async def cancel(self) -> bool:
        """Forget an announced move; False: there is none."""
        pending, self._pending = self._pending, None
        if pending is None or pending.task is None:
            return False
        pending.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, IkectxError):
            await pending.task
        return True

    def addresses_changed(self) -> None:
        """The host's addresses or routes have changed: an announced move may be complete."""
        self._search.changed()

    def status(self) -> dict[str, Any] | None:
        """The move that was announced, if one is."""
        pending = self._pending
        if pending is None:
            return None
        return {
            "to": pending.nsg.name,
            "from": pending.psg.name,
            "connection": pending.report.connection,
            "state": str(pending.machine.state),
            "seconds": round(time.time() - pending.report.started, 1),
        }

    # Steps.

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self._moving = True
        try:
            yield
        finally:
            self._moving = False

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        async with self.lock:
            with self._busy():
                yield

    async def _reactive(
        self, to: str, sa: SaName | None, own: Address | None, tell: Progress, *, announced: bool = False
    ) -> MobileReport:
        """Complete the handover from the new place, where the node has the address `own`."""
        async with self.lock:
            run = await self._begin(to, sa, HandoverMode.REACTIVE, own, tell)
            if isinstance(run, MobileReport):
                return run
            run.report.announced = announced
            async with self._made_loud(run):
                assert run.machine.care_of is not None
                open_nat(run.context, run.machine.care_of, run.nsg.addresses)
                await self._leave(run, run.machine.care_of)
                await self._end(run, await self._outcome(run))
            return self._finished(run)

    async def _where(self, to: str, sa: SaName | None, address: Address | None) -> Address | None:
        """Our address at the new place; None if there is nothing to do. Errors: LinkError, ConfigError.

        The lock is not held, because charon answers its gateway while a link comes up.
        """
        nsg, (view, _) = self._config.gateway(to), await self._select(sa)
        if address is not None or self._config.gateway_at(view.remote.address) in (None, nsg):
            return self._search.named(nsg, address)
        return await self._search.arrived(
            self._search.place(nsg, view.local.address.version, view.local_vips), nsg
        )

    async def _begin(
        self, to: str, sa: SaName | None, mode: HandoverMode, own: Address | None, tell: Progress
    ) -> HandoverRun | MobileReport:
        """The handover to run; a report if there is nothing to do."""
        config = self._config
        nsg = config.gateway(to)
        view, idle = await self._select(sa)
        psg = config.gateway_at(view.remote.address)
        if psg is None:
            raise ConfigError(
                f"the IKE_SA {view.name} is served by {view.remote.address}, which is no [[gateway]] here",
                hint=f"add it to {config.path}, by the name it has among the gateways",
            )
        report = MobileReport(
            "silent",
            psg.name,
            nsg.name,
            view.name,
            view.spis,
            str(mode),
            (view.local, view.remote),
            serves=psg.name,
            children=tuple(dict.fromkeys(child.name for child in view.children)),
            vips=view.local_vips,
        )
        if psg is nsg:
            report.result, report.detail = "already", f"{nsg.name} serves it already"
            return report
        context = self._mobile.known(view) if idle else await self._mobile.export(view.spis)
        version = own.version if own is not None else view.local.address.version
        settings = config.settings
        machine = Handover(
            context.current,
            mode,
            Route(
                context.local.address,
                await router_of(psg, context.local.address.version),
                await router_of(nsg, version),
            ),
            sequence=secrets.randbits(32),
            unix=time.time() - time.monotonic(),
            care_of=None if own is None else Endpoint(own, context.local.port),
            limits=Limits(
                Retry(settings.retry, settings.retry_max, settings.give_up),
                int(settings.lifetime),
                settings.predictive,
            ),
            expects=context.mid_responder,
        )
        return HandoverRun(view.spis, psg, nsg, context, report, machine, tell, now=view.spis)

    async def _select(self, sa: SaName | None) -> tuple[SaView, bool]:
        """The named SA, or the only one, and whether it is known to be idle. Errors: UnknownSaError."""
        known = self._outside.known()
        views = await self._outside.views() if known is None else known
        self.notes.only([view.spis for view in views])
        view = sa_of(views, sa, self._config)
        return view, known is not None and is_idle(view)

    async def _leave(self, run: HandoverRun, here: Endpoint) -> None:
        """The node is `here` now: its packets go on to the new gateway, and charon becomes passive."""
        sa, old = run.sa, run.context.local.address
        gone, announced = not self._outside.has(old), run.machine.outcome.announced
        if gone and any(view.spis == sa and is_idle(view) for view in self._outside.known() or ()):
            run.machine.expects = self._mobile.recorded(sa).mid_responder
            if announced:  # the new gateway decrypts already
                await self._mobile.ahead(run.context, here, run.beyond(here))
            self._note_asked(run)
            run.holding = asyncio.create_task(self._behind(run, None if announced else here))
            return
        if gone or announced:
            # else the old way may carry packets until the new gateway has the SA
            await self._mobile.ahead(run.context, here, run.beyond(here))
        await self._hold(run)
        self._note_asked(run)

    async def _behind(self, run: HandoverRun, here: Endpoint | None) -> None:
        """What the request need not wait for: packets leave from `here` (None: they do), and the SA becomes
        passive."""
        if here is not None:
            await run.asked.wait()
            await self._mobile.ahead(run.context, here, run.beyond(here))
        await self._hold(run)

    async def _hold(self, run: HandoverRun) -> None:
        """Make the SA passive, unless charon is looking for its gateway: then later."""
        try:
            await self._mobile.quiet(run.sa, patience=LOOKING)
            run.held = run.was_held = True
        except EndedUnheardError:
            run.was_held = True  # for a moment, in which a user of the node has ended it
            raise
        except BusyError:
            if run.holding is None and not await self._mobile.only_addresses(run.sa):
                raise
        # a passive charon receives nothing; one that looks for its gateway receives nothing of the old one
        # either
        expects = await self._mobile.next_request(run.sa)
        if run.holding is None:
            run.machine.expects = expects
        elif run.held and run.machine.expects != expects:
            run.heard_more = True
        run.phase("held" if run.held else "looking")

    async def _held(self, run: HandoverRun) -> None:
        """Wait until the SA is passive, if that goes on beside the request. Raises nothing."""
        if run.holding is None:
            return
        run.asked.set()  # it may have ended before it left
        await asyncio.wait({run.holding})
        if not run.holding.cancelled() and (error := run.holding.exception()) is not None:
            if not isinstance(error, IkectxError):
                raise error
            log.warning("%s was not made passive: %s", run.report.connection, error)

    def _note_asked(self, run: HandoverRun) -> None:
        self.notes.asked(run.sa, to=run.nsg.name, from_=run.psg.name, connection=run.report.connection)

    async def _predictive(self, run: HandoverRun) -> MobileReport:
        """Run from the announcement to the report; the lock is held from the arrival on."""
        before = run.context
        old = before.local.address
        place = self._search.place(run.nsg, old.version, before.local_vips, left=old)
        try:
            async with contextlib.AsyncExitStack() as stack:

                async def moves() -> Endpoint:
                    address = await self._next_place(run, place)
                    assert address is not None
                    await stack.enter_async_context(self._turn())
                    await stack.enter_async_context(self._made_loud(run))
                    run.since = time.monotonic()
                    run.at = Endpoint(address, before.local.port)
                    run.machine.nsg = await router_of(run.nsg, address.version)
                    await self._leave(run, run.at)
                    return run.at

                asking = self._run(run.machine, old, moves=moves(), progress=self._observer(run))
                await self._end(run, await self._unless_ended(run, asking))
            report = self._finished(run)
            return await self._elsewhere(run, place) if report.another_address_may_do else report
        finally:
            if self._pending is run:
                self._pending = None

    async def _elsewhere(self, run: HandoverRun, place: LocalPlace) -> MobileReport:
        """The new gateway has refused the SA at this address: ask anew from each further one that there is.

        A token names one address and is valid once, so that is another handover, with a sequence number of
        its own. It ends with the time of the announcement.
        """
        report, before, tried = run.report, run.context.local, run.machine.care_of
        while report.another_address_may_do and tried is not None and not run.named:
            place.refuse(tried.address)
            run.tell({"phase": "refused", "ms": 0.0, "to": run.nsg.name, "detail": report.detail})
            log.info("%s does not take the SA at %s: another address may come", run.nsg.name, tried.address)
            run.moved = asyncio.get_running_loop().create_future()
            address = await self._next_place(run, place, run.until)
            if address is None:
                break
            try:
                with self._busy():
                    report = await self._reactive(run.nsg.name, run.sa, address, run.tell, announced=True)
                    tried = Endpoint(address, before.port)
            except IkectxError as error:
                log.warning("handover to %s from %s: %s", run.nsg.name, address, error)
                break
        return report

    async def _next_place(
        self, run: HandoverRun, place: LocalPlace, until: float | None = None
    ) -> Address | None:
        """The address that the node has at its new place, found or given; None: none was known by `until`.

        Without `until` the search begins only after a change, because the announcement comes before that.
        """
        assert run.moved is not None
        said = run.moved
        looking = asyncio.ensure_future(self._search.find(place, until, at_once=until is not None))
        try:
            waiting: set[asyncio.Future[Any]] = {said, looking}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if said.done():
                return said.result()
            if (found := looking.result()) is not None:
                log.info("at a new address, %s: the handover to %s goes on", found, run.nsg.name)
            return found
        finally:
            looking.cancel()

    async def _complete(self, run: HandoverRun, address: Address | None) -> None:
        """The node was reported to be at its new place. Errors: ConfigError, LinkError."""
        said, named = run.moved, self._search.named(run.nsg, address)
        assert said is not None
        before = run.context
        place = self._search.place(run.nsg, before.local.address.version, before.local_vips)
        found = named or await self._search.arrived(place, run.nsg)
        if not said.done():
            run.named = named is not None
            said.set_result(found)

    def _observer(self, run: HandoverRun) -> Callable[[MobileState, HandoverEvent | None], None]:
        def told(state: MobileState, event: HandoverEvent | None) -> None:
            if isinstance(event, HandoverPrepared):
                run.report.result, run.report.announced = "announced", True
                run.until = asyncio.get_running_loop().time() + self._config.settings.predictive
                run.phase("announced", f"{run.psg.name} has sent the context to {run.nsg.name}")
                self._count(run)
                if run.prepared is not None and not run.prepared.done():
                    run.prepared.set_result(None)
            elif state in (MobileState.ANNOUNCING, MobileState.ARRIVING) and event is None:
                asked = run.psg if state is MobileState.ANNOUNCING else run.nsg
                if asked is run.nsg:
                    run.asked.set()
                run.tell({"phase": "asking", "ms": 0.0, "to": run.nsg.name, "detail": f"asking {asked.name}"})

        return told

    def _count(self, run: HandoverRun) -> None:
        outcome, report = run.machine.outcome, run.report
        report.messages, report.octets = outcome.messages, outcome.octets
        report.retransmissions = outcome.retransmissions

    async def _outcome(self, run: HandoverRun) -> HandoverOutcome:
        """The new gateway's answer, or the IKE request that it sends before an answer."""
        asking = asyncio.ensure_future(
            self._unless_ended(run, self._run(run.machine, progress=self._observer(run)))
        )
        care_of = run.machine.care_of
        try:
            if run.holding is not None:
                await asyncio.wait({asking, run.holding}, return_when=asyncio.FIRST_COMPLETED)
            if self.answering is None or not run.held or care_of is None:
                return await asking
            async with self.answering(run.sa, care_of, run.nsg.addresses) as moved:
                waiting: set[asyncio.Future[Any]] = {asking, moved}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not moved.done():
                    return await asking
                run.by_ike = moved.result()
                await asyncio.wait({asking}, timeout=AFTER_IKE)
            return run.machine.outcome
        finally:
            asking.cancel()

    async def _unless_ended(self, run: HandoverRun, asking: Awaitable[HandoverOutcome]) -> HandoverOutcome:
        return await (asking if self._farewells is None else self._farewells.unless_ended(run, asking))

    async def _end(self, run: HandoverRun, outcome: HandoverOutcome) -> None:
        """Apply the answer, or its absence, to the SA."""
        report = run.report
        self._count(run)
        run.phase("asked")
        await self._held(run)
        if run.by_ike is not None:
            log.info("%s has moved the SA by IKE", run.nsg.name)
            report.result, report.serves = "moved", run.nsg.name
            report.new, run.now = (run.by_ike.local, run.by_ike.remote), run.by_ike.spis
            run.phase("readdressed")
            return
        if outcome.state is not MobileState.ACTIVATED:
            report.failed(outcome, arrived=run.machine.care_of is not None)
            return
        report.result, report.serves = "moved", run.nsg.name
        care_of = run.machine.care_of
        assert care_of is not None
        remote = run.beyond(care_of)
        report.new = (care_of, remote)
        try:
            recorded = self._mobile.recorded(run.sa)
            agreement, run.now = agreed(outcome, recorded, care_of, remote, run.nsg.addresses)
        except (WireError, UnknownSaError) as error:
            report.unusable(error)
            return
        report.renamed = len(agreement.renames)
        applied = await self._mobile.apply(run.context, agreement, passive=run.held)
        run.asks = applied.asks
        run.held = applied.passive
        run.was_held |= applied.passive
        run.phase("readdressed")

    @contextlib.asynccontextmanager
    async def _made_loud(self, run: HandoverRun) -> Any:
        """Make the SA active after the handover, whatever its result, unless it is gone everywhere."""
        gone: UnknownSaError | None = None
        try:
            yield
        except UnknownSaError as error:
            gone = error
        finally:
            await self._held(run)
            if run.held:
                run.held = False
                try:
                    await self._mobile.loud(run.sa)
                    run.phase("active")
                except IkectxError as error:
                    run.report.exit_code = error.exit_code
                    run.report.detail = f"{run.report.detail}; {error}".strip("; ")
                    run.report.hint = run.report.hint or error.hint
                    self._mobile.loud_later(run.sa, self.lock)
            else:
                await self._mobile.home(run.sa)
                if self._mobile.is_quiet(run.sa):  # charon was away when it was to be active again
                    self._mobile.loud_later(run.sa, self.lock)
            self._outside.changed()
            if self._farewells is not None and await self._farewells.leave(run):
                self.notes.answered(run.sa)
                gone = None  # the report has that
            else:
                await self._after(run)
        if gone is not None:
            raise gone

    async def _after(self, run: HandoverRun) -> None:
        """The SA is active again: make charon check its gateway's address, and see that it knows it."""
        if run.asks and run.report.new is not None:
            self._outside.nudge(run.report.new[1].address)
        if run.report.result != "moved":
            self._outside.nudge(run.context.remote.address)
            if not run.machine.outcome.in_doubt and run.report.serves is not None:
                self.notes.answered(run.sa)
        elif run.report.new is not None and not run.report.exit_code:
            await self._see_moved(run, run.report.new[1])
            if run.heard_more and run.now == run.sa:
                # the new gateway would use a message ID that charon has had: both begin anew
                await self._mobile.rekey(run.sa)

    async def _see_moved(self, run: HandoverRun, remote: Endpoint) -> None:
        """See that charon knows its gateway's address by now, or its next request would go to the old one. It
        may have gone on to another one of that gateway (MOBIKE)."""
        try:
            there = [view.remote for view in await self._outside.views() if view.spis == run.now]
            if any(one == remote or one.address in run.nsg.addresses for one in there):
                return
            trouble = f"{run.nsg.name} serves the SA, but charon here does not talk to it"
        except IkectxError as error:
            trouble = f"{run.nsg.name} serves the SA, and charon here cannot be asked: {error}"
        run.report.exit_code, run.report.status = CharonError.exit_code, Status.CHARON
        run.report.detail, run.report.hint = trouble, "see charon's log; connect anew if nothing else helps"

    def _finished(self, run: HandoverRun) -> MobileReport:
        report = run.report
        if report.serves is not None:
            self.notes.answered(run.sa)
        self.notes.ended(report.to_json())
        (log.info if not report.exit_code else log.warning)(
            "handover %s -> %s: %s%s",
            report.from_,
            report.to,
            report.result,
            f" ({report.detail})" if report.detail else "",
        )
        return report
