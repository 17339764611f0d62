"""Freeze: the old gateway lets an SA go without losing a packet, below charon, which can freeze only
segments.

1. Mute the mobile node's messages to charon, so that no new exchange begins.
2. Wait until charon has ended an exchange that is under way, if there may be one.
3. Note the outbound policies. If the other gateway is prepared, verify that it would go on at numbers that
   were not used here. Then send packets for the mobile node on to it or block them, and remove the policies.
   Inbound SAs stay, so that late packets are decrypted until the SA is released. If the other gateway cannot
   send yet, ESP is sent on instead, and counted. This comes before all that asks charon, because packets for
   a mobile node that has left are lost until then.
4. Mute charon's messages to the mobile node.
5. Verify that charon has the SA as it was exported. Then read its message IDs, and last of all the counter of
   muted messages, because it must include everything that charon began until then.
6. Read the counters, which no longer change. With them the SA is let go.

Muting takes two requests over netlink, which are quicker than a thread. charon is asked for the SA once,
unless an exchange may be under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ikectx import trace
from ikectx.errors import BusyError
from ikectx.sa.context import ChildContext, FinalChild, FinalState, IkeContext, ReplayState
from ikectx.wire.payloads import AnyPayload
from vici_bridge.vici.views import SaView

from .leaving import LIVING, Leaving, Teller, in_the_way, last_request, outbound_of
from .runner import Facts, LedgerStep, StepEffect, with_context

IDLE_TIMEOUT = 3.0
"""Seconds to wait for charon to finish an exchange that is under way at the freeze."""

QUIET = 1.0
"""Seconds after the last IKE request for which charon may still be in its exchange."""


@dataclass(slots=True)
class Freezing(Leaving):
    """known: the SA with the message IDs that were found. listed: charon's last view. final: its ESP SAs as
    they were left. teller: tells the mobile node the payloads `told`."""

    known: IkeContext | None = None
    listed: SaView | None = None
    teller: Teller | None = None
    told: Sequence[AnyPayload] = ()
    final: tuple[FinalChild, ...] = ()

    def result(self) -> FinalState:
        """The final state for the other gateway."""
        assert self.known is not None
        return FinalState(
            spi_i=self.sa.spi_i,
            spi_r=self.sa.spi_r,
            # the mobile node that charon gave up never received the last request, so its ID is still the next
            # one
            mid_initiator=max(self.known.mid_initiator - self.departing, 0),
            mid_responder=self.known.mid_responder,
            epoch=self.context.epoch + 1,
            children=self.final,
            unsure=self.known.unsure,
        )

    @property
    def goes_on(self) -> bool:
        """Whether ESP goes on while the SA is frozen."""
        return self.sending and self.host.kernel is not None


async def hear_nothing(work: Freezing) -> None:
    work.host.mute.mute_in(work.sa)


@trace.spanned("charon idle")
async def wait(work: Freezing) -> None:
    """If `away`, an exchange that waits for the absent mobile node may be open, if a second look finds it,
    too, or if it is older than `QUIET`."""
    if work.host.heard.quiet(work.sa) > QUIET:
        return  # if an exchange began since, the next look finds that
    end = asyncio.get_running_loop().time() + IDLE_TIMEOUT
    before: tuple[str, ...] = ()
    while True:
        view = await _same(work)
        if not view.tasks or (view.tasks == before and not in_the_way(view, work.away)):
            return
        before = view.tasks
        if asyncio.get_running_loop().time() > end:
            raise BusyError(f"an exchange is in flight: {', '.join(view.tasks)}")
        await asyncio.sleep(0.05)


async def say_nothing(work: Freezing) -> None:
    work.host.mute.mute_out(work.sa)


async def find_ids(work: Freezing) -> None:
    """Find the message IDs. charon reports the next one over HA when it sends a request, not when that is
    answered. With the SA muted no answer arrives any more, so the mobile node expects that ID or the one
    before it."""
    host = work.host
    work.listed = view = await _same(work)
    await host.catch_up(work.sa)
    known = host.context(work.sa)
    # an SA whose mobile node is called back: charon was not told since which ID that expects
    silent = work.context.unsure and known.mid_initiator <= work.context.mid_initiator
    unsure = bool(work.away and (view.tasks or silent))
    dropped = host.mute.dropped(work.sa)
    if in_the_way(view, work.away) or (dropped and not unsure):
        raise BusyError("charon began an exchange while it was being frozen")
    mid = work.context.mid_initiator if silent else last_request(known)
    work.known = replace(known, mid_initiator=mid, unsure=True) if unsure else known


async def _go_on(work: Freezing) -> Facts:
    """An agent that starts needs the SA's addresses of now to end it; the record has those of then."""
    leaving = work.host.leaving
    leaving.hold(with_context(leaving.of(work.sa), work.context))
    return {"sends_to": work.to}


async def _note_policies(work: Freezing) -> Facts:
    work.outbound = outbound_of(work.host, work.context)
    return {"policies": tuple(policy.raw for policy in work.outbound[1])}


async def _stop(work: Freezing) -> None:
    if not work.unprepared:
        _check_sent(work)
    stop(work)


def _check_sent(work: Freezing) -> None:
    """The other gateway goes on at the exported numbers and the jump as soon as packets are sent on to it,
    which is before it has the counters of the freeze. A quarter of the jump is left for the packets of the
    milliseconds until ESP has stopped. Errors: BusyError, KernelError."""
    jump = work.host.config.oseq_jump
    for child, _, outbound in _replay_states(work):
        sent = outbound.seq - child.outbound.seq
        if work.host.kernel is not None and sent >= jump - jump // 4:
            raise BusyError(
                f"{sent} packets left by CHILD_SA {child.name} since it was exported, and the other gateway "
                f"goes on {jump} after that: it must be exported anew",
                hint="a larger `oseq_jump` at all gateways, if that comes again",
            )


def _replay_states(work: Freezing) -> list[tuple[ChildContext, ReplayState, ReplayState]]:
    """The kernel's present state of each CHILD_SA, inbound and outbound. With ESP in user space, where nobody
    can read it, the exported one. Errors: BusyError, KernelError."""
    host, found = work.host, []
    for child in work.context.children:
        inbound, outbound = child.inbound, child.outbound
        if host.kernel is not None:
            sa_in, sa_out = host.kernel_pair(work.context, child)
            if sa_in is None or sa_out is None:
                raise BusyError(f"CHILD_SA {child.name} went away while it was being frozen")
            inbound, outbound = sa_in.replay.inbound, sa_out.replay.outbound
        found.append((child, inbound, outbound))
    return found


@trace.spanned("stop outbound")
def stop(work: Leaving) -> None:
    """Stop ESP: packets for the mobile node go to the new gateway if a way is known, else they are
    blocked."""
    host = work.host
    if host.kernel is None:
        host.away.leave(work.context, work.to, (), unprepared=work.unprepared, relay=work.relay)
        return
    every, ours = work.outbound or outbound_of(host, work.context)
    host.away.leave(work.context, work.to, every, unprepared=work.unprepared, relay=work.relay)
    host.kernel.delete_policies(ours)


def goes_on_still(work: Leaving) -> bool:
    """Whether ESP of a frozen SA is still sent."""
    return bool(work.facts.sends_to) and work.facts.policies is None


def stop_at_last(work: Leaving) -> None:
    """Stop the ESP that is still sent, as any other freeze has done before."""
    work.to = work.facts.sends_to
    if work.host.kernel is not None:
        work.outbound = outbound_of(work.host, work.context)
        work.host.leaving.note(work.sa, policies=tuple(policy.raw for policy in work.outbound[1]))
    stop(work)


async def _read_counters(work: Freezing) -> Facts:
    work.final = tuple(
        FinalChild(child.spi_in, inbound, outbound) for child, inbound, outbound in _replay_states(work)
    )
    assert work.known is not None
    return {
        **({} if work.listed is None else work.seen(work.listed)),
        "renaming": work.renaming,
        "request": work.known.mid_initiator,
        "unsure": work.known.unsure,
        "counters": tuple((child.spi_in, child.outbound.seq) for child in work.final),
    }


async def _same(work: Freezing) -> SaView:
    """The SA's view, if it is still as it was exported. Errors: BusyError."""
    view, context = await work.look(), work.context
    if view is None:
        raise BusyError("the IKE_SA was rekeyed or deleted meanwhile")
    if view.state != "ESTABLISHED":
        raise BusyError(f"the IKE_SA is {view.state} now")
    if (view.local, view.remote) != (context.local, context.remote):
        raise BusyError("the MN moved meanwhile")
    living = {(child.spi_in, child.spi_out) for child in view.children if child.state in LIVING}
    if living != {(child.spi_in, child.spi_out) for child in context.children}:
        raise BusyError("a CHILD_SA was rekeyed, made or deleted meanwhile")
    return view


def _stops(work: Freezing) -> bool:
    return not work.goes_on and not work.facts.diverted


async def _diverted(work: Freezing) -> Facts:
    return {"diverted": True}


DIVERT: LedgerStep[Freezing] = LedgerStep(
    "divert",
    (
        StepEffect("policies are noted", _note_policies),
        StepEffect("ESP stops", _stop),
        StepEffect("that is noted", _diverted),
    ),
    journaled=False,
)
"""Divert: packets for a mobile node that leaves at once go to the new gateway, which holds them. The freeze
then does the rest, or the thaw takes it back."""

FREEZE: LedgerStep[Freezing] = LedgerStep(
    "freeze",
    (
        StepEffect("charon hears nothing", hear_nothing),
        StepEffect("charon ends its exchange", wait),
        StepEffect("ESP goes on", _go_on, when=lambda work: work.goes_on),
        StepEffect(
            "policies are noted",
            _note_policies,
            when=lambda work: _stops(work) and work.host.kernel is not None,
        ),
        StepEffect("ESP stops", _stop, when=_stops),
        StepEffect("charon says nothing", say_nothing),
        StepEffect("message IDs", find_ids),
        # written together with the journal's next state, which says that the SA was let go
        StepEffect("counters", _read_counters),
    ),
)
