"""Requests of the agent under an IKE_SA that charon has PASSIVE: sealed, retransmitted, matched with answers.

This is the common part of all exchanges in this package. The content of the requests, and the meaning of the
answers, are in `address_update`, `spi_update`, `rekey`, `probe` and `farewell`, each a machine with a table
of its own.

An answer counts if it opens under SK, has the message ID and exchange type of the request that waits, and
comes from the address and port that the request went to. Everything else is counted and ignored, so no forged
or late datagram ends an exchange. Requests of the mobile node stay unanswered.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Never

from ikectx.engine.ports import MoveReport
from ikectx.errors import StateError, UsageError, WireError
from ikectx.machine import EventT, InputT, StateT, Table, Talker
from ikectx.numbers import Exchange
from ikectx.sa.context import Endpoint, IkeGeneration
from ikectx.sa.keys import DrawnIvs, iv_length, seal_key, sk_keys
from ikectx.wire.ikev2 import (
    IkeHeader,
    IkeMessage,
    Reassembly,
    RequestWindow,
    RetransmitPolicy,
    add_marker,
    seal_fragments,
    strip_marker,
)
from ikectx.wire.payloads import AnyPayload


def is_request(datagram: bytes, local: Endpoint, remote: Endpoint) -> bool:
    """Whether a UDP payload from `remote` is marked as a request."""
    try:
        return not IkeHeader.parse(strip_marker(datagram, local, remote)).response
    except WireError:
        return False


class Fresh:
    """Fresh octets, each given out once, in order. UsageError when they are used up."""

    __slots__ = ("_at", "_octets")

    def __init__(self, octets: bytes) -> None:
        self._octets = octets
        self._at = 0

    @property
    def left(self) -> int:
        """Octets not yet given out."""
        return len(self._octets) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise UsageError(f"{len(self._octets)} fresh octets are not enough")
        self._at += count
        return self._octets[self._at - count : self._at]


@dataclass(frozen=True, slots=True)
class SaEnd:
    """Our end of an IKE_SA, from which requests are sent.

    message_id: of the next request. local, remote: endpoints, ports as on the wire. policy: of
    retransmissions. limit: octets of the largest IKE message, see `ikev2.seal_fragments`. Errors: UsageError.
    """

    generation: IkeGeneration
    message_id: int
    local: Endpoint
    remote: Endpoint
    policy: RetransmitPolicy | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.local.address.version != self.remote.address.version:
            raise UsageError("the gateway and the MN have addresses of different families")


class Asking:
    """One request after the other (window 1) from one end of an IKE_SA to the mobile node at the other."""

    def __init__(self, end: SaEnd) -> None:
        generation = end.generation
        self.local = end.local
        self.remote = end.remote
        self.spis = generation.spis
        self.initiator = generation.initiator
        self.iv_length = iv_length(generation.encr)
        self.ignored = 0
        """Datagrams that were no answer here: forged, damaged, from elsewhere, or late."""
        self.messages = self.octets = 0
        """Datagrams and their octets, in both directions."""
        self.requests = self.retransmissions = 0
        self._limit = end.limit
        self._window = RequestWindow(end.message_id, end.policy)
        self._exchange = Exchange.INFORMATIONAL
        self._datagrams: list[bytes] = []
        keys = sk_keys(generation)
        self._key = seal_key(generation, by_initiator=generation.initiator, keys=keys)
        self._incoming = Reassembly(seal_key(generation, by_initiator=not generation.initiator, keys=keys))
        self._proven = False

    @property
    def waits(self) -> bool:
        """A request waits for its answer."""
        return self._window.pending

    @property
    def message_id(self) -> int:
        """The message ID of the request that waits, or of the next one."""
        return self._window.next_id

    @property
    def sent(self) -> int:
        """How often the last request was sent."""
        return self._window.sent

    @property
    def report(self) -> MoveReport:
        """The cost so far. Once anything was sent a message ID counts as used, answered or not."""
        return MoveReport(
            messages=self.messages,
            octets=self.octets,
            retransmissions=self.retransmissions,
            requests=self.requests,
            proven_by_traffic=self._proven,
        )

    def seal(self, exchange: Exchange, payloads: Sequence[AnyPayload], ivs: bytes | DrawnIvs) -> list[bytes]:
        """The UDP payloads of the next request. `ivs`: see `ikev2.seal_fragments`."""
        header = IkeHeader(*self.spis, exchange, self.message_id, self.initiator, response=False)
        sealed = seal_fragments(self._key, header, payloads, ivs, self._limit)
        return [add_marker(one, self.local, self.remote) for one in sealed]

    def ask(self, exchange: Exchange, datagrams: list[bytes]) -> None:
        """Begin with a request that `seal` made; it is sent by `to_send`."""
        self._exchange, self._datagrams = exchange, datagrams
        self._window.request(datagrams[0])

    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        """UDP payloads to send now, each with its destination."""
        if not self._window.to_send(now):
            return []
        if self._window.sent == 1:
            self.requests += 1
        else:
            self.retransmissions += 1
        self.count(*self._datagrams)
        return [(datagram, self.remote) for datagram in self._datagrams]

    def next_timer(self) -> float | None:
        return self._window.next_timer()

    def handle_timer(self, now: float) -> bool:
        """False: no try was answered."""
        return self._window.handle_timer(now)

    def skip(self, count: int) -> None:
        """Other requests have used so many message IDs since our last one, which is answered."""
        if self.waits:
            raise StateError("the request that waits for an answer has its message ID already")
        self._window.next_id += count

    def insist(self) -> None:
        """The peer seems to receive: all sendings are done a second time before the request is given up."""
        self._window.policy = replace(self._window.policy, rounds=2)

    def prove(self) -> None:
        """ESP of the mobile node replaces the answer; the request's message ID is used."""
        self._proven = True
        self._window.response(self.message_id)

    def receive(self, datagram: bytes, source: Endpoint) -> IkeMessage | None:
        """The answer in `datagram`, if it is an authentic one to the request that waits."""
        try:
            message = self._answer(datagram, source)
        except WireError:
            self.ignored += 1
            return None
        if message is None:
            return None
        self._window.response(message.header.message_id)
        self.count(datagram)
        return message

    def _answer(self, datagram: bytes, source: Endpoint) -> IkeMessage | None:
        octets = strip_marker(datagram, self.local, self.remote)
        header = IkeHeader.parse(octets)
        if (header.spi_i, header.spi_r) != self.spis or header.initiator == self.initiator:
            raise WireError("another SA's, or our own message")
        if not header.response:
            return None
        waits = self._window.pending and header.message_id == self.message_id
        if not waits or header.exchange != self._exchange:
            raise WireError("the answer to something else")
        if source != self.remote:
            raise WireError("an answer from elsewhere")
        message = self._incoming.add(octets)
        if message is None:
            self.count(datagram)  # a fragment of the answer
        elif message.critical is not None:
            raise WireError("a critical payload that is not known here")
        return message

    def count(self, *datagrams: bytes) -> None:
        """Add datagrams to the report."""
        self.messages += len(datagrams)
        self.octets += sum(map(len, datagrams))


# --- what asks -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Silent:
    """No answer to any of `sent` requests. The mobile node may have moved nevertheless, if its answers were
    lost."""

    sent: int


class RequesterMachine(Talker[StateT, InputT, Never, EventT]):
    """A machine that `link` runs: sends requests to the mobile node at `remote` from `local`, under the SA
    `spis`. The marker (RFC 3948, 2.2) is part of UDP payloads."""

    def __init__(self, asking: Asking, table: Table[StateT, InputT, Never], new: StateT) -> None:
        super().__init__(table, new)
        self.local = asking.local
        self.remote = asking.remote
        self.spis = asking.spis
        self._then: Callable[[], object] = lambda: None
        """Called when the state's time is over (`_due`)."""

    def _later(self, due: float, then: Callable[[], object]) -> None:
        """Make `_wake` call `then` at `due`, unless the state has changed by then."""
        self._due, self._then = due, then

    def _wake(self, now: float) -> None:
        if self._due is not None and now >= self._due:
            self._due = None
            self._then()


class Requester(RequesterMachine[StateT, InputT, EventT]):
    """A machine with one request after the other. A subclass makes the requests and judges the answers."""

    def __init__(self, asking: Asking, table: Table[StateT, InputT, Never], new: StateT) -> None:
        super().__init__(asking, table, new)
        self._asking = asking
        self._new = new

    @abstractmethod
    def _begin(self) -> None:
        """Send the first request, and leave the state `new`."""

    @abstractmethod
    def _answered(self, message: IkeMessage, now: float) -> None:
        """Handle an authentic answer to the request that waited."""

    @abstractmethod
    def _unanswered(self) -> None:
        """Handle a request of which no try was answered."""

    @property
    def ignored(self) -> int:
        """Datagrams that were no answer here: forged, damaged, from elsewhere, or late."""
        return self._asking.ignored

    @property
    def report(self) -> MoveReport:
        """The cost so far, in message IDs of the SA `spis`. One counts as used once it was sent."""
        return self._asking.report

    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        if self.state is self._new:
            self._begin()
        return self._asking.to_send(now)

    def next_timer(self) -> float | None:
        return self._asking.next_timer() if self._asking.waits else self._due

    def handle_timer(self, now: float) -> None:
        if not self._asking.handle_timer(now):
            self._unanswered()
        self._wake(now)

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        message = self._asking.receive(datagram, source)
        if message is not None:
            self._answered(message, now)
