"""The VICI protocol as a client: charon's socket, and this project's own control socket.

`CharonVici` and `ControlClient` are for commands: they wait for each answer. The server side is in `control`,
which needs asyncio, so that the command line starts faster without it.

Messages are `codec.Message` trees of text in both directions.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ikectx import trace
from ikectx.errors import CharonError, ConfigError, IkectxError, LinkError, WireError
from ikectx.numbers import Status

from .codec import (
    LONGEST_PATH,
    MAX_ANSWER,
    Deframer,
    Message,
    Packet,
    PacketType,
    json_of,
    parse_message,
    serialize_message,
    with_json,
)

__all__ = ["CharonVici", "Connection", "ControlClient", "Message", "RemoteError", "json_of", "with_json"]


class Connection:
    """A connection on which each request ends within `seconds` of `arm` (None: no limit).

    Errors of all methods: OSError; of those that receive, WireError too.
    """

    def __init__(self, path: str, seconds: float | None) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        self._deframer = Deframer(MAX_ANSWER)
        self._packets: deque[Packet] = deque()
        self._events: set[str] = set()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(seconds)
            self._sock.connect(path)
        except BaseException:
            self._sock.close()
            raise

    def arm(self) -> None:
        """Start the clock for one request and its answer."""
        self._deadline = None if self._seconds is None else time.monotonic() + self._seconds

    def _wait(self) -> None:
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)

    def send(self, kind: PacketType, name: str, body: bytes = b"") -> None:
        self._wait()
        self._sock.sendall(Packet(kind, name, body).framed())

    def register(self, event: str) -> bool:
        """Have that event sent over this connection from now on. False: the other side does not know it."""
        if event not in self._events:
            self.send(PacketType.EVENT_REGISTER, event)
            if self.receive().type is not PacketType.EVENT_CONFIRM:
                return False
            self._events.add(event)
        return True

    def receive(self) -> Packet:
        """The next packet."""
        while not self._packets:
            self._wait()
            if not (data := self._sock.recv(65536)):
                raise ConnectionResetError("Connection closed")
            self._packets.extend(self._deframer.receive(data))
        return self._packets.popleft()

    def stale(self) -> bool:
        """Whether the other side has closed, or sent something that was not asked for."""
        self._sock.settimeout(0)
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return bool(self._packets)
        except OSError:
            return True
        return True

    def close(self) -> None:
        """End it, also for a thread that waits in `receive`."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def path_of(uri: str) -> str:
    """The path in `unix:///run/charon.vici`, or `uri` itself when it is a path. Errors: ConfigError."""
    path = uri.removeprefix("unix://")
    if "://" in path or not path or "\0" in path:
        raise ConfigError(f"{uri!r} is not a unix socket", hint="write unix:///run/charon.vici")
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ConfigError(f"the path {path} is too long for a unix socket: {LONGEST_PATH} octets at most")
    return path


class CharonVici:
    """charon's VICI socket for a command: thread-safe and synchronous. An agent uses `charon.Charon`.

    One connection serves all requests, one at a time; it is made at the first request and again after charon
    restarted. `timeout`: seconds that a request may take. All methods raise CharonError if charon does not
    run, does not answer, or refuses, and WireError if an answer is malformed.
    """

    def __init__(self, uri: str = "unix:///run/charon.vici", *, timeout: float = 10.0) -> None:
        self._path = path_of(uri)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def version(self) -> Message:
        """`daemon`, `version`, `sysname`, `release`, `machine`."""
        return self.request("version")

    def stats(self) -> Message:
        """`uptime`, `plugins` (a list), `ikesas`, queues and workers."""
        return self.request("stats")

    def list_sas(self, ike: str | None = None, ike_id: int | None = None) -> list[Message]:
        """IKE_SAs as charon's `list-sa` gives them, each with its connection under `name`."""
        return self._named("list-sas", "list-sa", {"ike": ike, "ike-id": ike_id})

    def list_conns(self) -> list[Message]:
        """Loaded connections as charon's `list-conn` gives them, each with its `name`."""
        return self._named("list-conns", "list-conn")

    def get_pools(self, leases: bool = False) -> dict[str, Message]:
        """Virtual IP pools by name, with their leases if asked."""
        return self.request("get-pools", {"leases": "yes" if leases else None})

    def rekey(self, *, ike_id: int | None = None, child_id: int | None = None) -> int:
        """Start rekeying one IKE_SA or CHILD_SA by its unique ID. Returns how many matched."""
        return count(self.request("rekey", {"ike-id": ike_id, "child-id": child_id}), "matches")

    def terminate(self, *, ike_id: int, force: bool = False, timeout_ms: int = 5000) -> int:
        """Delete one IKE_SA, telling the peer. Returns how many were deleted.

        `force` gives up waiting for the peer at `timeout_ms`; -1 does not wait at all.
        """
        query = {
            "ike-id": ike_id,
            "force": "yes" if force else None,
            "timeout": timeout_ms,
            "loglevel": "-1",
        }
        return count(self.request("terminate", query), "terminated")

    def request(self, command: str, message: Mapping[str, Any] | None = None) -> Message:
        """Any command that is answered by one message. None values are left out."""
        return self._ask(command, message)[1]

    def _named(self, command: str, event: str, message: Mapping[str, Any] | None = None) -> list[Message]:
        """The sections in the events that answer a command, each with its `name`."""
        return [
            {**section, "name": name}
            for item in self._ask(command, message, event)[0]
            for name, section in item.items()
            if isinstance(section, dict)
        ]

    def _ask(
        self, command: str, message: Mapping[str, Any] | None, event: str = ""
    ) -> tuple[list[Message], Message]:
        """The events that a command is answered with, and the answer at their end."""
        body, items = serialize_message(message or {}), []
        with self._ready(command) as connection:
            if event and not connection.register(event):
                raise CharonError(f"charon refused {command}: it does not know the event")
            connection.send(PacketType.CMD_REQUEST, command, body)
            while (packet := connection.receive()).type is PacketType.EVENT:
                items.append(parse_message(packet.body, foreign=True))
            if packet.type is not PacketType.CMD_RESPONSE:
                raise CharonError(f"charon does not know the command {command}")
            answer = parse_message(packet.body, foreign=True)
        if answer.get("success", "yes") != "yes":
            raise CharonError(f"charon refused {command}: {answer.get('errmsg', 'no reason')}")
        return items, answer

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    @contextlib.contextmanager
    def _ready(self, command: str) -> Iterator[Connection]:
        """A connection for one request, which no other one uses after an error."""
        with self._lock, trace.span(f"vici {command}", "call"):
            try:
                if self._connection is not None and self._connection.stale():
                    self._drop()
                if self._connection is None:
                    self._connection = Connection(self._path, self._timeout)
                self._connection.arm()
                yield self._connection
            except OSError as error:
                self._drop()
                raise away(self._path, error) from None
            except WireError as error:
                self._drop()
                raise WireError(f"charon's answer to {command} does not parse: {error}") from None
            except CharonError:
                self._drop()
                raise


class RemoteError(IkectxError):
    """An error of the agent that came over the control socket, with its exit code and status."""

    def __init__(self, message: str, *, hint: str, exit_code: int, status: Status) -> None:
        super().__init__(message, hint=hint, status=status)
        self.exit_code = exit_code

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> RemoteError:
        """From an answer whose `success` is not "yes"."""
        code, status = count(answer, "exit"), count(answer, "status")
        return cls(
            str(answer.get("errmsg") or "the agent gave no reason"),
            hint=str(answer.get("hint", "")),
            exit_code=code if 0 < code < 126 else 1,
            status=Status(status or Status.FAILED),
        )


class ControlClient:
    """The agent's control socket, for the command line and other short-lived callers.

    `timeout`: seconds for each `request`, and between two items of a `stream` (None: no limit). `start`: the
    command that starts the agent, for the hint if it does not run. Errors: LinkError if the agent does not
    run or does not answer, RemoteError for its own errors, WireError for malformed answers.
    """

    def __init__(
        self,
        path: str,
        *,
        timeout: float | None = 30.0,
        start: str = "systemctl start ikectx, or ikectx serve",
    ) -> None:
        self._path = path_of(path)
        self._timeout = timeout
        self._start = start
        self._connection: Connection | None = None

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, command: str, message: Mapping[str, Any] | None = None) -> Message:
        """One command, one answer."""
        body = serialize_message(message or {})
        with self._ready(command) as connection:
            connection.send(PacketType.CMD_REQUEST, command, body)
            return self._answer(command, connection.receive())

    def stream(
        self,
        command: str,
        event: str,
        message: Mapping[str, Any] | None = None,
        on_item: Callable[[Message], None] | None = None,
    ) -> Message:
        """One command; `on_item` gets each event as it comes. Returns the answer at the end."""
        body = serialize_message(message or {})
        with self._ready(command) as connection:
            if not connection.register(event):
                raise LinkError(f"the agent has no event {event}", hint="is it of the same version?")
            connection.send(PacketType.CMD_REQUEST, command, body)
            while True:
                connection.arm()
                packet = connection.receive()
                if packet.type is not PacketType.EVENT:
                    return self._answer(command, packet)
                if on_item is not None and packet.name == event:
                    on_item(parse_message(packet.body, foreign=True))

    def listing(self, command: str, event: str, message: Mapping[str, Any] | None = None) -> list[Any]:
        """One command; returns the JSON of each event that answers it."""
        items: list[Any] = []
        self.stream(command, event, message, lambda item: items.append(json_of(item)))
        return items

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @staticmethod
    def _answer(command: str, packet: Packet) -> Message:
        if packet.type is not PacketType.CMD_RESPONSE:
            raise LinkError(f"the agent has no command {command}", hint="is it of the same version?")
        answer = parse_message(packet.body, foreign=True)
        if answer.get("success", "yes") != "yes":
            raise RemoteError.of(answer)
        return answer

    @contextlib.contextmanager
    def _ready(self, command: str) -> Iterator[Connection]:
        try:
            if self._connection is None:
                self._connection = Connection(self._path, self._timeout)
            self._connection.arm()
            yield self._connection
        except OSError as error:
            self.close()
            raise _no_agent(self._path, command, error, self._start) from None
        except WireError as error:
            self.close()
            raise WireError(f"the agent's answer to {command} does not parse: {error}") from None


def count(answer: Mapping[str, Any], key: str) -> int:
    try:
        return int(answer.get(key, 0))
    except (TypeError, ValueError):
        return 0


def away(path: str, error: OSError) -> CharonError:
    if isinstance(error, TimeoutError):
        return CharonError(f"charon did not answer in time on {path}")
    return CharonError(
        f"charon's VICI socket {path} cannot be used: {error.strerror or error}",
        hint="start strongSwan, and compare [charon] vici with charon.plugins.vici.socket in strongswan.conf",
    )


def _no_agent(path: str, command: str, error: OSError, start: str) -> LinkError:
    if isinstance(error, TimeoutError):
        return LinkError(f"the agent did not answer {command} in time")
    if isinstance(error, PermissionError):
        return LinkError(f"no permission for the control socket {path}", hint="run it as root")
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return LinkError(f"no agent listens on {path}", hint=f"start it: {start}")
    return LinkError(f"the control socket {path} failed: {error.strerror or error}")
