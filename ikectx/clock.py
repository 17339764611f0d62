"""The clock of this machine (I/O)."""

from __future__ import annotations

import time


class MonotonicClock:
    """`ports.Clock` by `time.monotonic`: seconds since an arbitrary moment."""

    def now(self) -> float:
        return time.monotonic()
