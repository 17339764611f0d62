"""Which of the kernel's messages about routes make an agent look after its own."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

from tests.netns import namespaces
from vici_bridge.kernel.detour import PROTOCOL, TABLE, Detour
from vici_bridge.kernel.route_events import RouteEvents, matters

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
        (bytes(16), False),
        (message(25)[:18], False),
    ],
)
def test_what_matters(data: bytes, wanted: bool) -> None:
    assert matters(data, OWN) is wanted


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

        async def told() -> int:
            await asyncio.sleep(0.4)
            count = len(seen)
            seen.clear()
            return count

        async def main() -> None:
            events = RouteEvents(detour.port, lambda: seen.append(1))
            try:
                while await told():
                    pass  # the kernel tells up to a second later that a new link has its carrier
                detour.add(["10.9.0.5/32", "10.9.0.6/32"], ["10.1.0.2"])
                detour.remove(["10.9.0.6/32"])
                assert await told() == 0
                space.run("ip route add 10.66.0.0/16 via 10.1.0.9", "ip route del 10.66.0.0/16")
                assert await told() == 0
                space.run("ip route flush table local proto 91")
                assert await told() == 1
                space.ip("link set inner down", "link set inner up")
                assert await told() == 1, "all that happens at once is one change"
            finally:
                events.close()

        asyncio.run(main())
        detour.close()
