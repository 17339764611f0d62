"""What is wanted of an outgoing transfer while it waits: by the operator, by the peer, for a mobile node."""

from __future__ import annotations

from collections import deque

from ikectx.machine import Machine

from .lines import Question
from .procedures import Event, Process, Steps
from .tables import SourceAction, SourceInput, SourceState


class Signals:
    """Those of one transfer. What means nothing in the state that the transfer is in is dropped."""

    def __init__(self, machine: Machine[SourceState, SourceInput, SourceAction]) -> None:
        self.mailbox: deque[object] = deque()
        """Signals nobody has looked at: CANCEL and RECLAIM (the operator), CTC and REQUESTED (the peer)."""
        self.process: Process | None = None
        self._machine = machine

    def post(self, what: SourceInput) -> None:
        """Something from elsewhere: it counts as soon as a step under way has ended."""
        if self.process is not None:
            self.process.post(what)
        else:
            self.mailbox.append(what)

    def wait(self, until: float | None, asked: Question | None = None) -> Steps[SourceInput | None]:
        """The next signal that means something in this state; None: none came until then.

        `asked`: its reply is waited for, too, and counts first; None then, and the signal is kept.
        """
        while True:
            if asked is not None and asked.reply is not None:
                return None
            event = yield Event(until)
            if event is None:
                return None
            if isinstance(event, SourceInput) and not self._machine.ignores(event):
                if asked is not None and asked.reply is not None:
                    self.mailbox.appendleft(event)
                    return None
                return event

    def pending(self) -> SourceInput | None:
        """A signal that came while a step was under way."""
        while self.mailbox:
            event = self.mailbox.popleft()
            if isinstance(event, SourceInput) and not self._machine.ignores(event):
                return event
        return None
