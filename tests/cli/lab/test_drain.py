"""The reader of what a charon logs in virtual time: it stops reading who spins, and nobody else."""

from __future__ import annotations

import fcntl
import subprocess
import sys

from ikectx_cli.lab import drain as lab_drain
from ikectx_cli.lab.drain import PIPE, SPINNING, DrainWatch


def spin(watch: DrainWatch, now: float) -> tuple[float, float]:
    """Reads at one point in time until there is a pause; gives the pause and its end."""
    for _ in range(SPINNING // PIPE):
        assert watch.read(PIPE, now) == 0
    pause = watch.read(PIPE, now)
    return pause, now + pause


def test_one_that_spins_is_held_up_longer_and_longer() -> None:
    now, pauses = 5.0, []
    watch = DrainWatch(now)
    for _ in range(9):
        pause, now = spin(watch, now)
        pauses.append(pause)
    assert pauses == [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.1, 0.1]
    assert spin(watch, now + 1.0)[0] == 0.001


def test_one_that_works_is_not_held_up() -> None:
    watch = DrainWatch(0.0)
    assert not any(watch.read(SPINNING // 2, 0.01 * number) for number in range(100))


def test_what_is_logged_is_thrown_away_to_its_end() -> None:
    words = [sys.executable, "-I", "-S", lab_drain.__file__]
    done = subprocess.run(words, input=bytes(3 * SPINNING), capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_it_reads_on_while_charon_ends() -> None:
    words = [sys.executable, "-I", "-S", lab_drain.__file__]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as reader:
        assert reader.stdin is not None
        fcntl.fcntl(reader.stdin, fcntl.F_SETPIPE_SZ, PIPE)
        reader.stdin.write(bytes(8 * PIPE))  # when this is over, it reads
        reader.stdin.flush()
        reader.terminate()
        reader.stdin.write(bytes(8 * PIPE))
        reader.stdin.close()
        assert reader.wait(30) == 0
