"""Contexts as profiles carry them, the vectors of them, and profiles with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import cbor2

from ikectx.numbers import Encr, Fpt, IdType, Integ, KeMethod, Mode, Prf
from ikectx.sa.context import (
    AuthRound,
    ChildContext,
    Endpoint,
    FinalChild,
    FinalState,
    Identity,
    IkeContext,
    IkeGeneration,
    Lifetime,
    PeerContext,
    PolicyContext,
    ReplayState,
    Secret,
    TrafficSelector,
)
from ikectx.wire import cbor
from ikectx.wire.cxtp import MAX_BLOCK_DATA, ContextDataBlock
from ikectx.wire.profile import TransferHeader, encode

TRANSFER = TransferHeader(bytes.fromhex("0123456789abcdef"))
VECTORS = Path(__file__).parent / "vectors"


def octets(count: int, start: int) -> bytes:
    return bytes((start + 7 * n) & 0xFF for n in range(count))


def selector(text: str, **more: Any) -> TrafficSelector:
    net = ip_network(text)
    return TrafficSelector(net[0], net[-1], **more)


NI, NR = octets(32, 1), octets(32, 2)

TYPICAL = IkeContext(
    connection="mn",
    generations=(
        IkeGeneration(
            spi_i=octets(8, 3),
            spi_r=octets(8, 4),
            initiator=False,
            nonce_i=NI,
            nonce_r=NR,
            secret=Secret(octets(32, 5)),
            prf=Prf.HMAC_SHA2_256,
            encr=Encr.AES_GCM_16,
            encr_bits=128,
            ke=KeMethod.CURVE_25519,
        ),
    ),
    local_id=Identity(IdType.FQDN, b"psg.example.org"),
    remote_id=Identity(IdType.RFC822_ADDR, b"mn@example.org"),
    local=Endpoint.of("192.0.2.1", 4500),
    remote=Endpoint.of("198.51.100.7", 4500),
    children=(
        ChildContext(
            name="net",
            generation=0,
            initiator=False,
            spi_in=octets(4, 6),
            spi_out=octets(4, 7),
            nonce_i=NI,
            nonce_r=NR,
            encr=Encr.AES_GCM_16,
            local_ts=(selector("10.1.0.0/16"),),
            remote_ts=(selector("10.3.0.1/32"),),
            encr_bits=128,
            inbound=ReplayState(1_234_567, 32, 0xFFFFFFFF),
            outbound=ReplayState(7_654_321),
            lifetime=Lifetime(rekey=2871, hard=3311, bytes_used=123_456_789, packets_used=123_456),
        ),
    ),
    remote_vips=(ip_address("10.3.0.1"),),
    peer_addresses=(Endpoint.of("198.51.100.7"),),
    conditions=0x1234,
    extensions=0x0F,
    mid_initiator=3,
    mid_responder=17,
    lifetime=Lifetime(rekey=13_501, hard=14_941),
    policies=tuple(PolicyContext(0, way, priority=375_423) for way in ("fwd", "in", "out")),
    peer=PeerContext(
        "mn",
        (AuthRound("psk", "psg.example.org"),),
        (AuthRound("psk", "mn@example.org"),),
        ("net",),
        pools=("vips",),
    ),
    epoch=1,
)

TYPICAL_FINAL = FinalState(
    *TYPICAL.spis,
    mid_initiator=4,
    mid_responder=18,
    epoch=2,
    children=(
        FinalChild(
            TYPICAL.children[0].spi_in, ReplayState(1_234_999, 32, 0xFFFFFFFD), ReplayState(7_654_999)
        ),
    ),
)

RICH = replace(
    TYPICAL,
    generations=(
        TYPICAL.current,
        replace(
            TYPICAL.current,
            spi_i=octets(8, 8),
            spi_r=octets(8, 9),
            initiator=True,
            encr=Encr.AES_CBC,
            encr_bits=256,
            integ=Integ.HMAC_SHA2_256_128,
            add_secret=Secret(octets(32, 10)),
            add_kes=b"\x24",
            old_skd=Secret(octets(32, 11)),
            old_prf=Prf.HMAC_SHA1,
        ),
    ),
    local=Endpoint.of("2001:db8::1"),
    remote=Endpoint.of("2001:db8:1::7"),
    remote_eap_id=Identity(IdType.KEY_ID, b"carol"),
    local_vips=(ip_address("10.9.9.9"),),
    remote_vips=(ip_address("10.3.0.1"), ip_address("2001:db8:3::1")),
    peer_addresses=(Endpoint.of("2001:db8:1::7"), Endpoint.of("198.51.100.7", 4500)),
    children=(
        TYPICAL.children[0],
        ChildContext(
            name="pfs",
            generation=1,
            initiator=True,
            spi_in=octets(4, 12),
            spi_out=octets(4, 13),
            nonce_i=octets(16, 14),
            nonce_r=octets(64, 15),
            encr=Encr.AES_CBC,
            encr_bits=256,
            integ=Integ.HMAC_SHA2_512_256,
            ke=KeMethod.ECP_384,
            secret=Secret(octets(48, 16)),
            local_ts=(
                selector("2001:db8:2::/48", protocol=17, start_port=5000, end_port=5009),
                TrafficSelector(ip_address("10.1.0.1"), ip_address("10.1.0.7")),
                selector("0.0.0.0/0"),
            ),
            remote_ts=(selector("2001:db8:3::1/128", dynamic=True), selector("::/0")),
            mode=Mode.TRANSPORT,
            esn=True,
            ipcomp=2,
            cpi_in=0x1234,
            cpi_out=0x4321,
            inbound=ReplayState((7 << 32) + 5, 2048, (1 << 2048) - 1 ^ 0x0800, esn=True),
            outbound=ReplayState((7 << 32) + 9, esn=True),
            lifetime=Lifetime(-5, None, 3000, 1 << 40, 1 << 33, 5, 6),
        ),
    ),
    policies=(
        *TYPICAL.policies,
        PolicyContext(1, "in", 2, 1, 4242),
        PolicyContext(1, "in", 0, 0, 4242),
        PolicyContext(1, "fwd", 0, 0, 4241),
    ),
    peer=PeerContext(
        "mn-eap",
        (AuthRound("pubkey", "CN=psg", groups=("a", "b")),),
        (AuthRound("eap-mschapv2", "", "%any"),),
        ("net", "pfs", "other"),
        ("aes256-sha256-ecp384",),
        ("pool4", "pool6"),
    ),
    update_spi=True,
)


def read_vectors() -> dict[str, list[ContextDataBlock]]:
    found: dict[str, list[ContextDataBlock]] = {}
    name = ""
    for line in (VECTORS / "cxtp_profiles.txt").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("["):
            name, _, fpt = text.strip("[]").partition(" ")
            found.setdefault(name, []).append(ContextDataBlock(Fpt[fpt]))
        elif text:
            block = found[name][-1]
            found[name][-1] = replace(block, data=block.data + bytes.fromhex(text))
    return found


PROFILE_VECTORS = read_vectors()


def rewrite(context: IkeContext, fpt: Fpt, change: Callable[[Any], None]) -> list[ContextDataBlock]:
    """The blocks of a context with one profile's map changed."""
    found = []
    for block in encode(context, transfer=TRANSFER):
        if block.fpt is fpt:
            value = cbor2.loads(block.data)
            change(value)
            data = cbor2.dumps(value, canonical=True)
            cuts = range(0, len(data), MAX_BLOCK_DATA)
            found += [ContextDataBlock(fpt, data[cut : cut + MAX_BLOCK_DATA]) for cut in cuts]
        else:
            found.append(block)
    return found


UNKNOWN = (
    (int(Fpt.IKEV2_SA), 1000, cbor.dumps([1, {7: "x"}])),
    (int(Fpt.IKEV2_SA), 2 << 16 | 30, cbor.dumps(None)),
    (int(Fpt.SAD), 77, cbor.dumps(-1)),
    (int(Fpt.SAD), 1 << 16 | 31, cbor.dumps(b"new")),
    (int(Fpt.SAD), 2 << 16 | 31, cbor.dumps(True)),
    (int(Fpt.SPD), 40, cbor.dumps("")),
    (int(Fpt.PAD), 65535, cbor.dumps(1 << 63)),
)
