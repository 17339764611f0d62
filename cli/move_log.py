"""The log's line about each move: who moved from where to where, how that ended, and how long it took."""

from __future__ import annotations

import logging

from ikectx.engine.report import TransferEvent, TransferReport
from ikectx.engine.tables import TargetState

LEVELS = {
    "moved": logging.INFO,
    "kept": logging.WARNING,
    "refused": logging.WARNING,
    "in-doubt": logging.ERROR,
    "lost": logging.ERROR,
}
"""By result: what an operator has to look at is an error."""

_RESULTS = {TargetState.OWNED.value: "moved", TargetState.ABORTED.value: "kept"}


def log_event(log: logging.Logger, event: TransferEvent, own: str) -> None:
    """Log the end of a transfer as one line, and each of its steps at level DEBUG. `own`: this gateway."""
    report = event.report
    if report is not None:
        _log_end(log, event, report.from_, report.to, report.result, _reason(report))
    elif event.role == "target" and event.state in _RESULTS:
        _log_end(log, event, event.peer, own, _RESULTS[event.state], event.detail)
    else:
        log.debug(
            "%s of %s with %s (transfer %s): %s%s",
            event.role, event.mn, event.peer, event.transfer_id, event.state,
            f" ({event.detail})" if event.detail else "",
        )  # fmt: skip


def _reason(report: TransferReport) -> str:
    return "" if report.result == "moved" and not report.exit_code else report.text


def _log_end(
    log: logging.Logger, event: TransferEvent, from_: str, to: str, result: str, reason: str
) -> None:
    log.log(
        LEVELS[result],
        "move of %s from %s to %s: %s in %.0f ms%s (transfer %s)",
        event.mn, from_, to, result, event.ms,
        f": {reason}" if reason and result != "moved" else "",
        event.transfer_id,
    )  # fmt: skip
