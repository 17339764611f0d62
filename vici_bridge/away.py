"""`Away`: the SAs that left this gateway, and what the kernel does with packets for their mobile nodes. I/O.

Behind each SA that left stand policies that drop what the SA protected, of the lowest priority there is;
before them, as long as another gateway has the SA, policies that let these packets leave by the device
towards that gateway, and a route that leads them there. Forwarded packets are routed first and then looked up
in the SPD with their device, so where the route vanishes the block is left. What charon installs for the same
packets goes before both. With ESP in user space, where there are no policies, an unreachable route stands
behind the detour instead.

The store is written first when something is shut or sent on, and last when it is opened: `restore` puts into
the kernel what the store says, after a crash at any moment, a reboot, or a flush of the SPD by others.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_network

from ikectx.context import Address, IkeContext
from ikectx.errors import KernelError, StoreError, UnknownSaError
from ikectx.ports import SaName, Store

from .charon import SaView, prefixes
from .departures import OURS, Departure, News, Stage, allow_of, block_of, detourable, key_of
from .detour import Detour
from .kernel import Kernel
from .xfrm import KernelPolicy
from .xfrm_parts import Network

log = logging.getLogger(__name__)

KIND = "detour"
"""Kind of store entry, by the name that the SA had when it left: a `Departure`."""


class Away:
    """All departures of one gateway; those of the store from `load` on.

    `kernel` is None where ESP is in user space. `ways`: by peer name, the inner addresses of that gateway.
    """

    def __init__(
        self,
        store: Store,
        kernel: Kernel | None,
        detour: Detour,
        ways: Mapping[str, Sequence[Address]],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._kernel = kernel
        self._detour = detour
        self._ways = ways
        self._wall = wall
        self._rows: dict[str, Departure] = {}
        self._direct: Counter[SaName] = Counter()

    def load(self) -> None:
        """Read the store; what cannot be read is logged and left there."""
        for key, raw in self._store.items(KIND):
            try:
                self._rows[key] = Departure.loads(key, raw)
            except StoreError as error:
                log.error("%s (%s)", error, error.hint or "it is left as it is")

    def listing(self) -> list[Departure]:
        """All of them, those that left first in front."""
        return sorted(self._rows.values(), key=lambda row: row.since)

    def way(self, prefix: str, to: str) -> int:
        """Index of the device by which packets for `prefix` get to that peer now; 0: there is no way."""
        return self._detour.device_to(prefix, self._ways.get(to, ()))

    @contextlib.contextmanager
    def without_detour(self, sas: Iterable[SaName]) -> Iterator[None]:
        """Whichever of these leaves meanwhile: its packets are not sent on, the operator wants it so."""
        names = list(sas)
        self._direct.update(names)
        try:
            yield
        finally:
            self._direct.subtract(names)

    # An SA leaves, or is taken back.

    def leave(self, context: IkeContext, to: str, policies: Iterable[KernelPolicy]) -> None:
        """The SA goes to the peer `to`: shut what `policies` protect, and send packets on if there is a way.

        The policies may be taken out of the kernel afterwards. Errors: KernelError, StoreError.
        """
        remote = prefixes(ts for child in context.children for ts in child.remote_ts)
        row = Departure(
            sa=context.spis,
            mn=str(context.remote_id),
            peer=to,
            at=to,
            epoch=context.epoch + 1,
            since=self._wall(),
            stage=Stage.LEAVING,
            prefixes=() if self._direct[context.spis] > 0 else tuple(dict.fromkeys(detourable(context))),
            blocks=tuple(block_of(policy) for policy in policies),
            closed=tuple(remote) if self._kernel is None else (),
        )
        row = self._led(row)
        self._keep(row)
        self._shut(row)
        self._send_on(row)

    def back(self, sa: SaName) -> None:
        """The SA is served here again as it was: nothing is sent on or shut any more. Idempotent."""
        row = self._rows.get(key_of(sa))
        if row is not None and (row.stage is Stage.LEAVING or not row.peer):
            self._change(row, None)

    def left(self, sa: SaName) -> None:
        """The other gateway serves it: say where its packets go. Idempotent. Errors: StoreError."""
        row = self._rows.get(key_of(sa))
        if row is None or row.stage is not Stage.LEAVING:
            return
        self._keep(row.told(News.LEFT))
        if not row.prefixes:
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

    # It comes back, or its address is used here again.

    def comes(self, context: IkeContext) -> None:
        """The SA is about to be taken in here: the gateway that has it may send its packets to us."""
        for row in self._rows_of(context):
            self._change(row, row.told(News.COMES))

    def opens(self, context: IkeContext) -> None:
        """charon leads packets to the SA now, also with ESP in user space: nothing may stand before that."""
        for row in self._rows_of(context):
            self._detour.open_up(row.closed)

    def stays(self, context: IkeContext) -> None:
        """It is not taken in after all."""
        for row in self._rows_of(context):
            if row.stage is Stage.COMING:
                self._change(row, row.told(News.STAYS))

    def serves(self, context: IkeContext) -> None:
        """This gateway serves the SA, or a new one of the same mobile node or for the same addresses."""
        self._used(
            str(context.remote_id),
            [
                (_networks(prefixes(child.local_ts)), _networks(prefixes(child.remote_ts)))
                for child in context.children
            ],
            context.spis,
        )

    def look(self, views: Iterable[SaView], busy: Callable[[SaName], bool]) -> None:
        """What charon lists: addresses that came to be used here while no agent ran.

        `busy`: is that SA being moved in either direction?
        """
        for view in views if self._rows else ():
            if view.state == "ESTABLISHED" and not busy(view.spis):
                children = [
                    (_networks(child.local_ts), _networks(child.remote_ts))
                    for child in view.children
                    if child.state == "INSTALLED"
                ]
                self._used(view.remote_id, children, view.spis)

    def _used(
        self, who: str, children: Sequence[tuple[Sequence[Network], Sequence[Network]]], sa: SaName
    ) -> None:
        for row in list(self._rows.values()):
            if row.sa == sa and row.stage is Stage.LEAVING:
                continue  # it stands here still
            left = row.without(who, children)
            if left != row:
                log.info("%s is here again: its packets are not sent on any more", row.mn or who)
                self._change(row, None if left.empty else left)

    # The operator.

    def end(self, sa: SaName, *, unblock: bool) -> Departure:
        """Send nothing on any more for that SA; `unblock`: and drop nothing any more. Gives what it was.

        Errors: UnknownSaError.
        """
        row = self._rows.get(key_of(sa))
        if row is None:
            raise UnknownSaError(
                f"no SA {sa[0].hex()}:{sa[1].hex()} has left this gateway",
                hint="`ikectx detours` lists those that have",
            )
        self._change(row, None if unblock else row.told(News.ENDS))
        return row

    # The kernel.

    def restore(self) -> None:
        """Put into the kernel what the store says, and take out what it does not. What fails is logged."""
        rows = self.listing()
        try:
            if self._kernel is not None:
                wanted = {policy.raw for row in rows for policy in (*row.blocks, *row.allows)}
                for policy in self._kernel.dump_policies():
                    if policy.selector.user == OURS and replace(policy, index=0).raw not in wanted:
                        self._kernel.delete_policy(policy)
            sent = {prefix for row in rows for prefix in row.sent_on}
            self._detour.remove([net for net in self._detour.listing() if str(net) not in sent])
            closed = {prefix for row in rows for prefix in row.closed}
            self._detour.open_up([net for net in self._detour.listing(shut=True) if str(net) not in closed])
        except KernelError as error:
            log.error("what an agent before this one left in the kernel stays there: %s", error)
        for row in rows:
            try:
                self._shut(row)
                now = self._led(row) if row.peer else row
                if now != row:
                    self._change(row, now)
                else:
                    self._send_on(row)
            except (KernelError, StoreError) as error:
                log.error("packets for %s, which is at %s, cannot be sent on: %s", row.mn, row.at, error)

    def _led(self, row: Departure) -> Departure:
        """With the way there is now to where it is, and the policies that let packets go that way."""
        via = tuple(self._ways.get(row.at, ()))
        if row.stage not in (Stage.LEAVING, Stage.AWAY):
            return replace(row, via=via, allows=())
        devices = {prefix: self.way(prefix, row.at) for prefix in row.prefixes}
        led = {ip_network(prefix): device for prefix, device in devices.items() if device}
        allows = {
            allow_of(block, device).raw: allow_of(block, device)
            for block in row.blocks
            for network, device in led.items()
            if _holds(network, block.destination) and block.selector.ifindex in (0, device)
        }
        return replace(row, via=via if led else (), allows=tuple(allows.values()))

    def _rows_of(self, context: IkeContext) -> list[Departure]:
        """Those whose addresses the SA has."""
        remote = prefixes(ts for child in context.children for ts in child.remote_ts)
        used = [((), _networks(remote))]
        who = str(context.remote_id)
        return [
            row
            for row in self._rows.values()
            if row.sa == context.spis
            or (row.mn == who and (not row.prefixes or row.without(who, used).prefixes != row.prefixes))
        ]

    def _keep(self, row: Departure) -> None:
        self._store.put(KIND, row.key, row.dumps())
        self._rows[row.key] = row

    def _change(self, row: Departure, now: Departure | None) -> None:
        """Store and kernel as `now` says, None: nothing is left of it. Errors: KernelError, StoreError."""
        if now is not None:
            now = self._led(now) if now.peer else now
            self._keep(now)
            self._shut(now)
            self._send_on(now)
        else:
            self._rows.pop(row.key, None)
        others = list(self._rows.values())
        gone = set(row.sent_on) - {prefix for other in others for prefix in other.sent_on}
        self._detour.remove(sorted(gone))
        for other in others:
            if other is not now and set(other.sent_on) & set(row.sent_on):
                self._send_on(other)  # the same prefix may have led elsewhere
        if self._kernel is not None:
            kept = {policy.raw for other in others for policy in (*other.blocks, *other.allows)}
            for policy in (*row.allows, *row.blocks):
                if policy.raw not in kept:
                    self._kernel.delete_policy(policy)
        closed = set(row.closed) - {prefix for other in others for prefix in other.closed}
        if closed:
            self._detour.open_up(sorted(closed))
        if now is None:
            self._store.delete(KIND, row.key)

    def _shut(self, row: Departure) -> None:
        if self._kernel is not None:
            for policy in row.blocks:
                self._kernel.replace_policy(policy)
        elif row.closed:
            self._detour.shut(row.closed)

    def _send_on(self, row: Departure) -> None:
        if not row.sent_on or not row.via:
            return
        if self._kernel is not None:
            for policy in row.allows:
                self._kernel.replace_policy(policy)
        try:
            self._detour.add(row.sent_on, row.via)
        except KernelError as error:
            log.warning("packets for %s are not sent on to %s: %s", row.mn, row.at, error)


def _networks(texts: Iterable[str]) -> list[Network]:
    """Of prefixes, or of selectors as VICI writes them; ranges that are no prefix are left out."""
    found: list[Network] = []
    for text in texts:
        try:
            found.append(ip_network(text.split("[", 1)[0].split("|", 1)[0]))
        except ValueError:
            continue
    return found


def _holds(outer: Network, inner: Network) -> bool:
    return outer.version == inner.version and inner.subnet_of(outer)  # type: ignore[arg-type]
