"""A guest by QEMU: a virtual machine with Debian's own kernel on this machine's file system.

virtme-ng boots /boot/vmlinuz-* on the running root file system, read-only; what a command writes is lost or
refused, but for one folder that is shared with it. /dev/kvm can exist and not work, so it is tried
(`kvm_works`), and a boot that does not come to its job in BOOT_PATIENCE seconds is repeated under emulation.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from .boot import (
    CHECKOUT,
    SYSTEM_PATH,
    Boot,
    Job,
    Marks,
    NotStartedError,
    Output,
    byte_code,
    own_folder,
    run,
)
from .net import MODULES

BOOT_PATIENCE = 120.0
EMULATED_CPUS = 1
"""Emulated CPUs wait for one another at every change of a page table and in every lock: with two of them on a
busy machine of two, everything took 20 times its time."""

CACHED = "ikl-cached"
"""Mount tag of the root file system's second, read-only export, which the guest may cache."""


def find_kernel(boot: Path = Path("/boot"), modules: Path = Path("/lib/modules")) -> Path | None:
    """The newest installed kernel with ESP and 9p modules (Debian's cloud kernels have no 9p)."""

    def version(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.name)]

    for image in sorted(boot.glob("vmlinuz-*"), key=version, reverse=True):
        tree = modules / image.name.removeprefix("vmlinuz-") / "kernel"
        if any(tree.glob("net/ipv4/esp4.ko*")) and any(tree.glob("fs/9p/9p.ko*")):
            return image
    return None


def find_vng() -> str | None:
    """virtme-ng's command: beside this Python, else on PATH."""
    beside = Path(sys.executable).with_name("vng")
    return str(beside) if beside.exists() else shutil.which("vng")


def missing() -> list[str]:
    """What a VM needs and this machine lacks, as words for an operator; empty when a VM can boot."""
    lacks = []
    if shutil.which("qemu-system-x86_64") is None:
        lacks.append("qemu-system-x86 (Debian package)")
    if find_kernel() is None:
        lacks.append("linux-image-amd64 (Debian package; the cloud kernel will not do)")
    if find_vng() is None:
        lacks.append("virtme-ng (Python package)")
    if not any(shutil.which(name) for name in ("busybox", "busybox-static")):
        lacks.append("busybox-static (Debian package)")
    if shutil.which("file") is None:
        lacks.append("file (Debian package)")
    return lacks


def kvm_works() -> bool:
    """Runs one boot sector under KVM that ends QEMU through its debug port: 33 becomes exit status 67."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK) or shutil.which("qemu-system-x86_64") is None:
        return False
    code = bytes.fromhex("baf400 b021 ee f4")  # mov dx, 0xf4; mov al, 33; out dx, al; hlt
    with tempfile.NamedTemporaryFile(prefix="ikl-kvm-") as image:
        image.write(code.ljust(510, b"\0") + b"\x55\xaa")
        image.flush()
        words = ["qemu-system-x86_64", "-accel", "kvm", "-machine", "pc", "-cpu", "host", "-m", "16"]
        words += ["-display", "none", "-nodefaults", "-no-reboot"]
        words += ["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
        words += ["-drive", f"file={image.name},format=raw,if=ide,snapshot=on"]
        try:
            done = subprocess.run(
                words, capture_output=True, timeout=20, check=False, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
    return done.returncode == 67


def emulated(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU is one that QEMU emulates: some 10 to 20 times slower than a real one."""
    try:
        return re.search(r"^model name\s*: QEMU", cpuinfo.read_text(), re.MULTILINE) is not None
    except OSError:
        return False


async def boot(job: Job, output: Output) -> int:
    """Runs a job in a virtual machine; returns its exit status. Raises NotStartedError, KernelError."""
    if lacks := missing():
        raise NotStartedError("no virtual machine can boot here, missing: " + ", ".join(lacks))
    byte_code()
    async with _alone():
        with own_folder("qemu") as own:
            words, marks = command_line(job, own), Marks()
            (own / "inside").write_text(inside(job, marks))
            if kvm_works():
                fast = [*words, "--cpus", str(job.cpus or min(4, os.cpu_count() or 1))]
                try:
                    return await run(_boot(fast, own, marks, BOOT_PATIENCE), output)
                except NotStartedError as error:
                    print(f"{error}\nbooting again, without KVM", file=sys.stderr, flush=True)
            slow = [*words, "--cpus", str(job.cpus or EMULATED_CPUS), "--disable-kvm"]
            return await run(_boot(slow, own, marks, 2 * BOOT_PATIENCE), output)


def command_line(job: Job, own: Path) -> list[str]:
    """virtme-ng's words for a job, but for the CPUs and the command; `own` is a folder of both sides."""
    words = [str(find_vng()), "-r", str(find_kernel()), "--memory", f"{job.memory_mib}M", "--user", "root"]
    words.append(
        f"--qemu-opts=-fsdev local,id={CACHED},path=/,security_model=none,readonly=on,multidevs=remap"
        f" -device virtio-9p-pci,fsdev={CACHED},mount_tag={CACHED}"
    )
    return [*words, f"--rwdir={own}", *([f"--rwdir={job.shared}"] if job.shared else [])]


def _boot(words: list[str], own: Path, marks: Marks, patience: float) -> Boot:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', SYSTEM_PATH)}"
    what = f"the virtual machine ({find_kernel()})"
    return Boot(what, [*words, "--", f"sh {own}/inside"], marks, patience, 2.0, environment)


@contextlib.asynccontextmanager
async def _alone() -> AsyncIterator[None]:
    """Waits for the lab's other VM on this machine: two emulated machines would spoil each other's times.

    The lock is on the kernel image, so nothing is left behind and it ends with the process.
    """
    image = find_kernel()
    assert image is not None
    with image.open("rb") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    print("waiting for another VM of the lab to end", file=sys.stderr, flush=True)
                told = True
                await asyncio.sleep(0.5)
        yield


def inside(job: Job, marks: Marks) -> str:
    """The guest's side: modules, a device for TUN, then the job.

    Programs and Python's files come from the export that is cached (virtme-ng's own goes back to the machine
    for every look at a file: Python starts slowly). What changes outside meanwhile is not seen.
    """
    exports = {"PYTHONDONTWRITEBYTECODE": "1", **job.environment, "PATH": SYSTEM_PATH}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    # of a virtual environment the standard library is elsewhere
    python = {str(CHECKOUT), sys.prefix, sys.base_prefix}
    folders = sorted(path for path in python if not f"{path}/".startswith("/usr/"))
    lines.append(f"mkdir /run/cached && mount -t 9p -o {_CACHED_OPTIONS} {CACHED} /run/cached && {{")
    for path in ["/usr", *folders]:
        there = shlex.quote(path)  # below /tmp the guest does not have it
        lines.append(f"  mkdir -p {there}; mount --bind {shlex.quote(f'/run/cached{path}')} {there}")
    lines += ["}", f"cd {shlex.quote(str(job.folder))}", f"modprobe -a -q {' '.join(MODULES)}"]
    lines.append("[ -e /dev/net/tun ] || { mkdir -p /dev/net; mknod /dev/net/tun c 10 200; }")
    return "\n".join([*lines, *marks.around(shlex.join(job.argv))]) + "\n"


_CACHED_OPTIONS = "ro,trans=virtio,version=9p2000.L,access=any,msize=524288,cache=loose"
