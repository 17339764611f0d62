"""The lab's probe: what it sends by several paths, of which some are not there."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ikectx_cli.lab import probe as lab_probe

NOBODY = {4: "192.0.2.77", 6: "2001:db8::77"}
"""Addresses for documentation, which no machine has."""
HERE = {4: "127.0.0.1", 6: "::1"}


def probe(tmp_path: Path, paths: str) -> dict[str, Any]:
    """A run of a tenth of a second and a bit, between ends on this machine."""
    with socket.socket(socket.AF_INET6 if "::" in paths else socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    output, words = tmp_path / "probe.json", [sys.executable, "-I", "-S", lab_probe.__file__]
    with subprocess.Popen(words, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(f"{port} 5 {paths} {output}\n")
        process.stdin.flush()
        ready = Path(f"{output}.ready")

        def wait(path: Path, *, there: bool) -> None:
            while path.exists() is not there:
                assert process.poll() is None
                time.sleep(0.01)

        wait(ready, there=True)
        process.send_signal(signal.SIGUSR1)
        wait(ready, there=False)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        wait(output, there=True)
        process.stdin.close()
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("version", [4, 6])
def test_a_number_counts_as_sent_when_one_path_takes_it(tmp_path: Path, version: int) -> None:
    # the second path's source address is not there, as an old or a new one of a mobile node
    here, nobody = HERE[version], NOBODY[version]
    found = probe(tmp_path, f"{here}>{here},{nobody}>{here}")
    assert found["sent"] and {error for _number, _stamp, error in found["sent"]} == {0}
    assert [number for number, _stamp in found["received"]] == [number for number, _, _ in found["sent"]]


@pytest.mark.parametrize("version", [4, 6])
def test_a_number_that_no_path_takes_has_an_error(tmp_path: Path, version: int) -> None:
    here, nobody = HERE[version], NOBODY[version]
    found = probe(tmp_path, f"{nobody}>{here},{nobody}>{here}")
    assert found["sent"] and 0 not in {error for _number, _stamp, error in found["sent"]}
    assert found["received"] == []


def test_what_comes_from_elsewhere_does_not_count(tmp_path: Path) -> None:
    # it sends to itself from one address, and expects another
    found = probe(tmp_path, "127.0.0.1>127.0.0.2,127.0.0.1>127.0.0.3")
    assert {error for _number, _stamp, error in found["sent"]} == {0} and found["received"] == []


def test_what_one_path_takes_arrives_before_the_end_that_is_told(tmp_path: Path) -> None:
    found = probe(tmp_path, "127.0.0.1>127.0.0.1")
    assert [number for number, _stamp in found["received"]] == [number for number, _, _ in found["sent"]]
    assert found["ended"] > found["sent"][-1][1]
