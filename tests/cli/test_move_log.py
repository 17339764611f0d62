"""One line for each move: names, addresses of gateways, result and time, at the level that it deserves."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from ikectx.engine.report import TransferEvent, TransferReport
from ikectx.numbers import Status
from ikectx.sa.name import SaName
from ikectx_cli.move_log import log_event

SA = SaName(b"\1" * 8, b"\2" * 8)
REPORT = TransferReport("00ff", SA, "mn@example.org", "203.0.113.7", "psg", "nsg", "moved", Status.OK)
EVENT = TransferEvent("00ff", "source", "nsg", SA, "mn@example.org", "done", 151.7, report=REPORT)
KEPT = replace(REPORT, result="kept", text="no answer", exit_code=5)


@pytest.mark.parametrize(
    ("event", "level", "line"),
    [
        (EVENT, "INFO", "move of mn@example.org from psg to nsg: moved in 152 ms (transfer 00ff)"),
        (
            replace(EVENT, report=KEPT),
            "WARNING",
            "move of mn@example.org from psg to nsg: kept in 152 ms: no answer (transfer 00ff)",
        ),
        (
            replace(EVENT, report=replace(KEPT, result="in-doubt")),
            "ERROR",
            "move of mn@example.org from psg to nsg: in-doubt in 152 ms: no answer (transfer 00ff)",
        ),
        (
            replace(EVENT, role="target", peer="psg", state="owned", report=None),
            "INFO",
            "move of mn@example.org from psg to here: moved in 152 ms (transfer 00ff)",
        ),
        (
            replace(EVENT, role="target", peer="psg", state="aborted", detail="silent", report=None),
            "WARNING",
            "move of mn@example.org from psg to here: kept in 152 ms: silent (transfer 00ff)",
        ),
        (
            replace(EVENT, state="freezing", report=None),
            "DEBUG",
            "source of mn@example.org with nsg (transfer 00ff): freezing",
        ),
    ],
)
def test_lines(event: TransferEvent, level: str, line: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        log_event(logging.getLogger("test"), event, "here")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [(level, line)]
