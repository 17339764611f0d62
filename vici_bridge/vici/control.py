"""The agent's control socket: the server side of the VICI protocol on a unix socket.

    async def version(request): return {"version": "1"}
    async def count(request):
        for n in range(3):
            yield {"n": n}                # an event for whoever registered for it
        yield Response({"total": 3})      # the answer; left out: an empty one

    server = ControlServer(path, {"version": version, "count": count}, streamed={"count": "number"})
    await server.start()

`vici.Session(sock).request("version", {})` and `.streamed_request("count", "number")` work
against it, and so does every other VICI client. An answer holds `success`; "no" comes with
`errmsg`, `hint`, `exit` (exit code) and `status` (`numbers.Status`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import grp
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextvars import ContextVar
from typing import Any

from ikectx.errors import ConfigError, IkectxError, StateError, WireError
from ikectx.mistakes import log_mistake

from .codec import LONGEST_PATH, Deframer, Message, Packet, PacketType, serialize_message
from .request_keys import Keys, check

log = logging.getLogger(__name__)

Handler = Callable[[Message], Awaitable[Mapping[str, Any]]]
StreamHandler = Callable[[Message], AsyncIterator[Mapping[str, Any]]]

MAX_CLIENTS = 64
RESERVE = 8
"""Places beyond `MAX_CLIENTS` for root, and for the user that the agent runs as."""
ASKS_WITHIN = 10.0
"""Seconds in which a client must have sent its first request, and the rest of any request it has begun."""
MAX_UNREAD = 4 * 1024 * 1024
"""Octets that may wait for one client before its stream waits for it."""
MAX_ANSWER = MAX_UNREAD
"""Octets of the longest answer: reports of some seven thousand transfers. charon's own limit is not the
clients'."""
PATIENCE = 5.0
"""Seconds that a stream waits for a client that does not read, before it goes on without it."""


class Response(dict[str, Any]):
    """The last item of a streamed command: the answer, not an event."""


class _Client:
    """One connection: the events it registered for, and its writer.

    `trusted`: its user is root, or the agent's own. `busy`: a request of it is being answered. `active`: the
    time of its last whole request, or of its connection (the loop's time).
    """

    def __init__(self, writer: asyncio.StreamWriter, now: float) -> None:
        self._writer = writer
        self.user = _user(writer)
        self.trusted = self.user in (0, os.geteuid())
        self.events: set[str] = set()
        self.busy = False
        self.active = now
        self.gone = False

    def gives_way(self, other: _Client) -> bool:
        """Whether it is idle, and no more trusted than `other`, which needs a place."""
        return not self.busy and not self.gone and self.trusted <= other.trusted

    @property
    def order(self) -> tuple[bool, bool, float]:
        """Sort key for clients that give way, the first to go first: strangers before root, clients that wait
        for events after those that wait for nothing."""
        return self.trusted, bool(self.events), self.active

    def send(self, packet: Packet) -> None:
        """Queue a packet. Nothing more is sent to a client that is gone, or that does not read at all."""
        if self.gone or self._writer.is_closing():
            self.gone = True
            return
        data = packet.framed(MAX_ANSWER)
        if self._unread + len(data) > 2 * MAX_UNREAD:
            log.warning("a control client does not read; it is cut off")
            self.abort()
            return
        self._writer.write(data)

    async def settle(self) -> None:
        """Wait while much is unread, but not for long, because a stopped client must not stop a transfer."""
        if self.gone or self._unread < MAX_UNREAD:
            return
        try:
            async with asyncio.timeout(PATIENCE):
                await self._writer.drain()
        except (OSError, TimeoutError):
            self.abort()

    def abort(self) -> None:
        self.gone = True
        self._writer.transport.abort()

    async def close(self) -> None:
        self.gone = True
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await self._writer.wait_closed()

    @property
    def _unread(self) -> int:
        return self._writer.transport.get_write_buffer_size()


def _user(writer: asyncio.StreamWriter) -> int:
    """The user at the other end, from the kernel (SO_PEERCRED, unix(7)); -1 if it does not know."""
    sock: socket.socket = writer.get_extra_info("socket")
    try:
        told = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return -1
    return int(_CREDENTIALS.unpack(told)[1])


_CREDENTIALS = struct.Struct("=iII")
_ASKS: ContextVar[int] = ContextVar("control-client", default=-1)


def client_user() -> int:
    """The user whose request is being answered; -1: not known. For a command's handler, before it returns."""
    return _ASKS.get()


class ControlServer:
    """Serves `commands` on the unix socket `path`, until `close`.

    A command in `streamed` ({command: event}) is an async generator: its items go as that event to the client
    that asked, if it registered for it; a `Response` among them is the answer. The other commands are
    coroutine functions and return the answer. `events` are those for `emit`, to all who registered. A command
    goes on when its client leaves. `group`: name of a group that may use the socket too (mode 0660 instead of
    0600). `takes`: the keys of each command (`requests.check`); the requests of a command that it does not
    name are not checked.

    A client that sends no request, or does not finish one, is cut off after `ASKS_WITHIN`. If all places are
    taken, the client that has been idle longest gives way to a new one.
    """

    def __init__(
        self,
        path: str,
        commands: Mapping[str, Handler | StreamHandler],
        streamed: Mapping[str, str] | None = None,
        events: Collection[str] = (),
        *,
        group: str | None = None,
        takes: Mapping[str, Keys] | None = None,
    ) -> None:
        self._path = path
        self._commands = dict(commands)
        self._streamed = dict(streamed or {})
        self._events = frozenset(events) | frozenset(self._streamed.values())
        self._group = group
        self._takes = dict(takes or {})
        self._clients: set[_Client] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._lock: int | None = None
        self._inode: tuple[int, int] | None = None

    async def start(self) -> None:
        """Bind and listen. Errors: StateError (another agent has it), ConfigError (path, group)."""
        sock = self._bind()
        self._server = await asyncio.start_unix_server(self._connected, sock=sock)

    async def close(self) -> None:
        """Stop listening, cut off the clients, cancel their requests, remove the socket."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in list(self._clients):
            client.abort()
        self._unbind()

    def emit(self, event: str, message: Mapping[str, Any]) -> None:
        """Send an event to every client that registered for it. Call it in the loop's thread."""
        if not self.heard(event):
            return
        packet = Packet(PacketType.EVENT, event, serialize_message(message))
        for client in list(self._clients):
            if event in client.events:
                client.send(packet)

    def heard(self, event: str) -> bool:
        """Whether a client registered for that event."""
        return any(event in client.events for client in self._clients)

    # -- the socket in the file system

    def _bind(self) -> socket.socket:
        """A listening socket that never exists with wrong permissions or beside another agent's."""
        if len(os.fsencode(self._path)) > LONGEST_PATH - len(".new"):
            raise ConfigError(f"the control socket's path {self._path} is too long for a unix socket")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        fresh = self._path + ".new"
        try:
            self._lock = self._take_lock()
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISSOCK(os.lstat(self._path).st_mode):
                    raise ConfigError(f"{self._path} is there and is not a socket")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh)
            before = os.umask(0o177)
            try:
                sock.bind(fresh)
            finally:
                os.umask(before)
            if self._group is not None:
                os.chown(fresh, -1, self._gid(self._group))
                os.chmod(fresh, 0o660)
            sock.listen(16)
            sock.setblocking(False)
            os.rename(fresh, self._path)
            info = os.stat(self._path)
            self._inode = (info.st_dev, info.st_ino)
        except OSError as error:
            sock.close()
            self._release_lock()
            raise ConfigError(
                f"the control socket {self._path} cannot be made: {error.strerror or error}"
            ) from None
        except BaseException:
            sock.close()
            self._release_lock()
            raise
        return sock

    def _take_lock(self) -> int:
        """A lock beside the socket, because a socket that was left behind looks like a used one."""
        lock = os.open(self._path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StateError(
                f"another agent has the control socket {self._path}",
                hint="stop it, or give this one another [control] socket",
            ) from None
        return lock

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @staticmethod
    def _gid(group: str) -> int:
        try:
            return grp.getgrnam(group).gr_gid
        except KeyError:
            raise ConfigError(f"there is no group {group!r} for the control socket") from None

    def _unbind(self) -> None:
        if self._inode is not None:
            with contextlib.suppress(OSError):
                info = os.lstat(self._path)
                if (info.st_dev, info.st_ino) == self._inode:
                    os.unlink(self._path)
            self._inode = None
        self._release_lock()

    # -- connections

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = _Client(writer, asyncio.get_running_loop().time())
        if not self._has_place(client):
            log.warning("a control client was sent away: %d others are being served", len(self._clients))
            client.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._clients.add(client)
        try:
            await self._converse(client, reader)
        except WireError as error:
            log.warning("a control client was cut off: %s", error)
        except OSError:
            pass
        except asyncio.CancelledError:
            # cancelled by `close`, which waits for the end; streams before Python 3.12 log a cancelled
            # handler
            pass
        finally:
            self._clients.discard(client)
            self._tasks.discard(task)
            with contextlib.suppress(asyncio.CancelledError):
                await client.close()

    def _has_place(self, client: _Client) -> bool:
        """Whether there is a place for a new client, or another has given its place up."""
        if len(self._clients) < MAX_CLIENTS + (RESERVE if client.trusted else 0):
            return True
        idle = [other for other in self._clients if other.gives_way(client)]
        if not idle:
            return False
        gone = min(idle, key=lambda other: other.order)
        log.info("a control client that was idle was cut off, for a new one")
        gone.abort()
        self._clients.discard(gone)
        return True

    async def _converse(self, client: _Client, reader: asyncio.StreamReader) -> None:
        """Handle one packet after the other, as charon does; a stream's items come before the next packet."""
        deframer = Deframer()
        loop = asyncio.get_running_loop()
        due: float | None = loop.time() + ASKS_WITHIN
        while True:
            try:
                async with asyncio.timeout_at(due):
                    data = await reader.read(65536)
            except TimeoutError:
                return
            if not data:
                return
            packets = deframer.receive(data)
            client.busy = bool(packets)
            for packet in packets:
                await self._handle(client, packet)
            client.busy = False
            if packets:
                client.active, due = loop.time(), None
            if deframer.waiting and due is None:
                due = loop.time() + ASKS_WITHIN

    async def _handle(self, client: _Client, packet: Packet) -> None:
        match packet.type:
            case PacketType.EVENT_REGISTER | PacketType.EVENT_UNREGISTER if packet.name not in self._events:
                client.send(Packet(PacketType.EVENT_UNKNOWN))
            case PacketType.EVENT_REGISTER:
                client.events.add(packet.name)
                client.send(Packet(PacketType.EVENT_CONFIRM))
            case PacketType.EVENT_UNREGISTER:
                client.events.discard(packet.name)
                client.send(Packet(PacketType.EVENT_CONFIRM))
            case PacketType.CMD_REQUEST if packet.name not in self._commands:
                client.send(Packet(PacketType.CMD_UNKNOWN))
            case PacketType.CMD_REQUEST:
                await self._answer(client, packet)
            case _:
                raise WireError(f"a VICI client must not send {packet.type.name}")
        await client.settle()

    async def _answer(self, client: _Client, packet: Packet) -> None:
        try:
            answer = await self._run(client, packet)
            body = serialize_message({"success": True, **answer})
            response = Packet(PacketType.CMD_RESPONSE, body=body)
            response.framed(MAX_ANSWER)
        except IkectxError as error:
            response = _refusal(str(error), error.hint, error.exit_code, int(error.status))
        except Exception as error:
            log_mistake(log, f"the command {packet.name}", error)
            response = _refusal(f"the command {packet.name} failed, see the agent's log", "", 1, 0x80)
        client.send(response)

    async def _run(self, client: _Client, packet: Packet) -> Mapping[str, Any]:
        request = packet.message
        if packet.name in self._takes:
            check(packet.name, request, self._takes[packet.name])
        _ASKS.set(client.user)
        result = self._commands[packet.name](request)
        if not isinstance(result, AsyncIterator):
            return await result
        event = self._streamed.get(packet.name)
        answer: Mapping[str, Any] = {}
        unfit: WireError | None = None
        async for item in result:
            if isinstance(item, Response):
                answer = item
            elif event is not None and event in client.events:
                try:
                    client.send(Packet(PacketType.EVENT, event, serialize_message(item)))
                except WireError as error:  # the command itself must go on
                    unfit = unfit or error
                await client.settle()
        if unfit is not None:
            raise unfit
        return answer


def _refusal(errmsg: str, hint: str, code: int, status: int) -> Packet:
    message = {
        "success": False,
        "errmsg": _short(errmsg),
        "hint": _short(hint),
        "exit": code,
        "status": status,
    }
    return Packet(PacketType.CMD_RESPONSE, body=serialize_message(message))


def _short(text: str) -> str:
    """The part of a text that fits a VICI value."""
    return text.encode("utf-8", "backslashreplace")[:16000].decode("utf-8", "ignore")
