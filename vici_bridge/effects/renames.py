"""`Renames`: SAs whose SPIs are taken here get others, from the first check to the last clean-up. I/O.

    plan      draw and reserve SPIs, and store the plan, before anything is installed
    hold      after the import under them: receive on the SPIs that the mobile node will be told
    become    after the mobile node has agreed: install the new pair, then delete the placeholder
    forget    when all is done, or undone

With the kernel's ESP the pair for the new SPIs is installed beside the placeholder. Outbound packets are kept
on the placeholder by policies of better priority (`guards_of`) until the new SA's sequence number has been
raised, so that none is used twice under one key. The agent's own inbound SA is deleted just before charon
adds its own, because charon adds and never replaces (strongSwan 5.9.8, 6.0.6).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace

from ikectx.engine import ledger
from ikectx.engine.ports import SENDING_PACKETS
from ikectx.errors import CharonError, KernelError, RefusedError, StoreError
from ikectx.numbers import Status
from ikectx.sa.context import Address, ChildContext, IkeContext, ReplayState, Secret
from ikectx.sa.keys import esp_keys
from ikectx.sa.name import SaName
from vici_bridge.ha.chain import leftovers, reshape, settle
from vici_bridge.host import CharonHost
from vici_bridge.kernel.kernel import LATE, Kernel, LatePackets
from vici_bridge.kernel.relay import Relay, RelayRule
from vici_bridge.kernel.xfrm import KernelPolicy, KernelSa, policies_of
from vici_bridge.policy.new_names import (
    SEED_OCTETS,
    Agreed,
    ChildPlan,
    EspName,
    Plan,
    Taken,
    clash,
    draw_ike_spi,
    draw_spi,
)
from vici_bridge.policy.present import Present
from vici_bridge.vici.views import SaView

from .mobile_move import guards_of

log = logging.getLogger(__name__)

INSTALL_TIMEOUT = 8.0
"""Seconds for charon to install what it was given."""
_TRIES = 64


class Renames:
    """The plans of one gateway."""

    def __init__(self, host: CharonHost) -> None:
        self._host = host
        self._plans: dict[SaName, tuple[Plan, Taken]] = {}
        self.relay = Relay(host.config.ports[1])

    # What is planned.

    def plan_of(self, context: IkeContext) -> Plan | None:
        """The plan for an SA, by the other gateway's name of it. Errors: StoreError."""
        name = context.spis
        if name not in self._plans:
            saved = self._host.coming.of(name).facts.plan
            if not saved:
                return None
            self._keep(context, Plan.loads(saved))
        return self._plans[name][0]

    def _keep(self, here: IkeContext, plan: Plan) -> None:
        local = self._host.address_for(here)
        self._plans[here.spis] = (plan, plan.reserved(local, here.remote.address))

    def save(self, here: IkeContext, plan: Plan) -> None:
        """Store the plan, before anything follows from it. Errors: StoreError."""
        self._host.coming.note(here.spis, plan=plan.dumps())
        self._keep(here, plan)

    def shape(self, here: IkeContext) -> IkeContext:
        """The SA in charon here."""
        plan = self.plan_of(here)
        return here if plan is None else plan.shape(here)

    # Detection.

    def taken(self, here: IkeContext, present: Present) -> Taken:
        """Names in use: charon's, those of the kernel, and those planned for other transfers. Only those of
        the SA itself, if none of them is."""
        found = present.taken(here)
        for name, (_, reserved) in self._plans.items():
            if name != here.spis:
                found |= reserved
        kernel = self._host.kernel
        esp = set()
        for child in here.children if kernel is not None else ():
            keys = esp_keys(here.generations[child.generation], child)
            for sa, (encr, _) in zip(self._host.kernel_pair(here, child), keys, strict=True):
                # SAs that were restored for late packets of this very SA do not count
                if sa is not None and not (sa.sequence == LATE and sa.encr_key == encr):
                    esp.add((sa.destination, sa.spi))
        found |= Taken(frozenset(esp))
        # another name for it must be none of all those in use
        return found | present.taken() if clash(here, found) else found

    # Planning.

    def plan(self, here: IkeContext, taken: Taken, *, told_later: bool = False) -> Plan | None:
        """New names for those that are taken, reserved in the kernel and stored; None: all are free.

        `told_later`: the mobile node is told them in an answer that it waits for, so no placeholder is
        needed. Errors: RefusedError with ESP_SPI_IN_USE if no SPI is left, KernelError, StoreError.
        """
        found = clash(here, taken)
        if not found:
            return None
        local, remote = here.local.address, here.remote.address
        children: list[ChildPlan] = []
        reserved: list[bytes] = []
        try:
            for place in sorted(found.inbound | found.outbound):
                child = here.children[place]
                new_in = self._inbound(here, taken, reserved)
                taken |= Taken(frozenset({(local, new_in)}))
                hold_in, hold_out = new_in, child.spi_out
                if not told_later:
                    hold_in = child.spi_in
                    if place in found.inbound:
                        hold_in = self._inbound(here, taken, reserved)
                    if place in found.outbound:
                        hold_out = draw_spi(remote, taken, _between, *self._range)
                taken |= Taken(frozenset({(local, hold_in), (remote, hold_out)}))
                children.append(ChildPlan(child.spi_in, child.spi_out, new_in, hold_in, hold_out))
            ike = draw_ike_spi(taken, secrets.token_bytes) if found.ike else b""
            seed = Secret(secrets.token_bytes(SEED_OCTETS))
            plan = Plan(here.spis, ike, tuple(children), seed, later=told_later)
            self.save(here, plan)
        except BaseException:
            self._give_back(here, reserved)
            raise
        for one in children:
            log.info(
                "%s: SPI %s is to become %s here (%s is taken)",
                here.remote_id,
                one.spi_in.hex(),
                one.new_in.hex(),
                "it" if one.hold_in != one.spi_in else f"outbound {one.spi_out.hex()}",
            )
        if ike:
            log.info("%s: its IKE SPIs are taken, ours is to become %s", here.remote_id, ike.hex())
        return plan

    @property
    def _range(self) -> tuple[int, int]:
        return self._host.config.spi_min, self._host.config.spi_max

    def _inbound(self, here: IkeContext, taken: Taken, reserved: list[bytes]) -> bytes:
        """A free inbound SPI; if the kernel has ESP it is reserved there, so that charon does not take it."""
        kernel = self._host.kernel
        if kernel is None:
            return draw_spi(here.local.address, taken, _between, *self._range)
        unfit: list[bytes] = []
        try:
            for _ in range(_TRIES):
                spi = kernel.reserve_spi(here.remote.address, here.local.address, *self._range)
                if spi is None:
                    break
                if (here.local.address, spi) not in taken.esp:
                    reserved.append(spi)
                    return spi
                unfit.append(spi)  # planned for another transfer, and not in the kernel yet
        finally:
            self._give_back(here, unfit)
        raise RefusedError(
            f"no free SPI for {here.local.address} in {self._range[0]:#x}..{self._range[1]:#x}",
            hint="widen charon.spi_min and spi_max, in strongswan.conf and in ikectx.toml",
            status=Status.ESP_SPI_IN_USE,
        )

    def _give_back(self, here: IkeContext, spis: Sequence[bytes]) -> None:
        """Release reservations, never an SA that has keys."""
        kernel = self._host.kernel
        if kernel is None:
            return
        for spi in spis:
            sa = kernel.get_sa(here.local.address, spi)
            if sa is not None and not sa.encr_name and not sa.auth_name:
                kernel.delete_sa(sa)

    def ready(self, here: IkeContext, plan: Plan) -> None:
        """Just before the import: release the SPIs that charon is going to add."""
        self._give_back(here, [one.hold_in for one in plan.children if one.hold_in != one.spi_in])

    def hold(self, here: IkeContext, plan: Plan) -> None:
        """After the import: decrypt packets under the new inbound SPIs from now on. Idempotent."""
        kernel = self._host.kernel
        if kernel is None:
            return
        shape = plan.shape(here)
        for old, child in zip(here.children, shape.children, strict=True):
            planned = plan.child(old.spi_in)
            if planned is None or planned.new_in in (child.spi_in, planned.hold_in):
                continue
            inbound, _ = self._host.kernel_pair(shape, child)
            if inbound is None:
                raise KernelError(f"an ESP SA of CHILD_SA {child.name} has gone")
            there = kernel.get_sa(here.local.address, planned.new_in)
            if there is not None and there.encr_key == inbound.encr_key:
                continue
            fresh = replace(inbound.replay, oseq=0, seq=0, bitmap=0)
            ours = replace(inbound, spi=planned.new_in, replay=fresh, sequence=0)
            # one datagram, so that nobody takes the SPI in between
            kernel.batch([*([there.delete()] if there is not None else []), ours.add()])

    def others_send(self, here: IkeContext) -> bool:
        """Whether the other gateway goes on sending until the mobile node knows its new SPIs, because this
        one cannot, and the numbers under the old keys suffice for both."""
        plan = self.plan_of(here)
        if plan is None or plan.later or all(one.hold_out == one.spi_out for one in plan.children):
            return False
        least = (1 << 32) - 8 * SENDING_PACKETS
        return all(child.esn or child.outbound.seq < least for child in here.children)

    # The MN has agreed.

    async def become(self, here: IkeContext, agreed: Agreed) -> Plan:
        """Store what the mobile node has agreed to, and install it; returns the plan as it is then. Errors:
        StoreError, CharonError, KernelError."""
        plan = self.plan_of(here)
        if plan is None:
            raise CharonError("an SA was renamed that nobody wanted to rename")
        plan = replace(
            plan,
            told=agreed.now,
            moved=plan.moved or agreed.moved,
            how=agreed.how,
            report=plan.report + agreed.report,
            unfinished=agreed.unfinished,
        )
        self.save(here, plan)
        await self.converge(here)
        return plan

    async def converge(self, here: IkeContext) -> IkeContext:
        """Make charon and kernel match the plan, whatever their state. Idempotent; works after a crash.

        Returns the SA as it is then. Errors: CharonError, KernelError.
        """
        host = self._host
        plan = self.plan_of(here)
        if plan is None:
            return here
        after = plan.shape(here)
        found = self._found(here, plan, after, await self._views(here, plan, after))
        if found is None:
            raise CharonError("charon lost the prepared SA")
        before, stopped, state = found
        version = await host.version()
        orders = reshape(before, after, version, stopped=stopped)
        if state == "CONNECTING" and stopped is None and before.current == after.current:
            orders = settle(after, version) + orders
        extra = leftovers(before, after, version)
        if not orders and not extra:
            return after
        self._put_guards(here, before, after)
        counters = self._make_way(here, plan, before, after)
        # perhaps again, because an agent that starts unmutes SAs that charon does not list
        host.mute.mute(after.spis)
        await host.send(orders)
        # a toggle for another SA may have activated what is replaced here
        host.segments.came(after.spis, after.remote.address)
        await self._listed(after, before, present=True)
        if host.kernel is not None:
            self._go_on(host.kernel, here, plan, before, after, counters)
        self._drop_guards(here)
        if extra:
            late = self._late_packets(plan, before, after)
            await host.send(extra)
            await host.put_back(late)
            await self._listed(after, before, present=False)
        if before.spis != after.spis:
            host.mute.unmute(before.spis)
            host.record.forget(before.spis)
        host.record.learn(after, version)
        host.save()
        return after

    async def _views(self, here: IkeContext, plan: Plan, after: IkeContext) -> Sequence[SaView]:
        """The SA's view under one of its names; all views if charon knows neither: see `_found`."""
        for name in (after.spis, replace(plan, told=None).shape(here).spis):
            view = await self._host.view(name)
            if view is not None:
                return [view]
        return await self._host.views()

    def _found(
        self, here: IkeContext, plan: Plan, after: IkeContext, views: Sequence[SaView]
    ) -> tuple[IkeContext, int | None, str] | None:
        """The SA in charon: under one of its names, with some of its children.

        If an agent before this one stopped in the middle of `reshape` the SA has a hidden name: see `stopped`
        there.
        """
        first = replace(plan, told=None).shape(here)
        named, stopped = after, None
        view = next((view for view in views if view.spis == after.spis), None)
        if view is None:
            named = first
            view = next((view for view in views if view.spis == first.spis), None)
        ours = {(child.spi_in, child.spi_out): child for child in (*first.children, *after.children)}
        if view is None:
            for number, generation in enumerate(after.generations[:-1]):
                for one in views:
                    pairs = {(child.spi_in, child.spi_out) for child in one.children}
                    same = one.spis == generation.spis and one.remote == here.remote
                    if same and pairs <= ours.keys():
                        view, stopped = one, number
        if view is None:
            return None
        listed = {(child.spi_in, child.spi_out) for child in view.children}
        children = tuple(child for pair, child in ours.items() if pair in listed)
        return replace(named, children=children, policies=()), stopped, view.state

    def _late_packets(self, plan: Plan, before: IkeContext, after: IkeContext) -> LatePackets | None:
        """The SAs under the names that the mobile node knows, which it uses until it has our next message."""
        stay = {(child.spi_in, child.spi_out) for child in after.children}
        known = {one.spi_in for one in plan.children if one.hold_in == one.spi_in}
        going = [
            child
            for child in before.children
            if child.spi_in in known and (child.spi_in, child.spi_out) not in stay
        ]
        return self._host.late_packets(before, going)

    async def _listed(self, after: IkeContext, before: IkeContext, *, present: bool) -> None:
        """Wait until charon and the kernel have the children of `after`, or lack the others of `before`."""
        host = self._host
        wanted = {(child.spi_in, child.spi_out): child for child in after.children}
        unwanted = {(child.spi_in, child.spi_out): child for child in before.children} if not present else {}
        for pair in wanted:
            unwanted.pop(pair, None)
        end = asyncio.get_running_loop().time() + INSTALL_TIMEOUT
        pause = 0.002
        while True:
            if present and host.kernel is not None:
                # the kernel is asked first, because it answers faster than VICI, and packets wait
                pairs = [host.kernel_pair(after, child) for child in after.children]
                ready = all(a is not None and b is not None for a, b in pairs)
            else:
                ready = True
            if ready:
                view = await host.view(after.spis)
                listed = set() if view is None else {(child.spi_in, child.spi_out) for child in view.children}
                if wanted.keys() <= listed and not unwanted.keys() & listed:
                    return
            if asyncio.get_running_loop().time() > end:
                raise CharonError(
                    "charon did not give the SA its new SPIs",
                    hint="see charon's log (the ha plugin logs why at level 1)",
                )
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.1)

    # The kernel's part.

    @staticmethod
    def _pairs(
        here: IkeContext, before: IkeContext, after: IkeContext, plan: Plan
    ) -> list[tuple[ChildPlan, ChildContext, ChildContext]]:
        """(plan, placeholder, new child) for each child that is exchanged now."""
        have = {(child.spi_in, child.spi_out): child for child in before.children}
        out = []
        for old, new in zip(here.children, after.children, strict=True):
            planned = plan.child(old.spi_in)
            if planned is None or (new.spi_in, new.spi_out) in have:
                continue
            stands_in = have.get((planned.hold_in, planned.hold_out))
            if stands_in is not None:
                out.append((planned, stands_in, new))
        return out

    def _put_guards(self, here: IkeContext, before: IkeContext, after: IkeContext) -> None:
        """Keep outbound packets on the placeholder pairs."""
        kernel, plan = self._host.kernel, self.plan_of(here)
        if kernel is None or plan is None:
            return
        changes = self._pairs(here, before, after, plan)
        if not changes:
            return
        guards: list[KernelPolicy] = []
        for _, old, _ in changes:
            _, outbound = self._host.kernel_pair(before, old)
            if outbound is None:
                raise KernelError(f"an ESP SA of CHILD_SA {old.name} has gone")
            for policy in policies_of(kernel.policies_about({outbound.reqid}), outbound, "out"):
                held = tuple(replace(one, spi=outbound.spi) for one in policy.templates)
                guards += guards_of(replace(policy, templates=held), block=False)
        self._host.coming.note(here.spis, guards=tuple(guard.raw for guard in guards))
        for guard in guards:
            kernel.replace_policy(guard)

    def _drop_guards(self, here: IkeContext) -> None:
        kernel, row = self._host.kernel, self._host.coming.get(here.spis)
        if row is None or not row.facts.guards:
            return
        if kernel is not None:
            for raw in row.facts.guards:
                kernel.delete_policy(KernelPolicy.parse(raw))
        self._host.coming.note(here.spis, guards=())

    def _make_way(
        self, here: IkeContext, plan: Plan, before: IkeContext, after: IkeContext
    ) -> dict[bytes, ReplayState]:
        """Delete the agent's own inbound SAs before charon's are added; returns what each received, by
        SPI."""
        kernel = self._host.kernel
        received: dict[bytes, ReplayState] = {}
        if kernel is None:
            return received
        for _, _, new in self._pairs(here, before, after, plan):
            ours = kernel.get_sa(here.local.address, new.spi_in)
            if ours is None:
                continue
            if ours.encr_name or ours.auth_name:
                received[new.spi_in] = ours.replay.inbound
            kernel.delete_sa(ours)
        return received

    def _go_on(
        self,
        kernel: Kernel,
        here: IkeContext,
        plan: Plan,
        before: IkeContext,
        after: IkeContext,
        received: dict[bytes, ReplayState],
    ) -> None:
        """Raise sequence numbers of the new pairs whose keys are the old ones."""
        host = self._host
        for _, old, new in self._pairs(here, before, after, plan):
            if (old.nonce_i, old.nonce_r) != (new.nonce_i, new.nonce_r):
                continue
            _, sent_by = host.kernel_pair(before, old)
            inbound, outbound = host.kernel_pair(after, new)
            if inbound is None or outbound is None or sent_by is None:
                raise KernelError(f"an ESP SA of CHILD_SA {new.name} has gone")
            sent = sent_by.replay.outbound
            top = (1 << (64 if new.esn else 32)) - 1
            jump = 2 * SENDING_PACKETS if self.others_send(here) else host.config.oseq_jump
            ahead = min(sent.seq + jump, top)
            if ahead > outbound.replay.oseq:
                kernel.set_replay(outbound, replace(sent, seq=ahead), outbound=True)
            if new.spi_in in received:
                kernel.set_replay(inbound, received[new.spi_in], outbound=False)

    # What the MN still sends under the old SPIs.

    async def relay_old(self, here: IkeContext, other: Address) -> None:
        """Until the mobile node has new SPIs, send its packets under those that are taken on to the other
        gateway.

        A failure is only logged, because the packets would be lost without it, too.
        """
        plan = self.plan_of(here)
        spis = [] if plan is None else [one.spi_in for one in plan.children if one.hold_in != one.spi_in]
        if not spis or other == here.local.address or other.version != here.remote.address.version:
            return
        row = self._host.coming.note(here.spis, relay=ledger.Relayed(here.remote, tuple(spis), other))
        try:
            for one in _relayed(row.facts.relay):
                await asyncio.to_thread(self.relay.add, one)
        except KernelError as error:
            log.warning("%s: packets under old SPIs are lost: %s", here.remote_id, error)

    async def end_relay(self, sa: SaName, after: float) -> None:
        """End the relay in so many seconds, when the other gateway no longer decrypts."""
        await asyncio.sleep(after)
        row = self._host.coming.get(sa)
        if row is None or row.facts.relay is None:
            return
        try:
            for one in _relayed(row.facts.relay):
                await asyncio.to_thread(self.relay.remove, one)
        except KernelError as error:
            log.warning("a detour of old SPIs stays: %s", error)
        self._host.coming.note(sa, relay=None)

    def resume(self) -> None:
        """After a start: end relays of SAs that are not taken in any more, which an earlier agent left."""
        for row in self._host.coming.all():
            if row.facts.relay is not None and row.facts.stage == "imported":
                self._host.spawn(self.end_relay(row.sa, 0.0))

    # The end.

    def names(self, here: IkeContext) -> list[IkeContext]:
        """Every form in which charon may have the SA, to delete whichever it is."""
        plan = self.plan_of(here)
        if plan is None:
            return [here]
        shapes = {shape.spis: shape for shape in (replace(plan, told=None).shape(here), plan.shape(here))}
        return list(shapes.values())

    def forget(self, here: IkeContext, *, undone: bool = False) -> None:
        """Release the rest of the reservations; `undone`: also the agent's own SAs. Idempotent."""
        if self._host.coming.of(here.spis).facts.relay is not None and not undone:
            self._host.spawn(self.end_relay(here.spis, float(self._host.config.late)))
        self._drop_guards(here)
        plan = self.plan_of(here)
        if plan is None:
            return
        kernel = self._host.kernel
        if kernel is not None:
            spis = {spi for one in plan.children for spi in (one.new_in, one.hold_in) if spi != one.spi_in}
            self._give_back(here, sorted(spis))
            for child in here.children if undone else ():
                planned = plan.child(child.spi_in)
                if planned is None:
                    continue
                (encr, _), _ = esp_keys(here.generations[child.generation], child)
                ours: KernelSa | None = kernel.get_sa(here.local.address, planned.new_in)
                if ours is not None and ours.encr_key == encr:
                    kernel.delete_sa(ours)
        self._host.coming.note(here.spis, soon=True, plan=b"")
        self._plans.pop(here.spis, None)

    def load(self) -> None:
        """After a start: reserve names of earlier plans again. Errors: StoreError."""
        # their addresses are not known before the transfer goes on; until then they count for any address
        for row in self._host.coming.all():
            if not row.facts.plan:
                continue
            try:
                plan = Plan.loads(row.facts.plan)
            except StoreError as error:
                self._host.coming.set_aside(row.sa, str(error))
                continue
            esp: set[EspName] = set()
            for local in self._host.config.addresses:
                for child in plan.children:
                    esp |= {(local, child.new_in), (local, child.hold_in)}
            self._plans[row.sa] = (plan, Taken(frozenset(esp), frozenset({plan.ike} if plan.ike else ())))


def _relayed(relay: ledger.Relayed | None) -> list[RelayRule]:
    return [] if relay is None else [RelayRule(relay.mn, spi, relay.to) for spi in relay.spis]


def _between(low: int, high: int) -> int:
    return low + secrets.randbelow(high - low + 1)
