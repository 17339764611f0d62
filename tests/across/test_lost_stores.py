"""Agents that die and come back with no store, or with an old copy of it, by seed: never two owners of an SA.

The SA may be left without an owner: what was let go stays frozen until an operator decides.
"""

from __future__ import annotations

import copy

import pytest

from tests.engine_world import Disk, Slip, World

SEEDS = 120
FOUND = (1756, 3791)
"""Seeds that have found something: a check that failed was taken for a no of an SA that was taken."""


class Forgetful(World):
    """Half of the agents that die lose their store, or get an old copy, made while nothing was open."""

    def __init__(self, seed: int) -> None:
        self.copies: dict[str, dict[object, object]] = {}
        self.forgot = 0
        super().__init__(seed)

    def check(self) -> None:
        super().check()
        for side in self.sides.values():
            if not side.disk.open and self.dice.random() < 0.3:
                self.copies[side.name] = copy.copy(side.disk.journal)  # type: ignore[assignment]

    def killed(self, name: str) -> None:
        super().killed(name)
        if self.rough and self.dice.random() < 0.5:
            self.forgot += 1
            disk = Disk()
            if self.dice.random() < 0.5:
                disk.journal = copy.copy(self.copies.get(name, {}))  # type: ignore[arg-type]
            self.sides[name].disk = disk

    def check_end(self) -> None:
        self.check()

    def run(self) -> None:
        try:
            super().run()
        except Slip as slip:
            # in doubt, one gateway asks the other for ever, and the mobile node may be told so by the owner
            if not str(slip).startswith(("no end", "the MN is told IN_DOUBT")):
                raise
        self.check()


@pytest.mark.parametrize("part", range(4))
def test_no_store_makes_two_owners(part: int) -> None:
    forgot = 0
    for seed in (*range(part, SEEDS, 4), *FOUND[part::4]):
        world = Forgetful(seed)
        try:
            world.run()
        except Slip as slip:
            pytest.fail(f"seed {seed}, {world.mode}: {slip}")
        forgot += world.forgot
    assert forgot > SEEDS / 40
