"""When a non-blocking socket can be read or written (I/O).

asyncio's transports buffer octets, on the way in and on the way out: 256 KiB for each TLS connection, which
only the garbage collector gives back. So streams between gateways use their own sockets.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable


class Readiness:
    """Waits for one socket, for any number of tasks; made while the event loop runs."""

    def __init__(self, sock: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._number = sock.fileno()
        self._readers: set[asyncio.Future[None]] = set()
        self._writers: set[asyncio.Future[None]] = set()
        self.closed = False
        """True from `close` on; then nothing waits any more."""

    async def readable(self) -> None:
        """Wait until there is something to read, or `close` is called."""
        await self._wait(self._readers, self._loop.add_reader, self._loop.remove_reader)

    async def writable(self) -> None:
        """Wait until there is room to write, or `close` is called."""
        await self._wait(self._writers, self._loop.add_writer, self._loop.remove_writer)

    async def _wait(
        self,
        waiting: set[asyncio.Future[None]],
        add: Callable[..., object],
        remove: Callable[[int], object],
    ) -> None:
        if self.closed:
            return
        future: asyncio.Future[None] = self._loop.create_future()
        if not waiting:
            add(self._number, _wake, waiting)
        waiting.add(future)
        try:
            await future
        finally:
            waiting.discard(future)
            if not waiting and not self.closed:  # else the number may be another socket's by now
                remove(self._number)

    def close(self) -> None:
        """Call this before the socket is closed; twice is harmless."""
        if self.closed:
            return
        self.closed = True
        if not self._loop.is_closed():
            self._loop.remove_reader(self._number)
            self._loop.remove_writer(self._number)
        for waiting in (self._readers, self._writers):
            _wake(waiting)


def _wake(waiting: set[asyncio.Future[None]]) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(None)
