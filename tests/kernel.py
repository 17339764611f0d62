"""Runs the tests marked `kernel_esp`: here if this kernel has ESP and SCTP, else in a VM with Debian's.

Writes kernel.xml (JUnit) and kernel.where (where they ran) into the folder given.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from ikectx.errors import KernelError, LinkError
from ikectx.plain import open_socket
from ikectx_cli.lab import tidy
from ikectx_cli.lab_net import has_kernel_esp, load_modules
from ikectx_cli.lab_vm import find_kernel, run_in_vm

MARK = "kernel_esp"
SLOW = "600"
"""Seconds a test may take under emulation."""


def marked() -> list[str]:
    """The files that have such tests: an emulated machine takes a minute to collect all others."""
    found = Path(__file__).parent.glob("test_*.py")
    return sorted(str(path) for path in found if f"mark.{MARK}" in path.read_text())


def suffices() -> bool:
    """Whether this machine's kernel has all that these tests are about."""
    load_modules()
    try:
        open_socket(socket.AF_INET, "sctp").close()
    except LinkError:
        return False
    return has_kernel_esp()


def main(results: Path) -> int:
    where = results / "kernel.where"
    report = results / "kernel.xml"
    command = [sys.executable, "-m", "pytest", *marked(), "-q", "-m", MARK, "--junit-xml"]
    try:
        if suffices():
            where.write_text(f"this machine, Linux {platform.release()}")
            os.execv(sys.executable, [*command, str(report)])
        image = find_kernel()
        where.write_text(f"virtual machine, Linux {image.name.removeprefix('vmlinuz-') if image else '?'}")
        slow = ["-p", "no:cacheprovider", "-o", f"timeout={SLOW}"]
        environment = {"PYTHONDONTWRITEBYTECODE": "1", "HOME": os.environ.get("HOME", "/root")}
        # The guest may write here only; below the checkout, which it sees cached, it could not.
        with tempfile.TemporaryDirectory(prefix="ikl-kernel-") as folder:
            told = Path(folder, report.name)
            try:
                with tidy():
                    return run_in_vm(
                        [*command, str(told), *slow], shared=told.parent, environment=environment
                    )
            finally:
                if told.exists():
                    shutil.copyfile(told, report)
    except KernelError as error:
        where.write_text(f"nowhere: {error}")
        print(f"kernel: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
