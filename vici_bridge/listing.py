"""`Listing`: charon's IKE_SAs as views, so that a gateway with thousands can still be asked often. I/O.

A transfer asks some twenty times how its SA is, and charon's `list-sas` names all of them: at a thousand SAs
that would be a tenth of a second each time. So one SA is asked for by its unique ID once that is known, else
looked for among octets that are not read; and whoever wants all of them while a listing goes on shares the
next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ikectx.ports import SaName

from .charon import SaView, sa_views
from .vici import Message


class Listing:
    """`ask`: charon's `list-sas`, as `CharonVici.list_sas`; it is called in other threads."""

    def __init__(self, ask: Callable[..., list[Message]]) -> None:
        self._ask = ask
        self._ids: dict[SaName, int] = {}
        """Unique IDs as charon told them last. It gives none a second time while it lives (5.9.8, 6.0.6)."""
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
            views = sa_views(await asyncio.to_thread(self._ask))
        self._ids = {view.spis: view.unique_id for view in reversed(views)}
        return views

    async def view(self, sa: SaName) -> SaView | None:
        """One of them by its SPIs. Errors: as `views`."""
        known = self._ids.get(sa)
        if known is not None:
            found = sa_views(await asyncio.to_thread(self._ask, ike_id=known))
            for view in found:
                if view.spis == sa:
                    return view
        found = sa_views(await asyncio.to_thread(self._ask, holding=sa[0].hex()))
        named = next((view for view in found if view.spis == sa), None)
        if named is None:
            self._ids.pop(sa, None)
        else:
            self._ids[sa] = named.unique_id
        return named


def _heard(listing: asyncio.Task[list[SaView]]) -> None:
    """Whoever waited may be gone; asyncio would complain of an error that nobody asked for."""
    if not listing.cancelled():
        listing.exception()
