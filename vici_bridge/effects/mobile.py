"""`CharonMobile`: the mobile node's side of a handover, beside a stock charon. I/O.

    context = await mobile.export(sa)
    await mobile.ahead(context, local, remote)            # ESP goes by the new addresses already
    await mobile.quiet(sa)                                # PASSIVE: charon sends and accepts nothing
    ...                                                   # the new gateway confirms that it serves the SA
    context = await mobile.readdress(context, local, remote)
    await mobile.loud(sa)                                 # ESTABLISHED, at the addresses the SA has now

No IKE message is sent. charon gets the new addresses by IKE_UPDATE and its CHILD_SAs once more by CHILD_ADD,
under the same keys; the old ones are deleted by CHILD_DELETE. While both pairs exist, guard policies keep
outbound packets on the old one, until the new one's sequence number is beyond all that were used. If the two
pairs would share a name, the old one is deleted first, and guards drop packets that would be sent in between.

Each step is noted in the store before it begins and seen done before the next, so that an agent that starts
after a crash completes the open ones (`resume`): an SA is never left passive, and no number is used twice
under a key.

While passive, charon ignores changes of addresses and routes, and answers and repeats nothing (strongSwan
5.9.8, 6.0.6); that is true for all SAs of the segment. The HA plugin reports no virtual IP of charon's own,
but the IKE_SA keeps its virtual IPs through all of this, with their addresses and routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ikectx import trace
from ikectx.clock import steady_wall
from ikectx.engine.ledger import MobileFacts
from ikectx.errors import (
    BusyError,
    CharonError,
    IkectxError,
    KernelError,
    LinkError,
    StateError,
    StoreError,
    UnknownSaError,
    WireError,
)
from ikectx.node.agreement import Agreement
from ikectx.numbers import Status
from ikectx.sa.context import Endpoint, IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.relocate import relocate
from mobike_ext.link import run_spi_update
from mobike_ext.mirror import Mirror
from vici_bridge.ha import messages as ha
from vici_bridge.host import CharonHost
from vici_bridge.kernel.mute import MARK
from vici_bridge.policy.obstacles import check_kernel, check_kind, check_told
from vici_bridge.vici.views import SaView

from .ahead import AHEAD, HOME
from .loud import LOUD, activate, look_for_way, rekey_children
from .mobile_move import LIVING, MobileMove, plan_move
from .moving import Moving
from .quiet import QUIET, in_the_way
from .readdress import READDRESS
from .runner import Runner
from .speaking import go_on_asking, tell_ids
from .steps import MoveSteps

log = logging.getLogger(__name__)

IDLE_TIMEOUT = 3.0
"""Seconds to wait for charon to finish an exchange: a mobile node that comes into a new network often reports
its new address to its gateway first (MOBIKE)."""
AGAIN = 1.0
"""Seconds until charon is asked again if it was not reachable when the agent started."""
BEGUN = 2.0
"""Seconds after which charon has begun what it was about to do when its SA became active, or waits."""
NO_RENAMES: Mapping[bytes, bytes] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Applied:
    """After `CharonMobile.apply`. `passive`: the SA is, and `loud` must follow. `asks`: charon has a request
    without an answer, which it should send to the new gateway."""

    passive: bool
    asks: bool


class EndedUnheardError(UnknownSaError):
    """charon may have destroyed the SA while it was passive, without a Delete to its gateway."""


class CharonMobile:
    """A mobile node's charon. Calls for one SA must not overlap; `host.config.mobile_node` is set."""

    def __init__(self, host: CharonHost) -> None:
        self._host = host
        self.steps = MoveSteps(host)
        self._runner: Runner[Moving] = Runner(
            host.own, host.spawn, host.listing.crowd, AHEAD, HOME, QUIET, READDRESS, LOUD
        )
        self._not_applied: dict[SaName, tuple[IkeContext, Agreement]] = {}
        """What a gateway that serves an SA has agreed to, until charon, which could not be asked, has it."""

    async def export(self, sa: SaName) -> IkeContext:
        """The context as it is now, "local" being this mobile node. Errors: as `known`, and CharonError."""
        view = await self.steps.seen(sa)
        await self._host.catch_up(sa)
        return self.known(view)

    def known(self, view: SaView) -> IkeContext:
        """The context of an SA that charon lists so, without counters. Errors: UnknownSaError if charon has
        not reported all of it; RefusedError, CharonError if it cannot be given other addresses."""
        host = self._host
        host.ha_version.check()
        check_kind(view)
        context = host.record.context(view.spis)
        self._check(context, view)
        return replace(context_at(context, view), local_vips=view.local_vips)

    async def ahead(self, context: IkeContext, local: Endpoint, remote: Endpoint) -> None:
        """Have the ESP of this SA, as `known`, leave to `remote` from `local`, and come from there, before
        charon has these addresses. `readdress`, `loud` and `home` end that. Not done where it cannot be; a
        failure is logged."""
        rewrite, sa = self._host.rewrite, context.spis
        if rewrite is None:
            return
        try:
            place = self.steps.new_place(context, local, remote)
            await self._runner.run(AHEAD, self._moving(sa, place=place))
        except IkectxError as error:
            log.warning("the ESP of %s waits for the new gateway's answer: %s", context.connection, error)

    async def home(self, sa: SaName) -> None:
        """End `ahead`, where `loud` does not: the SA was not made passive."""
        rewrite = self._host.rewrite
        if rewrite is not None and rewrite.place is not None:
            await self._runner.run(HOME, self._moving(sa))
            self._host.own.note(sa, soon=True)

    async def only_addresses(self, sa: SaName) -> bool:
        """Whether charon's only open exchange is the search for its gateway, as after a change of its
        network.

        While the SA is active charon repeats the request, and the new gateway answers it as well.
        """
        view = await self.steps.seen(sa)
        return bool(view.tasks) and view.state == "ESTABLISHED" and not in_the_way(view, unanswered=True)

    def hear(self, local: Endpoint, spis: Mapping[bytes, bytes]) -> None:
        """Decrypt under new inbound SPIs (old to new), too, before the gateway is asked to agree to them.

        The gateway may use them before charon has them. Errors: KernelError.
        """
        self.steps.hear(local.address, spis)

    async def listed(self, *names: SaName) -> bool:
        """Whether charon has an SA of one of these names. Errors: CharonError, WireError."""
        return any([await self._host.view(name) is not None for name in names])

    def forget(self, sa: SaName) -> None:
        """charon no longer has this SA, and has not reported that, because it was passive."""
        self._host.record.forget(sa)
        self._host.save()

    def recorded(self, sa: SaName) -> IkeContext:
        """charon's report of the SA: without counters, and with the addresses of then. Errors:
        UnknownSaError."""
        return self._host.record.context(sa)

    @trace.spanned("quiet", "step")
    async def quiet(
        self,
        sa: SaName,
        *,
        unanswered: bool = False,
        anything: bool = False,
        patience: float = IDLE_TIMEOUT,
    ) -> None:
        """Make the SA PASSIVE and verify that it is; idempotent.

        `unanswered`: requests as of `only_addresses` may be in flight. charon does not repeat them while it
        is passive, nor later if that was due meanwhile, so this must not last long. `anything`: any exchange
        may be in flight: `count` makes charon begin it anew, or the IKE_SA gets other SPIs. `patience`:
        seconds to wait for an exchange to end. Errors: UnknownSaError; RefusedError for an SA of a kind that
        cannot be moved; BusyError while an exchange is in flight or the SA is not up; CharonError with
        NOT_COVERED if it could not be given other addresses. The SA is active after any of these, unless it
        `is_quiet`, because charon could not be asked: then `loud_later` must be called.
        EndedUnheardError if the SA was there before, and not when it should be passive.
        """
        host = self._host
        view = await self.steps.seen(sa)
        check_kind(view)
        await host.catch_up(sa)
        if view.state == "PASSIVE" and host.own.of(sa).facts.quiet:
            return
        self._check(host.record.context(sa), view)
        work = self._moving(sa, view, unanswered=unanswered, anything=anything, patience=patience)
        try:
            await self._runner.run(QUIET, work)
        except UnknownSaError as error:
            await self._take_back(work)
            raise EndedUnheardError(f"{error}: it was ended here, it seems") from None
        except BaseException:
            await self._take_back(work)
            raise

    async def _take_back(self, work: Moving) -> None:
        """Make the SA active again that was to become passive. Errors: CharonError."""
        if work.facts.quiet:
            await activate(work)
            await look_for_way(work)
        self._host.own.drop(work.sa)

    def _moving(
        self, sa: SaName, view: SaView | None = None, *, name: SaName | None = None, **more: Any
    ) -> Moving:
        return Moving(self._host, self.steps, sa, name or sa, view, **more)

    def _check(self, context: IkeContext, view: SaView) -> None:
        """Check now what would otherwise fail later, when no gateway serves the SA. Errors: CharonError,
        UnknownSaError."""
        kernel = self._host.kernel
        check_told(view, context)
        living = {child.spi_in for child in view.children if child.state == "INSTALLED"}
        for child in context.children:
            if child.spi_in not in living:
                continue  # charon is deleting it by itself
            if kernel is None and child.generation != len(context.generations) - 1:
                raise CharonError(
                    f"CHILD_SA {child.name} is older than the present keys of its IKE_SA",
                    hint="rekey it first; only ESP in the kernel can be given its keys again",
                    status=Status.NOT_COVERED,
                )
            _, outbound = self._host.kernel_pair(context_at(context, view), child)
            if outbound is None:
                continue
            check_kernel(child.name, outbound)
            if not child.esn and outbound.replay.oseq + 3 * self._host.config.oseq_jump >= 1 << 32:
                raise CharonError(
                    f"CHILD_SA {child.name} has used up its sequence numbers",
                    hint="rekey it first",
                    status=Status.NOT_COVERED,
                )

    async def apply(
        self,
        context: IkeContext,
        agreement: Agreement,
        *,
        passive: bool,
    ) -> Applied:
        """Give the SA, which the new gateway serves now, what was agreed. `passive`: it is so by `quiet`.

        An error is logged: `loud` tries again, also if charon could not be asked, and has charon rekey what
        is left.
        """
        sa, passive_now, asks = context.spis, passive, False
        self._not_applied.pop(sa, None)
        local, remote, peers = agreement.local, agreement.remote, agreement.peers
        try:
            if not passive:
                # charon's open request uses the old SPIs and will get no answer, so silence it
                named_anew = sa.renamed(agreement.renames) != sa
                await self.quiet(sa, unanswered=True, anything=named_anew)
                passive_now = True
            if agreement.expected is not None:
                asks = await self.renumber(sa, agreement.expected, local, remote)
            await self.readdress(context, local, remote, agreement.renames, peers)
        except CharonError as error:
            log.error("the SA's addresses: %s", error)
            self._not_applied[sa] = context, agreement
            passive_now = True
        except BusyError as error:
            log.warning("%s; charon goes on with it at %s", error, remote)
            await self.redirect(sa, local, remote, peers)
        except UnknownSaError as error:
            log.warning("%s: it was ended here, it seems", error)
        except IkectxError as error:
            log.error("the SA's addresses: %s", error)
        return Applied(passive_now, asks)

    @trace.spanned("readdress", "step")
    async def readdress(
        self,
        context: IkeContext,
        local: Endpoint,
        remote: Endpoint,
        renames: Mapping[bytes, bytes] = NO_RENAMES,
        peers: Sequence[Endpoint] = (),
    ) -> IkeContext:
        """Give the SA, PASSIVE by `quiet`, and its children other outer addresses; returns the context after
        it.

        `renames`: SPIs to replace, old to new, ESP's of 4 octets and IKE's of 8. `peers`: all addresses of
        the new gateway, for MOBIKE later on. Idempotent, and repeatable after an error; `loud` needs the SA's
        old name. Errors: StateError if the SA is not passive; CharonError, KernelError: then `loud` brings
        the SA back at the new addresses, and charon rekeys children that could not be moved.
        """
        host = self._host
        sa = context.spis
        view = await self.steps.seen(sa)
        if view.state != "PASSIVE":
            raise StateError(f"the IKE_SA {view.name} is {view.state}, not PASSIVE")
        saved = host.own.of(sa).facts.move
        move = MobileMove.loads(saved) if saved else None
        if move is None:
            now = context_at(host.record.context(sa), view)
            living = [child.spi_in for child in view.children if child.state in LIVING]
            now = replace(now, children=tuple(child for child in now.children if child.spi_in in living))
            move = plan_move(now, view.children, local, remote, renames, peers)
        elif (move.local, move.remote) != (local, remote):
            raise StateError("another change of this SA's addresses is open")
        if not move.nothing and not move.done:
            self._note_lifetimes(sa, move, view)
            self.steps.save(sa, move)
            await self._runner.run(READDRESS, self._moving(sa, view))
        moved = {child.spi_in for child in host.record.context(move.ike or sa).children}
        after = move.after(context)
        kept = tuple(child for child in after.children if child.spi_in in moved)
        return move.with_new_name(replace(after, children=kept))

    async def count(self, sa: SaName, *, initiator: int | None = None, responder: int | None = None) -> None:
        """Set the message IDs of charon's next request, and of the next one it expects, while the SA is
        passive.

        An exchange of charon's that is in flight begins anew under the first (strongSwan's task_manager
        `reset`, 5.9.8 and 6.0.6). Errors: CharonError.
        """
        await tell_ids(self._host, self.steps.ike_id(sa), initiator, responder)
        self._host.save()

    async def next_request(self, sa: SaName) -> int:
        """Message ID of the gateway's request that charon has not had yet. Errors: UnknownSaError."""
        await self._host.catch_up(sa)
        return self._host.record.context(sa).mid_responder

    @trace.spanned("renumber", "step")
    async def renumber(self, sa: SaName, expected: int, local: Endpoint, remote: Endpoint) -> bool:
        """Make charon begin anew, once it is active, the request that the old gateway did not answer.

        charon does not repeat a request whose time came while it was passive, and sends no other before it is
        answered. `expected`: the next message ID for the new gateway, which is that of the request if the old
        gateway did not receive it; or one more than charon's, if an answer to this agent's own request was
        lost: then it is used up with the gateway at `remote`. The SA is PASSIVE by `quiet`. True: charon has
        a request. Errors: UnknownSaError, CharonError.

        charon's own ID is not given to it again. For IVs charon counts up by message IDs, in two ranges: a
        second message with an ID takes from the other one, that of its answers. The first answer with a lower
        ID then has no IV, and charon destroys the SA (iv_gen_seq, strongSwan 5.9.8).
        """
        view = await self.steps.seen(sa)
        await self._host.catch_up(sa)
        after = self._host.record.context(sa).mid_initiator
        if expected == after and not view.tasks:
            return False
        if not -1 <= after - expected <= bool(view.tasks):
            log.warning("%s: the gateway expects request %d, charon is at %d", view.name, expected, after - 1)
            return False
        if expected < after:
            expected = await self.use_up(sa, expected, local, remote)
            if expected < after:
                return False  # charon may repeat it by itself
        await self.count(sa, initiator=expected)
        return bool(view.tasks)

    async def use_up(self, sa: SaName, message_id: int, local: Endpoint, remote: Endpoint) -> int:
        """Send the gateway at `remote` an empty request with that message ID. The SA is PASSIVE by `quiet`.

        Returns the next message ID, the same if there is no answer. Errors: UnknownSaError, CharonError.
        """
        context, own = self._host.record.context(sa), self._host.own
        note = Mirror.fresh_one(context, message_id, (local, remote), (), secrets.token_bytes)
        own.note(sa, mirror=note.dumps())
        try:
            message_id += (await run_spi_update(note.machine(context), mark=MARK)).move.requests
            await self.count(sa, initiator=message_id)
        except (LinkError, KernelError) as error:
            log.warning("%s does not answer: %s", remote, error)
        own.note(sa, mirror=b"")
        return message_id

    async def rekey(self, sa: SaName) -> None:
        """Have charon rekey the IKE_SA, which begins new message IDs. Raises nothing."""
        try:
            view = await self.steps.seen(sa)
            await self._host.vici.rekey(ike_id=view.unique_id)
        except (CharonError, UnknownSaError, WireError) as error:
            log.error("the IKE_SA %s is not rekeyed: %s", sa, error)

    async def redirect(
        self, sa: SaName, local: Endpoint, remote: Endpoint, peers: Sequence[Endpoint] = ()
    ) -> None:
        """If the SA cannot be made passive: let charon go on at other addresses and rekey children.

        Parameters as of `readdress`. Errors: CharonError, UnknownSaError.
        """
        host = self._host
        peers = tuple(peers) or (remote,)
        update = ha.ike_update(
            await host.version(), self.steps.ike_id(sa), local=local, remote=remote, peer_addresses=peers
        )
        await host.send([update])
        await self.steps.until(
            sa, "take the new addresses", lambda view: (view.local, view.remote) == (local, remote)
        )
        host.record.feed(update)
        host.save_soon()
        await rekey_children(self._moving(sa))

    @trace.spanned("loud", "step")
    async def loud(self, sa: SaName) -> None:
        """Make the SA active again and verify that it is, at its present addresses; idempotent.

        A move that stopped half-way is completed first. If that fails, charon rekeys the children, once the
        SA is active, and the error is raised. With user-space ESP they are rekeyed anyway, because its
        sequence numbers begin anew, under keys that were used. Errors: CharonError, KernelError.
        """
        host = self._host
        failed: IkectxError | None = None
        await self._apply_again(sa)
        saved = host.own.of(sa).facts.move
        moved = bool(saved)
        name = sa
        try:
            if saved:
                name, failed = await self._end_move(sa, MobileMove.loads(saved))
        except (CharonError, WireError):
            raise  # charon cannot be asked: the caller tries again
        except IkectxError as error:  # a note that cannot be read must not keep the SA passive
            log.error(
                "a move that stopped half-way is not ended, charon is to rekey the CHILD_SAs: %s", error
            )
            failed = error
        rekeys = moved and (host.kernel is None or failed is not None)
        work = self._moving(sa, name=name, rekeys=rekeys)
        await self._runner.run(LOUD, work)
        if work.view is not None and work.view.tasks:
            host.spawn(self._go_on_asking(name))
        if host.on_change is not None:
            host.on_change(None)  # of what it was ordered to change charon reports nothing
        if failed is not None:
            raise failed

    async def _go_on_asking(self, sa: SaName) -> None:
        await asyncio.sleep(BEGUN)
        await go_on_asking(self._host, sa)

    async def _apply_again(self, sa: SaName) -> None:
        """Give the SA what `apply` could not, once. Errors: CharonError while charon cannot be asked."""
        if sa not in self._not_applied:
            return
        there = await self._host.view(sa) is not None
        context, agreement = self._not_applied.pop(sa)
        if there and not self._host.own.of(sa).facts.move:
            passive = self._host.own.of(sa).facts.quiet
            if (await self.apply(context, agreement, passive=passive)).asks:
                self._host.detour.stir(agreement.remote.address)
            self._not_applied.pop(sa, None)

    async def _end_move(self, sa: SaName, move: MobileMove) -> tuple[SaName, IkectxError | None]:
        """The SA's name afterwards, and the reason if a CHILD_SA could not be moved."""
        failed: IkectxError | None = None
        name = await self.steps.present_name(sa, move)
        if await self._host.view(name) is None:
            self.steps.drop_guards(move)  # or they would hold back what comes after this SA
            return name, None
        try:
            if not move.done:
                view = await self._host.view(sa)
                await self._runner.run(READDRESS, self._moving(sa, view))
        except IkectxError as error:
            log.error("a CHILD_SA could not be moved, charon is to rekey it: %s", error)
            failed = error
            self.steps.drop_guards(move)
        return await self.steps.present_name(sa, move), failed

    def is_quiet(self, sa: SaName) -> bool:
        """Whether charon was told to keep the SA passive, and not yet to serve it again."""
        return self._host.own.of(sa).facts.quiet

    def loud_later(self, sa: SaName, lock: asyncio.Lock) -> None:
        """After `loud` failed: try it again, under `lock`, until the SA is active, at the addresses that were
        agreed to. Raises nothing."""
        self._host.spawn(self._loud_at_last(sa, lock))

    async def _loud_at_last(self, sa: SaName, lock: asyncio.Lock) -> None:
        while True:
            await asyncio.sleep(AGAIN)
            async with lock:
                try:
                    if not self._host.own.of(sa).facts.quiet and sa not in self._not_applied:
                        return  # it is active, or another task has made it so
                    await self.loud(sa)
                except IkectxError as error:
                    log.warning(
                        "charon does not serve the SA %s yet as agreed, it is told again: %s", sa, error
                    )

    def left_passive(self) -> dict[SaName, IkeContext]:
        """SAs that an agent before this one left PASSIVE, as far as the record knows them.

        Call it before charon is asked for its SAs, because the record forgets those that charon no longer
        has.
        """
        found: dict[SaName, IkeContext] = {}
        for row in self._host.own.all():
            with contextlib.suppress(UnknownSaError):
                if row.facts.quiet:
                    found[row.sa] = self._host.record.context(row.sa)
        return found

    async def resume(self) -> dict[SaName, SaName]:
        """After a start: complete the moves that an agent before this one left open. Waits for charon; raises
        nothing.

        Returns the SAs that charon no longer has, by their old name: their last name.
        """
        ended: dict[SaName, SaName] = {}
        rows = self._host.own.all()
        left = [row.sa for row in rows if row.facts.quiet or row.facts.move]
        for row in rows:
            if row.facts == MobileFacts():
                self._forget(row.sa)  # a step had come to its end, but for that
        while left:
            waiting = []
            for sa in left:
                try:
                    await self._resume(sa, ended)
                except (CharonError, WireError) as error:
                    log.debug("what was open waits for charon: %s", error)
                    waiting.append(sa)
            left = waiting
            if left:
                await asyncio.sleep(AGAIN)
        return ended

    def _forget(self, sa: SaName) -> None:
        try:
            self._host.own.drop(sa)
        except StoreError as error:
            log.error("the row of the IKE_SA %s stays: %s", sa, error)

    async def _resume(self, sa: SaName, ended: dict[SaName, SaName]) -> None:
        """Resume one SA. Errors: CharonError, WireError; any other is logged, because the others must go
        on."""
        host = self._host
        saved = host.own.of(sa).facts.move
        move: MobileMove | None = None
        name = sa
        try:
            if saved:
                move = MobileMove.loads(saved)
                name = await self.steps.present_name(sa, move)
            if await host.view(name) is None:
                if move is not None:
                    self.steps.drop_guards(move)
                host.own.drop(sa)
                ended[sa] = name
                return
        except (CharonError, WireError):
            raise
        except IkectxError as error:
            log.error("the note of a move of the IKE_SA %s: %s", sa, error)
        log.warning("the IKE_SA %s was left in the middle of a handover; it goes on now", sa)
        try:
            await self.loud(sa)
        except (CharonError, WireError):
            raise
        except IkectxError as error:
            log.error("the IKE_SA %s: %s", sa, error)

    def _note_lifetimes(self, sa: SaName, move: MobileMove, view: SaView) -> None:
        """Keep the lifetimes of the old pairs, because charon begins those of the new pairs anew."""
        wall = steady_wall()
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
