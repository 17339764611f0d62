"""The command line against an agent that answers from a table; rendering; the updown hook."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import click
import pytest

from ikectx.context import (
    ChildContext,
    Endpoint,
    Identity,
    IkeContext,
    IkeGeneration,
    ReplayState,
    Secret,
    TrafficSelector,
)
from ikectx.errors import BusyError, IkectxError, UnknownSaError
from ikectx.numbers import Encr, IdType, Integ, Prf
from ikectx_cli import __version__, commands, render, updown
from ikectx_cli.progress import Progress
from vici_bridge.control import ControlServer, Response
from vici_bridge.vici_codec import Deframer, Message, parse_message, with_json

SA = {
    "ike_id": 7,
    "name": "home",
    "state": "ESTABLISHED",
    "spi_i": "11" * 8,
    "spi_r": "22" * 8,
    "remote": "203.0.113.5:4500",
    "remote_id": "mn@example.org",
    "remote_eap_id": "",
    "vips": ["10.9.0.1"],
    "established": 4000,
    "movable": True,
    "children": [{"name": "net", "spi_in": "c0ffee00"}],
}

REPORT = {
    "transfer_id": "t1",
    "mn": "mn@example.org",
    "result": "moved",
    "phases_ms": {"export": 1.5, "freeze": 20.0},
    "cxtp_octets": 600,
    "exit_code": 0,
    "verdicts": [],
}
REFUSED = {
    **REPORT,
    "transfer_id": "t2",
    "mn": "other@example.org",
    "result": "refused",
    "text": "nsg refused",
    "hint": "load the connection",
    "state_here": "serves the MN",
    "exit_code": 4,
    "verdicts": [
        {"context": "PAD", "status": {"code": 0x83, "text": "no such connection"}, "detail": "home"},
        {"context": "SAD", "status": {"code": 0, "text": "fine"}, "detail": ""},
    ],
}


class Agent:
    """Stands in for the agent on a control socket; remembers what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.asked: list[tuple[str, Message]] = []
        self.reports: list[dict[str, Any]] = [REPORT]
        self.sas: list[dict[str, Any]] = [SA]
        self.told = threading.Event()
        self.answer_after = 0.0
        self.loop = asyncio.new_event_loop()
        self.server = ControlServer(
            self.path,
            {
                "list-contexts": self.list_contexts,
                "show-context": self.show,
                "transfer": self.transfer,
                "history": self.history,
                "status": self.status,
                "resync": self.resync,
                "cancel": self.cancel,
                "reclaim": self.cancel,
                "updown": self.updown,
            },
            streamed={
                "list-contexts": "list-context",
                "transfer": "transfer-progress",
                "history": "history-entry",
            },
        )
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self.server.start(), self.loop).result(5)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.close(), self.loop).result(5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()

    async def list_contexts(self, request: Message) -> AsyncIterator[Message]:
        for sa in self.sas:
            yield with_json(sa)

    async def show(self, request: Message) -> Message:
        self.asked.append(("show-context", request))
        if request.get("spi") == "dead":
            raise UnknownSaError("no IKE_SA answers to spi dead", hint="`ikectx list` shows those there are")
        return with_json({"connection": "home", "children": [{"name": "net"}], "lifetime": {"rekey": None}})

    async def transfer(self, request: Message) -> AsyncIterator[Message]:
        self.asked.append(("transfer", request))
        if request.get("to") == "busy":
            raise BusyError("a rekey is in flight")
        yield with_json({"transfer": "t1", "phase": "offered", "mn": "mn@example.org", "ms": 1.0})
        yield Response(with_json({"reports": self.reports}))

    async def history(self, request: Message) -> AsyncIterator[Message]:
        self.asked.append(("history", request))
        yield with_json({"started": 1700000000, "role": "source", "peer": "nsg", "result": "moved"})

    async def status(self, request: Message) -> Message:
        return with_json({"name": "psg", "charon": {"reachable": True}, "open": []})

    async def resync(self, request: Message) -> Message:
        self.asked.append(("resync", request))
        return {}

    async def cancel(self, request: Message) -> Message:
        self.asked.append(("cancel", request))
        return {}

    async def updown(self, request: Message) -> Message:
        self.asked.append(("updown", request))
        self.told.set()
        await asyncio.sleep(self.answer_after)
        return {}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    stand_in = Agent(tmp_path / "c.vici")
    yield stand_in
    stand_in.close()


class Cli:
    def __init__(self, agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
        self.agent = agent
        self.capsys = capsys

    def __call__(self, *args: str) -> tuple[int, str, str]:
        code = commands.run(["--socket", self.agent.path, *args])
        out, err = self.capsys.readouterr()
        return code, out, err

    def json(self, *args: str) -> tuple[int, Any]:
        code, out, _ = self(*args, "--json")
        return code, json.loads(out)


@pytest.fixture
def cli(agent: Agent, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(agent, capsys)


def test_list(cli: Cli) -> None:
    code, out, _ = cli("list")
    assert code == 0
    header, row = out.splitlines()
    assert header.split()[0] == "id" and row.startswith("7   home")
    assert "10.9.0.1" in row and "66 min" in row and row.endswith("yes")
    assert cli.json("list") == (0, [SA])
    cli.agent.sas = []
    assert cli("list")[1] == "no IKE_SAs\n"
    assert cli.json("list") == (0, [])


@pytest.mark.parametrize(
    "name, query",
    [
        ("7", {"ike-id": "7"}),
        ("home", {"ike": "home"}),
        ("mn@example.org", {"peer": "mn@example.org"}),
        ("0xC0FFEE00", {"spi": "c0ffee00"}),
        (f"{'11' * 8}:{'22' * 8}", {"spi": "11" * 8}),
        ("203.0.113.5", {"peer": "203.0.113.5"}),
    ],
)
def test_show_finds_what_a_person_wrote(cli: Cli, name: str, query: dict[str, str]) -> None:
    code, out, _ = cli("show", name)
    assert code == 0 and "connection: home" in out and "children[0]:\n  name: net" in out
    assert cli.agent.asked == [("show-context", {**query, "secrets": "no"})]
    assert cli.json("show", name, "--secrets")[1]["connection"] == "home"
    assert cli.agent.asked[1][1]["secrets"] == "yes"


def test_show_of_an_unknown_sa(cli: Cli) -> None:
    code, out, err = cli("show", "dead")
    assert (code, out) == (6, "")
    assert err == "ikectx: no IKE_SA answers to spi dead\nikectx: `ikectx list` shows those there are\n"
    code, value = cli.json("show", "dead")
    assert code == 6 and value["ok"] is False and value["status"] == "UNKNOWN_SA"
    assert value["exit_code"] == 6 and value["error"].startswith("no IKE_SA")


def test_transfer(cli: Cli) -> None:
    code, out, _ = cli("transfer", "--to", "nsg", "--ike-id", "7")
    assert code == 0 and "moved" in out and "export 2, freeze 20" in out
    assert cli.agent.asked[0][1] == {"to": "nsg", "ike-id": "7", "address": "update"}
    code, value = cli.json("transfer", "--to", "nsg", "--spi", "0xABCD", "--dry-run", "--address", "keep")
    # how many SPIs will collide is told with it; see test_collisions
    assert value.pop("collisions")["moved"] == 1
    assert (code, value) == (0, {"ok": True, "dry_run": True, "reports": [REPORT]})
    assert "SPI collisions to expect" in cli("transfer", "--to", "nsg", "--all", "--dry-run")[1]
    assert cli.agent.asked[1][1] == {"to": "nsg", "spi": "abcd", "dry-run": "yes", "address": "keep"}


def test_transfer_that_is_refused(cli: Cli) -> None:
    cli.agent.reports = [REPORT, REFUSED]
    code, out, _ = cli("transfer", "--to", "nsg", "--all")
    assert code == 4
    assert "nsg refused" in out and "PAD: no such connection (home)" in out and "load the connection" in out
    assert "SAD" not in out
    code, value = cli.json("transfer", "--to", "nsg", "--all")
    assert code == 4 and value["ok"] is False
    assert cli("transfer", "--to", "busy")[0] == 7


def test_dry_run_verdicts(cli: Cli) -> None:
    cli.agent.reports = [{**REPORT, "result": "kept", "dry_run": True}]
    assert "could move" in cli("transfer", "--to", "nsg", "--dry-run")[1]
    cli.agent.reports = []
    assert cli("transfer", "--to", "nsg", "--dry-run")[1] == "nothing to move\n"


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["transfer"], "--to"),
        (["transfer", "--to", "nsg", "--ike", "a", "--all"], "--ike and --all cannot go together"),
        (["transfer", "--to", "nsg", "--spi", "xyz"], "not hexadecimal"),
        (["transfer", "--to", "nsg", "--ike-id", "-1"], "--ike-id"),
        (["transfer", "--to", "nsg", "--address", "move"], "--address"),
        (["show"], "SA"),
        (["nonsense"], "nonsense"),
        (["history", "--limit", "0"], "--limit"),
    ],
)
def test_wrong_arguments(cli: Cli, args: list[str], complaint: str) -> None:
    code, _, err = cli(*args)
    assert code == 2 and complaint in err
    code, value = cli.json(*args)
    assert code == 2 and value["ok"] is False and value["exit_code"] == 2
    assert cli.agent.asked == []


def test_the_small_commands(cli: Cli) -> None:
    assert "reachable: yes" in cli("status")[1]
    assert cli.json("status")[1]["name"] == "psg"
    assert "source" in cli("history")[1]
    assert cli.json("history", "--limit", "5")[1][0]["result"] == "moved"
    assert cli.agent.asked[-1] == ("history", {"limit": "5"})
    assert cli("resync", "--yes")[0] == 0
    assert cli.json("cancel", "t1") == (0, {"ok": True})
    assert cli("reclaim", "t1", "--yes")[1] == "done\n"
    assert cli.agent.asked[-1] == ("cancel", {"transfer": "t1"})


def test_no_agent_and_no_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IKECTX_CONFIG", raising=False)
    assert commands.run(["--socket", str(tmp_path / "none"), "status"]) == 5
    assert "systemctl start ikectx" in capsys.readouterr().err
    for command in (["serve"], ["doctor"], ["list"]):
        assert commands.run(["--config", str(tmp_path / "none.toml"), *command]) == 2
        assert "none.toml: No such file" in capsys.readouterr().err


def test_every_error_has_its_documented_exit_code() -> None:
    def classes(base: type[IkectxError]) -> Iterator[type[IkectxError]]:
        yield base
        for below in base.__subclasses__():
            yield from classes(below)

    documented = [
        int(line.split()[0]) for line in commands.EXIT_CODES.splitlines() if line[:4].strip().isdigit()
    ]
    assert documented == [*range(12), 130]
    assert {error.exit_code for error in classes(IkectxError)} - {1} <= set(documented)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["--help"]) == 0
    text = capsys.readouterr().out
    for name in (
        "serve",
        "list",
        "show",
        "transfer",
        "status",
        "history",
        "doctor",
        "resync",
        "reclaim",
        "updown",
        "lab",
    ):
        assert f"\n  {name} " in text
    assert "Exit codes" in text
    assert commands.run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert metadata.version("ikectx") == __version__


def test_the_readme_has_every_command_and_exit_code() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    reference = text[text.index("## Command line") : text.index("## Library")]
    for name in commands.cli.list_commands(click.Context(commands.cli)):
        assert f"\n| `{name}" in reference, name
    for line in commands.EXIT_CODES.splitlines():
        if line[:4].strip().isdigit():
            assert f"\n| {line.split()[0]} | " in reference, line


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (KeyboardInterrupt, click.Abort):

        def interrupted(*_: Any, error: type[BaseException] = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(commands.cli, "main", interrupted)
        assert commands.run(["status"]) == 130


def test_the_modules_a_short_command_needs_are_light() -> None:
    """Start-up time matters in a slow VM and in a hook."""
    code = "import sys; from ikectx_cli import commands; print('\\n'.join(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "rich",
        "cryptography",
        "pyroute2",
        "asyncio",
        "cbor2",
        "vici",
        "ikectx_cli.lab",
        "ikectx_cli.daemon",
    }
    assert not heavy & set(loaded)


# -- rendering


def context() -> IkeContext:
    selector = TrafficSelector(ip_address("10.0.0.0"), ip_address("10.0.0.255"))
    generation = IkeGeneration(
        b"\x11" * 8,
        b"\x22" * 8,
        False,
        bytes(16),
        bytes(16),
        Secret(b"\xab\xcd" * 16),
        Prf.HMAC_SHA2_256,
        Encr.AES_GCM_16,
        256,
    )
    child = ChildContext(
        "net",
        0,
        False,
        b"\xc0\xff\xee\x00",
        b"\xde\xad\xbe\xef",
        bytes(16),
        bytes(16),
        Encr.AES_CBC,
        (selector,),
        (selector,),
        encr_bits=128,
        integ=Integ.HMAC_SHA2_256_128,
        secret=Secret(b"\xee\xff" * 16),
        inbound=ReplayState(9, 32, 7),
    )
    return IkeContext(
        "home",
        (generation,),
        Identity(IdType.FQDN, b"gw.example.org"),
        Identity(IdType.RFC822_ADDR, b"mn@example.org"),
        Endpoint.of("192.0.2.1", 4500),
        Endpoint.of("2001:db8::5".replace("2001:db8::5", "203.0.113.5"), 4500),
        (child,),
        unknown=((0xFF01, 99, b"\x41\xab\xcd"),),
    )


def test_context_json_redacts_unless_asked() -> None:
    shown = render.context_json(context())
    text = render.dump(shown)
    assert "abcd" * 3 not in text and "eeff" * 3 not in text and "keys" not in text
    assert shown["generations"][0]["secret"] == "<secret, 32 octets>"
    assert shown["unknown"] == [{"fpt": 0xFF01, "key": 99, "octets": 3}]
    assert shown["children"][0]["local_ts"] == ["10.0.0.0/24"]
    assert shown["children"][0]["inbound"]["bitmap"] == "0x7"
    assert (shown["spi_i"], shown["local"]) == ("11" * 8, "192.0.2.1:4500")
    full = render.context_json(context(), secrets=True)
    assert full["generations"][0]["secret"] == "abcd" * 16
    assert len(full["generations"][0]["keys"]["sk_d"]) == 64
    assert len(full["children"][0]["keys"]["integ_i"]) == 64
    assert "<secret" not in render.dump(full)
    assert "mn@example.org" in render.tree(full)


def test_dump_refuses_secrets() -> None:
    with pytest.raises(TypeError, match="secret"):
        render.dump({"a": [Secret(b"x")]})
    with pytest.raises(TypeError):
        render.dump(object())
    assert json.loads(render.dump({"a": ip_address("10.0.0.1")})) == {"a": "10.0.0.1"}


def test_texts() -> None:
    assert [render.duration(value) for value in (None, 5, 119.9, 600, 12000, 200000, -30, True)] == [
        "-",
        "5 s",
        "119 s",
        "10 min",
        "3 h 20 min",
        "2 d 7 h",
        "-30 s",
        "-",
    ]
    assert (
        render.when(None) == "-"
        and render.when(1e30) == "-"
        and render.when(1700000000).startswith("2023-11-1")
    )
    first, last = ip_address("10.0.0.1"), ip_address("10.0.0.9")
    assert render.selector_text(TrafficSelector(first, last)) == "10.0.0.1-10.0.0.9"
    assert render.selector_text(TrafficSelector(last, first)) == "10.0.0.9-10.0.0.1"
    assert (
        render.selector_text(TrafficSelector(first, first, 17, 53, 53, True)) == "10.0.0.1/32[17/53] dynamic"
    )
    assert render.selector_text(TrafficSelector(first, first, 6, 1, 9)) == "10.0.0.1/32[6/1-9]"
    assert render.selector_text(TrafficSelector(first, first, 6)) == "10.0.0.1/32[6]"


def test_a_peers_name_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    render.table(("peer",), [("\x1b[2Jgone\n",)])
    assert capsys.readouterr().out == "peer\n\\x1b[2Jgone\\x0a\n"


def test_tables_and_progress_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    render.table(("mn", "result"), [("[red]x", "moved")], styles={"moved": "green"})
    assert "[red]x" in capsys.readouterr().out
    with Progress(live=True) as progress:
        for number in range(25):
            progress.event({"transfer": str(number), "phase": "offered", "mn": "a", "ms": 1.0})
        progress.event({"transfer": "1", "phase": "done", "report": REPORT})
        progress.event(None)


# -- the updown hook

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
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.answer_after = 0.5
    began = time.monotonic()
    updown.tell(agent.path, updown.request(PLUTO, "home"), answer=False)
    assert time.monotonic() - began < 0.3
    updown.tell(agent.path, updown.request(PLUTO, "home"), answer=True)
    assert time.monotonic() - began > 0.45
    monkeypatch.setattr(updown, "DOWN_PATIENCE", 0.1)
    began = time.monotonic()
    updown.tell(agent.path, updown.request(PLUTO, "home"), answer=True)
    assert time.monotonic() - began < 0.4


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
