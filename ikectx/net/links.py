"""Connections between gateways, and CXTP messages on them (I/O); `tls` and `plain` make the connections.

A connection carries the messages of both directions, whoever dialled it. What answers what is the engine's
to know (`engine.lines`): messages go out in the order in which they are given, and come in as they are read.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import socket
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Protocol

from ikectx import trace
from ikectx.errors import LinkError, WireError
from ikectx.mistakes import log_mistake
from ikectx.peer import PeerConfig
from ikectx.rates import Bucket
from ikectx.timing import Timing
from ikectx.wire.cxtp import Message, StreamDecoder

log = logging.getLogger("ikectx.links")

READ_SIZE = 1 << 16
BRIEF = 1.0
"""Seconds: a link that ends sooner was turned away by the peer, and is not dialled again at once."""
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


ArrivalHandler = Callable[["Link", Message], Awaitable[None]]
_numbers = itertools.count(1)


class Link:
    """CXTP on one connection to one peer: cuts the stream into messages.

    `arrived` is called with each, in order.
    """

    def __init__(self, stream: Stream, peer: PeerConfig, arrived: ArrivalHandler) -> None:
        self.number = next(_numbers)
        """By which the engine knows it."""
        self.peer = peer
        self.where = stream.label
        """Where the other side is."""
        self.error: LinkError | None = None
        """Why the link is closed; None while it is open."""
        self.ended = asyncio.Event()
        """Set when it is closed."""
        self._stream = stream
        self._arrived = arrived
        self._unsent: deque[tuple[str, bytes]] = deque()
        self._writing = False
        self._writer: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.made = self.heard = self._touched = self._loop.time()
        """When, by the event loop's clock, it was made, and something was received on it last."""
        self._rate = Bucket(RATE, self._loop.time())
        self._slowed = False
        self._unhandled = 0
        self._room = asyncio.Event()
        self._room.set()
        self.gone: Callable[[Link], None] | None = None
        """Called when the link is closed."""

    @property
    def quiet(self) -> float:
        """Seconds since something was sent or received."""
        return self._loop.time() - self._touched

    @property
    def age(self) -> float:
        """Seconds since it was made."""
        return self._loop.time() - self.made

    @property
    def label(self) -> str:
        """The peer's name and address."""
        return f"{self.peer.name} at {self.where}"

    async def room(self) -> None:
        """Wait until one more message may be passed on; its handler will call `handled`."""
        await self._room.wait()
        self._unhandled += 1
        if self._unhandled >= WINDOW:
            self._room.clear()

    def handled(self) -> None:
        """A message that was counted by `room` has been handled."""
        self._unhandled -= 1
        if self._unhandled < WINDOW:
            self._room.set()

    def send(self, message: Message, octets: bytes | None = None) -> None:
        """Send it when what was given before is sent; what cannot be sent closes the link.

        `octets`: the message, where somebody has serialized it already. Errors: LinkError, where the link is
        closed.
        """
        if self.error is not None:
            raise self.error
        self._touched = self._loop.time()
        self._unsent.append((type(message).__name__, message.serialize() if octets is None else octets))
        if not self._writing:
            self._writing = True
            self._writer = self._loop.create_task(self._write(), name=f"ikectx writes to {self.label}")

    async def _write(self) -> None:
        try:
            while self._unsent and self.error is None:
                messages = list(self._unsent)
                self._unsent.clear()
                for name, octets in messages:
                    trace.message("sent", name, self.peer.name, len(octets))
                await self._stream.write(b"".join(octets for _, octets in messages))
        except LinkError as error:
            self.close(error)
        finally:
            self._writing = False

    async def run(self) -> None:
        """Read until the end of the connection, then close. Raises nothing."""
        decoder = StreamDecoder()
        try:
            while data := await self._stream.read():
                self.heard = self._touched = self._loop.time()
                for message in decoder.feed(data):
                    trace.message("received", type(message).__name__, self.peer.name)
                    await self._pace()
                    await self._arrived(self, message)
                    await self._heard()
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

    async def _heard(self) -> None:
        """Wait until the peer takes what it is sent: one that only asks would fill memory with answers."""
        while len(self._unsent) > WINDOW and self.error is None and self._writer is not None:
            await asyncio.wait({self._writer})

    def close(self, error: LinkError) -> None:
        """Close, for this reason. The first reason stays."""
        if self.error is not None:
            return
        self.error = error
        self._unsent.clear()
        self._stream.close()
        self._room.set()
        self.ended.set()
        if self.gone is not None:
            self.gone(self)


class Links:
    """The open links to each peer, whoever dialled them: each carries transfers in both directions.

    One is dialled when it is needed and none is there, or ahead (`keep`). Who dialled closes it when nothing
    was said on it and nobody needed it for `timing.idle`; `unused` says for how many seconds nobody did, by
    the peer's name.
    `opened` is called with each new link, and whether the peer dialled it, before anything is read.
    """

    def __init__(
        self,
        dial: Dial,
        timing: Timing,
        arrived: ArrivalHandler,
        opened: Callable[[Link, bool], None] = lambda link, accepted: None,
        unused: Callable[[str], float] = lambda name: math.inf,
    ) -> None:
        self._dial = dial
        self._timing = timing
        self._arrived = arrived
        self._opened = opened
        self._unused = unused
        self._dialled: dict[str, Link] = {}
        self._accepted: defaultdict[str, list[Link]] = defaultdict(list)
        self._dialling: dict[str, asyncio.Task[Link]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._kept: set[str] = set()

    def keep(self, peers: Iterable[PeerConfig]) -> None:
        """Have a link to each of these peers from now on, because dialling takes three round trips.

        One that nobody uses is made anew after `timing.renew`, so that certificates are proven again.
        """
        for peer in peers:
            if peer.name not in self._kept:
                self._kept.add(peer.name)
                self._begin(self._keep(peer), f"ikectx keeps a link to {peer.name}")

    async def _keep(self, peer: PeerConfig) -> None:
        tries = 0
        while True:
            try:
                link = await self.get(peer)
                used = self._timing.idle / 2 - (0 if self._dialled.get(peer.name) is link else link.quiet)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(used):
                        await link.ended.wait()
                problem = link.error if link.age < BRIEF else None
            except LinkError as error:
                problem = error
            if problem is None:
                tries = 0
                continue
            if tries == 0:
                log.info("no link to %s is kept up, it is dialled again and again: %s", peer.name, problem)
            await asyncio.sleep(self._timing.wait(tries))
            tries += 1

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def connected(self, name: str) -> bool:
        """True if a link to that peer is open."""
        return name in self._dialled or bool(self._accepted.get(name))

    async def get(self, peer: PeerConfig) -> Link:
        """An open link, or a new one. All who ask meanwhile get what one attempt comes to, because a silent
        peer would be dialled for each of them in turn. Who joins an attempt that fails asks once more, up to
        `timing.connect` after it came, because that one may have begun when the peer was not there yet.
        Errors: LinkError."""
        until = asyncio.get_running_loop().time() + self._timing.connect
        problem: LinkError | None = None
        while True:
            link = self.find(peer.name)
            if link is not None:
                return link
            dial = self._dialling.get(peer.name)
            joined = dial is not None
            if dial is None:
                dial = self._dialling[peer.name] = asyncio.create_task(
                    self._new(peer), name=f"ikectx dials {peer.name}"
                )
                dial.add_done_callback(lambda done: self._dial_ended(peer.name, done))
            try:
                async with asyncio.timeout_at(until if problem else None):
                    return await asyncio.shield(dial)
            except TimeoutError:
                assert problem is not None
                raise problem from None
            except LinkError as error:
                if problem or not joined or asyncio.get_running_loop().time() >= until:
                    raise
                problem = error

    def _dial_ended(self, name: str, dial: asyncio.Task[Link]) -> None:
        del self._dialling[name]
        if not dial.cancelled():
            dial.exception()  # whoever waits has it

    async def _new(self, peer: PeerConfig) -> Link:
        try:
            with trace.span("connect", "part"):
                stream = await self._dial(peer)
        except LinkError:
            raise
        except Exception as error:
            # whoever waits for the link must hear of it, and a link that is kept up be dialled again
            log_mistake(log, f"a connection to {peer.name}", error)
            raise LinkError(f"{peer.name}: a {type(error).__name__} here, see the log") from None
        link = Link(stream, peer, self._arrived)
        self._dialled[peer.name] = link
        self._opened(link, False)
        self._begin(self._run(link), f"ikectx link to {peer.name}")
        self._wait(link, self._timing.idle)
        return link

    def find(self, name: str) -> Link | None:
        """An open link to that peer: of those that it dialled the last."""
        # the other side may be about to close a link that was quiet for long
        lively = self._timing.idle / 2
        theirs = [each for each in self._accepted[name] if not each.error and each.quiet < lively]
        newest = max(theirs, key=lambda each: each.made, default=None)
        link = self._dialled.get(name)
        if link is None or link.error is not None:
            return newest
        # a peer that lost its power knows nothing of an older link, and TCP here does not notice for a while
        return newest if newest is not None and newest.made > link.heard else link

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
            self._opened(link, True)
            await link.run()
        finally:
            self._accepted[peer.name].remove(link)
            log.info("%s has gone: %s", peer.name, link.error)

    def _wait(self, link: Link, seconds: float) -> None:
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().call_later(seconds, self._idle, link)

    def _idle(self, link: Link) -> None:
        if link.error is not None:
            return
        left = self._timing.idle - min(link.quiet, self._unused(link.peer.name))
        if link.peer.name in self._kept:
            left = max(left, self._timing.renew - link.age)
        if left > 0.001:
            self._wait(link, left)
        else:
            link.close(LinkError(f"the connection to {link.peer.name} was idle"))

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
        for dial in list(self._dialling.values()):
            dial.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
