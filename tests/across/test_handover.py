"""The joint proof: a mobile node that asks for its handover itself, and its gateways, over bad links.

Whatever the order, one gateway serves the SA at the end, at no time two do (`engine_world`), and the mobile
node knows which, or is in doubt.
"""

from __future__ import annotations

from collections import Counter

import pytest

from ikectx.node.mobility import HandoverMode, MobileState
from tests.engine_world import Weather
from tests.handover_world import Air, HandoverWorld

CALM = Weather(cut=0.0, fail=0.0, slow=0.0, loss=0.0, crashes=0, full=0.0, jumps=0)
BAD = Weather(cut=0.05, fail=0.03, slow=0.03, loss=0.0, crashes=2, full=0.02, jumps=0)
WEATHERS = {
    "fine": (CALM, Air()),
    "lossy": (CALM, Air(loss=0.25, duplicate=0.2, delay=3.0)),
    "awful": (BAD, Air(loss=0.4, duplicate=0.4, delay=12.0)),
    "crashes": (BAD, Air(loss=0.15, duplicate=0.1, delay=2.0)),
    "attacked": (CALM, Air(loss=0.1, duplicate=0.1, delay=1.0, attack=0.7)),
    "loaded": (CALM, Air(loss=0.1, duplicate=0.2, delay=1.0, attack=0.4, load=1.0)),
    "everything": (BAD, Air(loss=0.25, duplicate=0.25, delay=5.0, attack=0.5, load=0.3)),
}
SEEDS = range(30)


@pytest.mark.parametrize("weather", WEATHERS)
@pytest.mark.parametrize("mode", list(HandoverMode))
def test_one_owner_and_the_mn_knows_or_doubts(mode: HandoverMode, weather: str) -> None:
    ends: Counter[tuple[MobileState, bool]] = Counter()
    for seed in SEEDS:
        world = HandoverWorld(seed, mode, *WEATHERS[weather])
        world.run()
        machine = world.mobile.machine
        assert machine.done or machine.state is MobileState.UNPREPARED, seed
        moved = world.sides["b"].box.owns(world.mobile.sa)
        outcome = machine.outcome
        if outcome.state is MobileState.ACTIVATED:
            assert moved and not outcome.in_doubt, seed
        elif not outcome.in_doubt:
            assert not moved, seed
        came = [one for one in world.sides["b"].disk.journal.values() if one.state == "owned"]
        assert len(came) == moved, seed  # no replay ever moved it again
        ends[outcome.state, outcome.in_doubt] += 1
    # it is worth doing: many get there
    assert ends[MobileState.ACTIVATED, False] >= (0.1 if WEATHERS[weather][0] is BAD else 0.7) * len(SEEDS), (
        ends
    )
