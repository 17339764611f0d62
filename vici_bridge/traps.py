"""`Traps`: policies by which charon begins an SA with the first packet (`start_action = trap`), which are out
while the SA is elsewhere. I/O.

A packet for the mobile node that still arrives here would have charon connect to it anew, and the mobile node
would give up the SA that moved (INITIAL_CONTACT). So the trap of a CHILD_SA that leaves is uninstalled before
charon lets the SA go, and installed again when the SA is gone at the other gateway, or back. What was taken
out is stored, because charon installs its traps anew when its configuration is loaded.

VICI: list-policies, install, uninstall (strongSwan 5.9.8 to 6.1).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Collection
from typing import Protocol

from ikectx.engine.ports import Store
from ikectx.errors import CharonError, IkectxError, StoreError, WireError, reading
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName

log = logging.getLogger(__name__)

_KIND = "trap"
"""Kind of store entry, by connection and child: the SAs for which its trap was taken out. It is not in the
ledger, because a trap stays out through several transfers."""
_KNOWN_FOR = 10.0
"""Seconds for which charon's traps are known, because each SA that leaves asks for them."""
_PAUSE = 2.0
"""Seconds between two looks, while a trap is out."""

Trap = tuple[str, str]
"""Connection and child."""


class TrapPort(Protocol):
    """The part of charon's VICI socket that is needed here."""

    async def traps(self) -> list[Trap]: ...

    async def trap(self, connection: str, child: str, *, install: bool) -> None: ...


class Traps:
    """`elsewhere`: the SAs that are at another gateway now."""

    def __init__(self, store: Store, charon: TrapPort, elsewhere: Callable[[], Collection[SaName]]) -> None:
        self._store = store
        self._charon = charon
        self._elsewhere = elsewhere
        self._known: tuple[float, list[Trap]] = (float("-inf"), [])
        self._out: dict[Trap, set[str]] = {}
        for key, raw in store.items(_KIND):
            try:
                with reading("a trap that is out"):
                    connection, child = json.loads(key)
                    self._out[str(connection), str(child)] = {str(sa) for sa in json.loads(raw)}
            except StoreError:
                store.delete(_KIND, key)

    async def leave(self, context: IkeContext) -> None:
        """Take out the traps of this SA, which is about to be let go. Errors: CharonError, StoreError."""
        wanted = {(context.connection, child.name) for child in context.children}
        for trap in wanted & {*await self._traps(), *self._out}:
            self._keep(trap, self._out.get(trap, set()) | {context.spis.key})
            await self._charon.trap(*trap, install=False)
            log.info("%s/%s: its trap is out while the SA is at another gateway", *trap)

    async def _traps(self) -> list[Trap]:
        now = time.monotonic()
        if now - self._known[0] > _KNOWN_FOR:
            self._known = now, await self._charon.traps()
        return self._known[1]

    async def watch(self) -> None:
        """Put traps back whose SAs are gone elsewhere, or back; take out those that charon has installed
        anew."""
        while True:
            await asyncio.sleep(_PAUSE)
            if self._out:
                try:
                    await self._look()
                except (CharonError, WireError):
                    continue  # charon does not run
                except IkectxError as error:
                    log.warning("traps cannot be looked after now: %s", error)

    async def _look(self) -> None:
        away = {sa.key for sa in self._elsewhere()}
        there = set(await self._charon.traps())
        for trap in list(self._out):
            if self._out[trap] & away:
                if trap in there:
                    await self._charon.trap(*trap, install=False)
            elif trap not in there:
                await self._charon.trap(*trap, install=True)
                log.info("%s/%s: its trap is back", *trap)
            # an SA may have begun to leave meanwhile: its trap is out, or taken out with the next look
            away = {sa.key for sa in self._elsewhere()}
            if (left := self._out[trap] & away) != self._out[trap]:
                self._keep(trap, left)

    def _keep(self, trap: Trap, sas: set[str]) -> None:
        key = json.dumps(trap)
        if sas:  # the store first: where the disk is full it is tried again
            self._store.put(_KIND, key, json.dumps(sorted(sas)).encode())
            self._out[trap] = sas
        else:
            self._store.delete(_KIND, key)
            self._out.pop(trap, None)
