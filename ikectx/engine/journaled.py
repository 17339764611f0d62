"""Common parts of both ends of a transfer: the ports of a gateway, its journal, steps with a time limit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as changed
from enum import StrEnum
from typing import Any, Generic, TypeVar

from ikectx.errors import ConfigError, IkectxError, StateError, StoreError
from ikectx.machine import Machine
from ikectx.numbers import Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import FinalState, IkeContext
from ikectx.timing import Timing

from .audit_line import audit_line
from .effects import FindLatest, Step, Write
from .journal import JournalEntry, JournalHas
from .lines import Lines
from .outputs import Journal, Report
from .procedures import Do, Pause, Scheduler, Steps, log
from .report import TransferEvent, TransferReport
from .tables import OSEQ_JUMP

ENDS_LATE = "end of a transfer"
"""Name of the procedures that write down an end which the disk did not take at once."""
_State = TypeVar("_State", bound=StrEnum)
_Input = TypeVar("_Input", bound=StrEnum)
_Action = TypeVar("_Action", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class MobileConfig:
    """What CTARs of MNs are worth here.

    `rfc_token`: the RFC's 32-bit token is accepted, too. `skew`: seconds that an MN's clock may be wrong.
    `memory`: CTARs that are remembered.
    """

    rfc_token: bool = False
    skew: float = 30.0
    memory: int = 1024


@dataclass(frozen=True, slots=True)
class TransferPolicy:
    """How a gateway moves SAs. Errors: ConfigError.

    `timing`: how long each part may take. `oseq_jump`: outbound sequence numbers that its sink leaves out
    when it takes an SA (packets), at most `OSEQ_JUMP`. `busy_attempts`: how often an SA that is busy is
    tried.

    `durable`: the journal is synced to the disk before an SA is let go or taken. That delays the mobile node
    by one sync on each side, and is needed only if SAs outlive a loss of power; those of charon do not.

    `mobile`: mobile nodes may ask for their handover themselves. Without it their CTARs, and CT-Reqs with
    their tokens, are refused.
    """

    timing: Timing = field(default_factory=Timing)
    oseq_jump: int = OSEQ_JUMP
    busy_attempts: int = 5
    durable: bool = True
    mobile: MobileConfig | None = None

    def __post_init__(self) -> None:
        if self.busy_attempts < 1:
            raise ConfigError(f"busy_attempts is {self.busy_attempts}: a transfer is tried at least once")
        if not 0 < self.oseq_jump <= OSEQ_JUMP:
            raise ConfigError(
                f"oseq_jump is {self.oseq_jump}: a gateway that takes an SA back counts on 1 to {OSEQ_JUMP}"
            )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The gateway that an engine is for, its peers, how it moves SAs, and whether its journal has all of
    them."""

    name: str
    peers: tuple[PeerConfig, ...]
    policy: TransferPolicy = field(default_factory=TransferPolicy)
    journal: JournalHas = "whole"


@dataclass(frozen=True, slots=True)
class Parts:
    """What all procedures of one engine use. `fresh`: so many random octets."""

    config: EngineConfig
    scheduler: Scheduler
    lines: Lines
    fresh: Callable[[int], bytes]

    @property
    def name(self) -> str:
        """This gateway's name."""
        return self.config.name

    @property
    def timing(self) -> Timing:
        """How long things may take."""
        return self.config.policy.timing

    @property
    def now(self) -> float:
        """Seconds of a clock that only goes forward."""
        return self.scheduler.now


class Run(Generic[_State, _Input, _Action]):
    """One transfer in one role.

    `durable`: states that must be on the disk itself. `soon`: states that are written with what is written
    next. `results`: the states that end it, and the journal's
    word for each. `instead`: what to feed when a state may not be entered since it cannot be journaled.
    `ticket`: of the request that began it.
    """

    reports = False
    """True if it reports its end itself."""

    def __init__(
        self,
        parts: Parts,
        machine: Machine[_State, _Input, _Action],
        entry: JournalEntry | None,
        ticket: int = 0,
        *,
        durable: frozenset[_State],
        soon: frozenset[_State],
        results: Mapping[_State, str],
        instead: Mapping[_State, _Input],
    ) -> None:
        self.parts = parts
        self.machine = machine
        self.entry = entry
        self.ticket = ticket
        self.error: IkectxError | None = None
        """Why it does not go on as it should; the first reason stays."""
        self.context: IkeContext | None = None
        """The SA as the old gateway exported it, with the mobile node's present address."""
        self.last_state: FinalState | None = None
        """Its last message IDs and counters there."""
        self.asked_by = ""
        """Whose wish it is, for the audit log; empty: not known any more, after a restart."""
        self.on_disk = machine.state
        """The state that the journal has, or gets with what is written next."""
        self._began = parts.now
        self._durable = durable
        self._soon = soon
        self._results = results
        self._instead = instead

    @property
    def ended(self) -> bool:
        return self.machine.state in self._results

    @property
    def stored(self) -> JournalEntry:
        """The journal's entry. Errors: StateError before there is one."""
        if self.entry is None:
            raise StateError("the transfer has no journal yet")
        return self.entry

    @property
    def status(self) -> Status:
        return Status.OK if self.error is None else self.error.status

    def blame(self, error: IkectxError) -> None:
        """Remember the reason, unless one is known already."""
        if self.error is None:
            self.error = error

    def phases(self) -> dict[str, float]:
        """Milliseconds by phase, for journal and report."""
        return self.machine.phases(self.parts.now)

    def must(self, state: _State) -> bool:
        """True if this state may not be entered before the journal has it."""
        return False

    def step(self, step: Step) -> Steps[Any]:
        """Have a step of this transfer done. Errors: those of the step."""
        outcome = yield Do(step, self.stored.transfer_id)
        return outcome

    def advance(self, what: _Input) -> Steps[tuple[_Action, ...]]:
        """Journal where `what` leads, go there, and say what is to be done.

        If the journal cannot be written: a transition that lets go or takes is replaced by `instead`; a state
        for which `must` is true waits for the journal; any other is entered, because the next start would
        take the same way. An end is journaled as soon as that is possible: a transfer would stay open.
        """
        tries = 0
        while True:
            state = self.machine.peek(what)
            try:
                yield from self.ready_for(what)
                yield from self._write(state)
            except StoreError as error:
                if state in self._instead:
                    self.blame(error)
                    what = self._instead[state]
                    continue
                if self.must(state):
                    yield from self.again(tries, f"journaling {state}", error)
                    tries += 1
                    continue
                log.error("transfer goes on without its journal: %s", error)
                if state in self._results:
                    self.parts.scheduler.spawn(self._write_at_last(state), ENDS_LATE)
            before = self.machine.state
            actions = self.machine.feed(what, self.parts.now)
            if self.machine.state != before and not (self.ended and self.reports):
                self.tell()
            return actions

    def ready_for(self, what: _Input) -> Steps[None]:
        """Do what must be done before `what` is journaled and fed, whichever input it stands in for."""
        yield from ()

    def _write_at_last(self, state: _State) -> Steps[None]:
        """Journal the end, in which it is already, when the disk allows it."""
        for tries in itertools.count():
            try:
                yield from self._write(state)
            except StoreError as error:
                yield from self.again(tries, f"journaling {state}", error)
            else:
                return

    def _write(self, state: _State) -> Steps[None]:
        if self.entry is None or state == self.on_disk:
            return
        over = state in self._results
        entry = changed(
            self.entry,
            state=str(state),
            updated=self.parts.scheduler.unix,
            detail=self.detail(),
            status=self.status,
            result=self._results.get(state, ""),
            phases=self.phases(),
            # a transfer that is over needs no keys any more
            context=None if over else self.entry.context,
            final=None if over else self.entry.final,
        )
        written = entry
        if state in self._durable and self.is_move(entry):
            line = audit_line(entry, self.parts.name, self.asked_by, self.context, self.last_state)
            written = changed(entry, audit={**line, **self.decided()})
        if state in self._soon:
            self.parts.scheduler.outputs.append(Journal(0, written, durable=False, soon=True))
        else:
            yield Write(written, durable=self.parts.config.policy.durable and state in self._durable)
        self.entry = entry
        self.on_disk = state

    def is_move(self, entry: JournalEntry) -> bool:
        """True if the SA was let go in it, or more than that: the audit log has nothing about mere offers."""
        return self.stored.final is not None

    def decided(self) -> Mapping[str, object]:
        """What else the audit log is to have."""
        return {}

    def superseded(self) -> Steps[bool]:
        """After a restart: was the SA in a later transfer, too? Then this one had ended before that began.

        Its end could not be journaled. To undo or thaw it once more would undo what came of the SA since.
        """
        entry = self.stored
        try:
            latest = yield FindLatest(entry.sa)
        except StoreError as error:
            log.error("transfer %s goes on as the journal has it: %s", entry.transfer_id.hex(), error)
            return False
        return latest not in (None, (entry.role, entry.transfer_id))

    def forget(self, state: _State, why: str = "a later one of its SA followed") -> Steps[None]:
        """It had ended in this state; nothing is done for that any more."""
        log.warning("transfer %s had ended: %s", self.stored.transfer_id.hex(), why)
        try:
            yield from self._write(state)
        except StoreError as error:
            log.error("the end of a transfer is not in the journal yet: %s", error)
        self.machine.state = state

    def detail(self) -> str:
        """The error's text for the journal. It holds no secrets, because no error does."""
        return "" if self.error is None else str(self.error)

    def tell(self, report: TransferReport | None = None) -> None:
        """Tell the observers where the transfer is; not at once, because the next message must not wait for
        them."""
        entry = self.entry
        if entry is None:
            return
        event = TransferEvent(
            transfer_id=entry.transfer_id.hex(),
            role=entry.role,
            peer=entry.peer,
            sa=entry.sa,
            mn=entry.mn,
            state=str(self.machine.state),
            ms=round((self.parts.now - self._began) * 1000, 3),
            detail=self.detail(),
            report=report,
        )
        self.parts.scheduler.outputs.append(Report(event, self.ticket))

    def again(self, tries: int, what: str, error: IkectxError) -> Steps[None]:
        """Log that `what` failed, and wait before it is tried again."""
        wait = self.parts.timing.wait(tries)
        ident = self.entry.transfer_id.hex() if self.entry else "?"
        log.error("transfer %s: %s failed, again in %g s: %s", ident, what, wait, error)
        yield Pause(self.parts.now + wait)
