"""The clock of this machine (I/O)."""

from __future__ import annotations

import time
from typing import Protocol


class MonotonicClock:
    """`ports.Clock` by `time.monotonic`: seconds since an arbitrary moment."""

    def now(self) -> float:
        return time.monotonic()


class Clock(Protocol):
    """Monotonic seconds."""

    def now(self) -> float: ...
