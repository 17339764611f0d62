"""The octets of a notice, both ways; what does not parse; what a later version may say."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ikectx.errors import WireError
from ikectx.numbers import Fpt
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import ContextDataBlock, Ctd, parse_message
from ikectx.wire.whereabouts import What, Whereabouts, is_notice, notice, parse_notice, spis_in, spis_text

SA = (bytes(range(8)), bytes(range(8, 16)))
MOVED = Whereabouts(SA, 3, What.MOVED, "nsg")
ENDED = Whereabouts(SA, 1 << 40, What.ENDED)
END = Whereabouts(SA, 7, What.END)
VECTOR = bytes.fromhex(
    # version 1, CTD; V and A; length; elapsed; MN address
    "13 c0 004c 00000000 00000000"
    # FPT, length in units of 8 octets, no presence vector
    "ff0a 08 00"
    "02 03 0001020304050607 08090a0b0c0d0e0f 0000000000000003 6e7367"
    "03 00 0001020304050607 08090a0b0c0d0e0f 0000010000000000"
    # padding
    "0000000000"
)


def test_the_octets() -> None:
    message, told = notice([MOVED, ENDED])
    assert told == [MOVED, ENDED]
    octets = message.serialize()
    assert octets == VECTOR
    assert len(octets) == int.from_bytes(octets[2:4])
    again = parse_message(octets)
    assert isinstance(again, Ctd) and again.acknowledge
    assert is_notice(again)
    assert parse_notice(again) == (MOVED, ENDED)


@st.composite
def news(draw: st.DrawFn) -> Whereabouts:
    what = draw(st.sampled_from(What))
    text = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=40)
    name = draw(text) if what is What.MOVED else ""
    if what is What.RENAMED:
        name = draw(st.binary(min_size=16, max_size=16)).hex()
    sa = (draw(st.binary(min_size=8, max_size=8)), draw(st.binary(min_size=8, max_size=8)))
    return Whereabouts(sa, draw(st.integers(0, (1 << 64) - 1)), what, name)


@given(st.lists(news(), max_size=200))
def test_any_number_is_told_in_as_many_messages(all_news: list[Whereabouts]) -> None:
    left, found = list(all_news), []
    while left:
        message, told = notice(left)
        assert told
        found += parse_notice(parse_message(message.serialize()))  # type: ignore[arg-type]
        left = left[len(told) :]
    assert found == all_news


def block(data: bytes) -> Ctd:
    return Ctd(IPv4Address(0), (ContextDataBlock(Fpt.WHEREABOUTS, data),))


@pytest.mark.parametrize(
    "data",
    [
        MOVED.serialize()[:-1],
        ENDED.serialize()[:10],
        b"\0\1",
        MOVED.serialize().replace(b"nsg", b"n\ng"),
        MOVED.serialize().replace(b"nsg", b"n\xffg"),
        b"\x02\x00" + MOVED.serialize()[2:-3],
        b"\x03\x03" + MOVED.serialize()[2:],
    ],
)
def test_what_does_not_parse(data: bytes) -> None:
    with pytest.raises(WireError):
        parse_notice(block(data))


def test_what_a_later_version_says_of_an_sa_is_left_out() -> None:
    later = b"\x09\x02" + MOVED.serialize()[2:-3] + b"xy"
    assert parse_notice(block(later + ENDED.serialize() + END.serialize())) == (ENDED, END)


def test_a_transfers_ctd_is_no_notice() -> None:
    blocks = (ContextDataBlock(Fpt.IKEV2_SA, b"\xa1\x00\x01"),)
    assert not is_notice(Ctd(IPv4Address("198.51.100.7"), blocks))
    assert not is_notice(Ctd(IPv4Address(0), blocks))


@pytest.mark.parametrize(
    "wrong",
    [
        ((b"short", SA[1]), 1, What.ENDED, ""),
        (SA, -1, What.ENDED, ""),
        (SA, 1 << 64, What.ENDED, ""),
        (SA, 1, What.ENDED, "nsg"),
        (SA, 1, What.MOVED, ""),
        (SA, 1, What(0), ""),
        (SA, 1, What.MOVED, "n" * 256),
        (SA, 1, What.MOVED, "n\n"),
    ],
)
def test_what_cannot_be_said(wrong: tuple[tuple[bytes, bytes], int, What, str]) -> None:
    with pytest.raises(ValueError):
        Whereabouts(*wrong)


def test_other_spis_are_told_of_as_an_sas_name() -> None:
    name = SaName(b"12345678", b"abcdefgh")
    news = Whereabouts(SaName(bytes(8), bytes(8)), 1, What.RENAMED, name.key)
    message, _ = notice([news])
    assert parse_notice(message) == (news,)
    esp = (bytes.fromhex("c1234567"), bytes.fromhex("c7654321"))
    assert spis_in(name.key) == (name, ())
    assert spis_in(spis_text(name, esp)) == (name, esp)
    assert len(spis_in(spis_text(name, esp * 20))[1]) == 27, "as many as fit into a name"
    Whereabouts(news.sa, 1, What.RENAMED, spis_text(name, esp * 20))
    for wrong in ("", "nsg", name.key[:-1] + "x", name.key + "c12345", name.key + "c123456 "):
        with pytest.raises(ValueError):
            Whereabouts(news.sa, 1, What.RENAMED, wrong)
