"""What a run makes of what its hosts say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ikectx_cli.lab_boot import CLOCK
from ikectx_cli.lab_report import Report
from ikectx_cli.lab_run import Runner


@pytest.mark.parametrize(
    ("clock", "said", "late"),
    [
        ("real", "INFO ikectx: mn.example does not know UPDATE_SPI: its SAs are rekeyed\n", True),
        ("real", "INFO ikectx: target 22bed54bb175c1ef: owned with psg\n", False),
        ("virtual", "INFO ikectx: mn.example does not know UPDATE_SPI: its SAs are rekeyed\n", False),
    ],
)
def test_new_keys_are_forgiven_where_an_agent_had_no_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: str, said: str, late: bool
) -> None:
    monkeypatch.setenv(CLOCK, clock)
    (tmp_path / "nsg").mkdir()
    (tmp_path / "nsg" / "agent.out").write_text(said)
    runner: Any = SimpleNamespace(_lab=SimpleNamespace(work=tmp_path), _owner="nsg", report=Report("x"))
    assert Runner._agent_was_late(runner) is late
    assert ("had no CPU" in "".join(runner.report.warnings)) is late
