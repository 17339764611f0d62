"""What a lab keeps of itself: the file of another user is not trusted, a damaged one is named."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ikectx.errors import UsageError
from ikectx_cli import commands
from ikectx_cli.lab import boot as lab_boot
from ikectx_cli.lab import commands as lab
from ikectx_cli.lab import hosts as lab_hosts
from ikectx_cli.lab import state as lab_state
from ikectx_cli.lab.config import Tunnel
from ikectx_cli.lab.hosts import Lab, names, sweep
from ikectx_cli.lab.state import read_state, write_state

GOOD: dict[str, Any] = {
    "delay_ms": 20.0,
    "gateway_delay_ms": 1.0,
    "tunnel": asdict(Tunnel()),
    "agents": True,
    "owner": 1,
    "keep": True,
}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lab_hosts, "ROOT", tmp_path)
    monkeypatch.setattr(Lab, "down", lambda self: pytest.fail("a lab was taken down"))
    return tmp_path


def a_lab(root: Path, name: str = "x", octets: bytes | None = None) -> Path:
    folder = root / f"ikl-{name}"
    folder.mkdir()
    write_state(folder, GOOD)
    if octets is not None:
        (folder / "lab.json").write_bytes(octets)
    return folder


def test_a_lab_of_ours(root: Path) -> None:
    before = os.umask(0)
    try:
        a_lab(root)
    finally:
        os.umask(before)
    (root / "ikl-x").chmod(0o755)
    assert Lab.find("x").tunnel == Tunnel()
    assert names() == names(kept=True) == ["x"]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", "null", "[" * 100_000, '"x"', '{"tunnel": 7}', "\xff", "1" * 70_000]
)
def test_a_damaged_file_is_named_and_left_alone(
    root: Path, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_lab(root, octets=text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"ikl-x/lab\.json is damaged"):
        Lab.find("x")
    assert names() == [] == sweep()
    assert "ikl-x/lab.json is damaged" in capsys.readouterr().err
    monkeypatch.setattr(lab, "load_modules", lambda: None)
    assert commands.run(["lab", "down", "--name", "x"]) == 2
    assert commands.run(["lab", "exec", "--name", "x", "mn", "true"]) == 2
    assert "rm -r" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [{"delay_ms": "20"}, {"delay_ms": -1}, {"agents": 1}, {"owner": 0}, {"owner": None}, {"keep": "no"}]
    + [{"tunnel": {**asdict(Tunnel()), **changed}} for changed in ({"family": "4"}, {"nat": 1}, {"new": 1})],
)
def test_each_value_is_what_it_must_be(root: Path, wrong: dict[str, Any]) -> None:
    a_lab(root, octets=json.dumps({**GOOD, **wrong}).encode())
    with pytest.raises(UsageError, match="damaged"):
        Lab.find("x")


def test_b29_what_is_another_users_or_could_be_changed_is_not_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_lab(root)
    for path in (folder, folder / "lab.json"):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        with pytest.raises(UsageError, match="could be written by others"):
            Lab.find("x")
        path.chmod(mode)
    assert names() == ["x"]
    monkeypatch.setattr(lab_state.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UsageError, match=f"is of user {os.getuid()}"):
        Lab.find("x")
    assert names() == [] == sweep()


def test_links_pipes_and_folders_are_no_files(root: Path) -> None:
    a_lab(root, "real")
    (root / "ikl-folder").symlink_to("ikl-real")
    for name, make in [
        ("link", lambda path: path.symlink_to("../ikl-real/lab.json")),
        ("pipe", lambda path: os.mkfifo(path, 0o600)),
        ("dir", lambda path: path.mkdir()),
    ]:
        (root / f"ikl-{name}").mkdir()
        make(root / f"ikl-{name}" / "lab.json")
    for name in ("folder", "link", "pipe", "dir"):
        with pytest.raises(UsageError):
            Lab.find(name)
    with pytest.raises(UsageError, match="no lab named none is up"):
        Lab.find("none")
    assert names() == ["real"]


def test_folders_of_others_are_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ikl-run-999999999-x").mkdir()
    (tmp_path / "ikl-run-999999998-x").symlink_to("ikl-run-999999999-x")
    with monkeypatch.context() as patched:
        patched.setattr(lab_boot.os, "geteuid", lambda: os.getuid() + 1)
        assert lab_boot.sweep(tmp_path) == []
    assert lab_boot.sweep(tmp_path) == ["ikl-run-999999999-x"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.data())
def test_any_octets_are_a_state_or_one_error(root: Path, octets: Any) -> None:
    folder = root / "ikl-fuzz"
    folder.mkdir(exist_ok=True)
    if not isinstance(octets, bytes):
        good = bytearray(json.dumps(GOOD).encode())
        for _ in range(octets.draw(st.integers(1, 4))):
            good[octets.draw(st.integers(0, len(good) - 1))] = octets.draw(st.integers(0, 255))
        octets = bytes(good)
    (folder / "lab.json").write_bytes(octets)
    with contextlib.suppress(UsageError):
        read_state(folder)
