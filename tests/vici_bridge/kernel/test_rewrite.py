"""A mobile node's ESP leaves and comes under other outer addresses, and nothing else does."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address

import pytest

from ikectx.errors import KernelError
from tests.netns import Namespace, namespaces
from vici_bridge.kernel.rewrite import EspPair, NewPlace, Rewrite

IN, OUT, OTHER = bytes.fromhex("c1234567"), bytes.fromhex("c7654321"), bytes.fromhex("c0000001")
OLD = {4: "10.0.7.9", 6: "fd00:7::9"}
PSG = {4: "10.0.8.1", 6: "fd00:8::1"}
NEW = {4: "10.0.1.9", 6: "fd00:1::9"}
NSG = {4: "10.0.2.1", 6: "fd00:2::1"}
PLAIN, IN_UDP = EspPair(IN, OUT), EspPair(IN, OUT, 4500)


def place(version: int, *pairs: EspPair) -> NewPlace:
    old, psg, new, nsg = (ip_address(one[version]) for one in (OLD, PSG, NEW, NSG))
    return NewPlace(old, psg, new, nsg, pairs or (PLAIN,))


@pytest.fixture
def line() -> Iterator[tuple[Namespace, Namespace]]:
    """mn - nsg; mn has left the network of its old address."""
    with namespaces(2) as (mn, nsg):
        mn.ip("link add name left type veth peer name right")
        mn.give("right", nsg)
        mn.ip(
            "link set left up",
            f"address add {NEW[4]}/24 dev left",
            f"address add {NEW[6]}/64 dev left nodad",
            "route add default via 10.0.1.1",
            "route add default via fd00:1::1",
        )
        nsg.ip(
            "link set right up",
            "address add 10.0.1.1/24 dev right",
            "address add fd00:1::1/64 dev right nodad",
            f"address add {NSG[4]}/32 dev lo",
            f"address add {NSG[6]}/128 dev lo nodad",
        )
        yield mn, nsg


def of(space: Namespace) -> Rewrite:
    with space.entered():
        made = Rewrite()
        made.prepare()
    return made


def begins(rewrite: Rewrite, space: Namespace, where: NewPlace) -> bool:
    with space.entered():
        return rewrite.begin(where)


def anywhere(sock: socket.socket) -> None:
    """It may have an address that only a route makes this host's (IPV6_FREEBIND, linux/in6.h)."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, 78, 1)


def esp(space: Namespace, address: str) -> socket.socket:
    version = socket.AF_INET6 if ":" in address else socket.AF_INET
    with space.entered():
        made = socket.socket(version, socket.SOCK_RAW, socket.IPPROTO_ESP)
    made.settimeout(0.3)
    anywhere(made)
    made.bind((address, 0))
    return made


def udp(space: Namespace, address: str, port: int = 4500) -> socket.socket:
    with space.entered():
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    anywhere(made)
    made.bind((address, port))
    made.settimeout(0.3)
    return made


def hears(sock: socket.socket) -> tuple[bytes, str] | None:
    try:
        data, sender = sock.recvfrom(2000)
    except TimeoutError:
        return None
    # a raw socket of IPv4 gives the IP header, too
    raw = sock.type == socket.SOCK_RAW and sock.family == socket.AF_INET
    return (data[20:] if raw else data), sender[0]


@pytest.mark.parametrize("version", [4, 6])
def test_esp_in_both_directions(line: tuple[Namespace, Namespace], version: int) -> None:
    mn, nsg = line
    rewrite = of(mn)
    assert begins(rewrite, mn, place(version))
    near, far = esp(mn, OLD[version]), esp(nsg, NSG[version])
    near.sendto(OUT + b"1234", (PSG[version], 0))
    assert hears(far) == (OUT + b"1234", NEW[version])
    far.sendto(IN + b"5678", (NEW[version], 0))
    assert hears(near) == (IN + b"5678", PSG[version])  # from whom it knows
    near.sendto(OTHER + b"1234", (PSG[version], 0))
    assert hears(far) is None
    far.sendto(OTHER + b"5678", (NEW[version], 0))
    assert hears(near) is None
    with mn.entered():
        rewrite.end()
    far.sendto(IN + b"5678", (NEW[version], 0))
    assert hears(near) is None
    assert OLD[version] not in mn.run("ip route show table local", "ip -6 route show table local")
    for sock in (near, far):
        sock.close()
    rewrite.close()


@pytest.mark.parametrize("version", [4, 6])
def test_esp_in_udp(line: tuple[Namespace, Namespace], version: int) -> None:
    mn, nsg = line
    rewrite = of(mn)
    assert begins(rewrite, mn, place(version, IN_UDP))
    near, other, far = udp(mn, OLD[version]), udp(mn, OLD[version], 4510), udp(nsg, NSG[version])
    near.sendto(OUT + b"1234", (PSG[version], 4500))
    assert hears(far) == (OUT + b"1234", NEW[version])
    far.sendto(IN + b"5678", (NEW[version], 4500))
    assert hears(near) == (IN + b"5678", PSG[version])
    near.sendto(bytes(4) + OUT + b"IKE", (PSG[version], 4500))  # IKE has no SPI there
    assert hears(far) is None
    other.sendto(OUT + b"1234", (PSG[version], 4500))
    assert hears(far) is None
    for sock in (near, other, far):
        sock.close()
    rewrite.close()


def test_the_same_address_at_another_gateway(line: tuple[Namespace, Namespace]) -> None:
    mn, nsg = line
    rewrite = of(mn)
    assert begins(rewrite, mn, replace(place(4), old_local=ip_address(NEW[4])))
    near, far = esp(mn, NEW[4]), esp(nsg, NSG[4])
    near.sendto(OUT + b"1234", (PSG[4], 0))
    assert hears(far) == (OUT + b"1234", NEW[4])
    with mn.entered():
        rewrite.end()
    assert NEW[4] in mn.run("ip route show table local", "ip address")
    near.close()
    far.close()
    rewrite.close()


def test_an_address_that_may_be_a_neighbours_is_left_to_it(line: tuple[Namespace, Namespace]) -> None:
    mn, _ = line
    rewrite = of(mn)
    assert not begins(rewrite, mn, replace(place(4), old_local=ip_address("10.0.1.77")))
    assert rewrite.place is None
    rewrite.close()


def test_one_place_after_the_other_and_what_an_earlier_agent_left(line: tuple[Namespace, Namespace]) -> None:
    mn, _ = line
    rewrite = of(mn)
    assert begins(rewrite, mn, place(4, PLAIN, EspPair(OTHER, OTHER)))
    assert begins(rewrite, mn, replace(place(4), old_local=ip_address("10.0.7.10")))
    routes = mn.run("ip route show table local")
    assert OLD[4] not in routes and "local 10.0.7.10 dev lo proto 91" in routes
    rewrite.close()
    again = of(mn)
    assert "10.0.7.10" not in mn.run("ip route show table local")
    assert OUT.hex() not in mn.run("nft list table inet ikectx_esp")
    with mn.entered():
        again.end()
    again.close()


def test_somebody_flushes_the_firewall(
    line: tuple[Namespace, Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    mn, nsg = line
    rewrite = of(mn)
    mn.run("nft flush ruleset")
    assert begins(rewrite, mn, place(4))
    near, far = esp(mn, OLD[4]), esp(nsg, NSG[4])
    near.sendto(OUT + b"1234", (PSG[4], 0))
    assert hears(far) == (OUT + b"1234", NEW[4])
    mn.run("nft flush ruleset")
    with mn.entered():
        rewrite.end()
    assert rewrite.place is None
    assert OLD[4] not in mn.run("ip route show table local")

    def missing(script: str) -> None:
        raise KernelError("the nft program is missing")

    monkeypatch.setattr("vici_bridge.kernel.rewrite.run_nft", missing)
    with pytest.raises(KernelError):
        begins(rewrite, mn, place(4))
    assert rewrite.place is None
    assert OLD[4] not in mn.run("ip route show table local")
    for sock in (near, far):
        sock.close()
    rewrite.close()


def test_before_its_table_is_made_nothing_is_rewritten(line: tuple[Namespace, Namespace]) -> None:
    mn, _ = line
    with mn.entered():
        unprepared = Rewrite()
        assert not unprepared.begin(place(4))
        unprepared.end()
    unprepared.close()
