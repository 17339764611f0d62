"""Programs that start are waited for as long as they work."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from ikectx_cli.lab import waiting
from ikectx_cli.lab.waiting import IDLE, began, process_clock


class Program:
    """A program that starts, by a clock that is moved by hand; `works`: the CPU time it has used by then."""

    pid = 42

    def __init__(self, ready: Path, at: float, works: Callable[[float], float]) -> None:
        self.now = 0.0
        self._ready, self._at, self._works = ready, at, works

    def monotonic(self) -> float:
        return self.now

    def clock_gettime_ns(self, clock: int) -> int:
        assert clock == process_clock(self.pid)
        return int(self._works(self.now) * 1e9)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self._at:
            self._ready.touch()

    def poll(self) -> None: ...


@pytest.mark.parametrize(
    ("works", "why"),
    [
        (lambda now: now / 100, ""),
        (lambda now: now // (IDLE - 1), ""),
        (lambda now: min(now, 100.0), f"did nothing for {IDLE:g} s"),
    ],
    ids=["slowly", "in-turns", "no-longer"],
)
def test_a_program_is_given_up_when_it_does_nothing(
    works: Callable[[float], float], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(tmp_path / "ready", 300.0, works)
    monkeypatch.setattr(waiting, "time", program)
    assert why in began(cast("subprocess.Popen[bytes]", program), tmp_path / "ready")
    assert why == "" or program.now < 100 + 2 * IDLE


def test_a_program_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "import os; os._exit(3)"]) as process:
        process.wait()
        began_at = time.monotonic()
        assert began(process, tmp_path / "ready", idle=3600) == "ended with 3"
        assert time.monotonic() - began_at < 600


def test_a_socket_that_takes_no_connections_yet_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    with socket.socket(socket.AF_UNIX) as daemon, subprocess.Popen(["sleep", "30"]) as process:
        daemon.bind(str(path))
        threading.Timer(0.3, daemon.listen).start()
        assert began(process, path) == ""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        process.kill()
