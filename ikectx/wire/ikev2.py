"""IKEv2 messages: header, SK and SKF, the payloads that each exchange allows, and the request window.

Sources: RFC 7296 (2.1-2.3 and 2.4 for the window, 2.23 for NAT detection, 3.1-3.14 for formats), RFC 7383 for
fragments, RFC 3948 (2.2) for the non-ESP marker. Lengths are octets, times seconds on the caller's monotonic
clock.

Errors: only `WireError` for foreign octets; `StateError` if the window is used out of order; `UsageError` for
wrong arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives import hashes

from ikectx.errors import StateError, UsageError, WireError
from ikectx.numbers import Exchange, Notify, Payload
from ikectx.sa.context import Endpoint
from ikectx.sa.keys import DrawnIvs, SealKey, iv_length, open_, seal, sealed_length, synthetic_ivs

from .payloads import AnyPayload, NotifyPayload, RawPayload, parse_payloads, serialize_payloads
from .reader import Reader, Writer

HEADER_LENGTH = 28
MAX_FRAGMENTS = 64
IKE_PORT = 500
NATT_PORT = 4500
_MARKER = bytes(4)


# --- header ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IkeHeader:
    """The IKE header (RFC 7296, 3.1).

    `initiator`: the sender is the IKE_SA's *original* initiator. `next_payload` and `length` are filled in
    when a message is built. `version`: major in the high half.
    """

    spi_i: bytes
    spi_r: bytes
    exchange: Exchange
    message_id: int
    initiator: bool
    response: bool
    next_payload: Payload = Payload.NONE
    length: int = HEADER_LENGTH
    version: int = 0x20

    @classmethod
    def parse(cls, datagram: bytes) -> IkeHeader:
        """The header of `datagram`, which must be one whole IKE message without marker."""
        reader = Reader(datagram, "IKE header")
        spi_i, spi_r = reader.octets(8, "SPI"), reader.octets(8, "SPI")
        next_payload, version = Payload(reader.u8()), reader.u8("version")
        exchange, flags = Exchange(reader.u8()), reader.u8("flags")
        message_id, length = reader.u32("message ID"), reader.u32("length")
        if version >> 4 != 2:
            raise reader.fail(f"version {version >> 4} is not IKEv2")
        if length != len(datagram):
            raise reader.fail(f"length {length} in a datagram of {len(datagram)} octets")
        return cls(
            spi_i,
            spi_r,
            exchange,
            message_id,
            initiator=bool(flags & 0x08),
            response=bool(flags & 0x20),
            next_payload=next_payload,
            length=length,
            version=version,
        )

    def serialize(self) -> bytes:
        writer = Writer().octets(self.spi_i).octets(self.spi_r)
        writer.u8(self.next_payload).u8(self.version).u8(self.exchange)
        writer.u8(0x08 * self.initiator | 0x20 * self.response)
        return writer.u32(self.message_id, "message ID").u32(self.length, "length").done()


# --- messages ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExchangeRule:
    """The payloads that one exchange allows. `sealed`: they are inside SK, and nothing is outside of it."""

    sealed: bool
    request: frozenset[Payload]
    response: frozenset[Payload]


def _rule(sealed: bool, both: set[Payload], request: set[Payload] | None = None) -> ExchangeRule:
    everywhere = both | {Payload.NOTIFY, Payload.VENDOR}
    return ExchangeRule(sealed, frozenset(everywhere | (request or set())), frozenset(everywhere))


_AUTH = {
    Payload.IDR,
    Payload.CERT,
    Payload.AUTH,
    Payload.EAP,
    Payload.CP,
    Payload.SA,
    Payload.TSI,
    Payload.TSR,
}
_CHILD = {Payload.SA, Payload.NONCE, Payload.KE, Payload.TSI, Payload.TSR}

EXCHANGES: dict[Exchange, ExchangeRule] = {
    Exchange.IKE_SA_INIT: _rule(False, {Payload.SA, Payload.KE, Payload.NONCE, Payload.CERTREQ}),
    Exchange.IKE_INTERMEDIATE: _rule(True, {Payload.KE}),
    Exchange.IKE_AUTH: _rule(True, _AUTH, {Payload.IDI, Payload.CERTREQ}),
    Exchange.CREATE_CHILD_SA: _rule(True, _CHILD),
    Exchange.INFORMATIONAL: _rule(True, {Payload.DELETE, Payload.CP}),
}
"""RFC 7296, 1.2-1.4 and appendix C; RFC 9242 for IKE_INTERMEDIATE. Unknown types may stand anywhere."""


@dataclass(frozen=True, slots=True)
class IkeMessage:
    """A whole message in the clear: one that was opened, or is to be sealed."""

    header: IkeHeader
    payloads: tuple[AnyPayload, ...]

    def notifies(self, kind: Notify) -> list[NotifyPayload]:
        """All notifies of that kind."""
        return [p for p in self.payloads if isinstance(p, NotifyPayload) and p.notify == kind]

    @property
    def error(self) -> NotifyPayload | None:
        """The first error notify."""
        return next((p for p in self.payloads if isinstance(p, NotifyPayload) and p.is_error), None)

    @property
    def critical(self) -> RawPayload | None:
        """A critical payload of a type that no exchange knows (RFC 7296, 2.5): refuse the message."""
        unknown = (p for p in self.payloads if isinstance(p, RawPayload) and p.type not in _KNOWN)
        return next((p for p in unknown if p.critical), None)

    def check(self) -> None:
        """WireError for a payload that has no place in this exchange, or an exchange that is unknown."""
        rule = EXCHANGES.get(self.header.exchange)
        if rule is None:
            raise WireError(f"exchange {self.header.exchange.name} is not known here")
        allowed = rule.response if self.header.response else rule.request
        for payload in self.payloads:
            if payload.type in _KNOWN and payload.type not in allowed:
                raise WireError(f"{payload.type.name} has no place in {self.header.exchange.name}")


_KNOWN = frozenset(Payload)


def seal_message(key: SealKey, header: IkeHeader, payloads: Iterable[AnyPayload], iv: bytes) -> bytes:
    """The datagram (no marker) of one message in SK. `iv`: `keys.iv_length` fresh random octets."""
    first, inner = serialize_payloads(payloads)
    size = 4 + sealed_length(key, len(inner))
    full = replace(header, next_payload=Payload.SK, length=HEADER_LENGTH + size)
    head = full.serialize() + Writer().u8(first).u8(0).u16(size, "SK length").done()
    return head + seal(key, head, inner, iv)


def seal_fragments(
    key: SealKey,
    header: IkeHeader,
    payloads: Iterable[AnyPayload],
    ivs: bytes | DrawnIvs,
    limit: int | None = None,
) -> list[bytes]:
    """The datagrams (no marker) of one message: one in SK, or SKF fragments (RFC 7383, 2.5).

    `limit`: octets of the largest datagram, None: no fragments, which only a peer that
    announced IKEV2_FRAGMENTATION_SUPPORTED understands. `ivs`: a fresh `keys.iv_length` for each datagram,
    one behind the other; what is left over is not used. `DrawnIvs`: the same arguments give the same
    datagrams, and any other message has other IVs. Errors: UsageError for too few of them or a limit
    that leaves no room; WireError for a message of more than `MAX_FRAGMENTS`.
    """
    size = iv_length(key.encr)
    listed = list(payloads)
    first, inner = serialize_payloads(listed)
    if isinstance(ivs, DrawnIvs):
        text = header.serialize() + bytes([first]) + (limit or 0).to_bytes(4) + inner
        ivs = synthetic_ivs(key, ivs, text)
    if limit is None or HEADER_LENGTH + 4 + sealed_length(key, len(inner)) <= limit:
        return [seal_message(key, header, listed, ivs[:size])]
    room = limit - HEADER_LENGTH - 8
    step = next((n for n in range(room, 0, -1) if sealed_length(key, n) <= room), 0)
    if not step:
        raise UsageError(f"no fragment fits into {limit} octets")
    parts = [inner[at : at + step] for at in range(0, len(inner), step)]
    if len(parts) > MAX_FRAGMENTS:
        raise WireError(f"a message of {len(parts)} fragments")
    if len(ivs) < size * len(parts):
        raise UsageError(f"{len(parts)} fragments need {size * len(parts)} octets of IV, not {len(ivs)}")
    made = []
    for number, part in enumerate(parts, 1):
        length = 8 + sealed_length(key, len(part))
        full = replace(header, next_payload=Payload.SKF, length=HEADER_LENGTH + length)
        writer = Writer().u8(first if number == 1 else Payload.NONE).u8(0).u16(length, "SKF length")
        head = full.serialize() + writer.u16(number).u16(len(parts)).done()
        made.append(head + seal(key, head, part, ivs[size * (number - 1) : size * number]))
    return made


@dataclass(frozen=True, slots=True)
class _Sealed:
    """An SK or SKF payload taken apart, still closed; SK is fragment 1 of 1."""

    header: IkeHeader
    first: Payload
    head: bytes
    body: bytes
    number: int = 1
    total: int = 1


def _sealed(datagram: bytes) -> _Sealed:
    header = IkeHeader.parse(datagram)
    reader = Reader(datagram, "sealed message")
    reader.octets(HEADER_LENGTH)
    # In the exchanges of the table no payload comes before SK, so any there is refused.
    if header.next_payload not in (Payload.SK, Payload.SKF):
        raise reader.fail(f"payload {header.next_payload.name} where SK belongs")
    first = Payload(reader.u8("next payload"))
    reader.u8("flags")
    if reader.u16("length") != len(datagram) - HEADER_LENGTH:
        raise reader.fail("SK does not fill the message")
    number = total = 1
    if header.next_payload == Payload.SKF:
        number, total = reader.u16("fragment number"), reader.u16("fragment total")
        if not 1 <= number <= total <= MAX_FRAGMENTS:
            raise reader.fail(f"fragment {number} of {total}")
    head = datagram[: reader.pos]
    return _Sealed(header, first, head, reader.rest(), number, total)


def open_message(key: SealKey, datagram: bytes) -> IkeMessage:
    """A whole message sealed in SK, opened and checked against the table. WireError for anything else."""
    sealed = _sealed(datagram)
    if sealed.header.next_payload == Payload.SKF:
        raise WireError("sealed message: a fragment of one")
    inner = open_(key, sealed.head, sealed.body)
    message = IkeMessage(sealed.header, parse_payloads(sealed.first, inner))
    message.check()
    return message


class Reassembly:
    """Opens the messages of one sender, whole ones and fragmented ones (RFC 7383, 2.6); one at a time."""

    __slots__ = ("_first", "_key", "_of", "_parts", "_total")

    def __init__(self, key: SealKey) -> None:
        self._key = key
        self._of: tuple[bool, int] | None = None
        self._total = 0
        self._parts: dict[int, bytes] = {}
        self._first = Payload.NONE

    def add(self, datagram: bytes) -> IkeMessage | None:
        """The message, once it is complete. A fragment that does not open changes nothing (WireError)."""
        sealed = _sealed(datagram)
        if sealed.header.next_payload == Payload.SK:
            return open_message(self._key, datagram)
        inner = open_(self._key, sealed.head, sealed.body)
        of = (sealed.header.response, sealed.header.message_id)
        if of != self._of or sealed.total > self._total:
            self._of, self._total = of, sealed.total
            self._parts.clear()
        elif sealed.total < self._total:
            return None
        self._parts.setdefault(sealed.number, inner)
        if sealed.number == 1:
            self._first = sealed.first
        if len(self._parts) < self._total:
            return None
        whole = b"".join(self._parts[n] for n in range(1, self._total + 1))
        self._of = None
        message = IkeMessage(sealed.header, parse_payloads(self._first, whole))
        message.check()
        return message


# --- around messages ---------------------------------------------------------------------------------


def nat_detection_hash(spi_i: bytes, spi_r: bytes, endpoint: Endpoint) -> bytes:
    """SHA-1(SPIi | SPIr | address | port) of RFC 7296, 2.23."""
    digest = hashes.Hash(hashes.SHA1())  # noqa: S303 the RFC's choice, no secret hangs on it
    digest.update(spi_i + spi_r + endpoint.address.packed + endpoint.port.to_bytes(2))
    return digest.finalize()


def has_marker(local: Endpoint, remote: Endpoint) -> bool:
    """IKE between these ports follows a non-ESP marker: neither is 500 (RFC 3948, 2.2; charon's rule)."""
    return IKE_PORT not in (local.port, remote.port)


def add_marker(datagram: bytes, local: Endpoint, remote: Endpoint) -> bytes:
    """The UDP payload that carries an IKE message."""
    return _MARKER + datagram if has_marker(local, remote) else datagram


def strip_marker(payload: bytes, local: Endpoint, remote: Endpoint) -> bytes:
    """The IKE message in a UDP payload; WireError for ESP in UDP and for NAT keepalives."""
    if not has_marker(local, remote):
        return payload
    if payload[:4] != _MARKER:
        raise WireError("not IKE: no non-ESP marker")
    return payload[4:]


# --- the window --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RetransmitPolicy:
    """When an unanswered request is sent again: `tries` sendings, `initial` s, then times `factor` each.

    After the last one the same growing wait passes before giving up: 11 s with these numbers. charon waits
    4 s first and 165 s in all, too long for packets that are lost meanwhile.
    """

    initial: float = 0.5
    factor: float = 1.8
    tries: int = 5
    rounds: int = 1
    """How often all of that is done."""

    def wait(self, sent: int) -> float:
        """Seconds to wait after the `sent`-th sending (1 is the first)."""
        return self.initial * self.factor ** ((sent - 1) % self.tries)


class RequestWindow:
    """The requests that one end of an IKE_SA sends, with a window of one (RFC 7296, 2.1-2.3).

    `next_id`: message ID of the next request. Octets are whole sealed messages, and a retransmission has the
    same octets.
    """

    __slots__ = ("_due", "_pending", "_send_now", "next_id", "policy", "sent")

    def __init__(self, next_id: int, policy: RetransmitPolicy | None = None) -> None:
        self.next_id = next_id
        self.policy = policy or RetransmitPolicy()
        self.sent = 0
        """How often the pending, or last, request was sent."""
        self._pending: bytes | None = None
        self._send_now = False
        self._due: float | None = None

    @property
    def pending(self) -> bool:
        """A request of ours waits for its response."""
        return self._pending is not None

    def request(self, octets: bytes) -> None:
        """Start a request whose message ID is `next_id`; StateError while another waits."""
        if self._pending is not None:
            raise StateError("a request is under way already")
        self._pending, self._send_now, self._due, self.sent = octets, True, None, 0

    def to_send(self, now: float) -> list[bytes]:
        """Messages to send now."""
        if self._pending is None or not self._send_now:
            return []
        self._send_now = False
        self.sent += 1
        self._due = now + self.policy.wait(self.sent)
        return [self._pending]

    def next_timer(self) -> float | None:
        """When to call `handle_timer`."""
        return self._due

    def handle_timer(self, now: float) -> bool:
        """Time has passed. False: all tries went unanswered, the request is given up.

        Its message ID counts as used: the peer may have processed the request, with its answers lost.
        """
        if self._due is None or now < self._due:
            return True
        self._due = None
        if self.sent < self.policy.tries * self.policy.rounds:
            self._send_now = True
            return True
        self._pending = None
        self.next_id += 1
        return False

    def response(self, message_id: int) -> bool:
        """An authenticated response: True if it answers the pending request, which is done then."""
        if self._pending is None or message_id != self.next_id:
            return False
        self._pending, self._send_now, self._due = None, False, None
        self.next_id += 1
        return True
