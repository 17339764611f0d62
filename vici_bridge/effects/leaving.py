"""`Leaving`: an SA that this gateway gives to another one, for the steps freeze, thaw and release."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ikectx.engine.ledger import SourceFacts
from ikectx.sa.context import NO_TAGS, Address, IkeContext, Tags
from ikectx.sa.name import SaName
from ikectx.wire.payloads import AnyPayload
from vici_bridge.host import CharonHost, Mover
from vici_bridge.kernel.nat_rule import NatRule
from vici_bridge.kernel.xfrm import KernelPolicy
from vici_bridge.vici.views import SaView

Ender = Callable[[IkeContext, Sequence[int]], Awaitable[bool]]
"""Deletes the SA of a context at its mobile node, under each of the message IDs; returns whether it
answered."""
Teller = Callable[[IkeContext, int, Sequence[AnyPayload]], Awaitable[int]]
"""Tells the mobile node of a context these payloads, under that message ID; returns the next one. Errors:
LinkError (silent)."""
SCRIPT_LIMIT = 25.0
"""Seconds for the calls of the updown script for one SA. Slower ones are repeated later."""
LIVING = ("INSTALLED",)
ABOUT_ADDRESSES = frozenset({"IKE_MOBIKE", "IKE_DPD"})
"""charon's tasks whose request does not concern CHILD_SAs: if one gateway is silent, another may answer, and
if a mobile node has left, another gateway may go on with the next request."""


@dataclass(slots=True)
class Leaving:
    """One SA in one step. Times in seconds.

    view: charon's view when the step begins, None: charon does not have it. look: asks charon for its present
    view. to: name of the gateway that it goes to. away: the mobile node has proven that it is elsewhere.
    sending: ESP is still sent. renaming: CHILD_SAs may be given other SPIs. unprepared: the other gateway has
    no part of it yet. relay: the mobile node stays at this gateway, its packets are passed on. jump: of the
    outbound sequence numbers when it is taken back.
    """

    host: CharonHost
    context: IkeContext
    mover: Mover
    look: Callable[[], Awaitable[SaView | None]]
    ender: Ender | None = None
    view: SaView | None = None
    to: str = ""
    away: bool = False
    sending: bool = False
    renaming: bool = False
    unprepared: bool = False
    departing: bool = False
    jump: int = 0
    relay: NatRule | None = None

    sa: SaName = field(init=False)
    """See `runner.Work`."""
    outbound: tuple[list[KernelPolicy], list[KernelPolicy]] | None = field(default=None, init=False)
    """Its policies, as `outbound_of` found them in this step."""

    def __post_init__(self) -> None:
        self.sa = self.context.spis

    @property
    def kept(self) -> IkeContext:
        """See `runner.Work`."""
        return self.context

    @property
    def facts(self) -> SourceFacts:
        """The facts in its row."""
        return self.host.leaving.of(self.sa).facts

    @property
    def reqids(self) -> Mapping[bytes, int]:
        """charon's reqid of each CHILD_SA, by inbound SPI."""
        return dict(self.facts.reqids)

    def seen(self, view: SaView) -> dict[str, object]:
        """Facts for the updown script, while charon still has them."""
        return numbers_of(view)

    async def script(self, *, up: bool) -> None:
        """Run the connection's updown script, if one is configured. Errors: KernelError."""
        facts = self.facts
        context = tagged(self.context, dict(facts.tags))
        await self.host.updown(context, up=up, reqids=dict(facts.reqids), unique_id=facts.unique_id)


def numbers_of(view: SaView) -> dict[str, object]:
    """Facts for the updown script, while charon has them."""
    children = view.children
    return {
        "unique_id": view.unique_id,
        "reqids": tuple((child.spi_in, child.reqid) for child in children),
        "tags": tuple((child.spi_in, child.tags) for child in children if child.tags != NO_TAGS),
    }


def tagged(context: IkeContext, tags: Mapping[bytes, Tags]) -> IkeContext:
    """The SA with the marks and if_ids that it has here."""
    if not tags and all(child.tags == NO_TAGS for child in context.children):
        return context
    children = (replace(child, tags=tags.get(child.spi_in, NO_TAGS)) for child in context.children)
    return replace(context, children=tuple(children))


def in_the_way(view: SaView, away: bool) -> tuple[str, ...]:
    """charon's tasks that prevent the SA from leaving; `away`: except those whose request stays
    unanswered."""
    return tuple(task for task in view.tasks if not (away and task in ABOUT_ADDRESSES))


def last_request(context: IkeContext) -> int:
    """Message ID of charon's last request: the one before the ID that HA reported."""
    return max(context.mid_initiator - 1, 0)


def outbound_of(host: CharonHost, context: IkeContext) -> tuple[list[KernelPolicy], list[KernelPolicy]]:
    """The SA's outbound policies: all that it uses, and those of them whose packets reach it.

    If two SAs have the same selectors one of them has the policy, which goes, or stays, with that one.
    """
    assert host.kernel is not None
    pairs = [host.kernel_pair(context, child) for child in context.children]
    reqids = {outbound.reqid for _, outbound in pairs if outbound is not None}
    every = [policy for policy in host.kernel.policies_about(reqids) if policy.direction == "out"]
    return every, [policy for policy in every if _leads_to(policy, reqids, context.remote.address)]


def _leads_to(policy: KernelPolicy, reqids: set[int], mn: Address) -> bool:
    return any(one.reqid in reqids and one.destination == mn for one in policy.templates)
