"""`Reloads`: a reloaded firewall (`nft flush ruleset`) removes the tables of the agent: they are made again.

SAs that were muted are muted again, mobile nodes are relayed again, and users are kept from the HA addresses
again. Until then, some hundredths of a
second, the kernel notes no message IDs; charon reports those to the agent, so no SA is in doubt by that. I/O.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ikectx.errors import KernelError
from vici_bridge.away.passing import Passing
from vici_bridge.doubts import Doubts
from vici_bridge.kernel import ha_users, message_ids, mute, nat_relay
from vici_bridge.kernel.kernel_events import KernelEvents, table_removals

log = logging.getLogger(__name__)


class Reloads:
    """`spawn` runs a coroutine in the background."""

    def __init__(
        self,
        muted: mute.Mute,
        doubts: Doubts,
        passing: Passing,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._mute = muted
        self._passing = passing
        self._doubts = doubts
        self._spawn = spawn
        self._turn = asyncio.Lock()
        self._events: KernelEvents | None = None
        self.users: ha_users.HaUsers | None = None
        """Who may send to the HA addresses; None: everybody."""

    def watch(self) -> None:
        """From now on. If the kernel does not let the agent listen, that is logged."""
        try:
            self._events = table_removals(
                (mute.TABLE, message_ids.TABLE, nat_relay.TABLE, ha_users.TABLE), self._ports, self._removed
            )
        except KernelError as error:
            log.warning("a reload of the firewall will be noticed only by the next freeze: %s", error)

    def close(self) -> None:
        """Stop."""
        if self._events is not None:
            self._events.close()

    def _ports(self) -> tuple[int, ...]:
        return (self._mute.port, self._doubts.noted.port, self._passing.port)

    def _removed(self) -> None:
        self._spawn(self._make_again())

    async def _make_again(self) -> None:
        async with self._turn:
            stood = await self._tried(asyncio.to_thread(self._mute.prepare))
            stood &= await self._tried(self._doubts.again())
            if self.users is not None:
                stood &= await self._tried(asyncio.to_thread(self.users.again))
            await self._tried(asyncio.to_thread(self._passing.again))
            if not stood:
                log.warning("somebody removed nftables rules of this agent (a reload?): they are back")

    @staticmethod
    async def _tried(again: Awaitable[bool | None]) -> bool:
        """Whether the table was there. One that cannot be made keeps no other from being made."""
        try:
            return await again is not False
        except KernelError as error:
            log.error("nftables rules of this agent were removed and cannot be made again: %s", error)
            return True
