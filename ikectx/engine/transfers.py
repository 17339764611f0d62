"""Old gateway: starts and tracks outgoing transfers. At most one per SA, and one per mobile node and peer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace as changed
from typing import Literal

from ikectx.errors import BusyError, IkectxError, LinkError, RefusedError, StateError, UnknownSaError
from ikectx.mistakes import log_mistake
from ikectx.numbers import Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import Ctc

from .dry_run import DryRun
from .effects import Invite, Invites, Recorded, Stands
from .journaled import Parts
from .occasion import Occasion
from .old_gateway import Outgoing
from .ports import Address, Stand
from .procedures import Cancelled, Do, Gate, Opened, Pause, Steps, Turn, log
from .report import TransferReport
from .tables import SourceInput, SourceState

CANCELLABLE = frozenset(
    {
        *(SourceState.NEW, SourceState.OFFERED, SourceState.ANNOUNCED, SourceState.AWAITING),
        SourceState.FREEZING,
    }
)

INVITED = 10.0
"""Seconds for an invited mobile node to come to the other gateway."""
Decision = Literal["reclaim", "give-up"]
"""What an operator decides of an SA that was let go, if the other gateway does not answer."""
_BEFORE_FREEZE = (SourceState.NEW, SourceState.OFFERED, SourceState.ANNOUNCED, SourceState.AWAITING)
_MAY_THAW = (SourceState.FREEZING, SourceState.THAWING)
"""States after which it is served again; if the journal is an old copy, the SA may have been let go since."""
LET_GO = (SourceState.RELEASED, SourceState.CLEANING)
_STAYED = (Status.PEER_SILENT, Status.PEER_REFUSED)
"""A mobile node that was told an address did not go there. Many go on with the old gateway: a filter before
them, or a daemon that has forgotten MOBIKE (libreswan 4.10 after a rekey of its IKE_SA)."""
_LOOK = 0.02
"""Seconds between two looks whether it has come."""
Allowed = Callable[[IkeContext], Steps[None]]
"""Raises the reason why the SA of that context may not be moved: RefusedError, WireError, StoreError."""


class Transfers:
    """The transfers that are open here at their old gateway."""

    def __init__(self, parts: Parts) -> None:
        self.open: dict[bytes, Outgoing] = {}
        self._parts = parts
        self._invited: dict[SaName, TransferReport | None] = {}
        """SAs whose mobile node was invited to go elsewhere, and how it went there."""
        self._stopping = False
        self._inviting: dict[SaName, Gate] = {}
        """The same SAs; the gate opens when it has gone, or did not go in time."""
        self._asked_for: dict[SaName, Gate] = {}
        """SAs that an operator, or a peer with the right `pull`, moves; the gate opens at the end. They
        keep the SA's turn between two attempts, too."""

    def moving(self, sa: SaName) -> Outgoing | None:
        """The open transfer of that SA."""
        return next((run for run in self.open.values() if run.sa == sa), None)

    def free(self, sa: SaName) -> None:
        """Errors: BusyError if that SA is being moved, or is about to be."""
        if sa in self._asked_for or self.moving(sa) is not None:
            raise BusyError("that IKE_SA is being moved already", hint="`ikectx status` shows the transfer")

    def _turn(self, sa: SaName) -> Steps[None]:
        """Wait until nobody else moves that SA.

        Errors: BusyError if that lasts longer than `Timing.turn`, or if the transfer is in doubt and may last
        for ever; UnknownSaError if the SA has left.
        """
        patience, last = self._parts.timing.turn, self.moving(sa)
        until = self._parts.now + patience
        while (over := last.over if last is not None else self._by_command(sa)) is not None:
            if last is not None and last.outcome is not None:
                raise BusyError(
                    f"that IKE_SA is being moved already: transfer {last.transfer_id.hex()} to "
                    f"{last.peer.name} is in doubt",
                    hint="see `ikectx resolve`",
                )
            if not (yield Opened(over, until)):
                raise self._too_long(sa, patience)
            if last is not None and last.machine.state is SourceState.DONE:
                ident = last.transfer_id.hex()
                raise UnknownSaError(
                    f"transfer {ident} has just brought that IKE_SA to {last.peer.name}",
                    hint=f"{last.peer.name} serves it now: ask there to move it on",
                )
            last = self.moving(sa)

    def _by_command(self, sa: SaName) -> Gate | None:
        return self._asked_for.get(sa) or self._inviting.get(sa)

    def _too_long(self, sa: SaName, patience: float) -> BusyError:
        run = self.moving(sa)
        what = "another command has its turn"
        if run is not None:
            what = f"transfer {run.transfer_id.hex()} to {run.peer.name} is {run.machine.state}"
        return BusyError(
            f"that IKE_SA is being moved already, and that did not end within {patience:g} s: {what}",
            hint="try again; `ikectx status` shows the transfer, `ikectx cancel` ends one that waits",
        )

    def named(self, transfer_id: str) -> Outgoing | None:
        """The open transfer with that id in hexadecimal."""
        try:
            return self.open.get(bytes.fromhex(transfer_id))
        except ValueError:
            return None

    def cancel(self, transfer_id: str) -> bool:
        """Stop one. True: it will be kept; False: it has let go already, or is unknown."""
        run = self.named(transfer_id)
        if run is None or run.machine.state not in CANCELLABLE:
            return False
        run.signals.post(SourceInput.CANCEL)
        return True

    def resolve(self, transfer_id: str, decision: Decision, by: str) -> Steps[TransferReport]:
        """Reclaim the SA of a transfer in doubt, or give it up: the word of `by`. Errors: StateError."""
        run = self.named(transfer_id)
        if run is None or run.machine.state is not SourceState.RELEASED:
            raise StateError(
                f"transfer {transfer_id} is not in doubt"
                if run
                else f"no transfer {transfer_id} is open here",
                hint="`ikectx resolve` shows those that are",
            )
        run.decided_by = by
        run.signals.post(SourceInput(decision))
        yield Opened(run.over, self._parts.now + self._parts.timing.step)
        return run.report()

    def cancelled(self, peer: PeerConfig, message: Ctc) -> None:
        """Handle the peer's CTC: it applies to transfers of that mobile node that can still be cancelled."""
        for run in self.open.values():
            offered = run.peer.name == peer.name and run.machine.state is not SourceState.NEW
            if offered and run.context and run.context.remote.address == message.mn:
                run.signals.post(SourceInput.CTC)

    def stop(self) -> None:
        """Cancel what has not been let go, and begin nothing new."""
        self._stopping = True
        for run in self.open.values():
            run.signals.post(SourceInput.CANCEL)

    # -- by the operator, or by a peer that may pull -----------------------------------------------------

    def transfer(
        self,
        peer: PeerConfig,
        sa: SaName,
        address: Address = "update",
        dry_run: bool = False,
        ticket: int = 0,
        pulled: bool = False,
        asked_by: str = "",
    ) -> Steps[TransferReport]:
        """Move the SA; how it ended. `pulled`: the peer asked for it, and waits for an offer. `asked_by`:
        whose wish it is. Errors: UnknownSaError, BusyError (it is being moved), RefusedError (its mobile node
        cannot be invited)."""
        # asked before the turn, because nothing may come between it and `_asked_for`
        invites: bool = not pulled and (yield Invites(sa, address))
        yield from self._turn(sa)
        if dry_run and invites:
            address = "invite"
        elif invites:
            invited = yield from self._invite(peer, sa, address)
            if invited is not None:
                return invited
            address = "relay"
            yield from self._turn(sa)
        if dry_run:
            dry = DryRun(
                self._parts, peer, sa=sa, transfer_id=self._parts.fresh(8), occasion=Occasion(address)
            )
            return (yield from dry.ask_only())
        over = self._asked_for[sa] = Gate()
        attempts = self._parts.config.policy.busy_attempts
        try:
            attempt = 0
            while True:
                attempt += 1
                report = yield from self._attempt(peer, sa, Occasion(address, asked_by=asked_by), ticket)
                report = changed(report, attempts=attempt)
                stayed = report.result == "kept" and report.status in _STAYED
                if stayed and address == "auto" and not pulled:  # who pulled was told that it failed
                    return (yield from self._relay_instead(peer, sa, report, asked_by, ticket))
                busy = report.status is Status.BUSY and report.result in ("kept", "refused")
                if not busy or attempt >= attempts:
                    return report
                pause = self._parts.timing.busy_backoff * 2 ** (attempt - 1)
                log.info("a transfer to %s is tried again in %.1f s: %s", peer.name, pause, report.text)
                yield Pause(self._parts.now + pause)
                if self._stopping:
                    return report
        finally:
            del self._asked_for[sa]
            self._parts.scheduler.open(over)

    def announce(self, sa: SaName) -> Steps[None]:
        """Tell the mobile node this gateway's addresses. Errors: as those of the export, LinkError
        (silent)."""
        yield from self._turn(sa)
        yield from self._tell(sa, "")

    def _tell(self, sa: SaName, gateway: str) -> Steps[None]:
        """See `ContextSource.invite`. Nobody else moves the SA meanwhile."""
        over = self._asked_for[sa] = Gate()
        try:
            yield Do(Invite(sa, gateway), self._parts.fresh(8))
        finally:
            del self._asked_for[sa]
            self._parts.scheduler.open(over)

    def _relay_instead(
        self, peer: PeerConfig, sa: SaName, kept: TransferReport, asked_by: str, ticket: int
    ) -> Steps[TransferReport]:
        """Relay a mobile node that did not go to the peer's address. If that fails, too, the report is the
        first one, `kept`."""
        log.warning("%s did not go to %s and is relayed there: %s", kept.mn, peer.name, kept.text)
        report = yield from self._attempt(peer, sa, Occasion("relay", asked_by=asked_by), ticket)
        if report.result in ("kept", "refused"):
            return kept
        return changed(report, attempts=kept.attempts + 1, why=f"it did not go to {peer.name}'s address")

    def _invite(self, peer: PeerConfig, sa: SaName, address: Address) -> Steps[TransferReport | None]:
        """Invite the mobile node, and wait until it has come to the peer. None: it did not, and need not.

        Errors: RefusedError, those of the export.
        """
        why, self._invited[sa] = "its agent did not answer", None
        over = self._inviting[sa] = Gate()
        try:
            yield from self._tell(sa, peer.name)
            until = self._parts.now + INVITED
            while self._parts.now < until:
                report = self._invited[sa]
                if report is not None and report.result in ("moved", "in-doubt"):
                    return changed(report, why="its agent was invited")
                yield Pause(self._parts.now + _LOOK)
            why = "its agent was invited, and did not ask there for its SA"
        except LinkError as error:
            why = str(error)
        finally:
            del self._invited[sa], self._inviting[sa]
            self._parts.scheduler.open(over)
        if address == "invite":
            hint = "its agent's log says why: is the gateway in its configuration? Else --address relay"
            raise RefusedError(f"the MN did not go to {peer.name}: {why}", hint=hint)
        log.warning("%s is relayed to %s: %s", sa, peer.name, why)
        return None

    def _attempt(
        self, peer: PeerConfig, sa: SaName, occasion: Occasion, ticket: int
    ) -> Steps[TransferReport]:
        run = Outgoing(
            self._parts,
            peer,
            sa=sa,
            transfer_id=self._parts.fresh(8),
            occasion=occasion,
            ticket=ticket,
        )
        self._start(run, self._move(run))
        try:
            yield Opened(run.settled)
        except Cancelled:
            run.signals.post(SourceInput.CANCEL)
            raise
        if isinstance(run.outcome, TransferReport):
            return run.outcome
        raise run.outcome or StateError("the transfer has no outcome")

    def _move(self, run: Outgoing) -> Steps[None]:
        yield from run.export()
        if run.context is None:
            yield from run.begin()
            return
        turn, waits = run.turn, run.turn in self._parts.scheduler.turns
        try:
            # those of one NAT take turns in a drain; one in doubt has given its turn to others
            if (yield from self._its_turn(run, self._parts.timing.in_doubt)) and waits:
                yield from run.export()
            yield from run.begin()
        finally:
            self._parts.scheduler.leave(turn)

    def _its_turn(self, run: Outgoing, patience: float) -> Steps[bool]:
        """Wait for its turn. False: it did not come within so many seconds, or a signal came, as `run.error`
        says."""
        until = self._parts.now + patience
        while not (yield Turn(run.turn, until, heeds=True)):
            if run.pending() is not None:
                return False
            if self._parts.now >= until:
                run.blame(
                    BusyError(
                        f"another IKE_SA with {run.turn[2]} is on its way to {run.peer.name}, and that did "
                        f"not end within {patience:g} s",
                        hint="try again; `ikectx status` shows that transfer",
                    )
                )
                return False
        return True

    # -- by the MN, or by a packet of it -----------------------------------------------------------------

    def grant(self, run: Outgoing, proven: Allowed, allowed: Allowed) -> Steps[None]:
        """Export, and begin `run` in the background if neither `proven` nor `allowed` raises anything.

        `proven` is called first, with the recorded context, so that a stranger's request neither takes the
        SA's turn nor has the SA exported. `allowed` is called last, with the exported context. Errors:
        BusyError, UnknownSaError, those of `proven`, `allowed` and the export, StateError.
        """
        recorded: IkeContext = yield Recorded(run.sa)
        yield from proven(recorded)
        self.free(run.sa)
        self.open[run.transfer_id] = run
        try:
            yield from run.export()
            if run.context is None:
                raise run.error or StateError("nothing was exported")
            yield from allowed(run.context)
        except BaseException:
            self._close(run)
            raise
        self._start(run, self._granted(run))

    def _granted(self, run: Outgoing) -> Steps[None]:
        turn = run.turn
        try:
            yield from self._its_turn(run, self._parts.timing.turn)
            yield from run.begin()
        finally:
            self._parts.scheduler.leave(turn)

    # -- after a crash -----------------------------------------------------------------------------------

    def resume(self, run: Outgoing) -> None:
        """Take up what the journal has open."""
        self._start(run, self._resumed(run))

    def _resumed(self, run: Outgoing) -> Steps[None]:
        turn = run.turn
        try:
            # without it, too, after a while: one that is frozen must not wait for one that is in doubt
            yield Turn(turn, self._parts.now + self._parts.timing.turn)
            yield from self._resume(run)
        finally:
            self._parts.scheduler.leave(turn)

    def _resume(self, run: Outgoing) -> Steps[None]:
        """Go on as the journal says, unless charon and the kernel say that the journal is an old copy."""
        state = run.machine.state
        if (yield from run.superseded()):
            yield from run.forget(SourceState.KEPT)
            return
        stands = yield from self._stands(run)
        old = self._parts.config.journal == "old" and state in _MAY_THAW
        if (stands == "frozen" and state in _BEFORE_FREEZE) or (old and stands in ("frozen", "unknown")):
            run.blame(
                StateError(
                    "the SA is frozen here, of which the store knows nothing: the store is an old copy, and "
                    "another gateway may serve the SA",
                    hint="`ikectx resolve` shows it",
                )
            )
            yield from run.forget(SourceState.LOST)
        elif stands == "served" and state in LET_GO:
            run.blame(StateError("the SA is served here: the store is an old copy, or could not be written"))
            yield from run.forget(SourceState.KEPT)
        else:
            run.copied = self._parts.config.journal == "old" and stands == "frozen"
            yield from run.go(SourceInput.RESTART)

    def _stands(self, run: Outgoing) -> Steps[Stand]:
        """How the SA stands here. A journal that may be an old copy is not believed before that is known."""
        for tries in itertools.count():
            try:
                found: Stand = yield Do(Stands(run.sa, run.machine.state in LET_GO), run.transfer_id)
            except IkectxError as error:
                if self._parts.config.journal != "old":
                    log.error("transfer %s goes on as the journal has it: %s", run.transfer_id.hex(), error)
                    break
                yield from run.again(tries, "asking how the SA stands", error)
            else:
                return found
        return "unknown"

    # -- all of them -------------------------------------------------------------------------------------

    def _start(self, run: Outgoing, work: Steps[None]) -> None:
        """Begin its own procedure, which goes on when its report has been given as "in-doubt"."""
        self.open[run.transfer_id] = run

        def ended(_: object, error: BaseException | None) -> None:
            if isinstance(error, UnknownSaError):
                run.settle(error)
            elif isinstance(error, Exception):
                # a mistake in here: leave everything as it stands, the next start reads the journal
                mistake = StateError(f"a mistake here: {type(error).__name__}")
                run.blame(error if isinstance(error, IkectxError) else mistake)
                if isinstance(error, IkectxError):
                    log.error("transfer %s: %s", run.transfer_id.hex(), error)
                else:
                    log_mistake(log, f"transfer {run.transfer_id.hex()}", error)
            if run.outcome is None:
                run.settle(run.report())
            self._close(run)

        name = f"transfer {run.transfer_id.hex()}"
        run.signals.process = self._parts.scheduler.spawn(
            work, name, mailbox=run.signals.mailbox, ended=ended
        )

    def _close(self, run: Outgoing) -> None:
        self.open.pop(run.transfer_id, None)
        if run.sa in self._invited:
            self._invited[run.sa] = run.report()
        self._parts.scheduler.open(run.awaited)
        self._parts.scheduler.open(run.over)
