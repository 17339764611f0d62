"""The VICI codec, the control socket against the official client, and charon's client against a stand-in."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import vici
from hypothesis import given, settings
from hypothesis import strategies as st
from vici.exception import CommandException, EventUnknownException, SessionException
from vici.protocol import FiniteStream
from vici.protocol import Message as PackageMessage

from ikectx.context import Secret
from ikectx.errors import BusyError, CharonError, ConfigError, LinkError, StateError, WireError
from ikectx.numbers import Status
from vici_bridge.control import ControlServer, Response
from vici_bridge.vici import CharonVici, ControlClient, RemoteError, as_text
from vici_bridge.vici_codec import (
    MAX_PACKET,
    MAX_VALUE,
    Deframer,
    Packet,
    PacketType,
    json_of,
    parse_message,
    serialize_message,
    with_json,
)

# The example of the protocol description in strongSwan's src/libcharon/plugins/vici/README.md:
# key1 = value1, section1 { sub-section { key2 = value2 }, list1 = item1, item2 }
DOCUMENTED = bytes.fromhex(
    "03 04 6b657931 0006 76616c756531"
    "01 08 73656374696f6e31"
    "01 0b 7375622d73656374696f6e"
    "03 04 6b657932 0006 76616c756532"
    "02"
    "04 05 6c69737431 05 0005 6974656d31 05 0005 6974656d32 06"
    "02"
)
TREE = {
    "key1": "value1",
    "section1": {"sub-section": {"key2": "value2"}, "list1": ["item1", "item2"]},
}

texts = st.text(st.characters(codec="utf-8"), max_size=40)
keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
trees = st.recursive(
    st.dictionaries(keys, st.one_of(texts, st.lists(texts, max_size=4)), max_size=4),
    lambda inner: st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)


def test_documented_message() -> None:
    assert parse_message(DOCUMENTED) == TREE
    assert serialize_message(TREE) == DOCUMENTED
    assert PackageMessage.serialize(TREE) == DOCUMENTED


@given(trees)
@settings(max_examples=150, deadline=None)
def test_round_trip_and_agreement_with_the_package(tree: dict[str, Any]) -> None:
    data = serialize_message(tree)
    assert parse_message(data) == tree
    assert PackageMessage.serialize(tree) == data
    assert as_text(PackageMessage.deserialize(FiniteStream(data))) == tree
    assert parse_message(data, foreign=True) == tree


@given(st.dictionaries(keys, st.one_of(st.binary(max_size=20), st.lists(st.binary(max_size=9))), max_size=4))
@settings(max_examples=150, deadline=None)
def test_foreign_text_is_read_as_the_package_reads_it(tree: dict[str, Any]) -> None:
    data = PackageMessage.serialize(tree)
    assert parse_message(data, foreign=True) == as_text(tree)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_octets_give_a_tree_or_wire_error(data: bytes) -> None:
    try:
        tree = parse_message(data)
    except WireError:
        return
    assert serialize_message(tree) == data


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_message_gives_a_tree_or_wire_error(data: st.DataObject) -> None:
    damaged = bytearray(DOCUMENTED)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        tree = parse_message(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    except WireError:
        return
    assert isinstance(tree, dict)


@pytest.mark.parametrize(
    "octets, complaint",
    [
        ("02", "not started"),
        ("01 01 61", "does not end"),
        ("07", "element 7"),
        ("05 0001 61", "element 5"),
        ("04 01 61 03", "in a list"),
        ("03 00 0000", "empty name"),
        ("03 01 61 0005 61", "5 octets, 1 are left"),
        ("03 01 ff 0000", "not UTF-8"),
        ("03 01 61 0001 ff", "not UTF-8"),
        ("03 01 61 0000 03 01 61 0000", "twice"),
        ("01 01 61" * 40, "deeply"),
    ],
)
def test_bad_messages(octets: str, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        parse_message(bytes.fromhex(octets))


@pytest.mark.parametrize(
    "tree, complaint",
    [
        ({"": "x"}, "empty"),
        ({"k" * 256: "x"}, "256"),
        ({"k": "x" * 65536}, "65536"),
        ({"k": Secret(b"key")}, "Secret"),
        ({"k": ["\ud800"]}, "Unicode"),
        ({"k": b"octets"}, "bytes"),
    ],
)
def test_messages_that_cannot_be_sent(tree: dict[str, Any], complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        serialize_message(tree)


def test_convenient_values() -> None:
    tree = {"yes": True, "no": False, "n": 7, "left-out": None, "list": (1, 2)}
    assert parse_message(serialize_message(tree)) == {"yes": "yes", "no": "no", "n": "7", "list": ["1", "2"]}


PACKETS = [
    Packet(PacketType.CMD_REQUEST, "version"),
    Packet(PacketType.CMD_REQUEST, "list-sas", DOCUMENTED),
    Packet(PacketType.CMD_RESPONSE, body=DOCUMENTED),
    Packet(PacketType.CMD_UNKNOWN),
    Packet(PacketType.EVENT_REGISTER, "log"),
    Packet(PacketType.EVENT_CONFIRM),
    Packet(PacketType.EVENT, "log", DOCUMENTED),
]


def test_deframer_whole_bytewise_and_with_a_tail() -> None:
    stream = b"".join(packet.framed() for packet in PACKETS)
    assert Deframer().receive(stream) == PACKETS
    slow = Deframer()
    got = [packet for at in range(len(stream)) for packet in slow.receive(stream[at : at + 1])]
    assert got == PACKETS
    tail = Deframer()
    assert tail.receive(stream + b"\0\0\0") == PACKETS
    assert tail.waiting == 3


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_deframer_survives_any_octets(data: bytes) -> None:
    try:
        packets = Deframer().receive(data)
    except WireError:
        return
    assert all(isinstance(packet, Packet) for packet in packets)


@pytest.mark.parametrize(
    "octets",
    ["00000000", "00080001", "ffffffff", "00000001 08", "00000002 0000", "00000002 0261", "00000001 03"],
)
def test_deframer_refuses(octets: str) -> None:
    with pytest.raises(WireError):
        Deframer().receive(bytes.fromhex(octets))


def test_packet_limits() -> None:
    with pytest.raises(WireError, match="limit"):
        Packet(PacketType.CMD_RESPONSE, body=bytes(MAX_PACKET)).framed()
    with pytest.raises(WireError):
        Packet(PacketType.CMD_UNKNOWN, "name")


def test_json_in_pieces() -> None:
    small, large = {"a": 1}, [{"id": "ä" * 50, "n": n} for n in range(2000)]
    assert json_of(with_json(small, to="nsg")) == small
    message = with_json(large)
    assert len(message["json"]) > 1 and all(len(piece) <= MAX_VALUE for piece in message["json"])
    assert json_of(parse_message(serialize_message(message))) == large
    assert json_of({}) is None
    with pytest.raises(WireError):
        json_of({"json": "{"})
    with pytest.raises(WireError, match="Secret"):
        with_json({"key": Secret(b"k")})


# -- the control socket


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
    events = listening.listen(["moved"], timeout=2)

    def emit() -> None:
        time.sleep(0.2)
        agent.loop.call_soon_threadsafe(agent.server.emit, "moved", {"sa": "1"})

    threading.Thread(target=emit, daemon=True).start()
    assert next(events) == (b"moved", {"sa": b"1"})
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


# -- charon's side: a stand-in that answers from a table, or with octets given


class StandIn:
    """A server in charon's place: `answer(packet)` gives the octets to send back; None: close."""

    def __init__(self, path: Path, answer: Callable[[Packet], bytes | None]) -> None:
        self.path = str(path)
        self.answer = answer
        self.conns: list[socket.socket] = []
        self.open()

    def open(self) -> None:
        Path(self.path).unlink(missing_ok=True)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(self.path)
        self.sock.listen()
        threading.Thread(target=self.accept, args=(self.sock,), daemon=True).start()

    def accept(self, sock: socket.socket) -> None:
        while True:
            try:
                conn, _ = sock.accept()
            except OSError:
                return
            self.conns.append(conn)
            threading.Thread(target=self.serve, args=(conn,), daemon=True).start()

    def serve(self, conn: socket.socket) -> None:
        deframer = Deframer()
        try:
            while data := conn.recv(65536):
                for packet in deframer.receive(data):
                    answer = self.answer(packet)
                    if answer is None:
                        conn.close()
                        return
                    conn.sendall(answer)
        except OSError:
            pass

    def close(self) -> None:
        for sock in [self.sock, *self.conns]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self.conns.clear()


def response(**tree: Any) -> bytes:
    return Packet(PacketType.CMD_RESPONSE, body=serialize_message(tree)).framed()


CONFIRM = Packet(PacketType.EVENT_CONFIRM).framed()


def like_charon(packet: Packet) -> bytes:
    if packet.type in (PacketType.EVENT_REGISTER, PacketType.EVENT_UNREGISTER):
        if packet.name == "ike-update":
            return Packet(PacketType.EVENT_UNKNOWN).framed()
        return CONFIRM
    sa = {"home": {"uniqueid": "7", "state": "ESTABLISHED", "child-sas": {"net-1": {"name": "net"}}}}
    match packet.name:
        case "version":
            return response(daemon="charon-systemd", version="5.9.8")
        case "list-sas":
            return Packet(PacketType.EVENT, "list-sa", serialize_message(sa)).framed() + response()
        case "rekey":
            return response(success=True, matches=len(packet.message))
        case "terminate":
            return response(success=False, errmsg="no matching SAs to terminate found")
    return Packet(PacketType.CMD_UNKNOWN).framed()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def charon(tmp_path: Path) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path / "charon.vici", like_charon)
    yield stand_in
    stand_in.close()


def test_charon_calls(charon: StandIn) -> None:
    client = CharonVici("unix://" + charon.path)
    assert client.version()["version"] == "5.9.8"
    (sa,) = client.list_sas(ike_id=7)
    assert (sa["name"], sa["uniqueid"], sa["child-sas"]["net-1"]["name"]) == ("home", "7", "net")
    assert client.rekey(ike_id=3) == 1
    with pytest.raises(CharonError, match="refused terminate: no matching"):
        client.terminate(ike_id=9)
    with pytest.raises(CharonError, match="does not know"):
        client.get_pools()
    client.close()


def test_sas_are_read_as_the_caller_likes(tmp_path: Path) -> None:
    def three(packet: Packet) -> bytes:
        if packet.name != "list-sas" or packet.type is not PacketType.CMD_REQUEST:
            return like_charon(packet)
        sas = [{"mn": {"uniqueid": str(number), "initiator-spi": f"{number:016x}"}} for number in (1, 2, 3)]
        items = (Packet(PacketType.EVENT, "list-sa", serialize_message(sa)).framed() for sa in sas)
        return b"".join(items) + response()

    charon = StandIn(tmp_path / "charon.vici", three)
    client = CharonVici(charon.path)
    told = client.read_sas(bytes)
    assert [parse_message(octets)["mn"]["uniqueid"] for octets in told] == ["1", "2", "3"]
    assert client.read_sas(lambda octets: b"0000000000000002" in octets) == [False, True, False]
    with pytest.raises(WireError):
        client.read_sas(lambda octets: parse_message(octets[1:]))
    assert client.version()["daemon"] == "charon-systemd"
    client.close()
    charon.close()


def test_an_item_of_nonsense_leaves_nothing_for_the_next_answer(tmp_path: Path) -> None:
    def spoilt(packet: Packet) -> bytes:
        if packet.name != "list-sas" or packet.type is not PacketType.CMD_REQUEST:
            return like_charon(packet)
        return 2 * Packet(PacketType.EVENT, "list-sa", b"\x07").framed() + response()

    charon = StandIn(tmp_path / "charon.vici", spoilt)
    client = CharonVici(charon.path)
    with pytest.raises(WireError, match="list-sas does not parse"):
        client.list_sas()
    assert client.version()["daemon"] == "charon-systemd"
    client.close()
    charon.close()


def test_charon_restarts(charon: StandIn) -> None:
    client = CharonVici(charon.path)
    client.version()
    charon.close()
    with pytest.raises(CharonError, match="cannot be used"):
        client.version()
    charon.open()
    assert client.version()["daemon"] == "charon-systemd"
    charon.close()
    charon.open()
    assert client.version()["daemon"] == "charon-systemd"


@pytest.mark.parametrize(
    "octets",
    [
        "00000001 01" + "",
        "00000003 01 03 ff",
        "00000005 01 03 01 61 00",
        "00000004 01 04 01 61",
        "00000002 01 02",
        "00000004 01 01 01 61",
        "0000000b 01 03 07 73756363657373",
        "00000010 01 03 07 73756363657373 0002 6e6f 00",
        "00000001 09",
        "00000001 07",
        "00000005 01 03 01 ff 00 00 00 00 00",
    ],
)
def test_charon_talks_nonsense(tmp_path: Path, octets: str) -> None:
    stand_in = StandIn(tmp_path / "c", lambda packet: bytes.fromhex(octets))
    client = CharonVici(stand_in.path, timeout=0.3)
    for _ in range(2):
        with contextlib.suppress(WireError, CharonError):
            client.version()
    stand_in.close()


@given(st.binary(max_size=40))
@settings(max_examples=60, deadline=None)
def test_charon_talks_any_octets(noise: bytes) -> None:
    path = Path(f"/tmp/ikectx-test-{os.getpid()}.vici")
    stand_in = StandIn(path, lambda packet: len(noise).to_bytes(4) + noise)
    client = CharonVici(str(path), timeout=0.5)
    try:
        client.version()
    except (WireError, CharonError):
        pass
    finally:
        client.close()
        stand_in.close()
        path.unlink()


def test_charon_stops_in_the_middle_of_a_packet(tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path / "c", lambda packet: b"\0\0\0\x10\x01")
    started = time.monotonic()
    with pytest.raises(CharonError, match="in time"):
        CharonVici(stand_in.path, timeout=0.3).version()
    assert time.monotonic() - started < 3
    stand_in.close()


def test_charon_events_and_restart(charon: StandIn) -> None:
    client = CharonVici(charon.path)
    events: list[tuple[str, dict[str, Any]]] = []
    states: list[bool] = []

    def handle(name: str, message: dict[str, Any]) -> None:
        events.append((name, message))
        raise ValueError("a callback that fails")

    client.listen(handle, on_state=states.append)
    wait_for(lambda: states == [True])
    body = serialize_message({"up": "yes"})
    charon.conns[0].sendall(Packet(PacketType.EVENT, "ike-updown", body).framed())
    wait_for(lambda: events == [("ike-updown", {"up": "yes"})])
    charon.close()
    wait_for(lambda: states == [True, False])
    charon.open()
    wait_for(lambda: states == [True, False, True])
    charon.conns[0].sendall(Packet(PacketType.EVENT, "child-updown", b"").framed())
    wait_for(lambda: len(events) == 2)
    client.close()
    wait_for(lambda: states[-1] is False)


def test_uri() -> None:
    for uri in ("tcp://127.0.0.1:4502", ""):
        with pytest.raises(ConfigError):
            CharonVici(uri)


def test_error_over_the_socket_keeps_no_unusable_code() -> None:
    error = RemoteError.of({"success": "no", "exit": "9999", "status": "x"})
    assert error.exit_code == 1 and error.status is Status.FAILED and json.dumps(str(error))
