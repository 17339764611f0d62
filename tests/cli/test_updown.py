"""The updown hook: what the agent is told, and the script that runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ikectx_cli import commands, config, updown
from tests.control_agent import Agent
from vici_bridge.vici.codec import Deframer, parse_message


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    stand_in = Agent(tmp_path / "c.vici")
    yield stand_in
    stand_in.close()


TOLD = {"verb": "down", "reqid": "3", "child": "net"}
PLUTO = {
    "PLUTO_VERB": "down-client",
    "PLUTO_CONNECTION": "net",
    "PLUTO_UNIQUEID": "7",
    "PLUTO_REQID": "3",
    "PLUTO_PEER_ID": "mn@exämple.org",
}


def run_hook(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ikectx_cli.main", "updown", *args],
        env={"PATH": os.environ["PATH"], **PLUTO, **env},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_hook_tells_the_agent_and_runs_the_script(agent: Agent) -> None:
    done = run_hook(
        f"--socket={agent.path}",
        "--connection",
        "home",
        "--then",
        'echo "$PLUTO_VERB" args',
        "--",
        "--one",
        "two",
    )
    assert (done.returncode, done.stdout) == (0, "down-client args --one two\n"), done.stderr
    assert agent.told.wait(5)
    assert agent.asked == [("updown", {**PLUTO, **TOLD, "connection": "home"})]


def test_hook_waits_for_the_agent_when_an_sa_goes_down_only(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.may_answer.clear()
    asked = updown.request(PLUTO, "home")
    updown.tell(agent.path, asked, answer=False)
    assert capsys.readouterr().out == ""
    waiting = threading.Thread(target=updown.tell, args=(agent.path, asked), kwargs={"answer": True})
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    agent.may_answer.set()
    waiting.join()
    assert capsys.readouterr().out == ""
    agent.may_answer.clear()
    monkeypatch.setattr(updown, "DOWN_PATIENCE", 0.1)
    updown.tell(agent.path, asked, answer=True)
    assert "silent" in capsys.readouterr().out


def test_hook_keeps_the_scripts_exit_code_and_survives_a_missing_agent(tmp_path: Path) -> None:
    config = tmp_path / "ikectx.toml"
    config.write_text(f'[control]\nsocket = "{tmp_path}/none"\n')
    done = run_hook("--config", str(config), "--then", "exit 3 #")
    assert done.returncode == 3 and "was not told" in done.stdout
    done = run_hook("--config", str(tmp_path / "broken"), "--then", "true")
    assert done.returncode == 0


def test_hook_says_nothing_when_the_agent_itself_runs_the_script(agent: Agent) -> None:
    done = run_hook("--socket", agent.path, "--then", "true", IKECTX_TRANSFER="1")
    assert (done.returncode, done.stdout) == (0, "")
    assert not agent.told.wait(0.2)


def test_hook_runs_the_stock_script_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    became: list[tuple[str, list[str]]] = []

    def execv(path: str, args: list[str]) -> None:
        became.append((path, args))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    stock = tmp_path / "_updown"
    monkeypatch.setattr(updown, "STOCK", (str(tmp_path / "none"), str(stock)))
    with pytest.raises(SystemExit) as gone:
        updown.main(["--socket", str(tmp_path / "none"), "iptables"])
    assert gone.value.code == 0 and became == []
    stock.write_text("#!/bin/sh\n")
    stock.chmod(0o755)
    with pytest.raises(SystemExit):
        updown.main(["iptables"])
    assert became == [(str(stock), [str(stock), "iptables"])]


def test_hook_finds_the_agent_where_the_command_line_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("IKECTX_SOCKET", "IKECTX_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    assert (updown.DEFAULT_SOCKET, updown.DEFAULT_CONFIG) == (config.DEFAULT_SOCKET, config.DEFAULT_PATH)
    (tmp_path / "x.toml").write_text('[control]\nsocket = "/run/x"\n')
    monkeypatch.setenv("IKECTX_CONFIG", str(tmp_path / "x.toml"))
    assert updown.socket_path({}) == "/run/x"
    monkeypatch.setenv("IKECTX_SOCKET", "/run/y")
    assert updown.socket_path({}) == "/run/y"
    assert updown.socket_path({"socket": "/run/z"}) == "/run/z"


def test_hook_packet_is_what_the_codec_makes_of_it() -> None:
    (packet,) = Deframer().receive(updown.request({**PLUTO, "HOME": "/", "PLUTO_BAD": "\udcff"}, ""))
    assert packet.name == "updown"
    assert parse_message(packet.body) == {**PLUTO, **TOLD, "PLUTO_BAD": "?"}


def test_hook_through_the_group_and_its_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        commands.run(["--config", "/x", "updown", "--help"])
    assert "PLUTO_*" in capsys.readouterr().out
    assert updown.parse(["--config", "/x", "--then=a b", "-x", "--", "--then"]) == (
        {"config": "/x", "then": "a b"},
        ["-x", "--then"],
    )
    assert updown.socket_path({"socket": "/s"}) == "/s"
