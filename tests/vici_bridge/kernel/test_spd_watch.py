"""The guard against the live kernel's SPD, in a network namespace; with ESP: test_guard_esp.py."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ikectx.errors import LinkError
from ikectx.net.five_tuple import Flow
from ikectx.sa.context import Endpoint
from tests.hand_loop import run_bounded as run
from tests.netns import Namespace, namespaces
from vici_bridge.kernel.kernel import Kernel
from vici_bridge.kernel.spd_lookup import Protection
from vici_bridge.kernel.spd_watch import SpdGuard
from vici_bridge.kernel.xfrm import KernelPolicy, Selector, Template
from vici_bridge.kernel.xfrm_parts import TRANSPORT, KernelLimits

PAIRS = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}


def flow_of(version: int = 4) -> Flow:
    here, there = PAIRS[version]
    return Flow(Endpoint.of(here, 49152), Endpoint.of(there, 5091))


def policies_of(version: int = 4, **more: object) -> list[KernelPolicy]:
    """Out and in, for this pair."""
    here, there = (ip_address(address) for address in PAIRS[version])
    template = Template(type(here)(0), type(here)(0), reqid=5, mode=TRANSPORT)
    values = {"priority": 1000, "templates": (template,), **more}
    ends = (ip_network(here), ip_network(there))
    return [
        KernelPolicy("out", Selector.between(*ends), **values),  # type: ignore[arg-type]
        KernelPolicy("in", Selector.between(ends[1], ends[0]), **values),  # type: ignore[arg-type]
    ]


@pytest.fixture
def space() -> Iterator[Namespace]:
    with namespaces(1) as (made,), made.entered():
        made.ip("link add near type veth peer name far", "link set near up", "link set far up")
        made.ip("addr add 192.0.2.1/24 dev near", "addr add 2001:db8::1/64 dev near nodad")
        yield made


@pytest.fixture
def guard(space: Namespace) -> Iterator[SpdGuard]:
    with SpdGuard() as made:
        yield made


@pytest.mark.parametrize("version", [4, 6])
def test_the_kernel_s_policies_count(kernel: Kernel, guard: SpdGuard, version: int) -> None:
    flow = flow_of(version)
    with pytest.raises(LinkError, match="no IPsec policy protects"):
        guard.protection(flow)
    out, back = policies_of(version)
    kernel.batch([out.add()])
    with pytest.raises(LinkError, match=r"no IPsec policy protects .*\(in "):
        guard.protection(flow)
    kernel.batch([back.add()])
    assert guard.protection(flow) == Protection(out.templates, back.templates)
    kernel.batch([replace(out, selector=replace(out.selector, protocol=6), templates=(), priority=7).add()])
    with pytest.raises(LinkError, match="lets packets pass as they are"):
        guard.protection(flow)
    guard.protection(replace(flow, protocol="sctp"))


@pytest.mark.parametrize("switch", ["disable_xfrm", "disable_policy"])
@pytest.mark.parametrize("name", ["all", "near"])
def test_switches_that_turn_ipsec_off(
    space: Namespace, kernel: Kernel, guard: SpdGuard, switch: str, name: str
) -> None:
    for policy in policies_of():
        kernel.batch([policy.add()])
    space.switch_on(f"ipv4/conf/{name}/{switch}")
    with pytest.raises(LinkError, match=f"{switch} is on for {name}"):
        guard.protection(flow_of())


def test_no_way_and_too_short_a_way(guard: SpdGuard) -> None:
    nowhere = Endpoint.of("203.0.113.9", 5091)
    with pytest.raises(LinkError, match=r"no way from 192\.0\.2\.1 to 203\.0\.113\.9"):
        guard.protection(replace(flow_of(), remote=nowhere))
    with pytest.raises(LinkError, match="stays on this machine"):
        guard.protection(replace(flow_of(), remote=Endpoint.of("192.0.2.1", 5091)))


class Heard:
    """A connection under guard that notes what it hears."""

    def __init__(self, guard: SpdGuard, version: int = 4) -> None:
        self.guard = guard
        self.flow = flow_of(version)
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.lost: list[LinkError] = []

    async def hold(self) -> None:
        self.hand = await self.guard.hold(self.flow, self.socket, self.lost.append)

    def verify(self) -> str:
        """What it says, empty for "protected"."""
        try:
            self.hand.verify()
        except LinkError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    "change",
    ["delete", "delete by index", "update", "flush", "shadow", "expire", "action"],
)
def test_changes_are_heard(
    space: Namespace, kernel: Kernel, guard: SpdGuard, version: int, change: str
) -> None:
    policies = policies_of(version)
    for policy in policies:
        kernel.batch([policy.add()])

    async def scenario() -> None:
        heard = Heard(guard, version)
        await heard.hold()
        heard.hand.verify()
        # what does not concern it
        far = ip_network("10.0.0.0/8") if version == 4 else ip_network("fd00::/8")
        kernel.batch([KernelPolicy("out", Selector.between(far, far)).add()])
        kernel.delete_policy(KernelPolicy("out", Selector.between(far, far)))
        heard.hand.verify()
        out, back = policies
        if change == "delete":
            kernel.delete_policy(back)
        elif change == "delete by index":
            index = next(item.index for item in kernel.dump_policies() if item.direction == "out")
            space.run(f"ip xfrm policy delete dir out index {index}")
        elif change == "update":
            kernel.replace_policy(replace(out, templates=()))
        elif change == "action":
            kernel.replace_policy(out.blocking())
        elif change == "flush":
            space.run("ip xfrm policy flush")
        elif change == "shadow":
            kernel.batch([replace(back, selector=replace(back.selector, protocol=6), templates=()).add()])
        else:
            kernel.replace_policy(replace(out, limits=KernelLimits(hard_add=1)))
            heard.hand.verify()
            async with asyncio.timeout(4):
                while not heard.lost:
                    await asyncio.sleep(0.05)
        # at the next question, without the event loop in between
        said = heard.verify()
        assert "protect" in said
        assert [str(error) for error in heard.lost] == [said]
        assert heard.verify() == said
        heard.hand.release()
        heard.hand.release()

    run(scenario())


def test_an_event_alone_tells_too(kernel: Kernel, guard: SpdGuard) -> None:
    out, back = policies_of()
    kernel.batch([out.add(), back.add()])

    async def scenario() -> None:
        first, second = Heard(guard), Heard(guard)
        await first.hold()
        await second.hold()
        second.hand.release()
        kernel.replace_policy(replace(out, priority=900))  # still protected
        await asyncio.sleep(0.02)
        assert first.lost == []
        kernel.delete_policy(out)
        await asyncio.sleep(0.02)
        assert len(first.lost) == 1
        assert second.lost == []
        third = Heard(guard)
        with pytest.raises(LinkError):
            await third.hold()
        kernel.batch([out.add()])
        await third.hold()
        guard.close()
        assert "are not watched" in str(third.lost[0])

    run(scenario())


def test_lost_events_are_made_up_for(kernel: Kernel, guard: SpdGuard) -> None:
    out, back = policies_of()
    kernel.batch([out.add(), back.add()])

    async def scenario() -> None:
        heard = Heard(guard)
        await heard.hold()
        events = guard._events
        assert events is not None
        events.setsockopt(socket.SOL_SOCKET, 33, 4096)  # SO_RCVBUFFORCE
        far = ip_network("10.0.0.0/8")
        noise = [KernelPolicy("out", Selector.between(far, far, number)) for number in range(20, 120)]
        kernel.batch([policy.add() for policy in noise])
        kernel.delete_policy(back)
        assert "no IPsec policy" in heard.verify()

    run(scenario())


def test_a_watch_that_dies_cuts(kernel: Kernel, guard: SpdGuard) -> None:
    out, back = policies_of()
    kernel.batch([out.add(), back.add()])

    async def scenario() -> None:
        heard = Heard(guard)
        await heard.hold()
        events = guard._events
        assert events is not None
        asyncio.get_running_loop().remove_reader(events.fileno())
        events.close()
        assert "cannot be watched any more" in heard.verify()
        await Heard(guard).hold()  # and it is taken up again

    run(scenario())


def asked_for(sock: socket.socket, sniffer: socket.socket, there: str) -> bool:
    """Whether a connection attempt makes the kernel look for its neighbour: a packet wants to leave."""
    sock.setblocking(False)
    with suppress(OSError):
        sock.connect((there, 5091))
    sniffer.settimeout(0.1)
    until = time.monotonic() + 0.3
    with suppress(TimeoutError):
        while time.monotonic() < until:
            packet = sniffer.recv(2000)
            if ip_address(there).packed in packet:
                return True
    return False


@pytest.mark.parametrize("version", [4, 6])
def test_the_kernel_holds_the_socket_to_it(kernel: Kernel, guard: SpdGuard, version: int) -> None:
    """Without an SA nothing leaves, though a policy lets everything pass by now."""
    out, back = policies_of(version)
    kernel.batch([out.add(), back.add()])
    _, there = PAIRS[version]

    async def scenario() -> None:
        heard = Heard(guard, version)
        await heard.hold()
        kernel.delete_policy(out)
        kernel.delete_policy(back)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)) as sniffer:
            sniffer.bind(("near", 0))
            assert not asked_for(heard.socket, sniffer, there), "no SA: nothing may leave"
            with socket.socket(heard.socket.family, socket.SOCK_STREAM) as free:
                assert asked_for(free, sniffer, there)
        heard.socket.close()

    run(scenario())


def test_many_policies_cost_little(kernel: Kernel, guard: SpdGuard) -> None:
    out, back = policies_of()
    many = [
        KernelPolicy("out", Selector.between(ip_network("10.0.0.0/8"), ip_network((0x0B000000 + number, 32))))
        for number in range(3000)
    ]
    kernel.batch([out.add(), back.add(), *(policy.add() for policy in many)])

    async def scenario() -> None:
        heard = Heard(guard)
        await heard.hold()
        began = time.process_time()  # others may have the CPU meanwhile
        for _ in range(1000):
            heard.hand.verify()
        idle = time.process_time() - began
        began = time.process_time()
        kernel.replace_policy(replace(out, priority=900))
        heard.hand.verify()
        changed = time.process_time() - began
        assert idle < 0.1, "some us a question"
        assert changed < 0.5
        print(f"{idle * 1000:.1f} us a question, {changed * 1000:.1f} ms after a change among 3000")

    run(scenario())
