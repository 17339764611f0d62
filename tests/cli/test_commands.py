"""The command line against an agent that answers from a table."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import click
import pytest

from ikectx.disk.place import open_store
from ikectx.engine.journal import JournalEntry
from ikectx.errors import IkectxError
from ikectx.sa.name import SaName
from ikectx_cli import __version__, commands
from ikectx_cli import agent as daemon
from tests.control_agent import REFUSED, REPORT, SA, Agent, Cli


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    stand_in = Agent(tmp_path / "c.vici")
    yield stand_in
    stand_in.close()


@pytest.fixture
def cli(agent: Agent, capsys: pytest.CaptureFixture[str]) -> Cli[Agent]:
    return Cli(agent, capsys)


def test_list(cli: Cli[Agent]) -> None:
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
def test_show_finds_what_a_person_wrote(cli: Cli[Agent], name: str, query: dict[str, str]) -> None:
    code, out, _ = cli("show", name)
    assert code == 0 and "connection: home" in out and "children[0]:\n  name: net" in out
    assert cli.agent.asked == [("show-context", {**query, "secrets": "no"})]
    assert cli.json("show", name, "--secrets")[1]["connection"] == "home"
    assert cli.agent.asked[1][1]["secrets"] == "yes"


def test_show_of_an_unknown_sa(cli: Cli[Agent]) -> None:
    assert "no IKE_SA has that number, connection, peer, address or SPI: 12" in cli("show", "12")[2]
    code, out, err = cli("show", "dead")
    assert (code, out) == (6, "")
    assert err == "ikectx: no IKE_SA answers to spi dead\nikectx: `ikectx list` shows those there are\n"
    code, value = cli.json("show", "dead")
    assert code == 6 and value["ok"] is False and value["status"] == "UNKNOWN_SA"
    assert value["exit_code"] == 6 and value["error"].startswith("no IKE_SA")


def test_transfer(cli: Cli[Agent]) -> None:
    code, out, _ = cli("transfer", "--to", "nsg", "--ike-id", "7")
    assert code == 0 and "moved" in out and "export 2, freeze 20" in out
    assert cli.agent.asked[0][1] == {"to": "nsg", "ike-id": "7", "address": "auto"}
    code, value = cli.json("transfer", "--to", "nsg", "--spi", "0xABCD", "--dry-run", "--address", "keep")
    # how many SPIs will collide is told with it; see test_collisions
    assert value.pop("collisions")["moved"] == 1
    assert (code, value) == (0, {"ok": True, "dry_run": True, "reports": [REPORT]})
    assert "SPI collisions to expect" in cli("transfer", "--to", "nsg", "--all", "--dry-run")[1]
    assert cli.agent.asked[1][1] == {"to": "nsg", "spi": "abcd", "dry-run": "yes", "address": "keep"}


def test_transfer_that_is_refused(cli: Cli[Agent]) -> None:
    cli.agent.reports = [REPORT, REFUSED]
    code, out, _ = cli("transfer", "--to", "nsg", "--all")
    assert code == 4
    assert "nsg refused" in out and "PAD: no such connection (home)" in out and "load the connection" in out
    assert "SAD" not in out
    code, value = cli.json("transfer", "--to", "nsg", "--all")
    assert code == 4 and value["ok"] is False
    assert cli("transfer", "--to", "busy")[0] == 7


def test_dry_run_verdicts(cli: Cli[Agent]) -> None:
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
        (["transfer", "--to", "nsg", "--address", "there"], "--address"),
        (["history", "--limit", "99999999999999999999"], "--limit"),
        (["pull", "--from", "nsg", "--mn", "::%x"], "'::%x' is not an IP address"),
        (["pull", "--from", "nsg", "--mn", "fe80::1%eth0"], "is not an IP address"),
        (["show"], "SA"),
        (["nonsense"], "nonsense"),
        (["history", "--limit", "0"], "--limit"),
        (["pull", "--from", "nsg", "--mn", "192.0.2"], "not an IP address"),
    ],
)
def test_wrong_arguments(cli: Cli[Agent], args: list[str], complaint: str) -> None:
    code, _, err = cli(*args)
    assert code == 2 and complaint in err
    code, value = cli.json(*args)
    assert code == 2 and value["ok"] is False and value["exit_code"] == 2
    assert cli.agent.asked == []


def test_the_small_commands(cli: Cli[Agent]) -> None:
    shown = cli("status")[1]
    assert "reachable: yes" in shown and "spis" not in shown
    assert cli.json("status")[1]["name"] == "psg"
    assert "source" in cli("history")[1]
    assert cli.json("history", "--limit", "5")[1][0]["result"] == "moved"
    assert cli.agent.asked[-1] == ("history", {"limit": "5"})
    assert "asked by" in cli("history", "--audit")[1]
    assert cli.agent.asked[-1] == ("history", {"limit": "100", "audit": "yes"})
    assert cli("resync", "--yes")[0] == 0
    assert cli.json("cancel", "t1") == (0, {"ok": True})
    assert cli("reclaim", "t1", "--yes")[0] == 0
    assert cli.agent.asked[-1] == ("resolve", {"transfer": "t1", "decision": "reclaim"})
    shown = cli("detours")[1]
    assert "10.4.0.10/32" in shown and "for 1 more selectors, of SAs that came here" in shown
    (left,) = cli.json("detours", "--end", "mn@example.org", "--unblock")[1]
    assert left["at"] == "nsg"
    assert cli.agent.asked[-1] == ("detours", {"end": "mn@example.org", "unblock": "yes"})
    assert "rekeys every CHILD_SA" in cli("resync", "--yes")[1]
    for words in (("resync",), ("reclaim", "t1")):  # nobody can be asked
        code, _, err = cli(*words)
        assert code == 2 and "give --yes" in err
    cli("transfer", "--to", "nsg", "--no-detour")
    assert cli.agent.asked[-1][1]["no-detour"] == "yes"


def test_what_is_in_doubt_is_shown_and_decided(cli: Cli[Agent]) -> None:
    code, out, _ = cli("resolve")
    assert code == 0
    for words in (
        "mn@example.org",
        "IKE is dropped",
        "1, if it owns it",
        "not connected now",
        "bring nsg back",
    ):
        assert words in out
    assert cli.agent.asked[-1] == ("resolve", {})
    assert "give --yes to give up" in cli("resolve", "t1", "--give-up")[1]
    assert cli.agent.asked[-1] == ("resolve", {"transfer": "t1"}), "without --yes it is only shown"
    assert cli("resolve", "t1", "--give-up", "--yes")[0] == 0
    assert cli.agent.asked[-1] == ("resolve", {"transfer": "t1", "decision": "give-up"})
    code, value = cli.json("resolve", "t1", "--reclaim", "--yes")
    assert value["in_doubt"][0]["here"]["gateway"] == "psg" and "report" in value
    for result, code in (("kept", 0), ("in-doubt", 8), ("lost", 8)):  # the transfer has failed in each
        cli.agent.reports = [{"result": result, "exit_code": 8}]
        assert cli("resolve", "t1", "--reclaim", "--yes")[0] == code
        assert cli("reclaim", "t1", "--yes")[0] == code
    for wrong in (["--yes"], ["t1", "--yes"], ["t1", "--give-up", "--reclaim"], ["--reclaim"]):
        assert cli("resolve", *wrong)[0] == 2


def test_the_audit_log_is_verified_by_the_agent(cli: Cli[Agent]) -> None:
    code, out, _ = cli("history", "--verify")
    assert code == 0 and "3 rows, 1 older ones were pruned; head 4:ab" in out and "nothing was changed" in out
    code, out, _ = cli("history", "--verify", "--head", "1:cd")
    assert code == 9 and "row 2 was changed" in out and "somebody changed the store" in out
    assert cli.agent.asked[-1] == ("verify-history", {"head": "1:cd"})
    code, value = cli.json("history", "--verify", "--head", "1:cd")
    assert code == 9 and value["ok"] is False and value["findings"] == ["row 2 was changed"]
    assert cli("history", "--head", "1:cd")[0] == 2


def test_the_audit_log_is_verified_without_an_agent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "state"
    with open_store(place) as store:
        store.write(
            JournalEntry(
                b"1" * 8, "source", "b", SaName(b"i" * 8, b"r" * 8), "", "", "done", 1, 1, 1, audit={"at": 1}
            )
        )
    with contextlib.closing(sqlite3.connect(place / "state.db", isolation_level=None)) as db:
        assert commands.run(["history", "--verify", "--store", str(place), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["ok"], found["rows"]) == (True, 1)
        db.execute("DELETE FROM audit")
        assert commands.run(["history", "--verify", "--store", str(place)]) == 9
        assert "the end of the log was cut off" in capsys.readouterr().out
    sample = (Path(__file__).parent.parent.parent / "examples" / "config" / "ikectx.toml").read_text()
    config = tmp_path / "ikectx.toml"
    config.write_text(f'state_dir = "{tmp_path / "nowhere"}"\n{sample}')
    down = ["--config", str(config), "--socket", str(tmp_path / "none"), "history", "--verify"]
    assert commands.run(down) == 9  # no agent, and no store where the configuration has it
    assert "does not exist" in capsys.readouterr().err
    octets = (place / "state.db").read_bytes()
    (place / "state.db").write_bytes(octets[:4096] + b"x" * (len(octets) - 4096))
    assert commands.run(["history", "--verify", "--store", str(place)]) == 9
    assert "state.db cannot be read" in capsys.readouterr().err
    (place / "state.key").unlink()
    assert commands.run(["history", "--verify", "--store", str(place)]) == 9
    assert "state.key" in capsys.readouterr().err
    (place / "state.db").unlink()
    (place / "state.db").mkdir()
    assert commands.run(["history", "--verify", "--store", str(place)]) == 9
    assert "Is a directory" in capsys.readouterr().err


def test_no_agent_and_no_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IKECTX_CONFIG", raising=False)
    assert commands.run(["--socket", str(tmp_path / "none"), "status"]) == 5
    assert "systemctl start ikectx" in capsys.readouterr().err
    for command in (["serve"], ["doctor"], ["list"]):
        assert commands.run(["--config", str(tmp_path / "none.toml"), *command]) == 2
        assert "none.toml: No such file" in capsys.readouterr().err


def test_the_agent_serves_the_socket_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    monkeypatch.setattr(daemon, "run", lambda config: served.append(config.control.socket) or 0)
    sample = Path(__file__).parent.parent.parent / "examples" / "config" / "ikectx.toml"
    assert commands.run(["--socket", "/run/other", "--config", str(sample), "serve"]) == 0
    assert commands.run(["serve", "--config", str(sample)]) == 0
    monkeypatch.setenv("IKECTX_SOCKET", "/run/third")
    assert commands.run(["serve", "--config", str(sample)]) == 0
    assert served == ["/run/other", "/run/ikectx.vici", "/run/third"]


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
        "detours",
        "history",
        "doctor",
        "resync",
        "reclaim",
        "updown",
        "lab",
    ):
        assert f"\n  {name} " in text
    assert "Exit codes" in text
    for group in ([], ["mobile"], ["lab"]):
        assert commands.run([*group, "--help"]) == 0
        assert "..." not in capsys.readouterr().out.partition("Commands:")[2], group
    assert commands.run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert metadata.version("ikectx") == __version__


def test_every_command_that_prints_takes_json() -> None:
    """As the README says; these run until they are stopped, print nothing, or print what another prints."""
    silent = {"serve", "updown", "updown-helper", "mobile serve", "lab down", "lab exec", "lab guest"}

    def walk(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            if isinstance(command, click.Group):
                yield from walk(command, f"{before}{name} ")
            else:
                yield before + name, command

    without = {
        name
        for name, command in walk(commands.cli)
        if not any("--json" in param.opts for param in command.params)
    }
    assert without == silent


def test_the_readme_has_every_command_and_exit_code() -> None:
    text = (Path(__file__).parent.parent.parent / "README.md").read_text()
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
        "ikectx_cli.lab.commands",
        "ikectx_cli.agent",
    }
    assert not heavy & set(loaded)


def test_what_a_user_may_not_look_for_is_taken_to_be_there() -> None:
    """To read it tells him so; `doctor` ended with a traceback."""

    class Hidden:
        def exists(self) -> bool:
            raise PermissionError(13, "Permission denied")

    assert commands._there(cast(Any, Hidden()))
