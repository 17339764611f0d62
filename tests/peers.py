"""Stand-ins for the world: a hand-moved clock, contexts, gateways kept in dictionaries, links that break."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, ip_address

from ikectx.context import (
    AuthRound,
    ChildContext,
    Endpoint,
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
from ikectx.numbers import Encr, IdType, KeMethod, Prf


class HandClock:
    """`ports.Clock` that goes forward when it is told to."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def forward(self, seconds: float) -> None:
        self._now += seconds


def a_context(number: int = 1, *, mn: str = "198.51.100.7", epoch: int = 0) -> IkeContext:
    """An IKE_SA with one child, as its gateway would export it; `number` sets what is unique."""
    mark = number.to_bytes(4)
    vip = IPv4Address(f"10.3.{number >> 8 & 255}.{number & 255}")
    generation = IkeGeneration(
        spi_i=b"\x11MNi" + mark,
        spi_r=b"\x22GWr" + mark,
        initiator=False,
        nonce_i=b"nonce of the initiator, the MN..",
        nonce_r=b"nonce of the responder, a gate..",
        secret=Secret(b"g to the ir, never to be shown.." + mark),
        prf=Prf.HMAC_SHA2_256,
        encr=Encr.AES_GCM_16,
        encr_bits=128,
        ke=KeMethod.CURVE_25519,
    )
    child = ChildContext(
        name="rw",
        generation=0,
        initiator=False,
        spi_in=b"\xc1" + mark[1:],
        spi_out=b"\xc2" + mark[1:],
        nonce_i=generation.nonce_i,
        nonce_r=generation.nonce_r,
        encr=Encr.AES_GCM_16,
        encr_bits=128,
        local_ts=(TrafficSelector(IPv4Address("10.1.0.0"), IPv4Address("10.1.255.255")),),
        remote_ts=(TrafficSelector(vip, vip),),
        inbound=ReplayState(seq=100, window=32, bitmap=0xFFFFFFFF),
        outbound=ReplayState(seq=200),
        lifetime=Lifetime(rekey=3000, hard=3600),
    )
    return IkeContext(
        connection="home",
        generations=(generation,),
        local_id=Identity(IdType.FQDN, b"gw.example"),
        remote_id=Identity(IdType.FQDN, f"mn{number}.example".encode()),
        local=Endpoint.of("192.0.2.1", 4500)
        if ip_address(mn).version == 4
        else Endpoint.of("2001:db8::1", 4500),
        remote=Endpoint.of(mn, 4500),
        children=(child,),
        remote_vips=(vip,),
        mid_initiator=2,
        mid_responder=5,
        lifetime=Lifetime(rekey=10000),
        policies=tuple(PolicyContext(0, direction) for direction in ("in", "out", "fwd")),
        peer=PeerContext("home", (AuthRound("pubkey", "gw.example"),), (AuthRound("psk"),), ("rw",)),
        epoch=epoch,
    )


def aged(context: IkeContext, packets: int) -> IkeContext:
    """The same SA after that many packets each way."""
    children = tuple(
        replace(
            child,
            inbound=replace(child.inbound, seq=child.inbound.seq + packets),
            outbound=replace(child.outbound, seq=child.outbound.seq + packets),
        )
        for child in context.children
    )
    return replace(context, children=children)
