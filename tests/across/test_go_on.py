"""pSG goes on sending ESP while nSG asks the MN for other SPIs: until when, how much, and what then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Literal
from unittest.mock import AsyncMock

import pytest

from ikectx.engine.ports import SENDING_PACKETS, MoveReport
from ikectx.errors import LinkError
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import FinalState, IkeContext
from ikectx.wire.cxtp import Ctdr, StatusBlock
from tests import peers
from tests.gateway_world import Place
from tests.hand_loop import run
from tests.vici_bridge.effects.test_sink import a_context, move, place
from tests.worlds import one_move, until, world
from vici_bridge.effects import source as source_module
from vici_bridge.effects.source import CharonSource
from vici_bridge.kernel.xfrm import KernelSa

SERVED = peers.a_context()


async def nobody(here: IkeContext, final: FinalState, arrived: Callable[[], bool]) -> MoveReport:
    raise AssertionError("the MN is asked nothing")


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Place, CharonSource, IkeContext]]:
    """A gateway with kernel ESP that serves an SA, exported."""
    here = place()
    context = a_context(1)
    here.mobiles.add(context)
    await move(here, context)
    source = CharonSource(here.host, nobody)
    try:
        yield here, source, await source.export(context.spis)
    finally:
        for task in list(here.host._tasks):
            task.cancel()


def outbound(here: Place, context: IkeContext) -> KernelSa:
    _, sa = here.host.kernel_pair(context, context.children[0])
    assert sa is not None
    return sa


def sends(here: Place, context: IkeContext) -> bool:
    """Does a packet for the MN leave under the SPI that it knows?"""
    return here.sad.send(context.remote_vips[0]) == context.children[0].spi_out


def test_esp_goes_on_until_release() -> None:
    async def scenario() -> None:
        async with served() as (here, source, context):
            assert sends(here, context)
            final = await source.freeze(context, "nsg", sending=True)
            assert final.children[0].outbound.seq == outbound(here, context).replay.oseq
            assert sends(here, context)
            await asyncio.sleep(0.3)
            assert sends(here, context)
            await source.release(context)
            assert not sends(here, context)
            assert not here.host.leaving.all()

    run(scenario())


def test_an_ordinary_freeze_ends_it_at_once() -> None:
    async def scenario() -> None:
        async with served() as (here, source, context):
            await source.freeze(context, "nsg")
            assert not sends(here, context)
            assert not here.host.leaving.of(context.spis).facts.sends_to

    run(scenario())


def test_it_ends_after_a_time(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(source_module, "SENDING_SECONDS", 1.0)

    async def scenario() -> None:
        async with served() as (here, source, context):
            await source.freeze(context, "nsg", sending=True)
            assert sends(here, context)
            await until(lambda: not sends(here, context))
            assert "no more ESP from here" in caplog.text
            await source.release(context)
            assert not here.host.leaving.of(context.spis).facts.sends_to

    run(scenario())


def test_it_ends_after_so_many_packets() -> None:
    async def scenario() -> None:
        async with served() as (here, source, context):
            final = await source.freeze(context, "nsg", sending=True)
            sa = outbound(here, context)
            far = replace(sa.replay, oseq=final.children[0].outbound.seq + SENDING_PACKETS)
            here.sad.sas[sa.destination, sa.spi] = replace(sa, replay=far)
            await until(lambda: not sends(here, context))

    run(scenario())


def test_taken_back_it_goes_on_beyond_what_the_other_may_have_used() -> None:
    async def scenario() -> None:
        async with served() as (here, source, context):
            source._mover = called_back
            final = await source.freeze(context, "nsg", sending=True)
            await source.thaw(context, 2000)
            assert sends(here, context)
            ahead = outbound(here, context).replay.oseq - final.children[0].outbound.seq
            # it may have begun 2 * SENDING_PACKETS on
            assert ahead >= 4 * SENDING_PACKETS
            assert not here.host.leaving.of(context.spis).facts.sends_to
            await asyncio.sleep(0.3)
            assert sends(here, context)

    run(scenario())


def test_taken_back_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "SENDING_SECONDS", 0.05)

    async def scenario() -> None:
        async with served() as (here, source, context):
            source._mover = called_back
            final = await source.freeze(context, "nsg", sending=True)
            await until(lambda: not sends(here, context))
            await source.thaw(context, 2000)
            assert sends(here, context)
            assert outbound(here, context).replay.oseq >= final.children[0].outbound.seq + 4 * SENDING_PACKETS

    run(scenario())


def test_an_agent_that_starts_ends_it() -> None:
    async def scenario() -> None:
        async with served() as (here, source, context):
            await source.freeze(context, "nsg", sending=True)
            here.store.flush()  # as the journal does it
            for task in list(here.host._tasks):
                task.cancel()  # the agent dies
            here.begin()
            again = CharonSource(here.host, called_back)
            again.resume()
            assert not sends(here, context)
            await again.release(context)
            assert not here.host.leaving.of(context.spis).facts.sends_to

    run(scenario())


@pytest.mark.parametrize("used", [0, 1, 3])
def test_the_mn_is_called_under_whatever_id_comes_next(used: int) -> None:
    # the other gateway may have asked it to change addresses, to rekey a child, and to delete the old one
    async def scenario() -> None:
        async with served() as (here, source, context):
            tried: list[int] = []

            async def mover(there: IkeContext, final: FinalState, arrived: Callable[[], bool]) -> MoveReport:
                tried.append(final.mid_initiator)
                if len(tried) <= used:
                    raise LinkError("silent")
                return MoveReport(messages=2, requests=1)

            source._mover = mover
            here.charon.rekey = AsyncMock()  # type: ignore[attr-defined]
            final = await source.freeze(context, "nsg", renaming=True)
            await source.thaw(context, 2000)
            assert tried == [final.mid_initiator + n for n in range(used + 1)]
            assert here.host.record.context(context.spis).mid_initiator == tried[-1] + 1

    run(scenario())


async def called_back(here: IkeContext, final: FinalState, arrived: Callable[[], bool]) -> MoveReport:
    return MoveReport(messages=2, requests=1)


# --- how the gateways agree on it ----------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("address", ["update", "keep"])
def test_the_other_gateway_says_that_it_cannot_send(wanted: bool, address: Literal["update", "keep"]) -> None:
    async def scenario() -> None:
        async with world() as w:
            if wanted:
                w.b.daemon.renaming.add(SERVED.spis)
            sa, report = await one_move(w, address=address)
            assert report.result == "moved"
            assert (sa in w.a.daemon.sending) is wanted
            answers = [message.statuses for message in w.network.seen if isinstance(message, Ctdr)]
            assert answers == [(StatusBlock(Fpt.GO_ON, Status.OK),) if wanted else (), ()]
            assert report.verdicts == ()

    run(scenario())


def test_a_pull_goes_on_sending_too() -> None:
    async def scenario() -> None:
        async with world(rights=frozenset({"pull"})) as w:
            sa = w.a.daemon.serve(SERVED)
            w.b.daemon.renaming.add(sa)
            await w.b.agent.pull("a", SERVED.remote.address)
            await until(lambda: sa in w.a.daemon.late)
            assert w.owner(sa) == "b"
            assert sa in w.a.daemon.sending

    run(scenario())


@pytest.mark.parametrize("renaming", [False, True])
def test_children_that_the_mn_may_have_under_other_names_are_rekeyed(renaming: bool) -> None:
    async def scenario() -> None:
        async with served() as (here, source, context):
            source._mover = called_back
            rekeyed: list[int] = []

            async def rekey(*, child_id: int) -> None:
                rekeyed.append(child_id)

            here.charon.rekey = rekey  # type: ignore[attr-defined]
            await source.freeze(context, "nsg", renaming=renaming)
            assert rekeyed == []
            await source.thaw(context, 2000)
            (view,) = await here.host.views()
            assert rekeyed == ([child.unique_id for child in view.children] if renaming else [])
            assert here.mute.muted == set()
            await source.thaw(context, 2000)
            assert len(rekeyed) == len(view.children) * renaming

    run(scenario())
