"""An invitation: one message ID, an answer that is lost, agents and charons that are killed meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from ikectx.engine.ports import MoveReport
from ikectx.errors import BusyError, CharonError, LinkError, RefusedError, StoreError
from ikectx.numbers import Notify
from ikectx.sa.context import FinalState, IkeContext
from ikectx.sa.name import SaName
from ikectx.wire.payloads import AnyPayload, NotifyPayload
from mobike_ext.notify import Invitation
from tests.across.test_go_on import run, sends
from tests.killing import Assassin, Killed, places
from tests.vici_bridge.effects.test_leaving import JUMP, gateway, quick
from tests.worlds import until
from vici_bridge.effects import invite as invite_module
from vici_bridge.effects import runner as runner_module
from vici_bridge.effects import source as source_module
from vici_bridge.effects.invite import INVITE
from vici_bridge.effects.source import CharonSource
from vici_bridge.effects.thaw import CALLS_BACK
from vici_bridge.vici.views import SaView

__all__ = ["quick"]


@dataclass
class Agent:
    """A mobile node. `heard`: the message IDs and the payloads that it was told."""

    answers: bool = True
    heard: list[tuple[int, Sequence[AnyPayload]]] = field(default_factory=list)

    async def __call__(self, here: IkeContext, message_id: int, payloads: Sequence[AnyPayload]) -> int:
        self.heard.append((message_id, payloads))
        if not self.answers:
            raise LinkError("silent")
        return message_id + 1


def test_an_invitation_uses_one_message_id() -> None:
    async def scenario() -> None:
        async with gateway() as there:
            host, sa, agent = there.here.host, there.context.spis, Agent()
            before = host.context(sa).mid_initiator
            source = CharonSource(host, there._mover, there._ender, agent)
            assert source.invites(sa, "update") is False
            with pytest.raises(RefusedError, match="not known to have an agent"):
                source.invites(sa, "invite")
            host.agents.note(there.context.remote_id)
            assert source.invites(sa, "invite") is True
            await source.invite(sa, "nsg")
            assert agent.heard == [(before, [Invitation("nsg").serialize()])]
            assert host.context(sa).mid_initiator == before + 1
            assert there.here.mute.muted == set()
            assert there.here.host.leaving.all() == []
            assert sends(there.here, there.context)

    run(scenario())


@pytest.mark.parametrize("received", [0, 1, 2])
def test_one_that_does_not_answer_an_invitation_is_called_back(
    received: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have received it, under one ID or two: then it ignores the next request under these, and has
    gone to the other gateway, which asks for its SA meanwhile."""
    monkeypatch.setattr(runner_module, "AGAIN", (0.05, 0.05))

    async def scenario() -> None:
        async with gateway() as there:
            host, sa = there.here.host, there.context.spis
            host.agents.note(there.context.remote_id)
            before = host.context(sa).mid_initiator
            source = CharonSource(host, there._mover, there._ender, Agent(answers=False))
            await source.invite(sa, "nsg")
            assert there.called == [], "it has just been asked six times"
            assert there.here.mute.muted == set() and sends(there.here, there.context)
            assert there.here.mute.answering == {sa}, "charon would use the same ID once more"
            with pytest.raises(BusyError, match="nobody knows which message ID"):
                await source.export(sa)
            away = await source.export(sa, away=True)
            assert (away.mid_initiator, away.unsure) == (before, True)
            final = await source.freeze(away, "nsg", away=True)
            assert (final.mid_initiator, final.unsure) == (before, True)
            source.not_taken(sa)
            mover = there._mover

            async def answers(here: IkeContext, final: FinalState, arrived: Callable[[], bool]) -> MoveReport:
                there.mn = final.mid_initiator == before + received
                return await mover(here, final, arrived)

            source._mover = answers
            await source.thaw(away, JUMP)
            await until(lambda: not host.leaving.all())
            assert there.called == [before + used for used in range(received + 1)]
            assert host.context(sa).mid_initiator == before + received + 1
            assert there.here.mute.muted == there.here.mute.answering == set()

    run(scenario())


def test_an_agent_that_starts_lets_an_invited_sa_go_under_the_right_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mobile node had answered, and charon was not told so: it came before what was to follow had."""

    async def scenario() -> None:
        async with gateway() as there:
            host, sa = there.here.host, there.context.spis
            before = host.context(sa).mid_initiator
            with monkeypatch.context() as patch:
                killer = Assassin("charon knows the ID").waits_in(INVITE)
                patch.setattr(source_module, "INVITE", killer)
                patch.setattr(CharonSource, "_unheard", _killed)
                source = CharonSource(host, there._mover, there._ender, Agent())
                with pytest.raises(Killed):
                    await source.invite(sa, "nsg")
            there.begin()
            away = await there.source.export(sa, away=True)
            assert (away.mid_initiator, away.unsure) == (before + 1, True)
            final = await there.source.freeze(away, "nsg", away=True)
            assert (final.mid_initiator, final.unsure) == (before + 1, True)
            there.source.resume()
            await asyncio.sleep(0.1)
            assert there.here.mute.muted == {sa}, "the freeze goes on"

    run(scenario())


def test_the_end_of_an_invitation_waits_for_a_store_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """charon was deaf and mute for the SA, for good."""
    monkeypatch.setattr(source_module, "AGAIN", 0.02)
    monkeypatch.setattr(runner_module, "AGAIN", (0.05, 0.05))

    async def scenario() -> None:
        async with gateway() as there:
            host, sa, mute, full = there.here.host, there.context.spis, there.here.mute, True
            source = CharonSource(host, there._mover, there._ender, Agent())
            put = host.leaving.put

            def writes(row: Any, *, soon: bool = False) -> None:
                if full and (mute.muted or mute.answering):
                    raise StoreError("database or disk is full")
                put(row, soon=soon)

            monkeypatch.setattr(host.leaving, "put", writes)
            with pytest.raises(StoreError):
                await source.invite(sa, "nsg")
            await asyncio.sleep(0.1)
            assert mute.answering == {sa} and host.leaving.all()
            full = False
            await until(lambda: not host.leaving.all())
            assert mute.muted == mute.answering == set()
            assert sends(there.here, there.context)

    run(scenario())


@pytest.mark.parametrize("speaks", [True, False])
def test_a_relayed_node_is_told_this_gateway_s_addresses_if_it_speaks_mobike(speaks: bool) -> None:
    async def scenario() -> None:
        async with gateway() as there:
            host, sa, mn = there.here.host, there.context.spis, Agent()
            before = host.context(sa).mid_initiator
            source = CharonSource(host, there._mover, there._ender, mn)
            if speaks:
                await source.invite(sa, "")
                ((used, payloads),) = mn.heard
                told = [one for one in payloads if isinstance(one, NotifyPayload)]
                assert [one.data for one in told] == [one.packed for one in host.config.addresses]
                assert {one.notify for one in told} == {Notify.ADDITIONAL_IP4_ADDRESS}
                assert (used, host.context(sa).mid_initiator) == (before, before + 1)
            else:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(source_module, "forgetful", lambda context: True)
                    with pytest.raises(RefusedError, match="MOBIKE"):
                        await source.invite(sa, "")
                assert mn.heard == []
            assert there.here.mute.muted == set() and sends(there.here, there.context)

    run(scenario())


def test_a_relayed_node_that_does_not_answer_does_not_count_as_told() -> None:
    async def scenario() -> None:
        async with gateway() as there:
            source = CharonSource(there.here.host, there._mover, there._ender, Agent(answers=False))
            with pytest.raises(LinkError, match="did not answer"):
                await source.invite(there.context.spis, "")
            assert there.here.mute.muted == set() and sends(there.here, there.context)
            assert [row.later for row in there.here.host.leaving.all()] == [(CALLS_BACK,)]

    run(scenario())


def test_an_agent_may_be_killed_while_it_invites(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    async def scenario() -> None:
        for effect, after in places([one.name for one in INVITE.effects]):
            async with gateway() as there:
                host, sa, agent = there.here.host, there.context.spis, Agent()
                with monkeypatch.context() as patch:
                    patch.setattr(source_module, "INVITE", Assassin(effect, after).waits_in(INVITE))
                    patch.setattr(CharonSource, "_unheard", _killed)
                    source = CharonSource(host, there._mover, there._ender, agent)
                    with pytest.raises(Killed):
                        await source.invite(sa, "nsg")
                there.begin()
                there.source.resume()
                await until(lambda there=there: not there.here.host.leaving.all())
                assert not there.here.store.rows("source"), "no journal is written for an invitation"
                assert there.here.mute.muted == set(), effect
                assert sends(there.here, there.context)

    run(scenario())


def test_an_invitation_that_a_charon_does_not_live_to_see_the_end_of_is_over(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Else the SA's row stays until the agent is started anew, and the SA mute if charon had it still."""

    async def scenario() -> None:
        async with gateway() as there:
            host, sa, away = there.here.host, there.context.spis, [True]
            seen = host.view

            async def ends(*_: object) -> None:
                host.view = gone  # type: ignore[method-assign]
                raise CharonError("charon has ended")

            async def gone(sa: SaName, *, search: bool = True) -> SaView | None:
                if away:
                    raise CharonError("charon's VICI socket cannot be used")
                return await seen(sa, search=search)

            monkeypatch.setattr(invite_module, "tell_ids", ends)
            source = CharonSource(host, there._mover, there._ender, Agent())
            with pytest.raises(CharonError, match="has ended"):
                await source.invite(sa, "nsg")
            assert [row.later for row in host.leaving.all()] == [(CALLS_BACK,)]
            there.here.charon.sas.clear()
            away.clear()
            await until(lambda: not host.leaving.all())
            assert there.here.mute.muted == set()

    run(scenario())


async def _killed(self: CharonSource, context: IkeContext) -> None:
    raise Killed
