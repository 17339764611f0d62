"""What charon's ha stream says: recorded ones, and an SA of two rekeys that messages are made for."""

from __future__ import annotations

import json
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ikectx.numbers import Encr, IdType, KeMethod, Prf
from ikectx.sa.context import (
    ChildContext,
    Endpoint,
    Identity,
    IkeContext,
    IkeGeneration,
    Secret,
    TrafficSelector,
)
from ikectx.sa.name import SaName
from vici_bridge.ha import messages as ha
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.messages import HaMessage
from vici_bridge.ha.record import Record

VECTORS = Path(__file__).parent / "vectors"
REAL = ("5.9.8_rekeys", "5.9.8_collisions", "5.9.8_resync", "5.9.8_taken", "6.0.6_rekeys")
MN, GW, NSG = (Endpoint.of(host, 4500) for host in ("192.0.2.1", "198.51.100.1", "203.0.113.1"))
VIP = ip_address("10.3.0.1")


def vector(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((VECTORS / f"ha_{name}.json").read_text())
    return data


def stream(name: str) -> list[HaMessage]:
    return [HaMessage.parse(bytes.fromhex(datagram)) for _, datagram in vector(name)["datagrams"]]


def generation(number: int, old: bool = False) -> IkeGeneration:
    return IkeGeneration(
        spi_i=bytes([0xA0 + number]) * 8,
        spi_r=bytes([0xB0 + number]) * 8,
        initiator=number % 2 == 1,
        nonce_i=bytes([0x10 + number]) * 32,
        nonce_r=bytes([0x20 + number]) * 32,
        secret=Secret(bytes([0x30 + number]) * 32),
        prf=Prf.HMAC_SHA2_256,
        encr=Encr.AES_GCM_16,
        encr_bits=128,
        ke=KeMethod.CURVE_25519,
        old_skd=Secret(bytes([0x40 + number]) * 32) if old else None,
        old_prf=Prf.HMAC_SHA2_256 if old else None,
    )


def child(number: int, index: int = 0) -> ChildContext:
    return ChildContext(
        name="net",
        generation=index,
        initiator=number % 2 == 0,
        spi_in=bytes([0xC0 + number]) * 4,
        spi_out=bytes([0xD0 + number]) * 4,
        nonce_i=bytes([0x50 + number]) * 32,
        nonce_r=bytes([0x60 + number]) * 32,
        encr=Encr.AES_GCM_16,
        local_ts=(TrafficSelector(ip_address("10.1.0.0"), ip_address("10.1.255.255")),),
        remote_ts=(TrafficSelector(VIP, VIP),),
        encr_bits=128,
        esn=number % 2 == 1,
    )


G1, G2, G3 = generation(1), generation(2, old=True), generation(3, old=True)
I1, I2, I3 = IkeId.of(G1), IkeId.of(G2), IkeId.of(G3)
CONTEXT = IkeContext(
    connection="roam",
    generations=(G1, G2),
    local_id=Identity(IdType.FQDN, b"gw.example"),
    remote_id=Identity(IdType.FQDN, b"mn.example"),
    local=GW,
    remote=MN,
    children=(child(1, 0), child(2, 1), child(3, 1)),
    remote_eap_id=Identity(IdType.RFC822_ADDR, b"mn@example"),
    remote_vips=(VIP, ip_address("2001:db8::7")),
    peer_addresses=(Endpoint.of("192.0.2.9", 0),),
    conditions=0x4005,
    extensions=0x392B,
    mid_initiator=3,
    mid_responder=9,
)


def up(ike: IkeId, version: int = 5, **more: Any) -> HaMessage:
    return ha.ike_update(
        version,
        ike,
        local_id=CONTEXT.local_id,
        remote_id=CONTEXT.remote_id,
        local=GW,
        remote=MN,
        name="roam",
        **more,
    )


def fed(*messages: HaMessage) -> Record:
    record = Record()
    for message in messages:
        record.feed(message)
    return record


def first() -> list[HaMessage]:
    """An IKE_SA comes up with a child and a virtual IP."""
    return [
        ha.ike_add(5, G1, MN),
        up(I1),
        ha.child_add(5, I1, child(1)),
        ha.ike_update(5, I1, remote_vips=(VIP,)),
    ]


def again(record: Record) -> Record:
    """The record as it comes back from the store."""
    loaded = Record()
    loaded.load([(key, value) for key, value in record.dump(everything=True) if value is not None])
    return loaded


def states(record: Record) -> dict[SaName, object]:
    return dict(record._sas)
