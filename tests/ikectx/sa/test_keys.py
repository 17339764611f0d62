"""keys.py: derivation against published vectors, sealing against one and against itself."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import RefusedError, UsageError, WireError
from ikectx.numbers import Encr, Integ, Prf, Protocol, Status
from ikectx.sa import keys
from ikectx.sa.context import NO_SECRET, ChildContext, IkeGeneration, Secret, TrafficSelector

VECTORS = json.loads((Path(__file__).parent.parent.parent / "vectors" / "ikev2_keys.json").read_text())
CAVP = VECTORS["cavp"]["cases"]
CHARON = json.loads((Path(__file__).parent.parent.parent / "vectors" / "charon_5_9_8.json").read_text())[
    "cases"
]
ANY = TrafficSelector(ip_address("0.0.0.0"), ip_address("255.255.255.255"))

AEADS = [
    Encr.AES_CCM_8, Encr.AES_CCM_12, Encr.AES_CCM_16,
    Encr.AES_GCM_8, Encr.AES_GCM_12, Encr.AES_GCM_16, Encr.CHACHA20_POLY1305,
]  # fmt: skip
CIPHERS = [Encr.DES3, Encr.AES_CBC, Encr.AES_CTR, Encr.CAMELLIA_CBC]
MACS = [integ for integ in Integ if integ is not Integ.NONE]
SUITES = [(encr, Integ.NONE) for encr in AEADS] + [(encr, integ) for encr in CIPHERS for integ in MACS]


def generation(**changes: object) -> IkeGeneration:
    base = IkeGeneration(
        spi_i=b"initiatr",
        spi_r=b"responde",
        initiator=False,
        nonce_i=bytes(range(32)),
        nonce_r=bytes(range(100, 132)),
        secret=Secret(b"shared" * 6),
        prf=Prf.HMAC_SHA2_256,
        encr=Encr.AES_GCM_16,
        encr_bits=256,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def child(**changes: object) -> ChildContext:
    base = ChildContext(
        name="net",
        generation=0,
        initiator=False,
        spi_in=b"\xc0\0\0\1",
        spi_out=b"\xc0\0\0\2",
        nonce_i=bytes(range(32)),
        nonce_r=bytes(range(100, 132)),
        encr=Encr.AES_GCM_16,
        encr_bits=128,
        local_ts=(ANY,),
        remote_ts=(ANY,),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def bits_of(encr: Encr) -> int:
    return 0 if encr in (Encr.DES3, Encr.CHACHA20_POLY1305) else 256


def suite_key(encr: Encr, integ: Integ, *, by_initiator: bool = True) -> keys.SealKey:
    return keys.seal_key(
        generation(encr=encr, encr_bits=bits_of(encr), integ=integ), by_initiator=by_initiator
    )


# --- published vectors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CAVP, ids=lambda c: f"{c['prf']}-{len(c['nonce_i']) // 2}")
def test_cavp_skeyseed_and_prf_plus(case: dict[str, str]) -> None:
    alg, v = Prf[case["prf"]], {k: bytes.fromhex(x) for k, x in case.items() if k != "prf"}
    nonces = v["nonce_i"] + v["nonce_r"]
    assert keys.prf(alg, nonces, v["secret"]) == v["skeyseed"]
    seed = nonces + v["spi_i"] + v["spi_r"]
    assert keys.prf_plus(alg, v["skeyseed"], seed, len(v["dkm"])) == v["dkm"]


def test_cavp_sk_keys_are_cut_in_the_order_of_the_rfc() -> None:
    # the case whose nonces are long enough for an IkeGeneration
    case = next(c for c in CAVP if len(c["nonce_i"]) == 512)
    v = {k: bytes.fromhex(x) for k, x in case.items() if k != "prf"}
    made = generation(
        spi_i=v["spi_i"],
        spi_r=v["spi_r"],
        nonce_i=v["nonce_i"],
        nonce_r=v["nonce_r"],
        secret=Secret(v["secret"]),
        encr=Encr.AES_CBC,
        encr_bits=192,
        integ=Integ.HMAC_SHA2_256_128,
    )
    assert keys.skeyseed(made).reveal() == v["skeyseed"]
    sk = keys.sk_keys(made)
    cut = (sk.sk_d, sk.sk_ai, sk.sk_ar, sk.sk_ei, sk.sk_er, sk.sk_pi, sk.sk_pr)
    assert [len(key) for key in cut] == [32, 32, 32, 24, 24, 32, 32]
    assert v["dkm"].startswith(b"".join(key.reveal() for key in cut))


def test_cavp_child_keymat_and_rekey() -> None:
    v = {k: bytes.fromhex(x) for k, x in CAVP[0].items() if k != "prf"}
    nonces, sk_d = v["nonce_i"] + v["nonce_r"], v["dkm"][:20]
    size = len(v["child_dkm"])
    assert keys.prf_plus(Prf.HMAC_SHA1, sk_d, nonces, size) == v["child_dkm"]
    assert keys.prf_plus(Prf.HMAC_SHA1, sk_d, v["new_secret"] + nonces, size) == v["child_pfs_dkm"]
    assert keys.prf(Prf.HMAC_SHA1, sk_d, v["new_secret"] + nonces) == v["rekey_skeyseed"]


@pytest.mark.parametrize(
    "case", VECTORS["aes_prf"]["cases"], ids=lambda c: f"{c['prf']}-{len(c['key']) // 2}"
)
def test_aes_prfs(case: dict[str, str]) -> None:
    out = keys.prf(Prf[case["prf"]], bytes.fromhex(case["key"]), bytes(range(20)))
    assert out.hex() == case["out"]


def test_xcbc_mac() -> None:
    key = bytes.fromhex(VECTORS["xcbc"]["key"])
    for case in VECTORS["xcbc"]["cases"]:
        assert keys.prf(Prf.AES128_XCBC, key, bytes(range(case["length"]))).hex() == case["out"]


def test_chacha20_poly1305_as_in_rfc_7634() -> None:
    v = {k: bytes.fromhex(x) for k, x in VECTORS["chacha20_poly1305"].items() if k != "source"}
    key = keys.SealKey(Encr.CHACHA20_POLY1305, Integ.NONE, Secret(v["key"]))
    assert keys.seal(key, v["head"], v["inner"], v["iv"]) == v["body"]
    assert keys.open_(key, v["head"], v["body"]) == v["inner"]


def charon_generation(case: dict[str, Any]) -> IkeGeneration:
    """The IKE_SA of a case of charon_5_9_8.json."""
    return IkeGeneration(
        spi_i=bytes.fromhex(case["spi_i"]),
        spi_r=bytes.fromhex(case["spi_r"]),
        initiator=case["gateway_is_initiator"],
        nonce_i=bytes.fromhex(case["nonce_i"]),
        nonce_r=bytes.fromhex(case["nonce_r"]),
        secret=Secret(bytes.fromhex(case["secret"])),
        prf=Prf[case["prf"]],
        encr=Encr[case["encr"]],
        encr_bits=case["encr_bits"],
        integ=Integ[case["integ"]],
        old_skd=Secret(bytes.fromhex(case["old_skd"])) if case["old_skd"] else None,
        old_prf=Prf[case["old_prf"]] if case["old_prf"] else None,
    )


@pytest.mark.parametrize("case", CHARON, ids=lambda c: c["label"])
def test_charons_own_keys(case: dict[str, Any]) -> None:
    made = charon_generation(case)
    sk = keys.sk_keys(made)
    assert {name: getattr(sk, name).reveal().hex() for name in case["sk"]} == case["sk"]
    kid = case["child"]
    got = keys.child_keys(
        made,
        child(
            initiator=kid["initiator"],
            nonce_i=bytes.fromhex(kid["nonce_i"]),
            nonce_r=bytes.fromhex(kid["nonce_r"]),
            secret=Secret(bytes.fromhex(kid["secret"])),
            encr=Encr[kid["encr"]],
            encr_bits=kid["encr_bits"],
            integ=Integ[kid["integ"]],
        ),
    )
    names = ("encr_i", "integ_i", "encr_r", "integ_r")
    assert [getattr(got, name).reveal().hex() for name in names] == [kid[name] for name in names]


# --- derivation: what the vectors do not say --------------------------------------------------------------


@pytest.mark.parametrize("alg", [Prf.AES128_XCBC, Prf.AES128_CMAC])
def test_aes_prfs_take_8_octets_of_each_nonce_as_the_first_key_only(alg: Prf) -> None:
    made = generation(prf=alg)
    short = made.nonce_i[:8] + made.nonce_r[:8]
    assert keys.skeyseed(made).reveal() == keys.prf(alg, short, made.secret.reveal())
    # the seed of prf+ has the whole nonces
    sk = keys.sk_keys(made)
    seed = made.nonce_i + made.nonce_r + made.spi_i + made.spi_r
    assert keys.prf_plus(alg, keys.skeyseed(made).reveal(), seed, 16) == sk.sk_d.reveal()
    assert len(sk.sk_d) == len(sk.sk_pi) == 16


def test_a_rekey_uses_the_old_prf_for_all_of_it_and_the_new_sizes() -> None:
    # what charon does; RFC 7296 would take the new prf for prf+
    made = generation(old_skd=Secret(b"d" * 20), old_prf=Prf.HMAC_SHA1, prf=Prf.HMAC_SHA2_512)
    nonces = made.nonce_i + made.nonce_r
    seed = keys.prf(Prf.HMAC_SHA1, b"d" * 20, made.secret.reveal() + nonces)
    assert keys.skeyseed(made).reveal() == seed
    sk = keys.sk_keys(made)
    assert sk.sk_d.reveal() == keys.prf_plus(Prf.HMAC_SHA1, seed, nonces + made.spi_i + made.spi_r, 64)


def test_additional_secrets_stand_behind_the_nonces() -> None:
    made = generation(old_skd=Secret(b"d" * 32), old_prf=Prf.HMAC_SHA2_256, add_secret=Secret(b"kem"))
    data = made.secret.reveal() + made.nonce_i + made.nonce_r + b"kem"
    assert keys.skeyseed(made).reveal() == keys.prf(Prf.HMAC_SHA2_256, b"d" * 32, data)
    with pytest.raises(UsageError):
        keys.skeyseed(generation(add_secret=Secret(b"kem")))
    kid = child(secret=Secret(b"pfs"), add_secret=Secret(b"kem"))
    seed = b"pfs" + kid.nonce_i + kid.nonce_r + b"kem"
    expected = keys.prf_plus(Prf.HMAC_SHA2_256, keys.sk_keys(made).sk_d.reveal(), seed, 40)
    got = keys.child_keys(made, kid)
    assert got.encr_i.reveal() + got.encr_r.reveal() == expected


def test_the_sk_keys_depend_on_the_ike_spis_and_keymat_only_through_sk_d() -> None:
    one, other = keys.sk_keys(generation()), keys.sk_keys(generation(spi_r=b"renamed!"))
    assert one.sk_ei != other.sk_ei
    assert keys.child_keys(generation(), child()) == keys.child_keys(
        generation(), child(spi_in=b"\xc1\0\0\1")
    )


@pytest.mark.parametrize("initiator", [False, True])
def test_esp_keys_follow_who_started_the_exchange(initiator: bool) -> None:
    kid = child(initiator=initiator, encr=Encr.AES_CBC, integ=Integ.HMAC_SHA2_256_128)
    made = keys.child_keys(generation(), kid)
    inbound, outbound = keys.esp_keys(generation(), kid)
    by_i, by_r = (made.encr_i, made.integ_i), (made.encr_r, made.integ_r)
    assert (outbound, inbound) == ((by_i, by_r) if initiator else (by_r, by_i))
    assert [len(key) for key in outbound] == [16, 32]


@pytest.mark.parametrize(
    ("encr", "bits", "octets"),
    [
        (Encr.AES_CBC, 128, 16),
        (Encr.AES_CTR, 192, 28),
        (Encr.AES_GCM_8, 128, 20),
        (Encr.AES_GCM_16, 256, 36),
        (Encr.AES_CCM_12, 128, 19),
        (Encr.NULL_AES_GMAC, 256, 36),
        (Encr.CHACHA20_POLY1305, 0, 36),
        (Encr.CHACHA20_POLY1305, 256, 36),
        (Encr.DES3, 0, 24),
        (Encr.NULL, 0, 0),
        (Encr.CAMELLIA_CBC, 256, 32),
    ],
)
def test_key_sizes_with_salt(encr: Encr, bits: int, octets: int) -> None:
    assert keys.encr_key_length(encr, bits) == octets


def test_null_encryption_has_an_empty_key() -> None:
    kid = child(encr=Encr.NULL, encr_bits=0, integ=Integ.HMAC_SHA1_96)
    made = keys.child_keys(generation(), kid)
    assert made.encr_i == NO_SECRET
    assert len(made.integ_i) == 20


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"prf": Prf(1026)},
        {"encr": Encr(250)},
        {"encr_bits": 0},
        {"encr_bits": 64},
        {"integ": Integ.HMAC_SHA1_96},
        {"encr": Encr.AES_CBC, "integ": Integ(99)},
    ],
)
def test_unknown_algorithms_are_refused_without_keys_in_the_message(changes: dict[str, object]) -> None:
    with pytest.raises(RefusedError) as caught:
        keys.sk_keys(generation(**changes))
    assert caught.value.status is Status.ALGORITHM
    assert "736861726564" not in str(caught.value)


def test_what_cannot_seal_ike_is_refused() -> None:
    with pytest.raises(RefusedError):
        keys.seal_key(generation(encr=Encr.NULL, encr_bits=0, integ=Integ.HMAC_SHA1_96), by_initiator=True)
    with pytest.raises(RefusedError):
        keys.seal_key(generation(encr=Encr.AES_CBC), by_initiator=True)
    with pytest.raises(RefusedError) as caught:
        keys.child_keys(generation(), child(protocol=Protocol.AH))
    assert caught.value.status is Status.NOT_COVERED


def test_prf_plus_has_an_end() -> None:
    assert len(keys.prf_plus(Prf.HMAC_SHA1, b"k", b"s", 255 * 20)) == 255 * 20
    with pytest.raises(UsageError):
        keys.prf_plus(Prf.HMAC_SHA1, b"k", b"s", 255 * 20 + 1)


# --- sealing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encr", "integ"), SUITES, ids=lambda a: a.name)
def test_what_is_sealed_opens_again_and_only_so(encr: Encr, integ: Integ) -> None:
    key = suite_key(encr, integ)
    for size in (0, 1, 7, 15, 16, 17, 100):
        inner, iv = bytes(range(size)), secrets.token_bytes(keys.iv_length(encr))
        body = keys.seal(key, b"head", inner, iv)
        assert len(body) == keys.sealed_length(key, size)
        assert keys.open_(key, b"head", body) == inner
    for place in (0, len(body) // 2, len(body) - 1):
        damaged = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        with pytest.raises(WireError):
            keys.open_(key, b"head", damaged)
    with pytest.raises(WireError):
        keys.open_(key, b"Head", body)
    with pytest.raises(WireError):
        keys.open_(suite_key(encr, integ, by_initiator=False), b"head", body)


def test_a_wrong_iv_size_is_the_callers_fault() -> None:
    with pytest.raises(UsageError):
        keys.seal(suite_key(Encr.AES_GCM_16, Integ.NONE), b"", b"", bytes(12))


def test_padding_longer_than_the_text_is_refused() -> None:
    # sealed by hand with a pad length octet that lies
    key = suite_key(Encr.AES_GCM_16, Integ.NONE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_padding", lambda *_: b"\x20")
        body = keys.seal(key, b"", b"", bytes(8))
    with pytest.raises(WireError):
        keys.open_(key, b"", body)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SUITES), st.binary(max_size=200))
def test_foreign_octets_raise_only_wire_errors(suite: tuple[Encr, Integ], body: bytes) -> None:
    with pytest.raises(WireError):
        keys.open_(suite_key(*suite), b"head", body)


def test_no_key_in_any_repr() -> None:
    sk = keys.sk_keys(generation())
    shown = repr(sk) + repr(keys.child_keys(generation(), child())) + repr(suite_key(*SUITES[0]))
    for secret in (sk.sk_d, sk.sk_ei, sk.sk_er):
        assert secret.reveal().hex() not in shown
        assert repr(secret.reveal()) not in shown
