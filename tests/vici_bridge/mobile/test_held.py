"""A gateway's request from its new address waits for the agent, and for nothing else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.errors import KernelError
from ikectx.sa.context import Address, Endpoint
from ikectx.sa.name import SaName
from mobike_ext.responder import Asked
from tests.fuzz.host import IKE_HEADER, queued
from tests.mobile_world import NSG, Node, a_node_context, do, quick
from vici_bridge.effects.shelter import Sheltered
from vici_bridge.kernel.ike_queue import Waiting, waiting_of
from vici_bridge.mobile import held as mobile_held
from vici_bridge.mobile.held import HeldRequests
from vici_bridge.mobile.spis import SpiWatch
from vici_bridge.vici.views import SaView

__all__ = ["quick"]

SA = SaName(IKE_HEADER[:8], IKE_HEADER[8:16])
NOWHERE = Endpoint(ip_address("0.0.0.0"), 4500)


class Queue:
    """Stands in for `IkeQueue`."""

    refuses = False

    def __init__(self) -> None:
        self.waiting: list[Waiting] = []
        self.passed: list[int] = []
        self.watched: Mapping[SaName, Address] = {}
        self.events = asyncio.Event()

    def open(self) -> None:
        if self.refuses:
            raise KernelError("nft refused: no queue", hint="none")

    def close(self) -> None:
        pass

    def fileno(self) -> int:
        return 0

    def watch(self, gateways: Mapping[SaName, Address]) -> None:
        self.watched = gateways

    def read(self) -> Iterator[Waiting]:
        while self.waiting:
            yield self.waiting.pop(0)

    def let_pass(self, waiting: Waiting) -> None:
        self.passed.append(waiting.number)


async def turns() -> None:
    """Whatever is due is done."""
    for _ in range(10):
        await asyncio.sleep(0)


async def held(monkeypatch: pytest.MonkeyPatch) -> tuple[HeldRequests, Queue]:
    queue = Queue()
    monkeypatch.setattr(mobile_held, "IkeQueue", lambda: queue)
    monkeypatch.setattr(mobile_held, "PATIENCE", 0)
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "add_reader", lambda *_: None)
    monkeypatch.setattr(loop, "remove_reader", lambda *_: None)
    made = HeldRequests()
    await made.start()
    return made, queue


def request(number: int, datagram: bytes = bytes(4) + IKE_HEADER) -> Waiting:
    found = waiting_of(queued(datagram))
    assert found is not None
    return replace(found, number=number)


def test_what_nobody_claims_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        requests, queue = await held(monkeypatch)
        queue.waiting = [request(1, b"no IKE"), request(2), request(3)]
        assert requests.claim(SA, NOWHERE, 5) == []
        assert queue.passed == [1]
        await turns()
        assert queue.passed == [1, 2, 3]
        requests.close()

    do(scenario())


def test_what_is_claimed_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        requests, queue = await held(monkeypatch)
        queue.waiting = [request(1), request(2)]
        found = requests.claim(SA, NOWHERE, 0)
        await turns()
        assert queue.passed == []
        requests.end(found)
        assert queue.passed == [1, 2]
        assert requests.claim(SA, NOWHERE, 0) == []

    do(scenario())


def test_without_a_queue_charon_has_had_every_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(Queue, "refuses", True)
        requests, _ = await held(monkeypatch)
        assert "packets may be lost" in caplog.text
        requests.watch({SA: NSG.address})
        assert requests.claim(SA, NOWHERE, 0) == []
        requests.close()

    do(scenario())


class Shelters:
    """Stands in for `Shelter`, and says in which order it was called."""

    def __init__(self, order: list[str], fails: str) -> None:
        self.order, self.fails = order, fails

    def begin(self, view: SaView) -> Sheltered:
        if self.fails == "begin":
            raise KernelError("the kernel refused")
        self.order.append("sheltered")
        return Sheltered(SA, (), ())

    async def end(self, sheltered: Sheltered, remote: Address) -> None:
        assert remote == NSG.address
        self.order.append("over")
        if self.fails == "end":
            raise KernelError("no policies")


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("fails", ["", "begin", "end"])
def test_charon_gets_the_request_when_packets_are_sheltered(
    caplog: pytest.LogCaptureFixture, moves: bool, fails: str
) -> None:
    """And whatever goes wrong with that."""
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        node, order = Node(a_node_context()), list[str]()
        node.begin()

        class Requests(HeldRequests):
            def claim(self, *name: Any) -> list[Waiting]:
                assert name == (node.sa, NSG, 4)
                return [request(1)]

            def end(self, held: Any) -> None:
                order.append("charon has it")

        requests = Requests()
        watch = SpiWatch(node.host, node.mobile, asyncio.Lock(), held=requests)
        watch._shelter = Shelters(order, fails)  # type: ignore[assignment]
        watch._asked(node.sa, Asked(NSG, moves, (), message_id=4))
        await asyncio.gather(*watch._work)
        sheltered = moves and fails != "begin"
        assert order == (["sheltered", "charon has it", "over"] if sheltered else ["charon has it"])
        assert (requests._remotes == {node.sa: NSG.address}) is moves
        assert ("packets may be lost" in caplog.text) is (moves and fails != "")
        assert "SPIs" not in caplog.text

    do(scenario())
