"""Undo: remove everything of an SA that was to come. The other gateway is told "not owned" when this is
complete.

1. Make charon drop it under each name that it may have here, also if it is not listed, because an import that
   stopped in the middle leaves ancestors. If charon does not run, there is nothing to drop. ESP SAs that a
   charon has left which was killed are removed, because they look like an SA that is served.
2. Remove the rules that mute its messages, and its relay, and lead packets for the mobile node to the gateway
   that has it.
3. Run the updown script with "down", if it was called with "up". One that hangs is called again later,
   because the other gateway waits for the end of this step before it serves the SA again.
4. Release the reserved names.
"""

from __future__ import annotations

from itertools import chain

from .activate import unmute
from .coming import SCRIPT_LIMIT, Coming
from .runner import LedgerStep, StepEffect


async def _drop(work: Coming) -> None:
    host = work.host
    for shape in work.renames.names(work.here):
        if host.listening():
            await host.delete(shape)
        else:
            host.record.forget(shape.spis)
            host.save_soon()
        if host.kernel is not None:
            pairs = [host.kernel_pair(shape, child) for child in shape.children]
            for sa in filter(None, chain.from_iterable(pairs)):
                host.kernel.delete_sa(sa)


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


UNDO: LedgerStep[Coming] = LedgerStep(
    "undo",
    (
        StepEffect("delete in charon", _drop),
        StepEffect("rules", unmute),
        StepEffect("relay", _end_relay),
        StepEffect("departures", _stay),
        StepEffect(
            "script down",
            _script_down,
            when=lambda work: work.facts.drawn != "",
            limit=SCRIPT_LIMIT,
            needed=False,
            once=True,
            later=True,
        ),
        StepEffect("names are given back", _forget),
    ),
    ends=True,
)
