"""What a move asks of charon, kernel and store does not grow with the number of other SAs at both
gateways."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from ikectx.sa.context import IkeContext
from tests.across.test_go_on import nobody
from tests.gateway_world import Place
from tests.hand_loop import run
from tests.vici_bridge.effects.test_sink import a_context, move, place
from vici_bridge.effects.source import CharonSource
from vici_bridge.vici.codec import serialize_message
from vici_bridge.vici.list_sas import Listing

_T = TypeVar("_T")

MN = 60_000
"""The number of the SA that moves; others have lower ones."""
LONG = 3600.0
"""Seconds since the SAs were listed, because charon had come."""


def other(number: int) -> IkeContext:
    return a_context(number, mn=f"198.51.{101 + (number >> 8)}.{number & 255}")


def tally(owner: Any, what: str, asked: Counter[str]) -> None:
    """Count the calls of that object, but those that it makes itself, and the rows that they answer."""
    calls: list[str] = []

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            calls.append(name)
            try:
                answer = call(*args, **named)
            finally:
                calls.pop()
            if calls:
                return answer
            asked[f"{what} {name}"] += 1
            if isinstance(answer, list):
                asked[f"rows of {what} {name}"] += len(answer)
            return answer

        return counted

    for name in dir(owner):
        if not name.startswith("_") and callable(call := getattr(owner, name)):
            setattr(owner, name, counting(name, call))


def count(here: Place) -> Counter[str]:
    """What this gateway asks of charon for SAs, tells it over HA, asks of its kernel, and writes."""
    asked: Counter[str] = Counter()
    tally(here.sad, "kernel", asked)
    tally(here.store, "store", asked)
    send = here.host.ha_link.send

    async def counted(datagrams: Iterable[bytes]) -> None:
        sent = list(datagrams)
        asked["HA messages"] += len(sent)
        await send(sent)

    here.host.ha_link.send = counted  # type: ignore[method-assign, assignment]

    async def read_sas(read: Callable[[bytes], _T], *, ike_ids: Sequence[int] = ()) -> list[_T]:
        asked["requests for one SA" if ike_ids else "requests for all SAs"] += 1
        found = [sa for sa in here.charon.sas.values() if not ike_ids or sa.unique_id in ike_ids]
        asked["SAs told"] += len(found)
        return [read(serialize_message({sa.name or "none": here.charon._view(sa)})) for sa in found]

    here.host.listing = Listing(read_sas)
    del here.host.views, here.host.view  # those of this world, which ask nobody
    return asked


@asynccontextmanager
async def two(others: int) -> AsyncIterator[tuple[Place, CharonSource, Place, list[Counter[str]]]]:
    """pSG, which serves an SA, and nSG, with so many others, and what both ask from now on."""
    old, new = place(), place()
    counts = [count(here) for here in (old, new)]
    for here in (old, new):
        for number in range(1, others + 1):
            here.charon.serve(other(number))
            here.host.record.learn(other(number), 3)
        here.host.save()
    sa = a_context(MN)
    for here in (old, new):
        here.mobiles.add(sa)
    await move(old, sa)
    await new.host.known.list_all()
    for here in (old, new):
        here.host.spawn(here.host.known.watch())
    await asyncio.sleep(LONG)
    for asked in counts:
        asked.clear()
    try:
        yield old, CharonSource(old.host, nobody), new, counts
    finally:
        for here in (old, new):
            for task in list(here.host._tasks):
                task.cancel()


async def pushed(old: Place, source: CharonSource, new: Place) -> None:
    context = await source.export(a_context(MN).spis)
    assert await new.sink.check(context, False) == []
    await new.sink.prepare(context, False)
    final = await source.freeze(context, "nsg")
    await new.sink.take(context, final)
    report = await new.sink.move_peer(context, final)
    await new.sink.activate(context, final, report)
    await source.release(context)


async def reactive(old: Place, source: CharonSource, new: Place) -> None:
    context = await source.export(a_context(MN).spis, away=True)
    final = await source.freeze(context, "nsg")
    assert await new.sink.check(context, False) == []
    await new.sink.prepare(context, False)
    await new.sink.take(context, final)
    report = await new.sink.move_peer(context, final)
    await new.sink.activate(context, final, report)
    await source.release(context)


async def by_packet(old: Place, source: CharonSource, new: Place) -> None:
    sa = a_context(MN)
    assert await source.find(sa.remote.address) == [sa.spis]
    await reactive(old, source, new)


def counted(others: int, way: Callable[[Place, CharonSource, Place], object]) -> list[dict[str, int]]:
    found: list[dict[str, int]] = []

    async def scenario() -> None:
        async with two(others) as (old, source, new, counts):
            await way(old, source, new)  # type: ignore[misc]
            assert new.charon.offences == [] and len(new.charon.sas) == others + 1
            found.extend(dict(asked) for asked in counts)

    run(scenario(), seconds=2 * LONG)
    return found


@pytest.mark.parametrize("way", [pushed, reactive, by_packet], ids=lambda way: way.__name__)
def test_what_a_move_asks_for_does_not_grow(
    way: Callable[[Place, CharonSource, Place], object],
) -> None:
    few, many = counted(3, way), counted(300, way)
    assert many == few
    for asked in few:
        assert "requests for all SAs" not in asked
        assert "kernel dump_sas" not in asked and asked["HA messages"] and asked["store keep"]
        assert asked["SAs told"] <= asked["requests for one SA"]
