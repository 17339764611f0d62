"""New gateway: CT-Reqs to other gateways, what follows from each, and the report of it.

A CT-Req is repeated with the same sequence number, with back-off, while the old gateway is busy or the
connection breaks, for `Timing.request` seconds. RFC 4067 has no answer that refuses it; ours is a CTDR with S
= 0 and statuses of FPT REQUEST (`refuse_request`).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakValueDictionary

from .context import Address, Endpoint, IkeContext
from .cxtp import Blocks, ContextDataBlock, Ctc, Ctdr, CtReq, StatusBlock
from .desk import Arrived, Desk
from .errors import BusyError, IkectxError, LinkError, RefusedError, StateError, UnknownSaError
from .incoming import Incoming
from .links import Link, Links, PeerConfig
from .name import SaName
from .numbers import STATUS_TEXT, Fpt, Status
from .ports import Verdict
from .profile import TransferHeader
from .report import HINTS, TARGET_STANDS, Result, TransferReport, mn_label, target_phases
from .run import Observer, Parts
from .transfer import TargetState, first_failure

CHECK_ONLY = 1
"""Flag of a named SA in a CT-Req: the old gateway should offer it for a check only."""

_CODES: Mapping[Status, int] = {
    Status.BUSY: BusyError.exit_code,
    Status.UNKNOWN_SA: UnknownSaError.exit_code,
    Status.AMBIGUOUS: UnknownSaError.exit_code,
}
_NOT_ALLOWED = "give this gateway the right `{}` in the other gateway's configuration"
_NOT_ALLOWED_HERE = (
    "change what is not allowed in this gateway's configuration: whose SAs the other one may bring "
    "([[peer]]), [connections.NAME], or the connection in swanctl.conf"
)
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


class Ask:
    """The request for one SA to one peer, until the SA is here or is refused. A `desk.Want`.

    `whole`: the SA comes in one CTD (or was sent ahead), because the mobile node is here; else the old
    gateway pushes it. `sa` None: any SA of the mobile node. `right`: the right that this gateway needs at the
    peer. `proves`: raises RefusedError if the evidence that a stranger presented is not of the mobile node of
    a context.
    """

    def __init__(
        self,
        peer: PeerConfig,
        request: CtReq,
        *,
        sa: SaName | None,
        right: str,
        place: Callable[[IkeContext], Endpoint] | None = None,
        proves: Callable[[IkeContext], object] | None = None,
        here: Endpoint | None = None,
        answers: bool = False,
        dry_run: bool = False,
        progress: Observer | None = None,
    ) -> None:
        self.peer = peer
        self.request = request
        self.sa = sa
        self.right = right
        self.whole = place is not None
        self.here = here
        self.answers = answers
        self.dry_run = dry_run
        self.progress = progress
        self.events: asyncio.Queue[object] = asyncio.Queue()
        self.desk: Desk | None = None
        self.run: Incoming | None = None
        """The transfer that followed; the last one, if the old gateway had to try again."""
        self.context: IkeContext | None = None
        self.link: Link | None = None
        self.error: IkectxError | None = None
        self.verdicts: tuple[Verdict, ...] = ()
        self.late = False
        """True if it was given up because its time was over."""
        self.done = False
        """True if the SA was taken; in a dry run, if it would be taken."""
        self.attempts = 0
        self.messages = 0
        self.octets = 0
        self.start = 0.0
        """When it had its turn."""
        self.began = 0.0
        self.answered: float | None = None
        self.heard = False
        """True if the peer has shown that it accepts the request: by saying that the SA is busy, or by the
        SA."""
        self._place = place
        self._proves = proves

    @property
    def stranger(self) -> bool:
        """True if anybody may have caused this request."""
        return self._proves is not None

    @property
    def mn(self) -> Address:
        """The mobile node's previous address, as this gateway knows it."""
        return self.request.mn

    def fits(self, peer: PeerConfig, mn: Address, context: IkeContext, header: TransferHeader) -> bool:
        """True if that offer answers this request."""
        return (
            peer.name == self.peer.name
            and self.whole == (header.address == "mn")
            and self.dry_run == (header.intent == "check")
            and (context.spis == self.sa if self.sa is not None else mn == self.mn)
            and self._proven(context)
        )

    def _proven(self, context: IkeContext) -> bool:
        """True if the context is of the mobile node that asked, because others may ask for the same SA at the
        same time to have it brought to another place."""
        try:
            if self._proves is not None:
                self._proves(context)
        except RefusedError:
            return False
        return True

    # -- as a Want ---------------------------------------------------------------------------------------

    def place(self, context: IkeContext) -> Endpoint:
        """Where the MN is now. Errors: RefusedError."""
        return context.remote if self._place is None else self._place(context)

    def begun(self, desk: Desk, run: Incoming) -> None:
        """`run` is the transfer that answers this request."""
        self.desk, self.run, self.context, self.heard = desk, run, run.context, True
        self.events.put_nowait(run)
        run.when_over(lambda: self.events.put_nowait(_Over(run)))

    def lost(self, gone: asyncio.Future[LinkError]) -> None:
        """Hear that the link is closed."""
        self.events.put_nowait((self.link, gone.result()))

    def leave(self) -> None:
        """Hear no more of the link: it lives on for weeks, and would keep the request for as long."""
        if self.link is not None:
            self.link.gone.remove_done_callback(self.lost)

    def checked(self, context: IkeContext, verdicts: Sequence[Verdict]) -> None:
        """The request was for a check only, and this is its result."""
        self.context = context
        self.refused_here(verdicts)

    def refused_here(self, verdicts: Sequence[Verdict]) -> None:
        """An offer for this request came, and was refused before a transfer began."""
        self.verdicts = tuple(verdicts)
        self.events.put_nowait(self.verdicts)


class _Over:
    def __init__(self, run: Incoming) -> None:
        self.run = run


class Asking:
    """The requests of this gateway to others."""

    def __init__(self, parts: Parts, links: Callable[[], Links]) -> None:
        self._parts = parts
        self._links = links
        self._open: list[Ask] = []
        self._turns: WeakValueDictionary[tuple[str, Address, int | None], asyncio.Lock] = (
            WeakValueDictionary()
        )

    def wanted(
        self, peer: PeerConfig, mn: Address, context: IkeContext, header: TransferHeader
    ) -> Ask | None:
        """The request that this offer answers."""
        return next((ask for ask in self._open if ask.fits(peer, mn, context, header)), None)

    def refused(self, link: Link, message: Ctdr) -> bool:
        """Handle a CTDR that refuses a CT-Req. False: there was no such request."""
        status, sequence = refused_request(message)
        name = (link.peer.name, message.mn, sequence)
        ask = next((a for a in self._open if (a.peer.name, a.mn, a.request.sequence) == name), None)
        if ask is None or status is Status.OK:
            return False
        self._count(ask, len(message.serialize()))
        ask.events.put_nowait(status)
        return True

    @staticmethod
    def _count(ask: Ask, octets: int) -> None:
        ask.messages += 1
        ask.octets += octets

    async def send(self, ask: Ask, link: Link | None = None) -> None:
        """Send the CT-Req, over `link` if it is open. Errors: LinkError."""
        if link is None or link.error is not None:
            link = await self._link(ask)
        if link is not ask.link:
            ask.leave()
            ask.link = link
            link.gone.add_done_callback(ask.lost)
        if not ask.began:
            ask.began = self._parts.clock.now()
        ask.attempts += 1
        self._count(ask, await link.send(ask.request))

    async def _link(self, ask: Ask) -> Link:
        """A link to the peer, within the time of the request, because others may be dialling before it.

        Errors: LinkError.
        """
        left = self._deadline(ask) - self._parts.clock.now()
        try:
            async with asyncio.timeout(max(0.0, left)):
                return await self._links().get(ask.peer)
        except TimeoutError:
            raise LinkError(f"{ask.peer.name} could not be reached in time", hint="see its log") from None

    # -- one request -------------------------------------------------------------------------------------

    async def run(self, ask: Ask, held: tuple[Desk, Incoming, Endpoint] | None = None) -> None:
        """Ask until the SA is here or refused, or the time is over; `ask` has the result.

        `held`: the context that the old gateway sent ahead of the mobile node, which has now arrived; only
        the rest is asked for.
        """
        # a stranger's request waits for nobody's turn, because its sequence number tells it from others
        alone = ask.request.sequence if ask.stranger else None
        turn = self._turns.setdefault((ask.peer.name, ask.mn, alone), asyncio.Lock())
        async with turn:
            self._open.append(ask)
            try:
                with self._links().in_use(ask.peer):
                    await self._ask(ask, held)
                    await self._give_up(ask)
            finally:
                self._open.remove(ask)
                ask.leave()
                self._drop(ask, "nobody waits for it any more")

    async def _give_up(self, ask: Ask) -> None:
        """Give up: tell the old gateway, and clear away what has arrived, so that nothing arrives later."""
        if ask.done or not (ask.late or ask.attempts > 1):
            return
        if ask.stranger and ask.run is None:
            return  # a CTC names only the mobile node, so it would cancel the mobile node's own request
        if ask.link is not None and ask.link.error is None:
            with contextlib.suppress(LinkError):
                self._count(ask, await ask.link.send(Ctc(ask.mn if ask.run is None else ask.run.mn)))
        if ask.run is not None and self._drop(ask, "it did not come in time"):
            over = asyncio.Event()
            ask.run.when_over(over.set)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._parts.timing.step):
                    await over.wait()

    async def _ask(self, ask: Ask, held: tuple[Desk, Incoming, Endpoint] | None) -> None:
        now = self._parts.clock.now
        ask.start = now()
        if held is not None:
            ask.begun(held[0], held[1])
        tries = 0
        while True:
            try:
                if held is not None and not held[1].ended:
                    held[0].post.put_nowait(Arrived(held[1], held[2], lambda link: self._request(ask, link)))
                else:
                    await self.send(ask)
            except LinkError as error:
                ask.error = error
            else:
                if await self._outcome(ask):
                    return
            wait = self._parts.timing.wait(tries)
            tries += 1
            if now() + wait >= self._deadline(ask):
                ask.late = True
                return
            await asyncio.sleep(wait)

    async def _request(self, ask: Ask, link: Link | None) -> None:
        try:
            await self.send(ask, link)
        except LinkError as error:
            ask.events.put_nowait((ask.link, error))

    def _deadline(self, ask: Ask) -> float:
        timing = self._parts.timing
        return ask.start + (timing.unproven if ask.stranger and not ask.heard else timing.request)

    async def _outcome(self, ask: Ask) -> bool:
        """Wait for an event. True: this was the result; False: ask again."""
        while True:
            try:
                async with asyncio.timeout(self._patience(ask)):
                    event = await ask.events.get()
            except TimeoutError:
                ask.late = True
                if not isinstance(ask.error, RefusedError):
                    ask.error = LinkError(f"{ask.peer.name} did not send it in time", hint="see its log")
                return True
            if ask.answered is None and ask.began:
                ask.answered = self._parts.clock.now()
            again = self._judge(ask, event)
            if again is not None:
                return not again

    def _patience(self, ask: Ask) -> float:
        if ask.run is None or ask.run.machine.state in _WAITING:
            return max(0.0, self._deadline(ask) - self._parts.clock.now())
        return self._parts.timing.in_doubt  # it is going on here

    def _judge(self, ask: Ask, event: object) -> bool | None:
        """True: ask again; False: the request has ended; None: go on waiting."""
        match event:
            case Status() as status:
                self._drop(ask, "the source refused it")
                ask.heard = ask.heard or status is Status.BUSY
                ask.error = RefusedError(
                    f"{ask.peer.name}: {STATUS_TEXT.get(status, f'status {int(status)}')}", status=status
                )
                return status is Status.BUSY
            case (link, LinkError() as error):
                if link is not ask.link:
                    return None
                going_on = ask.run is not None and ask.run.machine.state not in (*_WAITING, *_BEFORE)
                ask.error = ask.error or error
                return None if going_on else True
            case _Over() as over if over.run is ask.run:
                return self._ended(ask, over.run)
            case tuple() as verdicts:
                status = first_failure(verdicts)
                ask.done = status is Status.OK
                if not ask.done:
                    ask.error = RefusedError(STATUS_TEXT.get(status, "refused"), status=status)
                return status is Status.BUSY
        return None

    def _ended(self, ask: Ask, run: Incoming) -> bool | None:
        ask.context = run.context or ask.context
        if run.machine.state is TargetState.OWNED:
            ask.done, ask.error = True, None
            return False
        if ask.error is None or not run.dropped:
            ask.error = run.error or StateError("it was aborted")
        if run.dropped in ("source", "offer"):
            # the old gateway repeats its own pushes, and refuses explicitly what it was asked for
            return None if ask.attempts else True
        return run.dropped == "time" or run.status is Status.BUSY

    def _drop(self, ask: Ask, why: str) -> bool:
        """Drop a transfer that waits for the source in vain. False: there is none."""
        run = ask.run
        if ask.desk is None or run is None or run.ended or run.machine.state not in (*_WAITING, *_BEFORE):
            return False
        ask.desk.post.put_nowait(why)
        return True

    # -- the report --------------------------------------------------------------------------------------

    def pull(
        self,
        peer: PeerConfig,
        mn: Address,
        sa: SaName | None,
        dry_run: bool,
        progress: Observer | None,
    ) -> Ask:
        """A request of the operator."""
        request = CtReq(mn, secrets.randbits(32), 0, name_sa(sa, check=dry_run))
        return Ask(peer, request, sa=sa, right="pull", dry_run=dry_run, progress=progress)

    def report(self, ask: Ask) -> TransferReport:
        """The result, as this gateway sees it."""
        run, context, error = ask.run, ask.context, ask.error
        state = TargetState.NEW if run is None else run.machine.state
        result: Result
        result, here, there = TARGET_STANDS[state]
        status = Status.OK if ask.done else (error or StateError("")).status
        owned = run is not None and TargetState.OWNING in run.machine.spent
        if result == "kept" and not ask.done and not owned and not isinstance(error, LinkError):
            result = "refused"
        if status is Status.UNKNOWN_SA:
            there = "has no such SA"
        elif isinstance(error, LinkError):
            there += ", as far as is known here"
        mn = "" if context is None else mn_label(context)
        text, hint, code = "", "", 0
        if ask.done:
            text = (
                f"{self._parts.name} would take it" if ask.dry_run else f"{self._parts.name} serves {mn} now"
            )
        elif error is not None:
            text, code = str(error), _CODES.get(status, error.exit_code)
            hint = error.hint or HINTS.get(status, "")
            if status is Status.NOT_ALLOWED:
                ours = run is not None or bool(ask.verdicts)
                hint = _NOT_ALLOWED_HERE if ours else _NOT_ALLOWED.format(ask.right)
        sa = context.spis if context is not None else ask.sa
        return TransferReport(
            transfer_id="" if run is None else run.stored.transfer_id.hex(),
            sa=sa or SaName(b"", b""),
            mn=mn,
            mn_address=str(ask.mn if run is None else run.mn),
            from_=ask.peer.name,
            to=self._parts.name,
            result=result,
            status=status,
            text=text,
            hint=hint,
            state_here=f"{self._parts.name} {here}",
            state_there=f"{ask.peer.name} {there}",
            verdicts=ask.verdicts or (run.verdicts if run is not None else ()),
            phases_ms=_phases(ask),
            cxtp_messages=ask.messages + (run.messages if run is not None else 0),
            cxtp_octets=ask.octets + (run.octets if run is not None else 0),
            attempts=max(1, ask.attempts),
            epoch=run.stored.epoch if run is not None else 0,
            address="mn" if ask.whole else "update",
            dry_run=ask.dry_run,
            exit_code=code,
        )


def _phases(ask: Ask) -> dict[str, float]:
    request = None
    if ask.began and ask.answered is not None:
        request = (ask.answered - ask.began) * 1000
    return target_phases({} if ask.run is None else ask.run.phases(), request)
