"""SAs that come in at once: none of them overlooks another, though all have looked before the first came."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.gateway_world import Place
from tests.vici_bridge.effects.test_sink import a_context, final_of, move, place, rival, run
from vici_bridge.effects.looks import Looks
from vici_bridge.vici.views import SaView


def that_looks_before_others_come(here: Place, gate: asyncio.Event, count: int) -> list[int]:
    """The first `count` listings are told when `gate` is open; each look appends how many SAs it saw."""
    looks: list[int] = []
    read = here.host.views

    async def views() -> list[SaView]:
        seen = await read()
        looks.append(len(seen))
        if len(looks) <= count:
            await gate.wait()
        return seen

    here.host.views = views  # type: ignore[method-assign]
    return looks


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("kinds", [("inbound",), ("responder",)], ids="-".join)
def test_those_that_looked_at_once_get_different_names(kinds: tuple[str, ...], kernel: bool) -> None:
    async def scenario() -> None:
        here, gate = place(kernel=kernel), asyncio.Event()
        first = a_context(1)
        second = rival(first, *kinds)
        for one in (first, second):
            here.mobiles.add(one)
        looks = that_looks_before_others_come(here, gate, 2)
        work = [asyncio.create_task(move(here, one)) for one in (first, second)]
        while len(looks) < 2:
            await asyncio.sleep(0.001)
        gate.set()
        await asyncio.gather(*work)
        assert looks[:2] == [0, 0]
        assert len(here.charon.views()) == 2
        assert sum(wish.children != () or wish.ike != b"" for wish in here.mobiles.asked) == 1
        here.sound()

    run(scenario())


def test_a_name_given_meanwhile_is_taken() -> None:
    """The first has been told another name, and that is the one the second has."""

    async def scenario() -> None:
        here, gate = place(), asyncio.Event()
        other, first = rival(a_context(1), "inbound"), a_context(1)
        here.charon.serve(other)
        for one in (other, first):
            here.mobiles.add(one)
        await here.sink.prepare(first, False)
        plan = here.sink._renames.plan_of(here.sink._here(first))
        assert plan is not None
        second = a_context(2, mn="198.51.100.8")
        child = replace(second.children[0], spi_in=plan.children[0].new_in)
        second = replace(second, children=(child,))
        here.mobiles.add(second)
        looks = that_looks_before_others_come(here, gate, 1)
        coming = asyncio.create_task(here.sink.prepare(second, False))
        while not looks:
            await asyncio.sleep(0.001)
        final = final_of(first)
        await here.sink.take(first, final)
        report = await here.sink.move_peer(first, final)
        await here.sink.activate(first, final, report)
        assert here.sink._renames.plan_of(here.sink._here(first)) is None, "nothing is promised any more"
        gate.set()
        await coming
        taken = {(view.spi_i, child.spi_in) for view in here.charon.views() for child in view.children}
        assert len({spi for _, spi in taken}) == len(taken) == 3
        assert here.charon.offences == []

    run(scenario())


def test_each_sees_what_came_since_its_own_look() -> None:
    async def scenario() -> None:
        here = place()
        here.charon.serve(a_context(1))
        looks = Looks(here.host)
        one, two = (here.charon.views()[0] for _ in range(2))
        async with looks.look() as early:
            looks.came(one)
            async with looks.look() as late:
                looks.came(two)
                assert looks.now(late).views == (*late.views, two)
            assert looks.now(early).views == (*early.views, one, two)

    run(scenario())


def test_nothing_is_kept_when_nobody_looks() -> None:
    async def scenario() -> None:
        here = place()
        for number in range(3):
            one = a_context(number + 1, mn=f"198.51.100.{number + 7}")
            here.mobiles.add(one)
            await move(here, one)
        assert here.sink._looks._came == []

    run(scenario())
