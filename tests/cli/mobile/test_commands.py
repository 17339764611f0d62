"""`ikectx mobile` against a stand-in for the agent: what it asks for, what it prints, its exit codes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ikectx.errors import BusyError, LinkError
from ikectx_cli import commands
from ikectx_cli.mobile import agent as mobile_agent
from tests.control_agent import Cli, StandIn
from vici_bridge.vici.codec import Message, with_json
from vici_bridge.vici.control import Response

MOVED = {
    "result": "moved",
    "exit_code": 0,
    "from": "psg",
    "to": "nsg",
    "serves": "nsg",
    "connection": "home",
    "old": {"local": "192.0.2.7:4500", "remote": "198.51.100.1:4500"},
    "new": {"local": "203.0.113.7:4500", "remote": "198.51.100.2:4500"},
    "children": ["net"],
    "vips": ["10.4.0.10"],
    "detail": "",
    "hint": "",
    "messages": 3,
    "octets": 412,
    "retransmissions": 1,
    "ms": 87.4,
}
ANNOUNCED = {**MOVED, "result": "announced", "serves": "psg", "new": None, "retransmissions": 0}
SILENT = {
    **MOVED,
    "result": "silent",
    "exit_code": 5,
    "serves": None,
    "new": None,
    "detail": "no answer: which gateway serves the SA is not known",
    "hint": "is the agent of nsg up?",
}


class Agent(StandIn):
    """A mobile node's agent."""

    def __init__(self, path: Path) -> None:
        self.reports: dict[str, dict[str, Any]] = {"arrive": MOVED, "announce": ANNOUNCED}
        super().__init__(
            path,
            {"handover": self.handover, "status": self.status, "cancel": self.cancel},
            {"handover": "handover-progress"},
        )

    async def handover(self, request: Message) -> AsyncIterator[Message]:
        self.asked.append(("handover", request))
        if request["to"] == "busy":
            raise BusyError("another handover is under way", hint="see `ikectx mobile status`")
        yield with_json({"phase": "asking", "ms": 0.0, "to": request["to"], "detail": "asking nsg"})
        yield with_json({"phase": "asked", "ms": 41.5, "to": request["to"], "detail": ""})
        yield Response(with_json(self.reports[request["what"]]))

    async def status(self, request: Message) -> Message:
        return with_json({"sas": [{"name": "home", "gateway": "psg"}], "announced": None})

    async def cancel(self, request: Message) -> Message:
        self.asked.append(("cancel", request))
        return with_json({"cancelled": len(self.asked) == 1})


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli[Agent]]:
    agent = Agent(tmp_path / "m.vici")
    yield Cli(agent, capsys, "mobile")
    agent.close()


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ((), [("handover", {"to": "nsg", "what": "arrive"})]),
        (("--reactive",), [("handover", {"to": "nsg", "what": "arrive", "anew": "yes"})]),
        (("--predictive",), [("handover", {"to": "nsg", "what": "announce"})]),
        (
            ("--predictive", "--now", "--address", "203.0.113.7"),
            [
                ("handover", {"to": "nsg", "what": "announce"}),
                ("handover", {"to": "nsg", "what": "arrive", "address": "203.0.113.7"}),
            ],
        ),
        (
            ("--address", "203.0.113.7", "--ike", "home"),
            [("handover", {"to": "nsg", "ike": "home", "what": "arrive", "address": "203.0.113.7"})],
        ),
        (("--ike-id", "3"), [("handover", {"to": "nsg", "ike-id": "3", "what": "arrive"})]),
    ],
)
def test_what_the_agent_is_asked(cli: Cli[Agent], words: tuple[str, ...], asked: list[Any]) -> None:
    code, _, _ = cli("handover", "--to", "nsg", *words)
    assert code == 0
    assert cli.agent.asked == asked


def test_a_report_for_people(cli: Cli[Agent]) -> None:
    code, out, err = cli("handover", "--to", "nsg")
    assert code == 0
    assert out.splitlines() == [
        "home moved from psg to nsg",
        "  192.0.2.7:4500 - 198.51.100.1:4500  ->  203.0.113.7:4500 - 198.51.100.2:4500",
        "  with net, 10.4.0.10",
        "  on the air: 3 messages, 412 octets, 1 of them sent again; 87 ms",
    ]
    assert [line.split() for line in err.splitlines()] == [["asking", "nsg"], ["42", "ms", "answered"]]


def test_an_announcement_for_people(cli: Cli[Agent]) -> None:
    code, out, _ = cli("handover", "--to", "nsg", "--predictive")
    assert code == 0
    assert "psg serves until this node moves" in out
    assert "ikectx mobile handover --to nsg" in out


def test_a_failure_for_people(cli: Cli[Agent]) -> None:
    cli.agent.reports["arrive"] = SILENT
    code, out, _ = cli("handover", "--to", "nsg")
    assert code == LinkError.exit_code
    assert out.splitlines()[:2] == [
        "home was not moved to nsg: no answer: which gateway serves the SA is not known",
        "  served by: not known",
    ]
    assert out.splitlines()[-1] == "  is the agent of nsg up?"


def test_a_move_that_left_something_behind(cli: Cli[Agent]) -> None:
    cli.agent.reports["arrive"] = {**MOVED, "exit_code": 10, "detail": "charon lags", "hint": "look there"}
    code, out, _ = cli("handover", "--to", "nsg")
    assert code == 10
    assert out.splitlines()[-2:] == ["  but: charon lags", "  look there"]


def test_already_there(cli: Cli[Agent]) -> None:
    cli.agent.reports["arrive"] = {**MOVED, "result": "already"}
    assert cli("handover", "--to", "nsg")[1] == "home is served by nsg already\n"


def test_an_announcement_that_is_refused_is_not_completed(cli: Cli[Agent]) -> None:
    cli.agent.reports["announce"] = {**SILENT, "result": "refused", "exit_code": 4}
    code, _, _ = cli("handover", "--to", "nsg", "--predictive", "--now")
    assert code == 4
    assert len(cli.agent.asked) == 1


def test_json(cli: Cli[Agent]) -> None:
    code, out, err = cli("handover", "--to", "nsg", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"ok": True, **MOVED}
    code, out, _ = cli("status", "--json")
    assert json.loads(out)["sas"][0]["gateway"] == "psg"
    code, out, err = cli("handover", "--to", "busy", "--json")
    assert code == BusyError.exit_code
    assert json.loads(out)["hint"] == "see `ikectx mobile status`"


def test_status_and_cancel(cli: Cli[Agent]) -> None:
    assert "gateway: psg" in cli("status")[1]
    assert cli("cancel")[1] == "cancelled\n"
    assert cli("cancel")[1] == "nothing was announced\n"
    assert [json.loads(cli("cancel", "--json")[1])] == [{"cancelled": False}]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("handover",), "--to"),
        (("handover", "--to", "nsg", "--now"), "--now goes with"),
        (("handover", "--to", "nsg", "--predictive", "--address", "192.0.2.1"), "--address is for"),
        (("handover", "--to", "nsg", "--predictive", "--reactive"), "--predictive and --reactive"),
        (("handover", "--to", "nsg", "--predictive", "--now", "--address", "nsg"), "not an IP address"),
        (("handover", "--to", "nsg", "--reactive", "--address", "192.0.2"), "not an IP address"),
        (("handover", "--to", "nsg", "--ike", "home", "--ike-id", "3"), "--ike and --ike-id"),
    ],
)
def test_wrong_arguments(cli: Cli[Agent], args: tuple[str, ...], said: str) -> None:
    """They are told before the agent does the first half of what was asked for."""
    code, _, err = cli(*args)
    assert code == 2
    assert said in err
    assert cli.agent.asked == []


def test_where_the_agent_is(
    tmp_path: Path, cli: Cli[Agent], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the file's name before `mobile`, after it, or in the environment; or by the socket."""
    gateways = '[[gateway]]\nname = "psg"\naddress = "192.0.2.1"\n'
    config = tmp_path / "mobile.toml"
    config.write_text(f'[control]\nsocket = "{cli.agent.path}"\n{gateways}')
    for words in (
        ["--config", str(config), "mobile", "cancel"],
        ["mobile", "--config", str(config), "cancel"],
        ["--socket", cli.agent.path, "mobile", "cancel"],
    ):
        assert commands.run(words) == 0
    monkeypatch.setenv("IKECTX_MOBILE_CONFIG", str(config))
    assert commands.run(["mobile", "cancel"]) == 0
    monkeypatch.setenv("IKECTX_MOBILE_CONFIG", str(tmp_path / "none.toml"))
    assert commands.run(["mobile", "cancel"]) == 2
    assert "none.toml" in capsys.readouterr().err
    assert commands.run(["mobile", "--socket", str(tmp_path / "nobody"), "status"]) == LinkError.exit_code
    assert "systemctl start ikectx-mobile, or ikectx mobile serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--socket", "/run/other", "mobile"], ["mobile", "--socket", "/run/other"]]
)
def test_the_agent_serves_the_socket_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    served: list[str] = []
    monkeypatch.setattr(mobile_agent, "run", lambda config: served.append(config.control.socket) or 0)
    config = tmp_path / "mobile.toml"
    config.write_text('[control]\nsocket = "/run/own"\n[[gateway]]\nname = "psg"\naddress = "192.0.2.1"\n')
    assert commands.run([*words, "serve", "--config", str(config)]) == 0
    assert commands.run(["mobile", "--config", str(config), "serve"]) == 0
    assert served == ["/run/other", "/run/own"]
