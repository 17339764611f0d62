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
The steps are those of `steps`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from ikectx.engine.ports import Store
from ikectx.errors import BusyError, IkectxError
from ikectx.net.mn_udp import run_handover
from ikectx.node.mobility import HandoverMode
from ikectx.sa.context import Address, Endpoint
from ikectx.sa.name import SaName
from vici_bridge.effects.mobile import CharonMobile

from .farewell import Farewells
from .node import MobileNode
from .opening import open_nat
from .parties import Outside, inner_addresses
from .place import LocalPlace
from .report import MobileReport
from .run import HandoverRun, Progress
from .search import Search
from .steps import HandoverSteps, Runner

log = logging.getLogger("ikectx")


class Handovers(HandoverSteps):
    """Runs handovers, one at a time, because all SAs of the node are passive while one of them moves."""

    def __init__(
        self,
        config: MobileNode,
        outside: Outside,
        mobile: CharonMobile,
        store: Store,
        run: Runner = run_handover,
        farewells: Farewells | None = None,
    ) -> None:
        """See `HandoverSteps`."""
        super().__init__(config, outside, mobile, store, run, farewells)
        self._search = Search(config, outside.towards)
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
        self._free()
        with self._busy():
            run = await self._begin(to, sa, HandoverMode.PREDICTIVE, None, tell)
        if isinstance(run, MobileReport):
            return run
        run.machine.leaves = leaving
        run.inner = inner_addresses(self._outside, run.context)
        loop = asyncio.get_running_loop()
        run.moved, run.prepared = loop.create_future(), loop.create_future()
        self._pending = run
        self._search.from_now()
        run.task = loop.create_task(self._predictive(run))
        run.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # the report has it
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
        self._free()
        with self._busy():
            return await self._reactive(to, sa, await self._where(to, sa, address), tell)

    async def cancel(self) -> bool:
        """Forget an announced move; False: there is none.

        Errors: BusyError if the node has arrived, because the new gateway may be taking the SA.
        """
        if self._pending is not None and self._moving:
            raise _another(f"this node has arrived, and asks {self._pending.nsg.name} for its SA")
        return await self.close()

    async def close(self) -> bool:
        """The same at any moment: the agent ends."""
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

    def _free(self) -> None:
        """Errors: BusyError."""
        if self._moving:
            raise _another("another handover is under way")

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

    async def _predictive(self, run: HandoverRun) -> MobileReport:
        """Run from the announcement to the report; the lock is held from the arrival on."""
        before = run.context
        old = before.local.address
        place = self._search.place(run.nsg, old.version, run.inner, left=old)
        try:
            async with contextlib.AsyncExitStack() as stack:

                async def moves() -> Endpoint:
                    address = await self._next_place(run, place)
                    assert address is not None
                    await stack.enter_async_context(self._turn())
                    await stack.enter_async_context(self._made_loud(run))
                    run.since = time.monotonic()
                    run.at = Endpoint(address, before.local.port)
                    run.machine.nsg = await self._routers.of(run.nsg, address.version)
                    run.machine.unix = time.time() - time.monotonic()  # the host may have slept since
                    await self._leave(run, run.at)
                    return run.at

                asking = self._run(run.machine, old, moves=moves(), progress=self._observer(run))
                await self._end(run, await self._unless_ended(run, asking))
            report = self._finished(run)
            return await self._elsewhere(run, place) if report.another_address_may_do else report
        except IkectxError as error:
            run.report.broken(error, in_doubt=run.machine.outcome.in_doubt)
            self._finished(run)
            raise
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
        place = self._search.place(run.nsg, before.local.address.version, run.inner)
        found = named or await self._search.arrived(place, run.nsg)
        if not said.done():
            run.named = named is not None
            said.set_result(found)


def _another(what: str) -> BusyError:
    return BusyError(what, hint="see `ikectx mobile status`")
