"""Decides for which IKE datagrams of unknown SAs the other gateways are asked: bounded, no I/O.

A stock mobile node that lost its gateway probes all addresses that it knows (RFC 4555, 3.10) and repeats the
request, with the same octets, until a gateway answers: charon every 2.5 s, 11 times (5.9.8). Strangers can
send such datagrams too, so SPI pairs, octets of fragments and questions per second are all limited here.

All octets come from strangers. Nothing raises; datagrams that lead to no question are counted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from ikectx.errors import WireError
from ikectx.numbers import Payload
from ikectx.rates import RateLimit
from ikectx.sa.context import Endpoint
from ikectx.sa.name import SaName
from ikectx.wire.ikev2 import HEADER_LENGTH, MAX_FRAGMENTS, IkeHeader
from ikectx.wire.packet_proof import EXCHANGES, MAX_PROOF
from ikectx.wire.reader import Reader

AGAIN = 1.0
"""Seconds between two questions about one SPI pair."""
MAX_HELD = 1 << 18
"""Octets of fragments whose message is not complete, of all SPI pairs."""
_ZERO = bytes(8)


class NotAsked(Enum):
    """Why a datagram led to no question."""

    NO_REQUEST = "no sealed request that an MN with an SA could send"
    ASKED = "its SA was asked about within the last second"
    RATE = "too many questions of this source, or in all"
    PART = "a fragment: the message is not complete"


@dataclass(frozen=True, slots=True)
class UnknownMessage:
    """A whole message (or all its fragments, in order) that `remote` sent to `local`, of an unknown SA."""

    spis: SaName
    datagrams: tuple[bytes, ...] = field(repr=False)
    local: Endpoint
    remote: Endpoint


_Of = tuple[Endpoint, Endpoint, int, int, int]
"""The values that fragments of one message share: ends, exchange, message ID, total."""


@dataclass(slots=True)
class _Partial:
    """Fragments of one message, by number."""

    of: _Of
    parts: dict[int, bytes] = field(default_factory=dict)
    octets: int = 0


class UnknownSas:
    """Remembers SPI pairs that are not known here.

    memory: pairs remembered, the least recently seen is forgotten first. rate: questions per second in all;
    one source may cause half of them, at least one. draw: random numbers in [0, 1) for `RateLimit`.
    """

    def __init__(self, draw: Callable[[], float], *, memory: int = 1024, rate: float = 10.0) -> None:
        self.dropped: Counter[NotAsked] = Counter()
        self.held = 0
        """Octets of fragments that wait for the others."""
        self._memory = memory
        self._asked: OrderedDict[SaName, float] = OrderedDict()
        self._partial: OrderedDict[SaName, _Partial] = OrderedDict()
        self._limit = RateLimit(rate, max(1.0, rate / 2), draw, memory=memory)

    def __len__(self) -> int:
        """SPI pairs remembered."""
        return len(self._asked.keys() | self._partial.keys())

    def receive(
        self, datagram: bytes, local: Endpoint, remote: Endpoint, now: float
    ) -> UnknownMessage | None:
        """Take an IKE message (no marker) for an SA that is not here; returns the question to ask, if any.

        `now` is seconds, monotonic.
        """
        name = SaName(datagram[:8], datagram[8:16])
        # comes first, so that a storm of one SA costs no more than this
        if now - self._asked.get(name, -AGAIN) < AGAIN:
            return self._drop(NotAsked.ASKED)
        part = _part(datagram)
        if part is None:
            return self._drop(NotAsked.NO_REQUEST)
        header, number, total = part
        of = (local, remote, int(header.exchange), header.message_id, total)
        datagrams = self._gather(name, of, number, datagram) if total > 1 else (datagram,)
        if datagrams is None:
            return self._drop(NotAsked.PART)
        if not self._limit.allows(remote.address, now):
            return self._drop(NotAsked.RATE)
        self._forget_parts(name)
        self._asked[name] = now
        self._asked.move_to_end(name)
        if len(self._asked) > self._memory:
            self._asked.popitem(last=False)
        return UnknownMessage(name, datagrams, local, remote)

    def forget(self, name: SaName) -> None:
        """The SA is here now. If it leaves again, its next message is a question at once."""
        self._asked.pop(name, None)
        self._forget_parts(name)

    def _drop(self, why: NotAsked) -> UnknownMessage | None:
        self.dropped[why] += 1
        return None

    def _gather(self, name: SaName, of: _Of, number: int, datagram: bytes) -> tuple[bytes, ...] | None:
        """Keep a fragment; returns all of them when the message is complete. The first of each number
        counts."""
        partial = self._partial.get(name)
        if partial is None or partial.of != of:
            self._forget_parts(name)
            partial = self._partial[name] = _Partial(of)
        self._partial.move_to_end(name)
        if number not in partial.parts and partial.octets + len(datagram) <= MAX_PROOF:
            partial.parts[number] = datagram
            partial.octets += len(datagram)
            self.held += len(datagram)
        while self.held > MAX_HELD or len(self._partial) > self._memory:
            self._forget_parts(next(iter(self._partial)))
        total = of[-1]
        return tuple(partial.parts[n + 1] for n in range(total)) if len(partial.parts) == total else None

    def _forget_parts(self, name: SaName) -> None:
        partial = self._partial.pop(name, None)
        if partial is not None:
            self.held -= partial.octets


def _part(datagram: bytes) -> tuple[IkeHeader, int, int] | None:
    """(header, fragment number, total) of a sealed request; an unfragmented message is 1 of 1."""
    if len(datagram) > MAX_PROOF:
        return None
    try:
        header = IkeHeader.parse(datagram)
        if header.response or header.exchange not in EXCHANGES or _ZERO in (header.spi_i, header.spi_r):
            return None
        if header.next_payload is Payload.SK:
            return header, 1, 1
        if header.next_payload is not Payload.SKF:
            return None
        reader = Reader(datagram, "fragment")
        reader.octets(HEADER_LENGTH + 4)
        number, total = reader.u16("number"), reader.u16("total")
    except WireError:
        return None
    return (header, number, total) if 1 <= number <= total <= MAX_FRAGMENTS else None
