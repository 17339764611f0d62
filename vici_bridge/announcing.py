"""Tells relayed mobile nodes the addresses of this gateway, which serves them, so that they can come
themselves (I/O: the clock).

A relayed mobile node knows only the address of the gateway that relays it, so it is lost with that gateway's
host. charon announces the addresses that the SA does not use, and its own is one that the SA uses. So the
agent sends the list, some time after the move, as a request of the SA (RFC 4555, 3.6). What the mobile node
makes of it is its own decision: strongSwan goes on where it is, and tries these addresses when its path
fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ikectx.errors import BusyError, IkectxError
from ikectx.sa.name import SaName

from .host import CharonHost

log = logging.getLogger(__name__)

LOOK = 1.0
"""Seconds between two looks for mobile nodes that are due. One whose SA is busy is due again then."""


async def announce_to_relayed(
    host: CharonHost, after: float, announce: Callable[[SaName], Awaitable[None]]
) -> None:
    """Have `announce` tell each relayed mobile node, `after` seconds after it came, once."""
    while True:
        for sa in host.origins.unannounced(after):
            try:
                await announce(sa)
                log.info("%s: its mobile node knows the addresses of this gateway", sa)
            except BusyError:
                continue
            except IkectxError as error:
                log.warning("%s: its mobile node is not told the addresses of this gateway: %s", sa, error)
            try:
                host.origins.announced(sa)
            except IkectxError as error:
                log.error("%s: that its mobile node was told is not stored: %s", sa, error)
        await asyncio.sleep(LOOK)
