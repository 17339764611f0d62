"""Connections between gateways in TLS 1.3 over TCP (I/O).

Both ends show a certificate of the configured CA; a name in it (SAN dNSName, else the CN) says
which configured peer it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

from ikectx.errors import LinkError
from ikectx.peer import PeerConfig
from ikectx.sa.context import Address
from ikectx.timing import Timing
from ikectx.within import Limit

from .credentials import Credentials, tls_reason
from .door import Door, Handshakes, listen_on
from .links import READ_SIZE, Accept, Dial, Stream, keep_alive
from .neighbours import Neighbours, own_address, resolve
from .readiness import Readiness

log = logging.getLogger("ikectx.net.tls")


def certificate_names(certificate: Mapping[str, Any] | None) -> frozenset[str]:
    """dNSNames of a verified certificate (as `SSLSocket.getpeercert` gives it), else its CN; lower case."""
    if not certificate:
        return frozenset()
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    if not names:
        subject = [pair for rdn in certificate.get("subject", ()) for pair in rdn]
        names = [value for kind, value in subject if kind == "commonName"]
    return frozenset(name.lower() for name in names)


class TlsStream:
    """`Stream` on a non-blocking socket; it buffers nothing beyond OpenSSL's record of at most 16 KiB."""

    def __init__(self, sock: ssl.SSLSocket, where: tuple[object, int], timing: Timing) -> None:
        self.label = f"{where[0]}:{where[1]}"
        self.names: frozenset[str] = frozenset()
        self.certificate = b""
        """In DER, once it is verified."""
        self._error: LinkError | None = None
        self._sock = sock
        self._ready = Readiness(sock)
        self._timeout = 3 * timing.keepalive
        keep_alive(sock, timing.keepalive)
        # a message goes out at once: else it waits until the one before is acknowledged, up to 40 ms on Linux
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def handshake(self) -> None:
        """Authenticate both sides. Errors: OSError, also of TLS; the caller closes the stream then."""
        while True:
            try:
                self._sock.do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wants:
                await self._until(wants)
            else:
                self.names = certificate_names(self._sock.getpeercert())
                self.certificate = self._sock.getpeercert(binary_form=True) or b""
                return

    async def _until(self, wants: ssl.SSLError) -> None:
        if isinstance(wants, ssl.SSLWantReadError):
            await self._ready.readable()
        else:
            await self._ready.writable()
        self._check()

    def _check(self) -> None:
        if self._ready.closed:
            raise self._error or LinkError(f"the connection to {self.label} is closed")

    async def read(self) -> bytes:
        self._check()
        while True:
            try:
                return self._sock.recv(READ_SIZE)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wants:
                await self._until(wants)
            except OSError as error:
                raise LinkError(f"{self.label}: {tls_reason(error)}") from None

    async def write(self, data: bytes) -> None:
        self._check()
        left = memoryview(data)
        try:
            with Limit(self._timeout):
                while left:
                    try:
                        left = left[self._sock.send(left) :]
                    except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wants:
                        await self._until(wants)
        except TimeoutError:
            raise LinkError(f"{self.label} takes no more octets") from None
        except OSError as error:
            raise LinkError(f"{self.label}: {tls_reason(error)}") from None
        finally:
            if left:  # nothing can follow half a message
                self.close()

    def lost(self, error: LinkError) -> None:
        """Close, for this reason: who reads or writes gets it."""
        if not self._ready.closed:
            self._error = error
            self.close()

    def close(self) -> None:
        if self._ready.closed:
            return
        self._ready.close()
        with contextlib.suppress(OSError, ValueError):
            self._sock.unwrap()  # TLS's word that this is the end; the other side's is not waited for
        self._sock.close()


def tls_dial(credentials: Credentials, timing: Timing, listen: Sequence[tuple[str, int]] = ()) -> Dial:
    """A `Dial` that checks the peer's certificate and name. Connections leave from the first address of
    `listen` of the peer's family, by which the peer knows us, else from the one that routing chooses.
    Errors: LinkError when dialling."""

    async def dial(peer: PeerConfig) -> Stream:
        where = f"{peer.name} at {peer.host}:{peer.port}"
        try:
            async with asyncio.timeout(timing.connect):
                stream = await any_of(peer)
        except TimeoutError:
            raise LinkError(f"{where} did not answer within {timing.connect:g} s") from None
        except OSError as error:
            hint = ""
            if error.errno == errno.ECONNRESET or isinstance(error, ssl.SSLEOFError):
                hint = "its log says why, if it turned this gateway's address away or is full"
            raise LinkError(f"{where}: {tls_reason(error)}", hint=hint) from None
        except LinkError as error:
            raise LinkError(f"{where}: {error}", hint=error.hint) from None
        if peer.certified not in stream.names:
            stream.close()
            shown = ", ".join(sorted(stream.names)) or "no name"
            raise LinkError(
                f"{where} shows a certificate of {shown} instead of {peer.certified}",
                hint="correct the peer's address or name in the configuration, or the certificate there",
            )
        return stream

    async def any_of(peer: PeerConfig) -> TlsStream:
        first: OSError | None = None
        for address in await resolve(peer.host, peer.port):
            try:
                return await connect(address, peer.port)
            except OSError as error:
                first = first or error
        raise first or LinkError("the name has no address")

    async def connect(address: Address, port: int) -> TlsStream:
        sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
        stream: TlsStream | None = None
        try:
            sock.setblocking(False)
            if (own := own_address(listen, address.version)) is not None:
                sock.bind((str(own), 0))
            await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
            wrapped = credentials.context(server=False).wrap_socket(sock, do_handshake_on_connect=False)
            stream = TlsStream(wrapped, (address, port), timing)
            await stream.handshake()
            credentials.admit(stream)
        except BaseException:
            if stream is not None:
                stream.close()
            sock.close()
            raise
        return stream

    return dial


async def tls_listen(
    credentials: Credentials,
    timing: Timing,
    where: Sequence[tuple[str, int]],
    accept: Accept,
    peers: Sequence[PeerConfig],
) -> list[Door]:
    """Doors, to be opened, that give proven connections from peers' addresses to `accept`.

    Errors: LinkError.
    """
    neighbours = Neighbours(peers)
    await neighbours.look_soon()
    handshakes = Handshakes(neighbours.knows)

    async def prove(sock: socket.socket) -> Stream | None:
        source: tuple[str, int] = ("?", 0)
        stream = None
        try:
            source = sock.getpeername()[:2]
            context = credentials.context(server=True)
            wrapped = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            stream = TlsStream(wrapped, source, timing)
            async with asyncio.timeout(timing.connect):
                await stream.handshake()
            credentials.admit(stream)
        except (OSError, LinkError) as error:  # a TimeoutError is an OSError
            reason = tls_reason(error) if str(error) else f"no TLS within {timing.connect:g} s"
            log.warning("refused a connection from %s:%s: %s", *source, reason)
        else:
            made, stream = stream, None
            return made
        finally:
            if stream is not None:
                stream.close()
        sock.close()
        return None

    doors: list[Door] = []
    try:
        for host, port in where:
            for address in await resolve(host or "0.0.0.0", port):  # noqa: S104 - the operator's own words
                family = socket.AF_INET if address.version == 4 else socket.AF_INET6
                sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setblocking(False)
                if address.version == 6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                doors.append(Door(listen_on(sock, address, port), handshakes, prove, accept))
    except BaseException:
        for door in doors:
            door.close()
        raise
    return doors
