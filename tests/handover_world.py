"""A MN and two gateways joined by links that lose, duplicate and reorder; gateways are their tables alone.

The MN is the real machine, its messages are real octets with real tokens. A gateway is its transfer tables
(`ikectx.engine.tables`) and the least that has to stand around them: who may ask for what, what the MN is
told. Steps (check, prepare, freeze, ...) last a while and fail now and then; agents crash and restart from
the journal; somebody in between replays what he saw and forges what has no tag. Time moves by hand.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from ikectx.node.mobility import Handover, HandoverEvent, HandoverMode, Limits, MobileState, Retry, Route
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Endpoint
from ikectx.timing import Timing
from ikectx.wire.cxtp import Ctaa, StatusBlock
from tests.handover_gateway import ATTACKER, GENERATION, MN, NEW, NSG, OLD, PSG, ROUTERS, UNIX, Gateway, Said
from tests.peers import HandClock


@dataclass(frozen=True, slots=True)
class Weather:
    """How bad it is. Probabilities of a message (loss, duplicate) and of a step (fail); delay in seconds.

    crash: of a gateway's agent, at each message it gets. attack: of a datagram being replayed, or answered
    by a forger. load: of a CTAR without a good cookie being answered with a question for one.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.01
    fail: float = 0.0
    crash: float = 0.0
    attack: float = 0.0
    load: float = 0.0


class World:
    """Time, links, and who is where. `run` goes on until nothing happens any more."""

    def __init__(self, seed: int, weather: Weather) -> None:
        self.dice = random.Random(seed)
        self.weather = weather
        self.clock = HandClock(1000.0)
        self.timing = Timing()
        self.tids = itertools.count(1)
        self.gateways = {name: Gateway(name, self) for name in ROUTERS}
        self.gateways["psg"].owns = True
        self.mobile: Mobile | Stock | None = None
        self.log: list[str] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._recorded: list[bytes] = []

    @property
    def owners(self) -> list[str]:
        return [gateway.name for gateway in self.gateways.values() if gateway.owns]

    def chance(self, probability: float) -> bool:
        return self.dice.random() < probability

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.now() + seconds, next(self._count), what))

    def run(self, limit: float = 20_000.0) -> None:
        while self._events:
            when, _, what = heapq.heappop(self._events)
            self.clock.forward(max(0.0, when - self.clock.now()))
            assert self.clock.now() < limit, "it does not come to an end"
            what()
            assert len(self.owners) <= 1, self.log

    def _carry(self, deliver: Callable[[], None]) -> None:
        weather = self.weather
        copies = (not self.chance(weather.loss)) + self.chance(weather.duplicate)
        for _ in range(copies):
            self.later(self.dice.random() * weather.delay, deliver)

    def say(self, to: str, sender: str, said: Said) -> None:
        """One gateway to the other."""
        self._carry(lambda: self.gateways[to].hear(said, sender))

    def datagram(self, octets: bytes, source: Endpoint, to: Endpoint) -> None:
        """One UDP payload between the MN and a gateway."""
        self._carry(lambda: self._deliver(octets, source, to))
        self._recorded.append(octets)
        if self.chance(self.weather.attack):
            replayed = self.dice.choice(self._recorded)
            if self.chance(0.3):
                at = self.dice.randrange(len(replayed))
                replayed = (
                    replayed[:at] + bytes([replayed[at] ^ 1 << self.dice.randrange(8)]) + replayed[at + 1 :]
                )
            victim = self.dice.choice([OLD, NEW, PSG.cxtp, NSG.cxtp])
            forger = self.dice.choice([ATTACKER, OLD, NEW, PSG.cxtp, NSG.cxtp])
            self.later(self.dice.random() * 20, lambda: self._deliver(replayed, forger, victim))
            lie = Ctaa(MN, () if self.chance(0.5) else (StatusBlock(Fpt.IKEV2_SA, Status.BUSY),))
            self.later(self.dice.random() * 5, lambda: self._deliver(lie.serialize(), to, source))

    def _deliver(self, octets: bytes, source: Endpoint, to: Endpoint) -> None:
        for router in ROUTERS.values():
            if to == router.cxtp:
                self.gateways[router.name].datagram(octets, source)
        if self.mobile is not None and to == self.mobile.at:
            self.mobile.datagram(octets, source)


class Mobile:
    """The MN with its agent: the machine of `ikectx.node.mobility`, and a move at some time."""

    def __init__(self, world: World, mode: HandoverMode, sequence: int, *, moves_after: float = 0.0) -> None:
        self.world = world
        self.at = NEW if mode is HandoverMode.REACTIVE else OLD
        self.events: list[HandoverEvent] = []
        self.machine = Handover(
            GENERATION,
            mode,
            Route(MN, PSG, NSG),
            sequence=sequence,
            unix=UNIX,
            care_of=NEW if mode is HandoverMode.REACTIVE else None,
            limits=Limits(Retry(2, 15, 60), hold=50),
        )
        world.mobile = self
        if mode is not HandoverMode.REACTIVE:
            world.later(moves_after, self._move)
        self._poke()

    def _move(self) -> None:
        machine = self.machine
        if not machine.done and not (
            machine.mode is HandoverMode.PREDICTIVE and machine.state is MobileState.ANNOUNCING
        ):
            self.at = NEW
            machine.moved(NEW, self.world.clock.now())
            self._poke()
        elif not machine.done:
            self.world.later(1.0, self._move)

    def datagram(self, octets: bytes, source: Endpoint) -> None:
        self.machine.receive(octets, source, self.world.clock.now())
        self._poke()

    def _poke(self) -> None:
        now = self.world.clock.now()
        self.machine.handle_timer(now)
        for octets, to in self.machine.to_send(now):
            self.world.datagram(octets, self.at, to)
        while (event := self.machine.next_event()) is not None:
            self.events.append(event)
            self.world.log.append(f"{now:.2f} mn {event}")
            if self.machine.state is MobileState.ACTIVATED:
                assert self.world.owners == ["nsg"], "the MN believes what is not so"
        due = self.machine.next_timer()
        if due is not None:
            self.world.later(due - now, self._poke)


class Stock:
    """A MN without an agent: it asks nSG by IKE, again and again, until it is answered."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.at = NEW
        self.answered = False
        self._left = 30
        world.mobile = self
        self._ask()

    def _ask(self) -> None:
        if not self.answered and self._left:
            self._left -= 1
            self.world.datagram(b"IKE", NEW, NSG.cxtp)
            self.world.later(4.0, self._ask)

    def datagram(self, octets: bytes, source: Endpoint) -> None:
        if octets == b"OK of nsg":
            self.answered = True
