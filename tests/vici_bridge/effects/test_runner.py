"""The runner alone: what it notes, what it does again, what it leaves for later."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from ikectx.engine.ledger import Ledger, SourceFacts
from ikectx.errors import KernelError, StateError, StoreError
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from ikectx.together import Crowd
from tests.peers import a_context
from tests.vici_bridge.test_deadlines import MemoryStore
from tests.worlds import until
from vici_bridge.effects import runner as runner_module
from vici_bridge.effects.runner import LedgerStep, Runner, StepEffect

SA = a_context().spis


@dataclass
class Work:
    """What the effects below work on; `did` tells in which order."""

    did: list[str] = field(default_factory=list)
    sa: SaName = SA
    kept: IkeContext = field(default_factory=a_context)


class Bench:
    """A runner on a store in memory, whose agent may be another."""

    def __init__(self, *steps: LedgerStep[Work]) -> None:
        self.store = MemoryStore()
        self.steps = steps
        self.tasks: list[asyncio.Task[None]] = []
        self.begin()

    def begin(self) -> None:
        self.store.waiting.clear()
        self.ledger: Ledger[SourceFacts] = Ledger(self.store, "source")
        self.runner: Runner[Work] = Runner(self.ledger, self.spawn, Crowd(), *self.steps)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))


def effect(name: str, *, error: Exception | None = None, facts: Any = None, **how: Any) -> StepEffect[Work]:
    async def do(work: Work) -> Any:
        work.did.append(name)
        if error is not None:
            raise error
        return facts

    return StepEffect(name, do, **how)


def test_what_is_done_is_not_done_again() -> None:
    async def scenario() -> None:
        failing: list[Exception] = [KernelError("by hand")]

        async def fails_once(work: Work) -> None:
            work.did.append("b")
            if failing:
                raise failing.pop()

        step = LedgerStep("step", (effect("a"), StepEffect("b", fails_once), effect("c")))
        bench, work = Bench(step), Work()
        with pytest.raises(KernelError):
            await bench.runner.run(step, work)
        assert bench.ledger.of(SA).done == ("a",)
        await bench.runner.run(step, work)
        assert work.did == ["a", "b", "b", "c"]
        assert bench.ledger.of(SA).step == ""

    asyncio.run(scenario())


def test_facts_are_on_the_disk_before_the_next_effect() -> None:
    async def scenario() -> None:
        kept: list[int] = []

        async def looks(work: Work) -> None:
            kept.append(Ledger[SourceFacts](bench.store, "source").of(SA).facts.request or 0)

        step = LedgerStep("step", (effect("a", facts={"request": 7}), StepEffect("b", looks)), ends=True)
        bench = Bench(step)
        await bench.runner.run(step, Work())
        assert kept == [7]
        assert bench.ledger.all() == []
        bench.store.flush()
        assert bench.store.rows("source") == []

    asyncio.run(scenario())


@pytest.mark.parametrize("journaled", [True, False])
def test_the_end_of_the_last_effect_is_written_once_with_that_of_the_step(journaled: bool) -> None:
    async def scenario() -> None:
        step = LedgerStep(
            "step",
            (effect("a", facts={"request": 7}), effect("b", once=True), effect("c", facts={"unsure": True})),
            journaled=journaled,
        )
        bench = Bench(step)
        begun = []
        keep = bench.store.keep

        def watched(role: str, key: str, row: bytes | None, *, soon: bool = False) -> None:
            begun.append((bench.ledger.of(SA).begun, soon))
            keep(role, key, row, soon=soon)

        bench.store.keep = watched  # type: ignore[method-assign]
        await bench.runner.run(step, Work())
        # that b begins has the facts of a, its end comes before c begins, and that of c with the step's
        assert begun == [("b", False), ("", False), ("", journaled)]
        bench.store.flush()
        bench.begin()
        assert bench.ledger.of(SA).facts == SourceFacts(request=7, unsure=True)

    asyncio.run(scenario())


@pytest.mark.parametrize("done", [True, False])
def test_a_probe_tells_whether_what_had_begun_is_done(done: bool) -> None:
    async def scenario() -> None:
        async def probe(work: Work) -> bool:
            return done

        once = effect("once", once=True, probe=probe)
        step = LedgerStep("step", (once, effect("after")))
        bench, work = Bench(step), Work()
        row = bench.ledger.of(SA)
        bench.ledger.put(runner_module.replace(row, step="step", begun="once"))
        bench.begin()
        await bench.runner.run(step, work)
        assert work.did == ([] if done else ["once"]) + ["after"]

    asyncio.run(scenario())


def test_each_effect_has_its_own_time() -> None:
    async def scenario() -> None:
        async def hangs(work: Work) -> None:
            await asyncio.sleep(3600)

        step = LedgerStep("step", (StepEffect("hangs", hangs, limit=0.01),))
        with pytest.raises(StateError, match=r"hangs did not end within 0\.01 s"):
            await Bench(step).runner.run(step, Work())

    asyncio.run(scenario())


def test_what_is_not_needed_stands_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "AGAIN", (0.0, 0.0))

    async def scenario() -> None:
        idle = effect("idle", error=KernelError("by hand"), needed=False, later=True)
        given_up = effect("given up", error=KernelError("by hand"), needed=False)
        step = LedgerStep("step", (idle, given_up, effect("after")), ends=True)
        bench, work = Bench(step), Work()
        await bench.runner.run(step, work)
        assert work.did == ["idle", "given up", "after"]
        assert bench.ledger.of(SA).later == ("idle",)
        await until(lambda: not bench.ledger.all())
        assert work.did == ["idle", "given up", "after", "idle", "idle"]  # then it is given up, too

    asyncio.run(scenario())


def test_what_is_endless_is_tried_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "AGAIN", (0.0,))
    monkeypatch.setattr(runner_module, "ENDLESS", 0.0)

    async def scenario() -> None:
        async def call(work: Work) -> None:
            work.did.append("call")
            if len(work.did) < 9:
                raise KernelError("by hand")

        idle = StepEffect("call", call, needed=False, later=True, endless=True)
        bench, work = Bench(step := LedgerStep("step", (idle,), ends=True)), Work()
        await bench.runner.run(step, work)
        await until(lambda: not bench.ledger.all())
        assert work.did == ["call"] * 9

    asyncio.run(scenario())


def test_a_newer_step_ends_what_was_left_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "AGAIN", (0.02,))

    async def scenario() -> None:
        idle = effect("idle", error=KernelError("by hand"), needed=False, later=True)
        first, second = LedgerStep("first", (idle,), ends=True), LedgerStep("second", (effect("a"),))
        bench, work = Bench(first, second), Work()
        await bench.runner.run(first, work)
        await bench.runner.run(second, work)
        await asyncio.gather(*bench.tasks)
        assert work.did == ["idle", "a"]
        assert bench.ledger.of(SA).later == ()

    asyncio.run(scenario())


@pytest.mark.parametrize("fails", [False, True])
def test_a_newer_step_waits_for_the_end_of_an_attempt(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """A call of the mobile node that goes on beside a freeze would unmute the SA that was frozen."""
    monkeypatch.setattr(runner_module, "AGAIN", (0.0, 3600.0))

    async def scenario() -> None:
        async def call(work: Work) -> None:
            if not work.did:
                work.did.append("call")
                raise KernelError("by hand")
            work.did.append("again")
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                work.did.append("unmute")
                if fails:
                    raise KernelError("by hand")

        later = StepEffect("call", call, needed=False, later=True)
        first, second = LedgerStep("first", (later,), ends=True), LedgerStep("second", (effect("mute"),))
        bench, work = Bench(first, second), Work()
        await bench.runner.run(first, work)
        await until(lambda: "again" in work.did)
        async with asyncio.timeout(5):
            await bench.runner.run(second, work)
        assert work.did == ["call", "again", "unmute", "mute"]
        assert bench.ledger.of(SA).later == ()

    asyncio.run(scenario())


def test_an_effect_that_is_not_known_any_more_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        idle = effect("idle", error=KernelError("by hand"), needed=False, later=True)
        step = LedgerStep("step", (idle,), ends=True)
        bench = Bench(step)
        await bench.runner.run(step, Work())
        bench.store.flush()
        for task in bench.tasks:
            task.cancel()
        bench.steps = ()
        bench.begin()
        bench.runner.resume(lambda sa, context: Work())
        assert "what was left to do is not known any more" in caplog.text

    asyncio.run(scenario())


def test_a_step_without_a_store_does_not_begin_what_it_must_note(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        step = LedgerStep("step", (effect("once", once=True),))
        bench, work = Bench(step), Work()

        def full(*_: Any, **__: Any) -> None:
            raise StoreError("the disk is full")

        monkeypatch.setattr(bench.store, "keep", full)
        with pytest.raises(StoreError):
            await bench.runner.run(step, work)
        assert work.did == []

    asyncio.run(scenario())


def test_that_nothing_is_left_is_noted_when_the_store_has_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row stayed for good."""
    monkeypatch.setattr(runner_module, "AGAIN", (0.01, 0.01))

    async def scenario() -> None:
        tried: list[int] = []

        async def call(work: Work) -> None:
            tried.append(1)
            if len(tried) == 1:
                raise KernelError("by hand")

        step = LedgerStep("step", (StepEffect("call", call, needed=False, later=True),), ends=True)
        bench, full = Bench(step), True
        drop = bench.ledger.drop

        def drops(sa: SaName, *, soon: bool = False) -> None:
            if full:
                raise StoreError("database or disk is full")
            drop(sa, soon=soon)

        monkeypatch.setattr(bench.ledger, "drop", drops)
        await bench.runner.run(step, Work())
        await until(lambda: len(tried) == 2)
        await asyncio.sleep(0.1)
        assert bench.ledger.all()
        full = False
        await until(lambda: not bench.ledger.all())
        assert len(tried) == 2

    asyncio.run(scenario())
