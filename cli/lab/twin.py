"""An SA of mn2 with nsg that has names of mn's SA at psg: what chance would do in one of 2^28 cases.

No IKE exchange makes two charons choose given names. So both ends are told of the SA over their HA sockets
(as of any SA that an agent brings), with secrets of the lab's own: it carries traffic, and both charons
rekey and delete it like one that IKE has set up. Everything but the sending is in here, and pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

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
from vici_bridge.ha.chain import import_messages
from vici_bridge.ha.messages import segment_drop, segment_take
from vici_bridge.ha.version import wire_version

from .config import Tunnel
from .net import INNER, INNER_NET, NAT, NAT_PORT, OUTER

KINDS: Mapping[str, tuple[str, ...]] = {
    "inbound": ("spi_in",),
    "outbound": ("spi_out",),
    "ike": ("spi_i", "spi_r"),
    "all": ("spi_i", "spi_r", "spi_in", "spi_out"),
}
"""Which names the twin has of the other SA. An outbound SPI is only taken together with the mobile node's
address, so that `outbound` and `all` need both mobile nodes behind one NAT."""

_FRESH = 4 * 32 + 2 * 8 + 2 * 4 + 2 * 32
FRESH_OCTETS = _FRESH
"""Random octets that `twin` asks for."""

_NAT_ANY, _NAT_HERE, _NAT_THERE, _NAT_FAKE = 1, 2, 4, 8
_ORIGINAL_INITIATOR, _AUTHENTICATED = 1 << 6, 1 << 14
_EXTENSIONS = 1 << 0 | 1 << 1 | 1 << 11 | 1 << 12 | 1 << 16
"""charon's bits for NAT traversal, MOBIKE, fragmentation, signature hashes, childless IKE_SAs."""


@dataclass(frozen=True, slots=True)
class TwinNames:
    """Names of an IKE_SA and its CHILD_SA as the gateway sees them, in hexadecimal as VICI has them."""

    spi_i: str
    spi_r: str
    spi_in: str
    spi_out: str


def twin(tunnel: Tunnel, kind: str, taken: TwinNames, fresh: bytes) -> dict[str, IkeContext]:
    """The SA at its two ends, `nsg` and `mn2`: the names of `kind` are those `taken`, the others random."""
    rest = memoryview(fresh)

    def some(count: int) -> bytes:
        nonlocal rest
        found, rest = bytes(rest[:count]), rest[count:]
        return found

    secret = Secret(some(32))
    nonces = [some(32) for _ in range(4)]
    drawn = {"spi_i": some(8), "spi_r": some(8), "spi_in": b"\xce" + some(3), "spi_out": b"\xcf" + some(3)}
    names = {
        name: bytes.fromhex(getattr(taken, name)) if name in KINDS[kind] else octets
        for name, octets in drawn.items()
    }
    nsg, mn2 = Endpoint.of(OUTER["nsg"][tunnel.family], 4500), Endpoint.of(OUTER["mn2"][tunnel.family], 4500)
    seen = Endpoint.of(NAT, NAT_PORT["mn2"]) if tunnel.nat else mn2
    vip, net = ip_address(INNER["mn2"][tunnel.inner]), ip_network(INNER_NET[tunnel.inner])
    near = (TrafficSelector(net.network_address, net.broadcast_address),)
    far = (TrafficSelector(vip, vip),)
    natted = tunnel.nat or tunnel.libipsec or tunnel.encap

    def end(*, gateway: bool) -> IkeContext:
        generation = IkeGeneration(
            names["spi_i"],
            names["spi_r"],
            not gateway,
            nonces[0],
            nonces[1],
            secret,
            Prf.HMAC_SHA2_256,
            Encr.AES_GCM_16,
            128,
            ke=KeMethod.CURVE_25519,
        )
        spis = (names["spi_in"], names["spi_out"]) if gateway else (names["spi_out"], names["spi_in"])
        selectors = (near, far) if gateway else (far, near)
        child = ChildContext(
            "net", 0, not gateway, *spis, nonces[2], nonces[3], Encr.AES_GCM_16, *selectors, encr_bits=128
        )
        here, there = ("nsg", "mn2") if gateway else ("mn2", "nsg")
        conditions = _AUTHENTICATED if gateway else _AUTHENTICATED | _ORIGINAL_INITIATOR
        if tunnel.nat:
            conditions |= _NAT_ANY | (_NAT_THERE if gateway else _NAT_HERE)
        elif natted:
            conditions |= _NAT_ANY | _NAT_FAKE
        return IkeContext(
            there,  # connections are named after the other end
            (generation,),
            Identity(IdType.FQDN, f"{here}.example".encode()),
            Identity(IdType.FQDN, f"{there}.example".encode()),
            nsg if gateway else mn2,
            seen if gateway else nsg,
            (child,),
            remote_vips=(vip,) if gateway else (),
            conditions=conditions,
            extensions=_EXTENSIONS,
        )

    return {"nsg": end(gateway=True), "mn2": end(gateway=False)}


def lines(context: IkeContext, strongswan: str) -> str:
    """What `lab_inject` reads to give charon of that version the SA, and to make it active."""
    version = wire_version(strongswan)
    sends = [message.serialize().hex() for message in import_messages(context, version)]
    toggle = [segment_take(version, 0).serialize().hex(), segment_drop(version, 0).serialize().hex()]
    return "\n".join([*sends, "sleep 0.5", *toggle]) + "\n"
