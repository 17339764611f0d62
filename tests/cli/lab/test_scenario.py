"""Scenario folders: what they may say, and that what this project ships is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ikectx.errors import ConfigError, UsageError
from ikectx_cli.lab import run as lab_run
from ikectx_cli.lab.scenario import FOLDER, VERBS, Command, load, names, neighbours


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "scenario.toml").write_text(text)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in FOLDER.glob("*/scenario.toml")))
def test_every_scenario_of_this_project_reads(name: str) -> None:
    scenario = load(name)
    assert scenario.description and scenario.steps


def test_bases_are_not_listed() -> None:
    assert "handover" in names() and not [name for name in names() if name.startswith("_")]


def test_what_shares_daemons_stands_together(tmp_path: Path) -> None:
    for name, text in (("a", "[tunnel]\nmobile = true"), ("b", ""), ("c", "[tunnel]\nmobile = true")):
        write(tmp_path, name, 'steps = ["connect"]\n' + text)
    assert neighbours(names(tmp_path), tmp_path) == ["a", "c", "b"]


def test_what_wants_fresh_daemons_comes_when_they_are(tmp_path: Path) -> None:
    for name, text in (("a", "[tunnel]\nmobile = true"), ("b", ""), ("c", "")):
        write(tmp_path, name, f'fresh = {str(name == "c").lower()}\nsteps = ["connect"]\n{text}')
    assert neighbours(names(tmp_path), tmp_path) == ["c", "b", "a"]


def test_every_verb_can_be_done() -> None:
    assert all(callable(getattr(lab_run.ScenarioRunner, f"_do_{verb}")) for verb in VERBS)


def test_a_scenario_stands_on_its_base(tmp_path: Path) -> None:
    write(
        tmp_path,
        "_base",
        'description = "b"\nsteps = ["connect"]\n[limits]\nlost = 3\n[tunnel]\nauth = "cert"\nfamily = 6',
    )
    write(tmp_path, "one", 'base = "_base"\n[tunnel]\nfamily = 4\n[tunnel.child]\nreplay_window = 0')
    (tmp_path / "_base" / "mn.conf").write_text("a = 1\n")
    (tmp_path / "one" / "nsg.strongswan").write_text("c = 3\n")
    (tmp_path / "one" / "mn.conf").write_text("b = 2\n")
    one = load("one", tmp_path)
    assert (one.description, one.lost, one.steps) == ("b", 3, (("connect",),))
    assert (one.tunnel.auth, one.tunnel.family, one.tunnel.child) == ("cert", 4, {"replay_window": 0})
    assert one.overrides == {"mn": "a = 1\nb = 2\n", "nsg.strongswan": "c = 3\n"}
    assert names(tmp_path) == ["one"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("steps = [", "one/scenario.toml"),
        ("steps = []", "steps"),
        ("", "steps"),
        ('steps = ["fly"]', "fly"),
        ('steps = ["transfer psg"]', "transfer takes FROM TO"),
        ('steps = ["connect"]\nstep = 1', "step: no such key"),
        ('steps = ["connect"]\n[limits]\nlots = 1', "limits.lots"),
        ('steps = ["connect"]\n[tunnel]\nauht = "psk"', "tunnel.auht"),
        ('steps = ["connect"]\n[tunnel]\nauth = "none"', "tunnel.auth: one of psk"),
        ('steps = ["connect", { host = "mn" }]', "run"),
        ('steps = ["connect", { host = "me", run = "true" }]', "no host me"),
        ('steps = ["connect", { host = "mn", run = "true", exits = 1 }]', "no key exits"),
        ('steps = ["connect", { host = "mn", run = "true", expect = "(" }]', "unterminated"),
        ("steps = [1]", "a command is a table"),
        ('base = "one"\nsteps = ["connect"]', "its own base"),
        ('steps = ["cut mn me"]', "me is none of mn, mn2, psg, nsg, away"),
        ('steps = ["handover nsg soon"]', "soon is none of predictive, leaving, reactive"),
        ('steps = ["handover nsg reactive"]', "handover needs mobile = true"),
        ('steps = ["ping mn2"]', "mn2 takes part only with second = true"),
        ('steps = ["connect"]\nnames = "other"', "names: one of kept"),
        ('steps = ["connect"]\n[tunnel]\ninside = "rip"', "tunnel.inside: one of static, announce, bird"),
        ('steps = ["connect"]\n[tunnel]\nmobile = "yes"', "tunnel.mobile: true or false"),
        ('base = "none"\nsteps = ["connect"]', "none/scenario.toml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, word: str) -> None:
    write(tmp_path, "one", text)
    with pytest.raises(ConfigError) as caught:
        load("one", tmp_path)
    assert word in str(caught.value)


def test_an_unknown_name_is_told_what_there_is(tmp_path: Path) -> None:
    write(tmp_path, "one", 'steps = ["connect"]')
    with pytest.raises(UsageError) as caught:
        load("two", tmp_path)
    assert caught.value.hint == "there are: one"


@pytest.mark.parametrize(
    ("command", "status", "output", "wrong"),
    [
        (Command("mn", "x"), 0, "", ""),
        (Command("mn", "x"), 2, "", "exit 2 instead of 0"),
        (Command("mn", "x", exit=4), 4, "", ""),
        (Command("mn", "x", expect="^b"), 0, "a\nb", ""),
        (Command("mn", "x", expect="^c"), 0, "a\nb", "no /^c/"),
        (Command("mn", "x", expect="a", count=2), 0, "a a", ""),
        (Command("mn", "x", expect="a", count=0), 0, "a a", "2 times /a/ instead of 0"),
        (Command("mn", "x", reject="a"), 0, "a", "there is /a/"),
    ],
)
def test_verdicts_on_a_command(command: Command, status: int, output: str, wrong: str) -> None:
    assert command.verdict(status, output) == wrong


def test_what_a_scenario_leaves_disturbed(tmp_path: Path) -> None:
    write(tmp_path, "one", 'steps = ["connect", "ping"]')
    write(tmp_path, "two", 'steps = ["connect", "roam", { host = "mn", run = "true" }]')
    write(
        tmp_path,
        "three",
        'steps = ["connect", { host = "core", run = "ip route add blackhole 10.9.0.0/16" }]',
    )
    found = [load(name, tmp_path) for name in ("one", "two", "three")]
    write(tmp_path, "four", 'steps = ["cut mn psg"]')
    write(tmp_path, "five", 'steps = ["handover nsg reactive"]\n[tunnel]\nmobile = true')
    assert [load(name, tmp_path).disturbs_network for name in ("four", "five")] == [True, True]
    assert [one.disturbs_network for one in found] == [False, True, True]
    write(tmp_path, "six", 'steps = ["connect", "charon psg kill", "charon psg start"]')
    assert [load(name, tmp_path).crashes for name in ("one", "six")] == [False, True]


@pytest.mark.parametrize("name", names())
def test_a_brief_scenario_is_the_same_without_baselines(name: str) -> None:
    whole, brief = load(name), load(name).brief(slow=False)
    kept = [
        step
        for step in whole.steps
        if isinstance(step, Command) or step[0] not in ("baseline", "dark", "stays")
    ]
    assert kept == list(brief.steps)
    assert ("connect",) in brief.steps
    assert (brief.interval_ms, brief.lost) == (whole.interval_ms, whole.lost)


@pytest.mark.parametrize(
    ("text", "interval", "lost"),
    [("interval_ms = 5", 20.0, 6), ("interval_ms = 50", 50.0, 21), ("slow_interval_ms = 10", 20.0, 11)],
)
def test_a_coarser_probe_may_lose_less(tmp_path: Path, text: str, interval: float, lost: int) -> None:
    write(tmp_path, "one", f'{text}\nsteps = ["connect"]\n[limits]\nlost = 21')
    one = load("one", tmp_path).brief(slow=True)
    assert (one.interval_ms, one.lost) == (interval, lost)


def test_a_relayed_node_that_roams_is_seen_at_another_port_of_its_relay() -> None:
    """The gateway that serves it never sees its own address: the step that waits for it was over at once."""

    def listed(host: str, port: int) -> list[dict[str, Any]]:
        return [{"remote-host": host, "remote-port": str(port), "state": "ESTABLISHED"}]

    before = lab_run.seen_at(listed("10.2.1.2", 25629))
    assert not lab_run.seen_at(listed("10.2.1.2", 25629)) - before
    assert lab_run.seen_at(listed("10.2.1.2", 22979)) - before
    assert lab_run.seen_at(listed("fd01::10", 25629)) - before
    assert not lab_run.seen_at([]) - before
