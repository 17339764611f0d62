"""A gateway's engine hears anything from a peer that has all rights: it makes no mistake of its own.

What the models of charon and kernel make of it does not count here: a rogue peer may bring any SA.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator
from functools import partial
from random import Random
from types import ModuleType
from typing import Any
from unittest import mock

from ikectx.engine import core, inbox, procedures, transfers
from ikectx.errors import CharonError, IkectxError
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import StreamDecoder
from tests.engine_world import MODES, Mobile, Slip, Weather, Wire, World, _peer
from tests.peers import a_context

from .target import Target

FAIR = Weather(cut=0, fail=0, slow=0, loss=0, crashes=0, full=0, jumps=0)
EVENTS = 300
"""What follows from messages is looked at for so long,"""
SECONDS = 30.0
"""and for so long by the clock, because what is let go is asked about without end if no answer comes."""
LOGGERS: tuple[ModuleType, ...] = (core, inbox, procedures, transfers)


class Mobiles(dict[SaName, Mobile]):
    """Every SA has a mobile node."""

    def __missing__(self, sa: SaName) -> Mobile:
        self[sa] = Mobile(a_context())
        return self[sa]


class Fair(World):
    """Nothing breaks, and daemons do what they can. `sent`: what was sent, by who got it."""

    def __init__(self, mode: str) -> None:
        super().__init__(MODES.index(mode))
        self.weather = FAIR
        self.dice = Random(1)
        self._events.clear()
        self.mobiles = Mobiles()
        self.sent: dict[str, bytes] = {"a": b"", "b": b"", "c": b""}
        for side in self.sides.values():
            side.dies_at.clear()
            side.box.do = partial(_does, side.box.do)  # type: ignore[method-assign]

    def carry(self, sender: str, number: int, octets: bytes, output: Any) -> None:
        ends = self._wires[number].ends
        self.sent[ends[ends[0] == sender]] += octets
        super().carry(sender, number, octets, output)

    def go_on(self, events: int) -> None:
        while self._events and self._events[0][0] < SECONDS and (events := events - 1):
            when, _, what = heapq.heappop(self._events)
            self.now = max(self.now, when)
            what()

    def link(self, to: str, peer: str) -> int:
        number = next(self._numbers)
        self._wires[number] = Wire(number, (peer, to), (self.sides[peer].life, self.sides[to].life))
        engine = self.sides[to].engine
        assert engine is not None
        engine.link_up(self.sides[to].now, number, _peer(peer), peer, accepted=True)
        return number


def _does(do: Any, step: Any) -> object:
    try:
        return do(step)
    except (IkectxError, Slip):
        raise
    except Exception as error:
        raise CharonError(f"not one of the model's SAs: {type(error).__name__}") from None


def recorded() -> Iterator[bytes]:
    """What each gateway hears in a transfer of each kind."""
    for mode in ("push", "pull", "predictive", "reactive", "packet"):
        world = Fair(mode)
        getattr(world, f"_{mode}")()
        world.go_on(20 * EVENTS)
        for number, name in enumerate("ab"):
            if world.sent[name]:
                yield bytes([number]) + world.sent[name]


def hears(octets: bytes) -> None:
    """The first octet says which of two gateways hears the rest: the one that has an SA, or the other."""
    messages = StreamDecoder().feed(octets[1:])
    mistakes: list[BaseException] = []
    world = Fair("push")
    world._serve(1)
    to, peer = ("a", "b") if octets[:1] < b"\1" else ("b", "a")
    side, number = world.sides[to], world.link(to, peer)
    with contextlib.ExitStack() as stack:
        for module in LOGGERS:
            patch = mock.patch.object(module, "log_mistake", lambda log, what, error: mistakes.append(error))
            stack.enter_context(patch)
        with contextlib.suppress(Slip):
            for message in messages:
                if side.engine is not None:
                    side.engine.receive(side.now, number, message)
                    side.pump()
            world.go_on(EVENTS)
    if mistakes:
        raise mistakes[0]


TARGETS = {"engine": Target(hears, tuple(recorded()))}
