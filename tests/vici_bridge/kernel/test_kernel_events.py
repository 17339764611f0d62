"""Which of the kernel's events make an agent look after its tables of nftables and its routes."""

from __future__ import annotations

import asyncio
import select
import struct
import subprocess
import time
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.hand_loop import StandingLoop, run_standing
from tests.netns import namespaces
from vici_bridge.kernel.detour import PROTOCOL, TABLE, Detour
from vici_bridge.kernel.kernel_events import (
    changes_of_ways,
    changes_ways,
    flushes_of_policies,
    removes_table,
    table_removals,
)
from vici_bridge.kernel.nftables import NftTable, run_nft


def event(kind: int, table: bytes, port: int = 7) -> bytes:
    name = table + b"\0"
    body = struct.pack("=HH", 4 + len(name), 1) + name + bytes(-len(name) % 4)
    return struct.pack("=IHHII", 20 + len(body), 10 << 8 | kind, 0, 0, port) + bytes((1, 0, 0, 1)) + body


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (event(2, b"ikectx"), True),
        (event(8, b"ikectx_ids"), True),
        (event(14, b"ikectx"), True),
        (event(14, b"ikectx", port=9), False),  # our own
        (event(12, b"ikectx"), False),
        (event(2, b"ikectx2"), False),
        (event(2, b"filter") + event(2, b"ikectx"), True),
        (event(2, b"filter")[:18], True),
        (event(2, b"")[:16], True),
        (struct.pack("=IHHII", 16, 3, 0, 0, 0), False),
    ],
)
def test_removals_of_our_tables_are_told_from_others(data: bytes, expected: bool) -> None:
    assert removes_table(data, ("ikectx", "ikectx_ids"), (9,)) is expected


@pytest.mark.kernel_esp
def test_a_flush_is_noticed() -> None:
    async def scenario() -> int:
        seen = asyncio.Event()
        run_nft("add table inet ikectx_events\nadd set inet ikectx_events places { type ipv4_addr; }")
        ours, place = NftTable("ikectx_events"), bytes((10, 0, 0, 1))
        ours.put([("places", place, b"")])
        events = table_removals(("ikectx_events",), lambda: (ours.port,), seen.set)
        try:
            ours.remove(["places"], [place])
            ours.put([("places", place, b"")])
            assert not select.select([events._events], [], [], 0)[0], "the agent is not even woken"
            run_nft("add table inet ikectx_other")
            run_nft("delete table inet ikectx_other")
            await asyncio.sleep(0.05)
            assert not seen.is_set()
            run_nft("delete table inet ikectx_events")
            await asyncio.wait_for(seen.wait(), 5)
        finally:
            events.close()
            ours.close()
        return 0

    assert asyncio.run(scenario()) == 0


OWN = 77


def message(kind: int, *, port: int = 0, maker: int = PROTOCOL) -> bytes:
    body = struct.pack("=BBBBBBBBI", 2, 32, 0, 0, TABLE, maker, 0, 1, 0)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, port) + body


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (message(16), True),
        (message(21), True),
        (message(33), False),
        (message(25), True),
        (message(25, port=OWN), False),
        (message(25, maker=2), False),
        (message(24), False),
        (message(24) + message(25), True),
        (message(24) + message(28), False),
        (b"", False),
        (bytes(16), True),
        (message(25)[:18], True),
    ],
)
def test_what_changes_ways(data: bytes, wanted: bool) -> None:
    assert changes_ways(data, OWN) is wanted


def test_changes_are_told_soon_and_our_own_are_not() -> None:
    with namespaces(1) as (space,), space.entered():
        # an IPv6 address of a link counts as a change when it has been found to be nobody else's
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        space.ip(
            "link add inner type veth peer name far",
            "link set far up",
            "link set inner up",
            "address add 10.1.0.1/24 dev inner",
        )
        detour = Detour()
        seen: list[int] = []

        async def scenario(loop: StandingLoop) -> None:
            events = changes_of_ways(detour.port, lambda: seen.append(1))

            async def told() -> int:
                while select.select([events._events], [], [], 0)[0]:
                    await asyncio.sleep(0)
                loop.now += 0.4
                for _ in range(3):
                    await asyncio.sleep(0)
                count = len(seen)
                seen.clear()
                return count

            try:
                # the kernel tells up to a second later that a new link has its carrier
                while space.run("ip -o link show type veth").count("state UP") < 2:
                    time.sleep(0.05)
                time.sleep(0.2)
                await told()
                detour.add(["10.9.0.5/32", "10.9.0.6/32"], [ip_address("10.1.0.2")])
                detour.remove(["10.9.0.6/32"])
                space.run("ip route add 10.66.0.0/16 via 10.1.0.9", "ip route del 10.66.0.0/16")
                assert not select.select([events._events], [], [], 0)[0], "the agent is not even woken"
                assert await told() == 0
                space.run("ip route flush table local proto 91")
                assert await told() == 1
                space.ip(*(f"address add 10.1.1.{number}/32 dev inner" for number in range(100)))
                assert await told() == 1, "what happens at once is one change"
                space.ip("link set inner down", "link set inner up")
                assert await told() == 1
            finally:
                events.close()

        run_standing(scenario)
        detour.close()


@pytest.mark.parametrize("version", [4, 6])
def test_charon_is_made_to_look_at_its_ways(version: int) -> None:
    # by a route that comes and goes, by the device that leads there, and that no packet ever meets
    with namespaces(1) as (space,), space.entered():
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("0")
        space.ip("link add out type veth peer name far", "link set far up", "link set out up")
        space.ip("address add 10.1.0.1/24 dev out")
        space.ip("address add fd01::1/64 dev out nodad")
        far, near = {4: ("10.1.0.9", "10.1.0.1"), 6: ("fd01::9", "fd01::1")}[version]
        watching = subprocess.Popen(
            ["ip", f"-{version}", "monitor", "route"], stdout=subprocess.PIPE, text=True
        )
        assert watching.stdout is not None
        mark = {4: "10.2.0.1", 6: "fd02::1"}[version]
        marking = f"route replace unreachable {mark}"
        while not select.select([watching.stdout], [], [], 0.1)[0]:  # it listens when it tells of this
            space.ip(marking, marking.replace("replace", "del"))
        detour = Detour()
        detour.stir(ip_address(far))
        space.ip(f"address add {mark} dev out{' nodad' if version == 6 else ''}")
        told = []
        for line in watching.stdout:
            told.append(line)
            if line.startswith(f"local {mark}"):  # the last of what is told
                break
        watching.kill()
        watching.communicate()
        seen = [line for line in told if "4068" in line]
        assert len(seen) == 2
        assert all("dev out" in line for line in seen)
        assert seen[1].startswith("Deleted")
        assert detour.is_here(ip_address(near))
        assert not detour.is_here(ip_address(far))
        detour.stir(ip_address("198.51.100.1" if version == 4 else "2001:db8:9::1"))  # no way leads there
        detour.close()


def test_a_flush_of_policies_is_told_and_no_other_change() -> None:
    with namespaces(1) as (space,), space.entered():
        seen: list[int] = []

        async def scenario(loop: StandingLoop) -> None:
            events = flushes_of_policies(lambda: seen.append(1))

            async def told() -> int:
                while select.select([events._events], [], [], 0)[0]:
                    await asyncio.sleep(0)
                loop.now += 0.1
                for _ in range(3):
                    await asyncio.sleep(0)
                return len(seen)

            policy = "src 10.1.0.0/24 dst 10.2.0.0/24 dir out"
            try:
                space.run(f"ip xfrm policy add {policy} action block", f"ip xfrm policy delete {policy}")
                space.run(f"ip xfrm policy add {policy} action block")
                assert not select.select([events._events], [], [], 0)[0]
                assert await told() == 0
                space.run("ip xfrm policy flush")
                assert await told() == 1
            finally:
                events.close()

        run_standing(scenario)
