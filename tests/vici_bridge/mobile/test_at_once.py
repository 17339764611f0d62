"""Handovers of a mobile node that meet: two at once, one that is given up, names that cannot be found."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.errors import BusyError, LinkError
from ikectx.net.mn_udp import run_handover
from ikectx.node.mobility import Handover, HandoverOutcome, HandoverPrepared, MobileState
from ikectx.sa.name import SaName
from tests.asking_node import CONFIG, World, do
from tests.mobile_world import NEW, NSG

THIRD = CONFIG + '[[gateway]]\nname = "third"\naddress = "192.0.2.3"\n'


def world() -> World:
    """One with a third gateway, whose charon takes a moment to tell its SAs."""
    w = World(THIRD)
    w.outside.ways[ip_address("192.0.2.3")] = NEW.address
    export = w.mobile.export

    async def slow(sa: SaName) -> Any:
        await asyncio.sleep(0.01)
        return await export(sa)

    w.mobile.export = slow  # type: ignore[method-assign]
    return w


def test_of_two_announcements_at_once_one_is_refused() -> None:
    async def scenario() -> None:
        w = world()
        found = await asyncio.gather(
            w.handovers.announce("nsg"), w.handovers.announce("third"), return_exceptions=True
        )
        assert isinstance(found[1], BusyError)
        assert (w.handovers.status() or {})["to"] == "nsg"
        assert await w.handovers.cancel()
        assert not [task for task in asyncio.all_tasks() if "_predictive" in repr(task)]

    do(scenario())


def test_nothing_is_announced_while_another_handover_begins() -> None:
    async def scenario() -> None:
        w = world()
        announced = asyncio.create_task(w.handovers.announce("third"))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await w.arrive("nsg")
        assert (await announced).result == "announced"

    do(scenario())


def test_an_announced_move_that_fails_at_the_new_place_is_reported() -> None:
    async def scenario() -> None:
        w, bad = World(), list[Any]()
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: bad.append(context))
        await w.handovers.announce("nsg")
        w.mobile.busy = ["CHILD_REKEY"]
        w.handovers.addresses_changed()
        await asyncio.sleep(0.05)
        last = w.handovers.notes.last()
        assert (last["result"], last["serves"], last["exit_code"]) == ("failed", "psg", BusyError.exit_code)
        assert "CHILD_REKEY" in last["detail"]
        assert (w.handovers.status(), bad) == (None, [])

    do(scenario())


def test_an_announced_move_whose_socket_fails_is_in_doubt() -> None:
    async def scenario() -> None:
        w = World()

        async def run(
            machine: Handover, bind: object = None, *, moves: Any, progress: Any
        ) -> HandoverOutcome:
            progress(MobileState.PREPARED, HandoverPrepared(None))  # type: ignore[arg-type]
            await moves
            machine._know(in_doubt=True)
            raise LinkError("the network is down")

        w.handovers._run = run
        await w.handovers.announce("nsg")
        w.handovers.addresses_changed()
        await asyncio.sleep(0.05)
        last = w.handovers.notes.last()
        assert (last["result"], last["serves"], last["detail"]) == ("failed", None, "the network is down")
        assert w.handovers.notes.in_question()

    do(scenario())


class Arriving:
    """In place of `run_handover`: the new gateway has the CTAR, and does not answer until it may."""

    def __init__(self) -> None:
        self.sent, self.answer = asyncio.Event(), asyncio.Event()
        self.expiry = 0.0

    async def __call__(
        self, machine: Handover, bind: object = None, *, moves: Awaitable[Any], progress: Callable[..., None]
    ) -> HandoverOutcome:
        progress(MobileState.PREPARED, HandoverPrepared(None))  # type: ignore[arg-type]
        machine.moved(await moves, 0.0)
        progress(MobileState.ARRIVING, None)
        self.sent.set()
        await self.answer.wait()
        machine.state = MobileState.ACTIVATED
        return HandoverOutcome(MobileState.ACTIVATED)


@pytest.mark.parametrize("how", ["cancel", "arrive", "announce"])
def test_what_has_asked_the_new_gateway_is_not_cut_off(how: str) -> None:
    async def scenario() -> None:
        w, gateways = World(THIRD), Arriving()
        w.outside.ways[ip_address("192.0.2.3")] = NEW.address
        w.handovers._run = gateways
        await w.handovers.announce("nsg")
        w.handovers.addresses_changed()
        await gateways.sent.wait()
        with pytest.raises(BusyError, match="asks nsg"):
            await (w.handovers.cancel() if how == "cancel" else getattr(w.handovers, how)("third"))
        gateways.answer.set()
        await asyncio.sleep(0.01)
        assert (w.mobile.remote, w.handovers.notes.last()["result"]) == (NSG, "moved")

    do(scenario())


def test_what_is_cancelled_has_been_taken_back() -> None:
    """Also what the mobile node was doing at its new place just then."""

    async def scenario() -> None:
        w, began, did = World(), asyncio.Event(), list[str]()

        async def quiet(sa: SaName, **_: object) -> None:
            began.set()
            try:
                await asyncio.sleep(1)
            finally:
                await asyncio.sleep(0.02)  # VICI
                did.append("taken back")

        async def run(machine: Handover, bind: Any = None, *, moves: Any, progress: Any) -> HandoverOutcome:
            progress(MobileState.PREPARED, HandoverPrepared(None))  # type: ignore[arg-type]
            machine.state = MobileState.PREPARED
            return await run_handover(machine, bind, moves=moves, progress=progress, protect=lambda of: None)

        w.mobile.quiet = quiet  # type: ignore[method-assign]
        w.handovers._run = run
        await w.handovers.announce("nsg")
        w.handovers.addresses_changed()
        await began.wait()
        assert await w.handovers.close()
        assert (did, w.handovers.lock.locked()) == (["taken back"], False)

    do(scenario())


def test_a_question_is_answered_when_charon_has_found_the_gateway() -> None:
    async def scenario() -> None:
        w = World()
        w.gateways.state, w.gateways.in_doubt = MobileState.SILENT, True
        await w.arrive("nsg")
        assert w.handovers.notes.in_question()
        w.mobile.remote = NSG
        assert (await w.arrive("nsg")).result == "already"
        assert not w.handovers.notes.in_question()

    do(scenario())


NAMED = CONFIG.replace('"2001:db8:2::1"]', '"2001:db8:2::1"]\ncxtp = "nsg.example:5091"').replace(
    '"2001:db8:1::1"]', '"2001:db8:1::1"]\ncxtp = "psg.example:5091"'
)


def name_server(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    """One that is out of reach after these answers."""

    async def getaddrinfo(host: str, port: int, **_: object) -> list[Any]:
        if not answers:
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return [(2, 2, 17, "", (answers.pop(), port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


def test_at_the_new_place_there_may_be_no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = World(NAMED)
        name_server(monkeypatch, ["192.0.2.2", "192.0.2.1"])
        assert (await w.handovers.announce("nsg")).result == "announced"
        w.handovers.addresses_changed()
        await asyncio.sleep(0.05)
        assert w.handovers.notes.last()["result"] == "moved"
        w.mobile.remote = w.mobile.context.remote
        assert (await w.arrive("nsg")).result == "moved", "the name is known from before"

    do(scenario())


def test_the_old_gateways_name_need_not_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        w = World(NAMED)
        name_server(monkeypatch, ["192.0.2.2"])
        assert (await w.arrive("nsg")).result == "moved"

    do(scenario())


def test_a_host_that_slept_says_the_time_of_its_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monotonic clock stands still meanwhile."""

    async def scenario() -> None:
        w, gateways = World(), Arriving()
        w.handovers._run = gateways
        await w.handovers.announce("nsg")
        pending = w.handovers._pending
        assert pending is not None
        before = pending.machine.unix
        wall = time.time
        monkeypatch.setattr(time, "time", lambda: wall() + 600.0)
        w.handovers.addresses_changed()
        await gateways.sent.wait()
        assert pending.machine.unix - before == pytest.approx(600.0, abs=1.0)
        await w.handovers.close()

    do(scenario())
