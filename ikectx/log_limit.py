"""A limit for each cause in a program's log: some lines, then a count of those that were left out.

Otherwise a sender that repeats the same mistake would fill the agent's disk, and hide the lines about
everything else.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

PERIOD = 60.0
"""Seconds in which lines of one cause are counted; they begin with the first."""
WARNINGS = 20
"""Warnings and errors of one cause in that time, and"""
NEWS = 3000
"""lines of lower levels: a gateway that is drained of hundreds of SAs logs seven lines about each."""
CAUSES = 512
"""Causes that are counted separately at a time. Each ready-made line of a library is a cause of its own."""


@dataclass(slots=True)
class _Cause:
    began: float
    lines: int = 0
    left_out: int = 0


class LogLimit(logging.Filter):
    """Leaves out lines above the limit. A cause is a logger, a level, and a message without its arguments."""

    def __init__(self, handler: logging.Handler, now: Callable[[], float]) -> None:
        """`handler`: the one it is for, which is also given the lines that tell the counts. `now`: seconds,
        monotonic."""
        super().__init__()
        self._handler = handler
        self._now = now
        self._causes: OrderedDict[tuple[str, int, str], _Cause] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is within the limit."""
        if vars(record).get("tells_count"):
            return True
        now = self._now()
        self._end(now - PERIOD)
        key = record.name, record.levelno, str(record.msg)
        cause = self._causes.get(key)
        if cause is None:
            if len(self._causes) >= CAUSES:
                key = record.name, record.levelno, "many kinds of lines"
            cause = self._causes.setdefault(key, _Cause(now))
        if cause.lines < (WARNINGS if record.levelno >= logging.WARNING else NEWS):
            cause.lines += 1
            return True
        cause.left_out += 1
        return False

    def end(self) -> None:
        """Log all counts, because the log ends."""
        self._end(self._now())

    def _end(self, before: float) -> None:
        """Forget causes whose time began no later than `before`, and log how many lines were left out."""
        while self._causes:
            key, cause = next(iter(self._causes.items()))
            if cause.began > before:
                return
            del self._causes[key]
            if cause.left_out:
                name, level, message = key
                text = "%d lines like the last of these were left out in %d s: %s"
                args = (cause.left_out, round(self._now() - cause.began), message)
                record = logging.LogRecord(name, level, "", 0, text, args, None)
                record.tells_count = True
                self._handler.handle(record)
