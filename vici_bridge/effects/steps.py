"""`MoveSteps`: the steps by which a mobile node's SA gets other addresses or SPIs, each seen done. I/O.

    guard           keep outbound packets on the old SAs, or hold them back if those must be deleted first,
                    and let inbound ones come by either pair
    clear the way   delete old pairs that cannot exist beside the new ones, after noting their numbers
    add             IKE_UPDATE, CHILD_ADD
    raise           set keys, sequence numbers and windows of the new pairs; then remove the guards
    delete old      CHILD_DELETE
    rename          change the IKE_SA's own SPIs, if that is needed, too

`readdress` calls them in this order, and goes on where an agent before this one stopped: the SA's row of the
ledger, charon and the kernel show where that was, and `MobileMove` has what they no longer show.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ikectx import trace
from ikectx.clock import steady_wall
from ikectx.errors import CharonError, KernelError, UnknownSaError
from ikectx.sa.context import Address, ChildContext, Endpoint, IkeContext, ReplayState
from ikectx.sa.keys import esp_keys
from ikectx.sa.name import SaName
from vici_bridge.ha import messages as ha
from vici_bridge.ha.chain import reshape
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.host import ESP, CharonHost
from vici_bridge.kernel.algorithms import KernelReplay
from vici_bridge.kernel.kernel import LATE, InboundSnapshot, Kernel, LatePackets
from vici_bridge.kernel.rewrite import EspPair, NewPlace
from vici_bridge.kernel.xfrm import KernelPolicy, KernelSa, policies_of
from vici_bridge.kernel.xfrm_parts import TUNNEL
from vici_bridge.vici.views import SaView

from .mobile_move import ChildMove, MobileMove, guards_of, leads

LINGER = 0.5
"""Seconds for which an old inbound SA may stay beside the new one; charon is passive meanwhile."""
HEARD = 10
"""Seconds for which the kernel decrypts under an SPI that charon does not have yet, or any more."""
PATIENCE = 8.0
"""Seconds for charon to carry out an order."""


class MoveSteps:
    """The steps on one charon and its kernel."""

    def __init__(self, host: CharonHost) -> None:
        self._host = host

    async def add_pairs(self, sa: SaName, move: MobileMove, view: SaView) -> SaView:
        """Delete old pairs that the new ones could not stand beside; add the new ones, and the addresses."""
        move, away = await self._clear_the_way(sa, move, view)
        return await self._add(sa, move, view, away)

    async def end_old_pairs(self, sa: SaName, move: MobileMove, view: SaView) -> None:
        """Delete the old pairs, as soon as the other end has changed over, and record what is left."""
        host = self._host
        still = await self._linger(move)
        view = await self._delete_old(sa, move, view, still)
        after = move.after(host.record.context(sa))
        listed = {child.spi_in for child in view.children}
        # charon does not report children that end while it is passive
        kept = tuple(child for child in after.children if child.spi_in in listed)
        peers = move.peers or (move.remote,)
        host.record.moved(sa, replace(after, children=kept, peer_addresses=peers))
        host.save()

    async def rename_ike(self, sa: SaName, move: MobileMove, name: SaName) -> None:
        """Change the IKE_SA's SPIs: its keys are derived anew, its children keep theirs (see `chain`).

        The record has the new name beside the old one before charon does, so that it is known after a crash.
        """
        host = self._host
        version = await host.version()
        view = await host.view(sa)
        if view is not None:
            before = host.record.context(sa)
            add, *updates = reshape(before, move.with_new_name(before), version)
            host.record.feed(add)
            host.save()
            if view.rekey is not None:
                host.deadlines.keep(name, None, steady_wall() + view.rekey)
            await host.send([add, *updates])
        else:
            updates = self._updates(sa, move, version)
            await host.send(updates)
        await self._appears(name)
        await self.until(name, "rename the SA", lambda view: view.state == "PASSIVE")
        for message in updates:
            host.record.feed(message)
        host.save()

    def _updates(self, sa: SaName, move: MobileMove, version: int) -> list[ha.HaMessage]:
        """The messages after the IKE_ADD of a new name; none if the record has everything."""
        if sa not in self._host.record:
            return []
        before = self._host.record.context(sa)
        return reshape(before, move.with_new_name(before), version)[1:]

    async def present_name(self, sa: SaName, move: MobileMove) -> SaName:
        """charon's present name of the SA."""
        if move.ike is not None and await self._host.view(sa) is None:
            return move.ike
        return sa

    def _pair(
        self, end: tuple[Endpoint, Endpoint], spis: tuple[bytes, bytes]
    ) -> tuple[KernelSa | None, KernelSa | None]:
        """(inbound, outbound) SA of these names between (local, remote), None where it is not there."""
        kernel = self._host.kernel
        assert kernel is not None
        local, remote = end
        inbound, outbound = kernel.get_sas(((local.address, spis[0]), (remote.address, spis[1])))
        return (
            inbound if leads(inbound, remote, local) else None,
            outbound if leads(outbound, local, remote) else None,
        )

    def _old(self, move: MobileMove, child: ChildMove) -> tuple[KernelSa | None, KernelSa | None]:
        return self._pair((move.old_local, move.old_remote), (child.old_in, child.old_out))

    def _new(self, move: MobileMove, child: ChildMove) -> tuple[KernelSa | None, KernelSa | None]:
        return self._pair((move.local, move.remote), (child.new_in, child.new_out))

    def guard(self, sa: SaName, move: MobileMove, view: SaView) -> MobileMove:
        """Guard packets: outbound ones stay on the old SAs, or are held back if these must be deleted first;
        inbound ones may come by either pair."""
        kernel = self._host.kernel
        if kernel is None or any(child.new_in_view(view) for child in move.children):
            return move  # guards came before the first new pair, and are left as they are
        if not move.guards:
            policies = kernel.dump_policies()
            guards: list[KernelPolicy] = []
            for child in move.children:
                inbound, outbound = self._old(move, child)
                guards += _either_pair(policies, inbound)
                for policy in _policies_to(policies, outbound):
                    # if no address changes, only the SPI tells the old SA from the new one
                    spi = outbound.spi if outbound is not None else bytes(4)
                    held = tuple(replace(template, spi=spi) for template in policy.templates)
                    guards += guards_of(replace(policy, templates=held), block=not move.beside(child))
            move = replace(move, guards=tuple(guard.raw for guard in guards))
            self.save(sa, move)
        for raw in move.guards:
            kernel.replace_policy(KernelPolicy.parse(raw))
        return move

    def drop_guards(self, move: MobileMove, *directions: str) -> MobileMove:
        """Remove the guards of these directions; none: of all."""
        kept = []
        for raw in move.guards:
            policy = KernelPolicy.parse(raw)
            if directions and policy.direction not in directions:
                kept.append(raw)
            elif self._host.kernel is not None:
                self._host.kernel.delete_policy(policy)
        return replace(move, guards=tuple(kept))

    async def _clear_the_way(
        self, sa: SaName, move: MobileMove, view: SaView
    ) -> tuple[MobileMove, list[ha.HaMessage]]:
        """Deletions of old pairs that cannot exist beside the new ones, after their numbers were noted."""
        in_the_way = [child for child in move.children if not move.beside(child) and child.old_in_view(view)]
        for child in in_the_way:
            move = self._note_numbers(sa, move, child)
        version, ike = await self._host.version(), self.ike_id(sa)
        return move, [ha.child_delete(version, ike, child.old_in) for child in in_the_way]

    def _note_numbers(self, sa: SaName, move: MobileMove, child: ChildMove) -> MobileMove:
        """Note what the old pair has sent and received, while it can still be read."""
        if self._host.kernel is None:
            return move
        inbound, outbound = self._old(move, child)
        noted = move.child(child.old_in) or child
        if outbound is not None:
            noted = replace(noted, sent=max(outbound.replay.oseq, noted.sent or 0))
        if inbound is not None:
            noted = replace(noted, received=inbound.replay.inbound)
        move = move.with_child(noted)
        self.save(sa, move)
        return move

    def hear(self, local: Address, spis: Mapping[bytes, bytes]) -> None:
        """Decrypt under these new inbound SPIs (old to new), too, for `HEARD` seconds. Errors: KernelError.

        The other end uses them as soon as it has agreed, and charon has them only some time after that.
        """
        kernel = self._host.kernel
        if kernel is None:
            return
        ours = []
        for old, new in spis.items():
            sa = kernel.get_sa(local, old, ESP)
            if sa is not None:
                ours.append(replace(sa, spi=new, replay=replace(sa.replay, oseq=0, seq=0, bitmap=0)))
        kernel.restore_inbound(InboundSnapshot(tuple(ours), ()), HEARD)

    def _give_way(self, move: MobileMove, children: Sequence[ChildMove]) -> dict[bytes, ReplayState]:
        """Remove the SAs of `hear`, because charon adds and never replaces. Returns what each received, by
        SPI."""
        kernel = self._host.kernel
        received: dict[bytes, ReplayState] = {}
        for child in children if kernel is not None else ():
            assert kernel is not None
            ours = kernel.get_sa(move.local.address, child.new_in, ESP)
            if ours is not None and ours.sequence == LATE and child.new_in != child.old_in:
                received[child.new_in] = ours.replay.inbound
                kernel.delete_sa(ours)
        return received

    @trace.spanned("add pair")
    async def _add(self, sa: SaName, move: MobileMove, view: SaView, messages: list[ha.HaMessage]) -> SaView:
        """After `messages`, the IKE_SA's addresses, and the new pairs that are not there yet.

        charon takes one message after the other, and until the last of them packets are lost.
        """
        host = self._host
        version, ike = await host.version(), self.ike_id(sa)
        if (view.local, view.remote) != (move.local, move.remote):
            peers = move.peers or (move.remote,)
            messages.append(
                ha.ike_update(version, ike, local=move.local, remote=move.remote, peer_addresses=peers)
            )
        after = move.after(host.record.context(sa))
        lacking = [child for child in move.children if not child.new_in_view(view)]
        for child in lacking:
            messages.append(ha.child_add(version, ike, _child(after, child)))
        received = self._give_way(move, lacking)
        if messages:
            await host.send(messages)

        def there(view: SaView) -> bool:
            listed = all(child.new_in_view(view) for child in move.children)
            if not listed or (view.local, view.remote) != (move.local, move.remote):
                return False
            return host.kernel is None or all(None not in self._new(move, child) for child in move.children)

        view = await self.until(sa, "add the CHILD_SAs at the new addresses", there)
        for child in lacking if host.kernel is not None and received else ():
            inbound, _ = self._new(move, child)
            if inbound is not None and child.new_in in received and host.kernel is not None:
                host.kernel.set_replay(inbound, received[child.new_in], outbound=False)
        return view

    def raise_numbers(self, sa: SaName, move: MobileMove) -> MobileMove:
        """Set the new pairs' keys, numbers and windows from those of the old ones."""
        kernel = self._host.kernel
        if kernel is None:
            return move
        context = self._host.record.context(sa)
        for child in move.children:
            move = self._note_numbers(sa, move, child)
            noted = move.child(child.old_in)
            assert noted is not None
            self._right_keys(kernel, context, move, noted)
            inbound, outbound = self._new(move, noted)
            if inbound is None or outbound is None:
                raise KernelError(f"an ESP SA of {child.new_in.hex()} has gone")
            if noted.received is not None:
                kernel.set_replay(inbound, noted.received, outbound=False)
            if noted.sent is not None:
                ahead = outbound.replay.outbound
                if noted.sent + self._host.config.oseq_jump > ahead.seq:
                    raised = replace(ahead, seq=noted.sent + self._host.config.oseq_jump)
                    kernel.set_replay(outbound, raised, outbound=True)
        return move

    def join_windows(self, move: MobileMove) -> None:
        """Tell the new inbound SAs what the old ones have received since `raise_numbers`."""
        kernel = self._host.kernel
        for child in move.children if kernel is not None else ():
            assert kernel is not None
            (old, _), (new, _) = self._old(move, child), self._new(move, child)
            if old is not None and new is not None:
                kernel.set_replay(new, old.replay.inbound, outbound=False)

    def jump(self, place: NewPlace) -> None:
        """Raise the sequence numbers of its outbound SAs by the jump. Packets that leave meanwhile do not
        matter: they are fewer. Errors: KernelError."""
        kernel = self._host.kernel
        for pair in place.pairs if kernel is not None else ():
            assert kernel is not None
            sa = kernel.get_sa(place.old_remote, pair.spi_out, ESP)
            if sa is not None:
                sent = sa.replay.outbound
                raised = replace(sent, seq=sent.seq + self._host.config.oseq_jump)
                kernel.set_replay(sa, raised, outbound=True)

    def new_place(self, context: IkeContext, local: Endpoint, remote: Endpoint) -> NewPlace | None:
        """For the ESP of an SA that is at `context`'s addresses, and goes ahead to others; None: it cannot.

        Only outer addresses of one IP version are rewritten, and only tunnel mode does not depend on them.
        """
        ends = (context.local.address, context.remote.address, local.address, remote.address)
        pairs = []
        for child in self._host.record.context(context.spis).children:
            inbound, outbound = self._host.kernel_pair(context, child)
            if inbound is None or outbound is None:
                continue
            if outbound.mode != TUNNEL:
                return None
            port = outbound.encap.source_port if outbound.encap is not None else 0
            pairs.append(EspPair(child.spi_in, child.spi_out, port))
        if not pairs or len({end.version for end in ends}) > 1:
            return None
        return NewPlace(*ends, tuple(pairs))

    def _right_keys(self, kernel: Kernel, context: IkeContext, move: MobileMove, child: ChildMove) -> None:
        """Correct the keys of an older child, because charon derives them from the IKE_SA's present SK_d.

        XFRM_MSG_UPDSA would answer 0 and leave the key unchanged, so the SAs are deleted and added.
        """
        old = next(one for one in context.children if one.spi_in in (child.old_in, child.new_in))
        derived = esp_keys(context.generations[old.generation], old)
        for sa, (encr, integ) in zip(self._new(move, child), derived, strict=True):
            if sa is not None and (sa.encr_key, sa.auth_key) != (encr, integ):
                fresh = KernelReplay(window=sa.replay.window, esn=sa.replay.esn, words=sa.replay.words)
                kernel.batch([sa.delete(), replace(sa, encr_key=encr, auth_key=integ, replay=fresh).add()])

    @trace.spanned("old pair lingers")
    async def _linger(self, move: MobileMove) -> list[ChildMove]:
        """Keep the old inbound SA until the first packet under the new SPI arrives, at most `LINGER` s.

        Packets that were sent under the old SPI are still on their way. Returns the children that received
        none under the new one: see `_late_packets`.
        """
        kernel = self._host.kernel
        waits = [child for child in move.children if move.beside(child) and child.old_in != child.new_in]
        end = asyncio.get_running_loop().time() + LINGER
        while kernel is not None and waits and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
            for child in list(waits):
                inbound, _ = self._new(move, child)
                if inbound is None or inbound.usage.packets:
                    waits.remove(child)
        return waits

    @trace.spanned("delete old pair")
    async def _delete_old(
        self, sa: SaName, move: MobileMove, view: SaView, still: Sequence[ChildMove]
    ) -> SaView:
        """Delete the old pairs that exist beside the new ones; charon deletes the older of two with one
        name."""
        host = self._host
        version, ike = await host.version(), self.ike_id(sa)
        old = [child for child in move.children if child.old_in_view(view)]
        if old:
            renamed = [child for child in old if child in still]
            late = self._late_packets(move, renamed)
            await host.send(ha.child_delete(version, ike, child.old_in) for child in old)
            if late is not None and host.kernel is not None:
                await host.put_back(late)
                for child in renamed:
                    host.spawn(self._end_late(host.kernel, move, child))
            view = await self.until(
                sa,
                "delete the CHILD_SAs at the old addresses",
                lambda view: (
                    not any(child.old_in_view(view) for child in old)
                    or not all(child.new_in_view(view) for child in move.children)
                ),
            )
        if not all(child.new_in_view(view) for child in move.children):
            raise CharonError("charon deleted a CHILD_SA at the new addresses instead of the old one")
        return view

    def _late_packets(self, move: MobileMove, renamed: Sequence[ChildMove]) -> LatePackets | None:
        """The inbound SAs under old SPIs, which stay when charon has removed them.

        The gateway from which the SA comes may use them until it is told that the move is complete. They end
        with the first packet under the new SPIs, or by themselves after `HEARD`.
        """
        kernel = self._host.kernel
        if kernel is None or not renamed:
            return None
        inbound = [sa for child in renamed if (sa := self._old(move, child)[0]) is not None]
        going = tuple((move.old_local.address, child.old_in) for child in renamed)
        return LatePackets(kernel.snapshot_inbound(inbound), going, HEARD)

    async def _end_late(self, kernel: Kernel, move: MobileMove, child: ChildMove) -> None:
        end = asyncio.get_running_loop().time() + HEARD
        while asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
            inbound, _ = self._new(move, child)
            if inbound is None or inbound.usage.packets:
                break
        old, _ = self._old(move, child)
        if old is not None and old.sequence == LATE:
            kernel.delete_sa(old)

    def ike_id(self, sa: SaName) -> IkeId:
        return IkeId.of(self._host.record.context(sa).current)

    async def seen(self, sa: SaName) -> SaView:
        view = await self._host.view(sa)
        if view is None:
            raise UnknownSaError(f"charon has no IKE_SA {sa}")
        return view

    async def _appears(self, sa: SaName) -> None:
        """Wait for a new name, which charon does not list at once, as it does not the old one any more."""
        end = asyncio.get_running_loop().time() + PATIENCE
        while await self._host.view(sa) is None:
            if asyncio.get_running_loop().time() > end:
                return
            await asyncio.sleep(0.005)

    @trace.spanned("charon follows")
    async def until(self, sa: SaName, what: str, done: Callable[[SaView], bool]) -> SaView:
        """The view as soon as `done` accepts it. Errors: CharonError, UnknownSaError."""
        end = asyncio.get_running_loop().time() + PATIENCE
        pause = 0.001
        while True:
            view = await self.seen(sa)
            if done(view):
                return view
            if asyncio.get_running_loop().time() > end:
                raise CharonError(
                    f"charon did not {what}: the SA is {view.state} with {len(view.children)} CHILD_SAs",
                    hint="see charon's log (the ha plugin logs why at level 1)",
                )
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.05)

    def save(self, sa: SaName, move: MobileMove) -> None:
        self._host.own.note(sa, move=move.dumps())


def _child(after: IkeContext, child: ChildMove) -> ChildContext:
    return next(one for one in after.children if one.spi_in == child.new_in)


def _either_pair(policies: list[KernelPolicy], inbound: KernelSa | None) -> list[KernelPolicy]:
    """Guards by which packets may come by any pair of the SA's reqid: of a template without a source the
    kernel compares no address."""
    if inbound is None or inbound.mode != TUNNEL:
        return []
    guards: list[KernelPolicy] = []
    for policy in policies_of(policies, inbound, "in", "fwd"):
        open_to = tuple(replace(one, source=type(one.source)(0)) for one in policy.templates)
        guards += guards_of(replace(policy, templates=open_to), block=False)
    return guards


def _policies_to(policies: list[KernelPolicy], outbound: KernelSa | None) -> list[KernelPolicy]:
    if outbound is None:
        return []
    return [
        policy
        for policy in policies
        if policy.direction == "out"
        and policy.if_id == outbound.if_id
        and any(
            template.reqid == outbound.reqid and template.destination == outbound.destination
            for template in policy.templates
        )
    ]
