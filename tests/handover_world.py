"""A mobile node's own machine and its gateways' engines, over links that lose, duplicate and reorder.

The mobile node is the machine of `ikectx.node.mobility`, its messages are octets with tokens. Its gateways, a
and b, are those of `engine_world`, whose agents crash and whose steps fail. Somebody on the path replays what
was sent, changes bits of it, and forges answers without a tag.
"""

from __future__ import annotations

from dataclasses import dataclass

from ikectx.engine.core import Arrive
from ikectx.errors import WireError
from ikectx.node.mobility import (
    Handover,
    HandoverEvent,
    HandoverMode,
    Limits,
    MobileState,
    Retry,
    Route,
    Router,
)
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Endpoint
from ikectx.wire import cookies
from ikectx.wire.cxtp import Ctaa, Ctar, StatusBlock
from tests.engine_world import AWAY, UNIX, Slip, Weather, World

CXTP = {name: Endpoint.of(f"192.0.2.{number}", 5091) for number, name in enumerate("ab", 1)}
ATTACKER = Endpoint.of("192.0.2.66", 666)


@dataclass(frozen=True, slots=True)
class Air:
    """Between the mobile node and the gateways. Probabilities that a datagram is lost or duplicated; `delay`
    in seconds. attack: that it is replayed, or answered by a forger. load: that a CTAR without a right cookie
    is answered with a request for one.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.01
    attack: float = 0.0
    load: float = 0.0


class HandoverWorld(World):
    """One mobile node, which asks for a handover from a to b itself."""

    def __init__(self, seed: int, mode: HandoverMode, weather: Weather, air: Air) -> None:
        super().__init__(seed, "handover", weather)
        self.air = air
        self.jars = {name: cookies.Cookies(name.encode()) for name in CXTP}
        self.mobile = Roamer(self, mode, sequence=seed)
        self._recorded: list[bytes] = []

    def _handover(self) -> None:
        self.mobile.begin()

    def datagram(self, octets: bytes, source: Endpoint, to: Endpoint) -> None:
        """One UDP payload between the mobile node and a gateway."""
        copies = (not self.chance(self.air.loss)) + self.chance(self.air.duplicate)
        for _ in range(copies):
            self.later(self.dice.random() * self.air.delay, lambda: self._arrives(octets, source, to))
        self._recorded.append(octets)
        if self.chance(self.air.attack):
            self._attack(source, to)

    def _attack(self, source: Endpoint, to: Endpoint) -> None:
        dice, ends = self.dice, [self.mobile.old, self.mobile.new, *CXTP.values()]
        replayed = bytearray(dice.choice(self._recorded))
        if self.chance(0.3):
            replayed[dice.randrange(len(replayed))] ^= 1 << dice.randrange(8)
        victim, forger = dice.choice(ends), dice.choice([ATTACKER, *ends])
        self.later(dice.random() * 20, lambda: self._arrives(bytes(replayed), forger, victim))
        lie = Ctaa(
            self.mobile.old.address, () if self.chance(0.5) else (StatusBlock(Fpt.IKEV2_SA, Status.BUSY),)
        )
        self.later(dice.random() * 5, lambda: self._arrives(lie.serialize(), to, source))

    def _arrives(self, octets: bytes, source: Endpoint, to: Endpoint) -> None:
        for name, place in CXTP.items():
            if to == place:
                self._asks(name, octets, source)
        if to == self.mobile.at:
            self.mobile.hears(octets, source)

    def _asks(self, name: str, octets: bytes, source: Endpoint) -> None:
        """As `mn_udp.MnServer` does it."""
        fixed = cookies.fixed_part(octets)
        if not fixed:
            return
        cookie, rest = cookies.split(octets, fixed)
        jar, host = self.jars[name], (str(source.address), source.port)
        if self.chance(self.air.load) and not jar.right(cookie, *host, self.now):
            self.datagram(cookies.ask(octets, fixed, jar.make(*host, self.now)), CXTP[name], source)
            return
        try:
            ctar = Ctar.parse(rest)
        except WireError:
            return

        def answered(outcome: object) -> None:
            if isinstance(outcome, bytes):
                self.datagram(outcome, CXTP[name], source)

        self.sides[name].ask(Arrive(ctar, source), answered)


class Roamer:
    """The mobile node with its agent."""

    def __init__(self, world: HandoverWorld, mode: HandoverMode, sequence: int) -> None:
        self.world = world
        context = world._serve(1)
        self.sa = context.spis
        self.old = Endpoint(context.remote.address, 6000)
        self.new = Endpoint(AWAY.address, 6001)
        reactive = mode is HandoverMode.REACTIVE
        self.at = self.new if reactive else self.old
        self.events: list[HandoverEvent] = []
        psg, nsg = (Router(name, place.address, place) for name, place in CXTP.items())
        self.machine = Handover(
            context.current,
            mode,
            Route(context.remote.address, psg, nsg),
            sequence=sequence,
            unix=UNIX,
            care_of=AWAY if reactive else None,
            limits=Limits(Retry(1.5, 6, 40), hold=15),
        )

    def begin(self) -> None:
        if self.machine.mode is not HandoverMode.REACTIVE:
            self.world.later(self.world.dice.random() * 18, self._move)
        self._poke()

    def _move(self) -> None:
        machine = self.machine
        if machine.done:
            return
        if machine.mode is HandoverMode.PREDICTIVE and machine.state is MobileState.ANNOUNCING:
            self.world.later(1.0, self._move)
            return
        self.at = self.new
        machine.moved(AWAY, self.world.now)
        self._poke()

    def hears(self, octets: bytes, source: Endpoint) -> None:
        self.machine.receive(octets, source, self.world.now)
        self._poke()

    def _poke(self) -> None:
        world, machine = self.world, self.machine
        machine.handle_timer(world.now)
        for octets, to in machine.to_send(world.now):
            world.datagram(octets, self.at, to)
        while (event := machine.next_event()) is not None:
            self.events.append(event)
            if machine.state is MobileState.ACTIVATED and not world.sides["b"].box.owns(self.sa):
                raise Slip("the MN is told that b serves its SA, which does not")
        if (due := machine.next_timer()) is not None:
            world.later(due - world.now, self._poke)
