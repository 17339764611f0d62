"""Shows a transfer on the screen while it runs, and its reports when it has ended."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from . import render

RESULT_STYLES = {
    "moved": "green",
    "could move": "green",
    "kept": "yellow",
    "lost": "red",
    "refused": "red",
    "in-doubt": "bold red",
}


class Progress:
    """One line for each SA, updated if `live`; otherwise silent."""

    def __init__(self, *, live: bool) -> None:
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._stack = contextlib.ExitStack()
        self._live: Any = None
        if live:
            from rich.live import Live

            self._live = Live(refresh_per_second=12, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._stack.enter_context(self._live)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def event(self, item: Mapping[str, Any] | None) -> None:
        """One item of the agent's stream."""
        if self._live is None or not item:
            return
        self._rows[str(item.get("transfer"))] = item
        self._live.update(self._table())

    def _table(self) -> Any:
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None)
        shown = list(self._rows.values())[-20:]
        for item in shown:
            report = item.get("report") or {}
            done = bool(report)
            mark = Text("*") if done else Spinner("dots")
            phase = str(report.get("result") or item.get("phase") or "")
            table.add_row(
                mark,
                Text(render.printable(item.get("mn") or "")),
                Text(render.printable(phase), style=RESULT_STYLES.get(phase, "")),
                Text(f"{float(item.get('ms') or 0):.0f} ms"),
                Text(render.printable(item.get("detail") or "")),
            )
        if len(self._rows) > len(shown):
            table.add_row("", f"and {len(self._rows) - len(shown)} more")
        return table


def outcome(report: Mapping[str, Any]) -> str:
    """The result in a word; a dry run without refusals says that the SA could move."""
    if report.get("dry_run") and not report.get("exit_code"):
        return "could move"
    return str(report.get("result", "-"))


def _who(report: Mapping[str, Any]) -> str:
    """The mobile node, or else the SA, if nothing was known of it."""
    sa = report.get("sa") or {}
    return str(report.get("mn") or f"SA {sa.get('spi_i', '')}:{sa.get('spi_r', '')}")


def show_reports(reports: Sequence[Mapping[str, Any]]) -> None:
    """Print a table, and for each SA that did not move what happened and what to do."""
    if not reports:
        print("nothing to move")
        return
    rows = []
    for report in reports:
        phases = report.get("phases_ms") or {}
        rows.append(
            (
                _who(report),
                outcome(report),
                f"{sum(float(ms) for ms in phases.values()):.0f} ms" if phases else "-",
                ", ".join(f"{name} {float(ms):.0f}" for name, ms in phases.items()),
                report.get("cxtp_octets"),
                report.get("transfer_id"),
            )
        )
    headers = ("mobile node", "result", "time", "phases in ms", "octets", "transfer")
    render.table(headers, rows, styles=RESULT_STYLES, wraps="phases in ms")
    if len(reports) == 1:
        render.show_path(reports[0].get("path") or ())
    for report in reports:
        against = [
            verdict for verdict in report.get("verdicts") or () if verdict.get("status", {}).get("code")
        ]
        if not report.get("exit_code") and not against and not report.get("why"):
            continue
        render.say(f"{_who(report)}: {report.get('text') or report.get('status', {}).get('text', '')}")
        for verdict in against:
            detail = f" ({verdict['detail']})" if verdict.get("detail") else ""
            render.say(f"  {verdict.get('context')}: {verdict['status'].get('text')}{detail}")
        if not report.get("exit_code") and not against:
            continue
        for side, key in (("this gateway", "state_here"), ("the other", "state_there")):
            if report.get(key):
                render.say(f"  {side} {report[key]}")
        if report.get("hint"):
            render.say(f"  {report['hint']}")


def show_history(items: Sequence[Mapping[str, Any]]) -> None:
    """Print the history, newest first."""
    if not items:
        print("no transfers yet")
        return
    rows = [
        (
            render.when(item.get("updated") or item.get("started")),
            item.get("role"),
            item.get("peer") or item.get("to"),
            item.get("mn"),
            item.get("result") or item.get("state"),
            item.get("detail") or item.get("text"),
            item.get("transfer_id") or item.get("transfer"),
        )
        for item in items
    ]
    render.table(
        ("when", "role", "with", "mobile node", "result", "detail", "transfer"),
        rows,
        styles=RESULT_STYLES,
        wraps="detail",
    )


def show_detours(items: Sequence[Mapping[str, Any]]) -> None:
    """Print departures, oldest first."""
    if not items:
        print("no SA has left this gateway")
        return
    rows = [
        (
            item.get("mn") or "not known",
            f"{item.get('stage')}, relayed" if item.get("relayed") else item.get("stage"),
            item.get("at") or "not known",
            item.get("prefixes"),
            item.get("via"),
            item.get("blocked"),
            render.when(item.get("since")) if item.get("since") else "not known",
            ":".join(item.get("sa") or ()),
        )
        for item in items
    ]
    headers = ("mobile node", "stage", "at", "sent on", "by way of", "else blocked", "since", "SPIs")
    render.table(headers, rows, styles={"ended": "yellow"})
