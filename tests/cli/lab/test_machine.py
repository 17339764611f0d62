"""What is told of the machine that figures are from."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from ikectx_cli.lab.machine import here, host


def test_the_machine_by_its_cpu_and_kernel(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU w/ cores @ 2 GHz\nflags\t: fpu\n")
    told = host(file)
    assert told["cpu"] == "Some CPU w- cores @ 2 GHz"
    assert told["kernel"] == platform.release() and told["cores"] >= 1
    assert told["scheduled"].endswith(f", on {len(os.sched_getaffinity(0))}")
    assert told["python"] == platform.python_version()
    assert host(tmp_path / "none")["cpu"] == platform.machine()


def test_what_the_kernel_costs_is_measured() -> None:
    told = here()
    assert told["cpus"] >= 1
    assert 0 < told["syscall_us"] < told["thread_us"]


def test_a_clock_that_stands_still_measures_nothing() -> None:
    told = here(clock_stands_still=True)
    assert told["syscall_us"] is None is told["thread_us"] and told["kernel"] == platform.release()
