"""What is decided, renamed, asked for or stopped while a transfer waits for something else."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from ikectx.engine.core import Engine, EngineConfig, Resolve, Transfer
from ikectx.engine.effects import Choose, Export, Invite, Invites
from ikectx.engine.journaled import MobileConfig, TransferPolicy
from ikectx.engine.outputs import Send
from ikectx.engine.ports import Way
from ikectx.errors import BusyError, LinkError
from ikectx.peer import PeerConfig
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import Ctd, Ctdr
from tests import engine_world
from tests.engine_world import EVERYTHING, TIMING, Side, Weather, World


class Quiet(World):
    """Gateways a and b, and no bad weather."""

    def __init__(self) -> None:
        super().__init__(0, mode="push", weather=Weather(0, 0, 0, 0, 0, 0, 0))
        self.a, self.b = self.sides["a"], self.sides["b"]
        self.took = 0.01
        self.said: list[Any] = []
        self.cuts: Callable[[str, Send], bool] = lambda sender, output: False
        """Whether the link breaks instead of carrying that."""

    def lasts(self) -> float:
        return self.took

    def carry(self, sender: str, number: int, octets: bytes, output: Send) -> None:
        if not self.cuts(sender, output):
            super().carry(sender, number, octets, output)
            return
        wire = self._wires[number]
        wire.last.clear()
        wire.broken = True
        for end in "ab":
            self._deliver(wire, end, self.now + 0.01, lambda e, n: e.link_lost(n, number, LinkError("cut")))

    def until(self, end: float) -> None:
        while self._events and self.now < end:
            when, _, what = heapq.heappop(self._events)
            self.now = max(self.now, when)
            what()

    def state(self, side: Side, sa: SaName) -> str:
        return side.box.sas[sa].state if sa in side.box.sas else ""

    def moves(self, at: float, sa: SaName) -> None:
        self.later(at, lambda: self.a.ask(Transfer(sa, "b", "auto"), self.said.append))


def once(kind: type, which: int = 1) -> Callable[[str, Send], bool]:
    """The first, or a later, message of that kind."""
    number = itertools.count(1)
    return lambda sender, output: isinstance(output.message, kind) and next(number) == which


def test_who_reclaims_an_sa_while_its_gateway_is_dialled_does_not_let_go_of_it_again() -> None:
    world = Quiet()
    sa = world._serve(1).spis
    world.cuts = once(Ctd)
    dials = world.connect

    def slowly(side: Side, effect: int, peer: Any) -> None:
        world.took = 1.0 if side.engine is not None and side.engine.transfers.open else 0.01
        if world.took == 1.0 and world.state(world.b, sa):
            (run,) = side.engine.transfers.open.values()  # type: ignore[union-attr]
            world.later(0.5, lambda: side.ask(Resolve(run.transfer_id.hex(), "reclaim"), world.said.append))
        dials(side, effect, peer)
        world.took = 0.01

    world.connect = slowly  # type: ignore[method-assign]
    world.moves(0, sa)
    world.until(90)
    assert (world.state(world.a, sa), world.state(world.b, sa)) == ("served", "")


def test_a_gateway_under_another_name_is_not_told_that_its_sa_was_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = Quiet()
    sa, b = world._serve(1).spis, world.b
    cuts, reachable = once(Ctdr, 2), [True]

    def restart() -> None:
        b.engine, b.life = None, b.life + 1
        peers = (PeerConfig("gw-a", "a", rights=EVERYTHING),)
        policy = TransferPolicy(TIMING, mobile=MobileConfig())
        b.engine, b._due = Engine(EngineConfig("b", peers, policy), world.dice.randbytes), None
        for entry in b.disk.open:
            b.engine.restore(b.now, entry)
        b.engine.start(b.now)
        b.pump()
        named = engine_world._peer
        monkeypatch.setattr(engine_world, "_peer", lambda name: peers[0] if name == "a" else named(name))
        reachable[0] = True

    def breaks(sender: str, output: Send) -> bool:
        if sender != "b" or not cuts(sender, output):
            return False
        reachable[0] = False
        world.later(0.5, restart)
        return True

    world.cuts = breaks
    monkeypatch.setattr(world, "reach", lambda *_: reachable[0])
    world.moves(0, sa)
    world.until(30)
    assert (world.state(world.a, sa), world.state(b, sa)) == ("frozen", "served")


def test_two_commands_invite_one_mobile_node_one_after_the_other() -> None:
    world = Quiet()
    sa, does = world._serve(1).spis, world.a.box.do
    invited: list[float] = []

    def do(step: Any) -> Any:
        if isinstance(step, Invites):
            return True
        if isinstance(step, Invite):
            invited.append(world.now)
            return None
        return Way("update") if isinstance(step, Choose) else does(step)

    world.a.box.do = do  # type: ignore[method-assign]
    world.moves(0, sa)
    world.moves(3, sa)
    world.until(60)
    assert len(invited) == 1
    assert "being moved already" in str(world.said[0]) and world.said[1].result == "moved"


def test_a_gateway_that_stops_is_soon_idle() -> None:
    """Also while another one is being drained to it."""
    world, left = Quiet(), list[SaName]()
    world.took = 0.05
    left += [world._serve(number + 1).spis for number in range(40)]

    def more(outcome: object = None) -> None:
        if left:
            world.a.ask(Transfer(left.pop(), "b"), more)

    def stop() -> None:
        assert world.b.engine is not None
        world.b.engine.stop(world.b.now)
        world.b.pump()

    idle: list[bool] = []

    def look() -> None:
        assert world.b.engine is not None
        idle.append(world.b.engine.idle)

    for _ in range(3):
        world.later(0, more)
    world.later(1, stop)
    world.later(1.8, look)
    world.until(100)
    assert idle == [True]
    assert {sa.state for side in (world.a, world.b) for sa in side.box.sas.values()} == {"served"}


def test_a_gateway_that_stops_does_not_try_a_busy_sa_again() -> None:
    world, times = Quiet(), [1]
    sa, does = world._serve(1).spis, world.a.box.do

    def do(step: Any) -> Any:
        if isinstance(step, Export) and times:
            times.pop()
            raise BusyError("an exchange is in flight")
        return does(step)

    def stop() -> None:
        assert world.a.engine is not None
        world.a.engine.stop(world.a.now)
        world.a.pump()

    world.a.box.do = do  # type: ignore[method-assign]
    world.moves(0, sa)
    world.later(0.1, stop)
    world.until(30)
    assert (world.said[0].result, world.said[0].attempts) == ("kept", 1)
    assert (world.state(world.a, sa), world.state(world.b, sa)) == ("served", "")
