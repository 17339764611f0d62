"""Runs the tests marked `kernel_esp`: here if this kernel has ESP and SCTP, else in a guest of the lab.

Writes kernel.xml (JUnit) and kernel.where (where they ran) into the folder given.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shlex
import shutil
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from ikectx.errors import KernelError, LinkError
from ikectx.net.plain import open_socket
from ikectx_cli.lab.boot import GUEST, Job, tidy
from ikectx_cli.lab.guest import boot, means, ways
from ikectx_cli.lab.net import has_kernel_esp, load_modules

MARK = "kernel_esp"
SLOW = "600"
"""Seconds a test may take under emulation."""


def marked() -> list[str]:
    """The files that have such tests: an emulated machine takes a minute to collect all others."""
    found = Path(__file__).parent.rglob("test_*.py")
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
    where, report = results / "kernel.where", results / "kernel.xml"
    command = [sys.executable, "-m", "pytest", *marked(), "-q", "-m", MARK, "--junit-xml"]
    try:
        if suffices():
            where.write_text(f"this machine, Linux {platform.release()}")
            os.execv(sys.executable, [*command, str(report)])
        # The guest may write here only.
        with tempfile.TemporaryDirectory(prefix="ikl-kernel-") as folder:
            try:
                with tidy():
                    return in_guest([*command, f"{folder}/{report.name}"], Path(folder))
            finally:
                for path in (where, report):
                    if (told := Path(folder, path.name)).exists():
                        shutil.copyfile(told, path)
    except KernelError as error:
        where.write_text(f"nowhere: {error}")
        print(f"kernel: {error}", file=sys.stderr)
        return 1


def in_guest(command: list[str], folder: Path) -> int:
    """Runs the tests in a guest other than this machine, which says in `folder` what it is."""
    script = f'echo "guest ${GUEST}, Linux $(uname -r)" > {shlex.quote(str(folder))}/kernel.where; '
    script += shlex.join([*command, "-p", "no:cacheprovider", "-o", f"timeout={SLOW}"])
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "HOME": os.environ.get("HOME", "/root")}
    job = Job(("sh", "-c", script), shared=folder, environment=environment)
    guests = ways("auto", job, replace(means(job.clock), esp=False))

    def tell(line: bytes) -> None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()

    return asyncio.run(boot(guests, job, tell, lambda line: print(line, file=sys.stderr)))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
