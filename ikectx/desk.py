"""New gateway: one queue for each old gateway and mobile node. The messages of a queue are handled in order.

A `Desk` is such a queue with its open transfers. Because of the order, answers leave in the order of the
messages that they answer, and no two transfers of one mobile node run at once (RFC 4067). The transfers that
a peer may have open are limited, and so are its unhandled messages (`links.WINDOW`): the next message is read
when one of them has been handled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Protocol

from .context import Address, Endpoint, FinalState, IkeContext, Secret
from .cxtp import Ctc, Ctd, Pctd, TokenAlgorithm
from .errors import IkectxError, LinkError, RefusedError, StoreError, WireError
from .incoming import Dropped, Incoming, answer, doubt, refusal
from .links import Link, Links, PeerConfig
from .mistakes import log_mistake
from .name import SaName
from .numbers import STATUS_TEXT, Status
from .ports import Verdict
from .profile import TransferHeader, decode
from .reasons import refusals
from .report import mn_label
from .run import Observer, Parts, Tasks, log, step
from .store import JournalEntry
from .transfer import TARGET_OWNS, TargetInput, TargetState, offer_fits
from .whole import decode_last, final_of

_AHEAD = (TargetState.NEW, TargetState.ANNOUNCED, TargetState.HELD)
"""States in which the context came ahead of the mobile node: it is held, or will be after its check."""
_DROPPABLE = (TargetState.HELD, TargetState.PREPARED)


OPEN = 256
"""Transfers that one peer may have open here at a time, and"""
OPEN_OCTETS = 4 * 1024 * 1024
"""octets that it may have offered in them: some 8,000 for each IKE_SA, which take ten times that in
memory."""
DENIED = 1024
"""Denied transfers of one peer that are remembered. A late copy can only arrive over a link that is still
open."""


class Want(Protocol):
    """A request of this gateway to the peer; its methods report what becomes of it."""

    progress: Observer | None
    answers: bool
    """True if the mobile node waits for an answer, which can tell it new SPIs."""
    here: Endpoint | None
    """The mobile node's new peer: an address of this gateway; None: the sink chooses one."""

    def place(self, context: IkeContext) -> Endpoint:
        """Where the MN is now. Errors: RefusedError."""

    def begun(self, desk: Desk, run: Incoming) -> None:
        """`run` is the transfer that answers this request."""

    def checked(self, context: IkeContext, verdicts: Sequence[Verdict]) -> None:
        """The request was for a check only, and this is its result."""

    def refused_here(self, verdicts: Sequence[Verdict]) -> None:
        """An offer for this request came, and was refused before a transfer began."""


Wanted = Callable[[PeerConfig, Address, IkeContext, TransferHeader], Want | None]
"""The request that an offer answers, by peer, previous address of the mobile node, context and header."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """The mobile node of a held transfer has arrived at `endpoint`; `request` sends the CT-Req."""

    run: Incoming
    endpoint: Endpoint
    request: Callable[[Link | None], Awaitable[None]]


class Denied:
    """Transfers that a peer let go of, and that were denied because nobody here knew them.

    A late copy of a message must not revive one, because the other gateway has taken its SA back. They are
    kept in memory only: a peer could fill the journal with them, and no copy outlives the links of this
    process.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, transfer_id: bytes) -> bool:
        return transfer_id in self._known

    def add(self, transfer_id: bytes) -> None:
        """Remember a transfer. If there are more than `DENIED`, the oldest is forgotten."""
        self._known[transfer_id] = None
        if len(self._known) > DENIED:
            self._known.popitem(last=False)


class Desk:
    """All messages of one peer about one mobile node, handled in order. Ends when nothing is left to do."""

    def __init__(
        self,
        parts: Parts,
        peer: PeerConfig,
        mn: Address,
        busy: Callable[[Desk, SaName], bool],
        wanted: Wanted,
        denied: Denied,
        full: Callable[[PeerConfig, int], str],
    ) -> None:
        self.peer = peer
        self.runs: dict[bytes, Incoming] = {}
        """Open transfers by their transfer ID."""
        self.post: asyncio.Queue[tuple[Link, Pctd | Ctd | Ctc] | Arrived | JournalEntry | str] = (
            asyncio.Queue()
        )
        """Messages, arrivals, open transfers of the journal; a text is the reason to drop what is not
        owned."""
        self._parts = parts
        self._mn = mn
        self._busy = busy
        self._wanted = wanted
        self._denied = denied
        self._full = full

    def holds(self, sa: SaName) -> bool:
        """True if a transfer of that SA is open here."""
        return any(run.stored.sa == sa for run in self.runs.values())

    async def work(self) -> None:
        """Handle items until the queue is empty and no transfer is open."""
        while self.runs or not self.post.empty():
            try:
                async with asyncio.timeout(self._patience()):
                    item = await self.post.get()
            except TimeoutError:
                await self._timers()
                continue
            try:
                if isinstance(item, str):
                    await self._drop(item)
                elif isinstance(item, JournalEntry):
                    await self._resume(item)
                elif isinstance(item, Arrived):
                    await self._arrived(item)
                else:
                    await self._handle(*item)
            except (StoreError, WireError) as error:
                # no answer, because it would have to agree with a journal that cannot be read
                log.error("a message of %s for %s: %s", self.peer.name, self._mn, error)
                _unanswered(item)
            except Exception as error:
                log_mistake(log, f"a message of {self.peer.name} for {self._mn}", error)
                _unanswered(item)
            finally:
                if isinstance(item, tuple):
                    item[0].handled()
                self.runs = {ident: run for ident, run in self.runs.items() if not run.ended}

    def _patience(self) -> float | None:
        due = [at for run in self.runs.values() if (at := run.machine.next_timer()) is not None]
        return max(0.0, min(due) - self._parts.clock.now()) if due else None

    async def _timers(self) -> None:
        now = self._parts.clock.now()
        for run in list(self.runs.values()):
            due = run.machine.next_timer()
            if due is not None and due <= now:
                run.dropped = "time"
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
            await self._last(link, message)
        else:
            await self._drop("the source cancelled it", by="source")

    async def _drop(
        self, why: str, which: Callable[[Incoming], bool] = lambda run: True, by: Dropped = "us"
    ) -> None:
        """Undo the transfers that are held or prepared and not owned."""
        for run in list(self.runs.values()):
            if run.machine.state in _DROPPABLE and which(run):
                run.dropped = by
                run.blame(RefusedError(why, status=Status.UNKNOWN_TRANSFER))
                await run.go(TargetInput.CTC)

    async def _arrived(self, item: Arrived) -> None:
        run = item.run
        if run.machine.state not in _DROPPABLE:
            return
        run.request = item.request
        if run.machine.state is TargetState.HELD:
            run.settle(item.endpoint)
            run.token = None
        await run.go(TargetInput.ARRIVED)

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
        if header.transfer_id in self._denied and header.intent != "check":
            await self._deny(link, message.mn, header.transfer_id)
            return
        known = self.runs.get(header.transfer_id) or self._stored(header.transfer_id)
        if known is not None and header.intent != "check":
            held = known.header is not None and known.header.intent == "hold"
            await self._again(known, TargetInput.ANNOUNCE if held else TargetInput.PCTD, link, message)
            return
        wanted = None if header.intent == "hold" else self._wanted(self.peer, message.mn, context, header)
        status, why = self._admits(context, wanted is not None)
        if status is Status.OK and wanted is None and header.intent != "check":
            full = self._full(self.peer, sum(8 + len(block.data) for block in message.blocks))
            status, why = (Status.BUSY, full) if full else (status, why)
        if status is not Status.OK:
            log.warning("%s offered %s, which is refused: %s", link.label, mn_label(context), why)
            await answer(link, message.mn, refusal(status, why))
            if wanted is not None:
                wanted.refused_here(refusal(status, why))
        elif header.intent == "check":
            await self._only_check(link, message, context, header, wanted)
        else:
            await self._make_way(context)
            # the key is for the MN's arrival, and for no disk
            entry = self._entry(changed(message, algorithm=TokenAlgorithm.NONE, key=b""), context, header)
            run = Incoming(self._parts, entry, context, header, wanted.progress if wanted else None)
            if header.intent == "hold":
                run.token = (message.algorithm, Secret(message.key))
                run.answers = message.algorithm is TokenAlgorithm.HMAC_SHA256_128
            await self._begin(run, link, message, wanted)

    async def _begin(self, run: Incoming, link: Link, message: Pctd | Ctd, wanted: Want | None) -> None:
        self.runs[run.stored.transfer_id] = run
        run.count(len(message.serialize()))
        if wanted is not None:
            wanted.begun(self, run)
        if isinstance(message, Ctd):
            await run.go(TargetInput.WHOLE, link)
        else:
            held = run.header is not None and run.header.intent == "hold"
            await run.go(TargetInput.ANNOUNCE if held else TargetInput.PCTD, link)

    async def _make_way(self, context: IkeContext) -> None:
        """Before an offer: end older transfers of the same SA, and those that the source has given up.

        The source offers one SA at a time, so all of its transfers but those that wait for a mobile node have
        been given up.
        """

        def goes(run: Incoming) -> bool:
            waits = run.header is not None and run.header.address == "mn"
            return run.stored.sa == context.spis or not waits

        await self._drop("the source offered it anew", goes, "offer")

    def _stored(self, transfer_id: bytes) -> Incoming | None:
        entry = self._parts.store.find("target", transfer_id)
        return None if entry is None else Incoming.resumed(self._parts, entry)

    def _admits(self, context: IkeContext, wanted: bool) -> tuple[Status, str]:
        """Whether this peer may bring this SA, as far as the configuration tells; with the reason in
        words."""
        if not wanted and "push" not in self.peer.rights:
            return Status.NOT_ALLOWED, f"{self.peer.name} has not the right push here"
        why = self.peer.may_not_bring(context)
        if why:
            return Status.NOT_ALLOWED, why
        status = Status.BUSY if self._busy(self, context.spis) else self._in_time(context)
        return status, STATUS_TEXT.get(status, status.name)

    def _in_time(self, context: IkeContext) -> Status:
        store = self._parts.store
        return offer_fits(context, store.known_epoch(context.spis), store.owned_epoch(context.spis))

    async def _only_check(
        self,
        link: Link,
        message: Pctd,
        context: IkeContext,
        header: TransferHeader,
        wanted: Want | None,
    ) -> None:
        timing = self._parts.timing
        try:
            keep = header.address == "keep"
            verdicts = tuple(await step("check", self._parts.sink.check(context, keep), timing))
        except IkectxError as error:
            log.warning("check for %s: %s", link.label, error)
            verdicts = refusal(error.status, str(error))
        if why := refusals(verdicts):
            log.info("%s could not bring %s here: %s", link.label, mn_label(context), why)
        await answer(link, message.mn, verdicts)
        if wanted is not None:
            wanted.checked(context, verdicts)

    def _entry(self, message: Pctd | Ctd, context: IkeContext, header: TransferHeader) -> JournalEntry:
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
            context=Pctd(message.mn, message.blocks).serialize(),
        )

    # -- CTD ---------------------------------------------------------------------------------------------

    async def _last(self, link: Link, message: Ctd) -> None:
        try:
            what = decode_last(message.blocks)
        except WireError as error:
            await self._unreadable(link, message, error)
            return
        if isinstance(what[0], FinalState) and isinstance(what[1], bytes):
            await self._released(link, message, what[0], what[1])
        elif isinstance(what[0], IkeContext) and isinstance(what[1], TransferHeader):
            await self._whole(link, message, what[0], what[1])

    async def _whole(self, link: Link, message: Ctd, context: IkeContext, header: TransferHeader) -> None:
        """Handle a CTD with the whole context. From here on the source serves again only after a refusal."""
        if header.transfer_id in self._denied:
            await self._deny(link, message.mn, header.transfer_id)
            return
        known = self.runs.get(header.transfer_id) or self._stored(header.transfer_id)
        who = str(context.remote_id)
        if known is not None:
            if not await self._doubted(link, known, final_of(context), message.mn, who):
                await self._again(known, TargetInput.WHOLE, link, message)
            return
        wanted = self._wanted(self.peer, message.mn, context, header)
        if wanted is None:
            if not await self._doubted(link, None, final_of(context), message.mn, who):
                await self._deny(link, message.mn, header.transfer_id)
            return
        run = Incoming(self._parts, self._entry(message, context, header), context, header)
        run.whole = True
        try:
            if context.remote.address != message.mn or header.address != "mn":
                raise RefusedError("nobody asked for it", status=Status.UNKNOWN_TRANSFER)
            await self._make_way(context)
            status, why = self._admits(context, True)
            if status is not Status.OK:
                raise RefusedError(why, status=status)
            run.answers = wanted.answers
            run.take_whole(final_of(context))
            run.settle(wanted.place(context), wanted.here)
        except (RefusedError, WireError) as error:
            log.warning("%s sent %s: %s", link.label, mn_label(context), error)
            run.blame(error)
            # a busy SA is in this agent's journal; any other may have been taken before a journal was lost
            if error.status is not Status.BUSY:
                found = await doubt(self._parts, final_of(context), message.mn, who)
                if found:
                    run.error = RefusedError(found, status=Status.IN_DOUBT)
            wanted.begun(self, run)
            await run.go(TargetInput.CTD, link)
            return
        await self._begin(run, link, message, wanted)

    async def _released(self, link: Link, message: Ctd, final: FinalState, transfer_id: bytes) -> None:
        if transfer_id in self._denied:
            await self._deny(link, message.mn, transfer_id)
            return
        run = self.runs.get(transfer_id) or self._stored(transfer_id)
        if await self._doubted(link, run, final, message.mn):
            return
        if run is None:
            await self._deny(link, message.mn, transfer_id)
            return
        what = run.let_go(final, message.serialize()) if transfer_id in self.runs else TargetInput.CTD
        await self._again(run, what, link, message)

    async def _deny(self, link: Link, mn: Address, transfer_id: bytes) -> None:
        """Answer that nobody here knows that transfer, and keep to it. Nothing is written to the journal."""
        self._denied.add(transfer_id)
        log.warning("%s let go of an SA for %s that it had not offered", link.label, mn)
        await answer(link, mn, refusal(Status.UNKNOWN_TRANSFER, "nobody offered it"))

    async def _doubted(
        self, link: Link, run: Incoming | None, final: FinalState, mn: Address, who: str = ""
    ) -> bool:
        """Answer IN_DOUBT to a CTD whose transfer is not known, or was in doubt before, if the SA is here.

        Nothing is written to the journal, so that the next copy of the CTD is denied as soon as the operator
        has ended the SA here; the other gateway then serves it again.
        """
        if run is not None and not (run.ended and run.status is Status.IN_DOUBT):
            return False
        found = await doubt(self._parts, final, mn, who)
        if not found:
            if run is not None:
                run.error = RefusedError("the SA has been ended here", status=Status.UNKNOWN_TRANSFER)
            return False
        log.error(
            "%s let go of an SA in a transfer that is not in the journal here, but %s. "
            "It serves the SA again only when that has been ended here, or by `ikectx reclaim` there",
            *(self.peer.name, found),
        )
        await answer(link, mn, refusal(Status.IN_DOUBT, found))
        return True

    async def _again(self, run: Incoming, what: TargetInput, link: Link, message: Pctd | Ctd) -> None:
        """Handle a message for a known transfer. Only its own peer may send one, and for its own mobile
        node."""
        entry, mn = run.stored, message.mn
        if entry.peer != self.peer.name or entry.mn_address != str(mn):
            log.warning("%s names a transfer that is not its own", link.label)
            await answer(link, mn, refusal(Status.UNKNOWN_TRANSFER))
            return
        run.count(len(message.serialize()))
        if not run.ended and entry.transfer_id not in self.runs and run.machine.state is not TargetState.NEW:
            # the journal has it open, but no run: its end could not be written to the journal
            link.not_handled()
            self.post.put_nowait((link, message))
            await self._resume(entry)
            return
        await run.go(what, link)

    async def _unreadable(self, link: Link, message: Ctd, error: WireError) -> None:
        log.warning("%s let go with what does not parse: %s", link.label, error)
        if self._parts.store.owned_from(self.peer.name, str(message.mn)):
            # it may be a damaged copy of a CTD that was taken, so that neither yes nor no is certain
            link.close(LinkError("a CTD that does not parse"))
            return
        await self._drop("its CTD does not parse", lambda run: run.machine.state is TargetState.PREPARED)
        await answer(link, message.mn, refusal(Status.MALFORMED))


def _unanswered(item: object) -> None:
    """Close the link of an unanswered message, because answers are assigned by order: the next would be
    wrong."""
    if isinstance(item, tuple):
        item[0].close(LinkError("a message that came over it could not be answered here, see the log"))


class Desks:
    """All desks of a gateway."""

    def __init__(
        self,
        parts: Parts,
        tasks: Tasks,
        links: Callable[[], Links | None],
        moving: Callable[[SaName], object],
        wanted: Wanted,
    ) -> None:
        """`moving`: the outgoing transfer of an SA. `wanted`: the request that an offer answers."""
        self._parts = parts
        self._tasks = tasks
        self._links = links
        self._moving = moving
        self._wanted = wanted
        self._desks: dict[tuple[str, Address], Desk] = {}
        self._denied: dict[str, Denied] = {}

    def desk(self, peer: PeerConfig, mn: Address) -> Desk:
        """The desk for this peer and mobile node; makes one if there is none."""
        key = (peer.name, mn)
        desk = self._desks.get(key)
        if desk is None:
            denied = self._denied.setdefault(peer.name, Denied())
            desk = self._desks[key] = Desk(
                self._parts, peer, mn, self._busy, self._wanted, denied, self._full
            )
            self._tasks.spawn(self._staff(key, desk), f"ikectx desk for {peer.name}, {mn}")
        return desk

    async def take(self, link: Link, message: Pctd | Ctd) -> None:
        """Put a peer's message on its desk, as soon as few enough messages of that link are unhandled."""
        await link.room()
        self.desk(link.peer, message.mn).post.put_nowait((link, message))

    def _full(self, peer: PeerConfig, octets: int) -> str:
        """Why the peer may not open one more transfer with so many octets offered; empty: it may."""
        runs = [
            run for desk in self._desks.values() if desk.peer.name == peer.name for run in desk.runs.values()
        ]
        if len(runs) >= OPEN:
            return f"{len(runs)} transfers of {peer.name} are open here"
        held = sum(len(run.stored.context or b"") for run in runs)
        if held + octets > OPEN_OCTETS:
            return f"the open transfers of {peer.name} hold {held} octets here"
        return ""

    async def _staff(self, key: tuple[str, Address], desk: Desk) -> None:
        links = self._links()
        try:
            with contextlib.nullcontext() if links is None else links.in_use(desk.peer):
                await desk.work()
        finally:
            del self._desks[key]
            self._tasks.tidy()

    async def cancelled(self, link: Link, message: Ctc) -> None:
        """Handle the peer's CTC, if a transfer is open here that it can mean."""
        await link.room()
        desk = self._desks.get((link.peer.name, message.mn))
        if desk is None:
            link.handled()
        else:
            desk.post.put_nowait((link, message))

    def stop(self) -> None:
        """Undo all that is not owned, before the agent stops."""
        for desk in self._desks.values():
            desk.post.put_nowait("the gateway stops")

    def has(self, transfer_id: bytes) -> bool:
        """True if that transfer is open here."""
        return any(transfer_id in desk.runs for desk in self._desks.values())

    def held(self, peer: str, mn: Address, sa: SaName | None) -> tuple[Desk, Incoming] | None:
        """The context that the peer sent ahead of the mobile node; without `sa` the only one for that
        address.

        A mobile node behind a NAT need not know its address as the peer knows it.
        """
        found = [
            (desk, run)
            for desk, run in self._held(peer)
            if (run.mn == mn if sa is None else run.stored.sa == sa)
        ]
        return found[0] if len(found) == 1 else None

    def _held(self, peer: str) -> Iterator[tuple[Desk, Incoming]]:
        for desk in self._desks.values():
            for run in desk.runs.values() if desk.peer.name == peer else ():
                if run.machine.state in _AHEAD and run.header is not None and run.header.intent == "hold":
                    yield desk, run

    def _busy(self, asking: Desk, sa: SaName) -> bool:
        """True if that SA is in a transfer at another desk, or on its way out."""
        others = (desk for desk in self._desks.values() if desk is not asking)
        return bool(self._moving(sa)) or any(desk.holds(sa) for desk in others)
