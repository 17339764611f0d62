"""The IKE exchanges of a gateway's agent with a mobile node whose SA has come: address, new SPIs, rekeys.
Runs the machines of `mobike_ext` for the sink and the source of `vici_bridge`."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ikectx.engine.ports import MoveReport
from ikectx.errors import IkectxError, KernelError, LinkError, RefusedError
from ikectx.numbers import Prf, Protocol, Status
from ikectx.sa.context import Address, ChildContext, FinalState, IkeContext, IkeGeneration
from ikectx.sa.keys import DrawnIvs, iv_length, prf_plus, sk_keys
from ikectx.wire.ikev2 import RetransmitPolicy
from mobike_ext.address_update import COOKIE2_LENGTH, AddressNotice, AddressUpdate
from mobike_ext.farewell import Farewell
from mobike_ext.link import (
    SpiReport,
    UpdateReport,
    keep_answering,
    run_address_update,
    run_farewell,
    run_mid_probe,
    run_rekey,
    run_spi_update,
)
from mobike_ext.naming import MOST, ask, ask_peer, renamed_context
from mobike_ext.notify import Invitation, UpdateSpi
from mobike_ext.probe import MidProbe
from mobike_ext.rekey import REKEY_OCTETS, ChildRekey, IkeRekey
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
from vici_bridge.policy.new_names import Made, Told, Wish

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
        async def heard() -> bool:
            return arrived()

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
        report = await run_address_update(machine, heard=heard, mark=self._mark)
        _warn_of_nat(report)
        return report.move

    @staticmethod
    def _derived(here: IkeContext, final: FinalState, label: bytes, length: int) -> bytes:
        now = here.current
        seed = b"ikectx address update " + label + final.mid_initiator.to_bytes(4) + _path(here)
        # The rest of the request (`additional`) comes from the configuration. The IV depends on it, too
        # (`keys.DrawnIvs`); the cookie does not, because the mobile node would answer from its cache.
        return prf_plus(now.prf, sk_keys(now).sk_d.reveal(), seed, length)


class MnEnder:
    """Deletes at the mobile node an SA that was ended here while charon was muted. Arguments as for
    `MnMover`."""

    def __init__(self, tries: int, timeout: float, mark: int = 0) -> None:
        self._policy = RetransmitPolicy(timeout, tries=tries)
        self._mark = mark

    async def __call__(self, here: IkeContext, message_ids: Sequence[int]) -> bool:
        """Errors: LinkError (no socket)."""
        now = here.current
        iv = secrets.token_bytes(len(message_ids) * iv_length(now.encr))
        machine = Farewell(now, message_ids, here.local, here.remote, iv=iv, policy=self._policy)
        return await run_farewell(machine, mark=self._mark)


class MnSettler:
    """Asks the mobile node for the message ID of our next request. Arguments as for `MnMover`."""

    def __init__(self, tries: int, timeout: float, mark: int = 0) -> None:
        self._policy = RetransmitPolicy(timeout, tries=tries)
        self._mark = mark

    async def __call__(self, here: IkeContext, final: FinalState) -> int:
        """Errors: LinkError (silent)."""
        now = here.current
        seed = b"ikectx next request"
        for end in (here.local, here.remote):
            seed += end.address.packed + end.port.to_bytes(2)
        sk_d, size = sk_keys(now).sk_d.reveal(), iv_length(now.encr)
        first, second = (
            DrawnIvs.of(prf_plus(now.prf, sk_d, seed + (final.mid_initiator + used).to_bytes(4), size))
            for used in (0, 1)
        )
        machine = MidProbe(
            now, final.mid_initiator, here.local, here.remote, ivs=(first, second), policy=self._policy
        )
        found = await run_mid_probe(machine, mark=self._mark)
        log.info("%s expects request %d next, as its answer shows", here.remote_id, found)
        return found


class MnInviter:
    """Tells the mobile node's agent to ask another gateway for its SA. Arguments as for `MnMover`."""

    def __init__(self, tries: int, timeout: float, mark: int = 0) -> None:
        self._policy = RetransmitPolicy(timeout, tries=tries)
        self._mark = mark

    async def __call__(self, here: IkeContext, message_id: int, gateway: str) -> int:
        """The message ID of our next request. The same octets for the same message ID, also after a crash.

        Errors: LinkError (silent).
        """
        now = here.current
        label = b"ikectx invitation " + _path(here) + gateway.encode()
        sk_d, size = sk_keys(now).sk_d.reveal(), iv_length(now.encr)
        first, second = (
            DrawnIvs.of(prf_plus(now.prf, sk_d, label + (message_id + used).to_bytes(4), size))
            for used in (0, 1)
        )
        machine = MidProbe(
            now,
            message_id,
            here.local,
            here.remote,
            ivs=(first, second),
            policy=self._policy,
            payloads=(Invitation(gateway).serialize(),),
        )
        return await run_mid_probe(machine, mark=self._mark)


def _warn_of_nat(report: UpdateReport | SpiReport) -> None:
    nat = report.nat
    if nat is not None:
        log.warning(
            "the MN's way to this gateway has other NATs than before: here %s, at the MN %s",
            "one" if nat.nat_here else "none",
            "one" if nat.nat_there else "none",
        )


@dataclass(slots=True)
class _Talk:
    """One change of SPIs under way. `now`: the SA as the mobile node has it. `report`: the cost so far."""

    now: IkeContext
    wish: Wish
    made: Made
    moved: bool = False
    report: MoveReport = MoveReport()  # noqa: RUF009  frozen

    def fresh(self, label: bytes, length: int) -> bytes:
        """Octets for one message: the same after a crash, and unpredictable for others, because they come
        from the seed.

        `label` must contain the request's content besides the message ID. The IVs made of them also depend on
        all else in the message (`keys.DrawnIvs`).
        """
        # in parts, because prf+ ends after 255 blocks
        out = b""
        while len(out) < length:
            text = label + self.now.mid_initiator.to_bytes(4) + len(out).to_bytes(4)
            out += prf_plus(Prf.HMAC_SHA2_256, self.wish.seed.reveal(), text, min(length - len(out), 4096))
        return out

    def cookie(self, label: bytes) -> bytes:
        """COOKIE2 of one message. It proves one path, so it depends on both ends of that path."""
        return self.fresh(label + _path(self.now) + b" cookie2", COOKIE2_LENGTH)

    def took(self, report: MoveReport) -> None:
        """Add the message IDs and figures of an exchange that has ended."""
        self.report += report

    async def tell(self, how: str, *, unfinished: bool = False) -> None:
        """Have the changes installed here. `unfinished`: see `Made`."""
        await self.made(self.now, moved=self.moved, how=how, report=self.report, unfinished=unfinished)


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
        self._addresses = addresses
        self._policy = RetransmitPolicy(timeout, tries=tries)
        self._mark = mark
        self._answering: set[asyncio.Task[None]] = set()

    async def __call__(self, here: IkeContext, wish: Wish, arrived: Callable[[], bool], made: Made) -> Told:
        """Errors: LinkError (silent), RefusedError, and what `made` raises."""
        del arrived  # traffic does not prove the move here: the SPI from the answer is needed
        talk = _Talk(here, wish, made)
        supports: bool | None = None
        if wish.update and (wish.children or wish.ike):
            supports, done = await self._update(talk)
            if done:
                return Told(talk.report, supports)
            if not wish.rekey:
                raise RefusedError("the MN does not change its SPIs", status=Status.PEER_REFUSED)
        await self._rekey(talk)
        return Told(talk.report, supports)

    # -- UPDATE_SPI

    async def _update(self, talk: _Talk) -> tuple[bool, bool]:
        """(the mobile node knows it, it has agreed)."""
        left = self._asks(talk)
        names_first = bool(talk.wish.ike)
        while left or (talk.wish.addresses and not talk.moved):
            asks, left = (left[-MOST:], left[:-MOST]) if names_first else (left[:MOST], left[MOST:])
            addresses = talk.wish.addresses and not talk.moved and not names_first
            label = b"ikectx update " + bytes([addresses]) + b"".join(_octets(one) for one in asks)
            now = talk.now
            notice = AddressNotice(talk.cookie(label), now.conditions, self._addresses)
            patience = AGENT_WAIT if talk.wish.agent else MIRROR_WAIT
            machine = SpiUpdate(
                _end(now, self._policy),
                asks,
                iv=DrawnIvs.of(talk.fresh(label + b" iv", 8 * iv_length(now.current.encr))),
                fresh=talk.fresh(label + b" fresh", FRESH_OCTETS),
                address=notice if addresses else None,
                meanwhile=PeerRequests(now.mid_responder, patience),
            )
            report = await run_spi_update(machine, mark=self._mark)
            names_first = False
            talk.took(report.move)
            _warn_of_nat(report)
            talk.moved = talk.moved or addresses
            after = replace(
                talk.now,
                mid_initiator=talk.now.mid_initiator + report.move.requests,
                mid_responder=talk.now.mid_responder + report.move.answered,
            )
            match report.outcome:
                case Renamed(pairs):
                    talk.now = renamed_context(after, pairs)
                    if report.move.answered:
                        talk.moved = True  # its agent has asked us back, at our address
                        self._go_on_answering(machine)
                    await talk.tell("update")
                case Unsupported():
                    talk.now = after
                    log.info("%s does not know UPDATE_SPI: its SAs are rekeyed", after.remote_id)
                    await talk.tell("rekey")
                    return False, False
                case RenameRefused(reasons, error):
                    talk.now = after
                    why = ", ".join(sorted({reason.name for reason in reasons})) or str(error)
                    log.info("%s refused new SPIs (%s): its SAs are rekeyed", after.remote_id, why)
                    await talk.tell("rekey")
                    return True, False
        return True, True

    @staticmethod
    def _asks(talk: _Talk) -> list[UpdateSpi]:
        """Both directions of each child, so that both pairs can exist at the mobile node; the IKE_SA last."""
        outbound = {child.spi_in: child.spi_out for child in talk.now.children}
        asks: list[UpdateSpi] = []
        for spi_in, new_in in talk.wish.children:
            asks += [ask(Protocol.ESP, spi_in, new_in), ask_peer(Protocol.ESP, outbound[spi_in])]
        if talk.wish.ike:
            current = talk.now.current
            own = current.spi_i if current.initiator else current.spi_r
            asks.append(ask(Protocol.IKE, own, talk.wish.ike))
        return asks

    def _go_on_answering(self, machine: SpiUpdate) -> None:
        async def go_on() -> None:
            try:
                await keep_answering(machine, KEEP_ANSWERING, mark=self._mark)
            except (LinkError, KernelError) as error:
                log.warning("repetitions of the MN's UPDATE_SPI are not answered: %s", error)

        task = asyncio.get_running_loop().create_task(go_on())
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    # -- rekeys

    async def _rekey(self, talk: _Talk) -> None:
        if talk.wish.ike:
            await self._rekey_ike(talk)
        for spi_in, new_in in talk.wish.children:
            await self._rekey_child(talk, spi_in, new_in)
        await self._tell_address(talk)

    async def _rekey_child(self, talk: _Talk, spi_in: bytes, new_in: bytes) -> None:
        start = talk.now
        child = next(child for child in start.children if child.spi_in == spi_in)
        machine = ChildRekey(
            _end(start, self._policy),
            len(start.generations) - 1,
            child,
            new_spi=new_in,
            fresh=talk.fresh(b"ikectx child rekey " + spi_in + new_in, REKEY_OCTETS),
        )
        between = 0

        async def made(new: ChildContext | IkeGeneration) -> None:
            nonlocal between
            assert isinstance(new, ChildContext)
            new = replace(new, lifetime=child.lifetime)
            children = tuple(new if one is child else one for one in start.children)
            used = machine.report.requests
            talk.now = replace(start, children=children, mid_initiator=start.mid_initiator + used)
            await talk.tell("rekey", unfinished=True)
            before = talk.report.requests
            try:
                await self._tell_address(talk, unfinished=True)
            finally:  # the Delete follows, of the old child or, if the rekey failed, of the new one
                between = talk.report.requests - before
                machine.skip(between)

        report = await run_rekey(machine, made=made, mark=self._mark)
        talk.took(report.move)
        used = report.move.requests + between
        talk.now = replace(talk.now, mid_initiator=start.mid_initiator + used)
        await talk.tell("rekey")

    async def _tell_address(self, talk: _Talk, *, unfinished: bool = False) -> None:
        if talk.moved or not talk.wish.addresses:
            return
        now = talk.now
        machine = AddressUpdate(
            _end(now, self._policy),
            AddressNotice(talk.cookie(b"ikectx address"), now.conditions, self._addresses),
            DrawnIvs.of(talk.fresh(b"ikectx address iv", iv_length(now.current.encr))),
        )
        try:
            report = await run_address_update(machine, mark=self._mark)
        except IkectxError:
            talk.took(machine.report)
            raise
        _warn_of_nat(report)
        talk.took(report.move)
        talk.moved = True
        talk.now = replace(now, mid_initiator=now.mid_initiator + report.move.requests)
        await talk.tell("rekey", unfinished=unfinished)

    async def _rekey_ike(self, talk: _Talk) -> None:
        start = talk.now
        machine = IkeRekey(
            _end(start, self._policy),
            new_spi=talk.wish.ike,
            fresh=talk.fresh(b"ikectx IKE rekey " + talk.wish.ike, REKEY_OCTETS),
        )

        async def made(new: ChildContext | IkeGeneration) -> None:
            assert isinstance(new, IkeGeneration)
            talk.now = replace(start, generations=(*start.generations, new), mid_initiator=0, mid_responder=0)
            await talk.tell("rekey")

        report = await run_rekey(machine, made=made, mark=self._mark)
        talk.took(report.move)
        await talk.tell("rekey")


def _end(here: IkeContext, policy: RetransmitPolicy) -> SaEnd:
    return SaEnd(here.current, here.mid_initiator, here.local, here.remote, policy)


def _path(here: IkeContext) -> bytes:
    """Both ends and the NATs between them."""
    ends = b"".join(end.address.packed + end.port.to_bytes(2) for end in (here.local, here.remote))
    return ends + here.conditions.to_bytes(4)


def _octets(one: UpdateSpi) -> bytes:
    return bytes([one.protocol, one.choose, len(one.new)]) + one.old + one.new
