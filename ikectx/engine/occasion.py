"""Why an SA is to move: by whose word, and what the mobile node knows of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ikectx.errors import RefusedError
from ikectx.numbers import Status
from ikectx.sa.context import FinalState, IkeContext

from .lines import Line
from .tables import SourceInput

Address = Literal["update", "keep", "mn"]
"""update: the new gateway tells the mobile node its address. keep: the gateway's address moves along. mn: the
mobile node is there, or will go there, by itself."""


@dataclass(frozen=True, slots=True)
class Occasion:
    """Why an SA is to move, and how that begins.

    `begins`: OK to push the SA; ANNOUNCE if the mobile node said that it will go there; REQUESTED if it is at
    the peer, which asked for the SA over `link`. `sequence`: that of the mobile node's CTAR. `away`: the
    mobile node is at the peer and does not answer here.
    """

    address: Address = "update"
    begins: SourceInput = SourceInput.OK
    link: Line | None = None
    sequence: int = 0
    away: bool = False


def check_expected(state: IkeContext | FinalState, expects: int) -> None:
    """Check that the mobile node can expect this message ID of our next request. Errors: RefusedError."""
    last = state.mid_initiator
    if state.unsure and not 0 <= expects - last <= 1:
        raise RefusedError(
            f"the MN expects request {expects} next, which cannot be: request {last} has no answer yet",
            status=Status.FAILED,
            hint="the MN's agent may have missed messages of its charon: let the MN connect anew",
        )
