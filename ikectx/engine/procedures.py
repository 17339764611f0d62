"""Procedures: what the engine does step after step, written as generators, and what each of them waits for.

A procedure yields what it waits for, and is resumed with it: a `Step` (with the outcome that was reported),
`Event` (with the next event that others posted to it), `Opened` (with True), `Turn` (with None). Where a time
limit comes first, it is resumed with None or False. So a procedure reads from top to bottom, and nothing in
here waits: a `Scheduler` holds those that wait, and goes on with one when something happened.

One thing at a time runs, and only at a `yield` can another go on.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ikectx.errors import IkectxError, LinkError
from ikectx.mistakes import log_mistake

from .effects import OpenLink, Step, Write
from .outputs import Connect, Effect, Journal, Output

log = logging.getLogger("ikectx.transfer")

_T = TypeVar("_T")


class Cancelled(BaseException):
    """Raised in a procedure that nobody wants any more. It is no error, so that no procedure handles it."""


class Gate:
    """Something that happens once, and that procedures can wait for."""

    __slots__ = ("open", "waiting")

    def __init__(self) -> None:
        self.open = False
        self.waiting: list[Process] = []


@dataclass(frozen=True, slots=True)
class Do:
    """Have a step done that is for the transfer `of`."""

    step: Step
    of: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """The next event in the procedure's mailbox; None: there was none until that time."""

    until: float | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """The gate is open; False: it was not until that time."""

    gate: Gate
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """That time has come."""

    until: float


@dataclass(frozen=True, slots=True)
class Turn:
    """It is the procedure's turn for `key`, until it calls `Scheduler.leave`; True then.

    False: it was not until that time, or, if it `heeds` its mailbox, an event came.
    """

    key: Hashable
    until: float | None = None
    heeds: bool = False


Wish = Step | Do | Event | Opened | Pause | Turn
Steps = Generator[Wish, Any, _T]
"""A procedure whose result is a `_T`."""


class Timer:
    """A call that is due at a time, unless it is cancelled."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Twice is harmless."""
        self.call = None


class Process:
    """A procedure under way: its generator, its mailbox, and what it waits for now."""

    __slots__ = ("_scheduler", "effect", "ended", "mailbox", "name", "steps", "timer", "waits")

    def __init__(
        self,
        scheduler: Scheduler,
        steps: Steps[Any],
        name: str,
        mailbox: deque[object],
        ended: Callable[[Any, BaseException | None], None] | None,
    ) -> None:
        self._scheduler = scheduler
        self.steps = steps
        self.name = name
        self.mailbox = mailbox
        self.ended = ended
        self.waits: Wish | None = None
        self.effect = 0
        """The number of the effect that it waits for; 0: none."""
        self.timer: Timer | None = None

    def post(self, event: object) -> None:
        """Put an event into the mailbox."""
        self.mailbox.append(event)
        self.look()

    def look(self) -> None:
        """Go on if an event was waited for and there is one."""
        if isinstance(self.waits, Event) and self.mailbox:
            self._scheduler.wake(self, self.mailbox.popleft())
        elif isinstance(self.waits, Turn) and self.waits.heeds and self.mailbox:
            self._scheduler.no_turn(self, self.waits.key)


class Scheduler:
    """All procedures of one engine, the time, and what they have given out."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds of a clock that only goes forward."""
        self.unix = 0.0
        """Seconds since 1970, as this machine believes."""
        self.outputs: deque[Output] = deque()
        self.processes: set[Process] = set()
        self.current: Process | None = None
        self.in_use: Counter[str] = Counter()
        """Procedures that use a link to the peer of that name."""
        self.last_use: dict[str, float] = {}
        """When the last of them ended."""
        self.turns: dict[Hashable, deque[Process]] = {}
        """For each key: who has the turn, and behind it those that wait, in their order."""
        self._ready: deque[tuple[Process, Any, BaseException | None]] = deque()
        self._effects: dict[int, Process] = {}
        self._numbers = itertools.count(1)
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    # -- procedures --------------------------------------------------------------------------------------

    def spawn(
        self,
        steps: Steps[_T],
        name: str,
        *,
        mailbox: deque[object] | None = None,
        ended: Callable[[Any, BaseException | None], None] | None = None,
    ) -> Process:
        """Begin a procedure. `ended` is called with its result and error; without it an error is logged."""
        process = Process(self, steps, name, deque() if mailbox is None else mailbox, ended)
        self.processes.add(process)
        self._ready.append((process, None, None))
        return process

    def cancel(self, process: Process) -> None:
        """Raise `Cancelled` where the procedure waits."""
        if process in self.processes:
            if isinstance(process.waits, Turn):
                self._forget_turn(process.waits.key, process)
            self.wake(process, None, Cancelled())

    def wake(self, process: Process, value: object, error: BaseException | None = None) -> None:
        """What the procedure waits for is there."""
        process.waits, process.effect = None, 0
        if process.timer is not None:
            process.timer.cancel()
            process.timer = None
        self._ready.append((process, value, error))

    def run(self) -> None:
        """Go on with all that can go on."""
        while self._ready:
            process, value, error = self._ready.popleft()
            if process in self.processes:
                self._resume(process, value, error)

    def _resume(self, process: Process, value: object, error: BaseException | None) -> None:
        self.current = process
        try:
            wish = process.steps.send(value) if error is None else process.steps.throw(error)
        except StopIteration as end:
            self._end(process, end.value, None)
        except Cancelled as cancelled:
            self._end(process, None, cancelled)
        except Exception as mistake:
            self._end(process, None, mistake)
        else:
            self._wait(process, wish)
        finally:
            self.current = None

    def _end(self, process: Process, value: object, error: BaseException | None) -> None:
        self.processes.discard(process)
        ended, process.ended = process.ended, None  # who holds the process may be held by that
        if ended is not None:
            ended(value, error)
        elif isinstance(error, IkectxError):
            log.error("%s: %s", process.name, error)
        elif isinstance(error, Exception):
            log_mistake(log, process.name, error)

    def _wait(self, process: Process, wish: Wish) -> None:
        process.waits = wish
        match wish:
            case Do(step, of):  # most of them
                self._give_out(process, step, of)
            case Event(until):
                if process.mailbox:
                    process.look()
                else:
                    self._limited(process, until, None)
            case Opened(gate, until):
                if gate.open:
                    self.wake(process, True)
                else:
                    gate.waiting.append(process)
                    self._limited(process, until, False)
            case Pause(until):
                self._limited(process, until, None)
            case Turn(key, until, heeds):
                queue = self.turns.setdefault(key, deque())
                queue.append(process)
                if queue[0] is process:
                    self.wake(process, True)
                elif heeds and process.mailbox:
                    self.no_turn(process, key)
                elif until is not None:
                    process.timer = self.call_at(until, lambda: self.no_turn(process, key))
            case step:
                self._give_out(process, step, b"")

    def _limited(
        self, process: Process, until: float | None, otherwise: object, error: Exception | None = None
    ) -> None:
        if until is not None:
            process.timer = self.call_at(until, lambda: self.wake(process, otherwise, error))

    # -- effects -----------------------------------------------------------------------------------------

    def _give_out(self, process: Process, step: Step, of: bytes) -> None:
        number = process.effect = next(self._numbers)
        self._effects[number] = process
        match step:
            case Write(entry, durable):
                self.outputs.append(Journal(number, entry, durable))
            case OpenLink(peer, until):
                self.outputs.append(Connect(number, peer))
                late = LinkError(f"{peer.name} could not be reached in time", hint="see its log")
                self._limited(process, until, None, late)
            case _:
                self.outputs.append(Effect(number, step, of))

    def effect_done(self, number: int, outcome: object) -> None:
        """Go on with who asked for it, unless nobody wants it any more."""
        process = self._effects.pop(number, None)
        if process is None or process.effect != number:
            return
        if isinstance(outcome, Exception):
            self.wake(process, None, outcome)
        else:
            self.wake(process, outcome)

    # -- gates and turns ---------------------------------------------------------------------------------

    def open(self, gate: Gate) -> None:
        """It has happened; twice is harmless."""
        gate.open = True
        waiting, gate.waiting = gate.waiting, []
        for process in waiting:
            if isinstance(process.waits, Opened) and process.waits.gate is gate:
                self.wake(process, True)

    def leave(self, key: Hashable, of: Process | None = None) -> None:
        """A procedure, by default the one that runs now, gives its turn for `key`, if it has it, to the next
        that waits."""
        if (process := of or self.current) is not None:
            self._forget_turn(key, process)

    def no_turn(self, process: Process, key: Hashable) -> None:
        """It does not wait for that turn any longer."""
        self._forget_turn(key, process)
        self.wake(process, False)

    def _forget_turn(self, key: Hashable, process: Process) -> None:
        queue = self.turns.get(key)
        if queue is None or process not in queue:
            return
        had = queue[0] is process
        queue.remove(process)
        if not queue:
            del self.turns[key]
        elif had:
            self.wake(queue[0], True)

    @contextmanager
    def using(self, peer: str) -> Iterator[None]:
        """While the block lasts, links to that peer do not count as idle."""
        self.in_use[peer] += 1
        try:
            yield
        finally:
            self.in_use[peer] -= 1
            if not self.in_use[peer]:
                del self.in_use[peer]
                self.last_use[peer] = self.now

    # -- time --------------------------------------------------------------------------------------------

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        """Have `handle_timer` call it when it is due."""
        timer = Timer(call)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def next_timer(self) -> float | None:
        """When the next call is due, None: none is."""
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def handle_timer(self) -> None:
        """Make all calls that are due."""
        while (due := self.next_timer()) is not None and due <= self.now:
            timer = heapq.heappop(self._timers)[2]
            if timer.call is not None:
                timer.call()
