"""IKE requests from another place than the SA's gateway wait for the agent, and nothing else does."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from ikectx.errors import KernelError
from ikectx.sa.name import SaName
from tests.netns import Namespace
from vici_bridge.kernel.host_routes import HostRoutes
from vici_bridge.kernel.ike_queue import IkeQueue

SA = SaName(b"initiate", b"responds")
OTHER = SaName(b"initiate", b"otherone")
HOST = {4: "127.0.0.1", 6: "::1"}
ELSEWHERE = {4: "192.0.2.9", 6: "2001:db8::9"}


def request(sa: SaName = SA, *, exchange: int = 37, flags: int = 0x08, port: int = 4500) -> bytes:
    marker = b"" if port == 500 else bytes(4)
    return marker + sa.octets + bytes((46, 0x20, exchange, flags)) + bytes(4) + (28).to_bytes(4)


class Line:
    """Datagrams from this host to itself."""

    def __init__(self, version: int, port: int) -> None:
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        self.receiver, self.sender = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
        self.receiver.setblocking(False)
        self.receiver.bind((HOST[version], port))

    def passes(self, datagram: bytes) -> bool:
        """Whether it has come: loopback delivers within the call."""
        self.sender.sendto(datagram, self.receiver.getsockname()[:2])
        return self.came()

    def came(self) -> bool:
        try:
            return bool(self.receiver.recv(100))
        except BlockingIOError:
            return False

    def close(self) -> None:
        self.receiver.close()
        self.sender.close()


@pytest.fixture
def queue(space: Namespace) -> Iterator[IkeQueue]:
    space.ip("link set lo up")
    made = IkeQueue()
    made.open()
    yield made
    made.close()


@pytest.mark.kernel_esp  # and for the queue of nftables, which the guest has
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("port", [500, 4500])
def test_requests_from_elsewhere_wait(queue: IkeQueue, version: int, port: int) -> None:
    line = Line(version, port)
    asked = request(port=port)
    assert line.passes(asked)
    queue.watch({SA: ip_address(HOST[version])})
    assert line.passes(asked)
    queue.watch({SA: ip_address(ELSEWHERE[version])})
    assert not line.passes(asked)
    (waiting,) = queue.read()
    assert waiting.packet.endswith(asked)
    assert not line.came()
    queue.let_pass(waiting)
    assert line.came()
    for other in (
        request(OTHER, port=port),
        request(port=port, exchange=36),
        request(port=port, flags=0x28),  # a response
        b"\0\0\0\1" + SA.octets,
    ):
        assert line.passes(other)
    # somebody has flushed the firewall: all passes, until SAs change
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    assert line.passes(asked)
    queue.watch({SA: ip_address(ELSEWHERE[version]), OTHER: ip_address(ELSEWHERE[version])})
    assert not line.passes(asked)
    assert not line.passes(request(OTHER, port=port))
    queue.watch({})
    assert line.passes(asked)
    line.close()


@pytest.mark.kernel_esp
def test_a_flood_and_an_agent_that_has_died_hold_nothing(queue: IkeQueue) -> None:
    line = Line(4, 4500)
    queue.watch({SA: ip_address(ELSEWHERE[4])})
    passed = [line.passes(request()) for _ in range(400)]
    assert not passed[0] and any(passed)
    with pytest.raises(KernelError):  # two agents cannot have it
        IkeQueue().open()
    queue._socket.close()
    assert line.passes(request())
    line.close()


def routes() -> str:
    """Of the main table, in the namespace that was entered."""
    return subprocess.run(["ip", "route"], check=True, capture_output=True, text=True).stdout


def test_routes_stay_when_a_device_loses_an_address(space: Namespace) -> None:
    space.ip(
        "link add left type veth peer name right",
        "link set left up",
        "link set right up",
        "address add 192.0.2.7/24 dev left",
        "address add 10.4.0.10/32 dev left",
        "route add 10.3.0.0/24 dev left src 10.4.0.10",
    )
    made, vip = HostRoutes(), ip_address("10.4.0.10")
    device = made.device_of(vip)
    assert device and not made.device_of(ip_address("10.4.0.11"))
    made.add(vip, device)
    space.ip("address delete 10.4.0.10/32 dev left")
    assert "10.3.0.0/24" in routes()
    space.ip("address add 10.4.0.10/32 dev left")
    made.remove(vip, device)
    assert "10.3.0.0/24" in routes()
    assert made.is_own(vip)
    made.add(vip, device)
    made.clear()
    space.ip("address delete 10.4.0.10/32 dev left")
    assert not made.is_own(vip)
    assert "10.3.0.0/24" not in routes()
    made.close()
