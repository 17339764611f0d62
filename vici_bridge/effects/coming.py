"""`Coming`: an SA that this gateway takes in, for the steps prepare, take, activate and undo.

`context` has the other gateway's names of the SA, `here` this gateway's address, and `shape` is the SA in
charon: under other SPIs if its own are taken here (`renames`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from ikectx.engine.ledger import Drawn, TargetFacts
from ikectx.engine.ports import MoveReport
from ikectx.errors import CharonError
from ikectx.sa.context import Endpoint, FinalState, IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.relocate import relocate
from ikectx.sa.verdict import Verdict
from vici_bridge.ha.chain import import_messages
from vici_bridge.ha.messages import LONGEST
from vici_bridge.host import CharonHost
from vici_bridge.policy.new_names import Plan, Taken
from vici_bridge.vici.views import SaView

from .early import Early
from .leaving import tagged
from .looks import Seen
from .renames import Renames

_T = TypeVar("_T")
_MOST = 128
"""Contexts that are kept with this gateway's address, at most, because nobody forgets an SA that is checked
only."""
SCRIPT_LIMIT = 25.0
"""Seconds for the calls of the updown script for one SA."""


class Recorder(Protocol):
    """Records the mobile node's messages while charon may not receive them (`mobike_ext.packet_hold`)."""

    async def deliver(self) -> int:
        """Give charon the recorded messages."""

    def close(self) -> None: ...


Listen = Callable[[IkeContext, tuple[bytes, ...]], Recorder]
"""Begin to record messages of the mobile node of a context, as it is here, behind a request of its that came
before (datagrams). Errors: LinkError."""


@dataclass(slots=True)
class Memory:
    """Facts about SAs that come which the process keeps in memory; nothing depends on them after a crash.

    recorders: of the mobile node's messages. asked: SAs whose mobile node will be told by an answer that it
    waits for (CTAA). shown: SAs whose mobile node has sent charon a request from where it is now. seen: SAs
    that charon had when they were taken. givers: the gateway that gives an SA. relayed: the gateway at whose
    address the mobile node of an SA stays. places: contexts of SAs that are being checked or taken in, each
    with the same at this gateway's address.
    judged: what they were judged by, and the reasons against them. imports: those in charon, charon's HA wire
    version, and the messages by which it takes them in.
    """

    recorders: dict[SaName, Recorder] = field(default_factory=dict)
    asked: set[SaName] = field(default_factory=set)
    shown: set[SaName] = field(default_factory=set)
    seen: set[SaName] = field(default_factory=set)
    givers: dict[SaName, str] = field(default_factory=dict)
    relayed: dict[SaName, str] = field(default_factory=dict)
    places: dict[SaName, tuple[IkeContext, IkeContext]] = field(default_factory=dict)
    judged: dict[SaName, tuple[object, list[Verdict]]] = field(default_factory=dict)
    imports: dict[SaName, tuple[IkeContext, int, list[bytes]]] = field(default_factory=dict, repr=False)

    def relocated(self, context: IkeContext, local: Endpoint) -> IkeContext:
        """The context at that address. Each step of an SA asks for it, with the same object."""
        known = self.places.get(context.spis)
        if known is None or known[0] is not context or known[1].local != local:
            known = context, relocate(context, local=local)
            keep(self.places, context.spis, known)
        return known[1]

    def messages(self, sa: SaName, shape: IkeContext, version: int) -> list[bytes]:
        """The messages by which charon takes that SA in. They are checked, and sent some milliseconds later,
        for the same object. Errors: CharonError for one that the ha plugin cannot move."""
        known = self.imports.get(sa)
        if known is None or known[0] is not shape or known[1] != version:
            octets = [message.serialize(LONGEST) for message in import_messages(shape, version)]
            known = shape, version, octets
            keep(self.imports, sa, known)
        return known[2]

    def forget(self, sa: SaName) -> None:
        """The SA has been taken in, or will not come."""
        recorder = self.recorders.pop(sa, None)
        if recorder is not None:
            recorder.close()
        self.asked.discard(sa)
        self.shown.discard(sa)
        self.seen.discard(sa)
        self.givers.pop(sa, None)
        self.relayed.pop(sa, None)
        self.erase(sa)

    def erase(self, sa: SaName) -> None:
        """Keep no context of the SA, because it has keys."""
        self.places.pop(sa, None)
        self.judged.pop(sa, None)
        self.imports.pop(sa, None)


def keep(known: dict[SaName, _T], sa: SaName, what: _T) -> None:
    """Add it, in place of the oldest one if there are many."""
    known.pop(sa, None)
    if len(known) >= _MOST:
        del known[next(iter(known))]
    known[sa] = what


@dataclass(slots=True)
class Coming:
    """One SA in one step.

    look, taken: charon's state, and the names that are taken, when it is prepared. final, report: the other
    gateway's final state, and the cost of the exchange with the mobile node. listed: charon's last view of
    it. gone: the SA as it was in charon, for a script that is called when that is undone, or later.
    drawn_before: the progress of the updown script when this step began.
    """

    host: CharonHost
    renames: Renames
    memory: Memory
    early: Early
    sa: SaName
    context: IkeContext
    here: IkeContext
    look: Seen | None = None
    taken: Taken = field(default_factory=Taken)
    final: FinalState | None = None
    report: MoveReport = field(default_factory=MoveReport)
    listed: SaView | None = None
    gone: IkeContext | None = None
    drawn_before: Drawn = "begun"

    @property
    def facts(self) -> TargetFacts:
        """The facts in its row."""
        return self.host.coming.of(self.sa).facts

    @property
    def waits(self) -> bool:
        """Whether the mobile node has moved by itself, and waits for an answer of this gateway (or of charon
        here)."""
        return self.sa in self.memory.asked or self.sa in self.memory.shown

    @property
    def plan(self) -> Plan | None:
        """The plan of its names here, None: its own."""
        return self.renames.plan_of(self.here)

    @property
    def shape(self) -> IkeContext:
        """The SA in charon."""
        return self.renames.shape(self.here)

    @property
    def kept(self) -> IkeContext:
        """See `runner.Work`."""
        return self.gone or self.shape

    async def view(self) -> SaView:
        """charon's view of it. Errors: CharonError, if charon no longer has it."""
        view = await self.host.view(self.shape.spis)
        if view is None:
            raise CharonError("charon lost the prepared SA")
        self.listed = view
        return view

    async def script(self, *, up: bool) -> None:
        """Run the connection's updown script, if one is configured. Errors: KernelError."""
        facts = self.facts
        context = tagged(self.gone or self.shape, dict(facts.tags))
        await self.host.updown(context, up=up, reqids=dict(facts.reqids), unique_id=facts.unique_id)


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
