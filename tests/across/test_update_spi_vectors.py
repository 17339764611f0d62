"""Whole messages of UPDATE_SPI, `vectors/update_spi_messages.json`: keys, octets in the clear and sealed.

They were made by this project. So each is made once more here, by hand, with nothing but struct and the
primitives of `cryptography` (HMAC, AES-GCM, AES-CBC, ChaCha20-Poly1305), and must come out the same; and the
machines must send and understand these octets. `python -m tests.test_update_spi_vectors` writes the file.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hmac import HMAC

from ikectx.numbers import Encr, Integ, Prf, Protocol
from ikectx.sa.context import Endpoint, IkeGeneration, Secret
from ikectx.sa.keys import sk_keys
from mobike_ext.address_update import AddressNotice
from mobike_ext.naming import renamed_ike
from mobike_ext.notify import Reason, UpdateSpi
from mobike_ext.requester import SaEnd
from mobike_ext.responder import Asked, SpiResponder
from mobike_ext.spi_update import FRESH_OCTETS, Renamed, RenameRefused, SpiUpdate
from tests.air import Names

PATH = Path(__file__).parent.parent / "vectors/update_spi_messages.json"
GATEWAY, NODE = Endpoint.of("192.0.2.20", 500), Endpoint.of("198.51.100.7", 500)
"""Port 500: no marker in front."""
SPI_I, SPI_R = bytes.fromhex("114d4e6900000001"), bytes.fromhex("2247577200000001")
NI, NR, SECRET = bytes(range(32)), bytes(range(64, 96)), bytes(range(128, 160))
COOKIE2 = bytes(range(0xA0, 0xB0))
MESSAGE_ID = 7
ESP, IKE = 3, 1


@dataclass(frozen=True)
class Suite:
    """Algorithms of an IKE_SA, by their numbers; lengths in octets."""

    encr: Encr
    bits: int
    integ: Integ
    prf: Prf
    hash: Any
    key: int
    mac: int = 0


GCM = Suite(Encr.AES_GCM_16, 128, Integ.NONE, Prf.HMAC_SHA2_256, hashes.SHA256(), 16 + 4)
CBC = Suite(Encr.AES_CBC, 256, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, hashes.SHA256(), 32, 32)
CHACHA = Suite(Encr.CHACHA20_POLY1305, 0, Integ.NONE, Prf.HMAC_SHA2_512, hashes.SHA512(), 32 + 4)


@dataclass(frozen=True)
class Case:
    """What is asked, and answered: (protocol, old, new or nothing, chosen or reason)."""

    label: str
    suite: Suite
    asked: tuple[tuple[int, bytes, bytes], ...]
    chosen: tuple[bytes, ...] = ()
    reason: int = 0
    addresses: bool = False
    limit: int | None = None


CASES = [
    Case(
        "both SPIs of a CHILD_SA, and the addresses with them",
        GCM,
        ((ESP, b"\xc1\0\0\1", b"\xc9\x12\x34\x56"), (ESP, b"\xc2\0\0\2", b"")),
        (b"\xc9\x12\x34\x56", b"\xca\xfe\xba\xbe"),
        addresses=True,
    ),
    Case("the IKE_SA", CBC, ((IKE, SPI_R, b"\x22GWnew\0\2"),), (b"\x22GWnew\0\2",)),
    Case("a refusal", CHACHA, ((ESP, b"\xc1\0\0\1", b"\xc9\x12\x34\x56"),), reason=3),
    Case(
        "in fragments",
        GCM,
        tuple((ESP, bytes([0xC1, 0, 0, n]), bytes([0xC9, 0, 0, n])) for n in range(1, 7)),
        tuple(bytes([0xC9, 0, 0, n]) for n in range(1, 7)),
        limit=128,
    ),
]


# --- by hand -------------------------------------------------------------------------------------------


def hmac(kind: Any, key: bytes, data: bytes) -> bytes:
    mac = HMAC(key, kind)
    mac.update(data)
    return mac.finalize()


def sk(suite: Suite, spi_i: bytes, spi_r: bytes) -> dict[str, bytes]:
    """SK_* (RFC 7296, 2.14)."""
    seed = hmac(suite.hash, NI + NR, SECRET)
    sizes = {"d": suite.hash.digest_size, "ai": suite.mac, "ar": suite.mac, "ei": suite.key, "er": suite.key}
    out = last = b""
    for count in range(1, 20):
        last = hmac(suite.hash, seed, last + NI + NR + spi_i + spi_r + bytes([count]))
        out += last
    keys, at = {}, 0
    for name, size in sizes.items():
        keys[name] = out[at : at + size]
        at += size
    return keys


def notify(number: int, data: bytes = b"", protocol: int = 0, spi: bytes = b"") -> bytes:
    return struct.pack("!BBH", protocol, len(spi), number) + spi + data


def chain(bodies: list[bytes]) -> bytes:
    """Notify payloads (41) behind one another."""
    out = b""
    for at, body in enumerate(bodies):
        out += struct.pack("!BBH", 41 if at + 1 < len(bodies) else 0, 0, len(body) + 4) + body
    return out


def nat(number: int, address: bytes) -> bytes:
    digest = hashes.Hash(hashes.SHA1())
    digest.update(SPI_I + SPI_R + address + (500).to_bytes(2))
    return notify(number, digest.finalize())


def in_clear(case: Case) -> tuple[bytes, bytes]:
    """The payloads of request and answer."""
    asked, answered = [], []
    for at, (protocol, old, new) in enumerate(case.asked):
        flags = bytes([0 if new else 1, 0, 0, 0])
        asked.append(notify(41961, flags + new, protocol, old))
        if case.reason:
            answered.append(notify(41962, bytes([case.reason]), protocol, old))
        else:
            answered.append(notify(41961, flags + case.chosen[at], protocol, old))
    if case.addresses:
        here, there = GATEWAY.address.packed, NODE.address.packed
        cookie = notify(16401, COOKIE2)
        asked = [notify(16400), nat(16388, here), nat(16389, there), cookie, *asked]
        answered += [nat(16388, there), nat(16389, here), cookie]
    return chain(asked), chain(answered)


def sealed(case: Case, inner: bytes, ivs: bytes, *, response: bool) -> list[bytes]:
    """The datagrams of one message (RFC 7296, 3.14; RFC 5282, 7634, 7383).

    nSG is the original responder, the MN the initiator.
    """
    suite, keys = case.suite, sk(case.suite, SPI_I, SPI_R)
    cbc = suite.encr is Encr.AES_CBC
    size, icv = (16, 16) if cbc else (8, 16)
    flags, side = (0x28, "i") if response else (0x00, "r")

    def one(part: bytes, iv: bytes, kind: int, middle: bytes) -> bytes:
        padded = len(part) + 1 + (-(len(part) + 1) % 16 if cbc else 0)
        length = 4 + len(middle) - 2 + size + padded + icv
        header = SPI_I + SPI_R + bytes([kind, 0x20, 37, flags]) + struct.pack("!II", MESSAGE_ID, 28 + length)
        head = header + middle[:2] + struct.pack("!H", length) + middle[2:]
        if cbc:
            fill = -(len(part) + 1) % 16
            seal = Cipher(algorithms.AES(keys["e" + side]), modes.CBC(iv)).encryptor()
            out = iv + seal.update(part + bytes(fill) + bytes([fill])) + seal.finalize()
            return head + out + hmac(hashes.SHA256(), keys["a" + side], head + out)[:16]
        key = keys["e" + side]
        aead = AESGCM(key[:-4]) if suite.encr is Encr.AES_GCM_16 else ChaCha20Poly1305(key[:-4])
        return head + iv + aead.encrypt(key[-4:] + iv, part + b"\0", head)

    if case.limit is None or 28 + 4 + size + len(inner) + 1 + icv <= case.limit:
        return [one(inner, ivs[:size], 46, b"\x29\0")]
    step = case.limit - 28 - 8 - size - 1 - icv
    parts = [inner[at : at + step] for at in range(0, len(inner), step)]
    return [
        one(
            part,
            ivs[size * n : size * (n + 1)],
            53,
            bytes([0 if n else 41, 0]) + struct.pack("!HH", n + 1, len(parts)),
        )
        for n, part in enumerate(parts)
    ]


IVS = {"request": bytes(range(0x40, 0xC0)), "answer": bytes(range(0x60, 0xE0))}


def made(case: Case) -> dict[str, Any]:
    """A case as it stands in the file."""
    asked, answered = in_clear(case)
    suite = case.suite
    keys = sk(suite, SPI_I, SPI_R)
    out: dict[str, Any] = {
        "label": case.label,
        "suite": {
            "encr": suite.encr.name,
            "bits": suite.bits,
            "integ": suite.integ.name,
            "prf": suite.prf.name,
        },
        "spi_i": SPI_I.hex(),
        "spi_r": SPI_R.hex(),
        "nonce_i": NI.hex(),
        "nonce_r": NR.hex(),
        "shared_secret": SECRET.hex(),
        **{f"sk_{name}": key.hex() for name, key in keys.items()},
        "message_id": MESSAGE_ID,
        "limit": case.limit,
        "request_payloads": asked.hex(),
        "request_ivs": IVS["request"].hex(),
        "request": [one.hex() for one in sealed(case, asked, IVS["request"], response=False)],
        "answer_payloads": answered.hex(),
        "answer_ivs": IVS["answer"].hex(),
        "answer": [one.hex() for one in sealed(case, answered, IVS["answer"], response=True)],
    }
    if case.asked[0][0] == IKE:
        out["new_spi_r"] = case.chosen[0].hex()
        out |= {f"new_sk_{name}": key.hex() for name, key in sk(suite, SPI_I, case.chosen[0]).items()}
    return out


SOURCE = (
    "Made by this project, once by its machines and once by hand in test_update_spi_vectors.py, with the "
    "primitives of `cryptography` only. nSG (192.0.2.20, original responder) asks, the MN (198.51.100.7, "
    "original initiator) answers, both on port 500, so without a non-ESP marker. IVs stand one behind the "
    "other, one for each datagram; what is left over is not used."
)


# --- and by the machines -------------------------------------------------------------------------------


def generation(case: Case, *, initiator: bool) -> IkeGeneration:
    suite = case.suite
    return IkeGeneration(
        SPI_I,
        SPI_R,
        initiator,
        NI,
        NR,
        Secret(SECRET),
        suite.prf,
        suite.encr,
        suite.bits,
        suite.integ,
    )


FILE = json.loads(PATH.read_text()) if PATH.exists() else {"cases": []}


def test_every_case_is_there() -> None:
    assert [one["label"] for one in FILE["cases"]] == [case.label for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_by_hand(case: Case) -> None:
    assert made(case) == FILE["cases"][CASES.index(case)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_by_the_machines(case: Case) -> None:
    given = FILE["cases"][CASES.index(case)]
    world = Names({(Protocol(p), not new, old) for p, old, new in case.asked})
    for at, (_, old, new) in enumerate(case.asked):
        if not new:
            world.reserved[old] = case.chosen[at]
        if case.reason:
            world.objections[old] = Reason(case.reason)
    asks = SpiUpdate(
        SaEnd(generation(case, initiator=False), MESSAGE_ID, GATEWAY, NODE, limit=case.limit),
        [UpdateSpi(Protocol(p), old, new, choose=not new) for p, old, new in case.asked],
        iv=bytes.fromhex(given["request_ivs"]),
        fresh=bytes(FRESH_OCTETS),
        address=AddressNotice(COOKIE2) if case.addresses else None,
    )
    answers = SpiResponder(generation(case, initiator=True), MESSAGE_ID, NODE, world, limit=case.limit)
    request = asks.to_send(0)
    assert [one.hex() for one, _ in request] == given["request"]
    for one, _ in request:
        answers.receive(one, GATEWAY, 0)
    event = answers.next_event()
    assert isinstance(event, Asked)
    answers.answer(bytes.fromhex(given["answer_ivs"]), 0)
    answer = answers.to_send(0)
    assert [one.hex() for one, _ in answer] == given["answer"]
    for one, _ in answer:
        asks.receive(one, NODE, 0)
    outcome = None
    while (told := asks.next_event()) is not None:
        outcome = told
    if case.reason:
        assert outcome == RenameRefused((Reason(case.reason),))
        return
    assert isinstance(outcome, Renamed)
    assert [pair.new for pair in outcome.pairs] == list(case.chosen)
    renamed = renamed_ike(generation(case, initiator=False), outcome.pairs)
    if renamed is not None:
        keys = sk_keys(renamed)
        assert keys.sk_ei.reveal().hex() == given["new_sk_ei"]
        assert keys.sk_ar.reveal().hex() == given["new_sk_ar"]
        assert keys.sk_d.reveal().hex() == given["new_sk_d"]


if __name__ == "__main__":
    text = json.dumps({"source": SOURCE, "cases": [made(case) for case in CASES]}, indent=1)
    PATH.write_text(text + "\n")
