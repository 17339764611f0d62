"""The base of all state machines: interprets a literal table. No I/O, no clock of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from ikectx.errors import StateError
from ikectx.sa.context import Endpoint

StateT = TypeVar("StateT", bound=Enum)
InputT = TypeVar("InputT", bound=Enum)
ActionT = TypeVar("ActionT", bound=Enum)
EventT = TypeVar("EventT")

Table = Mapping[tuple[StateT, InputT], tuple[StateT, *tuple[ActionT, ...]]]
"""(state, input) to the next state, and the actions to carry out. A state that no row leaves is final."""

_NO_TIMERS: Mapping[Any, float] = MappingProxyType({})


class Machine(Generic[StateT, InputT, ActionT]):
    """Current state, its timer, time spent per state.

    ignored: pairs that change nothing, because they are late or repeated; any other one that the table lacks
    is a mistake. None: all that it lacks change nothing. timers: seconds in a state after which its timeout
    is to be fed, counted anew at every input that the table has for that state. Times are seconds of any
    clock that only goes forward.
    """

    def __init__(
        self,
        table: Table[StateT, InputT, ActionT],
        state: StateT,
        *,
        ignored: Collection[tuple[StateT, InputT]] | None = None,
        timers: Mapping[StateT, float] = _NO_TIMERS,
        now: float = 0.0,
    ) -> None:
        self._table = table
        self._ignored = ignored
        self._timers = timers
        self._entered = now
        self._due = now + timers[state] if state in timers else None
        self.state = state
        self.spent: dict[StateT, float] = {}
        """Seconds in each state that was left."""

    @property
    def done(self) -> bool:
        """True in a final state."""
        return all(state is not self.state or row[0] is state for (state, _), row in self._table.items())

    def ignores(self, what: InputT) -> bool:
        """True if `what` is late or a repetition, and changes nothing."""
        pair = self.state, what
        return pair not in self._table if self._ignored is None else pair in self._ignored

    def peek(self, what: InputT) -> StateT:
        """The state that `what` leads to; the journal needs it beforehand. Errors: StateError."""
        row = self._table.get((self.state, what))
        if row is not None:
            return row[0]
        if self.ignores(what):
            return self.state
        raise StateError(f"{what} cannot happen in the state {self.state}")

    def feed(self, what: InputT, now: float = 0.0) -> tuple[ActionT, ...]:
        """Take an input: `state` has the new state, the actions to carry out are returned.

        Errors: StateError if `what` cannot happen in this state.
        """
        row = self._table.get((self.state, what))
        if row is None:
            self.peek(what)  # raises unless it is ignored
            return ()
        state, *actions = row
        if state is not self.state:
            self.spent[self.state] = self.spent.get(self.state, 0.0) + now - self._entered
            self._entered = now
            self._due = None
            self.state = state
        if state in self._timers:
            self._due = now + self._timers[state]
        return tuple(actions)

    def phases(self, now: float) -> dict[str, float]:
        """Milliseconds in each state so far, the present one included."""
        spent = dict(self.spent)
        spent[self.state] = spent.get(self.state, 0.0) + now - self._entered
        # `value` takes two calls, in each of a dozen states of an SA that moves
        return {state._value_: round(seconds * 1000, 3) for state, seconds in spent.items()}

    def next_timer(self) -> float | None:
        """When the state's time is over; None: never."""
        return self._due


class Talker(Machine[StateT, InputT, ActionT], ABC, Generic[StateT, InputT, ActionT, EventT]):
    """A machine that sends and receives datagrams; a pair that its table lacks changes nothing.

    Verbs: `receive`, `to_send`, `next_timer`, `handle_timer`, `next_event`; `now` is seconds, monotonic.
    """

    def __init__(self, table: Table[StateT, InputT, ActionT], state: StateT) -> None:
        super().__init__(table, state)
        self._events: deque[EventT] = deque()

    @abstractmethod
    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        """UDP payloads to send now, each with its destination. The first call starts what asks."""

    @abstractmethod
    def handle_timer(self, now: float) -> None:
        """Time has passed; there may be something to send, or an event."""

    @abstractmethod
    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        """Take a UDP payload that came from `source`. Never raises: one that is not for this machine is
        counted."""

    def next_event(self) -> EventT | None:
        """The next event, oldest first."""
        return self._events.popleft() if self._events else None

    def _enter(self, what: InputT, *events: EventT) -> tuple[ActionT, ...]:
        """Take an input; `events` are queued if it leads to another state."""
        before = self.state
        actions = self.feed(what)
        if self.state is not before:
            self._events.extend(events)
        return actions
