"""The engine of a transfer: source and target machines as literal tables, no I/O.

A machine takes an input and the time, changes its state and returns the actions to carry out. Its caller
(`journaled.Run`) writes the new state to the journal *before* it carries them out, and feeds their outcome
back. So the journal is never behind the real state (but for `SOURCE_SOON` and `TARGET_SOON`), and after a
crash the input `RESTART` in the journaled state says what is left to do.

Who owns the SA (`SOURCE_SERVES`, `TARGET_OWNS`; tests walk every interleaving):

- the source serves until it has journaled RELEASED; it then sends the CTD and never serves again unless a
  CTDR to that CTD says that the target does not own the SA (or the operator decides so: `RECLAIM`;
  `GIVE_UP` ends the waiting the other way);
- the target owns from the moment it has journaled OWNING, after it received the CTD;
- a target says "not owned" only after it has undone everything and journaled ABORTED. An aborted transfer
  is remembered as ABORTED, and one that it never heard of as denied (`unknown_transfers.Denied`), so
  that a late copy of its PCTD or CTD changes nothing;
- in between nobody serves, and the journals say who may.

There are three ways for a transfer, which differ in the first input:

- the network pushes (or the new gateway pulled): `OK`, PCTD, prepared at once, CTD;
- the mobile node announces that it will move: `ANNOUNCE`, PCTD that the target only holds, while the source
  serves. The mobile node arrives at the target, which prepares and asks for the rest (CT-Req: `REQUESTED`),
  CTD;
- the mobile node (or a packet of it) has arrived already and the target asked: `REQUESTED`, and one CTD with
  everything (`WHOLE`), nothing before it.

Messages are those of RFC 4067; a transfer_id names one attempt and is never used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from ikectx.machine import Machine, Table
from ikectx.numbers import Status
from ikectx.sa.context import FinalState, IkeContext
from ikectx.sa.verdict import Verdict
from ikectx.timing import Timing

OSEQ_JUMP = 1 << 20
"""Outbound sequence numbers left unused between two owners (packets): at most so many, fewer are allowed.

A source that thaws after a failed transfer jumps twice as far, because the target may have sent under a jump
of its own, and does not say how large that is.
"""


class SourceState(StrEnum):
    """The state of a transfer at the gateway that serves the mobile node now (old gateway)."""

    NEW = "new"
    OFFERED = "offered"
    ANNOUNCED = "announced"
    AWAITING = "awaiting"
    FREEZING = "freezing"
    RELEASED = "released"
    CLEANING = "cleaning"
    THAWING = "thawing"
    DONE = "done"
    KEPT = "kept"
    REFUSED = "refused"
    LOST = "lost"


class SourceInput(StrEnum):
    """OK, BUSY, FAILED: outcome of the present step. ACCEPTED, REJECTED: the CTDR to the last message.
    GONE: there is nothing left that could be taken back.

    ANNOUNCE: the mobile node says that it will go. REQUESTED: the target asks for the SA, and may. DOUBTED: a
    CTDR that decides nothing, because the target's agent does not know the transfer, but its charon has the
    SA. RECLAIM, GIVE_UP: the operator's word that the source serves the SA again, or never again.
    """

    OK = "ok"
    ANNOUNCE = "announce"
    REQUESTED = "requested"
    BUSY = "busy"
    FAILED = "failed"
    GONE = "gone"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    DOUBTED = "doubted"
    CTC = "ctc"
    TIMEOUT = "timeout"
    LINK_LOST = "link-lost"
    LINK_UP = "link-up"
    CANCEL = "cancel"
    RECLAIM = "reclaim"
    GIVE_UP = "give-up"
    RESTART = "restart"


class SourceAction(StrEnum):
    """The actions to carry out; RECONNECT includes waiting a while first. DIVERT does nothing unless the
    mobile node leaves at once and the target holds its packets."""

    SEND_PCTD = "send-pctd"
    SEND_CTD = "send-ctd"
    SEND_CTC = "send-ctc"
    RECONNECT = "reconnect"
    FREEZE = "freeze"
    RELEASE = "release"
    THAW = "thaw"
    DIVERT = "divert"


class TargetState(StrEnum):
    """The state of a transfer at the gateway that is to serve the mobile node (new gateway)."""

    NEW = "new"
    ANNOUNCED = "announced"
    HELD = "held"
    INSTALLING = "installing"
    ADMITTING = "admitting"
    RECEIVING = "receiving"
    CHECKING = "checking"
    PREPARING = "preparing"
    PREPARED = "prepared"
    OWNING = "owning"
    MOVING = "moving"
    ACTIVATING = "activating"
    UNDOING = "undoing"
    OWNED = "owned"
    ABORTED = "aborted"


class TargetInput(StrEnum):
    """PCTD, CTD, CTC: received from the source; MISFIT: a CTD that does not fit what was prepared.

    ANNOUNCE: a PCTD to be held; ARRIVED: its mobile node is here. WHOLE: a requested CTD with everything. The
    loss of the link is no input, because a target waits `Timing.hold` for the source to come back.
    """

    PCTD = "pctd"
    ANNOUNCE = "announce"
    ARRIVED = "arrived"
    WHOLE = "whole"
    CTD = "ctd"
    MISFIT = "misfit"
    CTC = "ctc"
    OK = "ok"
    FAILED = "failed"
    TIMEOUT = "timeout"
    RESTART = "restart"


class TargetAction(StrEnum):
    """ANSWER: send the CTDR. REQUEST: send the CT-Req. SEND_CTC: end the waiting of a source that waits in
    vain."""

    CHECK = "check"
    PREPARE = "prepare"
    REQUEST = "request"
    TAKE = "take"
    MOVE = "move"
    ACTIVATE = "activate"
    UNDO = "undo"
    ANSWER = "answer"
    SEND_CTC = "send-ctc"


_S, _SI, _SA = SourceState, SourceInput, SourceAction
_T, _TI, _TA = TargetState, TargetInput, TargetAction

SOURCE_TABLE: Table[SourceState, SourceInput, SourceAction] = {
    # export is under way; nothing is anywhere yet
    (_S.NEW, _SI.OK): (_S.OFFERED, _SA.SEND_PCTD),
    (_S.NEW, _SI.BUSY): (_S.KEPT,),
    (_S.NEW, _SI.FAILED): (_S.KEPT,),
    (_S.NEW, _SI.CANCEL): (_S.KEPT,),
    (_S.NEW, _SI.LINK_LOST): (_S.KEPT,),
    (_S.NEW, _SI.RESTART): (_S.KEPT,),
    # the target checks and installs; we serve
    (_S.OFFERED, _SI.ACCEPTED): (_S.FREEZING, _SA.FREEZE),
    (_S.OFFERED, _SI.REJECTED): (_S.REFUSED,),
    (_S.OFFERED, _SI.CTC): (_S.REFUSED,),
    (_S.OFFERED, _SI.TIMEOUT): (_S.KEPT, _SA.SEND_CTC),
    (_S.OFFERED, _SI.CANCEL): (_S.KEPT, _SA.SEND_CTC),
    (_S.OFFERED, _SI.LINK_LOST): (_S.KEPT,),
    # a CTC ends the target's waiting for a CTD that will not come
    (_S.OFFERED, _SI.RESTART): (_S.KEPT, _SA.SEND_CTC),
    # the mobile node will move some time: the target checks and then holds the context; the source serves
    (_S.NEW, _SI.ANNOUNCE): (_S.ANNOUNCED, _SA.SEND_PCTD),
    (_S.ANNOUNCED, _SI.ACCEPTED): (_S.AWAITING, _SA.DIVERT),
    (_S.ANNOUNCED, _SI.REJECTED): (_S.REFUSED,),
    (_S.ANNOUNCED, _SI.CTC): (_S.REFUSED,),
    (_S.ANNOUNCED, _SI.TIMEOUT): (_S.KEPT, _SA.SEND_CTC),
    (_S.ANNOUNCED, _SI.CANCEL): (_S.KEPT, _SA.SEND_CTC),
    (_S.ANNOUNCED, _SI.LINK_LOST): (_S.KEPT,),
    (_S.ANNOUNCED, _SI.RESTART): (_S.KEPT, _SA.SEND_CTC),
    (_S.ANNOUNCED, _SI.REQUESTED): (_S.FREEZING, _SA.FREEZE),
    (_S.AWAITING, _SI.REQUESTED): (_S.FREEZING, _SA.FREEZE),
    (_S.AWAITING, _SI.CTC): (_S.REFUSED,),
    (_S.AWAITING, _SI.TIMEOUT): (_S.KEPT, _SA.SEND_CTC),
    (_S.AWAITING, _SI.CANCEL): (_S.KEPT, _SA.SEND_CTC),
    (_S.AWAITING, _SI.RESTART): (_S.KEPT, _SA.SEND_CTC),
    # the mobile node is at the target already, which has nothing yet: everything goes in the CTD
    (_S.NEW, _SI.REQUESTED): (_S.FREEZING, _SA.FREEZE),
    # letting go, and nobody was told yet, so the source alone can still take it back
    (_S.FREEZING, _SI.OK): (_S.RELEASED, _SA.SEND_CTD),
    (_S.FREEZING, _SI.BUSY): (_S.KEPT, _SA.SEND_CTC),
    (_S.FREEZING, _SI.FAILED): (_S.THAWING, _SA.SEND_CTC, _SA.THAW),
    (_S.FREEZING, _SI.CANCEL): (_S.THAWING, _SA.SEND_CTC, _SA.THAW),
    (_S.FREEZING, _SI.CTC): (_S.THAWING, _SA.THAW),
    (_S.FREEZING, _SI.LINK_LOST): (_S.THAWING, _SA.THAW),
    (_S.FREEZING, _SI.RESTART): (_S.THAWING, _SA.THAW),
    # let go: only the target's answer (or the operator) ends this
    (_S.RELEASED, _SI.ACCEPTED): (_S.CLEANING, _SA.RELEASE),
    (_S.RELEASED, _SI.REJECTED): (_S.THAWING, _SA.THAW),
    # the target's agent knows nothing of it, but its charon or kernel does: neither yes nor no
    (_S.RELEASED, _SI.DOUBTED): (_S.RELEASED, _SA.RECONNECT),
    (_S.RELEASED, _SI.RECLAIM): (_S.THAWING, _SA.SEND_CTC, _SA.THAW),
    (_S.RELEASED, _SI.GIVE_UP): (_S.CLEANING, _SA.RELEASE),
    (_S.RELEASED, _SI.TIMEOUT): (_S.RELEASED, _SA.SEND_CTD),
    (_S.RELEASED, _SI.LINK_UP): (_S.RELEASED, _SA.SEND_CTD),
    (_S.RELEASED, _SI.LINK_LOST): (_S.RELEASED, _SA.RECONNECT),
    (_S.RELEASED, _SI.RESTART): (_S.RELEASED, _SA.RECONNECT),
    # the target owns the SA; the rest of it here is cleared away
    (_S.CLEANING, _SI.OK): (_S.DONE,),
    (_S.CLEANING, _SI.FAILED): (_S.CLEANING, _SA.RELEASE),
    (_S.CLEANING, _SI.RESTART): (_S.CLEANING, _SA.RELEASE),
    # the source owns the SA again
    (_S.THAWING, _SI.OK): (_S.KEPT,),
    (_S.THAWING, _SI.FAILED): (_S.THAWING, _SA.THAW),
    # charon gave it up while it was frozen: nobody serves it
    (_S.THAWING, _SI.GONE): (_S.LOST,),
    (_S.THAWING, _SI.RESTART): (_S.THAWING, _SA.THAW),
}

TARGET_TABLE: Table[TargetState, TargetInput, TargetAction] = {
    (_T.NEW, _TI.PCTD): (_T.CHECKING, _TA.CHECK),
    # a CTD without an offer: remember the refusal, because a late PCTD must not revive the transfer
    (_T.NEW, _TI.CTD): (_T.ABORTED, _TA.ANSWER),
    (_T.NEW, _TI.MISFIT): (_T.ABORTED, _TA.ANSWER),
    # the check changes nothing, so there is nothing to undo
    (_T.CHECKING, _TI.OK): (_T.PREPARING, _TA.PREPARE),
    (_T.CHECKING, _TI.FAILED): (_T.ABORTED, _TA.ANSWER),
    (_T.CHECKING, _TI.RESTART): (_T.ABORTED,),
    # held: its ESP may be ready, but charon has no part of it before the mobile node arrives, because its new
    # address is not known
    (_T.NEW, _TI.ANNOUNCE): (_T.ANNOUNCED, _TA.CHECK),
    (_T.ANNOUNCED, _TI.OK): (_T.HELD, _TA.ANSWER),
    (_T.ANNOUNCED, _TI.FAILED): (_T.ABORTED, _TA.ANSWER),
    (_T.ANNOUNCED, _TI.RESTART): (_T.UNDOING, _TA.UNDO),
    # the source lets go while charon is given the SA: packets for the mobile node are lost until then
    (_T.HELD, _TI.ARRIVED): (_T.INSTALLING, _TA.REQUEST, _TA.PREPARE),
    (_T.HELD, _TI.ANNOUNCE): (_T.HELD, _TA.ANSWER),
    (_T.HELD, _TI.CTC): (_T.ABORTED,),
    (_T.HELD, _TI.TIMEOUT): (_T.ABORTED, _TA.SEND_CTC),
    (_T.HELD, _TI.RESTART): (_T.ABORTED,),
    # nobody asked the source to let go
    (_T.HELD, _TI.CTD): (_T.ABORTED, _TA.ANSWER),
    (_T.HELD, _TI.MISFIT): (_T.ABORTED, _TA.ANSWER),
    (_T.HELD, _TI.WHOLE): (_T.ABORTED, _TA.ANSWER),
    (_T.INSTALLING, _TI.OK): (_T.PREPARED,),
    (_T.INSTALLING, _TI.FAILED): (_T.UNDOING, _TA.SEND_CTC, _TA.UNDO),
    (_T.INSTALLING, _TI.RESTART): (_T.UNDOING, _TA.UNDO),
    # the source has let go: either take the SA or refuse it
    (_T.NEW, _TI.WHOLE): (_T.ADMITTING, _TA.CHECK),
    (_T.ADMITTING, _TI.OK): (_T.RECEIVING, _TA.PREPARE),
    (_T.ADMITTING, _TI.FAILED): (_T.ABORTED, _TA.ANSWER),
    (_T.ADMITTING, _TI.RESTART): (_T.ABORTED,),
    (_T.RECEIVING, _TI.OK): (_T.OWNING, _TA.TAKE),
    (_T.RECEIVING, _TI.FAILED): (_T.UNDOING, _TA.UNDO),
    (_T.RECEIVING, _TI.MISFIT): (_T.UNDOING, _TA.UNDO),
    (_T.RECEIVING, _TI.RESTART): (_T.UNDOING, _TA.UNDO),
    (_T.PREPARING, _TI.OK): (_T.PREPARED, _TA.ANSWER),
    (_T.PREPARING, _TI.FAILED): (_T.UNDOING, _TA.UNDO),
    (_T.PREPARING, _TI.RESTART): (_T.UNDOING, _TA.UNDO),
    # installed, not owned
    (_T.PREPARED, _TI.CTD): (_T.OWNING, _TA.TAKE),
    (_T.PREPARED, _TI.MISFIT): (_T.UNDOING, _TA.UNDO),
    (_T.PREPARED, _TI.PCTD): (_T.PREPARED, _TA.ANSWER),
    (_T.PREPARED, _TI.ANNOUNCE): (_T.PREPARED, _TA.ANSWER),
    (_T.PREPARED, _TI.ARRIVED): (_T.PREPARED, _TA.REQUEST),
    (_T.PREPARED, _TI.WHOLE): (_T.UNDOING, _TA.UNDO),
    (_T.PREPARED, _TI.CTC): (_T.UNDOING, _TA.UNDO),
    (_T.PREPARED, _TI.TIMEOUT): (_T.UNDOING, _TA.SEND_CTC, _TA.UNDO),
    (_T.PREPARED, _TI.RESTART): (_T.UNDOING, _TA.UNDO),
    # owned: go on, or undo everything
    (_T.OWNING, _TI.OK): (_T.MOVING, _TA.MOVE),
    (_T.OWNING, _TI.FAILED): (_T.UNDOING, _TA.UNDO),
    (_T.OWNING, _TI.RESTART): (_T.OWNING, _TA.TAKE),
    (_T.MOVING, _TI.OK): (_T.ACTIVATING, _TA.ACTIVATE),
    (_T.MOVING, _TI.FAILED): (_T.UNDOING, _TA.UNDO),
    (_T.MOVING, _TI.RESTART): (_T.MOVING, _TA.MOVE),
    (_T.ACTIVATING, _TI.OK): (_T.OWNED, _TA.ANSWER),
    (_T.ACTIVATING, _TI.FAILED): (_T.UNDOING, _TA.UNDO),
    (_T.ACTIVATING, _TI.RESTART): (_T.ACTIVATING, _TA.ACTIVATE),
    # the source is told "not owned" only when the undo has ended
    (_T.UNDOING, _TI.OK): (_T.ABORTED, _TA.ANSWER),
    (_T.UNDOING, _TI.FAILED): (_T.UNDOING, _TA.UNDO),
    (_T.UNDOING, _TI.RESTART): (_T.UNDOING, _TA.UNDO),
    # over: every repetition gets the same answer
    (_T.OWNED, _TI.CTD): (_T.OWNED, _TA.ANSWER),
    (_T.OWNED, _TI.WHOLE): (_T.OWNED, _TA.ANSWER),
    (_T.OWNED, _TI.PCTD): (_T.OWNED, _TA.ANSWER),
    (_T.OWNED, _TI.ANNOUNCE): (_T.OWNED, _TA.ANSWER),
    (_T.ABORTED, _TI.CTD): (_T.ABORTED, _TA.ANSWER),
    (_T.ABORTED, _TI.MISFIT): (_T.ABORTED, _TA.ANSWER),
    (_T.ABORTED, _TI.WHOLE): (_T.ABORTED, _TA.ANSWER),
    (_T.ABORTED, _TI.PCTD): (_T.ABORTED, _TA.ANSWER),
    (_T.ABORTED, _TI.ANNOUNCE): (_T.ABORTED, _TA.ANSWER),
}

SOURCE_FINAL = frozenset({_S.DONE, _S.KEPT, _S.REFUSED, _S.LOST})
TARGET_FINAL = frozenset({_T.OWNED, _T.ABORTED})

SOURCE_SERVES = frozenset(
    {
        *(_S.NEW, _S.OFFERED, _S.ANNOUNCED, _S.AWAITING, _S.FREEZING),
        *(_S.THAWING, _S.KEPT, _S.REFUSED),
    }
)
"""States in which the source's ESP may be sent, or may have begun to be sent again."""
TARGET_OWNS = frozenset({_T.OWNING, _T.MOVING, _T.ACTIVATING, _T.OWNED})

SOURCE_DURABLE = frozenset({_S.RELEASED, _S.DONE, _S.KEPT, _S.REFUSED, _S.LOST})
TARGET_DURABLE = frozenset({_T.OWNING, _T.OWNED, _T.ABORTED})
"""States that must be on the disk before anything follows, if SAs outlive a loss of power. The others need
only outlive the process."""

SOURCE_SOON = frozenset({_S.CLEANING})
TARGET_SOON = frozenset({_T.CHECKING, _T.PREPARED})
"""States that are written with what is written next, because an agent that finds the state before in its
journal comes to the same end: a check changes nothing; what is being prepared is undone as what is prepared;
who asks again whether an SA that it let go is owned gets the same answer."""

_LATE = (
    *(_SI.ACCEPTED, _SI.REJECTED, _SI.CTC, _SI.TIMEOUT, _SI.LINK_LOST, _SI.LINK_UP),
    *(_SI.CANCEL, _SI.REQUESTED, _SI.RECLAIM, _SI.GIVE_UP),
)
SOURCE_IGNORED = frozenset(
    {
        *((state, late) for state in (_S.CLEANING, _S.THAWING) for late in _LATE),
        *((state, late) for state in SOURCE_FINAL for late in _LATE),
        # too late to cancel; and a CTC does not answer a CTD
        (_S.RELEASED, _SI.CANCEL),
        (_S.RELEASED, _SI.CTC),
        (_S.RELEASED, _SI.REQUESTED),
        # the present step ends first, then its outcome decides
        *((_S.NEW, late) for late in (_SI.CTC, _SI.TIMEOUT, _SI.LINK_UP)),
        *((_S.FREEZING, late) for late in (_SI.ACCEPTED, _SI.REJECTED, _SI.TIMEOUT, _SI.LINK_UP)),
        (_S.FREEZING, _SI.REQUESTED),
        (_S.OFFERED, _SI.LINK_UP),
        (_S.OFFERED, _SI.REQUESTED),
        (_S.ANNOUNCED, _SI.LINK_UP),
        # nothing is being done: the target that holds the context may ask over another link
        (_S.AWAITING, _SI.LINK_UP),
        (_S.AWAITING, _SI.LINK_LOST),
    }
)
"""Inputs that are late or repeated and change nothing. Any pair in neither table is a mistake: StateError."""

_BETWEEN = (
    *(_T.NEW, _T.ANNOUNCED, _T.INSTALLING, _T.ADMITTING, _T.RECEIVING, _T.CHECKING, _T.PREPARING),
    *(_T.OWNING, _T.MOVING, _T.ACTIVATING, _T.UNDOING),
)
TARGET_IGNORED = frozenset(
    {
        *((state, late) for state in _BETWEEN for late in (_TI.CTC, _TI.TIMEOUT)),
        *((state, late) for state in TARGET_FINAL for late in (_TI.CTC, _TI.TIMEOUT, _TI.ARRIVED)),
    }
)

SourceMachine = Machine[SourceState, SourceInput, SourceAction]
TargetMachine = Machine[TargetState, TargetInput, TargetAction]


def new_source(now: float, timing: Timing, state: SourceState = SourceState.NEW) -> SourceMachine:
    """A source machine; `state` is the journal's after a restart."""
    timers = {
        SourceState.OFFERED: timing.offer,
        SourceState.ANNOUNCED: timing.offer,
        SourceState.AWAITING: timing.predictive,
        SourceState.RELEASED: timing.confirm,
    }
    return Machine(SOURCE_TABLE, state, ignored=SOURCE_IGNORED, timers=timers, now=now)


def new_target(now: float, timing: Timing, state: TargetState = TargetState.NEW) -> TargetMachine:
    """A target machine; `state` is the journal's after a restart."""
    timers = {TargetState.PREPARED: timing.hold, TargetState.HELD: timing.predictive}
    return Machine(TARGET_TABLE, state, ignored=TARGET_IGNORED, timers=timers, now=now)


# -- epochs ----------------------------------------------------------------------------------------------

MAX_EPOCH = 1 << 32
"""No SA changes its owner so often; a larger number means damage (the journal holds 63 bits)."""


def offer_fits(context: IkeContext, known: int, owned: int = -1) -> Status:
    """OK if this context may be offered to this gateway, else the reason.

    `known`: the highest epoch of its SA in our journal (0: none); `owned`: the highest in which this gateway
    took the SA over itself (-1: never). `context.epoch` is the one in which the sender claims to own it.
    """
    if context.epoch >= MAX_EPOCH:
        return Status.MALFORMED
    stale = context.epoch < known or context.epoch <= owned
    return Status.STALE_EPOCH if stale else Status.OK


def final_fits(context: IkeContext, final: FinalState, known: int) -> Status:
    """OK if the CTD lets go of the SA that the PCTD offered, in a newer epoch than any known one."""
    if (final.spi_i, final.spi_r) != context.spis:
        return Status.UNKNOWN_SA
    if {child.spi_in for child in final.children} != {child.spi_in for child in context.children}:
        return Status.UNKNOWN_SA
    if final.epoch != context.epoch + 1 or final.epoch <= known:
        return Status.STALE_EPOCH
    return Status.OK


def first_failure(verdicts: Sequence[Verdict]) -> Status:
    """The status that represents all verdicts: the first that is not OK."""
    return next((verdict.status for verdict in verdicts if verdict.status is not Status.OK), Status.OK)
