"""Release: the old gateway clears away an SA that the other gateway serves.

1. Stop ESP that is still sent. Send packets for the mobile node on, which the freeze has blocked if the other
   gateway had nothing of the SA: they wait for this, so charon is asked for nothing before.
2. Note charon's view of the SA, because after its deletion the updown script could not be given it.
3. Take out traps by which charon would begin the SA anew. Make charon drop the SA silently, and restore its
   inbound SAs for some seconds, because late packets are on their way.
4. Remove the rules that mute its messages. Report the departure to the gateways that it came from, and to the
   one that it went to if somebody ended it here meanwhile.
5. Run the updown script with "down". This comes last, because a script that hangs must delay nothing else. It
   is called exactly once after any interruption, provided that its end could be noted.
"""

from __future__ import annotations

import logging

from ikectx.errors import CharonError, WireError

from .freeze import goes_on_still, stop_at_last
from .heirs import heir_of
from .leaving import SCRIPT_LIMIT, Leaving
from .runner import Facts, LedgerStep, StepEffect

log = logging.getLogger(__name__)


async def _look(work: Leaving) -> Facts | None:
    if work.view is None:
        return {"unique_id": 0}  # charon lost it before: its own updown plugin has called the script "down"
    return {**work.seen(work.view), "ended": work.view.state == "DELETING"}


async def _stop_sending(work: Leaving) -> None:
    stop_at_last(work)


async def _send_on(work: Leaving) -> None:
    work.host.away.left(work.sa)


async def _untrap(work: Leaving) -> None:
    try:
        await work.host.traps.leave(work.context)
    except (CharonError, WireError) as error:  # the SA must be let go all the same
        log.warning("%s: charon may begin it anew, its traps are in: %s", work.context.connection, error)


async def _drop(work: Leaving) -> None:
    await work.host.delete(work.context, work.host.late_packets(work.context, work.context.children))


async def _gone(work: Leaving) -> bool:
    return await work.host.view(work.sa) is None


async def _forget_rules(work: Leaving) -> None:
    work.host.mute.unmute(work.sa)


async def _tell(work: Leaving) -> None:
    host = work.host
    departure = host.away.left(work.sa)
    if departure is None:
        return
    host.origins.left(departure)
    if work.facts.ended:
        log.warning("%s was ended here while it left: %s is told", work.context.connection, departure.peer)
        host.origins.end(departure)


async def _script(work: Leaving) -> None:
    late = work.host.leaving.of(work.sa).step == ""
    if late and await heir_of(work.host, work.context) is not None:
        log.info("%s: its mobile node is here again, so its script is not told that it left", work.sa)
        return
    await work.script(up=False)


RELEASE: LedgerStep[Leaving] = LedgerStep(
    "release",
    (
        StepEffect(
            "ESP stops",
            _stop_sending,
            when=lambda work: work.view is not None and goes_on_still(work),
        ),
        # charon's own SAs decrypt until here; from now on nothing of a relayed mobile node is for this charon
        StepEffect("packets follow", _send_on),
        StepEffect("look", _look),
        StepEffect("traps", _untrap, when=lambda work: work.view is not None),
        StepEffect("delete in charon", _drop, when=lambda work: work.view is not None, probe=_gone),
        StepEffect("rules", _forget_rules),
        StepEffect("departure", _tell),
        StepEffect(
            "script",
            _script,
            when=lambda work: work.facts.unique_id != 0,
            limit=SCRIPT_LIMIT,
            needed=False,
            once=True,
            later=True,
        ),
    ),
    ends=True,
)
