"""Activate: charon does IKE for the SA from now on, after the mobile node was told.

1. Repeat steps of `take`, for an agent that began anew, and if packets could not be led here before; for a
   mobile node that waits for an answer all but the updown script.
2. Give charon the message IDs, and make it active by the toggle. It is still muted.
3. Note what follows from serving the SA: lifetimes, limits, the SPIs for an answer, gateways to notify,
   blocks for its end, and that the updown script will be called (5). Then mark the row "active": message IDs
   are not set back after that.
4. Unmute charon, and give it the mobile node's requests from the time before.
5. Lead packets for a mobile node that waits for an answer here by the updown script. It comes last because it
   takes as long as it likes, and the mobile node has no answer before 4. The other gateway sends packets on
   until it knows that this step has ended. A script that cannot be started (no descriptors, no helper) is
   tried again until it can; one that hangs is not waited for.
6. Delete the plan of new names: once it is gone, undo must not remove an SA with this name. The SA serves
   without it, so an error is only logged.
"""

from __future__ import annotations

import asyncio
import logging
import math

from ikectx import trace
from ikectx.clock import steady_wall
from ikectx.engine.ports import MoveReport
from ikectx.errors import CharonError, KernelError, WireError
from ikectx.sa.context import FinalState, IkeContext
from ikectx.wire.spis import ESP, IKE, NewSpi, serialize_new_spis
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.host import CharonHost
from vici_bridge.policy.new_names import Plan, own_spi
from vici_bridge.vici.views import SaView

from .coming import SCRIPT_LIMIT, Coming, now
from .heirs import heir_of
from .renames import INSTALL_TIMEOUT
from .runner import Facts, LedgerStep, StepEffect
from .speaking import tell_ids
from .take import converge, lead, open_way, script_up, will_lead

log = logging.getLogger(__name__)

MISSED = 0.5
"""Seconds after which all segments are toggled: charon may have another number of them than the agent was
told."""
AT_ONCE = 3
"""Looks for an SA that was made active that follow each other without a pause."""


def _inactive(work: Coming) -> bool:
    return work.facts.stage == "installing"


def _leads(work: Coming) -> bool:
    return _inactive(work) and work.facts.drawn != "done" and not work.waits


def _renamed(work: Coming) -> bool:
    """Whether packets may not have been led here by `take`, because the mobile node had to know new SPIs."""
    return _inactive(work) and work.plan is not None


async def _look(work: Coming) -> Facts:
    work.drawn_before = work.facts.drawn
    return will_lead(await work.view())


async def _message_ids(work: Coming) -> None:
    assert work.final is not None
    ids = _mids(work.here, work.plan, work.final, work.report)
    await tell_ids(work.host, IkeId.of(work.shape.current), *ids)


def _mids(here: IkeContext, plan: Plan | None, final: FinalState, report: MoveReport) -> tuple[int, int]:
    """Message IDs of our next request and of the one that we expect."""
    if plan is not None and plan.told is not None:
        return plan.told.mid_initiator, plan.told.mid_responder
    if plan is not None and plan.ike:
        return 0, 0
    return final.mid_initiator + report.requests, final.mid_responder + report.answered


async def _toggle(work: Coming) -> None:
    await work.host.segments.activate(work.shape.spis)
    work.listed = view = await _established(work.host, work.shape)
    # its names may have changed since it was taken in
    before = [shape.spis for shape in work.renames.names(work.here)]
    work.host.known.put(view, before)


@trace.spanned("charon activates")
async def _established(host: CharonHost, here: IkeContext) -> SaView:
    loop, looks = asyncio.get_running_loop(), 0
    end, missed = loop.time() + INSTALL_TIMEOUT, loop.time() + MISSED
    while True:
        view = await host.view(here.spis)
        if view is not None and view.state in ("ESTABLISHED", "REKEYING"):
            return view
        if loop.time() > end:
            raise CharonError(
                f"charon did not activate the SA of {here.remote.address} in {INSTALL_TIMEOUT:g} s",
                hint="look into charon's log; charon.plugins.ha must be as the README's ha.conf",
            )
        if loop.time() > missed:
            missed = math.inf
            log.warning(
                "charon did not activate the SA of %s by its HA segment in %g s, so all segments are toggled "
                "now, and the other SAs do not answer IKE for a moment: is [charon] segments in ikectx.toml "
                "(without it: strongswan.conf when the agent started) the segment_count that charon has?",
                here.remote.address,
                MISSED,
            )
            await host.segments.activate()
        # charon needs some 0.1 ms; asyncio has no pause between nothing and 1 ms
        await asyncio.sleep(0 if looks < AT_ONCE else min(0.001 * 1.5 ** (looks - AT_ONCE), 0.05))
        looks += 1


async def _note(work: Coming) -> Facts:
    host, here, shape = work.host, work.here, work.shape
    _note_lifetimes(host, shape)
    _count_on(host, shape, here)
    host.fresh.want(shape.spis, [child.spi_in for child in shape.children], host.config.rekey_after)
    host.save(soon=True)
    host.origins.serves(work.context, shape.spis)
    host.follow.serves(shape.spis, here)
    view = work.listed or await work.view()
    host.away.behind.stand(here, {child.reqid for child in view.children})
    leads = {} if work.facts.drawn == "done" else will_lead(view)
    return {"stage": "active", **leads, **_names(here, work.plan)}


def _names(here: IkeContext, plan: Plan | None) -> Facts:
    """The SPIs for an answer to the mobile node, if it was not asked otherwise."""
    if plan is None or plan.told is not None:
        return {}
    spis = [NewSpi(ESP, child.spi_in, child.new_in) for child in plan.children]
    if plan.ike:
        spis.append(NewSpi(IKE, own_spi(here.current), plan.ike))
    return {"new_names": serialize_new_spis(spis), "named": now()}


def _note_lifetimes(host: CharonHost, here: IkeContext) -> None:
    """Keep original deadlines that may come before charon's new timers."""
    wall = steady_wall()
    left = [seconds for seconds in (here.lifetime.rekey, here.lifetime.reauth) if seconds is not None]
    if left:
        host.deadlines.keep(here.spis, None, wall + min(left))
    for child in here.children:
        soft, hard = child.lifetime.rekey, child.lifetime.hard
        if soft is not None or hard is not None:
            # without a soft lifetime the rekey is due at nine tenths of the hard one
            due = float(soft) if soft is not None else 0.9 * float(hard or 0)
            host.deadlines.keep(here.spis, child.spi_in, wall + due)


def _count_on(host: CharonHost, shape: IkeContext, here: IkeContext) -> None:
    """Let limits of octets and packets go on from their present values. Not before charon is active, because
    a limit that is reached makes it begin a rekey, which would be muted."""
    kernel = host.kernel
    for child, given in zip(shape.children, here.children, strict=True):
        used = given.lifetime
        rekeyed = (child.nonce_i, child.nonce_r) != (given.nonce_i, given.nonce_r)
        if kernel is None or rekeyed or not (used.bytes_used or used.packets_used):
            continue
        try:
            for sa in host.kernel_pair(shape, child):
                if sa is not None:
                    kernel.count_on(sa, used.bytes_used, used.packets_used)
        except (KernelError, WireError) as error:
            log.warning("octets and packets of CHILD_SA %s are counted anew: %s", child.name, error)


async def unmute(work: Coming) -> None:
    """Unmute the SA, whichever of its names charon has it under."""
    for shape in work.renames.names(work.here):
        work.host.mute.unmute(shape.spis)
        work.host.expected.discard(shape.spis)


async def _speak(work: Coming) -> None:
    await work.host.carried_out()  # see `speaking`
    await unmute(work)


async def _deliver(work: Coming) -> None:
    recorder = work.memory.recorders.pop(work.sa, None)
    if recorder is not None and await recorder.deliver():
        log.debug("%s: charon has what the MN asked meanwhile", work.here.remote_id)


async def _script_after_answer(work: Coming) -> Facts:
    """Errors: NotStarted, CharonError."""
    tried = work.gone is not None
    work.gone = work.gone or work.shape  # the script is told these names, also if it is tried again later
    if tried and await heir_of(work.host, work.gone) is None:
        return {}  # it has left or ended meanwhile
    return await lead(work)


async def _forget(work: Coming) -> Facts:
    if work.sa in work.memory.asked:
        work.host.agents.note(work.here.remote_id)  # the mobile node has an agent, which knows UPDATE_SPI
    work.renames.forget(work.here)
    over: dict[str, object] = {"stage": "imported", "since": now(), "drawn": ""}
    if work.host.coming.of(work.sa).later:
        return over  # a script that is to be called needs the rest
    return {**over, "reqids": (), "tags": (), "unique_id": 0}


ACTIVATE: LedgerStep[Coming] = LedgerStep(
    "activate",
    (
        StepEffect("new names", converge, when=_inactive),
        StepEffect("charon has it", _look, when=_leads),
        StepEffect("way", open_way, when=_renamed),
        StepEffect("script up", script_up, when=_leads, limit=SCRIPT_LIMIT + 5.0),
        StepEffect("message IDs", _message_ids, when=_inactive),
        StepEffect("charon is active", _toggle, when=_inactive),
        StepEffect("what follows is noted", _note, when=_inactive),
        StepEffect("charon speaks", _speak),
        StepEffect("what was kept is heard", _deliver, needed=False),
        StepEffect(
            "script after the answer",
            _script_after_answer,
            when=lambda work: work.facts.drawn == "begun",
            limit=SCRIPT_LIMIT + 5.0,
            needed=False,
            later=True,
            endless=True,
            soon=True,
        ),
        # written together with the journal's next state, which says that the SA is owned
        StepEffect("names are over", _forget, needed=False),
    ),
)
