"""Connections between gateways under the kernel's own ESP: plain TCP or SCTP (I/O).

RFC 4067 wants CXTP between routers inside ESP. The other side is identified by its address, because packets
from that address reach us only through the SA with that gateway. So a connection lives only as long as a
`Guard` confirms that the kernel protects exactly its addresses and ports. The guard is asked again before
octets are sent, and before received octets are passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ikectx.errors import ConfigError, IkectxError, LinkError
from ikectx.peer import PeerConfig
from ikectx.sa.context import Address, Endpoint
from ikectx.timing import Timing

from .door import Door, Handshakes, listen_on
from .five_tuple import Flow, Transport
from .links import READ_SIZE, Accept, Dial, Stream, keep_alive
from .neighbours import Neighbours, own_address, plain_address, resolve
from .readiness import Readiness

log = logging.getLogger("ikectx.plain")

CHUNK = 1 << 14
"""Octets that are sent between two calls of the guard; SCTP makes one message of them."""
CONNECT_AGAIN = 0.05
"""Seconds between two attempts to connect while the kernel has no SA for the connection yet."""
_SCTP_RTOINFO = 0
_SCTP_ASSOCINFO = 1
_SCTP_NODELAY = 3
_SCTP_PEER_ADDR_PARAMS = 9
_SCTP_GET_PEER_ADDRS = 108
_SCTP_GET_LOCAL_ADDRS = 109
_SPP_HB_ENABLE = 1
_ABORT = struct.pack("=ii", 1, 0)


class Hold(Protocol):
    """A guard's watch over one connection."""

    def verify(self) -> None:
        """Check all changes up to now; cheap if there is none. Errors: LinkError if the protection is
        gone."""

    def release(self) -> None:
        """The connection is closed: end the watch. Twice is harmless."""


class Guard(Protocol):
    """Knows whether the kernel protects a connection with ESP in both directions."""

    async def check(self, flow: Flow) -> None:
        """Errors: LinkError if a packet of the flow could pass unprotected now; its hint says what is
        missing."""

    async def hold(self, flow: Flow, sock: socket.socket, lost: Callable[[LinkError], None]) -> Hold:
        """`check`, and bind `sock` to that protection if the kernel can.

        `lost` is called once, as soon as the protection is known to be gone, or can no longer be watched.
        Errors: LinkError.
        """


class PlainStream:
    """`Stream` on a guarded socket; `names` is the peer that has this address.

    It uses no transports of asyncio, because those buffer octets, and would send them after the protection
    has gone.
    """

    def __init__(self, sock: socket.socket, flow: Flow, peer: PeerConfig, timing: Timing) -> None:
        self.names = frozenset({peer.certified})
        self.label = str(flow.remote)
        self._sock = sock
        self._flow = flow
        self._timeout = 3 * timing.keepalive
        self._hold: Hold | None = None
        self._error: LinkError | None = None
        self._ready = Readiness(sock)

    async def guarded(self, guard: Guard) -> None:
        """Begin the guard's watch over the stream. Errors: LinkError; the stream is closed then."""
        try:
            hold = await guard.hold(self._flow, self._sock, self.lost)
        except LinkError as error:
            self.lost(error)
            raise
        if self._ready.closed:
            hold.release()
            raise self._ended()
        self._hold = hold

    async def connect(self, where: tuple[str, int]) -> None:
        """Connect the socket, however long that takes. Errors: OSError; LinkError if the stream is closed."""
        while not self._ready.closed:
            code = self._sock.connect_ex(where)
            if code == errno.EINPROGRESS:
                await self._ready.writable()
                if self._ready.closed:
                    break
                code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code == 0:
                return
            if code != errno.EAGAIN:
                raise OSError(code, os.strerror(code))
            # a socket with an IPsec policy of its own, whose SA is still being negotiated
            await asyncio.sleep(CONNECT_AGAIN)
        raise self._ended()

    def verify(self) -> None:
        """Errors: LinkError if the stream is closed or no longer protected; it is closed then."""
        if self._ready.closed or self._hold is None:
            raise self._ended()
        try:
            self._hold.verify()
            if self._flow.protocol == "sctp":
                _one_address_each(self._sock)
        except LinkError as error:
            self.lost(error)
            raise
        if self._ready.closed:
            raise self._ended()

    def _ended(self) -> LinkError:
        return self._error or LinkError(f"the connection to {self.label} is closed")

    async def read(self) -> bytes:
        while True:
            self.verify()
            try:
                data = self._sock.recv(READ_SIZE)
            except (BlockingIOError, InterruptedError):
                await self._ready.readable()
            except OSError as error:
                raise LinkError(f"{self.label}: {_reason(error)}") from None
            else:
                self.verify()  # the octets may have come after the protection was gone
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
                        await self._ready.writable()
                    else:
                        left = left[sent:]
        except TimeoutError:
            raise LinkError(f"{self.label} takes no more octets") from None
        except OSError as error:
            raise LinkError(f"{self.label}: {_reason(error)}") from None
        finally:
            if left:  # nothing can follow half a message
                self.close()

    def lost(self, error: LinkError) -> None:
        """Cut the connection at once: octets that the kernel has not sent yet are thrown away."""
        if self._ready.closed:
            return
        self._error = error
        log.warning("%s is cut: %s%s", self._flow, error, f" ({error.hint})" if error.hint else "")
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self.close()

    def close(self) -> None:
        if self._ready.closed:
            return
        self._ready.close()
        if self._hold is not None:
            self._hold.release()
        self._sock.close()


def _reason(error: OSError) -> str:
    if error.errno and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)  # asyncio has words of its own, without the reason
    return error.strerror or str(error)


def open_socket(family: int, protocol: Transport) -> socket.socket:
    """A non-blocking stream socket. Errors: LinkError, for SCTP if the kernel has none."""
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
    """Disable Nagle's delay, and notice within about three times `seconds` that the other side has gone."""
    if protocol == "tcp":
        keep_alive(sock, seconds)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return
    whole = max(1, round(seconds))
    # heartbeats every `whole` seconds, of which two may stay unanswered, and no longer wait for an answer
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
    """Refuse an association with several addresses at an end, because SCTP may use addresses that nobody has
    checked. Errors: LinkError."""
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
    return Endpoint(plain_address(address), int(address[1]))


def plain_dial(
    timing: Timing, protocol: Transport, protected: Guard, listen: Sequence[tuple[str, int]] = ()
) -> Dial:
    """A `Dial` for connections that the kernel protects.

    They begin at the first address of `listen` of the peer's family, where the peer looks for us, else where
    routing says. The guard is asked before the first packet. Errors when dialling: LinkError.
    """

    async def dial(peer: PeerConfig) -> Stream:
        where = f"{peer.name} at {peer.host}:{peer.port}"
        first: LinkError | None = None
        try:
            async with asyncio.timeout(timing.connect):
                for address in await resolve(peer.host, peer.port):
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
            local = own_address(listen, address.version) or _source(family, address)
            sock.bind((str(local), 0))
            flow = Flow(_endpoint(sock.getsockname()), Endpoint(address, peer.port), protocol)
            stream = PlainStream(sock, flow, peer, timing)
            await stream.guarded(protected)
            await stream.connect((str(address), peer.port))
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


def _source(family: int, address: Address) -> Address:
    """The source address that routing chooses for packets to `address`; nothing is sent."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((str(address), 9))
        return _endpoint(probe.getsockname()).address


async def plain_listen(
    timing: Timing,
    protocol: Transport,
    protected: Guard,
    where: Sequence[tuple[str, int]],
    peers: Sequence[PeerConfig],
    accept: Accept,
) -> list[Door]:
    """Doors, to be opened, that give connections from configured peers, if protected, to `accept`.

    Errors: ConfigError for SCTP on a wildcard address, LinkError.
    """
    neighbours = Neighbours(peers)
    await neighbours.look_soon()
    handshakes = Handshakes(neighbours.knows)

    async def prove(sock: socket.socket) -> Stream | None:
        stream: PlainStream | None = None
        try:
            flow = Flow(_endpoint(sock.getsockname()), _endpoint(sock.getpeername()), protocol)
            peer = neighbours.owner(flow.remote.address)
            async with asyncio.timeout(timing.connect):
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
            return None
        return stream

    servers: list[Door] = []
    try:
        for host, port in where:
            for address in await resolve(host or "0.0.0.0", port):  # noqa: S104 - the operator's own words
                if protocol == "sctp" and address.is_unspecified:
                    raise ConfigError(
                        f"[transfer] listen: SCTP on {host} would use every address of this machine",
                        hint="name the addresses that IPsec protects",
                    )
                family = socket.AF_INET if address.version == 4 else socket.AF_INET6
                sock = listen_on(open_socket(family, protocol), address, port)
                servers.append(Door(sock, handshakes, prove, accept))
    except BaseException:
        for server in servers:
            server.close()
        raise
    return servers
