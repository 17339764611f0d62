"""UPDATE_SPI as a sans-IO machine: one INFORMATIONAL exchange changes SPIs, and the gateway's address with
them.

    nSG -> MN   HDR, SK { [N(UPDATE_SA_ADDRESSES), N(NAT_DETECTION_*), N(COOKIE2), further addresses,]
                          N(UPDATE_SPI)+ [, N(UPDATE_SPI_SUPPORTED)] }
    MN -> nSG   HDR, SK { one N(UPDATE_SPI) or N(UPDATE_SPI_REFUSED) each [, N(NAT_DETECTION_*), N(COOKIE2)] }

If the answer lacks the notify, the mobile node's charon did not understand it. There may be an agent beside
it, which saw the request in its copy and begins an exchange of its own with the same content the other way
round. This machine waits for that (`patience`) and answers it here under `expected_id` by a `SpiResponder`;
`Unsupported` if it does not come.

The address part is that of `address_update`; it is valid whatever the result for the SPIs. See `requester`
for retransmission and for what counts as an answer, and `naming` for requests that cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Never

from ikectx.engine.ports import MoveReport
from ikectx.errors import UsageError, WireError
from ikectx.machine import Table
from ikectx.numbers import Exchange, Notify, Protocol
from ikectx.sa.context import Endpoint
from ikectx.sa.keys import DrawnIvs
from ikectx.wire.ikev2 import IkeMessage

from .address_update import AddressNotice, AddressPart, Moved, Refused
from .naming import (
    MOST,
    Decision,
    Names,
    Renaming,
    answered,
    ask,
    ask_peer,
    mirrored,
    renamed_context,
    renamed_generation,
    renamed_ike,
    supported_by,
)
from .notify import Reason, UpdateSpi, UpdateSpiSupported
from .requester import Asking, Fresh, Requester, SaEnd, Silent, is_request
from .responder import Asked, PeerSupports, ResponderRole, SpiResponder

MIRROR_WAIT = 0.5
"""Seconds in which an agent that is not known yet may begin an exchange of its own."""
AGENT_WAIT = 8.0
"""Seconds in which one that is known of may: it may have no CPU, or begin anew. Meanwhile the gateway before
goes on sending, for at most 10 s."""
BUSY_PAUSE = 1.2
"""Seconds until the one retry after a refusal as busy; at least what the other side's rate limit requires."""
FRESH_OCTETS = 512
"""Fresh random octets that `SpiUpdate` needs."""
_DATAGRAMS = 8
"""Fragments that an answer or a retry may have, for which IVs are reserved."""


# --- events ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Renamed:
    """Both ends use the new SPIs. `pairs`: ours, and those that the peer chose."""

    pairs: tuple[Renaming, ...]


@dataclass(frozen=True, slots=True)
class RenameRefused:
    """The SPIs stay; the address update, if there was one, is valid. `error`: instead of reasons."""

    reasons: tuple[Reason, ...]
    error: Notify | None = None


@dataclass(frozen=True, slots=True)
class Unsupported:
    """The peer does not know UPDATE_SPI; the address update, if there was one, is valid."""


@dataclass(frozen=True, slots=True)
class PeerRenamed:
    """Meanwhile the peer asked for a change of its own and got it."""

    pairs: tuple[Renaming, ...]


SpiUpdateEvent = Moved | Refused | Silent | Renamed | RenameRefused | Unsupported | PeerRenamed | PeerSupports


# --- the machine -------------------------------------------------------------------------------------


class SpiUpdateState(Enum):
    """NEW: nothing was sent. WAITING: for the answer, AGAIN: to the retry. PAUSED: until the retry.

    AGREED: the peer asked for the same and got it, our own answer is still to come. MIRROR: for the peer's
    own request. The rest are final.
    """

    NEW = "new"
    WAITING = "waiting"
    AGREED = "agreed"
    PAUSED = "paused"
    AGAIN = "again"
    MIRROR = "mirror"
    RENAMED = "renamed"
    REFUSED = "refused"
    REJECTED = "address rejected"
    UNSUPPORTED = "unsupported"
    SILENT = "silent"


class SpiUpdateInput(Enum):
    """Inputs of the machine."""

    START = "the first sending"
    ACCEPT = "an answer that accepts"
    DENY = "an answer that refuses the names"
    BUSY = "an answer that refuses them for the moment"
    PLAIN = "an answer without the notify"
    PLAIN_YET = "an answer without the notify, after which the peer's own request may come"
    REJECT = "an answer with an error, or without our cookie"
    MIRRORED = "the peer's own request for the same, answered"
    PAUSE_OVER = "the time to try again"
    LATE = "no request of the peer's own in time"
    GIVE_UP = "the last retransmission timer"


_S, _I = SpiUpdateState, SpiUpdateInput

TABLE: Table[SpiUpdateState, SpiUpdateInput, Never] = {
    (_S.NEW, _I.START): (_S.WAITING,),
    (_S.WAITING, _I.ACCEPT): (_S.RENAMED,),
    (_S.WAITING, _I.DENY): (_S.REFUSED,),
    (_S.WAITING, _I.BUSY): (_S.PAUSED,),
    (_S.WAITING, _I.PLAIN): (_S.UNSUPPORTED,),
    (_S.WAITING, _I.PLAIN_YET): (_S.MIRROR,),
    (_S.WAITING, _I.REJECT): (_S.REJECTED,),
    (_S.WAITING, _I.MIRRORED): (_S.AGREED,),
    (_S.WAITING, _I.GIVE_UP): (_S.SILENT,),
    (_S.AGREED, _I.ACCEPT): (_S.RENAMED,),
    (_S.AGREED, _I.DENY): (_S.RENAMED,),
    (_S.AGREED, _I.BUSY): (_S.RENAMED,),
    (_S.AGREED, _I.PLAIN): (_S.RENAMED,),
    (_S.AGREED, _I.PLAIN_YET): (_S.RENAMED,),
    (_S.AGREED, _I.REJECT): (_S.REJECTED,),
    (_S.AGREED, _I.GIVE_UP): (_S.RENAMED,),
    (_S.PAUSED, _I.MIRRORED): (_S.RENAMED,),
    (_S.PAUSED, _I.PAUSE_OVER): (_S.AGAIN,),
    (_S.AGAIN, _I.ACCEPT): (_S.RENAMED,),
    (_S.AGAIN, _I.DENY): (_S.REFUSED,),
    (_S.AGAIN, _I.BUSY): (_S.REFUSED,),
    (_S.AGAIN, _I.PLAIN): (_S.UNSUPPORTED,),
    (_S.AGAIN, _I.PLAIN_YET): (_S.MIRROR,),
    (_S.AGAIN, _I.MIRRORED): (_S.AGREED,),
    (_S.AGAIN, _I.GIVE_UP): (_S.SILENT,),
    (_S.MIRROR, _I.MIRRORED): (_S.RENAMED,),
    (_S.MIRROR, _I.LATE): (_S.UNSUPPORTED,),
}

_OPEN = (
    SpiUpdateState.WAITING,
    SpiUpdateState.AGREED,
    SpiUpdateState.PAUSED,
    SpiUpdateState.AGAIN,
    SpiUpdateState.MIRROR,
)


class _Ours:
    """Decides whether a peer request that crosses ours is accepted: only if it names the same SPIs or none of
    ours. See `naming`."""

    def __init__(self, update: SpiUpdate, names: Names | None) -> None:
        self._update = update
        self._names = names

    def known(self, protocol: Protocol, spi: bytes, inbound: bool) -> bool:
        ours = self._update.wanted(protocol, spi, inbound) is not None
        return ours or self._names is None or self._names.known(protocol, spi, inbound)

    def usable(self, protocol: Protocol, old: bytes, new: bytes) -> bool:
        return self._names is None or self._names.usable(protocol, old, new)

    def reserve(self, protocol: Protocol, old: bytes) -> bytes | None:
        ours = self._update.wanted(protocol, old, True)
        if ours is not None:
            return ours.new
        return None if self._names is None else self._names.reserve(protocol, old)

    def objection(self, protocol: Protocol, spi: bytes, inbound: bool) -> Reason | None:
        if self._update.wanted(protocol, spi, inbound) is not None:
            open_ = (*_OPEN, SpiUpdateState.RENAMED)
            return None if self._update.state in open_ else Reason.BUSY
        both = protocol is Protocol.IKE and any(one.protocol is Protocol.IKE for one in self._update.asked)
        if self._names is None or (both and self._update.initiator):
            return Reason.BUSY
        return self._names.objection(protocol, spi, inbound)


@dataclass(frozen=True, slots=True)
class PeerRequests:
    """How requests of the peer are answered while ours is under way.

    expected_id: message ID of the peer's next request (`mid_responder`), which is waited for after an answer
    without the notify. patience: how long, in seconds; see `AGENT_WAIT`. names: decides about requests with
    other content; None: they are refused as busy.
    """

    expected_id: int
    patience: float = MIRROR_WAIT
    names: Names | None = None


class SpiUpdate(Requester[SpiUpdateState, SpiUpdateInput, SpiUpdateEvent]):
    """Asks the peer for new SPIs, and with `address` tells it that this gateway is at `end.local` now.

    renames: see `naming.ask`, `naming.ask_peer`; none: the address alone. iv: an IV for each datagram of the
    first request, `DrawnIvs` if the octets may be used again after a crash. fresh: `FRESH_OCTETS`, random.
    meanwhile: None: the peer's own requests are left to charon. announce: announce UPDATE_SPI, too.

    When it is done, duplicates of the peer's request are still answered.
    """

    def __init__(
        self,
        end: SaEnd,
        renames: Sequence[UpdateSpi],
        *,
        iv: bytes | DrawnIvs,
        fresh: bytes,
        address: AddressNotice | None = None,
        meanwhile: PeerRequests | None = None,
        announce: bool = False,
    ) -> None:
        if len(renames) > MOST:
            raise UsageError(f"{len(renames)} UPDATE_SPI in one request: at most {MOST}")
        if len(fresh) < FRESH_OCTETS:
            raise UsageError(f"{FRESH_OCTETS} fresh octets are needed, not {len(fresh)}")
        if any(one.choose and one.new for one in renames):
            raise UsageError("the peer chooses its own SPI")
        super().__init__(Asking(end), TABLE, SpiUpdateState.NEW)
        self.initiator = end.generation.initiator
        self.asked = tuple(renames)
        self._part = None if address is None else AddressPart(end, address)
        self._fresh = Fresh(fresh)
        self._again_iv = DrawnIvs.of(self._fresh.take(_DATAGRAMS * self._asking.iv_length))
        self._mirrored: tuple[Renaming, ...] = ()
        self._patience = 0.0 if meanwhile is None else meanwhile.patience
        self._responder: SpiResponder | None = None
        if meanwhile is not None:
            names = _Ours(self, meanwhile.names)
            self._responder = SpiResponder(
                end.generation,
                meanwhile.expected_id,
                end.local,
                names,
                limit=end.limit,
                role=ResponderRole.SPIS,
            )
        said = [] if self._part is None else self._part.payloads()
        said += [one.serialize() for one in self.asked]
        if announce:
            said.append(UpdateSpiSupported().serialize())
        self._request = self._asking.seal(Exchange.INFORMATIONAL, said, iv)

    # -- what is known of it

    @property
    def ignored(self) -> int:
        return super().ignored + (0 if self._responder is None else self._responder.ignored)

    @property
    def report(self) -> MoveReport:
        """The cost so far; `answered`: the peer's requests for the same."""
        mine = super().report
        if self._responder is None:
            return mine
        theirs = self._responder.report
        return replace(
            mine,
            messages=mine.messages + theirs.messages,
            octets=mine.octets + theirs.octets,
            answered=theirs.answered,
        )

    def wanted(self, protocol: Protocol, spi: bytes, inbound: bool) -> UpdateSpi | None:
        """Our request that changes this SPI; `inbound`: we receive on it."""
        found = ((one, (one.protocol, one.old, not one.choose)) for one in self.asked)
        return next((one for one, name in found if name == (protocol, spi, inbound)), None)

    # -- verbs

    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        out = super().to_send(now)
        return out if self._responder is None else out + self._responder.to_send(now)

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        if self._responder is not None and is_request(datagram, self.local, source):
            self._responder.receive(datagram, source, now)
            self._attend(self._responder, now)
            return
        super().receive(datagram, source, now)

    # -- our request

    def _begin(self) -> None:
        self._asking.ask(Exchange.INFORMATIONAL, self._request)
        self._enter(SpiUpdateInput.START)

    def _ask_again(self) -> None:
        self._part = None  # the peer has accepted the address already
        said = [one.serialize() for one in self.asked]
        self._asking.ask(
            Exchange.INFORMATIONAL, self._asking.seal(Exchange.INFORMATIONAL, said, self._again_iv)
        )
        self._enter(SpiUpdateInput.PAUSE_OVER)

    def _unanswered(self) -> None:
        if self.state is SpiUpdateState.AGREED:
            self._enter(SpiUpdateInput.GIVE_UP, *self._moved(), Renamed(self._mirrored))
        else:
            self._enter(SpiUpdateInput.GIVE_UP, Silent(self._asking.sent))

    def _answered(self, message: IkeMessage, now: float) -> None:
        what, events = self._judge(message)
        self._enter(what, *events)
        if self.state is SpiUpdateState.PAUSED:
            self._later(now + BUSY_PAUSE, self._ask_again)
        elif self.state is SpiUpdateState.MIRROR:
            self._later(now + self._patience, lambda: self._enter(SpiUpdateInput.LATE, Unsupported()))

    def _judge(self, message: IkeMessage) -> tuple[SpiUpdateInput, list[SpiUpdateEvent]]:
        """The input that an answer means, and the events."""
        events: list[SpiUpdateEvent] = []
        if supported_by(message):
            events.append(PeerSupports(supported_by(message)))
        if self._part is not None:
            refusal = self._part.refusal(message)
            if refusal is not None:
                return SpiUpdateInput.REJECT, [*events, refusal]
            events += self._moved()
        decision: Decision | None = None
        error = None if message.error is None else message.error.notify
        if error is None:
            try:
                decision = answered(self.asked, message)
            except WireError:
                error = Notify.INVALID_SYNTAX
        if self.state is SpiUpdateState.AGREED:
            return SpiUpdateInput.ACCEPT, [*events, Renamed(self._mirrored)]
        if error is not None:
            return SpiUpdateInput.DENY, [*events, RenameRefused((), error)]
        if not self.asked:
            return SpiUpdateInput.ACCEPT, [*events, Renamed(())]
        if decision is None:
            if self._responder is not None:
                return SpiUpdateInput.PLAIN_YET, events
            return SpiUpdateInput.PLAIN, [*events, Unsupported()]
        if not decision.reasons:
            return SpiUpdateInput.ACCEPT, [*events, Renamed(decision.pairs)]
        refused = RenameRefused(decision.reasons)
        if set(decision.reasons) != {Reason.BUSY} or self._gone():
            return SpiUpdateInput.DENY, [*events, refused]
        return SpiUpdateInput.BUSY, [*events, refused] if self.state is SpiUpdateState.AGAIN else events

    def _moved(self) -> list[SpiUpdateEvent]:
        return [] if self._part is None else [Moved()]

    def _gone(self) -> bool:
        """Whether the IKE_SA has other SPIs by now, so that nothing can be asked under these."""
        return self._responder is not None and self._responder.retired

    # -- the peer's own request

    def _attend(self, responder: SpiResponder, now: float) -> None:
        """Answer the peer at once, because everything that it may ask for is installed already."""
        while (event := responder.next_event()) is not None:
            if not isinstance(event, Asked):
                self._events.append(event)
                continue
            size = _DATAGRAMS * self._asking.iv_length
            if self._fresh.left < size:
                continue  # unanswered: an honest peer does not send so many requests
            ours = [one for one in event.pairs if self.wanted(one.protocol, one.old, one.inbound)]
            refusal = Reason.BUSY if ours and len(ours) != len(self.asked) else None
            responder.answer(DrawnIvs.of(self._fresh.take(size)), now, refusal)
            if refusal is not None or not event.pairs:
                continue
            if not ours:
                self._events.append(PeerRenamed(event.pairs))
            elif self.state in _OPEN:
                self._mirrored = self._in_order(ours)
                told: list[SpiUpdateEvent] = []
                if self.state not in (SpiUpdateState.WAITING, SpiUpdateState.AGAIN):
                    told = [Renamed(self._mirrored)]
                self._enter(SpiUpdateInput.MIRRORED, *told)

    def _in_order(self, pairs: list[Renaming]) -> tuple[Renaming, ...]:
        """The pairs in the order in which we asked for them."""
        places = {(one.protocol, one.old, not one.choose): at for at, one in enumerate(self.asked)}
        return tuple(sorted(pairs, key=lambda one: places[one.protocol, one.old, one.inbound]))


__all__ = [
    "MOST",
    "Asked",
    "Names",
    "PeerRenamed",
    "PeerSupports",
    "RenameRefused",
    "Renamed",
    "Renaming",
    "SpiResponder",
    "SpiUpdate",
    "SpiUpdateEvent",
    "Unsupported",
    "ask",
    "ask_peer",
    "mirrored",
    "renamed_context",
    "renamed_generation",
    "renamed_ike",
]
