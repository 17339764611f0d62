"""The old gateway's end of a transfer: export, offer, let go, and what follows from the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace as changed
from typing import Any, Literal, TypeVar

from . import trace
from .context import FinalState, IkeContext, Secret
from .cxtp import Ctc, Ctd, Ctdr, Pctd, TokenAlgorithm
from .errors import BusyError, IkectxError, LinkError, RefusedError, StateError, UnknownSaError, WireError
from .links import Answer, Link, Links, PeerConfig
from .name import SaName
from .numbers import STATUS_TEXT, UNTOUCHED, Fpt, Status
from .ports import Verdict, hand_over, stay, take_nothing
from .profile import TransferHeader, decode, decode_verdicts, encode, encode_final
from .reasons import with_reasons
from .report import HINTS, SOURCE_STANDS, TransferReport, mn_label, source_phases, source_words
from .run import Observer, Parts, Run, Turn, log, step
from .store import JournalEntry
from .transfer import OSEQ_JUMP, SOURCE_DURABLE, SourceAction, SourceInput, SourceState, new_source
from .whole import decode_last, encode_whole

Address = Literal["update", "keep", "mn"]
_T = TypeVar("_T")

_RESULTS: Mapping[SourceState, str] = {
    SourceState.DONE: "moved",
    SourceState.KEPT: "kept",
    SourceState.LOST: "lost",
    SourceState.REFUSED: "refused",
}
_INSTEAD: Mapping[SourceState, SourceInput] = {
    SourceState.OFFERED: SourceInput.FAILED,
    SourceState.FREEZING: SourceInput.CANCEL,
    SourceState.RELEASED: SourceInput.FAILED,
}
"""States that are entered only if the journal can be written, because the SA is let go in them."""


def offer_status(answer: Ctdr) -> tuple[Status, tuple[Verdict, ...]]:
    """The status of a CTDR: OK, IN_DOUBT, the first refusal, or MALFORMED if it says both yes and no, or
    nothing."""
    verdicts = with_reasons(decode_verdicts(answer.statuses), answer.blocks)
    if any(verdict.status is Status.IN_DOUBT for verdict in verdicts):
        return Status.IN_DOUBT, verdicts  # with S = 1, so that older gateways take it for neither yes nor no
    failed = next((verdict.status for verdict in verdicts if verdict.status is not Status.OK), None)
    if answer.complete == (failed is None):
        return failed or Status.OK, verdicts
    return Status.MALFORMED, verdicts


def refusal_text(status: Status, verdicts: Sequence[Verdict]) -> str:
    """A refusal in words: the text of its status, and the other gateway's own text."""
    text = STATUS_TEXT.get(status, f"status {int(status)}")
    words = next((verdict.detail for verdict in verdicts if verdict.status is status), "")
    return text if words in ("", text) else f"{text}: {words}"


def check_expected(state: IkeContext | FinalState, expects: int) -> None:
    """Check that the mobile node can expect this message ID of our next request. Errors: RefusedError."""
    last = state.mid_initiator
    if state.unsure and not 0 <= expects - last <= 1:
        raise RefusedError(
            f"the MN expects request {expects} next, which cannot be: request {last} has no answer yet",
            status=Status.FAILED,
            hint="the MN's agent may have missed messages of its charon: let the MN connect anew",
        )


_SERVED = frozenset({SourceState.KEPT, SourceState.REFUSED})
"""Ends in which this gateway serves the SA."""
_PREPARED_THERE = frozenset({SourceState.OFFERED, SourceState.ANNOUNCED, SourceState.AWAITING})
"""States in which this gateway serves the SA and the other one may have it prepared."""


class _Overrun(BusyError):
    """After the freeze the counters are beyond what was offered, so the whole context must be sent again."""


class Outgoing(Run[SourceState, SourceInput, SourceAction]):
    """One attempt to move one IKE_SA to one peer. `go` walks it to its end, also after it was reported.

    `begins`: OK to push the SA; ANNOUNCE if the mobile node said that it will go there; REQUESTED if it is at
    the peer, which asked for the SA over `link`. `token`: algorithm and key by which the peer can check the
    mobile node's arrival. `mid`: message ID of the request that the mobile node is known to send next.
    `away`: the mobile node is at the peer and does not answer here; then `expects` is the ID of the next
    request that it expects, None: not known.
    """

    reports = True

    def __init__(
        self,
        parts: Parts,
        links: Links,
        peer: PeerConfig,
        *,
        sa: SaName,
        transfer_id: bytes,
        address: Address = "update",
        observer: Observer | None = None,
        entry: JournalEntry | None = None,
        begins: SourceInput = SourceInput.OK,
        link: Link | None = None,
        token: tuple[TokenAlgorithm, Secret] | None = None,
        sequence: int = 0,
        mid: int | None = None,
        away: bool = False,
    ) -> None:
        """`sequence`: that of the MN's CTAR."""
        state = SourceState.NEW if entry is None else SourceState(entry.state)
        machine = new_source(parts.clock.now(), parts.timing, state)
        super().__init__(
            parts, machine, entry, observer, durable=SOURCE_DURABLE, results=_RESULTS, instead=_INSTEAD
        )
        self.peer = peer
        self.sa = sa
        self.transfer_id = transfer_id
        self.address = address
        self.context: IkeContext | None = None
        self.signals: asyncio.Queue[SourceInput] = asyncio.Queue()
        """Inputs from elsewhere: CANCEL and RECLAIM (the operator), CTC and REQUESTED (the peer)."""
        self.settled: asyncio.Future[TransferReport] = asyncio.get_running_loop().create_future()
        """The report: set at the end, or earlier as "in-doubt"."""
        self.over = asyncio.Event()
        """Set when all work of this transfer has ended."""
        self.awaited = asyncio.Event()
        """Set when the peer holds the context and the mobile node may go, or when the transfer has ended."""
        self.turn: Turn | None = None
        """The lock that it holds. While it waits for the mobile node, others for the same node may go before
        it."""
        self.link = link
        """The connection that its messages use."""
        self.sequence = sequence
        self.mid = mid
        self.away = away
        self.expects: int | None = None
        self.asked_for: frozenset[Fpt] = frozenset()
        """Wishes of the peer beside yes: NEW_SPIS, CHILD_SAs get other SPIs; GO_ON, it cannot send yet."""
        self.told = False
        """True if the peer knows that the transfer ended, and why."""
        self._begins = begins
        self._offered = entry is not None
        """Has the peer been told of it, as far as we know?"""
        self.token = token
        self._links = links
        self._asked: asyncio.Future[Answer] | None = None
        self._verdicts: tuple[Verdict, ...] = ()
        self._messages = 0
        self._octets = 0
        self._connect_ms = 0.0
        self._tries = 0
        self._trouble: IkectxError | None = None
        self._doubts: asyncio.TimerHandle | None = None
        self._sent = 0.0
        self._do: Mapping[SourceAction, Callable[[], Awaitable[SourceInput | None]]] = {
            SourceAction.SEND_PCTD: self._send_pctd,
            SourceAction.SEND_CTD: self._send_ctd,
            SourceAction.SEND_CTC: self._send_ctc,
            SourceAction.RECONNECT: self._reconnect,
            SourceAction.FREEZE: self._freeze,
            SourceAction.RELEASE: self._release,
            SourceAction.THAW: self._thaw,
        }

    @classmethod
    def resumed(cls, parts: Parts, links: Links, peer: PeerConfig, entry: JournalEntry) -> Outgoing:
        """As the journal has it. Errors: WireError when its context is not one of this version."""
        if entry.context is None:
            raise WireError("the journal has no context for it")
        context, header = decode(Pctd.parse(entry.context).blocks)
        begins = SourceInput.ANNOUNCE if header.intent == "hold" else SourceInput.OK
        if entry.final is not None and isinstance(decode_last(Ctd.parse(entry.final).blocks)[0], IkeContext):
            begins = SourceInput.REQUESTED
        run = cls(
            parts,
            links,
            peer,
            sa=entry.sa,
            transfer_id=entry.transfer_id,
            address=header.address,
            entry=entry,
            begins=begins,
        )
        run.context = context
        return run

    @property
    def held(self) -> bool:
        """True if the peer holds the context, and waits for the mobile node."""
        answered = self._asked is not None and self._asked.done()
        state = self.machine.state
        return state is SourceState.AWAITING or (state is SourceState.ANNOUNCED and answered)

    # -- the walk ----------------------------------------------------------------------------------------

    async def export(self) -> None:
        """Ask the source for the context. Errors: UnknownSaError; any other error is kept for `begin`."""
        try:
            context = await self._step("export", self.parts.source.export(self.sa, away=self.away))
            epoch = max(context.epoch, self.parts.store.known_epoch(self.sa))
            self.context = changed(context, epoch=epoch)
            self.error = None
        except UnknownSaError:
            raise
        except IkectxError as error:
            self.context = None
            self.error = error

    async def begin(self) -> None:
        """Go on from the export to the end."""
        if self.context is not None:
            try:
                self.entry = self._new_entry(self.context)
            except WireError as error:
                self.blame(error)
        if self.error is None:
            await self.go(self._begins)
        else:
            busy = isinstance(self.error, BusyError)
            await self.go(SourceInput.BUSY if busy else SourceInput.FAILED)

    @property
    def _header(self) -> TransferHeader:
        hold = self._begins is SourceInput.ANNOUNCE
        return TransferHeader(self.transfer_id, "hold" if hold else "prepare", self.address)

    @trace.spanned("encode PCTD")
    def _new_entry(self, context: IkeContext) -> JournalEntry:
        header = self._header
        offer = Pctd(context.remote.address, encode(context, transfer=header))
        now = self.parts.wall()
        return JournalEntry(
            transfer_id=self.transfer_id,
            role="source",
            peer=self.peer.name,
            sa=self.sa,
            mn=mn_label(context),
            mn_address=str(context.remote.address),
            state=str(SourceState.NEW),
            epoch=context.epoch,
            started=now,
            updated=now,
            context=offer.serialize(),
        )

    async def go(self, what: SourceInput | None) -> None:
        """Feed `what`, do what the table says, feed what comes of it, until the end."""
        with self._links.in_use(self.peer):
            while what is not None:
                before = self.machine.state
                if self._may_have_sent and before in _PREPARED_THERE and self.machine.peek(what) in _SERVED:
                    await self._pass_by()
                actions = await self.advance(what)
                if self.machine.state != before:
                    self._tries = 0
                what = None
                for action in actions:
                    what = await self._do[action]()
                if what is None and self.machine.state is SourceState.AWAITING:
                    what = await self._await()
        if self._doubts is not None:
            self._doubts.cancel()
        if self.machine.state in _SERVED:
            self._stay()
        self._settle()

    def _stay(self) -> None:
        try:
            stay(self.parts.source, self.sa)
        except IkectxError as error:
            log.error("gateways that it came from are not told that an SA stays here: %s", error)

    async def _await(self) -> SourceInput:
        """The MN: it goes when it likes, and until then others may have their turn."""
        self.awaited.set()
        due = self.machine.next_timer() or 0.0
        if self.turn is not None:
            self.turn.give()
        try:
            signal = await self._signal(max(0.0, due - self.parts.clock.now()))
        finally:
            if self.turn is not None:
                await self.turn.take()
        if signal is not None:
            return signal
        late = f"the MN did not arrive at {self.peer.name} in time"
        self.blame(LinkError(late, hint="this gateway goes on serving it"))
        return SourceInput.TIMEOUT

    def _settle(self) -> None:
        """Report: at the end, and before it when the caller should not wait any longer."""
        self.awaited.set()
        report = self.report()
        self.tell(report)
        if not self.settled.done():
            self.settled.set_result(report)

    async def _step(self, what: str, work: Awaitable[_T]) -> _T:
        with trace.about(self.transfer_id):
            return await step(what, work, self.parts.timing)

    # -- messages ----------------------------------------------------------------------------------------

    async def _connect(self) -> Link:
        began = self.parts.clock.now()
        self.link = await self._links.get(self.peer)
        self._connect_ms += (self.parts.clock.now() - began) * 1000
        return self.link

    def asked(self, octets: int) -> None:
        """The other gateway asked for it (CT-Req): that is part of what the transfer took."""
        self._count(octets)

    def _count(self, octets: int) -> None:
        self._messages += 1
        self._octets += octets

    def _elapsed(self) -> int:
        """The field of PCTD and CTD: milliseconds since the first message of this transfer."""
        now = self.parts.clock.now()
        if not self._sent:
            self._sent = now
        return min(0xFFFFFFFF, round((now - self._sent) * 1000))

    async def _send_pctd(self) -> SourceInput:
        try:
            link = await self._connect()
            offer = changed(Pctd.parse(self.stored.context or b""), elapsed=self._elapsed())
            if self.token is not None:
                offer = changed(offer, algorithm=self.token[0], key=self.token[1].reveal())
            self._offered = True
            octets, self._asked = await link.ask(offer)
        except LinkError as error:
            self.blame(error)
            return SourceInput.LINK_LOST
        self._count(octets)
        return await self._answer()

    async def _send_ctd(self) -> SourceInput:
        if self._doubts is None:
            self._doubts = asyncio.get_running_loop().call_later(self.parts.timing.in_doubt, self._doubt)
        try:
            if self.link is None or self.link.error is not None:
                raise self.link.error if self.link and self.link.error else LinkError("not connected")
            letting_go = changed(Ctd.parse(self.stored.final or b""), elapsed=self._elapsed())
            # no answer in time: asked once more on the same link
            again = self._asked if self._asked is not None and not self._asked.done() else None
            octets, self._asked = await self.link.ask(letting_go, again)
        except LinkError as error:
            self._lost(error)
            return SourceInput.LINK_LOST
        self._count(octets)
        return await self._answer()

    def _doubt(self) -> None:
        if self.machine.state is SourceState.RELEASED:
            self.blame(LinkError(f"{self.peer.name} has not confirmed in {self.parts.timing.in_doubt:g} s"))
            self._settle()

    def _lost(self, error: LinkError) -> None:
        log.warning("transfer %s: let go, but not confirmed yet: %s", self.transfer_id.hex(), error)

    async def _reconnect(self) -> SourceInput:
        """Wait, longer each time, then dial again."""
        wait = self.parts.timing.wait(self._tries)
        self._tries += 1
        signal = await self._signal(wait)
        if signal is not None:
            return signal
        try:
            await self._connect()
        except LinkError as error:
            self._lost(error)
            return SourceInput.LINK_LOST
        return SourceInput.LINK_UP

    async def _send_ctc(self) -> None:
        """So that the peer need not wait for its own timer; not more than a courtesy."""
        if self.context is None or self._begins is SourceInput.REQUESTED:
            return
        try:
            link = self.link
            if link is None:
                link = await self._connect()  # after a restart
            self._count(await link.send(Ctc(self.context.remote.address)))
        except LinkError as error:
            log.info("transfer %s: %s was not told: %s", self.transfer_id.hex(), self.peer.name, error)

    async def _signal(self, seconds: float | None) -> SourceInput | None:
        """The next signal that means something in this state; None: none came in time."""
        try:
            async with asyncio.timeout(seconds):
                while self.machine.ignores(signal := await self.signals.get()):
                    pass
        except TimeoutError:
            return None
        self._blame_signal(signal)
        return signal

    def _pending(self) -> SourceInput | None:
        """A signal that came while a step was under way."""
        while not self.signals.empty():
            signal = self.signals.get_nowait()
            if not self.machine.ignores(signal):
                self._blame_signal(signal)
                return signal
        return None

    def _blame_signal(self, signal: SourceInput) -> None:
        reasons = {
            SourceInput.CANCEL: StateError("it was cancelled here", hint="nothing to do"),
            SourceInput.CTC: RefusedError(f"{self.peer.name} cancelled it", status=Status.UNKNOWN_TRANSFER),
            SourceInput.RECLAIM: StateError(
                "it was reclaimed by the operator",
                hint=f"make sure that {self.peer.name} does not serve the SA as well",
            ),
        }
        if signal in reasons:
            self.error = reasons[signal]
            self.told = signal is SourceInput.CTC

    async def _answer(self) -> SourceInput:
        """What comes first: the CTDR, the end of the link, a signal, the machine's timer."""
        asked = self._asked
        if asked is None:
            raise StateError("nothing was asked")
        due = self.machine.next_timer()
        left = None if due is None else max(0.0, due - self.parts.clock.now())
        signal = asyncio.ensure_future(self._signal(left))
        both: set[asyncio.Future[Any]] = {asked, signal}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            signal.cancel()
        what = signal.result() if signal.done() and not signal.cancelled() else None
        if asked.done():
            if what is not None:
                self.signals.put_nowait(what)  # the answer counts first
            return self._judge(asked.result())
        if what is not None:
            return what
        offered = self.machine.state in (SourceState.OFFERED, SourceState.ANNOUNCED)
        waited = "offer" if offered else "confirmation"
        log.warning("transfer %s: no answer to the %s", self.transfer_id.hex(), waited)
        if offered:
            self.blame(LinkError(f"{self.peer.name} did not answer in time", hint="see its log"))
        return SourceInput.TIMEOUT

    def _judge(self, answer: Answer) -> SourceInput:
        if isinstance(answer, LinkError):
            if self.machine.state is SourceState.RELEASED:
                self._lost(answer)
            else:
                self.blame(answer)
            return SourceInput.LINK_LOST
        self._count(len(answer.serialize()))
        status, self._verdicts = offer_status(answer)
        if status is Status.OK:
            self.asked_for = frozenset(verdict.fpt for verdict in self._verdicts)
            return SourceInput.ACCEPTED
        if status is Status.MALFORMED and self.machine.state is SourceState.RELEASED and answer.complete:
            # neither yes nor no: whoever may own it now, it is not for us to guess
            log.error("transfer %s: an answer that contradicts itself", self.transfer_id.hex())
            return SourceInput.LINK_LOST
        text = f"{self.peer.name}: {refusal_text(status, self._verdicts)}"
        if status is Status.IN_DOUBT and self.machine.state is SourceState.RELEASED:
            log.error("transfer %s is in doubt, %s", self.transfer_id.hex(), text)
            self.error = LinkError(text, status=status, hint=HINTS[status])
            if not self.settled.done():
                self._settle()  # the operator decides, and need not wait for a time limit
            return SourceInput.DOUBTED
        self.error = RefusedError(text, status=status, hint=HINTS.get(status, ""))
        self.told = True
        return SourceInput.REJECTED

    # -- steps -------------------------------------------------------------------------------------------

    @property
    def _of(self) -> IkeContext:
        if self.context is None:
            raise StateError("a transfer without context takes no steps")
        return self.context

    async def _freeze(self) -> SourceInput:
        context, entry = self._of, self.stored
        self._asked = None  # what is still to come for the PCTD is no answer to the CTD
        try:
            # not said where it is not wanted: sources of integrators may not know it
            words = (("sending", Fpt.GO_ON), ("renaming", Fpt.NEW_SPIS))
            how = {word: True for word, fpt in words if fpt in self.asked_for}
            if self._begins is SourceInput.REQUESTED:
                hand_over(self.parts.source, self.sa)
            letting = self.parts.source.freeze(context, self.peer.name, away=self.away, **how)
            final: FinalState = await self._step("freeze", letting)
            final = changed(final, epoch=context.epoch + 1)
            if final.unsure and self.expects is not None:
                check_expected(final, self.expects)
                final = changed(final, mid_initiator=self.expects, unsure=False)
            if self.mid is not None and final.mid_responder != self.mid:
                raise _Overrun("the MN sent another request meanwhile")
            letting_go = self._encode(context, final)
        except _Overrun as error:
            self.blame(error)
            return SourceInput.FAILED  # it is frozen, and must be thawed before the next try
        except BusyError as error:
            self.blame(error)
            return SourceInput.BUSY
        except IkectxError as error:
            self.blame(error)
            return SourceInput.FAILED
        signal = self._pending()
        if signal is not None:
            return signal
        if self.link is None or self.link.error is not None:
            self.blame((self.link and self.link.error) or LinkError("the connection is gone"))
            return SourceInput.LINK_LOST
        self.entry = changed(entry, final=letting_go, epoch=final.epoch)
        return SourceInput.OK

    @trace.spanned("encode CTD")
    def _encode(self, context: IkeContext, final: FinalState) -> bytes:
        """The CTD, as octets. Errors: `_Overrun`."""
        if self._begins is SourceInput.REQUESTED:
            blocks = encode_whole(context, final, transfer=self._header)
        else:
            self._check_numbers(context, final)
            blocks = encode_final(final, self.transfer_id)
        return Ctd(context.remote.address, blocks).serialize()

    def _check_numbers(self, context: IkeContext, final: FinalState) -> None:
        """The peer is prepared to go on at the exported numbers plus the jump: ours must still be below."""
        exported = {child.spi_in: child.outbound.seq for child in context.children}
        for child in final.children:
            sent = child.outbound.seq - exported.get(child.spi_in, 0)
            if sent >= self.parts.oseq_jump:
                raise _Overrun(
                    f"{sent} packets left since the export, the jump is {self.parts.oseq_jump}",
                    hint="a larger `oseq_jump` at all gateways",
                )

    async def _release(self) -> SourceInput:
        try:
            await self._step("release", self.parts.source.release(self._of))
        except IkectxError as error:
            return await self._failed("release", error)
        self._trouble = None
        return SourceInput.OK

    async def _thaw(self) -> SourceInput:
        entry = self.stored
        # the peer may have sent under its own jump, even before it took the SA: packets for the MN may have
        # found their way there since the freeze. Go past all of that.
        jump = 2 * OSEQ_JUMP
        try:
            if self.told and self.status in UNTOUCHED:
                take_nothing(self.parts.source, self.sa)
            await self._step("thaw", self.parts.source.thaw(self._of, jump))
        except UnknownSaError as error:
            self.error = error
            return SourceInput.GONE
        except IkectxError as error:
            return await self._failed("thaw", error)
        self._trouble = None
        if entry.final is not None:
            self.entry = changed(entry, epoch=self._of.epoch + 2)
        return SourceInput.OK

    @property
    def _may_have_sent(self) -> bool:
        """Whether the peer, which was to prepare the SA, may have sent packets under its keys."""
        return self._offered and self.context is not None and not (self.told and self.status in UNTOUCHED)

    async def _pass_by(self) -> None:
        """Go past what the peer may have sent from the moment when it had prepared the SA, and serve on.

        A packet for the MN may have found its way there. The numbers that it used are not used again.
        """
        while True:
            try:
                return await self._step("thaw", self.parts.source.thaw(self._of, 2 * OSEQ_JUMP))
            except IkectxError as error:
                await self._failed("thaw", error)

    async def _failed(self, what: str, error: IkectxError) -> SourceInput:
        """A step without alternative: report in time, and go on trying."""
        self._tries += 1
        if self._tries == self.parts.timing.retries:
            self._trouble = error
            self._settle()
        await self.again(self._tries - 1, what, error)
        return SourceInput.FAILED

    # -- the report --------------------------------------------------------------------------------------

    def phases(self) -> dict[str, float]:
        return source_phases(super().phases(), self._connect_ms)

    def report(self) -> TransferReport:
        """As it stands now."""
        state, context = self.machine.state, self.context
        result, here, there = SOURCE_STANDS[state]
        mn = mn_label(context) if context is not None else ""
        ident = self.transfer_id.hex()
        words = source_words(state, self.error, self._trouble, mn=mn, peer=self.peer.name, ident=ident)
        return TransferReport(
            transfer_id=ident,
            sa=self.sa,
            mn=mn,
            mn_address=str(context.remote.address) if context is not None else "",
            from_=self.parts.name,
            to=self.peer.name,
            result=result,
            status=Status.OK if result == "moved" else self.status,
            text=words.text,
            hint=words.hint,
            state_here=f"{self.parts.name} {here}",
            state_there=f"{self.peer.name} {there}",
            verdicts=self._verdicts,
            phases_ms=self.phases(),
            cxtp_messages=self._messages,
            cxtp_octets=self._octets,
            epoch=self.entry.epoch if self.entry is not None else 0,
            address=self.address,
            exit_code=words.exit_code,
        )
