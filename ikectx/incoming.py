"""The target's end of transfers: check, prepare, own, or undo, and answer (nSG).

One `Desk` for each peer and MN handles what comes for it one after the other, so that answers leave in the
order of what they answer, and no two transfers of one MN run at once (RFC 4067).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from dataclasses import replace as changed

from .context import Address, FinalState, IkeContext
from .cxtp import Ctc, Ctd, Ctdr, Pctd
from .errors import IkectxError, LinkError, RefusedError, StateError, StoreError, WireError
from .links import Link, PeerConfig
from .numbers import STATUS_TEXT, Fpt, Status
from .ports import MoveReport, SaName, Verdict
from .profile import TransferHeader, decode, decode_final, encode_verdicts
from .run import Parts, Run, log, log_mistake, step
from .store import JournalEntry
from .transfer import (
    TARGET_DURABLE,
    TARGET_OWNS,
    TargetAction,
    TargetInput,
    TargetState,
    final_fits,
    first_failure,
    mn_label,
    new_target,
    offer_fits,
)

_RESULTS: Mapping[TargetState, str] = {TargetState.OWNED: "moved", TargetState.ABORTED: "aborted"}
_INSTEAD: Mapping[TargetState, TargetInput] = {
    TargetState.PREPARING: TargetInput.FAILED,
    TargetState.PREPARED: TargetInput.FAILED,
    TargetState.OWNING: TargetInput.MISFIT,
}
"""Without a journal nothing is installed, and nothing taken."""

_STEPS = {
    TargetAction.CHECK: "check",
    TargetAction.PREPARE: "prepare",
    TargetAction.TAKE: "take",
    TargetAction.MOVE: "move",
    TargetAction.ACTIVATE: "activate",
    TargetAction.UNDO: "undo",
}


def refusal(status: Status, detail: str = "") -> tuple[Verdict, ...]:
    """The verdicts of an answer that says no as a whole."""
    return (Verdict(Fpt.IKEV2_SA, status, detail),)


async def answer(link: Link, mn: Address, verdicts: Sequence[Verdict]) -> None:
    """Send the CTDR; a link that has gone is the asker's to mend."""
    statuses = encode_verdicts(verdicts)
    complete = all(each.status is Status.OK for each in statuses)
    try:
        await link.send(Ctdr(mn, statuses, complete))
    except LinkError as error:
        log.warning("%s was not answered for %s: %s", link.peer.name, mn, error)


class Incoming(Run[TargetState, TargetInput, TargetAction]):
    """One transfer to this gateway."""

    def __init__(self, parts: Parts, entry: JournalEntry, context: IkeContext | None, keep: bool) -> None:
        state = TargetState(entry.state)
        super().__init__(
            parts,
            new_target(parts.clock.now(), parts.timing, state),
            entry,
            durable=TARGET_DURABLE,
            results=_RESULTS,
            instead=_INSTEAD,
        )
        self.context = context
        self.keep = keep
        self.mn: Address | None = context.remote.address if context is not None else None
        self.link: Link | None = None
        """Where its last message came from."""
        self._owed = False
        """It has no answer yet. An answer nobody asked for would pass for the answer to something else."""
        if state in (TargetState.UNDOING, TargetState.ABORTED):
            self.blame(
                RefusedError(entry.detail or "aborted", status=entry.status or Status.UNKNOWN_TRANSFER)
            )
        self._final: FinalState | None = None
        self._report = MoveReport(**entry.moved) if entry.moved else MoveReport()  # type: ignore[arg-type]
        self._verdicts: tuple[Verdict, ...] = ()
        self._tries = 0
        self._do: Mapping[TargetAction, Callable[[IkeContext], Awaitable[None]]] = {
            TargetAction.CHECK: self._check,
            TargetAction.PREPARE: self._prepare,
            TargetAction.TAKE: self._take,
            TargetAction.MOVE: self._move,
            TargetAction.ACTIVATE: self._activate,
            TargetAction.UNDO: self._undo,
        }

    @classmethod
    def resumed(cls, parts: Parts, entry: JournalEntry) -> Incoming:
        """As the journal has it. Errors: WireError when its context is not one of this version."""
        if entry.context is None:
            return cls(parts, entry, None, keep=False)
        context, header = decode(Pctd.parse(entry.context).blocks)
        run = cls(parts, entry, context, header.address == "keep")
        if entry.final is not None:
            run._final, _ = decode_final(Ctd.parse(entry.final).blocks)
        return run

    def must(self, state: TargetState) -> bool:
        """Nothing may be said of what is owned before it is written down; nor of what was never known."""
        ends = (TargetState.OWNED, TargetState.UNDOING, TargetState.ABORTED)
        tombstone = self.machine.state is TargetState.NEW and state is TargetState.ABORTED
        return tombstone or (state in ends and self.on_disk in TARGET_OWNS)

    # -- the walk ----------------------------------------------------------------------------------------

    async def go(self, what: TargetInput | None, link: Link | None = None) -> None:
        """Feed `what`, do what the table says, until there is nothing to do but wait."""
        if link is not None:
            self.link, self._owed = link, True
        while what is not None:
            before = self.machine.state
            actions = await self.advance(what)
            if self.machine.state is not before:
                self._tries = 0
            what = None
            for action in actions:
                what = await self._act(action)

    async def _act(self, action: TargetAction) -> TargetInput | None:
        if action is TargetAction.ANSWER:
            if self._owed and self.link is not None and self.mn is not None:
                self._owed = False
                await answer(self.link, self.mn, self._said())
            return None
        if action is TargetAction.SEND_CTC:
            await self._cancel()
            return None
        try:
            if self.context is None:
                raise StateError("the journal has no context for it")
            await step(_STEPS[action], self._do[action](self.context), self.parts.timing)
        except IkectxError as error:
            if action is TargetAction.UNDO:
                self._tries += 1
                await self.again(self._tries - 1, "undo", error)
            else:
                log.warning("transfer %s: %s: %s", self.stored.transfer_id.hex(), _STEPS[action], error)
                self.blame(error)
            return TargetInput.FAILED
        return TargetInput.OK

    def _said(self) -> tuple[Verdict, ...]:
        if self.machine.state is not TargetState.ABORTED:
            return self._verdicts
        if first_failure(self._verdicts) is not Status.OK:
            return self._verdicts
        return refusal(self.status if self.error is not None else Status.UNKNOWN_TRANSFER)

    async def _cancel(self) -> None:
        self.blame(RefusedError("no CTD came in time", status=Status.UNKNOWN_TRANSFER))
        if self.link is not None and self.link.error is None and self.mn is not None:
            try:
                await self.link.send(Ctc(self.mn))
            except LinkError as error:
                log.info("transfer %s: cancel not sent: %s", self.stored.transfer_id.hex(), error)

    def let_go(self, final: FinalState, octets: bytes) -> TargetInput:
        """The source's CTD: what to feed. Journaled with the next state."""
        if self.machine.state is not TargetState.PREPARED or self.context is None:
            return TargetInput.CTD
        fits = final_fits(self.context, final, self.parts.store.known_epoch(self.stored.sa))
        if fits is not Status.OK:
            self.blame(RefusedError("the CTD does not fit its PCTD", status=fits))
            return TargetInput.MISFIT
        self._final = final
        self.entry = changed(self.stored, final=octets, epoch=final.epoch)
        return TargetInput.CTD

    # -- steps -------------------------------------------------------------------------------------------

    @property
    def _last(self) -> FinalState:
        if self._final is None:
            raise StateError("the journal has no final state for it")
        return self._final

    async def _check(self, context: IkeContext) -> None:
        verdicts = tuple(await self.parts.sink.check(context, self.keep))
        status = first_failure(verdicts)
        if status is not Status.OK:
            self._verdicts = verdicts
            said = next(verdict.detail for verdict in verdicts if verdict.status is status)
            raise RefusedError(said or STATUS_TEXT.get(status, "refused"), status=status)

    async def _prepare(self, context: IkeContext) -> None:
        await self.parts.sink.prepare(context, self.keep)

    async def _take(self, context: IkeContext) -> None:
        await self.parts.sink.take(context, self._last)

    async def _move(self, context: IkeContext) -> None:
        if self.keep:
            return
        try:
            self._report = await self.parts.sink.move_peer(context, self._last)
        except LinkError as error:
            raise LinkError(str(error), hint=error.hint, status=Status.PEER_SILENT) from None
        except RefusedError as error:
            raise RefusedError(str(error), hint=error.hint, status=Status.PEER_REFUSED) from None
        self.entry = changed(
            self.stored, moved={name: int(value) for name, value in asdict(self._report).items()}
        )

    async def _activate(self, context: IkeContext) -> None:
        await self.parts.sink.activate(context, self._last, self._report)

    async def _undo(self, context: IkeContext) -> None:
        await self.parts.sink.undo(context)


class Desk:
    """All that one peer sends for one MN, one thing after the other. Ends by itself when nothing is left."""

    def __init__(
        self, parts: Parts, peer: PeerConfig, mn: Address, busy: Callable[[Desk, SaName], bool]
    ) -> None:
        self.peer = peer
        self.runs: dict[bytes, Incoming] = {}
        """Open transfers by their id."""
        self.post: asyncio.Queue[tuple[Link, Pctd | Ctd | Ctc] | JournalEntry | None] = asyncio.Queue()
        """Messages, open transfers of the journal, None: leave nothing half done and end."""
        self._parts = parts
        self._mn = mn
        self._busy = busy

    def holds(self, sa: SaName) -> bool:
        """Is a transfer of that SA open here?"""
        return any(run.stored.sa == sa for run in self.runs.values())

    async def work(self) -> None:
        """Until the post is empty and no transfer is open."""
        while self.runs or not self.post.empty():
            try:
                async with asyncio.timeout(self._patience()):
                    item = await self.post.get()
            except TimeoutError:
                await self._timers()
                continue
            try:
                if item is None:
                    await self._drop("the gateway stops")
                    return
                if isinstance(item, JournalEntry):
                    await self._resume(item)
                else:
                    await self._handle(*item)
            except (StoreError, WireError) as error:
                # no answer: what the journal does not tell cannot be told
                log.error("a message of %s for %s: %s", self.peer.name, self._mn, error)
            except Exception as error:
                log_mistake(f"a message of {self.peer.name} for {self._mn}", error)
            finally:
                self.runs = {ident: run for ident, run in self.runs.items() if not run.ended}

    def _patience(self) -> float | None:
        due = [at for run in self.runs.values() if (at := run.machine.next_timer()) is not None]
        return max(0.0, min(due) - self._parts.clock.now()) if due else None

    async def _timers(self) -> None:
        now = self._parts.clock.now()
        for run in list(self.runs.values()):
            due = run.machine.next_timer()
            if due is not None and due <= now:
                await run.go(TargetInput.TIMEOUT)
        self.runs = {ident: run for ident, run in self.runs.items() if not run.ended}

    async def _resume(self, entry: JournalEntry) -> None:
        run = Incoming.resumed(self._parts, entry)
        if run.machine.state not in TARGET_OWNS:
            run.blame(RefusedError("the agent was restarted", status=Status.UNKNOWN_TRANSFER))
        self.runs[entry.transfer_id] = run
        await run.go(TargetInput.RESTART)

    async def _handle(self, link: Link, message: Pctd | Ctd | Ctc) -> None:
        if isinstance(message, Pctd):
            await self._offered(link, message)
        elif isinstance(message, Ctd):
            await self._released(link, message)
        else:
            await self._drop("the source cancelled it")

    async def _drop(self, why: str) -> None:
        """Undo what is prepared and not owned."""
        for run in list(self.runs.values()):
            if run.machine.state is TargetState.PREPARED:
                run.blame(RefusedError(why, status=Status.UNKNOWN_TRANSFER))
                await run.go(TargetInput.CTC)

    # -- PCTD --------------------------------------------------------------------------------------------

    async def _offered(self, link: Link, message: Pctd) -> None:
        try:
            context, header = decode(message.blocks)
            if context.remote.address != message.mn:
                raise WireError(f"the PCTD is for {message.mn}, its context for {context.remote.address}")
        except WireError as error:
            log.warning("%s offered what does not parse: %s", link.label, error)
            await answer(link, message.mn, refusal(Status.MALFORMED))
            return
        known = self.runs.get(header.transfer_id) or self._stored(header.transfer_id)
        if known is not None and header.intent == "prepare":
            await self._again(known, TargetInput.PCTD, link, message)
            return
        status = self._admits(context)
        if status is not Status.OK:
            log.warning(
                "%s offered %s: %s", link.label, mn_label(context), STATUS_TEXT.get(status, status.name)
            )
            await answer(link, message.mn, refusal(status))
        elif header.intent == "check":
            await self._only_check(link, message, context, header)
        else:
            await self._drop("the source offered it anew")
            run = Incoming(
                self._parts, self._entry(message, context, header), context, header.address == "keep"
            )
            self.runs[header.transfer_id] = run
            await run.go(TargetInput.PCTD, link)

    def _stored(self, transfer_id: bytes) -> Incoming | None:
        entry = self._parts.store.find("target", transfer_id)
        return None if entry is None else Incoming.resumed(self._parts, entry)

    def _admits(self, context: IkeContext) -> Status:
        if "push" not in self.peer.rights:
            return Status.NOT_ALLOWED
        if self._busy(self, context.spis):
            return Status.BUSY
        store = self._parts.store
        return offer_fits(context, store.known_epoch(context.spis), store.owned_epoch(context.spis))

    async def _only_check(
        self, link: Link, message: Pctd, context: IkeContext, header: TransferHeader
    ) -> None:
        timing = self._parts.timing
        try:
            keep = header.address == "keep"
            verdicts = tuple(await step("check", self._parts.sink.check(context, keep), timing))
        except IkectxError as error:
            log.warning("check for %s: %s", link.label, error)
            verdicts = refusal(error.status, str(error))
        await answer(link, message.mn, verdicts)

    def _entry(self, message: Pctd, context: IkeContext, header: TransferHeader) -> JournalEntry:
        now = self._parts.wall()
        return JournalEntry(
            transfer_id=header.transfer_id,
            role="target",
            peer=self.peer.name,
            sa=context.spis,
            mn=mn_label(context),
            mn_address=str(message.mn),
            state=str(TargetState.NEW),
            epoch=context.epoch,
            started=now,
            updated=now,
            context=message.serialize(),
        )

    # -- CTD ---------------------------------------------------------------------------------------------

    async def _released(self, link: Link, message: Ctd) -> None:
        try:
            final, transfer_id = decode_final(message.blocks)
        except WireError as error:
            await self._unreadable(link, message, error)
            return
        run = self.runs.get(transfer_id) or self._stored(transfer_id)
        if run is None:
            now = self._parts.wall()
            entry = JournalEntry(
                transfer_id=transfer_id,
                role="target",
                peer=self.peer.name,
                sa=(final.spi_i, final.spi_r),
                mn="",
                mn_address=str(message.mn),
                state=str(TargetState.NEW),
                epoch=0,
                started=now,
                updated=now,
            )
            run = Incoming(self._parts, entry, None, keep=False)
            run.blame(RefusedError("nobody offered it", status=Status.UNKNOWN_TRANSFER))
        what = run.let_go(final, message.serialize()) if transfer_id in self.runs else TargetInput.CTD
        await self._again(run, what, link, message)

    async def _again(self, run: Incoming, what: TargetInput, link: Link, message: Pctd | Ctd) -> None:
        """A message for a transfer that is known; only its own peer and MN may speak of it."""
        entry, mn = run.stored, message.mn
        if entry.peer != self.peer.name or entry.mn_address != str(mn):
            log.warning("%s names a transfer that is not its own", link.label)
            await answer(link, mn, refusal(Status.UNKNOWN_TRANSFER))
            return
        run.mn = mn
        if not run.ended and entry.transfer_id not in self.runs and run.machine.state is not TargetState.NEW:
            # open in the journal and not here: its end could not be written down
            self.post.put_nowait((link, message))
            await self._resume(entry)
            return
        await run.go(what, link)

    async def _unreadable(self, link: Link, message: Ctd, error: WireError) -> None:
        log.warning("%s let go with what does not parse: %s", link.label, error)
        if self._parts.store.owned_from(self.peer.name, str(message.mn)):
            # it may be a damaged copy of one that we took: neither yes nor no may be said
            link.close(LinkError("a CTD that does not parse"))
            return
        await self._drop("its CTD does not parse")
        await answer(link, message.mn, refusal(Status.MALFORMED))
