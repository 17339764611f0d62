"""`Listing`: charon's IKE_SAs as views, fast enough for a gateway with thousands of SAs. I/O.

A transfer asks several times for the state of its SA, and charon's `list-sas` reports all of them: to parse a
thousand takes a tenth of a second. So one SA is asked for by its unique ID once that is known, else it is
searched in octets that are not parsed. Those that several callers want in one round of the event loop are
asked for at once. Callers that want all SAs while a listing is under way share the next one. An SA that
charon reports with the same octets as last time (which contain its age in seconds) is not parsed again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

from ikectx.sa.name import SaName
from ikectx.together import Crowd, Together

from .codec import Message, parse_message
from .views import SaView, aged, sa_views

_NEVER = -math.inf
MOMENT = 1.0
"""Seconds for which an answer of charon's will do for who looks again before anything depends on it."""


class _ReadSa(Protocol):
    def __call__(self, octets: bytes, /) -> SaView | None: ...


class _Ask(Protocol):
    """`Charon.read_sas`."""

    async def __call__(self, read: _ReadSa, *, ike_ids: Sequence[int] = ()) -> list[SaView | None]: ...


class Listing:
    """charon's IKE_SAs, as `ask` tells them."""

    def __init__(self, ask: _Ask) -> None:
        self._ask = ask
        self.crowd = crowd = Crowd()
        """The SAs that have a step under way, and may be asked for together."""
        self._read: dict[bytes, SaView | None] = {}
        """charon's last message about each SA, and its view."""
        self._seen: dict[SaName, tuple[float, SaView]] = {}
        """Each SA's last view, and the loop's time when it was asked for. charon never uses a unique ID again
        while it runs (5.9.8, 6.0.6)."""
        self._told: dict[SaName, float] = {}
        """When charon told last that something about an SA has changed or begun, by the loop's clock."""
        self._highest = 0
        """The highest unique ID that was seen; 0: none was."""
        self._asking = Together(self._ask_for, crowd)
        self._searching = Together(self._search_for, crowd)
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[list[SaView]] | None = None
        """The listing that has not begun yet."""

    async def views(self) -> list[SaView]:
        """All IKEv2 SAs, as of this call or later. Errors: CharonError, WireError."""
        if self._next is None:
            self._next = asyncio.create_task(self._all())
            self._next.add_done_callback(_heard)
        return list(await asyncio.shield(self._next))

    async def _all(self) -> list[SaView]:
        async with self._turn:
            self._next = None  # a listing that has begun is too old for later callers
            before, now, highest = self._read, dict[bytes, SaView | None](), self._highest
            asked_at = asyncio.get_running_loop().time()

            def read(octets: bytes) -> SaView | None:
                now[octets] = view = before[octets] if octets in before else _view(octets)
                return view

            views = await self._asked(read)
            self._read = now
        # numbers that were learnt meanwhile are of SAs that may have come up too late for the list
        late = {sa: known for sa, known in self._seen.items() if known[1].unique_id > highest}
        self._seen = late | {view.spis: (asked_at, view) for view in reversed(views)}
        self._told = {sa: at for sa, at in self._told.items() if sa in self._seen}
        self._highest = max(self._highest, *(view.unique_id for view in views), 0)
        return views

    def recent(self, sa: SaName) -> SaView | None:
        """One of charon's SAs, if it was asked for within `MOMENT`, alone or with all, and nothing was told
        of it since."""
        age, view = self._last(sa)
        return view if age <= MOMENT else None

    def unchanged(self, sa: SaName) -> SaView | None:
        """One of charon's SAs as it was when it was asked for, however long ago, but with the times that it
        has left now, if nothing was told of it since."""
        age, view = self._last(sa)
        return None if view is None else aged(view, int(age))

    def _last(self, sa: SaName) -> tuple[float, SaView | None]:
        """How long ago it was asked for (seconds), and what came of it, if nothing was told of it since."""
        asked_at, view = self._seen.get(sa, (_NEVER, None))
        outdated = asked_at <= self._told.get(sa, _NEVER)
        return asyncio.get_running_loop().time() - asked_at, None if outdated else view

    def outdate(self, sas: Iterable[SaName]) -> None:
        """charon has told of these. What was asked about them before is not recent any more, also if the
        answer is still to come; their unique IDs stay."""
        self._told.update(dict.fromkeys(sas, asyncio.get_running_loop().time()))

    def heard(self, told: Message) -> list[SaView]:
        """The IKE_SAs that came up by charon's event `ike-updown` or `ike-rekey`, without their CHILD_SAs.
        Their unique IDs need not be guessed. Errors: WireError."""
        views: list[SaView] = []
        for name, body in told.items():
            if isinstance(body, dict) and ("up" in told or "new" in body):
                views += sa_views([{**body.get("new", body), "name": name}])
        for view in views:
            self._seen.setdefault(view.spis, (_NEVER, view))
            self._highest = max(self._highest, view.unique_id)
        return views

    def gone(self, sa: SaName) -> None:
        """charon does not have this SA any more."""
        self._seen.pop(sa, None)
        self._told.pop(sa, None)

    async def view(self, sa: SaName, *, search: bool = True) -> SaView | None:
        """One of charon's SAs by its SPIs. Errors: as `views`.

        It has one unique ID as long as charon has it. charon numbers its SAs one after the other, so that
        those that just came in probably have the next numbers. `search`: else look for it among all.
        """
        if sa not in self._seen and not self._highest:
            return await self._searching.join(sa)  # there is no number to go on from
        view, misled = await self._asking.join(sa)
        # one that had a number is not there any more, unless charon began anew
        if view is None and (search if misled is None else misled):
            return await self._searching.join(sa)
        return view

    async def _ask_for(self, sas: Sequence[SaName]) -> Sequence[tuple[SaView | None, bool | None]]:
        """The view of each SA, and whether another one has its number; None: it has no number that is known
        (any more: a listing may have ended since it was asked for)."""
        asked_at = asyncio.get_running_loop().time()
        numbers = {sa: self._seen[sa][1].unique_id for sa in sas if sa in self._seen}
        new = len(set(sas) - numbers.keys()) if self._highest else 0
        guesses = range(self._highest + 1, self._highest + 1 + new)
        found = await self._asked(_view, *dict.fromkeys([*numbers.values(), *guesses]))
        there = {view.unique_id for view in found}
        views = self._noted(found, asked_at)
        for sa in sas:
            if sa not in views:
                self._seen.pop(sa, None)
        return [(views.get(sa), numbers[sa] in there if sa in numbers else None) for sa in sas]

    async def _search_for(self, sas: Sequence[SaName]) -> Sequence[SaView | None]:
        """The views of those that are among all."""
        asked_at = asyncio.get_running_loop().time()
        wanted = {sa[0].hex().encode() for sa in sas}
        found = await self._asked(
            lambda octets: _view(octets) if any(spi in octets for spi in wanted) else None
        )
        views = self._noted(found, asked_at)
        return [views.get(sa) for sa in sas]

    def _noted(self, found: Sequence[SaView], asked_at: float) -> dict[SaName, SaView]:
        for view in found:
            self._highest = max(self._highest, view.unique_id)
            self._seen[view.spis] = asked_at, view
        return {view.spis: view for view in found}

    def forget(self) -> None:
        """charon begins anew, and numbers its SAs from one."""
        self._seen.clear()
        self._told.clear()
        self._highest = 0

    async def _asked(self, read: _ReadSa, *ike_ids: int) -> list[SaView]:
        found = await self._ask(read, ike_ids=ike_ids)
        return [view for view in found if view is not None]


def _view(octets: bytes) -> SaView | None:
    """From charon's message about one SA; None for one of IKEv1. Errors: WireError."""
    told = parse_message(octets, foreign=True)
    return next(iter(sa_views([{**body, "name": name} for name, body in told.items()])), None)


def _heard(listing: asyncio.Task[list[SaView]]) -> None:
    """Fetch the error of a listing that nobody waits for any more, because asyncio would complain
    otherwise."""
    if not listing.cancelled():
        listing.exception()
