"""`Away`: the SAs that left this gateway, and what the kernel does with packets for their mobile nodes. I/O.

Behind each SA that left there are policies that drop the packets that the SA protected, of the lowest
priority there is. Before them, as long as another gateway has the SA, are policies that let these packets
leave by the device towards that gateway, and a route that leads them there. Forwarded packets are routed
first and then looked up in the SPD with their device, so if the route vanishes, the block remains. The
policies that charon installs for the same packets precede both. With ESP in user space, which has no
policies, an unreachable route behind the detour is the block.

The store is written first when packets are blocked or sent on, and last when that ends. `restore` puts into
the kernel what the store has, after a crash at any moment, a reboot, or a flush of the SPD by others.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address

from ikectx.engine.ports import Store
from ikectx.errors import KernelError, StoreError, UnknownSaError
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.sa.name import SaName
from vici_bridge.kernel.detour import Detour
from vici_bridge.kernel.kernel import Kernel
from vici_bridge.kernel.nat_relay import NatRelay
from vici_bridge.kernel.nat_rule import NatRule
from vici_bridge.kernel.xfrm import BLOCK, KernelPolicy
from vici_bridge.kernel.xfrm_parts import Network
from vici_bridge.vici.views import prefixes

from .behind import Behind
from .departures import (
    OURS,
    SENT,
    SENT_ON,
    Departure,
    News,
    Stage,
    bare_blocks,
    block_of,
    detourable,
)
from .leading import Leading, Ways
from .pairs import Pair, networks
from .passing import Passing

log = logging.getLogger(__name__)

_LETTING_GO = (Stage.LEAVING, Stage.HANDED)
GUESTS = 3
"""Places of a relayed mobile node beside the one that it had when it left."""
FAR = (ip_address("192.0.2.1"), ip_address("2001:db8::1"))
"""Addresses of no host (RFC 5737, RFC 3849): packets for them leave by the default route."""
KIND = "detour"
"""Kind of store entry, by the name that the SA had when it left: a `Departure`. It is not in the ledger,
because it stays for as long as the SA is elsewhere, through other transfers."""


class Away:
    """All departures of one gateway; those in the store are there after `load`.

    `kernel` is None if ESP is in user space. `ways`: by peer name, the inner addresses of that gateway.
    `announced`: connections for whose mobile nodes the network inside follows by itself.
    """

    def __init__(
        self,
        store: Store,
        kernel: Kernel | None,
        detour: Detour,
        ways: Mapping[str, Sequence[Address]],
        wall: Callable[[], float] = time.time,
        announced: Collection[str] = (),
        nat: NatRelay | None = None,
    ) -> None:
        self._store = store
        self._kernel = kernel
        self._detour = detour
        self._leading = Leading(kernel, detour, ways)
        self._wall = wall
        self._rows: dict[str, Departure] = {}
        self._named: defaultdict[str, set[str]] = defaultdict(set)
        """Keys of rows by mobile nodes and prefixes, because rows are looked up by them. There may be
        thousands."""
        self._direct: Counter[SaName] = Counter()
        self._announced = announced
        self._keeps = False
        """Are blocks left in the kernel that the store does not have?"""
        self._found: set[SaName] = set()
        """SAs that are leaving, whose packets the network inside leads to the new gateway by itself."""
        self.behind = Behind(store, kernel, detour.device_now)
        self.passing = Passing(nat)

    def load(self) -> None:
        """Read the store; a row that cannot be read is logged and left there."""
        self.behind.load()
        for key, raw in self._store.items(KIND):
            try:
                self._enter(Departure.loads(key, raw))
            except StoreError as error:
                log.error("%s (%s)", error, error.hint or "it is left as it is")

    def listing(self) -> list[Departure]:
        """All departures, oldest first."""
        return sorted(self._rows.values(), key=lambda row: row.since)

    def elsewhere(self) -> set[SaName]:
        """The names that SAs had here which another gateway serves now."""
        return {row.sa for row in self._rows.values() if row.stage not in (Stage.ENDED, Stage.COMING)}

    def stranded(self, prefixes: Collection[Network], to: str) -> set[Network]:
        """Those of the prefixes whose packets have no way to that peer now."""
        known: Ways = {}
        return {network for network in prefixes if not self._leading.way(network, to, known)}

    @contextlib.contextmanager
    def without_detour(self, sas: Iterable[SaName]) -> Iterator[None]:
        """Packets of these SAs are not sent on if they leave within this block, because the operator wants
        so."""
        names = list(sas)
        self._direct.update(names)
        try:
            yield
        finally:
            self._direct.subtract(names)

    # An SA leaves, or is taken back.

    def leave(
        self,
        context: IkeContext,
        to: str,
        policies: Iterable[KernelPolicy],
        *,
        unprepared: bool = False,
        relay: NatRule | None = None,
    ) -> None:
        """The SA goes to the peer `to`: block the packets that `policies` protect, and send them on if
        possible.

        The policies may be taken out of the kernel afterwards. `unprepared`: the peer has no part of the SA
        yet, and may itself send its packets here. `relay`: the mobile node stays here, and its IKE is passed
        on. Errors: KernelError, StoreError.
        """
        policies = tuple(policies)
        blocks = [block_of(policy) for policy in policies]
        if any(block.mark is not None or block.if_id for block in blocks):
            outside = self._detour.device_now(str(context.remote.address))
            blocks += [bare for block in blocks for bare in bare_blocks(block, context, outside)]
        remote = prefixes(ts for child in context.children for ts in child.remote_ts)
        row = Departure(
            sa=context.spis,
            mn=str(context.remote_id),
            peer=to,
            at=to,
            epoch=context.epoch + 1,
            since=self._wall(),
            stage=Stage.HANDED if unprepared else Stage.LEAVING,
            prefixes=() if self._direct[context.spis] > 0 else tuple(dict.fromkeys(detourable(context))),
            blocks=tuple(blocks),
            relay=relay,
            policies=policies,
        )
        row = self._leading.led(row)
        if context.connection in self._announced:
            self._found.add(context.spis)
        # with ESP in user space no policy has any effect
        row = replace(row, closed=tuple(remote)) if self._kernel is None else self._leading.closing(row)
        self._keep(row)
        self._leading.shut(row)
        self._leading.send_on(row)
        self._pass_on(None, row)

    def back(self, sa: SaName) -> None:
        """The SA is served here again as before: end its detour and its block. Idempotent."""
        row = self._rows.get(sa.key)
        self._found.discard(sa)
        if row is not None and (row.stage in _LETTING_GO or not row.peer):
            self._change(row, None)

    def left(self, sa: SaName) -> Departure | None:
        """The other gateway serves the SA: send its packets on, and log that. Idempotent; the caller's step
        writes what has changed.

        Returns the departure, None if there is none. Errors: KernelError, StoreError.
        """
        row = self._rows.get(sa.key)
        if row is None or row.stage not in _LETTING_GO:
            return row
        now = row.told(News.LEFT)
        if row.stage is Stage.LEAVING:
            self.passing.put(now.key, now.passed_on)
            self._keep(now, soon=True)  # the kernel has the right routes and policies already
        else:
            self._change(row, now)
        row = self._rows[row.key]
        found = sa in self._found
        self._found.discard(sa)
        if not row.prefixes or (found and not row.sent_on):
            log.info("%s: its packets are not sent on to %s", row.mn, row.at)
        elif row.sent_on:
            places = " or ".join(map(str, row.via))
            log.info("%s: packets for it are sent on by way of %s (%s)", row.mn, row.at, places)
        else:
            log.warning(
                "%s: there is no way to %s, packets for it that arrive here are dropped: set forward_via for "
                "that peer, or have the network announce the way there",
                row.mn,
                row.at,
            )
        return row

    def relayed(self, name: SaName) -> Departure | None:
        """The SA that left and whose mobile node stays at this gateway's address, by its name at either
        gateway."""
        return next(
            (row for row in self._rows.values() if row.rules and name in (row.sa, row.known_as)), None
        )

    def relays(self) -> dict[tuple[Endpoint, Address], Departure]:
        """The SAs that left, by the places from which their packets are passed on, and the gateways to
        which."""
        return {(rule.mn, rule.to): row for row in self._rows.values() for rule in row.rules.values()}

    def roamed(self, row: Departure, mn: Endpoint, ours: Endpoint) -> NatRule | None:
        """A relayed mobile node sends from `mn` to `ours`: pass its packets on from there, too.

        The other gateway decides whether it is really there. None: they are passed on already, or cannot be,
        because that gateway's address is of the other IP version. Errors: KernelError, StoreError, BusyError.
        """
        known = any((rule.mn, rule.ours) == (mn, ours) for rule in row.rules.values())
        if row.relay is None or known or row.relay.to.version != mn.address.version:
            return None
        guest = NatRule(mn, ours, self.passing.free_port(), row.relay.to)
        log.info("%s sends from %s now: its packets are passed on from there, too", row.mn, mn)
        guests = row.guests
        if len(guests) >= GUESTS:
            answered = self.passing.answered()
            # whoever repeats packets from elsewhere is not answered, and does not displace the mobile node
            out = next((one for one in guests if one.port not in answered), guests[0])
            guests = tuple(one for one in guests if one is not out)
        self._change(row, replace(row, guests=(*guests, guest)))
        return guest

    def ready(self, peer: str, sa: SaName, epoch: int) -> None:
        """The gateway that the SA was handed to can send its ESP: packets are sent on from now on.
        Idempotent. Errors: KernelError, StoreError."""
        row = self._rows.get(sa.key)
        if row is not None and (row.epoch, row.peer, row.stage) == (epoch, peer, Stage.HANDED):
            now = self._leading.closing(self._leading.led(row.told(News.READY)))
            self._keep(now)
            if now.closed != row.closed:
                self._leading.shut(now)
            self._leading.send_on(now)  # what was in the kernel stays

    def renamed(self, peer: str, sa: SaName, epoch: int, name: SaName, esp: tuple[bytes, ...] = ()) -> None:
        """The SA has another name at the gateway that it was given to, or its mobile node receives ESP under
        other SPIs. Errors: KernelError, StoreError."""
        row = self._rows.get(sa.key)
        if row is not None and (row.epoch, row.peer) == (epoch, peer):
            relay = (
                replace(row.relay, spis=esp)
                if row.relay is not None and row.relay.plain and esp
                else row.relay
            )
            self._change(row, replace(row, known_as=name, relay=relay))

    def came(self, peer: str, sa: SaName, epoch: int) -> None:
        """The mobile node has gone to the gateway that the SA was given to: pass nothing on any more.

        That gateway knows one of our addresses. If the mobile node has sent to another one as well, it may be
        that, and the relay goes on. Errors: KernelError, StoreError.
        """
        row = self._rows.get(sa.key)
        if row is None or (row.epoch, row.peer) != (epoch, peer) or row.relay is None:
            return
        if all(guest.ours.address == row.relay.ours.address for guest in row.guests):
            log.info("%s has gone to %s itself, and is not relayed any more", row.mn, peer)
            now = replace(row, relay=None, guests=())
            self._change(row, None if now.empty else now)

    def _pass_on(self, row: Departure | None, now: Departure | None) -> None:
        before, after = ({} if one is None else one.places for one in (row, now))
        rules = {} if now is None else now.rules
        for key in {**before, **after}:
            if now is not None and now.stage is Stage.ENDED and key in after:
                self.passing.end_soon(key)
            else:
                self.passing.put(key, rules.get(key))

    def hear(self, peer: str, sa: SaName, epoch: int, news: News, to: str) -> Departure | None:
        """Take in the peer's notice about an SA that was given to it, `to` with MOVED. None: it has no say in
        it.

        Errors: KernelError, StoreError.
        """
        row = self._rows.get(sa.key)
        if row is None or row.epoch != epoch:
            return None
        if row.peer != peer:
            log.warning("%s reports on an SA of %s, which was given to %s", peer, row.mn, row.peer or "?")
            return None
        at = {News.HERE: peer, News.MOVED: to}.get(news, row.at)
        self._change(row, replace(row.told(news), at=at))
        return self._rows[row.key]

    # It comes back, or its address is used here again.

    def comes(self, context: IkeContext) -> None:
        """The SA is about to be taken in here, so the gateway that has it may send its packets to us."""
        for row in self._rows_of(context):
            self._change(row, row.told(News.COMES))

    def awaits(self, context: IkeContext, reqids: Collection[int], *, relayed: bool = False) -> None:
        """The SA is prepared here, with policies of these reqids, so the gateway that has it may send packets
        here.

        Such packets must never leave in the clear, even if the SA is not taken in the end. `relayed`: the way
        to the outer address is that to another gateway, and its packets would leave by the default route.
        Idempotent.
        """
        if self._kernel is None:
            return  # ESP in user space has no policies that could be blocks
        try:
            places = [context.remote.address, *(FAR if relayed else ())]
            devices = {place: self._detour.device_now(str(place)) for place in places}
        except KernelError as error:
            log.error("the way to %s is not known: %s", context.remote.address, error)
            devices = {}
        towards = {place: device for place, device in devices.items() if device}
        if context.remote.address not in towards:
            self.behind.stand(context, reqids)
        for outer, device in towards.items():
            self.behind.stand(context, reqids, device, outer)

    def opens(self, context: IkeContext) -> None:
        """charon leads packets to the SA now, also with ESP in user space: remove any block in front of
        it."""
        for row in self._rows_of(context):
            self._detour.open_up(row.closed)
            self._put_back(row)

    def _put_back(self, row: Departure) -> None:
        """Install the operator's own policies again, for an SA whose policies charon does not install
        (`policies = no`): it is here, and nothing leads to it."""
        kernel = self._kernel
        if kernel is None or not row.policies:
            return
        reqids = {template.reqid for policy in row.policies for template in policy.templates} - {0}
        if any(policy.direction == "out" for policy in kernel.policies_about(reqids)):
            return
        places = {template.destination for policy in row.policies for template in policy.templates}
        here = {sa.reqid for place in places for sa in kernel.sas_to(place)}
        for policy in row.policies:
            if any(template.reqid in here for template in policy.templates):
                log.info("%s: an outbound policy of the operator is back (%s)", row.mn, policy)
                kernel.replace_policy(replace(policy, index=0))

    def stays(self, context: IkeContext) -> None:
        """The SA is not taken in after all; the gateway that has it will report that."""
        for row in self._rows_of(context):
            if row.stage is Stage.COMING:
                self._change(row, row.told(News.STAYS))

    def serves(self, sa: SaName, who: str, children: Iterable[Pair]) -> list[Departure]:
        """The mobile node `who` has an SA here with these networks of both sides.

        Departures of the same node, or for the same addresses, end; returns those of which nothing is left.
        The store forgets them with its next write, because here they end again at each start.
        Errors: KernelError, StoreError.
        """
        used, over = list(children), []
        self.behind.serves(who, used)
        for row in self._candidates(who, (str(network) for _, remote in used for network in remote)):
            if row.sa == sa and row.stage in _LETTING_GO:
                continue  # it is served here, too, under its old name
            left = row.without(who, used)
            if left != row:
                log.info("%s is here again: its packets are not sent on any more", who)
                self._put_back(row)
                self._change(row, None if left.empty else left, soon=True)
                over += [row] if left.empty else []
        return over

    # The operator.

    def end(self, sa: SaName, *, unblock: bool) -> Departure:
        """Send nothing on any more for that SA; with `unblock` also remove its block. Returns the departure.

        Errors: UnknownSaError.
        """
        row = self._rows.get(sa.key)
        if row is None:
            raise UnknownSaError(
                f"no SA {sa} has left this gateway",
                hint="`ikectx detours` lists those that have",
            )
        # without prefixes no notice of the other gateway can begin the detour again
        self._change(row, None if unblock else replace(row.told(News.ENDS), prefixes=()))
        return row

    # The kernel.

    def keep_blocks(self) -> None:
        """Leave blocks in the kernel that the store does not have, because it lacks SAs that left: their
        packets would leave in the clear. Other policies go before a block, so it stops nobody else."""
        self._keeps = self.behind.keeps = True

    def restore(self) -> None:
        """Put into the kernel what the store has, and remove the rest. Failures are logged."""
        self.behind.restore()
        try:
            for row in self.listing():
                if (now := self._leading.renewed(row)) != row:
                    self._keep(now)
        except (KernelError, StoreError) as error:
            log.error("packets for mobile nodes that left may leave in the clear: %s", error)
        rows = self.listing()
        try:
            if self._kernel is not None:
                wanted = {policy.raw for row in rows for policy in (*row.blocks, *row.allows)}
                for policy in self._kernel.dump_policies():
                    kept = self._keeps and policy.action == BLOCK
                    ours = policy.selector.user in (OURS, SENT) and not kept
                    if ours and replace(policy, index=0).raw not in wanted:
                        self._kernel.delete_policy(policy)
            sent = {prefix for row in rows for prefix in row.sent_on}
            self._detour.remove([net for net in self._detour.listing() if str(net) not in sent])
            closed = {prefix for row in rows for prefix in row.closed}
            self._detour.open_up([net for net in self._detour.listing(shut=True) if str(net) not in closed])
        except KernelError as error:
            log.error("what an agent before this one left in the kernel stays there: %s", error)
        try:
            self.passing.restore({key: rule for row in rows for key, rule in row.rules.items()})
        except KernelError as error:
            log.error("packets of relayed mobile nodes are not passed on: %s", error)
        ways: Ways = {}
        for row in rows:
            try:
                self._leading.shut(row)
                now = self._leading.led(row, ways) if row.peer else row
                if now != row:
                    self._change(row, now)
                else:
                    self._leading.send_on(row)
            except (KernelError, StoreError) as error:
                log.error("packets for %s, which is at %s, cannot be sent on: %s", row.mn, row.at, error)

    def look_again(self) -> None:
        """Devices or addresses changed, or somebody removed our routes: adapt the detours."""
        self.behind.look_again()
        ways: Ways = {}
        last: dict[str, tuple[Address, ...]] = {}
        inside: set[Network] = set()
        for row in self.listing():
            now = self._leading.renewed(row)
            if row.peer and row.stage in SENT_ON:
                now = self._leading.led(now, ways)
                last.update((prefix, now.via) for prefix in now.sent_on)
                inside |= now.inside
                if (now.led, now.via) != (row.led, row.via):
                    log.info("%s: packets for it are sent on by another way, or by none", row.mn)
            if now != row:
                try:
                    self._change(row, now)
                except (KernelError, StoreError) as error:
                    log.error("packets for %s are not blocked or sent on: %s", row.mn, error)
        for via in set(last.values()):
            self._leading.add([prefix for prefix, by in last.items() if by == via], via, inside)

    def _rows_of(self, context: IkeContext) -> list[Departure]:
        """The departures that have an address of the SA."""
        remote = prefixes(ts for child in context.children for ts in child.remote_ts)
        used: list[Pair] = [((), networks(remote))]
        who = str(context.remote_id)
        candidates = self._candidates(who, remote)
        own = self._rows.get(context.spis.key)
        return [
            row
            for row in ([own] if own is not None and own not in candidates else []) + candidates
            if row.sa == context.spis
            or (row.mn == who and (not row.prefixes or row.without(who, used).prefixes != row.prefixes))
        ]

    def _candidates(self, who: str, texts: Iterable[str]) -> list[Departure]:
        """Departures of that mobile node, or of one of these prefixes exactly."""
        keys = set(self._named.get(who, ())).union(*(self._named.get(text, ()) for text in texts))
        return [self._rows[key] for key in sorted(keys)]

    def _keep(self, row: Departure, *, soon: bool = False) -> None:
        self._store.put(KIND, row.key, row.dumps(), soon=soon)
        self._leave_out(row.key)
        self._enter(row)

    def _enter(self, row: Departure) -> None:
        self._rows[row.key] = row
        for name in row.names:
            self._named[name].add(row.key)

    def _leave_out(self, key: str) -> None:
        row = self._rows.pop(key, None)
        for name in row.names if row is not None else ():
            self._named[name].discard(key)
            if not self._named[name]:
                del self._named[name]

    def _change(self, row: Departure, now: Departure | None, *, soon: bool = False) -> None:
        """Change store (`soon`: with its next write) and kernel to `now`, None: remove the departure. Errors:
        KernelError, StoreError."""
        if now is not None:
            now = self._leading.led(now) if now.peer else now
            if now.sent_on and not row.sent_on:
                now = self._leading.closing(now)
            self._keep(now, soon=soon)
            try:
                if now.stage is not Stage.COMING:  # until then nothing that is shut was opened
                    self._leading.shut(now)
                self._lead(row, now)
            except KernelError:
                self._keep(row, soon=True)  # whoever tries again must find what is to be changed
                raise
            return
        self._leave_out(row.key)
        try:
            self._lead(row, None)
            self._store.delete(KIND, row.key, soon=soon)
        except (KernelError, StoreError):
            self._enter(row)  # whoever tries again must find it
            raise

    def _lead(self, row: Departure, now: Departure | None) -> None:
        self._pass_on(row, now)
        others = self._candidates(row.mn, row.names)
        wanted = {prefix for other in others for prefix in other.sent_on}
        self._detour.remove(sorted(set(row.sent_on) - wanted))
        # if two departures have the same address, the later one leads its packets
        for other in sorted(others, key=lambda one: one.since):
            if other is now or set(other.sent_on) & set(row.sent_on):
                self._leading.send_on(other)
        if self._kernel is not None:
            kept = {policy.raw for other in others for policy in (*other.blocks, *other.allows)}
            over = [policy for policy in (*row.allows, *row.blocks) if policy.raw not in kept]
            self._kernel.delete_policies(over)
        closed = set(row.closed) - {prefix for other in others for prefix in other.closed}
        if closed:
            self._detour.open_up(sorted(closed))
