"""A gateway that has psg's certificate and says what it likes: `python -m tests.live.rogue FOLDER`.

Run in psg's namespace, with psg's folder. It offers nsg SAs that no mobile node ever set up, one connection
each, and prints nsg's answers as JSON: by the name of the attack, a status for each profile that was refused
and the words that nsg gave.
"""

from __future__ import annotations

import json
import secrets
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

from ikectx.engine.offer_answer import offer_status
from ikectx.net.credentials import TlsConfig
from ikectx.numbers import Encr, IdType, Integ, Mode
from ikectx.sa.context import (
    ChildContext,
    Endpoint,
    Identity,
    IkeContext,
    Lifetime,
    Secret,
    TrafficSelector,
)
from ikectx.wire.cxtp import Ctdr, Pctd, StreamDecoder
from ikectx.wire.profile import TransferHeader, encode
from ikectx_cli.lab.net import INNER, INNER_NET, OUTER
from tests.peers import a_context
from vici_bridge.vici.views import EXT_MOBIKE

Attack = Callable[[IkeContext], IkeContext]


def selector(text: str) -> TrafficSelector:
    net = ip_network(text)
    return TrafficSelector(net.network_address, net.broadcast_address)


def decent() -> IkeContext:
    """What the mobile node's SA would look like."""
    made = a_context(secrets.randbelow(1 << 16) + 1)
    vip = ip_address(INNER["mn"][4])
    child = replace(
        made.children[0],
        name="net",
        local_ts=(selector(INNER_NET[4]),),
        remote_ts=(selector(str(vip)),),
    )
    return replace(
        made,
        connection="mn",
        generations=(replace(made.current, secret=Secret(secrets.token_bytes(32))),),
        local_id=Identity(IdType.FQDN, b"psg.example"),
        remote_id=Identity(IdType.FQDN, b"mn.example"),
        local=Endpoint.of(OUTER["psg"][4], 4500),
        remote=Endpoint.of(OUTER["mn"][4], 4500),
        children=(child,),
        remote_vips=(vip,),
        extensions=EXT_MOBIKE,
        peer=None,
        policies=(),
    )


def of_child(**changes: object) -> Attack:
    def attack(context: IkeContext) -> IkeContext:
        child: ChildContext = replace(context.children[0], **changes)  # type: ignore[arg-type]
        return replace(context, children=(child,))

    return attack


def of_sa(**changes: object) -> Attack:
    return lambda context: replace(context, **changes)  # type: ignore[arg-type]


def at(address: str, port: int = 4500) -> Attack:
    return of_sa(remote=Endpoint.of(address, port))


def server_without_vip(context: IkeContext) -> IkeContext:
    """It says that its mobile node is where the inner server is."""
    server = INNER["srv"][4]
    here = replace(context, remote_vips=(), remote=Endpoint.of(server, 4500))
    return of_child(remote_ts=(selector(server),))(here)


def many(context: IkeContext) -> IkeContext:
    child = context.children[0]
    names = [number.to_bytes(4) for number in range(0xC1000000, 0xC100003C)]
    return replace(context, children=tuple(replace(child, spi_in=spi, spi_out=spi) for spi in names))


ATTACKS: dict[str, Attack] = {
    "none": lambda context: context,
    "identity": of_sa(remote_id=Identity(IdType.FQDN, b"root.evil")),
    "identity that forges": of_sa(remote_id=Identity(IdType.FQDN, b"a\nERROR ikectx: forged\x1b[31m")),
    "identity with NUL": of_sa(remote_id=Identity(IdType.FQDN, b"\xff\xfe\0x")),
    "gateway's identity": of_sa(local_id=Identity(IdType.FQDN, b"other.example")),
    "EAP identity": of_sa(remote_eap_id=Identity(IdType.FQDN, b"carol")),
    "server": of_child(remote_ts=(selector(INNER["srv"][4]),)),
    "server as outer address": server_without_vip,
    "everything": of_child(local_ts=(selector("0.0.0.0/0"),)),
    "virtual IP": of_sa(remote_vips=(ip_address("10.4.0.99"),)),
    "3DES": of_child(encr=Encr.DES3, encr_bits=0, integ=Integ.HMAC_SHA1_96),
    "NULL": of_child(encr=Encr.NULL, encr_bits=0, integ=Integ.HMAC_SHA2_256_128),
    "transport mode": of_child(mode=Mode.TRANSPORT),
    "SPI 5": of_child(spi_in=bytes((0, 0, 0, 5))),
    "SPI 0": of_child(spi_out=bytes(4)),
    "multicast": at("224.0.0.5"),
    "broadcast": at("255.255.255.255"),
    "loopback": at("127.0.0.1"),
    "nsg": at(OUTER["nsg"][4]),
    "psg": at(OUTER["psg"][4]),
    "port 22": at(OUTER["mn"][4], 22),
    "port 0": at(OUTER["mn"][4], 0),
    "message ID": of_sa(mid_responder=(1 << 32) - 1),
    "lifetime": of_child(lifetime=Lifetime(rekey=-5)),
    "60 children": many,
}


PACE = 0.2
"""Seconds between two connections: ten a second of one address are let in (`ikectx.net.door`)."""


def offer(folder: Path, context: IkeContext, intent: str) -> Ctdr:
    """nsg's answer to one PCTD."""
    tls = TlsConfig(folder / "x509" / "own.pem", folder / "private" / "own.pem", folder / "x509ca" / "ca.pem")
    header = TransferHeader(secrets.token_bytes(8), intent, "keep" if intent == "keep" else "update")  # type: ignore[arg-type]
    message = Pctd(context.remote.address, encode(context, transfer=header)).serialize()
    time.sleep(PACE)
    with (
        socket.create_connection((OUTER["nsg"][4], 5091), timeout=10) as raw,
        tls.context(server=False).wrap_socket(raw) as link,
    ):
        link.sendall(message)
        decoder = StreamDecoder()
        while True:
            for answer in decoder.feed(link.recv(1 << 16)):
                assert isinstance(answer, Ctdr)
                return answer


def main() -> None:
    """Offer each of them, to be checked, and those that `sys.argv` names after the folder in earnest."""
    folder, earnest = Path(sys.argv[1]), sys.argv[2:]
    said = {}
    for name, attack in ATTACKS.items():
        for intent in ["check", *(["prepare"] if name in earnest else [])]:
            _, verdicts = offer_status(offer(folder, attack(decent()), intent))
            said[f"{name} ({intent})"] = [
                (each.fpt.name, each.status.name, each.detail) for each in verdicts if each.status
            ]
    print(json.dumps(said))


if __name__ == "__main__":
    main()
