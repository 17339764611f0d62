"""The steps of one handover of a mobile node, from what is known at its beginning to the report. I/O.

The SA becomes passive beside the request if nothing can come to charon by the old address any more, and
charon has no exchange under way; else before it. Otherwise the request could not say which message IDs are
used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager
from typing import Any

from ikectx.engine.ports import Store
from ikectx.errors import BusyError, CharonError, ConfigError, IkectxError, UnknownSaError, WireError
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
from .parties import Outside, Routers, is_idle, router_unasked, sa_of
from .report import MobileReport
from .run import HandoverRun, Progress

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


class HandoverSteps:
    """What each handover consists of, see `handover`."""

    def __init__(
        self,
        config: MobileNode,
        outside: Outside,
        mobile: CharonMobile,
        store: Store,
        run: Runner = run_handover,
        farewells: Farewells | None = None,
    ) -> None:
        """`farewells`: deletes at gateways an SA that is ended here while it is passive."""
        self._config = config
        self._outside = outside
        self._mobile = mobile
        self._routers = Routers()
        self.notes = Notes(store)
        self._run = run
        self.answering: Answering | None = None
        """Answers the new gateway's IKE requests while the SA is passive; set later."""
        self._farewells = farewells
        self.lock = asyncio.Lock()
        """Held while an SA is passive, by a handover or for a moment by other tasks."""

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
            self.notes.answered(view.spis)  # charon has asked it, if an agent's question had no answer
            return report
        context = self._mobile.known(view) if idle else await self._mobile.export(view.spis)
        version = own.version if own is not None else view.local.address.version
        settings = config.settings
        machine = Handover(
            context.current,
            mode,
            Route(
                context.local.address,
                router_unasked(psg, version)
                if mode is HandoverMode.REACTIVE
                else await self._routers.anew(psg, context.local.address.version),
                await (self._routers.of if mode is HandoverMode.REACTIVE else self._routers.anew)(
                    nsg, version
                ),
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
