"""What other gateways ask of this one: CT-Reqs, and who may have what (old gateway).

A CT-Req is granted for one of three reasons: its sender has the right `pull`; it has the mobile node's token;
or it has a packet of the mobile node, and its sender has the right `packet`. In the last two cases the mobile
node has chosen: it is at the sender already, so its whole SA goes there in one CTD.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence

from ikectx.errors import (
    BusyError,
    IkectxError,
    LinkError,
    ProofError,
    RefusedError,
    UnknownSaError,
    WireError,
)
from ikectx.mac import digest
from ikectx.numbers import Fpt, Status
from ikectx.rates import Bucket
from ikectx.sa.context import Address, IkeContext
from ikectx.sa.name import SaName
from ikectx.wire import packet_proof as proof
from ikectx.wire import tokens
from ikectx.wire.cxtp import Ctc, CtReq, size
from ikectx.wire.tokens import Purpose, TokenBlock, TokenError

from .effects import Delete, Find, FindTransfer, Get, Items, Put, Recorded
from .journal import JournalEntry
from .journaled import MobileConfig, Parts
from .lines import Line
from .occasion import Occasion, check_expected
from .old_gateway import Outgoing
from .procedures import Opened, Process, Steps, log
from .report import TransferReport
from .requests import named_sa, refuse_request
from .tables import SourceInput, SourceState
from .transfers import Allowed, Transfers

MEMORY = 1024
"""CT-Reqs of one peer that are remembered, because a repeated one must not begin a second transfer."""
UNDER_WAY = 128
"""CT-Reqs of one peer that are handled at a time."""
RATE = 100.0
"""CT-Reqs of one peer in a second, for each of the three reasons; twice as many at once. A gateway passes on
some 20 CTARs a second (CT_REQUEST_RATE) and 10 packets."""


class UsedTokens:
    """Used tokens, kept in the store until they expire, because each is valid for one transfer only.

    A token counts as used only if its transfer succeeded.
    """

    KIND = "token"
    """Kind of store entry, by SA, sequence and purpose of a token. It is not in the ledger, because it counts
    until the token expires, whatever becomes of the transfer."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._pruned = 0.0

    def check(self, sa: SaName, sequence: int, purpose: int, transfer_id: bytes = b"") -> Steps[None]:
        """Errors: TokenError if the token was used for another transfer; StoreError."""
        used: bytes | None = yield Get(self.KIND, _token_name(sa, sequence, purpose))
        if used is None or used[8:] == transfer_id:
            return
        began: JournalEntry | None = yield FindTransfer("source", used[8:])
        if began is not None and began.result not in ("kept", "refused"):
            raise TokenError("the token was used before")

    def noted(self, sa: SaName, sequence: int, purpose: int) -> Steps[bool]:
        """Whether a transfer has begun with that token, whatever became of it. Errors: StoreError."""
        used: bytes | None = yield Get(self.KIND, _token_name(sa, sequence, purpose))
        return used is not None

    def use(self, sa: SaName, sequence: int, purpose: int, until: float, transfer_id: bytes) -> Steps[None]:
        """Note the token as used for that transfer. Errors: TokenError if another has used it; StoreError."""
        now = self._parts.scheduler.unix
        if now - self._pruned > 60:
            self._pruned = now
            kept: Sequence[tuple[str, bytes]] = yield Items(self.KIND)
            for key, value in kept:
                if int.from_bytes(value[:8]) < now:
                    yield Delete(self.KIND, key)
        yield from self.check(sa, sequence, purpose, transfer_id)
        value = max(0, round(until)).to_bytes(8) + transfer_id
        yield Put(self.KIND, _token_name(sa, sequence, purpose), value)


def _token_name(sa: SaName, sequence: int, purpose: int) -> str:
    return f"{sa.spi_i.hex()}_{sa.spi_r.hex()}_{sequence:08x}_{int(purpose)}"


class _Served:
    """One CT-Req: it is being handled, or has ended."""

    def __init__(self, mn: Address, line: Line) -> None:
        self.mn = mn
        self.line = line
        """The one over which it was asked last."""
        self.process: Process | None = None
        self.open = True
        self.moved = False
        self.final: Status | None = None
        """The refusal that every copy of the request gets; None: a copy may try again."""


_RFC_TOKEN_USED = 90 * 86400.0
"""Seconds for which it is remembered that a token of RFC 4067 was used. It has no end of its own, but the
IKE_SA has, or its rekey, by which its tokens get another key."""
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


class Grants:
    """Answers CT-Reqs. A request is granted once; its copies get the same answer."""

    def __init__(self, parts: Parts, transfers: Transfers, used: UsedTokens) -> None:
        self._parts = parts
        self._transfers = transfers
        self._used = used
        self._askers: defaultdict[str, _Asker] = defaultdict(_Asker)

    def request(self, line: Line, message: CtReq) -> None:
        """Handle a CT-Req. A repeated request joins the transfer that it started before.

        A peer that asks too often, or without the right to, is refused before anything is looked up. Its next
        message is read after it was told so.
        """
        reason, asker = _reason(message), self._askers[line.peer.name]
        if not asker.passes(reason, self._parts.now):
            self._turn_away(
                line, message, BusyError(f"it asks by {reason} more than {RATE:g} times a second")
            )
            return
        if reason != "token" and reason not in line.peer.rights:
            why = RefusedError(f"it has no right `{reason}` here", status=Status.NOT_ALLOWED)
            self._turn_away(line, message, why)
            return
        # by its octets, because a wrong token says nothing about the right one of the same sequence number
        key = digest(message.serialize())
        served = asker.served.get(key)
        if served is not None and (served.open or served.moved):
            log.info("%s asks again for the SA of %s", line.label, message.mn)
            served.line = line
            return
        if served is not None and served.final is not None:
            self._refuse(line, message, served.final)
            return
        if asker.full:
            self._turn_away(line, message, BusyError(f"{UNDER_WAY} requests of it are under way"))
            return
        if served is None:
            served = asker.served[key] = _Served(message.mn, line)
            asker.forget()
        served.open, served.line = True, line
        work = self._serve(served, message)
        served.process = self._parts.scheduler.spawn(
            work, f"request of {line.peer.name}", ended=lambda *_: asker.ended(key)
        )

    def cancelled(self, line: Line, message: Ctc) -> None:
        """Handle the peer's CTC: the SA that it pulled is not tried again."""
        for served in self._askers[line.peer.name].served.values():
            if served.open and served.mn == message.mn and served.process:
                self._parts.scheduler.cancel(served.process)

    def _turn_away(self, line: Line, message: CtReq, error: IkectxError) -> None:
        log.warning("%s is turned away, it asked for the SA of %s: %s", line.label, message.mn, error)
        self._refuse(line, message, error.status)

    def _serve(self, served: _Served, message: CtReq) -> Steps[None]:
        status: Status | None = Status.FAILED
        peer = served.line.peer.name
        try:
            status = yield from self._grant_again(served, message)
            served.moved = status is Status.OK
        except (BusyError, LinkError) as error:
            status = error.status
            log.info("%s asked for the SA of %s: %s", peer, message.mn, error)
        except (UnknownSaError, RefusedError, WireError) as error:
            status = error.status
            served.final = None if status in _SAID_OF_ANYTHING else status
            log.warning("%s asked for the SA of %s: %s", served.line.label, message.mn, error)
        except IkectxError as error:
            status = error.status
            log.error("%s asked for the SA of %s: %s", peer, message.mn, error)
        finally:
            served.open = False
        if status is not None and status is not Status.OK:
            self._refuse(served.line, message, status)

    def _grant_again(self, served: _Served, message: CtReq) -> Steps[Status | None]:
        """As `_grant`; once more for each further connection over which the peer asks, because what went over
        a lost one was lost with it."""
        while True:
            line, lost = served.line, None
            try:
                status = yield from self._grant(line, message)
            except LinkError as error:
                status, lost = error.status, error
            if status is Status.OK or served.line is line or line.error is None:
                if lost is not None:
                    raise lost
                return status

    def _refuse(self, line: Line, message: CtReq, status: Status) -> None:
        try:
            line.send(refuse_request(message, status))
        except LinkError as error:
            log.info("%s was not told: %s", line.peer.name, error)

    def _grant(self, line: Line, message: CtReq) -> Steps[Status | None]:
        """The result: OK, or the status that the peer has to be told; None if it knows it already."""
        by = {"token": self._by_token, "packet": self._by_packet, "pull": self._pull}
        with self._parts.scheduler.using(line.peer.name):
            return (yield from by[_reason(message)](line, message))

    # -- by the operator of the other gateway ------------------------------------------------------------

    def _pull(self, line: Line, message: CtReq) -> Steps[Status | None]:
        sa, check = named_sa(message.blocks)
        if sa is None:
            found: Sequence[SaName] = yield Find(message.mn)
            if not found:
                raise UnknownSaError(f"no IKE_SA with {message.mn}")
            if len(found) > 1:
                raise UnknownSaError(
                    f"{len(found)} IKE_SAs with {message.mn}, and none was named", status=Status.AMBIGUOUS
                )
            sa = found[0]
        report = yield from self._transfers.transfer(
            line.peer, sa, "auto", dry_run=check, pulled=True, asked_by=f"gateway {line.peer.name} (pull)"
        )
        if check:
            # the peer knows its own verdicts, if the transfer came as far as its check
            return None if report.status is Status.OK or report.result == "refused" else report.status
        return _ended(report, report.result == "refused")

    # -- by the MN ---------------------------------------------------------------------------------------

    def _by_token(self, line: Line, message: CtReq) -> Steps[Status | None]:
        mobile = self._parts.config.policy.mobile
        if mobile is None:
            raise RefusedError("no MN may ask for anything here", status=Status.NOT_ALLOWED)
        said, sa = yield from self._token(line, message, mobile)

        def verified(context: IkeContext) -> TokenBlock | None:
            return tokens.verify(
                tokens.token_key(context.current, message.sequence),
                message,
                purpose=Purpose.ARRIVE,
                psg=self._parts.name,
                nsg=line.peer.name,
                now=self._parts.scheduler.unix,
                skew=mobile.skew,
                rfc=mobile.rfc_token,
            )

        def proven(context: IkeContext) -> Steps[None]:
            verified(context)
            yield from self._used.check(sa, message.sequence, Purpose.ARRIVE)

        def allowed(context: IkeContext, run: Outgoing) -> Steps[None]:
            token = verified(context)
            run.expects = None if token is None else token.expects
            run.away = run.expects is not None
            if run.expects is not None:
                check_expected(context, run.expects)
            until = self._parts.scheduler.unix + _RFC_TOKEN_USED if token is None else token.expiry
            yield from self._used.use(
                sa, message.sequence, Purpose.ARRIVE, until + mobile.skew, run.transfer_id
            )

        recorded: IkeContext = yield Recorded(sa)
        verified(recorded)
        run = self._transfers.moving(sa)
        announced = (SourceState.ANNOUNCED, SourceState.AWAITING)
        if run is not None and run.peer.name == line.peer.name and run.machine.state in announced:
            if run.context is None:
                raise BusyError("it is being announced")
            yield from allowed(run.context, run)
            if run.held and run.link is line and run.sequence == message.sequence:
                run.count(size(message))
                run.signals.post(SourceInput.REQUESTED)
                yield Opened(run.over)
                ended = run.report()
                # a CTC names an address, and so ends what was announced of all mobile nodes behind a NAT
                if not (run.told and ended.status is Status.UNKNOWN_TRANSFER):
                    return _ended(ended, run.told)
            else:
                # whether the peer has what was announced is not certain: all of it, anew
                run.signals.post(SourceInput.CANCEL)
                yield Opened(run.over)
        run = self._outgoing(line, sa, message, away=said is not None and said.expects is not None)
        return (yield from self._whole(run, proven, lambda context: allowed(context, run)))

    def _token(
        self, line: Line, message: CtReq, mobile: MobileConfig
    ) -> Steps[tuple[TokenBlock | None, SaName]]:
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
                nsg=line.peer.name,
                now=self._parts.scheduler.unix,
                skew=mobile.skew,
            )
            return token, token.spis
        if not mobile.rfc_token:
            raise TokenError("it has no token of 128 bits")
        found: Sequence[SaName] = yield Find(message.mn)
        if len(found) != 1:
            raise TokenError(f"{message.mn} has {len(found)} IKE_SAs, and the RFC's token names none")
        return None, found[0]

    # -- by a packet -------------------------------------------------------------------------------------

    def _by_packet(self, line: Line, message: CtReq) -> Steps[Status | None]:
        datagrams = proof.decode(message.blocks)
        # nSG can ask the MN which of two message IDs is the next
        run = self._outgoing(line, proof.spis_of(datagrams[0]), message, away=True)

        def proven(context: IkeContext) -> Steps[None]:
            try:
                proof.verify(context, datagrams)
            except ProofError as error:
                # the packet is the mobile node's, but beyond the recorded state of the SA: the export decides
                if error.status is not Status.BUSY:
                    raise
            yield from ()

        def allowed(context: IkeContext) -> Steps[None]:
            run.mid = proof.verify(context, datagrams)
            yield from ()

        return (yield from self._whole(run, proven, allowed))

    def _whole(self, run: Outgoing, proven: Allowed, allowed: Allowed) -> Steps[Status | None]:
        yield from self._transfers.grant(run, proven, allowed)
        yield Opened(run.over)
        return _ended(run.report(), run.told)

    def _outgoing(self, line: Line, sa: SaName, message: CtReq, *, away: bool) -> Outgoing:
        run = Outgoing(
            self._parts,
            line.peer,
            sa=sa,
            transfer_id=self._parts.fresh(8),
            occasion=Occasion(
                "mn",
                SourceInput.REQUESTED,
                line,
                away=away,
                asked_by=f"gateway {line.peer.name}, for the mobile node ({_reason(message)})",
            ),
        )
        run.count(size(message))
        return run


def _ended(report: TransferReport, told: bool) -> Status | None:
    """The status that the peer has to be told; None if it knows it already; OK if the SA has left."""
    if report.result in ("moved", "in-doubt"):
        return Status.OK
    return None if told else report.status
