"""An agent's memory: not dumped, not swapped."""

from __future__ import annotations

import ctypes
import logging
import resource
import subprocess
import sys

import pytest

from ikectx_cli.memory import protect_memory

LOOK = """
import ctypes, resource
from ikectx_cli.memory import protect_memory
protect_memory()
libc = ctypes.CDLL(None)
print(libc.prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)[0])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmLck")))
"""


def looks() -> tuple[str, str, int, str]:
    """Of a process that protects its memory: may it be dumped, how large, KiB locked, what it said."""
    done = subprocess.run([sys.executable, "-c", LOOK], check=True, capture_output=True, text=True)
    dumpable, core, locked = done.stdout.split()
    return dumpable, core, int(locked), done.stderr


def test_memory_is_not_dumped() -> None:
    assert looks()[:2] == ("0", "0")


@pytest.mark.kernel_esp  # in a container root may not raise the limit
def test_memory_is_locked() -> None:
    *_, locked, said = looks()
    assert locked > 1000, said


class Refuses:
    """A libc whose calls fail."""

    def prctl(self, *_: int) -> int:
        ctypes.set_errno(22)
        return -1

    def mlockall(self, flags: int) -> int:
        del flags
        ctypes.set_errno(1)
        return -1


def test_what_the_kernel_refuses_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with caplog.at_level(logging.WARNING):
        protect_memory(Refuses())  # type: ignore[arg-type]
    assert "memory may be dumped: Invalid argument" in caplog.text
    assert "keys may get into swap: Operation not permitted" in caplog.text


def test_a_limit_that_cannot_be_raised_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixed(which: int, limits: tuple[int, int]) -> None:
        if which == resource.RLIMIT_MEMLOCK:
            raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", fixed)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    with caplog.at_level(logging.WARNING):
        protect_memory(Refuses())  # type: ignore[arg-type]
    assert "LimitMEMLOCK=infinity" in caplog.text
