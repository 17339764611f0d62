"""The engine of one gateway as a plain object: aioquic's verbs, no I/O.

    engine = Engine(EngineConfig("psg", peers), secrets.token_bytes)
    engine.start(now)
    ticket = engine.request(now, Transfer(sa, "nsg"))
    while (output := engine.next_output()) is not None:
        ...                                  # carry it out: see `outputs`
    engine.effect_done(now, effect, outcome)
    engine.receive(now, link, message)
    engine.handle_timer(now)                 # when `next_timer` is due

What comes out is to be carried out in its order, after each verb. A crash may come between any two outputs:
all that an engine needs of the past is in the journal and the notes that it had written, and `restore` takes
up what the journal has open. No verb raises anything, except for mistakes of the caller's (`StateError`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import NamedTuple

from ikectx.errors import IkectxError, LinkError, StateError, UsageError, WireError
from ikectx.mistakes import log_mistake
from ikectx.numbers import Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import Address as IpAddress
from ikectx.sa.context import Endpoint
from ikectx.sa.name import SaName
from ikectx.wire import packet_proof as proof
from ikectx.wire.cxtp import Ctar, Ctc, Ctd, Ctdr, CtReq, Message, Pctd
from ikectx.wire.whereabouts import Whereabouts, is_notice

from .arrivals import Arrivals
from .grants import Grants, UsedTokens
from .inbox import Inboxes
from .journal import JournalEntry
from .journaled import EngineConfig, Parts
from .lines import Line, Lines
from .notices import Notices
from .old_gateway import Outgoing
from .outputs import Answer, Output, Settled
from .ports import Address
from .procedures import Process, Scheduler, Steps, log
from .report import TransferReport
from .requests import Request, Requests, Sighting
from .tables import TARGET_OWNS, SourceState, TargetState
from .transfers import Decision, Transfers


class Moment(NamedTuple):
    """The time. `clock`: seconds of a clock that only goes forward; `unix`: seconds since 1970."""

    clock: float
    unix: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """Move an SA of this gateway to the peer `to`. Outcome: `TransferReport`.

    `address`: how its mobile node gets there (`ports.Address`). `dry_run`: only ask. `asked_by`: whose
    wish it is, for the audit log. Errors: UsageError, UnknownSaError, BusyError.
    """

    sa: SaName
    to: str
    address: Address = "update"
    dry_run: bool = False
    asked_by: str = ""


@dataclass(frozen=True, slots=True)
class Pull:
    """Have the SA of the MN at that outer address moved here. Outcome: `TransferReport`.

    `sa` says which, where it has several. Errors: UsageError.
    """

    from_: str
    mn: IpAddress
    sa: SaName | None = None
    dry_run: bool = False
    asked_by: str = ""


@dataclass(frozen=True, slots=True)
class Show:
    """An IKE message of an SA that is not here came from `remote`: ask these peers for the SA, in this order.

    Outcome: `TransferReport`; None, where none of them has it or asking makes no sense. Errors: UsageError.
    """

    datagrams: tuple[bytes, ...]
    local: Endpoint
    remote: Endpoint
    ask: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Arrive:
    """A CTAR that an MN has sent from that endpoint. Its outcome is given out as an `Answer`."""

    message: Ctar
    source: Endpoint


@dataclass(frozen=True, slots=True)
class Resolve:
    """Serve the SA of that transfer here again, or never again, whatever the peer says. Outcome:
    `TransferReport`. `by`: who decides, in words."""

    transfer_id: str
    decision: Decision
    by: str = "operator"


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the mobile node of that SA the addresses of this gateway. Outcome: None. Errors: UnknownSaError,
    BusyError, RefusedError, LinkError (silent)."""

    sa: SaName


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell a peer where an SA is that it gave. Outcome: None, as soon as it will not be forgotten."""

    peer: str
    news: Whereabouts


Wanted = Transfer | Pull | Show | Arrive | Resolve | Announce | Tell


class Engine:
    """All transfers of one gateway, in both roles. `fresh` gives so many random octets.

    Errors: ConfigError.
    """

    def __init__(self, config: EngineConfig, fresh: Callable[[int], bytes]) -> None:
        self.config = config
        self._scheduler = Scheduler()
        self._lines = Lines(self._scheduler)
        parts = self._parts = Parts(config, self._scheduler, self._lines, fresh)
        self._peers = {peer.name: peer for peer in config.peers}
        self.transfers = Transfers(parts)
        self.requests = Requests(parts)
        self._inboxes = Inboxes(parts, self.requests, self.transfers.moving)
        used = UsedTokens(parts)
        self.grants = Grants(parts, self.transfers, used)
        self._notices = Notices(parts)
        self.arrivals: Arrivals | None = None
        """The CTARs; None where no mobile node may hand over."""
        if config.policy.mobile is not None:
            self.arrivals = Arrivals(
                parts, self.transfers, self._inboxes, self.requests, used, config.policy.mobile
            )
        self.heard: dict[str, float] = {}
        """When the last message of a peer came, by its name (seconds since 1970)."""
        self._tickets: dict[int, Process] = {}
        self._last_ticket = 0
        self._runs = False

    def _at(self, now: Moment) -> None:
        self._scheduler.now, self._scheduler.unix = now

    # -- life --------------------------------------------------------------------------------------------

    def start(self, now: Moment) -> None:
        """From now on requests and messages are taken; what is in the store for peers is told to them."""
        self._at(now)
        self._runs = True
        self._scheduler.spawn(self._notices.start_all(), "notices")
        self._scheduler.run()

    def restore(self, now: Moment, entry: JournalEntry) -> str:
        """Take up a transfer that the journal has open; what becomes of it, empty: it is known already.

        Errors: WireError, ValueError, where the entry is not one of this version.
        """
        self._at(now)
        if entry.transfer_id in self.transfers.open or self._inboxes.has(entry.transfer_id):
            return ""
        said = self._take_up(entry)
        self._scheduler.run()
        return said

    def _take_up(self, entry: JournalEntry) -> str:
        peer = self._peers.get(entry.peer) or PeerConfig(entry.peer, "")
        if entry.role == "target":
            self._inboxes.inbox(peer, ip_address(entry.mn_address)).post(entry)
            return "finished" if TargetState(entry.state) in TARGET_OWNS else "undone"
        run = Outgoing.resumed(self._parts, peer, entry)
        self.transfers.resume(run)
        if run.machine.state is SourceState.RELEASED:
            return f"{entry.peer} is asked whether it owns the SA"
        return "cleaned up" if run.machine.state is SourceState.CLEANING else "kept and served here"

    def stop(self, now: Moment) -> None:
        """Begin nothing new, cancel what has not been let go. What is open stays in the journal."""
        self._at(now)
        self._runs = False
        self.transfers.stop()
        self._inboxes.stop()
        self._scheduler.run()

    @property
    def idle(self) -> bool:
        """Is nothing under way any more?"""
        return not self._scheduler.processes

    def unused(self, now: Moment, peer: str) -> float:
        """For how many seconds no link to that peer was needed; 0: one is, even if nothing is said on it."""
        if peer in self._scheduler.in_use:
            return 0.0
        return now.clock - self._scheduler.last_use.get(peer, 0.0)

    # -- requests ----------------------------------------------------------------------------------------

    def request(self, now: Moment, what: Wanted) -> int:
        """Begin this; its ticket, by which a `Settled` (or an `Answer`) tells how it ended."""
        self._at(now)
        self._last_ticket += 1
        ticket = self._last_ticket

        def ended(value: object, error: BaseException | None) -> None:
            del self._tickets[ticket]
            outcome: object = value
            if isinstance(error, IkectxError):
                outcome = error
            elif error is not None:
                if isinstance(error, Exception):
                    log_mistake(log, type(what).__name__, error)
                outcome = StateError(f"a mistake here: {type(error).__name__}")
            if isinstance(outcome, bytes | None) and isinstance(what, Arrive):
                self._scheduler.outputs.append(Answer(ticket, outcome))
            else:
                self._scheduler.outputs.append(Settled(ticket, outcome))

        steps = self._steps(what, ticket)
        self._tickets[ticket] = self._scheduler.spawn(steps, type(what).__name__.lower(), ended=ended)
        self._scheduler.run()
        return ticket

    def abandon(self, now: Moment, ticket: int) -> None:
        """Nobody waits for that any more: a transfer that has not let go is cancelled."""
        self._at(now)
        if ticket in self._tickets:
            self._scheduler.cancel(self._tickets[ticket])
        self._scheduler.run()

    def cancel(self, now: Moment, transfer_id: str) -> bool:
        """Stop a transfer of ours. True: it will be kept; False: it has let go already, or is unknown."""
        self._at(now)
        cancelled = self.transfers.cancel(transfer_id)
        self._scheduler.run()
        return cancelled

    def reports(self) -> dict[int, TransferReport]:
        """How those transfers stand that were requested and have not ended, by their tickets."""
        runs = self.transfers.open.values()
        return {run.ticket: run.report() for run in runs if run.ticket in self._tickets}

    def peer(self, name: str) -> PeerConfig:
        """The peer of that name. Errors: UsageError."""
        peer = self._peers.get(name)
        if peer is None:
            known = ", ".join(sorted(self._peers)) or "none"
            raise UsageError(f"no peer is called {name!r}", hint=f"configured peers: {known}")
        return peer

    def _steps(self, what: Wanted, ticket: int) -> Steps[object]:
        if not self._runs and not isinstance(what, Resolve | Tell):
            raise StateError("the gateway does not run")
        match what:
            case Transfer(sa, to, address, dry_run, asked_by):
                return (
                    yield from self.transfers.transfer(
                        self.peer(to), sa, address, dry_run, ticket, asked_by=asked_by
                    )
                )
            case Pull(from_, mn, sa, dry_run, asked_by):
                peer = self.peer(from_)
                return (yield from self.requests.pull(peer, mn, sa, dry_run, ticket, asked_by))
            case Show():
                return (yield from self._show(what))
            case Arrive(message, source):
                if self.arrivals is None:
                    raise StateError("no MN may hand over here: the gateway has no `mobile`")
                return (yield from self.arrivals.ctar(message, source))
            case Resolve(transfer_id, decision, by):
                return (yield from self.transfers.resolve(transfer_id, decision, by))
            case Announce(sa):
                yield from self.transfers.announce(sa)
            case Tell(peer, news):
                yield from self._notices.tell(peer, news)
        return None

    def _show(self, what: Show) -> Steps[TransferReport | None]:
        blocks = proof.encode(what.datagrams)
        try:
            sa = proof.spis_of(what.datagrams[0])
        except WireError:
            return None
        remote = what.remote
        if not any(sa[1]) or remote.address.version != what.local.address.version:
            return None
        for name in what.ask:
            message = CtReq(remote.address, int.from_bytes(self._parts.fresh(4)), 0, blocks)
            one = Request(
                self._parts,
                self.peer(name),
                message,
                sa=sa,
                right="packet",
                seen=Sighting(
                    lambda context: remote,
                    proves=partial(proof.verify, datagrams=what.datagrams),
                    here=what.local,
                    shown=what.datagrams,
                ),
            )
            yield from self.requests.run(one)
            report = one.report()
            not_here = (Status.UNKNOWN_SA, Status.UNREACHABLE, Status.NOT_ALLOWED)
            if one.run is not None or report.status not in not_here:
                return report
            log.info("%s does not give the SA of the request from %s: %s", name, remote, report.text)
        return None

    # -- links and messages ------------------------------------------------------------------------------

    def link_up(
        self, now: Moment, link: int, peer: PeerConfig, where: str, *, accepted: bool = False
    ) -> None:
        """There is a link of that number to that peer, and where it is, in words. `accepted`: it dialled."""
        self._at(now)
        self._lines.up(link, peer, where)
        if accepted:
            self._notices.connected(peer.name)
        self._scheduler.run()

    def link_lost(self, now: Moment, link: int, error: LinkError) -> None:
        """That link is closed, for this reason; harmless where the engine knows."""
        self._at(now)
        line = self._lines.find(link)
        self._lines.lost(link, error)
        if line is not None:
            self._inboxes.forget(line)
        self._scheduler.run()

    def receive(self, now: Moment, link: int, message: Message) -> None:
        """A message came over that link. For a PCTD, CTD or CTC a `Handled` says that it needs no more."""
        self._at(now)
        line = self._lines.find(link)
        if line is not None:
            self.heard[line.peer.name] = now.unix
            self._receive(line, message)
        self._scheduler.run()

    def _receive(self, line: Line, message: Message) -> None:
        if isinstance(message, Pctd | Ctd) and not (isinstance(message, Ctd) and is_notice(message)):
            self._inboxes.receive(line, message)
            return
        if isinstance(message, Ctd):
            self._scheduler.spawn(self._notices.arrived(line, message), f"a notice of {line.peer.name}")
            return
        if isinstance(message, Ctc):
            # it names no more than the MN: it ends what can still be ended, in both directions
            self.transfers.cancelled(line.peer, message)
            self.grants.cancelled(line, message)
            self._inboxes.cancelled(line, message)
            return
        if isinstance(message, Ctdr):
            if not line.answered(message) and not self.requests.refused(line, message):
                log.warning("%s answered what nobody asked, for %s", line.label, message.mn)
        elif isinstance(message, CtReq):
            if self._runs:
                self.grants.request(line, message)
        else:
            log.warning("%s sent a %s: not served here", line.label, message.TYPE.name)

    # -- what comes of it --------------------------------------------------------------------------------

    def effect_done(self, now: Moment, effect: int, outcome: object) -> None:
        """How the effect, the journal's write or the connecting of that number ended; an error: it failed."""
        self._at(now)
        self._scheduler.effect_done(effect, outcome)
        self._scheduler.run()

    def next_timer(self) -> float | None:
        """When `handle_timer` is due, by the clock that goes forward; None: not before something happens."""
        return self._scheduler.next_timer()

    def handle_timer(self, now: Moment) -> None:
        """Go on with what waited for a time that has come."""
        self._at(now)
        self._scheduler.handle_timer()
        self._scheduler.run()

    def next_output(self) -> Output | None:
        """What is to be carried out next; None: nothing, for now."""
        outputs: deque[Output] = self._scheduler.outputs
        return outputs.popleft() if outputs else None


__all__ = [
    "Arrive",
    "Engine",
    "EngineConfig",
    "Moment",
    "Pull",
    "Resolve",
    "Show",
    "Tell",
    "Transfer",
    "Wanted",
]
