"""The watch over rekeys that are due: how often it asks charon for all SAs."""

from __future__ import annotations

import asyncio

import pytest

from tests.hand_loop import run
from tests.vici_bridge.test_known import Side, view
from vici_bridge.due_rekeys import LOOK, DueRekeys
from vici_bridge.known import REST, Known
from vici_bridge.rekey_after_move import FreshKeys
from vici_bridge.vici.views import SaView


class Listed(Side):
    """A charon that takes so many seconds to list its SAs."""

    def __init__(self, takes: float) -> None:
        super().__init__(1)
        self.takes = takes
        self.at: list[float] = []

    async def views(self) -> list[SaView]:
        self.at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.takes)
        return await super().views()

    async def rekey(self, ike_id: int | None, child_id: int | None) -> None: ...


@pytest.mark.parametrize(("takes", "most"), [(0.001, 2 * LOOK), (2.0, REST * 2.0 + 2 * 1.0)])
def test_who_takes_long_to_list_its_sas_is_asked_less_often(takes: float, most: float) -> None:
    async def scenario() -> None:
        charon, sa = Listed(takes), view(1)
        fresh = FreshKeys(charon.store)
        fresh.want(sa.spis, [child.spi_in for child in sa.children])
        watch = asyncio.create_task(
            DueRekeys(charon.deadlines, fresh, charon.view, Known(charon), charon.rekey).watch()
        )
        await asyncio.sleep(50.0)
        watch.cancel()
        pauses = [after - at - takes for at, after in zip(charon.at, charon.at[1:], strict=False)]
        assert pauses and all(max(LOOK, REST * takes) - 0.001 < pause < most for pause in pauses), pauses

    run(scenario())
