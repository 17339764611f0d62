"""`Segments`: all of charon's SAs become PASSIVE, or ESTABLISHED again, at once. I/O.

The ha plugin knows no single SA, only segments (strongSwan 5.9.8 to 6.0.6). So one toggle activates all SAs
that came into a segment until then, and restarts the timers of each of its SAs: 60 ms of charon's for 2,000.
With `segment_count = 16` it is for a sixteenth of them. What that needs to know of charon costs no
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
from ikectx.sa.context import Address
from ikectx.sa.name import SaName
from vici_bridge.ha import messages as ha
from vici_bridge.ha.segment import ALL, segment_of

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

    def __init__(self, side: Side, count: int) -> None:
        """`count`: how many there are (`segment_count`); 0: that is not known."""
        self._side = side
        self._count = count
        self._toggle: asyncio.Future[None] | None = None
        self._toggled = -math.inf
        """When the last toggle was, by the event loop's clock."""
        self._wanted: set[int] = set()
        """Segments that the next toggle is for."""
        self._passive: dict[SaName, int] = {}
        """SAs that came in since the last toggle of their segment."""
        self._active: set[SaName] = set()
        """SAs that a toggle has activated, and that nobody has asked for since."""

    def came(self, sa: SaName, peer: Address) -> None:
        """This SA was just installed, PASSIVE, with its peer at that address; the next toggle of its segment
        activates it, whoever wants that."""
        self._active.discard(sa)
        self._passive[sa] = segment_of(peer, self._count)

    def gone(self, sa: SaName) -> None:
        """This SA is deleted."""
        self._active.discard(sa)
        self._passive.pop(sa, None)

    @trace.spanned("activate segment")
    async def activate(self, sa: SaName | None = None) -> None:
        """Make every PASSIVE SA ESTABLISHED: TAKE, then DROP. Calls close together share one toggle.

        `sa`: the SA that is to become active, and with it those of its segment, if it came to this agent;
        nothing is done if a toggle since it came was for another one.

        Between the two all these SAs are PASSIVE for some milliseconds, and charon 6.0.1 and later destroys
        half-open ones, so this waits for a moment without any (2 s at most).
        """
        if sa is None or sa not in self._active:
            self._wanted.add(ALL if sa is None else self._passive.get(sa, ALL))
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
        await self._side.send([ha.segment_drop(version, ALL), ha.segment_take(version, ALL)])

    async def _none_half_open(self) -> None:
        """Until no SA is half-open, but 2 s at most."""
        for _ in range(20):
            if not await self._side.half_open():
                return
            await asyncio.sleep(0.1)

    async def _toggle_soon(self, done: asyncio.Future[None]) -> None:
        side, loop, activated = self._side, asyncio.get_running_loop(), dict[SaName, int]()
        try:
            await asyncio.sleep(self._toggled + SOON - loop.time())
            await side.known.now()
            await self._none_half_open()
            version = await side.version()
            self._toggle, self._toggled = None, loop.time()  # later calls wait for the next toggle
            wanted, self._wanted = {ALL} if ALL in self._wanted else self._wanted, set()
            for sa, segment in list(self._passive.items()):
                if wanted & {ALL, segment}:
                    activated[sa] = self._passive.pop(sa)
            self._active |= activated.keys()
            await side.send(
                [
                    order(version, segment)
                    for segment in sorted(wanted)
                    for order in (ha.segment_take, ha.segment_drop)
                ]
            )
            done.set_result(None)
        except IkectxError as error:
            self._toggle = None
            for sa in self._active & activated.keys():  # the next one is for these, too
                self._active.discard(sa)
                self._passive[sa] = activated[sa]
            done.set_exception(error)
        except BaseException:
            # callers must not wait for ever
            self._toggle = None
            done.cancel()
            raise
