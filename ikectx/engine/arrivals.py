"""Handovers that mobile nodes ask for: what happens to a CTAR at either gateway, until its CTAA is sent.

At the old gateway a CTAR announces a handover: its token is checked, and the context goes ahead to the new
gateway, which holds it. At the new gateway a CTAR reports the mobile node's arrival: its token is checked
with the key that came with the held context, else the old gateway is asked, which checks it. A CTAR without a
good token gets no answer, whatever is wrong with it. An identical CTAR from the same source is a
retransmission: it begins nothing, and gets the same CTAA as soon as there is one.

Anybody can send CTARs. So a CTAR is remembered only if it was proven to be the mobile node's, for as long as
its token lives; any other is forgotten with its answer. The CTARs that are being handled are limited for each
source and each other gateway.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from enum import StrEnum
from ipaddress import ip_address

from ikectx.errors import (
    BusyError,
    IkectxError,
    RefusedError,
    StateError,
    StoreError,
    UnknownSaError,
    WireError,
)
from ikectx.machine import Machine, Table
from ikectx.numbers import Fpt, Status
from ikectx.peer import PeerConfig
from ikectx.rates import one_source
from ikectx.sa.context import Address, Endpoint, IkeContext, Secret
from ikectx.sa.name import SaName
from ikectx.wire import tokens
from ikectx.wire.cxtp import Blocks, Ctaa, Ctar, CtReq, StatusBlock, TokenAlgorithm
from ikectx.wire.tokens import Purpose, TokenBlock, TokenError

from .effects import Epochs, Export, Find, FindEpochs, FindLatest, NewNames, Recorded
from .grants import UsedTokens
from .inbox import Inbox, Inboxes
from .journaled import MobileConfig, Parts
from .new_gateway import Incoming
from .occasion import Occasion
from .old_gateway import Outgoing
from .procedures import Opened, Steps, log
from .requests import Request, Requests, Sighting
from .tables import SourceInput, SourceState, TargetState
from .transfers import Transfers

NAT_ANY = 1
"""Bit of `IkeContext.conditions`: ESP goes in UDP (strongSwan's COND_NAT_ANY)."""
ESP_IN_UDP = 4500
IKE = 500


AT_ONCE = 4
"""CTARs of one source that are handled at a time, because each is a question to the other gateway, which may
be silent."""
OF_A_PEER = 128
"""CTARs that name one other gateway and are handled at a time, whatever their sources."""


class ArrivalState(StrEnum):
    """The state of a CTAR."""

    NEW = "new"
    ANNOUNCING = "announcing"
    INSTALLING = "installing"
    ASKING = "asking"
    ANSWERED = "answered"
    IGNORED = "ignored"


class ArrivalInput(StrEnum):
    """ANNOUNCE: a CTAR at the old gateway. HELD, UNKNOWN: at the new gateway, with and without a context that
    came ahead. AGAIN: a copy. OK, REFUSED: the result. BAD: the sender is not proven."""

    ANNOUNCE = "announce"
    HELD = "held"
    UNKNOWN = "unknown"
    AGAIN = "again"
    OK = "ok"
    REFUSED = "refused"
    BAD = "bad"


class ArrivalAction(StrEnum):
    """OFFER: send the context ahead. INSTALL: the held context. ASK: the old gateway. ANSWER: send the
    CTAA."""

    OFFER = "offer"
    INSTALL = "install"
    ASK = "ask"
    ANSWER = "answer"


_S, _I, _A = ArrivalState, ArrivalInput, ArrivalAction

ARRIVAL_TABLE: Table[ArrivalState, ArrivalInput, ArrivalAction] = {
    (_S.NEW, _I.ANNOUNCE): (_S.ANNOUNCING, _A.OFFER),
    (_S.NEW, _I.HELD): (_S.INSTALLING, _A.INSTALL),
    (_S.NEW, _I.UNKNOWN): (_S.ASKING, _A.ASK),
    (_S.NEW, _I.BAD): (_S.IGNORED,),
    (_S.ANNOUNCING, _I.OK): (_S.ANSWERED, _A.ANSWER),
    (_S.ANNOUNCING, _I.REFUSED): (_S.ANSWERED, _A.ANSWER),
    (_S.ANNOUNCING, _I.BAD): (_S.IGNORED,),
    (_S.INSTALLING, _I.OK): (_S.ANSWERED, _A.ANSWER),
    (_S.INSTALLING, _I.REFUSED): (_S.ANSWERED, _A.ANSWER),
    (_S.INSTALLING, _I.BAD): (_S.IGNORED,),
    (_S.ASKING, _I.OK): (_S.ANSWERED, _A.ANSWER),
    (_S.ASKING, _I.REFUSED): (_S.ANSWERED, _A.ANSWER),
    (_S.ASKING, _I.BAD): (_S.IGNORED,),
    # the CTAA may have been lost
    (_S.ANSWERED, _I.AGAIN): (_S.ANSWERED, _A.ANSWER),
}
ARRIVAL_IGNORED = frozenset(
    (state, _I.AGAIN) for state in (_S.NEW, _S.ANNOUNCING, _S.INSTALLING, _S.ASKING, _S.IGNORED)
)
"""States in which copies are ignored, because the work that is under way repeats its messages by itself."""


def encapsulated(context: IkeContext) -> bool:
    """True if ESP of this SA is encapsulated in UDP."""
    return bool(context.conditions & NAT_ANY)


def endpoint(context: IkeContext, care_of: Address | None, source: Address) -> Endpoint:
    """The mobile node's present IKE endpoint, from the address that it names and the source of its CTAR.

    The two differ behind a NAT. Then ESP must be in UDP already, and its first packet will reveal the port.
    Errors: RefusedError.
    """
    address = care_of or source
    if address != source:
        if not encapsulated(context):
            raise RefusedError(
                f"the MN reports {care_of} and its request came from {source}: behind a NAT it needs ESP "
                "in UDP, which its SA does not have",
                status=Status.NO_ADDRESS,
            )
        address = source
    udp = encapsulated(context) or context.remote.port == ESP_IN_UDP
    return Endpoint(address, ESP_IN_UDP if udp else IKE)


class Arrival:
    """One CTAR, its copies, and its answer."""

    def __init__(
        self,
        message: Ctar,
        token: TokenBlock | None,
        source: Endpoint,
        peer: PeerConfig,
        came: float,
        until: float,
    ) -> None:
        self.peer = peer
        """The other gateway that it names."""
        self.came = came
        """When the CTAR came, seconds since 1970."""
        self.proven = False
        """True if the CTAR is proven to be the mobile node's."""
        self.message = message
        self.octets = message.serialize()
        self.token = token
        self.source = source
        self.until = until
        """When the CTAR may be forgotten, seconds since 1970."""
        self.machine = Machine(ARRIVAL_TABLE, ArrivalState.NEW, ignored=ARRIVAL_IGNORED)
        self.answer: bytes | None = None
        self.refused: bytes = b""
        """The transfer to here that a refusal with a tag was about."""

    def feed(self, what: ArrivalInput) -> bytes | None:
        """Take an input; returns the CTAA if it is to be sent now."""
        actions = self.machine.feed(what)
        return self.answer if ArrivalAction.ANSWER in actions and self.message.acknowledge else None

    @property
    def ended(self) -> bool:
        return self.machine.state in (ArrivalState.ANSWERED, ArrivalState.IGNORED)


class Arrivals:
    """The CTARs of one gateway."""

    def __init__(
        self,
        parts: Parts,
        transfers: Transfers,
        inboxes: Inboxes,
        requests: Requests,
        used: UsedTokens,
        config: MobileConfig,
    ) -> None:
        self._parts = parts
        self._peers = {peer.name: peer for peer in parts.config.peers}
        self._transfers = transfers
        self._inboxes = inboxes
        self._requests = requests
        self._used = used
        self._config = config
        self._known: OrderedDict[bytes, Arrival] = OrderedDict()

    def ctar(self, message: Ctar, source: Endpoint) -> Steps[bytes | None]:
        """What becomes of a CTAR from that endpoint; the CTAA to send there, None for no answer."""
        now = self._parts.scheduler.unix
        self._forget(now)
        # The key is what the tag covers, and the tag. So a forgery that comes first does not stand in the way
        # of the mobile node's own CTAR, and a CTAR that was changed where the tag does not cover it is a
        # copy.
        key = CtReq(message.mn, message.sequence, message.token, message.blocks).serialize()
        known = self._known.get(key)
        if known is not None:
            if known.source != source:
                log.warning("a CTAR for %s is ignored: it came from elsewhere before", message.mn)
                return None
            if not (yield from self._came_otherwise(known)):
                return None if (yield from self._has_left(known)) else known.feed(ArrivalInput.AGAIN)
            if self._known.get(key) is not known:
                return None  # another copy has begun it anew
        try:
            arrival = self._known[key] = self._new(message, source, now)
        except (TokenError, WireError) as error:
            log.warning("a CTAR from %s is ignored: %s", source, error)
            return None
        try:
            answer = arrival.feed((yield from self._handle(arrival)))
        except TokenError as error:
            log.warning("a CTAR from %s for %s is ignored: %s", source, message.mn, error)
            answer = arrival.feed(ArrivalInput.BAD)
        except (BusyError, UnknownSaError) as error:
            # nothing was begun, so its retransmission may try again
            log.warning("a CTAR from %s for %s: %s", source, message.mn, error)
            answer = None
        except IkectxError as error:
            log.warning("a CTAR from %s for %s: %s", source, message.mn, error)
            answer = None
        finally:
            if not (arrival.proven and arrival.ended):
                del self._known[key]  # forget it, because anybody could fill the table with such requests
        self._make_room(arrival.peer)
        return answer

    def _new(self, message: Ctar, source: Endpoint, now: float) -> Arrival:
        """Check that the claims of a CTAR fit, and that there is room for it. Errors: TokenError,
        WireError."""
        token = tokens.find(message.blocks)
        if token is None and not self._config.rfc_token:
            raise TokenError("it has no token of 128 bits")
        until = now + tokens.MAX_LIFETIME
        if token is not None:
            until = token.expiry
            announces = token.purpose == Purpose.ANNOUNCE
            peer = self._peer(message, token.nsg if announces else token.psg)
            ours = self._parts.name
            psg, nsg = (ours, peer.name) if announces else (peer.name, ours)
            purpose = Purpose.ANNOUNCE if announces else Purpose.ARRIVE
            skew = self._config.skew
            tokens.check_claims(token, purpose=purpose, psg=psg, nsg=nsg, now=now, skew=skew)
        else:
            peer = self._peer(message, None)
        under_way = [one for one in self._known.values() if not (one.ended or one.proven)]
        here = one_source(source.address)
        if sum(one_source(one.source.address) == here for one in under_way) >= AT_ONCE:
            raise TokenError(f"{AT_ONCE} others of that source are under way")
        if sum(one.peer is peer for one in under_way) >= OF_A_PEER:
            raise TokenError(f"{OF_A_PEER} others that name {peer.name} are under way")
        return Arrival(message, token, source, peer, now, until + self._config.skew)

    def _forget(self, now: float) -> None:
        for key, arrival in list(self._known.items()):
            if arrival.ended and arrival.until < now:
                del self._known[key]

    def _make_room(self, peer: PeerConfig) -> None:
        """Forget the oldest CTARs of this peer beyond its share of what is remembered.

        Copies of them are still recognised: either the SA is here, or the token was used.
        """
        share = max(1, self._config.memory // len(self._peers))
        remembered = [key for key, one in self._known.items() if one.peer is peer and one.ended]
        for key in remembered[: max(0, len(remembered) - share)]:
            del self._known[key]

    def _handle(self, arrival: Arrival) -> Steps[ArrivalInput]:
        token = arrival.token
        if token is not None:
            announces = token.purpose == Purpose.ANNOUNCE
        else:
            announces = bool((yield Find(arrival.message.mn)))
        if announces:
            return (yield from self._announce(arrival))
        return (yield from self._arrive(arrival))

    def _peer(self, message: Ctar, name: str | None) -> PeerConfig:
        """The other gateway that the CTAR names. Errors: TokenError."""
        if name is None:
            router = message.router
            found = [peer for peer in self._peers.values() if router in (*peer.addresses, _host(peer))]
            if len(found) == 1:
                return found[0]
            raise TokenError(f"{len(found)} peers have the address {router}")
        peer = self._peers.get(name)
        if peer is None:
            raise TokenError(f"no peer is called {name!r}")
        return peer

    def _verify(self, key: Secret, arrival: Arrival, purpose: Purpose) -> None:
        """Check that the CTAR is the mobile node's. Errors: TokenError."""
        names = (self._parts.name, arrival.peer.name)
        psg, nsg = names if purpose is Purpose.ANNOUNCE else names[::-1]
        tokens.verify(
            key,
            arrival.message,
            purpose=purpose,
            psg=psg,
            nsg=nsg,
            now=arrival.came,
            skew=self._config.skew,
            rfc=self._config.rfc_token,
        )
        arrival.proven = True

    # -- at pSG ------------------------------------------------------------------------------------------

    def _announce(self, arrival: Arrival) -> Steps[ArrivalInput]:
        message, token, peer = arrival.message, arrival.token, arrival.peer
        sa = (yield from self._served(message.mn)) if token is None else token.spis
        key: list[Secret] = []
        algorithm = TokenAlgorithm.HMAC_SHA1 if token is None else TokenAlgorithm.HMAC_SHA256_128
        run = Outgoing(
            self._parts,
            peer,
            sa=sa,
            transfer_id=self._parts.fresh(8),
            occasion=Occasion(
                "mn", SourceInput.ANNOUNCE, sequence=message.sequence, asked_by="the mobile node (CTAR)"
            ),
        )

        def proven(context: IkeContext) -> Steps[None]:
            key[:] = [tokens.token_key(context.current, message.sequence)]
            self._verify(key[0], arrival, Purpose.ANNOUNCE)
            yield from self._used.check(sa, message.sequence, Purpose.ANNOUNCE)
            if (yield from self._used.noted(sa, message.sequence, Purpose.ARRIVE)):
                # a late copy: the new gateway would take what it held then, behind its refusal of the arrival
                raise TokenError("its mobile node has arrived elsewhere since it announced that")

        def allowed(context: IkeContext) -> Steps[None]:
            yield from proven(context)
            yield from self._used.use(sa, message.sequence, Purpose.ANNOUNCE, arrival.until, run.transfer_id)
            run.token = (algorithm, key[0])
            run.leaving = token is not None and any(block.fpt == Fpt.LEAVING for block in message.blocks)

        yield from self._transfers.grant(run, proven, allowed)
        arrival.feed(ArrivalInput.ANNOUNCE)
        yield Opened(run.awaited)
        status = Status.OK
        if run.machine.state in (SourceState.NEW, SourceState.REFUSED, SourceState.KEPT):
            status = run.status or Status.FAILED
        return (yield from self._answer(arrival, key[0], status))

    def _served(self, mn: Address) -> Steps[SaName]:
        found: Sequence[SaName] = yield Find(mn)
        if len(found) != 1:
            raise TokenError(f"{mn} has {len(found)} IKE_SAs, and the RFC's token names none")
        return found[0]

    # -- at nSG ------------------------------------------------------------------------------------------

    def _arrive(self, arrival: Arrival) -> Steps[ArrivalInput]:
        message, token, peer = arrival.message, arrival.token, arrival.peer
        sa = None if token is None else token.spis
        care_of = token.care_of.address if token is not None and token.care_of is not None else None

        def place(context: IkeContext) -> Endpoint:
            return endpoint(context, care_of, arrival.source.address)

        def proves(context: IkeContext) -> None:
            self._verify(tokens.token_key(context.current, message.sequence), arrival, Purpose.ARRIVE)

        request = CtReq(message.mn, message.sequence, message.token, message.blocks)
        answers = token is not None
        ask = Request(
            self._parts, peer, request, sa=sa, right="push", seen=Sighting(place, proves, answers=answers)
        )
        ahead = self._inboxes.held(peer.name, message.mn, sa)
        if ahead is not None and self._opens(ahead[1], arrival):
            return (yield from self._install(arrival, ask, *ahead))
        context = None if sa is None else (yield from self._taken(arrival, sa))
        if context is not None and context.remote.address == place(context).address:
            key = tokens.token_key(context.current, message.sequence)
            arrival.feed(ArrivalInput.UNKNOWN)
            return (yield from self._answer(arrival, key, Status.OK, context, context.mid_responder))
        arrival.feed(ArrivalInput.UNKNOWN)
        yield from self._requests.run(ask)
        return (yield from self._arrived(arrival, ask))

    def _taken(self, arrival: Arrival, sa: SaName) -> Steps[IkeContext | None]:
        """The SA, if it is here already and the token is right: the agent was restarted before it could
        answer."""
        epochs: Epochs = yield FindEpochs(sa)
        if epochs.owned < 0:
            return None
        try:
            known: IkeContext = yield Recorded(sa)
            key = tokens.token_key(known.current, arrival.message.sequence)
            self._verify(key, arrival, Purpose.ARRIVE)
            # it is only looked at, and need not be idle
            exported: IkeContext = yield Export(sa, away=True)
        except (BusyError, UnknownSaError):
            return None
        return exported

    def _came_otherwise(self, arrival: Arrival) -> Steps[bool]:
        """True if another transfer has brought the SA of a CTAR that is refused with a tag, or is about to.

        The mobile node would take such a refusal for the old gateway's word that it goes on serving.
        """
        if not arrival.refused:
            return False
        latest = yield from self._latest(arrival)
        return latest is not None and latest[0] == "target" and latest[1] != arrival.refused

    def _has_left(self, arrival: Arrival) -> Steps[bool]:
        """True if the SA of a mobile node that has arrived here leaves again, or has left.

        A grant is not true any more, and the mobile node finds the gateway that serves it by IKE.
        """
        if arrival.token is None or arrival.token.purpose != Purpose.ARRIVE:
            return False
        latest = yield from self._latest(arrival)
        return latest is not None and latest[0] == "source"

    def _latest(self, arrival: Arrival) -> Steps[tuple[str, bytes] | None]:
        """Role and ID of the newest transfer of the SA that the token names; None: there is none, or nobody
        knows."""
        if arrival.token is None:
            return None
        try:
            latest: tuple[str, bytes] | None = yield FindLatest(arrival.token.spis)
        except StoreError as error:
            log.error("where the SA of %s is now is not known: %s", arrival.message.mn, error)
            return None
        return latest

    def _opens(self, run: Incoming, arrival: Arrival) -> bool:
        """True if the key that came ahead confirms the token. Else the old gateway is asked, because the
        mobile node may have started anew."""
        if run.token is None or run.context is None:
            return False
        try:
            self._verify(run.token[1], arrival, Purpose.ARRIVE)
        except TokenError as error:
            ident = run.stored.transfer_id.hex()
            log.warning("transfer %s: a CTAR for another one: %s", ident, error)
            return False
        return True

    def _install(self, arrival: Arrival, ask: Request, inbox: Inbox, run: Incoming) -> Steps[ArrivalInput]:
        _, key = run.token or (TokenAlgorithm.NONE, Secret())
        arrival.feed(ArrivalInput.HELD)
        try:
            if run.context is None:
                raise StateError("nothing is held")
            where = ask.place(run.context)
        except RefusedError as error:
            log.warning("transfer %s: %s", run.stored.transfer_id.hex(), error)
            return (yield from self._answer(arrival, key, error.status))
        run.token = None
        yield from self._requests.run(ask, (inbox, run, where))
        return (yield from self._arrived(arrival, ask))

    def _arrived(self, arrival: Arrival, ask: Request) -> Steps[ArrivalInput]:
        error = ask.error
        status = Status.OK if ask.done else (Status.FAILED if error is None else error.status)
        if ask.run is None and status is Status.NOT_ALLOWED:
            raise TokenError(str(error))
        text = ask.report().text or status.name
        if arrival.proven:
            log.info("%s at %s: %s", arrival.message.mn, arrival.source, text)
        else:  # a warning, since those have the smaller part of the log
            log.warning("somebody at %s asked for the SA of %s: %s", arrival.source, arrival.message.mn, text)
        key = None
        # A tag makes an answer final, so a refusal has none as long as it may still become a grant.
        if not ask.done and ask.run is not None and ask.run.machine.state is TargetState.ABORTED:
            arrival.refused = ask.run.stored.transfer_id
            if (yield from self._came_otherwise(arrival)):
                raise BusyError(f"another transfer brings it: {text}")
        if ask.context is not None and (ask.done or arrival.refused):
            key = tokens.token_key(ask.context.current, arrival.message.sequence)
        expects = ask.run.next_request if ask.done and ask.run is not None else None
        context = ask.context if ask.done else None
        return (yield from self._answer(arrival, key, status, context, expects))

    def _answer(
        self,
        arrival: Arrival,
        key: Secret | None,
        status: Status,
        context: IkeContext | None = None,
        expects: int | None = None,
    ) -> Steps[ArrivalInput]:
        """Make the CTAA; with a tag where the MN's token has one and we know the key.

        `expects`: message ID of the mobile node's next request, if the SA is here.
        """
        message, token = arrival.message, arrival.token
        statuses = () if status is Status.OK else (StatusBlock(Fpt.IKEV2_SA, status),)
        answer = Ctaa(message.mn, statuses)
        if token is not None and key is not None:
            try:
                names: Blocks = () if context is None else (yield NewNames(context))
                answer = tokens.seal_ctaa(
                    key,
                    message.mn,
                    message.sequence,
                    statuses,
                    names,
                    purpose=token.purpose,
                    expects=expects,
                )
            except (IkectxError, ValueError) as error:
                log.error("the CTAA for %s has no tag: %s", message.mn, error)
        arrival.answer = answer.serialize()
        return ArrivalInput.OK if status is Status.OK else ArrivalInput.REFUSED


def _host(peer: PeerConfig) -> Address | None:
    try:
        return ip_address(peer.host)
    except ValueError:
        return None
