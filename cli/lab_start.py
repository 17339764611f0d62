"""Where scenarios run: here when the kernel has ESP, else in a VM that repeats the same command inside."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ikectx.errors import KernelError

from . import lab_hosts, lab_scenario, lab_vm
from .lab_net import has_kernel_esp, load_modules
from .lab_run import run_here

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What to run and how: `esp` is auto, kernel (here), vm or libipsec (here)."""

    names: tuple[str, ...]
    esp: str = "auto"
    delay_ms: float | None = None
    logs: Path | None = None


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


def run(request: Request, say: Say) -> list[dict[str, Any]]:
    """Runs the scenarios; returns their reports as JSON values. Raises IkectxError when none can run."""
    scenarios = [lab_scenario.load(name) for name in request.names]
    for name in lab_hosts.sweep():
        say(f"removed what was left of lab {name}")
    way = choose(request.esp)
    if way == "vm":
        return _in_vm(request, say)
    reports = run_here(
        scenarios, libipsec=way == "libipsec", say=say, logs=request.logs, delay_ms=request.delay_ms
    )
    return [report.as_json() for report in reports]


def _in_vm(request: Request, say: Say) -> list[dict[str, Any]]:
    """The same in a VM: progress comes through its console, reports and logs through a shared folder."""
    say("this kernel has no ESP: booting a VM (about half a minute)")
    with tempfile.TemporaryDirectory(prefix="ikl-run-") as folder:
        results, logs = Path(folder, "reports.json"), Path(folder, "logs")
        words = [sys.executable, "-m", __spec__.name, str(results), "kernel"]
        words += [
            "-" if request.delay_ms is None else str(request.delay_ms),
            str(logs) if request.logs else "-",
        ]
        lab_vm.run_in_vm(
            [*words, *request.names],
            shared=Path(folder),
            on_output=lambda line: say(line.decode(errors="replace").rstrip()),
        )
        try:
            reports: list[dict[str, Any]] = json.loads(results.read_text())
        except (OSError, ValueError):
            raise KernelError("the VM ended without a report") from None
        if request.logs is not None and logs.exists():
            shutil.copytree(logs, request.logs, dirs_exist_ok=True)
        return reports


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


def inside(arguments: Sequence[str]) -> None:
    """The guest's side of `_in_vm`."""
    results, esp, delay, logs, *names = arguments
    request = Request(
        tuple(names), esp, None if delay == "-" else float(delay), None if logs == "-" else Path(logs)
    )
    reports = run(request, lambda line: print(line, flush=True))
    Path(results).write_text(json.dumps(reports))


if __name__ == "__main__":
    inside(sys.argv[1:])
