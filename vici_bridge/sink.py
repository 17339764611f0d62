"""`CharonSink`: nSG's side. Take an SA in behind charon's back, own it, and activate it in charon.

The order is the one the ha plugin needs: checks, IKE_ADD(s), IKE_UPDATE, CHILD_ADDs while PASSIVE,
replay state into the kernel, then (when the other side has let go) final counters, routes and updown, the
exchange with the MN, message IDs, and the segment toggle. Each step is seen done, not assumed.

The toggle activates every PASSIVE SA, those that are not ours yet or whose MN is just being asked among them.
So an SA is mute from before charon has it until all of this is done: charon neither hears nor says anything.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from ikectx.context import Endpoint, FinalState, IkeContext
from ikectx.errors import CharonError, IkectxError, KernelError, RefusedError
from ikectx.numbers import STATUS_TEXT, Fpt, Status
from ikectx.ports import MoveReport, Verdict

from . import ha
from .charon import SaView, prefixes, relocate
from .checks import (
    check_address,
    check_covered,
    check_esp_spis,
    check_ike_algorithms,
    check_ike_spis,
    check_names,
    check_numbers,
    check_selectors,
    check_vips,
)
from .host import DETOUR, IMPORT, CharonHost, Mover
from .kernel import LATE
from .record import import_messages
from .xfrm import KernelSa
from .xfrm_parts import INET as AF_INET
from .xfrm_parts import INET6 as AF_INET6

log = logging.getLogger(__name__)

_ACTIVE = b"active"
"""Value of an `IMPORT` entry when charon has the message IDs and is active: they must not be set back."""
_TAKEN = "taken"
"""Kind of store entry: the updown script was run for this SA."""
INSTALL_TIMEOUT = 8.0
"""Seconds for charon to install what it was given."""


class CharonSink:
    """A `ContextSink` on a running charon."""

    def __init__(self, host: CharonHost, mover: Mover) -> None:
        """`mover` must get through to the MN while the SA is muted: `mute.MARK`."""
        self._host = host
        self._mover = mover
        self._seen: set[str] = set()
        """SAs that charon had when they were taken, in this life of the agent."""

    def _here(self, context: IkeContext) -> IkeContext:
        """The context as it stands at this gateway: our outer address instead of the other's."""
        address = self._host.address_for(context)
        return relocate(context, local=Endpoint(address, context.local.port))

    async def check(self, context: IkeContext, keep_address: bool) -> list[Verdict]:
        """See `ContextSink.check`: every reason is listed, not only the first."""
        host = self._host
        try:
            here = self._here(context)
        except IkectxError as error:
            return [Verdict(Fpt.IKEV2_SA, error.status, str(error))]
        verdicts = list(check_covered(here, await host.version()))
        verdicts += check_address(here, context, keep_address)
        if not host.listening():
            verdicts.append(Verdict(Fpt.IKEV2_SA, Status.CHARON, "charon does not listen on its HA address"))
        views = await host.views()
        verdicts += check_names(here, await host.connections())
        verdicts += check_ike_spis(here, views)
        verdicts += check_esp_spis(here, here.local.address, self._taken(here), views)
        verdicts += check_numbers(here, host.config.oseq_jump)
        verdicts += check_vips(here, views, await asyncio.to_thread(host.vici.get_pools, True))
        verdicts += check_selectors(here, views)
        verdicts += check_ike_algorithms(here, await asyncio.to_thread(host.vici.algorithms))
        if host.kernel is not None:
            family = AF_INET6 if here.local.address.version == 6 else AF_INET
            for child in here.children:
                if not host.kernel.supports(child.encr, child.encr_bits, child.integ, family):
                    verdicts.append(
                        Verdict(
                            Fpt.SAD,
                            Status.ALGORITHM,
                            f"the kernel cannot do {child.encr.name}/{child.encr_bits} {child.integ.name}",
                        )
                    )
        for verdict in verdicts:
            # a CTDR carries a status for each kind of context and no words: they stand here
            log.info("%s cannot come here: %s (%s)", here.remote_id, verdict.detail, verdict.status.name)
        return verdicts

    def _taken(self, here: IkeContext) -> list[KernelSa]:
        """The kernel's SAs of the same names, but those left for late packets: these give way."""
        found = [sa for child in here.children for sa in self._host.kernel_pair(here, child)]
        return [sa for sa in found if sa is not None and sa.sequence != LATE]

    async def prepare(self, context: IkeContext, keep_address: bool) -> None:
        """See `ContextSink.prepare`. On any failure nothing stays behind."""
        host = self._host
        async with host.import_lock:
            bad = [v for v in await self.check(context, keep_address) if v.status is not Status.OK]
            if bad:
                raise RefusedError(
                    f"{STATUS_TEXT.get(bad[0].status, '')}: {bad[0].detail}", status=bad[0].status
                )
            here = self._here(context)
            if host.kernel is not None:
                ours = {child.spi_in for child in here.children}
                host.kernel.drop_late([sa for sa in host.kernel.late_sas() if sa.spi in ours])
            host.detour.remove(prefixes(ts for child in here.children for ts in child.remote_ts))
            host.store.delete(DETOUR, _key(context))
            messages = import_messages(here, await host.version())
            host.store.put(IMPORT, _key(context), b"1")
            try:
                await asyncio.to_thread(host.mute.mute_in, here.spis)
                await asyncio.to_thread(host.mute.mute_out, here.spis)
                await host.send(messages)
                await self._installed(here)
                for message in messages:
                    host.record.feed(message)
                self._write_replay(here, here, host.config.oseq_jump)
            except BaseException:
                await self.undo(context)
                raise
            host.save()

    async def _installed(self, here: IkeContext) -> SaView:
        """Wait until charon lists the SA with its children, and the kernel has their ESP SAs.

        It is PASSIVE, or ESTABLISHED already by the toggle of another SA.
        """
        host = self._host
        end = time.monotonic() + INSTALL_TIMEOUT
        pause = 0.01
        while True:
            view = await host.view(here.spis)
            listed = set() if view is None else {(child.spi_in, child.spi_out) for child in view.children}
            wanted = {(child.spi_in, child.spi_out) for child in here.children}
            if view is not None and view.state in ("PASSIVE", "ESTABLISHED") and wanted <= listed:
                pairs = [host.kernel_pair(here, child) for child in here.children]
                if host.kernel is None or all(a is not None and b is not None for a, b in pairs):
                    return view
            if time.monotonic() > end:
                seen = "nothing" if view is None else f"{view.state} with {len(listed)} CHILD_SAs"
                raise CharonError(
                    f"charon did not install the SA: wanted PASSIVE with {len(wanted)} CHILD_SAs, saw {seen}",
                    hint="see charon's log (the ha plugin logs why at level 1)",
                )
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.1)

    def _write_replay(self, here: IkeContext, counters: IkeContext, jump: int) -> None:
        """Sequence numbers and windows into the kernel before a packet leaves.

        Outbound goes on after a jump, never back; inbound windows are joined with what arrived here already.
        """
        kernel = self._host.kernel
        if kernel is None:
            return
        state = {child.spi_in: child for child in counters.children}
        for child in here.children:
            inbound, outbound = self._host.kernel_pair(here, child)
            if inbound is None or outbound is None:
                raise KernelError(f"an ESP SA of CHILD_SA {child.name} has gone")
            given = state[child.spi_in]
            kernel.set_replay(inbound, given.inbound, outbound=False)
            sent = given.outbound
            ahead, _ = kernel.get_replay(outbound, outbound=True)
            if sent.seq + jump > ahead.seq:
                kernel.set_replay(outbound, replace(sent, seq=sent.seq + jump), outbound=True)

    async def take(self, context: IkeContext, final: FinalState) -> None:
        """See `ContextSink.take`."""
        host = self._host
        here = self._here(context)
        counters = {child.spi_in: child for child in final.children}
        finals = replace(
            here,
            children=tuple(
                replace(
                    child, inbound=counters[child.spi_in].inbound, outbound=counters[child.spi_in].outbound
                )
                if child.spi_in in counters
                else child
                for child in here.children
            ),
        )
        self._write_replay(here, finals, host.config.oseq_jump)
        view = await host.view(here.spis)
        if view is None:
            raise CharonError("charon lost the prepared SA")
        self._seen.add(_key(context))
        host.store.put(_TAKEN, _key(context), b"1")
        reqids = {child.spi_in: child.reqid for child in view.children}
        await host.updown(here, up=True, reqids=reqids, unique_id=view.unique_id)

    async def move_peer(self, context: IkeContext, final: FinalState) -> MoveReport:
        """See `ContextSink.move_peer`. Nothing to tell where the gateway's address moved along."""
        here = self._here(context)
        if here.local == context.local:
            return MoveReport()
        if _key(context) not in self._seen and await self._host.view(here.spis) is None:
            raise CharonError("charon lost the prepared SA meanwhile")  # before the MN is told
        base = self._received(here)
        return await self._mover(here, final, lambda: self._received(here) > base)

    def _received(self, here: IkeContext) -> int:
        """ESP packets that arrived here on the SA's children."""
        kernel = self._host.kernel
        if kernel is None:
            return 0
        total = 0
        for child in here.children:
            inbound, _ = self._host.kernel_pair(here, child)
            if inbound is not None:
                total += kernel.get_replay(inbound, outbound=False)[1].packets
        return total

    async def activate(self, context: IkeContext, final: FinalState, report: MoveReport) -> None:
        """See `ContextSink.activate`."""
        host = self._host
        here = self._here(context)
        if host.store.get(IMPORT, _key(context)) != _ACTIVE:
            version = await host.version()
            ike = ha.IkeId.of(here.current)
            mids = [
                ha.ike_mid(version, ike, initiator=True, mid=final.mid_initiator + report.requests),
                ha.ike_mid(version, ike, initiator=False, mid=final.mid_responder),
            ]
            await host.send(mids)
            for message in mids:
                host.record.feed(message)
            view = await host.view(here.spis)
            if view is None:
                raise CharonError("charon lost the prepared SA")
            if view.state == "PASSIVE":
                await host.activate_segment()
                await self._established(here)
            self._note_lifetimes(here)
            host.save()
            host.store.put(IMPORT, _key(context), _ACTIVE)
        await asyncio.to_thread(host.mute.unmute, here.spis)
        self._seen.discard(_key(context))
        host.store.delete(_TAKEN, _key(context))
        host.store.delete(IMPORT, _key(context))

    async def _established(self, here: IkeContext) -> None:
        end = time.monotonic() + INSTALL_TIMEOUT
        while True:
            view = await self._host.view(here.spis)
            if view is not None and view.state in ("ESTABLISHED", "REKEYING"):
                return
            if time.monotonic() > end:
                raise CharonError(
                    "charon did not activate the SA", hint="is charon.segments the ha plugin's segment_count?"
                )
            await asyncio.sleep(0.01)

    def _note_lifetimes(self, here: IkeContext) -> None:
        """Original deadlines that may come before charon's new timers."""
        wall = time.time()
        left = [seconds for seconds in (here.lifetime.rekey, here.lifetime.reauth) if seconds is not None]
        if left:
            self._host.deadlines.keep(here.spis, None, wall + min(left))
        for child in here.children:
            soft, hard = child.lifetime.rekey, child.lifetime.hard
            if soft is not None or hard is not None:
                # without a soft lifetime the rekey is asked for at nine tenths of the hard one
                due = float(soft) if soft is not None else 0.9 * float(hard or 0)
                self._host.deadlines.keep(here.spis, child.spi_in, wall + due)

    async def undo(self, context: IkeContext) -> None:
        """See `ContextSink.undo`."""
        host = self._host
        if host.store.get(IMPORT, _key(context)) is None:
            return
        here = self._here(context)
        view = None
        if host.listening():
            view = await host.view(here.spis)
            await host.delete(here)  # also where it is not listed: an import that stopped leaves ancestors
        else:
            # without charon nothing of it is there: its SAs end with it
            host.record.forget(here.spis)
            host.save_soon()
        await asyncio.to_thread(host.mute.unmute, here.spis)
        self._seen.discard(_key(context))
        if host.store.get(_TAKEN, _key(context)) is not None:
            reqids = {} if view is None else {child.spi_in: child.reqid for child in view.children}
            await host.updown(here, up=False, reqids=reqids, unique_id=0 if view is None else view.unique_id)
            host.store.delete(_TAKEN, _key(context))
        host.store.delete(IMPORT, _key(context))


def _key(context: IkeContext) -> str:
    return (context.spis[0] + context.spis[1]).hex()
