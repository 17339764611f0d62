"""The block behind an SA that left, and the way to who has it, by packets through the live kernel.

server --- inner [ gateway ] outer --- (nobody)
other  --/
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

import pytest

from ikectx.sa.context import IkeContext
from tests.netns import Namespace, namespaces
from tests.vici_bridge.test_deadlines import MemoryStore
from tests.vici_bridge.vici.test_views import context, selector
from vici_bridge.away.absences import Away
from vici_bridge.away.departures import OURS, SENT
from vici_bridge.away.pairs import pairs_of
from vici_bridge.kernel.detour import Detour
from vici_bridge.kernel.kernel import Kernel
from vici_bridge.kernel.kernel_events import changes_of_ways
from vici_bridge.kernel.xfrm import KernelPolicy, Selector, Template

pytestmark = pytest.mark.kernel_esp

GATEWAYS = {4: "10.3.0.3", 6: "fd03::3"}
NODE = {4: "10.4.0.10", 6: "fd04::10"}
SERVER = {4: "10.3.0.10", 6: "fd03::10"}


@dataclass
class Place:
    """A gateway's kernel, and an agent's view of it."""

    space: Namespace
    servers: Namespace
    kernel: Kernel
    detour: Detour
    away: Away
    store: MemoryStore
    sender: socket.socket
    node: str
    sniffers: dict[str, socket.socket]
    known: str
    """`ip` command that says where the other gateway is on the link."""

    def packet(self) -> str:
        """Where one from the server to the mobile node leaves: "inner", to the other gateway, "outer", to
        anybody else by any device, or nowhere ("")."""
        for sniffer in self.sniffers.values():
            with contextlib.suppress(OSError):  # nothing more, or the device was down
                while sniffer.recv(2048):
                    pass
        self.sender.sendto(b"ikectx", (self.node, 7777))
        to = ip_address(self.node).packed
        at = 30 if len(to) == 4 else 38  # the destination of an IP packet behind Ethernet's 14 octets
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            for name, sniffer in self.sniffers.items():
                with contextlib.suppress(BlockingIOError):
                    while True:
                        frame, (_, _, kind, *_) = sniffer.recvfrom(2048)
                        if kind == socket.PACKET_OUTGOING and frame[at : at + len(to)] == to:
                            return name if frame[:6] == OTHER_GATEWAY or name == "outer" else "outer"
            time.sleep(0.005)
        return ""

    def again(self) -> None:
        """The agent was killed, and another starts."""
        with self.space.entered():
            self.away = Away(self.store, self.kernel, self.detour, {"nsg": WAY})
        self.away.load()
        self.away.restore()


OTHER_GATEWAY = bytes.fromhex("020000000003")
WAY = tuple(map(ip_address, GATEWAYS.values()))


def _sniffer(device: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    made.bind((device, 0))
    made.setblocking(False)
    return made


@contextlib.contextmanager
def placed(version: int, *, kernel_esp: bool = True) -> Iterator[Place]:
    with namespaces(2) as (here, there), contextlib.ExitStack() as stack:
        here.ip(
            "link add inner type veth peer name far",
            "link add outer type veth peer name nobody",
            "link set nobody up",
            "link set inner address 02:00:00:00:00:02",
        )
        here.give("far", there)
        nodad = " nodad" if version == 6 else ""
        bits = 24 if version == 4 else 64
        own, out = ("10.3.0.2", "192.0.2.1") if version == 4 else ("fd03::2", "fd02::1")
        here.ip(f"address add {own}/{bits} dev inner{nodad}", "link set inner up")
        here.ip(f"address add {out}/{bits} dev outer{nodad}", "link set outer up")
        there.ip(f"address add {SERVER[version]}/{bits} dev far{nodad}", "link set far up")
        gone = f"{out[:-1]}9"
        here.ip(f"route add default via {gone}", f"neigh add {gone} lladdr 02:00:00:00:00:09 dev outer")
        known = f"neigh replace {GATEWAYS[version]} lladdr 02:00:00:00:00:03 dev inner"
        here.ip(known)
        there.ip(f"route add {NODE[version]} via {own}")
        # nobody has to be asked, which takes a second where the link is down
        there.ip(f"neigh add {own} lladdr 02:00:00:00:00:02 dev far")
        with here.entered():
            for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                with open(f"/proc/sys/net/{name}", "w") as file:
                    file.write("1")
            for name in ("inner", "all"):
                with open(f"/proc/sys/net/ipv4/conf/{name}/send_redirects", "w") as file:
                    file.write("0")
            kernel = stack.enter_context(Kernel())
            detour = stack.enter_context(contextlib.closing(Detour()))
            store = MemoryStore()
            away = Away(store, kernel if kernel_esp else None, detour, {"nsg": WAY})
            sniffers = {name: stack.enter_context(_sniffer(name)) for name in ("inner", "outer")}
        with there.entered():
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            sender = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            sender.bind((SERVER[version], 0))
        yield Place(here, there, kernel, detour, away, store, sender, NODE[version], sniffers, known)


def _sa(version: int) -> IkeContext:
    here = context()
    ours = selector("10.3.0.0-10.3.0.255" if version == 4 else "fd03::-fd03::ffff:ffff:ffff:ffff")
    child = replace(here.children[0], local_ts=(ours,), remote_ts=(selector(NODE[version]),))
    return replace(here, children=(child,))


def _policy(here: IkeContext, version: int) -> KernelPolicy:
    selectors = Selector.between(
        ip_network("10.3.0.0/24" if version == 4 else "fd03::/64"), ip_network(NODE[version])
    )
    template = Template(here.local.address, here.remote.address, reqid=1)
    return KernelPolicy("out", selectors, 370000, templates=(template,))


@pytest.mark.parametrize("version", [4, 6])
def test_no_packet_leaves_in_the_clear(version: int) -> None:
    with placed(version) as place:
        assert place.packet() == "outer", "in the clear, as long as there is nothing"
        here, policy = _sa(version), _policy(_sa(version), version)
        place.kernel.batch([policy.add()])
        place.away.leave(here, "nsg", [policy])
        assert place.packet() == "", "charon's policy has no SA here"
        place.kernel.delete_policy(policy)
        assert place.packet() == "inner"
        place.away.left(here.spis)
        place.again()
        assert place.packet() == "inner"

        place.detour.remove(place.detour.listing())
        assert place.packet() == "", "the way is gone"
        place.again()
        assert place.packet() == "inner"
        place.space.ip("link set inner down", "link set inner up")
        if version == 6:
            place.space.ip("address add fd03::2/64 dev inner nodad")
        place.space.ip(place.known)
        assert place.packet() != "outer"
        place.away.look_again()
        assert place.packet() == "inner"

        # charon comes with the same selectors, and goes: neither finds ours
        place.kernel.batch([policy.add()])
        assert place.packet() == ""
        assert place.kernel.delete_policy(policy)
        assert place.packet() == "inner"

        place.away.end(here.spis, unblock=False)
        assert place.packet() == ""
        place.again()
        assert place.packet() == ""
        place.away.serves(here.spis, str(here.remote_id), pairs_of(here))
        assert place.packet() == "outer"
        assert [one for one in place.kernel.dump_policies() if one.selector.user in (OURS, SENT)] == []


def test_policies_are_read_as_they_were_written() -> None:
    with placed(4) as place:
        here = _sa(4)
        place.away.leave(here, "nsg", [_policy(here, 4)])
        (row,) = place.away.listing()
        found = {replace(one, index=0).raw for one in place.kernel.dump_policies()}
        assert found == {one.raw for one in (*row.blocks, *row.allows)}
        assert len(row.allows) == 1


@pytest.mark.parametrize("version", [4, 6])
def test_esp_in_user_space_has_an_unreachable_route_behind_it(version: int) -> None:
    with placed(version, kernel_esp=False) as place:
        here = _sa(version)
        place.away.leave(here, "nsg", ())
        assert place.packet() == "inner"
        place.detour.remove(place.detour.listing())
        assert place.packet() == ""
        place.away.end(here.spis, unblock=False)
        assert place.packet() == ""
        place.away.serves(here.spis, str(here.remote_id), pairs_of(here))
        assert place.packet() == "outer"


@pytest.mark.parametrize("version", [4, 6])
def test_one_device_for_all(version: int) -> None:
    with placed(version) as place:
        gone = "10.3.0.9" if version == 4 else "fd03::9"
        place.space.ip(
            f"route replace default via {gone} dev inner",
            f"neigh add {gone} lladdr 02:00:00:00:00:09 dev inner",
        )
        assert place.packet() == "outer"
        here, policy = _sa(version), _policy(_sa(version), version)
        place.away.leave(here, "nsg", [policy])
        assert place.packet() == "inner"
        place.detour.remove(place.detour.listing())
        assert place.packet() == ""
        place.away.look_again()
        assert place.packet() == "inner"
        place.away.end(here.spis, unblock=True)
        assert place.packet() == "outer"


@pytest.mark.parametrize("version", [4, 6])
def test_an_agent_mends_the_way(version: int) -> None:
    """The link inside goes down and comes up; somebody removes routes, and rules. No restart is needed."""
    with placed(version) as place:
        here = _sa(version)
        place.away.leave(here, "nsg", [_policy(here, version)])

        async def mended() -> None:
            async with asyncio.timeout(30):
                while (way := place.packet()) != "inner":
                    assert way == ""
                    await asyncio.sleep(0.05)

        async def main() -> None:
            events = changes_of_ways(place.detour.port, place.away.look_again)
            try:
                place.space.ip("link set inner down")
                await asyncio.sleep(0.4)
                assert place.packet() == ""
                place.space.ip("link set inner up")
                if version == 6:
                    place.space.ip("address add fd03::2/64 dev inner nodad")
                place.space.ip(place.known)
                await mended()
                six = "-6 " if version == 6 else ""
                place.space.run(f"ip {six}route flush table local proto 91")
                await mended()
            finally:
                events.close()

        with place.space.entered():
            asyncio.run(main())


@pytest.mark.parametrize("version", [4, 6])
def test_what_still_comes_for_an_sa_that_came_here_and_ended_is_dropped(version: int) -> None:
    with placed(version) as place:
        here, policy = _sa(version), _policy(_sa(version), version)
        place.kernel.batch([policy.add()])
        place.away.behind.stand(here, {1})
        assert place.kernel.delete_policy(policy), "charon takes its own away, and finds it"
        assert place.packet() == ""
        place.again()
        assert place.packet() == ""

        place.kernel.batch([policy.add()])
        place.away.leave(here, "nsg", [policy])
        place.kernel.delete_policy(policy)
        place.away.left(here.spis)
        assert place.packet() == "inner", "moved on, it is sent on"
        place.away.end(here.spis, unblock=True)
        assert place.packet() == ""
        assert place.away.behind.end(str(here.remote_id)) == 1
        assert place.packet() == "outer"
