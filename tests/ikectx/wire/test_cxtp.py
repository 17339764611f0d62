"""CXTP messages against vectors made by hand, the stream, the token, and fuzz."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import WireError
from ikectx.numbers import Cxtp, Fpt, Status
from ikectx.wire.cxtp import (
    CTAA_BLOCKS,
    CTDR_BLOCKS,
    MAX_BLOCK_DATA,
    MESSAGES,
    ContextDataBlock,
    Ctaa,
    Ctar,
    Ctc,
    Ctd,
    Ctdr,
    CtReq,
    Message,
    Pctd,
    StatusBlock,
    StreamDecoder,
    TokenAlgorithm,
    compute_token,
    parse_message,
    size,
    verify_token,
)
from tests.vector_text import read_vectors

MN4 = ip_address("192.0.2.10")
MN6 = ip_address("2001:db8::a")
KEY = b"correct horse battery"
VECTORS = read_vectors("cxtp_messages.txt")

COOKIE = ContextDataBlock(Fpt.COOKIE, bytes.fromhex("2a0102030405060708090a0b"))
EXPECTED: dict[str, Message] = {
    "ctar-v4": Ctar(
        MN4,
        ip_address("198.51.100.2"),
        0x01020304,
        0x3B0778DC,
        (
            ContextDataBlock(Fpt.IKEV2_SA),
            ContextDataBlock(Fpt.MLD, bytes.fromhex("deadbeef00000000"), 0x80000001),
        ),
        acknowledge=True,
    ),
    "ctar-v6-all-contexts": Ctar(MN6, ip_address("2001:db8:1::2"), 0xFFFFFFFF, 0),
    "ctaa-v4": Ctaa(
        MN4, (StatusBlock(Fpt.SAD, Status.ESP_SPI_IN_USE), StatusBlock(Fpt.MLD, Status.BAD_CHECKSUM))
    ),
    "cookie-ctaa-v4": Ctaa(MN4, (), (COOKIE,)),
    "cookie-ctar-v4": Ctar(
        MN4,
        ip_address("198.51.100.2"),
        0x01020304,
        0x3B0778DC,
        (
            COOKIE,
            ContextDataBlock(Fpt.IKEV2_SA),
            ContextDataBlock(Fpt.MLD, bytes.fromhex("deadbeef00000000"), 0x80000001),
        ),
        acknowledge=True,
    ),
    "ctd-v4": Ctd(MN4, (ContextDataBlock(Fpt.IKEV2_SA, bytes.fromhex("a10001") + bytes(9)),), 123),
    "ctd-v6-no-ack": Ctd(MN6, (ContextDataBlock(Fpt(0xFF77), b"\1\2\3\4"),), 0xFFFFFFFF, acknowledge=False),
    "pctd-v4-push": Pctd(MN4, (ContextDataBlock(Fpt.PAD, b"abcd"),)),
    "pctd-v6-key": Pctd(
        MN6, (ContextDataBlock(Fpt.PAD, bytes(4)),), 5, TokenAlgorithm.HMAC_SHA1, b"0123456789"
    ),
    "ctdr-v4-complete": Ctdr(
        MN4, tuple(StatusBlock(f) for f in (Fpt.IKEV2_SA, Fpt.SAD, Fpt.SPD, Fpt.PAD)), complete=True
    ),
    "ctdr-v6-refused": Ctdr(
        MN6, (StatusBlock(Fpt.PAD, Status.NO_CONNECTION), StatusBlock(Fpt.SAD, Status(0xFE)))
    ),
    "ctc-v4": Ctc(MN4),
    "ctc-v6": Ctc(MN6),
    "ct-req-v4": CtReq(MN4, 0x01020304, 0, (ContextDataBlock(Fpt.IKEV2_SA),)),
}


def test_every_message_type_has_a_vector() -> None:
    assert EXPECTED.keys() == VECTORS.keys()
    assert {m.TYPE for m in EXPECTED.values()} == set(MESSAGES) == set(Cxtp)


@pytest.mark.parametrize("name", VECTORS)
def test_vector_is_read_and_written_back(name: str) -> None:
    message = parse_message(VECTORS[name])
    assert message == EXPECTED[name]
    assert message.serialize() == VECTORS[name]
    assert type(message).parse(VECTORS[name]) == message


@pytest.mark.parametrize("name", VECTORS)
def test_reserved_bits_are_ignored_and_zero_again(name: str) -> None:
    data = bytearray(VECTORS[name])
    data[1] |= 0x3F
    if name.startswith(("ctaa", "ctdr")):
        data[-1] = 0xFF  # the reserved octet of the last status
    if name == "ctd-v4":
        data[15] |= 0x7F  # the reserved bits of the block
    message = parse_message(bytes(data))
    assert message == EXPECTED[name]
    assert message.serialize() == VECTORS[name]


@pytest.mark.parametrize("name", VECTORS)
def test_every_truncation_and_extension_is_refused(name: str) -> None:
    data = VECTORS[name]
    for end in range(len(data)):
        with pytest.raises(WireError):
            parse_message(data[:end])
    with pytest.raises(WireError):
        parse_message(data + b"\0")
    # an honest length field does not help a field that is cut; what ends at a block's or status's
    # border is a shorter message
    for end in range(4, len(data)):
        cut = data[:2] + end.to_bytes(2) + data[4:end]
        with contextlib.suppress(WireError):
            assert len(parse_message(cut).serialize()) == end


@pytest.mark.parametrize(
    "data",
    [
        "21800008c000020a",  # version 2
        "10800008c000020a",  # type 0
        "18800008c000020a",  # type 8
        "16800003",  # length shorter than the header
        "16800007c00002",  # address cut
        "16000008c000020a",  # IPv6 without room for it
        "16800009c000020a00",  # CTC with a tail
        "15800009c000020aff",  # status cut
        "13c0000c00000000c000020a" + "ff010100",  # block longer than the message
        "13c0001000000000c000020aff010080",  # presence vector in a block of length 0
        "14c0001000000000c000020a0001ffff",  # key longer than the message
    ],
)
def test_bad_message(data: str) -> None:
    with pytest.raises(WireError):
        parse_message(bytes.fromhex(data))


def test_parse_of_another_type_is_refused() -> None:
    with pytest.raises(WireError, match="the message is a CTC"):
        Ctd.parse(VECTORS["ctc-v4"])


def test_block_sizes() -> None:
    assert ContextDataBlock(Fpt.SAD).size == 4
    assert ContextDataBlock(Fpt.SAD, b"1").size == 8
    assert ContextDataBlock(Fpt.SAD, b"12345").size == 16
    assert ContextDataBlock(Fpt.SAD, b"", 0).size == 8
    assert ContextDataBlock(Fpt.SAD, bytes(MAX_BLOCK_DATA)).size == 2040
    with pytest.raises(ValueError, match="too many"):
        ContextDataBlock(Fpt.SAD, bytes(MAX_BLOCK_DATA + 1))
    with pytest.raises(ValueError, match="too many"):
        ContextDataBlock(Fpt.SAD, bytes(MAX_BLOCK_DATA), 0)


def test_message_too_long() -> None:
    block = ContextDataBlock(Fpt.SAD, bytes(MAX_BLOCK_DATA))
    assert len(Ctd(MN4, (block,) * 32).serialize()) == 12 + 32 * 2040
    with pytest.raises(WireError, match="message length"):
        Ctd(MN4, (block,) * 33).serialize()


def test_values_that_do_not_fit() -> None:
    for build in (
        lambda: Ctar(MN4, MN6, 0, 0),
        lambda: Ctar(MN4, MN4, 1 << 32, 0),
        lambda: Ctar(MN4, MN4, 0, -1),
        lambda: Ctd(MN4, elapsed=1 << 32),
        lambda: Pctd(MN4, key=bytes(65536)),
        lambda: Pctd(MN4, algorithm=TokenAlgorithm(65536)),
        lambda: CtReq(MN4, -1),
        lambda: ContextDataBlock(Fpt(65536)),
        lambda: ContextDataBlock(Fpt.MLD, b"", 1 << 32),
        lambda: StatusBlock(Fpt.MLD, Status(256)),
        lambda: Ctaa(MN4, (StatusBlock(Fpt.MN_TOKEN),)),
        lambda: Ctdr(MN4, (StatusBlock(Fpt.REASON),)),
        lambda: Ctdr(MN4, blocks=(ContextDataBlock(Fpt.SAD),)),
        lambda: Ctaa(MN4, (), (ContextDataBlock(Fpt.SAD, b"1"),)),
    ):
        with pytest.raises(ValueError, match=r"fit|family|CTAA|CTDR"):
            build()


def test_repr_shows_no_key_material() -> None:
    message = Pctd(MN4, (ContextDataBlock(Fpt.PAD, b"SECRET"),), algorithm=TokenAlgorithm.HMAC_SHA1, key=KEY)
    assert "SECRET" not in repr(message)
    assert KEY.decode() not in repr(message)


def test_token() -> None:
    message = parse_message(VECTORS["ctar-v4"])
    assert isinstance(message, Ctar)
    args = (KEY, message.mn, message.sequence)
    assert compute_token(*args, message.blocks) == message.token
    assert verify_token(*args, message.token, message.blocks)
    assert not verify_token(*args, message.token ^ 1, message.blocks)
    assert not verify_token(*args, message.token)
    assert not verify_token(KEY, message.mn, message.sequence + 1, message.token, message.blocks)
    assert not verify_token(KEY, MN6, message.sequence, message.token, message.blocks)
    assert not verify_token(*args, -1)
    assert not verify_token(*args, 1 << 32)


def test_no_token_is_right_without_a_key() -> None:
    assert not verify_token(b"", MN4, 1, compute_token(b"", MN4, 1))


def test_blocks_end_the_statuses_of_a_ctaa() -> None:
    plain = Ctaa(MN4, (StatusBlock(Fpt.SAD, Status.ESP_SPI_IN_USE),))
    block = ContextDataBlock(Fpt.MN_TOKEN, bytes(20))
    full = replace(plain, blocks=(block, ContextDataBlock(Fpt.SAD)))
    assert full.serialize()[4:] == plain.serialize()[4:] + bytes.fromhex("ff050300") + bytes(
        20
    ) + bytes.fromhex("ff020000")
    assert Ctaa.parse(full.serialize()) == full
    # who knows only the RFC finds statuses to the end: 4 octets each
    assert len(full.serialize()) % 4 == 0
    for end in (13, 16, 40):
        cut = bytes.fromhex("1280") + end.to_bytes(2) + full.serialize()[4:end]
        with contextlib.suppress(WireError):
            assert Ctaa.parse(cut).serialize() == cut


# The stream.

STREAM = b"".join(VECTORS.values())


def test_stream_whole_byte_by_byte_and_with_trailing_bytes() -> None:
    decoder = StreamDecoder()
    assert decoder.feed(STREAM) == list(EXPECTED.values())

    decoder = StreamDecoder()
    got = [message for octet in STREAM for message in decoder.feed(bytes([octet]))]
    assert got == list(EXPECTED.values())

    decoder = StreamDecoder()
    assert decoder.feed(VECTORS["ctc-v4"] + VECTORS["ctd-v4"][:9]) == [EXPECTED["ctc-v4"]]
    assert decoder.feed(b"") == []
    assert decoder.feed(VECTORS["ctd-v4"][9:]) == [EXPECTED["ctd-v4"]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_stream_cut_anywhere(cuts: list[int]) -> None:
    decoder = StreamDecoder()
    got = []
    borders = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(borders):
        got += decoder.feed(STREAM[start:end])
    assert got == list(EXPECTED.values())


def test_largest_message_in_a_stream() -> None:
    data = (
        b"\x14\xc0\xff\xff" + bytes(4) + MN4.packed + b"\0\1" + (65535 - 16).to_bytes(2) + bytes(65535 - 16)
    )
    decoder = StreamDecoder()
    assert decoder.feed(data[:-1]) == []
    (message,) = decoder.feed(data[-1:] + b"\x16")
    assert message.serialize() == data


@pytest.mark.parametrize("bad", ["26800008", "19800008", "16800003", "15800009c000020aff"])
def test_stream_dies_of_a_bad_message(bad: str) -> None:
    decoder = StreamDecoder()
    with pytest.raises(WireError):
        decoder.feed(bytes.fromhex(bad))
    assert decoder.error is not None
    with pytest.raises(WireError):
        decoder.feed(VECTORS["ctc-v4"])

    decoder = StreamDecoder()
    assert decoder.feed(VECTORS["ctc-v4"] + bytes.fromhex(bad)) == [EXPECTED["ctc-v4"]]
    assert decoder.error is not None
    with pytest.raises(WireError):
        decoder.feed(b"")


# Fuzz.

addresses = st.ip_addresses(v=4) | st.ip_addresses(v=6)
u32 = st.integers(0, (1 << 32) - 1)
fpts = st.integers(0, 65535).map(Fpt)
blocks = st.lists(st.builds(ContextDataBlock, fpts, st.binary(max_size=40), st.none() | u32), max_size=4).map(
    tuple
)
statuses = st.lists(st.builds(StatusBlock, fpts, st.integers(0, 255).map(Status)), max_size=5).map(tuple)
ctaa_statuses = statuses.map(lambda each: tuple(s for s in each if s.fpt not in CTAA_BLOCKS))
ctaa_blocks = st.just(()) | st.tuples(
    st.builds(
        ContextDataBlock, st.sampled_from(sorted(CTAA_BLOCKS)), st.binary(max_size=40), st.none() | u32
    ),
    blocks,
).map(lambda pair: (pair[0], *pair[1]))
ctdr_statuses = statuses.map(lambda each: tuple(s for s in each if s.fpt not in CTDR_BLOCKS))
ctdr_blocks = st.just(()) | st.tuples(
    st.builds(ContextDataBlock, st.just(Fpt.REASON), st.binary(max_size=40), st.none() | u32), blocks
).map(lambda pair: (pair[0], *pair[1]))
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        lambda pair, *rest: Ctar(*pair, *rest),
        st.integers().flatmap(lambda n: st.tuples(*[st.ip_addresses(v=4 if n % 2 else 6)] * 2)),
        u32,
        u32,
        blocks,
        st.booleans(),
    ),
    st.builds(Ctaa, addresses, ctaa_statuses, ctaa_blocks),
    st.builds(Ctd, addresses, blocks, u32, st.booleans()),
    st.builds(
        Pctd,
        addresses,
        blocks,
        u32,
        st.integers(0, 65535).map(TokenAlgorithm),
        st.binary(max_size=40),
        st.booleans(),
    ),
    st.builds(Ctdr, addresses, ctdr_statuses, st.booleans(), ctdr_blocks),
    st.builds(Ctc, addresses),
    st.builds(CtReq, addresses, u32, u32, blocks),
)


def padded(message: Message) -> Message:
    """The message with its blocks' data as the other end reads it."""
    if isinstance(message, Ctc):
        return message
    return replace(
        message,
        blocks=tuple(
            replace(b, data=b.data.ljust(b.size - 4 - (0 if b.presence is None else 4), b"\0"))
            for b in message.blocks
        ),
    )


@settings(max_examples=300, deadline=None)
@given(messages)
def test_any_message_round_trips(message: Message) -> None:
    data = message.serialize()
    assert len(data) == int.from_bytes(data[2:4]) == size(message)
    assert parse_message(data) == padded(message)
    assert parse_message(data).serialize() == data
