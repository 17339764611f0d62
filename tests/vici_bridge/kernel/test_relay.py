"""ESP under an SPI that is somebody else's goes on to the other gateway, and nothing else does."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from ikectx.sa.context import Endpoint
from tests.netns import Namespace, namespaces
from vici_bridge.kernel.relay import Relay, RelayRule

SPI = bytes.fromhex("c1234567")
OTHER = bytes.fromhex("c7654321")
NSG = {4: "10.0.1.1", 6: "fd00:1::1"}
PSG = {4: "10.0.2.2", 6: "fd00:2::2"}
MN = {4: "10.0.1.9", 6: "fd00:1::9"}


@pytest.fixture
def line() -> Iterator[tuple[Namespace, Namespace, Namespace]]:
    """mn - nsg - psg."""
    with namespaces(3) as (mn, nsg, psg):
        nsg.ip("link add name left type veth peer name near", "link add name right type veth peer name far")
        nsg.give("near", mn)
        nsg.give("far", psg)
        nsg.ip(
            "link set left up",
            "link set right up",
            f"address add {NSG[4]}/24 dev left",
            f"address add {NSG[6]}/64 dev left nodad",
            "address add 10.0.2.1/24 dev right",
            "address add fd00:2::1/64 dev right nodad",
        )
        nsg.switch_on("ipv4/ip_forward", "ipv6/conf/all/forwarding")
        mn.ip(
            "link set near up",
            f"address add {MN[4]}/24 dev near",
            f"address add {MN[6]}/64 dev near nodad",
            "address add 10.0.1.10/24 dev near",
        )
        psg.ip(
            "link set far up",
            f"address add {PSG[4]}/24 dev far",
            f"address add {PSG[6]}/64 dev far nodad",
            "route add default via 10.0.2.1",
            "route add default via fd00:2::1",
        )
        yield mn, nsg, psg


def udp(space: Namespace, address: str, port: int = 4500) -> socket.socket:
    with space.entered():
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, port))
    made.settimeout(0.5)
    return made


def heard(sock: socket.socket) -> tuple[bytes, tuple[str, int]] | None:
    try:
        data, source = sock.recvfrom(2000)
    except TimeoutError:
        return None
    return data, source[:2]


@pytest.mark.parametrize("version", [4, 6])
def test_only_what_it_is_told(line: tuple[Namespace, Namespace, Namespace], version: int) -> None:
    mn, nsg, psg = line
    here, there = udp(nsg, NSG[version]), udp(psg, PSG[version])
    sender = udp(mn, MN[version])
    stranger = udp(mn, MN[version], 4501)
    to = (NSG[version], 4500)
    relay = Relay()
    one = RelayRule(Endpoint.of(MN[version], 4500), SPI, ip_address(PSG[version]))
    packet = SPI + bytes(20)
    with nsg.entered():
        relay.add(one)
        relay.add(one)
    found = None
    for _ in range(8):  # neighbours must be found first
        sender.sendto(packet, to)
        if found := heard(there):
            break
    # from the MN, at the other gateway; its checksum was mended
    assert found == (packet, (MN[version], 4500))
    # another SPI, IKE, and another port of the same address stay here
    for sock, data in ((sender, OTHER + bytes(20)), (sender, bytes(4) + b"IKE"), (stranger, packet)):
        sock.sendto(data, to)
        found = heard(here)
        assert found is not None and found[0] == data
    with nsg.entered():
        relay.remove(one)
        relay.remove(one)
    sender.sendto(packet, to)
    assert heard(here) == (packet, (MN[version], 4500))
    for sock in (here, there, sender, stranger):
        sock.close()


@pytest.mark.parametrize("version", [4, 6])
def test_without_udp(line: tuple[Namespace, Namespace, Namespace], version: int) -> None:
    mn, nsg, psg = line
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with psg.entered():
        ear = socket.socket(family, socket.SOCK_RAW, 50)
    ear.settimeout(0.5)
    with mn.entered():
        sender = socket.socket(family, socket.SOCK_RAW, 50)
    relay = Relay()
    with nsg.entered():
        relay.add(RelayRule(Endpoint.of(MN[version], 4500), SPI, ip_address(PSG[version])))
    for _ in range(8):
        for spi in (OTHER, SPI):
            sender.sendto(spi + bytes(20), (NSG[version], 0))
        with contextlib.suppress(TimeoutError):
            data, source = ear.recvfrom(2000)
            break
    assert data.endswith(SPI + bytes(20)) and source[0] == MN[version]
    ear.close()
    sender.close()
