"""The HA socket: one UDP socket that receives charon's stream and sends SAs to it, paced.

charon's ha plugin binds ha_remote:4510 (from the agent's side) and connects to ha_local:4510; it receives
only datagrams from there. Nothing is acknowledged, and its receive buffer has room for some 270 messages: a
faster sender loses them silently, so `send` watches charon's queue in /proc/net/udp.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import cast

from ikectx import trace
from ikectx.errors import CharonError, StateError

log = logging.getLogger(__name__)

HA_PORT = 4510
_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55
"""linux/socket.h; Python has no name for it."""
_DROPS = 8
"""Index of SO_MEMINFO's number of datagrams that found the buffer full (linux/sock_diag.h)."""
_BUFFER = 4 * 1024 * 1024
"""Octets. The kernel doubles it, and counts its own: some 10,000 messages, those of 2,000 SAs' set-up."""
_QUEUE_LIMIT = 64 * 1024
"""Octets waiting at charon above which the sender pauses: a third of its default buffer."""
_BATCH = 16
"""Messages that are sent between two looks at charon's queue, and"""
_FRESH = 0.1
"""seconds for which a look will do: the kernel walks all its UDP sockets for one."""
_LONGEST = 65535


UNCONFIRMED = 4 * 1024 * 1024
"""Octets of messages that are accepted while charon does not answer over VICI, each counted as 512 at least:
some 1,300 SAs, because one takes six messages."""


class Unconfirmed:
    """Limits the messages that are accepted while charon does not answer over VICI.

    While charon is down, its address belongs to nobody, and any local user may send in its place. When charon
    is there, the record is compared with its list.
    """

    def __init__(self, remote: str, port: int) -> None:
        self._where = f"{remote}:{port}"
        self._octets = 0

    def begin(self) -> None:
        """charon has come, or gone."""
        self._octets = 0

    def hears(self, octets: int) -> bool:
        """Whether a message of that size is accepted."""
        self._octets += max(octets, 512)
        if self._octets <= UNCONFIRMED:
            return True
        log.error(
            "HA messages are left unheard, since too many came while charon is not reachable over VICI: does "
            "another program send them from %s? SAs that they told of cannot be moved before `ikectx resync`",
            self._where,
        )
        return False


def inherited(local: str, port: int) -> socket.socket | None:
    """The UDP socket of that address that systemd has bound for this process (sd_listen_fds(3)), or None."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    for number in range(3, 3 + int(os.environ.get("LISTEN_FDS") or 0)):
        sock = socket.socket(fileno=number)
        sock.set_inheritable(False)
        if sock.type == socket.SOCK_DGRAM and sock.getsockname()[:2] == (local, port):
            sock.setblocking(False)
            return sock
        sock.detach()
    return None


def _place(address: str, port: int) -> str:
    """Address and port as the kernel's table has them."""
    raw = ipaddress.ip_address(address).packed
    words = [raw[i : i + 4][::-1].hex().upper() for i in range(0, len(raw), 4)]
    return f"{''.join(words)}:{port:04X}"


class HaSocket(asyncio.DatagramProtocol):
    """The agent's end of the HA link. `receive` is called with each datagram."""

    def __init__(
        self, local: str, remote: str, receive: Callable[[bytes], None], port: int = HA_PORT
    ) -> None:
        self._local = local
        self._remote = remote
        self._port = port
        self._receive = receive
        self._key = f": {_place(remote, port)} ".encode()
        """charon's end in the kernel's table."""
        self._sock: socket.socket | None = None
        self._room = 0
        """Messages that may be sent without another look at charon's queue, and"""
        self._room_until = 0.0
        """until when (time.monotonic)."""
        self._table: int | None = None
        """Descriptor of the kernel's table of UDP sockets."""
        self._lost = 0
        """Messages of charon's HA plugin that the kernel had no room for."""
        self._transport: asyncio.DatagramTransport | None = None
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Bind, exclusively, or take the socket that systemd has bound. Errors: StateError if another
        program has the address."""
        family = socket.AF_INET6 if ":" in self._local else socket.AF_INET
        given = inherited(self._local, self._port)
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        sock = given or socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024 * 1024)
        try:
            if given is None:
                sock.bind((self._local, self._port))
            # systemd sets it, and with it any user could bind the address as well
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            sock.connect((self._remote, self._port))
        except OSError as error:
            sock.close()
            raise StateError(
                f"cannot use the HA address {self._local}:{self._port}: {error.strerror}",
                hint="another agent (or another program) holds it"
                if error.errno == errno.EADDRINUSE
                else "check charon.ha_local in the configuration; both addresses must be local",
            ) from None
        if given is not None and (users := self._others(sock)):
            sock.close()
            raise StateError(
                f"the HA address {self._local}:{self._port} has been bound by another program, too, "
                f"of user {', '.join(users)}: it could get the keys of all SAs",
                hint="find it with `ss -lunp`, end it, and start the agent again",
            )
        self._sock = sock
        self._queue()  # opens the table
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: self, sock=sock)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio's own datagram transport is no subclass of DatagramTransport in Python 3.11
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        # before the socket was connected, which systemd's is not yet, anybody could send to it
        if addr[:2] == (self._remote, self._port):
            self._receive(data)
        else:
            log.warning("a message for charon's HA plugin came from %s:%s, and is left unheard", *addr[:2])
        self._look_for_losses()

    def hear(self) -> int:
        """Read the messages that are waiting now. Returns how many the kernel had no room for since `open`.

        charon sends before it goes on, and the loopback interface delivers at once (strongSwan 5.9.8, 6.0.6).
        So what charon had to tell before it answered over VICI is here, and nothing has to be waited for.
        """
        while self._sock is not None and self._transport is not None:
            try:
                data, sender = self._sock.recvfrom(_LONGEST)
            except OSError:  # nothing to read any more; ECONNREFUSED: charon is not there (yet)
                break
            self.datagram_received(data, sender)
        return self._lost

    def _look_for_losses(self) -> None:
        """Log losses. Called only when there is something to read, because losses can only happen then."""
        if self._sock is None or self._transport is None:
            return
        numbers = self._sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 4 * (_DROPS + 1))
        lost = int.from_bytes(numbers[4 * _DROPS :], sys.byteorder)
        if lost != self._lost:
            log.error(
                "%d messages of charon's HA plugin were lost, since the agent did not read them in time: "
                "SAs that they told of cannot be moved before `ikectx resync`",
                lost - self._lost,
            )
            self._lost = lost

    def error_received(self, exc: Exception) -> None:
        # ECONNREFUSED: charon is not there (yet). The record is corrected through VICI.
        log.debug("HA socket: %s", exc)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        if self._table is not None:
            os.close(self._table)
            self._table = None

    @trace.spanned("ha", "call")
    async def send(self, messages: Iterable[bytes]) -> None:
        """Send messages to charon in order, never faster than it reads. Errors: CharonError."""
        async with self._lock:
            for message in messages:
                if self._transport is None:
                    raise CharonError("the HA socket is closed")
                if not self._room or time.monotonic() > self._room_until:
                    await self._make_room()
                self._room -= 1
                self._transport.sendto(message)

    async def read(self) -> None:
        """Wait until charon has read all that it was sent, or is gone. Errors: CharonError.

        One thread of charon's reads and carries out one message after the other (strongSwan 5.9.8 to 6.1), so
        by then all but the last one are carried out; over VICI charon answers before that.
        """
        async with self._lock:
            await self._drained(1)

    async def _make_room(self) -> None:
        if not await self._drained(_QUEUE_LIMIT):
            raise CharonError(
                f"charon does not listen on its HA address {self._remote}:{self._port}",
                hint="is charon running, with plugins.ha { local = "
                f"{self._remote}  remote = {self._local}  monitor = no }} in strongswan.conf?",
            )

    async def _drained(self, limit: int) -> bool:
        """Whether less than `limit` octets wait for charon; False: it does not listen. Errors: CharonError if
        it does not read."""
        for _ in range(500):
            waiting = self._queue()
            if waiting is None:  # a socket that is closed between two reads of the table hides another
                waiting = self._queue()
            if waiting is None or waiting < limit:
                return waiting is not None
            await asyncio.sleep(0.002)
        raise CharonError("charon has not read its HA socket for a second", hint="see charon's log")

    def _queue(self) -> int | None:
        """Octets in charon's receive queue, None if no socket is bound."""
        self._room = 0
        for table in self._sockets():
            at = table.find(self._key)
            if at >= 0 and table.find(b"\n", at) > 0:
                waiting = int(table[at + len(self._key) :].split(None, 4)[2].partition(b":")[2], 16)
                if waiting < _QUEUE_LIMIT:
                    self._room, self._room_until = _BATCH, time.monotonic() + _FRESH
                return waiting
        return None

    def _others(self, sock: socket.socket) -> list[str]:
        """The users who have bound the agent's address or all addresses at its port, beside that socket."""
        own, found = str(os.fstat(sock.fileno()).st_ino), []
        every = "::" if ":" in self._local else "0.0.0.0"  # noqa: S104 - where somebody else could be
        keys = {_place(one, self._port) for one in (self._local, every)}
        *_, table = b"", *self._sockets()
        for line in table.decode().splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[1] in keys and fields[9] != own:
                found.append(fields[7])
        return found

    def _sockets(self) -> Iterator[bytes]:
        """The kernel's table of UDP sockets, longer and longer until it is whole: to read a part costs less.

        It stays open, because an SA must be undone, and the status told, without a free descriptor, too.
        """
        if self._table is None:
            name = "udp6" if ":" in self._remote else "udp"
            self._table = os.open(f"/proc/self/net/{name}", os.O_RDONLY | os.O_CLOEXEC)
        octets = b""
        while more := os.pread(self._table, 1 << 16, len(octets)):
            octets += more
            yield octets

    def listening(self) -> bool:
        """Whether charon's end of the link exists."""
        return self._queue() is not None
