"""Policies by reqid: dumped once, then kept up to date by the kernel's events."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from dataclasses import replace
from ipaddress import ip_address, ip_network
from types import SimpleNamespace

import pytest

from ikectx.errors import KernelError, WireError
from tests.netns import namespaces
from vici_bridge.kernel import netlink, netlink_parts, spd_index
from vici_bridge.kernel import xfrm_wire as wire
from vici_bridge.kernel.kernel import Kernel
from vici_bridge.kernel.spd_index import SpdIndex
from vici_bridge.kernel.xfrm import KernelPolicy, Mark, Selector, Template
from vici_bridge.kernel.xfrm_parts import TRANSPORT, KernelLimits, template_octets

ENDS = ip_address("192.0.2.1"), ip_address("198.51.100.7")


def a_policy(number: int, direction: str = "out", *, reqid: int = 0) -> KernelPolicy:
    networks = ip_network("10.3.0.0/24"), ip_network(f"10.48.{number // 250}.{number % 250}/32")
    return KernelPolicy(
        direction, Selector.between(*networks), templates=(Template(*ENDS, reqid=reqid or 0x10000 + number),)
    )


@pytest.fixture
def dumps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each dump of the SPD."""
    seen: list[str] = []
    exchange = netlink.Netlink._exchange

    def counted(self: netlink.Netlink, requests: list[netlink.XfrmRequest]) -> list[netlink.NetlinkOutcome]:
        for request in requests:
            kind, flags = struct.unpack_from("=HH", request.message.reveal(), 4)
            if kind == wire.GETPOLICY and flags & netlink_parts.DUMP:
                seen.append(request.what)
        return exchange(self, requests)

    monkeypatch.setattr(netlink.Netlink, "_exchange", counted)
    return seen


def names(policies: list[KernelPolicy]) -> list[str]:
    return sorted(str(policy) for policy in policies)


def about_by_dump(kernel: Kernel, reqid: int) -> list[KernelPolicy]:
    every = kernel.dump_policies()
    return [one for one in every if any(template.reqid == reqid for template in one.templates)]


def test_a_change_ends_the_wait_for_it(kernel: Kernel) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        kernel.batch([a_policy(1).add()])
        await kernel.policies_change(0.001)  # what was before does not count
        waiting = [asyncio.create_task(kernel.policies_change(60)) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        began = loop.time()
        kernel.batch([a_policy(2).add()])
        await asyncio.gather(*waiting)
        assert loop.time() - began < 30

    asyncio.run(scenario())


def test_an_sa_among_thousands_costs_no_dump(kernel: Kernel, dumps: list[str]) -> None:
    policies = [a_policy(number, way) for number in range(300) for way in ("out", "in", "fwd")]
    kernel.batch([policy.add() for policy in policies])
    for number in (7, 255, 7):
        reqid = 0x10000 + number
        assert names(kernel.policies_about({reqid})) == names(policies[3 * number : 3 * number + 3])
    both = kernel.policies_about({0x10007, 0x100FF})
    assert names(both) == names([*policies[21:24], *policies[765:768]])
    assert kernel.policies_about(()) == kernel.policies_about({0x12345}) == []
    assert len(dumps) == 1


def test_each_change_is_seen_by_whoever_made_it(kernel: Kernel, dumps: list[str]) -> None:
    """The answer to a change comes after its event."""
    assert kernel.policies_about({1}) == []
    with Kernel() as other:
        for number in range(50):
            policy = a_policy(number, reqid=1)
            other.replace_policy(policy)
            assert names(kernel.policies_about({1})) == names([policy])
            (there,) = kernel.policies_about({1})
            assert there.index
            # another reqid, a block (without any) and back, as a freeze and a thaw do
            other.replace_policy(replace(policy, templates=(Template(*ENDS, reqid=2),)))
            assert kernel.policies_about({1}) == []
            assert names(kernel.policies_about({2})) == names([policy])
            other.replace_policy(policy.blocking())
            assert kernel.policies_about({1, 2}) == []
            other.replace_policy(policy)
            assert other.delete_policy(policy)
            assert kernel.policies_about({1, 2}) == []
    assert len(dumps) == 1


def test_policies_with_selectors_of_their_own_are_found(kernel: Kernel, dumps: list[str]) -> None:
    """Not only those that charon makes from traffic selectors: marks, interfaces, and an operator's own."""
    kernel.policies_about({5})
    plain = a_policy(1, reqid=5)
    user = replace(plain, selector=replace(plain.selector, user=0x494B4558))
    wide = replace(plain, selector=Selector.between(ip_network("10.0.0.0/8"), ip_network("10.9.0.0/16")))
    marked = [replace(plain, mark=Mark(bit, 0x80000000)) for bit in (0, 0x80000000)]
    others = [user, wide, *marked, replace(plain, if_id=7), replace(plain, direction="fwd")]
    two = replace(a_policy(2), templates=(Template(*ENDS, reqid=9), Template(*ENDS, reqid=5)))
    v6 = replace(plain, selector=Selector.between(ip_network("fd00:3::/64"), ip_network("fd00:9::5/128")))
    kernel.batch([policy.add() for policy in (plain, *others, two, v6)])
    found = kernel.policies_about({5})
    expected = {replace(one, index=0).raw for one in about_by_dump(kernel, 5)}
    assert {replace(one, index=0).raw for one in found} == expected
    assert len(found) == 9
    for policy in (user, *marked, two):
        assert kernel.delete_policy(policy)
    assert len(kernel.policies_about({5})) == 5
    assert names(kernel.policies_about({9})) == []
    assert len(dumps) == 2, "one of them is this test's own"


def test_a_policy_that_expires_is_gone(kernel: Kernel, dumps: list[str]) -> None:
    kernel.policies_about({1})
    kernel.batch([replace(a_policy(1, reqid=1), limits=KernelLimits(soft_add=1, hard_add=2)).add()])
    end = time.monotonic() + 10
    while time.monotonic() < end:
        known = kernel.policies_about({1})
        if not kernel.dump_policies():
            break
        assert len(known) == 1  # it was there before it was seen there
        time.sleep(0.1)
    assert kernel.policies_about({1}) == []


def test_a_flush_and_lost_events_lead_to_a_new_dump(
    kernel: Kernel, dumps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spd_index, "EVENT_BUFFER", 4096)
    kernel.batch([a_policy(number).add() for number in range(20)])
    assert len(kernel.policies_about({0x10003})) == 1
    policies = [a_policy(number, "in") for number in range(200)]
    kernel.batch([policy.add() for policy in policies])
    assert names(kernel.policies_about({0x100C7})) == names([policies[199]])
    assert len(kernel.policies_about({0x10003})) == 2
    assert len(dumps) == 2
    flush = struct.pack("=IHHII", 16, 0x1D, netlink_parts.REQUEST | netlink_parts.ACK, 0, 0)
    kernel.batch([netlink.XfrmRequest(wire.Secret(flush), "flush the policies")])
    assert kernel.policies_about({0x10003}) == []
    assert len(dumps) == 3


def test_socket_policies_are_left_out(kernel: Kernel) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        nowhere = ip_address("0.0.0.0")
        template = template_octets(Template(nowhere, nowhere, reqid=5, mode=TRANSPORT))
        own = KernelPolicy("in", Selector(nowhere, 0, nowhere, 0)).raw[16:184] + template
        sock.setsockopt(socket.IPPROTO_IP, 17, own)
        assert kernel.policies_about({5}) == []


# Events that no kernel sends.


class Deaf:
    """A socket with these events, or errors, in front of nothing."""

    def __init__(self, *events: bytes | OSError) -> None:
        self.events = list(events)

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        if not self.events:
            raise BlockingIOError
        event = self.events.pop(0)
        if isinstance(event, OSError):
            raise event
        return event, (0, 2)

    def close(self) -> None: ...


def an_index(*answers: list[bytes]) -> tuple[SpdIndex, list[list[bytes]]]:
    left = list(answers)
    index = SpdIndex(SimpleNamespace(ask=lambda request: left.pop(0)))  # type: ignore[arg-type]
    index._events.close()
    index._events, index._listens = Deaf(), True  # type: ignore[assignment]
    return index, left


def told(policy: KernelPolicy, number: int) -> bytes:
    return replace(policy, index=8 * number + 1).raw


@pytest.mark.parametrize(
    "event",
    [
        bytes(7),
        told(a_policy(1), 1)[:40],
        struct.pack("=IHHII", 17, wire.NEWPOLICY, 0, 0, 0) + b"x",
        struct.pack("=IHHII", 80, wire.DELPOLICY, 0, 0, 0) + bytes(64),
        struct.pack("=IHHII", 84, wire.DELPOLICY, 0, 0, 0) + bytes(64) + struct.pack("=HH", 90, 7),
        struct.pack("=IHHII", 20, 0x1B, 0, 0, 0) + bytes(4),
        OSError(105, "no buffer space"),
    ],
    ids=range(7),
)
def test_what_cannot_be_read_leads_to_a_new_dump(event: bytes | OSError) -> None:
    first, second = a_policy(1, reqid=1), a_policy(2, reqid=1)
    index, left = an_index([told(first, 1)], [told(first, 1), told(second, 2)])
    assert names(index.about({1})) == names([first])
    index._events = Deaf(event)  # type: ignore[assignment]
    assert names(index.about({1})) == names([first, second])
    assert left == []


def test_a_policy_that_is_cut_short_is_told() -> None:
    index, _ = an_index([told(a_policy(1), 1)[:60]])
    with pytest.raises(WireError, match="cut short"):
        index.about({1})


def test_events_that_are_always_lost_end_in_an_error() -> None:
    index, left = an_index(*([] for _ in range(9)))
    lost = OSError(105, "no buffer space")

    class Lossy(Deaf):
        def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
            if not self.events:
                self.events.append(lost)
                raise BlockingIOError
            return super().recvfrom(size)

    index._events = Lossy(lost)  # type: ignore[assignment]
    with pytest.raises(KernelError, match="change faster"):
        index.about({1})
    assert len(left) == 5


def test_a_socket_that_fails_is_told_and_the_next_look_dumps() -> None:
    first = a_policy(1, reqid=1)
    index, left = an_index([], [told(first, 1)])
    assert index.about({1}) == []
    index._events = Deaf(OSError(9, "bad file descriptor"))  # type: ignore[assignment]
    with pytest.raises(KernelError, match="cannot be watched"):
        index.about({1})
    assert names(index.about({1})) == names([first])
    assert left == []


def test_policies_are_those_of_the_namespace_that_it_was_made_in(dumps: list[str]) -> None:
    with namespaces(2) as (one, two):
        with one.entered():
            kernel = Kernel()
        with two.entered(), kernel:
            assert kernel.policies_about({1}) == []
            kernel.replace_policy(a_policy(1, reqid=1))
            assert len(kernel.policies_about({1})) == 1
            assert len(dumps) == 1
