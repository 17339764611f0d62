"""What the engine gives out, in the order in which it is to be carried out.

`effect` is the number by which `Engine.effect_done` is told how it ended, `ticket` the number that
`Engine.request` gave. What depends on a journal write is given out after the outcome of that write.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ikectx.errors import LinkError
from ikectx.peer import PeerConfig
from ikectx.wire.cxtp import Message

from .effects import Step
from .journal import JournalEntry
from .report import TransferEvent


@dataclass(frozen=True, slots=True)
class Send:
    """A message to the peer at the other end of that link; what cannot be sent ends the link."""

    link: int
    message: Message
    octets: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Close:
    """Close the link, because of this. `Engine.link_lost` need not be called for it."""

    link: int
    reason: LinkError


@dataclass(frozen=True, slots=True)
class Handled:
    """One more message that came over the link needs nothing any more: another one may be read."""

    link: int


@dataclass(frozen=True, slots=True)
class Connect:
    """An open link to the peer is needed."""

    effect: int
    peer: PeerConfig


@dataclass(frozen=True, slots=True)
class Journal:
    """Put the entry into the journal. `durable`: on the disk itself, where SAs outlive a loss of power.
    `soon`: with what is written next; nobody waits for the outcome."""

    effect: int
    entry: JournalEntry
    durable: bool
    soon: bool = False


@dataclass(frozen=True, slots=True)
class Effect:
    """A step at the daemon, or a question to the store. `of`: the transfer that it is for, if any."""

    effect: int
    step: Step
    of: bytes = b""


@dataclass(frozen=True, slots=True)
class Report:
    """A transfer has entered a state, or ended. `ticket`: that of the request that began it; 0: none."""

    event: TransferEvent
    ticket: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What the mobile node of that CTAR is to be sent: a CTAA, or nothing."""

    ticket: int
    octets: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Settled:
    """How a request ended: its result, or an error (of `ikectx.errors`) to raise."""

    ticket: int
    outcome: object


Output = Send | Close | Handled | Connect | Journal | Effect | Report | Answer | Settled
