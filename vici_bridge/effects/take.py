"""Take: the new gateway owns the SA from now on, because the other gateway has let go of it.

1. Complete changes of charon and the kernel that an agent before this one may have left half done
   (`renames`).
2. Write the final sequence numbers and windows into the kernel.
3. Verify that charon still has the SA, and note that the updown script will be called.
4. Lead packets for the mobile node here by the script, unless this gateway cannot send them before the mobile
   node knows new SPIs; then that is done by `activate`. A script that cannot be started undoes the transfer,
   because an SA without packets is not served; one that hangs is not waited for.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from ikectx.sa.context import IkeContext
from ikectx.within import Limit
from vici_bridge.updown import NotStarted

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
    work.listed = await work.host.recent_view(work.shape.spis) or await work.view()
    work.memory.seen.add(work.sa)
    return will_lead(work) if leads_here(work) else None


def will_lead(work: Coming) -> Facts:
    """The facts to note before the updown script is called with "up"."""
    assert work.listed is not None
    work.drawn_before = work.facts.drawn
    return {**numbers_of(work.listed), "drawn": "begun"}


async def _origin(work: Coming) -> None:
    peer = work.memory.givers.get(work.sa)
    if peer is not None:
        # one whose mobile node stays at this gateway's own address comes home
        relayed = work.facts.relayed and work.here.remote == work.context.remote
        work.host.origins.came(work.context, peer, work.shape.spis, relayed=relayed)


def leads_here(work: Coming) -> bool:
    """Whether packets for the mobile node should be led here now, and are not yet."""
    return work.facts.drawn != "done" and (work.activates or not work.renames.others_send(work.here))


async def open_way(work: Coming) -> None:
    """Remove routes that precede those by which charon leads packets to the SA."""
    work.host.away.opens(work.shape)


async def script_up(work: Coming) -> Facts:
    """Have the updown script attract packets for the mobile node. Errors: NotStarted, if it cannot be
    started."""
    try:
        with Limit(SCRIPT_LIMIT):
            await work.script(up=True)
    except NotStarted as error:
        if not error.began:
            work.host.coming.note(work.sa, drawn=work.drawn_before)  # there is nothing to undo
        raise
    except TimeoutError:
        log.warning("%s: the updown script hangs, it is not waited for", work.context.connection)
    return {"drawn": "done"}


TAKE: LedgerStep[Coming] = LedgerStep(
    "take",
    (
        StepEffect("new names", converge),
        StepEffect("numbers", _numbers, when=lambda work: work.host.kernel is not None),
        StepEffect("charon has it", _look),
        StepEffect("origin", _origin),
        StepEffect("way", open_way, when=leads_here),
        StepEffect("script up", script_up, when=leads_here, limit=SCRIPT_LIMIT + 5.0),
    ),
)
