"""A mobile node's IKE and ESP go on to the other gateway, as if this one were its NAT, and come back."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from ikectx.sa.context import Endpoint
from tests.netns import ROW, Namespace, namespaces, row
from vici_bridge.kernel.nat_relay import NatRelay, Stranger
from vici_bridge.kernel.nat_rule import NatRule

MN, PSG, _, NSG = ({version: ROW[version][place] for version in ROW} for place in range(4))
PORT = 20000
ESP = bytes.fromhex("c1234567") + bytes(range(60))
SO_NO_CHECK = 11


def ike(exchange: int) -> bytes:
    """Behind four zero octets."""
    return bytes(4) + bytes(18) + bytes((exchange,)) + b"something"


@pytest.fixture
def line() -> Iterator[tuple[Namespace, Namespace, Namespace]]:
    """mn - psg - nsg; neither end knows a way to the other."""
    with row() as (mn, psg, nsg):
        nsg.ip(f"route add {PSG[4]} via {ROW[4][2]}", f"route add {PSG[6]} via {ROW[6][2]}")
        yield mn, psg, nsg


def sock(space: Namespace, address: str, port: int, kind: int = socket.SOCK_DGRAM) -> socket.socket:
    with space.entered():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        made = socket.socket(family, kind, 50 if kind == socket.SOCK_RAW else 0)
    made.bind((address, port))
    made.settimeout(0.5)
    return made


def passed(near: socket.socket, far: socket.socket, to: tuple[str, int], data: bytes) -> tuple[str, int]:
    """The address that the far end sees."""
    for _ in range(8):  # neighbours must be found first
        near.sendto(data, to)
        with contextlib.suppress(TimeoutError):
            while True:
                found, source = far.recvfrom(2000)
                if found.endswith(data):
                    return str(source[0]), source[1]
    raise AssertionError("nothing came")


def nothing(near: socket.socket, far: socket.socket, to: tuple[str, int], data: bytes) -> bool:
    near.sendto(data, to)
    try:
        far.recvfrom(2000)
    except TimeoutError:
        return True
    return False


@pytest.mark.parametrize("version", [4, 6])
def test_in_udp(line: tuple[Namespace, Namespace, Namespace], version: int) -> None:
    mn, psg, nsg = line
    here, there = (PSG[version], 4500), (NSG[version], 4500)
    near, far = sock(mn, MN[version], 1234), sock(nsg, *there)
    charon, stranger = sock(psg, *here), sock(mn, MN[version], 1235)
    rule = NatRule(Endpoint.of(MN[version], 1234), Endpoint.of(*here), PORT, ip_address(NSG[version]))
    quiet = NatRule(rule.mn, rule.ours, PORT, rule.to, esp=False)
    relay = NatRelay()
    with psg.entered():
        relay.change([], [quiet])
        relay.change([quiet], [quiet])
    assert passed(near, far, here, ike(37)) == (PSG[version], PORT)
    assert passed(near, charon, here, ESP)[1] == 1234  # decrypted here until nSG serves it
    with psg.entered():
        relay.change([quiet], [rule])
    for unsummed in (0, 1) if version == 4 else (0,):
        for one in (near, far):
            one.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, unsummed)
        for data in (ESP, ike(36), ike(37), ike(44)):
            assert passed(near, far, here, data) == (PSG[version], PORT)
            assert passed(far, near, (PSG[version], PORT), data) == here
    with psg.entered():
        assert list(relay.answered()) == [PORT]
    # an IKE_SA that begins is for this gateway, and so is what others send
    for exchange in (34, 35):
        assert passed(near, charon, here, ike(exchange))[1] == 1234
    assert passed(stranger, charon, here, ESP)[1] == 1235
    assert nothing(stranger, far, here, ike(37))
    with psg.entered():
        relay.set([rule])
    assert passed(near, far, here, ESP) == (PSG[version], PORT)
    # it sent ESP before the relay knew its place: now its NAT gives it another one, or somebody repeats ESP
    assert passed(stranger, charon, here, ESP)[1] == 1235
    assert passed(stranger, charon, here, bytes.fromhex("c7654321") + bytes(20))[1] == 1235
    with psg.entered():
        assert relay.strangers() == [
            Stranger(Endpoint.of(MN[version], 1235), rule.ours, ESP[:4], ((rule.mn, rule.to),))
        ]
        assert relay.strangers() == []
    assert passed(stranger, charon, here, ESP)[1] == 1235
    with psg.entered():
        relay.change([rule], [])
        relay.change([rule], [])
        listed = subprocess.run(
            ["nft", "list", "table", "inet", "ikectx_nat"], capture_output=True, text=True, check=True
        )
    assert "elements" not in listed.stdout
    charon.settimeout(0.01)
    with contextlib.suppress(TimeoutError):
        while True:
            charon.recvfrom(2000)
    charon.settimeout(0.5)
    assert passed(near, charon, here, ESP)[1] == 1234
    with psg.entered():
        relay.set([])
    relay.close()
    for one in (near, far, charon, stranger):
        one.close()


@pytest.mark.parametrize("version", [4, 6])
def test_without_udp(line: tuple[Namespace, Namespace, Namespace], version: int) -> None:
    mn, psg, nsg = line
    near = sock(mn, MN[version], 0, socket.SOCK_RAW)
    far = sock(nsg, NSG[version], 0, socket.SOCK_RAW)
    spi, later = b"\1\2\3\4", b"\5\6\7\x08"
    ends = Endpoint.of(MN[version], 500), Endpoint.of(PSG[version], 500)
    rule = NatRule(*ends, PORT, ip_address(NSG[version]), (spi,), plain=True, alone=True)
    among = NatRule(*ends, PORT, rule.to, (spi,), plain=True)
    relay = NatRelay()
    with psg.entered():
        relay.change([], [rule])
    to = (PSG[version], 0)
    assert passed(near, far, to, later + bytes(20))[0] == PSG[version]
    assert passed(far, near, to, spi + bytes(20))[0] == PSG[version]
    assert passed(far, near, to, later + bytes(20))[0] == PSG[version]
    with psg.entered():
        relay.change([rule], [among])
    assert passed(far, near, to, spi + bytes(20))[0] == PSG[version]
    assert nothing(far, near, to, later + bytes(20))  # of several, nobody knows whose that is
    relay.close()
    near.close()
    far.close()


def test_more_than_a_socket_sends_at_once_otherwise() -> None:
    """A gateway that was emptied has hundreds of relays to restore, and whoever sends as a mobile node can
    have thousands of SPIs noted."""
    ours, to = Endpoint.of("192.0.2.1", 4500), ip_address("192.0.2.2")
    rules = [
        NatRule(Endpoint(ip_address(0xC6336400 + number), 1234), ours, PORT + number, to)
        for number in range(1000)
    ]
    place = rules[0].mn.address.packed + (1234).to_bytes(2) + bytes(2) + to.packed
    with namespaces(1) as (space,), space.entered():
        relay = NatRelay()
        relay.set(rules)
        assert len(relay._table.elements("esp4")) == 1000
        relay._table.put([("heard4", place + number.to_bytes(4), b"") for number in range(5000)])
        relay.change(rules[:1], [])
        assert len(relay._table.elements("esp4")) == 999
        assert relay._table.elements("heard4") == []
        relay.close()
