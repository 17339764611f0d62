"""Old gateway: answers to the CT-Reqs of other gateways, and who may have which SA.

A CT-Req is granted for one of three reasons: its sender has the right `pull`; it has the mobile node's token;
or it has a packet of the mobile node, and its sender has the right `packet`. In the last two cases the mobile
node has chosen: it is at the sender already, so its whole SA goes there in one CTD.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from . import proof, tokens
from .asking import named_sa, refuse_request
from .context import Address, IkeContext
from .cxtp import Ctc, CtReq
from .errors import (
    BusyError,
    IkectxError,
    LinkError,
    ProofError,
    RefusedError,
    UnknownSaError,
    WireError,
)
from .links import Link, Links
from .moves import Allowed, Moves
from .name import SaName
from .numbers import Fpt, Status
from .outgoing import Outgoing, check_expected
from .rates import Bucket
from .report import TransferReport
from .run import Parts, Tasks, log, step
from .tokens import Purpose, TokenBlock, TokenError
from .transfer import SourceInput, SourceState

MEMORY = 1024
"""CT-Reqs of one peer that are remembered, because a repeated one must not begin a second transfer."""
UNDER_WAY = 128
"""CT-Reqs of one peer that are handled at a time."""
RATE = 100.0
"""CT-Reqs of one peer in a second, for each of the three reasons; twice as many at once. A gateway passes on
some 20 CTARs a second (CT_REQUEST_RATE) and 10 packets."""


@dataclass(frozen=True, slots=True)
class MobileConfig:
    """How this gateway treats the CTARs of mobile nodes.

    `rfc_token`: the RFC's 32-bit token is accepted, too. `skew`: seconds that a mobile node's clock may be
    wrong. `memory`: CTARs that are remembered.
    """

    rfc_token: bool = False
    skew: float = 30.0
    memory: int = 1024


class UsedTokens:
    """Used tokens, kept in the store until they expire, because each is valid for one transfer only.

    A token counts as used only if its transfer succeeded.
    """

    KIND = "token"

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._wall = parts.wall
        self._pruned = 0.0

    def check(self, sa: SaName, sequence: int, purpose: int, transfer_id: bytes = b"") -> None:
        """Errors: TokenError if the token was used for another transfer; StoreError."""
        used = self._store.get(self.KIND, _token_name(sa, sequence, purpose))
        if used is None or used[8:] == transfer_id:
            return
        began = self._store.find("source", used[8:])
        if began is not None and began.result not in ("kept", "refused"):
            raise TokenError("the token was used before")

    def use(self, sa: SaName, sequence: int, purpose: int, until: float, transfer_id: bytes) -> None:
        """Note the token as used for that transfer. Errors: TokenError if another has used it; StoreError."""
        now = self._wall()
        if now - self._pruned > 60:
            self._pruned = now
            for key, value in self._store.items(self.KIND):
                if int.from_bytes(value[:8]) < now:
                    self._store.delete(self.KIND, key)
        self.check(sa, sequence, purpose, transfer_id)
        value = max(0, round(until)).to_bytes(8) + transfer_id
        self._store.put(self.KIND, _token_name(sa, sequence, purpose), value)


def _token_name(sa: SaName, sequence: int, purpose: int) -> str:
    return f"{sa.spi_i.hex()}_{sa.spi_r.hex()}_{sequence:08x}_{int(purpose)}"


class _Served:
    """One CT-Req: it is being handled, or has ended."""

    def __init__(self, mn: Address) -> None:
        self.mn = mn
        self.task: asyncio.Task[None] | None = None
        self.open = True
        self.moved = False
        self.final: Status | None = None
        """The refusal that every copy of the request gets; None: a copy may try again."""


_SAID_OF_ANYTHING = (Status.BUSY, Status.UNKNOWN_SA, Status.NOT_ALLOWED)
"""Refusals that are not remembered for copies, because anybody can cause them."""


class _Asker:
    """The requests of one peer. Each peer has limits of its own, so that one does not affect the others."""

    def __init__(self) -> None:
        self.served: OrderedDict[bytes, _Served] = OrderedDict()
        self._buckets: dict[str, Bucket] = {}

    def passes(self, reason: str, now: float) -> bool:
        """True if it may ask once more for that reason. `now`: seconds, monotonic."""
        bucket = self._buckets.setdefault(reason, Bucket(RATE, now))
        bucket.fill(now)
        if bucket.level < 1:
            return False
        bucket.level -= 1
        return True

    @property
    def full(self) -> bool:
        """True if no further request of it may be handled at present."""
        return sum(served.open for served in self.served.values()) >= UNDER_WAY

    def ended(self, key: bytes) -> None:
        """Keep only the parts of that request that prevent a copy from beginning anew."""
        served = self.served.get(key)
        if served is not None and not (served.open or served.moved or served.final):
            del self.served[key]

    def forget(self) -> None:
        """Forget the oldest requests beyond `MEMORY` that have ended."""
        for key in list(self.served):
            if len(self.served) <= MEMORY:
                return
            if not self.served[key].open:
                del self.served[key]


def _reason(message: CtReq) -> str:
    """The reason to grant it: the mobile node's "token", its "packet", or the sender's right to "pull"."""
    if message.token or any(block.fpt == Fpt.MN_TOKEN for block in message.blocks):
        return "token"
    return "packet" if any(block.fpt == Fpt.PROOF for block in message.blocks) else "pull"


class Serving:
    """Answers CT-Reqs. A request is granted once; its copies get the same answer."""

    def __init__(
        self,
        parts: Parts,
        links: Callable[[], Links],
        moves: Moves,
        tasks: Tasks,
        used: UsedTokens,
        mobile: MobileConfig | None,
    ) -> None:
        self._parts = parts
        self._links = links
        self._moves = moves
        self._tasks = tasks
        self._used = used
        self._mobile = mobile
        self._askers: defaultdict[str, _Asker] = defaultdict(_Asker)

    async def request(self, link: Link, message: CtReq) -> None:
        """Handle a CT-Req. A repeated request joins the transfer that it started before.

        A peer that asks too often, or without the right to, is refused before anything is looked up. Its next
        message is read after it was told so.
        """
        reason, asker = _reason(message), self._askers[link.peer.name]
        if not asker.passes(reason, self._parts.clock.now()):
            busy = BusyError(f"it asks by {reason} more than {RATE:g} times a second")
            await self._turn_away(link, message, busy)
            return
        if reason != "token" and reason not in link.peer.rights:
            why = RefusedError(f"it has no right `{reason}` here", status=Status.NOT_ALLOWED)
            await self._turn_away(link, message, why)
            return
        # by its octets, because a wrong token says nothing about the right one of the same sequence number
        key = sha256(message.serialize()).digest()
        served = asker.served.get(key)
        if served is not None and (served.open or served.moved):
            log.info("%s asks again for the SA of %s", link.label, message.mn)
            return
        if served is not None and served.final is not None:
            await self._refuse(link, message, served.final)
            return
        if asker.full:
            await self._turn_away(link, message, BusyError(f"{UNDER_WAY} requests of it are under way"))
            return
        if served is None:
            served = asker.served[key] = _Served(message.mn)
            asker.forget()
        served.open = True
        work = self._serve(served, link, message)
        served.task = self._tasks.spawn(work, f"ikectx request of {link.peer.name}")
        served.task.add_done_callback(lambda _: asker.ended(key))

    def cancelled(self, link: Link, message: Ctc) -> None:
        """Handle the peer's CTC: the SA that it pulled is not tried again."""
        for served in self._askers[link.peer.name].served.values():
            if served.open and served.mn == message.mn and served.task:
                served.task.cancel()

    async def _turn_away(self, link: Link, message: CtReq, error: IkectxError) -> None:
        log.warning("%s is turned away, it asked for the SA of %s: %s", link.label, message.mn, error)
        await self._refuse(link, message, error.status)

    async def _serve(self, served: _Served, link: Link, message: CtReq) -> None:
        status: Status | None = Status.FAILED
        try:
            status = await self._grant(link, message)
            served.moved = status is Status.OK
        except (BusyError, LinkError) as error:
            status = error.status
            log.info("%s asked for the SA of %s: %s", link.label, message.mn, error)
        except (UnknownSaError, RefusedError, WireError) as error:
            status = error.status
            served.final = None if status in _SAID_OF_ANYTHING else status
            log.warning("%s asked for the SA of %s: %s", link.label, message.mn, error)
        except IkectxError as error:
            status = error.status
            log.error("%s asked for the SA of %s: %s", link.label, message.mn, error)
        finally:
            served.open = False
        if status is not None and status is not Status.OK:
            await self._refuse(link, message, status)

    async def _refuse(self, link: Link, message: CtReq, status: Status) -> None:
        try:
            await link.send(refuse_request(message, status))
        except LinkError as error:
            log.info("%s was not told: %s", link.peer.name, error)

    async def _grant(self, link: Link, message: CtReq) -> Status | None:
        """The result: OK, or the status that the peer has to be told; None if it knows it already."""
        by = {"token": self._by_token, "packet": self._by_packet, "pull": self._pull}
        with self._links().in_use(link.peer):
            return await by[_reason(message)](link, message)

    # -- by the operator of the other gateway ------------------------------------------------------------

    async def _pull(self, link: Link, message: CtReq) -> Status | None:
        sa, check = named_sa(message.blocks)
        if sa is None:
            found = await step("find", self._parts.source.find(message.mn), self._parts.timing)
            if not found:
                raise UnknownSaError(f"no IKE_SA with {message.mn}")
            if len(found) > 1:
                raise UnknownSaError(
                    f"{len(found)} IKE_SAs with {message.mn}, and none was named", status=Status.AMBIGUOUS
                )
            sa = found[0]
        report = await self._moves.transfer(link.peer, sa, "update", check, None)
        if check:
            # the peer knows its own verdicts, if the transfer came as far as its check
            return None if report.status is Status.OK or report.result == "refused" else report.status
        return _ended(report, report.result == "refused")

    # -- by the MN ---------------------------------------------------------------------------------------

    async def _by_token(self, link: Link, message: CtReq) -> Status | None:
        mobile = self._mobile
        if mobile is None:
            raise RefusedError("no MN may ask for anything here", status=Status.NOT_ALLOWED)
        said, sa = await self._token(link, message, mobile)

        def verified(context: IkeContext) -> TokenBlock | None:
            return tokens.verify(
                tokens.token_key(context.current, message.sequence),
                message,
                purpose=Purpose.ARRIVE,
                psg=self._parts.name,
                nsg=link.peer.name,
                now=self._parts.wall(),
                skew=mobile.skew,
                rfc=mobile.rfc_token,
            )

        def proven(context: IkeContext) -> None:
            verified(context)
            self._used.check(sa, message.sequence, Purpose.ARRIVE)

        def allowed(context: IkeContext, run: Outgoing) -> None:
            token = verified(context)
            run.expects = None if token is None else token.expects
            run.away = run.expects is not None
            if run.expects is not None:
                check_expected(context, run.expects)
            until = self._parts.wall() + tokens.MAX_LIFETIME if token is None else token.expiry
            self._used.use(sa, message.sequence, Purpose.ARRIVE, until + mobile.skew, run.transfer_id)

        verified(self._parts.source.recorded(sa))
        run = self._moves.moving(sa)
        announced = (SourceState.ANNOUNCED, SourceState.AWAITING)
        if run is not None and run.peer.name == link.peer.name and run.machine.state in announced:
            if run.context is None:
                raise BusyError("it is being announced")
            allowed(run.context, run)
            if run.held and run.link is link and run.sequence == message.sequence:
                run.asked(len(message.serialize()))
                run.signals.put_nowait(SourceInput.REQUESTED)
                await run.over.wait()
                return _ended(run.report(), run.told)
            # whether the peer has the announced context is not certain, so everything is sent anew
            run.signals.put_nowait(SourceInput.CANCEL)
            await run.over.wait()
        run = self._outgoing(link, sa, message, away=said is not None and said.expects is not None)
        return await self._whole(run, proven, lambda context: allowed(context, run))

    async def _token(
        self, link: Link, message: CtReq, mobile: MobileConfig
    ) -> tuple[TokenBlock | None, SaName]:
        """The token that a CT-Req carries, and the SA that it is for. Errors: TokenError."""
        try:
            token = tokens.find(message.blocks)
        except WireError as error:
            raise TokenError(str(error)) from None
        if token is not None:
            tokens.check_claims(
                token,
                purpose=Purpose.ARRIVE,
                psg=self._parts.name,
                nsg=link.peer.name,
                now=self._parts.wall(),
                skew=mobile.skew,
            )
            return token, token.spis
        if not mobile.rfc_token:
            raise TokenError("it has no token of 128 bits")
        found = await step("find", self._parts.source.find(message.mn), self._parts.timing)
        if len(found) != 1:
            raise TokenError(f"{message.mn} has {len(found)} IKE_SAs, and the RFC's token names none")
        return None, found[0]

    # -- by a packet -------------------------------------------------------------------------------------

    async def _by_packet(self, link: Link, message: CtReq) -> Status | None:
        datagrams = proof.decode(message.blocks)
        # if two message IDs are possible, the new gateway can ask the mobile node which is the next
        run = self._outgoing(link, proof.spis_of(datagrams[0]), message, away=True)

        def proven(context: IkeContext) -> None:
            try:
                proof.verify(context, datagrams)
            except ProofError as error:
                # the packet is the mobile node's, but beyond the recorded state of the SA: the export decides
                if error.status is not Status.BUSY:
                    raise

        def allowed(context: IkeContext) -> None:
            run.mid = proof.verify(context, datagrams)

        return await self._whole(run, proven, allowed)

    async def _whole(self, run: Outgoing, proven: Allowed, allowed: Allowed) -> Status | None:
        await self._moves.grant(run, proven, allowed)
        await run.over.wait()
        return _ended(run.report(), run.told)

    def _outgoing(self, link: Link, sa: SaName, message: CtReq, *, away: bool) -> Outgoing:
        run = Outgoing(
            self._parts,
            self._links(),
            link.peer,
            sa=sa,
            transfer_id=secrets.token_bytes(8),
            address="mn",
            begins=SourceInput.REQUESTED,
            link=link,
            away=away,
        )
        run.asked(len(message.serialize()))
        return run


def _ended(report: TransferReport, told: bool) -> Status | None:
    """The status that the peer has to be told; None if it knows it already; OK if the SA has left."""
    if report.result in ("moved", "in-doubt"):
        return Status.OK
    return None if told else report.status
