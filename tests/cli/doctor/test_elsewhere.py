"""`doctor` before there is a configuration, and on a mobile node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ikectx_cli import commands
from ikectx_cli.config import parse
from ikectx_cli.doctor import elsewhere
from tests.healthy_world import CHARON, TOML, Fake

MOBILE = (
    '[[gateway]]\nname = "psg"\naddress = "192.0.2.1"\n[[gateway]]\nname = "nsg"\naddress = "192.0.2.2"\n'
)
SA = {"name": "home", "ike_id": 1, "gateway": "psg", "remote": "192.0.2.1:4500", "reason": ""}


@pytest.fixture
def world(tmp_path: Path) -> Fake:
    return Fake(parse(TOML, tmp_path / "ikectx.toml"))


def test_before_there_is_a_configuration(world: Fake) -> None:
    world.config = elsewhere.nothing_yet(Path("/etc/ikectx/ikectx.toml"))
    first, *others = elsewhere.before(world)
    assert first.level == "fail" and "no /etc/ikectx/ikectx.toml" in first.found
    assert "cp /opt/ikectx/examples/config/ikectx.toml" in first.fix
    assert {finding.level for finding in others} == {"ok"}
    assert {"charon", "ha plugin", "ha settings", "kernel"} == {finding.check for finding in others}


def test_on_a_mobile_node(world: Fake, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "mobile.toml").write_text(MOBILE)
    world.config = replace(elsewhere.nothing_yet(tmp_path / "mobile.toml"), state_dir=tmp_path / "state")
    gateways = [{"name": "psg", "192.0.2.1": "from 203.0.113.7"}]
    world.answers["status"] = {"version": "1", "charon": CHARON, "sas": [SA], "gateways": gateways}
    assert {finding.level for finding in elsewhere.on_mobile_node(world)} == {"ok"}
    world.answers["status"] = {
        "version": "1",
        "charon": {**CHARON, "reachable": False},
        "sas": [{**SA, "gateway": None}, {**SA, "reason": "it is AH"}],
        "gateways": [{"name": "nsg", "192.0.2.2": "no way there"}],
    }
    found = [(item.level, item.found) for item in elsewhere.on_mobile_node(world) if item.level != "ok"]
    assert found == [
        ("fail", "the agent cannot reach charon"),
        ("warn", "home #1 is at 192.0.2.1:4500, which is no [[gateway]]"),
        ("warn", "home #1 cannot be handed over: it is AH"),
        ("warn", "no route leads to nsg (192.0.2.2)"),
    ]


def test_the_command_finds_out_what_this_machine_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world: Fake
) -> None:
    def made(config: object, control: str) -> Fake:
        world.config = config  # type: ignore[assignment]
        return world

    monkeypatch.setattr("ikectx_cli.doctor.world.World", made)
    monkeypatch.setenv("IKECTX_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.setenv("IKECTX_MOBILE_CONFIG", str(tmp_path / "mobile.toml"))
    assert commands.run(["doctor"]) == 1
    assert "there is no " in capsys.readouterr().out
    (tmp_path / "mobile.toml").write_text(f'state_dir = "{tmp_path}"\n' + MOBILE)
    for args in (["doctor"], ["mobile", "doctor"]):
        assert commands.run(args) == 0
        assert "1 is at psg" not in (out := capsys.readouterr().out) and "the agent runs" in out
    assert commands.run(["--config", str(tmp_path / "none.toml"), "doctor"]) == 2
