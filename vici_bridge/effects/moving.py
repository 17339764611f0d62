"""`Moving`: a mobile node's own SA, for the steps quiet, readdress and loud."""

from __future__ import annotations

from dataclasses import dataclass

from ikectx.engine.ledger import MobileFacts
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from vici_bridge.host import CharonHost
from vici_bridge.kernel.rewrite import NewPlace
from vici_bridge.vici.views import SaView

from .mobile_move import MobileMove
from .steps import MoveSteps


@dataclass(slots=True)
class Moving:
    """One SA in one step. `sa`: its name when it was made passive.

    name: its present name. view: charon's view of it under its old name, None: charon does not have it.
    unanswered, anything, patience: see `CharonMobile.quiet`. rekeys: its children are to be rekeyed when it
    is active. place: where its ESP goes ahead of its SAs.
    """

    host: CharonHost
    steps: MoveSteps
    sa: SaName
    name: SaName
    view: SaView | None = None
    unanswered: bool = False
    anything: bool = False
    patience: float = 0.0
    rekeys: bool = False
    place: NewPlace | None = None

    @property
    def kept(self) -> IkeContext:
        """See `runner.Work`."""
        return self.host.record.context(self.name)

    @property
    def facts(self) -> MobileFacts:
        """The facts in its row."""
        return self.host.own.of(self.sa).facts

    @property
    def move(self) -> MobileMove:
        """Its change of addresses or SPIs. Errors: StoreError."""
        return MobileMove.loads(self.facts.move)

    async def seen(self) -> SaView:
        """charon's view of it under its old name. Errors: CharonError, UnknownSaError."""
        if self.view is None:
            self.view = await self.steps.seen(self.sa)
        return self.view
