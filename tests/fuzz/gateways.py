"""What other gateways and mobile nodes send in CXTP."""

from __future__ import annotations

import contextlib

from ikectx.errors import ProofError, WireError
from ikectx.numbers import Fpt, IdType, Protocol, Status
from ikectx.sa.context import Identity
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from ikectx.wire import cbor, cookies, packet_proof
from ikectx.wire.cookies import with_cookie
from ikectx.wire.cxtp import (
    ContextDataBlock,
    Ctaa,
    Ctar,
    Ctc,
    Ctd,
    Ctdr,
    CtReq,
    Pctd,
    StreamDecoder,
    parse_message,
)
from ikectx.wire.identity import allows
from ikectx.wire.profile import decode, decode_final, decode_verdicts, encode, encode_final, encode_verdicts
from ikectx.wire.reasons import encode_reasons, with_reasons
from ikectx.wire.spis import NewSpi, parse_new_spis, serialize_new_spis
from ikectx.wire.tokens import Purpose, find, make_ctar, open_ctaa, seal_ctaa
from ikectx.wire.whereabouts import What, Whereabouts, notice, parse_notice
from tests.ikectx.node import test_mobility as mobility
from tests.ikectx.wire import test_packet_proof as proofs
from tests.profile_samples import RICH, TRANSFER, TYPICAL, TYPICAL_FINAL
from tests.vector_text import read_vectors

from .target import ENDS, KEY, MN, NSG, Target

CTAR = make_ctar(
    KEY,
    mn=MN,
    router=NSG,
    sequence=7,
    purpose=Purpose.ARRIVE,
    spis=TYPICAL.spis,
    psg="psg",
    nsg="nsg",
    expiry=1_800_000_000,
    care_of=ENDS[0],
)
CTAA = seal_ctaa(KEY, MN, 7, purpose=Purpose.ARRIVE, expects=3)
NOTICE, _ = notice([Whereabouts(SaName(bytes(range(8)), bytes(range(8, 16))), 3, What.MOVED, "nsg")] * 2)
REFUSED = Verdict(Fpt.SAD, Status.NOT_ALLOWED, "SPI 5 is reserved")
COOKIE = with_cookie(CTAR, ContextDataBlock(Fpt.COOKIE, bytes(12))).serialize()
MESSAGES = tuple(
    one.serialize()
    for one in (
        CTAR,
        CTAA,
        NOTICE,
        Pctd(MN, encode(TYPICAL, transfer=TRANSFER)),
        Ctd(MN, encode_final(TYPICAL_FINAL, TRANSFER.transfer_id)),
        CtReq(MN, 7, CTAR.token, CTAR.blocks),
        Ctc(MN),
        Ctdr(MN, encode_verdicts([REFUSED]), False),
    )
)
RECORDED = tuple(read_vectors("cxtp_messages.txt").values())
PROFILES = tuple(
    Pctd(MN, blocks).serialize()
    for blocks in (
        encode(TYPICAL, transfer=TRANSFER),
        encode(RICH, transfer=TRANSFER),
        encode_final(TYPICAL_FINAL, TRANSFER.transfer_id),
    )
)
PROVEN = proofs.context()
PROOF = proofs.request(PROVEN)


def message_of(octets: bytes) -> None:
    """What is read can be written, and is the same when it is read again."""
    message = parse_message(octets)
    assert parse_message(message.serialize()) == message
    if isinstance(message, Ctdr):
        assert all(verdict.detail.isprintable() for verdict in decode_verdicts(message.statuses))


def stream_of(octets: bytes) -> None:
    decoder = StreamDecoder()
    for at in range(0, len(octets), 7):
        decoder.feed(octets[at : at + 7])


def token_of(octets: bytes) -> None:
    message = parse_message(octets)
    if isinstance(message, Ctar | CtReq):
        find(message.blocks)
    if isinstance(message, Ctaa):
        open_ctaa(KEY, message, 7, purpose=Purpose.ARRIVE)


def profile_of(octets: bytes) -> None:
    message = parse_message(octets)
    if isinstance(message, Pctd | Ctd):
        with contextlib.suppress(WireError):
            context, transfer = decode(message.blocks)
            assert decode(encode(context, transfer=transfer)) == (context, transfer)
        with contextlib.suppress(WireError):
            final, transfer_id = decode_final(message.blocks)
            assert decode_final(encode_final(final, transfer_id)) == (final, transfer_id)


def notice_of(octets: bytes) -> None:
    message = parse_message(octets)
    if isinstance(message, Ctd):
        parse_notice(message)


def reason_of(octets: bytes) -> None:
    """Words that cannot be read are passed over."""
    for verdict in with_reasons([REFUSED], [ContextDataBlock(Fpt.REASON, octets)]):
        assert verdict.status is REFUSED.status and verdict.detail.isprintable()


def new_spis_of(octets: bytes) -> None:
    found = parse_new_spis(octets)
    assert parse_new_spis(serialize_new_spis(found)) == found


def proof_of(octets: bytes) -> None:
    """As a block of datagrams, and as the one datagram."""
    with contextlib.suppress(WireError):
        packet_proof.decode([ContextDataBlock(Fpt.PROOF, octets)])
    packet_proof.verify(PROVEN, [octets])


def cookie_of(octets: bytes) -> None:
    """Who asks for a cookie has read nothing but the fixed part."""
    fixed = cookies.fixed_part(octets)
    if not fixed:
        return
    cookie, rest = cookies.split(octets, fixed)
    assert len(cookie) + len(rest) <= len(octets)
    answer = cookies.ask(octets, fixed, bytes(12))
    assert len(answer) <= len(octets)
    if answer:
        assert cookies.asked(Ctaa.parse(answer)) is not None


def cbor_of(octets: bytes) -> None:
    cbor.loads(octets)


def answer_to_handover(octets: bytes) -> None:
    machine = mobility.handover()
    machine.to_send(0)
    machine.receive(octets, mobility.NSG.cxtp, 0)


KINDS = (
    IdType.IPV4_ADDR,
    IdType.FQDN,
    IdType.RFC822_ADDR,
    IdType.IPV6_ADDR,
    IdType.DER_ASN1_DN,
    IdType.KEY_ID,
)
PATTERNS = ("*@example.org", "C=CH, O=*, CN=mn", "10.0.0.0/8", "%any", "^.*@example$")


def identity_of(octets: bytes) -> None:
    """The first octet chooses its type. It prints in one line that steers no terminal."""
    identity = Identity(KINDS[octets[0] % len(KINDS)] if octets else IdType.KEY_ID, octets[1:])
    for pattern in PATTERNS:
        allows(pattern, identity)
    assert str(identity).isprintable()


TARGETS = {
    "CXTP message": Target(message_of, MESSAGES + RECORDED),
    "CXTP stream": Target(stream_of, MESSAGES),
    "CXTP token": Target(token_of, MESSAGES[:2] + MESSAGES[5:6]),
    "CXTP cookie": Target(cookie_of, (COOKIE, CTAR.serialize()), ()),
    "CXTP answer to a mobile node": Target(
        answer_to_handover,
        tuple(mobility.answer(one, mobility.BUSY) for one in (Purpose.ANNOUNCE, Purpose.ARRIVE)),
        (),
    ),
    "CBOR": Target(cbor_of, (cbor.dumps([1, b"x" * 20, [True, {1: 2}]]),)),
    "profile": Target(profile_of, PROFILES),
    "whereabouts": Target(notice_of, (NOTICE.serialize(),)),
    "reason": Target(reason_of, tuple(one.data for one in encode_reasons([REFUSED])), ()),
    "new SPIs": Target(
        new_spis_of, (serialize_new_spis([NewSpi(Protocol.ESP, b"\xc1\0\0\1", b"\xc9\0\0\1")]),)
    ),
    "proof": Target(proof_of, (PROOF,), (ProofError,)),
    "identity": Target(
        identity_of,
        (
            b"\4\x30\x81\x8a0\x0b1\x090\x07\x06\x03U\x04\x03\x0c\x02mn",
            b"\1mn.example",
            b"\0\x0a\0\0\1",
            b"\2a@b.example",
        ),
        (),
    ),
}
