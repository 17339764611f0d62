"""ESP under an SPI that is somebody else's goes on to the other gateway, and nothing else does."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from ikectx.sa.context import Endpoint
from tests.netns import ROW, Namespace, row
from vici_bridge.kernel.relay import Relay, RelayRule

SPI = bytes.fromhex("c1234567")
OTHER = bytes.fromhex("c7654321")
MN, NSG, _, PSG = ({version: ROW[version][place] for version in ROW} for place in range(4))


@pytest.fixture
def line() -> Iterator[tuple[Namespace, Namespace, Namespace]]:
    """mn - nsg - psg."""
    with row() as (mn, nsg, psg):
        mn.ip("address add 10.0.1.10/24 dev near")
        psg.ip(f"route add default via {ROW[4][2]}", f"route add default via {ROW[6][2]}")
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
    relay = Relay(4500)
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
    relay = Relay(4500)
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
