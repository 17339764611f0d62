"""`ikectx lab`: what a person may write, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ikectx_cli import commands
from ikectx_cli.lab import commands as lab
from ikectx_cli.lab.report import ScenarioReport


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["up", "--name", "../x"], "'../x' is not 1 to 16 small letters"),
        (["up", "--name", ""], "'' is not 1 to 16 small letters"),
        (["up", "--name", "-x"], "'-x' is not 1 to 16 small letters"),
        (["down", "--name", "a" * 17], "is not 1 to 16 small letters"),
        (["exec", "--name", "a b", "mn", "true"], "'a b' is not 1 to 16 small letters"),
        (["up", "--delay", "-5"], "-5 is not from 0 to 10000 ms"),
        (["up", "--delay", "nan"], "nan is not from 0 to 10000 ms"),
        (["run", "handover", "--delay", "inf"], "inf is not from 0 to 10000 ms"),
        (["run", "no-such-scenario"], "no scenario no-such-scenario"),
        (["run"], "which scenario?"),
        (["run", "handover", "--cpus", "2", "--time", "virtual"], "virtual time has one CPU"),
        (["run", "handover", "--guest", "qemu", "--time", "virtual"], "--guest qemu has no virtual time"),
        (["run", "handover", "--root", "/no/such/folder"], "'/no/such/folder' does not exist"),
        (["guest", "--guest", "host", "--cpus", "2", "true"], "it goes without --cpus"),
        (["run", "handover", "pull", "--trace", "x.svg"], "2 runs need a folder, not a file"),
        (["run", "handover", "--trace", "none/x.svg"], "there is no folder none"),
        (["run", "--trace", "handover"], "a scenario's name goes before --trace"),
        (["bench", "no-such-scenario"], "no scenario no-such-scenario"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    for where, name in ((lab, "sweep"), (lab, "load_modules"), (lab.lab_start.lab_hosts, "sweep")):
        monkeypatch.setattr(where, name, lambda *_: pytest.fail("something is done"))
    monkeypatch.setattr(lab.lab_start, "guests", lambda _request: ("host",))
    assert commands.run(["lab", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "command", ["up", "down", "exec", "guest", "scenarios", "run", "bench", "collisions"]
)
def test_every_option_says_what_it_does(command: str) -> None:
    for param in lab.lab.commands[command].params:
        if param.param_type_name == "option":
            assert param.help, param.name  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_lab_that_is_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    class Up:
        work = "/tmp/ikl-x"
        warnings = ("no netem",)

        def up(self, *_: Any, **__: Any) -> None: ...

    monkeypatch.setattr(lab, "sweep", lambda: [])
    monkeypatch.setattr(lab.Lab, "new", lambda *_, **__: Up())
    assert commands.run(["lab", "up", "--name", "x", "--esp", "libipsec", *words]) == 0
    out, err = capsys.readouterr()
    if words:
        assert json.loads(out) == {"name": "x", "work": "/tmp/ikl-x", "warnings": ["no netem"]}
        assert err == ""
    else:
        assert out.startswith("lab x is up in /tmp/ikl-x: ikectx lab exec {mn,mn2,")
        assert err == "note: no netem\n"


PULLS = ["pull-1", "pull-2"]
LINE = {
    **{"name": "handover: transfer psg nsg", "began_ns": 1, "end": 2.0, "arrows": [], "changes": []},
    "spans": [
        {"host": "psg", "step": "freeze", "kind": "step", "begin": 0, "end": 1, "of": "", "failed": ""}
    ],
    **{
        way: {"arrived": [], "lost": [], "last": None, "first": None, "gap": None, "transit": None}
        for way in ("up", "down")
    },
}


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["handover", "--trace"], ["handover.svg"]),
        (["handover", "--trace", "push.svg"], ["push.svg"]),
        (["pull", "handover", "--repeat", "2", "--trace", "."], [*PULLS, "handover-1", "handover-2"]),
    ],
)
def test_time_lines_are_drawn(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    files: list[str],
) -> None:
    asked: list[bool] = []

    def run(request: lab.lab_start.Request, _say: object, _found: object) -> list[dict[str, Any]]:
        asked.append(request.trace)
        return [_report(request, number) for number in range(len(request.names))]

    def _report(request: lab.lab_start.Request, number: int) -> dict[str, Any]:
        told = {
            **ScenarioReport(request.names[number], ok=True).as_json(),
            "guest": "uml",
            "clock": "virtual",
        }
        return {**told, "trace": [LINE]} | ({"run": which} if (which := request.run(number)) else {})

    monkeypatch.setattr(lab.lab_start, "run", run)
    monkeypatch.chdir(tmp_path)
    assert commands.run(["lab", "run", *words, "--json"]) == 0
    assert asked == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name if name.endswith(".svg") else f"{name}.svg" for name in files
    )
    for path in tmp_path.iterdir():
        assert "freeze 1.0" in path.read_text() and "uml, virtual time" in path.read_text()
    assert "trace" in capsys.readouterr().out


def test_a_run_without_a_handover_has_no_time_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        lab.lab_start, "run", lambda _request, _say, _found: [ScenarioReport("left", ok=True).as_json()]
    )
    monkeypatch.chdir(tmp_path)
    assert commands.run(["lab", "run", "left", "--trace"]) == 2
    assert "no handover ran that could be drawn" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
