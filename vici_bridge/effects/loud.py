"""Loud: a mobile node's SA becomes active again, at its present addresses and under its present name.

1. Rewrite no packets any more (`ahead`): what could be given new addresses has them.
2. Make charon active, and verify that it is. If the SA has gone, others were made passive with it. Then the
   row says that nothing is open any more.
3. Have charon look for its way to its gateway, if it has the SA at an address that is none of this host any
   more: it did not hear of the change while the SA was passive, and the SA was given no other one, because
   no gateway wanted it.
4. Have charon rekey the children, if one could not be moved, or because ESP in user space began its sequence
   numbers anew, under keys that were used.
5. Note which rekeys came due meanwhile, of this SA and of others that were passive with it.
"""

from __future__ import annotations

import contextlib

from ikectx.clock import steady_wall
from ikectx.errors import UnknownSaError

from .ahead import go_home
from .moving import Moving
from .runner import Facts, LedgerStep, StepEffect


async def activate(work: Moving) -> Facts:
    """Make the segment active again. Errors: CharonError."""
    host = work.host
    there = await host.view(work.name) is not None
    if there or host.listening():
        await host.segments.activate()
    if there:
        with contextlib.suppress(UnknownSaError):
            work.view = await work.steps.until(
                work.name, "activate the SA", lambda view: view.state in ("ESTABLISHED", "REKEYING")
            )
    return {"quiet": False, "move": b""}


async def look_for_way(work: Moving) -> None:
    """Errors: CharonError, KernelError."""
    host = work.host
    view = await host.view(work.name)
    if view is not None and not host.detour.is_here(view.local.address):
        host.detour.stir(view.remote.address)


async def rekey_children(work: Moving) -> None:
    """Have charon rekey all CHILD_SAs. Errors: CharonError."""
    view = await work.host.view(work.name)
    for child in view.children if view is not None else ():
        if child.state == "INSTALLED":
            await work.host.vici.rekey(child_id=child.unique_id)


async def note_missed(work: Moving) -> None:
    """Errors: CharonError, WireError."""
    for view in await work.host.views():
        if view.state != "PASSIVE":
            work.host.deadlines.missed(view, steady_wall())


LOUD: LedgerStep[Moving] = LedgerStep(
    "loud",
    (
        StepEffect("ESP goes by its SAs", go_home, limit=5.0, needed=False),
        StepEffect("charon is active", activate),
        StepEffect("charon looks for its way", look_for_way, limit=5.0, needed=False),
        StepEffect("children are rekeyed", rekey_children, when=lambda work: work.rekeys),
        StepEffect("rekeys that came due", note_missed, limit=5.0, needed=False),
    ),
    ends=True,
    journaled=False,
)
