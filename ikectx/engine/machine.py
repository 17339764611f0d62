"""Interprets a transition table: current state, its timer, time spent per state. No I/O, no clock of its
own."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, TypeVar

from ikectx.errors import StateError

_State = TypeVar("_State", bound=StrEnum)
_Input = TypeVar("_Input", bound=StrEnum)
_Action = TypeVar("_Action", bound=StrEnum)


class Machine(Generic[_State, _Input, _Action]):
    """Interprets a transition table: current state, its timer, time spent per state.

    Times are seconds of any clock that only goes forward. `timers` has the seconds in a state after which
    its timeout is to be fed (counted anew at every input that the table has for that state).
    """

    def __init__(
        self,
        table: Mapping[tuple[_State, _Input], tuple[_State, *tuple[_Action, ...]]],
        ignored: frozenset[tuple[_State, _Input]],
        state: _State,
        now: float,
        *,
        timers: Mapping[_State, float],
    ) -> None:
        self._table = table
        self._ignored = ignored
        self._timers = timers
        self._entered = now
        self._due = self._due_in(state, now)
        self.state = state
        self.spent: dict[_State, float] = {}
        """Seconds in each state that was left."""

    def _due_in(self, state: _State, now: float) -> float | None:
        after = self._timers.get(state)
        return None if after is None else now + after

    def peek(self, what: _Input) -> _State:
        """The state that `what` leads to; the journal needs it beforehand. Errors: StateError."""
        row = self._table.get((self.state, what))
        if row is not None:
            return row[0]
        if self.ignores(what):
            return self.state
        raise StateError(f"{what} cannot happen to a transfer that is {self.state}")

    def ignores(self, what: _Input) -> bool:
        """True if `what` is late or a repetition, and changes nothing."""
        return (self.state, what) in self._ignored

    def phases(self, now: float) -> dict[str, float]:
        """Milliseconds in each state so far, the present one included."""
        spent = dict(self.spent)
        spent[self.state] = spent.get(self.state, 0.0) + now - self._entered
        return {state: round(seconds * 1000, 3) for state, seconds in spent.items()}

    def feed(self, what: _Input, now: float) -> tuple[_Action, ...]:
        """Take an input: `state` has the new state, the actions to carry out are returned.

        Errors: StateError if `what` cannot happen in this state.
        """
        if self.ignores(what):
            return ()
        self.peek(what)
        state, *actions = self._table[self.state, what]
        if state != self.state:
            self.spent[self.state] = self.spent.get(self.state, 0.0) + now - self._entered
            self._entered = now
            self.state = state
        self._due = self._due_in(state, now)
        return tuple(actions)

    def next_timer(self) -> float | None:
        """When to feed the state's timeout; None: never."""
        return self._due
