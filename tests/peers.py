"""Stand-ins for the world: a hand-moved clock, contexts, gateways kept in dictionaries, links that break."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from enum import StrEnum
from ipaddress import IPv4Address, ip_address
from typing import Any, Literal

import pytest

from ikectx.disk.store import SqliteStore
from ikectx.engine.journal import JournalEntry
from ikectx.engine.ports import Address as Wish
from ikectx.engine.ports import ContextSink, ContextSource, Evidence, MoveReport, RelayTo, Stand, Way
from ikectx.errors import BusyError, CharonError, LinkError, StateError, StoreError, UnknownSaError
from ikectx.gateway import Gateway
from ikectx.machine import Machine
from ikectx.net.links import Dial, Stream
from ikectx.numbers import Encr, Fpt, IdType, KeMethod, Prf, Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import (
    Address,
    AuthRound,
    ChildContext,
    Endpoint,
    FinalChild,
    FinalState,
    Identity,
    IkeContext,
    IkeGeneration,
    Lifetime,
    PeerContext,
    PolicyContext,
    ReplayState,
    Secret,
    TrafficSelector,
)
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from ikectx.wire.cxtp import Message, StreamDecoder, parse_message


class HandClock:
    """`ports.Clock` that goes forward when it is told to."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def forward(self, seconds: float) -> None:
        self._now += seconds


def check_pair(
    machine: Machine[Any, Any, Any],
    table: Mapping[tuple[Any, Any], tuple[Any, ...]],
    ignored: Set[tuple[Any, Any]],
    what: StrEnum,
) -> None:
    """The input does what the table says, or nothing where it is ignored; any other cannot happen."""
    state = machine.state
    pair = state, what
    assert not (pair in table and pair in ignored)
    if pair in table:
        after, *actions = table[pair]
        assert machine.feed(what, 1.0) == tuple(actions)
        assert machine.state is after
        return
    if pair in ignored:
        assert machine.feed(what, 1.0) == ()
    else:
        with pytest.raises(StateError, match=f"{what} cannot happen in the state {state}"):
            machine.feed(what, 1.0)
    assert machine.state is state


def a_context(number: int = 1, *, mn: str = "198.51.100.7", epoch: int = 0) -> IkeContext:
    """An IKE_SA with one child, as its gateway would export it; `number` sets what is unique."""
    mark = number.to_bytes(4)
    vip = IPv4Address(f"10.3.{number >> 8 & 255}.{number & 255}")
    generation = IkeGeneration(
        spi_i=b"\x11MNi" + mark,
        spi_r=b"\x22GWr" + mark,
        initiator=False,
        nonce_i=b"nonce of the initiator, the MN..",
        nonce_r=b"nonce of the responder, a gate..",
        secret=Secret(b"g to the ir, never to be shown.." + mark),
        prf=Prf.HMAC_SHA2_256,
        encr=Encr.AES_GCM_16,
        encr_bits=128,
        ke=KeMethod.CURVE_25519,
    )
    child = ChildContext(
        name="rw",
        generation=0,
        initiator=False,
        spi_in=b"\xc1" + mark[1:],
        spi_out=b"\xc2" + mark[1:],
        nonce_i=generation.nonce_i,
        nonce_r=generation.nonce_r,
        encr=Encr.AES_GCM_16,
        encr_bits=128,
        local_ts=(TrafficSelector(IPv4Address("10.1.0.0"), IPv4Address("10.1.255.255")),),
        remote_ts=(TrafficSelector(vip, vip),),
        inbound=ReplayState(seq=100, window=32, bitmap=0xFFFFFFFF),
        outbound=ReplayState(seq=200),
        lifetime=Lifetime(rekey=3000, hard=3600),
    )
    return IkeContext(
        connection="home",
        generations=(generation,),
        local_id=Identity(IdType.FQDN, b"gw.example"),
        remote_id=Identity(IdType.FQDN, f"mn{number}.example".encode()),
        local=Endpoint.of("192.0.2.1", 4500)
        if ip_address(mn).version == 4
        else Endpoint.of("2001:db8::1", 4500),
        remote=Endpoint.of(mn, 4500),
        children=(child,),
        remote_vips=(vip,),
        mid_initiator=2,
        mid_responder=5,
        lifetime=Lifetime(rekey=10000),
        policies=tuple(PolicyContext(0, direction) for direction in ("in", "out", "fwd")),
        peer=PeerContext("home", (AuthRound("pubkey", "gw.example"),), (AuthRound("psk"),), ("rw",)),
        epoch=epoch,
    )


# -- a world of gateways ---------------------------------------------------------------------------------


class Crash(BaseException):
    """The agent's process is gone. No error: nothing may catch it."""


class Fuse:
    """Counts the moments of one agent; blows at one of them, and from then on at each."""

    def __init__(self, at: int = 0, on_blow: Callable[[], None] = lambda: None) -> None:
        self.on_blow = on_blow
        self.count = 0
        self.log: list[str] = []
        self._at = at
        self.blown = False

    def tick(self, where: str) -> None:
        if self.blown:
            raise Crash(where)
        self.count += 1
        self.log.append(where)
        if self.count == self._at:
            self.blown = True
            self.on_blow()
            raise Crash(where)


class Ether:
    """The MNs and the ESP they see: who sends for which SA, and under which sequence numbers."""

    def __init__(self) -> None:
        self.senders: dict[SaName, set[str]] = {}
        self.used: dict[SaName, int] = {}
        """Highest outbound sequence number that anybody used."""
        self.slips: list[str] = []

    def sends(self, name: str, sa: SaName, first: int) -> None:
        """From now on `name` sends ESP for this SA, beginning with this number."""
        senders = self.senders.setdefault(sa, set())
        if name not in senders and first <= self.used.get(sa, 0):
            self.slips.append(f"{name} sends number {first} after {self.used[sa]}: one IV twice")
        senders.add(name)
        if len(senders) > 1:
            self.slips.append(f"{' and '.join(sorted(senders))} both send")
        self.used[sa] = max(self.used.get(sa, 0), first + 1000)

    def silent(self, name: str, sa: SaName) -> None:
        self.senders.setdefault(sa, set()).discard(name)


class MemoryGateway(ContextSource, ContextSink):
    """`ContextSource` and `ContextSink` in dictionaries; survives its agent as charon and kernel do.

    `fail[step]`: errors to raise, one a call; "after:step" raises when the step has taken effect.
    """

    def __init__(self, name: str, ether: Ether, *, jump: int = 1 << 20) -> None:
        self.name = name
        self.ether = ether
        self.jump = jump
        self.fuse = Fuse()
        self.fail: dict[str, list[BaseException]] = {}
        self.verdicts: list[Verdict] = []
        self.wait: dict[str, asyncio.Event] = {}
        """Steps that last until their event is set."""
        self.calls: list[str] = []
        self.looks = 0
        """How often `recorded` was asked; it is no step."""
        self.advance = 0
        """Requests of the MN that were answered between export and freeze."""
        self.unanswered: set[SaName] = set()
        """SAs with a liveness check that the MN has not answered; its ID is the context's `mid_initiator`."""
        self.passed_on: dict[SaName, RelayTo] = {}
        """SAs whose MN stays here, and where its packets go."""
        self.settles = 0
        """What `settle` finds to be the next request's message ID."""
        self.served: dict[SaName, IkeContext] = {}
        self.frozen: set[SaName] = set()
        self.certain = True
        """Can charon say that it serves an SA, and not only that it has it?"""
        self.late: set[SaName] = set()
        """Released, but late packets are still decrypted."""
        self.passive: dict[SaName, IkeContext] = {}
        self.taken: set[SaName] = set()
        self.moves: list[SaName] = []
        self.requests: list[tuple[bytes, ...]] = []
        """The mobile nodes' requests that are given to charon."""
        self.renaming: set[SaName] = set()
        """SAs for whose MN nothing can be sent here before it knows other SPIs."""
        self.sending: set[SaName] = set()
        """Frozen, but ESP goes on."""
        self.mine: dict[SaName, int] = {}
        """Highest outbound sequence number used here: what the kernel knows."""

    def _send(self, sa: SaName, first: int) -> None:
        first = max(first, self.mine.get(sa, 0) + 1)  # a number is only ever raised
        self.ether.sends(self.name, sa, first)
        self.mine[sa] = first + 1000

    def sent(self, sa: SaName, packets: int) -> None:
        """The MN got that many more packets."""
        self._send(sa, self.mine[sa] + packets)

    def serve(self, context: IkeContext) -> SaName:
        """An MN has set up this SA here."""
        self.served[context.spis] = context
        self._send(context.spis, context.children[0].outbound.seq)
        return context.spis

    async def _step(self, step: str) -> None:
        self.calls.append(step)
        self.fuse.tick(f"{self.name}: before {step}")
        await asyncio.sleep(0)
        if step in self.wait:
            await self.wait[step].wait()
        self._fail(step)

    def _fail(self, step: str) -> None:
        if self.fail.get(step):
            raise self.fail[step].pop(0)

    def _done(self, step: str) -> None:
        self._fail(f"after:{step}")
        self.fuse.tick(f"{self.name}: after {step}")

    # ContextSource

    async def choose(self, context: IkeContext, to: str, address: Wish) -> Way:
        if address == "relay":
            return Way("relay", "as asked for", Endpoint.of("192.0.2.77", 40000))
        return await super().choose(context, to, address)

    def relayed(self, context: IkeContext, peer: str) -> None: ...

    def shown(self, context: IkeContext, request: tuple[bytes, ...]) -> None:
        if request:
            self.requests.append(request)

    def heard_at(self, context: IkeContext) -> Address | None:
        return ip_address("192.0.2.88")

    async def find(self, mn: Address) -> Sequence[SaName]:
        return [sa for sa, context in self.served.items() if context.remote.address == mn]

    def recorded(self, sa: SaName) -> IkeContext:
        self.looks += 1
        if sa not in self.served:
            raise UnknownSaError("no such SA", hint="list")
        return self.served[sa]

    async def export(self, sa: SaName, *, away: bool = False) -> IkeContext:
        await self._step("export")
        self._busy(sa, away)
        if sa not in self.served:
            raise UnknownSaError("no such SA", hint="list")
        self._done("export")
        served = self.served[sa]
        outbound = replace(served.children[0].outbound, seq=self.mine.get(sa, 0))
        children = (replace(served.children[0], outbound=outbound),)
        return replace(served, children=children, unsure=sa in self.unanswered)

    def _busy(self, sa: SaName, away: bool) -> None:
        if sa in self.unanswered and not away:
            raise BusyError("IKE_DPD has no answer")

    async def freeze(
        self,
        context: IkeContext,
        to: str,
        *,
        away: bool = False,
        sending: bool = False,
        renaming: bool = False,
        relay: RelayTo | None = None,
    ) -> FinalState:
        await self._step("freeze")
        if relay is not None:
            self.passed_on[context.spis] = relay
        sa = context.spis
        self._busy(sa, away)
        self.frozen.add(sa)
        if sending:
            self.sending.add(sa)
        self.ether.silent(self.name, sa)
        children = tuple(
            FinalChild(child.spi_in, child.inbound, replace(child.outbound, seq=self.mine[sa]))
            for child in context.children
        )
        self._done("freeze")
        unsure = sa in self.unanswered
        received = context.mid_responder + self.advance
        return FinalState(*sa, context.mid_initiator, received, 0, children, unsure)

    async def thaw(self, context: IkeContext, oseq_jump: int) -> None:
        await self._step("thaw")
        sa = context.spis
        if sa in self.frozen:
            self.frozen.discard(sa)
            self._send(sa, self.mine[sa] + oseq_jump + 1)
        self._done("thaw")

    async def release(self, context: IkeContext) -> None:
        await self._step("release")
        sa = context.spis
        self.served.pop(sa, None)
        self.frozen.discard(sa)
        self.late.add(sa)
        self._done("release")

    # ContextSink

    def cannot_send(self, context: IkeContext) -> bool:
        return context.spis in self.renaming

    async def check(self, context: IkeContext, keep_address: bool) -> Sequence[Verdict]:
        await self._step("check")
        self._done("check")
        if context.spis in self.served or context.spis in self.passive:
            return [Verdict(Fpt.IKEV2_SA, Status.IKE_SPI_IN_USE, "it is here")]
        return self.verdicts

    async def still_here(self, final: FinalState, mn: Address, who: str) -> Evidence:
        await self._step("look")
        sa = (final.spi_i, final.spi_r)
        serves = sa in self.served and self.certain
        here = sa in self.served or sa in self.passive
        return Evidence("charon has it", serves, idle=not serves) if here else Evidence()

    async def stands(self, sa: SaName, let_go: bool) -> Stand:
        if sa in self.frozen:
            return "frozen"
        return "served" if sa in self.served else "gone"

    async def prepare(self, context: IkeContext, keep_address: bool) -> None:
        await self._step("prepare")
        self.passive[context.spis] = context
        self._done("prepare")

    async def take(self, context: IkeContext, final: FinalState) -> None:
        await self._step("take")
        sa = context.spis
        if sa not in self.passive:
            raise CharonError("the SA is not there")
        self.taken.add(sa)
        self._send(sa, final.children[0].outbound.seq + self.jump)
        self._done("take")

    async def move_peer(self, context: IkeContext, final: FinalState) -> MoveReport:
        await self._step("move")
        self.moves.append(context.spis)
        assert not final.unsure
        self._done("move")
        return MoveReport(messages=2, octets=300, requests=1)

    async def settle(self, context: IkeContext, final: FinalState) -> FinalState:
        await self._step("settle")
        self._done("settle")
        return replace(final, mid_initiator=self.settles, unsure=False)

    async def activate(self, context: IkeContext, final: FinalState, report: MoveReport) -> None:
        await self._step("activate")
        assert not final.unsure
        sa = context.spis
        here = self.passive.get(sa)
        if here is None:
            if sa in self.served:
                return  # a repetition after a crash
            raise CharonError("the SA is not there")
        self.served[sa] = replace(
            here,
            epoch=final.epoch,
            mid_initiator=final.mid_initiator,
            mid_responder=final.mid_responder,
            unsure=False,
        )
        del self.passive[sa]
        self._done("activate")

    async def undo(self, context: IkeContext) -> None:
        await self._step("undo")
        sa = context.spis
        self.passive.pop(sa, None)
        if sa in self.taken:
            self.served.pop(sa, None)
            self.taken.discard(sa)
        self.ether.silent(self.name, sa)
        self._done("undo")


class CountedStore(SqliteStore):
    """A store whose agent can die before and after each write of the journal, or that cannot be written."""

    fuse = Fuse()
    broken: str = ""
    """The journal refuses to enter this state."""
    refused = 0

    def write(self, *entries: JournalEntry, durable: bool = True, soon: bool = False) -> None:
        if not soon and self.broken and self.broken in (entry.state for entry in entries):
            self.refused += len(entries) == 1
            raise StoreError("the disk is full")
        for entry in entries:
            self.fuse.tick(f"{entry.role}: before writing {entry.state}")
        super().write(*entries, durable=durable, soon=soon)
        for entry in entries:
            self.fuse.tick(f"{entry.role}: after writing {entry.state}")


class MemoryStream:
    """One end of a connection in memory; each message goes by itself."""

    def __init__(self, names: frozenset[str], label: str, wire: Wire) -> None:
        self.names = names
        self.label = label
        self.inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self.other: MemoryStream | None = None
        self._wire = wire

    async def read(self) -> bytes:
        if self._wire.cut and self.inbox.empty():
            return b""
        return await self.inbox.get()

    async def write(self, data: bytes) -> None:
        for message in StreamDecoder().feed(data):
            if self._wire.cut:
                raise LinkError(f"{self.label}: the link is cut")
            self._wire.carry(self, message.serialize())

    def close(self) -> None:
        self._wire.break_()


class Wire:
    """A connection: `network.fate` decides over each message."""

    def __init__(self, network: Network) -> None:
        self.cut = False
        self.ends: list[MemoryStream] = []
        self._network = network

    def carry(self, sender: MemoryStream, data: bytes) -> None:
        message = parse_message(data)
        self._network.seen.append(message)
        fate = self._network.fate(message)
        if fate in ("deliver", "deliver-cut") and sender.other is not None:
            inbox = sender.other.inbox
            if self._network.held is not None and self._network.held(message, lambda: inbox.put_nowait(data)):
                return
            inbox.put_nowait(data)
        if fate in ("lose-cut", "deliver-cut"):
            self.break_()

    def break_(self) -> None:
        if not self.cut:
            self.cut = True
            for end in self.ends:
                end.inbox.put_nowait(b"")


Fate = Literal["deliver", "lose", "lose-cut", "deliver-cut"]


class Network:
    """Connections between gateways by name; tasks of a dead gateway go with it."""

    def __init__(self, fate: Callable[[Message], Fate] = lambda message: "deliver") -> None:
        self.fate = fate
        self.seen: list[Message] = []
        self.held: Callable[[Message, Callable[[], None]], bool] | None = None
        self.up: dict[str, Gateway] = {}
        self._wires: list[tuple[str, Wire]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def dial_from(self, name: str) -> Dial:
        async def dial(peer: PeerConfig) -> Stream:
            await asyncio.sleep(0.0005)
            there = self.up.get(peer.name)
            if there is None:
                raise LinkError(f"{peer.name}: connection refused")
            wire = Wire(self)
            near = MemoryStream(frozenset({peer.name}), peer.name, wire)
            far = MemoryStream(frozenset({name}), name, wire)
            near.other, far.other = far, near
            wire.ends = [near, far]
            self._wires += [(name, wire), (peer.name, wire)]
            task = asyncio.create_task(there.accept(far))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return near

        return dial

    def hold(self, which: Callable[[Message], bool], late: list[bytes]) -> Callable[[], None]:
        """Keep the first message of that kind on its way, and all that follows it; the call delivers them."""
        waiting: list[Callable[[], None]] = []

        def held(message: Message, deliver: Callable[[], None]) -> bool:
            if not waiting and not which(message):
                return False
            waiting.append(deliver)
            late.append(message.serialize())
            return True

        def go() -> None:
            self.held = None
            for deliver in waiting:
                deliver()

        self.held = held
        return go

    def kill(self, name: str) -> None:
        """The agent of that name is gone: its connections break, nobody listens."""
        self.up.pop(name, None)
        for owner, wire in self._wires:
            if owner == name:
                wire.break_()

    async def close(self) -> None:
        for _, wire in self._wires:
            wire.break_()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def lossy(seed: int, rate: float) -> Callable[[Message], Fate]:
    """Cuts the connection at one in 1/rate messages, before or after it arrives; the same for each seed."""
    dice = random.Random(seed)

    def fate(message: Message) -> Fate:
        if dice.random() >= rate:
            return "deliver"
        return "lose-cut" if dice.random() < 0.5 else "deliver-cut"

    return fate


def fate_at(number: int, fate: Fate) -> Callable[[Message], Fate]:
    """Only the message of that number, from 1, has this fate."""
    count = 0

    def decide(message: Message) -> Fate:
        nonlocal count
        count += 1
        return fate if count == number else "deliver"

    return decide


def losing(kind: type[Message]) -> Callable[[Message], Fate]:
    """Every message of this kind is lost, and the connection with it."""
    return lambda message: "lose-cut" if isinstance(message, kind) else "deliver"
