"""A thousand SAs from two gateways at once, their SPIs drawn from tiny ranges: hundreds collide."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random

import pytest

from ikectx.sa.context import IkeContext, ReplayState
from tests.hand_loop import run
from tests.vici_bridge.effects.test_sink import LOW, a_context, move, place
from vici_bridge.effects import looks as looks_module


def test_a_thousand_sas_from_two_gateways_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """SPIs of a range of 1536, IKE SPIs of 2048, MNs behind common addresses: hundreds collide."""
    monkeypatch.setattr(looks_module, "check_selectors", lambda *_: [])
    monkeypatch.setattr(looks_module, "check_vips", lambda *_: [])
    dice = Random(4067)
    here = place(spi_max=LOW + 1535)
    names = {gateway: dice.sample(range(LOW, LOW + 1536), 500) for gateway in "ab"}
    queues: dict[str, list[IkeContext]] = {"a": [], "b": []}
    for number in range(1000):
        gateway = "ab"[number % 2]
        context = a_context(number + 1, mn=f"198.51.{100 + number % 40}.7")
        child = replace(
            context.children[0],
            spi_in=names[gateway][number // 2].to_bytes(4),
            spi_out=dice.randrange(LOW, LOW + 256).to_bytes(4),
            inbound=ReplayState(5, 32, 31),
        )
        ours = b"\x22GWr" + dice.randrange(2048).to_bytes(4)
        generation = replace(context.current, spi_r=ours)
        context = replace(context, generations=(generation,), children=(child,))
        queues[gateway].append(context)
        if dice.random() < 0.3:
            here.mobiles.stock.add(str(context.remote_id))
    # at one gateway names are unique, as MNs' own are among those of one address only by chance
    for context in (*queues["a"], *queues["b"]):
        here.mobiles.add(context)

    async def push(contexts: list[IkeContext]) -> None:
        for context in contexts:
            await move(here, context)
            await asyncio.sleep(0)

    async def scenario() -> None:
        halves = [queue[at::2] for queue in queues.values() for at in (0, 1)]
        await asyncio.gather(*(push(half) for half in halves))

    run(scenario(), seconds=3600)
    assert len(here.charon.sas) == 1000
    assert len(here.mobiles.asked) > 300
    here.sound()
