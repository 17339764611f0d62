"""SAs that are mute here although the store does not know why.

The rules of nftables outlive the agent and its store. If the store was lost, or an old copy was restored,
after an SA had been let go, the SA is still in charon, frozen, and another gateway may serve it. So it is
neither unmuted nor moved: the operator decides (`ikectx resolve`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from ikectx.engine.ledger import Ledger, SourceFacts
from ikectx.errors import RefusedError
from ikectx.numbers import Status
from ikectx.sa.name import SaName

from .kernel.kernel import Mute

log = logging.getLogger(__name__)

ORPHAN = (
    "the IKE_SA %s is frozen here, and the store does not know why: it was lost, or is an old copy, and "
    "another gateway may serve the SA"
)


class Orphans:
    """`known`: those that there are."""

    def __init__(self, mute: Mute, leaving: Ledger[SourceFacts], importing: Callable[[SaName], bool]) -> None:
        self.known: set[SaName] = set()
        self._mute = mute
        self._leaving = leaving
        self._importing = importing

    async def sweep(self, listed: Collection[SaName]) -> None:
        """Look through all that is mute. `listed`: charon's SAs; what it does not have is unmuted. Errors:
        KernelError."""
        for sa in await asyncio.to_thread(self._mute.half_muted):
            # nobody calls its mobile node back any more if the store does not have that
            if sa not in listed or not self._explained(sa):
                self._mute.unmute(sa)
        found = set()
        for sa in await self._muted():
            if self._importing(sa):
                continue
            if sa not in listed:
                self._mute.unmute(sa)
            elif not self._explained(sa) and sa not in self.known:
                found.add(sa)
        if found:  # one whose transfer ended meanwhile is not mute any more
            found = {sa for sa in found & await self._muted() if not self._explained(sa)}
        for sa in found:
            self.known.add(sa)
            log.error("%s: see `ikectx resolve`", ORPHAN % str(sa))
        self.known.intersection_update(listed)

    async def _muted(self) -> set[SaName]:
        return {muted.spis for muted in await asyncio.to_thread(self._mute.listing)}

    def _explained(self, sa: SaName) -> bool:
        row = self._leaving.get(sa)
        return row is not None and bool(row.step or row.facts.request is not None)

    def check(self, sa: SaName) -> None:
        """Errors: RefusedError if it is one of them."""
        if sa in self.known:
            raise RefusedError(
                ORPHAN % str(sa),
                status=Status.IN_DOUBT,
                hint=f"`ikectx resolve {sa}` shows it, and can drop it here",
            )
