"""`Listing`: charon's IKE_SAs as views, so that a gateway with thousands can still be asked often. I/O.

A transfer asks some twenty times how its SA is, and charon's `list-sas` names all of them: to read a thousand
takes a tenth of a second. So one SA is asked for by its unique ID once that is known, else looked for among
octets that are not read; whoever wants all of them while a listing goes on shares the next one; and what
charon says of an SA in the same octets as last time (which hold its age in seconds) is not read again.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from ikectx.name import SaName

from .charon import SaView, sa_views
from .vici_codec import parse_message


class _Reader(Protocol):
    def __call__(self, octets: bytes, /) -> SaView | None: ...


class _Ask(Protocol):
    """`CharonVici.read_sas`."""

    def __call__(self, read: _Reader, *, ike_id: int | None = None) -> list[SaView | None]: ...


class _Run(Protocol):
    """`asyncio.to_thread`, or the like."""

    async def __call__(
        self, call: _Ask, read: _Reader, /, *, ike_id: int | None = None
    ) -> list[SaView | None]: ...


class Listing:
    """`ask`: called in other threads (by `run`), one call at a time or several."""

    def __init__(self, ask: _Ask, run: _Run | None = None) -> None:
        self._ask = ask
        self._run = run or asyncio.to_thread
        self._ids: dict[SaName, int] = {}
        """Unique IDs as charon told them last. It gives none a second time while it lives (5.9.8, 6.0.6)."""
        self._read: dict[bytes, SaView | None] = {}
        """What charon said last of all SAs, and what that means."""
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[list[SaView]] | None = None
        """The listing that has not begun yet."""

    async def views(self) -> list[SaView]:
        """All IKEv2 SAs, as they are after this call or later. Errors: CharonError, WireError."""
        if self._next is None:
            self._next = asyncio.create_task(self._all())
            self._next.add_done_callback(_heard)
        return list(await asyncio.shield(self._next))

    async def _all(self) -> list[SaView]:
        async with self._turn:
            self._next = None  # what begins now is not what somebody asks for later
            before, now = self._read, dict[bytes, SaView | None]()

            def read(octets: bytes) -> SaView | None:
                now[octets] = view = before[octets] if octets in before else _view(octets)
                return view

            views = await self._asked(read)
            self._read = now
        self._ids = {view.spis: view.unique_id for view in reversed(views)}
        return views

    async def view(self, sa: SaName) -> SaView | None:
        """One of them by its SPIs. Errors: as `views`."""
        known = self._ids.get(sa)
        found = [] if known is None else await self._asked(_view, known)
        if not any(view.spis == sa for view in found):
            wanted = sa[0].hex().encode()
            found = await self._asked(lambda octets: _view(octets) if wanted in octets else None)
        for view in found:
            if view.spis == sa:
                self._ids[sa] = view.unique_id
                return view
        self._ids.pop(sa, None)
        return None

    async def _asked(self, read: _Reader, ike_id: int | None = None) -> list[SaView]:
        found = await self._run(self._ask, read, ike_id=ike_id)
        return [view for view in found if view is not None]


def _view(octets: bytes) -> SaView | None:
    """From charon's message about one SA; None for one of IKEv1. Errors: WireError."""
    told = parse_message(octets, foreign=True)
    return next(iter(sa_views([{**body, "name": name} for name, body in told.items()])), None)


def _heard(listing: asyncio.Task[list[SaView]]) -> None:
    """Whoever waited may be gone; asyncio would complain of an error that nobody asked for."""
    if not listing.cancelled():
        listing.exception()
