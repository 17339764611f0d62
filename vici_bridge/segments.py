"""`Segments`: all of charon's SAs become PASSIVE, or ESTABLISHED again, at once. I/O.

The ha plugin knows no single SA, only segments (strongSwan 5.9.8 to 6.0.6). So one toggle activates all SAs
that came in until then, and restarts the timers of every SA. What that needs to know of charon costs no
listing: how many SAs are half-open is a number of charon's (`stats`), and the timers of an SA are noted once,
when it was first seen active (`Deadlines`). Only for an SA that came up here since then all are listed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Protocol

from ikectx import trace
from ikectx.clock import steady_wall
from ikectx.errors import IkectxError
from ikectx.sa.name import SaName
from vici_bridge.ha import messages as ha
from vici_bridge.vici.views import SaView

from .deadlines import Deadlines

SOON = 0.005
"""Seconds after a toggle for which the next one waits: calls of that time share it. The first does not wait,
because the packets of a mobile node may."""

FEW = 32
"""SAs that are asked for one by one before a toggle, in one go; more are asked for by a list of all."""


class Side(Protocol):
    """charon, as the host of the agent knows it."""

    deadlines: Deadlines

    async def half_open(self) -> int:
        """SAs that are being set up. Errors: CharonError."""

    async def views(self) -> list[SaView]:
        """All SAs. Errors: CharonError, WireError."""

    async def view(self, sa: SaName, *, search: bool = True) -> SaView | None:
        """One SA; `search`: also among all, if its unique ID is not known. Errors: as `views`."""

    async def version(self) -> int:
        """The HA wire version. Errors: CharonError."""

    async def send(self, messages: Iterable[ha.HaMessage]) -> None:
        """Orders to charon. Errors: CharonError."""

    def served(self) -> Sequence[SaName]:
        """SAs that charon reported and that are not just being taken in."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it in the background."""


class Segments:
    """The segments of one charon. Errors of all methods: CharonError, WireError."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._toggle: asyncio.Future[None] | None = None
        self._toggled = -math.inf
        """When the last toggle was, by the event loop's clock."""
        self._passive: set[SaName] = set()
        """SAs that came in since the last toggle."""
        self._active: set[SaName] = set()
        """SAs that a toggle has activated, and that nobody has asked for since."""

    def came(self, sa: SaName) -> None:
        """This SA was just installed, PASSIVE; the next toggle activates it, whoever wants that."""
        self._active.discard(sa)
        self._passive.add(sa)

    def gone(self, sa: SaName) -> None:
        """This SA is deleted."""
        self._active.discard(sa)
        self._passive.discard(sa)

    @trace.spanned("activate segment")
    async def activate(self, sa: SaName | None = None) -> None:
        """Make every PASSIVE SA ESTABLISHED: TAKE, then DROP. Calls close together share one toggle.

        `sa`: the SA that is to become active; nothing is done if a toggle since it came was for another one.

        Between the two all SAs are PASSIVE for some milliseconds, and charon 6.0.1 and later destroys
        half-open ones, so this waits for a moment without any (2 s at most).
        """
        if sa is None or sa not in self._active:
            if self._toggle is None:
                self._toggle = asyncio.get_running_loop().create_future()
                self._side.spawn(self._toggle_soon(self._toggle))
            await asyncio.shield(self._toggle)
        if sa is not None:
            self._active.discard(sa)

    @trace.spanned("pause segment")
    async def pause(self) -> None:
        """Make every ESTABLISHED SA PASSIVE, until `activate`: DROP, then TAKE.

        charon's segments are not active when it starts, and the TAKE of one that is not active does nothing.
        Half-open SAs are waited for as in `activate`.
        """
        await self._none_half_open()
        version = await self._side.version()
        await self._side.send([ha.segment_drop(version, 0), ha.segment_take(version, 0)])

    async def _none_half_open(self) -> None:
        """Until no SA is half-open, but 2 s at most."""
        for _ in range(20):
            if not await self._side.half_open():
                return
            await asyncio.sleep(0.1)

    async def _unseen(self) -> Sequence[SaView]:
        """The SAs whose timers were not noted since they came up; all, if more than `FEW` came up, or charon
        does not know one of them. Errors: CharonError, WireError.

        charon's list of 1,000 SAs takes 0.4 s (5.9.8), and the SA of a move becomes active only after it.
        """
        side = self._side
        unseen = side.deadlines.unseen(side.served())
        if len(unseen) <= FEW:
            found = await asyncio.gather(*(side.view(sa, search=False) for sa in unseen))
            views = [view for view in found if view is not None]
            if len(views) == len(unseen):
                return views
        return await side.views()

    async def _toggle_soon(self, done: asyncio.Future[None]) -> None:
        side, loop = self._side, asyncio.get_running_loop()
        try:
            await asyncio.sleep(self._toggled + SOON - loop.time())
            side.deadlines.before_toggle(await self._unseen(), steady_wall())
            await self._none_half_open()
            version = await side.version()
            self._toggle, self._toggled = None, loop.time()  # later calls wait for the next toggle
            self._active |= self._passive
            self._passive.clear()
            await side.send([ha.segment_take(version, 0), ha.segment_drop(version, 0)])
            done.set_result(None)
        except IkectxError as error:
            self._toggle = None
            self._passive |= self._active  # the next one is for these, too
            self._active.clear()
            done.set_exception(error)
        except BaseException:
            # callers must not wait for ever
            self._toggle = None
            done.cancel()
            raise
