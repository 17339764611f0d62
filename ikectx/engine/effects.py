"""What the engine may ask for: steps at the daemon, and questions to the store.

Each is given out as an `outputs.Effect` (or `Journal`, `Connect`), and the procedure that asked goes on when
`Engine.effect_done` reports the outcome: what the comment behind each class says, or an error of
`ikectx.errors`, which is raised in the procedure. `NAME` is the word for it in messages and traces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ikectx.peer import PeerConfig
from ikectx.sa.context import Address, FinalState, IkeContext
from ikectx.sa.name import SaName
from ikectx.wire.whereabouts import Whereabouts

from .journal import JournalEntry, Role
from .ports import Address as Wish
from .ports import MoveReport, RelayTo

# -- at the gateway that serves the SA (`ports.ContextSource`) --------------------------------------------


@dataclass(frozen=True, slots=True)
class Find:
    """The IKE_SAs served here whose mobile node has this outer address. Outcome: a sequence of `SaName`."""

    NAME: ClassVar[str] = "find"
    mn: Address


@dataclass(frozen=True, slots=True)
class Recorded:
    """The SA as it was last heard of, which asks nobody. Outcome: `IkeContext`."""

    NAME: ClassVar[str] = "recorded"
    sa: SaName


@dataclass(frozen=True, slots=True)
class Export:
    """The context as it is now. `away`: the mobile node is known to be elsewhere. Outcome: `IkeContext`."""

    NAME: ClassVar[str] = "export"
    sa: SaName
    away: bool = False


@dataclass(frozen=True, slots=True)
class Divert:
    """Send packets for the mobile node, which leaves at once, on to the gateway that holds them. Outcome:
    None."""

    NAME: ClassVar[str] = "divert"
    context: IkeContext
    to: str


@dataclass(frozen=True, slots=True)
class Choose:
    """How the mobile node gets to the gateway `to`. Outcome: `ports.Way`."""

    NAME: ClassVar[str] = "choose a way"
    context: IkeContext
    to: str
    address: Wish


@dataclass(frozen=True, slots=True)
class Invites:
    """Whether the mobile node's agent is to be told to go there, rather than the SA offered. Outcome:
    `bool`."""

    NAME: ClassVar[str] = "look for an agent"
    sa: SaName
    address: Wish


@dataclass(frozen=True, slots=True)
class Invite:
    """Tell the mobile node's agent to ask the gateway `to` for its SA, or, if empty, the mobile node this
    gateway's addresses. Outcome: None."""

    NAME: ClassVar[str] = "invite"
    sa: SaName
    to: str


@dataclass(frozen=True, slots=True)
class Freeze:
    """Let go of the SA. `unannounced`: the other gateway has nothing of it yet. Outcome: `FinalState`.

    `relay`: the mobile node stays here, and its packets are passed on. `held`: the other gateway has the
    context ahead of the mobile node, and not the SA.
    """

    NAME: ClassVar[str] = "freeze"
    context: IkeContext
    to: str
    away: bool = False
    sending: bool = False
    renaming: bool = False
    unannounced: bool = False
    relay: RelayTo | None = None
    held: bool = False


@dataclass(frozen=True, slots=True)
class Thaw:
    """Serve a frozen SA on. `untouched`: the other gateway refused it and did nothing for it. Outcome: None.

    `oseq_jump`: outbound sequence numbers (packets) that are left out.
    """

    NAME: ClassVar[str] = "thaw"
    context: IkeContext
    oseq_jump: int
    untouched: bool = False


@dataclass(frozen=True, slots=True)
class Stands:
    """Ask how an SA stands at charon and the kernel; `let_go`: it was let go. Outcome: `Stand`."""

    NAME: ClassVar[str] = "ask how the SA stands"
    sa: SaName
    let_go: bool


@dataclass(frozen=True, slots=True)
class Release:
    """Take away what is left of an SA that moved. Outcome: None."""

    NAME: ClassVar[str] = "release"
    context: IkeContext


@dataclass(frozen=True, slots=True)
class Stay:
    """The SA was to go and is served here still, which those that gave it are to hear. Outcome: None."""

    NAME: ClassVar[str] = "stay"
    sa: SaName


# -- at the gateway that is to serve it (`ports.ContextSink`) ---------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """What speaks against taking the SA. Outcome: a sequence of `Verdict`.

    `keep`: the gateway's address moves along. `answers`: the mobile node waits for an answer that can tell
    it other SPIs; None: it is not asked whether (a dry run). `relayed_by`: the gateway at whose address the
    mobile node stays, empty: none.
    """

    NAME: ClassVar[str] = "check"
    context: IkeContext
    keep: bool
    answers: bool | None = None
    relayed_by: str = ""


@dataclass(frozen=True, slots=True)
class StillHere:
    """What this gateway has of an SA that its journal does not know. Outcome: `Evidence`.

    `who`: the mobile node's IKE identity; empty: not known.
    """

    NAME: ClassVar[str] = "look for the SA"
    final: FinalState
    mn: Address
    who: str = ""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Install the SA without owning it. Outcome: `Prepared`.

    `served`: the old gateway serves it meanwhile, so that what follows may wait for other SAs for a moment.
    `shown`: the mobile node's IKE request that charon is to be given once it serves the SA.
    """

    NAME: ClassVar[str] = "prepare"
    context: IkeContext
    keep: bool
    answers: bool
    relayed_by: str = ""
    served: bool = False
    shown: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class GetReady:
    """Have as much of the SA installed as can be before its mobile node arrives. Outcome: `bool`.

    `leaving`: the mobile node leaves at once, so its packets are to be held until it arrives. The outcome is
    True if they are.
    """

    NAME: ClassVar[str] = "get ready"
    context: IkeContext
    keep: bool
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the other gateway must know of an SA that was installed.

    `renames`: its CHILD_SAs have SPIs here that the mobile node does not know. `cannot_send`: nothing can be
    sent from here before the mobile node knows them. `heard_at`: where a relayed mobile node's packets are to
    be passed on to.
    """

    renames: bool = False
    cannot_send: bool = False
    heard_at: Address | None = None


@dataclass(frozen=True, slots=True)
class Take:
    """Own the SA. `given_by`: the gateway that gives it. Outcome: None."""

    NAME: ClassVar[str] = "take"
    context: IkeContext
    final: FinalState
    given_by: str


@dataclass(frozen=True, slots=True)
class Settle:
    """Ask the mobile node for the next request's message ID. Outcome: a `FinalState` that is sure."""

    NAME: ClassVar[str] = "settle"
    context: IkeContext
    final: FinalState


@dataclass(frozen=True, slots=True)
class Move:
    """Tell the mobile node its new gateway. Outcome: `MoveReport`, or None where it need not be told.

    `always`: whether or not the SA has other SPIs here.
    """

    NAME: ClassVar[str] = "move"
    context: IkeContext
    final: FinalState
    always: bool


@dataclass(frozen=True, slots=True)
class Activate:
    """Let charon speak IKE for the SA. Outcome: None."""

    NAME: ClassVar[str] = "activate"
    context: IkeContext
    final: FinalState
    report: MoveReport


@dataclass(frozen=True, slots=True)
class Undo:
    """Take back all that was done for an SA that does not come. Outcome: None."""

    NAME: ClassVar[str] = "undo"
    context: IkeContext


@dataclass(frozen=True, slots=True)
class NotComing:
    """The SA does not come, and no answer will tell its mobile node of it any more. Outcome: None."""

    NAME: ClassVar[str] = "forget the SA"
    context: IkeContext


@dataclass(frozen=True, slots=True)
class NewNames:
    """The other SPIs of an SA that came, for the answer to its mobile node. Outcome: blocks of a CTAA."""

    NAME: ClassVar[str] = "new names"
    context: IkeContext


# -- the store ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Write:
    """Put this into the journal. Outcome: None, as soon as it is there."""

    NAME: ClassVar[str] = "journal"
    entry: JournalEntry
    durable: bool


@dataclass(frozen=True, slots=True)
class FindTransfer:
    """What the journal has of a transfer. Outcome: `JournalEntry`, or None."""

    NAME: ClassVar[str] = "find a transfer"
    role: Role
    transfer_id: bytes


@dataclass(frozen=True, slots=True)
class FindEpochs:
    """The highest epochs of an SA that the journal knows. Outcome: `Epochs`."""

    NAME: ClassVar[str] = "find epochs"
    sa: SaName


@dataclass(frozen=True, slots=True)
class Epochs:
    """`known`: the highest that any transfer told of, 0: none. `owned`: in which it was taken, -1: never."""

    known: int = 0
    owned: int = -1


@dataclass(frozen=True, slots=True)
class FindLatest:
    """The newest transfer of an SA that is open or has moved it. Outcome: role and transfer ID, or None."""

    NAME: ClassVar[str] = "find the newest transfer"
    sa: SaName


@dataclass(frozen=True, slots=True)
class OwnedFrom:
    """Does this gateway own anything that the peer pushed for that mobile node? Outcome: `bool`."""

    NAME: ClassVar[str] = "find what is owned"
    peer: str
    mn_address: str


@dataclass(frozen=True, slots=True)
class Put:
    """Keep a note. Outcome: None, as soon as it is kept."""

    NAME: ClassVar[str] = "keep a note"
    kind: str
    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Get:
    """Outcome: the note's octets, or None."""

    NAME: ClassVar[str] = "read a note"
    kind: str
    key: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Forget a note; it need not exist. Outcome: None."""

    NAME: ClassVar[str] = "forget a note"
    kind: str
    key: str


@dataclass(frozen=True, slots=True)
class Items:
    """All notes of a kind. Outcome: a sequence of (key, octets)."""

    NAME: ClassVar[str] = "read notes"
    kind: str


# -- other gateways ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenLink:
    """Have an open link to the peer. Outcome: the link's number, after `Engine.link_up` was called for it.

    `until`: no longer than that, because others may be dialling before it; None: as long as it takes.
    """

    NAME: ClassVar[str] = "connect"
    peer: PeerConfig
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Hear:
    """Take in what a peer says of where an SA is. Outcome: None."""

    NAME: ClassVar[str] = "take in a notice"
    peer: str
    news: Whereabouts


Step = (
    Find
    | Recorded
    | Export
    | Divert
    | Choose
    | Invites
    | Invite
    | Freeze
    | Thaw
    | Release
    | Stands
    | Stay
    | Check
    | StillHere
    | Prepare
    | GetReady
    | Take
    | Settle
    | Move
    | Activate
    | Undo
    | NewNames
    | NotComing
    | Write
    | FindTransfer
    | FindEpochs
    | FindLatest
    | OwnedFrom
    | Put
    | Get
    | Delete
    | Items
    | OpenLink
    | Hear
)
