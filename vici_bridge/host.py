"""One charon and its kernel, for source and sink: receives the HA stream, sends orders, reads views.

The record of the HA stream is stored after each change, because it cannot be asked for again: a resync would
rekey every CHILD_SA (strongSwan 5.9.8 and 6.0.6).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from ikectx import trace
from ikectx.clock import steady_wall
from ikectx.engine.ledger import Ledger, MobileFacts, SourceFacts, TargetFacts
from ikectx.engine.ports import MoveReport, Store
from ikectx.errors import (
    CharonError,
    IkectxError,
    KernelError,
    NoAddressError,
    RefusedError,
    StoreError,
    UnknownSaError,
    WireError,
)
from ikectx.mistakes import log_failure
from ikectx.sa.context import NO_TAGS, Address, ChildContext, FinalState, IkeContext
from ikectx.sa.name import SaName
from vici_bridge.away.absences import Away
from vici_bridge.away.follow import Follow
from vici_bridge.away.origins import Origins
from vici_bridge.ha import messages as ha
from vici_bridge.ha.chain import undo_messages
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.record import (
    Added,
    ChildAdded,
    ChildDeleted,
    Deleted,
    MidChanged,
    Record,
    RecordChange,
    Rekeyed,
    Rekeying,
    Updated,
)
from vici_bridge.ha.sockets import HaSocket, Unconfirmed
from vici_bridge.ha.version import HaVersion
from vici_bridge.kernel.kernel import Detour, Kernel, LatePackets, Mute
from vici_bridge.kernel.kernel_events import KernelEvents, changes_of_ways, flushes_of_policies
from vici_bridge.kernel.nat_relay import NatRelay
from vici_bridge.kernel.rewrite import Rewrite
from vici_bridge.kernel.xfrm import KernelSa
from vici_bridge.policy.obstacles import check_alone, check_context, check_kind, check_ports, check_told
from vici_bridge.vici.charon import Charon
from vici_bridge.vici.codec import Message
from vici_bridge.vici.list_sas import Listing
from vici_bridge.vici.views import SaView, sa_view

from .deadlines import Deadlines
from .doubts import Doubts
from .due_rekeys import DueRekeys
from .host_config import HostConfig
from .known import Known
from .known_agents import KnownAgents
from .last_heard import LastHeard
from .orphans import Orphans
from .rekey_after_move import FreshKeys
from .reloads import Reloads
from .segments import Segments
from .traps import Traps
from .updown import Scripts

log = logging.getLogger(__name__)

Settler = Callable[[IkeContext, FinalState], Awaitable[int]]
"""Asks the mobile node of a context, as it is here, for our next message ID. Errors: LinkError (silent)."""
Mover = Callable[[IkeContext, FinalState, Callable[[], bool]], Awaitable[MoveReport]]
"""The exchange with the mobile node, injected by the module that knows `mobike_ext`: (context as it is
here, final message IDs, whether the mobile node's ESP arrives here) to a report. Errors: LinkError,
RefusedError."""

ESP = 50
_RECORD = "record"
"""Kind of store entry, by SA: what charon reported of it. It is not in the ledger, because each SA has one,
whether or not it ever moves."""
REKEYED = 256
"""Old names of IKE_SAs that are remembered: a transfer that was asked for before is told "busy"."""
DELETE_PATIENCE = 5.0
"""Seconds for charon to drop an SA after it was ordered to."""
END_PATIENCE = 30_000
"""Milliseconds for the mobile node to answer a Delete; charon goes on after that by itself."""
LAZY = 0.1
"""Seconds until message IDs are stored, which several messages of charon change one after the other."""
SAVE_AGAIN = 2.0
"""Seconds until a record that could not be stored is stored again."""


def _concerned(change: RecordChange) -> set[SaName]:
    """The SAs that the change is about."""
    match change:
        case Rekeying(old, new) | Rekeyed(old, new):
            return {old, new}
        case Added(sa) | Updated(sa) | Deleted(sa) | ChildAdded(sa) | ChildDeleted(sa):
            return {sa}
    return set()


class CharonHost:
    """Shared by `CharonSource` and `CharonSink`; `open` before use, `close` after."""

    def __init__(self, config: HostConfig, store: Store) -> None:
        self.config = config
        self.store = store
        self.leaving: Ledger[SourceFacts] = Ledger(store, "source")
        self.coming: Ledger[TargetFacts] = Ledger(store, "target")
        self.own: Ledger[MobileFacts] = Ledger(store, "mobile")
        self.vici = Charon(config.vici)
        self.listing = Listing(self.vici.read_sas)
        self.kernel = Kernel() if config.kernel_esp else None
        self.rewrite = Rewrite() if config.mobile_node and config.kernel_esp else None
        """The ESP of a mobile node that has moved."""
        self.mute = Mute()
        self.orphans = Orphans(self.mute, self.leaving, self.importing)
        self.doubts = Doubts(store, config.ports)
        self.detour = Detour()
        self.nat = NatRelay(config.ports)
        self.away = Away(
            store, self.kernel, self.detour, config.forward_via, announced=config.announced, nat=self.nat
        )
        self.origins = Origins(store)
        self.reloads = Reloads(self.mute, self.doubts, self.away.passing, self.spawn)
        self._events: list[KernelEvents] = []
        self.record = Record()
        self.heard = LastHeard(self.record)
        self.agents = KnownAgents(config, store)
        self.follow = Follow(self.away, self.origins, self.record, self.importing, self.end)
        self.deadlines = Deadlines(store)
        self.fresh = FreshKeys(store)
        self.traps = Traps(store, self.vici, self.away.elsewhere)
        self.scripts = Scripts(config.updown, self.detour, config.host_access, config.updown_helper)
        self.import_lock = asyncio.Lock()
        """Held while names are compared and taken, so that two imports never race for an SPI."""
        self.on_change: Callable[[RecordChange | None], None] | None = None
        """Called when the record has changed; None: charon has come, and it may have SAs that it had
        before."""
        self.ha_link = HaSocket(config.ha_local, config.ha_remote, self._hear, config.ha_port)
        self.ha_version = HaVersion()
        self._saving: asyncio.Handle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.segments = Segments(self, config.segments)
        self.rekeyed: deque[SaName] = deque(maxlen=REKEYED)
        self.known = Known(self)
        self.expected: set[SaName] = set()
        """New names of SAs that are being taken in. They may be muted before charon lists them."""
        self.charon_up = False
        self._closing = False
        self._unconfirmed = Unconfirmed(config.ha_remote, config.ha_port)

    async def open(self) -> None:
        """Bind the HA address (before charon starts), load the record, listen.

        Errors: StateError, KernelError.
        """
        for key, value in self.store.items(_RECORD):
            try:
                self.record.load([(key, value)])
            except StoreError as error:
                self.store.set_aside(f"items|{_RECORD}", key, str(error))
        self.away.load()
        self.origins.load()
        if not self.config.mobile_node:
            self._events.append(changes_of_ways(self.detour.port, self.away.look_again))
            if self.kernel is not None:
                self._events.append(flushes_of_policies(self._flushed))
        await self.ha_link.open()
        try:
            if not self.config.mobile_node:
                await asyncio.to_thread(self.mute.prepare)
        except KernelError as error:
            # every transfer will report the same again
            log.error("no SA can be moved from here or to here: %s (%s)", error, error.hint)
        try:
            if self.rewrite is not None:
                await asyncio.to_thread(self.rewrite.prepare)
        except KernelError as error:
            log.warning("after a move ESP will wait for the new gateway's answer: %s (%s)", error, error.hint)
        # a mobile node whose gateway takes its messages for old ones connects anew, so only a gateway needs
        # this
        await self.doubts.begin(() if self.config.mobile_node else self.record.names())
        if not self.config.mobile_node:
            self.reloads.watch()
        events = {"ike-update": self._moves, "ike-updown": self._up, "ike-rekey": self._up}
        self.vici.watch(self._charon_state, {} if self.config.mobile_node else events)
        self.spawn(self.traps.watch())
        if not self.config.mobile_node:
            self.spawn(self.known.watch())
        self.spawn(DueRekeys(self.deadlines, self.fresh, self._due, self.known, self._rekey).watch())

    def _flushed(self) -> None:
        log.warning("somebody removed all IPsec policies (a flush?): this agent's are back, charon's are not")
        self.away.restore()

    async def close(self) -> None:
        """Stop listening and save. SAs, freezes and policies stay as they are."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.ha_link.close()
        self.reloads.close()
        for events in self._events:
            events.close()
        self.save()
        if self._saving is not None:
            self._saving.cancel()
        await self.vici.close()
        if self.kernel is not None:
            self.kernel.close()
        if self.rewrite is not None:
            self.rewrite.close()
        self.detour.close()
        self.nat.close()
        self.doubts.close()
        if not self.config.mobile_node:
            await asyncio.to_thread(self.mute.close)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the background until it ends or the agent does."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log_failure(log, "a background task", error)

    # The HA stream.

    def _hear(self, datagram: bytes) -> None:
        if not self.charon_up and not self._unconfirmed.hears(len(datagram)):
            return
        new = self.ha_version.heard(datagram)
        if self.ha_version.problem:
            if new:
                log.error("%s: upgrade ikectx", self.ha_version.problem)
            return
        try:
            message = ha.HaMessage.parse(datagram)
        except WireError as error:
            log.warning("charon sent an HA message that cannot be parsed: %s", error)
            return
        self.heard.keep(message)
        self._fed(self.record.feed(message))

    def _fed(self, change: RecordChange) -> None:
        # the kernel notes message IDs as well, but not for a mobile node
        known = isinstance(change, MidChanged) and not self.config.mobile_node
        self.save_soon(LAZY if known else 0.0)
        match change:
            case MidChanged(name, initiator):
                self.heard.spoke(name)
                self.doubts.told(name, initiator)
                self.listing.outdate([name] if initiator else [])  # perhaps nobody answers that request
            case _:
                concerned = _concerned(change)
                self.known.heed(concerned)
                self.listing.outdate(concerned)
        if isinstance(change, Rekeyed):
            self.rekeyed.append(change.old)
            self.deadlines.renamed(change.old, change.new)
        self.follow.heed(change)
        if self.on_change is not None:
            self.on_change(change)

    def save_soon(self, wait: float = 0.0) -> None:
        """Save when all waiting datagrams have been read, because charon reports everything only once. After
        `wait` seconds, and with the next write, where it can be found out again."""
        if not wait and isinstance(self._saving, asyncio.TimerHandle):
            self._saving.cancel()
            self._saving = None
        if self._saving is None and wait:
            self._saving = asyncio.get_running_loop().call_later(wait, lambda: self.save(soon=True))
        elif self._saving is None:
            self._saving = asyncio.get_running_loop().call_soon(self.save)

    def save(self, *, soon: bool = False) -> None:
        """Save the record's changes; `soon`: with the next write. What fails is logged, and tried again."""
        if self._saving is not None:
            self._saving.cancel()
            self._saving = None
        names = set(self.record.dirty)
        try:
            for left, (key, value) in enumerate(self.record.dump(), 1 - len(names)):
                if value is None:
                    self.store.delete(_RECORD, key, soon=soon or left < 0)
                else:
                    self.store.put(_RECORD, key, value, soon=soon or left < 0)
            for name in names:
                if name not in self.record:  # deleted, moved away, or rekeyed: no other event removes them
                    parts = self.doubts.gone, self.deadlines.gone, self.listing.gone, self.known.drop
                    for forget in (self.heard.forget, *parts):
                        forget(name)
        except StoreError as error:
            log.error("the record of charon's SAs is not stored: %s", error)
            self.record.dirty |= names
            self._saving = asyncio.get_running_loop().call_later(SAVE_AGAIN, self.save)

    def _charon_state(self, up: bool) -> None:
        if self._closing:  # this agent has ended the connection, or goes on without its store
            return
        self.charon_up = up
        self.listing.forget()
        self.known.forget()
        self._unconfirmed.begin()
        if up:
            self.spawn(self._reconcile())
        else:
            log.warning("charon is not reachable over VICI at %s", self.config.vici)

    def _moves(self, told: Message) -> None:
        """charon's event `ike-update`: where the SA's mobile node is now, and the SA as it was."""
        for name, body in told.items():
            if isinstance(body, dict):
                sa = sa_view(name, body).spis
                self.follow.moves(sa, str(told.get("remote-host", "")))
                self.known.heed([sa])

    def _up(self, told: Message) -> None:
        for view in self.listing.heard(told):
            self.deadlines.note(view, steady_wall())
            self.known.heed([view.spis])  # also if HA tells nothing of it

    async def _reconcile(self) -> None:
        """After charon came (back): forget SAs that it no longer has."""
        await self._ask_version()
        self.ha_link.hear()
        mark = self.record.mark()
        views = await self.known.list_all()
        listed = {view.spis for view in views}
        gone = self.record.retain(listed, mark)
        self.save()
        await asyncio.sleep(0.001)
        self.ha_link.hear()  # SAs that came up just now have been reported by now
        self.doubts.keep(listed)
        if not self.config.mobile_node:
            await self.orphans.sweep(listed)
        for sa in self.record.names():
            with contextlib.suppress(UnknownSaError, RefusedError, CharonError):
                await self.catch_up(sa)
        self.follow.look(views)
        if self.on_change is not None:
            self.on_change(None)
        unknown = [view for view in views if view.state == "ESTABLISHED" and not self.knows(view)]
        counts = len(self.record.names()), len(gone)
        log.info("charon %s: %d IKE_SAs known, %d forgotten", self.ha_version.charon, *counts)
        if unknown:
            log.warning(
                "%d IKE_SAs, or CHILD_SAs of them, came up while no agent ran: these cannot be moved; "
                "`ikectx resync` learns them (charon then rekeys their CHILD_SAs)",
                len(unknown),
            )

    def importing(self, sa: SaName) -> bool:
        """Whether that SA is being taken in: it may be muted before charon lists it."""
        row = self.coming.get(sa)
        return sa in self.expected or (row is not None and row.facts.stage in ("installing", "active"))

    @trace.spanned("catch up with charon")
    async def catch_up(self, sa: SaName) -> None:
        """Read what charon has reported, and add message IDs to the record that it reported to no agent.

        If those cannot be known, charon's HA messages are the only source. Errors: UnknownSaError if some of
        them may be missing.
        """
        self.ha_link.hear()
        if sa not in self.record:
            return
        self.doubts.check(sa)
        known, ike = self.record.context(sa), IkeId.of(self.record.context(sa).current)
        after = self.doubts.after(sa)
        version = await self.version()
        for initiator, mid, noted in zip(
            (True, False), (known.mid_initiator, known.mid_responder), after, strict=True
        ):
            if noted > mid:
                log.info("%s: message ID %d was not heard of", known.remote_id, noted - 1)
                self._fed(self.record.feed(ha.ike_mid(version, ike, initiator=initiator, mid=noted)))

    async def _ask_version(self) -> None:
        answer = await self.vici.version()
        self.ha_version.told(str(answer.get("version", "")))

    async def version(self) -> int:
        """The HA wire version, see `HaVersion`. Errors: CharonError, also for one that is not known here."""
        if self.ha_version.number is None:
            await self._ask_version()
        self.ha_version.check()
        assert self.ha_version.number is not None
        return self.ha_version.number

    async def send(self, messages: Iterable[ha.HaMessage]) -> None:
        """Orders to charon, in order, paced. What was seen of their SAs will not do any more. Errors:
        CharonError."""
        orders = list(messages)
        await self.ha_link.send([message.serialize(self.config.ha_buflen) for message in orders])
        names = {message.find(ha.Attr.IKE_ID, IkeId) for message in orders}
        self.listing.outdate(name.spis for name in names if name is not None)

    async def carried_out(self) -> None:
        """Wait until charon has carried out all orders but the last one. Errors: CharonError."""
        await self.ha_link.read()

    def hear(self) -> int:
        """Take what charon has reported by now. Returns how many of its reports were lost."""
        return self.ha_link.hear()

    def listening(self) -> bool:
        """Whether charon's end of the HA link exists."""
        return self.ha_link.listening()

    def context(self, sa: SaName) -> IkeContext:
        """The record's context, or that of an SA charon is destroying. Errors: as `Record.context`."""
        return self.heard.context(sa)

    # Views.

    async def views(self) -> list[SaView]:
        """All IKEv2 SAs of charon. Errors: CharonError, WireError."""
        views = await self.listing.views()
        self._look_for_marks(views)
        return views

    def _look_for_marks(self, views: Iterable[SaView]) -> None:
        if self.kernel is not None and not self.kernel.marked:
            self.kernel.marked = any(child.tags is not NO_TAGS for view in views for child in view.children)

    def knows(self, view: SaView) -> bool:
        """Whether the record has all keys of the IKE_SA and its CHILD_SAs, and no doubtful message IDs."""
        return not isinstance(self.obstacle(view), UnknownSaError)

    def obstacle(self, view: SaView, listed: Iterable[SaView] = ()) -> IkectxError | None:
        """Why that SA cannot be moved, as far as this gateway can tell; None: it can. `listed`: all SAs that
        may have the same mobile node and selectors."""
        try:
            self.ha_version.check()
            self.orphans.check(view.spis)
            check_kind(view)
            if not self.config.mobile_node:
                check_ports(view, self.config.ports)
            context = self.record.context(view.spis)
            if not self.config.mobile_node:
                check_context(context)
                alike = self.record.alike(view.spis)
                check_alone(view, [one for one in listed if one.spis in alike] if alike else ())
            self.doubts.check(view.spis)
            check_told(view, context)
        except (CharonError, RefusedError, UnknownSaError) as error:
            return error
        return None

    async def alike(self, sa: SaName) -> list[SaView]:
        """Other IKE_SAs of charon that may have the same mobile node and selectors."""
        names = self.record.alike(sa) if sa in self.record else []
        return [view for name in names if (view := await self.view(name)) is not None]

    def marked(self) -> bool:
        """Whether any SA has a mark or an if_id."""
        return self.kernel is not None and self.kernel.marked

    async def view(self, sa: SaName, *, search: bool = True) -> SaView | None:
        """One of charon's SAs by its SPIs; `search`: also among all, if its unique ID is not known."""
        view = await self.listing.view(sa, search=search)
        if view is not None:
            self._look_for_marks([view])
        return view

    async def connections(self, names: Collection[str] | None = None) -> Mapping[str, Message]:
        """charon's loaded connections by name: these, or all."""
        return await self.vici.connections(names)

    def kernel_pair(
        self, context: IkeContext, child: ChildContext
    ) -> tuple[KernelSa | None, KernelSa | None]:
        """(inbound, outbound) ESP SA of a child in the kernel, None where it is not there."""
        if self.kernel is None:
            return (None, None)
        names = ((context.local.address, child.spi_in), (context.remote.address, child.spi_out))
        inbound, outbound = self.kernel.get_sas(names)
        return inbound, outbound

    # Things both sides do.

    async def updown(
        self, context: IkeContext, *, up: bool, reqids: dict[bytes, int], unique_id: int
    ) -> None:
        """Run the connection's updown script, if one is configured. Errors: KernelError if it cannot be
        started."""
        await self.scripts.run(context, up=up, reqids=reqids, unique_id=unique_id)

    @trace.spanned("delete in charon")
    async def delete(self, context: IkeContext, late: LatePackets | None = None) -> None:
        """Make charon drop the IKE_SA silently, wait until it has gone, and restore what `late` has. The
        caller's step writes that the record has forgotten it. Errors: CharonError."""
        await self.send(undo_messages(context, await self.version()))
        await self.put_back(late)
        end, pause = asyncio.get_running_loop().time() + DELETE_PATIENCE, 0.001
        await asyncio.sleep(pause)  # charon takes at least as long
        while await self.view(context.spis) is not None:
            if asyncio.get_running_loop().time() > end:
                raise CharonError(
                    f"charon still lists the IKE_SA {context.connection} after it was told to drop it",
                    hint="see charon's log; `swanctl --terminate` would tell the MN",
                )
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        self.record.forget(context.spis)
        self.known.drop(context.spis)
        self.segments.gone(context.spis)
        self.save(soon=True)

    def end(self, sa: SaName) -> None:
        """Make charon delete an SA that it serves, and tell the mobile node. Raises nothing."""
        self.spawn(self._end(sa))

    async def _end(self, sa: SaName) -> None:
        try:
            view = await self.view(sa)
            if view is not None:
                log.warning(
                    "%s: ended at the gateway that gave its SA, while that left: deleted here", view.name
                )
                await self.vici.terminate(view.unique_id, END_PATIENCE)
        except (CharonError, WireError) as error:
            log.error("an SA that was ended at the gateway that gave it is not deleted here: %s", error)

    def late_packets(self, context: IkeContext, children: Sequence[ChildContext]) -> LatePackets | None:
        """The inbound SAs that `put_back` is to restore for `HostConfig.late` seconds, as they are now; None:
        there are none. Errors: KernelError."""
        if self.kernel is None or not children:
            return None
        inbound = [self.kernel_pair(context, child)[0] for child in children]
        snapshot = self.kernel.snapshot_inbound([sa for sa in inbound if sa is not None])
        going = [(context.local.address, child.spi_in) for child in children]
        going += [(context.remote.address, child.spi_out) for child in children]
        return LatePackets(snapshot, tuple(going), self.config.late)

    async def put_back(self, late: LatePackets | None) -> None:
        """After charon was told to remove SAs: restore what `late` has, as soon as they have gone. A failure
        is only logged."""
        if late is None or self.kernel is None:
            return
        end = asyncio.get_running_loop().time() + DELETE_PATIENCE
        # charon removes a child's policies first and its outbound SA last
        while any(self.kernel.get_sa(*name, ESP) is not None for name in late.going):
            if asyncio.get_running_loop().time() > end:
                return
            await asyncio.sleep(0.0005)
        try:
            self.kernel.restore_inbound(late.inbound, late.seconds)
        except KernelError as error:
            log.warning("packets that come late will not be decrypted: %s", error)

    def address_for(self, context: IkeContext) -> Address:
        """Our outer address for this mobile node: the SA's own if this host has it, else the first of its
        family."""
        if context.local.address in self.config.addresses:
            return context.local.address
        for address in self.config.addresses:
            if address.version == context.remote.address.version:
                return address
        raise NoAddressError(context.remote.address.version)

    async def half_open(self) -> int:
        """SAs that charon is setting up. Errors: CharonError, WireError."""
        return await self.vici.half_open()

    async def resync(self) -> None:
        """Make charon report its IKE_SAs again; it rekeys all CHILD_SAs of its segments, too."""
        segments = range(1, max(self.config.segments, 1) + 1)
        await self.send([ha.resync(await self.version(), segments)])

    async def _due(self, sa: SaName) -> SaView | None:
        """An SA that is to be rekeyed; one that has gone is not searched among all."""
        return await self.view(sa, search=sa in self.record)

    async def _rekey(self, ike_id: int | None, child_id: int | None) -> None:
        await self.vici.rekey(ike_id=ike_id, child_id=child_id)
