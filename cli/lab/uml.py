"""A guest by User-Mode Linux: a kernel with ESP that is a program here, on a copy of a file system here.

The guest's root is an overlay: below it the installation, read through hostfs, above it a tmpfs that is lost.
What the guest writes there costs its memory. Only `Job.shared` is mounted so that writes come through.

Two kernels exist, since UML has either several CPUs or virtual time. `tests/uml.sh` builds both from the
configurations in `tests/uml` into `cache`. Needs Linux 6.16 or newer: older ones have no `seccomp=on` (system
calls by seccomp in place of ptrace), and die on CPUs with large register state (AMX).
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from ikectx.errors import KernelError

from .boot import CHECKOUT, SYSTEM_PATH, Boot, Job, Marks, Output, own_folder, run

CONFIGURATIONS = {
    "real": ("small.config", "smp.config"),
    "virtual": ("small.config", "virtual-time.config"),
}
"""By clock: the files in `FOLDER` that a kernel is built from, in this order."""

STEMS = {"real": "linux-smp", "virtual": "linux-virtual"}
"""By clock: how a kernel's file name begins; the configuration's digest and the kernel's version follow."""

VARIABLES = {"real": "IKECTX_UML", "virtual": "IKECTX_UML_VIRTUAL"}
"""By clock: the environment variable that names a kernel."""

FOLDER = CHECKOUT / "tests" / "uml"
EMPTY = ("run", "tmp", "dev/shm")
"""Folders of a guest's root that are its own."""

DIGEST_LETTERS = 16


def cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Where kernels lie that were built for this user."""
    base = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/root"), ".cache")
    return Path(base, "ikectx")


def digest(clock: str, folder: Path = FOLDER) -> str:
    """Of the configuration of a kernel: SHA-256 of its files one after the other, the first hex digits."""
    octets = b"".join((folder / name).read_bytes() for name in CONFIGURATIONS[clock])
    return hashlib.sha256(octets).hexdigest()[:DIGEST_LETTERS]


def find_kernel(
    clock: str, environment: Mapping[str, str] = os.environ, folder: Path = FOLDER
) -> Path | None:
    """The kernel that the environment names, else the newest one in the cache of today's configuration.

    Raises KernelError when the environment names what is no program.
    """
    if named := environment.get(VARIABLES[clock]):
        if not os.access(named, os.X_OK) or not os.path.isfile(named):
            raise KernelError(
                f"{VARIABLES[clock]}={named}: there is no such program",
                hint="name a UML kernel, or none to take the one that tests/uml.sh has built",
            )
        return Path(named).resolve()
    try:
        wanted = f"{STEMS[clock]}-{digest(clock, folder)}-*"
    except FileNotFoundError:
        return None
    found = [path for path in cache(environment).glob(wanted) if os.access(path, os.X_OK)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def command_line(kernel: Path, job: Job, own: Path) -> list[str]:
    """The words that boot a kernel for a job; `own` is a folder here with the guest's `init`."""
    words = [str(kernel), "seccomp=on", f"mem={job.memory_mib}M"]
    words.append("time-travel=inf-cpu" if job.clock == "virtual" else f"ncpus={job.cpus or 1}")
    words += ["rootfstype=hostfs", "rootflags=/", "rw", f"init={own}/init", f"uml_dir={own}"]
    return [*words, "con=null", "con0=fd:0,fd:1", "loglevel=3"]


def init(job: Job, marks: Marks) -> str:
    """The script that is the guest's first program. It runs on all of this machine's files (hostfs).

    It builds the root file system, makes the way by which writes could reach this machine read-only, and runs
    the job there. It does not end: the guest is ended from outside.
    """
    bound = [_overlay(str(n), path, f"/mnt/root{path}") for n, path in enumerate(_needed(job))]
    if job.shared is not None:
        there = shlex.quote(f"/mnt/root{job.shared}")
        bound.append(f"mkdir -p {there} && mount --bind {shlex.quote(str(job.shared))} {there}")
    exports = {"HOME": "/root", "TERM": "dumb", **job.environment, "PATH": SYSTEM_PATH}
    inside = ["export " + shlex.join(f"{name}={value}" for name, value in exports.items())]
    inside += [
        "ip link set lo up",
        f"cd {shlex.quote(str(job.folder))} && {shlex.join(job.argv)} < /dev/null",
    ]
    lines = [
        "#!/bin/sh",
        f"export PATH={SYSTEM_PATH}",
        "mount -t tmpfs -o mode=755,size=90% guest /mnt",
        _overlay("root", job.root, "/mnt/root"),
        "mount -t proc proc /mnt/root/proc",
        "mount -t sysfs sys /mnt/root/sys",
        "mount -t devtmpfs dev /mnt/root/dev",
        "mkdir -p /mnt/root/dev/pts /mnt/root/dev/shm /mnt/root/dev/net",
        "mount -t devpts pts /mnt/root/dev/pts",
        f"for name in {' '.join(EMPTY)}; do mount -t tmpfs -o mode=1777 $name /mnt/root/$name; done",
        "[ -e /mnt/root/dev/net/tun ] || mknod /mnt/root/dev/net/tun c 10 200",
        *bound,
        "mount -o remount,bind,ro /",
        "stty -F /mnt/root/dev/console -opost",
        *marks.around(f"chroot /mnt/root /bin/sh -c {shlex.quote('; '.join(inside))}"),
        # no program waits for a time here: virtual time would be over at once
        "mkfifo /mnt/never && read -r nothing < /mnt/never",
    ]
    return "\n".join(lines) + "\n"


def _needed(job: Job) -> list[Path]:
    """Folders here that a job needs and the guest's root would not show: the project, and what it runs on."""
    if job.root != Path("/"):
        return [CHECKOUT]
    found = {CHECKOUT, Path(sys.prefix), Path(sys.base_prefix), job.folder}
    hidden = {path for path in found if any(path.is_relative_to(f"/{name}") for name in EMPTY)}
    return sorted(path for path in hidden if not hidden & set(path.parents))


def _overlay(name: str, lower: Path, target: str) -> str:
    """A line of `init` that mounts a folder of this machine, with writes on top that are lost."""
    below, upper, work = (f"/mnt/{part}-{name}" for part in ("lower", "upper", "work"))
    there = shlex.quote(target)
    # bound first, since overlay's own options cannot hold every path
    lines = [f"mkdir -p {below} {upper} {work} {there}", f"mount --bind {shlex.quote(str(lower))} {below}"]
    lines.append(f"mount -t overlay -o lowerdir={below},upperdir={upper},workdir={work} {name} {there}")
    lines.append(f"umount {below}")
    return " && ".join(lines)


async def boot(job: Job, output: Output) -> int:
    """Runs a job in a UML guest; returns its exit status. Raises NotStartedError, KernelError."""
    kernel = find_kernel(job.clock)
    if kernel is None:
        raise KernelError(f"no UML kernel with {job.clock} time is built", hint="tests/uml.sh builds it")
    marks = Marks()
    with own_folder("uml") as own:
        return await run(_boot(kernel, job, marks, own), output)


def _boot(kernel: Path, job: Job, marks: Marks, own: Path) -> Boot:
    """Writes the guest's `init` into a folder of its own."""
    script = own / "init"
    script.write_text(init(job, marks))
    script.chmod(0o700)
    environment = dict(os.environ)
    if not _fits(Path("/dev/shm"), job.memory_mib):  # noqa: S108  where UML has its memory by itself
        environment["TMPDIR"] = str(own)
    words = command_line(kernel, job, own)
    return Boot(f"the UML guest ({kernel})", words, marks, environment=environment)


def _fits(folder: Path, mib: int) -> bool:
    """Whether a guest's memory fits into a folder of this machine."""
    try:
        return shutil.disk_usage(folder).free >= mib << 20
    except OSError:
        return False
