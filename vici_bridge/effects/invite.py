"""Invite: over the SA itself the mobile node's agent is told to ask another gateway for it, or a relayed
mobile node the addresses of this gateway.

1. Mute the mobile node's messages to charon, wait until charon has ended its exchange, and mute charon's own.
2. Note charon's next message ID, then send the request under it. A step that begins anew sends the same
   octets, and the mobile node answers them as it did before.
3. Tell charon which message ID is next, and unmute it. It had to wait, because it would use that ID.
4. A mobile node that has not answered may have received the request, and only its answers were lost: it is
   called back later, as after a thaw, and until then charon only answers.

ESP is not touched.
"""

from __future__ import annotations

from vici_bridge.ha.ike_id import IkeId

from .freeze import Freezing, find_ids, hear_nothing, say_nothing, wait
from .runner import Facts, LedgerStep, StepEffect
from .speaking import speak, tell_ids
from .thaw import CALL_LIMIT, CALLS_BACK, call_back

SPEAKS = "charon speaks"
"""The effect from whose beginning on charon uses message IDs of its own again."""
INVITE_LIMIT = 15.0
"""Seconds for the mobile node to answer."""


async def _begin(work: Freezing) -> None:
    """Nothing but the note that it began, because no journal knows of it, and charon is muted next."""


async def _note_id(work: Freezing) -> Facts:
    await find_ids(work)
    assert work.known is not None
    # as long as it is not answered, the mobile node may have received it, under this ID or the next one
    return {"request": work.known.mid_initiator, "unsure": True}


async def _invite(work: Freezing) -> Facts:
    request = work.facts.request
    assert request is not None and work.teller is not None
    following = await work.teller(work.context, request, work.told)
    work.answered = True
    return {"request": following}


async def _tell_id(work: Freezing) -> None:
    host = work.host
    await tell_ids(host, IkeId.of(work.context.current), work.facts.request)
    host.save()


async def _speak(work: Freezing) -> None:
    await speak(work.host, work.sa)


async def _only_answer(work: Freezing) -> None:
    work.host.mute.only_answer(work.sa)


def _heard(work: Freezing) -> bool:
    return work.answered


def _unheard(work: Freezing) -> bool:
    return not work.answered


INVITE: LedgerStep[Freezing] = LedgerStep(
    "invite",
    (
        StepEffect("invitation begins", _begin, once=True),
        StepEffect("charon hears nothing", hear_nothing),
        StepEffect("charon ends its exchange", wait),
        StepEffect("charon says nothing", say_nothing),
        StepEffect("message ID", _note_id),
        StepEffect("invitation", _invite, limit=INVITE_LIMIT, needed=False),
        StepEffect("charon knows the ID", _tell_id, when=_heard),
        StepEffect(SPEAKS, _speak, when=_heard, once=True),
        StepEffect("charon only answers", _only_answer, when=_unheard),
        StepEffect(
            CALLS_BACK,
            call_back,
            when=_unheard,
            limit=CALL_LIMIT,
            needed=False,
            once=True,
            later=True,
            endless=True,
            postponed=True,
        ),
    ),
    ends=True,
    journaled=False,
)
