"""Asking other gateways for SAs: CT-Reqs, what comes of them, and the report of it (new gateway).

A CT-Req is repeated with the same sequence number, with back-off, while the old gateway is busy or the
connection breaks, for `Timing.request` seconds. RFC 4067 has no answer that refuses it; ours is a CTDR with S
= 0 and statuses of FPT REQUEST (`refuse_request`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ikectx.errors import BusyError, IkectxError, LinkError, RefusedError, StateError, UnknownSaError
from ikectx.numbers import STATUS_TEXT, Fpt, Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from ikectx.wire.cxtp import Blocks, ContextDataBlock, Ctc, Ctdr, CtReq, StatusBlock, size
from ikectx.wire.profile import TransferHeader

from .hints import advice
from .journaled import Parts
from .lines import Line, Lost
from .new_gateway import Incoming
from .procedures import Event, Opened, Pause, Process, Steps, Turn
from .report import TARGET_STANDS, Result, TransferReport, mn_label, target_phases
from .tables import TargetState, first_failure

CHECK_ONLY = 1
"""Flag of a named SA in a CT-Req: the old gateway should offer it for a check only."""

_CODES: Mapping[Status, int] = {
    Status.BUSY: BusyError.exit_code,
    Status.UNKNOWN_SA: UnknownSaError.exit_code,
    Status.AMBIGUOUS: UnknownSaError.exit_code,
}
_NOT_ALLOWED = "give this gateway the right `{}` in the other gateway's configuration"
_WAITING = (TargetState.HELD, TargetState.PREPARED, TargetState.ABORTED)
_BEFORE = (
    *(TargetState.ANNOUNCED, TargetState.INSTALLING),
    *(TargetState.CHECKING, TargetState.PREPARING),
)
"""States in which the old gateway serves the SA, and may have given up because it lost the connection."""


def name_sa(sa: SaName | None, *, check: bool = False) -> Blocks:
    """The block by which a CT-Req with token 0 names an SA: SPIi | SPIr (zero: any of the mobile node) |
    flags."""
    if sa is None and not check:
        return ()
    spi_i, spi_r = sa or (bytes(8), bytes(8))
    flags = bytes([CHECK_ONLY]) if check else b""
    return (ContextDataBlock(Fpt.IKEV2_SA, spi_i + spi_r + flags),)


def named_sa(blocks: Sequence[ContextDataBlock]) -> tuple[SaName | None, bool]:
    """The SA that `name_sa` has written, None for any; and True if it is only to be checked."""
    for block in blocks:
        if block.fpt == Fpt.IKEV2_SA and len(block.data) >= 16:
            sa = SaName(block.data[:8], block.data[8:16])
            flags = block.data[16] if len(block.data) > 16 else 0
            return sa if any(block.data[:16]) else None, bool(flags & CHECK_ONLY)
    return None, False


def refuse_request(request: CtReq, status: Status) -> Ctdr:
    """The CTDR that refuses a CT-Req: FPT REQUEST with the status, and with the sequence number by octets.

    The sequence number is needed because with the mobile node's address alone a late refusal could be taken
    for that of a later request.
    """
    said = (status, *request.sequence.to_bytes(4))
    return Ctdr(request.mn, tuple(StatusBlock(Fpt.REQUEST, Status(octet)) for octet in said))


def refused_request(message: Ctdr) -> tuple[Status, int]:
    """Status and sequence number of such a CTDR; OK if it is not one."""
    said = [block.status for block in message.statuses if block.fpt == Fpt.REQUEST]
    if len(said) != 5 or message.complete:
        return Status.OK, 0
    return said[0], int.from_bytes(bytes(said[1:]))


@dataclass(frozen=True, slots=True)
class _Refused:
    """Event: the peer has refused the CT-Req."""

    status: Status


class Holder(Protocol):
    """`Inbox`, as far as a request needs it."""

    def post(self, item: Request) -> None:
        """The mobile node of the transfer that it has is here now."""

    def drop(self, why: str, run: Incoming) -> None:
        """That transfer, if it is held or prepared here and not owned, is not wanted any more."""


@dataclass(frozen=True, slots=True)
class _Checked:
    """Event: what came was refused before it began, or was only to be checked."""

    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class _Failed:
    """Event: the CT-Req for the rest could not be sent."""

    error: LinkError


@dataclass(frozen=True, slots=True)
class _Over:
    """Event: that transfer has ended."""

    run: Incoming


@dataclass(frozen=True, slots=True)
class Sighting:
    """The mobile node was seen at this gateway, or somebody who pretends to be it.

    `place`: where the MN of a context is now, or RefusedError. `proves`: raises RefusedError where what was
    shown here, by somebody who may be anybody, is not of the MN of a context. `here`: where at this gateway
    the MN came to, None: that is left to the sink. `answers`: the MN waits for an answer that can tell it new
    names. `shown`: the MN's IKE request, one datagram or all its fragments, that nobody has answered.
    """

    place: Callable[[IkeContext], Endpoint]
    proves: Callable[[IkeContext], object] | None = None
    here: Endpoint | None = None
    answers: bool = False
    shown: tuple[bytes, ...] = ()


_SLACK = 0.1
"""Seconds by which clocks of two gateways may differ about the age of a transfer."""


class Request:
    """One SA wanted of one peer, until it is here or is refused: what was asked, and what has come of it.

    `sa` None: what the MN has. `right`: what we must be allowed to there. `seen`: with it the SA comes in one
    CTD (or was sent ahead), because the MN is here; else pSG pushes it.
    """

    def __init__(
        self,
        parts: Parts,
        peer: PeerConfig,
        message: CtReq,
        *,
        sa: SaName | None,
        right: str,
        seen: Sighting | None = None,
        dry_run: bool = False,
        ticket: int = 0,
    ) -> None:
        self.peer = peer
        self.message = message
        self.sa = sa
        self.right = right
        self.asked_by = f"the mobile node ({'CTAR' if right == 'push' else right})"
        """Whose wish it is, in words."""
        self.whole = seen is not None
        self.here = None if seen is None else seen.here
        self.answers = seen is not None and seen.answers
        self.shown = () if seen is None else seen.shown
        self.dry_run = dry_run
        self.ticket = ticket
        self.endpoint: Endpoint | None = None
        """Where the MN of what was sent ahead is now."""
        self.inbox: Holder | None = None
        self.run: Incoming | None = None
        """The transfer that followed; the last one, if the old gateway had to try again."""
        self.context: IkeContext | None = None
        self.error: IkectxError | None = None
        self.verdicts: tuple[Verdict, ...] = ()
        self.done = False
        """Would it be taken (dry run), or was it?"""
        self._parts = parts
        self._line: Line | None = None
        self._late = False
        """Was it given up, since the time was over?"""
        self._attempts = 0
        self._messages = 0
        self._octets = 0
        self._start = 0.0
        """When it had its turn."""
        self._began = 0.0
        self._answered: float | None = None
        self._heard = False
        """Has the peer shown that it takes the request seriously: that the SA is busy, or the SA itself?"""
        self._dropped: Incoming | None = None
        """The transfer that is not wanted any more."""
        self._place = None if seen is None else seen.place
        self._proves = None if seen is None else seen.proves
        self._events: deque[object] = deque()
        self._process: Process | None = None

    @property
    def stranger(self) -> bool:
        """True if anybody may have caused this request."""
        return self._proves is not None

    @property
    def mn(self) -> Address:
        """The mobile node's previous address, as this gateway knows it."""
        return self.message.mn

    def fits(self, peer: PeerConfig, mn: Address, context: IkeContext, header: TransferHeader) -> bool:
        """True if that offer answers this request."""
        return (
            peer.name == self.peer.name
            and self.whole == (header.address == "mn")
            and self.dry_run == (header.intent == "check")
            and (context.spis == self.sa if self.sa is not None else mn == self.mn)
            and self._proven(context)
        )

    def may_bring(self, elapsed: int) -> bool:
        """True if a transfer that began so many milliseconds ago can be an answer to this request."""
        return elapsed / 1000 < self._parts.now - self._start + _SLACK

    def _proven(self, context: IkeContext) -> bool:
        """True if the context is of the mobile node that asked, because others may ask for the same SA at the
        same time to have it brought to another place."""
        try:
            if self._proves is not None:
                self._proves(context)
        except RefusedError:
            return False
        return True

    def place(self, context: IkeContext) -> Endpoint:
        """Where the MN is now. Errors: RefusedError."""
        return context.remote if self._place is None else self._place(context)

    # -- what is heard of it -----------------------------------------------------------------------------

    def _tell(self, event: object) -> None:
        self._events.append(event)
        if self._process is not None:
            self._process.look()

    def begun(self, inbox: Holder, run: Incoming) -> None:
        """This is it."""
        self.inbox, self.run, self.context, self._heard = inbox, run, run.context, True
        run.request, run.asked_by = self, self.asked_by
        self._tell(run)
        if run.ended:
            self.run_ended(run)

    def run_ended(self, run: Incoming) -> None:
        """The transfer that came of it has ended."""
        self._tell(_Over(run))

    def checked(self, context: IkeContext, verdicts: Sequence[Verdict]) -> None:
        """The request was for a check only, and this is its result."""
        self.context = context
        self.refused_here(verdicts)

    def refused_here(self, verdicts: Sequence[Verdict]) -> None:
        """An offer for this request came, and was refused before a transfer began."""
        self.verdicts = tuple(verdicts)
        self._tell(_Checked(self.verdicts))

    def refused(self, message: Ctdr, status: Status) -> None:
        """The peer says no to it."""
        self._count(size(message))
        self._tell(_Refused(status))

    # -- asking ------------------------------------------------------------------------------------------

    def _count(self, octets: int) -> None:
        self._messages += 1
        self._octets += octets

    def _send(self, line: Line | None = None) -> Steps[None]:
        """Send the CT-Req, over `line` if it is open. Errors: LinkError."""
        if line is None or line.error is not None:
            line = yield from self._parts.lines.get(self.peer, self._deadline)
        if line is not self._line and self._process is not None:
            self._leave()
            self._line = line
            line.watch(self._process)
        if not self._began:
            self._began = self._parts.now
        self._attempts += 1
        self._count(line.send(self.message))

    def _leave(self) -> None:
        """Hear no more of the line."""
        if self._line is not None and self._process is not None:
            self._line.unwatch(self._process)

    def ask_for_the_rest(self, line: Line | None) -> Steps[None]:
        """What was held is prepared now: send the CT-Req for its final state, over `line` if it is open."""
        try:
            yield from self._send(line)
        except LinkError as error:
            self._tell(_Failed(error))

    def work(self, held: tuple[Holder, Incoming, Endpoint] | None) -> Steps[None]:
        """Ask until it is here or refused, or the time is over."""
        self._process = self._parts.scheduler.current
        if self._process is not None:
            self._process.mailbox = self._events
        try:
            with self._parts.scheduler.using(self.peer.name):
                yield from self._ask(held)
                self._give_up()
                if not self.done:
                    yield from self._cleared()
        finally:
            self._leave()
            self._process = None

    def _give_up(self) -> None:
        """What has not come in time is not to come later: tell pSG, and clear away what there is of it."""
        if self.done or not (self._late or self._attempts > 1):
            return
        if self.stranger and self.run is None:
            return  # a CTC names the MN alone: it would cancel what the MN itself has asked for
        if self._line is not None and self._line.error is None:
            self._count(self._line.send(Ctc(self.mn if self.run is None else self.run.mn)))
        self.drop("it did not come in time")

    def _cleared(self) -> Steps[None]:
        """Wait until what does not come is cleared away: only then it is certain how that ended."""
        until = self._parts.now + self._parts.timing.step
        while (run := self.run) is not None and not run.ended:
            if run is not self._dropped and run.machine.state is not TargetState.UNDOING:
                return
            if not (yield Opened(run.over, until)):
                return
            self.drop("it did not come in time")  # pSG may have offered it anew before it heard of that
        if self.run is not None and self.run.machine.state is TargetState.OWNED:
            self.done, self.error = True, None

    def _ask(self, held: tuple[Holder, Incoming, Endpoint] | None) -> Steps[None]:
        self._start = self._parts.now
        if held is not None:
            self.endpoint = held[2]
            self.begun(held[0], held[1])
        tries = 0
        while True:
            try:
                if held is not None and not held[1].ended:
                    held[0].post(self)
                else:
                    yield from self._send()
            except LinkError as error:
                self.error = error
            else:
                if (yield from self._outcome()):
                    return
            wait = self._parts.timing.wait(tries)
            tries += 1
            if self._parts.now + wait >= self._deadline:
                self._late = True
                return
            yield Pause(self._parts.now + wait)

    @property
    def _deadline(self) -> float:
        timing = self._parts.timing
        return self._start + (timing.unproven if self.stranger and not self._heard else timing.request)

    def _outcome(self) -> Steps[bool]:
        """Wait for an event. True: this was the result; False: ask again."""
        while True:
            event = yield Event(self._patience)
            if event is None:
                self._late = True
                if not isinstance(self.error, RefusedError):
                    self.error = LinkError(f"{self.peer.name} did not send it in time", hint="see its log")
                return True
            if self._answered is None and self._began:
                self._answered = self._parts.now
            again = self._judge(event)
            if again is not None:
                return not again

    @property
    def _patience(self) -> float:
        if self.run is None or self.run.machine.state in _WAITING:
            return self._deadline
        return self._parts.now + self._parts.timing.in_doubt  # it is going on here

    def _judge(self, event: object) -> bool | None:
        """True: ask again; False: the request has ended; None: go on waiting."""
        match event:
            case _Refused(status):
                self.drop("the source refused it")
                self._heard = self._heard or status is Status.BUSY
                self.error = RefusedError(
                    f"{self.peer.name}: {STATUS_TEXT.get(status, f'status {int(status)}')}", status=status
                )
                return status is Status.BUSY
            case Lost(line) if line is self._line and line.error is not None:
                return self._unreachable(line.error)
            case _Failed(error):
                return self._unreachable(error)
            case _Over(run) if run is self.run:
                return self._ended(run)
            case _Checked(verdicts):
                status = first_failure(verdicts)
                self.done = status is Status.OK
                if not self.done:
                    self.error = RefusedError(STATUS_TEXT.get(status, "refused"), status=status)
                return status is Status.BUSY
        return None

    def _unreachable(self, error: LinkError) -> bool | None:
        going_on = self.run is not None and self.run.machine.state not in (*_WAITING, *_BEFORE)
        self.error = self.error or error
        return None if going_on else True

    def _ended(self, run: Incoming) -> bool | None:
        self.context = run.context or self.context
        if run.machine.state is TargetState.OWNED:
            self.done, self.error = True, None
            return False
        if self.error is None or not run.dropped:
            self.error = run.error or StateError("it was aborted")
        if run.dropped in ("source", "offer"):
            # it tries again by itself what it pushes, and says no to what it was asked for
            return None if self._attempts else True
        return run.dropped == "time" or run.status is Status.BUSY

    def drop(self, why: str) -> None:
        """What waits for the source waits in vain, or would."""
        run = self.run
        if self.inbox is None or run is None or run.ended:
            return
        if run.machine.state not in (*_WAITING, *_BEFORE):
            return
        self.inbox.drop(why, run)
        self._dropped = run

    # -- the report --------------------------------------------------------------------------------------

    def report(self) -> TransferReport:
        """How it ended, as this gateway sees it."""
        run, context, error = self.run, self.context, self.error
        state = TargetState.NEW if run is None else run.machine.state
        result: Result
        result, here, there = TARGET_STANDS[state]
        status = Status.OK if self.done else (error or StateError("")).status
        owned = run is not None and TargetState.OWNING in run.machine.spent
        if result == "kept" and not self.done and not owned and not isinstance(error, LinkError):
            result = "refused"
        if status is Status.UNKNOWN_SA:
            there = "has no such SA"
        elif isinstance(error, LinkError):
            there += ", as far as is known here"
        mn, ours = "" if context is None else mn_label(context), self._parts.name
        text, hint, code = "", "", 0
        if self.done:
            text = f"{ours} would take it" if self.dry_run else f"{ours} serves {mn} now"
        elif error is not None:
            text, code = str(error), _CODES.get(status, error.exit_code)
            came = run is not None or bool(self.verdicts)
            hint = error.hint or advice(status, refused_here=came)
            if status is Status.NOT_ALLOWED and not came:
                hint = _NOT_ALLOWED.format(self.right)
        sa = context.spis if context is not None else self.sa
        return TransferReport(
            transfer_id="" if run is None else run.stored.transfer_id.hex(),
            sa=sa or SaName(b"", b""),
            mn=mn,
            mn_address=str(self.mn if run is None else run.mn),
            from_=self.peer.name,
            to=ours,
            result=result,
            status=status,
            text=text,
            hint=hint,
            state_here=f"{ours} {here}",
            state_there=f"{self.peer.name} {there}",
            verdicts=self.verdicts or (run.verdicts if run is not None else ()),
            phases_ms=self._phases(),
            cxtp_messages=self._messages + (run.messages if run is not None else 0),
            cxtp_octets=self._octets + (run.octets if run is not None else 0),
            attempts=max(1, self._attempts),
            epoch=run.stored.epoch if run is not None else 0,
            address="mn" if self.whole else "update",
            dry_run=self.dry_run,
            exit_code=code,
        )

    def _phases(self) -> dict[str, float]:
        request = None
        if self._began and self._answered is not None:
            request = (self._answered - self._began) * 1000
        return target_phases({} if self.run is None else self.run.phases(), request)


class Requests:
    """What this gateway wants of others."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._open: list[Request] = []

    def wanted(
        self, peer: PeerConfig, mn: Address, context: IkeContext, header: TransferHeader
    ) -> Request | None:
        """What of ours this offer answers."""
        return next((one for one in self._open if one.fits(peer, mn, context, header)), None)

    def refused(self, line: Line, message: Ctdr) -> bool:
        """The CTDR that answers a CT-Req; False: nobody had asked."""
        status, sequence = refused_request(message)
        name = (line.peer.name, message.mn, sequence)
        found = next(
            (one for one in self._open if (one.peer.name, one.mn, one.message.sequence) == name), None
        )
        if found is None or status is Status.OK:
            return False
        found.refused(message, status)
        return True

    def run(self, request: Request, held: tuple[Holder, Incoming, Endpoint] | None = None) -> Steps[None]:
        """Ask until it is here or refused, or the time is over: `request` says how it ended.

        `held`: what pSG has sent ahead of the MN that has now arrived; only the rest of it is asked for.
        """
        # a stranger's has no turn to take from others: it is told from them by its sequence number
        alone = request.message.sequence if request.stranger else None
        turn = ("request", request.peer.name, request.mn, alone)
        yield Turn(turn)
        self._open.append(request)
        try:
            yield from request.work(held)
        finally:
            self._open.remove(request)
            self._parts.scheduler.leave(turn)
            request.drop("nobody waits for it any more")

    def pull(
        self,
        peer: PeerConfig,
        mn: Address,
        sa: SaName | None,
        dry_run: bool,
        ticket: int,
        asked_by: str = "",
    ) -> Steps[TransferReport]:
        """A request by the operator; how it ended."""
        sequence = int.from_bytes(self._parts.fresh(4))
        message = CtReq(mn, sequence, 0, name_sa(sa, check=dry_run))
        request = Request(self._parts, peer, message, sa=sa, right="pull", dry_run=dry_run, ticket=ticket)
        request.asked_by = asked_by
        yield from self.run(request)
        return request.report()
