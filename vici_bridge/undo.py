"""Undo: nothing of an SA stays that was to come; the other gateway hears "not owned" when this is over.

1. charon drops it under each name that it may have here, also where it is not listed: an import that stopped
   in the middle leaves ancestors. Without charon nothing of it is there.
2. Rules for its messages go, what was relayed is relayed no more, and packets for the mobile node are led to
   the gateway that has it.
3. The updown script says "down", where it was told "up". One that hangs is called again later: the other
   gateway waits for the end of this step before it serves the SA again.
4. Names that were reserved are given back.
"""

from __future__ import annotations

from .activate import speak
from .coming import SCRIPT_LIMIT, Coming
from .runner import Effect, Step


async def _drop(work: Coming) -> None:
    host = work.host
    for shape in work.renames.names(work.here):
        if host.listening():
            await host.delete(shape)
        else:
            host.record.forget(shape.spis)
            host.save_soon()


async def _end_relay(work: Coming) -> None:
    await work.renames.end_relay(work.sa, 0.0)


async def _stay(work: Coming) -> None:
    work.host.away.stays(work.here)
    work.host.origins.undone(work.context)


async def _script_down(work: Coming) -> None:
    work.gone = work.gone or work.shape
    await work.script(up=False)


async def _forget(work: Coming) -> None:
    work.renames.forget(work.here, undone=True)


UNDO: Step[Coming] = Step(
    "undo",
    (
        Effect("delete in charon", _drop),
        Effect("rules", speak),
        Effect("relay", _end_relay),
        Effect("departures", _stay),
        Effect(
            "script down",
            _script_down,
            when=lambda work: work.facts.drawn != "",
            limit=SCRIPT_LIMIT,
            needed=False,
            once=True,
            later=True,
        ),
        Effect("names are given back", _forget),
    ),
    ends=True,
)
