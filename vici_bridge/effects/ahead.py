"""Ahead: a mobile node's ESP leaves from its new place to the new gateway, before that has answered.

1. Raise the sequence numbers by the jump: below it the new gateway takes every packet for one that the old
   gateway has had, so that none can be replayed.
2. Rewrite the outer addresses of its packets (`vici_bridge.kernel.rewrite`). The new gateway decrypts them as
   soon as it has the SA: if the move was announced, at once.

Home: the new gateway does not serve the SA, or charon has its new addresses already.

1. Rewrite nothing. An agent that starts does that, too.

Neither is needed: without them packets wait until charon's SAs have other addresses.
"""

from __future__ import annotations

import logging

from .moving import Moving
from .runner import LedgerStep, StepEffect

log = logging.getLogger(__name__)

_LIMIT = 5.0


async def _jump(work: Moving) -> None:
    if work.place is not None:
        work.steps.jump(work.place)


async def _go(work: Moving) -> None:
    rewrite = work.host.rewrite
    if rewrite is not None and work.place is not None:
        rewrite.begin(work.place)


async def go_home(work: Moving) -> None:
    """Rewrite nothing any more. Errors: KernelError."""
    if work.host.rewrite is not None:
        work.host.rewrite.end()


AHEAD: LedgerStep[Moving] = LedgerStep(
    "ahead",
    (
        StepEffect("numbers jump", _jump, limit=_LIMIT),
        StepEffect("ESP goes by the new place", _go, limit=_LIMIT),
    ),
    journaled=False,
    anew=True,
)
HOME: LedgerStep[Moving] = LedgerStep(
    "home",
    (StepEffect("ESP goes by its SAs", go_home, limit=_LIMIT, needed=False),),
    journaled=False,
)
