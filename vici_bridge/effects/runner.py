"""`Runner`: carries out the effects of a step one after the other, and goes on after the last one after a
crash.

A step is a literal tuple of effects in the order in which they are carried out. The progress is in the SA's
row of the ledger. So a step that begins anew (because its time was over, an effect failed or the agent died)
neither repeats an effect that must happen once nor forgets the rest:

- an effect that is done is not done again. If it is harmless to do it again, it is noted with the next write,
  because a write for each would cost more than the effect does;
- the facts that an effect returns are on the disk before the next effect begins, and those of the last one
  when the step has ended: with the journal's next state, if there is one;
- an effect that is done `once` is noted before it begins, and its end before the next one does. If its end
  was not noted, `probe` finds out whether it is done; without a probe it is done again;
- an effect that the step does not need (a script of the operator, asking the mobile node back) and that fails
  or takes longer than its limit is left for later, or given up, so that it never keeps an SA from a gateway
  that serves it. An effect that is left for later is tried again in the background.

Undoing a step is another step with its own order, because an SA must be served again before anybody is asked
anything; the reverse order of the effects would not do that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any, Generic, Protocol, TypeVar

from ikectx import trace
from ikectx.engine.ledger import Ledger, Row
from ikectx.errors import IkectxError, StateError, StoreError, WireError
from ikectx.numbers import Fpt
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from ikectx.together import Crowd, Together
from ikectx.wire.cxtp import ContextDataBlock
from ikectx.wire.profile import TransferHeader, decode, encode
from ikectx.within import within

log = logging.getLogger(__name__)

LIMIT = 30.0
"""Seconds that an effect may take unless it says otherwise: charon and the kernel answer within a few."""
AGAIN = (5.0, 20.0, 60.0, 300.0)
"""Seconds until an effect that was left for later is tried again, each time; then it is given up."""
ENDLESS = 60.0
"""The same for one that is never given up, from the third time on."""

_NOBODY = TransferHeader(bytes(8))

Facts = Mapping[str, Any]
"""Facts of the row that an effect found or changed, by name."""


class Work(Protocol):
    """The SA that the effects of one step work on."""

    @property
    def sa(self) -> SaName:
        """The name of its row."""

    @property
    def kept(self) -> IkeContext:
        """The SA, for effects that are left for later."""


W = TypeVar("W", bound=Work)


def _always(work: Any) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class StepEffect(Generic[W]):
    """One change of charon, the kernel, the store or the mobile node within a step.

    do: carries it out, and returns facts to keep, None: nothing. when: whether it is needed for this SA.
    probe: whether it is done already. limit: seconds. needed: the step fails with it. once: it is noted
    before it begins, because it must not be done twice. later: if it failed and is not needed, it is tried
    again in the background; endless: until it is done; postponed: it is tried only there. soon: its facts may
    wait for the row's next write, because nothing before that depends on them.
    """

    name: str
    do: Callable[[W], Coroutine[Any, Any, Facts | None]]
    when: Callable[[W], bool] = _always
    probe: Callable[[W], Awaitable[bool]] | None = None
    limit: float = LIMIT
    needed: bool = True
    once: bool = False
    later: bool = False
    endless: bool = False
    postponed: bool = False
    soon: bool = False


def with_context(row: Row[Any], context: IkeContext) -> Row[Any]:
    """The row, with what the SA was. It holds keys then."""
    blocks = encode(context, transfer=_NOBODY)
    return replace(row, context=tuple((int(block.fpt), block.data) for block in blocks))


def context_of(row: Row[Any]) -> IkeContext:
    """What the SA was, by `with_context`. Errors: WireError."""
    context, _ = decode(ContextDataBlock(Fpt(fpt), octets) for fpt, octets in row.context)
    return context


@dataclass(frozen=True, slots=True)
class LedgerStep(Generic[W]):
    """A step by its name. ends: the SA's row is dropped at its end. journaled: its end is written together
    with the journal's next state. anew: if it begins again it does all of its effects, because each checks
    the state of charon and the kernel, and earlier changes may have been lost."""

    name: str
    effects: tuple[StepEffect[W], ...]
    ends: bool = False
    journaled: bool = True
    anew: bool = False


class Runner(Generic[W]):
    """Runs steps on the rows of one role. `spawn` runs a coroutine in the background. `crowd`: of the SAs
    that have a step of any role under way."""

    def __init__(
        self,
        ledger: Ledger[Any],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        crowd: Crowd,
        *steps: LedgerStep[W],
    ) -> None:
        self._ledger = ledger
        self._spawn = spawn
        self._effects = {effect.name: effect for step in steps for effect in step.effects}
        self._waiting: dict[SaName, object] = {}
        """For an SA with effects left for later: whose turn it is, so that a newer step ends an older
        one's."""
        self._trying: dict[SaName, asyncio.Task[Facts | None]] = {}
        """Attempts of such effects that are under way."""
        self._crowd = crowd
        self._writing: Together[SaName, None] = Together(self._write, crowd)
        self._cut: set[tuple[SaName, str]] = set()
        """Effects that were cut off because the time of the whole step was over."""

    async def run(self, step: LedgerStep[W], work: W) -> None:
        """Carry out the rest of the step. Errors: those of effects that the step needs."""
        self._waiting.pop(work.sa, None)
        trying = self._trying.get(work.sa)
        if trying is not None:
            # it would work against this step: a call of the mobile node unmutes the SA when it ends
            trying.cancel()
            await asyncio.wait([trying])
        row = self._ledger.of(work.sa)
        if row.step != step.name or step.anew:
            self._cut = {(sa, name) for sa, name in self._cut if sa != work.sa}
            ident = trace.transfer_id() or row.transfer_id
            row = row.begins(step.name, ident)
            self._ledger.hold(row)
        owes = False  # whether the row must be written before another effect begins
        with self._crowd:
            for effect in step.effects:
                if effect.name not in row.done and effect.when(work):
                    if owes and not effect.once:
                        await self._put(self._ledger.of(work.sa))
                    owes = await self._do(effect, work)
        row, soon = self._ledger.of(work.sa), step.journaled or not owes
        if row.later:
            self._ledger.put(with_context(row.ended(), work.kept), soon=soon)
            self._go_on_later(work, row.later, step.ends)
        elif step.ends:
            self._ledger.drop(work.sa, soon=step.journaled)
        else:
            self._ledger.put(row.ended(), soon=soon)

    def resume(self, work_of: Callable[[SaName, IkeContext], W]) -> None:
        """After a start: go on with effects that an agent before this one had left for later. Raises
        nothing."""
        for row in self._ledger.all():
            if not row.later or row.step:
                continue
            try:
                context = context_of(row)
                unknown = [name for name in row.later if name not in self._effects]
                if unknown:
                    raise WireError(f"what was left for later: {unknown}")
            except WireError as error:
                log.error("SA %s: what was left to do is not known any more: %s", row.sa, error)
                continue
            self._go_on_later(work_of(row.sa, context), row.later, ends=True)

    async def _put(self, row: Row[Any]) -> None:
        self._ledger.hold(row)
        await self._writing.join(row.sa)

    def _write(self, sas: Sequence[SaName]) -> Sequence[None]:
        """Put the rows of SAs that are at the same effect into the store, in one transaction."""
        rows = [row for sa in sas if (row := self._ledger.get(sa)) is not None]
        for at, row in enumerate(rows, 1):
            self._ledger.put(row, soon=at < len(rows))
        return [None] * len(sas)

    def _go_on_later(self, work: W, names: Sequence[str], ends: bool) -> None:
        self._waiting[work.sa] = turn = object()
        self._spawn(self._try_again([self._effects[name] for name in names], work, turn, ends))

    async def _do(self, effect: StepEffect[W], work: W) -> bool:
        """Whether its end must be on the disk before another one begins."""
        row = self._ledger.of(work.sa)
        begun = row.begun == effect.name
        if begun and effect.probe is not None and await effect.probe(work):
            return self._done(effect, work, None)
        if effect.postponed:
            await self._postpone(effect, work)
            return False
        if (work.sa, effect.name) in self._cut:
            self._cut.discard((work.sa, effect.name))
            if not effect.needed:
                await self._leave(effect, work, StateError("the step's time was over before it ended"))
                return False
        if effect.once:
            await self._put(replace(row, begun=effect.name))
        try:
            facts = await self._limited(effect, work)
        except IkectxError as error:
            if effect.needed:
                raise
            await self._leave(effect, work, error)
            return False
        except asyncio.CancelledError:
            self._cut.add((work.sa, effect.name))
            raise
        return self._done(effect, work, facts)

    async def _limited(self, effect: StepEffect[W], work: W) -> Facts | None:
        try:
            return await within(effect.limit, effect.do(work))
        except TimeoutError:
            raise StateError(f"{effect.name} did not end within {effect.limit:g} s") from None

    def _done(self, effect: StepEffect[W], work: W, facts: Facts | None) -> bool:
        row = self._ledger.of(work.sa).finished(effect.name, facts or {})
        self._ledger.hold(row)
        # after a crash the note from before it began must not be found
        return effect.once or (bool(facts) and not effect.soon)

    async def _leave(self, effect: StepEffect[W], work: W, error: IkectxError) -> None:
        log.warning(
            "SA %s: %s failed, %s: %s",
            *(
                work.sa,
                effect.name,
                "it is tried again later" if effect.later else "it goes on without",
                error,
            ),
        )
        await self._postpone(effect, work)

    async def _postpone(self, effect: StepEffect[W], work: W) -> None:
        row = self._ledger.of(work.sa)
        later = (*row.later, effect.name) if effect.later else row.later
        await self._put(replace(row, begun="", done=(*row.done, effect.name), later=later))

    async def _try_again(self, effects: Sequence[StepEffect[W]], work: W, turn: object, ends: bool) -> None:
        """Try the effects that were left for later again, in the background."""
        for effect in sorted(effects, key=lambda one: not one.endless):
            for wait in chain(AGAIN[:2], repeat(ENDLESS)) if effect.endless else AGAIN:
                await asyncio.sleep(wait)
                if self._waiting.get(work.sa) is not turn:
                    return  # another step of this SA has begun
                attempt = asyncio.create_task(self._limited(effect, work))
                self._trying[work.sa] = attempt
                try:
                    await attempt
                except IkectxError as error:
                    log.warning("SA %s: %s failed again: %s", work.sa, effect.name, error)
                else:
                    log.info("SA %s: %s is done now", work.sa, effect.name)
                    break
                finally:
                    self._trying.pop(work.sa, None)
            else:
                log.error("SA %s: %s is given up", work.sa, effect.name)
        logged = False
        while self._waiting.get(work.sa) is turn:
            try:
                if ends:
                    self._ledger.drop(work.sa)
                else:
                    self._ledger.put(replace(self._ledger.of(work.sa), later=(), context=()))
                del self._waiting[work.sa]
            except StoreError as error:
                if not logged:
                    log.error("SA %s: that nothing is left to do is not noted yet: %s", work.sa, error)
                logged = True
                await asyncio.sleep(AGAIN[0])
