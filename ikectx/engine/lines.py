"""The engine's end of its links: what was asked over each, and which answer is whose.

RFC 4067 names a transfer by the mobile node's previous address only, so an answer is told from another by
order: on one connection, the CTDRs for one mobile node come in the order of the PCTDs and CTDs for it, one
for each. A CTDR with a status of FPT REQUEST answers none of them: it refuses a CT-Req (ours; the RFC has no
such answer).
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass

from ikectx.errors import LinkError
from ikectx.numbers import Fpt
from ikectx.peer import PeerConfig
from ikectx.sa.context import Address
from ikectx.wire.cxtp import Ctd, Ctdr, Message, Pctd

from .effects import OpenLink
from .outputs import Close, Handled, Send
from .procedures import Event, Process, Scheduler, Steps

Reply = Ctdr | LinkError
"""What comes of a question: its answer, or the end of the link over which it was asked."""


class Question:
    """A PCTD or CTD that was sent, perhaps more than once. `reply` is None until one came.

    Whoever stops waiting leaves it alone, because the answer that comes for it still counts.
    """

    def __init__(self, process: Process | None) -> None:
        self.reply: Reply | None = None
        self._process = process

    def settle(self, reply: Reply) -> None:
        """The first reply stays; who asked is told by an event."""
        if self.reply is None:
            self.reply = reply
            if self._process is not None:
                self._process.post(self)


@dataclass(frozen=True, slots=True)
class Lost:
    """Event: the line is gone."""

    line: Line


class Line:
    """One open link to one peer, whoever dialled it."""

    def __init__(self, scheduler: Scheduler, number: int, peer: PeerConfig, where: str) -> None:
        self.number = number
        self.peer = peer
        self.label = f"{peer.name} at {where}"
        """The peer's name and where it is, for logs."""
        self.since = scheduler.now
        """When it came up, in seconds."""
        self.error: LinkError | None = None
        """Why it is closed; None while it is open."""
        self._scheduler = scheduler
        self._asked: defaultdict[Address, deque[Question]] = defaultdict(deque)
        self._watched_by: list[Process] = []

    def send(self, message: Message) -> int:
        """Send; the message's octets. Errors: LinkError, where the line is closed already."""
        if self.error is not None:
            raise self.error
        octets = message.serialize()
        self._scheduler.outputs.append(Send(self.number, message, octets))
        return len(octets)

    def ask(self, message: Pctd | Ctd, again: Question | None = None) -> tuple[int, Question]:
        """Send what wants an answer: its octets, and the question.

        `again`: that of the same message, asked before over this line; an answer to either is its reply.
        Errors: LinkError.
        """
        size = self.send(message)
        question = again or Question(self._scheduler.current)
        self._asked[message.mn].append(question)
        return size, question

    def answered(self, message: Ctdr) -> bool:
        """Give the CTDR to whose question it answers; False: it answers none."""
        asked = self._asked.get(message.mn)
        if not asked or any(status.fpt == Fpt.REQUEST for status in message.statuses):
            return False
        question = asked.popleft()
        if not asked:
            del self._asked[message.mn]
        question.settle(message)
        return True

    def watch(self, process: Process) -> None:
        """Have that procedure get an event `Lost` when the line is closed."""
        self._watched_by.append(process)

    def unwatch(self, process: Process) -> None:
        """Tell it nothing more: the line lives on for weeks, and would keep the procedure for as long."""
        if process in self._watched_by:
            self._watched_by.remove(process)

    def handled(self) -> None:
        """A message that came over it needs nothing more."""
        self._scheduler.outputs.append(Handled(self.number))

    def close(self, reason: LinkError) -> None:
        """Close it from here."""
        if self.error is None:
            self._scheduler.outputs.append(Close(self.number, reason))
            self.lost(reason)

    def lost(self, error: LinkError) -> None:
        """It is closed, for this reason; all who wait for answers get it. The first reason stays."""
        if self.error is not None:
            return
        self.error = error
        for asked in self._asked.values():
            for question in asked:
                question.settle(error)
        self._asked.clear()
        for process in self._watched_by:
            process.post(Lost(self))
        self._watched_by.clear()


class Lines:
    """The open lines of an engine, by the driver's number."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._open: dict[int, Line] = {}

    def up(self, number: int, peer: PeerConfig, where: str) -> None:
        """There is a new link."""
        self._open.setdefault(number, Line(self._scheduler, number, peer, where))

    def find(self, number: int) -> Line | None:
        """The open line of that number."""
        return self._open.get(number)

    def lost(self, number: int, error: LinkError) -> None:
        """That link is gone."""
        line = self._open.pop(number, None)
        if line is not None:
            line.lost(error)

    def get(self, peer: PeerConfig, until: float | None = None) -> Steps[Line]:
        """An open line to the peer, by that time. Errors: LinkError."""
        number: int = yield OpenLink(peer, until)
        line = self._open.get(number)
        if line is None or line.error is not None:
            raise LinkError(f"the connection to {peer.name} was closed as soon as it was there")
        return line


def reply_to(question: Question, until: float | None) -> Steps[Reply | None]:
    """Wait for the reply to a question of this procedure; None: none came until then."""
    while question.reply is None:
        if (yield Event(until)) is None and question.reply is None:
            return None
    return question.reply
