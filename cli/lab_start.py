"""Where scenarios run: here when the kernel has ESP, else in a VM that repeats the same command inside."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ikectx.errors import KernelError

from . import lab_hosts, lab_scenario, lab_vm
from .lab_net import has_kernel_esp, load_modules
from .lab_report import Report
from .lab_run import run_here

Say = Callable[[str], None]
Done = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What to run and how: `esp` is auto, kernel (here), vm or libipsec (here).

    `brief`: without what only figures need (`Scenario.brief`).
    """

    names: tuple[str, ...]
    esp: str = "auto"
    delay_ms: float | None = None
    logs: str = ""
    brief: bool = False


def choose(esp: str) -> str:
    """kernel, vm or libipsec. Raises KernelError where what is asked for cannot be had."""
    if esp in ("libipsec", "vm"):
        return esp
    load_modules()
    if has_kernel_esp():
        return "kernel"
    if esp == "kernel":
        raise KernelError("this kernel has no ESP", hint="--esp vm or --esp libipsec")
    lacks = lab_vm.missing()
    if lacks:
        raise KernelError(
            f"this kernel has no ESP, and a VM cannot boot without {', '.join(lacks)}",
            hint="or --esp libipsec",
        )
    return "vm"


def run(request: Request, say: Say, done: Done = lambda _report: None) -> list[dict[str, Any]]:
    """Runs the scenarios; returns their reports as JSON values. Raises IkectxError when none can run.

    `done` gets each of them as well, also where something ends this before all have run.
    """
    scenarios = [lab_scenario.load(name) for name in request.names]
    for name in lab_hosts.sweep():
        say(f"removed what was left of lab {name}")
    way = choose(request.esp)
    found: list[dict[str, Any]] = []

    def keep(report: dict[str, Any]) -> None:
        found.append(report)
        done(report)

    if way == "vm":
        _in_vm(request, say, keep)
    else:
        run_here(
            [scenario.brief(slow=lab_vm.emulated()) if request.brief else scenario for scenario in scenarios],
            libipsec=way == "libipsec",
            say=say,
            done=lambda report: keep(report.as_json()),
            logs=Path(request.logs) if request.logs else None,
            delay_ms=request.delay_ms,
        )
    return found


def left(request: Request, reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reports, as failures, of those scenarios that had not come to their end when a run was ended."""
    names = request.names[len(reports) :]
    return [Report(name, error="did not run to its end").as_json() for name in names]


def _in_vm(request: Request, say: Say, done: Done) -> None:
    """The same in a VM: progress comes through its console, reports and logs through a shared folder."""
    say("this kernel has no ESP: booting a VM (about half a minute)")
    with tempfile.TemporaryDirectory(prefix="ikl-run-") as folder:
        results, logs = Path(folder, "reports"), Path(folder, "logs")
        there = replace(request, esp="kernel", logs=str(logs) if request.logs else "")
        lines: list[str] = []
        try:
            lab_vm.run_in_vm(
                [sys.executable, "-m", __spec__.name, str(results), json.dumps(asdict(there))],
                shared=Path(folder),
                on_output=lambda line: say(line.decode(errors="replace").rstrip()),
            )
        finally:
            if results.exists():
                lines = results.read_text().splitlines()
            for line in lines:
                done(json.loads(line))
            if request.logs and logs.exists():
                shutil.copytree(logs, request.logs, dirs_exist_ok=True)
        if len(lines) < len(request.names):
            raise KernelError(f"the VM ended after {len(lines)} of {len(request.names)} scenarios")


def show(reports: Sequence[dict[str, Any]]) -> None:
    """Prints reports for people: each by itself, or a line each when there are many."""
    from rich.console import Console

    from .lab_report import summary, tables

    console = Console(width=None if sys.stdout.isatty() else 150)
    if len(reports) > 2:
        console.print(summary(reports))
        return
    for report in reports:
        for part in tables(report):
            console.print(part)


def inside(results: Path, request: Request) -> None:
    """The guest's side of `_in_vm`: each line of `results` is a report."""
    with results.open("w", buffering=1) as file:
        run(
            request, lambda line: print(line, flush=True), lambda report: print(json.dumps(report), file=file)
        )


if __name__ == "__main__":
    inside(Path(sys.argv[1]), Request(**json.loads(sys.argv[2])))
