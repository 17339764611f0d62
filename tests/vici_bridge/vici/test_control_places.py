"""The operator always gets in: idle and half-spoken clients give way; a request holds what it may hold."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ikectx.errors import UsageError
from ikectx_cli.requests import GATEWAY
from tests.vici_bridge.vici.test_client import wait_for
from tests.vici_bridge.vici.test_control import Agent
from vici_bridge.vici import control
from vici_bridge.vici.client import ControlClient, RemoteError
from vici_bridge.vici.codec import Packet, PacketType
from vici_bridge.vici.request_keys import check


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    monkeypatch.setattr(control, "RESERVE", 0)
    served = Agent(
        tmp_path / "ikectx.vici", takes={"version": {}, "count": {"to": "text", "dry-run": "flag"}}
    )
    yield served
    served.close()


def knock(agent: Agent, octets: bytes = b"") -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(agent.path)
    if octets:  # even nothing cannot be sent to an end that has closed
        sock.sendall(octets)
    return sock


def cut_off(sock: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        return sock.recv(1) == b""
    return True


def version(agent: Agent) -> str:
    with ControlClient(agent.path, timeout=5) as client:
        return str(client.request("version")["version"])


def test_idle_clients_lock_nobody_out(agent: Agent) -> None:
    crowd = [knock(agent) for _ in range(control.MAX_CLIENTS)]
    wait_for(lambda: len(agent.server._clients) == control.MAX_CLIENTS)
    for _ in range(3):
        assert version(agent) == "1"
    assert cut_off(crowd[0])  # who has been idle longest
    for sock in crowd:
        sock.close()


def test_a_listener_gives_way_after_those_who_wait_for_nothing(agent: Agent) -> None:
    listener = knock(agent, Packet(PacketType.EVENT_REGISTER, "moved").framed())
    assert listener.recv(100)
    crowd = [knock(agent) for _ in range(control.MAX_CLIENTS - 1)]
    wait_for(lambda: len(agent.server._clients) == control.MAX_CLIENTS)
    assert version(agent) == "1"
    assert cut_off(crowd[0])
    agent.loop.call_soon_threadsafe(agent.server.emit, "moved", {"sa": "1"})
    assert listener.recv(100)
    for sock in (listener, *crowd):
        sock.close()


def test_clients_who_are_served_stay_and_root_has_a_reserve(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "MAX_CLIENTS", 2)
    slow = Packet(PacketType.CMD_REQUEST, "slow").framed()
    crowd = [knock(agent, slow) for _ in range(2)]
    wait_for(lambda: sum(client.busy for client in agent.server._clients) == 2)
    assert cut_off(knock(agent))
    monkeypatch.setattr(control, "RESERVE", 1)
    assert version(agent) == "1"
    monkeypatch.setattr(control, "_user", lambda writer: 12345)
    assert cut_off(knock(agent))
    for sock in crowd:
        sock.close()


def test_strangers_do_not_push_root_away(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_CLIENTS", 2)
    mine = [knock(agent) for _ in range(2)]
    wait_for(lambda: len(agent.server._clients) == 2)
    monkeypatch.setattr(control, "_user", lambda writer: 12345)
    assert cut_off(knock(agent))
    for sock in mine:
        sock.close()


def test_who_does_not_ask_or_does_not_finish_is_cut_off(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "ASKS_WITHIN", 0.3)
    asked = Packet(PacketType.CMD_REQUEST, "version").framed()
    silent, half, both = knock(agent), knock(agent, asked[:6]), knock(agent, asked + asked[:6])
    assert both.recv(1000)
    began = time.monotonic()
    for sock in (silent, half, both):
        assert cut_off(sock)
    assert time.monotonic() - began < 10
    patient = knock(agent, asked)
    assert patient.recv(1000)
    time.sleep(0.6)  # between two requests nobody is hurried
    patient.sendall(asked)
    assert patient.recv(1000)
    patient.close()


def test_octets_one_by_one_win_no_time(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "ASKS_WITHIN", 0.5)
    sock = knock(agent)
    began = time.monotonic()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for octet in Packet(PacketType.CMD_REQUEST, "version", bytes(200)).framed():
            sock.sendall(bytes([octet]))
            time.sleep(0.1)
    assert time.monotonic() - began < 10
    sock.close()


def test_a_mistyped_key_is_refused(agent: Agent) -> None:
    with ControlClient(agent.path, timeout=5) as client:
        for wrong, words in [
            ({"dryrun": "yes"}, "count has no key 'dryrun'"),
            ({"dry-run": "true"}, "dry-run must be yes or no"),
            ({"to": ["1"]}, "to must be a text, not a list"),
            ({"to": {"a": "1"}}, "to must be a text, not a section"),
        ]:
            with pytest.raises(RemoteError, match=words) as caught:
                client.request("count", wrong)
            assert caught.value.exit_code == 2
        assert client.request("count", {"to": "2", "dry-run": "no"})["total"] == "2"
        assert client.request("echo", {"any": "thing"})  # a command that is not described


def test_the_hook_may_tell_all_that_charon_told_it() -> None:
    check("updown", {"verb": "down", "PLUTO_VERB": "down-client", "PLUTO_NEW_IN_7_0": ""}, GATEWAY["updown"])
    with pytest.raises(UsageError):
        check("updown", {"pluto": ""}, GATEWAY["updown"])
