"""Runs the tests marked `kernel_esp`: here if this kernel has ESP, else in a virtual machine with Debian's.

Writes kernel.xml (JUnit) and kernel.where (where they ran) into the folder given.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ikectx.errors import KernelError
from ikectx_cli.lab_start import choose
from ikectx_cli.lab_vm import find_kernel, run_in_vm

MARK = "kernel_esp"
SLOW = "600"
"""Seconds a test may take under emulation."""


def marked() -> list[str]:
    """The files that have such tests: an emulated machine takes a minute to collect all others."""
    found = Path(__file__).parent.glob("test_*.py")
    return sorted(str(path) for path in found if f"mark.{MARK}" in path.read_text())


def main(results: Path) -> int:
    where = results / "kernel.where"
    report = results / "kernel.xml"
    command = [sys.executable, "-m", "pytest", *marked(), "-q", "-m", MARK, "--junit-xml"]
    try:
        if choose("auto") == "kernel":
            where.write_text(f"this machine, Linux {platform.release()}")
            return subprocess.run([*command, str(report)], check=False).returncode
        image = find_kernel()
        where.write_text(f"virtual machine, Linux {image.name.removeprefix('vmlinuz-') if image else '?'}")
        slow = ["-p", "no:cacheprovider", "-o", f"timeout={SLOW}"]
        environment = {"PYTHONDONTWRITEBYTECODE": "1", "HOME": os.environ.get("HOME", "/root")}
        # The guest may write here only; below the checkout, which it sees cached, it could not.
        with tempfile.TemporaryDirectory(prefix="ikl-kernel-") as folder:
            told = Path(folder, report.name)
            status = run_in_vm([*command, str(told), *slow], shared=told.parent, environment=environment)
            if told.exists():
                shutil.copyfile(told, report)
            return status
    except KernelError as error:
        where.write_text(f"nowhere: {error}")
        print(f"kernel: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
