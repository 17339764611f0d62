"""charon's client against a stand-in that answers from a table, or with octets given."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import CharonError, ConfigError, WireError
from ikectx.numbers import Status
from vici_bridge.vici.client import CharonVici, RemoteError
from vici_bridge.vici.codec import Deframer, Packet, PacketType, serialize_message


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


def test_uri() -> None:
    for uri in ("tcp://127.0.0.1:4502", ""):
        with pytest.raises(ConfigError):
            CharonVici(uri)


def test_error_over_the_socket_keeps_no_unusable_code() -> None:
    error = RemoteError.of({"success": "no", "exit": "9999", "status": "x"})
    assert error.exit_code == 1 and error.status is Status.FAILED and json.dumps(str(error))
