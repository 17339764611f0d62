"""CXTP between a mobile node and gateways: UDP (RFC 4067 leaves the transport open), both ends of it (I/O).

The sockets are exempt from IPsec policies, because a CTAR must not be protected by the SA that it moves,
which the new gateway cannot decrypt (BWIA'07). A gateway answers from the address that the CTAR came to.
Datagrams that are no CTAR, or above the limits, are counted and get no answer.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from ikectx import trace
from ikectx.clock import Clock, MonotonicClock
from ikectx.errors import IkectxError, LinkError, UsageError, WireError
from ikectx.mistakes import log_mistake
from ikectx.node.mobility import Handover, HandoverEvent, HandoverMode, HandoverOutcome, MobileState
from ikectx.rates import Bucket, RateLimit
from ikectx.sa.context import Address, Endpoint
from ikectx.wire import cookies
from ikectx.wire.cxtp import Ctar

from .bypass import bypass

log = logging.getLogger("ikectx.mnlink")

MAX_DATAGRAM = 8192
"""Octets of the longest message read: a CTAR has some hundred."""
MAX_AT_WORK = 512
"""CTARs handled at a time; more are dropped. At the default rate fewer arrive in the time that the old
gateway may be asked for (30 s)."""

COOKIE_RATE = 10_000.0
"""Cookies sent per second, at some 8 us each. A mobile node's CTAR that gets none in a flood is sent again
after a second."""
WARN_EVERY = 60.0
"""Seconds between two lines in the log that tell of load."""
_BATCH = 32
"""Datagrams read before other tasks get their turn."""
_BUFFER = 1 << 20
"""Octets that may wait at a socket; the kernel doubles it. Beside 10,000 datagrams a second this process
may do something else for 0.2 s before one is lost, with Linux's default for 0.03 s."""
_SO_RCVBUFFORCE = 33
_IP_PKTINFO = 8
_ANCILLARY = 128

Handler = Callable[[Ctar, Endpoint], Awaitable[bytes | None]]
"""Handles a CTAR from that UDP endpoint; returns the CTAA to send back, or None for no answer."""

Protect = Callable[[socket.socket], None]
"""Exempts a socket from IPsec policies: `bypass`, except in tests that run without privileges."""


# --- the gateway's end -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Counters:
    """Datagrams: received; malformed (no CTAR); limited (above the rate); busy (too many at work); failed.

    asked: above the rate, and a cookie was asked for. unanswered: the handler wanted none. answered: a CTAA
    was sent.
    """

    received: int = 0
    malformed: int = 0
    limited: int = 0
    asked: int = 0
    busy: int = 0
    failed: int = 0
    unanswered: int = 0
    answered: int = 0


class MnServer:
    """Receives CTARs of mobile nodes at `listen` and gives them to `handler`.

    rate, source_rate: CTARs per second in total and of one source (CT_REQUEST_RATE). Above that, CTARs are
    dropped at random, and their senders are asked for a cookie. CTARs with a cookie have the same rate again
    for themselves, which a flood from forged addresses cannot use up, because it never sees a cookie. draw:
    random numbers in [0, 1) for that. secret: the key of the cookies.
    """

    def __init__(
        self,
        listen: Sequence[Endpoint],
        handler: Handler,
        rate: float = 10.0,
        source_rate: float = 2.0,
        *,
        clock: Clock | None = None,
        draw: Callable[[], float] | None = None,
        protect: Protect = bypass,
        secret: bytes | None = None,
    ) -> None:
        self.counters = Counters()
        self._listen = tuple(listen)
        self._handler = handler
        self._clock = clock or MonotonicClock()
        draw = draw or random.SystemRandom().random
        self._limit = RateLimit(rate, source_rate, draw)
        self._shown = RateLimit(rate, source_rate, draw)
        """The limit for CTARs with a cookie."""
        self._cookies = cookies.Cookies(secret or secrets.token_bytes(32))
        self._asking = Bucket(COOKIE_RATE, self._clock.now())
        self._warned = -WARN_EVERY
        self._protect = protect
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def endpoints(self) -> list[Endpoint]:
        """The endpoints that it listens on: `listen`, with the ports that the system chose for 0."""
        return [_endpoint(sock.getsockname()) for sock in self._sockets]

    async def start(self) -> None:
        """Listen. Errors: LinkError, and nothing is left open then."""
        loop = asyncio.get_running_loop()
        for at in self._listen:
            try:
                sock = _open(at, self._protect)
            except OSError as error:
                await self.close()
                raise LinkError(
                    f"no CTARs can be taken at {at}: {error.strerror}", hint=_hint(error)
                ) from None
            self._sockets.append(sock)
            loop.add_reader(sock, self._readable, sock)

    async def close(self) -> None:
        """Stop listening; CTARs that are being handled are given up. Twice is harmless."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            loop.remove_reader(sock)
            sock.close()
        self._sockets.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _readable(self, sock: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                data, ancillary, _, sender = sock.recvmsg(MAX_DATAGRAM, _ANCILLARY)
            except OSError:  # nothing to read any more, or an ICMP error, which anybody can forge
                return
            self._take(sock, data, ancillary, sender)

    def _take(self, sock: socket.socket, data: bytes, ancillary: Sequence[_Cmsg], sender: _SockAddr) -> None:
        counters = self.counters
        counters.received += 1
        fixed = cookies.fixed_part(data)
        if not fixed:
            counters.malformed += 1
            return
        now = self._clock.now()
        cookie, ctar_octets = cookies.split(data, fixed)
        shown = bool(cookie) and self._cookies.right(cookie, sender[0], sender[1], now)
        # the limit comes first: a flood must not cost parsing, nor hide behind messages that do not parse
        limit = self._shown if shown else self._limit
        if limit.spent(now) or not limit.allows((source := _endpoint(sender)).address, now):
            if shown or not self._ask(sock, data, fixed, ancillary, sender, now):
                counters.limited += 1
            return
        try:
            ctar = Ctar.parse(ctar_octets)
        except WireError as error:
            counters.malformed += 1
            log.debug("from %s: %s", source, error)
            return
        if len(self._tasks) >= MAX_AT_WORK:
            counters.busy += 1
            return
        reply = _Reply(sock, _same_address(ancillary, sender[0]), sender)
        task = asyncio.get_running_loop().create_task(self._handle(ctar, source, reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _ask(
        self,
        sock: socket.socket,
        data: bytes,
        fixed: int,
        ancillary: Sequence[_Cmsg],
        sender: _SockAddr,
        now: float,
    ) -> bool:
        """Send a cookie to the sender of that CTAR, unless too many were sent just now."""
        if self._limit.spent(now) and now - self._warned >= WARN_EVERY:
            self._warned = now
            log.warning("more CTARs come than are looked at: senders must show that they hear us (cookies)")
        self._asking.fill(now)
        if self._asking.level < 1:
            return False
        question = cookies.ask(data, fixed, self._cookies.make(sender[0], sender[1], now))
        if not question:
            return False
        self._asking.level -= 1
        try:
            sock.sendmsg([question], _same_address(ancillary, sender[0]), 0, sender)
        except OSError:  # the source address may be forged, and lead nowhere
            return False
        self.counters.asked += 1
        return True

    async def _handle(self, ctar: Ctar, source: Endpoint, reply: _Reply) -> None:
        try:
            answer = await self._handler(ctar, source)
        except IkectxError as error:
            self.counters.failed += 1
            log.warning("the CTAR of %s from %s: %s", ctar.mn, source, error)
            return
        except Exception as error:
            self.counters.failed += 1
            log_mistake(log, f"the CTAR of {ctar.mn} from {source}", error)
            return
        if answer is None:
            self.counters.unanswered += 1
            return
        try:
            reply.send(answer)
        except OSError as error:  # the MN asks again
            self.counters.failed += 1
            log.info("no answer to %s: %s", source, error.strerror)
            return
        self.counters.answered += 1


_Cmsg = tuple[int, int, bytes]
_SockAddr = tuple[str, int] | tuple[str, int, int, int]


@dataclass(frozen=True, slots=True)
class _Reply:
    sock: socket.socket
    ancillary: Sequence[_Cmsg]
    to: _SockAddr

    def send(self, data: bytes) -> None:
        self.sock.sendmsg([data], self.ancillary, 0, self.to)


def _same_address(ancillary: Sequence[_Cmsg], source: str) -> list[_Cmsg]:
    """Control messages that make the answer leave from the address that the request came to."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO and len(data) >= 12:
            return [(level, kind, struct.pack("=I4s4s", 0, data[4:8], bytes(4)))]
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO and len(data) >= 20:
            interface = data[16:20] if source.startswith(("fe8", "fe9", "fea", "feb")) else bytes(4)
            return [(level, kind, data[:16] + interface)]
    return []


def _open(at: Endpoint, protect: Protect) -> socket.socket:
    six = at.address.version == 6
    sock = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        protect(sock)
        sock.bind((str(at.address), at.port))
    except OSError:
        sock.close()
        raise
    return sock


def _endpoint(name: _SockAddr) -> Endpoint:
    host, port = name[0].partition("%")[0], name[1]
    return Endpoint.of(host, port)


def _hint(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return "the agent must run as root or with CAP_NET_ADMIN"
    if error.errno == errno.EADDRINUSE:
        return "another program has this UDP port: is a second agent running?"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have the address"
    return ""


# --- the MN's end ------------------------------------------------------------------------------------------

Progress = Callable[[MobileState, HandoverEvent | None], None]
"""Called with each event, and at each change of state without one."""


async def run_handover(
    handover: Handover,
    bind: Address | None = None,
    *,
    moves: Awaitable[Endpoint | None] | None = None,
    progress: Progress | None = None,
    clock: Clock | None = None,
    protect: Protect = bypass,
) -> HandoverOutcome:
    """Run `handover` to its end.

    bind: the address that the first CTAR leaves from; None: the care-of address if `handover` is reactive,
    else the address that the routes give. moves: returns the care-of endpoint once the mobile node is at its
    new place; needed unless reactive. The arrival leaves from that address, if this machine has it. clock:
    the one that `handover`'s `unix` belongs to. When this task is cancelled, so is `handover`; its `outcome`
    says if it is in doubt. Errors: LinkError if there is no socket to send from; UsageError; any error of
    `moves`.
    """
    if handover.mode is not HandoverMode.REACTIVE and moves is None:
        raise UsageError("a predictive handover must be told when the MN has moved")
    run = _Run(handover, progress or (lambda state, event: None), clock or MonotonicClock(), protect)
    try:
        return await run.run(bind, moves)
    finally:
        handover.cancel()  # no effect at an end


class _Run:
    """One handover's socket and timers. A CTAR to the second gateway leaves from another address."""

    def __init__(self, handover: Handover, progress: Progress, clock: Clock, protect: Protect) -> None:
        self._handover = handover
        self._progress = progress
        self._clock = clock
        self._protect = protect
        self._wake = asyncio.Event()
        self._received: deque[tuple[bytes, Endpoint]] = deque()
        self._sock: socket.socket | None = None
        self._to: Endpoint | None = None
        self._told = MobileState.NEW
        self._trouble: int | None = None
        """The error at sending that was logged last."""

    async def run(self, bind: Address | None, moves: Awaitable[Endpoint | None] | None) -> HandoverOutcome:
        handover = self._handover
        moving = None if moves is None else asyncio.ensure_future(moves)
        if moving is not None:
            moving.add_done_callback(lambda _: self._wake.set())
        try:
            while True:
                now = self._clock.now()
                if moving is not None and moving.done():
                    handover.moved(moving.result(), now)
                while self._received:
                    with trace.span("check CTAA", "part"):
                        handover.receive(*self._received.popleft(), now)
                handover.handle_timer(now)
                began = time.time_ns()
                for octets, to in handover.to_send(now):
                    self._send(octets, to, bind)
                    trace.ended("make CTAR", began, "part")
                self._tell()
                if handover.done:
                    return handover.outcome
                await self._sleep(handover.next_timer())
        finally:
            self._close()
            if moving is not None:
                moving.cancel()
                await asyncio.wait({moving})  # what it has begun is taken back before anything else begins

    async def _sleep(self, due: float | None) -> None:
        try:
            async with asyncio.timeout(None if due is None else max(0.0, due - self._clock.now())):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()

    def _tell(self) -> None:
        handover = self._handover
        event = handover.next_event()
        while event is not None:
            self._told = handover.state
            self._progress(handover.state, event)
            event = handover.next_event()
        if handover.state is not self._told:
            self._told = handover.state
            self._progress(handover.state, None)

    def _send(self, octets: bytes, to: Endpoint, bind: Address | None) -> None:
        if to != self._to:
            first = self._to is None
            care_of = self._handover.care_of
            here = bind if first and bind is not None else care_of.address if care_of is not None else None
            self._open(to, here)
        assert self._sock is not None
        try:
            self._sock.sendto(octets, (str(to.address), to.port))
        except OSError as error:
            # one of this machine: errors on the way are not told to a socket that is not connected
            if error.errno != self._trouble:
                self._trouble = error.errno
                log.info("no CTAR to %s, it is tried again and again: %s", to, error.strerror)
            self._handover.not_sent(self._clock.now())

    def _open(self, to: Endpoint, here: Address | None) -> None:
        self._close()
        anywhere: Address = IPv6Address(0) if to.address.version == 6 else IPv4Address(0)
        if here is None or here.version != to.address.version:
            here = anywhere
        try:
            try:
                sock = _open(Endpoint(here, 0), self._protect)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL or here == anywhere:
                    raise
                # behind a NAT the care-of address is not an address of this machine
                sock = _open(Endpoint(anywhere, 0), self._protect)
        except OSError as error:
            raise LinkError(
                f"no socket to send CTARs from {here}: {error.strerror}", hint=_hint(error)
            ) from None
        self._sock, self._to = sock, to
        asyncio.get_running_loop().add_reader(sock, self._readable, sock)

    def _readable(self, sock: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                data, sender = sock.recvfrom(MAX_DATAGRAM)
            except OSError:
                return
            self._received.append((data, _endpoint(sender)))
            self._wake.set()

    def _close(self) -> None:
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._sock = None


__all__ = [
    "Counters",
    "Handler",
    "MnServer",
    "Progress",
    "run_handover",
]
