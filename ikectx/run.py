"""Common parts of both ends of a transfer: the ports of a gateway, its journal, steps with a time limit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from enum import StrEnum
from typing import Any, Generic, TypeVar

from . import trace
from .errors import IkectxError, StateError, StoreError
from .machine import Machine
from .mistakes import log_mistake
from .numbers import Status
from .ports import Clock, ContextSink, ContextSource
from .report import TransferEvent, TransferReport
from .store import JournalEntry, SqliteStore
from .transfer import Timing

log = logging.getLogger("ikectx.transfer")

_T = TypeVar("_T")
_State = TypeVar("_State", bound=StrEnum)
_Input = TypeVar("_Input", bound=StrEnum)
_Action = TypeVar("_Action", bound=StrEnum)

Observer = Callable[[TransferEvent], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """The ports and settings that all transfers of one gateway use.

    `wall`: seconds since 1970, for the journal only. `durable`: see `Gateway`.
    """

    name: str
    source: ContextSource
    sink: ContextSink
    store: SqliteStore
    timing: Timing
    clock: Clock
    wall: Callable[[], float]
    oseq_jump: int
    durable: bool
    observer: Observer | None = None


async def step(what: str, work: Awaitable[_T], timing: Timing) -> _T:
    """Await one call of a port. Errors: any IkectxError of the port; StateError if it takes too long."""
    try:
        with trace.span(what):
            async with asyncio.timeout(timing.step):
                return await work
    except IkectxError:
        raise
    except TimeoutError:
        raise StateError(f"{what} did not end within {timing.step:g} s") from None
    except Exception as error:
        log_mistake(log, what, error)
        raise StateError(f"{what} failed with a {type(error).__name__}, see the log") from None


class Turn:
    """The right of one transfer to a lock, which it may give to others while it waits for its mobile node.

    `async with` takes the lock, and releases it at the end if it is held. This class remembers the owner,
    because an `asyncio.Lock` has none: a transfer that was cancelled while it took the lock anew would
    release another's.
    """

    def __init__(self, lock: asyncio.Lock) -> None:
        self._lock = lock
        self._held = False

    async def take(self) -> None:
        """Wait for the lock."""
        await self._lock.acquire()
        self._held = True

    def give(self) -> None:
        """Release the lock; does nothing if it is not held."""
        if self._held:
            self._held = False
            self._lock.release()

    async def __aenter__(self) -> None:
        await self.take()

    async def __aexit__(self, *_: object) -> None:
        self.give()


class Tasks:
    """The background tasks of one gateway."""

    def __init__(self, parts: Parts) -> None:
        self.running: set[asyncio.Task[None]] = set()
        self.stopped = True
        self._store = parts.store
        self._wall = parts.wall

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run `work`; if it ends with an error, the error is logged."""
        task = asyncio.create_task(work, name=name)
        self.running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, IkectxError):
                log.error("%s: %s", task.get_name(), error)
            else:
                log_mistake(log, task.get_name(), error)

    def tidy(self) -> None:
        """Prune the journal and checkpoint its write-ahead log; called between transfers."""
        if self._store.wants_checkpoint and not self.stopped:
            self.spawn(asyncio.to_thread(self._store.checkpoint, self._wall()), "ikectx checkpoint")

    async def stop(self, seconds: float) -> None:
        """Wait so long for the tasks to end, then cancel them."""
        if self.running:
            await asyncio.wait(self.running, timeout=seconds)
        for task in list(self.running):
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)


class Run(Generic[_State, _Input, _Action]):
    """Runs one table. Each new state is written to the journal before its actions are executed.

    `durable`: see `transfer`. `results`: the final states, and the journal's word for each. `instead`: the
    input to feed if a state may not be entered because it cannot be journaled.
    """

    reports = False
    """True if it reports its end itself."""

    def __init__(
        self,
        parts: Parts,
        machine: Machine[_State, _Input, _Action],
        entry: JournalEntry | None,
        observer: Observer | None = None,
        *,
        durable: frozenset[_State],
        results: Mapping[_State, str],
        instead: Mapping[_State, _Input],
    ) -> None:
        self.parts = parts
        self.machine = machine
        self.entry = entry
        self.error: IkectxError | None = None
        """Why it does not go on as it should; the first reason stays."""
        self._began = parts.clock.now()
        self._observers = [each for each in (parts.observer, observer) if each is not None]
        self.on_disk = machine.state
        """The state that the journal has."""
        self._durable = durable
        self._results = results
        self._instead = instead

    @property
    def ended(self) -> bool:
        return self.machine.state in self._results

    @property
    def stored(self) -> JournalEntry:
        """The journal's entry. Errors: StateError before there is one."""
        if self.entry is None:
            raise StateError("the transfer has no journal yet")
        return self.entry

    @property
    def status(self) -> Status:
        return Status.OK if self.error is None else self.error.status

    def blame(self, error: IkectxError) -> None:
        """Remember the reason, unless one is known already."""
        if self.error is None:
            self.error = error

    def phases(self) -> dict[str, float]:
        """Milliseconds by phase, for journal and report."""
        return self.machine.phases(self.parts.clock.now())

    def must(self, state: _State) -> bool:
        """True if this state may not be entered before the journal has it."""
        return False

    async def advance(self, what: _Input) -> tuple[_Action, ...]:
        """Journal the state that `what` leads to, enter it, and return its actions.

        If the journal cannot be written: a transition that lets go or takes is replaced by `instead`; a state
        for which `must` is true waits for the journal; any other is entered, because the next start would
        take the same way.
        """
        tries = 0
        while True:
            state = self.machine.peek(what)
            try:
                self._write(state)
            except StoreError as error:
                if state in self._instead:
                    self.blame(error)
                    what = self._instead[state]
                    continue
                if self.must(state):
                    await self.again(tries, f"journaling {state}", error)
                    tries += 1
                    continue
                log.error("transfer goes on without its journal: %s", error)
            before = self.machine.state
            actions = self.machine.feed(what, self.parts.clock.now())
            if self.machine.state != before and not (self.ended and self.reports):
                self.tell()
            return actions

    @trace.spanned("journal", "call")
    def _write(self, state: _State) -> None:
        if self.entry is None or state == self.on_disk:
            return
        over = state in self._results
        entry = changed(
            self.entry,
            state=str(state),
            updated=self.parts.wall(),
            detail=self.detail(),
            status=self.status,
            result=self._results.get(state, ""),
            phases=self.phases(),
            # a transfer that is over needs no keys any more
            context=None if over else self.entry.context,
            final=None if over else self.entry.final,
        )
        self.parts.store.write(entry, durable=self.parts.durable and state in self._durable)
        self.entry = entry
        self.on_disk = state

    def detail(self) -> str:
        """The error's text for the journal. It holds no secrets, because no error does."""
        return "" if self.error is None else str(self.error)

    def tell(self, report: TransferReport | None = None) -> None:
        """Tell the observers where the transfer is; not at once, because the next message must not wait for
        them."""
        entry = self.entry
        if entry is None:
            return
        event = TransferEvent(
            transfer_id=entry.transfer_id.hex(),
            role=entry.role,
            peer=entry.peer,
            sa=entry.sa,
            mn=entry.mn,
            state=str(self.machine.state),
            ms=round((self.parts.clock.now() - self._began) * 1000, 3),
            detail=self.detail(),
            report=report,
        )
        if self._observers:
            asyncio.get_running_loop().call_soon(self._notify, event)

    def _notify(self, event: TransferEvent) -> None:
        for observer in self._observers:
            try:
                observer(event)
            except Exception as error:
                log_mistake(log, "an observer of transfers", error)

    async def again(self, tries: int, what: str, error: IkectxError) -> None:
        """Log that `what` failed, and wait before the next try."""
        wait = self.parts.timing.wait(tries)
        ident = self.entry.transfer_id.hex() if self.entry else "?"
        log.error("transfer %s: %s failed, again in %g s: %s", ident, what, wait, error)
        await asyncio.sleep(wait)
