"""Requests of ours under an IKE_SA that charon holds PASSIVE: sealed, sent again, matched with their answers.

The part that all exchanges of this house have in common; what is asked and what an answer means stands in
`exchange`, `rename` and `rekey`.

An answer counts when it opens under SK, carries the message ID and exchange type of the request that waits,
and comes from the address and port the request went to. Everything else is counted and ignored, so no forged
or late datagram ends an exchange. A request of the MN is kept apart: see `Asking.requests`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ikectx.context import Endpoint, IkeGeneration
from ikectx.errors import UsageError, WireError
from ikectx.ikev2 import (
    IkeHeader,
    Message,
    Reassembly,
    RequestWindow,
    RetransmitPolicy,
    add_marker,
    seal_fragments,
    strip_marker,
)
from ikectx.keys import iv_length, seal_key, sk_keys
from ikectx.numbers import Exchange
from ikectx.payloads import AnyPayload
from ikectx.ports import MoveReport


def is_request(datagram: bytes, local: Endpoint, remote: Endpoint) -> bool:
    """A UDP payload from `remote` that calls itself a request."""
    try:
        return not IkeHeader.parse(strip_marker(datagram, local, remote)).response
    except WireError:
        return False


class Fresh:
    """Fresh octets, given out once each, in order. UsageError when they are used up."""

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


class Asking:
    """One request after the other (window 1) from `local` to the MN at `remote`.

    message_id: of the first one. `limit`: octets of the largest IKE message, see `ikev2.seal_fragments`.
    """

    def __init__(
        self,
        generation: IkeGeneration,
        message_id: int,
        local: Endpoint,
        remote: Endpoint,
        *,
        policy: RetransmitPolicy | None = None,
        limit: int | None = None,
    ) -> None:
        if local.address.version != remote.address.version:
            raise UsageError("the gateway and the MN have addresses of different families")
        self.local = local
        self.remote = remote
        self.spis = (generation.spi_i, generation.spi_r)
        self.initiator = generation.initiator
        self.iv_length = iv_length(generation.encr)
        self.ignored = 0
        """Datagrams that were no answer to us: forged, damaged, from elsewhere, or late."""
        self.peer_requests = 0
        """Requests of the MN seen, unanswered; not authenticated, so no more than a hint."""
        self.messages = self.octets = 0
        """Datagrams and their octets, in both directions."""
        self.requests = self.retransmissions = 0
        self._limit = limit
        self._window = RequestWindow(message_id, 0, policy)
        self._exchange = Exchange.INFORMATIONAL
        self._datagrams: list[bytes] = []
        keys = sk_keys(generation)
        self._key = seal_key(generation, by_initiator=generation.initiator, keys=keys)
        self._incoming = Reassembly(seal_key(generation, by_initiator=not generation.initiator, keys=keys))

    @property
    def message_id(self) -> int:
        """Of the request that waits, or of the next one."""
        return self._window.next_id

    @property
    def sent(self) -> int:
        """How often the last request was sent."""
        return self._window.sent

    @property
    def report(self) -> MoveReport:
        """What it took so far. Once anything was sent a message ID counts as used, answered or not."""
        return MoveReport(
            messages=self.messages,
            octets=self.octets,
            retransmissions=self.retransmissions,
            requests=self.requests,
        )

    def seal(self, exchange: Exchange, payloads: Sequence[AnyPayload], ivs: bytes) -> list[bytes]:
        """The UDP payloads of the next request."""
        header = IkeHeader(*self.spis, exchange, self.message_id, self.initiator, response=False)
        sealed = seal_fragments(self._key, header, payloads, ivs, self._limit)
        return [add_marker(one, self.local, self.remote) for one in sealed]

    def ask(self, exchange: Exchange, datagrams: list[bytes]) -> None:
        """Begin with a request that `seal` made; it is sent by `to_send`."""
        self._exchange, self._datagrams = exchange, datagrams
        self._window.request(datagrams[0])

    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        """UDP payloads to send now, and where to."""
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
        """False: all tries went unanswered."""
        return self._window.handle_timer(now)

    def skip(self, count: int) -> None:
        """Requests from elsewhere have used so many message IDs since our last one."""
        self._window.next_id += count

    def stop(self) -> None:
        """The request is as good as answered; its message ID is used."""
        self._window.response(self.message_id)

    def receive(self, datagram: bytes, source: Endpoint) -> Message | None:
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

    def _answer(self, datagram: bytes, source: Endpoint) -> Message | None:
        octets = strip_marker(datagram, self.local, self.remote)
        header = IkeHeader.parse(octets)
        if (header.spi_i, header.spi_r) != self.spis or header.initiator == self.initiator:
            raise WireError("another SA's, or our own message")
        if not header.response:
            self.peer_requests += 1
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
