"""Gateways that are engines in one process: links, daemons, disks and agents that die, all by one seed.

An engine gives out what is to be done; this world does it in models that count. A `Box` is charon and kernel
of one gateway: who sends for an SA, under which sequence numbers, and which message IDs its requests have.
It outlives its agent, as does the `Disk`. Links are connections as TCP has them: in order, delayed, broken at
any message with what was on its way, while the other end still reads and a new one is there already.
Datagrams of mobile nodes are lost, doubled and overtaken. An agent dies before any of its outputs, and its
next start has the disk alone. Time moves by hand, and nothing here waits.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import ip_address
from typing import Any

from ikectx.engine.core import Arrive, Engine, EngineConfig, Moment, Pull, Show, Transfer, Wanted
from ikectx.engine.effects import (
    Activate,
    Check,
    Choose,
    Delete,
    Divert,
    Epochs,
    Export,
    Find,
    FindEpochs,
    FindLatest,
    FindTransfer,
    Freeze,
    Get,
    GetReady,
    Hear,
    Invites,
    Items,
    Move,
    NewNames,
    NotComing,
    OwnedFrom,
    Prepare,
    Prepared,
    Put,
    Recorded,
    Release,
    Stands,
    Stay,
    Step,
    StillHere,
    Take,
    Thaw,
    Undo,
)
from ikectx.engine.journal import JournalEntry, JournalHas
from ikectx.engine.journaled import MobileConfig, TransferPolicy
from ikectx.engine.outputs import (
    Answer,
    Close,
    Connect,
    Effect,
    Journal,
    Output,
    Report,
    Send,
    Settled,
)
from ikectx.engine.ports import Evidence, MoveReport, Way
from ikectx.engine.tables import OSEQ_JUMP
from ikectx.errors import BusyError, CharonError, IkectxError, LinkError, StoreError, UnknownSaError
from ikectx.numbers import Fpt, Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import Endpoint, FinalChild, FinalState, IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from ikectx.timing import Timing
from ikectx.wire.cxtp import ContextDataBlock, Ctaa
from ikectx.wire.tokens import Purpose, make_ctar, open_ctaa, token_key
from tests.ikectx.wire.test_packet_proof import request
from tests.peers import a_context

TIMING = Timing(
    offer=3.0,
    predictive=20.0,
    request=10.0,
    unproven=5.0,
    confirm=2.0,
    hold=8.0,
    in_doubt=15.0,
    backoff=0.2,
    backoff_max=3.0,
    busy_backoff=0.2,
    turn=6.0,
)
UNIX = 1_795_000_000
ROUGH = 40.0
"""Seconds after which nothing breaks any more."""
CALM = 1000.0
"""When agents start for the last time, unless something goes on for longer."""
LIMIT = 4000.0
EVENTS = 60_000
"""A run that is not over by then has no end."""
MODES = ("push", "pull", "predictive", "reactive", "packet", "twice", "ring", "torn")
JUMPS = (-86400.0, -70.0, -1.0, 1.0, 70.0, 86400.0, 1e8)
"""Seconds by which a clock is set on or back."""
AWAY = Endpoint.of("203.0.113.5", 4500)
EVERYTHING = frozenset({"push", "pull", "packet"})


class Slip(AssertionError):
    """An invariant does not hold."""


# -- what outlives an agent --------------------------------------------------------------------------------


class Mobile:
    """The other end of one SA: the sequence numbers it has seen, and the request that it expects next."""

    def __init__(self, context: IkeContext) -> None:
        self.context = context
        self.home = ""
        """The gateway to which the network sends packets for it."""
        self.numbers: list[tuple[bytes, int, int, str]] = []
        """Sent so far: under which SPI, first and last number, and by which gateway."""
        self.expects = context.mid_initiator
        self.owners: dict[int, str] = {}
        """Who has served it in each epoch in which it went to somebody."""
        self.asked: dict[int, str] = {}
        """Who had the request of that message ID answered."""

    def gets(self, spi: bytes, first: int, last: int, by: str) -> None:
        """ESP packets of these numbers. None may come twice under one key: that is an IV used twice."""
        for sent, begin, end, other in self.numbers:
            if sent == spi and first <= end and begin <= last:
                raise Slip(f"{by} sends {first} to {last}, {other} sent {begin} to {end}: one IV twice")
        self.numbers.append((spi, first, last, by))

    def hears(self, message_id: int, who: str) -> bool:
        """A request: True if it is answered, because it is the next one, or the last one again."""
        if message_id == self.expects:
            self.asked[message_id] = who
            self.expects += 1
            return True
        return self.asked.get(message_id) == who


@dataclass(slots=True)
class Sa:
    """One SA in one box. `oseq`: the last outbound number in its kernel, `mid`: of charon's next request."""

    context: IkeContext
    oseq: int
    mid: int
    state: str
    """served, frozen, prepared or taken."""
    to: str = ""
    """Where packets for the mobile node go while it is frozen."""
    diverted: str = ""
    """Where they go already, because it was leaving."""


class Box:
    """charon and kernel of one gateway."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.world = world
        self.sas: dict[SaName, Sa] = {}
        self.strange: set[SaName] = set()
        """SAs whose keys the agent does not know any more: they cannot be moved."""

    def mobile(self, sa: SaName) -> Mobile:
        return self.world.mobiles[sa]

    def send(self, sa: SaName, count: int, hops: int = 2) -> None:
        """So many packets for the mobile node have come here."""
        here = self.sas.get(sa)
        if here is None:
            return
        if here.state == "frozen" or here.diverted:
            to = here.to if here.state == "frozen" else here.diverted
            if hops and to:
                self.world.sides[to].box.send(sa, count, hops - 1)
            return
        spi = here.context.children[0].spi_out
        self.mobile(sa).gets(spi, here.oseq + 1, here.oseq + count, self.name)
        here.oseq += count

    def owns(self, sa: SaName) -> bool:
        here = self.sas.get(sa)
        return here is not None and here.state in ("served", "taken")

    def _at(self, sa: SaName, *states: str) -> Sa:
        here = self.sas.get(sa)
        if here is None or here.state not in states:
            raise UnknownSaError(f"{self.name} has no such SA ({here and here.state})")
        return here

    def _now(self, here: Sa) -> IkeContext:
        child = here.context.children[0]
        children = (replace(child, outbound=replace(child.outbound, seq=here.oseq)),)
        return replace(here.context, children=children, mid_initiator=here.mid)

    def do(self, step: Step) -> object:
        """The step takes effect. Errors: IkectxError."""
        match step:
            case Find(mn):
                return [sa for sa, here in self.sas.items() if here.state == "served"
                        and here.context.remote.address == mn]  # fmt: skip
            case Recorded(sa) | Export(sa) if sa in self.strange:
                raise UnknownSaError("its keys are not known")
            case Recorded(sa):
                return self._at(sa, "served", "frozen").context
            case Export(sa):
                return self._now(self._at(sa, "served"))
            case Choose():
                return Way("update")
            case Invites():
                return False
            case Freeze(context, to) as freeze:
                here = self._at(context.spis, "served")
                # nothing is sent on to a gateway that has nothing of the SA
                here.state, here.to = "frozen", "" if freeze.unannounced else to
                now = self._now(here)
                children = tuple(FinalChild(one.spi_in, one.inbound, one.outbound) for one in now.children)
                return FinalState(*context.spis, here.mid, now.mid_responder, 0, children)
            case Thaw(context, jump, untouched):
                return self._thaw(context.spis, jump, untouched)
            case Release(context):
                if self.sas.get(context.spis) is not None:
                    self._at(context.spis, "frozen", *self.world.leftovers)
                    del self.sas[context.spis]
                return None
            case Check(context):
                taken = context.spis in self.sas
                return [Verdict(Fpt.IKEV2_SA, Status.IKE_SPI_IN_USE if taken else Status.OK)]
            case StillHere(final):
                here = self.sas.get(SaName(final.spi_i, final.spi_r))
                return (
                    Evidence()
                    if here is None
                    else Evidence("charon has it", here.state == "served", idle=here.state != "served")
                )
            case Stands(sa):
                here = self.sas.get(sa)
                return (
                    "gone"
                    if here is None
                    else {"frozen": "frozen", "served": "served"}.get(here.state, "unknown")
                )
            case GetReady(_, _, leaving):
                return leaving
            case Divert(context, to):
                self._at(context.spis, "served").diverted = to
                return None
            case Prepare(context):
                if context.spis in self.sas:
                    raise CharonError("there is one of that name")
                self.strange.discard(context.spis)
                seq = context.children[0].outbound.seq + OSEQ_JUMP
                self.sas[context.spis] = Sa(context, seq, -1, "prepared")
                return Prepared()
            case Take(context, final):
                here = self._at(context.spis, "prepared", "taken", "served")
                if here.state != "served":
                    here.state = "taken"
                self.mobile(context.spis).home = self.name
                here.oseq = max(here.oseq, final.children[0].outbound.seq + OSEQ_JUMP)
                return None
            case Move(context, final, always):
                return self._move(context, final, always)
            case Activate(context, final, report):
                here = self._at(context.spis, "taken", "served")
                if here.state == "taken":
                    self.world.owns_in(context.spis, final.epoch, self.name)
                    here.state, here.mid = "served", final.mid_initiator + report.requests
                    here.context = replace(context, epoch=final.epoch, mid_responder=final.mid_responder)
                    if here.mid != self.mobile(context.spis).expects:
                        raise Slip(f"{self.name} goes on at {here.mid}, its MN expects another one")
                return None
            case Undo(context):
                here = self.sas.get(context.spis)
                if here is not None and here.state in ("prepared", "taken", "served"):
                    del self.sas[context.spis]
                return None
            case Stay() | NewNames() | NotComing() | Hear():
                return ()
        raise CharonError(f"nobody does {step}")

    def takes_back(self, step: Freeze) -> None:
        """A freeze that fails has the SA served again, and what was diverted comes back."""
        here = self.sas.get(step.context.spis)
        if here is not None and here.state == "served":
            self._thaw(step.context.spis, 0 if step.unannounced else 2 * OSEQ_JUMP, True)

    def _thaw(self, sa: SaName, jump: int, untouched: bool) -> None:
        here = self._at(sa, "frozen", "served")
        here.oseq += jump
        here.diverted = ""
        if here.state == "served":
            return  # it was not frozen; the other gateway had it prepared
        here.state = "served"
        mobile = self.mobile(sa)
        mobile.home = self.name
        if not untouched:
            # the mobile node is called back, under nSG's message ID and then under the next
            for _ in range(2):
                mobile.hears(here.mid, f"{self.name} thaws {self.world.now}")
                here.mid += 1
                if here.mid == mobile.expects:
                    break
        if here.mid != mobile.expects:
            raise Slip(f"{self.name} serves again at {here.mid}, its MN expects {mobile.expects}")

    def _move(self, context: IkeContext, final: FinalState, always: bool) -> MoveReport | None:
        self._at(context.spis, "taken")
        if not always:
            return None
        # the same octets again after a crash: all of it follows from the journal
        if not self.mobile(context.spis).hears(final.mid_initiator, f"{self.name} moves to {final.epoch}"):
            raise Slip(f"{self.name} asks under {final.mid_initiator}, its MN expects another one")
        return MoveReport(messages=2, requests=1)


class Disk:
    """Journal and notes of one gateway."""

    def __init__(self) -> None:
        self.journal: dict[tuple[str, bytes], JournalEntry] = {}
        self.soon: dict[tuple[str, bytes], JournalEntry] = {}
        """Entries that are written with what is written next, and lost where the agent dies before."""
        self.notes: dict[tuple[str, str], bytes] = {}
        self.has: JournalHas = "whole"
        self.doubtful: set[tuple[str, bytes]] = set()
        """Transfers that an old copy had open: as long as they are, the next start takes it for old, too."""

    def do(self, step: Step) -> object:
        entries = self.journal.values()
        match step:
            case FindTransfer(role, transfer_id):
                return self.soon.get((role, transfer_id)) or self.journal.get((role, transfer_id))
            case FindEpochs(sa):
                ours = [one for one in entries if one.sa == sa]
                owned = [one.epoch for one in ours if (one.role, one.state) == ("target", "owned")]
                return Epochs(max((one.epoch for one in ours), default=0), max(owned, default=-1))
            case FindLatest(sa):
                last = [one for one in entries if one.sa == sa and one.result in ("", "moved")]
                return (last[-1].role, last[-1].transfer_id) if last else None
            case OwnedFrom(peer, mn):
                return any(
                    (one.role, one.peer, one.mn_address) == ("target", peer, mn)
                    and one.state not in ("installing", "preparing", "prepared", "aborted")
                    for one in entries
                )
            case Put(kind, key, value):
                self.notes[kind, key] = value
            case Get(kind, key):
                return self.notes.get((kind, key))
            case Delete(kind, key):
                self.notes.pop((kind, key), None)
            case Items(kind):
                return [(key, value) for (of, key), value in sorted(self.notes.items()) if of == kind]
        return None

    def write(self, entry: JournalEntry, *, soon: bool = False) -> None:
        self.soon[entry.role, entry.transfer_id] = entry
        if not soon:
            self.journal.update(self.soon)
            self.soon.clear()

    @property
    def open(self) -> list[JournalEntry]:
        return [entry for entry in self.journal.values() if not entry.result]


# -- links -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Wire:
    """One connection. `broken`: nothing new gets through."""

    number: int
    ends: tuple[str, str]
    lives: tuple[int, int]
    """Which life of each agent has it."""
    broken: bool = False
    last: dict[str, float] = field(default_factory=dict)
    """When what was sent last arrives at that end."""


@dataclass(frozen=True, slots=True)
class Weather:
    """Probabilities of a message, a step, an output; `slow`: of a delay that is longer than time limits.
    `jumps`: how often somebody sets a gateway's clock."""

    cut: float
    fail: float
    slow: float
    loss: float
    crashes: int
    full: float
    jumps: int


class Side:
    """One gateway: what outlives its agent, and the engine of the agent that lives now."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.world = world
        self.box = Box(name, world)
        self.disk = Disk()
        self.engine: Engine | None = None
        self.life = 0
        self.outputs = 0
        self.dies_at: set[int] = set()
        self.open: dict[int, Callable[[object], None]] = {}
        """Tickets that have not ended, and who waits for them."""
        self.clock: float = UNIX
        """The time of its clock at the beginning, as it would have been."""
        self._due: float | None = None

    @property
    def now(self) -> Moment:
        return Moment(self.world.now, self.clock + self.world.now)

    def set_clock(self, by: float) -> None:
        self.clock += by

    def start(self) -> None:
        """A new agent, with what is on the disk."""
        world = self.world
        self.life += 1
        peers = tuple(PeerConfig(one, one, rights=EVERYTHING) for one in world.sides if one != self.name)
        policy = TransferPolicy(TIMING, mobile=MobileConfig())
        config = EngineConfig(self.name, peers, policy, self.disk.has)
        self.engine = Engine(config, world.dice.randbytes)
        self._due = None
        for entry in self.disk.open:
            self.engine.restore(self.now, entry)
        self.engine.start(self.now)
        self.pump()

    def die(self) -> None:
        """The process is gone: no word to anybody."""
        self.engine = None
        self.disk.soon.clear()
        self.life += 1
        self.open.clear()
        self.world.killed(self.name)
        self.world.later(self.world.dice.uniform(0.01, 4.0), self.start)

    def ask(self, what: Wanted, heard: Callable[[object], None]) -> None:
        """Request this of the agent, if one lives."""
        if self.engine is not None:
            ticket = self.engine.request(self.now, what)
            self.open[ticket] = heard
            self.pump()

    def later(self, seconds: float, what: Callable[[Engine], None]) -> None:
        """Tell the agent, if it is still the same one then."""
        life = self.life

        def then() -> None:
            if self.engine is not None and self.life == life:
                what(self.engine)
                self.pump()

        self.world.later(seconds, then)

    def pump(self) -> None:
        """Carry out what the engine gives out; the agent may die before each of it."""
        engine = self.engine
        while engine is not None and (output := engine.next_output()) is not None:
            self.outputs += 1
            if self.outputs in self.dies_at and self.world.rough:
                self.die()
                return
            self._carry_out(output)
        if engine is not None and (due := engine.next_timer()) is not None and due != self._due:
            self._due = due
            self.later(due - self.world.now, partial(self._time, due))

    def _time(self, due: float, engine: Engine) -> None:
        if due == self._due:  # else there is another timer by now
            self._due = None
            engine.handle_timer(self.now)

    def _carry_out(self, output: Output) -> None:
        world = self.world
        match output:
            case Send(number, _, octets):
                world.carry(self.name, number, octets, output)
            case Close(number):
                world.cut(number)
            case Connect(effect, peer):
                world.connect(self, effect, peer)
            case Journal(_, entry, _, True):
                world.chance(world.weather.full)  # as for each write, so that a seed goes on meaning the same
                self.disk.write(entry, soon=True)
            case Journal(effect, entry):
                if world.chance(world.weather.full):
                    self.done(effect, StoreError("the disk is full"))
                else:
                    self.disk.write(entry)
                    self.done(effect, None)
            case Effect(effect, step):
                self._step(effect, step)
            case Answer(ticket, outcome) | Settled(ticket, outcome):
                self.open.pop(ticket)(outcome)
            case Report():
                pass

    def done(self, effect: int, outcome: object, seconds: float = 0.0) -> None:
        self.later(seconds, lambda engine: engine.effect_done(self.now, effect, outcome))

    def _step(self, effect: int, step: Step) -> None:
        if isinstance(step, FindTransfer | FindEpochs | FindLatest | OwnedFrom | Put | Get | Delete | Items):
            self.done(effect, self.disk.do(step))
            return
        if isinstance(step, Recorded | Invites | Stay | NewNames | NotComing | Hear):
            try:
                self.done(effect, self.box.do(step))
            except IkectxError as error:
                self.done(effect, error)
            return
        self.later(self.world.lasts(), lambda _: self._take_effect(effect, step))

    def _take_effect(self, effect: int, step: Step) -> None:
        """It may fail before it does anything, or say so though it is done."""
        world = self.world
        outcome: object
        if world.chance(world.weather.fail):
            outcome = self._failure(step)
            if isinstance(step, Freeze):
                self.box.takes_back(step)
        else:
            try:
                outcome = self.box.do(step)
            except IkectxError as error:
                outcome = error
            world.check()
            if world.chance(world.weather.fail) and not isinstance(step, Export | Find | Check):
                outcome = CharonError(f"{step.NAME} may have been done")
        self.done(effect, outcome, world.lasts())

    def _failure(self, step: Step) -> IkectxError:
        if isinstance(step, Export | Freeze) and self.world.chance(0.5):
            return BusyError("an exchange is in flight")
        return LinkError("silent") if isinstance(step, Move) else CharonError(f"{step.NAME} did not work")


class World:
    """All of it. `run` goes on until nothing happens any more, and then looks what has become of it."""

    vague: frozenset[Status] = frozenset()
    """What a gateway may tell a mobile node although it has its SA."""
    leftovers: tuple[str, ...] = ()
    """States of an SA beside frozen in which a gateway may clear it away that has let it go."""

    def __init__(self, seed: int, mode: str = "", weather: Weather | None = None) -> None:
        """`mode`, `weather`: else by the seed."""
        dice = self.dice = random.Random(seed)
        self.mode = mode or MODES[seed % len(MODES)]
        self.now = 0.0
        self.weather = weather or Weather(
            cut=dice.choice((0.0, 0.05, 0.2)),
            fail=dice.choice((0.0, 0.0, 0.05, 0.15)),
            slow=dice.choice((0.0, 0.0, 0.03)),
            loss=dice.choice((0.0, 0.2)),
            crashes=dice.choice((0, 1, 1, 2, 3)),
            full=dice.choice((0.0, 0.0, 0.05)),
            jumps=dice.choice((0, 0, 1, 3)),
        )
        names = ("a", "b", "c") if self.mode in ("twice", "ring", "torn") else ("a", "b")
        self.sides = {name: Side(name, self) for name in names}
        self.mobiles: dict[SaName, Mobile] = {}
        self.settled: list[object] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._wires: dict[int, Wire] = {}
        self._numbers = itertools.count(1)
        self._calmed = False
        for side in self.sides.values():
            side.start()
        for _ in range(self.weather.jumps):
            side = dice.choice(list(self.sides.values()))
            self.later(dice.uniform(0.0, 20.0), partial(side.set_clock, dice.choice(JUMPS)))
        for _ in range(self.weather.crashes):
            side = dice.choice(list(self.sides.values()))
            side.dies_at.add(dice.randint(2, 60))

    # -- time and chance -----------------------------------------------------------------------------------

    @property
    def rough(self) -> bool:
        return self.now < ROUGH

    def chance(self, probability: float) -> bool:
        return self.rough and probability > 0 and self.dice.random() < probability

    def lasts(self) -> float:
        """Seconds of a step, or of a message on its way."""
        return self.dice.random() * (6.0 if self.chance(self.weather.slow) else 0.05)

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + max(0.0, seconds), next(self._order), what))

    # -- links ---------------------------------------------------------------------------------------------

    def connect(self, side: Side, effect: int, peer: PeerConfig) -> None:
        """Give the agent an open link, or make one, if the other one lives."""
        there = self.sides[peer.name]
        for wire in self._wires.values():
            if side.name in wire.ends and peer.name in wire.ends and not wire.broken:
                side.done(effect, wire.number)
                return

        def dialled(engine: Engine) -> None:
            apart = not self.reach(side.name, peer.name)
            if apart or there.engine is None or self.chance(self.weather.cut / 2):
                engine.effect_done(side.now, effect, LinkError(f"{peer.name}: connection refused"))
                return
            number = next(self._numbers)
            self._wires[number] = Wire(number, (side.name, peer.name), (side.life, there.life))
            there.engine.link_up(there.now, number, _peer(side.name), side.name, accepted=True)
            there.pump()
            engine.link_up(side.now, number, peer, peer.name)
            engine.effect_done(side.now, effect, number)

        side.later(self.lasts(), dialled)

    def reach(self, one: str, other: str) -> bool:
        """Is there a way between these gateways?"""
        return True

    def carry(self, sender: str, number: int, octets: bytes, output: Send) -> None:
        """A message is on its way, unless the connection breaks over it."""
        wire = self._wires[number]
        if wire.broken:
            return
        to = wire.ends[wire.ends[0] == sender]
        lost = self.chance(self.weather.cut)
        if not (lost and self.dice.random() < 0.5):
            at = max(wire.last.get(to, 0.0), self.now + self.lasts())
            wire.last[to] = at
            self._deliver(wire, to, at, lambda engine, now: engine.receive(now, number, output.message))
        if lost:
            self.cut(number)

    def cut(self, number: int) -> None:
        """It breaks. Each end hears of it behind what is still to come, whenever that is."""
        wire = self._wires[number]
        if wire.broken:
            return
        wire.broken = True
        error = LinkError("the connection is cut")
        for end in wire.ends:
            if self.dice.random() < 0.3:
                wire.last[end] = 0.0  # what was on its way does not arrive
            at = max(wire.last.get(end, 0.0), self.now + self.lasts())
            self._deliver(wire, end, at, lambda engine, now: engine.link_lost(now, number, error))

    def _deliver(self, wire: Wire, to: str, at: float, what: Callable[[Engine, Moment], None]) -> None:
        side = self.sides[to]
        life = wire.lives[wire.ends.index(to)]

        def arrives() -> None:
            if side.engine is not None and side.life == life:
                what(side.engine, side.now)
                side.pump()

        self.later(at - self.now, arrives)

    def killed(self, name: str) -> None:
        """Its connections break."""
        for wire in list(self._wires.values()):
            if name in wire.ends:
                self.cut(wire.number)

    # -- invariants ----------------------------------------------------------------------------------------

    def owns_in(self, sa: SaName, epoch: int, who: str) -> None:
        """That gateway serves the SA in this epoch: no other one may have done so."""
        if self.mobiles[sa].owners.setdefault(epoch, who) != who:
            raise Slip(f"{self.mobiles[sa].owners[epoch]} and {who} own {sa} in epoch {epoch}")

    def check(self) -> None:
        """At most one gateway owns each SA."""
        for sa in self.mobiles:
            owners = [side.name for side in self.sides.values() if side.box.owns(sa)]
            if len(owners) > 1:
                raise Slip(f"{' and '.join(owners)} own {sa}")

    def check_end(self) -> None:
        """Every run has ended, and each SA is served by one gateway that is sane."""
        for side in self.sides.values():
            if side.disk.open:
                raise Slip(f"{side.name}: {[(one.role, one.state) for one in side.disk.open]} has no end")
            if side.engine is None or not side.engine.idle:
                raise Slip(f"something is under way in {side.name}: {side.engine and side.engine.idle}")
        for sa in self.mobiles:
            found = {side.name: side.box.sas[sa].state for side in self.sides.values() if sa in side.box.sas}
            if list(found.values()) != ["served"]:
                raise Slip(f"{sa} is {found}")

    # -- what happens --------------------------------------------------------------------------------------

    def run(self) -> None:
        """Errors: Slip."""
        getattr(self, f"_{self.mode}")()
        for _ in range(6):
            self.later(self.dice.uniform(0.0, 12.0), self._traffic)
        count = 0
        while self._events:
            when, _, what = heapq.heappop(self._events)
            self.now = max(self.now, when)
            count += 1
            if self.now > LIMIT or count > EVENTS:
                raise Slip(f"no end after {self.now:.0f} s and {count} events")
            what()
            if not self._events and not self._calmed:
                self._calm()
        self.check_end()

    def _calm(self) -> None:
        """Nothing breaks any more. Agents start once more: what could not be journaled ends now."""
        self._calmed = True
        self.now = max(self.now, CALM)
        for side in self.sides.values():
            if side.engine is None:
                raise Slip(f"{side.name} did not come back")
            for owed in list(side.open):
                raise Slip(f"{side.name} owes the answer to request {owed}")
            side.die()

    def _traffic(self) -> None:
        for sa, mobile in self.mobiles.items():
            self.sides[mobile.home].box.send(sa, self.dice.choice((1, 1000, 5000)))

    def _serve(self, number: int, at: str = "a") -> IkeContext:
        context = a_context(number, mn=f"198.51.100.{number}")
        self.mobiles[context.spis] = Mobile(context)
        self.mobiles[context.spis].home = at
        self.sides[at].box.sas[context.spis] = Sa(context, 200, context.mid_initiator, "served")
        self.sides[at].box.send(context.spis, 100)
        return context

    def _note(self, outcome: object) -> None:
        self.settled.append(outcome)

    def _push(self) -> None:
        sa = self._serve(1).spis
        self.later(0.0, lambda: self.sides["a"].ask(Transfer(sa, "b"), self._note))
        self.later(self.dice.uniform(3.0, 20.0), lambda: self.sides["b"].ask(Transfer(sa, "a"), self._note))

    def _pull(self) -> None:
        context = self._serve(1)
        pull = Pull("a", context.remote.address, context.spis if self.dice.random() < 0.5 else None)
        self.later(0.0, lambda: self.sides["b"].ask(pull, self._note))

    def _twice(self) -> None:
        sa = self._serve(1).spis
        for to in ("b", "c"):
            self.later(
                self.dice.uniform(0, 0.5), lambda to=to: self.sides["a"].ask(Transfer(sa, to), self._note)
            )

    def _ring(self) -> None:
        names = tuple(self.sides)
        sas = [self._serve(number + 1, name).spis for number, name in enumerate(names)]
        for turn in range(2):
            for number, sa in enumerate(sas):
                at, to = (names[(number + turn + step) % 3] for step in (0, 1))
                self.later(
                    self.dice.uniform(8.0 * turn, 8.0 * turn + 3.0),
                    lambda at=at, to=to, sa=sa: self.sides[at].ask(Transfer(sa, to), self._note),
                )

    def _predictive(self) -> None:
        node = Node(self, self._serve(1))
        node.say(Purpose.ANNOUNCE, "a", 0.0)
        node.say(Purpose.ARRIVE, "b", self.dice.uniform(0.0, 8.0))

    def _reactive(self) -> None:
        Node(self, self._serve(1)).say(Purpose.ARRIVE, "b", 0.0)

    def _torn(self) -> None:
        """A mobile node that asks two gateways for its SA."""
        context = self._serve(1)
        for sequence, to in ((7, "b"), (8, "c")):
            node = Node(self, context, to, sequence)
            if self.dice.random() < 0.3:
                node.say(Purpose.ANNOUNCE, "a", 0.0)
            node.say(Purpose.ARRIVE, to, self.dice.uniform(0.0, 3.0))

    def _packet(self) -> None:
        context = self._serve(1)
        datagram = request(context, mid=context.mid_responder)
        here = Endpoint.of("192.0.2.2", 4500)
        for again in range(3):
            self.later(
                4.0 * again,
                lambda: self.sides["b"].ask(Show((datagram,), here, AWAY, ("a",)), self._note),
            )


def _peer(name: str) -> PeerConfig:
    return PeerConfig(name, name, rights=EVERYTHING)


class Node:
    """A mobile node that asks for its handover itself: each CTAR again and again, until it is answered."""

    def __init__(self, world: World, context: IkeContext, nsg: str = "b", sequence: int = 7) -> None:
        self.world = world
        self.context = context
        self.nsg = nsg
        self.sequence = sequence
        self.key = token_key(context.current, self.sequence)
        self.leaves = world.chance(0.5)
        self.answers: deque[tuple[Purpose, bool, Status]] = deque()

    def say(self, purpose: Purpose, to: str, when: float) -> None:
        """Send that CTAR, up to eight times, until an answer is there."""
        arrives = purpose is Purpose.ARRIVE
        message = make_ctar(
            self.key,
            mn=self.context.remote.address,
            router=ip_address("192.0.2.9"),
            sequence=self.sequence,
            purpose=purpose,
            spis=self.context.spis,
            psg="a",
            nsg=self.nsg,
            expiry=UNIX + 100,
            care_of=AWAY if arrives else None,
            blocks=() if arrives or not self.leaves else (ContextDataBlock(Fpt.LEAVING, b""),),
        )
        source = Endpoint((AWAY if arrives else self.context.remote).address, 5091)
        for again in range(8):
            self.world.later(when + 1.5 * again, lambda: self._send(Arrive(message, source), purpose, to))

    def _send(self, what: Arrive, purpose: Purpose, to: str) -> None:
        world = self.world
        if any(answer[0] is purpose for answer in self.answers):
            return
        copies = (not world.chance(world.weather.loss)) + world.chance(0.1)
        for _ in range(copies):
            world.later(
                world.lasts(),
                lambda: world.sides[to].ask(what, lambda outcome: self._answered(outcome, purpose, to)),
            )

    def _answered(self, outcome: Any, purpose: Purpose, to: str) -> None:
        world = self.world
        if isinstance(outcome, bytes) and not world.chance(world.weather.loss):
            ctaa = Ctaa.parse(outcome)
            sure = open_ctaa(self.key, ctaa, self.sequence, purpose=purpose)
            status = next((block.status for block in ctaa.statuses), Status.OK)
            if sure:
                self.answers.append((purpose, sure, status))
            if sure and purpose is Purpose.ARRIVE:
                owned = world.sides[to].box.owns(self.context.spis)
                if owned is not (status is Status.OK) and status not in world.vague:
                    raise Slip(f"the MN is told {status.name} by {to}, which owns it: {owned}")
