"""Tokens: the derivation recomputed with hmac alone, what is accepted, what is not, and foreign bytes."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import RefusedError, WireError
from ikectx.numbers import Encr, Fpt, Integ, Prf, Status
from ikectx.sa.context import Endpoint, IkeGeneration, Secret
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import (
    ContextDataBlock,
    Ctaa,
    Ctar,
    CtReq,
    StatusBlock,
    compute_token,
    parse_message,
)
from ikectx.wire.tokens import (
    MAX_LIFETIME,
    NOT_SAID,
    Purpose,
    TokenBlock,
    TokenError,
    expected_by,
    find,
    make_ctar,
    open_ctaa,
    seal_ctaa,
    token_key,
    verify,
)

MN = ip_address("192.0.2.10")
NOW = 1_790_000_000.0
SPIS = SaName(b"SPI of i", b"SPI of r")
SEQUENCE = 0x01020304
CARE_OF = Endpoint.of("203.0.113.9", 4500)
OTHERS = (ContextDataBlock(Fpt.IKEV2_SA), ContextDataBlock(Fpt.MLD, b"abcd", 0x80000001))
GENERATION = IkeGeneration(
    spi_i=SPIS[0],
    spi_r=SPIS[1],
    initiator=False,
    nonce_i=bytes(range(32)),
    nonce_r=bytes(range(32, 64)),
    secret=Secret(bytes(range(64, 96))),
    prf=Prf.HMAC_SHA2_256,
    encr=Encr.AES_GCM_16,
    encr_bits=128,
)
KEY = token_key(GENERATION, SEQUENCE)


def ctar(
    purpose: Purpose = Purpose.ARRIVE,
    care_of: Endpoint | None = CARE_OF,
    expiry: int = int(NOW) + 60,
    blocks: tuple[ContextDataBlock, ...] = OTHERS,
    key: Secret = KEY,
) -> Ctar:
    return make_ctar(
        key,
        mn=MN,
        router=ip_address("192.0.2.1"),
        sequence=SEQUENCE,
        purpose=purpose,
        spis=SPIS,
        psg="psg",
        nsg="nsg",
        expiry=expiry,
        care_of=care_of,
        blocks=blocks,
    )


def check(
    message: Ctar | CtReq,
    *,
    key: Secret = KEY,
    purpose: Purpose = Purpose.ARRIVE,
    psg: str = "psg",
    nsg: str = "nsg",
    now: float = NOW,
    rfc: bool = False,
) -> TokenBlock | None:
    return verify(key, message, purpose=purpose, psg=psg, nsg=nsg, now=now, skew=30, rfc=rfc)


@pytest.mark.parametrize("care_of", [None, CARE_OF, Endpoint.of("2001:db8::9", 500)])
def test_a_token_is_good_at_nsg_and_in_the_ct_req(care_of: Endpoint | None) -> None:
    sent = ctar(care_of=care_of)
    got = parse_message(sent.serialize())
    assert isinstance(got, Ctar)
    token = check(got)
    assert token is not None
    assert (token.spis, token.psg, token.nsg, token.care_of) == (SPIS, "psg", "nsg", care_of)
    assert token.expiry == int(NOW) + 60
    assert got.token == token.token != 0
    asked = CtReq.parse(CtReq(got.mn, got.sequence, got.token, got.blocks).serialize())
    assert check(asked) == token


def test_key_follows_the_prf_and_names_sa_and_sequence() -> None:
    assert len(KEY) == 32
    other = replace(GENERATION, spi_r=b"another.")
    keys = [token_key(GENERATION, SEQUENCE + 1), token_key(other, SEQUENCE)]
    keys += [
        token_key(replace(GENERATION, prf=alg, encr=Encr.AES_CBC, integ=Integ.HMAC_SHA2_256_128), SEQUENCE)
        for alg in Prf
        if alg is not GENERATION.prf
    ]
    revealed = {KEY.reveal(), *(key.reveal() for key in keys)}
    assert len(revealed) == len(keys) + 1
    with pytest.raises(RefusedError):
        token_key(replace(GENERATION, prf=Prf(99)), SEQUENCE)
    with pytest.raises(WireError):
        token_key(GENERATION, 1 << 32)


def test_what_is_not_accepted() -> None:
    good = ctar()
    for wrong in (
        replace(good, mn=ip_address("192.0.2.11")),
        replace(good, sequence=SEQUENCE + 1),
        replace(good, token=good.token ^ 1),
        replace(good, blocks=good.blocks[1:]),
        replace(good, blocks=(*OTHERS[::-1], good.blocks[2])),
        replace(good, blocks=(*good.blocks, ContextDataBlock(Fpt.SAD))),
        replace(good, blocks=(*good.blocks, good.blocks[2])),
        replace(good, blocks=()),
    ):
        with pytest.raises(TokenError) as error:
            check(wrong)
        assert error.value.status is Status.NOT_ALLOWED
    for other in (
        {"key": token_key(GENERATION, SEQUENCE + 1)},
        {"key": Secret()},
        {"purpose": Purpose.ANNOUNCE},
        {"psg": "nsg", "nsg": "psg"},
        {"nsg": "another"},
        {"now": NOW + 60 + 30 + 1},
        {"now": NOW - MAX_LIFETIME + 60 - 30 - 1},
    ):
        with pytest.raises(TokenError):
            check(good, **other)
    # at the edges of its life
    assert check(good, now=NOW + 90)
    assert check(good, now=NOW - MAX_LIFETIME + 60 - 30)


def test_every_changed_octet_of_the_token_is_seen() -> None:
    good = ctar()
    block = good.blocks[-1]
    for at in range(len(block.data)):
        data = bytearray(block.data)
        data[at] ^= 0x01
        wrong = replace(good, blocks=(*OTHERS, replace(block, data=bytes(data))))
        with pytest.raises(TokenError):
            check(wrong)


def test_the_key_of_nobody_makes_no_token() -> None:
    with pytest.raises(TokenError):
        check(ctar(key=Secret()), key=Secret())


def test_the_token_field_is_never_zero() -> None:
    block = TokenBlock(Purpose.ARRIVE, *SPIS, 1, "a", "b", None, bytes(4) + bytes([1] * 12))
    assert block.token == 1
    assert replace(block, tag=b"\0\0\0\2" + bytes(12)).token == 2


def test_rfc_token_only_where_it_is_allowed() -> None:
    text = compute_token(KEY.reveal(), MN, SEQUENCE, OTHERS)
    message = CtReq(MN, SEQUENCE, text, OTHERS)
    assert check(message, rfc=True) is None
    with pytest.raises(TokenError, match="no token of 128 bits"):
        check(message)
    for wrong in (replace(message, token=text ^ 1), replace(message, token=0), replace(message, blocks=())):
        with pytest.raises(TokenError):
            check(wrong, rfc=True)
    # a message with our block stands or falls with it
    both = replace(message, blocks=ctar().blocks)
    right = replace(both, token=compute_token(KEY.reveal(), MN, SEQUENCE, both.blocks))
    with pytest.raises(TokenError):
        check(right, rfc=True)
    assert check(ctar(), rfc=True) is not None


def test_blocks_that_are_no_token() -> None:
    good = ctar().blocks[-1]
    data = good.data
    body = TokenBlock.from_block(good)._covered()
    tail = data[len(body) :]
    for wrong in (
        replace(good, fpt=Fpt.PROOF),
        replace(good, presence=0),
        *(replace(good, data=data[:end]) for end in range(len(data))),
        replace(good, data=data + bytes(8)),
        replace(good, data=data + b"\1"),
        replace(good, data=body[:1] + b"\5" + body[2:] + tail),
        replace(good, data=body[:1] + b"\0" + body[2:-4] + tail),  # a port without an address
        replace(good, data=body[:28] + b"\0" + body[32:] + tail),  # no name
        replace(good, data=body.replace(b"psg", b"p\xffg") + tail),
    ):
        with pytest.raises(WireError):
            TokenBlock.from_block(wrong)
    assert find(()) is None
    assert find(OTHERS) is None
    with pytest.raises(WireError, match="two"):
        find((good, good))


@pytest.mark.parametrize(
    "change",
    [
        {"psg": ""},
        {"nsg": "é" * 128},
        {"spi_i": b"short"},
        {"expiry": 1 << 32},
        {"expiry": -1},
        {"expects": NOT_SAID},
        {"expects": -1},
        {"tag": b""},
        {"purpose": Purpose(256)},
    ],
)
def test_values_no_token_can_hold(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"octets|fit"):
        replace(TokenBlock(Purpose.ARRIVE, *SPIS, 1, "a", "b", None), **change)


# CTAA


STATUSES = (StatusBlock(Fpt.SAD, Status.ESP_SPI_IN_USE), StatusBlock(Fpt.PAD, Status.NO_CONNECTION))
NEW_SPIS = (ContextDataBlock(Fpt.NEW_SPIS, b"sixteen octets.."),)


@pytest.mark.parametrize("blocks", [(), NEW_SPIS])
@pytest.mark.parametrize("statuses", [(), STATUSES])
def test_ctaa_is_authentic(statuses: tuple[StatusBlock, ...], blocks: tuple[ContextDataBlock, ...]) -> None:
    sealed = seal_ctaa(KEY, MN, SEQUENCE, statuses, blocks, purpose=Purpose.ARRIVE)
    got = Ctaa.parse(sealed.serialize())
    assert got.statuses == statuses
    assert [block.fpt for block in got.blocks] == [block.fpt for block in (*blocks, sealed.blocks[-1])]
    assert open_ctaa(KEY, got, SEQUENCE, purpose=Purpose.ARRIVE)
    # not the answer to something else, nor under another key
    assert not open_ctaa(KEY, got, SEQUENCE, purpose=Purpose.ANNOUNCE)
    assert not open_ctaa(KEY, got, SEQUENCE + 1, purpose=Purpose.ARRIVE)
    assert not open_ctaa(Secret(), got, SEQUENCE, purpose=Purpose.ARRIVE)
    assert not open_ctaa(Secret(bytes(32)), got, SEQUENCE, purpose=Purpose.ARRIVE)
    # nor changed, cut or extended
    assert not open_ctaa(KEY, replace(got, mn=ip_address("192.0.2.11")), SEQUENCE, purpose=Purpose.ARRIVE)
    changed = replace(got, statuses=(*statuses, StatusBlock(Fpt.SPD)))
    assert not open_ctaa(KEY, changed, SEQUENCE, purpose=Purpose.ARRIVE)
    if statuses:
        assert not open_ctaa(KEY, replace(got, statuses=()), SEQUENCE, purpose=Purpose.ARRIVE)
    if blocks:
        assert not open_ctaa(KEY, replace(got, blocks=got.blocks[1:]), SEQUENCE, purpose=Purpose.ARRIVE)
    assert not open_ctaa(KEY, replace(got, blocks=got.blocks[:-1]), SEQUENCE, purpose=Purpose.ARRIVE)
    assert not open_ctaa(KEY, replace(got, blocks=got.blocks * 2), SEQUENCE, purpose=Purpose.ARRIVE)
    appended = replace(got, blocks=(*got.blocks, ContextDataBlock(Fpt.SAD)))
    assert not open_ctaa(KEY, appended, SEQUENCE, purpose=Purpose.ARRIVE)


def test_every_changed_octet_of_a_ctaa_is_seen() -> None:
    octets = seal_ctaa(KEY, MN, SEQUENCE, STATUSES, NEW_SPIS, purpose=Purpose.ARRIVE).serialize()
    ignored = {11 + 4 * n for n in range(len(STATUSES))}  # reserved octets of statuses
    token = len(octets) - 32
    ignored |= {token + 5, token + 6, token + 7}
    for at in range(4, len(octets)):
        wrong = bytearray(octets)
        wrong[at] ^= 0x01
        try:
            got = Ctaa.parse(bytes(wrong))
        except WireError:
            continue
        reserved = at in {8 + 4 * len(STATUSES) + 3, token + 3}  # flags of blocks
        assert open_ctaa(KEY, got, SEQUENCE, purpose=Purpose.ARRIVE) == (at in ignored or reserved), at


def test_a_request_is_no_answer() -> None:
    request = ctar(blocks=())
    wrong = Ctaa(MN, (), request.blocks)
    assert not open_ctaa(KEY, wrong, SEQUENCE, purpose=Purpose.ARRIVE)


def test_an_untagged_ctaa_is_not_authentic() -> None:
    assert not open_ctaa(KEY, Ctaa(MN), SEQUENCE, purpose=Purpose.ARRIVE)
    assert not open_ctaa(KEY, Ctaa(MN, STATUSES), SEQUENCE, purpose=Purpose.ARRIVE)


# foreign bytes


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120))
def test_noise_raises_only_wire_error(data: bytes) -> None:
    block = ContextDataBlock(Fpt.MN_TOKEN, data)
    try:
        token = TokenBlock.from_block(block)
    except WireError:
        pass
    else:
        assert data.startswith(token.to_block().data)
    with pytest.raises(TokenError):
        check(replace(ctar(), blocks=(block,)))
    assert not open_ctaa(KEY, Ctaa(MN, (), (block,)), SEQUENCE, purpose=Purpose.ARRIVE)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 255).map(Purpose),
    st.binary(min_size=8, max_size=8),
    st.integers(0, (1 << 32) - 1),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
    st.none() | st.builds(Endpoint, st.ip_addresses(), st.integers(0, 65535)),
    st.none() | st.integers(0, NOT_SAID - 1),
)
def test_any_token_round_trips(
    purpose: Purpose, spi: bytes, expiry: int, name: str, care_of: Endpoint | None, expects: int | None
) -> None:
    token = TokenBlock(purpose, spi, spi[::-1], expiry, name, "nsg", care_of, bytes(range(16)), expects)
    padded = Ctar.parse(Ctar(MN, MN, 1, 1, (token.to_block(),)).serialize()).blocks[0]
    assert TokenBlock.from_block(padded) == token


# vectors


@dataclass
class Case:
    """One case of the vectors: derivation, CTAR, CTAA."""

    values: dict[str, str] = field(default_factory=dict)
    messages: dict[str, bytes] = field(default_factory=lambda: {"ctar": b"", "ctaa": b""})

    def octets(self, name: str) -> bytes:
        return bytes.fromhex(self.values[name])

    @property
    def generation(self) -> IkeGeneration:
        octets: dict[str, Any] = {
            name: self.octets(name) for name in ("spi_i", "spi_r", "nonce_i", "nonce_r")
        }
        return replace(
            GENERATION, **octets, prf=Prf[self.values["prf"]], secret=Secret(self.octets("secret"))
        )


def read_vectors() -> dict[str, Case]:
    found: dict[str, Case] = {}
    case, message = Case(), ""
    for line in (Path(__file__).parent.parent.parent / "vectors/cxtp_tokens.txt").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("["):
            case = found[text.strip("[]")] = Case()
        elif text.endswith(":"):
            message = text[:-1]
        elif " = " in text:
            name, _, value = text.partition(" = ")
            case.values[name] = value
        elif text:
            case.messages[message] += bytes.fromhex(text)
    return found


VECTORS = read_vectors()


@pytest.mark.parametrize("name", VECTORS)
def test_vector_follows_from_hmac_alone(name: str) -> None:
    case = VECTORS[name]
    digest = {"HMAC_SHA1": "sha1", "HMAC_SHA2_256": "sha256", "HMAC_SHA2_512": "sha512"}[case.values["prf"]]

    def prf_plus(key: bytes, seed: bytes, length: int) -> bytes:
        made = last = b""
        for number in range(1, 256):
            last = hmac.new(key, last + seed + bytes([number]), digest).digest()
            made += last
        return made[:length]

    spis = case.octets("spi_i") + case.octets("spi_r")
    nonces = case.octets("nonce_i") + case.octets("nonce_r")
    skeyseed = hmac.new(nonces, case.octets("secret"), digest).digest()
    assert skeyseed == case.octets("skeyseed")
    sk_d = prf_plus(skeyseed, nonces + spis, hashlib.new(digest).digest_size)
    assert sk_d == case.octets("sk_d")
    ctar, ctaa = case.messages["ctar"], case.messages["ctaa"]
    size = 4 if ctar[1] & 0x80 else 16
    mn, sequence = ctar[4 : 4 + size], ctar[4 + 2 * size : 8 + 2 * size]
    seed = b"ikectx CXTP token 1" + spis + sequence
    assert seed == case.octets("seed")
    key = prf_plus(sk_d, seed, 32)
    assert key == case.octets("key")
    # the token
    token = ctar.index(b"\xff\x05")
    others, data = ctar[12 + 2 * size : token], ctar[token + 4 :]
    end = 28 + data[28] + 1  # up to pSG's name
    end += data[end] + 1 + {0: 0, 4: 4, 6: 16}[data[1]]
    text = b"ikectx CXTP request 1" + bytes([4 if size == 4 else 6]) + mn + sequence + data[:end] + others
    assert text == case.octets("request_text")
    tag = hmac.new(key, text, "sha256").digest()[:16]
    assert data[end:].rstrip(b"\0") == tag.rstrip(b"\0")
    assert ctar[8 + 2 * size : 12 + 2 * size] == tag[:4]
    # the answer
    at = 4 + size
    while ctaa[at : at + 2] not in (b"\xff\x05", b"\xff\x07"):
        at += 4
    count = ((at - 4 - size) // 4).to_bytes(2)
    text = b"ikectx CXTP reply 1" + ctaa[-28:-27] + ctaa[-24:-20] + bytes([4 if size == 4 else 6]) + mn
    text += sequence + count + ctaa[4 + size : -32]
    assert text == case.octets("reply_text")
    assert ctaa[-20:-4] == hmac.new(key, text, "sha256").digest()[:16]
    assert ctaa[-4:] == bytes(4)


@pytest.mark.parametrize("name", VECTORS)
def test_vector_is_made_and_read_here(name: str) -> None:
    case = VECTORS[name]
    ctar, ctaa = Ctar.parse(case.messages["ctar"]), Ctaa.parse(case.messages["ctaa"])
    key = token_key(case.generation, ctar.sequence)
    assert key == Secret(case.octets("key"))
    token = find(ctar.blocks)
    assert token is not None
    made = make_ctar(
        key,
        mn=ctar.mn,
        router=ctar.router,
        sequence=ctar.sequence,
        purpose=token.purpose,
        spis=token.spis,
        psg=token.psg,
        nsg=token.nsg,
        expiry=token.expiry,
        care_of=token.care_of,
        blocks=ctar.blocks[:-1],
        expects=token.expects,
    )
    assert made.serialize() == case.messages["ctar"]
    assert check(ctar, key=key, purpose=token.purpose, psg=token.psg, nsg=token.nsg) == token
    sealed = seal_ctaa(
        key,
        ctar.mn,
        ctar.sequence,
        ctaa.statuses,
        ctaa.blocks[:-1],
        purpose=token.purpose,
        expects=expected_by(ctaa),
    )
    assert sealed.serialize() == case.messages["ctaa"]
    assert open_ctaa(key, ctaa, ctar.sequence, purpose=token.purpose)
