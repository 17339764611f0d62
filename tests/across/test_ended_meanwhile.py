"""An SA that somebody ends at pSG while it leaves: nSG is told, and ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from ikectx.sa.context import IkeContext
from ikectx.wire.whereabouts import What, Whereabouts
from tests.across.test_go_on import nobody, run, served
from tests.vici_bridge.away.test_origins import World
from tests.worlds import until
from vici_bridge.effects.source import CharonSource


@pytest.mark.parametrize("state", ["ESTABLISHED", "DELETING"])
@pytest.mark.parametrize("dies", [False, True])
def test_nsg_is_told_of_what_was_ended_here(state: str, dies: bool) -> None:
    async def scenario() -> None:
        async with served() as (here, source, context):
            told: list[tuple[str, Whereabouts]] = []
            here.host.origins.tell = lambda peer, news: told.append((peer, news))
            await source.freeze(context, "nsg")
            (sa,) = here.charon.sas.values()
            sa.state, sa.view = state, None
            here.mute.said = state == "DELETING"  # its Delete
            if dies:
                # the agent is gone when charon has dropped the SA; the next one begins the step anew
                left, here.host.away.left = here.host.away.left, crash
                with pytest.raises(asyncio.CancelledError):
                    await source.release(context)
                here.host.away.left = left
                source = CharonSource(here.host, nobody)
            await source.release(context)
            news = Whereabouts(context.spis, context.epoch + 1, What.END)
            assert told == ([("nsg", news)] if state == "DELETING" else [])
            assert not here.host.leaving.all()

    run(scenario())


@pytest.mark.parametrize("answers", [True, False])
def test_taken_back_it_is_deleted_at_its_mn(answers: bool) -> None:
    """charon's own Delete has a message ID that nSG may have used."""

    async def scenario() -> None:
        async with served() as (here, _, context):
            asked: list[tuple[int, ...]] = []

            async def ender(there: IkeContext, ids: Sequence[int]) -> bool:
                assert there.spis == context.spis
                assert context.spis in here.mute.muted, "charon would say it beside the agent"
                asked.append(tuple(ids))
                return answers

            source = CharonSource(here.host, nobody, ender)
            final = await source.freeze(context, "nsg")
            (sa,) = here.charon.sas.values()
            sa.state, sa.view = "DELETING", None
            await source.thaw(context, 2000)
            mid = final.mid_initiator
            assert asked == [(mid, mid + 1, mid + 2)]
            assert here.charon.sas == {}
            assert here.mute.muted == set()
            assert not here.host.leaving.all()

    run(scenario())


def crash(*_: Any) -> Any:
    raise asyncio.CancelledError


def test_only_who_gave_an_sa_may_have_it_ended() -> None:
    world = World()
    world.connect("a")
    world.move("b")
    world.deliver()
    (row,) = world.nodes["a"].away.listing()
    b, ended = world.nodes["b"], []
    b.follow._end = ended.append
    for peer, news in (
        ("c", Whereabouts(row.sa, row.epoch, What.END)),
        ("a", Whereabouts(row.sa, row.epoch + 1, What.END)),
        ("a", Whereabouts((b"unknown.", b"unknown."), row.epoch, What.END)),
    ):
        b.follow.hear(peer, news)
    assert ended == []
    world.rekey()
    b.follow.hear("a", Whereabouts(row.sa, row.epoch, What.END))
    (name,) = b.record.sas
    assert ended == [name]


def test_charon_is_asked_to_delete_what_it_serves() -> None:
    async def scenario() -> None:
        async with served() as (here, _, context):
            asked: list[int] = []

            async def terminate(ike_id: int, timeout_ms: int) -> int:
                asked.append(ike_id)
                return 1

            here.host.vici.terminate = terminate  # type: ignore[method-assign]
            here.host.end(context.spis)
            here.host.end((b"unknown.", b"unknown."))
            await until(lambda: asked)
            view = await here.host.view(context.spis)
            assert view is not None
            assert asked == [view.unique_id]

    run(scenario())
