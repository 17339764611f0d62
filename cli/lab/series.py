"""Runs scenarios one after the other on one lab, whose daemons go on as long as they can."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ikectx.errors import IkectxError

from .config import Tunnel
from .daemons import lacks
from .fleet import SEGMENTS, prepare
from .fleet import crowd as others
from .hosts import Lab, save_logs
from .kill_lab import KillLab
from .kill_run import KillRunner
from .report import ScenarioReport
from .run import Say, ScenarioRunner
from .scenario import Scenario


def run_here(
    scenarios: Iterable[Scenario],
    *,
    libipsec: bool,
    say: Say,
    done: Callable[[ScenarioReport], None],
    logs: Callable[[], Path] | None = None,
    delay_ms: float | None = None,
    gateway_delay_ms: float | None = None,
    crowd: int = 0,
    traced: bool = False,
    kills: bool = False,
) -> None:
    """Runs scenarios one after the other on one lab of this machine; takes it down whatever happens.

    `done` gets the report of each as soon as it is there; the next one is asked for after that. `logs` gives
    the folder for what the daemons of the one under way have said. `delay_ms`, `gateway_delay_ms`: instead of
    the scenario's. `crowd`: so many other SAs at each gateway. `traced`: with a time line of each
    handover. `kills`: they are cases of `kill_cases`.
    """
    kind, runner = (KillLab, KillRunner) if kills else (Lab, ScenarioRunner)
    lab: Lab | None = None
    clean = disturbed = False
    try:
        for scenario in scenarios:
            started = time.monotonic()

            def tell(words: str, name: str = scenario.name, started: float = started) -> None:
                say(f"[{name} {time.monotonic() - started:5.1f} s] {words}")

            wanted = (
                scenario.delay_ms if delay_ms is None else delay_ms,
                scenario.gateway_delay_ms if gateway_delay_ms is None else gateway_delay_ms,
            )
            tunnel = replace(scenario.tunnel, libipsec=libipsec)
            if crowd:
                tunnel = replace(tunnel, second=True, segments=SEGMENTS)
            lacking = "needs kernel ESP" if libipsec and scenario.kernel_only else lacks(tunnel.daemon)
            if lacking:
                done(ScenarioReport.skipped(scenario, lacking))
                continue
            if lab is not None and (lab.net.delay_ms, lab.net.gateway_delay_ms) != wanted:
                lab.down()
                lab = None
            tell("daemons" if lab else "network and daemons")
            try:
                new = partial(kind.new, delay_ms=wanted[0], gateway_delay_ms=wanted[1], traced=traced)
                if crowd:
                    new = partial(_crowded, new, libipsec)
                lab = _prepared(lab, new, scenario, tunnel, clean=clean, disturbed=disturbed, say=tell)
            except IkectxError as error:
                done(ScenarioReport.failed(scenario, str(error)))
                if lab is not None:
                    lab.down()
                    lab = None
                continue
            try:
                tell(f"{crowd} other SAs at each gateway" if crowd else "steps")
                with others(lab, crowd, scenario.overrides):
                    report = runner(lab, scenario, tell).run()
            except IkectxError as error:
                report = ScenarioReport.failed(scenario, f"other SAs: {error}")
            report.crowd = crowd
            report.warnings += lab.warnings
            clean = report.ok and not scenario.crashes
            disturbed = scenario.disturbs_network or not report.ok
            tell("ok" if report.ok else f"FAILED: {report.why()}")
            if logs is not None:
                save_logs(lab, logs())
            done(report)
    finally:
        if lab is not None:
            lab.down()


def _crowded(new: Callable[[], Lab], libipsec: bool) -> Lab:
    """A new lab whose charons will have many SAs."""
    lab = new()
    prepare(lab, "mn2", libipsec=libipsec)
    return lab


def _prepared(
    lab: Lab | None,
    new: Callable[[], Lab],
    scenario: Scenario,
    tunnel: Tunnel,
    *,
    clean: bool,
    disturbed: bool,
    say: Say,
) -> Lab:
    """A lab with this scenario's configuration: a new one, or the last one.

    Its daemons go on where the last scenario left them `clean` and this one does not ask for fresh ones.
    """
    if lab is None:
        lab = new()
        try:
            lab.up(tunnel, agents=scenario.agents, overrides=scenario.overrides)
        except BaseException:
            lab.down()
            raise
        return lab
    if disturbed:
        lab.restore()
    if clean and lab.agents == scenario.agents and not scenario.fresh:
        if not (stays := lab.clear()):
            lab.empty_logs()
            lab.reload(tunnel, scenario.overrides)
            return lab
        say(f"daemons anew: {stays}")
    lab.configure(tunnel, agents=scenario.agents, overrides=scenario.overrides)
    return lab
