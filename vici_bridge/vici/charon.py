"""charon's VICI socket for an agent, on the event loop. I/O.

Each transfer asks charon several times. A thread for each question costs a tenth of a millisecond of CPU on
an idle machine, and registering and unregistering an event with each listing costs two more round trips. So
`Charon` uses its socket itself, on the loop, and leaves events registered: charon sends the items of a
listing only over the connection that asked for it (`vici_dispatcher`, strongSwan 5.9.8 to 6.0.6). An answer
with the same octets as the one before is not parsed again: connections, pools and algorithms change rarely.

Messages are `codec.Message` trees of text in both directions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ikectx import trace
from ikectx.errors import CharonError, WireError

from .client import away, count, path_of
from .codec import Deframer, Message, Packet, PacketType, parse_message, serialize_message

log = logging.getLogger(__name__)

_T = TypeVar("_T")

PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds between two tries to reach a charon that is not there."""


class _Connection(asyncio.Protocol):
    """One connection: what has arrived, and whether it has ended."""

    def __init__(self) -> None:
        self.events: set[str] = set()
        """Those that charon was told to send."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.error: WireError | None = None
        self.transport: asyncio.Transport | None = None
        self._deframer = Deframer()
        self._packets: deque[Packet] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._packets.extend(self._deframer.receive(data))
        except WireError as error:
            self.error = error
            self.close()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
        self._look()

    def _look(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    @property
    def fit(self) -> bool:
        """Whether a request can be sent: it is open, and nothing came that was not asked for."""
        return not self.ended.done() and not self._packets and self.error is None

    def send(self, packet: Packet) -> None:
        """Nothing is sent on a connection that has ended: `receive` tells that."""
        if self.transport is not None:
            self.transport.write(packet.framed())

    async def register(self, event: str) -> None:
        """Have charon send that event from now on. Errors: as `receive`, CharonError."""
        self.send(Packet(PacketType.EVENT_REGISTER, event))
        if (await self.receive()).type is not PacketType.EVENT_CONFIRM:
            raise CharonError(f"charon does not know the event {event}")
        self.events.add(event)

    async def receive(self) -> Packet:
        """The next packet. Errors: ConnectionResetError, WireError."""
        while not self._packets:
            if self.error is not None:
                raise self.error
            if self.ended.done():
                raise ConnectionResetError(104, "charon closed the connection")
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self._packets.popleft()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Charon:
    """All requests go over one connection, one at a time; it is made at the first one, and again after charon
    restarted.

    `timeout`: seconds that a request may take. All methods raise CharonError if charon does not run, does not
    answer, or refuses, and WireError if an answer is malformed. What they return may be the object that the
    same call returned before: it must not be changed.
    """

    def __init__(self, uri: str = "unix:///run/charon.vici", *, timeout: float = 10.0) -> None:
        self._path = path_of(uri)
        self._timeout = timeout
        self._turn = asyncio.Lock()
        self._connection: _Connection | None = None
        self._watching: asyncio.Task[None] | None = None
        self._known: dict[str, tuple[object, Any]] = {}
        """By command: the octets of its last answer, and what they say."""

    async def version(self) -> Message:
        """`daemon`, `version`, `sysname`, `release`, `machine`."""
        return await self.request("version")

    async def half_open(self) -> int:
        """Number of IKE_SAs that are being set up."""
        ikesas = (await self.request("stats")).get("ikesas", {})
        return count(ikesas if isinstance(ikesas, dict) else {}, "half-open")

    async def algorithms(self) -> Mapping[str, Mapping[str, str]]:
        """Kinds (`encryption`, `aead`, `prf`, ...) to {algorithm: plugin}."""
        return await self.request("get-algorithms")

    async def read_sas(self, read: Callable[[bytes], _T], *, ike_id: int | None = None) -> list[_T]:
        """The results of `read` for the message about each IKE_SA: {connection: {...}} as octets.

        To look at the octets of one costs a tenth of parsing them. A WireError of `read` is passed on.
        """
        return await self._items("list-sas", "list-sa", {"ike-id": ike_id}, read)

    async def connections(self) -> Mapping[str, Message]:
        """Loaded connections by name, as charon's `list-conn` gives them, each with its `name`."""
        octets = tuple(await self._items("list-conns", "list-conn", None, bytes))
        known = self._known.get("connections")
        if known is None or known[0] != octets:
            trees = [parse_message(each, foreign=True) for each in octets]
            found = {
                name: {**section, "name": name}
                for tree in trees
                for name, section in tree.items()
                if isinstance(section, dict)
            }
            known = self._known["connections"] = (octets, found)
        result: Mapping[str, Message] = known[1]
        return result

    async def connection(self, name: str) -> Message | None:
        """One loaded connection, in the same form; None: there is none of that name."""

        def read(octets: bytes) -> Message:
            return parse_message(octets, foreign=True)

        for tree in await self._items("list-conns", "list-conn", {"ike": name}, read):
            section = tree.get(name)
            if isinstance(section, dict):
                return {**section, "name": name}
        return None

    async def pools(self) -> Mapping[str, Message]:
        """Virtual IP pools by name, with their leases."""
        return await self.request("get-pools", {"leases": "yes"})

    async def traps(self) -> list[tuple[str, str]]:
        """Connection and child of each trap policy that is installed."""

        def read(octets: bytes) -> Message:
            return parse_message(octets, foreign=True)

        trees = await self._items("list-policies", "list-policy", {"trap": "yes"}, read)
        return [
            (str(section.get("ike", "")), str(section.get("child", "")))
            for tree in trees
            for section in tree.values()
            if isinstance(section, dict)
        ]

    async def trap(self, connection: str, child: str, *, install: bool) -> None:
        """Install or uninstall a trap policy. Errors: CharonError if charon does not."""
        await self.request("install" if install else "uninstall", {"child": child, "ike": connection})

    async def rekey(self, *, ike_id: int | None = None, child_id: int | None = None) -> int:
        """Start rekeying one IKE_SA or CHILD_SA by its unique ID. Returns how many matched."""
        return count(await self.request("rekey", {"ike-id": ike_id, "child-id": child_id}), "matches")

    async def terminate(self, ike_id: int, timeout_ms: int) -> int:
        """Delete one IKE_SA and tell its peer, waiting so long for that. Returns how many were deleted."""
        query = {"ike-id": ike_id, "timeout": timeout_ms, "loglevel": "-1"}
        return count(await self.request("terminate", query), "terminated")

    async def request(self, command: str, message: Mapping[str, Any] | None = None) -> Message:
        """Any command that is answered by one message."""
        _, answer = await self._ask(command, message)
        return answer

    async def _items(
        self, command: str, event: str, message: Mapping[str, Any] | None, read: Callable[[bytes], _T]
    ) -> list[_T]:
        """Any command whose answer is a series of events: what `read` makes of each."""
        items: list[_T] = []
        await self._ask(command, message, event, lambda octets: items.append(read(octets)))
        return items

    async def _ask(
        self,
        command: str,
        message: Mapping[str, Any] | None,
        event: str = "",
        item: Callable[[bytes], None] | None = None,
    ) -> tuple[_Connection, Message]:
        async with self._turn:
            try:
                with trace.span(f"vici {command}", "call"):
                    async with asyncio.timeout(self._timeout):
                        connection = await self._ready()
                        if event and event not in connection.events:
                            await connection.register(event)
                        return connection, await self._answer(connection, command, message, item)
            except CharonError:
                raise  # its answer came whole
            except OSError as error:
                self._drop()
                raise away(self._path, error) from None
            except WireError as error:
                self._drop()
                raise WireError(f"charon's answer to {command} does not parse: {error}") from None
            except BaseException:
                self._drop()
                raise

    async def _answer(
        self,
        connection: _Connection,
        command: str,
        message: Mapping[str, Any] | None,
        item: Callable[[bytes], None] | None,
    ) -> Message:
        connection.send(Packet(PacketType.CMD_REQUEST, command, serialize_message(message or {})))
        while (packet := await connection.receive()).type is PacketType.EVENT and item is not None:
            item(packet.body)
        if packet.type is not PacketType.CMD_RESPONSE:
            raise CharonError(f"charon does not know the command {command}")
        known = self._known.get(command)
        if known is None or known[0] != packet.body:
            known = self._known[command] = (packet.body, parse_message(packet.body, foreign=True))
        answer: Message = known[1]
        if answer.get("success", "yes") != "yes":
            raise CharonError(f"charon refused {command}: {answer.get('errmsg', 'no reason')}")
        return answer

    async def _ready(self) -> _Connection:
        if self._connection is None or not self._connection.fit:
            self._drop()
            self._connection = await _connected(self._path)
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # -- charon comes and goes

    def watch(self, changed: Callable[[bool], None]) -> None:
        """Call `changed` whenever charon has come (True) or gone (False), until `close`."""
        self._watching = asyncio.get_running_loop().create_task(self._watch(changed))

    async def _watch(self, changed: Callable[[bool], None]) -> None:
        failures = 0
        while True:
            with contextlib.suppress(CharonError, WireError):
                connection = await self._came()
                failures = 0
                try:
                    changed(True)
                    await connection.ended
                finally:
                    connection.close()
                log.info("charon closed its VICI socket")
                changed(False)
            await asyncio.sleep(PAUSES[min(failures, len(PAUSES) - 1)])
            failures += 1

    async def _came(self) -> _Connection:
        """A connection of its own to a charon that answers: the other one is dropped when a request takes too
        long."""
        other = Charon(self._path, timeout=self._timeout)
        try:
            connection, _ = await other._ask("version", None)
        except BaseException:
            other._drop()
            raise
        return connection

    async def close(self) -> None:
        """End the connection, and the watching."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None
        self._drop()


async def _connected(path: str) -> _Connection:
    """Errors: OSError."""
    _, connection = await asyncio.get_running_loop().create_unix_connection(_Connection, path)
    return connection
