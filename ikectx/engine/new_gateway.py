"""The new gateway's end of a transfer: check, hold or prepare, own, or undo, and answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as changed
from ipaddress import ip_address
from typing import Literal, Protocol

from ikectx.errors import IkectxError, LinkError, RefusedError, StateError
from ikectx.numbers import STATUS_TEXT, Fpt, Status
from ikectx.sa.context import Address, Endpoint, FinalState, IkeContext, Secret
from ikectx.sa.relocate import relocate
from ikectx.sa.verdict import Verdict
from ikectx.wire.cxtp import ContextDataBlock, Ctc, Ctd, Ctdr, Pctd, TokenAlgorithm
from ikectx.wire.profile import (
    TransferHeader,
    decode,
    decode_final,
    encode,
    encode_final,
    encode_verdicts,
)
from ikectx.wire.reasons import encode_reasons, refusals
from ikectx.wire.whereabouts import What, Whereabouts, notice

from .effects import (
    Activate,
    Check,
    GetReady,
    Move,
    NotComing,
    Prepare,
    Prepared,
    Settle,
    StillHere,
    Take,
    Undo,
    Write,
)
from .hints import advice
from .journal import JournalEntry
from .journaled import Parts, Run
from .lines import Line, Question
from .ports import Evidence, MoveReport
from .procedures import Gate, Steps, log
from .tables import (
    TARGET_DURABLE,
    TARGET_OWNS,
    TARGET_SOON,
    TargetAction,
    TargetInput,
    TargetState,
    final_fits,
    first_failure,
    new_target,
)

_RESULTS: Mapping[TargetState, str] = {TargetState.OWNED: "moved", TargetState.ABORTED: "aborted"}
_INSTEAD: Mapping[TargetState, TargetInput] = {
    TargetState.PREPARING: TargetInput.FAILED,
    TargetState.OWNING: TargetInput.MISFIT,
    TargetState.INSTALLING: TargetInput.TIMEOUT,
    TargetState.RECEIVING: TargetInput.FAILED,
}
"""States that are entered only if the journal can be written, because they install or take something."""

_STEPS = {
    TargetAction.CHECK: "check",
    TargetAction.PREPARE: "prepare",
    TargetAction.TAKE: "take",
    TargetAction.MOVE: "move",
    TargetAction.ACTIVATE: "activate",
    TargetAction.UNDO: "undo",
}


def refusal(status: Status, detail: str = "") -> tuple[Verdict, ...]:
    """The verdicts of an answer that refuses the transfer as a whole."""
    return (Verdict(Fpt.IKEV2_SA, status, detail),)


def answer(
    line: Line, mn: Address, verdicts: Sequence[Verdict], blocks: tuple[ContextDataBlock, ...] = ()
) -> int:
    """Send the CTDR, its octets; a link that has gone is the asker's to mend (0). `blocks`: beside a yes.

    IN_DOUBT is sent with S = 1, so that a gateway that does not know this status takes it for no decision.
    """
    statuses = encode_verdicts(verdicts)
    fine = all(each.status is Status.OK for each in statuses)
    complete = fine or any(each.status is Status.IN_DOUBT for each in statuses)
    try:
        return line.send(Ctdr(mn, statuses, complete, blocks if fine else encode_reasons(verdicts)))
    except LinkError as error:
        log.warning("%s was not answered for %s: %s", line.peer.name, mn, error)
        return 0


def doubt(final: FinalState, mn: Address, who: str = "") -> Steps[Evidence]:
    """What there is of an SA of which the journal here tells nothing. Without words this gateway does not
    serve it.

    A gateway that lost its journal (or restored an old one) must not deny an SA that its charon still serves,
    because the other gateway would then serve the SA as well. If charon or the kernel cannot be asked, the SA
    is not denied either. `who`: the mobile node's identity if it is known; others may have its address (NAT).
    """
    try:
        found: Evidence = yield StillHere(final, mn, who)
    except IkectxError as error:
        return Evidence(f"charon or the kernel could not be asked for the SA: {error}")
    return found


Dropped = Literal["", "source", "offer", "time", "us"]
"""Why a prepared transfer was given up: the source cancelled it; the source sent a new offer; the source was
silent too long; this gateway is stopping, or dropped it for another reason of its own."""


class Asker(Protocol):
    """`Request`, as far as a transfer needs the request that it answers. `shown`: see `requests.Sighting`."""

    shown: tuple[bytes, ...]

    def run_ended(self, run: Incoming) -> None:
        """The transfer has ended."""

    def ask_for_the_rest(self, line: Line | None) -> Steps[None]:
        """What was held is prepared: ask for its final state, over this link if it is open."""


class Incoming(Run[TargetState, TargetInput, TargetAction]):
    """One transfer to this gateway.

    `context` has the mobile node's present address. Messages go on naming the transfer by the address that
    the journal has.
    """

    def __init__(
        self,
        parts: Parts,
        entry: JournalEntry,
        context: IkeContext | None,
        header: TransferHeader | None,
        ticket: int = 0,
    ) -> None:
        state = TargetState(entry.state)
        super().__init__(
            parts,
            new_target(parts.now, parts.timing, state),
            entry,
            ticket,
            durable=TARGET_DURABLE,
            soon=TARGET_SOON,
            results=_RESULTS,
            instead=_INSTEAD,
        )
        self.asked_by = f"gateway {entry.peer}" if state is TargetState.NEW else ""
        self.context = context
        self.header = header
        self.mn: Address = ip_address(entry.mn_address)
        self.link: Line | None = None
        """The link over which its last message came."""
        self.token: tuple[TokenAlgorithm, Secret] | None = None
        """The key that the mobile node's arrival is checked with, while the context is held."""
        self.request: Asker | None = None
        """Sends the CT-Req, over this link if it is open."""
        self.answers = False
        """True if the mobile node waits for an answer, which can tell it new SPIs."""
        self.whole = False
        """True if the context and the final state came in one CTD."""
        self.leaving = False
        """True if the mobile node leaves the old gateway at once."""
        self.dropped: Dropped = ""
        """Who or what ended it before anything was taken."""
        self.over = Gate()
        """Open when it has ended."""
        self.messages = 0
        self.octets = 0
        """Octets of the CXTP messages of this transfer, both ways."""
        self._owed = False
        """True if its last message has no answer yet. A second answer would be taken for that of another
        message."""
        if state in (TargetState.UNDOING, TargetState.ABORTED):
            self.blame(
                RefusedError(entry.detail or "aborted", status=entry.status or Status.UNKNOWN_TRANSFER)
            )
        self._report = MoveReport(**entry.moved) if entry.moved else MoveReport()  # type: ignore[arg-type]
        self._verdicts: tuple[Verdict, ...] = ()
        self._prepared = Prepared()
        self._holds = False
        """Are packets for the mobile node held until it arrives?"""
        self._tries = 0

    @classmethod
    def resumed(cls, parts: Parts, entry: JournalEntry) -> Incoming:
        """As the journal has it. Errors: WireError when its context is not one of this version."""
        if entry.context is None:
            return cls(parts, entry, None, None)
        context, header = decode(Pctd.parse(entry.context).blocks)
        run = cls(parts, entry, context, header)
        if entry.final is not None:
            run.last_state, _ = decode_final(Ctd.parse(entry.final).blocks)
        return run

    def must(self, state: TargetState) -> bool:
        """True if this state must be in the journal before we answer: a change of ownership, or the first
        answer about an unknown transfer."""
        ends = (TargetState.OWNED, TargetState.UNDOING, TargetState.ABORTED)
        unheard = self.whole or self.machine.state is TargetState.NEW
        tombstone = unheard and state is TargetState.ABORTED
        return tombstone or (state in ends and self.on_disk in TARGET_OWNS)

    def decided(self) -> Mapping[str, object]:
        return {"exchange": self._report.counts()} if self.machine.state is TargetState.ACTIVATING else {}

    @property
    def keep(self) -> bool:
        """True if the gateway's address moves along, so that the mobile node is not told a new one."""
        return self.header is not None and self.header.address == "keep"

    @property
    def relayed_by(self) -> str:
        """The gateway at whose address the mobile node stays; empty: it is told this gateway's."""
        return self.stored.peer if self.header is not None and self.header.address == "relay" else ""

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The result of its check."""
        return self._verdicts

    # -- the walk ----------------------------------------------------------------------------------------

    def go(self, what: TargetInput | None, link: Line | None = None) -> Steps[None]:
        """Feed `what` and carry out the table's actions, until there is nothing to do but wait."""
        if link is not None:
            self.link, self._owed = link, True
        ended = self.ended
        while what is not None:
            before = self.machine.state
            actions = yield from self.advance(what)
            if self.machine.state is not before:
                self._tries = 0
            what = None
            for action in actions:
                what = yield from self._act(action)
        if self.ended and not self.over.open:
            self.token = None
            if self.context is not None and not ended and self.machine.state is TargetState.ABORTED:
                # whatever was got ready for it, and for the answer to its MN, is forgotten
                try:
                    yield NotComing(self.context)
                except IkectxError as error:
                    log.error("transfer %s: %s", self.stored.transfer_id.hex(), error)
            if self.request is not None:
                self.request.run_ended(self)
            self.parts.scheduler.open(self.over)

    def _act(self, action: TargetAction) -> Steps[TargetInput | None]:
        if action is TargetAction.ANSWER:
            if self._owed and self.link is not None:
                self._owed = False
                self.count(answer(self.link, self.mn, self._said(), self._place()))
            return None
        if action is TargetAction.REQUEST:
            if self.request is not None:
                yield from self.request.ask_for_the_rest(self.link)
            return None
        if action is TargetAction.SEND_CTC:
            self._cancel()
            return None
        try:
            if self.context is None:
                raise StateError("the journal has no context for it")
            yield from _DO[action](self, self.context)
        except IkectxError as error:
            if action is TargetAction.UNDO:
                self._tries += 1
                yield from self.again(self._tries - 1, "undo", error)
            else:
                entry = self.stored
                todo = f"; {error.hint}" if error.hint else ""
                log.warning(
                    "transfer %s of %s, from %s: %s: %s%s",
                    *(entry.transfer_id.hex(), entry.mn, entry.peer, _STEPS[action], error, todo),
                )
                self.blame(error)
            return TargetInput.FAILED
        return TargetInput.OK

    def _said(self) -> tuple[Verdict, ...]:
        if self.machine.state is TargetState.PREPARED:
            told = (
                (Fpt.NEW_SPIS, self._prepared.renames),
                (Fpt.GO_ON, self._prepared.cannot_send),
            )
            return tuple(Verdict(fpt, Status.OK) for fpt, holds in told if holds)
        if self.machine.state is TargetState.HELD and self._holds:
            return (Verdict(Fpt.LEAVING, Status.OK),)
        if self.machine.state is not TargetState.ABORTED:
            return self._verdicts
        if first_failure(self._verdicts) is not Status.OK:
            return self._verdicts
        if self.error is None:
            return refusal(Status.UNKNOWN_TRANSFER)
        # Errors here are for this gateway's log. The other gateway may only know why something is refused.
        return refusal(self.status, str(self.error) if isinstance(self.error, RefusedError) else "")

    def _place(self) -> tuple[ContextDataBlock, ...]:
        """The address here to which the old gateway is to pass on what a relayed mobile node sends."""
        heard_at = self._prepared.heard_at
        if self.machine.state is not TargetState.PREPARED or heard_at is None:
            return ()
        return (ContextDataBlock(Fpt.RELAY, heard_at.packed),)

    def _cancel(self) -> None:
        self.blame(RefusedError("no CTD came in time", status=Status.UNKNOWN_TRANSFER))
        if self.link is not None and self.link.error is None:
            self.count(self.link.send(Ctc(self.mn)))

    def count(self, octets: int) -> None:
        """A message of this transfer was sent or received."""
        self.messages += octets > 0
        self.octets += octets

    def settle(self, endpoint: Endpoint, here: Endpoint | None = None) -> None:
        """Use the mobile node's present address for all that is installed and journaled. Errors: WireError.

        `here`: the address of this gateway that it came to; None: the sink chooses one.
        """
        if self.context is None or self.header is None:
            raise StateError("the journal has no context for it")
        self.context = relocate(self.context, remote=endpoint, local=here)
        blocks = encode(self.context, transfer=self.header)
        self.entry = changed(self.stored, context=Pctd(self.mn, blocks).serialize())

    def take_whole(self, final: FinalState) -> None:
        """Take the final state from a CTD with the whole context. Errors: WireError."""
        self.whole = True
        self.last_state = final
        octets = Ctd(self.mn, encode_final(final, self.stored.transfer_id)).serialize()
        self.entry = changed(self.stored, final=octets, epoch=final.epoch)

    def let_go(self, final: FinalState, octets: bytes, known: int) -> TargetInput:
        """Take the final state from the source's CTD; returns the input. Journaled with the next state."""
        if self.machine.state is not TargetState.PREPARED or self.context is None:
            return TargetInput.CTD
        fits = final_fits(self.context, final, known)
        if fits is not Status.OK:
            self.blame(RefusedError("the CTD does not fit its PCTD", status=fits))
            return TargetInput.MISFIT
        self.last_state = final
        self.entry = changed(self.stored, final=octets, epoch=final.epoch)
        return TargetInput.CTD

    # -- steps -------------------------------------------------------------------------------------------

    @property
    def _last(self) -> FinalState:
        if self.last_state is None:
            raise StateError("the journal has no final state for it")
        return self.last_state

    def _check(self, context: IkeContext) -> Steps[None]:
        try:
            verdicts = tuple((yield from self.step(Check(context, self.keep, self.answers, self.relayed_by))))
        except IkectxError:
            yield from self._not_here(context)
            raise
        status = first_failure(verdicts)
        if status is not Status.OK:
            yield from self._not_here(context)
            self._verdicts = verdicts
            why = refusals(verdicts) or STATUS_TEXT.get(status, "refused")
            raise RefusedError(why, status=status, hint=advice(status, refused_here=True))
        if self.machine.state is TargetState.ANNOUNCED:
            self._holds = yield from self.step(GetReady(context, self.keep, self.leaving))

    def _not_here(self, context: IkeContext) -> Steps[None]:
        """Errors: RefusedError with IN_DOUBT if an SA that the source has let go may have been taken here
        before the journal was lost: what is in use may be this very SA."""
        if self.whole:
            found = yield from doubt(self._last, self.mn, str(context.remote_id))
            if found.words:
                raise RefusedError(found.words, status=Status.IN_DOUBT)

    def _prepare(self, context: IkeContext) -> Steps[None]:
        served = self.machine.state is TargetState.PREPARING
        shown = () if self.request is None else self.request.shown
        wanted = Prepare(context, self.keep, self.answers, self.relayed_by, served, shown)
        self._prepared = yield from self.step(wanted)
        # a mobile node that waits for no answer decrypts nothing from here before it has moved by IKE
        if self.whole and self.answers and not self._prepared.cannot_send:
            self._say_ready(context)

    def _say_ready(self, context: IkeContext) -> None:
        """The old gateway may send packets for the mobile node on to here, before the CTDR, which says so as
        well: therefore the notice is not repeated."""
        if self.link is not None and self.link.error is None:
            message, _ = notice([Whereabouts(context.spis, self._last.epoch, What.READY)])
            self.link.ask(message, Question(None))

    def _take(self, context: IkeContext) -> Steps[None]:
        yield from self.step(Take(context, self._last, self.stored.peer))

    def _move(self, context: IkeContext) -> Steps[None]:
        if self._last.unsure:
            yield from self._settle(context)
        always = self.header is None or self.header.address == "update"
        try:
            report: MoveReport | None = yield from self.step(Move(context, self._last, always))
        except LinkError as error:
            raise LinkError(str(error), hint=error.hint, status=Status.PEER_SILENT) from None
        except RefusedError as error:
            raise RefusedError(str(error), hint=error.hint, status=Status.PEER_REFUSED) from None
        if report is not None:
            self._report = report
            moved = {name: int(value) for name, value in report.counts().items()}
            self.entry = changed(self.stored, moved=moved)

    def _settle(self, context: IkeContext) -> Steps[None]:
        """Ask the mobile node for its next message ID and journal the answer, because it would change
        later."""
        try:
            final: FinalState = yield from self.step(Settle(context, self._last))
        except LinkError as error:
            raise LinkError(str(error), hint=error.hint, status=Status.PEER_SILENT) from None
        octets = Ctd(self.mn, encode_final(final, self.stored.transfer_id)).serialize()
        entry = changed(self.stored, final=octets)
        yield Write(entry, durable=self.parts.config.policy.durable)
        self.last_state, self.entry = final, entry

    @property
    def next_request(self) -> int | None:
        """Message ID of the MN's request that this gateway expects next, once it serves the SA."""
        if self.machine.state is not TargetState.OWNED or self.last_state is None:
            return None
        return self.last_state.mid_responder + self._report.answered

    def _activate(self, context: IkeContext) -> Steps[None]:
        yield from self.step(Activate(context, self._last, self._report))

    def _undo(self, context: IkeContext) -> Steps[None]:
        yield from self.step(Undo(context))


_DO: Mapping[TargetAction, Callable[[Incoming, IkeContext], Steps[None]]] = {
    TargetAction.CHECK: Incoming._check,
    TargetAction.PREPARE: Incoming._prepare,
    TargetAction.TAKE: Incoming._take,
    TargetAction.MOVE: Incoming._move,
    TargetAction.ACTIVATE: Incoming._activate,
    TargetAction.UNDO: Incoming._undo,
}
