"""Reads what a charon logs in virtual time, throws it away, and has the charon wait where it spins.

    python -I -S lab_drain.py < PIPE

charon's watcher (libstrongswan, `watcher.c`; 5.9.8) polls without a pause while one of its callbacks is at
work in another thread and another file descriptor is ready. A real clock lets the other thread run meanwhile.
In virtual time no time passes while a program runs: nothing would take the only CPU from the watcher, and the
callback would never end. The watcher logs every poll into this pipe. When it has logged more than a charon
with work to do logs at one point in time, the pipe is not read for a while: the watcher blocks, others run,
and time passes.

SIGTERM is ignored, because charon's updown scripts run while it ends, and it spins then, too. The end of the
pipe is the end.
"""

import os
import signal
import time

PIPE = 4096
"""Octets that the pipe is made to hold: little, so that who writes on is blocked soon."""

SPINNING = 65536
"""Octets, some two hundred polls."""

AT_ONCE = 0.001
"""Seconds that count as one point in time: reading the clock alone takes some 100 ns of virtual time."""

PAUSES = (0.001, 0.1)
"""Seconds: the first pause, and the longest, to which pauses grow while nothing else happens."""


class DrainWatch:
    """Tells by how much is read, and when, whether the one who writes spins."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._count = 0
        self._pause = PAUSES[0]

    def read(self, octets: int, now: float) -> float:
        """So many octets were read; gives the seconds to wait before more are."""
        if now - self._began > AT_ONCE:
            self._began, self._count, self._pause = now, 0, PAUSES[0]
        self._count += octets
        if self._count <= SPINNING:
            return 0.0
        pause = self._pause
        self._began, self._count, self._pause = now + pause, 0, min(2 * pause, PAUSES[1])
        return pause


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch = DrainWatch(time.monotonic())
    while octets := os.read(0, PIPE):
        if pause := watch.read(len(octets), time.monotonic()):
            time.sleep(pause)


if __name__ == "__main__":
    main()
