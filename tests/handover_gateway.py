"""A gateway as its transfer tables alone, for `handover_world`: no sockets, no store, no charon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ikectx.engine.tables import (
    SOURCE_FINAL,
    TARGET_FINAL,
    TARGET_OWNS,
    SourceAction,
    SourceInput,
    SourceMachine,
    SourceState,
    TargetAction,
    TargetInput,
    TargetMachine,
    TargetState,
    new_source,
    new_target,
)
from ikectx.errors import StateError, WireError
from ikectx.node.mobility import Router
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Endpoint, Secret
from ikectx.wire import cookies
from ikectx.wire.cxtp import Ctaa, Ctar, CtReq, StatusBlock
from ikectx.wire.tokens import Purpose, TokenBlock, TokenError, find, seal_ctaa, token_key, verify
from tests.peers import a_context

if TYPE_CHECKING:
    from tests.handover_world import World

GENERATION = a_context().current
SPIS = a_context().spis
UNIX = 1_790_000_000.0
OLD, NEW = Endpoint.of("198.51.100.7", 6000), Endpoint.of("203.0.113.7", 6001)
ATTACKER = Endpoint.of("192.0.2.66", 666)
MN = OLD.address
PSG = Router("psg", Endpoint.of("192.0.2.1").address, Endpoint.of("192.0.2.1", 5091))
NSG = Router("nsg", Endpoint.of("192.0.2.2").address, Endpoint.of("192.0.2.2", 5091))
ROUTERS = {"psg": PSG, "nsg": NSG}

_S, _SI, _SA = SourceState, SourceInput, SourceAction
_T, _TI, _TA = TargetState, TargetInput, TargetAction


# what gateways say to each other; the order of a connection tells what a CTDR answers, here it says so itself


@dataclass(frozen=True)
class Offer:
    tid: int
    hold: bool
    key: Secret


@dataclass(frozen=True)
class LetGo:
    tid: int
    whole: bool


@dataclass(frozen=True)
class Answer:
    tid: int
    of: type
    ok: bool


@dataclass(frozen=True)
class Cancel:
    tid: int


@dataclass(frozen=True)
class Ask:
    request: CtReq
    proof: bytes = b""


@dataclass(frozen=True)
class Refusal:
    ask: Ask
    status: Status


Said = Offer | LetGo | Answer | Cancel | Ask | Refusal


@dataclass
class Seen:
    """A CTAR that was believed, and what it was answered."""

    octets: bytes
    source: Endpoint
    answer: bytes | None = None


@dataclass
class Outgoing:
    tid: int
    machine: SourceMachine
    whole: bool = False
    sequence: int | None = None
    announced: Seen | None = None


@dataclass
class Incoming:
    tid: int
    machine: TargetMachine
    key: Secret | None = None
    sequence: int | None = None
    arrived: Seen | None = None


@dataclass
class Pending:
    """A CTAR that nobody here can judge, or a packet for an unknown SA: pSG is asked."""

    ask: Ask
    seen: Seen | None
    until: float
    tries: int = 0


class Gateway:
    """The tables, and what stands around them. `owns`: the SA is served here, or may be."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.world = world
        self.other = next(other for other in ROUTERS if other != name)
        self.owns = False
        self.outgoing: dict[int, Outgoing] = {}
        self.incoming: dict[int, Incoming] = {}
        self.used: dict[tuple[int, int], Seen] = {}
        """Tokens believed, by sequence number and purpose: on disk."""
        self.pending: dict[bytes, Pending] = {}
        self.life = 0
        self.jar = cookies.Cookies(name.encode())

    @property
    def now(self) -> float:
        return self.world.clock.now()

    @property
    def idle(self) -> bool:
        return all(o.machine.state in SOURCE_FINAL for o in self.outgoing.values()) and all(
            i.machine.state in TARGET_FINAL for i in self.incoming.values()
        )

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        """Unless the agent dies before."""
        life = self.life
        self.world.later(seconds, lambda: what() if self.life == life else None)

    def _say(self, said: Said) -> None:
        self.world.log.append(f"{self.now:.2f} {self.name} says {said}")
        self.world.say(self.other, self.name, said)

    def restart(self) -> None:
        """The agent dies; what it comes back to is the journal."""
        self.world.log.append(f"{self.now:.2f} {self.name} restarts")
        self.life += 1
        self.pending.clear()
        for outgoing in list(self.outgoing.values()):
            if outgoing.machine.state not in SOURCE_FINAL:
                self._source(outgoing, _SI.RESTART)
        for incoming in list(self.incoming.values()):
            incoming.arrived = None
            if incoming.machine.state not in TARGET_FINAL:
                self._target(incoming, _TI.RESTART)

    # the machines

    def _step(self, what: Callable[[str], None], *, sure: bool = False) -> None:
        failed = not sure and self.world.chance(self.world.weather.fail)
        self._later(self.world.dice.random() * 0.2, lambda: what("failed" if failed else "ok"))

    def _source(self, outgoing: Outgoing, what: SourceInput) -> None:
        machine = outgoing.machine
        was = machine.state
        self._source_does(outgoing, was, machine.feed(what, self.now))

    def _source_does(self, outgoing: Outgoing, was: SourceState, actions: tuple[SourceAction, ...]) -> None:
        machine, tid = outgoing.machine, outgoing.tid
        if machine.state is not was:
            self.world.log.append(f"{self.now:.2f} {self.name} source {tid}: {was} -> {machine.state}")
            if machine.state is _S.RELEASED:
                self.owns = False
            elif was is _S.RELEASED and machine.state is _S.THAWING:
                self.owns = True
            self._tell_announcer(outgoing)
        for action in actions:
            match action:
                case _SA.SEND_PCTD:
                    hold = outgoing.announced is not None
                    key = token_key(GENERATION, outgoing.sequence or 0) if hold else Secret()
                    self._say(Offer(tid, hold, key))
                case _SA.SEND_CTD:
                    self._say(LetGo(tid, outgoing.whole))
                case _SA.SEND_CTC:
                    self._say(Cancel(tid))
                case _SA.RECONNECT:
                    self._later(1.0, lambda: self._source(outgoing, _SI.LINK_UP))
                case _SA.FREEZE:
                    self._step(lambda how: self._source(outgoing, _SI(how)))
                case _SA.RELEASE | _SA.THAW:
                    self._step(lambda how: self._source(outgoing, _SI(how)))
        self._timer(machine, lambda: self._source_time(outgoing))

    def _source_time(self, outgoing: Outgoing) -> None:
        was = outgoing.machine.state
        self._source_does(outgoing, was, self._timed_out(outgoing.machine, _SI.TIMEOUT))

    def _target(self, incoming: Incoming, what: TargetInput) -> None:
        machine = incoming.machine
        was = machine.state
        self._target_does(incoming, was, machine.feed(what, self.now))

    def _target_does(self, incoming: Incoming, was: TargetState, actions: tuple[TargetAction, ...]) -> None:
        machine, tid = incoming.machine, incoming.tid
        if machine.state is not was:
            self.world.log.append(f"{self.now:.2f} {self.name} target {tid}: {was} -> {machine.state}")
            if machine.state is _T.OWNING:
                self.owns = True
            elif was in TARGET_OWNS and machine.state not in TARGET_OWNS:
                self.owns = False
        for action in actions:
            match action:
                case _TA.CHECK | _TA.PREPARE | _TA.TAKE | _TA.ACTIVATE | _TA.UNDO:
                    self._step(lambda how: self._target(incoming, _TI(how)))
                case _TA.MOVE:  # the MN moves itself, or answers
                    self._step(lambda how: self._target(incoming, _TI.OK), sure=True)
                case _TA.ANSWER:
                    good = machine.state in (_T.PREPARED, _T.HELD, _T.OWNED)
                    kind = Offer if machine.state in (_T.PREPARED, _T.HELD) or was is _T.CHECKING else LetGo
                    self._say(Answer(tid, kind, good))
                    if kind is LetGo and not good:  # it may have been the offer that it asked about
                        self._say(Answer(tid, Offer, False))
                case _TA.REQUEST:
                    self._request(incoming)
                case _TA.SEND_CTC:
                    self._say(Cancel(tid))
        if machine.state is not was and machine.state in TARGET_FINAL:
            self._tell_arrived(incoming, machine.state is _T.OWNED)
        self._timer(machine, lambda: self._target_time(incoming))

    def _target_time(self, incoming: Incoming) -> None:
        was = incoming.machine.state
        self._target_does(incoming, was, self._timed_out(incoming.machine, _TI.TIMEOUT))

    def _timed_out(self, machine: Any, timeout: Any) -> tuple[Any, ...]:
        """What the machine does now; nothing if it waits for something else since, or longer."""
        due = machine.next_timer()
        return () if due is None or self.now < due else machine.feed(timeout, self.now)

    def _timer(self, machine: Any, fire: Callable[[], None]) -> None:
        due = machine.next_timer()
        if due is not None:
            self._later(due - self.now, fire)

    def _new_outgoing(self, **more: Any) -> Outgoing:
        tid = next(self.world.tids)
        outgoing = Outgoing(tid, new_source(self.now, self.world.timing), **more)
        self.outgoing[tid] = outgoing
        return outgoing

    def _takes(self, incoming: Incoming, what: TargetInput) -> bool:
        """What comes in the middle of a step waits for its repetition."""
        try:
            incoming.machine.peek(what)
        except StateError:
            return False
        self._target(incoming, what)
        return True

    # what the other gateway says

    def hear(self, said: Said, sender: str) -> None:
        if self.world.chance(self.world.weather.crash):
            self.restart()
        match said:
            case Offer():
                self._hear_offer(said)
            case LetGo():
                self._hear_let_go(said)
            case Answer() if said.tid in self.outgoing:
                self._hear_answer(self.outgoing[said.tid], said)
            case Cancel():
                if said.tid in self.outgoing:
                    outgoing = self.outgoing[said.tid]
                    if outgoing.machine.state is _S.FREEZING:  # the present step ends first
                        self._later(0.1, lambda: self.hear(said, sender))
                    elif outgoing.machine.state is not _S.NEW:
                        self._source(outgoing, _SI.CTC)
                elif said.tid in self.incoming:
                    self._target(self.incoming[said.tid], _TI.CTC)
                else:  # a late offer must not revive it
                    incoming = Incoming(said.tid, new_target(self.now, self.world.timing, _T.ABORTED))
                    self.incoming[said.tid] = incoming
            case Ask():
                self._hear_ask(said)
            case Refusal():
                self._hear_refusal(said)

    def _hear_offer(self, said: Offer) -> None:
        incoming = self.incoming.get(said.tid)
        if incoming is None:
            if not self.idle or self.owns:
                self._say(Answer(said.tid, Offer, False))
                return
            incoming = Incoming(said.tid, new_target(self.now, self.world.timing), said.key)
            self.incoming[said.tid] = incoming
        self._takes(incoming, _TI.ANNOUNCE if said.hold else _TI.PCTD)

    def _hear_let_go(self, said: LetGo) -> None:
        incoming = self.incoming.get(said.tid)
        if incoming is None:
            incoming = Incoming(said.tid, new_target(self.now, self.world.timing))
            self.incoming[said.tid] = incoming
            asked = self._asked() if said.whole else None
            if asked is None or self.owns:
                self._target(incoming, _TI.CTD)
                return
            # with the context at hand the token can be checked here, too
            if asked.seen is not None:
                incoming.arrived = asked.seen
                incoming.sequence = asked.ask.request.sequence
                incoming.key = token_key(GENERATION, incoming.sequence)
                self.used[incoming.sequence, Purpose.ARRIVE] = asked.seen
            self.pending.clear()
        # an inbox keeps what comes while a step is under way
        kept = incoming.machine.state is _T.INSTALLING
        if not self._takes(incoming, _TI.WHOLE if said.whole else _TI.CTD) and kept:
            self._later(0.1, lambda: self._hear_let_go(said))

    def _asked(self) -> Pending | None:
        for pending in self.pending.values():
            request = pending.ask.request
            if pending.ask.proof or self._judge(request, "psg", self.name) is not None:
                return pending
        return None

    def _hear_answer(self, outgoing: Outgoing, said: Answer) -> None:
        waits = {Offer: (_S.OFFERED, _S.ANNOUNCED), LetGo: (_S.RELEASED,)}[said.of]
        if outgoing.machine.state in waits:
            self._source(outgoing, _SI.ACCEPTED if said.ok else _SI.REJECTED)

    # tokens

    def _judge(
        self, message: Ctar | CtReq, psg: str, nsg: str, key: Secret | None = None
    ) -> TokenBlock | None:
        try:
            token = find(message.blocks)
            if token is None or token.spis != SPIS:
                return None
            return verify(
                key or token_key(GENERATION, message.sequence),
                message,
                purpose=token.purpose,
                psg=psg,
                nsg=nsg,
                now=UNIX + self.now,
                skew=5,
                rfc=False,
            )
        except (TokenError, WireError):
            return None

    # what the MN says

    def datagram(self, octets: bytes, source: Endpoint) -> None:
        if self.world.chance(self.world.weather.crash):
            self.restart()
        if octets.startswith(b"IKE"):
            self._ike(octets, source)
            return
        fixed = cookies.fixed_part(octets)
        if not fixed:
            return
        cookie, ctar_octets = cookies.split(octets, fixed)
        load, host = self.world.weather.load, (str(source.address), source.port)
        if load and not self.jar.right(cookie, *host, self.now) and self.world.chance(load):
            question = cookies.ask(octets, fixed, self.jar.make(*host, self.now))
            self.world.datagram(question, ROUTERS[self.name].cxtp, source)
            return
        octets = ctar_octets
        try:
            ctar = Ctar.parse(octets)
            token = find(ctar.blocks)
        except WireError:
            return
        if token is None:
            return
        seen = self.used.get((ctar.sequence, token.purpose))
        if seen is not None:
            if (seen.octets, seen.source) == (octets, source) and seen.answer is not None:
                self.world.datagram(seen.answer, ROUTERS[self.name].cxtp, source)
            return
        if token.purpose == Purpose.ANNOUNCE:
            self._announced(ctar, Seen(octets, source))
        else:
            self._arrived(ctar, Seen(octets, source))

    def _announced(self, ctar: Ctar, seen: Seen) -> None:
        if not self.owns or self._judge(ctar, self.name, self.other) is None:
            return
        self.used[ctar.sequence, Purpose.ANNOUNCE] = seen
        if not self.idle:
            self._reply(seen, Purpose.ANNOUNCE, ctar.sequence, Status.BUSY)
            return
        outgoing = self._new_outgoing(sequence=ctar.sequence, announced=seen)
        self._source(outgoing, _SI.ANNOUNCE)

    def _tell_announcer(self, outgoing: Outgoing) -> None:
        state, seen = outgoing.machine.state, outgoing.announced
        if seen is None or outgoing.sequence is None or seen.answer is not None:
            return
        if state is _S.AWAITING:
            self._reply(seen, Purpose.ANNOUNCE, outgoing.sequence, Status.OK)
        elif state in (_S.KEPT, _S.REFUSED):
            self._reply(seen, Purpose.ANNOUNCE, outgoing.sequence, Status.FAILED)

    def _arrived(self, ctar: Ctar, seen: Seen) -> None:
        for incoming in self.incoming.values():
            if incoming.key is None or incoming.machine.state is not _T.HELD:
                continue
            if self._judge(ctar, self.other, self.name, incoming.key) is not None:
                self.used[ctar.sequence, Purpose.ARRIVE] = seen
                incoming.arrived, incoming.sequence = seen, ctar.sequence
                self._target(incoming, _TI.ARRIVED)
                return
        if not self.owns:
            ask = Ask(CtReq(ctar.mn, ctar.sequence, ctar.token, ctar.blocks))
            self._ask(seen.octets, Pending(ask, seen, self.now + self.world.timing.request))

    def _request(self, incoming: Incoming) -> None:
        """The MN is here: pSG is asked until it lets go."""
        seen = incoming.arrived
        if seen is None or incoming.machine.state not in (_T.INSTALLING, _T.PREPARED):
            return
        ctar = Ctar.parse(seen.octets)
        self._say(Ask(CtReq(ctar.mn, ctar.sequence, ctar.token, ctar.blocks)))
        self._later(2.0, lambda: self._request(incoming))

    def _ask(self, key: bytes, pending: Pending) -> None:
        if key not in self.pending and len(self.pending) < 8:
            self.pending[key] = pending
            self._ask_again(key)

    def _ask_again(self, key: bytes) -> None:
        pending = self.pending.get(key)
        if pending is None:
            return
        if self.now >= pending.until:
            self._give_up(key, Status.UNREACHABLE)
            return
        self._say(pending.ask)
        pending.tries += 1
        self._later(self.world.timing.wait(pending.tries + 2), lambda: self._ask_again(key))

    def _give_up(self, key: bytes, status: Status) -> None:
        """Nobody vouches for the CTAR, so there is no key for a tag. A token that is wrong gets nothing."""
        pending = self.pending.pop(key)
        if pending.seen is not None and status is not Status.NOT_ALLOWED:
            refusal = Ctaa(MN, (StatusBlock(Fpt.IKEV2_SA, status),)).serialize()
            self.world.datagram(refusal, ROUTERS[self.name].cxtp, pending.seen.source)

    def _hear_refusal(self, said: Refusal) -> None:
        for key, pending in list(self.pending.items()):
            if pending.ask == said.ask:
                self._give_up(key, said.status)
        for incoming in self.incoming.values():
            asked = incoming.arrived is not None and incoming.sequence == said.ask.request.sequence
            if asked and incoming.machine.state is _T.PREPARED:
                self._target(incoming, _TI.CTC)

    def _hear_ask(self, said: Ask) -> None:
        request = said.request
        if said.proof:
            if not self.owns:
                self._say(Refusal(said, Status.UNKNOWN_SA))
            elif self.idle:
                self._source(self._new_outgoing(whole=True), _SI.REQUESTED)
            return
        if request.token == 0:  # pull: an ordinary push to who asks
            if self.owns and self.idle:
                outgoing = self._new_outgoing()
                self._step(lambda how: self._source(outgoing, _SI(how)))
            return
        token = self._judge(request, self.name, self.other)
        if token is None or token.purpose != Purpose.ARRIVE:
            self._say(Refusal(said, Status.NOT_ALLOWED))
            return
        for outgoing in self.outgoing.values():
            if outgoing.sequence != request.sequence:
                continue
            if outgoing.machine.state in (_S.KEPT, _S.REFUSED):
                break
            self._source(outgoing, _SI.REQUESTED)
            self.used[request.sequence, Purpose.ARRIVE] = Seen(b"", OLD)
            return
        if (request.sequence, Purpose.ARRIVE) in self.used:
            self._say(Refusal(said, Status.UNKNOWN_TRANSFER))
        elif not self.owns:
            self._say(Refusal(said, Status.UNKNOWN_SA))
        elif not self.idle:
            self._say(Refusal(said, Status.BUSY))
        else:
            self.used[request.sequence, Purpose.ARRIVE] = Seen(b"", OLD)
            outgoing = self._new_outgoing(whole=True, sequence=request.sequence)
            self._source(outgoing, _SI.REQUESTED)

    def _tell_arrived(self, incoming: Incoming, good: bool) -> None:
        if incoming.arrived is not None and incoming.sequence is not None:
            status = Status.OK if good else Status.FAILED
            self._reply(incoming.arrived, Purpose.ARRIVE, incoming.sequence, status)

    def _reply(self, seen: Seen, purpose: Purpose, sequence: int, status: Status) -> None:
        statuses = () if status is Status.OK else (StatusBlock(Fpt.IKEV2_SA, status),)
        key = token_key(GENERATION, sequence)
        seen.answer = seal_ctaa(key, MN, sequence, statuses, purpose=purpose).serialize()
        self.world.datagram(seen.answer, ROUTERS[self.name].cxtp, seen.source)

    # a MN without an agent

    def _ike(self, octets: bytes, source: Endpoint) -> None:
        if self.owns:
            if self.idle:
                self.world.datagram(b"OK of " + self.name.encode(), ROUTERS[self.name].cxtp, source)
        elif self.idle:
            pending = Pending(Ask(CtReq(MN, 1), octets), None, self.now + 2)
            self._ask(octets, pending)

    def pull(self) -> None:
        """`ikectx pull`: ask until it is here, or a while."""
        until = self.now + 60

        def again() -> None:
            if not self.owns and self.now < until:
                self._say(Ask(CtReq(MN, 1)))
                self.world.later(5.0, again)

        again()
