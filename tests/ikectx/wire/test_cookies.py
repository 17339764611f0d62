"""Cookies: octets in and out, no clock but the one given."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ikectx.errors import WireError
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Secret
from ikectx.wire.cookies import LIFE, MAX_LENGTH, Cookies, ask, asked, fixed_part, split, with_cookie
from ikectx.wire.cxtp import ContextDataBlock, Ctaa, Ctar, StatusBlock
from ikectx.wire.tokens import Purpose, make_ctar, verify
from tests.vector_text import read_vectors

KEY = Secret(bytes(32))
HOST, PORT = "198.51.100.7", 40000


def a_ctar(version: int = 4) -> Ctar:
    return make_ctar(
        KEY,
        mn=ip_address("198.51.100.7" if version == 4 else "2001:db8::7"),
        router=ip_address("192.0.2.1" if version == 4 else "2001:db8::1"),
        sequence=7,
        purpose=Purpose.ARRIVE,
        spis=(b"12345678", b"abcdefgh"),
        psg="a",
        nsg="b",
        expiry=1000,
        care_of=None,
        blocks=(ContextDataBlock(Fpt.IKEV2_SA),),
    )


@pytest.mark.parametrize("version", [4, 6])
def test_a_cookie_goes_to_and_fro_and_leaves_the_token_as_it_is(version: int) -> None:
    jar = Cookies(b"secret")
    message = a_ctar(version)
    octets = message.serialize()
    fixed = fixed_part(octets)
    assert fixed == (20 if version == 4 else 44)
    assert split(octets, fixed) == (b"", octets)
    question = ask(octets, fixed, jar.make(HOST, PORT, 0.0))
    assert len(question) < len(octets)
    ctaa = Ctaa.parse(question)
    assert (ctaa.mn, ctaa.statuses, ctaa.serialize()) == (message.mn, (), question)
    block = asked(ctaa)
    assert block is not None
    again = with_cookie(message, block)
    assert with_cookie(again, block) == again
    cookie, rest = split(again.serialize(), fixed)
    assert (cookie, rest) == (block.data, octets)
    assert jar.right(cookie, HOST, PORT, 0.0)
    assert verify(KEY, Ctar.parse(rest), purpose=Purpose.ARRIVE, psg="a", nsg="b", now=990, skew=0, rfc=False)


def test_a_cookie_is_good_for_one_source_and_some_time() -> None:
    jar = Cookies(b"secret")
    for start in (0.0, 255 * LIFE, 256 * LIFE + 59, 1e9):
        cookie = jar.make(HOST, PORT, start)
        assert jar.right(cookie, HOST, PORT, start + LIFE)
        assert not jar.right(cookie, HOST, PORT, start + 2 * LIFE)
        assert not jar.right(cookie, HOST, PORT + 1, start)
        assert not jar.right(cookie, "198.51.100.8", PORT, start)
        assert not jar.right(cookie[:-1], HOST, PORT, start)
        assert not Cookies(b"other").right(cookie, HOST, PORT, start)
    assert not jar.right(b"", HOST, PORT, 0.0)
    assert not jar.right(bytes([255]) + bytes(11), HOST, PORT, 0.0)
    assert len(jar._keys) <= 2


def test_what_asks_for_no_cookie() -> None:
    mn = ip_address(HOST)
    for statuses, blocks in (
        ((), ()),
        ((), (ContextDataBlock(Fpt.MN_TOKEN, bytes(12)),)),
        ((), (ContextDataBlock(Fpt.COOKIE),)),
        ((), (ContextDataBlock(Fpt.COOKIE, bytes(12), 1),)),
        ((), (ContextDataBlock(Fpt.COOKIE, bytes(MAX_LENGTH + 1)),)),
        ((), (ContextDataBlock(Fpt.COOKIE, bytes(12)), ContextDataBlock(Fpt.NEW_SPIS))),
        ((StatusBlock(Fpt.IKEV2_SA, Status.BUSY),), (ContextDataBlock(Fpt.COOKIE, bytes(12)),)),
    ):
        assert asked(Ctaa(mn, statuses, blocks)) is None


def test_the_vectors() -> None:
    """`cxtp_messages.txt` has a question and the CTAR that answers it."""
    vectors = read_vectors("cxtp_messages.txt")
    first, question, again = (vectors[name] for name in ("ctar-v4", "cookie-ctaa-v4", "cookie-ctar-v4"))
    cookie = bytes.fromhex("2a0102030405060708090a0b")
    assert ask(first, fixed_part(first), cookie) == question
    block = asked(Ctaa.parse(question))
    assert block is not None
    assert with_cookie(Ctar.parse(first), block).serialize() == again
    assert split(again, fixed_part(again)) == (cookie, first)


def test_an_answer_is_never_longer_than_what_it_answers() -> None:
    short = Ctar(ip_address(HOST), ip_address(HOST), 1, 2).serialize()
    assert ask(short, fixed_part(short), bytes(12)) == b""


@given(st.binary(max_size=200) | st.builds(lambda rest: b"\x11\x80\x00" + rest, st.binary(max_size=120)))
def test_foreign_octets(octets: bytes) -> None:
    """Whatever they are: no error, and what parses as a CTAR passes for one."""
    fixed = fixed_part(octets)
    try:
        Ctar.parse(octets)
    except WireError:
        if not fixed:
            return
    assert fixed in (20, 44)
    cookie, rest = split(octets, fixed)
    assert not Cookies(b"secret").right(cookie, HOST, PORT, 0.0)
    assert len(rest) == int.from_bytes(rest[2:4])
    assert ask(octets, fixed, bytes(12)) == b"" or len(octets) >= 28
