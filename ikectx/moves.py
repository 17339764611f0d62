"""Old gateway: starts and tracks outgoing transfers. At most one per SA, and one per mobile node and peer."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import replace as changed
from typing import Any
from weakref import WeakValueDictionary

from .context import Address as IpAddress
from .context import IkeContext
from .cxtp import Ctc
from .dry_run import DryRun
from .errors import BusyError, IkectxError, StateError, UnknownSaError
from .links import Links, PeerConfig
from .name import SaName
from .numbers import Status
from .outgoing import Address, Outgoing
from .report import TransferReport
from .run import Observer, Parts, Tasks, Turn, log
from .transfer import SourceInput, SourceState

CANCELLABLE = frozenset(
    {
        *(SourceState.NEW, SourceState.OFFERED, SourceState.ANNOUNCED, SourceState.AWAITING),
        SourceState.FREEZING,
    }
)


Allowed = Callable[[IkeContext], None]
"""Raises the reason why the SA of that context may not be moved: RefusedError, WireError, StoreError."""


class Moves:
    """The transfers that are open here as source. `links` gives the links, or StateError when stopped."""

    def __init__(self, parts: Parts, links: Callable[[], Links], tasks: Tasks, busy_attempts: int) -> None:
        self.open: dict[bytes, Outgoing] = {}
        self._parts = parts
        self._links = links
        self._tasks = tasks
        self._busy_attempts = busy_attempts
        self._asked_for: dict[SaName, asyncio.Event] = {}
        """SAs that an operator, or a peer with the right `pull`, moves; the event is set at the end. They
        keep the SA's turn between two attempts, too."""
        self._mn_locks: WeakValueDictionary[tuple[str, IpAddress], asyncio.Lock] = WeakValueDictionary()

    def moving(self, sa: SaName) -> Outgoing | None:
        """The open transfer of that SA."""
        return next((run for run in self.open.values() if run.sa == sa), None)

    def free(self, sa: SaName) -> None:
        """Errors: BusyError if that SA is being moved, or is about to be."""
        if sa in self._asked_for or self.moving(sa) is not None:
            raise BusyError("that IKE_SA is being moved already", hint="`ikectx status` shows the transfer")

    async def _turn(self, sa: SaName) -> None:
        """Wait until nobody else moves that SA.

        Errors: BusyError if that lasts longer than `Timing.turn`, or if the transfer is in doubt and may last
        for ever; UnknownSaError if the SA has left.
        """
        patience, last = self._parts.timing.turn, self.moving(sa)
        try:
            async with asyncio.timeout(patience):
                while (over := last.over if last is not None else self._asked_for.get(sa)) is not None:
                    if last is not None and last.settled.done():
                        raise BusyError(
                            f"that IKE_SA is being moved already: transfer {last.transfer_id.hex()} to "
                            f"{last.peer.name} is in doubt",
                            hint="see `ikectx status`, and `ikectx reclaim`",
                        )
                    await over.wait()
                    if last is not None and last.machine.state is SourceState.DONE:
                        ident = last.transfer_id.hex()
                        raise UnknownSaError(
                            f"transfer {ident} has just brought that IKE_SA to {last.peer.name}",
                            hint=f"{last.peer.name} serves it now: ask there to move it on",
                        )
                    last = self.moving(sa)
        except TimeoutError:
            run = self.moving(sa)
            what = "another command has its turn"
            if run is not None:
                what = f"transfer {run.transfer_id.hex()} to {run.peer.name} is {run.machine.state}"
            raise BusyError(
                f"that IKE_SA is being moved already, and that did not end within {patience:g} s: {what}",
                hint="try again; `ikectx status` shows the transfer, `ikectx cancel` ends one that waits",
            ) from None

    def named(self, transfer_id: str) -> Outgoing | None:
        """The open transfer with that id in hexadecimal."""
        try:
            return self.open.get(bytes.fromhex(transfer_id))
        except ValueError:
            return None

    def cancel(self, transfer_id: str) -> bool:
        """See `Gateway.cancel`."""
        run = self.named(transfer_id)
        if run is None or run.machine.state not in CANCELLABLE:
            return False
        run.signals.put_nowait(SourceInput.CANCEL)
        return True

    async def reclaim(self, transfer_id: str) -> TransferReport:
        """See `Gateway.reclaim`."""
        run = self.named(transfer_id)
        if run is None or run.machine.state is not SourceState.RELEASED:
            raise StateError(
                f"transfer {transfer_id} is not in doubt"
                if run
                else f"no transfer {transfer_id} is open here",
                hint="`ikectx status` shows those that are",
            )
        run.signals.put_nowait(SourceInput.RECLAIM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._parts.timing.step):
                await run.over.wait()
        return run.report()

    def cancelled(self, peer: PeerConfig, message: Ctc) -> None:
        """Handle the peer's CTC: it applies to transfers of that mobile node that can still be cancelled."""
        for run in self.open.values():
            if run.peer.name == peer.name and run.context and run.context.remote.address == message.mn:
                run.signals.put_nowait(SourceInput.CTC)

    # -- by the operator, or by a peer that may pull -----------------------------------------------------

    async def transfer(
        self, peer: PeerConfig, sa: SaName, address: Address, dry_run: bool, progress: Observer | None
    ) -> TransferReport:
        """See `Gateway.transfer`."""
        links = self._links()
        await self._turn(sa)
        if dry_run:
            dry = DryRun(self._parts, links, peer, sa=sa, transfer_id=secrets.token_bytes(8), address=address)
            await dry.export()
            return await dry.ask_only()
        over = self._asked_for[sa] = asyncio.Event()
        try:
            for attempt in range(1, self._busy_attempts + 1):
                report = await self._attempt(peer, sa, address, progress)
                report = changed(report, attempts=attempt)
                if report.status is not Status.BUSY or report.result not in ("kept", "refused"):
                    break
                if attempt < self._busy_attempts:
                    pause = self._parts.timing.busy_backoff * 2 ** (attempt - 1)
                    log.info("a transfer to %s is tried again in %.1f s: %s", peer.name, pause, report.text)
                    await asyncio.sleep(pause)
        finally:
            del self._asked_for[sa]
            over.set()
        return report

    async def _attempt(
        self, peer: PeerConfig, sa: SaName, address: Address, progress: Observer | None
    ) -> TransferReport:
        run = Outgoing(
            self._parts,
            self._links(),
            peer,
            sa=sa,
            transfer_id=secrets.token_bytes(8),
            address=address,
            observer=progress,
        )
        self.open[run.transfer_id] = run
        self._start(run, self._move(run))
        try:
            return await asyncio.shield(run.settled)
        except asyncio.CancelledError:
            run.signals.put_nowait(SourceInput.CANCEL)
            raise

    async def _move(self, run: Outgoing) -> None:
        await run.export()
        if run.context is None:
            await run.begin()
            return
        lock = self._mn_lock(run, run.context.remote.address)
        waited = lock.locked()
        async with lock:
            if waited:
                await run.export()
            await run.begin()

    # -- by the MN, or by a packet of it -----------------------------------------------------------------

    async def grant(self, run: Outgoing, proven: Allowed, allowed: Allowed) -> None:
        """Export, and begin `run` in the background if neither `proven` nor `allowed` raises anything.

        `proven` is called first, with the recorded context, so that a stranger's request neither takes the
        SA's turn nor has the SA exported. `allowed` is called last, with the exported context. Errors:
        BusyError, UnknownSaError, those of `proven`, `allowed` and the export, StateError.
        """
        proven(self._parts.source.recorded(run.sa))
        self.free(run.sa)
        self._links()
        self.open[run.transfer_id] = run
        try:
            await run.export()
            if run.context is None:
                raise run.error or StateError("nothing was exported")
            allowed(run.context)
        except BaseException:
            del self.open[run.transfer_id]
            run.over.set()
            raise
        self._start(run, self._in_turn(run, run.context.remote.address))

    async def _in_turn(self, run: Outgoing, mn: IpAddress) -> None:
        run.turn = Turn(self._mn_lock(run, mn))
        async with run.turn:
            await run.begin()

    # -- after a crash -----------------------------------------------------------------------------------

    def resume(self, run: Outgoing, mn: IpAddress) -> None:
        """Go on with a transfer that the journal has open."""
        self.open[run.transfer_id] = run
        self._start(run, self._resume(run, mn))

    async def _resume(self, run: Outgoing, mn: IpAddress) -> None:
        async with self._mn_lock(run, mn):
            await run.go(SourceInput.RESTART)

    # -- all of them -------------------------------------------------------------------------------------

    def _mn_lock(self, run: Outgoing, mn: IpAddress) -> asyncio.Lock:
        """The lock of this mobile node and peer: they have one transfer at a time, because messages name
        nothing else (RFC 4067)."""
        return self._mn_locks.setdefault((run.peer.name, mn), asyncio.Lock())

    def _start(self, run: Outgoing, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.spawn(self._walk(run, work), f"ikectx transfer {run.transfer_id.hex()}")

    async def _walk(self, run: Outgoing, work: Coroutine[Any, Any, None]) -> None:
        """The task of a transfer. It goes on after the transfer was reported as "in-doubt"."""
        try:
            await work
        except UnknownSaError as error:
            run.settled.set_exception(error)
        except Exception as error:
            # a mistake in the program: leave everything as it is, because the next start reads the journal
            if not run.settled.done():
                mistake = StateError(f"a mistake here: {type(error).__name__}")
                run.blame(error if isinstance(error, IkectxError) else mistake)
                run.settled.set_result(run.report())
            raise
        finally:
            self.open.pop(run.transfer_id, None)
            run.awaited.set()
            run.over.set()
            self._tasks.tidy()
