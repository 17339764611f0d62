"""What machine figures are from, and what its kernel costs: measured, so that a page can say it."""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS, TURNS = 2000, 200


POLICIES = {os.SCHED_OTHER: "like others", os.SCHED_FIFO: "real-time", os.SCHED_RR: "real-time"}


def host(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """This machine: `cpu` (its model), `cores`, `kernel`; how what runs here is `scheduled`; `python`."""
    try:
        told = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        told = None
    # a slash would look like a path in what is published
    model = told[1].strip().replace("/", "-") if told else platform.machine()
    policy = POLICIES.get(os.sched_getscheduler(0), "otherwise")
    scheduled = f"{policy}, on {len(os.sched_getaffinity(0))}"
    return {
        "cpu": model,
        "cores": os.cpu_count() or 1,
        "kernel": platform.release(),
        "scheduled": scheduled,
        "python": platform.python_version(),
    }


def here(*, clock_stands_still: bool = False) -> dict[str, Any]:
    """The kernel that this process runs on: `kernel`, `cpus`, and what two things cost in it.

    `syscall_us`: one system call that does nothing. `thread_us`: handing the turn to another thread and
    getting it back. None where the clock stands still while programs run.
    """
    costs: dict[str, float | None] = {"syscall_us": None, "thread_us": None}
    if not clock_stands_still:
        costs = {"syscall_us": _each_us(os.getppid, CALLS), "thread_us": _hand_over_us()}
    return {"kernel": platform.release(), "cpus": len(os.sched_getaffinity(0)), **costs}


def _each_us(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return round((time.perf_counter() - began) / times * 1e6, 2)


def _hand_over_us() -> float:
    ours, theirs = threading.Semaphore(0), threading.Semaphore(0)

    def answer() -> None:
        for _ in range(TURNS):
            theirs.acquire()
            ours.release()

    def ask() -> None:
        theirs.release()
        ours.acquire()

    other = threading.Thread(target=answer)
    other.start()
    found = _each_us(ask, TURNS)
    other.join()
    return found
