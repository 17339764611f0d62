"""Gateways whose agents lose their store, or get an old copy of it, when they die; by one seed.

What is lost with a store is charon's record of its SAs, too: such an SA can be moved only after a resync, in
which charon makes new CHILD_SAs. An operator does that in most cases, moves the SA on soon, and decides in
the end about what is in doubt. Nobody may own an SA twice, and each run ends; but an SA may be left without
an owner, because what was let go stays frozen.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

from ikectx.engine.core import Resolve, Transfer
from ikectx.engine.journal import JournalEntry
from ikectx.engine.tables import OSEQ_JUMP, SourceState
from ikectx.engine.transfers import Decision
from ikectx.numbers import Status
from ikectx.sa.name import SaName
from tests.engine_world import CALM, Disk, Side, Slip, World

DECIDES = (CALM, CALM + 200.0, CALM + 400.0)
"""When the operator decides about what is in doubt."""


class Forgetful(World):
    """Half of the agents that die lose their store, or get an old copy, in the middle of anything."""

    vague = frozenset({Status.IN_DOUBT})
    # an old copy says that the SA left, and the other gateway confirms it: charon drops what came back since
    leftovers = ("prepared", "taken")

    def __init__(self, seed: int) -> None:
        self.copies: dict[str, dict[tuple[str, bytes], JournalEntry]] = {}
        self.forgot = 0
        self.decided = 0
        self.apart: dict[frozenset[str], float] = {}
        """Until when there is no way between two gateways."""
        super().__init__(seed)
        for when in DECIDES:
            self.later(when, self._decide)
        for _ in range(12):
            self.later(self.dice.uniform(0.0, 30.0), self._traffic)

    def check(self) -> None:
        super().check()
        for side in self.sides.values():
            if self.dice.random() < 0.3:
                self.copies[side.name] = copy.copy(side.disk.journal)

    def owns_in(self, sa: SaName, epoch: int, who: str) -> None:
        """Epochs are lost with a store, so they say nothing here."""

    def reach(self, one: str, other: str) -> bool:
        return self.now >= self.apart.get(frozenset((one, other)), 0.0)

    def killed(self, name: str) -> None:
        super().killed(name)
        side, dice = self.sides[name], self.dice
        if self.rough and dice.random() < 0.5:
            self.forgot += 1
            disk = Disk()
            disk.has = "old" if side.disk.journal else side.disk.has
            if dice.random() < 0.5:
                disk.journal = copy.copy(self.copies.get(name, {}))
            else:
                side.box.strange |= set(side.box.sas)
            side.disk = disk
            for here in side.box.sas.values():
                if here.state == "served":
                    here.oseq += 2 * OSEQ_JUMP  # as the agent does when it starts
            if dice.random() < 0.8:
                self.later(dice.uniform(4.0, 15.0), partial(self._move_on, side))
            if dice.random() < 0.5:
                other = dice.choice([one for one in self.sides if one != name])
                self.apart[frozenset((name, other))] = self.now + dice.uniform(5.0, 30.0)
            side.disk.doubtful = {(one.role, one.transfer_id) for one in disk.open}
        elif side.disk.has == "old" and not any(
            (one.role, one.transfer_id) in side.disk.doubtful for one in side.disk.open
        ):
            side.disk.has = "gaps"

    def _move_on(self, side: Side) -> None:
        """charon reports its SAs, and has new CHILD_SAs made for those that were strange; then they move."""
        for sa, here in side.box.sas.items():
            if here.state != "served":
                continue
            if sa in side.box.strange:
                side.box.strange.discard(sa)
                (child,) = here.context.children
                fresh = replace(child, spi_out=self.dice.randbytes(4))
                here.context, here.oseq, here.diverted = replace(here.context, children=(fresh,)), 0, ""
            to = self.dice.choice([name for name in self.sides if name != side.name])
            self.later(self.dice.uniform(0.0, 4.0), partial(side.ask, Transfer(sa, to), self._note))

    def _decide(self) -> None:
        """One gateway at most takes an SA back; which one has it is known when the others are decided."""
        reclaimed: set[SaName] = set()
        for side in self.sides.values():
            for run in list(side.engine.transfers.open.values()) if side.engine is not None else ():
                if run.machine.state is SourceState.RELEASED and run.sa not in reclaimed:
                    self.decided += 1
                    what: Decision = "give-up" if self._owned(run.sa) else "reclaim"
                    if what == "reclaim":
                        reclaimed.add(run.sa)
                    side.ask(Resolve(run.transfer_id.hex(), what), self._note)

    def _owned(self, sa: SaName) -> bool:
        return any(side.box.owns(sa) for side in self.sides.values())

    def check_end(self) -> None:
        self.check()
        for side in self.sides.values():
            if side.disk.open:
                raise Slip(f"{side.name}: {[(one.role, one.state) for one in side.disk.open]} has no end")
            if side.engine is None or not side.engine.idle:
                raise Slip(f"something is under way in {side.name}")
        if not self.forgot:
            super().check_end()
