"""`ikectx lab`: what a person may write, before anything is built."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ikectx_cli import commands, lab


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
