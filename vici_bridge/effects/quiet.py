"""Quiet: a mobile node's SA becomes PASSIVE, so that charon neither sends nor accepts anything while it
moves.

1. Wait until charon has ended the exchange that is under way, unless that may be left open.
2. Note that the SA is passive before it is, because an agent that starts must make it active again.
3. Make charon passive, which affects all SAs of its segment, and verify that it is.
"""

from __future__ import annotations

import asyncio

from ikectx.clock import steady_wall
from ikectx.errors import BusyError
from vici_bridge.vici.views import SaView

from .leaving import ABOUT_ADDRESSES
from .moving import Moving
from .runner import Facts, LedgerStep, StepEffect

PATIENCE = 60.0
"""Seconds for charon to end its exchange; `CharonMobile.quiet` allows less."""


def in_the_way(view: SaView, *, unanswered: bool) -> tuple[str, ...]:
    """charon's tasks that prevent an SA from being made passive."""
    return tuple(task for task in view.tasks if not (unanswered and task in ABOUT_ADDRESSES))


async def _wait(work: Moving) -> None:
    end = asyncio.get_running_loop().time() + work.patience
    view = await work.seen()
    while not _idle(work, view) or view.state != "ESTABLISHED":
        if asyncio.get_running_loop().time() > end:
            what = ", ".join(view.tasks) or f"it is {view.state}"
            raise BusyError(f"the IKE_SA {view.name} has an exchange in flight: {what}", hint="try again")
        await asyncio.sleep(0.02)
        view = await work.steps.seen(work.sa)
    work.view = view


def _idle(work: Moving, view: SaView) -> bool:
    return work.anything or not in_the_way(view, unanswered=work.unanswered)


async def _note(work: Moving) -> Facts:
    work.host.deadlines.note(await work.seen(), steady_wall())
    return {"quiet": True}


async def _pause(work: Moving) -> None:
    await work.host.segments.pause()
    view = await work.steps.until(work.sa, "make the SA passive", lambda view: view.state == "PASSIVE")
    if not _idle(work, view):
        raise BusyError(f"charon began an exchange meanwhile: {', '.join(view.tasks)}")


QUIET: LedgerStep[Moving] = LedgerStep(
    "quiet",
    (
        StepEffect("charon ends its exchange", _wait, limit=PATIENCE),
        StepEffect("passive is noted", _note),
        StepEffect("charon is passive", _pause),
    ),
    journaled=False,
)
