"""Engines in one process, links that break and agents that die: 2,000 seeds of `engine_world`.

`python -m tests.engine_seeds --seeds 100000 --jobs 2` tries more; a seed that fails there is tried here, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ikectx.engine.journaled import Run
from ikectx.engine.tables import SOURCE_TABLE, SourceAction, SourceInput, SourceState
from tests.engine_seeds import some, tried
from tests.engine_world import MODES, Slip, World

SEEDS = 2000
PARTS = 8
FOUND = (39306, 98262)
"""Seeds that have found something: a full disk kept an announced SA from being let go, and it was served on
under numbers that the other gateway had used; an SA was moved on before the journal said that it had come."""


@pytest.mark.parametrize("part", range(PARTS))
def test_one_owner_no_number_twice_and_every_run_ends(part: int) -> None:
    count = SEEDS // PARTS
    assert some(part * count, count) == {}


@pytest.mark.parametrize("seed", FOUND)
def test_what_was_wrong_once_is_right(seed: int) -> None:
    assert tried(seed) == ""


def test_every_mode_moves_sas_in_good_weather_and_bad() -> None:
    """The seeds are worth something only if transfers succeed in some, and break off in others."""
    results: dict[str, set[str]] = {mode: set() for mode in MODES}
    for seed in range(15 * len(MODES)):
        world = World(seed)
        world.run()
        for side in world.sides.values():
            results[world.mode] |= {entry.result for entry in side.disk.journal.values()}
    assert all({"moved", "kept", "aborted"} <= found for found in results.values()), results


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that takes back what it let go, or writes nothing down, does not pass."""
    state, action = SourceState, SourceAction
    wrong = (state.THAWING, action.THAW)
    monkeypatch.setitem(SOURCE_TABLE, (state.RELEASED, SourceInput.LINK_LOST), wrong)  # type: ignore[arg-type]
    assert any("own" in tried(seed) for seed in range(200))
    monkeypatch.undo()

    def forgets(self: object, state: object) -> Iterator[None]:
        yield from ()

    monkeypatch.setattr(Run, "_write", forgets)
    assert any(Slip.__name__ in tried(seed) for seed in range(200))
