"""Which of a host's addresses leads to a gateway, and that changes are noticed; in network namespaces."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from ikectx.sa.context import Address
from tests.netns import Namespace, namespaces
from tests.worlds import until
from vici_bridge.kernel.addresses import OuterAddresses, _address

OUT, OTHER = ip_address("192.0.2.7"), ip_address("198.51.100.7")
FAR = ip_address("203.0.113.1")
VIP = ip_address("10.4.0.10")
SIX, FAR6 = ip_address("2001:db8:1::7"), ip_address("2001:db8:ffff::1")


@pytest.fixture
def node() -> Iterator[Namespace]:
    """Two links, the first with the default route; no tunnel."""
    with namespaces(1) as (space,):
        space.ip(
            "link add one type veth peer name one-far",
            "link add two type veth peer name two-far",
            f"addr add {OUT}/24 dev one",
            f"addr add {OTHER}/24 dev two",
            f"addr add {SIX}/64 dev one nodad",
            "link set one up",
            "link set one-far up",
            "link set two-far up",
            "link set two up",
            "route add default via 192.0.2.1",
            "route add default via 2001:db8:1::1",
        )
        yield space


def of(space: Namespace) -> OuterAddresses:
    with space.entered():
        return OuterAddresses()


def test_the_way_the_packets_go(node: Namespace) -> None:
    addresses = of(node)
    with node.entered():
        assert addresses.towards(FAR) == OUT
        assert addresses.towards(FAR6) == SIX
        assert addresses.towards(ip_address("198.51.100.1")) == OTHER
        assert addresses.is_local(OUT)
        assert not addresses.is_local(FAR)
    addresses.close()


def test_past_a_tunnel_that_draws_everything_into_itself(node: Namespace) -> None:
    node.ip(
        "link add tunnel type veth peer name tunnel-far",
        f"addr add {VIP}/32 dev tunnel",
        "link set tunnel up",
        f"route add default dev one via 192.0.2.1 src {VIP} table 220",
        "rule add pref 220 lookup 220",
    )
    addresses = of(node)
    with node.entered():
        assert addresses.towards(FAR) == VIP
        assert addresses.towards(FAR, avoid=[VIP]) == OUT
    addresses.close()


def test_only_some_addresses_will_do(node: Namespace) -> None:
    addresses = of(node)
    with node.entered():
        assert addresses.towards(FAR, among=[ip_address("192.0.2.99"), OTHER]) == OTHER
        assert addresses.towards(FAR, among=[SIX]) is None
        assert addresses.towards(FAR6, among=[OTHER, SIX]) == SIX
    addresses.close()


def test_an_address_that_the_kernel_does_not_route_to_yet(node: Namespace) -> None:
    # as in the moment between RTM_NEWADDR and the route of the address (__inet_insert_ifa)
    node.ip(f"route del table local local {OUT} dev one")
    addresses = of(node)
    with node.entered():
        assert addresses.towards(FAR) != OUT
        node.ip(f"route add table local local {OUT} dev one")
        assert addresses.towards(FAR) == OUT
    addresses.close()


def test_no_way(node: Namespace) -> None:
    node.run("ip route del default", "ip -6 route del default")
    addresses = of(node)
    with node.entered():
        assert addresses.towards(FAR) is None
        assert addresses.towards(FAR6) is None
        addresses.nudge(FAR)
    addresses.close()


def test_changes_are_noticed_at_once(node: Namespace) -> None:
    async def scenario() -> None:
        addresses = of(node)
        calls: list[None] = []
        with node.entered():
            addresses.watch(lambda: calls.append(None))
        await asyncio.sleep(0.1)
        assert calls == []
        node.ip("addr add 192.0.2.8/24 dev one", f"addr del {OTHER}/24 dev two")
        await until(lambda: calls)
        addresses.close()

    asyncio.run(scenario())


def test_a_nudge_leaves_nothing_behind_and_is_heard(node: Namespace) -> None:
    async def scenario() -> None:
        addresses = of(node)
        calls: list[None] = []
        before = node.run("ip route show table all", "ip -6 route show table all")
        with node.entered():
            addresses.watch(lambda: calls.append(None))
            addresses.nudge(FAR)
            addresses.nudge(FAR6)
        await until(lambda: calls)
        assert node.run("ip route show table all", "ip -6 route show table all") == before
        addresses.close()

    asyncio.run(scenario())


def test_addresses_that_no_packet_to_another_network_may_come_from(node: Namespace) -> None:
    addresses = of(node)
    other6 = ip_address("2001:db8:1::8")
    with node.entered():
        node.run(f"ip addr del {SIX}/64 dev one")
        assert addresses.towards(FAR6) is None, "fe80:: alone"
        node.run(f"ip addr add {SIX}/64 dev one nodad preferred_lft 0")
        assert addresses.towards(FAR6) is None, "deprecated"
        assert addresses.towards(FAR6, among=[SIX]) is None
        node.ip(f"addr add {other6}/64 dev one nodad")
        assert addresses.towards(FAR6) == other6
        assert addresses.towards(FAR6, avoid=[other6]) is None
        node.run(f"ip addr del {OUT}/24 dev one", "ip addr add 169.254.7.7/16 dev one scope global")
        node.run("ip route replace default dev one")
        assert addresses.towards(FAR) != ip_address("169.254.7.7")
    addresses.close()


def answer(address: Address, *, scope: int = 0, flags: int = 0x80, wide: bool = True) -> bytes:
    """An RTM_NEWADDR; `wide`: with IFA_FLAGS, as kernels from 3.14 send it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    body = struct.pack("=BBBBI", family, 64, flags & 0xFF, scope, 2)
    body += struct.pack("=HH", 4 + len(address.packed), 1) + address.packed
    if wide:
        body += struct.pack("=HHI", 8, 8, flags)
    return struct.pack("=IHHII", 16 + len(body), 20, 2, 1, 1) + body


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(
    ("address", "scope", "flags", "counts"),
    [
        ("2001:db8::1", 0, 0x80, True),
        ("2001:db8::1", 0, 0x01, True),  # temporary (RFC 8981)
        ("fd05::10", 0, 0x80, True),
        ("10.5.0.10", 0, 0x80, True),
        ("fe80::1", 253, 0x80, False),
        ("fe80::1", 0, 0x80, False),
        ("169.254.1.1", 0, 0x80, False),
        ("127.0.0.1", 254, 0x80, False),
        ("2001:db8::1", 0, 0x40, False),  # tentative
        ("2001:db8::1", 0, 0x44, False),  # optimistic
        ("2001:db8::1", 0, 0xC8, False),  # another host has it
        ("2001:db8::1", 0, 0xA0, False),  # deprecated
    ],
)
def test_what_the_kernel_tells_of_an_address(
    address: str, scope: int, flags: int, counts: bool, wide: bool
) -> None:
    told = ip_address(address)
    assert _address(answer(told, scope=scope, flags=flags, wide=wide)) == (told if counts else None)
