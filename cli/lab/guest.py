"""A guest: a kernel with ESP in which a command runs, and which of them is taken.

The machine here is a guest, too, where its kernel has ESP. Else there are two ways to boot one: User-Mode
Linux (`lab_uml`, at nearly the speed of this machine) and QEMU (`lab_qemu`, slow where KVM does not work).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ikectx.errors import IkectxError, KernelError, UsageError

from . import qemu as lab_qemu
from . import uml as lab_uml
from .boot import (
    CHECKOUT,
    CLOCK,
    GUEST,
    Boot,
    Job,
    NotStartedError,
    Output,
    byte_code,
    own_folder,
    run,
    sweep,
    tidy,
)
from .machine import host
from .net import has_kernel_esp, load_modules

WAYS = ("host", "uml", "qemu")
CLOCKS = ("real", "virtual")

VENV = Path("opt/ikectx/.venv")
"""In another installation (`Job.root`): the virtual environment whose Python runs this project there."""

GENTLY = 60.0
"""Seconds a job on this machine has to take away what it made here, when it is to end."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Means:
    """What this machine has: ESP in its own kernel, a UML kernel of that clock, and what QEMU lacks here."""

    esp: bool
    uml: bool
    qemu_lacks: tuple[str, ...]


def means(clock: str) -> Means:
    """Tried and looked for, here. Raises KernelError."""
    load_modules()
    return Means(has_kernel_esp(), lab_uml.find_kernel(clock) is not None, tuple(lab_qemu.missing()))


def check(guest: str, clock: str = "real", root: Path = Path("/"), cpus: int = 0) -> None:
    """Raises UsageError for what no machine can do."""
    if guest in ("host", "qemu"):
        if clock == "virtual":
            raise UsageError(f"--guest {guest} has no virtual time", hint="only --guest uml has")
        if root != Path("/"):
            raise UsageError(f"--guest {guest} cannot run on another root", hint="only --guest uml can")
    if guest == "host" and cpus:
        raise UsageError("--guest host has the CPUs of this machine: it goes without --cpus")
    if clock == "virtual" and cpus > 1:
        raise UsageError("virtual time has one CPU", hint="leave out --cpus")


def ways(guest: str, job: Job, means: Means) -> tuple[str, ...]:
    """The guests of `WAYS` to try for a job, best first. Raises KernelError when there is none."""
    if guest != "auto":
        if guest == "host" and not means.esp:
            raise KernelError("this kernel has no ESP", hint="--guest uml, --guest qemu or --esp libipsec")
        return (guest,)
    only_uml = job.clock == "virtual" or job.root != Path("/")
    if means.esp and not only_uml and not job.cpus:
        return ("host",)
    found = ("uml",) if means.uml else ()
    if not only_uml and not means.qemu_lacks:
        found = (*found, "qemu")
    if found:
        return found
    variable = lab_uml.VARIABLES[job.clock]
    wanted = f"a UML kernel with {job.clock} time, which tests/uml.sh builds or {variable} names"
    if only_uml:
        raise KernelError(f"what is missing here is {wanted}")
    raise KernelError(
        f"this kernel has no ESP. What is missing here is {wanted}; or for a virtual machine: "
        + ", ".join(means.qemu_lacks),
        hint="or --esp libipsec",
    )


async def boot(guests: Sequence[str], job: Job, output: Output, say: Say) -> int:
    """Runs a job in the first of the guests (of `WAYS`) that starts; returns its exit status.

    `say` is told why another one is tried. Raises NotStartedError, KernelError.
    """
    for number, guest in enumerate(guests, 1):
        told = {**job.environment, GUEST: guest, CLOCK: job.clock}
        try:
            return await _BOOTS[guest](replace(job, environment=told), output)
        except NotStartedError as error:
            if number == len(guests):
                raise
            say(f"{error}\ntrying guest {guests[number]} instead")
    raise ValueError("no guest to boot")


async def _here(job: Job, output: Output) -> int:
    """The guest that is this machine: the job is a process like any other."""
    environment = {**os.environ, **job.environment}
    words = ["env", "-C", str(job.folder), *job.argv]
    return await run(Boot(job.argv[0], words, None, gently=GENTLY, environment=environment), output)


_BOOTS = {"host": _here, "uml": lab_uml.boot, "qemu": lab_qemu.boot}


def run_job(guest: str, job: Job, output: Output, say: Say) -> int:
    """Runs one job in a guest (of `WAYS`, or auto); returns its exit status. Raises IkectxError."""
    check(guest, job.clock, job.root, job.cpus)
    sweep()
    return asyncio.run(boot(ways(guest, job, means(job.clock)), job, output, say))


def result(
    module: str,
    words: Sequence[str],
    guest: str,
    clock: str,
    *,
    libipsec: bool,
    memory_mib: int,
    say: Say,
) -> dict[str, Any]:
    """The JSON that `python -m module RESULT WORDS...` leaves in RESULT, run in a guest (of `WAYS`, or auto),
    and on what machine that was.

    ESP in user space (`libipsec`) needs no other kernel than this machine's. Raises IkectxError.
    """
    here_alone = libipsec and guest in ("auto", "host")
    check("host" if here_alone else guest, clock)
    environment = {name: value for name, value in os.environ.items() if name.startswith("IKECTX_LAB_")}
    byte_code()
    with tidy(), own_folder("result") as shared:
        file = shared / "result.json"
        argv = (sys.executable, "-m", module, str(file), *words)
        job = Job(argv, CHECKOUT, shared, environment, clock=clock, memory_mib=memory_mib)
        guests = ("host",) if here_alone else ways(guest, job, means(clock))
        last = ""

        def tell(line: bytes) -> None:
            nonlocal last
            last = line.decode(errors="replace").rstrip()
            say(last)

        status = asyncio.run(boot(guests, job, tell, say))
        if status or not file.exists():
            raise KernelError(f"{module.rpartition('.')[2]} ended with status {status}: {last}")
        return {**json.loads(file.read_text()), "host": host()}


def program(measure: Callable[..., Any]) -> int:
    """The program that `result` runs: `measure(*WORDS)`, whose value goes to RESULT. Gives the exit code."""
    file, *words = sys.argv[1:]
    with tidy():
        try:
            found = measure(*words)
        except (IkectxError, KeyboardInterrupt) as problem:
            print(f"{problem or 'told to end'}", file=sys.stderr, flush=True)
            return 1
    Path(file).write_text(json.dumps(found))
    return 0


def python(root: Path) -> str:
    """The interpreter in another installation that has this project's dependencies. Raises UsageError."""
    path = VENV / "bin" / "python"
    if not (root / path).is_symlink() and not (root / path).exists():
        raise UsageError(
            f"{root} has no /{path}",
            hint=f"tests/roots.sh makes such a root; in another, make a virtual environment in /{VENV} with "
            "this project's dependencies",
        )
    return f"/{path}"


def folder_in(root: Path) -> Path:
    """The working folder of a job: this one where the guest has it, else the root folder."""
    here = Path.cwd()
    return here if root == Path("/") or here.is_relative_to(CHECKOUT) else Path("/")
