"""Runs scenarios in guests: one, or several side by side, each of which takes the next scenario when free.

A run has a folder that all its guests share (`Share`). There a scenario is a file that the guest takes away
which is to run it, and each report is a file. A guest runs this module as a program (`inside`).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikectx.errors import IkectxError, KernelError

from . import (
    guest as lab_guest,
)
from . import (
    hosts as lab_hosts,
)
from . import (
    machine as lab_machine,
)
from . import (
    qemu as lab_qemu,
)
from . import (
    scenario as lab_scenario,
)
from .boot import CHECKOUT, GUEST, PACKAGES, Job, NotStartedError, byte_code, own_folder, sweep, tidy
from .daemons import UNPACKED, unpacked
from .kill_run import scenario as kill_scenario
from .report import ScenarioReport
from .series import run_here
from .usage import clock_stands_still

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Say = Callable[[str], None]

UNFINISHED = "did not run to its end"


MANY, CROWDED_MIB = 200, 3072
"""From how many other SAs on a guest has more memory, and how much: charon's logs of them are in it, too."""


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What to run and how: `names` with one entry for each run; ESP by the kernel, or by charon (libipsec).

    `crowd`: other SAs at each gateway. `interval_ms`: of the probe, instead of the scenario's.
    `guest` is one of `lab_guest.WAYS`, or auto. `clock`, `root` and `cpus` are those of `Job`; `jobs` is how
    many guests run side by side. `brief`: without what only figures need (`Scenario.brief`). `trace`: with a
    time line of each handover. `kills`: the names are those of cases (`kill_cases`), not of scenarios.
    """

    names: tuple[str, ...]
    esp: str = "kernel"
    guest: str = "auto"
    clock: str = "real"
    root: str = "/"
    cpus: int = 0
    jobs: int = 1
    delay_ms: float | None = None
    gateway_delay_ms: float | None = None
    crowd: int = 0
    logs: str = ""
    brief: bool = False
    trace: bool = False
    kills: bool = False
    interval_ms: float | None = None

    def load(self, number: int) -> lab_scenario.Scenario:
        """The scenario, or the case. Errors: UsageError, ConfigError."""
        found = (kill_scenario if self.kills else lab_scenario.load)(self.names[number])
        if self.interval_ms is None:
            return found
        return replace(found, interval_ms=self.interval_ms, slow_interval_ms=0.0)

    def label(self, number: int) -> str:
        """The name of a run, for people and its logs: the scenario's, with a number where it runs often."""
        which = self.run(number)
        return f"{self.names[number]}-{which}" if which else self.names[number]

    def run(self, number: int) -> int:
        """Which run of its scenario that is, counted from 1; 0 where it is the only one."""
        name = self.names[number]
        return self.names[: number + 1].count(name) if self.names.count(name) > 1 else 0


@dataclass(frozen=True, slots=True)
class Share:
    """The folder of a run. `queue` and `taken` hold scenarios by number, `reports` what came of them."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, request: RunRequest) -> Share:
        """Lays a run out in an empty folder."""
        share = cls(folder)
        for name in ("queue", "taken", "reports", "logs", "packages"):
            (folder / name).mkdir()
        for number in range(len(request.names)):
            (folder / "queue" / f"{number:06}").touch()
        for package, where in PACKAGES.items():
            (folder / "packages" / package).symlink_to(CHECKOUT / where)
        (folder / "request.json").write_text(json.dumps(asdict(request)))
        return share

    def request(self) -> RunRequest:
        told = json.loads((self.folder / "request.json").read_text())
        return RunRequest(**{**told, "names": tuple(told["names"])})

    def waiting(self) -> bool:
        """Whether there are scenarios that no guest has taken."""
        return any((self.folder / "queue").iterdir())

    def take(self, guest: int) -> Iterator[int]:
        """Takes one scenario after the other for a guest, first come, first served: renaming is atomic."""
        while True:
            for path in sorted((self.folder / "queue").iterdir()):
                with suppress(FileNotFoundError):  # another guest was faster
                    path.rename(self.folder / "taken" / f"{path.name}.{guest}")
                    yield int(path.name)
                    break
            else:
                if not self.waiting():
                    return

    def taken(self, guest: int) -> list[int]:
        """What a guest has taken, in this order."""
        return sorted(int(path.stem) for path in (self.folder / "taken").glob(f"*.{guest}"))

    def put(self, number: int, report: Mapping[str, Any]) -> None:
        """Keeps a report; it is on the disk when this returns, whatever ends the guest then."""
        path = self.folder / "reports" / f"{number:06}"
        with path.with_suffix(".part").open("w", encoding="utf-8") as file:
            json.dump(report, file)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".part").rename(path)

    def reports(self) -> dict[int, dict[str, Any]]:
        """All reports that there are."""
        paths = sorted(path for path in (self.folder / "reports").iterdir() if not path.suffix)
        return {int(path.name): json.loads(path.read_text()) for path in paths}


def check(request: RunRequest) -> None:
    """Raises UsageError for what no machine can do, and for scenarios that do not exist."""
    for number in range(len(request.names)):
        request.load(number)
    lab_guest.check(_guest_of(request), request.clock, Path(request.root), request.cpus)
    if request.root != "/":
        lab_guest.python(Path(request.root))


def _guest_of(request: RunRequest) -> str:
    """ESP in user space needs no other kernel than this machine's."""
    return "host" if request.esp == "libipsec" and request.guest == "auto" else request.guest


def guests(request: RunRequest) -> tuple[str, ...]:
    """The ways to run it (of `lab_guest.WAYS`), best first. Raises KernelError."""
    if request.esp == "libipsec" and _guest_of(request) == "host":
        return ("host",)
    return lab_guest.ways(request.guest, _job(request), lab_guest.means(request.clock))


def _job(request: RunRequest, argv: Sequence[str] = (), share: Share | None = None) -> Job:
    """The job of a guest of a run."""
    root = Path(request.root)
    environment = {name: value for name, value in os.environ.items() if name.startswith("IKECTX_LAB_")}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    if root == Path("/"):
        environment[UNPACKED] = str(unpacked())
    if share is not None and root != Path("/"):
        environment["PYTHONPATH"] = str(share.folder / "packages")
    job = Job(
        tuple(argv),
        folder=CHECKOUT,
        shared=share.folder if share else None,
        environment=environment,
        root=root,
        clock=request.clock,
        cpus=request.cpus,
    )
    return replace(job, memory_mib=CROWDED_MIB) if request.crowd > MANY else job


def run(
    request: RunRequest, say: Say, found: dict[int, dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Runs the scenarios; returns their reports as JSON values, in the order of the request.

    `found` gets them as well, by their number, also where something ends this before all have run. Raises
    IkectxError when none can run, or guests end before their scenarios.
    """
    check(request)
    for name in [*lab_hosts.sweep(), *sweep()]:
        say(f"removed what was left of {name}")
    found = {} if found is None else found
    ways = guests(request)
    interpreter = sys.executable if request.root == "/" else lab_guest.python(Path(request.root))
    byte_code()
    with tidy(), own_folder("run") as shared:
        share = Share.make(shared, request)
        try:
            asyncio.run(_side_by_side(request, ways, share, interpreter, say))
        finally:
            found |= share.reports()
            if request.logs:
                shutil.copytree(share.folder / "logs", request.logs, dirs_exist_ok=True)
    return [found[number] for number in sorted(found)]


async def _side_by_side(
    request: RunRequest, ways: Sequence[str], share: Share, interpreter: str, say: Say
) -> None:
    count = min(request.jobs, len(request.names))
    if ways[0] != "host":
        say(f"booting {count} guest{'s' if count > 1 else ''} ({ways[0]}, {request.clock} time)")
    running = [
        asyncio.create_task(_guest(number, request, ways, share, interpreter, say))
        for number in range(1, count + 1)
    ]
    try:
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _guest(
    number: int, request: RunRequest, ways: Sequence[str], share: Share, interpreter: str, say: Say
) -> None:
    """Boots guests, one after the other, until no scenario is left: one that dies costs what it ran."""
    prefix = f"guest {number} " if request.jobs > 1 else ""
    argv = [interpreter, "-m", __spec__.name, str(share.folder), str(number)]
    job = _job(request, argv, share)

    last = ""

    def tell(line: bytes) -> None:
        nonlocal last
        last = line.decode(errors="replace").rstrip()
        say(prefix + last)

    while share.waiting():
        before = len(share.taken(number))
        try:
            status = await lab_guest.boot(ways, job, tell, lambda line: say(prefix + line))
            why = f"guest {ways[0]} ended with status {status}: {last}" if status else ""
        except NotStartedError:
            raise
        except KernelError as error:
            why = str(error)
        if not why:
            continue
        open_runs = [one for one in share.taken(number)[before:] if one not in share.reports()]
        if not open_runs:
            raise KernelError(why)
        for one in open_runs:
            say(f"{prefix}[{request.label(one)}] FAILED: {why}")
            share.put(one, _told(request, one, ScenarioReport(request.names[one], error=why), ways[0]))


def _told(
    request: RunRequest,
    number: int,
    report: ScenarioReport,
    guest: str,
    machine: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A report as JSON, with where it ran (`lab_machine.here`, where it came to run)."""
    told = {**report.as_json(), "guest": guest, "clock": request.clock}
    if machine is not None:
        told["machine"] = machine
    return {**told, "run": which} if (which := request.run(number)) else told


def complete(request: RunRequest, found: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """All reports of a run that was ended: what had not come to its end has failed."""
    return [
        found.get(number) or _told(request, number, ScenarioReport(name, error=UNFINISHED), request.guest)
        for number, name in enumerate(request.names)
    ]


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 150)


def print_all(parts: Iterable[RenderableType]) -> None:
    """Prints tables for people."""
    console = _console()
    for part in parts:
        console.print(part)


def show(reports: Sequence[dict[str, Any]]) -> None:
    """Prints reports for people: each by itself, or a line each when there are many."""
    from .report import repeated, summary, tables

    console = _console()
    if len(reports) > 2:
        console.print(summary(reports))
        console.print("\n".join(repeated(reports)), end="")
        return
    print_all(part for report in reports for part in tables(report))


def inside(share: Share, guest: int) -> None:
    """The guest's side: takes scenarios and runs them, until none is left."""
    byte_code()
    request = share.request()
    current = 0
    machine = lab_machine.here(clock_stands_still=clock_stands_still())

    def scenarios() -> Iterator[lab_scenario.Scenario]:
        nonlocal current
        for current in share.take(guest):
            scenario = request.load(current)
            yield scenario.brief(slow=lab_qemu.emulated()) if request.brief else scenario

    def done(report: ScenarioReport) -> None:
        os.sync()  # its logs
        share.put(current, _told(request, current, report, os.environ.get(GUEST, "host"), machine))

    run_here(
        scenarios(),
        libipsec=request.esp == "libipsec",
        say=lambda line: print(line, flush=True),
        done=done,
        logs=(lambda: share.folder / "logs" / request.label(current)) if request.logs else None,
        delay_ms=request.delay_ms,
        gateway_delay_ms=request.gateway_delay_ms,
        crowd=request.crowd,
        traced=request.trace,
        kills=request.kills,
    )


if __name__ == "__main__":
    with tidy():
        try:
            inside(Share(Path(sys.argv[1])), int(sys.argv[2]))
        except (IkectxError, KeyboardInterrupt) as problem:
            print(problem or "told to end", file=sys.stderr, flush=True)
            sys.exit(1)
