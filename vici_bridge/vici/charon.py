"""charon's VICI socket for an agent, on the event loop. I/O.

Each transfer asks charon several times. A thread for each question costs a tenth of a millisecond of CPU on
an idle machine, and registering and unregistering an event with each listing costs two more round trips. So
`Charon` uses its socket itself, on the loop, and leaves events registered: charon sends the items of a
listing only over the connection that asked for it (`vici_dispatcher`, strongSwan 5.9.8 to 6.0.6). An answer
with the same octets as the one before is not parsed again: connections, pools and algorithms change rarely.

charon answers the requests of one connection one after the other, and some of them late: a listing waits for
each IKE_SA that a thread of charon works on, also while that thread waits for an updown script. So such
requests have connections apart from the others, and a listing of all IKE_SAs from those of single ones.

Messages are `codec.Message` trees of text in both directions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from ikectx import trace
from ikectx.errors import CharonError, WireError
from ikectx.together import Together
from ikectx.within import Limit

from .client import away, count, path_of
from .codec import Deframer, Message, Packet, PacketType, parse_message, serialize_message

log = logging.getLogger(__name__)

_T = TypeVar("_T")

PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds between two tries to reach a charon that is not there."""
MOMENT = 0.05
"""Seconds that a request waits for one of the connections there are, before it gets another one."""
MOST = 4
"""Connections of one kind. Each request that waits keeps one of charon's threads, of which it has 16."""
FEW = 8
"""Connections that are asked for one by one."""
WAITING = ("list-sas", "rekey", "terminate")
"""Requests for which charon waits for all IKE_SAs that are in use (5.9.8, 6.0.6), or for a peer's answer."""
ALL = "list-sas of all"
"""The kind of a request for all IKE_SAs: a request for one of them must not wait for it."""
PIECE = 4
"""Items of a listing that are read in one go: some 1 ms. What waits on the event loop meanwhile comes
between, because to read 1,000 SAs takes 0.3 s."""


NO_EVENTS: Mapping[str, Callable[[Message], None]] = MappingProxyType({})


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

    def send(self, *packets: Packet) -> None:
        """Nothing is sent on a connection that has ended: `receive` tells that."""
        if self.transport is not None:
            self.transport.write(b"".join(packet.framed() for packet in packets))

    async def register(self, event: str) -> None:
        """Have charon send that event from now on. Errors: as `receive`, CharonError."""
        self.send(Packet(PacketType.EVENT_REGISTER, event))
        others = []  # events that were asked for before: charon does not wait with them
        while (packet := await self.receive()).type is PacketType.EVENT:
            others.append(packet)
        self._packets.extendleft(reversed(others))
        if packet.type is not PacketType.EVENT_CONFIRM:
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


class _Connections:
    """Connections for requests of one kind: one, as long as charon answers soon, and `MOST` at most. Those
    that are idle are kept."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._turns = asyncio.Semaphore(1)
        self._size = 1
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    async def __aenter__(self) -> None:
        """Wait until a connection may be used."""
        if not await self._soon():
            await self._turns.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._turns.release()

    async def _soon(self) -> bool:
        """Whether there is a turn within a moment, if need be by another connection."""
        if not self._turns.locked():
            return await self._turns.acquire()
        if self._size == MOST:
            return False
        try:
            with Limit(MOMENT):
                return await self._turns.acquire()
        except TimeoutError:
            if self._size == MOST:
                return False
            self._size += 1
            return True

    async def take(self) -> _Connection:
        """An idle connection, or a new one. Errors: OSError."""
        while self._idle:
            connection = self._idle.pop()
            if connection.fit:
                break
            connection.close()
        else:
            connection = await _connected(self._path)
        self._busy.add(connection)
        return connection

    def give_back(self, connection: _Connection, *, keep: bool) -> None:
        """`keep`: its answer came whole."""
        self._busy.discard(connection)
        if keep:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """End all, also those that are waited for."""
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()


class Charon:
    """A connection is made at the first request that needs it, and again after charon restarted. A request
    that charon does not answer yet holds up no other one.

    `timeout`: seconds that a request may take. All methods raise CharonError if charon does not run, does not
    answer, or refuses, and WireError if an answer is malformed. What they return may be the object that the
    same call returned before: it must not be changed.
    """

    def __init__(self, uri: str = "unix:///run/charon.vici", *, timeout: float = 10.0) -> None:
        self._path = path_of(uri)
        self._timeout = timeout
        self._connections = {kind: _Connections(self._path) for kind in ("", *WAITING, ALL)}
        """By command; "": for those that charon answers at once."""
        self._watching: asyncio.Task[None] | None = None
        self._asking = Together(self._connections_for)
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

    async def read_sas(self, read: Callable[[bytes], _T], *, ike_ids: Sequence[int] = ()) -> list[_T]:
        """The results of `read` for the message about each IKE_SA, or about those of these unique IDs:
        {connection: {...}} as octets.

        To look at the octets of one costs a tenth of parsing them. A WireError of `read` is passed on.
        """
        if not ike_ids:
            return await self._items("list-sas", "list-sa", [None], read, ALL)
        return await self._items("list-sas", "list-sa", [{"ike-id": ike_id} for ike_id in ike_ids], read)

    async def connections(self, names: Collection[str] | None = None) -> Mapping[str, Message]:
        """Loaded connections by name, as charon's `list-conn` gives them, each with its `name`.

        `names`: these at least; a few are asked for one by one, because there may be a thousand others.
        """
        if names is not None and len(names) <= FEW:
            return await self._connections_of(names)
        return self._read("connections", await self._items("list-conns", "list-conn", [None], bytes))

    async def connection(self, name: str) -> Message | None:
        """One loaded connection, in the same form; None: there is none of that name. It is asked for once for
        all SAs that are exported in one round of the event loop."""
        return await self._asking.join(name)

    async def _connections_for(self, names: Sequence[str]) -> Sequence[Message | None]:
        found = await self._connections_of(set(names))
        return [found.get(name) for name in names]

    async def _connections_of(self, names: Collection[str]) -> Mapping[str, Message]:
        """Those of these names that are loaded, each asked for alone."""
        asked = [{"ike": name} for name in names]
        told = await self._items("list-conns", "list-conn", asked, bytes) if asked else []
        return self._read("some connections", told)

    def _read(self, which: str, told: Sequence[bytes]) -> Mapping[str, Message]:
        """The connections in these messages. One answer is kept of each kind (`which`)."""
        octets = tuple(told)
        known = self._known.get(which)
        if known is None or known[0] != octets:
            found = {
                name: {**section, "name": name}
                for tree in (parse_message(each, foreign=True) for each in octets)
                for name, section in tree.items()
                if isinstance(section, dict)
            }
            known = self._known[which] = (octets, found)
        result: Mapping[str, Message] = known[1]
        return result

    async def pools(self, name: str = "", *, leases: bool = False) -> Mapping[str, Message]:
        """Virtual IP pools by name, or only that one; `leases`: with theirs, which takes 3 ms for 1,000."""
        return await self.request("get-pools", {"name": name or None, "leases": leases})

    async def traps(self) -> list[tuple[str, str]]:
        """Connection and child of each trap policy that is installed."""

        def read(octets: bytes) -> Message:
            return parse_message(octets, foreign=True)

        trees = await self._items("list-policies", "list-policy", [{"trap": "yes"}], read)
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

    async def terminate(self, ike_id: int, timeout_ms: int, *, force: bool = False) -> int:
        """Delete one IKE_SA and tell its peer, waiting so long for that. Returns how many were deleted.

        `force`: charon forgets the SA then, even if the peer has not answered.
        """
        query = {"ike-id": ike_id, "timeout": timeout_ms, "loglevel": "-1"}
        if force:
            query["force"] = "yes"
        _, answer = await self._ask("terminate", [query], patience=max(0.0, timeout_ms / 1000))
        return count(answer, "terminated")

    async def request(self, command: str, message: Mapping[str, Any] | None = None) -> Message:
        """Any command that is answered by one message."""
        _, answer = await self._ask(command, [message])
        return answer

    async def _items(
        self,
        command: str,
        event: str,
        messages: Sequence[Mapping[str, Any] | None],
        read: Callable[[bytes], _T],
        kind: str = "",
    ) -> list[_T]:
        """Any command whose answer is a series of events: what `read` makes of each. Several requests go out
        at once; charon takes those of a connection in their order (5.9.8, 6.0.6)."""
        items: list[_T] = []
        await self._ask(command, messages, event, lambda octets: items.append(read(octets)), kind)
        return items

    async def _ask(
        self,
        command: str,
        messages: Sequence[Mapping[str, Any] | None],
        event: str = "",
        item: Callable[[bytes], None] | None = None,
        kind: str = "",
        patience: float = 0.0,
    ) -> tuple[_Connection, Message]:
        """`patience`: seconds that charon may wait for others before it answers."""
        connections = self._connections[kind or (command if command in WAITING else "")]
        async with connections:
            connection, whole = None, False
            try:
                with trace.span(f"vici {command}", "call"), Limit(self._timeout + patience):
                    connection = await connections.take()
                    if event and event not in connection.events:
                        await connection.register(event)
                    requests = [serialize_message(message or {}) for message in messages]
                    connection.send(*(Packet(PacketType.CMD_REQUEST, command, body) for body in requests))
                    for _ in messages:
                        answer = await self._answer(connection, command, item)
                    whole = True
                    return connection, answer
            except CharonError:
                whole = len(messages) == 1  # else the answers to the others are still to come
                raise
            except OSError as error:
                raise away(self._path, error) from None
            except WireError as error:
                raise WireError(f"charon's answer to {command} does not parse: {error}") from None
            finally:
                if connection is not None:
                    connections.give_back(connection, keep=whole)

    async def _answer(
        self,
        connection: _Connection,
        command: str,
        item: Callable[[bytes], None] | None,
    ) -> Message:
        read = 0
        while (packet := await connection.receive()).type is PacketType.EVENT and item is not None:
            item(packet.body)
            read += 1
            if read % PIECE == 0:
                await asyncio.sleep(0)
        if packet.type is not PacketType.CMD_RESPONSE:
            raise CharonError(f"charon does not know the command {command}")
        known = self._known.get(command)
        if known is None or known[0] != packet.body:
            known = self._known[command] = (packet.body, parse_message(packet.body, foreign=True))
        answer: Message = known[1]
        if answer.get("success", "yes") != "yes":
            raise CharonError(f"charon refused {command}: {answer.get('errmsg', 'no reason')}")
        return answer

    def _drop(self) -> None:
        for connections in self._connections.values():
            connections.close()

    # -- charon comes and goes

    def watch(
        self, changed: Callable[[bool], None], events: Mapping[str, Callable[[Message], None]] = NO_EVENTS
    ) -> None:
        """Call `changed` whenever charon has come (True) or gone (False), until `close`, and what `events`
        has for each of its events."""
        self._watching = asyncio.get_running_loop().create_task(self._watch(changed, events))

    async def _watch(
        self, changed: Callable[[bool], None], events: Mapping[str, Callable[[Message], None]]
    ) -> None:
        failures = 0
        while True:
            with contextlib.suppress(CharonError, WireError, ConnectionResetError):
                connection = await self._came()
                failures = 0
                try:
                    for event in events:
                        with contextlib.suppress(CharonError):  # one that does not know the event
                            await connection.register(event)
                    changed(True)
                    with contextlib.suppress(ConnectionResetError, WireError):
                        while events:
                            packet = await connection.receive()
                            with contextlib.suppress(WireError):  # one event that cannot be read
                                if (hear := events.get(packet.name)) is not None:
                                    hear(parse_message(packet.body, foreign=True))
                    await connection.ended
                finally:
                    connection.close()
                log.info("charon closed its VICI socket")
                changed(False)
            await asyncio.sleep(PAUSES[min(failures, len(PAUSES) - 1)])
            failures += 1

    async def _came(self) -> _Connection:
        """A connection of its own to a charon that answers: others end when a request takes too long."""
        connection, _ = await Charon(self._path, timeout=self._timeout)._ask("version", [None])
        return connection

    async def close(self) -> None:
        """End the connections, and the watching."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None
        self._drop()


async def _connected(path: str) -> _Connection:
    """Errors: OSError."""
    _, connection = await asyncio.get_running_loop().create_unix_connection(_Connection, path)
    return connection
