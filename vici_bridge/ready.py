"""`Ready`: charon's IKE_SAs as a mobile node's agent knows them without asking, when it must be quick. I/O.

charon reports over HA whenever an SA, its addresses or its message IDs change. So what was listed after the
last report is what charon has, and an SA without a task then has none now: an exchange would have been
reported."""

from __future__ import annotations

import asyncio

from ikectx.errors import CharonError, WireError
from vici_bridge.ha.record import RecordChange
from vici_bridge.host import CharonHost
from vici_bridge.vici.views import SaView

SETTLE = 0.2
"""Seconds from a report until charon is asked for its SAs."""
AGAIN = 1.0
"""Seconds between two listings while charon has an exchange under way: it does not report that one ends."""


class Ready:
    """The SAs of one charon, kept known from the first call of `changed` on."""

    def __init__(self, host: CharonHost) -> None:
        self._host = host
        self._views: list[SaView] | None = None
        self._changes = 0
        self._looks = False

    def changed(self, change: RecordChange | None = None) -> None:
        """Something about charon's SAs has changed."""
        del change
        self._views = None
        self._changes += 1
        if not self._looks:
            self._looks = True
            self._host.spawn(self._look())

    def views(self) -> list[SaView] | None:
        """All IKEv2 SAs of charon as they are now; None: charon must be asked."""
        self._host.hear()
        return self._views if self._host.charon_up else None

    async def _look(self) -> None:
        try:
            wait = SETTLE
            while True:
                await asyncio.sleep(wait)
                before = self._changes
                try:
                    views = await self._host.views()
                except (CharonError, WireError):
                    wait = AGAIN
                    continue
                self._host.hear()
                if before != self._changes:
                    wait = SETTLE
                    continue
                self._views = views
                if not any(view.tasks for view in views):
                    return
                wait = AGAIN
        finally:
            self._looks = False
