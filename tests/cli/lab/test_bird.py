"""The routing daemon's example: BIRD reads it, the lab runs it, and its script says what BIRD learns."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ikectx_cli.lab import bird as lab_bird


def reads(path: Path) -> None:
    """BIRD itself says so. Its package is one of those that tests/setup.sh installs."""
    assert Path(lab_bird.BIRD).exists(), "tests/setup.sh installs bird2"
    done = subprocess.run([lab_bird.BIRD, "-p", "-c", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["gateway.conf", "router.conf"])
def test_bird_reads_the_example(name: str) -> None:
    reads(lab_bird.FOLDER / name)


@pytest.mark.parametrize("host", lab_bird.HOSTS)
def test_the_lab_runs_the_example_with_addresses_of_its_own(tmp_path: Path, host: str) -> None:
    text = lab_bird.config(host)
    (tmp_path / "bird.conf").write_text(text)
    reads(tmp_path / "bird.conf")
    example = (lab_bird.FOLDER / ("router.conf" if host == "srv" else "gateway.conf")).read_text()
    changed = [
        (one, other)
        for one, other in zip(example.splitlines(), text.splitlines(), strict=True)
        if one != other
    ]
    assert changed and all(one.startswith(("define ", "log ")) for one, _other in changed)


def test_an_example_with_other_definitions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(lab_bird.FOLDER, tmp_path / "bird")
    text = (tmp_path / "bird" / "gateway.conf").read_text()
    (tmp_path / "bird" / "gateway.conf").write_text(text.replace("define POOL4", "define NETWORK4"))
    monkeypatch.setattr(lab_bird, "FOLDER", tmp_path / "bird")
    with pytest.raises(ValueError, match="NETWORK4"):
        lab_bird.config("psg")


@pytest.mark.parametrize(
    ("verb", "client", "words"),
    [
        ("up-client", "10.4.0.10/32", "route replace blackhole 10.4.0.10/32 table 4242 proto static"),
        ("down-client-v6", "fd04::10/128", "route del blackhole fd04::10/128 table 4242 proto static"),
        ("up-client", "0.0.0.0/0", ""),
        ("up-host", "10.4.0.10/32", ""),
    ],
)
def test_the_script_tells_bird(tmp_path: Path, verb: str, client: str, words: str) -> None:
    (tmp_path / "ip").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\n')
    (tmp_path / "ip").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PLUTO_VERB": verb, "PLUTO_PEER_CLIENT": client}
    assert subprocess.run([lab_bird.FOLDER / "updown"], env=env, check=False).returncode == 0
    asked = tmp_path / "asked"
    assert (asked.read_text().strip() if asked.exists() else "") == words
    assert {str(lab_bird.TABLE)} == set(re.findall(r"table (\d+)", (lab_bird.FOLDER / "updown").read_text()))
