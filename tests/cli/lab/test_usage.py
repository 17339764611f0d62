"""What agents use: CPU time of a real process, and the arithmetic on it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ikectx_cli.lab.hosts import Lab
from ikectx_cli.lab.usage import clock_stands_still, cpu, memory_kib, resident_kib, spent_ms

WORK = """
import sys, threading, time
def work():
    end = time.thread_time() + 0.2
    while time.thread_time() < end: pass
thread = threading.Thread(target=work); thread.start(); thread.join()
print("done", flush=True); sys.stdin.read()
"""


def test_the_cpu_time_of_an_agent_counts_threads_that_have_ended() -> None:
    words = [sys.executable, "-c", WORK]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as agent:
        lab = cast(Lab, SimpleNamespace(started={("nsg", "agent"): agent, ("psg", "charon"): agent}))
        before = {"nsg": (agent.pid, 0)}
        assert agent.stdout is not None and agent.stdout.readline() == b"done\n"
        spent = spent_ms(before, cpu(lab))
        assert spent["psg"] is None is spent["mn"]
        assert spent["nsg"] is not None and spent["nsg"] >= 190
        began = cpu(lab)
        time.sleep(0.05)
        idle = spent_ms(began, cpu(lab))["nsg"]
        assert idle is not None and idle < 20
        assert memory_kib(lab)["nsg"] > 1000
        assert agent.stdin is not None
        agent.stdin.close()
    assert cpu(lab) == {} == memory_kib(lab)


def test_an_agent_that_was_started_anew_counts_from_its_start() -> None:
    before, after = {"psg": (10, 500_000_000)}, {"psg": (11, 30_000_000), "nsg": (12, 1_000_000)}
    assert spent_ms(before, after) == {"mn": None, "psg": 30.0, "nsg": 1.0}


def test_a_clock_that_stands_still_tells_no_cpu_time(tmp_path: Path) -> None:
    assert spent_ms({"psg": (1, 0)}, {"psg": (1, 7)}, clock_stands_still=True)["psg"] is None
    line = tmp_path / "cmdline"
    line.write_text("mem=3G time-travel=inf-cpu init=/x")
    assert clock_stands_still(line)
    line.write_text("mem=3G init=/x")
    assert not clock_stands_still(line) and not clock_stands_still(tmp_path / "none")


@pytest.mark.parametrize(("text", "kib"), [("VmRSS:\t   4321 kB\n", 4321), ("Name:\tx\n", 0)])
def test_resident_memory(text: str, kib: Any) -> None:
    assert resident_kib("VmHWM:\t 9 kB\n" + text) == kib
