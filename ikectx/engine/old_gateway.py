"""The old gateway's end of a transfer: export, offer, let go, and what follows from the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace as changed

from ikectx.errors import (
    BusyError,
    IkectxError,
    LinkError,
    RefusedError,
    StateError,
    UnknownSaError,
    WireError,
)
from ikectx.numbers import UNTOUCHED, Fpt, Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import FinalState, IkeContext, Secret
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from ikectx.wire.cxtp import Ctc, Ctd, Ctdr, Pctd, TokenAlgorithm, size
from ikectx.wire.full_ctd import decode_last, encode_whole
from ikectx.wire.profile import Intent, TransferHeader, decode, encode_final

from .effects import Choose, Divert, Epochs, Export, FindEpochs, Freeze, Release, Stay, Thaw
from .hints import advice
from .journal import JournalEntry
from .journaled import Parts, Run
from .lines import Line, Question, Reply
from .occasion import Occasion, Overrun, check_expected, check_sent, signalled
from .offer_answer import offer_status, refusal_text
from .ports import RelayTo, Way, told
from .procedures import Do, Gate, Steps, Timer, Turn, log
from .relaying import Offers, new_entry, onward, relayed_words
from .report import SOURCE_STANDS, TransferReport, mn_label, source_phases, source_words
from .signals import Signals
from .tables import (
    OSEQ_JUMP,
    SOURCE_DURABLE,
    SOURCE_SOON,
    SourceAction,
    SourceInput,
    SourceState,
    new_source,
)

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
_SERVED = frozenset({SourceState.KEPT, SourceState.REFUSED})
"""Ends in which this gateway serves the SA."""
_PREPARED_THERE = frozenset({SourceState.OFFERED, SourceState.ANNOUNCED, SourceState.AWAITING})
"""States in which this gateway serves the SA and the other one may have it prepared."""


class Outgoing(Run[SourceState, SourceInput, SourceAction]):
    """One attempt to move one IKE_SA to one peer. `go` walks it to its end, also after it was reported.

    `token`: algorithm and key by which the peer can check the mobile node's arrival. `mid`: message ID of the
    request that the mobile node is known to send next. `expects`: if the mobile node is away, the ID of the
    next request that it expects, None: not known.
    """

    reports = True

    def __init__(
        self,
        parts: Parts,
        peer: PeerConfig,
        *,
        sa: SaName,
        transfer_id: bytes,
        occasion: Occasion,
        ticket: int = 0,
        entry: JournalEntry | None = None,
    ) -> None:
        state = SourceState.NEW if entry is None else SourceState(entry.state)
        machine = new_source(parts.now, parts.timing, state)
        super().__init__(
            *(parts, machine, entry, ticket),
            durable=SOURCE_DURABLE,
            soon=SOURCE_SOON,
            results=_RESULTS,
            instead=_INSTEAD,
        )
        self.asked_by = occasion.asked_by
        self.peer = peer
        self.sa = sa
        self.transfer_id = transfer_id
        self.address = occasion.address
        self.way = Way(told(occasion.address))
        """How its mobile node gets to the peer, as it was chosen by `export`."""
        self.signals = Signals(machine)
        self.settled = Gate()
        """Open when there is an `outcome` to report: at the end, or earlier as "in-doubt"."""
        self.outcome: TransferReport | IkectxError | None = None
        self.over = Gate()
        """Open when nothing goes on any more."""
        self.awaited = Gate()
        """Open when the peer holds it and the MN may go, or when it has ended."""
        self.link = occasion.link
        """The connection that its messages use."""
        self.sequence = occasion.sequence
        self.mid: int | None = None
        self.away = occasion.away
        self.expects: int | None = None
        self.asked_for: frozenset[Fpt] = frozenset()
        """Wishes of the peer beside yes: NEW_SPIS, CHILD_SAs get other SPIs; GO_ON, it cannot send yet."""
        self._onward: RelayTo | None = None
        self.decided_by = "operator"
        """Who reclaimed it, or gave it up."""
        self.told = False
        """True if the peer knows that the transfer ended, and why."""
        self.token: tuple[TokenAlgorithm, Secret] | None = None
        self.leaving = False
        """True if the mobile node said that it leaves at once."""
        self._diverted = False
        """True if packets for it may be sent on to the peer, which holds them."""
        self._begins, self._offers = occasion.begins, Offers()
        self._offered = entry is not None
        """Has the peer been told of it, as far as we know?"""
        self.copied = False
        """True if it is from a journal that is an old copy: another gateway than the peer may have the SA."""
        self._asked: Question | None = None
        self._ctd: Ctd | None = None
        """The CTD that lets go; None: it is in the journal, if at all."""
        self._verdicts: tuple[Verdict, ...] = ()
        self._messages = 0
        self._octets = 0
        self._connect_ms = 0.0
        self._tries = 0
        self._trouble: IkectxError | None = None
        self._doubts: Timer | None = None
        self._sent: float | None = None
        """When the first message of this transfer was sent, also by an agent before this one."""

    @classmethod
    def resumed(cls, parts: Parts, peer: PeerConfig, entry: JournalEntry) -> Outgoing:
        """As the journal has it. Errors: WireError when its context is not one of this version."""
        if entry.context is None:
            raise WireError("the journal has no context for it")
        context, header = decode(Pctd.parse(entry.context).blocks)
        begins = SourceInput.ANNOUNCE if header.intent == "hold" else SourceInput.OK
        if entry.final is not None and isinstance(decode_last(Ctd.parse(entry.final).blocks)[0], IkeContext):
            begins = SourceInput.REQUESTED
        run = cls(
            parts,
            peer,
            sa=entry.sa,
            transfer_id=entry.transfer_id,
            occasion=Occasion(header.address, begins),
            entry=entry,
        )
        run.context = context
        run._sent = parts.now - max(0.0, parts.scheduler.unix - entry.started)
        return run

    @property
    def held(self) -> bool:
        """True if the peer holds the context, and waits for the mobile node."""
        answered, state = self._asked is not None and self._asked.reply is not None, self.machine.state
        return state is SourceState.AWAITING or (state is SourceState.ANNOUNCED and answered)

    @property
    def turn(self) -> tuple[str, str, object]:
        """The turn it needs: one transfer for each MN and peer at a time (RFC 4067 names them by no more)."""
        return ("transfer", self.peer.name, self._of.remote.address)

    # -- the walk ----------------------------------------------------------------------------------------

    def export(self) -> Steps[None]:
        """Ask the source for the context. Errors: UnknownSaError; any other error is kept for `begin`."""
        try:
            context: IkeContext = yield Do(Export(self.sa, self.away), self.transfer_id)
            epochs: Epochs = yield FindEpochs(self.sa)
            self.context = changed(self.peer.may_get(context), epoch=max(context.epoch, epochs.known))
            self.error = None
            if self._begins is SourceInput.OK:
                self.way = yield Do(Choose(self.context, self.peer.name, self.address), self.transfer_id)
                self.address = self.way.address
        except UnknownSaError:
            raise
        except IkectxError as error:
            self.context = None
            self.error = error

    def begin(self) -> Steps[None]:
        """Go on from the export to the end."""
        if self.context is not None:
            try:
                self.entry = self._new_entry(self.context)
            except WireError as error:
                self.blame(error)
        if self.error is None:
            yield from self.go(self._begins)
        else:
            busy = isinstance(self.error, BusyError)
            yield from self.go(SourceInput.BUSY if busy else SourceInput.FAILED)

    @property
    def _header(self) -> TransferHeader:
        intent: Intent = "hold" if self._begins is SourceInput.ANNOUNCE else "prepare"
        return TransferHeader(self.transfer_id, intent, self.way.address)

    def _new_entry(self, context: IkeContext) -> JournalEntry:
        # with the mobile node's own endpoint, which this gateway knows the SA by
        offer = self._offers.make(context, Way(self.way.address), self._header, self.leaving)
        now = self.parts.scheduler.unix
        return new_entry(context, offer, self.transfer_id, self.peer.name, self.sa, now)

    def go(self, what: SourceInput | None) -> Steps[None]:
        """Feed `what`, do what the table says, feed what comes of it, until the end."""
        with self.parts.scheduler.using(self.peer.name):
            while what is not None:
                before = self.machine.state
                actions = yield from self.advance(what)
                if self.machine.state != before:
                    self._tries = 0
                what = None
                for action in actions:
                    what = yield from _DO[action](self)
                if what is None and self.machine.state is SourceState.AWAITING:
                    what = yield from self._await()
        if self._doubts is not None:
            self._doubts.cancel()
        if self.machine.state in _SERVED:
            try:
                yield Stay(self.sa)
            except IkectxError as error:
                log.error("gateways that it came from are not told that an SA stays here: %s", error)
        self._settle()

    def _await(self) -> Steps[SourceInput]:
        """The MN: it goes when it likes, and until then others may have their turn."""
        scheduler = self.parts.scheduler
        scheduler.open(self.awaited)
        scheduler.leave(self.turn)
        signal = yield from self._signal(self.machine.next_timer() or 0.0)
        # without it, too, after a while: what another transfer has under way then is undone at the peer
        yield Turn(self.turn, self.parts.now + self.parts.timing.offer)
        if signal is not None:
            return signal
        late = f"the MN did not arrive at {self.peer.name} in time"
        self.blame(LinkError(late, hint="this gateway goes on serving it"))
        return SourceInput.TIMEOUT

    def _settle(self) -> None:
        """Report: at the end, and before it when the caller should not wait any longer."""
        scheduler = self.parts.scheduler
        scheduler.open(self.awaited)
        if self.context is not None:  # else it has had no turn
            scheduler.leave(self.turn, self.signals.process)  # one in doubt may be so for ever
        report = self.report()
        self.tell(report)
        self.settle(report)

    def settle(self, outcome: TransferReport | IkectxError) -> None:
        """The first outcome stays."""
        if self.outcome is None:
            self.outcome = outcome
            self.parts.scheduler.open(self.settled)

    # -- messages ----------------------------------------------------------------------------------------

    def _connect(self) -> Steps[Line]:
        began = self.parts.now
        self.link = yield from self.parts.lines.get(self.peer)
        self._connect_ms += (self.parts.now - began) * 1000
        return self.link

    def count(self, octets: int) -> None:
        """One more message that belongs to the transfer, such as the CT-Req by which it was asked for."""
        self._messages += 1
        self._octets += octets

    def _elapsed(self) -> int:
        """The field of PCTD and CTD: milliseconds since the first message of this transfer."""
        now = self.parts.now
        if self._sent is None:
            self._sent = now
        return min(0xFFFFFFFF, round((now - self._sent) * 1000))

    def offer(self, intent: Intent) -> Pctd:
        """The PCTD, with the endpoint at which the peer finds the mobile node."""
        return self._offers.make(self._of, self.way, changed(self._header, intent=intent), self.leaving)

    def _send_pctd(self) -> Steps[SourceInput]:
        try:
            link = yield from self._connect()
            offer = changed(self.offer(self._header.intent), elapsed=self._elapsed())
            if self.token is not None:
                offer = changed(offer, algorithm=self.token[0], key=self.token[1].reveal())
            self._offered = True
            octets, self._asked = link.ask(offer)
        except LinkError as error:
            self.blame(error)
            return SourceInput.LINK_LOST
        self.count(octets)
        return (yield from self._answer(self._asked))

    def _send_ctd(self) -> Steps[SourceInput]:
        if self._doubts is None:
            until = self.parts.now + self.parts.timing.in_doubt
            self._doubts = self.parts.scheduler.call_at(until, self._doubt)
        try:
            if self.link is None or self.link.error is not None:
                raise self.link.error if self.link and self.link.error else LinkError("not connected")
            ctd = self._ctd or Ctd.parse(self.stored.final or b"")
            letting_go = changed(ctd, elapsed=self._elapsed())
            # no answer in time: asked once more on the same link
            again = self._asked if self._asked is not None and self._asked.reply is None else None
            octets, self._asked = self.link.ask(letting_go, again)
        except LinkError as error:
            self._lost(error)
            return SourceInput.LINK_LOST
        self.count(octets)
        return (yield from self._answer(self._asked))

    def _doubt(self) -> None:
        if self.machine.state is SourceState.RELEASED:
            self.blame(LinkError(f"{self.peer.name} has not confirmed in {self.parts.timing.in_doubt:g} s"))
            self._settle()

    def _lost(self, error: LinkError) -> None:
        self.parts.scheduler.leave(self.turn, self.signals.process)
        log.warning("transfer %s: let go, but not confirmed yet: %s", self.transfer_id.hex(), error)

    def _reconnect(self) -> Steps[SourceInput]:
        """Wait, longer each time, then dial again."""
        wait = self.parts.timing.wait(self._tries)
        self._tries += 1
        signal = yield from self._signal(self.parts.now + wait)
        if signal is not None:
            return signal
        try:
            yield from self._connect()
        except LinkError as error:
            self._lost(error)
            return SourceInput.LINK_LOST
        return self.pending() or SourceInput.LINK_UP  # if the operator has decided, the CTD is not sent again

    def _send_ctc(self) -> Steps[None]:
        """So that the peer need not wait for its own timer; not more than a courtesy."""
        if self.context is None or self._begins is SourceInput.REQUESTED:
            return
        try:
            link = self.link
            if link is None:
                link = yield from self._connect()  # after a restart
            self.count(link.send(Ctc(self.context.remote.address)))
        except LinkError as error:
            log.info("transfer %s: %s was not told: %s", self.transfer_id.hex(), self.peer.name, error)

    def _signal(self, until: float | None, asked: Question | None = None) -> Steps[SourceInput | None]:
        """The next signal, as `Signals.wait`, which is then why the transfer ends."""
        return self._heeded((yield from self.signals.wait(until, asked)))

    def pending(self) -> SourceInput | None:
        """The same of one that came meanwhile."""
        return self._heeded(self.signals.pending())

    def _heeded(self, signal: SourceInput | None) -> SourceInput | None:
        reason = None if signal is None else signalled(signal, self.peer.name, self.decided_by)
        if reason is not None:
            self.error, self.told = reason, signal is SourceInput.CTC
        return signal

    def _answer(self, asked: Question) -> Steps[SourceInput]:
        """What comes first: the CTDR, the end of the link, a signal, the machine's timer."""
        signal = yield from self._signal(self.machine.next_timer(), asked)
        if asked.reply is not None:
            return self._judge(asked.reply)
        if signal is not None:
            return signal
        offered = self.machine.state in (SourceState.OFFERED, SourceState.ANNOUNCED)
        waited = "offer" if offered else "confirmation"
        log.warning("transfer %s: no answer to the %s", self.transfer_id.hex(), waited)
        if offered:
            self.blame(LinkError(f"{self.peer.name} did not answer in time", hint="see its log"))
        return SourceInput.TIMEOUT

    def _judge(self, reply: Reply) -> SourceInput:
        if isinstance(reply, LinkError):
            if self.machine.state is SourceState.RELEASED:
                self._lost(reply)
            else:
                self.blame(reply)
            return SourceInput.LINK_LOST
        self.count(size(reply))
        status, self._verdicts = offer_status(reply)
        if status is Status.OK:
            self.asked_for = frozenset(verdict.fpt for verdict in self._verdicts)
            offered = self.machine.state is SourceState.OFFERED
            return self._passes_on(reply) if offered else SourceInput.ACCEPTED
        if status is Status.MALFORMED and self.machine.state is SourceState.RELEASED and reply.complete:
            # neither yes nor no: whoever may own it now, it is not for us to guess
            log.error("transfer %s: an answer that contradicts itself", self.transfer_id.hex())
            return SourceInput.LINK_LOST
        text = f"{self.peer.name}: {refusal_text(status, self._verdicts)}"
        if self.copied:
            text += "; the store here is an old copy, so another gateway may have the SA since"
        if self.machine.state is SourceState.RELEASED and (status is Status.IN_DOUBT or self.copied):
            log.error("transfer %s is in doubt, %s", self.transfer_id.hex(), text)
            self.error = LinkError(text, status=status, hint=advice(status))
            if self.outcome is None:
                self._settle()  # the operator decides, and need not wait for a time limit
            return SourceInput.DOUBTED
        self.error = RefusedError(text, status=status, hint=advice(status))
        self.told = True
        return SourceInput.REJECTED

    def _passes_on(self, reply: Ctdr) -> SourceInput:
        """Where the peer wants to be passed what the mobile node sends, if it stays here."""
        try:
            self._onward = onward(self.way, reply, self.asked_for, self.peer.name)
        except RefusedError as error:
            self.blame(error)
            return SourceInput.CANCEL
        return SourceInput.ACCEPTED

    # -- steps -------------------------------------------------------------------------------------------

    @property
    def _of(self) -> IkeContext:
        if self.context is None:
            raise StateError("a transfer without context takes no steps")
        return self.context

    def _freeze(self) -> Steps[SourceInput]:
        context, entry = self._of, self.stored
        self._asked = None  # what is still to come for the PCTD is no answer to the CTD
        try:
            final: FinalState = yield from self.step(
                Freeze(
                    context,
                    self.peer.name,
                    away=self.away,
                    sending=Fpt.GO_ON in self.asked_for,
                    renaming=Fpt.NEW_SPIS in self.asked_for,
                    unannounced=self._begins is SourceInput.REQUESTED,
                    relay=self._onward,
                    held=self._begins is SourceInput.ANNOUNCE,
                )
            )
            final = changed(final, epoch=context.epoch + 1)
            if final.unsure and self.expects is not None:
                check_expected(final, self.expects)
                final = changed(final, mid_initiator=self.expects, unsure=False)
            if self.mid is not None and final.mid_responder != self.mid:
                raise Overrun("the MN sent another request meanwhile")
            self._ctd = self._encode(context, final)
            self.last_state = final
        except Overrun as error:
            self.blame(error)
            return SourceInput.FAILED  # it is frozen, and must be thawed before the next try
        except BusyError as error:
            self.blame(error)
            return SourceInput.BUSY
        except IkectxError as error:
            self.blame(error)
            return SourceInput.FAILED
        if (signal := self.pending()) is not None:
            return signal
        if self.link is None or self.link.error is not None:
            self.blame((self.link and self.link.error) or LinkError("the connection is gone"))
            return SourceInput.LINK_LOST
        self.entry = changed(entry, final=self._ctd.serialize(), epoch=final.epoch)
        return SourceInput.OK

    def _encode(self, context: IkeContext, final: FinalState) -> Ctd:
        """The CTD. Errors: `Overrun`."""
        if self._begins is SourceInput.REQUESTED:
            blocks = encode_whole(context, final, transfer=self._header)
        else:
            check_sent(context, final, self.parts.config.policy.oseq_jump)
            blocks = encode_final(final, self.transfer_id)
        return Ctd(context.remote.address, blocks)

    def _divert(self) -> Steps[None]:
        if not (self.leaving and Fpt.LEAVING in self.asked_for):
            return
        self._diverted = True
        try:
            yield from self.step(Divert(self._of, self.peer.name))
        except IkectxError as error:
            ident = self.transfer_id.hex()
            log.warning("transfer %s: packets for the MN are not sent on while it moves: %s", ident, error)

    def _release(self) -> Steps[SourceInput]:
        try:
            yield from self.step(Release(self._of))
        except IkectxError as error:
            return (yield from self._failed("release", error))
        self._trouble = None
        return SourceInput.OK

    def _thaw(self) -> Steps[SourceInput]:
        entry = self.stored
        # the peer may have sent under its own jump, even before it took the SA: packets for the MN may have
        # found their way there since the freeze. Go past all of that.
        jump = 2 * OSEQ_JUMP
        try:
            yield from self.step(Thaw(self._of, jump, untouched=self.told and self.status in UNTOUCHED))
        except UnknownSaError as error:
            self.error = error
            return SourceInput.GONE
        except IkectxError as error:
            return (yield from self._failed("thaw", error))
        self._trouble = None
        if entry.final is not None:
            self.entry = changed(entry, epoch=self._of.epoch + 2)
        return SourceInput.OK

    @property
    def _may_have_sent(self) -> bool:
        """Whether the peer, which was to prepare the SA, may have sent packets under its keys."""
        untouched = self.told and self.status in UNTOUCHED and not self._diverted
        return self._offered and self.context is not None and not untouched

    def ready_for(self, what: SourceInput) -> Steps[None]:
        """Before it serves on: go past what the peer may have sent since it had prepared the SA, because a
        packet for the MN may have found its way there. The numbers that it used are not used again."""
        after = self.machine.peek(what)
        if not (self._may_have_sent and self.machine.state in _PREPARED_THERE and after in _SERVED):
            return
        while True:
            try:
                yield from self.step(Thaw(self._of, 2 * OSEQ_JUMP))
            except UnknownSaError:
                return  # it has ended meanwhile
            except IkectxError as error:
                yield from self._failed("thaw", error)
            else:
                return

    def _failed(self, what: str, error: IkectxError) -> Steps[SourceInput]:
        """A step without alternative: report in time, and go on trying."""
        self._tries += 1
        if self._tries == self.parts.timing.retries:
            self._trouble = error
            self._settle()
        yield from self.again(self._tries - 1, what, error)
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
            text=words.text + relayed_words(result, self.way, context, self.parts.name),
            hint=words.hint,
            state_here=f"{self.parts.name} {here}",
            state_there=f"{self.peer.name} {there}",
            verdicts=self._verdicts,
            phases_ms=self.phases(),
            cxtp_messages=self._messages,
            cxtp_octets=self._octets,
            epoch=self.entry.epoch if self.entry is not None else 0,
            address=self.address,
            why=self.way.why,
            exit_code=words.exit_code,
        )


_DO: Mapping[SourceAction, Callable[[Outgoing], Steps[SourceInput | None]]] = {
    SourceAction.SEND_PCTD: Outgoing._send_pctd,
    SourceAction.SEND_CTD: Outgoing._send_ctd,
    SourceAction.SEND_CTC: Outgoing._send_ctc,
    SourceAction.RECONNECT: Outgoing._reconnect,
    SourceAction.FREEZE: Outgoing._freeze,
    SourceAction.RELEASE: Outgoing._release,
    SourceAction.THAW: Outgoing._thaw,
    SourceAction.DIVERT: Outgoing._divert,
}
