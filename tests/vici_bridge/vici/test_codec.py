"""The VICI codec: messages and packets, against the documentation and the official package."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vici.protocol import FiniteStream
from vici.protocol import Message as PackageMessage

from ikectx.errors import WireError
from ikectx.sa.context import Secret
from vici_bridge.vici.client import as_text
from vici_bridge.vici.codec import (
    MAX_PACKET,
    MAX_VALUE,
    Deframer,
    Packet,
    PacketType,
    json_of,
    parse_message,
    serialize_message,
    with_json,
)

# The example of the protocol description in strongSwan's src/libcharon/plugins/vici/README.md:
# key1 = value1, section1 { sub-section { key2 = value2 }, list1 = item1, item2 }
DOCUMENTED = bytes.fromhex(
    "03 04 6b657931 0006 76616c756531"
    "01 08 73656374696f6e31"
    "01 0b 7375622d73656374696f6e"
    "03 04 6b657932 0006 76616c756532"
    "02"
    "04 05 6c69737431 05 0005 6974656d31 05 0005 6974656d32 06"
    "02"
)
TREE = {
    "key1": "value1",
    "section1": {"sub-section": {"key2": "value2"}, "list1": ["item1", "item2"]},
}

texts = st.text(st.characters(codec="utf-8"), max_size=40)
keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
trees = st.recursive(
    st.dictionaries(keys, st.one_of(texts, st.lists(texts, max_size=4)), max_size=4),
    lambda inner: st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)


def test_documented_message() -> None:
    assert parse_message(DOCUMENTED) == TREE
    assert serialize_message(TREE) == DOCUMENTED
    assert PackageMessage.serialize(TREE) == DOCUMENTED


@given(trees)
@settings(max_examples=150, deadline=None)
def test_round_trip_and_agreement_with_the_package(tree: dict[str, Any]) -> None:
    data = serialize_message(tree)
    assert parse_message(data) == tree
    assert PackageMessage.serialize(tree) == data
    assert as_text(PackageMessage.deserialize(FiniteStream(data))) == tree
    assert parse_message(data, foreign=True) == tree


@given(st.dictionaries(keys, st.one_of(st.binary(max_size=20), st.lists(st.binary(max_size=9))), max_size=4))
@settings(max_examples=150, deadline=None)
def test_foreign_text_is_read_as_the_package_reads_it(tree: dict[str, Any]) -> None:
    data = PackageMessage.serialize(tree)
    assert parse_message(data, foreign=True) == as_text(tree)


@pytest.mark.parametrize(
    "octets, complaint",
    [
        ("02", "not started"),
        ("01 01 61", "does not end"),
        ("07", "element 7"),
        ("05 0001 61", "element 5"),
        ("04 01 61 03", "in a list"),
        ("03 00 0000", "empty name"),
        ("03 01 61 0005 61", "5 octets, 1 are left"),
        ("03 01 ff 0000", "not UTF-8"),
        ("03 01 61 0001 ff", "not UTF-8"),
        ("03 01 61 0000 03 01 61 0000", "twice"),
        ("01 01 61" * 40, "deeply"),
    ],
)
def test_bad_messages(octets: str, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        parse_message(bytes.fromhex(octets))


@pytest.mark.parametrize(
    "tree, complaint",
    [
        ({"": "x"}, "empty"),
        ({"k" * 256: "x"}, "256"),
        ({"k": "x" * 65536}, "65536"),
        ({"k": Secret(b"key")}, "Secret"),
        ({"k": ["\ud800"]}, "Unicode"),
        ({"k": b"octets"}, "bytes"),
    ],
)
def test_messages_that_cannot_be_sent(tree: dict[str, Any], complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        serialize_message(tree)


def test_convenient_values() -> None:
    tree = {"yes": True, "no": False, "n": 7, "left-out": None, "list": (1, 2)}
    assert parse_message(serialize_message(tree)) == {"yes": "yes", "no": "no", "n": "7", "list": ["1", "2"]}


PACKETS = [
    Packet(PacketType.CMD_REQUEST, "version"),
    Packet(PacketType.CMD_REQUEST, "list-sas", DOCUMENTED),
    Packet(PacketType.CMD_RESPONSE, body=DOCUMENTED),
    Packet(PacketType.CMD_UNKNOWN),
    Packet(PacketType.EVENT_REGISTER, "log"),
    Packet(PacketType.EVENT_CONFIRM),
    Packet(PacketType.EVENT, "log", DOCUMENTED),
]


def test_deframer_whole_bytewise_and_with_a_tail() -> None:
    stream = b"".join(packet.framed() for packet in PACKETS)
    assert Deframer().receive(stream) == PACKETS
    slow = Deframer()
    got = [packet for at in range(len(stream)) for packet in slow.receive(stream[at : at + 1])]
    assert got == PACKETS
    tail = Deframer()
    assert tail.receive(stream + b"\0\0\0") == PACKETS
    assert tail.waiting == 3


@pytest.mark.parametrize(
    "octets",
    ["00000000", "00080001", "ffffffff", "00000001 08", "00000002 0000", "00000002 0261", "00000001 03"],
)
def test_deframer_refuses(octets: str) -> None:
    with pytest.raises(WireError):
        Deframer().receive(bytes.fromhex(octets))


def test_packet_limits() -> None:
    with pytest.raises(WireError, match="limit"):
        Packet(PacketType.CMD_RESPONSE, body=bytes(MAX_PACKET)).framed()
    with pytest.raises(WireError):
        Packet(PacketType.CMD_UNKNOWN, "name")


def test_json_in_pieces() -> None:
    small, large = {"a": 1}, [{"id": "ä" * 50, "n": n} for n in range(2000)]
    assert json_of(with_json(small, to="nsg")) == small
    message = with_json(large)
    assert len(message["json"]) > 1 and all(len(piece) <= MAX_VALUE for piece in message["json"])
    assert json_of(parse_message(serialize_message(message))) == large
    assert json_of({}) is None
    with pytest.raises(WireError):
        json_of({"json": "{"})
    with pytest.raises(WireError, match="Secret"):
        with_json({"key": Secret(b"k")})
