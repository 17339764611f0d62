"""The control socket against the official client, and our own client against it."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import vici
from vici.exception import CommandException, EventUnknownException, SessionException
from vici.protocol import FiniteStream
from vici.protocol import Message as PackageMessage

from ikectx.errors import BusyError, ConfigError, LinkError, StateError
from ikectx.numbers import Status
from tests.vici_bridge.vici.test_client import wait_for
from tests.vici_bridge.vici.test_codec import TREE
from vici_bridge.vici.client import ControlClient, RemoteError
from vici_bridge.vici.codec import (
    Packet,
    PacketType,
    json_of,
    parse_message,
    serialize_message,
    with_json,
)
from vici_bridge.vici.control import ControlServer, Response


class Agent:
    """A ControlServer in a loop of its own thread, so that the blocking clients can be used."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = str(path)
        self.left: list[str] = []
        self.loop = asyncio.new_event_loop()
        self.server = ControlServer(
            self.path,
            {
                "version": self.version,
                "echo": self.echo,
                "busy": self.busy,
                "broken": self.broken,
                "slow": self.slow,
                "count": self.count,
                "unfit": self.unfit,
                "long": self.long,
                "fail-late": self.fail_late,
            },
            streamed={"count": "number", "unfit": "number", "fail-late": "number"},
            events={"moved"},
            **options,
        )
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.run(self.server.start())

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(5)

    def close(self) -> None:
        self.run(self.server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()

    async def version(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"daemon": "ikectx", "version": 1}

    async def echo(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"request": request}

    async def busy(self, request: dict[str, Any]) -> dict[str, Any]:
        raise BusyError("a rekey is in flight", hint="try again")

    async def broken(self, request: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError("secret detail")

    async def slow(self, request: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(30)
        return {}

    async def count(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        for n in range(int(request.get("to", 3))):
            yield {"n": n, "pad": "x" * int(request.get("pad", 0))}
        self.left.append("count done")
        yield Response({"total": request.get("to", 3)})

    async def unfit(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {"n": "x" * 70000}
        self.left.append("went on")
        yield Response()

    async def long(self, request: dict[str, Any]) -> dict[str, Any]:
        """As the reports of so many transfers."""
        return with_json([{"text": "x" * 520} for _ in range(int(request["transfers"]))])

    async def fail_late(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {"n": 0}
        raise StateError("the transfer was undone")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    served = Agent(tmp_path / "ikectx.vici")
    yield served
    served.close()


def session(agent: Agent) -> vici.Session:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(agent.path)
    return vici.Session(sock)


def test_the_official_client(agent: Agent) -> None:
    client = session(agent)
    assert client.request("version") == {"success": b"yes", "daemon": b"ikectx", "version": b"1"}
    answer = client.request("echo", TREE)
    assert parse_message(PackageMessage.serialize(answer["request"])) == TREE
    items = list(client.streamed_request("count", "number", {"to": "4"}))
    assert [item["n"] for item in items] == [b"0", b"1", b"2", b"3"]
    with pytest.raises(CommandException, match="a rekey is in flight"):
        client.request("busy")
    with pytest.raises(SessionException):
        client.request("nonsense")
    with pytest.raises(EventUnknownException):
        next(client.listen(["nonsense"]))
    collected = []
    with pytest.raises(CommandException, match="undone"):
        for item in client.streamed_request("fail-late", "number"):
            collected.append(item)
    assert len(collected) == 1
    assert client.request("version")["daemon"] == b"ikectx"


def test_an_unexpected_exception_stays_in_the_log(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CommandException, match="see the agent's log") as caught:
        session(agent).request("broken")
    assert "secret detail" not in str(caught.value)
    assert "ZeroDivisionError" in caplog.text


def test_emitted_events_reach_those_who_registered(agent: Agent) -> None:
    listening, other = session(agent), session(agent)
    events = listening.listen(["moved"], timeout=0.1)
    assert next(events) == (None, None)  # it registers before it waits
    agent.loop.call_soon_threadsafe(agent.server.emit, "moved", {"sa": "1"})
    heard = (event for event in events if event != (None, None))
    assert next(heard) == (b"moved", {"sa": b"1"})
    events.close()
    assert other.request("version")["version"] == b"1"


def test_a_stream_without_registration_answers_only(agent: Agent) -> None:
    assert session(agent).request("count", {"to": "2"})["total"] == b"2"


def test_a_command_goes_on_when_its_client_leaves(agent: Agent) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(agent.path)
    sock.sendall(Packet(PacketType.EVENT_REGISTER, "number").framed())
    request = serialize_message({"to": 200, "pad": 60000})
    sock.sendall(Packet(PacketType.CMD_REQUEST, "count", request).framed())
    sock.recv(100)
    sock.close()
    wait_for(lambda: agent.left == ["count done"])


def test_an_item_that_does_not_fit_does_not_stop_the_command(agent: Agent) -> None:
    with pytest.raises(CommandException, match="70000"):
        list(session(agent).streamed_request("unfit", "number"))
    assert agent.left == ["went on"]


def test_an_answer_about_thousands_is_longer_than_charons_packets(agent: Agent) -> None:
    with ControlClient(agent.path) as client:
        for transfers in (1000, 5000):
            assert len(json_of(client.request("long", {"transfers": transfers}))) == transfers
        with pytest.raises(RemoteError, match="is the limit"):
            client.request("long", {"transfers": 20000})
        assert client.request("version")


@pytest.mark.parametrize("octets", ["00000000", "ffffffff00", "00000001ff", "00000001 01", "0000000107"])
def test_a_client_that_talks_nonsense_is_cut_off(agent: Agent, octets: str) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(agent.path)
    sock.sendall(bytes.fromhex(octets))
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(100) == b""
    assert session(agent).request("version")["version"] == b"1"


def test_a_bad_message_in_a_good_packet_is_one_clear_error(agent: Agent) -> None:
    client = session(agent)
    client.transport.send(Packet(PacketType.CMD_REQUEST, "echo", b"\x02").serialize())
    answer = PackageMessage.deserialize(FiniteStream(client.transport.receive()[1:]))
    assert answer["success"] == b"no" and b"not started" in answer["errmsg"]
    assert client.request("version")["version"] == b"1"


def test_the_end_with_a_client_that_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """asyncio's streams in Python 3.11 log a connection's task that was cancelled as an unhandled error."""

    async def scenario() -> None:
        server = ControlServer(str(tmp_path / "control"), {})
        await server.start()
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "control"))
        await asyncio.sleep(0.05)
        await server.close()
        await asyncio.sleep(0.05)
        assert await reader.read() == b""
        writer.close()

    with caplog.at_level(logging.DEBUG):
        asyncio.run(scenario())
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_socket_file(tmp_path: Path) -> None:
    path = tmp_path / "c.vici"
    # a socket somebody left behind
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    agent = Agent(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(StateError, match="another agent"):
        asyncio.run(ControlServer(str(path), {}).start())
    assert session(agent).request("version")["version"] == b"1"
    agent.close()
    assert not path.exists()
    grouped = Agent(path, group=grp.getgrgid(os.getgid()).gr_name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    grouped.close()


def test_socket_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for path, complaint in [
        (tmp_path / "file", "not a socket"),
        (tmp_path / "no" / "dir", "No such file"),
        (tmp_path / ("x" * 120), "too long"),
    ]:
        with pytest.raises(ConfigError, match=complaint):
            asyncio.run(ControlServer(str(path), {}).start())
    with pytest.raises(ConfigError, match="no group"):
        asyncio.run(ControlServer(str(tmp_path / "c"), {}, group="no-such-group").start())
    assert (tmp_path / "file").read_text() == "precious"


def test_control_client(agent: Agent) -> None:
    with ControlClient(agent.path, timeout=5) as client:
        assert client.request("version")["daemon"] == "ikectx"
        seen: list[str] = []
        answer = client.stream(
            "count", "number", {"to": "3", "none": None}, lambda item: seen.append(item["n"])
        )
        assert seen == ["0", "1", "2"] and answer["total"] == "3"
        with pytest.raises(RemoteError, match="rekey is in flight") as caught:
            client.request("busy")
        assert (caught.value.exit_code, caught.value.status, caught.value.hint) == (
            7,
            Status.BUSY,
            "try again",
        )
        with pytest.raises(LinkError, match="no command"):
            client.request("nonsense")
        with pytest.raises(LinkError, match="no event"):
            client.stream("count", "nonsense")
    with pytest.raises(LinkError, match="in time"):
        ControlClient(agent.path, timeout=0.2).request("slow")
    with pytest.raises(LinkError, match="no agent"):
        ControlClient(agent.path + ".not").request("version")


@pytest.mark.parametrize("mistake", [BrokenPipeError(32, "Broken pipe"), KeyError("ms")])
def test_what_fails_in_showing_an_event_is_not_blamed_on_the_agent(agent: Agent, mistake: Exception) -> None:
    def show(item: object) -> None:
        raise mistake

    with ControlClient(agent.path) as client:
        with pytest.raises(type(mistake)):
            client.stream("count", "number", {}, show)
        shown: list[object] = []
        client.stream("count", "number", {}, shown.append)  # over a connection of its own
        assert shown
