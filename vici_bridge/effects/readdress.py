"""Readdress: a mobile node's SA gets other addresses or SPIs while it is PASSIVE.

1. Install guard policies: they keep outbound packets on the old SAs, or hold them back if these must be
   deleted first, and let inbound packets come by either pair, because charon's policies want the new one.
2. Delete old pairs that cannot exist beside the new ones, after noting their numbers; install the new ones by
   IKE_UPDATE and CHILD_ADD.
3. Set keys, sequence numbers and windows of the new pairs from those of the old ones, numbers beyond all that
   were used. Only then remove the outbound guards.
4. End the rewriting of packets (`ahead`), so that the new pairs get theirs, and tell them what the old ones
   have received until then. Remove the inbound guards.
5. Delete the old pairs, as soon as the other end sends by the new ones.
6. Change the IKE_SA's own SPIs last of all, because until then it is found under the old ones.
"""

from __future__ import annotations

from dataclasses import replace

from .ahead import go_home
from .moving import Moving
from .runner import Facts, LedgerStep, StepEffect


async def _guard(work: Moving) -> None:
    work.steps.guard(work.sa, work.move, await work.seen())


async def _add(work: Moving) -> None:
    work.view = await work.steps.add_pairs(work.sa, work.move, await work.seen())


async def _raise(work: Moving) -> None:
    work.steps.raise_numbers(work.sa, work.move)


async def _let_go(work: Moving) -> Facts:
    return {"move": work.steps.drop_guards(work.move, "out").dumps()}


async def _by_new_pairs(work: Moving) -> Facts:
    await go_home(work)
    work.steps.join_windows(work.move)
    return {"move": work.steps.drop_guards(work.move).dumps()}


async def _end_old(work: Moving) -> None:
    await work.steps.end_old_pairs(work.sa, work.move, await work.seen())


async def _rename(work: Moving) -> None:
    move = work.move
    if move.ike is not None:
        await work.steps.rename_ike(work.sa, move, move.ike)


async def _done(work: Moving) -> Facts:
    return {"move": replace(work.move, done=True).dumps()}


def _old_name(work: Moving) -> bool:
    """Whether charon has the SA under its old name; else its children have moved."""
    return work.view is not None


READDRESS: LedgerStep[Moving] = LedgerStep(
    "readdress",
    (
        StepEffect("guards", _guard, when=_old_name),
        StepEffect("new pairs", _add, when=_old_name),
        StepEffect("numbers", _raise, when=_old_name),
        StepEffect("guards go", _let_go, when=_old_name),
        StepEffect("packets by the new pairs", _by_new_pairs, when=_old_name),
        StepEffect("old pairs go", _end_old, when=_old_name),
        StepEffect("IKE_SA's name", _rename),
        StepEffect("all is done", _done),
    ),
    journaled=False,
    anew=True,
)
