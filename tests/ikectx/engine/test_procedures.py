"""Procedures of the engine: what they wait for, whose turn it is, and what comes of errors."""

from __future__ import annotations

import pytest

from ikectx.engine.effects import Export, FindEpochs
from ikectx.engine.outputs import Effect
from ikectx.engine.procedures import Cancelled, Do, Event, Gate, Opened, Pause, Scheduler, Steps, Turn
from ikectx.errors import BusyError, StoreError
from ikectx.sa.name import SaName

SA = SaName(bytes(8), bytes(range(8)))


def test_a_step_is_given_out_and_its_outcome_comes_back() -> None:
    scheduler = Scheduler()
    said: list[object] = []

    def procedure() -> Steps[str]:
        said.append((yield Do(Export(SA), b"transfer")))
        try:
            yield FindEpochs(SA)
        except StoreError as error:
            said.append(str(error))
        return "done"

    scheduler.spawn(procedure(), "p", ended=lambda value, error: said.append((value, error)))
    assert not scheduler.outputs  # nothing runs before it is its turn
    scheduler.run()
    assert list(scheduler.outputs) == [Effect(1, Export(SA), b"transfer")]
    scheduler.effect_done(1, "a context")
    scheduler.run()
    scheduler.effect_done(1, "again")  # an outcome that nobody waits for
    scheduler.effect_done(2, StoreError("the disk is gone"))
    scheduler.run()
    assert said == ["a context", "the disk is gone", ("done", None)]
    assert not scheduler.processes


def test_events_gates_and_pauses_have_time_limits() -> None:
    scheduler = Scheduler()
    gate, said = Gate(), list[object]()

    def procedure() -> Steps[None]:
        said.append((yield Event(until=2.0)))
        said.append((yield Event(until=3.0)))
        said.append((yield Opened(gate, until=4.0)))
        said.append((yield Opened(gate)))
        said.append((yield Opened(gate)))  # it stays open
        said.append((yield Pause(until=9.0)))

    process = scheduler.spawn(procedure(), "p")
    scheduler.run()
    process.post("first")
    scheduler.run()
    for now in (2.0, 3.0, 4.0):
        assert scheduler.next_timer() == max(3.0, now)
        scheduler.now = now
        scheduler.handle_timer()
        scheduler.run()
    assert said == ["first", None, False]
    assert scheduler.next_timer() is None
    scheduler.open(gate)
    scheduler.run()
    assert said[3:] == [True, True]
    scheduler.now = scheduler.next_timer() or 0.0
    scheduler.handle_timer()
    scheduler.run()
    assert not scheduler.processes


def test_b26_turns_are_taken_in_order_and_given_by_who_has_them() -> None:
    """One that was cancelled while it waited for its turn again freed another one's."""
    scheduler = Scheduler()
    said: list[str] = []

    def procedure(name: str) -> Steps[None]:
        yield Turn("mn")
        try:
            said.append(f"{name} has it")
            yield Event()
            scheduler.leave("mn")  # others may go before it while it waits for its mobile node
            yield Event()
            yield Turn("mn")
            said.append(f"{name} has it again")
            yield Event()
        finally:
            scheduler.leave("mn")

    def begin(name: str) -> None:
        processes[name] = scheduler.spawn(procedure(name), name)
        scheduler.run()

    def tell(name: str) -> None:
        processes[name].post("go on")
        scheduler.run()

    processes = {}  # type: ignore[var-annotated]
    for name in ("a", "b", "c"):
        begin(name)
    assert said == ["a has it"]
    tell("a")
    assert said.pop() == "b has it"
    tell("a")  # it wants it back, and waits behind c
    scheduler.cancel(processes["a"])
    scheduler.run()
    assert [process.name for process in scheduler.turns["mn"]] == ["b", "c"]
    scheduler.cancel(processes["b"])
    scheduler.run()
    assert said.pop() == "c has it"
    scheduler.cancel(processes["c"])
    scheduler.run()
    assert scheduler.turns == {}


def test_a_cancelled_procedure_handles_no_outcome() -> None:
    scheduler = Scheduler()
    said: list[object] = []

    def procedure() -> Steps[None]:
        try:
            yield Export(SA)
        except Cancelled:
            said.append("cancelled")
            raise

    process = scheduler.spawn(procedure(), "p", ended=lambda value, error: said.append(type(error)))
    scheduler.run()
    scheduler.cancel(process)
    scheduler.effect_done(1, "too late")
    scheduler.run()
    scheduler.cancel(process)
    scheduler.run()
    assert said == ["cancelled", Cancelled]


@pytest.mark.parametrize("error", [BusyError("later"), ValueError("who knows what is in it")])
def test_an_error_ends_one_procedure_only(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Scheduler()
    said: list[str] = []

    def fails() -> Steps[None]:
        yield Pause(1.0)
        raise error

    def goes_on() -> Steps[None]:
        with scheduler.using("peer"):
            yield Pause(2.0)
            said.append("here")

    scheduler.spawn(fails(), "the one that fails")
    scheduler.spawn(goes_on(), "the other one")
    scheduler.run()
    assert scheduler.in_use == {"peer": 1}
    for now in (1.0, 2.0):
        scheduler.now = now
        scheduler.handle_timer()
        scheduler.run()
    assert said == ["here"]
    assert scheduler.last_use == {"peer": 2.0}
    assert "the one that fails" in caplog.text
    assert ("who knows" in caplog.text) is False
