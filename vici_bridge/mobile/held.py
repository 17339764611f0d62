"""`HeldRequests`: a gateway's request from its new address waits until the agent is ready for it. I/O.

When charon has UPDATE_SA_ADDRESSES it makes its ESP SAs anew, and packets that are sent meanwhile are lost,
unless the agent has sheltered them before (`effects/shelter.py`). So the kernel holds the request
(`kernel/ike_queue.py`): `claim` takes it, and `end` gives it to charon. What nobody claims, because it is not
authentic or not about addresses, passes after `PATIENCE`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping

from ikectx.errors import KernelError, WireError
from ikectx.sa.context import Address, Endpoint
from ikectx.sa.name import SaName
from ikectx.wire.ikev2 import IkeHeader, strip_marker
from mobike_ext.packet_io import udp_in
from vici_bridge.kernel.ike_queue import IkeQueue, Waiting

log = logging.getLogger("ikectx")

PATIENCE = 0.01
"""Seconds for which a request waits to be claimed: the agent hears it from the kernel at the same time."""
_Key = tuple[SaName, Endpoint, int]


class HeldRequests:
    """Requests from other places than the SA's gateway, of all watched SAs, from `start` to `close`."""

    def __init__(self) -> None:
        self._queue: IkeQueue | None = None
        self._held: dict[_Key, list[Waiting]] = {}
        self._remotes: Mapping[SaName, Address] = {}

    async def start(self) -> None:
        """Without nftables or its queue charon gets all requests at once, which is logged."""
        queue = None
        try:
            queue = IkeQueue()
            await asyncio.to_thread(queue.open)
        except KernelError as error:
            log.warning(
                "packets may be lost when a gateway gives this node's SA to another one: %s (%s)",
                error,
                error.hint,
            )
            if queue is not None:
                self._shut(queue)
            return
        self._queue = queue
        asyncio.get_running_loop().add_reader(queue.fileno(), self._read)

    def close(self) -> None:
        """Hold nothing any more."""
        if self._queue is not None:
            asyncio.get_running_loop().remove_reader(self._queue.fileno())
            self.end([one for held in self._held.values() for one in held])
            self._held.clear()
            self._shut(self._queue)
            self._queue = None

    @staticmethod
    def _shut(queue: IkeQueue) -> None:
        with contextlib.suppress(KernelError):  # without a listener the table does nothing
            queue.close()

    def watch(self, remotes: Mapping[SaName, Address]) -> None:
        """Hold requests of these SAs if they come from another address than this one. Raises nothing."""
        self._remotes = remotes
        if self._queue is None:
            return
        try:
            self._queue.watch(remotes)
        except KernelError as error:
            log.warning("requests of gateways to which an SA was given are not held: %s", error)

    def moved(self, sa: SaName, remote: Address) -> None:
        """Its gateway has this address now, as far as is known. Raises nothing."""
        self.watch({**self._remotes, sa: remote})

    def claim(self, sa: SaName, source: Endpoint, message_id: int) -> list[Waiting]:
        """The datagrams that wait and may be this request; empty: charon has had it. `end` must follow."""
        key = (sa, source, message_id)
        self._read()
        return self._held.pop(key, [])

    def end(self, held: Iterable[Waiting]) -> None:
        """charon gets them."""
        for one in held:
            if self._queue is not None:
                self._queue.let_pass(one)

    def _read(self) -> None:
        if self._queue is None:
            return
        for waiting in self._queue.read():
            key = name_of(waiting)
            if key is None:
                self._queue.let_pass(waiting)
                continue
            self._held.setdefault(key, []).append(waiting)
            asyncio.get_running_loop().call_later(PATIENCE, self._pass, key, waiting)

    def _pass(self, key: _Key, held: Waiting) -> None:
        """Nobody has claimed it."""
        if held in self._held.get(key, ()):
            self._held[key].remove(held)
            if not self._held[key]:
                del self._held[key]
            self.end([held])


def name_of(waiting: Waiting | None) -> _Key | None:
    """The request's SA, source and message ID; None: it is none."""
    found = None if waiting is None else udp_in(waiting.packet)
    if found is None:
        return None
    datagram, local, source = found
    try:
        header = IkeHeader.parse(strip_marker(datagram, local, source))
    except WireError:
        return None
    return SaName(header.spi_i, header.spi_r), source, header.message_id
