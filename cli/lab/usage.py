"""What the agents of a lab use of their machine: CPU time and memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .boot import CLOCK, GUEST
from .hosts import Lab
from .machine import here
from .net import CHARONS
from .waiting import process_clock

Used = Mapping[str, tuple[int, int]]
"""By host: the process of its agent or charon, and the CPU time (ns, user and system) that this has used."""


def clock_stands_still(cmdline: Path = Path("/proc/cmdline")) -> bool:
    """Whether this machine's clock stands still while programs run (User-Mode Linux in virtual time)."""
    try:
        return "time-travel" in cmdline.read_text()
    except OSError:
        return False


def circumstances(lab: Lab) -> dict[str, Any]:
    """Where and how figures were measured: `esp`, `strongswan`, `guest`, `clock`, `machine`."""
    return {
        "esp": "libipsec" if lab.tunnel.libipsec else "kernel",
        "strongswan": lab.strongswan(),
        "guest": os.environ.get(GUEST, "host"),
        "clock": os.environ.get(CLOCK, "real"),
        "machine": here(clock_stands_still=clock_stands_still()),
    }


def cpu(lab: Lab, daemon: str = "agent") -> Used:
    """What the agents have used until now, ended threads included; or the daemons of another name.

    The kernel's clock of a process counts ns; User-Mode Linux counts the ticks (10 ms) that find the process
    at work, which is a sample. Hosts without an agent that runs are left out.
    """
    found = {}
    for host in CHARONS:
        process = lab.started.get((host, daemon))
        if process is not None and process.poll() is None:
            found[host] = process.pid, time.clock_gettime_ns(process_clock(process.pid))
    return found


def spent_ms(before: Used, after: Used, *, clock_stands_still: bool = False) -> dict[str, float | None]:
    """What each agent used in between, in ms. None: no agent there, or a clock that cannot tell."""
    spent: dict[str, float | None] = dict.fromkeys(CHARONS)
    for host, (pid, used) in after.items():
        if not clock_stands_still:
            was, had = before.get(host, (0, 0))
            spent[host] = round((used - had if was == pid else used) / 1e6, 1)
    return spent


def memory_kib(lab: Lab) -> dict[str, int]:
    """What each agent holds in memory (resident set, KiB). Hosts without an agent that runs are left out."""
    found = {}
    for host in CHARONS:
        process = lab.started.get((host, "agent"))
        if process is not None and process.poll() is None:
            found[host] = resident_kib(Path(f"/proc/{process.pid}/status").read_text())
    return found


def resident_kib(status: str) -> int:
    """VmRSS of a /proc/PID/status, in KiB; 0 where it is not told, as of a process that has ended."""
    told = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(told[1]) if told else 0
