"""An agent that notes what its CPU time goes into, by samples. A lab that is asked for a profile runs its
agents as this module, so that the product has no hook for it.

    python -m ikectx_cli.lab.sampled ARGUMENT...

is `ikectx ARGUMENT...`. It begins to sample with SIGUSR1, and with SIGUSR2 it ends, and writes the file that
$IKECTX_LAB_SAMPLES names: JSON, {part of `PARTS`: ms of CPU time, user and system}.

A sample is taken when the process has used 1 ms of CPU time (ITIMER_PROF; the kernel makes that one of its
ticks, which take up to 10). It counts for the time that was used since the one before: for the part that the
innermost of the product's own modules belongs to, which the main thread runs just then.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType

from .config import PRODUCT, SAMPLES

EVERY = 0.001
"""Seconds of CPU time between two samples, at least."""

LOOP = "the event loop"
THREADS = "other threads: syncs of the disk"

PARTS: dict[str, tuple[str, ...]] = {
    "engine and driver": ("ikectx",),
    "contexts and messages to octets and back": ("ikectx.wire", "ikectx.sa"),
    "store, journal and audit log": ("ikectx.disk",),
    "links and TLS between gateways": ("ikectx.net",),
    "the steps and their runner": ("vici_bridge",),
    "checks of what comes in": ("vici_bridge.policy",),
    "SAs that are elsewhere": ("vici_bridge.away",),
    "VICI": ("vici_bridge.vici",),
    "HA messages and their record": ("vici_bridge.ha", "vici_bridge.segments", "vici_bridge.last_heard"),
    "nftables, routes and XFRM": ("vici_bridge.kernel",),
    "updown scripts": ("vici_bridge.updown", "vici_bridge.updown_helper"),
    "the exchange with the mobile node": ("mobike_ext", "vici_bridge.exchanges"),
    "the operator's socket and the log": ("ikectx_cli", "vici_bridge.vici.control", "logging"),
    LOOP: (),
    THREADS: (),
}
"""Parts of an agent, with the packages and modules that belong to them: the longest name counts."""

_PART = {name: part for part, names in PARTS.items() for name in names}
_ROUNDS = {("asyncio.base_events", "_run_once"), ("asyncio.events", "_run")}
"""Whose callees are the product's, and who themselves are the event loop."""


@cache
def _part_of(module: str) -> str | None:
    while module and module not in _PART:
        module = module.rpartition(".")[0]
    return _PART.get(module)


def part(frames: Iterable[tuple[str, str]]) -> str:
    """The part of a stack's frames (module, function), the innermost first."""
    for module, function in frames:
        if (module, function) in _ROUNDS:
            break
        if (found := _part_of(module)) is not None:
            return found
    return LOOP


def _frames(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    while frame is not None:
        yield str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        frame = frame.f_back


class Samples:
    """The CPU time of this process by parts (ns), from `begin` to `end`. For the main thread."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._used = self._mine = 0

    def begin(self) -> None:
        self.spent.clear()
        self._used, self._mine = time.process_time_ns(), time.thread_time_ns()
        signal.signal(signal.SIGPROF, lambda _, frame: self.take(_frames(frame)))
        signal.setitimer(signal.ITIMER_PROF, EVERY, EVERY)

    def take(self, frames: Iterable[tuple[str, str]]) -> None:
        """A sample: since the last one this stack was at work, beside other threads."""
        used, mine = time.process_time_ns(), time.thread_time_ns()
        self.spent[part(frames)] += mine - self._mine
        self.spent[THREADS] += max(0, (used - self._used) - (mine - self._mine))
        self._used, self._mine = used, mine

    def end(self) -> dict[str, float]:
        """ms by parts."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        return {name: round(self.spent[name] / 1e6, 3) for name in PARTS}


def sample(file: Path) -> None:
    """Have this process heed the two signals."""
    samples = Samples()

    def write() -> None:
        made = file.with_suffix(".new")
        made.write_text(json.dumps(samples.end()))
        made.rename(file)

    signal.signal(signal.SIGUSR1, lambda *_: samples.begin())
    signal.signal(signal.SIGUSR2, lambda *_: write())


if __name__ == "__main__":
    sample(Path(os.environ[SAMPLES]))
    runpy.run_module(PRODUCT, run_name="__main__")
