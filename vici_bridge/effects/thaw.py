"""Thaw: the old gateway serves an SA again that it was letting go.

1. Note charon's view of the SA, and the outbound sequence numbers from which it goes on. This is done once,
   because a thaw that begins anew must not use up numbers again.
2. Raise the numbers, then restore the outbound policies, then end the detour of packets for the mobile node.
   From here on ESP is served.
3. If somebody ended the SA here while it was leaving, delete it at the mobile node and in charon.
4. If the other gateway may have begun to serve, run the updown script, to attract the mobile node's packets
   here again, and call the mobile node back. Neither may delay the SA: a script that hangs, and a silent
   mobile node, are called again later.
5. Unmute charon. It had to wait for 4., because it would use message IDs that the mobile node has received,
   and asks nothing as long as the mobile node is silent.
6. Rekey CHILD_SAs that the mobile node may have under other SPIs.
7. Forget what was done for this move, in case the row stays because something is left for later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from ikectx import trace
from ikectx.engine.ports import SENDING_PACKETS
from ikectx.errors import CharonError, IkectxError, LinkError, RefusedError, WireError
from ikectx.sa.context import FinalState
from ikectx.sa.relocate import relocate
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.kernel.kernel import Kernel
from vici_bridge.kernel.xfrm import KernelPolicy

from .leaving import LIVING, SCRIPT_LIMIT, Leaving
from .runner import Facts, LedgerStep, StepEffect
from .speaking import go_on_asking, speak, tell_ids

log = logging.getLogger(__name__)

CALLS_BACK = "call back"
"""The effect that is left for later as long as nobody knows which message ID the mobile node expects."""
CALL_BACK = 40.0
"""Seconds in which the mobile node is called back, under all message IDs that can be the next one."""


async def _look(work: Leaving) -> Facts | None:
    view, facts = work.view, work.facts
    if view is None:  # what a killed charon left in the kernel sends on, once its policies are back
        return {"numbers": _numbers(work)} if facts.numbers is None else None
    found = work.seen(view)
    found["ended"] = facts.ended or (view.state == "DELETING" and facts.request is not None)
    if facts.numbers is None:
        found["numbers"] = _numbers(work)
    return found


def _numbers(work: Leaving) -> tuple[tuple[bytes, int], ...]:
    """The numbers from which outbound SAs go on, because the other gateway may have sent under the same
    keys."""
    host, jump = work.host, work.jump
    if work.facts.sends_to:
        jump = max(jump, 4 * SENDING_PACKETS)  # then the other gateway began twice as far ahead
    found = []
    for child in work.context.children if jump else ():
        _, outbound = host.kernel_pair(work.context, child)
        if outbound is not None:
            top = (1 << (64 if child.esn else 32)) - 1
            found.append((child.spi_out, min(outbound.replay.oseq + jump, top)))
    return tuple(found)


async def _raise_numbers(work: Leaving) -> None:
    kernel, numbers = work.host.kernel, dict(work.facts.numbers or ())
    for child in work.context.children if kernel is not None else ():
        _, outbound = work.host.kernel_pair(work.context, child)
        if outbound is not None and child.spi_out in numbers and kernel is not None:
            state = outbound.replay.outbound
            if state.seq < numbers[child.spi_out]:
                kernel.set_replay(outbound, replace(state, seq=numbers[child.spi_out]), outbound=True)


async def _put_back_policies(work: Leaving) -> None:
    """With the SA's present addresses: a mobile node that was about to leave may have changed its own since
    (MOBIKE). If charon was killed they are put back as well, beside what it has left in the kernel, or
    packets would leave in the clear until the mobile node has an SA again; its policies take their place.
    Not after a loss of power, when nothing is left: nobody would expect them there, and remove them."""
    kernel, policies = work.host.kernel, [KernelPolicy.parse(raw) for raw in work.facts.policies or ()]
    if kernel is None:
        return
    if work.view is None:
        policies = _missing(kernel, policies)
    local, remote = work.context.local.address, work.context.remote.address
    for policy in policies:
        now = tuple(
            one if one.destination.is_unspecified else replace(one, source=local, destination=remote)
            for one in policy.templates
        )
        kernel.replace_policy(replace(policy, templates=now))


def _missing(kernel: Kernel, outbound: Sequence[KernelPolicy]) -> list[KernelPolicy]:
    """Those of which the kernel has the inbound ones, and nothing in their place: the mobile node may have an
    SA again."""
    there = kernel.dump_policies() if outbound else []
    inbound = {policy.selector for policy in there if policy.direction == "in"}
    taken = {_place(policy) for policy in there if policy.direction == "out"}
    return [one for one in outbound if one.selector.opposite in inbound and _place(one) not in taken]


def _place(policy: KernelPolicy) -> tuple[object, ...]:
    """What no two policies of a direction have in common."""
    return policy.selector, policy.mark, policy.if_id


async def _end_detour(work: Leaving) -> None:
    work.host.away.back(work.sa)


async def _delete_at_mn(work: Leaving) -> None:
    """charon's Delete has the message ID that was given away, which the other gateway may have used, and the
    one after it. So the agent sends the Delete, under each ID that can be the next."""
    context, mid = work.context, work.facts.request or 0
    log.warning("%s was ended here while it was to leave: its MN is told", context.connection)
    if work.ender is None or not await work.ender(context, (mid, mid + 1, mid + 2)):
        log.warning("%s: the MN at %s did not answer the Delete", context.connection, context.remote)


async def _drop(work: Leaving) -> None:
    await work.host.delete(work.context)


async def _gone(work: Leaving) -> bool:
    return await work.host.view(work.sa) is None


async def _script_down(work: Leaving) -> None:
    await work.script(up=False)


async def _script_anew(work: Leaving) -> None:
    """The other gateway's script may have attracted the mobile node's packets, which it no longer accepts."""
    await work.script(up=False)
    await work.script(up=True)


@trace.spanned("call back")
async def _call_back(work: Leaving) -> None:
    """The mobile node may have received the other gateway's request, although its answer was lost: call it
    back.

    That request had the message ID that was given away. A mobile node that has received it takes a request
    with that ID for a copy and answers to the other gateway; then the next ID is the right one, for charon,
    too. If it is silent it is called again in the background until it answers or charon has given the SA up,
    because nobody knows which ID it expects. Until then charon answers its requests and does nothing else: it
    would ask in vain, and delete the SA when a late answer comes that it cannot assign.

    Errors: LinkError (silent).
    """
    host, facts = work.host, work.facts
    view = await host.view(work.sa)
    if view is None:  # it has ended, or has other SPIs, since the first call
        host.mute.unmute(work.sa)
        return
    # the other gateway's request, if it was sent, used one ID; one that nobody answered, and the two by which
    # the mobile node was asked about that, one each. The octets for an ID are the same each time, and it
    # answers them again.
    mid, ids = facts.request or 0, 4 if facts.unsure else 2
    asks = 0
    with contextlib.suppress(IkectxError):
        await host.catch_up(work.sa)
        asks = host.context(work.sa).mid_initiator
    if asks > mid + 1:
        # that was done, and charon has asked since: under these IDs the mobile node would ignore the agent
        await _speak(work)
        return
    context = relocate(work.context, local=view.local, remote=view.remote)
    if facts.renaming:
        # CREATE_CHILD_SA and INFORMATIONAL D for each child, and one request to begin with
        ids += 1 + 2 * len(context.children)
    host.mute.mute(work.sa)
    if view.state == "DELETING":  # somebody has ended it here since, and its Delete was dropped
        await _delete_at_mn(work)
        await _drop(work)
        host.mute.unmute(work.sa)
        return
    answered = False
    try:
        for used in range(1, ids + 1):
            final = FinalState(*work.sa, mid + used - 1, context.mid_responder, context.epoch + 1)
            try:
                async with asyncio.timeout(CALL_BACK / ids):
                    await work.mover(context, final, lambda: False)
            except RefusedError as error:
                log.warning("%s: %s", context.connection, error)
            except (LinkError, TimeoutError):
                continue
            await tell_ids(host, IkeId.of(context.current), mid + used)
            host.save()
            answered = True
            break
    finally:
        if answered:
            await _speak(work)
        else:
            host.mute.only_answer(work.sa)
    if not answered:
        raise LinkError(f"{context.connection}: the MN at {context.remote} is silent here, too")
    if not work.facts.renaming:
        await go_on_asking(host, work.sa)
    elif not _knows_ids(work):  # the effect "rekey" was left out if charon was to ask nothing
        try:
            await _renew(work)
        except (CharonError, WireError) as error:
            log.warning("%s: its CHILD_SAs are not rekeyed: %s", context.connection, error)


async def _speak(work: Leaving) -> None:
    await speak(work.host, work.sa)


async def _renew(work: Leaving) -> None:
    """If the mobile node has another child it answers CHILD_SA_NOT_FOUND, and charon makes a new one
    (child_rekey, strongSwan 5.9.8, 6.0.6)."""
    view = await work.host.view(work.sa)
    for child in view.children if view is not None else ():
        if child.state in LIVING:
            log.info(
                "%s: CHILD_SA %s is rekeyed: the MN may have other SPIs", work.context.connection, child.name
            )
            try:
                await work.host.vici.rekey(child_id=child.unique_id)
            except CharonError as error:
                log.warning(
                    "CHILD_SA %s of %s is not rekeyed: %s", child.name, work.context.connection, error
                )


async def _forget(work: Leaving) -> Facts:
    """A row that stays for what is left for later must not tell the next move that packets are led away
    already, nor the next thaw its numbers."""
    return {"policies": None, "diverted": False, "sends_to": "", "counters": (), "numbers": None}


def _served(work: Leaving) -> bool:
    """Whether charon has the SA, and the other gateway may have asked for it."""
    return work.view is not None and work.facts.request is not None and not work.facts.ended


def _knows_ids(work: Leaving) -> bool:
    return CALLS_BACK not in work.host.leaving.of(work.sa).later


def _ended(work: Leaving) -> bool:
    return work.facts.ended


def calls_back(when: Callable[[Leaving], bool], *, postponed: bool = False) -> StepEffect[Leaving]:
    """The effect by which the mobile node is called back until it answers. `when`, `postponed`: as in
    `StepEffect`."""
    return StepEffect(
        CALLS_BACK,
        _call_back,
        when=when,
        limit=CALL_BACK + 5.0,
        needed=False,
        once=True,
        later=True,
        endless=True,
        postponed=postponed,
    )


THAW: LedgerStep[Leaving] = LedgerStep(
    "thaw",
    (
        StepEffect("look", _look),
        StepEffect("numbers", _raise_numbers),
        StepEffect("policies", _put_back_policies),
        StepEffect("detour", _end_detour),
        StepEffect("delete at the MN", _delete_at_mn, when=_ended, needed=False, once=True),
        StepEffect("delete in charon", _drop, when=_ended, probe=_gone),
        StepEffect(
            "script of what was ended",
            _script_down,
            when=_ended,
            limit=SCRIPT_LIMIT,
            needed=False,
            once=True,
            later=True,
        ),
        StepEffect(
            "script anew", _script_anew, when=_served, limit=SCRIPT_LIMIT, needed=False, once=True, later=True
        ),
        calls_back(_served),
        StepEffect("charon speaks", _speak, when=_knows_ids),
        StepEffect(
            "rekey",
            _renew,
            when=lambda work: _served(work) and work.facts.renaming and _knows_ids(work),
            needed=False,
            once=True,
            later=True,
        ),
        StepEffect("that move is over", _forget),
    ),
    ends=True,
)
