"""ikev2.py and payloads.py: octets there and back, the table of exchanges, fragments, the window."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from ikectx.errors import StateError, UsageError, WireError
from ikectx.numbers import Encr, Exchange, Integ, KeMethod, Notify, Payload, Protocol
from ikectx.sa.context import Endpoint, Secret, TrafficSelector
from ikectx.sa.keys import SealKey, iv_length, seal, sealed_length
from ikectx.wire import ikev2
from ikectx.wire.ikev2 import IkeHeader, IkeMessage, RequestWindow, RetransmitPolicy
from ikectx.wire.payloads import (
    AnyPayload,
    DeletePayload,
    KePayload,
    NoncePayload,
    NotifyPayload,
    Proposal,
    RawPayload,
    RawSelector,
    SaPayload,
    Transform,
    TransformType,
    TsPayload,
    parse_payloads,
    serialize_payloads,
)

SELF_MADE = json.loads(
    (Path(__file__).parent.parent.parent / "vectors" / "sealed_self_made.json").read_text()
)["cases"]
KEY = SealKey(Encr.AES_GCM_16, Integ.NONE, Secret(bytes(range(36))))
HEADER = IkeHeader(b"initiatr", b"responde", Exchange.INFORMATIONAL, 5, initiator=True, response=False)
INSIDE = (NotifyPayload(Notify.UPDATE_SA_ADDRESSES), NotifyPayload(Notify.COOKIE2, bytes(range(16))))

ESP_PROPOSAL = Proposal(
    1,
    Protocol.ESP,
    (
        Transform.encr(Encr.AES_CBC, 256),
        Transform(TransformType.INTEG, Integ.HMAC_SHA2_256_128),
        Transform(TransformType.KE, KeMethod.CURVE_25519),
        Transform(TransformType.ESN, 0),
        Transform(TransformType(250), 7, ((99, b"long"),)),
    ),
    spi=b"\xc0\x01\x02\x03",
)
V4 = TrafficSelector(ip_address("10.1.0.0"), ip_address("10.1.255.255"), 17, 5000, 5001)
V6 = TrafficSelector(ip_address("2001:db8::"), ip_address("2001:db8::ffff"))

SAMPLES: list[AnyPayload] = [
    *INSIDE,
    NotifyPayload(Notify.REKEY_SA, protocol=Protocol.ESP, spi=b"\1\2\3\4"),
    NotifyPayload(Notify(50000), b"unknown status"),
    DeletePayload(Protocol.IKE),
    DeletePayload(Protocol.ESP, (b"\1\2\3\4", b"\5\6\7\x08")),
    NoncePayload(bytes(32)),
    KePayload(KeMethod.CURVE_25519, bytes(32)),
    SaPayload(
        (ESP_PROPOSAL, replace(ESP_PROPOSAL, number=2, transforms=(Transform.encr(Encr.CHACHA20_POLY1305),)))
    ),
    TsPayload(Payload.TSI, (V4, V6, RawSelector(9, 0, b"mystery"))),
    TsPayload(Payload.TSR, ()),
    RawPayload(Payload.VENDOR, b"vendor"),
    RawPayload(Payload(200), b"", critical=True),
]


def sealed(payloads: tuple[AnyPayload, ...] = INSIDE, header: IkeHeader = HEADER) -> bytes:
    return ikev2.seal_message(KEY, header, payloads, secrets.token_bytes(8))


# --- octets ------------------------------------------------------------------------------------------------


def test_header_octets() -> None:
    octets = HEADER.serialize()
    assert octets == b"initiatrresponde" + bytes.fromhex("00 20 25 08 00000005 0000001c")
    assert IkeHeader.parse(octets) == HEADER
    answer = replace(HEADER, initiator=False, response=True)
    assert answer.serialize()[19] == 0x20


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o[:27],
        lambda o: o + b"x",
        lambda o: o[:17] + b"\x10" + o[18:],
        lambda o: o[:24] + bytes(4),
        lambda o: b"",
    ],
)
def test_a_wrong_header_is_a_wire_error(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(WireError):
        IkeHeader.parse(change(HEADER.serialize()))


def test_notify_and_proposal_octets() -> None:
    # written out by hand from RFC 7296, 3.10 and 3.3
    notify = NotifyPayload(Notify.REKEY_SA, b"", Protocol.ESP, b"\1\2\3\4")
    assert notify.serialize() == bytes.fromhex("03 04 4009 01020304")
    small = Proposal(
        1, Protocol.ESP, (Transform.encr(Encr.AES_GCM_16, 256), Transform(TransformType.ESN, 0)), b"SPI!"
    )
    expected = "00000020 01030402 53504921 0300000c 01000014 800e0100 00000008 05000000"
    assert SaPayload((small,)).serialize() == bytes.fromhex(expected)


@pytest.mark.parametrize("payload", SAMPLES, ids=lambda p: p.type.name)
def test_each_payload_there_and_back(payload: AnyPayload) -> None:
    first, octets = serialize_payloads([payload])
    assert parse_payloads(first, octets) == (payload,)


def test_a_chain_there_and_back_and_cut_short() -> None:
    first, octets = serialize_payloads(SAMPLES)
    assert parse_payloads(first, octets) == tuple(SAMPLES)
    for end in range(len(octets)):
        with pytest.raises(WireError):
            parse_payloads(first, octets[:end])
    with pytest.raises(WireError):
        parse_payloads(first, octets + b"\0")
    assert serialize_payloads([]) == (Payload.NONE, b"")
    assert parse_payloads(Payload.NONE, b"") == ()


def test_key_length_attribute() -> None:
    assert ESP_PROPOSAL.transforms[0].key_bits == 256
    assert ESP_PROPOSAL.transforms[1].key_bits == 0


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Payload.NONCE, bytes(15)),
        (Payload.NONCE, bytes(257)),
        (Payload.DELETE, bytes.fromhex("03 04 0002 01020304")),
        (Payload.DELETE, bytes.fromhex("01 00 0001")),
        (Payload.NOTIFY, bytes.fromhex("03 04 4009 0102")),
        (Payload.SA, b""),
        (Payload.SA, bytes.fromhex("00000009 01030001 ff")),
        (Payload.SA, bytes.fromhex("02000010 01030001 00000008 05000000")),
        (Payload.SA, bytes.fromhex("00000010 01030002 00000008 05000000")),
        (Payload.TSI, bytes.fromhex("02000000 07000010 0000ffff 0a000000 0a0000ff")),
        (Payload.TSI, bytes.fromhex("01000000 07000014 0000ffff 0a000000 0a0000ff 00000000")),
        (Payload.SK, bytes(40)),
    ],
)
def test_wrong_payloads_are_wire_errors(kind: Payload, body: bytes) -> None:
    octets = bytes([0, 0]) + (len(body) + 4).to_bytes(2) + body
    with pytest.raises(WireError):
        parse_payloads(kind, octets)


def test_endless_chains_are_refused() -> None:
    with pytest.raises(WireError):
        parse_payloads(Payload.VENDOR, bytes.fromhex("2b000004") * 1000)


# --- sealed messages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SELF_MADE, ids=lambda c: f"{c['encr']}-{c['bits']}-{c['integ']}")
def test_self_made_messages_stay_as_they_were(case: dict[str, str]) -> None:
    raw = {name: bytes.fromhex(case[name]) for name in ("encr_key", "integ_key", "iv", "datagram")}
    key = SealKey(Encr[case["encr"]], Integ[case["integ"]], Secret(raw["encr_key"]), Secret(raw["integ_key"]))
    message = ikev2.open_message(key, raw["datagram"])
    assert message.payloads == INSIDE
    assert len(raw["iv"]) == iv_length(key.encr)
    assert ikev2.seal_message(key, HEADER, INSIDE, raw["iv"]) == raw["datagram"]


def test_an_empty_informational() -> None:
    message = ikev2.open_message(KEY, sealed(()))
    assert message.payloads == ()
    assert message.header == replace(HEADER, next_payload=Payload.SK, length=28 + 4 + 8 + 1 + 16)


def test_every_octet_of_a_message_is_protected() -> None:
    octets = sealed()
    for place in range(len(octets)):
        damaged = octets[:place] + bytes([octets[place] ^ 0x40]) + octets[place + 1 :]
        with pytest.raises(WireError):
            ikev2.open_message(KEY, damaged)


def test_nothing_stands_in_front_of_sk() -> None:
    first, body = serialize_payloads(INSIDE)
    clear = replace(HEADER, next_payload=first, length=28 + len(body)).serialize() + body
    with pytest.raises(WireError):
        ikev2.open_message(KEY, clear)


def test_lookups_in_a_message() -> None:
    message = IkeMessage(HEADER, (*INSIDE, NotifyPayload(Notify.UNACCEPTABLE_ADDRESSES)))
    assert message.notifies(Notify.COOKIE2) == [INSIDE[1]]
    assert message.error == NotifyPayload(Notify.UNACCEPTABLE_ADDRESSES)
    assert IkeMessage(HEADER, INSIDE).error is None
    assert IkeMessage(HEADER, (RawPayload(Payload(200), b""),)).critical is None
    assert IkeMessage(HEADER, (RawPayload(Payload.VENDOR, b"", critical=True),)).critical is None
    unknown = RawPayload(Payload(200), b"", critical=True)
    assert IkeMessage(HEADER, (unknown,)).critical == unknown


@pytest.mark.parametrize("exchange", list(ikev2.EXCHANGES))
@pytest.mark.parametrize("response", [False, True])
def test_every_cell_of_the_table_of_exchanges(exchange: Exchange, response: bool) -> None:
    rule = ikev2.EXCHANGES[exchange]
    allowed = rule.response if response else rule.request
    header = replace(HEADER, exchange=exchange, response=response)
    for kind in Payload:
        message = IkeMessage(header, (RawPayload(kind, b""),))
        if kind in allowed:
            message.check()
        else:
            with pytest.raises(WireError):
                message.check()
    IkeMessage(header, (RawPayload(Payload(200), b""),)).check()


def test_an_unknown_exchange_is_refused() -> None:
    with pytest.raises(WireError):
        ikev2.open_message(KEY, sealed(header=replace(HEADER, exchange=Exchange(240))))


# --- fragments ---------------------------------------------------------------------------------------------


def fragments(payloads: tuple[AnyPayload, ...], total: int, header: IkeHeader = HEADER) -> list[bytes]:
    """RFC 7383, 2.5: so many parts of one size; `seal_fragments` would fill them."""
    first, inner = serialize_payloads(payloads)
    step = -(-len(inner) // total)
    made = []
    for number in range(1, total + 1):
        part = inner[(number - 1) * step : number * step]
        size = 8 + sealed_length(KEY, len(part))
        full = replace(header, next_payload=Payload.SKF, length=28 + size)
        kind = first if number == 1 else Payload.NONE
        head = full.serialize() + bytes([kind, 0]) + size.to_bytes(2) + number.to_bytes(2) + total.to_bytes(2)
        made.append(head + seal(KEY, head, part, secrets.token_bytes(8)))
    return made


def test_fragments_in_any_order_with_duplicates() -> None:
    one, two, three = fragments(INSIDE, 3)
    assembly = ikev2.Reassembly(KEY)
    assert [assembly.add(part) for part in (three, one, three, one)] == [None] * 4
    message = assembly.add(two)
    assert message is not None
    assert message.payloads == INSIDE
    whole = assembly.add(sealed())
    assert whole is not None
    assert whole.payloads == INSIDE


def test_a_forged_fragment_changes_nothing() -> None:
    one, two = fragments(INSIDE, 2)
    assembly = ikev2.Reassembly(KEY)
    assert assembly.add(one) is None
    with pytest.raises(WireError):
        assembly.add(two[:-1] + bytes([two[-1] ^ 1]))
    assert assembly.add(two) is not None


def test_more_fragments_replace_and_fewer_are_ignored() -> None:
    # RFC 7383, 2.6: the sender may split smaller after a loss
    coarse, fine = fragments(INSIDE, 2), fragments(INSIDE, 4)
    assembly = ikev2.Reassembly(KEY)
    assembly.add(coarse[0])
    assert [assembly.add(fine[n]) for n in range(3)] == [None] * 3
    assert assembly.add(coarse[1]) is None
    assert assembly.add(fine[3]) is not None


def test_fragments_of_two_messages_do_not_mix() -> None:
    old, new = fragments(INSIDE, 2), fragments(INSIDE, 2, replace(HEADER, message_id=6))
    assembly = ikev2.Reassembly(KEY)
    assert assembly.add(old[0]) is None
    assert assembly.add(new[1]) is None
    message = assembly.add(new[0])
    assert message is not None
    assert message.header.message_id == 6


def test_a_lone_fragment_is_no_message_and_its_numbers_are_checked() -> None:
    one = fragments(INSIDE, 2)[0]
    with pytest.raises(WireError):
        ikev2.open_message(KEY, one)
    for number, total in ((0, 2), (3, 2), (1, 0), (1, 65535)):
        wrong = one[:32] + number.to_bytes(2) + total.to_bytes(2) + one[36:]
        with pytest.raises(WireError, match="fragment"):
            ikev2.Reassembly(KEY).add(wrong)


@pytest.mark.parametrize("encr", [Encr.AES_GCM_16, Encr.AES_CBC, Encr.CHACHA20_POLY1305])
@pytest.mark.parametrize("limit", [100, 128, 200, 1000])
def test_a_sealed_message_is_cut_to_the_limit(encr: Encr, limit: int) -> None:
    size = {Encr.AES_CBC: 16, Encr.AES_GCM_16: 20, Encr.CHACHA20_POLY1305: 36}[encr]
    integ = Integ.HMAC_SHA2_256_128 if encr is Encr.AES_CBC else Integ.NONE
    key = SealKey(encr, integ, Secret(bytes(range(size))), Secret(bytes(32 * (encr is Encr.AES_CBC))))
    payloads = (*INSIDE, RawPayload(Payload.VENDOR, bytes(range(200))))
    ivs = secrets.token_bytes(64 * iv_length(encr))
    parts = ikev2.seal_fragments(key, HEADER, payloads, ivs, limit)
    assert all(len(part) <= limit for part in parts)
    assert (len(parts) == 1) == (limit == 1000)
    assert {IkeHeader.parse(part).next_payload for part in parts} == {
        Payload.SK if limit == 1000 else Payload.SKF
    }
    # no room is given away, and each has an IV of its own
    assert len({part[36:44] for part in parts}) == len(parts)
    assembly = ikev2.Reassembly(key)
    *others, last = [assembly.add(part) for part in reversed(parts)]
    assert others == [None] * len(others)
    assert last is not None
    assert last.payloads == payloads
    if len(parts) > 1:
        assert [part[28] for part in parts] == [Payload.NOTIFY] + [0] * (len(parts) - 1)
        with pytest.raises(UsageError):
            ikev2.seal_fragments(key, HEADER, payloads, ivs[: iv_length(encr)], limit)


def test_without_a_limit_nothing_is_cut() -> None:
    iv = bytes(8)
    assert ikev2.seal_fragments(KEY, HEADER, INSIDE, iv) == [ikev2.seal_message(KEY, HEADER, INSIDE, iv)]
    whole = ikev2.seal_message(KEY, HEADER, INSIDE, iv)
    assert ikev2.seal_fragments(KEY, HEADER, INSIDE, iv, len(whole)) == [whole]
    assert len(ikev2.seal_fragments(KEY, HEADER, INSIDE, bytes(16), len(whole) - 1)) == 2
    with pytest.raises(UsageError):
        ikev2.seal_fragments(KEY, HEADER, INSIDE, bytes(800), 60)
    with pytest.raises(WireError):
        ikev2.seal_fragments(KEY, HEADER, (RawPayload(Payload.VENDOR, bytes(9000)),), bytes(8000), 100)


# --- NAT and markers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "packed"), [("192.0.2.1", "c0000201"), ("2001:db8::1", "20010db8" + "0" * 23 + "1")]
)
def test_nat_detection_hash(address: str, packed: str) -> None:
    octets = b"initiatrresponde" + bytes.fromhex(packed) + bytes.fromhex("1194")
    got = ikev2.nat_detection_hash(b"initiatr", b"responde", Endpoint.of(address, 4500))
    assert got == hashlib.sha1(octets).digest()


def test_marker() -> None:
    gateway, node, old = (
        Endpoint.of("192.0.2.1", 4500),
        Endpoint.of("192.0.2.9", 40001),
        Endpoint.of("192.0.2.9"),
    )
    assert ikev2.add_marker(b"ike", gateway, node) == b"\0\0\0\0ike"
    assert ikev2.strip_marker(b"\0\0\0\0ike", gateway, node) == b"ike"
    assert ikev2.add_marker(b"ike", Endpoint.of("192.0.2.1"), old) == b"ike"
    assert ikev2.strip_marker(b"ike", Endpoint.of("192.0.2.1"), old) == b"ike"
    for other in (b"\xff", b"\xc0\0\0\1esp", b""):
        with pytest.raises(WireError):
            ikev2.strip_marker(other, gateway, node)


# --- the window --------------------------------------------------------------------------------------------


def test_retransmissions_repeat_the_octets_at_growing_intervals() -> None:
    window = RequestWindow(7, RetransmitPolicy(initial=0.5, factor=2, tries=3))
    window.request(b"request 7")
    sent, now = [], 100.0
    while window.pending:
        sent += [(now, octets) for octets in window.to_send(now)]
        assert window.to_send(now) == []
        due = window.next_timer()
        assert due is not None
        assert window.handle_timer(due - 0.01)
        now = due
        alive = window.handle_timer(now)
    assert sent == [(100.0, b"request 7"), (100.5, b"request 7"), (101.5, b"request 7")]
    assert not alive
    assert (now, window.next_id, window.next_timer()) == (103.5, 8, None)


def test_a_response_ends_its_request_only() -> None:
    window = RequestWindow(7)
    assert not window.response(7)
    window.request(b"request 7")
    with pytest.raises(StateError):
        window.request(b"another")
    window.to_send(0)
    assert not window.response(6)
    assert not window.response(8)
    assert window.response(7)
    assert not window.response(7)
    assert (window.pending, window.next_id, window.next_timer(), window.to_send(9)) == (False, 8, None, [])
    assert window.handle_timer(1000)


# --- foreign octets ----------------------------------------------------------------------------------------
