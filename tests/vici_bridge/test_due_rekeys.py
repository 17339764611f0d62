"""The watch over rekeys that are due: how often it asks charon for all SAs."""

from __future__ import annotations

import asyncio

import pytest

from ikectx.sa.name import SaName
from tests.hand_loop import run
from tests.vici_bridge.test_deadlines import MemoryStore
from tests.vici_bridge.test_rekey_after_move import SA, SPIS_IN
from vici_bridge.deadlines import Deadlines
from vici_bridge.due_rekeys import LOOK, REST, DueRekeys
from vici_bridge.rekey_after_move import FreshKeys
from vici_bridge.vici.views import SaView


class Listed:
    """A charon that takes so many seconds to list its SAs."""

    def __init__(self, takes: float) -> None:
        self.takes = takes
        self.at: list[float] = []

    async def views(self) -> list[SaView]:
        self.at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.takes)
        return [SA]

    async def view(self, sa: SaName) -> SaView | None:
        raise AssertionError("no deadline is due")

    async def rekey(self, ike_id: int | None, child_id: int | None) -> None: ...


@pytest.mark.parametrize(("takes", "most"), [(0.001, 2 * LOOK), (2.0, REST * 2.0 + 2 * 1.0)])
def test_who_takes_long_to_list_its_sas_is_asked_less_often(takes: float, most: float) -> None:
    async def scenario() -> None:
        store, charon = MemoryStore(), Listed(takes)
        fresh = FreshKeys(store)
        fresh.want(SA.spis, SPIS_IN)
        watch = asyncio.create_task(
            DueRekeys(Deadlines(store), fresh, charon.view, charon.views, charon.rekey).watch()
        )
        await asyncio.sleep(50.0)
        watch.cancel()
        pauses = [after - at - takes for at, after in zip(charon.at, charon.at[1:], strict=False)]
        assert pauses and all(max(LOOK, REST * takes) - 0.001 < pause < most for pause in pauses), pauses

    run(scenario())
