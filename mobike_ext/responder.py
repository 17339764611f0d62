"""Answers a peer's request to change SPIs: one INFORMATIONAL request under SK, sans-IO.

    LISTENING --request--> ASKED --answer()--> ANSWERED      duplicates get the same octets again
                                          `--> RETIRED       the same, if the IKE_SA has other SPIs now

The peer's request arrives at `local`, perhaps from an unknown address. The machine opens it, decides with the
caller's `Names` (all of it or nothing), and reports it to the caller with `Asked`. The caller does everything
that must be done *before* the answer leaves (install the SAs it will receive on, move addresses), and calls
`answer`. Copies of the request, before and after that, never change the SPIs twice. Its message ID must be
the next one expected, so a replayed or late one is ignored.

Requests without UPDATE_SPI or UPDATE_SA_ADDRESSES (dead peer detection, Delete, CREATE_CHILD_SA) are left to
charon, which has the SA PASSIVE meanwhile and answers their retransmissions later. They are counted.

As a `ResponderRole.WATCH` charon is not PASSIVE and answers for itself, without the notify that it does not
know: the machine only reports what it sees in a copy, and the agent may begin an exchange of its own
(`naming.mirrored`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum
from ipaddress import ip_address
from typing import Any

from ikectx.engine.ports import MoveReport
from ikectx.errors import StateError, WireError
from ikectx.machine import Table, Talker
from ikectx.numbers import Exchange, Notify, Payload, Protocol
from ikectx.sa.context import Address, Endpoint, IkeGeneration
from ikectx.sa.keys import DrawnIvs, seal_key, sk_keys
from ikectx.wire.ikev2 import IkeHeader, IkeMessage, Reassembly, add_marker, seal_fragments, strip_marker
from ikectx.wire.payloads import AnyPayload, NotifyPayload

from .address_update import Condition, nat_conditions, nat_detection
from .naming import Decision, Names, Renaming, asked_for, decide, supported_by
from .notify import Invitation, Reason, UpdateSpiSupported

KEEP = 60.0
"""Seconds for which the old SPIs of a renamed IKE_SA answer retransmissions of the renaming request."""
RATE = 1.0
"""Exchanges per second and IKE_SA; more are refused as busy."""


# --- events ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of the peer. Call `answer`, at best within the peer's retransmission time (500 ms).

    source: where it came from, and the answer goes. moves: it has UPDATE_SA_ADDRESSES, so the peer is at
    `source` now; then `conditions` are charon's bits of the SA from now on, and `additional` the peer's
    further addresses (None: the request has none). pairs: the SPIs to change, empty if `reasons` refuse it.
    message_id: of the request. invitation: the gateway that the mobile node is to ask for its SA; only a
    machine that watches reports it.
    """

    source: Endpoint
    moves: bool
    pairs: tuple[Renaming, ...]
    reasons: tuple[Reason, ...] = ()
    conditions: int = 0
    additional: tuple[Address, ...] | None = None
    message_id: int = 0
    invitation: str = ""


@dataclass(frozen=True, slots=True)
class PeerSupports:
    """The peer announced UPDATE_SPI, which is to be kept in the context (`IkeContext.update_spi`)."""

    version: int


ResponderEvent = Asked | PeerSupports


# --- the machine -------------------------------------------------------------------------------------


class ResponderState(Enum):
    """LISTENING: no request. ASKED: the caller must answer. CLOSED: final. The others: see above."""

    LISTENING = "listening"
    ASKED = "asked"
    ANSWERED = "answered"
    RETIRED = "retired"
    CLOSED = "closed"


class ResponderInput(Enum):
    """Inputs of the machine."""

    REQUEST = "the next request of the peer"
    DUPLICATE = "the last request again"
    ANSWER = "the caller's answer"
    ANSWER_IKE = "the caller's answer, and the IKE_SA has another name now"
    ELSEWHERE = "charon answers it"
    EXPIRE = "the old SPIs have been kept long enough"


class Action(Enum):
    """Actions of the machine."""

    TELL = "tell the caller"
    SEND = "seal and send the answer"
    RESEND = "send the same octets again"


_S, _I = ResponderState, ResponderInput

TABLE: Table[ResponderState, ResponderInput, Action] = {
    (_S.LISTENING, _I.REQUEST): (_S.ASKED, Action.TELL),
    (_S.ASKED, _I.ANSWER): (_S.ANSWERED, Action.SEND),
    (_S.ASKED, _I.ANSWER_IKE): (_S.RETIRED, Action.SEND),
    (_S.ASKED, _I.ELSEWHERE): (_S.LISTENING,),
    (_S.ANSWERED, _I.REQUEST): (_S.ASKED, Action.TELL),
    (_S.ANSWERED, _I.DUPLICATE): (_S.ANSWERED, Action.RESEND),
    (_S.RETIRED, _I.DUPLICATE): (_S.RETIRED, Action.RESEND),
    (_S.RETIRED, _I.EXPIRE): (_S.CLOSED,),
}


@dataclass(frozen=True, slots=True)
class _Open:
    """The request that is being answered."""

    message: IkeMessage
    source: Endpoint
    decision: Decision
    moves: bool


class ResponderRole(Enum):
    """The requests that a `SpiResponder` answers."""

    ALL = "those about SPIs, addresses or both"
    SPIS = "those about SPIs alone; the others are charon's"
    WATCH = "none: charon answers, and this machine only reports"


class SpiResponder(Talker[ResponderState, ResponderInput, Action, ResponderEvent]):
    """Answers the peer's UPDATE_SPI, and UPDATE_SA_ADDRESSES with or without it.

    expected_id: message ID of the peer's next request (`mid_responder`); with `ResponderRole.WATCH` any that
    is higher than those seen. local: where the peer's requests arrive. conditions: charon's bits of the SA.
    `limit`: octets of the largest answer, see `ikev2.seal_fragments`.
    """

    def __init__(
        self,
        generation: IkeGeneration,
        expected_id: int,
        local: Endpoint,
        names: Names,
        *,
        conditions: int = 0,
        limit: int | None = None,
        role: ResponderRole = ResponderRole.ALL,
    ) -> None:
        super().__init__(TABLE, ResponderState.LISTENING)
        self.local = local
        self.spis = generation.spis
        self.expected_id = expected_id
        self.answering = role is not ResponderRole.WATCH
        self.ignored = 0
        """Datagrams that were no request for this machine: forged, damaged, late, another SA's, or a
        response."""
        self.others = 0
        """Requests with the expected message ID that are charon's to answer."""
        self.answered = 0
        self.messages = self.octets = 0
        self._initiator = generation.initiator
        self._names = names
        self._conditions = conditions
        self._limit = limit
        self._addresses = role is not ResponderRole.SPIS
        self._last_time: float | None = None
        self._open: _Open | None = None
        self._arrived: list[bytes] = []
        """Datagrams of the request that is arriving."""
        self._last: list[bytes] = []
        """Datagrams of the request that was answered last, with `_answer`."""
        self._answer: list[bytes] = []
        self._send: list[tuple[bytes, Endpoint]] = []
        keys = sk_keys(generation)
        self._key = seal_key(generation, by_initiator=generation.initiator, keys=keys)
        self._incoming = Reassembly(seal_key(generation, by_initiator=not generation.initiator, keys=keys))

    @property
    def report(self) -> MoveReport:
        """The cost so far; `answered` counts the peer's message IDs used up here."""
        return MoveReport(messages=self.messages, octets=self.octets, answered=self.answered)

    @property
    def retired(self) -> bool:
        """The IKE_SA has other SPIs now."""
        return self.state in (ResponderState.RETIRED, ResponderState.CLOSED)

    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        del now
        send, self._send = self._send, []
        self._count(*(datagram for datagram, _ in send))
        return send

    def handle_timer(self, now: float) -> None:
        if self._due is not None and now >= self._due:
            self._enter(ResponderInput.EXPIRE)
            self._answer, self._last = [], []

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        try:
            octets = strip_marker(datagram, self.local, source)
            message = self._request(octets, source)
        except WireError:
            self.ignored += 1
            return
        if message is None:
            return
        if not self._ours(message):
            self.others += 1
            self._arrived = []
            if not self.answering:
                self._seen(message)
            return
        if Action.TELL not in self._enter(ResponderInput.REQUEST):
            self.ignored += 1
            return
        self._answer = []  # the peer has it
        self._count(*(add_marker(one, self.local, source) for one in self._arrived))
        self._tell(message, source, now)

    def answer(self, fresh: bytes | DrawnIvs, now: float, refusal: Reason | None = None) -> None:
        """Answer the last `Asked` request. `fresh`: random octets, an IV for each datagram.

        `refusal`: the change cannot be made after all. Errors: StateError if there is no request.
        """
        if self._open is None:
            raise StateError("no request of the peer waits for an answer")
        request, self._open = self._open, None
        decision = request.decision if refusal is None else request.decision.refused(refusal)
        head = replace(request.message.header, initiator=self._initiator, response=True)
        payloads: list[AnyPayload] = [*decision.payloads()]
        if supported_by(request.message):
            payloads.append(UpdateSpiSupported().serialize())
        if request.moves:
            forced = bool(self._conditions & Condition.NAT_FAKE)
            payloads += nat_detection(self.spis, self.local, request.source, encap=forced)
        payloads += request.message.notifies(Notify.COOKIE2)
        sealed = seal_fragments(self._key, head, payloads, fresh, self._limit)
        self._answer = [add_marker(one, self.local, request.source) for one in sealed]
        self._last, self._arrived = self._arrived, []
        self._send += [(one, request.source) for one in self._answer]
        self.answered += 1
        self.expected_id += 1
        retired = any(one.protocol is Protocol.IKE for one in decision.pairs)
        self._enter(ResponderInput.ANSWER_IKE if retired else ResponderInput.ANSWER)
        if retired:
            self._due = now + KEEP

    def _request(self, octets: bytes, source: Endpoint) -> IkeMessage | None:
        """The authentic new request that `octets` complete; None: more fragments are missing, or a
        duplicate."""
        header = IkeHeader.parse(octets)
        if (header.spi_i, header.spi_r) != self.spis or header.initiator == self._initiator:
            raise WireError("another SA's, or our own message")
        if header.response:
            raise WireError("a response")
        last = self.expected_id - 1
        if self.answering and header.message_id == last and octets in self._last:
            # the first fragment represents a fragmented request (RFC 7383, 2.6.1)
            first = header.next_payload != Payload.SKF or octets[32:34] == b"\0\1"
            if first and Action.RESEND in self._enter(ResponderInput.DUPLICATE):
                self._send += [(one, source) for one in self._answer]
            return None
        current = header.message_id == self.expected_id
        if not (current if self.answering else header.message_id >= self.expected_id):
            raise WireError("a late request, or one from the future")
        if self.state is ResponderState.ASKED:
            return None
        message = self._incoming.add(octets)
        if octets not in self._arrived:
            self._arrived.append(octets)
        if message is not None and message.critical is not None:
            raise WireError("a critical payload that is not known here")
        return message

    def _ours(self, message: IkeMessage) -> bool:
        """Whether the request is for this machine, not for charon."""
        if message.header.exchange != Exchange.INFORMATIONAL:
            return False
        if any(payload.type in (Payload.DELETE, Payload.CP) for payload in message.payloads):
            return False
        if message.notifies(Notify.UPDATE_SA_ADDRESSES):
            return self._addresses
        if not self.answering and message.notifies(Notify.INVITATION):
            return True
        return bool(message.notifies(Notify.UPDATE_SPI) or message.notifies(Notify.UPDATE_SPI_SUPPORTED))

    def _tell(self, message: IkeMessage, source: Endpoint, now: float) -> None:
        version = supported_by(message)
        if version:
            self._events.append(PeerSupports(version))
        asked = asked_for(message)
        moves = bool(message.notifies(Notify.UPDATE_SA_ADDRESSES))
        if asked and self._last_time is not None and now - self._last_time < 1 / RATE:
            decision = Decision(asked).refused(Reason.BUSY)
        else:
            decision = decide(asked, self._names)
        if asked:
            self._last_time = now
        if moves:
            self._conditions = nat_conditions(message, self.spis, self.local, source, self._conditions)
        self._events.append(
            Asked(
                source,
                moves,
                decision.pairs,
                decision.reasons,
                self._conditions,
                _further(message) if moves else None,
                message.header.message_id,
                _invitation(message),
            )
        )
        if self.answering:
            self._open = _Open(message, source, decision, moves)
        else:
            self._seen(message)

    def _seen(self, message: IkeMessage) -> None:
        """Count a request that charon answers."""
        self.expected_id = message.header.message_id + 1
        self._enter(ResponderInput.ELSEWHERE)
        self._arrived = []

    def _count(self, *datagrams: bytes) -> None:
        self.messages += len(datagrams)
        self.octets += sum(map(len, datagrams))


def _invitation(message: IkeMessage) -> str:
    """The gateway that the request names; empty: none that can be read."""
    for notify in message.payloads:
        if isinstance(notify, NotifyPayload) and notify.notify == Notify.INVITATION:
            with contextlib.suppress(WireError):
                return Invitation.parse(notify).gateway
    return ""


def _further(message: IkeMessage) -> tuple[Address, ...] | None:
    """The peer's further addresses (RFC 4555, 3.6); None: the message has none."""
    kinds = {Notify.ADDITIONAL_IP4_ADDRESS: 4, Notify.ADDITIONAL_IP6_ADDRESS: 16}
    told = [p for p in message.payloads if isinstance(p, NotifyPayload) and p.notify in kinds]
    if not told and not message.notifies(Notify.NO_ADDITIONAL_ADDRESSES):
        return None
    return tuple(ip_address(p.data) for p in told if len(p.data) == kinds[p.notify])


class GatewayResponder(SpiResponder):
    """Answers only one gateway. `gateway`: its addresses."""

    def __init__(self, gateway: Collection[Address], *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self.gateway = gateway

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        if source.address in self.gateway:
            super().receive(datagram, source, now)
