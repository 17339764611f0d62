"""A virtual machine with Debian's own kernel on this machine's file system, for kernels without ESP.

virtme-ng boots /boot/vmlinuz-* on the running root file system, read-only; what a command writes
is lost, but for one folder that is shared with it. /dev/kvm can exist and not work, so it is tried
(`kvm_works`), and a boot that says nothing for BOOT_PATIENCE seconds is repeated under emulation.
"""

from __future__ import annotations

import compileall
import contextlib
import fcntl
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ikectx.errors import KernelError

from .lab_net import MODULES

BOOT_PATIENCE = 120.0
MARK = "ikectx-lab-vm: up"
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


def run_in_vm(
    argv: Sequence[str],
    *,
    shared: Path | None = None,
    writable: bool = False,
    environment: Mapping[str, str] | None = None,
    on_output: Callable[[bytes], None] | None = None,
    memory: str = "2G",
) -> int:
    """Boots, runs one command in this folder as root, powers off; returns the command's exit status.

    `shared`: a folder both sides can write. `writable`: the guest may write the whole file system.
    Output of the command (both streams) goes to `on_output` as it comes, else to standard output.
    The VM ends with this process, whatever ends it but SIGKILL. Raises KernelError when no VM can boot.
    """
    lacks = missing()
    if lacks:
        raise KernelError("no VM can boot here, missing: " + ", ".join(lacks))
    _compile()
    with _alone(), tempfile.TemporaryDirectory(prefix="ikl-vm-") as folder:
        script = Path(folder, "inside")
        script.write_text(inside(argv, environment or {}, cached=not writable))
        words = [str(find_vng()), "-r", str(find_kernel()), "--memory", memory, "--user", "root"]
        words.append(
            f"--qemu-opts=-fsdev local,id={CACHED},path=/,security_model=none,readonly=on,multidevs=remap"
            f" -device virtio-9p-pci,fsdev={CACHED},mount_tag={CACHED}"
        )
        words += (
            [f"--rwdir={folder}"] + ([f"--rwdir={shared}"] if shared else []) + (["--rw"] if writable else [])
        )
        if kvm_works():
            fast = [*words, "--cpus", str(min(4, os.cpu_count() or 1)), "--", f"sh {script}"]
            if _boot(fast, on_output, BOOT_PATIENCE):
                return _status(folder)
        slow = [
            *words,
            "--cpus",
            str(EMULATED_CPUS),
            "--disable-kvm",
            "--",
            f"sh {script}",
        ]
        if not _boot(slow, on_output, 2 * BOOT_PATIENCE):
            raise KernelError(f"the VM did not start within {2 * BOOT_PATIENCE:.0f} s")
        return _status(folder)


def _compile() -> None:
    """Byte code of this project's packages: the guest cannot write it and would compile at every start."""
    for package in ("ikectx", "vici_bridge", "mobike_ext", "ikectx_cli"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            compileall.compile_dir(folder, quiet=2, maxlevels=2)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Waits for the lab's other VM on this machine: two emulated machines would spoil each other's times.

    The lock is on the kernel image, so nothing is left behind and it ends with the process.
    """
    image = find_kernel()
    assert image is not None
    with image.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another VM of the lab to end", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def inside(argv: Sequence[str], environment: Mapping[str, str], *, cached: bool) -> str:
    """The guest's side: modules, a device for TUN, then the command; its status goes to a file.

    `cached`: programs and Python's files come from the export that is cached (virtme-ng's own goes back to
    the machine for every look at a file: Python starts slowly). What changes outside meanwhile is not seen.
    """
    exports = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **environment}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    if cached:
        project = str(Path(__file__).resolve().parent.parent)
        # of a virtual environment the standard library is elsewhere
        python = {project, sys.prefix, sys.base_prefix}
        folders = sorted(path for path in python if not f"{path}/".startswith("/usr/"))
        lines.append(f"mkdir /run/cached && mount -t 9p -o {_CACHED_OPTIONS} {CACHED} /run/cached && {{")
        lines += [
            f"  mount --bind {shlex.quote(f'/run/cached{path}')} {shlex.quote(path)}"
            for path in ["/usr", *folders]
        ]
        lines.append("}")
    lines += [f"cd {shlex.quote(os.getcwd())}", f"modprobe -a -q {' '.join(MODULES)}"]
    lines.append("[ -e /dev/net/tun ] || { mkdir -p /dev/net; mknod /dev/net/tun c 10 200; }")
    lines += [f"echo {shlex.quote(MARK)}", f"{shlex.join(argv)} 2>&1", 'echo $? > "${0%/*}/status"', "sync"]
    return "\n".join(lines) + "\n"


_CACHED_OPTIONS = "ro,trans=virtio,version=9p2000.L,access=any,msize=524288,cache=loose"


def _status(folder: str) -> int:
    try:
        return int(Path(folder, "status").read_text())
    except (OSError, ValueError):
        raise KernelError("the VM ended before its command did") from None


def _boot(words: Sequence[str], on_output: Callable[[bytes], None] | None, patience: float) -> bool:
    """One boot, in a process group that ends with it. False when the guest never said a word."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PATH"] = (
        f"{Path(sys.executable).parent}:{os.environ.get('PATH', '/usr/sbin:/usr/bin:/sbin:/bin')}"
    )
    process = subprocess.Popen(
        list(words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
    )
    started = False
    timer = threading.Timer(patience, _end, [process])
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if started:
                if on_output is None:
                    sys.stdout.buffer.write(line)
                    sys.stdout.buffer.flush()
                else:
                    on_output(line)
            elif line.strip() == MARK.encode():
                started = True
                timer.cancel()
        process.wait()
    finally:
        timer.cancel()
        _end(process)
    return started


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the group of a boot (virtme-ng, QEMU): asked first, forced after two seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            continue
    if process.poll() is None:
        process.wait()
