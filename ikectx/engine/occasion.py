"""Why an SA is to move: by whose word, and what the mobile node knows of it."""

from __future__ import annotations

from dataclasses import dataclass

from ikectx.errors import BusyError, IkectxError, RefusedError, StateError
from ikectx.numbers import Status
from ikectx.sa.context import FinalState, IkeContext

from .lines import Line
from .ports import Address
from .report import GivenUp
from .tables import SourceInput


@dataclass(frozen=True, slots=True)
class Occasion:
    """Why an SA is to move, and how that begins.

    `begins`: OK to push the SA; ANNOUNCE if the mobile node said that it will go there; REQUESTED if it is at
    the peer, which asked for the SA over `link`. `sequence`: that of the mobile node's CTAR. `away`: the
    mobile node is at the peer and does not answer here. `asked_by`: whose wish it is, in words.
    """

    address: Address = "update"
    begins: SourceInput = SourceInput.OK
    link: Line | None = None
    sequence: int = 0
    away: bool = False
    asked_by: str = ""


UNANSWERED = 2
"""Requests without an answer that a mobile node may have received: one of charon's, or an invitation, which
is sent under two message IDs."""


def check_expected(state: IkeContext | FinalState, expects: int) -> None:
    """Check that the mobile node can expect this message ID of our next request. Errors: RefusedError."""
    last = state.mid_initiator
    if state.unsure and not 0 <= expects - last <= UNANSWERED:
        raise RefusedError(
            f"the MN expects request {expects} next, which cannot be: request {last} has no answer yet",
            status=Status.FAILED,
            hint="the MN's agent may have missed messages of its charon: let the MN connect anew",
        )


class Overrun(BusyError):
    """After the freeze the counters are beyond what was offered, so the whole context must be sent again."""


def check_sent(context: IkeContext, final: FinalState, jump: int) -> None:
    """Check that the peer, which goes on at the exported numbers and the jump, goes on above ours. Errors:
    Overrun."""
    exported = {child.spi_in: child.outbound.seq for child in context.children}
    for child in final.children:
        sent = child.outbound.seq - exported.get(child.spi_in, 0)
        if sent >= jump:
            raise Overrun(
                f"{sent} packets left since the export, the jump is {jump}",
                hint="a larger `oseq_jump` at all gateways",
            )


def signalled(signal: SourceInput, peer: str, by: str) -> IkectxError | None:
    """Why a transfer does not go on after that signal; None: it does. `by`: who decided, if somebody did."""
    if signal is SourceInput.CANCEL:
        return StateError("it was cancelled here", hint="nothing to do")
    if signal is SourceInput.CTC:
        return RefusedError(f"{peer} cancelled it", status=Status.UNKNOWN_TRANSFER)
    if signal is SourceInput.RECLAIM:
        return StateError(
            f"it was reclaimed by the {by}", hint=f"make sure that {peer} does not serve the SA as well"
        )
    if signal is SourceInput.GIVE_UP:
        return GivenUp(
            f"it was given up here by the {by}; whether {peer} serves it is not known",
            hint=f"see `ikectx list` at {peer}; if nobody serves the mobile node, it connects anew by itself",
        )
    return None
