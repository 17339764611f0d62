"""A message of the mobile node as the reason to let its IKE_SA go (CT-Req "by packet"): codec and check, no
I/O.

A stock mobile node that lost the old gateway probes the other gateway addresses that it knows (RFC 4555,
3.10) and so reaches the new gateway, which does not know the SA. The new gateway cannot open the message, but
the old gateway can: the new gateway sends the message in a CT-Req with token 0, in Context Data Blocks of
`Fpt.PROOF`, and `verify` at the old gateway decides whether it proves that the mobile node is there now. The
message replaces the token, because only the mobile node can have made it, and only just now.

Layout of the blocks' data, joined: for each datagram its length in octets (u16, not 0), then the IKE message
from the IKE header on, without non-ESP marker. All blocks but the last are full (2036 octets); what follows
the last datagram is zero, at most the 7 octets of a block's padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ikectx.errors import ProofError, UsageError, WireError
from ikectx.numbers import Exchange, Fpt, Status
from ikectx.sa.context import IkeContext
from ikectx.sa.keys import seal_key
from ikectx.sa.name import SaName

from .cxtp import MAX_BLOCK_DATA, ContextDataBlock
from .ikev2 import HEADER_LENGTH, MAX_FRAGMENTS, IkeHeader, IkeMessage, Reassembly
from .reader import Reader, Writer

EXCHANGES = frozenset({Exchange.INFORMATIONAL, Exchange.CREATE_CHILD_SA})
"""Exchanges that a mobile node can begin in an established IKE_SA (RFC 7296, 1.3 and 1.4)."""

MAX_PROOF = 16384
"""Octets of all datagrams of one proof: a rekey with the largest key exchanges needs less than half."""


def encode(datagrams: Sequence[bytes]) -> tuple[ContextDataBlock, ...]:
    """The blocks that carry IKE datagrams (no markers): a whole message, or all fragments of one.

    Errors: UsageError where there is none, or more than `MAX_FRAGMENTS`, or than `MAX_PROOF` octets.
    """
    if not 1 <= len(datagrams) <= MAX_FRAGMENTS or not all(datagrams):
        raise UsageError(f"a proof is 1 to {MAX_FRAGMENTS} datagrams, not {len(datagrams)}")
    if sum(map(len, datagrams)) > MAX_PROOF:
        raise UsageError(f"a proof has at most {MAX_PROOF} octets")
    writer = Writer()
    for datagram in datagrams:
        writer.u16(len(datagram)).octets(datagram)
    data = writer.done()
    cuts = range(0, len(data), MAX_BLOCK_DATA)
    return tuple(ContextDataBlock(Fpt.PROOF, data[cut : cut + MAX_BLOCK_DATA]) for cut in cuts)


def decode(blocks: Iterable[ContextDataBlock]) -> tuple[bytes, ...]:
    """The datagrams in a message's blocks; () if it has no block of `Fpt.PROOF`. Errors: WireError."""
    parts: list[bytes] = []
    for block in blocks:
        if block.fpt is not Fpt.PROOF:
            continue
        if block.presence is not None:
            raise WireError("proof: has a presence vector")
        if parts and len(parts[-1]) != MAX_BLOCK_DATA:
            raise WireError("proof: a further block though the one before was not full")
        parts.append(block.data)
    if not parts:
        return ()
    reader = Reader(b"".join(parts), "proof")
    datagrams: list[bytes] = []
    total = 0
    while reader.left >= 2 and (length := reader.u16("datagram length")):
        datagrams.append(reader.octets(length, "datagram"))
        total += length
        if len(datagrams) > MAX_FRAGMENTS or total > MAX_PROOF:
            raise reader.fail("too much for one message of an MN")
    if any(padding := reader.rest()) or len(padding) > 7:
        raise reader.fail("padding that is too long, or not zero,")
    if not datagrams:
        raise reader.fail("no datagram in it")
    return tuple(datagrams)


def verify(context: IkeContext, datagrams: Sequence[bytes]) -> int:
    """The message ID of the mobile node's request in `datagrams`, if it proves where the mobile node is.

    `context` is the SA at the gateway that serves it, with an up-to-date `mid_responder`, the message ID of
    the next request that it expects of the mobile node. The datagrams are one whole message, or all fragments
    of one in any order (RFC 7383), from the IKE header on. They are a proof if all of these conditions hold:

    - SPIs, version and direction are those of a request of the mobile node in this SA, and the exchange is
      INFORMATIONAL or CREATE_CHILD_SA;
    - every part opens under SK_e and SK_a of the mobile node's direction, and together they are the whole
      message;
    - its message ID is exactly `mid_responder`.

    The message ID proves that the request is fresh. Anybody on the way can record the mobile node's messages,
    and send them to another gateway at any later time; octets and keys stay right for as long as the SA
    lives. But with a window of one (RFC 7296, 2.3) the mobile node makes its request n + 1 only when n was
    answered, and this gateway counts up with each request that opened. So a request below `mid_responder` has
    been here already, and does not show where the mobile node is now. That is true for the one just below
    too, which an honest mobile node does retransmit while the answer is lost: it is identical to a recording
    that anybody may have, so it is refused, and the mobile node must come with its next request. A request
    above `mid_responder` cannot be judged yet, because this gateway may be about to receive the one between:
    the new gateway may ask again.

    Errors: ProofError, whose text is for the log; RefusedError with ALGORITHM for an SA whose algorithms are
    not known here. Never WireError, because the caller is another gateway, and its message came from a
    stranger.
    """
    if not 1 <= len(datagrams) <= MAX_FRAGMENTS:
        raise ProofError(f"{len(datagrams)} datagrams are no message of an MN")
    headers = [_header(context, datagram) for datagram in datagrams]
    first = headers[0]
    if any((each.exchange, each.message_id) != (first.exchange, first.message_id) for each in headers):
        raise ProofError("the fragments are of different messages")
    expected = context.mid_responder
    if first.message_id < expected:
        when = "the last one answered" if first.message_id == expected - 1 else "an old one"
        raise ProofError(
            f"request {first.message_id} is {when}, not the next ({expected}): a retransmission or a replay"
        )
    _open(context, datagrams)
    if first.message_id > expected:
        # only for messages that open: for a forged one the new gateway would ask again and again
        raise ProofError(
            f"request {first.message_id} is not the next ({expected}): not seen here yet", status=Status.BUSY
        )
    return first.message_id


def _header(context: IkeContext, datagram: bytes) -> IkeHeader:
    try:
        header = IkeHeader.parse(datagram)
    except WireError as error:
        raise ProofError(f"not an IKE message: {error}") from None
    if (header.spi_i, header.spi_r) != context.spis:
        raise ProofError("a message of another IKE_SA")
    if header.response:
        raise ProofError("a response of the MN; only a request shows that it waits for an answer")
    if header.initiator == context.current.initiator:
        raise ProofError("a message of the gateway's own direction")
    if header.exchange not in EXCHANGES:
        raise ProofError(f"{header.exchange.name} is no exchange of an IKE_SA that stands")
    return header


def _open(context: IkeContext, datagrams: Sequence[bytes]) -> IkeMessage:
    now = context.current
    whole = Reassembly(seal_key(now, by_initiator=not now.initiator))
    message: IkeMessage | None = None
    for datagram in datagrams:
        if message is not None:
            raise ProofError("more datagrams than the message has")
        try:
            message = whole.add(datagram)
        except WireError as error:
            raise ProofError(f"it does not open: {error}", hint="forged, or damaged on the way") from None
    if message is None:
        raise ProofError("fragments are missing")
    return message


def spis_of(datagram: bytes) -> SaName:
    """(initiator SPI, responder SPI) that an IKE datagram names. Errors: WireError when it is too short."""
    reader = Reader(datagram[:HEADER_LENGTH], "IKE header")
    return SaName(reader.octets(8, "SPI"), reader.octets(8, "SPI"))
