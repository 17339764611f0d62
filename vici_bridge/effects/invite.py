"""Invite: over the SA itself the mobile node's agent is told to ask another gateway for it, or a relayed
mobile node the addresses of this gateway.

1. Mute the mobile node's messages to charon, wait until charon has ended its exchange, and mute charon's own.
2. Note charon's next message ID, then send the request under it. A step that begins anew sends the same
   octets, and the mobile node answers them as it did before.
3. Tell charon which message ID is next, and unmute it. It had to wait, because it would use that ID.

If that fails, or the agent ends meanwhile, another step follows: charon is unmuted, unless the request may
have been sent. Then the mobile node may have received it, and only its answer was lost. So charon only
answers, and the mobile node is called back later, as after a thaw: in the background, because it may come to
the other gateway at any moment, and the step by which the SA leaves then ends the call.

ESP is not touched.
"""

from __future__ import annotations

import asyncio

from ikectx.errors import LinkError
from ikectx.numbers import Status
from vici_bridge.ha.ike_id import IkeId

from .freeze import Freezing, find_ids, hear_nothing, say_nothing, wait
from .leaving import Leaving
from .runner import Facts, LedgerStep, StepEffect
from .speaking import speak, tell_ids
from .thaw import calls_back

SPEAKS = "charon speaks"
"""The effect from whose beginning on charon uses message IDs of its own again."""
INVITE_LIMIT = 15.0
"""Seconds for the mobile node to answer, less than an effect may take."""


async def _begin(work: Freezing) -> Facts:
    """The note that it began, because no journal knows of it, and charon is muted next. What the row knows
    of the message IDs is of a step before."""
    return {"request": None, "unsure": False}


async def _note_id(work: Freezing) -> Facts:
    await find_ids(work)
    assert work.known is not None
    # as long as it is not answered, the mobile node may have received it, under this ID or the next one
    return {"request": work.known.mid_initiator, "unsure": True}


async def _invite(work: Freezing) -> Facts:
    request = work.facts.request
    assert request is not None and work.teller is not None
    try:
        async with asyncio.timeout(INVITE_LIMIT):
            following = await work.teller(work.context, request, work.told)
    except TimeoutError:
        silent = f"the MN did not answer within {INVITE_LIMIT:g} s"
        raise LinkError(silent, status=Status.PEER_SILENT) from None
    return {"request": following}


async def _tell_id(work: Freezing) -> None:
    host = work.host
    await tell_ids(host, IkeId.of(work.context.current), work.facts.request)
    host.save()


async def _speak(work: Leaving) -> None:
    await speak(work.host, work.sa)


async def _only_answer(work: Leaving) -> None:
    work.host.mute.only_answer(work.sa)


def _asked(work: Leaving) -> bool:
    return work.facts.request is not None


def _not_asked(work: Leaving) -> bool:
    return work.facts.request is None


INVITE: LedgerStep[Freezing] = LedgerStep(
    "invite",
    (
        StepEffect("invitation begins", _begin, once=True),
        StepEffect("charon hears nothing", hear_nothing),
        StepEffect("charon ends its exchange", wait),
        StepEffect("charon says nothing", say_nothing),
        StepEffect("message ID", _note_id),
        StepEffect("invitation", _invite),
        StepEffect("charon knows the ID", _tell_id),
        StepEffect(SPEAKS, _speak, once=True),
    ),
    ends=True,
    journaled=False,
)

UNHEARD: LedgerStep[Leaving] = LedgerStep(
    "unheard",
    (
        StepEffect("charon speaks again", _speak, when=_not_asked),
        StepEffect("charon only answers", _only_answer, when=_asked),
        calls_back(_asked, postponed=True),
    ),
    ends=True,
    journaled=False,
)
