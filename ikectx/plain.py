"""Connections between gateways under the kernel's own ESP: plain TCP or SCTP (I/O).

RFC 4067 wants CXTP between routers inside ESP. Who the other side is, its address tells: packets from there
reach us only through the SA with that gateway. So a connection lives as long as a `Guard` vouches that the
kernel protects exactly its addresses and ports; it is asked again before octets are sent, and
before octets that came are handed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Any, Protocol

from .context import Address, Endpoint
from .errors import ConfigError, IkectxError, LinkError
from .flow import Flow, Transport
from .links import READ_SIZE, Accept, Dial, PeerConfig, Stream, keep_alive
from .transfer import Timing

log = logging.getLogger("ikectx.plain")

CHUNK = 1 << 14
"""Octets that are sent between two questions to the guard; SCTP makes one message of them."""
RESOLVE_AGAIN = 60.0
"""Seconds for which a peer's name keeps its addresses."""
BACKLOG = 64
ACCEPT_AGAIN = 1.0
"""Seconds without accepting when the system has no file descriptor or memory for it."""
_SCTP_RTOINFO = 0
_SCTP_ASSOCINFO = 1
_SCTP_NODELAY = 3
_SCTP_PEER_ADDR_PARAMS = 9
_SCTP_GET_PEER_ADDRS = 108
_SCTP_GET_LOCAL_ADDRS = 109
_SPP_HB_ENABLE = 1
_ABORT = struct.pack("=ii", 1, 0)


class Hold(Protocol):
    """A guard's hand on one connection."""

    def verify(self) -> None:
        """Look at all changes up to now; cheap if there is none. Errors: LinkError, protection is gone."""

    def release(self) -> None:
        """The connection is closed: look after it no longer. Twice is harmless."""


class Guard(Protocol):
    """Knows whether the kernel protects a connection with ESP in both directions."""

    async def check(self, flow: Flow) -> None:
        """Errors: LinkError if a packet of the flow could pass unprotected now; its hint: what lacks."""

    async def hold(self, flow: Flow, sock: socket.socket, lost: Callable[[LinkError], None]) -> Hold:
        """`check`, and bind `sock` to that protection where the kernel can.

        `lost` is called, once, as soon as it is known that protection is gone, or can no longer be
        watched. Errors: LinkError.
        """


class PlainStream:
    """`Stream` on a guarded socket; `names` is the peer whose address it is.

    Without asyncio's transports: those keep octets of their own, and would send them after protection went.
    """

    def __init__(self, sock: socket.socket, flow: Flow, peer: PeerConfig, timing: Timing) -> None:
        self.names = frozenset({peer.certified})
        self.label = str(flow.remote)
        self._sock = sock
        self._flow = flow
        self._timeout = 3 * timing.keepalive
        self._hold: Hold | None = None
        self._error: LinkError | None = None
        self._closed = False
        self._waiting: set[asyncio.Future[None]] = set()

    async def guarded(self, guard: Guard) -> None:
        """Put the stream under its guard. Errors: LinkError; the stream is closed then."""
        try:
            hold = await guard.hold(self._flow, self._sock, self.lost)
        except LinkError as error:
            self.lost(error)
            raise
        if self._closed:
            hold.release()
            raise self._ended()
        self._hold = hold

    def verify(self) -> None:
        """Errors: LinkError when the stream is closed or no longer protected; it is closed then."""
        if self._closed or self._hold is None:
            raise self._ended()
        try:
            self._hold.verify()
            if self._flow.protocol == "sctp":
                _one_address_each(self._sock)
        except LinkError as error:
            self.lost(error)
            raise
        if self._closed:
            raise self._ended()

    def _ended(self) -> LinkError:
        return self._error or LinkError(f"the connection to {self.label} is closed")

    async def read(self) -> bytes:
        while True:
            self.verify()
            try:
                data = self._sock.recv(READ_SIZE)
            except (BlockingIOError, InterruptedError):
                await self._ready(self._loop().add_reader, self._loop().remove_reader)
            except OSError as error:
                raise LinkError(f"{self.label}: {_reason(error)}") from None
            else:
                self.verify()  # they may have come after protection went
                return data

    async def write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            async with asyncio.timeout(self._timeout):
                while left:
                    self.verify()
                    try:
                        sent = self._sock.send(left[:CHUNK])
                    except (BlockingIOError, InterruptedError):
                        await self._ready(self._loop().add_writer, self._loop().remove_writer)
                    else:
                        left = left[sent:]
        except TimeoutError:
            raise LinkError(f"{self.label} takes no more octets") from None
        except OSError as error:
            raise LinkError(f"{self.label}: {_reason(error)}") from None

    @staticmethod
    def _loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def _ready(self, add: Callable[..., Any], remove: Callable[[int], Any]) -> None:
        future: asyncio.Future[None] = self._loop().create_future()
        self._waiting.add(future)
        number = self._sock.fileno()
        add(number, _wake, future)
        try:
            await future
        finally:
            self._waiting.discard(future)
            if not self._closed:  # else the number may be another socket's by now
                remove(number)

    def lost(self, error: LinkError) -> None:
        """Cut at once: what the kernel has not sent yet is thrown away."""
        if self._closed:
            return
        self._error = error
        log.warning("%s is cut: %s%s", self._flow, error, f" ({error.hint})" if error.hint else "")
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self.close()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._hold is not None:
            self._hold.release()
        with contextlib.suppress(RuntimeError):
            loop = self._loop()
            loop.remove_reader(self._sock.fileno())
            loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for future in list(self._waiting):
            _wake(future)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _reason(error: OSError) -> str:
    if error.errno and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)  # asyncio has words of its own, without the reason
    return error.strerror or str(error)


def open_socket(family: int, protocol: Transport) -> socket.socket:
    """A non-blocking stream socket. Errors: LinkError, for SCTP where the kernel has none."""
    number = socket.IPPROTO_SCTP if protocol == "sctp" else socket.IPPROTO_TCP
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, number)
    except OSError as error:
        if protocol == "sctp" and error.errno in (errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT):
            raise LinkError(
                "this kernel has no SCTP", hint='modprobe sctp, or write protocol = "tcp" in [transfer]'
            ) from None
        raise LinkError(f"no {protocol} socket: {_reason(error)}") from None
    sock.setblocking(False)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return sock


def _tune(sock: socket.socket, protocol: Transport, seconds: float) -> None:
    """No delay, and notice within about three times `seconds` that the other side has gone."""
    if protocol == "tcp":
        keep_alive(sock, seconds)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return
    whole = max(1, round(seconds))
    # heartbeats each `whole` seconds, two may stay unanswered, and no wait for an answer is longer
    beats = struct.pack("=i128xIHIIIIBx", 0, 1000 * whole, 2, 0, 0, _SPP_HB_ENABLE, 0, 0)
    options: tuple[tuple[int, int | bytes], ...] = (
        (_SCTP_NODELAY, 1),
        (_SCTP_RTOINFO, struct.pack("=iIII", 0, 1000, 1000 * whole, 1000)),
        (_SCTP_ASSOCINFO, struct.pack("=iHHIII", 0, 2, 0, 0, 0, 0)),
        (_SCTP_PEER_ADDR_PARAMS, beats),
    )
    for name, value in options:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_SCTP, name, value)


def _one_address_each(sock: socket.socket) -> None:
    """SCTP may go on between other addresses of both ends, which nobody has checked. Errors: LinkError."""
    for option, whose in ((_SCTP_GET_LOCAL_ADDRS, "this end"), (_SCTP_GET_PEER_ADDRS, "the other end")):
        try:
            (count,) = struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_SCTP, option, 1024), 4)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOTCONN):
                return  # the association has ended: nothing is sent any more, and what came, came before
            raise LinkError(f"the addresses of {whose} cannot be read: {_reason(error)}") from None
        if count != 1:
            raise LinkError(
                f"{whose} of an SCTP association has {count} addresses",
                hint="let [transfer] listen name one address, not 0.0.0.0 or ::, at both gateways",
            )


def _endpoint(address: Any) -> Endpoint:
    return Endpoint(ip_address(str(address[0]).partition("%")[0]), int(address[1]))


def plain_dial(
    timing: Timing, protocol: Transport, protected: Guard, listen: Sequence[tuple[str, int]] = ()
) -> Dial:
    """A `Dial` for connections that the kernel protects.

    They begin at the first address of `listen` of the peer's family, where the peer looks for us, else where
    routing says. The guard is asked before the first packet. Errors when dialling: LinkError.
    """
    own = [
        ip_address(host) for host, _ in listen if _is_address(host) and not ip_address(host).is_unspecified
    ]

    async def dial(peer: PeerConfig) -> Stream:
        where = f"{peer.name} at {peer.host}:{peer.port}"
        first: LinkError | None = None
        try:
            async with asyncio.timeout(timing.connect):
                for address in await _resolve(peer):
                    try:
                        return await connect(peer, address)
                    except LinkError as error:
                        first = first or error
        except LinkError as error:
            first = error
        except TimeoutError:
            first = first or LinkError(
                f"it did not answer within {timing.connect:g} s",
                hint="does an IPsec SA between the gateways come up, and does the agent there run?",
            )
        if first is None:
            raise LinkError(f"{where}: the name has no address")
        raise LinkError(f"{where}: {first}", hint=first.hint)

    async def connect(peer: PeerConfig, address: Address) -> Stream:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        sock = open_socket(family, protocol)
        stream: PlainStream | None = None
        try:
            local = next((one for one in own if one.version == address.version), None) or _source(
                family, address
            )
            sock.bind((str(local), 0))
            flow = Flow(_endpoint(sock.getsockname()), Endpoint(address, peer.port), protocol)
            stream = PlainStream(sock, flow, peer, timing)
            await stream.guarded(protected)
            await asyncio.get_running_loop().sock_connect(sock, (str(address), peer.port))
            _tune(sock, protocol, timing.keepalive)
            stream.verify()
        except BaseException as error:
            if stream is not None:
                stream.close()
            sock.close()
            if isinstance(error, OSError):
                raise LinkError(_reason(error)) from None
            raise
        return stream

    return dial


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _source(family: int, address: Address) -> Address:
    """Where routing lets packets to `address` begin; nothing is sent."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((str(address), 9))
        return _endpoint(probe.getsockname()).address


async def _resolve(peer: PeerConfig) -> list[Address]:
    if _is_address(peer.host):
        return [ip_address(peer.host)]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LinkError(_reason(error)) from None
    return list(dict.fromkeys(_endpoint(entry[4]).address for entry in found))


class _Neighbours:
    """Which configured peer an address belongs to."""

    def __init__(self, peers: Sequence[PeerConfig]) -> None:
        self._peers = peers
        self._known: dict[str, tuple[float, list[Address]]] = {}

    async def owner(self, address: Address) -> PeerConfig:
        """The one peer with that address. Errors: LinkError."""
        found = [peer for peer in self._peers if address in await self._addresses(peer)]
        if not found:
            raise LinkError(f"{address} is no configured peer's address", hint="compare [[peer]] address")
        if len(found) > 1:
            names = ", ".join(peer.name for peer in found)
            raise LinkError(
                f"{address} is the address of several peers: {names}",
                hint='with transport = "ipsec" each [[peer]] needs an address of its own',
            )
        return found[0]

    async def _addresses(self, peer: PeerConfig) -> list[Address]:
        until, addresses = self._known.get(peer.host, (0.0, []))
        if time.monotonic() >= until:
            try:
                addresses = await _resolve(peer)
            except LinkError as error:
                log.warning("%s: %s: %s", peer.name, peer.host, error)
                addresses = []
            self._known[peer.host] = (time.monotonic() + RESOLVE_AGAIN, addresses)
        return addresses


class PlainServer:
    """A listening socket; what `asyncio.Server` has, as far as `Gateway` uses it."""

    def __init__(self, sock: socket.socket, connected: Callable[[socket.socket], Any]) -> None:
        self.sockets = (sock,)
        self._connected = connected
        self._tasks: set[asyncio.Task[None]] = set()
        self._later: asyncio.TimerHandle | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens; with the port that was had for port 0. Errors: OSError once it is closed."""
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
        for _ in range(BACKLOG):
            try:
                connection, _ = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("cannot accept a connection: %s", _reason(error))
                # it stays readable, and the loop would ask without end
                loop = asyncio.get_running_loop()
                loop.remove_reader(sock.fileno())
                self._later = loop.call_later(ACCEPT_AGAIN, self._listen)
                return
            connection.setblocking(False)
            task = asyncio.ensure_future(self._connected(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Stop listening; connections that were accepted go on."""
        (sock,) = self.sockets
        if self._later is not None:
            self._later.cancel()
        if sock.fileno() >= 0:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()


async def plain_listen(
    timing: Timing,
    protocol: Transport,
    protected: Guard,
    where: Sequence[tuple[str, int]],
    peers: Sequence[PeerConfig],
    accept: Accept,
) -> list[PlainServer]:
    """Servers, to be started, that give connections from configured peers, if protected, to `accept`.

    Errors: ConfigError for SCTP on a wildcard address, LinkError.
    """
    neighbours = _Neighbours(peers)

    async def connected(sock: socket.socket) -> None:
        stream: PlainStream | None = None
        try:
            flow = Flow(_endpoint(sock.getsockname()), _endpoint(sock.getpeername()), protocol)
            async with asyncio.timeout(timing.connect):
                peer = await neighbours.owner(flow.remote.address)
                stream = PlainStream(sock, flow, peer, timing)
                await stream.guarded(protected)
            _tune(sock, protocol, timing.keepalive)
            stream.verify()
        except (IkectxError, OSError) as error:  # a TimeoutError is an OSError
            reason = error if isinstance(error, IkectxError) else _reason(error) or "it took too long"
            hint = f" ({error.hint})" if isinstance(error, IkectxError) and error.hint else ""
            log.warning("refused a connection on %s: %s%s", where, reason, hint)
            if stream is not None:
                stream.close()
            sock.close()
            return
        await accept(stream)

    servers: list[PlainServer] = []
    try:
        for host, port in where:
            for address in await _places(host, port):
                if protocol == "sctp" and address.is_unspecified:
                    raise ConfigError(
                        f"[transfer] listen: SCTP on {host} would use every address of this machine",
                        hint="name the addresses that IPsec protects",
                    )
                servers.append(PlainServer(_listening(address, port, protocol), connected))
    except BaseException:
        for server in servers:
            server.close()
        raise
    return servers


async def _places(host: str, port: int) -> list[Address]:
    return await _resolve(PeerConfig("", host or "0.0.0.0", port))  # noqa: S104 - the operator's own words


def _listening(address: Address, port: int, protocol: Transport) -> socket.socket:
    sock = open_socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((str(address), port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise LinkError(
            f"cannot listen on {address}:{port}: {_reason(error)}",
            hint="another agent may be running, or the address may not be here yet",
        ) from None
    return sock
