"""A limit for each cause in a program's log: some lines, then a count of those that were left out.

Whoever sends an agent the same wrong thing again and again would fill its disk otherwise, and bury the lines
that tell of something else.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

PERIOD = 60.0
"""Seconds in which lines of one cause are counted; they begin with the first."""
WARNINGS = 20
"""Lines of one cause in that time: warnings and errors,"""
NEWS = 3000
"""and lines of lower levels: a gateway that is drained of hundreds of SAs says seven lines about each."""
CAUSES = 512
"""Causes that are counted apart at a time. Lines of libraries that come ready-made are a cause each."""


@dataclass(slots=True)
class _Cause:
    began: float
    lines: int = 0
    left_out: int = 0


class LogLimit(logging.Filter):
    """Leaves out what is too much. A cause is a logger, a level, and a message without its arguments."""

    def __init__(self, handler: logging.Handler, now: Callable[[], float]) -> None:
        """`handler`: the one it is for, which is also given the lines that tell the counts. `now`: seconds,
        monotonic."""
        super().__init__()
        self._handler = handler
        self._now = now
        self._causes: OrderedDict[tuple[str, int, str], _Cause] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is within the limit."""
        if getattr(record, "tells_count", False):
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
        """Tell all counts: the log ends."""
        self._end(self._now())

    def _end(self, before: float) -> None:
        """Forget causes whose time began no later than `before`, and say how many lines were left out."""
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
