"""A question over netlink costs one message each way: each further call delays a mobile node's packets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.errors import KernelError
from vici_bridge.kernel.netlink import ROUTE, Netlink
from vici_bridge.kernel.netlink_parts import DUMP
from vici_bridge.kernel.routes import GETROUTE, KernelRoute

LOOPBACK = ip_address("127.0.0.1")


class Counted:
    """A socket whose calls are counted."""

    def __init__(self, real: socket.socket) -> None:
        self.real = real
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.real, name)

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return method(*arguments)

        return call


@pytest.fixture
def netlink() -> Iterator[Netlink]:
    made = Netlink(ROUTE, "routes")
    yield made
    made.close()


def question(address: str = "127.0.0.1") -> Any:
    return KernelRoute(socket.AF_INET, ip_address(address), 32).request(GETROUTE, 0, "find a way")


def test_a_question_is_one_message_each_way(netlink: Netlink, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(netlink._socket)
    monkeypatch.setattr(netlink, "_socket", counted)
    for _ in range(3):
        (answer,) = netlink.ask(question())
        assert KernelRoute.parse(answer).destination == LOOPBACK
    assert counted.calls == ["send", "recv_into"] * 3


def test_questions_share_one_datagram(netlink: Netlink, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(netlink._socket)
    monkeypatch.setattr(netlink, "_socket", counted)
    outcomes = netlink.transact([question(f"127.0.0.{last}") for last in (1, 2, 3)])
    found = [KernelRoute.parse(answer).destination for outcome in outcomes for answer in outcome.answers]
    assert [str(address) for address in found] == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    assert counted.calls == ["send", *["recv_into"] * 3]


def test_a_refused_question_ends_as_well(netlink: Netlink) -> None:
    refused = KernelRoute(socket.AF_INET, LOOPBACK, 32, device=0x7FFFFFF0).request(GETROUTE, 0, "find a way")
    outcomes = netlink.transact([refused, question()])
    assert [bool(outcome.errno) for outcome in outcomes] == [True, False]
    (answer,) = netlink.ask(question())
    assert KernelRoute.parse(answer).destination == LOOPBACK


def test_a_list_is_read_to_its_end(netlink: Netlink) -> None:
    request = KernelRoute(socket.AF_INET).request(GETROUTE, DUMP, "list the routes")
    assert len(netlink.ask(request)) > 1


def test_a_kernel_that_does_not_answer_is_an_error(netlink: Netlink, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with silent, other:
        silent.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, (0).to_bytes(8) + (1000).to_bytes(8, "little")
        )
        monkeypatch.setattr(netlink, "_socket", silent)
        with pytest.raises(KernelError, match="did not answer a request to find a way"):
            netlink.ask(question())
