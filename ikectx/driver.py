"""Carries out what the engine gives out, and tells it how that ended (I/O).

The driver owns the clock, the store, the links and the calls of source and sink. It decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from ikectx.disk import syncs
from ikectx.disk.store import SqliteStore
from ikectx.engine.core import Engine, Moment, Wanted
from ikectx.engine.effects import (
    Activate,
    Check,
    Choose,
    Delete,
    Divert,
    Epochs,
    Export,
    Find,
    FindEpochs,
    FindLatest,
    FindTransfer,
    Freeze,
    Get,
    GetReady,
    Hear,
    Invite,
    Invites,
    Items,
    Move,
    NewNames,
    NotComing,
    OwnedFrom,
    Prepare,
    Prepared,
    Put,
    Recorded,
    Release,
    Settle,
    Stands,
    Stay,
    Step,
    StillHere,
    Take,
    Thaw,
    Undo,
)
from ikectx.engine.outputs import (
    Answer,
    Close,
    Connect,
    Effect,
    Handled,
    Journal,
    Output,
    Report,
    Send,
    Settled,
)
from ikectx.engine.ports import ContextSink, ContextSource
from ikectx.engine.report import TransferEvent
from ikectx.engine.tables import SourceState, TargetState
from ikectx.net.links import Dial, Link, Links
from ikectx.wire.cxtp import Ctc, Ctd, Message, Pctd
from ikectx.wire.whereabouts import Whereabouts

from . import trace
from .clock import Clock, MonotonicClock
from .errors import IkectxError, LinkError, StateError, StoreError
from .mistakes import log_failure, log_mistake
from .timing import Timing
from .together import Gather, Together
from .within import within

log = logging.getLogger("ikectx.transfer")

Observer = Callable[[TransferEvent], None]
ERASE_AFTER = 5.0
"""Seconds after the end of a transfer until the store's log is emptied, in which its keys still are, sealed.
By then charon has told that the SA is gone, so that the record has forgotten it."""

ON_DISK = 0.2
"""Seconds that an SA which is prepared waits for the disk: a mobile node may wait as well."""
SYNC_OWNED = 0.1
"""Seconds from a write until the log is synced where an SA is taken over; at once where it is let go,
otherwise as any other write. Only an SA that is prepared waits for it (`_on_disk`)."""

GATHER = 0.03
"""Seconds that an SA that was prepared waits for others that are being prepared, so that they are frozen and
taken together, which is less work for each. The old gateway serves it meanwhile."""

HearOf = Callable[[str, Whereabouts], None]
"""Takes in what the peer of that name says. Errors: IkectxError, when it is to be told again."""

_SYNC_WITHIN: Mapping[str, float] = {
    SourceState.RELEASED: 0.0,
    TargetState.OWNING: SYNC_OWNED,
    TargetState.OWNED: SYNC_OWNED,
}
"""By the journal's state; the sync begins before the other gateway hears of it."""

_AT_ONCE = frozenset(
    {
        *(Recorded, Invites, Stay, NewNames, NotComing, Hear),
        *(FindTransfer, FindEpochs, FindLatest, OwnedFrom, Put, Get, Delete, Items),
    }
)
"""Steps that wait for nobody."""


@dataclass(frozen=True, slots=True)
class GatewayHooks:
    """What a gateway uses of the process that it runs in, and what it calls there.

    `observer` is called at every change of state of every transfer. `hear` is called with the whereabouts of
    SAs that went to a peer, whenever that peer reports them (see `whereabouts`).

    `dial` replaces TLS (other transports, tests); the other side then gives its streams to `Gateway.accept`.

    `clock`: seconds that only go forward. `wall`: seconds since 1970.
    """

    observer: Observer | None = None
    hear: HearOf | None = None
    dial: Dial | None = None
    clock: Clock = field(default_factory=MonotonicClock)
    wall: Callable[[], float] = time.time


class Driver:
    """Drives one engine."""

    def __init__(
        self,
        engine: Engine,
        source: ContextSource,
        sink: ContextSink,
        store: SqliteStore,
        hooks: GatewayHooks,
    ) -> None:
        self.engine = engine
        self.running: set[asyncio.Task[None]] = set()
        """Effects under way."""
        self.links: Links | None = None
        """None: the gateway is not started."""
        self.hear = hooks.hear
        self._source = source
        self._sink = sink
        self._store = store
        self._clock = hooks.clock
        self._wall = hooks.wall
        self._observer = hooks.observer
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._progress: dict[int, Observer] = {}
        self._open: dict[int, Link] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due: float | None = None
        self._outcomes: list[tuple[int, object]] = []
        """How effects ended in this round of the event loop."""
        self._preparing = Gather(GATHER, self._all_done)
        """How SAs were prepared that the old gateway serves meanwhile."""
        self._goes_on = False
        """Whether the engine will be told soon, and what it gives out carried out."""
        self._events: list[tuple[Observer, TransferEvent]] = []
        """What observers are told when all else is carried out."""
        self._writes: list[Journal] = []
        """What is to be written as soon as nothing else is to be carried out."""
        self._pumping = self._sent = False
        """`_sent`: whether a message left in this round of `pump`."""
        self._closed = self._ended = False
        self._erasing: asyncio.TimerHandle | None = None
        self._syncs = syncs.Syncs(store)
        self._safely: Together[bool, bool] = Together(self._on_disk)
        self._quiet = asyncio.Event()

    @property
    def _timing(self) -> Timing:
        return self.engine.config.policy.timing

    def now(self) -> Moment:
        """The time, for the engine."""
        return Moment(self._clock.now(), self._wall())

    # -- life --------------------------------------------------------------------------------------------

    def connect(self, dial: Dial) -> Links:
        """From now on there are links, dialled by this."""
        self.links = Links(dial, self._timing, self._arrived, self._opened, self._unused)
        self._erase_later()  # what an agent left that was killed
        return self.links

    async def stop(self) -> None:
        """Cancel what has not been let go, wait a little, and close."""
        self.engine.stop(self.now())
        self.pump()
        try:
            async with asyncio.timeout(self._timing.stop):
                while not (self.engine.idle and not self.running):
                    self._quiet.clear()
                    await self._quiet.wait()
        except TimeoutError:
            log.info("the gateway stops, what is open stays in the journal")
        for ticket, report in self.engine.reports().items():
            self._settle(ticket, report)
        self.close()
        await asyncio.gather(*self.running, return_exceptions=True)
        links, self.links = self.links, None
        if links is not None:
            await links.close()

    def close(self) -> None:
        """Carry out nothing any more, and end what is under way: as if the process had ended."""
        self._closed = True
        for timer in (self._timer, self._erasing):
            if timer is not None:
                timer.cancel()
        self._syncs.close()
        self._preparing.close()
        for task in self.running:
            task.cancel()
        for ticket in list(self._waiting):
            self._settle(ticket, StateError("the gateway has ended"))

    # -- requests ----------------------------------------------------------------------------------------

    def begin(self, what: Wanted, progress: Observer | None = None) -> tuple[int, asyncio.Future[Any]]:
        """Request this: its ticket, and a future of how it ends."""
        ticket = self.engine.request(self.now(), what)
        future = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        if progress is not None:
            self._progress[ticket] = progress
        self.pump()
        return ticket, future

    async def ask(self, what: Wanted, progress: Observer | None = None) -> Any:
        """Request this, and wait for how it ends. Who does not wait any longer abandons it."""
        ticket, future = self.begin(what, progress)
        try:
            return await future
        except asyncio.CancelledError:
            if not self._closed:
                self.engine.abandon(self.now(), ticket)
                self.pump()
            raise

    # -- the pump ----------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Carry out all that there is."""
        if self._pumping or self._closed:
            return
        self._pumping = True
        waited = bool(self._writes)  # for a round, in which messages left: not for another one
        try:
            while not self._closed:
                output = self.engine.next_output()
                if output is not None:
                    self._carry_out(output)
                elif self._writes and (waited or not self._sent):
                    self._write()
                else:
                    break
        finally:
            self._pumping = self._sent = False
        if self._events:
            self._notify()
        if self._writes:  # messages leave first, since a disk takes longer
            self._go_on_soon()
        self._arm()
        if self.engine.idle:
            self._quiet.set()
        if self._ended:
            self._ended = False
            self._tidy()

    def _arm(self) -> None:
        """A timer that is too early by now stays, and is set anew when it ends, because most waiting ends
        before its time."""
        due = self.engine.next_timer()
        if due is None or (self._due is not None and self._due <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        left = max(0.0, due - self._clock.now())
        self._timer = asyncio.get_running_loop().call_later(left, self._time)

    def _time(self) -> None:
        self._timer = self._due = None
        self.engine.handle_timer(self.now())
        self.pump()

    def _carry_out(self, output: Output) -> None:
        match output:
            case Send(number, message, octets):
                self._send(number, message, octets)
            case Close(number, reason):
                if (link := self._open.get(number)) is not None:
                    link.close(reason)
            case Handled(number):
                if (link := self._open.get(number)) is not None:
                    link.handled()
            case Connect(effect, peer):
                self._connect(Connect(effect, peer))
            case Journal(_, entry, _, True):
                self._store.write(entry, soon=True)
            case Journal():
                self._writes.append(output)
            case Effect(effect, step) if type(step) in _AT_ONCE:
                try:
                    outcome = self._at_once(step)
                except Exception as error:
                    outcome = error
                self.engine.effect_done(self.now(), effect, outcome)
            case Effect():
                gathers = isinstance(output.step, Prepare) and output.step.served
                if gathers:
                    self._preparing.begin()
                name = f"ikectx {output.step.NAME}"
                self.running.add(asyncio.create_task(self._effect(output, gathers), name=name))
            case Report(event, ticket):
                self._tell(event, ticket)
            case Answer(ticket, outcome) | Settled(ticket, outcome):
                self._settle(ticket, outcome)

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=f"ikectx {name}")
        self.running.add(task)
        task.add_done_callback(self._gone)

    def _gone(self, task: asyncio.Task[None]) -> None:
        self.running.discard(task)
        self._quiet.set()
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            log_failure(log, task.get_name(), error)

    def _settle(self, ticket: int, outcome: object) -> None:
        self._progress.pop(ticket, None)
        future = self._waiting.pop(ticket, None)
        if future is None or future.done():
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _tell(self, event: TransferEvent, ticket: int) -> None:
        observers = (self._observer, self._progress.get(ticket))
        self._events += [(each, event) for each in observers if each is not None]

    def _notify(self) -> None:
        events, self._events = self._events, []
        for observer, event in events:
            try:
                observer(event)
            except Exception as error:
                log_mistake(log, "an observer of transfers", error)

    # -- effects -----------------------------------------------------------------------------------------

    def _done(self, effect: int, outcome: object) -> None:
        """Tell the engine: what ends or arrives in one round of the event loop is gone on with at once, so
        that SAs that move together stay together. What ends alone waits for nothing."""
        self._all_done([(effect, outcome)])

    def _all_done(self, outcomes: Sequence[tuple[int, object]]) -> None:
        self._outcomes += outcomes
        if self.running:
            self._go_on_soon()
        else:
            self._go_on()

    def _go_on_soon(self) -> None:
        if not self._goes_on:
            self._goes_on = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._goes_on = False
        outcomes, self._outcomes = self._outcomes, []
        if not self._closed:
            for effect, outcome in outcomes:
                self.engine.effect_done(self.now(), effect, outcome)
            self.pump()

    def _write(self) -> None:
        """Write what several transfers want in the journal, in one transaction."""
        writes, self._writes = self._writes, []
        with trace.about(writes[0].entry.transfer_id), trace.span("journal", "call"):
            outcomes = self._written(writes)
        self._syncs.within(min(_SYNC_WITHIN.get(output.entry.state, syncs.REST) for output in writes))
        for output, outcome in zip(writes, outcomes, strict=True):
            self._ended = self._ended or bool(output.entry.result)
            self.engine.effect_done(self.now(), output.effect, outcome)

    def _written(self, writes: Sequence[Journal]) -> Sequence[object]:
        """The outcome of each. If all together fail, each is written alone, because only one may be bad."""
        durable = any(output.durable for output in writes)
        try:
            self._store.write(*(output.entry for output in writes), durable=durable)
        except Exception as error:
            if len(writes) == 1:
                return [error]
            return [outcome for output in writes for outcome in self._written([output])]
        return [None] * len(writes)

    async def _on_disk(self, prepared: Sequence[bool]) -> Sequence[bool]:
        """The other gateway sends packets on to an SA that is prepared here. What blocks them, if this one
        loses its power and with it the SA, is on the disk before, unless that takes longer than `ON_DISK`."""
        with suppress(StoreError, TimeoutError):  # a full disk fails what follows, which undoes the SA
            self._store.write(durable=False)
            await within(ON_DISK, self._syncs.now())
        return prepared

    def _tidy(self) -> None:
        """Between transfers, the journal's log goes into its database."""
        if self._store.wants_checkpoint:
            self._spawn(asyncio.to_thread(self._store.checkpoint, self._wall()), "checkpoint")
        self._erase_later()

    def _erase_later(self) -> None:
        if self._erasing is None:
            self._erasing = asyncio.get_running_loop().call_later(ERASE_AFTER, self._erase)

    def _erase(self) -> None:
        """Leave nothing on the disk of what was deleted. While a transfer is open that would hold it up."""
        self._erasing = None
        if self.engine.idle:
            self._spawn(asyncio.to_thread(self._store.erase), "erase")
        else:
            self._erase_later()

    async def _effect(self, output: Effect, gathers: bool) -> None:
        """One call of a port: its outcome, an IkectxError whatever it raised, or when it takes too long."""
        outcome: object
        name = output.step.NAME
        try:
            with trace.about(output.of), trace.span(name):
                outcome = await within(self._timing.step, self._perform(output.step))
        except IkectxError as error:
            outcome = error
        except TimeoutError:
            outcome = StateError(f"{name} did not end within {self._timing.step:g} s")
        except Exception as error:
            log_mistake(log, name, error)
            outcome = StateError(f"{name} failed with a {type(error).__name__}, see the log")
        self.running.discard(cast(asyncio.Task[None], asyncio.current_task()))
        self._quiet.set()
        if gathers:
            self._preparing.end((output.effect, outcome))
        else:
            self._done(output.effect, outcome)

    async def _perform(self, step: Step) -> object:
        source, sink = self._source, self._sink
        match step:
            case Find(mn):
                return tuple(await source.find(mn))
            case Export(sa, away):
                return await source.export(sa, away=away)
            case Divert(context, to):
                await source.divert(context, to)
            case Invite(sa, to):
                await source.invite(sa, to)
            case Choose(context, to, address):
                return await source.choose(context, to, address)
            case Freeze(context, to, away, sending, renaming, unannounced, relay, held):
                if unannounced or held:
                    source.hands_over(context.spis, held=held)
                more = {} if relay is None else {"relay": relay}
                return await source.freeze(context, to, away=away, sending=sending, renaming=renaming, **more)
            case Thaw(context, jump, untouched):
                if untouched:
                    source.not_taken(context.spis)
                await source.thaw(context, jump)
            case Stands(sa, let_go):
                return await source.stands(sa, let_go)
            case Release(context):
                await source.release(context)
            case Check(context, keep, answers, relayed_by):
                sink.relayed(context, relayed_by)
                if answers is not None:
                    sink.tell_later(context, answers)
                return tuple(await sink.check(context, keep))
            case StillHere(final, mn, who):
                return await sink.still_here(final, mn, who)
            case GetReady(context, keep, leaving):
                holds = await sink.ready(context, keep, leaving=leaving)
                return holds and await self._safely.join(True)
            case Prepare(context, keep, answers, relayed_by, _, shown):
                sink.tell_later(context, answers)
                sink.relayed(context, relayed_by)
                sink.shown(context, shown)
                await sink.prepare(context, keep)
                await self._safely.join(True)
                heard_at = sink.heard_at(context) if relayed_by else None
                return Prepared(sink.renames(context), sink.cannot_send(context), heard_at)
            case Take(context, final, given_by):
                sink.came_from(context, given_by)
                await sink.take(context, final)
            case Settle(context, final):
                return await sink.settle(context, final)
            case Move(context, final, always):
                if not always and not sink.must_tell(context):
                    return None
                return await sink.move_peer(context, final)
            case Activate(context, final, report):
                await sink.activate(context, final, report)
            case Undo(context):
                await sink.undo(context)
        return None

    def _at_once(self, step: Step) -> object:
        store = self._store
        match step:
            case Recorded(sa):
                return self._source.recorded(sa)
            case Invites(sa, address):
                return self._source.invites(sa, address)
            case Stay(sa):
                self._source.stays(sa)
            case NewNames(context):
                return tuple(self._sink.new_names(context))
            case NotComing(context):
                self._sink.not_coming(context)
            case Hear(peer, news):
                if self.hear is not None:
                    self.hear(peer, news)
            case FindTransfer(role, transfer_id):
                return store.find(role, transfer_id)
            case FindEpochs(sa):
                return Epochs(*store.epochs(sa))
            case FindLatest(sa):
                return store.latest(sa)
            case OwnedFrom(peer, mn_address):
                return store.owned_from(peer, mn_address)
            case Put(kind, key, value):
                store.put(kind, key, value)
            case Get(kind, key):
                return store.get(kind, key)
            case Delete(kind, key):
                store.delete(kind, key)
            case Items(kind):
                return store.items(kind)
        return None

    # -- links -------------------------------------------------------------------------------------------

    def _connect(self, output: Connect) -> None:
        link = None if self.links is None else self.links.find(output.peer.name)
        if link is not None:
            self.engine.effect_done(self.now(), output.effect, link.number)
        else:
            self._spawn(self._dial(output), f"connects to {output.peer.name}")

    async def _dial(self, output: Connect) -> None:
        outcome: object
        try:
            if self.links is None:
                raise LinkError("the gateway does not run")
            outcome = (await self.links.get(output.peer)).number
        except IkectxError as error:
            outcome = error
        self._done(output.effect, outcome)

    def _send(self, number: int, message: Message, octets: bytes) -> None:
        link = self._open.get(number)
        if link is not None and link.error is None:
            link.send(message, octets)
            self._sent = True

    def _opened(self, link: Link, accepted: bool) -> None:
        self._open[link.number] = link
        link.gone = self._lost
        self.engine.link_up(self.now(), link.number, link.peer, link.where, accepted=accepted)
        self.pump()

    def _unused(self, peer: str) -> float:
        return self.engine.unused(self.now(), peer)

    def _lost(self, link: Link) -> None:
        self._open.pop(link.number, None)
        if link.error is not None and not self._closed:
            self.engine.link_lost(self.now(), link.number, link.error)
            self.pump()

    async def _arrived(self, link: Link, message: Message) -> None:
        if isinstance(message, Pctd | Ctd | Ctc):
            await link.room()
        if not self._closed:
            self.engine.receive(self.now(), link.number, message)
            self._go_on_soon()
