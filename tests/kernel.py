"""Runs the tests marked `kernel_esp`: here if this kernel has ESP, else in a virtual machine with Debian's.

Writes kernel.xml (JUnit) and kernel.where (where they ran) into the folder given.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from ikectx.errors import KernelError
from ikectx_cli.doctor import ESP_PROBE
from ikectx_cli.lab_vm import find_kernel, kvm_works, run_in_vm

SLOW = "600"
"""Seconds a test may take under emulation."""


def command(results: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "kernel_esp",
        "--junit-xml",
        str(results / "kernel.xml"),
    ]


def has_esp() -> bool:
    try:
        done = subprocess.run(
            ["unshare", "-n", "ip", *ESP_PROBE], capture_output=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def main(results: Path) -> int:
    if has_esp():
        (results / "kernel.where").write_text(f"this machine, Linux {platform.release()}")
        return subprocess.run(command(results), check=False).returncode
    image = find_kernel()
    name = image.name.removeprefix("vmlinuz-") if image else "none"
    how = "KVM" if kvm_works() else "emulation"
    (results / "kernel.where").write_text(f"virtual machine, Linux {name}, {how}")
    slow = ["-p", "no:cacheprovider", "-o", f"timeout={SLOW}"]
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "HOME": os.environ.get("HOME", "/root")}
    try:
        return run_in_vm([*command(results), *slow], shared=results, environment=environment)
    except KernelError as error:
        (results / "kernel.where").write_text(f"nowhere: {error}")
        print(f"kernel: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
