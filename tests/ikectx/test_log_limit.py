"""The log's limit for each cause: lines, then a count."""

from __future__ import annotations

import logging

import pytest

from ikectx import log_limit
from ikectx.escape import Escaping
from ikectx.log_limit import CAUSES, NEWS, PERIOD, WARNINGS, LogLimit
from tests.peers import HandClock


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def a_log() -> tuple[logging.Logger, list[str], HandClock, LogLimit]:
    log, handler, clock = logging.Logger("some"), Kept(), HandClock()
    limit = LogLimit(handler, clock.now)
    handler.addFilter(limit)
    handler.addFilter(Escaping())
    log.addHandler(handler)
    return log, handler.lines, clock, limit


def test_a_cause_has_some_lines_and_then_a_count() -> None:
    log, lines, clock, _ = a_log()
    for number in range(1000):
        log.warning("refused %s", number)
        log.error("refused %s", number)
    log.warning("something else")
    assert len(lines) == 2 * WARNINGS + 1
    clock.forward(PERIOD / 2)
    log.warning("refused %s", "again")
    assert len(lines) == 2 * WARNINGS + 1
    clock.forward(PERIOD / 2)
    log.warning("refused %s", "a\nforged line")
    told = lines[2 * WARNINGS + 1 :]
    assert told == [
        f"{1000 - WARNINGS + 1} lines like the last of these were left out in 60 s: refused %s",
        f"{1000 - WARNINGS} lines like the last of these were left out in 60 s: refused %s",
        "refused a\\x0aforged line",
    ]


def test_the_last_count_is_told_when_the_log_ends() -> None:
    log, lines, clock, limit = a_log()
    for _ in range(WARNINGS + 3):
        log.warning("full")
    clock.forward(2)
    limit.end()
    assert lines[WARNINGS:] == ["3 lines like the last of these were left out in 2 s: full"]
    limit.end()
    assert len(lines) == WARNINGS + 1


def test_news_may_be_more_than_warnings() -> None:
    log, lines, _, _ = a_log()
    for number in range(NEWS + 10):
        log.info("moved %d", number)
    assert len(lines) == NEWS


def test_lines_that_differ_each_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    log, lines, clock, limit = a_log()
    for number in range(10 * CAUSES):
        log.warning(f"ready-made {number}")
    assert len(lines) == CAUSES + WARNINGS
    clock.forward(log_limit.PERIOD)
    log.warning("ready-made anew")
    assert lines[-1] == "ready-made anew"
    assert len(limit._causes) == 1
