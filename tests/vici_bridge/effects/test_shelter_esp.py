"""Packets of a mobile node while its charon changes the SA's addresses, through the live kernel.

node --- gateways (the old one and the new one)
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest

from ikectx.errors import KernelError
from ikectx.sa.name import SaName
from tests.netns import JOINED, Namespace, join, namespaces
from vici_bridge.effects.beside import keep_packets
from vici_bridge.effects.shelter import HOLD, LINGER, Shelter
from vici_bridge.ha.record import ChildAdded
from vici_bridge.kernel.host_routes import HostRoutes
from vici_bridge.kernel.kernel import Kernel

pytestmark = pytest.mark.kernel_esp

SA = SaName(bytes.fromhex("11" * 8), bytes.fromhex("22" * 8))
NODE, OLD = JOINED[4]
NEW, VIP = "10.9.0.3", "10.4.0.10"
KEYS = f"enc cbc(aes) 0x{'00' * 16} auth hmac(sha256) 0x{'00' * 32}"


class Node:
    """A mobile node's kernel as its charon has set it up, and what its gateways get."""

    def __init__(self, here: Namespace, there: Namespace) -> None:
        self.here = here
        join(here, there)
        there.ip(f"addr add {NEW}/24 dev joined1")
        here.ip(f"addr add {VIP}/32 dev joined0", f"route add 10.3.0.0/24 via {OLD} src {VIP}")
        self.has("add", OLD)
        with there.entered():
            self.air = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ESP)
        with here.entered():
            keep_packets()
            self.kernel = Kernel()
            self.shelter = Shelter(SimpleNamespace(kernel=self.kernel))  # type: ignore[arg-type]
            self.sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def has(self, verb: str, gateway: str) -> None:
        """charon adds or deletes SAs and policies with that gateway."""
        keys = f"reqid 7 mode tunnel {KEYS}" if verb == "add" else ""
        for source, destination, spi in ((NODE, gateway, "0x1001"), (gateway, NODE, "0x1002")):
            self.here.run(f"ip xfrm state {verb} src {source} dst {destination} proto esp spi {spi} {keys}")
        for way, flow, source, destination in (
            ("out", f"src {VIP}/32 dst 10.3.0.0/24", NODE, gateway),
            ("in", f"src 10.3.0.0/24 dst {VIP}/32", gateway, NODE),
        ):
            by = f"priority 1000 tmpl src {source} dst {destination} proto esp reqid 7 mode tunnel"
            self.here.run(f"ip xfrm policy {verb} {flow} dir {way} {by if verb == 'add' else ''}")

    def view(self) -> Any:
        child = SimpleNamespace(spi_out=(0x1001).to_bytes(4), spi_in=(0x1002).to_bytes(4))
        ends = {
            name: SimpleNamespace(address=ip_address(one)) for name, one in (("local", NODE), ("remote", OLD))
        }
        return SimpleNamespace(spis=SA, **ends, local_vips=(ip_address(VIP),), children=(child,))

    def send(self) -> None:
        self.sender.sendto(b"probe", ("10.3.0.9", 9))

    def arrived(self, seconds: float = 0.2) -> list[str]:
        """The gateways that packets came to, until none has come for so long."""
        self.air.settimeout(seconds)
        found = []
        while True:
            try:
                packet = self.air.recv(2048)
            except TimeoutError:
                return found
            found.append(str(ip_address(packet[16:20])))

    def policies(self) -> int:
        return self.here.run("ip xfrm policy").count("tmpl ")

    def close(self) -> None:
        self.shelter.close()
        self.kernel.close()
        self.air.close()
        self.sender.close()


@pytest.fixture
def node() -> Iterator[Node]:
    with namespaces(2) as (here, there):
        made = Node(here, there)
        with here.entered():
            yield made
        made.close()


def test_packets_wait_while_charon_changes_the_addresses(node: Node) -> None:
    node.send()
    assert node.arrived() == [OLD]
    sheltered = node.shelter.begin(node.view())
    node.send()
    node.has("delete", OLD)
    node.here.ip(f"addr del {VIP}/32 dev joined0")
    node.send()
    assert node.arrived() == []
    node.has("add", NEW)
    node.here.ip(f"addr add {VIP}/32 dev joined0")
    asyncio.run(node.shelter.end(sheltered, ip_address(NEW)))
    assert node.arrived() == [NEW, NEW]
    assert node.policies() == 2, "charon's alone are left"
    node.send()
    assert node.arrived() == [NEW]


def test_a_rekey_just_after_that_finds_no_policy_that_leads_to_the_sa_before_it(node: Node) -> None:
    # charon deletes that SA: what such a policy takes would wait for it, and be lost
    async def end() -> list[str]:
        ending = asyncio.create_task(node.shelter.end(sheltered, ip_address(NEW)))
        await asyncio.sleep(LINGER / 3)
        node.shelter.heed(ChildAdded(SaName(bytes(8), bytes(8)), bytes(4)))
        await asyncio.sleep(0)
        assert node.policies() > 3
        node.here.run(f"ip xfrm state delete src {NODE} dst {NEW} proto esp spi 0x1001")
        node.here.run(
            f"ip xfrm state add src {NODE} dst {NEW} proto esp spi 0x1003 reqid 7 mode tunnel {KEYS}"
        )
        node.shelter.heed(ChildAdded(SA, bytes(4)))
        await asyncio.sleep(LINGER / 10)
        node.send()
        found = node.arrived()
        await ending
        return found

    sheltered = node.shelter.begin(node.view())
    node.has("delete", OLD)
    node.has("add", NEW)
    assert asyncio.run(end()) == [NEW]
    assert node.policies() == 2, "charon's alone are left"


def test_packets_go_on_as_before_where_charon_changes_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vici_bridge.effects.shelter.PATIENCE", 0.05)
    sheltered = node.shelter.begin(node.view())
    asyncio.run(node.shelter.end(sheltered, ip_address(NEW)))
    assert node.policies() == 2
    node.send()
    assert OLD in node.arrived()


def test_an_agent_that_dies_stops_packets_for_seconds_only(node: Node) -> None:
    node.shelter.begin(node.view())
    node.send()
    assert node.arrived() == []
    assert node.policies() > 2
    limit = time.monotonic() + 10 * HOLD
    while node.policies() > 2:
        assert time.monotonic() < limit, "the kernel has not ended it"
        time.sleep(0.1)
    node.send()
    assert OLD in node.arrived()
    again = HostRoutes()  # the next agent
    again.clear()
    again.close()
    node.here.ip(f"addr del {VIP}/32 dev joined0")
    with pytest.raises(OSError):
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind((VIP, 0))


def test_what_begins_and_fails_leaves_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_self: object, _requests: object) -> None:
        raise KernelError("the kernel refused")

    monkeypatch.setattr(Kernel, "batch", refuses)
    with pytest.raises(KernelError):
        node.shelter.begin(node.view())
    assert node.policies() == 2
    node.send()
    assert node.arrived() == [OLD]
