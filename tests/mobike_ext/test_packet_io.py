"""What a raw socket hears is never lost, whenever the process gets a CPU."""

from __future__ import annotations

import asyncio
import socket
import time

from ikectx.sa.context import Endpoint
from mobike_ext.packet_io import RawLink, udp_datagram

HERE, THERE = Endpoint.of("192.0.2.1", 4500), Endpoint.of("198.51.100.7", 4500)


def packet(payload: bytes) -> bytes:
    """An IPv4 packet from THERE to HERE, as a raw socket gives it."""
    udp = udp_datagram(THERE, HERE, payload)
    head = bytes([0x45, 0, 0, 20 + len(udp), 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0, 0])
    return head + THERE.address.packed + HERE.address.packed + udp


def test_a_datagram_that_comes_together_with_the_end_of_the_time_is_not_lost() -> None:
    """A mobile node's agent that had no CPU for a quarter of a second did not hear its gateway's request."""

    async def scenario() -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        near.setblocking(False)
        with far, RawLink(near, HERE, None) as link:
            waiting = asyncio.create_task(link.receive(0.02))
            await asyncio.sleep(0)
            far.send(packet(b"request"))
            time.sleep(0.05)
            heard = [await waiting, await link.receive(0.0)]
            assert [one for one in heard if one] == [(b"request", THERE)]

    asyncio.run(scenario())


def test_the_time_ends_without_a_datagram() -> None:
    async def scenario() -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        near.setblocking(False)
        with far, RawLink(near, HERE, None) as link:
            assert await link.receive(0.01) is None
            far.send(packet(b"one") + b"padding")
            far.send(packet(b"two"))
            assert [await link.receive(1), await link.receive(1)] == [(b"one", THERE), (b"two", THERE)]
            waiting = asyncio.create_task(link.receive(60))
            await asyncio.sleep(0)
            waiting.cancel()

    asyncio.run(scenario())


def test_what_came_for_another_port_before_the_filter_was_there_is_not_ours() -> None:
    """IPv6, whose raw socket hears the datagrams for all ports until then."""
    here, there = Endpoint.of("2001:db8::1", 4500), Endpoint.of("2001:db8::7", 4500)
    other = Endpoint.of("2001:db8::1", 5353)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with far, RawLink(near, here, there) as link:
        sender = (str(there.address), 0, 0, 0)
        assert link._read(udp_datagram(there, other, b"query"), sender) is None
        assert link._read(udp_datagram(there, here, b"request"), sender) == (b"request", there)


class Flooded:
    """A socket that always has another datagram."""

    def fileno(self) -> int:
        return -1

    def recvfrom(self, octets: int) -> tuple[bytes, object]:
        return packet(b"forged"), None

    def close(self) -> None: ...


def test_whoever_knows_the_spis_cannot_keep_other_tasks_from_their_turn() -> None:
    # they are in the clear; 15 Mbit/s of forged datagrams stopped the whole agent
    async def scenario() -> None:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        with RawLink(Flooded(), HERE, None) as link:  # type: ignore[arg-type]
            working = asyncio.create_task(others())
            for _ in range(1000):
                assert await link.receive(1.0) == (b"forged", THERE)
            assert turns > 1000 / 20
            working.cancel()

    asyncio.run(scenario())
