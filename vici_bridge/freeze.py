"""Freeze: pSG lets go of an SA without losing a packet, below charon, which can freeze only whole segments.

1. Nothing of the mobile node reaches charon any more, so that no new exchange begins.
2. charon ends the exchange that is under way, if any.
3. Nothing of charon leaves any more.
4. charon has the SA as it was exported. Only then are its message IDs read, and last of all the counter of
   what was kept from leaving, because it must be counted whatever charon began until then.
5. The outbound policies are written down, packets for the mobile node go to the other gateway from now on or
   nowhere, and the policies go. Inbound SAs stay: late packets are decrypted until the SA is released. Where
   the other gateway cannot send yet, ESP goes on instead and is counted.
6. Counters are read when nothing changes them any more, and with them the SA is let go.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

from ikectx import trace
from ikectx.context import FinalChild, FinalState, IkeContext
from ikectx.errors import BusyError

from .charon import SaView
from .leaving import LIVING, Leaving, in_the_way, last_request, outbound_of
from .runner import Effect, Facts, Step

IDLE_TIMEOUT = 3.0
"""Seconds to wait for charon to finish an exchange that is under way when it is frozen."""


@dataclass(slots=True)
class Freezing(Leaving):
    """known: the SA with the message IDs that were found. final: its ESP SAs as they were left."""

    known: IkeContext | None = None
    final: tuple[FinalChild, ...] = ()

    def result(self) -> FinalState:
        """What the other gateway is told."""
        assert self.known is not None
        return FinalState(
            spi_i=self.sa.spi_i,
            spi_r=self.sa.spi_r,
            # an MN that charon gave up never saw the last request: its ID is still the next one
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


async def _hear_nothing(work: Freezing) -> None:
    await asyncio.to_thread(work.host.mute.mute_in, work.sa)


@trace.spanned("charon idle")
async def _wait(work: Freezing) -> None:
    """`away`: an exchange that an MN that has left does not answer may be, if a second look finds it, too."""
    end = time.monotonic() + IDLE_TIMEOUT
    before: tuple[str, ...] = ()
    while True:
        view = await _same(work)
        if not view.tasks or (view.tasks == before and not in_the_way(view, work.away)):
            return
        before = view.tasks
        if time.monotonic() > end:
            raise BusyError(f"an exchange is in flight: {', '.join(view.tasks)}")
        await asyncio.sleep(0.05)


async def _say_nothing(work: Freezing) -> None:
    await asyncio.to_thread(work.host.mute.mute_out, work.sa)


async def _find_ids(work: Freezing) -> None:
    """charon tells over HA the ID after that of a request when it sends it, not when it is answered. With the
    SA muted no answer comes any more, so the MN expects that ID or the one before it."""
    host = work.host
    view = await _same(work)
    await host.catch_up(work.sa)
    known = host.context(work.sa)
    unsure = bool(work.away and view.tasks)
    _, dropped = await asyncio.to_thread(host.mute.counters, work.sa)
    if in_the_way(view, work.away) or (dropped and not unsure):
        raise BusyError("charon began an exchange while it was being frozen")
    work.known = replace(known, mid_initiator=last_request(known), unsure=True) if unsure else known


async def _go_on(work: Freezing) -> Facts:
    return {"sends_to": work.to}


async def _note_policies(work: Freezing) -> Facts:
    return {"policies": tuple(policy.raw for policy in outbound_of(work.host, work.context)[1])}


async def _stop(work: Freezing) -> None:
    stop(work)


@trace.spanned("stop outbound")
def stop(work: Leaving) -> None:
    """No ESP leaves any more: packets for the MN go to nSG if a way is known, else nowhere."""
    host = work.host
    if host.kernel is None:
        host.away.leave(work.context, work.to, (), unprepared=work.unprepared)
        return
    every, ours = outbound_of(host, work.context)
    host.away.leave(work.context, work.to, every, unprepared=work.unprepared)
    for policy in ours:
        host.kernel.delete_policy(policy)


def goes_on_still(work: Leaving) -> bool:
    """Whether ESP of a frozen SA still goes on."""
    return bool(work.facts.sends_to) and work.facts.policies is None


def stop_at_last(work: Leaving) -> None:
    """End the ESP that goes on, as any other freeze has done it."""
    work.to = work.facts.sends_to
    if work.host.kernel is not None:
        ours = outbound_of(work.host, work.context)[1]
        work.host.leaving.note(work.sa, policies=tuple(policy.raw for policy in ours))
    stop(work)


async def _read_counters(work: Freezing) -> Facts:
    host, final = work.host, []
    for child in work.context.children:
        inbound, outbound = child.inbound, child.outbound
        if host.kernel is not None:
            sa_in, sa_out = host.kernel_pair(work.context, child)
            if sa_in is None or sa_out is None:
                raise BusyError(f"CHILD_SA {child.name} went away while it was being frozen")
            inbound = host.kernel.get_replay(sa_in, outbound=False)[0]
            outbound = host.kernel.get_replay(sa_out, outbound=True)[0]
        final.append(FinalChild(child.spi_in, inbound, outbound))
    assert work.known is not None
    work.final = tuple(final)
    return {
        "renaming": work.renaming,
        "request": work.known.mid_initiator,
        "unsure": work.known.unsure,
        "counters": tuple((child.spi_in, child.outbound.seq) for child in final),
    }


async def _same(work: Freezing) -> SaView:
    """The SA's view, if it is still what was exported. Errors: BusyError."""
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


FREEZE: Step[Freezing] = Step(
    "freeze",
    (
        Effect("charon hears nothing", _hear_nothing),
        Effect("charon ends its exchange", _wait),
        Effect("charon says nothing", _say_nothing),
        Effect("message IDs", _find_ids),
        Effect("ESP goes on", _go_on, when=lambda work: work.goes_on),
        Effect(
            "policies are noted",
            _note_policies,
            when=lambda work: not work.goes_on and work.host.kernel is not None,
        ),
        Effect("ESP stops", _stop, when=lambda work: not work.goes_on),
        # the journal's next state says that the SA was let go: this is written with it
        Effect("counters", _read_counters, soon=True),
    ),
)
