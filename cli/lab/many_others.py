"""Handovers beside more and more other SAs at both gateways, and by how much their gaps grow.

    python -m ikectx_cli.lab.many_others RESULT ESP RUNS INTERVAL_MS SIZE...

is one measurement on this machine, which a guest runs for `ikectx lab bench --others`; RESULT gets its JSON.
The SAs come up once; all modes run beside them in the same lab.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import median
from typing import Any

from . import guest as lab_guest
from .aims import BESIDE_OTHERS, figures
from .bench import by_name
from .config import Tunnel
from .emptying import Say
from .fleet import SEGMENTS, crowd, prepare
from .hosts import Lab
from .net import GATEWAYS
from .run import ScenarioRunner
from .scenario import Scenario
from .start import CROWDED_MIB
from .usage import circumstances

_UNDER_TRAFFIC = ("traffic start", "wait 0.5", "{}", "wait 1.5", "traffic stop")
_MOVES = ("dark", "relocate")
"""Behind a handover for which the mobile node changes its network: how long its link was dark, and back."""

MODES = {
    "push": ("transfer psg nsg", ("terminate mn",)),
    "predictive": ("handover nsg predictive", _MOVES),
    "reactive": ("handover nsg reactive", _MOVES),
}
"""What is done under traffic, and what follows. The mobile node has an agent."""


def run(
    sizes: Iterable[int],
    runs: int,
    guest: str,
    clock: str,
    *,
    libipsec: bool,
    interval_ms: float,
    say: Say,
) -> dict[str, Any]:
    """`beside` in a guest of `lab_guest.WAYS` (or auto), and on what machine that was. Raises IkectxError."""
    words = ["libipsec" if libipsec else "kernel", str(runs), str(interval_ms), *map(str, sizes)]
    return lab_guest.result(
        __spec__.name, words, guest, clock, libipsec=libipsec, memory_mib=CROWDED_MIB, say=say
    )


def beside(
    sizes: Iterable[int], runs: int, *, libipsec: bool, interval_ms: float, say: Say
) -> dict[str, Any]:
    """Runs each of `MODES` so often, with so many other SAs at each gateway, from few to many.

    A run of each without others comes before and does not count: Python compiles, charon loads.

    Raises IkectxError when the lab or the other SAs do not come up.
    """
    lab = Lab.new()
    scenarios = {mode: _scenario(mode, interval_ms, libipsec=libipsec) for mode in MODES}
    try:
        say("network and daemons")
        prepare(lab, "mn2", libipsec=libipsec)
        lab.up(scenarios["push"].tunnel)
        rows: list[dict[str, Any]] = []
        there = 0
        for scenario in scenarios.values():
            _ran(lab, scenario, 1, say)
        with ExitStack() as stack:
            for size in sorted(set(sizes)):
                say(f"{size} other SAs at each gateway")
                stack.enter_context(crowd(lab, size - there, {}, first=2 * there))
                there = size
                for mode, scenario in scenarios.items():
                    rows.append({"sas": size, "mode": mode, **_ran(lab, scenario, runs, say)})
            return {
                "runs": runs,
                "interval_ms": interval_ms,
                "rows": compared(rows),
                **circumstances(lab),
            }
    finally:
        lab.down()


def _scenario(mode: str, interval_ms: float, *, libipsec: bool) -> Scenario:
    what, after = MODES[mode]
    steps = ("connect", "ping", *(step.format(what) for step in _UNDER_TRAFFIC), *after)
    return replace(
        Scenario(mode, "", tuple(tuple(step.split()) for step in steps)),
        tunnel=Tunnel(mobile=True, second=True, segments=SEGMENTS, libipsec=libipsec),
        interval_ms=interval_ms,
    )


def _ran(lab: Lab, scenario: Scenario, runs: int, say: Say) -> dict[str, Any]:
    """The medians of some runs. Those that failed count, as far as they measured something."""
    reports = []
    for number in range(1, runs + 1):
        report = ScenarioRunner(lab, scenario, lambda _step: None).run()
        told = report.as_json()
        gaps = (told["traffic"] or {}).get("gap_ms")
        say(f"{scenario.name} {number}: " + (f"gaps {gaps}" if report.ok else f"FAILED: {report.why()}"))
        reports.append(told)
        for gateway in GATEWAYS:
            lab.forget_departures(gateway)
    return medians(reports)


def medians(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the runs of one mode: gaps beyond what the link was dark, lost packets, CPU time."""
    each = [figures(one) for one in reports if one["traffic"]]
    found: dict[str, float | None] = {}
    for name in ("up", "down", "lost"):
        values = [value for one in each if (value := one[name]) is not None]
        found[name] = round(median(values), 1) if values else None
    return {
        "runs": len(reports),
        "ok": sum(bool(one["ok"]) for one in reports),
        **found,
        **{name: by_name(one[name] for one in reports) for name in ("cpu_ms", "charon_ms")},
    }


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with how many times the gaps of its mode beside the fewest others its own are, and
    whether that is `BESIDE_OTHERS` at most."""
    first: dict[str, Mapping[str, Any]] = {}
    found = []
    for row in rows:
        base = first.setdefault(row["mode"], row)
        times = {way: _times(row[way], base[way]) for way in ("up", "down")}
        reached = all(one is not None and one <= BESIDE_OTHERS for one in times.values())
        found.append({**row, "times": times, "reached": reached})
    return found


def _times(ours: float | None, base: float | None) -> float | None:
    return round(ours / base, 2) if ours is not None and base else None


if __name__ == "__main__":
    sys.exit(
        lab_guest.program(
            lambda esp, runs, interval_ms, *sizes: beside(
                map(int, sizes),
                int(runs),
                libipsec=esp == "libipsec",
                interval_ms=float(interval_ms),
                say=print,
            )
        )
    )
