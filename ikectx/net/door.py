"""Listening for connections of peers: which are accepted, and how many at a time (I/O).

A connection from an address that belongs to no peer is closed before anything is read. The connections that
have not proven their identity yet are limited, in all and from one source, and never use the descriptors that
the agent needs for the work that it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import resource
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable

from ikectx.errors import LinkError
from ikectx.mistakes import log_mistake
from ikectx.rates import RateLimit
from ikectx.sa.context import Address

from .links import Accept, Stream
from .neighbours import plain_address

log = logging.getLogger("ikectx.net.door")

BACKLOG = 64
HANDSHAKES = 64
"""Connections, from all sources, that are accepted and have not proven their identity yet."""
HANDSHAKES_OF_ONE = 8
"""The same for one source address: a peer dials once, and again after its agent was restarted."""
RATE, RATE_OF_ONE = 50.0, 10.0
"""Connections accepted per second, from all sources and from one: a TLS handshake takes some 3 ms."""
RESERVE = 128
"""Descriptors that connections from outside leave free; at most a quarter of the limit. Each transfer that
is under way takes up to six, for raw sockets and for an updown script."""
PAUSE = 1.0
"""Seconds without accepting when there is no file descriptor or memory for it."""
AT_ONCE = 16
"""Connections that are accepted before the event loop does something else."""
_ABORT = struct.pack("=ii", 1, 0)


class Handshakes:
    """Counts connections that have not proven their identity yet, for all doors of one gateway."""

    def __init__(self, knows: Callable[[Address], bool]) -> None:
        """`knows`: whether an address is a peer's."""
        self._knows = knows
        self._open: Counter[Address] = Counter()
        self._rate = RateLimit(RATE, RATE_OF_ONE, random.SystemRandom().random)

    def begin(self, source: Address, now: float) -> str:
        """Count one more; returns the reason not to accept it, or nothing. `now`: seconds, monotonic."""
        if not self._knows(source):
            return "no [[peer]] connects from there (`address`, `connects_from`)"
        if self._open[source] >= HANDSHAKES_OF_ONE:
            return f"{HANDSHAKES_OF_ONE} connections from there have not proven yet who they are"
        if self._open.total() >= HANDSHAKES:
            return f"{HANDSHAKES} connections have not proven yet who they are"
        if not self._rate.allows(source, now):
            return "too many connections have come in the last seconds"
        self._open[source] += 1
        return ""

    def end(self, source: Address) -> None:
        """The connection has proven its identity, or was closed."""
        self._open[source] -= 1
        if not self._open[source]:
            del self._open[source]


def descriptors() -> int:
    """Descriptors that connections from outside may use, together with all others of the process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit - min(RESERVE, limit // 4)


class Door:
    """A listening socket. A connection is proven by `prove` (which closes it if that fails), then given to
    `accept`."""

    def __init__(
        self,
        sock: socket.socket,
        handshakes: Handshakes,
        prove: Callable[[socket.socket], Awaitable[Stream | None]],
        accept: Accept,
    ) -> None:
        self.sockets = (sock,)
        self._handshakes = handshakes
        self._prove = prove
        self._accept_stream = accept
        self._tasks: set[asyncio.Task[None]] = set()
        self._proving: set[asyncio.Task[None]] = set()
        self._later: asyncio.TimerHandle | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The address that it listens on, with the port that the system chose for port 0. Errors: OSError
        once it is closed."""
        (sock,) = self.sockets
        host, port, *_ = sock.getsockname()
        return str(host), int(port)

    async def start_serving(self) -> None:
        """Begin to accept."""
        self._listen()

    def _listen(self) -> None:
        (sock,) = self.sockets
        asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                connection, name = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                reason = os.strerror(error.errno) if error.errno else str(error)
                self._rest(sock, f"cannot accept a connection: {reason}")
                return
            # the kernel gives the lowest free number: all below it are in use
            if connection.fileno() >= descriptors():
                _abort(connection)
                self._rest(
                    sock,
                    f"{descriptors()} file descriptors are in use, the rest is kept for transfers: "
                    "no connection is accepted (LimitNOFILE of the service)",
                )
                return
            source = plain_address(name)
            refused = self._handshakes.begin(source, asyncio.get_running_loop().time())
            if refused:
                log.warning("turned a connection from %s away: %s", source, refused)
                _abort(connection)
                continue
            connection.setblocking(False)
            task = asyncio.get_running_loop().create_task(self._serve(connection, source))
            self._tasks.add(task)
            self._proving.add(task)
            task.add_done_callback(self._ended)

    def _rest(self, sock: socket.socket, why: str) -> None:
        """Stop accepting for a while, because the socket stays readable and the loop would call without
        end."""
        log.error("%s; again in %g s", why, PAUSE)
        loop = asyncio.get_running_loop()
        loop.remove_reader(sock.fileno())
        self._later = loop.call_later(PAUSE, self._listen)

    async def _serve(self, connection: socket.socket, source: Address) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            stream = await self._prove(connection)
        finally:
            self._handshakes.end(source)
            self._proving.discard(task)
        if stream is not None:
            await self._accept_stream(stream)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log_mistake(log, "a connection from outside", error)

    def close(self) -> None:
        """Stop listening, and close connections that are not proven; the others go on."""
        (sock,) = self.sockets
        if self._later is not None:
            self._later.cancel()
        if sock.fileno() >= 0:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()
        for task in list(self._proving):
            task.cancel()


def _abort(connection: socket.socket) -> None:
    """Close with a reset, so that the kernel need not wait for the other side."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    connection.close()


def listen_on(sock: socket.socket, address: Address, port: int) -> socket.socket:
    """Bind a fresh socket and listen. Errors: LinkError; the socket is closed then."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((str(address), port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise LinkError(
            f"cannot listen on {address}:{port}: {reason}",
            hint="another agent may be running, or the address may not be here yet",
        ) from None
    return sock
