"""The IKE exchanges of a gateway's agent with a mobile node whose SA has come: address, new SPIs, rekeys.
Runs the machines of `mobike_ext` for the sink and the source of `vici_bridge`."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from ikectx.engine.ports import MoveReport
from ikectx.errors import IkectxError, KernelError, LinkError
from ikectx.numbers import Prf, Protocol
from ikectx.sa.context import Address, ChildContext, FinalState, IkeContext
from ikectx.sa.keys import DrawnIvs, iv_length, prf_plus, sk_d
from ikectx.wire.ikev2 import RetransmitPolicy
from ikectx.wire.payloads import AnyPayload
from mobike_ext.address_update import COOKIE2_LENGTH, AddressNotice, AddressUpdate
from mobike_ext.farewell import Farewell
from mobike_ext.link import (
    ask_rekey,
    end_rekey,
    keep_answering,
    run_address_update,
    run_farewell,
    run_mid_probe,
    run_spi_update,
)
from mobike_ext.naming import MOST, ask, ask_peer, renamed_context
from mobike_ext.notify import UpdateSpi
from mobike_ext.probe import MidProbe
from mobike_ext.rekey import REKEY_OCTETS, ChildMade, ChildRekey, IkeMade, IkeRekey
from mobike_ext.requester import SaEnd
from mobike_ext.spi_update import (
    AGENT_WAIT,
    FRESH_OCTETS,
    MIRROR_WAIT,
    PeerRequests,
    Renamed,
    RenameRefused,
    SpiUpdate,
    Unsupported,
)
from vici_bridge.policy.new_names import Agreed, Wish, own_spi

log = logging.getLogger("ikectx")

KEEP_ANSWERING = 60.0
"""Seconds for which repetitions of the mobile node's own UPDATE_SPI are answered."""


class MnMover:
    """The address update. `mark`: that of packets that a muted SA may send."""

    def __init__(self, addresses: Sequence[Address], tries: int, timeout: float, mark: int = 0) -> None:
        self._addresses = addresses
        self._tries = tries
        self._timeout = timeout
        self._mark = mark

    async def __call__(self, here: IkeContext, final: FinalState, arrived: Callable[[], bool]) -> MoveReport:
        policy = RetransmitPolicy(self._timeout, tries=self._tries)
        machine = AddressUpdate(
            SaEnd(here.current, final.mid_initiator, here.local, here.remote, policy),
            # The same octets for the same message ID, also after a crash, because the mobile node answers a
            # request whose ID it knows from its cache, with the old cookie. Without SK_d they cannot be
            # predicted.
            AddressNotice(
                self._derived(here, final, b"cookie2", COOKIE2_LENGTH), here.conditions, self._addresses
            ),
            DrawnIvs.of(self._derived(here, final, b"iv", iv_length(here.current.encr))),
        )
        return await run_address_update(machine, heard=arrived, mark=self._mark)

    @staticmethod
    def _derived(here: IkeContext, final: FinalState, label: bytes, length: int) -> bytes:
        now = here.current
        seed = b"ikectx address update " + label + final.mid_initiator.to_bytes(4) + _path(here)
        # The rest of the request (`additional`) comes from the configuration. The IV depends on it, too
        # (`keys.DrawnIvs`); the cookie does not, because the mobile node would answer from its cache.
        return prf_plus(now.prf, sk_d(now).reveal(), seed, length)


class _Sender:
    """How often the mobile node is asked, and how long it is waited for. Arguments as for `MnMover`."""

    def __init__(self, tries: int, timeout: float, mark: int = 0) -> None:
        self._policy = RetransmitPolicy(timeout, tries=tries)
        self._mark = mark


class MnEnder(_Sender):
    """Deletes at the mobile node an SA that was ended here while charon was muted."""

    async def __call__(self, here: IkeContext, message_ids: Sequence[int]) -> bool:
        """Errors: LinkError (no socket)."""
        now = here.current
        iv = secrets.token_bytes(len(message_ids) * iv_length(now.encr))
        machine = Farewell(now, message_ids, here.local, here.remote, iv=iv, policy=self._policy)
        return await run_farewell(machine, mark=self._mark)


class _Prober(_Sender):
    async def _probe(
        self, here: IkeContext, message_id: int, label: bytes, payloads: Sequence[AnyPayload] = ()
    ) -> int:
        """The message ID of our next request. The same octets for the same payloads, also after a crash,
        because the IVs depend on them, too (`keys.DrawnIvs`)."""
        now = here.current
        key, size = sk_d(now).reveal(), iv_length(now.encr)
        first, second = (
            DrawnIvs.of(prf_plus(now.prf, key, label + (message_id + used).to_bytes(4), size))
            for used in (0, 1)
        )
        machine = MidProbe(
            now,
            message_id,
            here.local,
            here.remote,
            ivs=(first, second),
            policy=self._policy,
            payloads=payloads,
        )
        return await run_mid_probe(machine, mark=self._mark)


class MnSettler(_Prober):
    """Asks the mobile node for the message ID of our next request."""

    async def __call__(self, here: IkeContext, final: FinalState) -> int:
        """Errors: LinkError (silent)."""
        found = await self._probe(here, final.mid_initiator, b"ikectx next request" + _ends(here))
        log.info("%s expects request %d next, as its answer shows", here.remote_id, found)
        return found


class MnTeller(_Prober):
    """Tells the mobile node something over the SA."""

    async def __call__(self, here: IkeContext, message_id: int, payloads: Sequence[AnyPayload]) -> int:
        """The message ID of our next request. Errors: LinkError (silent)."""
        return await self._probe(here, message_id, b"ikectx telling " + _path(here), payloads)


class MnRenamer:
    """`policy.new_names.SpiRenamer`: UPDATE_SPI together with the address, else rekeys (RFC 7296).

    The first exchange with the address also shows whether the mobile node knows UPDATE_SPI. If the IKE_SA
    itself needs other SPIs, the address is told after the SPIs, because a mobile node with ESP in user space
    rekeys its children as soon as it has the address, and an IKE_SA cannot be rekeyed beside that, if a rekey
    becomes necessary.

    By rekeys: the IKE_SA, then a CREATE_CHILD_SA for each child, with the address told before the first
    Delete, because the mobile node sends on the new SA from that Delete on.
    """

    def __init__(self, addresses: Sequence[Address], tries: int, timeout: float, mark: int = 0) -> None:
        """As for `MnMover`."""
        self.addresses = addresses
        self.policy = RetransmitPolicy(timeout, tries=tries)
        self.mark = mark
        self._answering: set[asyncio.Task[None]] = set()

    def __call__(self, here: IkeContext, wish: Wish) -> MnTalk:
        return MnTalk(self, here, wish)

    def go_on_answering(self, machine: SpiUpdate) -> None:
        """In the background: answer repetitions of the mobile node's own request."""

        async def go_on() -> None:
            try:
                await keep_answering(machine, KEEP_ANSWERING, mark=self.mark)
            except (LinkError, KernelError) as error:
                log.warning("repetitions of the MN's UPDATE_SPI are not answered: %s", error)

        task = asyncio.get_running_loop().create_task(go_on())
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)


class MnTalk:
    """`policy.new_names.SpiTalk`: one change of SPIs under way.

    Which exchange is next follows from the SA as the mobile node has it, and from a rekey whose Delete is
    still to be sent.
    """

    def __init__(self, renamer: MnRenamer, here: IkeContext, wish: Wish) -> None:
        self._renamer = renamer
        self._now = here
        self._wish = wish
        self._moved = False
        self._supports: bool | None = None
        self._left = _asks(here, wish) if wish.update else []
        """What UPDATE_SPI is still to ask for."""
        self._updates = bool(self._left)
        self._rekey: ChildRekey | IkeRekey | None = None
        """The rekey whose new SA the mobile node has, beside the old one."""

    async def next(self) -> Agreed | None:
        """See `SpiTalk`."""
        addresses = self._wish.addresses and not self._moved
        if self._rekey is not None:
            if addresses and isinstance(self._rekey, ChildRekey):
                return await self._tell_address()
            return await self._end_rekey(self._rekey)
        if self._updates and (self._left or addresses):
            return await self._update()
        if self._names_itself:
            return await self._rekey_ike()
        for spi_in, new_in in self._wish.children:
            for child in self._now.children:
                if child.spi_in == spi_in:
                    return await self._rekey_child(child, new_in)
        return await self._tell_address() if addresses else None

    async def give_up(self, why: str) -> None:
        """See `SpiTalk`. A new CHILD_SA is deleted at the mobile node again; a new IKE_SA has the children
        already."""
        machine, self._rekey = self._rekey, None
        if isinstance(machine, ChildRekey):
            machine.abandon(why)
            try:
                await end_rekey(machine, mark=self._renamer.mark)
            except IkectxError as error:
                log.warning("%s may keep a CHILD_SA that is not used: %s", self._now.remote_id, error)

    @property
    def _names_itself(self) -> bool:
        """The IKE_SA is still to get other SPIs."""
        return bool(self._wish.ike) and own_spi(self._now.current) != self._wish.ike

    def _agreed(
        self, how: str, report: MoveReport, *, used: int = 0, answered: int = 0, unfinished: bool = False
    ) -> Agreed:
        """`used`, `answered`: message IDs that the exchange took."""
        now = self._now
        self._now = replace(
            now, mid_initiator=now.mid_initiator + used, mid_responder=now.mid_responder + answered
        )
        return Agreed(self._now, self._moved, how, report, unfinished, self._supports)

    # what is sent

    def _end(self) -> SaEnd:
        return _end(self._now, self._renamer.policy)

    def _fresh(self, label: bytes, length: int) -> bytes:
        """Octets for one message: the same after a crash, and unpredictable for others, because they come
        from the seed.

        `label` must contain the request's content besides the message ID. The IVs made of them also depend on
        all else in the message (`keys.DrawnIvs`).
        """
        # in parts, because prf+ ends after 255 blocks
        out = b""
        while len(out) < length:
            text = label + self._now.mid_initiator.to_bytes(4) + len(out).to_bytes(4)
            out += prf_plus(Prf.HMAC_SHA2_256, self._wish.seed.reveal(), text, min(length - len(out), 4096))
        return out

    def _notice(self, label: bytes) -> AddressNotice:
        """COOKIE2 proves one path, so it depends on both ends of that path."""
        cookie = self._fresh(label + _path(self._now) + b" cookie2", COOKIE2_LENGTH)
        return AddressNotice(cookie, self._now.conditions, self._renamer.addresses)

    # exchanges

    async def _update(self) -> Agreed:
        names_first = self._names_itself
        asks, rest = _in_one_request(self._left, names_first)
        addresses = self._wish.addresses and not self._moved and not names_first
        label = b"ikectx update " + bytes([addresses]) + b"".join(_octets(one) for one in asks)
        now = self._now
        machine = SpiUpdate(
            self._end(),
            asks,
            iv=DrawnIvs.of(self._fresh(label + b" iv", 8 * iv_length(now.current.encr))),
            fresh=self._fresh(label + b" fresh", FRESH_OCTETS),
            address=self._notice(label) if addresses else None,
            meanwhile=PeerRequests(now.mid_responder, AGENT_WAIT if self._wish.agent else MIRROR_WAIT),
        )
        done = await run_spi_update(machine, mark=self._renamer.mark)
        self._moved = self._moved or addresses
        used, answered = done.move.requests, done.move.answered
        match done.outcome:
            case Renamed(pairs):
                self._left, self._supports = rest, True
                if answered:
                    self._moved = True  # its agent has asked us back, at our address
                    self._renamer.go_on_answering(machine)
                now = replace(now, mid_initiator=now.mid_initiator + used)
                self._now = renamed_context(replace(now, mid_responder=now.mid_responder + answered), pairs)
                return self._agreed("update", done.move)
            case Unsupported():
                self._supports = False
                log.info("%s does not know UPDATE_SPI: its SAs are rekeyed", now.remote_id)
            case RenameRefused(reasons, error):
                self._supports = True
                why = ", ".join(sorted({reason.name for reason in reasons})) or str(error)
                log.info("%s refused new SPIs (%s): its SAs are rekeyed", now.remote_id, why)
        self._updates = False
        return self._agreed("rekey", done.move, used=used, answered=answered)

    async def _rekey_ike(self) -> Agreed:
        new_spi = self._wish.ike
        fresh = self._fresh(b"ikectx IKE rekey " + new_spi, REKEY_OCTETS)
        machine = IkeRekey(self._end(), new_spi=new_spi, fresh=fresh)
        made = await ask_rekey(machine, mark=self._renamer.mark)
        assert isinstance(made, IkeMade)
        self._rekey = machine
        generations = (*self._now.generations, made.generation)
        self._now = replace(self._now, generations=generations, mid_initiator=0, mid_responder=0)
        return self._agreed("rekey", MoveReport())

    async def _rekey_child(self, child: ChildContext, new_in: bytes) -> Agreed:
        now = self._now
        fresh = self._fresh(b"ikectx child rekey " + child.spi_in + new_in, REKEY_OCTETS)
        machine = ChildRekey(self._end(), len(now.generations) - 1, child, new_spi=new_in, fresh=fresh)
        made = await ask_rekey(machine, mark=self._renamer.mark)
        assert isinstance(made, ChildMade)
        self._rekey = machine
        new = replace(made.child, lifetime=child.lifetime)
        self._now = replace(now, children=tuple(new if one is child else one for one in now.children))
        return self._agreed("rekey", MoveReport(), used=machine.report.requests, unfinished=True)

    async def _end_rekey(self, machine: ChildRekey | IkeRekey) -> Agreed:
        """The Delete; that of an IKE_SA has a message ID of the old one."""
        before = machine.report.requests
        machine.installed()
        await end_rekey(machine, mark=self._renamer.mark)
        self._rekey = None
        used = machine.report.requests - before if isinstance(machine, ChildRekey) else 0
        return self._agreed("rekey", machine.report, used=used)

    async def _tell_address(self) -> Agreed:
        """Alone, or between a rekey's new SA and its Delete."""
        iv = self._fresh(b"ikectx address iv", iv_length(self._now.current.encr))
        machine = AddressUpdate(self._end(), self._notice(b"ikectx address"), DrawnIvs.of(iv))
        rekey = self._rekey
        try:
            done = await run_address_update(machine, mark=self._renamer.mark)
        except IkectxError as error:
            if rekey is not None:
                rekey.skip(machine.report.requests)
                await self.give_up(str(error))
            raise
        if rekey is not None:
            rekey.skip(done.requests)
        self._moved = True
        return self._agreed("rekey", done, used=done.requests, unfinished=rekey is not None)


def _asks(now: IkeContext, wish: Wish) -> list[UpdateSpi]:
    """Both directions of each child, so that both pairs can exist at the mobile node; the IKE_SA last."""
    outbound = {child.spi_in: child.spi_out for child in now.children}
    asks: list[UpdateSpi] = []
    for spi_in, new_in in wish.children:
        asks += [ask(Protocol.ESP, spi_in, new_in), ask_peer(Protocol.ESP, outbound[spi_in])]
    if wish.ike:
        asks.append(ask(Protocol.IKE, own_spi(now.current), wish.ike))
    return asks


def _in_one_request(left: list[UpdateSpi], last_first: bool) -> tuple[list[UpdateSpi], list[UpdateSpi]]:
    """What the next request asks for, `MOST` at most, and the rest. `last_first`: with the IKE_SA.

    A child's two directions are never in two requests: it would go on under the SPI that is taken.
    """
    if not last_first:
        return left[:MOST], left[MOST:]
    most = MOST - 1 if left[-1].protocol is Protocol.IKE else MOST
    return left[-most:], left[:-most]


def _end(here: IkeContext, policy: RetransmitPolicy) -> SaEnd:
    return SaEnd(here.current, here.mid_initiator, here.local, here.remote, policy)


def _ends(here: IkeContext) -> bytes:
    return b"".join(end.address.packed + end.port.to_bytes(2) for end in (here.local, here.remote))


def _path(here: IkeContext) -> bytes:
    """Both ends and the NATs between them."""
    return _ends(here) + here.conditions.to_bytes(4)


def _octets(one: UpdateSpi) -> bytes:
    return bytes([one.protocol, one.choose, len(one.new)]) + one.old + one.new
