"""Prepare: an SA that comes is installed in charon and the kernel, and not owned yet.

1. Plan and store its names before anything is installed, so that an undo knows which SAs are its own.
2. Mute charon's messages for it, because the toggle that activates one SA activates all that are PASSIVE.
3. Drop packets for the mobile node (`hush`), because one that leaves must have a number that the other
   gateway has not used, and the first of charon's new SA is 1. Those of a mobile node that had announced
   itself are held (`early`).
4. Release the SPIs that were reserved for charon, and install the SA in charon and the kernel, PASSIVE.
   If the pair of a mobile node that had announced itself is in the kernel, it ends at that moment.
   Write sequence numbers and windows into the kernel at once, and let packets leave.
5. Block packets that the other gateway sends on here from leaving in the clear, add the SA to the record, and
   receive packets under the SPIs that the mobile node will be told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from ikectx import trace
from ikectx.errors import CharonError, KernelError, RefusedError
from ikectx.numbers import STATUS_TEXT
from ikectx.sa.context import NO_TAGS, IkeContext
from ikectx.sa.verdict import Verdict
from vici_bridge.host import CharonHost
from vici_bridge.kernel.xfrm import KernelPolicy
from vici_bridge.policy.checks import check_installed, check_selectors
from vici_bridge.policy.new_names import clash
from vici_bridge.vici.views import SaView

from .coming import Coming
from .early import is_late
from .hush import HUSH, hushing
from .leaving import numbers_of
from .renames import INSTALL_TIMEOUT
from .runner import Facts, LedgerStep, StepEffect

EVENTS = 0.003
"""Seconds up to which the kernel's events may end a pause before charon is asked again."""
SEARCH = 0.2
"""Seconds after which an SA that was sent to charon is searched among all."""


async def _plan(work: Coming) -> Facts:
    host, here = work.host, work.here
    if host.kernel is not None:
        # SAs that were restored for late packets of this SA are removed
        clashes = clash(here, work.taken)
        ours = {child.spi_in for child in here.children}
        ours -= {here.children[place].spi_in for place in clashes.inbound}
        places = dict.fromkeys((here.local.address, *host.config.addresses))
        found = host.kernel.get_sas([(place, spi) for place in places for spi in ours])
        host.kernel.drop_late(sa for sa in found if sa is not None and is_late(sa))
    host.away.comes(here)
    await work.renames.end_relay(work.sa, 0.0)
    work.renames.forget(here, undone=True)
    work.renames.plan(here, work.taken, told_later=work.sa in work.memory.asked)
    relayed = work.sa in work.memory.relayed
    return {
        **{"stage": "installing", "since": 0, "drawn": "", "new_names": b"", "named": 0},
        "relayed": relayed,
        "guards": tuple(policy.raw for policy in _hushing(work)),
    }


def _hushing(work: Coming) -> list[KernelPolicy]:
    if work.host.kernel is None or work.sa in work.early:
        return []
    if any(child.tags != NO_TAGS for child in work.here.children):
        assert work.look is not None
        others = work.look.present.rivals(work.here)
        if any(check_selectors(work.here, others, marked=True)):
            return []  # another SA has the same marks and networks, unless charon here gives this one others
    return hushing(work.here, HUSH)


async def _mute(work: Coming) -> None:
    name = work.shape.spis
    work.host.expected.add(name)
    work.host.mute.mute(name)


async def _hush(work: Coming) -> None:
    kernel = work.host.kernel
    if kernel is not None and work.facts.guards:
        kernel.batch([KernelPolicy.parse(raw).put() for raw in work.facts.guards])


async def _import(work: Coming) -> Facts:
    host, shape = work.host, work.shape
    assert work.look is not None
    messages = work.memory.messages(work.sa, shape, work.look.version)
    if work.plan is not None:
        work.renames.ready(work.here, work.plan)
    work.early.give_way(work.sa)
    await host.ha_link.send(messages)  # their length was checked
    others = work.look.present.rivals(work.here)
    try:
        view = await _installed(host, shape)
    except CharonError:
        # charon installs no second policy under the same mark and if_id
        _refuse(check_selectors(work.here, others, marked=True))
        raise
    _refuse(check_installed(view, others))
    write_replay(host, shape, work.here)
    work.early.number(work.sa, shape)
    work.early.go_on(work.sa, shape)
    if host.kernel is not None:
        host.kernel.delete_policies(map(KernelPolicy.parse, work.facts.guards))
    host.known.put(view)
    host.segments.came(view.spis, view.remote.address)
    return {**numbers_of(view), "guards": ()}


def _refuse(verdicts: Iterable[Verdict]) -> None:
    """Errors: RefusedError for the first."""
    for verdict in verdicts:
        raise RefusedError(f"{STATUS_TEXT[verdict.status]}: {verdict.detail}", status=verdict.status)


@trace.spanned("charon installs")
async def _installed(host: CharonHost, here: IkeContext) -> SaView:
    """Wait until charon lists the SA with its children, and the kernel has their ESP SAs.

    It is PASSIVE, or ESTABLISHED already by the toggle of another SA. The kernel is asked first, because that
    costs less, and because charon is not searched for an SA that it does not have yet.
    """
    begun = asyncio.get_running_loop().time()
    end = begun + INSTALL_TIMEOUT
    pause = 0.001
    while True:
        pairs = [host.kernel_pair(here, child) for child in here.children]
        there = host.kernel is None or all(a is not None and b is not None for a, b in pairs)
        late = asyncio.get_running_loop().time() > begun + SEARCH
        view = None
        if there or late:
            # it has the next unique ID, unless others came at the same time
            view = await host.view(here.spis, search=late or host.kernel is not None)
        listed = set() if view is None else {(child.spi_in, child.spi_out) for child in view.children}
        wanted = {(child.spi_in, child.spi_out) for child in here.children}
        if there and view is not None and view.state in ("PASSIVE", "ESTABLISHED") and wanted <= listed:
            return view
        if asyncio.get_running_loop().time() > end:
            seen = "nothing" if view is None else f"{view.state} with {len(listed)} CHILD_SAs"
            raise CharonError(
                f"charon did not install the SA: wanted PASSIVE with {len(wanted)} CHILD_SAs, saw {seen}",
                hint="see charon's log (the ha plugin logs why at level 1)",
            )
        # policies are the last that charon installs; later events are mostly of other SAs
        if host.kernel is not None and pause < EVENTS:
            await host.kernel.policies_change(pause)
        else:
            await asyncio.sleep(pause)
        pause = min(pause * 1.5, 0.1)


@trace.spanned("counters")
def write_replay(host: CharonHost, shape: IkeContext, counters: IkeContext) -> None:
    """Write sequence numbers and windows into the kernel before a packet leaves; children in the same order.

    Outbound numbers go on after a jump, but stay where they are above the other gateway's: packets may
    be leaving under them, so that one read a moment ago may have been used since. Inbound windows are joined
    with those of packets received here.
    """
    kernel, jump = host.kernel, host.config.oseq_jump
    if kernel is None:
        return
    for child, given in zip(shape.children, counters.children, strict=True):
        inbound, outbound = host.kernel_pair(shape, child)
        if inbound is None or outbound is None:
            raise KernelError(f"an ESP SA of CHILD_SA {child.name} has gone")
        if (child.nonce_i, child.nonce_r) != (given.nonce_i, given.nonce_r):
            continue  # rekeyed here: other keys, numbers of their own
        changes = [(inbound, given.inbound, False)] if child.spi_in == given.spi_in else []
        sent = given.outbound
        if sent.seq >= outbound.replay.oseq:
            changes.append((outbound, replace(sent, seq=sent.seq + jump), True))
        kernel.set_replays(changes)


async def _block(work: Coming) -> None:
    reqids = {reqid for _, reqid in work.facts.reqids}
    work.host.away.awaits(work.here, reqids, relayed=work.facts.relayed)


async def _learn(work: Coming) -> None:
    assert work.look is not None
    work.host.record.learn(work.shape, work.look.version)
    work.host.save(soon=True)


async def _hold(work: Coming) -> None:
    if work.plan is not None:
        work.renames.hold(work.here, work.plan)


PREPARE: LedgerStep[Coming] = LedgerStep(
    "prepare",
    (
        StepEffect("names are planned", _plan),
        StepEffect("charon says nothing", _mute),
        StepEffect("nothing leaves yet", _hush),
        StepEffect("import", _import, soon=True),
        StepEffect("packets are blocked", _block),
        StepEffect("record", _learn),
        StepEffect("new names are heard", _hold),
    ),
)
