"""`Segments`: all of charon's SAs become PASSIVE, or ESTABLISHED again, at once. I/O.

The ha plugin knows no single SA, only segments (strongSwan 5.9.8 to 6.0.6). So one toggle activates all SAs
that came in until then, and restarts the timers of every SA. What that needs to know of charon costs no
listing: how many SAs are half-open is a number of charon's (`stats`), and the timers of an SA are noted once,
when it is first seen active (`Known`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol

from ikectx import trace
from ikectx.errors import IkectxError
from ikectx.sa.name import SaName
from vici_bridge.ha import messages as ha

SOON = 0.005
"""Seconds after a toggle for which the next one waits: calls of that time share it. The first does not wait,
because the packets of a mobile node may."""


class SasKnown(Protocol):
    """`Known`."""

    async def now(self) -> object:
        """Learn what charon has reported by now, and note the timers of new SAs. Errors: CharonError,
        WireError."""


class Side(Protocol):
    """charon, as the host of the agent knows it."""

    known: SasKnown

    async def half_open(self) -> int:
        """SAs that are being set up. Errors: CharonError."""

    async def version(self) -> int:
        """The HA wire version. Errors: CharonError."""

    async def send(self, messages: Iterable[ha.HaMessage]) -> None:
        """Orders to charon. Errors: CharonError."""

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

    async def _toggle_soon(self, done: asyncio.Future[None]) -> None:
        side, loop = self._side, asyncio.get_running_loop()
        try:
            await asyncio.sleep(self._toggled + SOON - loop.time())
            await side.known.now()
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
