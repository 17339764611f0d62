"""Waits for programs that start, for as long as they work: an emulated machine, or a busy one, needs a
hundred times what a quick one does."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

IDLE = 30.0
"""Seconds in which a program that starts uses some CPU time, on any machine."""


def process_clock(pid: int) -> int:
    """The clock that counts the CPU time of a process: what clock_getcpuclockid(3) returns on Linux."""
    return (~pid << 3) | 2


def _stands(ready: Path) -> bool:
    """Whether the file is there, and, if it is a socket, takes connections: it is bound a moment before."""
    if not ready.is_socket():
        return ready.exists()
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(ready)) == 0


def began(process: subprocess.Popen[bytes], ready: Path, idle: float = IDLE) -> str:
    """Waits until a program has made the file or socket `ready`; returns why it has not, or nothing.

    It is given up when it has ended, or used no CPU time for `idle` seconds.
    """
    used, limit = -1, 0.0
    while not _stands(ready):
        if process.poll() is not None:
            return f"ended with {process.returncode}"
        spent, now = time.clock_gettime_ns(process_clock(process.pid)), time.monotonic()
        if spent != used:
            used, limit = spent, now + idle
        elif now > limit:
            return f"did not start, and did nothing for {idle:g} s"
        time.sleep(0.02)
    return ""
