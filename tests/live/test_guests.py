"""Guests that really boot: what they write, what they tell, and what is left when the command is ended.

Each way that this machine can boot is tried; without any, the tests say what is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ikectx_cli.lab import guest as lab_guest
from ikectx_cli.lab import qemu as lab_qemu
from ikectx_cli.lab.boot import FOLDERS, GUEST, Job, sweep

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(
        os.environ.get(GUEST) in ("uml", "qemu"), reason="this is a guest already, and boots no other"
    ),
]

IKECTX = [sys.executable, "-m", "ikectx_cli.main", "lab"]
BEGUN = 60.0
"""Seconds in which a command must have begun, on a busy machine; to end takes a moment."""


@pytest.fixture(scope="module")
def guest() -> str:
    """The guest that the lab takes where this kernel has no ESP."""
    found = lab_guest.means("real")
    if not found.uml and not lab_qemu.kvm_works():
        pytest.fail("an emulated machine boots in minutes; tests/uml.sh builds a UML kernel", pytrace=False)
    return lab_guest.ways("auto", Job(("true",)), replace(found, esp=False))[0]


def lab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*IKECTX, *words], capture_output=True, text=True, check=False, timeout=110)


def test_what_a_guest_writes_reaches_its_folder_alone(guest: str, tmp_path: Path) -> None:
    lost = Path("/etc/ikl-written-by-a-guest")
    script = f"echo one > {tmp_path}/kept; echo two 2> /dev/null > {lost}; echo three > /tmp/ikl-lost; exit 7"
    done = lab("guest", "--guest", guest, "--share", str(tmp_path), "--", "sh", "-c", script)
    assert done.returncode == 7, done.stderr
    assert (tmp_path / "kept").read_text() == "one\n"
    assert not lost.exists()
    assert not Path("/tmp/ikl-lost").exists()


def test_a_guest_has_esp_and_says_what_it_is(guest: str) -> None:
    script = "ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x1000 mode tunnel "
    script += f"aead 'rfc4106(gcm(aes))' 0x{'00' * 20} 128 && ip xfrm state count && echo $IKECTX_LAB_GUEST"
    done = lab("guest", "--guest", guest, "--", "sh", "-c", script)
    assert done.stdout.splitlines()[-1:] == [guest], done.stderr


def test_virtual_time_passes_without_waiting() -> None:
    assert lab_guest.means("virtual").uml, "no UML kernel with virtual time is built: run tests/uml.sh"
    began = time.monotonic()
    done = lab("guest", "--time", "virtual", "--", "sh", "-c", "date +%s; sleep 3600; date +%s")
    first, second = (int(word) for word in done.stdout.split())
    assert second - first == 3600
    assert time.monotonic() - began < BEGUN


def test_a_kernel_that_is_none_is_told_with_what_it_said(tmp_path: Path) -> None:
    broken = tmp_path / "linux"
    broken.write_text("#!/bin/sh\necho no such register state >&2; exit 1\n")
    broken.chmod(0o755)
    words = [*IKECTX, "guest", "--guest", "uml", "true"]
    environment = {**os.environ, "IKECTX_UML": str(broken)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=110)
    assert done.returncode not in (0, None)
    assert "ended before it had started; it said last:\n  no such register state" in done.stderr
    assert "Traceback" not in done.stderr


# -- what is left -------------------------------------------------------------------------------


def children(of: int) -> set[int]:
    """Processes that descend from one."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if words[0] not in "ZX":
            parents[int(path.parent.name)] = int(words[1])
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in found | {of}} - found:
        found |= more
    return found


def alive(pids: set[int]) -> set[int]:
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it is gone, maybe since just now
            if ") Z " not in Path(f"/proc/{pid}/stat").read_text():
                found.add(pid)
    return found


def gone(pids: set[int], within: float) -> bool:
    limit = time.monotonic() + within
    while alive(pids) and time.monotonic() < limit:
        time.sleep(0.05)
    return not alive(pids)


def left(process: subprocess.Popen[str], below: set[int]) -> set[str]:
    """Folders of guests and runs that a process made; folders and namespaces of labs of those below it."""
    found = {str(path) for path in FOLDERS.glob(f"ikl-*-{process.pid}-*")}
    for path in FOLDERS.glob("ikl-*/lab.json"):
        with contextlib.suppress(FileNotFoundError):  # a lab of somebody else's that has gone since
            if json.loads(path.read_text())["owner"] in below:
                found |= {str(path.parent), *map(str, Path("/run/netns").glob(f"{path.parent.name}-*"))}
    return found


def begin(*words: str, until: str) -> tuple[subprocess.Popen[str], set[int]]:
    """Starts a command, waits until it has said something; gives it and the processes below it."""
    process = subprocess.Popen(
        [*IKECTX, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if until in line:
            return process, children(process.pid)
    raise AssertionError("".join(said))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_leaves_no_guest(guest: str, number: signal.Signals) -> None:
    process, below = begin("guest", "--guest", guest, "--", "sh", "-c", "echo up; sleep 1000", until="up")
    assert below
    process.send_signal(number)
    assert process.wait(20) != 0
    assert gone(below, 5)
    assert not left(process, below)


def test_a_command_that_is_killed_leaves_no_guest(guest: str) -> None:
    process, below = begin("guest", "--guest", guest, "--", "sh", "-c", "echo up; sleep 1000", until="up")
    assert below
    process.kill()
    process.wait()
    assert gone(below, 5)
    assert left(process, below)
    sweep()  # what the next command does first
    assert not left(process, below)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_neither_guests_nor_folders(guest: str, number: signal.Signals) -> None:
    words = ["run", "handover", "left", "--jobs", "2", "--guest", guest]
    process, below = begin(*words, until="] network and daemons")
    process.send_signal(number)
    assert process.wait(30) != 0
    assert gone(below, 5)
    assert not left(process, below)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_on_this_machine_that_is_ended_leaves_nothing(
    number: signal.Signals,
) -> None:
    process, below = begin("run", "handover", "--esp", "libipsec", until="] connect")
    made = left(process, below)
    assert made
    process.send_signal(number)
    process.wait(BEGUN)
    assert gone(below, BEGUN)
    sweep()
    assert not {path for path in made if Path(path).exists()}
