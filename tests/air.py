"""A link between two ends of an IKE_SA that loses, doubles and reorders datagrams; time moves by itself.

Ends are machines of `mobike_ext`, with what their agents do: `Node` is one that is asked.
"""

from __future__ import annotations

import heapq
import itertools
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ikectx.numbers import Protocol as Proto
from ikectx.sa.context import Endpoint
from mobike_ext.naming import Renaming
from mobike_ext.notify import Reason
from mobike_ext.requester import EventT, RequesterMachine
from mobike_ext.responder import Asked, PeerSupports, SpiResponder


def events(machine: RequesterMachine[Any, Any, EventT]) -> list[EventT]:
    """All that has happened and was not asked for yet."""
    found: list[EventT] = []
    while (event := machine.next_event()) is not None:
        found.append(event)
    return found


@dataclass(slots=True)
class Names:
    """`naming.Names` in dictionaries. `sas`: (protocol, inbound, SPI) of one IKE_SA."""

    sas: set[tuple[Proto, bool, bytes]]
    taken: set[bytes] = field(default_factory=set)
    """Outbound SPIs of other SAs."""
    objections: dict[bytes, Reason] = field(default_factory=dict)
    reserved: dict[bytes, bytes] = field(default_factory=dict)
    full: bool = False
    seed: int = 0

    def known(self, protocol: Proto, spi: bytes, inbound: bool) -> bool:
        return (protocol, inbound, spi) in self.sas

    def usable(self, protocol: Proto, old: bytes, new: bytes) -> bool:
        return new not in self.taken

    def reserve(self, protocol: Proto, old: bytes) -> bytes | None:
        if self.full:
            return None
        dice = random.Random(self.seed * 1000 + len(self.reserved))
        size = 8 if protocol is Proto.IKE else 4
        return self.reserved.setdefault(old, b"\xcf" + dice.randbytes(size - 1))

    def objection(self, protocol: Proto, spi: bytes, inbound: bool) -> Reason | None:
        return self.objections.get(spi)

    def rename(self, pair: Renaming) -> None:
        """KeyError when that was done before."""
        self.sas.remove((pair.protocol, pair.inbound, pair.old))
        self.sas.add((pair.protocol, pair.inbound, pair.new))


class Agent:
    """An end of the link: what stands around a machine, and does its part in `to_send`."""

    machine: Any

    @property
    def local(self) -> Endpoint:
        found: Endpoint = self.machine.local
        return found

    def next_timer(self) -> float | None:
        due: float | None = self.machine.next_timer()
        return due

    def handle_timer(self, now: float) -> None:
        self.machine.handle_timer(now)

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        self.machine.receive(datagram, source, now)


class Node(Agent):
    """An agent that is asked: installs, then answers."""

    def __init__(self, machine: SpiResponder, names: Names, *, refusal: Reason | None = None) -> None:
        self.machine: SpiResponder = machine
        self.names = names
        self.refusal = refusal
        self.asked: list[Asked] = []
        self.supports = 0

    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        while (event := self.machine.next_event()) is not None:
            if isinstance(event, PeerSupports):
                self.supports = event.version
                continue
            self.asked.append(event)
            if self.machine.answering:
                if self.refusal is None:
                    for pair in event.pairs:
                        self.names.rename(pair)
                self.machine.answer(secrets.token_bytes(256), now, self.refusal)
        return self.machine.to_send(now)


class Air:
    """Carries datagrams among ends by address. The same seed is the same weather."""

    def __init__(
        self,
        seed: int = 0,
        *,
        loss: float = 0.0,
        double: float = 0.0,
        delay: tuple[float, float] = (0.01, 0.01),
    ) -> None:
        self.now = 0.0
        self.sent: list[tuple[Endpoint, bytes]] = []
        self.drop: Callable[[Endpoint, bytes], bool] = lambda source, datagram: False
        self._dice = random.Random(seed)
        self._loss, self._double, self._delay = loss, double, delay
        self._flying: list[tuple[float, int, Endpoint, Endpoint, bytes]] = []
        self._number = itertools.count()

    def _carry(self, source: Endpoint, to: Endpoint, datagram: bytes) -> None:
        self.sent.append((source, datagram))
        if self.drop(source, datagram):
            return
        for _ in range(1 + (self._dice.random() < self._double)):
            if self._dice.random() >= self._loss:
                due = self.now + self._dice.uniform(*self._delay)
                heapq.heappush(self._flying, (due, next(self._number), source, to, datagram))

    def run(self, *ends: Any, until: float = 60.0) -> None:
        """Until nothing more can happen, or for so many seconds."""
        end = self.now + until
        while True:
            for one in ends:
                for datagram, to in one.to_send(self.now):
                    self._carry(one.local, to, datagram)
            timers = [due for one in ends if (due := one.next_timer()) is not None]
            if self._flying:
                timers.append(self._flying[0][0])
            if not timers or min(timers) > end:
                self.now = end
                return
            self.now = max(self.now, min(timers))
            while self._flying and self._flying[0][0] <= self.now:
                _, _, source, to, datagram = heapq.heappop(self._flying)
                for one in ends:
                    if one.local == to:
                        one.receive(datagram, source, self.now)
            for one in ends:
                one.handle_timer(self.now)
