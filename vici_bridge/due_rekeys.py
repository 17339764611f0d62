"""`DueRekeys`: asks charon for the rekeys that an original lifetime or a move demands (I/O: the clock)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from ikectx.clock import steady_wall
from ikectx.errors import CharonError, IkectxError, StoreError, WireError
from ikectx.sa.name import SaName
from vici_bridge.vici.views import SaView

from .deadlines import Deadline, Deadlines
from .rekey_after_move import Ask, FreshKeys

log = logging.getLogger(__name__)

LOOK = 0.5
"""Seconds at least from one list of all SAs to the next, while any is to have fresh keys."""
REKEY_AGAIN = 5.0
"""Seconds until charon is asked again for a rekey that it did not begin."""

Look = Callable[[SaName], Awaitable[SaView | None]]
"""An SA as charon has it now, None: it has no such SA. Errors: CharonError, WireError."""
Rekey = Callable[[int | None, int | None], Awaitable[None]]
"""Asks charon to rekey the IKE_SA, or the CHILD_SA, of that unique id. Errors: CharonError, WireError."""


class SasListed(Protocol):
    """`Known`."""

    def list_after(self, seconds: float) -> float:
        """When all may be listed again, so many seconds after the last time at least."""

    async def list_all(self) -> list[SaView]:
        """All SAs, asked for after this call. Errors: CharonError, WireError."""


class DueRekeys:
    """The watch over `deadlines`, and over the keys that are to be `fresh` after a move."""

    def __init__(
        self, deadlines: Deadlines, fresh: FreshKeys, look: Look, known: SasListed, rekey: Rekey
    ) -> None:
        self._deadlines = deadlines
        self._fresh = fresh
        self._look = look
        self._known = known
        self._rekey = rekey

    async def watch(self) -> None:
        """Ask charon for the rekeys that an original lifetime demands."""
        while True:
            due = self._deadlines.next_due()
            wait = LOOK if self._fresh else 3600.0 if due is None else due - steady_wall()
            await asyncio.sleep(min(max(wait, 0.2), 1.0))
            due = self._deadlines.next_due()
            if not self._fresh and (due is None or due > steady_wall()):
                continue
            try:
                await self._ask_rekeys()
            except IkectxError as error:  # also a StoreError, because a full disk must not end this watch
                log.warning("lifetimes cannot be watched now: %s", error)

    async def _ask_rekeys(self) -> None:
        trouble: IkectxError | None = None
        for entry in self._deadlines.due(steady_wall()):
            try:
                view = await self._look(SaName.from_key(entry.spis))
                if self._deadlines.settle(entry, view, steady_wall()) and view is not None:
                    await self._ask_rekey(entry, view)
                    self._deadlines.asked(entry)
            except (CharonError, WireError) as error:  # the other rekeys are asked for all the same
                trouble = error
                self._deadlines.later(entry, steady_wall() + REKEY_AGAIN)
            except StoreError as error:
                trouble = error
        for what, number in await self._stale():
            log.info("asking for fresh keys: %s %d", what, number)
            try:
                if what == "ike":
                    await self._rekey(number, None)
                else:
                    await self._rekey(None, number)
            except (CharonError, WireError) as error:  # asked again by `FreshKeys`
                trouble = error
        if trouble is not None:
            raise trouble

    async def _stale(self) -> list[Ask]:
        now = asyncio.get_running_loop().time()
        if not self._fresh or now < self._known.list_after(LOOK):
            return []
        return self._fresh.due(await self._known.list_all(), steady_wall())

    async def _ask_rekey(self, entry: Deadline, view: SaView) -> None:
        if entry.child:
            ids = [child.unique_id for child in view.children if child.spi_in.hex() == entry.child]
            for child_id in ids:
                log.info("the lifetime of CHILD_SA %s asks for a rekey now", entry.child)
                await self._rekey(None, child_id)
        else:
            log.info("the lifetime of IKE_SA %s asks for a rekey now", view.name)
            await self._rekey(view.unique_id, None)
