"""What is done late, or again after it failed: by then the SA may be back, gone, or under another name."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ikectx.clock import steady_wall
from ikectx.engine.ports import MoveReport
from ikectx.errors import CharonError, KernelError, StoreError, UnknownSaError
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from tests.across.test_go_on import run, sends, served
from tests.gateway_world import Charon, Sad
from tests.mobile_world import NEW, NSG, Node, a_node_context, do
from tests.vici_bridge import test_traps
from tests.vici_bridge.effects.test_coming import gateway as coming_gateway
from tests.vici_bridge.effects.test_leaving import JUMP, gateway
from tests.vici_bridge.effects.test_sink import a_context, come, final_of, move, no_descriptors, place
from tests.vici_bridge.test_deadlines import MemoryStore
from tests.worlds import until
from vici_bridge.away.departures import Stage
from vici_bridge.deadlines import Deadlines
from vici_bridge.due_rekeys import DueRekeys
from vici_bridge.effects import runner as runner_module
from vici_bridge.effects import source as source_module
from vici_bridge.effects.source import CharonSource
from vici_bridge.host import CharonHost
from vici_bridge.rekey_after_move import FreshKeys
from vici_bridge.traps import Traps
from vici_bridge.vici.views import SaView


async def frozen(host: CharonHost, context: IkeContext) -> tuple[CharonSource, IkeContext]:
    """The SA on its way to nsg again, and who lets it go."""

    async def nobody(*_: Any) -> MoveReport:
        return MoveReport()

    source = CharonSource(host, nobody)
    leaves = await source.export(context.spis)
    await source.freeze(leaves, "nsg")
    return source, leaves


def test_what_a_killed_charon_has_left_goes_on_behind_the_other_gateways_numbers() -> None:
    async def scenario() -> None:
        async with gateway() as there:
            began = there.number
            await there.source.freeze(there.context, "nsg")
            there.here.charon.sas.clear()
            with pytest.raises(UnknownSaError):
                await there.source.thaw(there.context, JUMP)
            assert there.number >= began + JUMP
            assert sends(there.here, there.context)

    run(scenario())


def test_an_sa_that_is_here_again_has_no_script_that_says_that_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "AGAIN", (0.1, 0.1))

    async def scenario() -> None:
        here = place(updown={"home": f'echo "$PLUTO_VERB" >> {tmp_path}/ran'})
        context = a_context(1)
        here.mobiles.add(context)
        await move(here, context)
        source, leaves = await frozen(here.host, context)
        with monkeypatch.context() as without:
            without.setattr(subprocess, "Popen", no_descriptors)
            await source.release(leaves)
        here.host.coming.drop(leaves.spis)
        back = replace(leaves, epoch=leaves.epoch + 2)
        final = final_of(back)
        await here.sink.prepare(back, False)
        await here.sink.take(back, final)
        await here.sink.activate(back, final, await here.sink.move_peer(back, final))
        await until(lambda: not here.host.leaving.all())
        assert not [word for word in (tmp_path / "ran").read_text().split() if word.startswith("down")]

    asyncio.run(scenario())


def test_an_sa_that_was_rekeyed_meanwhile_has_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "AGAIN", (0.05, 0.05))
    monkeypatch.setattr(runner_module, "ENDLESS", 0.05)

    async def scenario() -> None:
        here = place(updown={"home": f'echo "$PLUTO_VERB" >> {tmp_path}/ran'})
        with monkeypatch.context() as without:
            without.setattr(subprocess, "Popen", no_descriptors)
            await come(here, a_context(1))
            (old,) = here.charon.sas
            sa = here.charon.sas.pop(old)
            sa.id, sa.view = replace(old, spi_i=b"newspi_i", spi_r=b"newspi_r"), None
            sa.generation = replace(sa.generation, spi_i=b"newspi_i", spi_r=b"newspi_r")
            here.charon.sas[sa.id] = sa
        await until(lambda: not any(row.later for row in here.host.coming.all()))
        assert (tmp_path / "ran").read_text().startswith("up")

    asyncio.run(scenario())


def test_a_trap_is_noted_until_charon_has_it() -> None:
    store, context = MemoryStore(), a_context(1)
    ours, away, fails = (context.connection, context.children[0].name), {context.spis}, [True]

    class Refuses(test_traps.Charon):
        async def trap(self, connection: str, name: str, *, install: bool) -> None:
            if install and fails:
                raise CharonError("installing failed")
            await super().trap(connection, name, install=install)

    charon = Refuses(ours)

    async def scenario() -> None:
        traps = Traps(store, charon, lambda: away)
        await traps.leave(context)
        away.clear()
        with pytest.raises(CharonError):
            await traps._look()
        fails.clear()
        await traps._look()
        assert charon.there == {ours} and not store.values

    asyncio.run(scenario())


def test_an_sa_that_could_not_be_got_ready_is_not_left_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other gateway serves it, and would come to the numbers at which this one sends."""

    async def scenario() -> None:
        async with coming_gateway("") as there:

            def bad(_here: Any) -> None:
                raise KernelError("netlink: no buffer space")

            monkeypatch.setattr(there.here.sink._early, "read", bad)
            assert await there.here.sink.ready(there.context, False) is False
            assert not there.here.charon.sas and not there.here.mute.muted
            assert not there.here.host.coming.of(there.context.spis).facts.stage

    run(scenario())


def test_an_sa_that_charon_keeps_goes_when_it_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with coming_gateway("") as there:
            sink = there.here.sink

            async def listed(*_: Any, **__: Any) -> None:
                raise CharonError("charon still lists the IKE_SA")

            with monkeypatch.context() as slow:
                slow.setattr(there.here.host, "delete", listed)
                with pytest.raises(CharonError):
                    await sink.ready(there.context, False)
                sink.not_coming(there.context)
                # the other gateway offers it again: it would be removed as soon as that can be done
                with pytest.raises(CharonError, match="still being removed"):
                    await sink.prepare(there.context, False)
                assert await sink.ready(there.context, False) is False
            await until(lambda: not there.here.charon.sas)

    run(scenario())


def test_the_lifetime_of_a_child_goes_on_under_the_new_name_of_its_ike_sa() -> None:
    store, context, charon = MemoryStore(), a_context(1), Charon(Sad())
    deadlines, sa = Deadlines(store), charon.serve(context)
    deadlines.keep(context.spis, context.children[0].spi_in, steady_wall() - 1)
    del charon.sas[sa.id]
    sa.id, sa.view = replace(sa.id, spi_i=b"newnew_i", spi_r=b"newnew_r"), None
    charon.sas[sa.id] = sa
    deadlines.renamed(context.spis, SaName(b"newnew_i", b"newnew_r"))
    asked: list[int | None] = []

    async def look(name: SaName) -> SaView | None:
        return next((view for view in charon.views() if view.spis == name), None)

    async def rekey(_ike: int | None, child: int | None) -> None:
        asked.append(child)

    asyncio.run(DueRekeys(deadlines, FreshKeys(store), look, None, rekey)._ask_rekeys())  # type: ignore[arg-type]
    assert asked == [charon.views()[0].children[0].unique_id]
    assert [key for key, _ in Deadlines(store)._store.items("deadline")] == []


def test_esp_that_goes_on_is_ended_at_last_where_the_disk_was_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "SENDING_SECONDS", 0.1)
    monkeypatch.setattr(source_module, "_LOOK", 0.02)

    async def scenario() -> None:
        async with served() as (here, source, context):
            await source.freeze(context, "nsg", sending=True)
            note, tries = here.host.leaving.note, list[int]()

            def full(*_: Any, **__: Any) -> None:
                tries.append(1)
                raise StoreError("the disk is full")

            here.host.leaving.note = full  # type: ignore[method-assign]
            await until(lambda: len(tries) > 1)
            here.host.leaving.note = note  # type: ignore[method-assign]
            await until(lambda: context.spis not in source._sending)
            assert not sends(here, context)

    run(scenario())


def test_an_sa_that_was_to_come_back_and_did_not_is_away_again() -> None:
    async def scenario() -> None:
        here = place()
        context = a_context(1)
        here.mobiles.add(context)
        await move(here, context)
        source, leaves = await frozen(here.host, context)
        await source.release(leaves)

        def full(*_: Any, **__: Any) -> Sequence[Any]:
            raise StoreError("the disk is full")

        here.sink._renames.plan = full  # type: ignore[method-assign]
        back = replace(leaves, epoch=leaves.epoch + 2)
        with pytest.raises(StoreError):
            await here.sink.prepare(back, False)
        await here.sink.undo(back)
        assert here.host.away.listing()[0].stage is Stage.WAITING  # until the other gateway reports it

    run(scenario())


def test_nothing_is_kept_of_a_relayed_sa_that_was_refused() -> None:
    async def scenario() -> None:
        here = place()
        context = a_context(1)
        here.sink.relayed(context, "nsg")
        await here.sink.check(context, False)
        here.sink.not_coming(context)
        assert not here.sink._memory.relayed

    run(scenario())


def test_numbers_jump_each_time_that_esp_goes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        node, jumps = Node(a_node_context()), list[int]()
        context = node.mobile.known(await node.mobile.steps.seen(node.sa))
        jump, begin = node.mobile.steps.jump, node.host.rewrite.begin  # type: ignore[union-attr]
        monkeypatch.setattr(node.mobile.steps, "jump", lambda at: (jumps.append(1), jump(at))[1])

        def busy(_place: Any) -> None:
            raise KernelError("nft is busy")

        node.host.rewrite.begin = busy  # type: ignore
        await node.mobile.ahead(context, NEW, NSG)
        await node.mobile.home(node.sa)
        node.host.rewrite.begin = begin  # type: ignore
        await node.mobile.ahead(context, NEW, NSG)
        assert len(jumps) == 2

    do(scenario())


def test_it_is_known_that_charon_was_away_when_an_sa_was_to_be_active_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        node = Node(a_node_context())
        pause = node.host.segments.pause

        async def away(*_: Any, **__: Any) -> None:
            raise CharonError("charon did not answer within 10 s")

        async def paused() -> None:
            await pause()
            monkeypatch.setattr(node.host, "view", away)

        monkeypatch.setattr(node.host.segments, "pause", paused)
        with pytest.raises(CharonError):
            await node.mobile.quiet(node.sa)
        monkeypatch.undo()
        assert node.mobile.is_quiet(node.sa)
        await node.mobile.loud(node.sa)
        assert node.charon.state == "ESTABLISHED" and not node.mobile.is_quiet(node.sa)

    do(scenario())
