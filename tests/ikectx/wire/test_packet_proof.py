"""proof.py: which message of an MN lets its SA go, and how it travels in Context Data Blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import ProofError, RefusedError, UsageError, WireError
from ikectx.numbers import Encr, Exchange, Fpt, IdType, Integ, Notify, Payload, Prf, Status
from ikectx.sa.context import Endpoint, Identity, IkeContext, IkeGeneration, Secret
from ikectx.sa.keys import iv_length, seal, seal_key, sealed_length
from ikectx.sa.name import SaName
from ikectx.wire import packet_proof as proof
from ikectx.wire.cxtp import MAX_BLOCK_DATA, ContextDataBlock
from ikectx.wire.ikev2 import HEADER_LENGTH, IkeHeader, add_marker, seal_message
from ikectx.wire.payloads import (
    AnyPayload,
    DeletePayload,
    NoncePayload,
    NotifyPayload,
    serialize_payloads,
)
from ikectx.wire.reader import Writer

SPIS = SaName(b"initiatr", b"responde")
NEXT = 7
FAMILIES = [
    (Encr.AES_GCM_8, 256, Integ.NONE),
    (Encr.AES_GCM_12, 192, Integ.NONE),
    (Encr.AES_GCM_16, 128, Integ.NONE),
    (Encr.AES_CCM_8, 128, Integ.NONE),
    (Encr.AES_CCM_12, 192, Integ.NONE),
    (Encr.AES_CCM_16, 256, Integ.NONE),
    (Encr.CHACHA20_POLY1305, 256, Integ.NONE),
    (Encr.AES_CBC, 256, Integ.HMAC_SHA2_256_128),
    (Encr.AES_CBC, 128, Integ.HMAC_SHA1_96),
    (Encr.AES_CBC, 128, Integ.AES_XCBC_96),
    (Encr.AES_CTR, 128, Integ.HMAC_SHA2_384_192),
    (Encr.AES_CTR, 256, Integ.AES_CMAC_96),
    (Encr.CAMELLIA_CBC, 192, Integ.HMAC_SHA2_512_256),
    (Encr.DES3, 0, Integ.HMAC_MD5_96),
]
PROBE: tuple[AnyPayload, ...] = ()
"""What charon sends along the paths it knows: an INFORMATIONAL with nothing in it."""


def context(
    encr: Encr = Encr.AES_GCM_16,
    bits: int = 128,
    integ: Integ = Integ.NONE,
    *,
    gateway_initiated: bool = False,
    expected: int = NEXT,
) -> IkeContext:
    generation = IkeGeneration(
        *SPIS,
        gateway_initiated,
        bytes(range(32)),
        bytes(range(32, 64)),
        Secret(b"shared secret of the exchange"),
        Prf.HMAC_SHA2_256,
        encr,
        bits,
        integ,
    )
    gateway, mn = Identity(IdType.FQDN, b"psg.example"), Identity(IdType.FQDN, b"mn.example")
    here, there = Endpoint.of("192.0.2.1", 4500), Endpoint.of("198.51.100.7", 4500)
    return IkeContext("mn", (generation,), gateway, mn, here, there, mid_initiator=3, mid_responder=expected)


def request(
    sa: IkeContext,
    *payloads: AnyPayload,
    exchange: Exchange = Exchange.INFORMATIONAL,
    mid: int = NEXT,
    by_mn: bool = True,
    response: bool = False,
) -> bytes:
    """A message in SK; from the MN to its gateway, unless said otherwise."""
    now = sa.current
    by_initiator = by_mn != now.initiator
    header = IkeHeader(*sa.spis, exchange, mid, by_initiator, response)
    key = seal_key(now, by_initiator=by_initiator)
    return seal_message(key, header, payloads, bytes(range(iv_length(now.encr))))


def fragments(sa: IkeContext, *payloads: AnyPayload, size: int = 100, mid: int = NEXT) -> list[bytes]:
    """The MN's CREATE_CHILD_SA in SKF payloads of `size` octets inside each (RFC 7383, 2.5)."""
    now = sa.current
    key = seal_key(now, by_initiator=not now.initiator)
    first, inner = serialize_payloads(payloads)
    parts = [inner[at : at + size] for at in range(0, len(inner), size)]
    made = []
    for number, part in enumerate(parts, 1):
        length = 8 + sealed_length(key, len(part))
        header = IkeHeader(
            *sa.spis,
            Exchange.CREATE_CHILD_SA,
            mid,
            not now.initiator,
            False,
            Payload.SKF,
            HEADER_LENGTH + length,
        )
        writer = Writer().octets(header.serialize()).u8(first if number == 1 else Payload.NONE).u8(0)
        head = writer.u16(length).u16(number).u16(len(parts)).done()
        made.append(head + seal(key, head, part, bytes([number]) * iv_length(now.encr)))
    return made


REKEY = (NotifyPayload(Notify.REKEY_SA), NoncePayload(bytes(range(256))))


# --- what proves it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gateway_initiated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_request_of_the_mn_is_a_proof(
    family: tuple[Encr, int, Integ], gateway_initiated: bool
) -> None:
    sa = context(*family, gateway_initiated=gateway_initiated)
    assert proof.verify(sa, [request(sa, *PROBE)]) == NEXT
    assert proof.verify(sa, [request(sa, *REKEY, exchange=Exchange.CREATE_CHILD_SA)]) == NEXT
    assert proof.verify(sa, fragments(sa, *REKEY)) == NEXT


@pytest.mark.parametrize("expected", [0, 1, 0xFFFFFFFF])
def test_message_ids_begin_at_0_and_fill_32_bits(expected: int) -> None:
    sa = context(expected=expected)
    assert proof.verify(sa, [request(sa, mid=expected)]) == expected


def test_any_content_of_an_informational_will_do() -> None:
    sa = context()
    inside = (NotifyPayload(Notify.UPDATE_SA_ADDRESSES), NotifyPayload(Notify.COOKIE2, bytes(16)))
    for payloads in (PROBE, inside, (DeletePayload(1),)):  # type: ignore[arg-type]
        assert proof.verify(sa, [request(sa, *payloads)]) == NEXT


def test_fragments_come_in_any_order() -> None:
    sa = context()
    parts = fragments(sa, *REKEY)
    assert len(parts) == 3
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        assert proof.verify(sa, [parts[n] for n in order]) == NEXT


# --- what does not -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mid", [0, 1, NEXT - 2, NEXT - 1])
def test_a_request_that_was_answered_is_a_recording(mid: int) -> None:
    sa = context()
    with pytest.raises(ProofError, match="replay") as caught:
        proof.verify(sa, [request(sa, mid=mid)])
    assert caught.value.status is Status.NOT_ALLOWED


@pytest.mark.parametrize("mid", [NEXT + 1, 0xFFFFFFFF])
def test_a_request_that_cannot_be_next_may_be_asked_again(mid: int) -> None:
    sa = context()
    with pytest.raises(ProofError, match="not seen here yet") as caught:
        proof.verify(sa, [request(sa, mid=mid)])
    assert caught.value.status is Status.BUSY


def test_a_request_that_proved_it_once_proves_nothing_when_it_was_answered() -> None:
    sa = context()
    seen = request(sa)
    assert proof.verify(sa, [seen]) == NEXT
    with pytest.raises(ProofError):
        proof.verify(replace(sa, mid_responder=NEXT + 1), [seen])


def _no_sk(sa: IkeContext) -> bytes:
    header = IkeHeader(*sa.spis, Exchange.INFORMATIONAL, NEXT, True, False)
    return header.serialize()


WRONG: dict[str, Callable[[IkeContext], list[bytes]]] = {
    "nothing": lambda sa: [],
    "empty": lambda sa: [b""],
    "too short": lambda sa: [request(sa)[:20]],
    "no SK": lambda sa: [_no_sk(sa)],
    "own direction": lambda sa: [request(sa, by_mn=False)],
    "own direction, as if the MN's": lambda sa: [_flipped(request(sa, by_mn=False), 19, 0x08)],
    "a response": lambda sa: [request(sa, response=True)],
    "a response, as if a request": lambda sa: [_flipped(request(sa, response=True), 19, 0x20)],
    "IKE_AUTH": lambda sa: [request(sa, exchange=Exchange.IKE_AUTH)],
    "IKE_INTERMEDIATE": lambda sa: [request(sa, exchange=Exchange.IKE_INTERMEDIATE)],
    "another exchange": lambda sa: [request(sa, exchange=Exchange(200))],
    "IKEv1": lambda sa: [_flipped(request(sa), 17, 0x30)],
    "another SPI": lambda sa: [_flipped(request(sa), 9, 1)],
    "damaged": lambda sa: [_flipped(request(sa), -1, 1)],
    "another's keys": lambda sa: [request(_other_keys(sa))],
    "with the marker": lambda sa: [add_marker(request(sa), sa.local, sa.remote)],
    "a message too many": lambda sa: [request(sa), request(sa)],
    "a fragment missing": lambda sa: fragments(sa, *REKEY)[:-1],
    "a fragment too many": lambda sa: [*fragments(sa, *REKEY), fragments(sa, *REKEY)[0]],
    "a fragment damaged": lambda sa: [*fragments(sa, *REKEY)[:2], _flipped(fragments(sa, *REKEY)[2], -1, 1)],
    "fragments of two messages": lambda sa: [
        fragments(sa, *REKEY)[0],
        fragments(sa, *REKEY, mid=NEXT + 1)[1],
    ],
    "fragments cut in two ways": lambda sa: [
        *fragments(sa, *REKEY)[:2],
        *fragments(sa, *REKEY, size=150)[1:],
    ],
    "65 datagrams": lambda sa: [request(sa)] * 65,
}


def _flipped(datagram: bytes, at: int, bits: int) -> bytes:
    changed = bytearray(datagram)
    changed[at] ^= bits
    return bytes(changed)


def _other_keys(sa: IkeContext) -> IkeContext:
    return replace(sa, generations=(replace(sa.current, secret=Secret(b"somebody else's")),))


@pytest.mark.parametrize("what", WRONG)
def test_anything_else_is_refused(what: str) -> None:
    for sa in (context(), context(gateway_initiated=True), context(Encr.AES_CBC, 128, Integ.HMAC_SHA1_96)):
        with pytest.raises(ProofError) as caught:
            proof.verify(sa, WRONG[what](sa))
        assert caught.value.status is Status.NOT_ALLOWED


def test_every_damaged_octet_is_noticed() -> None:
    sa = context()
    good = request(sa, *REKEY[:1])
    for at in range(len(good)):
        if at == 17:
            continue  # the minor version, in the low half: covered by the ICV like all else, tried below
        with pytest.raises(RefusedError):
            proof.verify(sa, [_flipped(good, at, 0x01)])
    with pytest.raises(ProofError):
        proof.verify(sa, [_flipped(good, 17, 0x01)])


def test_an_sa_with_unknown_algorithms_is_refused() -> None:
    sa = context()
    strange = replace(sa, generations=(replace(sa.current, encr=Encr(99)),))
    with pytest.raises(RefusedError) as caught:
        proof.verify(strange, [request(sa)])
    assert caught.value.status is Status.ALGORITHM


def test_no_error_shows_octets_of_the_message() -> None:
    sa = context()
    for make in WRONG.values():
        with pytest.raises(ProofError) as caught:
            proof.verify(sa, make(sa))
        shown = str(caught.value) + caught.value.hint + repr(caught.value)
        assert not any(datagram.hex() in shown for datagram in make(sa) if datagram)


# --- blocks ------------------------------------------------------------------------------------------------


def sent(blocks: tuple[ContextDataBlock, ...]) -> list[ContextDataBlock]:
    """The blocks as the other gateway reads them: padded."""
    return [replace(b, data=b.data + bytes(b.size - 4 - len(b.data))) for b in blocks]


def test_layout() -> None:
    (block,) = proof.encode([b"one", b"three"])
    assert block.fpt is Fpt.PROOF
    assert block.data == b"\0\3one\0\5three"
    assert proof.decode([replace(block, data=block.data + bytes(4))]) == (b"one", b"three")


@pytest.mark.parametrize("sizes", [(1,), (2034,), (2035,), (2036,), (4070,), (1500,) * 8, (5000, 1, 5000)])
def test_datagrams_there_and_back(sizes: tuple[int, ...]) -> None:
    datagrams = tuple(bytes([n + 1]) * size for n, size in enumerate(sizes))
    blocks = proof.encode(datagrams)
    assert all(len(block.data) == MAX_BLOCK_DATA for block in blocks[:-1])
    other = ContextDataBlock(Fpt.IKEV2_SA, b"".join(SPIS))
    assert proof.decode([other, *sent(blocks)]) == datagrams


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=5))
def test_any_datagrams_there_and_back(datagrams: list[bytes]) -> None:
    assert proof.decode(sent(proof.encode(datagrams))) == tuple(datagrams)


def test_a_message_without_proof() -> None:
    assert proof.decode([]) == ()
    assert proof.decode([ContextDataBlock(Fpt.IKEV2_SA, b"".join(SPIS))]) == ()


@pytest.mark.parametrize(
    "datagrams", [[], [b""], [b"x", b""], [b"x"] * 65, [bytes(9000), bytes(9000)], [bytes(16385)]]
)
def test_what_is_no_message_is_not_sent(datagrams: list[bytes]) -> None:
    with pytest.raises(UsageError):
        proof.encode(datagrams)


@pytest.mark.parametrize(
    "blocks",
    [
        [ContextDataBlock(Fpt.PROOF)],
        [ContextDataBlock(Fpt.PROOF, bytes(4))],
        [ContextDataBlock(Fpt.PROOF, b"\0\5abcd")],
        [ContextDataBlock(Fpt.PROOF, b"\0\1a\0\0\0\0\1")],
        [ContextDataBlock(Fpt.PROOF, b"\0\1a" + bytes(10))],
        [ContextDataBlock(Fpt.PROOF, b"\0\1a\0", presence=1)],
        [ContextDataBlock(Fpt.PROOF, b"\0\1a\0"), ContextDataBlock(Fpt.PROOF, b"\0\1a\0")],
        [ContextDataBlock(Fpt.PROOF, (b"\0\1a" * 65).ljust(200, b"\0"))],
        [
            ContextDataBlock(Fpt.PROOF, (b"\x50\0" + bytes(20480))[n : n + 2036])
            for n in range(0, 20482, 2036)
        ],
    ],
)
def test_wrong_blocks_are_wire_errors(blocks: list[ContextDataBlock]) -> None:
    with pytest.raises(WireError):
        proof.decode(blocks)


def test_spis_of() -> None:
    sa = context()
    assert proof.spis_of(request(sa)) == SPIS
    with pytest.raises(WireError):
        proof.spis_of(bytes(15))
