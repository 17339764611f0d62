"""The VICI protocol as a client: charon's socket, and this project's own control socket.

`CharonVici` and `ControlClient` use the official `vici` package, whose transport lets socket, struct and
Unicode errors through and waits for ever once a packet has begun; both are corrected here. The server side is
in `control`, which needs asyncio, so that the command line starts faster without it.

Messages are `codec.Message` trees of text in both directions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from vici import Session
from vici.exception import CommandException, DeserializationException, EventUnknownException, SessionException
from vici.protocol import Message as PackageMessage
from vici.protocol import Packet as PackagePacket
from vici.protocol import Transport

from ikectx import trace
from ikectx.errors import CharonError, ConfigError, IkectxError, LinkError, WireError
from ikectx.numbers import Status

from .codec import LONGEST_PATH, Message, json_of, parse_message, with_json

__all__ = ["CharonVici", "ControlClient", "Message", "RemoteError", "json_of", "with_json"]

log = logging.getLogger(__name__)

_GARBAGE = (DeserializationException, struct.error, UnicodeError, KeyError, IndexError, TypeError, ValueError)

_EVENT = bytes([PackagePacket.EVENT])
_T = TypeVar("_T")


class _TimedSocket:
    """A connected socket on which every read ends by a deadline.

    The package's transport clears the socket's timeout once the first octet is there; this class keeps it.
    """

    def __init__(self, sock: socket.socket, seconds: float | None) -> None:
        self._sock = sock
        self._seconds = seconds
        self._deadline: float | None = None

    def arm(self) -> None:
        """Start the clock for one request and its answer."""
        self._deadline = None if self._seconds is None else time.monotonic() + self._seconds

    def _left(self) -> float | None:
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._left())
        self._sock.sendall(data)

    def recv(self, count: int) -> bytes:
        self._sock.settimeout(self._left())
        return self._sock.recv(min(count, 65536))

    def settimeout(self, seconds: float | None) -> None:
        """Does nothing, because the deadline must stay."""

    def gettimeout(self) -> float | None:
        return None

    def stale(self) -> bool:
        """Whether the other side has closed, or sent something that was not asked for."""
        self._sock.settimeout(0)
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(how)

    def close(self) -> None:
        self.shutdown()
        self._sock.close()


def _connect(path: str, seconds: float | None) -> _TimedSocket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(seconds)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    timed = _TimedSocket(sock, seconds)
    timed.arm()
    return timed


def path_of(uri: str) -> str:
    """The path in `unix:///run/charon.vici`, or `uri` itself when it is a path. Errors: ConfigError."""
    path = uri.removeprefix("unix://")
    if "://" in path or not path or "\0" in path:
        raise ConfigError(f"{uri!r} is not a unix socket", hint="write unix:///run/charon.vici")
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ConfigError(f"the path {path} is too long for a unix socket: {LONGEST_PATH} octets at most")
    return path


def as_text(value: Any) -> Any:
    """The package's result with octets as text; octets that are not UTF-8 as \\xNN."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return {str(name): as_text(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [as_text(item) for item in value]
    return value


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
        self._sock: _TimedSocket | None = None
        self._session: Session | None = None

    def version(self) -> Message:
        """`daemon`, `version`, `sysname`, `release`, `machine`."""
        return self.request("version")

    def stats(self) -> Message:
        """`uptime`, `plugins` (a list), `ikesas`, queues and workers."""
        return self.request("stats")

    def list_sas(self, ike: str | None = None, ike_id: int | None = None) -> list[Message]:
        """IKE_SAs as charon's `list-sa` gives them, each with its connection under `name`."""
        return self._named(self.stream("list-sas", "list-sa", {"ike": ike, "ike-id": ike_id}))

    def list_conns(self) -> list[Message]:
        """Loaded connections as charon's `list-conn` gives them, each with its `name`."""
        return self._named(self.stream("list-conns", "list-conn"))

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
        with self._lock, self._mapped(command):
            answer: Message = as_text(self._ready().request(command, _clean(message)))
            return answer

    def stream(self, command: str, event: str, message: Mapping[str, Any] | None = None) -> list[Message]:
        """Any command whose answer is a series of events."""
        with self._lock, self._mapped(command):
            return self._items(command, event, message, partial(parse_message, foreign=True))

    def _items(
        self, command: str, event: str, message: Mapping[str, Any] | None, read: Callable[[bytes], _T]
    ) -> list[_T]:
        transport = self._ready().transport
        self._register(transport, PackagePacket.register_event(event))
        transport.send(PackagePacket.request(command, PackageMessage.serialize(_clean(message))))
        items = []
        while (octets := transport.receive())[:1] == _EVENT:
            items.append(read(octets[2 + octets[1] :]))
        answer = PackagePacket.parse(octets)
        self._register(transport, PackagePacket.unregister_event(event))
        if answer.response_type != PackagePacket.CMD_RESPONSE:
            raise SessionException(f"an answer of type {answer.response_type}")
        told = as_text(PackageMessage.deserialize(answer.payload))
        if told.get("success", "yes") != "yes":
            raise CommandException(told.get("errmsg", "no reason"))
        return items

    @staticmethod
    def _register(transport: Any, packet: bytes) -> None:
        """Begin or end hearing an event."""
        transport.send(packet)
        while (octets := transport.receive())[:1] == _EVENT:
            pass
        if octets[:1] == bytes([PackagePacket.EVENT_UNKNOWN]):
            raise EventUnknownException("it does not know the event")
        if octets[:1] != bytes([PackagePacket.EVENT_CONFIRM]):
            raise SessionException(f"an answer of type {octets[:1].hex()}")

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            self._drop()

    def _ready(self) -> Session:
        if self._sock is not None and self._sock.stale():
            self._drop()
        if self._sock is None or self._session is None:
            self._sock = _connect(self._path, self._timeout)
            self._session = Session(self._sock)
        self._sock.arm()
        return self._session

    def _drop(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self._sock = self._session = None

    @contextlib.contextmanager
    def _mapped(self, command: str) -> Iterator[None]:
        """Map the package's errors to ours; after all but a plain refusal the connection is dropped."""
        try:
            with trace.span(f"vici {command}", "call"):
                yield
        except CommandException as error:
            raise CharonError(
                f"charon refused {command}: {str(error).removeprefix('Command failed: ')}"
            ) from None
        except EventUnknownException as error:
            raise CharonError(f"charon refused {command}: {error}") from None
        except SessionException:
            self._drop()
            raise CharonError(f"charon does not know the command {command}") from None
        except OSError as error:
            self._drop()
            raise away(self._path, error) from None
        except (WireError, *_GARBAGE) as error:
            self._drop()
            raise WireError(f"charon's answer to {command} does not parse: {error}") from None

    @staticmethod
    def _named(items: list[Message]) -> list[Message]:
        return [
            {**section, "name": name}
            for item in items
            for name, section in item.items()
            if isinstance(section, dict)
        ]


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
        self._sock: _TimedSocket | None = None

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, command: str, message: Mapping[str, Any] | None = None) -> Message:
        """One command, one answer."""
        with self._mapped(command):
            transport = self._ready()
            transport.send(PackagePacket.request(command, PackageMessage.serialize(_clean(message))))
            return self._answer(command, PackagePacket.parse(transport.receive()))

    def stream(
        self,
        command: str,
        event: str,
        message: Mapping[str, Any] | None = None,
        on_item: Callable[[Message], None] | None = None,
    ) -> Message:
        """One command; `on_item` gets each event as it comes. Returns the answer at the end."""
        with self._mapped(command):
            transport = self._ready()
            transport.send(PackagePacket.register_event(event))
            confirm = PackagePacket.parse(transport.receive())
            if confirm.response_type != PackagePacket.EVENT_CONFIRM:
                raise LinkError(f"the agent has no event {event}", hint="is it of the same version?")
            transport.send(PackagePacket.request(command, PackageMessage.serialize(_clean(message))))
        while True:
            with self._mapped(command):
                self._ready()
                packet = PackagePacket.parse(transport.receive())
                if packet.response_type != PackagePacket.EVENT:
                    return self._answer(command, packet)
                item = as_text(PackageMessage.deserialize(packet.payload))
            if on_item is not None and packet.event_type == event.encode():
                try:
                    on_item(item)
                except BaseException:  # it is the caller's own, such as a closed stdout
                    self.close()
                    raise

    def listing(self, command: str, event: str, message: Mapping[str, Any] | None = None) -> list[Any]:
        """One command; returns the JSON of each event that answers it."""
        items: list[Any] = []
        self.stream(command, event, message, lambda item: items.append(json_of(item)))
        return items

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _ready(self) -> Transport:
        if self._sock is None:
            self._sock = _connect(self._path, self._timeout)
        self._sock.arm()
        return Transport(self._sock)

    def _answer(self, command: str, packet: Any) -> Message:
        if packet.response_type != PackagePacket.CMD_RESPONSE:
            raise LinkError(f"the agent has no command {command}", hint="is it of the same version?")
        answer: Message = as_text(PackageMessage.deserialize(packet.payload))
        if answer.get("success", "yes") != "yes":
            raise RemoteError.of(answer)
        return answer

    @contextlib.contextmanager
    def _mapped(self, command: str) -> Iterator[None]:
        try:
            yield
        except IkectxError:
            raise
        except OSError as error:
            self.close()
            raise _no_agent(self._path, command, error, self._start) from None
        except _GARBAGE as error:
            self.close()
            raise WireError(f"the agent's answer to {command} does not parse: {error}") from None


def _clean(message: Mapping[str, Any] | None) -> dict[str, Any]:
    """The message without None values, which the package would send as the text "None"."""
    return {name: value for name, value in (message or {}).items() if value is not None}


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
