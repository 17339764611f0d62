"""`Coming`: an SA that this gateway takes in, as the steps prepare, take, activate and undo work on it.

`context` names the SA as the other gateway does, `here` has this gateway's address, and `shape` is what
stands in charon: under other names where its own are taken here (`renames`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ikectx.context import FinalState, IkeContext
from ikectx.errors import CharonError
from ikectx.ledger import Drawn, TargetFacts
from ikectx.name import SaName
from ikectx.ports import MoveReport

from .charon import SaView
from .host import CharonHost
from .looks import Looks, Seen
from .names import Plan, Taken
from .renames import Renames
from .runner import Facts

SCRIPT_LIMIT = 25.0
"""Seconds for the calls of the updown script for one SA."""


class Ear(Protocol):
    """What the MN says while charon may not hear it (`mobike_ext.held`)."""

    async def deliver(self) -> int:
        """Give it to charon."""

    def close(self) -> None: ...


Listen = Callable[[IkeContext], Ear]
"""Begin to hear the MN of a context, as it stands here. Errors: LinkError."""


@dataclass(slots=True)
class Memory:
    """What this life of the agent knows of SAs that come; nothing depends on it after a crash.

    ears: who hears the MN. asked: SAs whose MN will be told by an answer it waits for (CTAA). seen: SAs that
    charon had when they were taken. givers: which gateway gives an SA.
    """

    ears: dict[SaName, Ear] = field(default_factory=dict)
    asked: set[SaName] = field(default_factory=set)
    seen: set[SaName] = field(default_factory=set)
    givers: dict[SaName, str] = field(default_factory=dict)

    def forget(self, sa: SaName) -> None:
        """The SA has come, or does not come."""
        ear = self.ears.pop(sa, None)
        if ear is not None:
            ear.close()
        self.asked.discard(sa)
        self.seen.discard(sa)
        self.givers.pop(sa, None)


@dataclass(slots=True)
class Coming:
    """One SA and one step of it.

    look, taken: what charon has, and which names are taken, when it is prepared.
    final, report: what the other gateway told, and what the exchange with the MN took. activates: this is the
    last step. listed: how charon had it last. gone: what stood in charon before that was undone.
    drawn_before: how far the updown script was when this step began.
    """

    host: CharonHost
    renames: Renames
    looks: Looks
    memory: Memory
    sa: SaName
    context: IkeContext
    here: IkeContext
    look: Seen | None = None
    taken: Taken = field(default_factory=Taken)
    final: FinalState | None = None
    report: MoveReport = field(default_factory=MoveReport)
    activates: bool = False
    listed: SaView | None = None
    gone: IkeContext | None = None
    drawn_before: Drawn = "begun"

    @property
    def facts(self) -> TargetFacts:
        """What is known of it."""
        return self.host.coming.of(self.sa).facts

    @property
    def plan(self) -> Plan | None:
        """The names that it gets here, None: its own."""
        return self.renames.plan_of(self.here)

    @property
    def shape(self) -> IkeContext:
        """The SA as it stands in charon."""
        return self.renames.shape(self.here)

    @property
    def kept(self) -> IkeContext:
        """See `runner.Work`."""
        return self.gone or self.shape

    async def view(self) -> SaView:
        """How charon has it. Errors: CharonError, where it has it no more."""
        view = await self.host.view(self.shape.spis)
        if view is None:
            raise CharonError("charon lost the prepared SA")
        self.listed = view
        return view

    async def script(self, *, up: bool) -> None:
        """The connection's updown script, if one is configured. Errors: KernelError."""
        facts = self.facts
        await self.host.updown(
            self.gone or self.shape, up=up, reqids=dict(facts.reqids), unique_id=facts.unique_id
        )


def numbers_of(view: SaView) -> Facts:
    """Facts for the updown script."""
    reqids = tuple((child.spi_in, child.reqid) for child in view.children)
    return {"unique_id": view.unique_id, "reqids": reqids}


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
