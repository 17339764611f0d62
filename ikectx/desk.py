"""What comes for one MN after the other: the desks at which a gateway takes transfers (nSG).

One `Desk` for each peer and MN handles what comes for it one after the other, so that answers leave in the
order of what they answer, and no two transfers of one MN run at once (RFC 4067). A peer has only so many
transfers open here, and only so many messages unhandled (`links.WINDOW`): the next is read after that.
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
"""It is held, or will be when what comes next for it is looked at."""
_DROPPABLE = (TargetState.HELD, TargetState.PREPARED)


OPEN = 256
"""Transfers of one peer that are open here at a time, and"""
OPEN_OCTETS = 4 * 1024 * 1024
"""octets of what it offered in them: some 8,000 for each IKE_SA, held in memory at ten times their size."""
DENIED = 1024
"""Denied transfers of one peer that are remembered. A copy comes late only over a link that is still open."""


class Want(Protocol):
    """Something that this gateway asked the peer for; it is told what becomes of it."""

    progress: Observer | None
    answers: bool
    """Does the MN wait for an answer that can tell it new names?"""
    here: Endpoint | None
    """Where at this gateway the MN came to; None: that is left to the sink."""

    def place(self, context: IkeContext) -> Endpoint:
        """Where the MN is now. Errors: RefusedError."""

    def begun(self, desk: Desk, run: Incoming) -> None:
        """This is it."""

    def checked(self, context: IkeContext, verdicts: Sequence[Verdict]) -> None:
        """It was only to be checked, and was."""

    def refused_here(self, verdicts: Sequence[Verdict]) -> None:
        """It came, and was refused before it began."""


Wanted = Callable[[PeerConfig, Address, IkeContext, TransferHeader], Want | None]
"""What of ours this offer answers, by peer, MN's previous address, context and header."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """The MN of a held transfer is here, at `endpoint`; `request` sends the CT-Req."""

    run: Incoming
    endpoint: Endpoint
    request: Callable[[Link | None], Awaitable[None]]


class Denied:
    """Transfers that a peer let go of though nobody here knew them, which was denied.

    A late copy of a message must not revive one: the other gateway has taken its SA back. They are in memory
    only, since a peer could fill the journal with them, and no copy outlives the links of this process.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, transfer_id: bytes) -> bool:
        return transfer_id in self._known

    def add(self, transfer_id: bytes) -> None:
        """Remember it; the oldest is forgotten where there are more than `DENIED`."""
        self._known[transfer_id] = None
        if len(self._known) > DENIED:
            self._known.popitem(last=False)


class Desk:
    """All that one peer sends for one MN, one thing after the other. Ends by itself when nothing is left."""

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
        """Open transfers by their id."""
        self.post: asyncio.Queue[tuple[Link, Pctd | Ctd | Ctc] | Arrived | JournalEntry | str] = (
            asyncio.Queue()
        )
        """Messages, MNs that arrived, open transfers of the journal; a text: why what is not owned goes."""
        self._parts = parts
        self._mn = mn
        self._busy = busy
        self._wanted = wanted
        self._denied = denied
        self._full = full

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
                if isinstance(item, str):
                    await self._drop(item)
                elif isinstance(item, JournalEntry):
                    await self._resume(item)
                elif isinstance(item, Arrived):
                    await self._arrived(item)
                else:
                    await self._handle(*item)
            except (StoreError, WireError) as error:
                # no answer: what the journal does not tell cannot be told
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
        """Undo what is held or prepared and not owned."""
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
        """For an offer: what is here of the same SA goes; so does all that the source offered and gave up.

        That is all but what waits for an MN: the source offers one thing at a time.
        """

        def goes(run: Incoming) -> bool:
            waits = run.header is not None and run.header.address == "mn"
            return run.stored.sa == context.spis or not waits

        await self._drop("the source offered it anew", goes, "offer")

    def _stored(self, transfer_id: bytes) -> Incoming | None:
        entry = self._parts.store.find("target", transfer_id)
        return None if entry is None else Incoming.resumed(self._parts, entry)

    def _admits(self, context: IkeContext, wanted: bool) -> tuple[Status, str]:
        """Whether the peer may bring it, as far as nobody need look at it, with the reason in words."""
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
        """All in one: from here on the source serves again only when it is told no."""
        if header.transfer_id in self._denied:
            await self._deny(link, message.mn, header.transfer_id)
            return
        known = self.runs.get(header.transfer_id) or self._stored(header.transfer_id)
        if known is not None:
            if not await self._doubted(link, known, final_of(context), message.mn):
                await self._again(known, TargetInput.WHOLE, link, message)
            return
        wanted = self._wanted(self.peer, message.mn, context, header)
        if wanted is None:
            if not await self._doubted(link, None, final_of(context), message.mn):
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
        """Say that nobody here knows that transfer, and stay with it. Nothing of it stands in the journal."""
        self._denied.add(transfer_id)
        log.warning("%s let go of an SA for %s that it had not offered", link.label, mn)
        await answer(link, mn, refusal(Status.UNKNOWN_TRANSFER, "nobody offered it"))

    async def _doubted(self, link: Link, run: Incoming | None, final: FinalState, mn: Address) -> bool:
        """Answer IN_DOUBT to a CTD whose transfer is not known, or was in doubt before, if the SA is here.

        Nothing is written down: as soon as the operator has ended the SA here, the next copy of the CTD is
        denied, and the other gateway serves again.
        """
        if run is not None and not (run.ended and run.status is Status.IN_DOUBT):
            return False
        found = await doubt(self._parts, final, mn)
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
        """A message for a transfer that is known; only its own peer and MN may speak of it."""
        entry, mn = run.stored, message.mn
        if entry.peer != self.peer.name or entry.mn_address != str(mn):
            log.warning("%s names a transfer that is not its own", link.label)
            await answer(link, mn, refusal(Status.UNKNOWN_TRANSFER))
            return
        run.count(len(message.serialize()))
        if not run.ended and entry.transfer_id not in self.runs and run.machine.state is not TargetState.NEW:
            # open in the journal and not here: its end could not be written down
            link.not_handled()
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
        await self._drop("its CTD does not parse", lambda run: run.machine.state is TargetState.PREPARED)
        await answer(link, message.mn, refusal(Status.MALFORMED))


def _unanswered(item: object) -> None:
    """The answers on a link are told apart by their order: after a missing one the next would be wrong."""
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
        """`moving`: is the SA on its way out? `wanted`: what did we ask for?"""
        self._parts = parts
        self._tasks = tasks
        self._links = links
        self._moving = moving
        self._wanted = wanted
        self._desks: dict[tuple[str, Address], Desk] = {}
        self._denied: dict[str, Denied] = {}

    def desk(self, peer: PeerConfig, mn: Address) -> Desk:
        """The desk for them, a new one where there is none."""
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
        """Lay a peer's message on its desk, as soon as few enough of that link are unhandled."""
        await link.room()
        self.desk(link.peer, message.mn).post.put_nowait((link, message))

    def _full(self, peer: PeerConfig, octets: int) -> str:
        """Why one more transfer of that peer, with so many octets offered, is too much; empty: it is not."""
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
        """The peer's CTC, if anything is here that it may mean."""
        await link.room()
        desk = self._desks.get((link.peer.name, message.mn))
        if desk is None:
            link.handled()
        else:
            desk.post.put_nowait((link, message))

    def stop(self) -> None:
        """Leave nothing half done."""
        for desk in self._desks.values():
            desk.post.put_nowait("the gateway stops")

    def has(self, transfer_id: bytes) -> bool:
        """Is that transfer open here?"""
        return any(transfer_id in desk.runs for desk in self._desks.values())

    def held(self, peer: str, mn: Address, sa: SaName | None) -> tuple[Desk, Incoming] | None:
        """What that peer sent ahead of the MN; without `sa` the one thing there is for that address.

        An MN behind a NAT need not know the address that the peer calls it by.
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
        """Is that SA in a transfer elsewhere in this gateway?"""
        others = (desk for desk in self._desks.values() if desk is not asking)
        return bool(self._moving(sa)) or any(desk.holds(sa) for desk in others)
