"""An SA that is ended at a mobile node while it is passive: the Delete that charon does not send."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest

from ikectx.errors import CharonError, UnknownSaError, UsageError
from ikectx.node.mobility import Handover, HandoverOutcome, MobileState
from ikectx.numbers import Exchange, Protocol
from ikectx.sa.context import Endpoint, IkeContext
from ikectx.sa.keys import iv_length, seal_key
from ikectx.sa.name import SaName
from ikectx.wire.ikev2 import IkeHeader, Reassembly, add_marker, seal_message, strip_marker
from ikectx.wire.payloads import DeletePayload
from mobike_ext.farewell import TABLE, Farewell, FarewellInput, FarewellState
from mobike_ext.requester import Silent
from tests import hand_loop
from tests.asking_node import World
from tests.mobile_world import NEW, NSG, PSG, a_node_context
from vici_bridge.effects.mobile import EndedUnheardError
from vici_bridge.mobile.farewell import AFTER_END, LOOK, TOLD, Farewells

CONTEXT = a_node_context()
SIZE = iv_length(CONTEXT.current.encr)


def farewell(*ids: int) -> Farewell:
    return Farewell(CONTEXT.current, ids, NEW, NSG, iv=bytes(range(SIZE * len(ids))))


def test_every_cell_of_the_table() -> None:
    assert set(TABLE) <= {(state, what) for state in FarewellState for what in FarewellInput}
    assert {to for (to,) in TABLE.values()} == {
        FarewellState.WAITING,
        FarewellState.DELETED,
        FarewellState.SILENT,
    }


def opened(datagram: bytes) -> Any:
    inbound = Reassembly(seal_key(CONTEXT.current, by_initiator=CONTEXT.current.initiator))
    return inbound.add(strip_marker(datagram, NEW, NSG))


def test_a_delete_of_the_ike_sa_under_each_id_that_may_be_the_next() -> None:
    machine = farewell(7, 8)
    sent = machine.to_send(0.0)
    messages = [opened(datagram) for datagram, to in sent if to == NSG]
    assert [message.header.message_id for message in messages] == [7, 8]
    assert all(message.payloads == (DeletePayload(Protocol.IKE),) for message in messages)
    assert len({datagram[36:44] for datagram, _ in sent}) == 2, "an IV is used once"
    assert machine.to_send(0.1) == []


def answer(message_id: int, *, by_gateway: bool = True) -> bytes:
    generation = CONTEXT.current
    initiator = generation.initiator is not by_gateway
    header = IkeHeader(*CONTEXT.spis, Exchange.INFORMATIONAL, message_id, initiator, response=True)
    key = seal_key(generation, by_initiator=initiator)
    return add_marker(seal_message(key, header, [], bytes(SIZE)), NSG, NEW)


def test_an_answer_to_any_of_them() -> None:
    for message_id in (7, 8):
        machine = farewell(7, 8)
        machine.to_send(0.0)
        machine.receive(answer(6), NSG, 0.1)
        machine.receive(answer(message_id, by_gateway=False), NSG, 0.1)
        machine.receive(answer(message_id)[:-1] + b"?", NSG, 0.1)
        machine.receive(answer(message_id), PSG, 0.1)
        assert machine.state is FarewellState.WAITING
        machine.receive(answer(message_id), NSG, 0.1)
        assert (machine.state, machine.next_timer()) == (FarewellState.DELETED, None)
        assert machine.to_send(1.0) == []


def test_silence() -> None:
    machine = farewell(7, 8)
    now, sent = 0.0, len(machine.to_send(0.0))
    while (due := machine.next_timer()) is not None:
        now = due
        machine.handle_timer(now)
        sent += len(machine.to_send(now))
    assert (machine.state, machine.next_event()) == (FarewellState.SILENT, Silent(sent))
    assert 30 < now < 45


def test_what_cannot_be_meant() -> None:
    with pytest.raises(UsageError):
        Farewell(CONTEXT.current, (), NEW, NSG, iv=b"")
    with pytest.raises(UsageError):
        Farewell(CONTEXT.current, (1, 2), NEW, NSG, iv=bytes(SIZE))


# The agent.


class Ends:
    """A mobile node whose user ends the SA at some time during a handover; who is told, and who answers."""

    def __init__(self, *answering: Endpoint) -> None:
        self.w = World()
        self.gone = False
        self.told: list[tuple[Endpoint, Endpoint, tuple[int, ...], SaName]] = []
        self.answering = answering
        self.forgotten: list[SaName] = []
        mobile: Any = self.w.mobile
        mobile.listed = self.listed
        mobile.forget = self.forgotten.append
        for step in ("quiet", "readdress", "loud"):
            setattr(mobile, step, self._unless_gone(getattr(mobile, step), loud=step == "loud"))
        self.farewells = Farewells(mobile, self.run)
        self.w.handovers._farewells = self.farewells

    def _unless_gone(self, do: Any, *, loud: bool) -> Any:
        async def step(*args: Any, **more: Any) -> Any:
            if self.gone and not loud:
                raise UnknownSaError("charon has no such SA")
            return None if self.gone else await do(*args, **more)

        return step

    async def listed(self, *names: SaName) -> bool:
        return not self.gone

    async def run(self, machine: Farewell, *, mark: int) -> bool:
        ids = tuple(ask.message_id for ask in machine._asks)
        self.told.append((machine.local, machine.remote, ids, machine.spis))
        if machine.remote in self.answering:
            return True
        await asyncio.sleep(37)
        return False

    def when_asked(self, seconds: float = 0.0, **outcome: Any) -> None:
        """The SA is ended while nsg is asked, which says so after as many seconds."""
        run = self.w.gateways.__call__

        async def asked(machine: Handover, *args: Any, **more: Any) -> HandoverOutcome:
            found = await run(machine, *args, **more)
            assert self.w.mobile.state == "PASSIVE"
            self.gone = True
            machine._know(**outcome)
            await asyncio.sleep(seconds)
            return replace(found, **outcome)

        self.w.handovers._run = asked


MID = CONTEXT.mid_initiator


def test_nsg_has_it_by_then_and_deletes_it() -> None:
    async def scenario() -> None:
        ends = Ends(NSG)
        ends.when_asked(0.05, expected=MID + 1)
        report = await ends.w.arrive()
        assert (report.result, report.exit_code, report.serves) == ("failed", UnknownSaError.exit_code, None)
        assert "nsg has deleted it" in report.detail
        assert ends.told == [(NEW, NSG, (MID + 1,), CONTEXT.spis)]
        assert CONTEXT.spis in ends.forgotten
        assert ends.w.handovers.notes.in_question() == []
        assert ends.w.handovers.notes.last()["result"] == "failed"

    hand_loop.run(scenario())


def test_nsg_refuses_it_and_psg_deletes_it() -> None:
    async def scenario() -> None:
        ends = Ends(PSG)
        ends.when_asked(0.05)
        ends.w.gateways.state = MobileState.REFUSED
        report = await ends.w.arrive()
        assert "psg has deleted it" in report.detail
        assert ends.told == [(NEW, PSG, (MID,), CONTEXT.spis)]

    hand_loop.run(scenario())


def test_predictive() -> None:
    async def scenario() -> None:
        ends = Ends(NSG)
        ends.when_asked(0.05, expected=MID)
        await ends.w.handovers.announce("nsg")
        report = await ends.w.arrive()
        assert (report.result, report.mode) == ("failed", "predictive")
        assert ends.told == [(NEW, NSG, (MID,), CONTEXT.spis)]

    hand_loop.run(scenario())


@pytest.mark.parametrize("announced", [True, False])
def test_in_the_moment_in_which_it_becomes_passive(announced: bool) -> None:
    """charon has destroyed it before the agent sees it passive, and nobody has heard of that."""

    async def scenario() -> None:
        ends = Ends(PSG)

        async def quiet(*_: Any, **__: Any) -> None:
            ends.gone = True
            raise EndedUnheardError("charon has no such SA")

        ends.w.mobile.quiet = quiet  # type: ignore[method-assign]
        if announced:
            await ends.w.handovers.announce("nsg")
        report = await ends.w.arrive()
        assert (report.result, report.exit_code) == ("failed", UnknownSaError.exit_code)
        assert "psg has deleted it" in report.detail
        assert ends.told == [(NEW, PSG, (MID,), CONTEXT.spis)]
        assert ends.w.handovers.notes.last()["result"] == "failed"

    hand_loop.run(scenario())


def test_nobody_says_who_has_it() -> None:
    """Both are told, and the handover does not wait for the end of all retransmissions."""

    async def scenario() -> None:
        ends = Ends()
        ends.when_asked(45, in_doubt=True)
        ends.w.gateways.state = MobileState.SILENT
        loop = asyncio.get_running_loop()
        began = loop.time()
        report = await ends.w.arrive()
        assert loop.time() - began < 2 * LOOK + AFTER_END + TOLD + 1
        assert {(remote, ids) for _, remote, ids, _ in ends.told} == {(NSG, (MID,)), (PSG, (MID,))}
        assert "has answered a Delete so far" in report.detail
        await ends.farewells.close()

    hand_loop.run(scenario())


def test_an_sa_that_is_there_is_not_deleted() -> None:
    async def scenario() -> None:
        ends = Ends(NSG)
        assert (await ends.w.arrive()).result == "moved"
        assert (ends.told, ends.forgotten) == ([], [])

    hand_loop.run(scenario())


def test_a_charon_that_cannot_be_asked_is_not_taken_for_one_without_the_sa() -> None:
    async def scenario() -> None:
        ends = Ends(NSG)

        async def unreachable(*names: SaName) -> bool:
            raise CharonError("no VICI socket")

        ends.w.mobile.listed = unreachable  # type: ignore[attr-defined]
        assert not await ends.farewells.ended(CONTEXT.spis)

    hand_loop.run(scenario())


def test_under_its_new_name() -> None:
    async def scenario() -> None:
        ends = Ends(NSG)
        after: IkeContext = replace(
            CONTEXT, generations=(replace(CONTEXT.current, spi_r=b"newnewne"),), remote=NSG
        )

        @contextlib.asynccontextmanager
        async def answering(*_: Any) -> Any:
            moved: asyncio.Future[IkeContext] = asyncio.get_running_loop().create_future()
            moved.set_result(after)
            ends.gone = True
            yield moved

        ends.w.handovers.answering = answering
        report = await ends.w.arrive()
        assert report.result == "failed"
        assert ends.told == [(NEW, NSG, (0,), after.spis)]

    hand_loop.run(scenario())
