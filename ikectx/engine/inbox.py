"""New gateway: one inbox for each old gateway and mobile node. Messages of an inbox are handled in order.

So answers leave in the order of what they answer, and no two transfers of one mobile node run at once (RFC
4067). A peer has only so many transfers open here; how many of its messages may be unhandled is the driver's
to bound (`outputs.Handled`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed

from ikectx.errors import IkectxError, LinkError, RefusedError, StoreError, WireError
from ikectx.mistakes import log_mistake
from ikectx.numbers import STATUS_TEXT, Fpt, Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import Address, FinalState, IkeContext, Secret
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import Ctc, Ctd, Pctd, TokenAlgorithm, size
from ikectx.wire.full_ctd import decode_last, final_of
from ikectx.wire.profile import TransferHeader, decode
from ikectx.wire.reasons import refusals

from .effects import Check, Epochs, FindEpochs, FindTransfer, NotComing, OwnedFrom
from .hints import advice
from .journal import JournalEntry
from .journaled import ENDS_LATE, Parts
from .lines import Line
from .new_gateway import Dropped, Incoming, answer, doubt, refusal
from .procedures import Event, Process, Steps, log
from .report import mn_label
from .requests import Request, Requests
from .tables import TARGET_OWNS, TargetInput, TargetState, first_failure, offer_fits
from .unknown_transfers import LOST, UnknownTransfers

_AHEAD = (TargetState.NEW, TargetState.ANNOUNCED, TargetState.HELD)
"""States in which the context came ahead of the mobile node: it is held, or will be after its check."""
_DROPPABLE = (TargetState.HELD, TargetState.PREPARED)

OPEN = 256
"""Transfers that one peer may have open here at a time, and"""
OPEN_OCTETS = 4 * 1024 * 1024
"""octets that it may have offered in them: some 8,000 for each IKE_SA, and ten times that in memory."""


@dataclass(frozen=True, slots=True)
class Mail:
    """A message of the peer, and the line that it came over."""

    line: Line
    message: Pctd | Ctd | Ctc


@dataclass(frozen=True, slots=True)
class Drop:
    """What is held or prepared and not owned is not wanted any more, and why. `run`: only that."""

    why: str
    run: Incoming | None = None


Item = Mail | Drop | Request | JournalEntry
"""What an inbox handles; a `Request`: the MN of the transfer that it has is here now."""


class Inbox:
    """All messages of one peer about one mobile node, handled in order. Ends when nothing is left to do."""

    def __init__(self, inboxes: Inboxes, peer: PeerConfig, mn: Address, unknown: UnknownTransfers) -> None:
        self.peer = peer
        self.runs: dict[bytes, Incoming] = {}
        """Open transfers by their transfer ID."""
        self.items: deque[object] = deque()
        """Messages, arrivals, open transfers of the journal, and what is not wanted any more."""
        self.process: Process | None = None
        self._inboxes = inboxes
        self._parts = inboxes.parts
        self._mn = mn
        self._unknown = unknown
        self._admitting: SaName | None = None
        """The SA of an offer that is being admitted, and has no run yet."""

    def post(self, item: Item) -> None:
        """Handle it when what came before is handled."""
        if self.process is not None:
            self.process.post(item)
        else:
            self.items.append(item)

    def drop(self, why: str, run: Incoming) -> None:
        """That transfer, if it is held or prepared here and not owned, is not wanted any more."""
        self.post(Drop(why, run))

    def holds(self, sa: SaName) -> bool:
        """True if a transfer of that SA is open here."""
        return sa == self._admitting or sa in [run.stored.sa for run in self.runs.values()]

    def work(self) -> Steps[None]:
        """Handle items until the queue is empty and no transfer is open."""
        with self._parts.scheduler.using(self.peer.name):
            while self.runs or self.items:
                item = yield Event(self._due())
                if item is None:
                    yield from self._timers()
                    continue
                try:
                    yield from self._handle(item)
                except (StoreError, WireError) as error:
                    # no answer: what the journal does not tell cannot be told
                    log.error("a message of %s for %s: %s", self.peer.name, self._mn, error)
                    _unanswered(item)
                except Exception as error:
                    log_mistake(log, f"a message of {self.peer.name} for {self._mn}", error)
                    _unanswered(item)
                if isinstance(item, Mail):
                    item.line.handled()
                self._admitting = None
                self._forget()

    def _forget(self) -> None:
        self.runs = {ident: run for ident, run in self.runs.items() if not run.ended}

    def _due(self) -> float | None:
        due = [at for run in self.runs.values() if (at := run.machine.next_timer()) is not None]
        return min(due) if due else None

    def _timers(self) -> Steps[None]:
        for run in list(self.runs.values()):
            due = run.machine.next_timer()
            if due is not None and due <= self._parts.now:
                run.dropped = "time"
                yield from run.go(TargetInput.TIMEOUT)
        self._forget()

    def _handle(self, item: object) -> Steps[None]:
        match item:
            case Mail(line, Pctd() as message):
                yield from self._offered(line, message)
            case Mail(line, Ctd() as message):
                yield from self._last(line, message)
            case Mail():
                yield from self._drop("the source cancelled it", by="source")
            case Drop(why, only):
                yield from self._drop(why, lambda run: only in (None, run))
            case JournalEntry():
                yield from self._resume(item)
            case Request():
                yield from self._arrived(item)

    def _resume(self, entry: JournalEntry) -> Steps[None]:
        run = self.runs[entry.transfer_id] = Incoming.resumed(self._parts, entry)
        if self._parts.config.journal == "old" and run.context is not None:
            found = yield from doubt(final_of(run.context), run.mn, entry.mn)
            if found.serves:
                yield from run.forget(TargetState.OWNED, f"the store is an older copy, but {found.words}")
                return
            run.blame(RefusedError(found.words or LOST, status=Status.IN_DOUBT))
            if not found.words and run.machine.state in TARGET_OWNS:
                yield from run.forget(TargetState.ABORTED, LOST)
                return
        if run.machine.state is TargetState.ADMITTING and run.last_state is not None:
            # it was not known whether the SA had been taken before a journal was lost
            found = yield from doubt(run.last_state, run.mn, entry.mn)
            if found.words:
                run.blame(RefusedError(found.words, status=Status.IN_DOUBT))
        if run.machine.state not in TARGET_OWNS:
            run.blame(RefusedError("the agent was restarted", status=Status.UNKNOWN_TRANSFER))
        if (yield from run.superseded()):
            # what could be moved on from here was served here, although the journal does not say so yet
            owned = run.machine.state in TARGET_OWNS
            yield from run.forget(TargetState.OWNED if owned else TargetState.ABORTED)
        else:
            yield from run.go(TargetInput.RESTART)

    def _drop(
        self, why: str, which: Callable[[Incoming], bool] = lambda run: True, by: Dropped = "us"
    ) -> Steps[None]:
        """Undo the transfers that are held or prepared and not owned."""
        for run in list(self.runs.values()):
            if run.machine.state in _DROPPABLE and which(run):
                run.dropped = by
                run.blame(RefusedError(why, status=Status.UNKNOWN_TRANSFER))
                yield from run.go(TargetInput.CTC)

    def _arrived(self, request: Request) -> Steps[None]:
        run = request.run
        if run is None or run.machine.state not in _DROPPABLE:
            return
        if run.machine.state is TargetState.HELD and request.endpoint is not None:
            run.settle(request.endpoint)
            run.token = None
        yield from run.go(TargetInput.ARRIVED)

    # -- PCTD --------------------------------------------------------------------------------------------

    def _offered(self, line: Line, message: Pctd) -> Steps[None]:
        try:
            context, header = decode(message.blocks)
            if context.remote.address != message.mn and header.address != "relay":
                raise WireError(f"the PCTD is for {message.mn}, its context for {context.remote.address}")
        except WireError as error:
            log.warning("%s offered what does not parse: %s", line.label, error)
            answer(line, message.mn, refusal(Status.MALFORMED))
            return
        if header.transfer_id in self._unknown.denied and header.intent != "check":
            self._unknown.deny(line, message.mn, header.transfer_id)
            return
        known = yield from self._known(header.transfer_id)
        if known is not None and header.intent != "check":
            held = known.header is not None and known.header.intent == "hold"
            yield from self._again(known, TargetInput.ANNOUNCE if held else TargetInput.PCTD, line, message)
            return
        epochs: Epochs = yield FindEpochs(context.spis)
        requests = self._inboxes.requests
        wanted = None if header.intent == "hold" else requests.wanted(self.peer, message.mn, context, header)
        status, why = self._admits(context, wanted is not None, epochs)
        if status is Status.OK and wanted is None and header.intent != "check":
            full = self._inboxes.full(self.peer, sum(8 + len(block.data) for block in message.blocks))
            status, why = (Status.BUSY, full) if full else (status, why)
        if status is not Status.OK:
            todo = advice(status, refused_here=True)
            log.warning("%s offered %s, which is refused: %s; %s", line.label, mn_label(context), why, todo)
            answer(line, message.mn, refusal(status, why))
            if wanted is not None:
                wanted.refused_here(refusal(status, why))
        elif header.intent == "check":
            yield from self._only_check(line, message, context, header, wanted)
        else:
            self._admitting = context.spis
            yield from self._make_way(context)
            # the key is for the MN's arrival, and for no disk
            entry = self._entry(changed(message, algorithm=TokenAlgorithm.NONE, key=b""), context, header)
            run = Incoming(self._parts, entry, context, header, 0 if wanted is None else wanted.ticket)
            if header.intent == "hold":
                run.token = (message.algorithm, Secret(message.key))
                run.answers = message.algorithm is TokenAlgorithm.HMAC_SHA256_128
                run.leaving = any(block.fpt == Fpt.LEAVING for block in message.blocks)
            yield from self._begin(run, line, message, wanted)

    def _begin(self, run: Incoming, line: Line, message: Pctd | Ctd, wanted: Request | None) -> Steps[None]:
        self.runs[run.stored.transfer_id] = run
        run.count(size(message))
        if wanted is not None:
            wanted.begun(self, run)
        if isinstance(message, Ctd):
            yield from run.go(TargetInput.WHOLE, line)
        else:
            held = run.header is not None and run.header.intent == "hold"
            yield from run.go(TargetInput.ANNOUNCE if held else TargetInput.PCTD, line)

    def _make_way(self, context: IkeContext) -> Steps[None]:
        """For an offer: what is here of the same SA goes. One of another SA may have been let go already."""
        yield from self._drop(
            "the source offered it anew", lambda run: run.stored.sa == context.spis, "offer"
        )

    def _known(self, transfer_id: bytes) -> Steps[Incoming | None]:
        """The transfer of that id, open or in the journal. Errors: StoreError, WireError."""
        run = self.runs.get(transfer_id)
        if run is not None:
            return run
        entry: JournalEntry | None = yield FindTransfer("target", transfer_id)
        return None if entry is None else Incoming.resumed(self._parts, entry)

    def _admits(self, context: IkeContext, wanted: bool, epochs: Epochs) -> tuple[Status, str]:
        """Whether this peer may bring this SA, as far as the configuration tells; with the reason in
        words."""
        if self._inboxes.stopping:
            return Status.BUSY, "the agent here stops"
        if not wanted and "push" not in self.peer.rights:
            return Status.NOT_ALLOWED, f"{self.peer.name} has not the right push here"
        why = self.peer.may_not_bring(context)
        if why:
            return Status.NOT_ALLOWED, why
        if self._inboxes.busy(self, context.spis):
            status = Status.BUSY
        else:
            status = offer_fits(context, epochs.known, epochs.owned)
        return status, STATUS_TEXT.get(status, status.name)

    def _only_check(
        self,
        line: Line,
        message: Pctd,
        context: IkeContext,
        header: TransferHeader,
        wanted: Request | None,
    ) -> Steps[None]:
        try:
            verdicts = tuple(
                (
                    yield Check(
                        context,
                        header.address == "keep",
                        relayed_by=self.peer.name if header.address == "relay" else "",
                    )
                )
            )
        except IkectxError as error:
            log.warning("check for %s: %s", line.label, error)
            verdicts = refusal(error.status, str(error))
        if why := refusals(verdicts):
            todo = advice(first_failure(verdicts), refused_here=True)
            log.info("%s could not bring %s here: %s; %s", line.label, mn_label(context), why, todo)
        answer(line, message.mn, verdicts)
        if wanted is not None:
            wanted.checked(context, verdicts)
        if context.spis not in [run.stored.sa for run in self.runs.values()]:
            yield NotComing(context)

    def _entry(self, message: Pctd | Ctd, context: IkeContext, header: TransferHeader) -> JournalEntry:
        now = self._parts.scheduler.unix
        return JournalEntry(
            transfer_id=header.transfer_id,
            role="target",
            peer=self.peer.name,
            sa=context.spis,
            mn=mn_label(context),
            mn_address=str(message.mn),
            state=str(TargetState.NEW),
            epoch=0,  # what the peer says counts once the SA was taken
            started=now,
            updated=now,
            context=Pctd(message.mn, message.blocks).serialize(),
        )

    # -- CTD ---------------------------------------------------------------------------------------------

    def _last(self, line: Line, message: Ctd) -> Steps[None]:
        try:
            what = decode_last(message.blocks)
        except WireError as error:
            yield from self._unreadable(line, message, error)
            return
        transfer_id = what[1].transfer_id if isinstance(what[1], TransferHeader) else what[1]
        if transfer_id in self._unknown.denied:
            self._unknown.deny(line, message.mn, transfer_id)
        elif isinstance(what[0], FinalState):
            yield from self._released(line, message, what[0], transfer_id)
        elif isinstance(what[1], TransferHeader):
            yield from self._whole(line, message, what[0], what[1])

    def _whole(self, line: Line, message: Ctd, context: IkeContext, header: TransferHeader) -> Steps[None]:
        """Handle a CTD with the whole context. From here on the source serves again only after a refusal."""
        known = yield from self._known(header.transfer_id)
        told = message.mn, final_of(context), header.transfer_id, str(context.remote_id)
        if known is not None:
            if not (yield from self._unknown.doubted(line, known, *told)):
                yield from self._again(known, TargetInput.WHOLE, line, message)
            return
        epochs: Epochs = yield FindEpochs(context.spis)
        wanted = self._inboxes.requests.wanted(self.peer, message.mn, context, header)
        if wanted is None or (
            # it may have been here before the store was lost, and its numbers been used
            self._parts.config.journal != "whole" and not wanted.may_bring(message.elapsed)
        ):
            if not (yield from self._unknown.doubted(line, None, *told)):
                self._unknown.deny(line, message.mn, header.transfer_id)
            return
        run = Incoming(self._parts, self._entry(message, context, header), context, header)
        run.whole = True
        try:
            if context.remote.address != message.mn or header.address != "mn":
                raise RefusedError("nobody asked for it", status=Status.UNKNOWN_TRANSFER)
            self._admitting = context.spis
            yield from self._make_way(context)
            status, why = self._admits(context, True, epochs)
            if status is not Status.OK:
                raise RefusedError(why, status=status)
            run.answers = wanted.answers
            run.take_whole(final_of(context))
            run.settle(wanted.place(context), wanted.here)
        except (RefusedError, WireError) as error:
            log.warning("%s sent %s: %s", line.label, mn_label(context), error)
            run.blame(error)
            # a busy SA is in this agent's journal; any other may have been taken before a journal was lost
            if error.status is not Status.BUSY or self._parts.config.journal != "whole":
                found = yield from doubt(final_of(context), message.mn, str(context.remote_id))
                if found.words:
                    run.error = RefusedError(found.words, status=Status.IN_DOUBT)
            wanted.begun(self, run)
            yield from run.go(TargetInput.CTD, line)
            return
        yield from self._begin(run, line, message, wanted)

    def _released(self, line: Line, message: Ctd, final: FinalState, transfer_id: bytes) -> Steps[None]:
        run = yield from self._known(transfer_id)
        if (yield from self._unknown.doubted(line, run, message.mn, final, transfer_id)):
            return
        if run is None:
            self._unknown.deny(line, message.mn, transfer_id)
            return
        what = TargetInput.CTD
        if transfer_id in self.runs:
            epochs: Epochs = yield FindEpochs(run.stored.sa)
            what = run.let_go(final, message.serialize(), epochs.known)
        yield from self._again(run, what, line, message)

    def _again(self, run: Incoming, what: TargetInput, line: Line, message: Pctd | Ctd) -> Steps[None]:
        """Handle a message for a known transfer. Only its own peer may send one, and for its own mobile
        node."""
        entry, mn = run.stored, message.mn
        if entry.peer != self.peer.name or entry.mn_address != str(mn):
            log.warning("%s names a transfer that is not its own, but of %s", line.label, entry.peer)
            # it may be that peer, under another name since, and must not serve what was taken here
            let_go = run.machine.state in TARGET_OWNS or (not run.ended and entry.final is not None)
            taken = isinstance(message, Ctd) and let_go
            answer(line, mn, refusal(Status.IN_DOUBT if taken else Status.UNKNOWN_TRANSFER))
            return
        run.count(size(message))
        if not run.ended and entry.transfer_id not in self.runs and run.machine.state is not TargetState.NEW:
            # open in the journal and not here: its end could not be written down
            yield from self._resume(entry)
            yield from self._handle(Mail(line, message))
            return
        yield from run.go(what, line)

    def _unreadable(self, line: Line, message: Ctd, error: WireError) -> Steps[None]:
        log.warning("%s let go with what does not parse: %s", line.label, error)
        owned: bool = yield OwnedFrom(self.peer.name, str(message.mn))
        if owned:
            # it may be a damaged copy of one that we took: neither yes nor no may be said
            line.close(LinkError("a CTD that does not parse"))
            return
        yield from self._drop("its CTD does not parse", lambda run: run.machine.state is TargetState.PREPARED)
        answer(line, message.mn, refusal(Status.MALFORMED))


def _offered_over(line: Line, item: object) -> bool:
    return isinstance(item, Mail) and item.line is line and isinstance(item.message, Pctd)


def _unanswered(item: object) -> None:
    """Close the link of an unanswered message, because answers are assigned by order: the next would be
    wrong."""
    if isinstance(item, Mail):
        item.line.close(LinkError("a message that came over it could not be answered here, see the log"))


class Inboxes:
    """All inboxes of a gateway."""

    def __init__(self, parts: Parts, requests: Requests, moving: Callable[[SaName], object]) -> None:
        """`moving`: the outgoing transfer of an SA."""
        self.parts = parts
        self.requests = requests
        self._moving = moving
        self._open: dict[tuple[str, Address], Inbox] = {}
        self._unknown: dict[str, UnknownTransfers] = {}
        self._adopted: set[SaName] = set()
        self._count: Counter[str] = Counter()
        """Inboxes by the name of their peer."""
        self.stopping = False

    def receive(self, line: Line, message: Pctd | Ctd) -> None:
        """A message for an inbox. A peer may not have offers for more mobile nodes looked at than it may have
        transfers."""
        peer = line.peer
        others = 0 if (peer.name, message.mn) in self._open else self._looked_at(peer.name)
        if others >= OPEN and isinstance(message, Pctd):
            answer(line, message.mn, refusal(Status.BUSY, f"{others} offers of {peer.name} are looked at"))
            line.handled()
        elif others >= 4 * OPEN:
            line.close(LinkError(f"it let go of SAs of more than {others} mobile nodes at a time"))
        else:
            self.inbox(peer, message.mn).post(Mail(line, message))

    def _looked_at(self, peer: str) -> int:
        """Mobile nodes of whom that peer has sent something, and no transfer is open yet; 0: few."""
        if self._count[peer] < OPEN:
            return 0
        return sum(name == peer and not box.runs for (name, _), box in self._open.items())

    def inbox(self, peer: PeerConfig, mn: Address) -> Inbox:
        """The inbox for this peer and mobile node; makes one if there is none."""
        key = (peer.name, mn)
        inbox = self._open.get(key)
        if inbox is None:
            unknown = self._unknown.get(peer.name)
            if unknown is None:
                unknown = self._unknown[peer.name] = UnknownTransfers(self.parts, peer, self._adopted)
            inbox = self._open[key] = Inbox(self, peer, mn, unknown)
            self._count[peer.name] += 1
            inbox.process = self.parts.scheduler.spawn(
                self._staff(key, inbox), f"inbox for {peer.name}, {mn}", mailbox=inbox.items
            )
        return inbox

    def _staff(self, key: tuple[str, Address], inbox: Inbox) -> Steps[None]:
        try:
            yield from inbox.work()
        finally:
            del self._open[key]
            self._count[key[0]] -= 1

    def full(self, peer: PeerConfig, octets: int) -> str:
        """Why one more transfer of that peer, with so many octets offered, is too much; empty: it is not."""
        runs = [run for box in self._open.values() if box.peer.name == peer.name for run in box.runs.values()]
        if len(runs) >= OPEN:
            return f"{len(runs)} transfers of {peer.name} are open here"
        late = sum(process.name == ENDS_LATE for process in self.parts.scheduler.processes)
        if late >= OPEN:
            return f"the ends of {late} transfers could not be written down yet"
        held = sum(len(run.stored.context or b"") for run in runs)
        if held + octets > OPEN_OCTETS:
            return f"the open transfers of {peer.name} hold {held} octets here"
        return ""

    def cancelled(self, line: Line, message: Ctc) -> None:
        """The peer's CTC, if anything is here that it may mean."""
        inbox = self._open.get((line.peer.name, message.mn))
        if inbox is None:
            line.handled()
        else:
            inbox.post(Mail(line, message))

    def stop(self) -> None:
        """Undo all that is not owned, before the agent stops."""
        self.stopping = True
        for inbox in self._open.values():
            inbox.post(Drop("the gateway stops"))

    def forget(self, line: Line) -> None:
        """The line is closed: nobody waits for answers to what was offered over it."""
        for inbox in self._open.values():
            if any(_offered_over(line, item) for item in inbox.items):
                kept = [item for item in inbox.items if not _offered_over(line, item)]
                inbox.items.clear()
                inbox.items.extend(kept)

    def has(self, transfer_id: bytes) -> bool:
        """True if that transfer is open here."""
        return any(transfer_id in inbox.runs for inbox in self._open.values())

    def held(self, peer: str, mn: Address, sa: SaName | None) -> tuple[Inbox, Incoming] | None:
        """What that peer sent ahead of the MN; without `sa` the one thing there is for that address.

        A mobile node behind a NAT need not know its address as the peer knows it.
        """
        found = [
            (inbox, run)
            for inbox, run in self._held(peer)
            if (run.mn == mn if sa is None else run.stored.sa == sa)
        ]
        return found[0] if len(found) == 1 else None

    def _held(self, peer: str) -> Iterator[tuple[Inbox, Incoming]]:
        for inbox in self._open.values():
            for run in inbox.runs.values() if inbox.peer.name == peer else ():
                if run.machine.state in _AHEAD and run.header is not None and run.header.intent == "hold":
                    yield inbox, run

    def busy(self, asking: Inbox, sa: SaName) -> bool:
        """True if that SA is in a transfer in another inbox, or on its way out."""
        here = [inbox for inbox in self._open.values() if inbox is not asking and inbox.holds(sa)]
        return bool(here or self._moving(sa))
