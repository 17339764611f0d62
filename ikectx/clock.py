"""The clock of this machine (I/O)."""

from __future__ import annotations

import functools
import time
from typing import Protocol


def uptime() -> float:
    """Seconds since this machine was started, also while it slept. Nobody sets this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


_START = time.time() - uptime()


def steady_wall() -> float:
    """Seconds since 1970, by the wall clock as it was when this process began: nobody sets this one."""
    return _START + uptime()


@functools.cache
def this_start() -> str:
    """A name of this start of the machine; empty if the kernel tells none."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


class MonotonicClock:
    """`Clock` by `time.monotonic`: seconds since an arbitrary moment."""

    def now(self) -> float:
        return time.monotonic()


class Clock(Protocol):
    """Monotonic seconds."""

    def now(self) -> float: ...
