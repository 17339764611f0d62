"""Connections between gateways, and CXTP messages on them (I/O); `tls` and `plain` make the connections.

A connection carries the messages of both directions, whoever dialled it.

RFC 4067 names a transfer by the mobile node's previous address only, so answers are assigned by order: on one
connection, the CTDRs for one mobile node come in the order of the PCTDs and CTDs for it, one for each. A CTDR
with a status of FPT REQUEST answers none of them: it refuses a CT-Req (ours; the RFC has no such answer).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Protocol

from . import trace
from .context import Address, IkeContext
from .cxtp import PORT, Ctd, Ctdr, Message, Pctd, StreamDecoder
from .errors import LinkError, WireError
from .identity import allows
from .mistakes import log_mistake
from .numbers import Fpt
from .rates import Bucket
from .transfer import Timing

log = logging.getLogger("ikectx.links")

READ_SIZE = 1 << 16
RATE = 500
"""Messages that are read from one connection in a second, with a burst of twice as many. When a gateway is
drained, both it and the new one hear two for each SA."""
LINKS = 2
"""Connections of one peer that are served: the one it uses, and an old one that it lost when its agent
ended."""
WINDOW = 64
"""Messages of one link that may be unhandled; the next is read when one of them has been handled. So many
mobile nodes of one peer can be moved at a time, because handling a message may take as long as the mobile
node takes to answer."""


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """Another gateway.

    `rights`: what it may do to us: "push" (move SAs here), "pull" (have them moved there), "packet" (the
    same, where it shows a packet of the MN). What the MN itself asks for needs none. `certificate_name`: the
    name its certificate holds, empty for `name`. `addresses`: those it serves MNs on, by which a CTAR with
    the RFC's token names it; `host` counts as well. `sources`: networks that it connects from, beside those.
    `connections`, `identities`: what SAs it may bring, by
    the connection's name and by the MN's identity (patterns as `identity.allows` has them); empty: any.
    """

    name: str
    host: str
    port: int = PORT
    rights: frozenset[str] = frozenset({"push"})
    certificate_name: str = ""
    addresses: tuple[Address, ...] = ()
    sources: tuple[IPv4Network | IPv6Network, ...] = ()
    connections: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()

    @property
    def certified(self) -> str:
        """The certificate name, in lower case."""
        return (self.certificate_name or self.name).lower()

    def may_not_bring(self, context: IkeContext) -> str:
        """Why it may not bring this SA here, whoever asked for it; empty: it may.

        If the mobile node has an EAP identity, that one counts, because nothing proves its IKE identity then.
        """
        if self.connections and context.connection not in self.connections:
            return f"{self.name} may not bring SAs of connection {context.connection} here"
        identity = context.remote_eap_id or context.remote_id
        if self.identities and not any(allows(pattern, identity) for pattern in self.identities):
            return f"{self.name} may not bring SAs of {identity} here"
        return ""


class Stream(Protocol):
    """A reliable stream of octets to a gateway that has proven its names."""

    @property
    def names(self) -> frozenset[str]:
        """The names the other side has proven, lower case."""

    @property
    def label(self) -> str:
        """The other side's address, for logs."""

    async def read(self) -> bytes:
        """Some octets, none at the end. Errors: LinkError."""

    async def write(self, data: bytes) -> None:
        """Errors: LinkError."""

    def close(self) -> None:
        """Close at once; twice is harmless."""


Dial = Callable[[PeerConfig], Awaitable[Stream]]
Accept = Callable[[Stream], Awaitable[None]]


def keep_alive(sock: Any, seconds: float) -> None:
    """Make TCP notice within about three times `seconds` that the other side has gone."""
    if sock is None:
        return
    whole = max(1, round(seconds))
    options = (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, whole),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, whole),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 3000 * whole),
    )
    for level, name, value in options:
        with contextlib.suppress(OSError):
            sock.setsockopt(level, name, value)


Answer = Ctdr | LinkError
Arrival = Callable[["Link", Message], Awaitable[None]]


class Link:
    """CXTP on one connection to one peer: cuts the stream into messages, assigns answers to requests.

    `arrived` is called, in order, with every message but the CTDRs that were asked for.
    """

    def __init__(self, stream: Stream, peer: PeerConfig, arrived: Arrival) -> None:
        self.peer = peer
        self.error: LinkError | None = None
        """Why the link is closed; None while it is open."""
        self._stream = stream
        self._arrived = arrived
        self._asked: defaultdict[Address, deque[asyncio.Future[Answer]]] = defaultdict(deque)
        self._writing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._touched = self._loop.time()
        self._rate = Bucket(RATE, self._loop.time())
        self._slowed = False
        self._unhandled = 0
        self._room = asyncio.Event()
        self._room.set()
        self.gone: asyncio.Future[LinkError] = self._loop.create_future()
        """Done when the link is closed."""

    @property
    def quiet(self) -> float:
        """Seconds since something was sent or received."""
        return self._loop.time() - self._touched

    @property
    def label(self) -> str:
        """The peer's name and address."""
        return f"{self.peer.name} at {self._stream.label}"

    async def room(self) -> None:
        """Wait until one more message may be passed on; its handler will call `handled`."""
        await self._room.wait()
        self.not_handled()

    def not_handled(self) -> None:
        """A message that was handled in part waits for another turn: its handler will call `handled`
        again."""
        self._unhandled += 1
        if self._unhandled >= WINDOW:
            self._room.clear()

    def handled(self) -> None:
        """A message that was counted by `room` has been handled."""
        self._unhandled -= 1
        if self._unhandled < WINDOW:
            self._room.set()

    async def send(self, message: Message) -> int:
        """Send a message; returns its octets. Errors: LinkError."""
        data = message.serialize()
        async with self._writing:
            trace.message("sent", type(message).__name__, self.peer.name, len(data))
            await self._write(data)
        return len(data)

    async def _write(self, data: bytes) -> None:
        if self.error is not None:
            raise self.error
        self._touched = self._loop.time()
        try:
            await self._stream.write(data)
        except LinkError as error:
            self.close(error)
            raise

    async def ask(
        self, message: Pctd | Ctd, again: asyncio.Future[Answer] | None = None
    ) -> tuple[int, asyncio.Future[Answer]]:
        """Send a message that needs an answer: its octets, and a future of the CTDR (or of the link's end).

        `again`: the future of the same message, asked before on this link; any answer to either resolves it.
        A caller that stops waiting leaves the future alone, because the answer that comes for it still
        counts.
        """
        future = again or asyncio.get_running_loop().create_future()
        data = message.serialize()
        async with self._writing:  # so that the order of asking is the order on the wire
            if self.error is not None:
                raise self.error
            self._asked[message.mn].append(future)
            trace.message("sent", type(message).__name__, self.peer.name, len(data))
            await self._write(data)
        return len(data), future

    async def run(self) -> None:
        """Read until the end of the connection, then close. Raises nothing."""
        decoder = StreamDecoder()
        try:
            while data := await self._stream.read():
                self._touched = self._loop.time()
                for message in decoder.feed(data):
                    trace.message("received", type(message).__name__, self.peer.name)
                    await self._pace()
                    if not (isinstance(message, Ctdr) and self._answered(message)):
                        await self._arrived(self, message)
                    if self.error is not None:
                        return
                if decoder.error is not None:
                    raise decoder.error
                await asyncio.sleep(0)  # other tasks get their turn even if a peer sends without end
            self.close(
                LinkError(
                    f"{self.label} closed the connection",
                    hint="its log says why, if it refused this gateway's certificate or name",
                )
            )
        except WireError as error:
            log.warning("%s sent what is not CXTP, the connection is closed: %s", self.label, error)
            self.close(LinkError(f"{self.label} sent what is not CXTP: {error}"))
        except LinkError as error:
            self.close(error)
        except asyncio.CancelledError:
            self.close(LinkError(f"the connection to {self.label} was closed here"))
            raise
        except Exception as error:
            # without a reader the peer would wait for ever
            log_mistake(log, f"a message from {self.label}", error)
            self.close(LinkError(f"the connection to {self.label} ended by a {type(error).__name__} here"))

    async def _pace(self) -> None:
        """Read a peer that says too much more slowly: its own TCP then makes it wait."""
        self._rate.fill(self._loop.time())
        self._rate.level -= 1
        if self._rate.level >= 0:
            return
        if not self._slowed:
            self._slowed = True
            log.warning("%s sends more than %d messages a second and is read more slowly", self.label, RATE)
        await asyncio.sleep(-self._rate.level / RATE)

    def _answered(self, message: Ctdr) -> bool:
        """True if it answers a PCTD or CTD of ours."""
        asked = self._asked.get(message.mn)
        if not asked or any(status.fpt == Fpt.REQUEST for status in message.statuses):
            return False
        future = asked.popleft()
        if not asked:
            del self._asked[message.mn]
        if not future.done():
            future.set_result(message)
        return True

    def close(self, error: LinkError) -> None:
        """Close with this error, which all that wait for answers get. The first one stays."""
        if self.error is not None:
            return
        self.error = error
        self.gone.set_result(error)
        self._stream.close()
        for asked in self._asked.values():
            for future in asked:
                if not future.done():
                    future.set_result(error)
        self._asked.clear()


class Links:
    """The open links to each peer, whoever dialled them: each carries transfers in both directions.

    A link is dialled when it is needed and none is open. The side that dialled closes it when nothing was
    sent on it and nobody has used it for `timing.idle`.
    """

    def __init__(self, dial: Dial, timing: Timing, arrived: Arrival) -> None:
        self._dial = dial
        self._timing = timing
        self._arrived = arrived
        self._dialled: dict[str, Link] = {}
        self._accepted: defaultdict[str, list[Link]] = defaultdict(list)
        self._dialling: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[None]] = set()
        self._users: defaultdict[str, int] = defaultdict(int)
        self._waits: dict[str, asyncio.TimerHandle] = {}

    def connected(self, name: str) -> bool:
        """True if a link to that peer is open."""
        return name in self._dialled or bool(self._accepted.get(name))

    async def get(self, peer: PeerConfig) -> Link:
        """An open link, or a new one. Errors: LinkError."""
        async with self._dialling[peer.name]:
            link = self._open(peer.name)
            if link is not None:
                return link
            with trace.span("connect", "part"):
                stream = await self._dial(peer)
            link = Link(stream, peer, self._arrived)
            self._dialled[peer.name] = link
            task = asyncio.create_task(self._run(link), name=f"ikectx link to {peer.name}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return link

    def _open(self, name: str) -> Link | None:
        link = self._dialled.get(name)
        if link is not None and link.error is None:
            return link
        # the other side may be about to close a link that was quiet for long
        lively = self._timing.idle / 2
        return next((each for each in self._accepted[name] if not each.error and each.quiet < lively), None)

    async def serve(self, stream: Stream, peer: PeerConfig) -> None:
        """Use a connection that the peer has dialled, until it ends.

        If there are `LINKS` already, the one that was quiet for longest is closed, because a peer that lost
        its power must get in before TCP has noticed. A peer that dials without end harms only its own links.
        """
        link = Link(stream, peer, self._arrived)
        log.info("%s has connected", link.label)
        open_ = [each for each in self._accepted[peer.name] if each.error is None]
        if len(open_) >= LINKS:
            quietest = max(open_, key=lambda each: each.quiet)
            quietest.close(LinkError(f"{peer.name} has connected {LINKS} times since"))
        self._accepted[peer.name].append(link)
        try:
            await link.run()
        finally:
            self._accepted[peer.name].remove(link)
            log.info("%s has gone: %s", peer.name, link.error)

    @contextlib.contextmanager
    def in_use(self, peer: PeerConfig) -> Iterator[None]:
        """While one of these is held, the link does not count as idle."""
        self._users[peer.name] += 1
        try:
            yield
        finally:
            self._users[peer.name] -= 1
            self._wait(peer.name, self._timing.idle)

    def _wait(self, name: str, seconds: float) -> None:
        if not self._users[name] and name not in self._waits:  # else a flood leaves a timer for each message
            with contextlib.suppress(RuntimeError):
                self._waits[name] = asyncio.get_running_loop().call_later(seconds, self._idle, name)

    def _idle(self, name: str) -> None:
        del self._waits[name]
        link = self._dialled.get(name)
        if link is None or self._users[name]:
            return
        left = self._timing.idle - link.quiet
        if left > 0.001:
            self._wait(name, left)
        else:
            link.close(LinkError(f"the connection to {name} was idle"))

    async def _run(self, link: Link) -> None:
        try:
            await link.run()
        finally:
            if self._dialled.get(link.peer.name) is link:
                del self._dialled[link.peer.name]

    async def close(self) -> None:
        """Close all."""
        for links in list(self._accepted.values()):
            for link in list(links):
                link.close(LinkError("this gateway stops"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
