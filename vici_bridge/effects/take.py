"""Take: the new gateway owns the SA from now on, because the other gateway has let go of it.

1. Complete changes of charon and the kernel that an agent before this one may have left half done
   (`renames`).
2. Write the final sequence numbers and windows into the kernel.
3. Verify that charon still has the SA, and note that the updown script will be called.
4. Lead packets for the mobile node here by the script, unless the mobile node waits for an answer, or this
   gateway cannot send packets before the mobile node knows new SPIs: then `activate` does that. A script that
   cannot be started undoes the transfer, because an SA without packets is not served; one that hangs is not
   waited for.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from ikectx.sa.context import IkeContext
from ikectx.within import Limit
from vici_bridge.updown import NotStarted
from vici_bridge.vici.views import SaView

from .coming import SCRIPT_LIMIT, Coming
from .leaving import numbers_of
from .prepare import write_replay
from .runner import Facts, LedgerStep, StepEffect

log = logging.getLogger(__name__)


async def converge(work: Coming) -> None:
    """Make charon and the kernel match the plan of new names. Errors: CharonError, KernelError."""
    await work.renames.converge(work.here)


async def _numbers(work: Coming) -> None:
    write_replay(work.host, work.shape, _finals(work))


def _finals(work: Coming) -> IkeContext:
    """The context with the other gateway's counters at the freeze."""
    assert work.final is not None
    left = {child.spi_in: child for child in work.final.children}
    children = tuple(
        replace(child, inbound=left[child.spi_in].inbound, outbound=left[child.spi_in].outbound)
        if child.spi_in in left
        else child
        for child in work.here.children
    )
    return replace(work.here, children=children)


async def _look(work: Coming) -> Facts | None:
    """What charon said when it had installed the SA will do, if that was just now."""
    work.host.hear()
    work.listed = work.host.listing.recent(work.shape.spis) or await work.view()
    work.memory.seen.add(work.sa)
    if not _leads_now(work):
        return None
    work.drawn_before = work.facts.drawn
    return will_lead(work.listed)


def will_lead(view: SaView) -> dict[str, object]:
    """The facts to note before the updown script is called with "up"."""
    return {**numbers_of(view), "drawn": "begun"}


async def _origin(work: Coming) -> None:
    peer = work.memory.givers.get(work.sa)
    if peer is not None:
        # one whose mobile node stays at this gateway's own address comes home
        relayed = work.facts.relayed and work.here.remote == work.context.remote
        work.host.origins.came(work.context, peer, work.shape.spis, relayed=relayed)


def _sends(work: Coming) -> bool:
    return not work.renames.others_send(work.here)


def _leads_now(work: Coming) -> bool:
    """Whether the script is called before the mobile node is told anything: a device that it makes must be
    there when packets come."""
    return work.facts.drawn != "done" and not work.waits and _sends(work)


async def open_way(work: Coming) -> None:
    """Remove routes that precede those by which charon leads packets to the SA."""
    work.host.away.opens(work.shape)


async def lead(work: Coming) -> Facts:
    """Have the updown script attract packets for the mobile node. Errors: NotStarted, if it cannot be
    started."""
    try:
        with Limit(SCRIPT_LIMIT):
            await work.script(up=True)
    except TimeoutError:
        log.warning("%s: the updown script hangs, it is not waited for", work.context.connection)
    return {"drawn": "done"}


async def script_up(work: Coming) -> Facts:
    """The same, before the SA is served: without its script it is not."""
    try:
        return await lead(work)
    except NotStarted as error:
        if not error.began:
            work.host.coming.note(work.sa, drawn=work.drawn_before)  # there is nothing to undo
        raise


TAKE: LedgerStep[Coming] = LedgerStep(
    "take",
    (
        StepEffect("new names", converge),
        StepEffect("numbers", _numbers, when=lambda work: work.host.kernel is not None),
        StepEffect("charon has it", _look),
        StepEffect("origin", _origin),
        StepEffect("way", open_way, when=_sends),
        StepEffect("script up", script_up, when=_leads_now, limit=SCRIPT_LIMIT + 5.0),
    ),
)
