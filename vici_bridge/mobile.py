"""`CharonMobile`: the mobile node's side of a handover, beside a stock charon. I/O.

    context = await mobile.export(sa)
    await mobile.quiet(sa)                                # PASSIVE: charon says and hears nothing
    ...                                                   # nSG is asked, and says it serves from now on
    context = await mobile.readdress(context, local, remote)
    await mobile.loud(sa)                                 # ESTABLISHED, at the addresses the SA has now

No IKE message is sent. charon gets the new addresses by IKE_UPDATE and its CHILD_SAs once more by CHILD_ADD,
under the same keys; the old ones go by CHILD_DELETE. While both pairs stand, guard policies keep outbound
packets on the old one, until the new one's sequence number is beyond all that were used. Where the two pairs
would share a name, the old one goes first, and guards drop what would be sent in between.

Each step is noted in the store before it begins and seen done before the next, so whoever starts anew after a
crash ends what was open (`resume`): an SA is never left passive, and no number is used twice under a key.

While passive, charon ignores changes of addresses and routes, and answers and repeats nothing (strongSwan
5.9.8, 6.0.6); that holds for all SAs of the segment. The HA plugin tells no virtual IP of charon's own, but
the IKE_SA keeps its own through all of this, and with it the addresses and routes that hang on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ikectx.context import ChildContext, Endpoint, FinalState, IkeContext
from ikectx.errors import (
    BusyError,
    CharonError,
    IkectxError,
    KernelError,
    StateError,
    UnknownSaError,
    WireError,
)
from ikectx.keys import esp_keys
from ikectx.numbers import Status
from ikectx.ports import MoveReport, SaName

from . import ha
from .charon import SaView, relocate
from .esp import KernelReplay
from .host import ESP, CharonHost
from .kernel import Kernel
from .moves import ChildMove, Move, guards_of, leads, plan_move
from .source import CharonSource
from .xfrm import KernelPolicy, KernelSa

log = logging.getLogger(__name__)

_QUIET = "quiet"
"""Kind of store entry: this SA is passive and must become active again."""
_MOVE = "move"
"""Kind of store entry: the `Move` of this SA that is open."""
IDLE_TIMEOUT = 3.0
"""Seconds to wait for charon to finish an exchange that is under way: an MN that comes into a new network
often tells its gateway of the new address first (MOBIKE)."""
PATIENCE = 8.0
"""Seconds for charon to do what it was told."""
AGAIN = 1.0
"""Seconds until charon is asked again where it was not reachable when the agent started."""
ABOUT_ADDRESSES = frozenset({"IKE_MOBIKE", "IKE_DPD"})
"""charon's tasks whose request says nothing of CHILD_SAs: if one gateway is silent, another may answer."""
NO_RENAMES: Mapping[bytes, bytes] = MappingProxyType({})


class _MobileSource(CharonSource):
    """Exports as a gateway's, but also what is PASSIVE, and while charon looks for its gateway."""

    async def _view(self, sa: SaName) -> SaView | None:
        view = await self._host.view(sa)
        if view is None:
            return None
        state = "ESTABLISHED" if view.state == "PASSIVE" else view.state
        return replace(view, state=state, tasks=_in_the_way(view, unanswered=True))


async def _nobody(here: IkeContext, final: FinalState, arrived: Callable[[], bool]) -> MoveReport:
    raise StateError("a mobile node asks nobody to move")


class CharonMobile:
    """A mobile node's charon. One SA's calls come one after the other; `host.config.mobile_node` is set."""

    def __init__(self, host: CharonHost) -> None:
        self._host = host
        self._source = _MobileSource(host, _nobody)

    async def export(self, sa: SaName) -> IkeContext:
        """The context as it is now, "local" being this mobile node. Errors: as `ContextSource.export`."""
        context = await self._source.export(sa)
        view = await self._seen(sa)
        return replace(context, local_vips=view.local_vips)

    async def only_addresses(self, sa: SaName) -> bool:
        """Whether all that charon has under way is to find its gateway, as after its network has changed.

        While the SA is active charon repeats the request, and the new gateway answers it as well.
        """
        view = await self._seen(sa)
        return bool(view.tasks) and view.state == "ESTABLISHED" and not _in_the_way(view, unanswered=True)

    async def quiet(self, sa: SaName, *, unanswered: bool = False, patience: float = IDLE_TIMEOUT) -> None:
        """Make the SA PASSIVE and see that it is; idempotent.

        `unanswered`: requests as of `only_addresses` may be in flight. charon does not repeat them while it
        is passive, nor later if that was due meanwhile, so it must not be for long. `patience`: seconds to
        wait for an exchange to end. Errors: UnknownSaError; BusyError while an exchange is in flight or the
        SA is not up; CharonError with NOT_COVERED where it could not be given other addresses. The SA is
        active then.
        """
        host = self._host
        view = await self._seen(sa)
        if view.state == "PASSIVE" and host.store.get(_QUIET, _key(sa)) is not None:
            return
        self._check(host.record.context(sa), view)
        end = time.monotonic() + patience
        while _in_the_way(view, unanswered=unanswered) or view.state != "ESTABLISHED":
            if time.monotonic() > end:
                what = ", ".join(view.tasks) or f"it is {view.state}"
                raise BusyError(f"the IKE_SA {view.name} has an exchange in flight: {what}", hint="try again")
            await asyncio.sleep(0.02)
            view = await self._seen(sa)
        host.store.put(_QUIET, _key(sa), b"1")
        host.deadlines.before_toggle(await host.views(), time.time())
        try:
            await host.pause_segment()
            view = await self._until(sa, "make the SA passive", lambda view: view.state == "PASSIVE")
            if _in_the_way(view, unanswered=unanswered):
                raise BusyError(f"charon began an exchange meanwhile: {', '.join(view.tasks)}")
        except BaseException:
            await self._activate(sa)
            raise

    def _check(self, context: IkeContext, view: SaView) -> None:
        """What would fail later, when nobody else serves the SA any more. Errors: CharonError."""
        kernel = self._host.kernel
        known = {child.spi_in for child in context.children}
        for listed in view.children:
            if listed.state == "INSTALLED" and listed.spi_in not in known:
                raise UnknownSaError(
                    f"no record of CHILD_SA {listed.name}: it came up while no agent ran",
                    hint="rekey it, or let the mobile node connect anew",
                )
        living = {child.spi_in for child in view.children if child.state == "INSTALLED"}
        for child in context.children:
            if child.spi_in not in living:
                continue  # on its way out: charon ends it by itself
            if kernel is None and child.generation != len(context.generations) - 1:
                raise CharonError(
                    f"CHILD_SA {child.name} is older than the present keys of its IKE_SA",
                    hint="rekey it first; only ESP in the kernel can be given its keys again",
                    status=Status.NOT_COVERED,
                )
            _, outbound = self._host.kernel_pair(context_at(context, view), child)
            if kernel is None or outbound is None:
                continue
            sent, _ = kernel.get_replay(outbound, outbound=True)
            if not child.esn and sent.seq + 2 * self._host.config.oseq_jump >= 1 << 32:
                raise CharonError(
                    f"CHILD_SA {child.name} has used up its sequence numbers",
                    hint="rekey it first",
                    status=Status.NOT_COVERED,
                )

    async def readdress(
        self,
        context: IkeContext,
        local: Endpoint,
        remote: Endpoint,
        renames: Mapping[bytes, bytes] = NO_RENAMES,
        peers: Sequence[Endpoint] = (),
    ) -> IkeContext:
        """Give the SA, PASSIVE by `quiet`, and its children other outer addresses; the context after it.

        `renames`: ESP SPIs (4 octets) that get another name, old to new. `peers`: all addresses of the new
        gateway, for MOBIKE later on. Idempotent, and repeatable after an error. Errors: StateError where the
        SA is not passive; CharonError, KernelError: then `loud` brings the SA back at the new addresses, and
        charon rekeys children that could not be moved.
        """
        host = self._host
        sa = context.spis
        view = await self._seen(sa)
        if view.state != "PASSIVE":
            raise StateError(f"the IKE_SA {view.name} is {view.state}, not PASSIVE")
        saved = host.store.get(_MOVE, _key(sa))
        move = Move.loads(saved) if saved is not None else None
        if move is None:
            now = context_at(host.record.context(sa), view)
            living = [child.spi_in for child in view.children if child.state == "INSTALLED"]
            now = replace(now, children=tuple(child for child in now.children if child.spi_in in living))
            move = plan_move(now, view.children, local, remote, renames, peers)
        elif (move.local, move.remote) != (local, remote):
            raise StateError("another change of this SA's addresses is open")
        if not move.nothing and not move.done:
            self._note_lifetimes(sa, move, view)
            self._save(sa, move)
            await self._carry_out(sa, move)
        moved = {child.spi_in for child in host.record.context(sa).children}
        after = move.after(context)
        kept = tuple(child for child in after.children if child.spi_in in moved)
        return replace(after, children=kept)

    async def redirect(
        self, sa: SaName, local: Endpoint, remote: Endpoint, peers: Sequence[Endpoint] = ()
    ) -> None:
        """Where the SA cannot be made passive: let charon go on at other addresses and rekey children.

        Parameters as of `readdress`. Errors: CharonError, UnknownSaError.
        """
        host = self._host
        peers = tuple(peers) or (remote,)
        update = ha.ike_update(
            await host.version(), self._ike(sa), local=local, remote=remote, peer_addresses=peers
        )
        await host.send([update])
        await self._until(
            sa, "take the new addresses", lambda view: (view.local, view.remote) == (local, remote)
        )
        host.record.feed(update)
        host.save_soon()
        await self._rekey_children(sa)

    async def loud(self, sa: SaName) -> None:
        """Make the SA active again and see that it is, at the addresses it has by now; idempotent.

        A move that stopped half-way is ended first; where that fails, charon rekeys the children, once the SA
        is active, and the error is raised. With user-space ESP they are rekeyed anyway: its sequence numbers
        begin anew, under keys that were used. Errors: CharonError, KernelError.
        """
        host = self._host
        failed: IkectxError | None = None
        saved = host.store.get(_MOVE, _key(sa))
        moved = saved is not None
        if saved is not None and await host.view(sa) is not None:
            move = Move.loads(saved)
            try:
                if not move.done:
                    await self._carry_out(sa, move)
            except IkectxError as error:
                log.error("a CHILD_SA could not be moved, charon is to rekey it: %s", error)
                failed = error
                self._drop_guards(move)
        await self._activate(sa)
        host.store.delete(_MOVE, _key(sa))
        if moved and (host.kernel is None or failed is not None):
            await self._rekey_children(sa)
        if failed is not None:
            raise failed

    async def resume(self) -> None:
        """After a start: end what an agent before this one left open. Waits for charon; raises nothing."""
        while True:
            try:
                await self._resume()
                return
            except (CharonError, WireError) as error:
                log.debug("what was open waits for charon: %s", error)
                await asyncio.sleep(AGAIN)

    async def _resume(self) -> None:
        host = self._host
        for key in sorted({key for kind in (_QUIET, _MOVE) for key, _ in host.store.items(kind)}):
            sa = (bytes.fromhex(key[:16]), bytes.fromhex(key[16:]))
            saved = host.store.get(_MOVE, key)
            if await host.view(sa) is None:
                if saved is not None:
                    self._drop_guards(Move.loads(saved))
                host.store.delete(_MOVE, key)
                host.store.delete(_QUIET, key)
                continue
            log.warning("the IKE_SA %s was left in the middle of a handover; it goes on now", key[:16])
            try:
                await self.loud(sa)
            except KernelError as error:
                log.error("%s", error)

    # Steps.

    async def _carry_out(self, sa: SaName, move: Move) -> None:
        """Bring the move to its end from wherever it stands. Errors: CharonError, KernelError."""
        host = self._host
        view = await self._seen(sa)
        move = self._guard(sa, move, view)
        move = await self._clear_the_way(sa, move, view)
        await self._add(sa, move)
        move = self._raise(sa, move)
        self._drop_guards(move)
        move = replace(move, guards=())
        self._save(sa, move)
        view = await self._delete_old(sa, move)
        after = move.after(host.record.context(sa))
        listed = {child.spi_in for child in view.children}
        # charon does not tell of children that end while it is passive
        kept = tuple(child for child in after.children if child.spi_in in listed)
        peers = move.peers or (move.remote,)
        host.record.moved(sa, replace(after, children=kept, peer_addresses=peers))
        host.save()
        self._save(sa, replace(move, done=True))

    def _pair(
        self, end: tuple[Endpoint, Endpoint], spis: tuple[bytes, bytes]
    ) -> tuple[KernelSa | None, KernelSa | None]:
        """(inbound, outbound) SA of these names between (local, remote), None where it is not there."""
        kernel = self._host.kernel
        assert kernel is not None
        local, remote = end
        inbound = kernel.get_sa(local.address, spis[0], ESP)
        outbound = kernel.get_sa(remote.address, spis[1], ESP)
        return (
            inbound if leads(inbound, remote, local) else None,
            outbound if leads(outbound, local, remote) else None,
        )

    def _old(self, move: Move, child: ChildMove) -> tuple[KernelSa | None, KernelSa | None]:
        return self._pair((move.old_local, move.old_remote), (child.old_in, child.old_out))

    def _new(self, move: Move, child: ChildMove) -> tuple[KernelSa | None, KernelSa | None]:
        return self._pair((move.local, move.remote), (child.new_in, child.new_out))

    def _guard(self, sa: SaName, move: Move, view: SaView) -> Move:
        """Hold outbound packets: on the old SAs, or back where these have to go first."""
        kernel = self._host.kernel
        if kernel is None or any(child.new_in_view(view) for child in move.children):
            return move  # guards came before the first new pair, and what stands is left
        if not move.guards:
            policies = kernel.dump_policies()
            guards: list[KernelPolicy] = []
            for child in move.children:
                _, outbound = self._old(move, child)
                for policy in _policies_to(policies, outbound):
                    guards += guards_of(policy, block=not move.beside(child))
            move = replace(move, guards=tuple(guard.raw for guard in guards))
            self._save(sa, move)
        for raw in move.guards:
            kernel.replace_policy(KernelPolicy.parse(raw))
        return move

    def _drop_guards(self, move: Move) -> None:
        if self._host.kernel is not None:
            for raw in move.guards:
                self._host.kernel.delete_policy(KernelPolicy.parse(raw))

    async def _clear_the_way(self, sa: SaName, move: Move, view: SaView) -> Move:
        """Delete old pairs that the new ones could not stand beside, when what they sent is noted."""
        host = self._host
        in_the_way = [child for child in move.children if not move.beside(child) and child.old_in_view(view)]
        if not in_the_way:
            return move
        for child in in_the_way:
            move = self._note_numbers(sa, move, child)
        ike = self._ike(sa)
        version = await host.version()
        await host.send(ha.child_delete(version, ike, child.old_in) for child in in_the_way)
        await self._until(
            sa,
            "delete a CHILD_SA",
            lambda view: not any(child.old_in_view(view) for child in in_the_way),
        )
        return move

    def _note_numbers(self, sa: SaName, move: Move, child: ChildMove) -> Move:
        """Write down what the old pair has sent and received, while it is there to be asked."""
        kernel = self._host.kernel
        if kernel is None:
            return move
        inbound, outbound = self._old(move, child)
        noted = move.child(child.old_in) or child
        if outbound is not None:
            sent = kernel.get_replay(outbound, outbound=True)[0].seq
            noted = replace(noted, sent=max(sent, noted.sent or 0))
        if inbound is not None:
            noted = replace(noted, received=kernel.get_replay(inbound, outbound=False)[0])
        move = move.with_child(noted)
        self._save(sa, move)
        return move

    async def _add(self, sa: SaName, move: Move) -> None:
        """The IKE_SA's addresses, and the new pairs that are not there yet."""
        host = self._host
        version, ike = await host.version(), self._ike(sa)
        view = await self._seen(sa)
        messages = []
        if (view.local, view.remote) != (move.local, move.remote):
            peers = move.peers or (move.remote,)
            messages.append(
                ha.ike_update(version, ike, local=move.local, remote=move.remote, peer_addresses=peers)
            )
        after = move.after(host.record.context(sa))
        lacking = [child for child in move.children if not child.new_in_view(view)]
        for child in lacking:
            messages.append(ha.child_add(version, ike, _child(after, child)))
        if messages:
            await host.send(messages)

        def there(view: SaView) -> bool:
            listed = all(child.new_in_view(view) for child in move.children)
            if not listed or (view.local, view.remote) != (move.local, move.remote):
                return False
            return host.kernel is None or all(None not in self._new(move, child) for child in move.children)

        await self._until(sa, "add the CHILD_SAs at the new addresses", there)

    def _raise(self, sa: SaName, move: Move) -> Move:
        """The new pairs' keys, numbers and windows, from what the old ones have (or had)."""
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
                ahead, _ = kernel.get_replay(outbound, outbound=True)
                if noted.sent + self._host.config.oseq_jump > ahead.seq:
                    raised = replace(ahead, seq=noted.sent + self._host.config.oseq_jump)
                    kernel.set_replay(outbound, raised, outbound=True)
        return move

    def _right_keys(self, kernel: Kernel, context: IkeContext, move: Move, child: ChildMove) -> None:
        """charon derives a child's keys from the IKE_SA's present SK_d; an older child's are put right.

        XFRM_MSG_UPDSA would answer 0 and leave the key as it was, so the SAs are taken out and put in.
        """
        old = next(one for one in context.children if one.spi_in in (child.old_in, child.new_in))
        derived = esp_keys(context.generations[old.generation], old)
        for sa, (encr, integ) in zip(self._new(move, child), derived, strict=True):
            if sa is not None and (sa.encr_key, sa.auth_key) != (encr, integ):
                fresh = KernelReplay(window=sa.replay.window, esn=sa.replay.esn, words=sa.replay.words)
                kernel.batch([sa.delete(), replace(sa, encr_key=encr, auth_key=integ, replay=fresh).add()])

    async def _delete_old(self, sa: SaName, move: Move) -> SaView:
        """The old pairs that stand beside the new ones; charon deletes the older of two with one name."""
        host = self._host
        version, ike = await host.version(), self._ike(sa)
        view = await self._seen(sa)
        old = [child for child in move.children if child.old_in_view(view)]
        if old:
            await host.send(ha.child_delete(version, ike, child.old_in) for child in old)
            view = await self._until(
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

    async def _activate(self, sa: SaName) -> None:
        host = self._host
        if await host.view(sa) is not None:
            await host.activate_segment()
            with contextlib.suppress(UnknownSaError):
                await self._until(
                    sa, "activate the SA", lambda view: view.state in ("ESTABLISHED", "REKEYING")
                )
        host.store.delete(_QUIET, _key(sa))

    async def _rekey_children(self, sa: SaName) -> None:
        host = self._host
        view = await host.view(sa)
        for child in view.children if view is not None else ():
            if child.state == "INSTALLED":
                await asyncio.to_thread(host.vici.rekey, child_id=child.unique_id)

    # Views and notes.

    def _ike(self, sa: SaName) -> ha.IkeId:
        return ha.IkeId.of(self._host.record.context(sa).current)

    async def _seen(self, sa: SaName) -> SaView:
        view = await self._host.view(sa)
        if view is None:
            raise UnknownSaError(f"charon has no IKE_SA {sa[0].hex()}_i {sa[1].hex()}_r")
        return view

    async def _until(self, sa: SaName, what: str, done: Callable[[SaView], bool]) -> SaView:
        """The view as soon as it is as wanted. Errors: CharonError, UnknownSaError."""
        end = time.monotonic() + PATIENCE
        pause = 0.001
        while True:
            view = await self._seen(sa)
            if done(view):
                return view
            if time.monotonic() > end:
                raise CharonError(
                    f"charon did not {what}: the SA is {view.state} with {len(view.children)} CHILD_SAs",
                    hint="see charon's log (the ha plugin logs why at level 1)",
                )
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.05)

    def _save(self, sa: SaName, move: Move) -> None:
        self._host.store.put(_MOVE, _key(sa), move.dumps())

    def _note_lifetimes(self, sa: SaName, move: Move, view: SaView) -> None:
        """charon begins the lifetimes of the new pairs anew; those of the old ones stand."""
        wall = time.time()
        for listed in view.children:
            child = move.child(listed.spi_in)
            if child is None or listed.unique_id != child.unique_id:
                continue
            if listed.rekey is not None or listed.life is not None:
                due = float(listed.rekey) if listed.rekey is not None else 0.9 * float(listed.life or 0)
                self._host.deadlines.keep(sa, child.new_in, wall + due)


def context_at(context: IkeContext, view: SaView) -> IkeContext:
    """The record's context at the addresses that charon has now."""
    return relocate(context, local=view.local, remote=view.remote)


def _in_the_way(view: SaView, *, unanswered: bool) -> tuple[str, ...]:
    """charon's tasks that keep an SA from being made passive."""
    return tuple(task for task in view.tasks if not (unanswered and task in ABOUT_ADDRESSES))


def _child(after: IkeContext, child: ChildMove) -> ChildContext:
    return next(one for one in after.children if one.spi_in == child.new_in)


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


def _key(sa: SaName) -> str:
    return (sa[0] + sa[1]).hex()
