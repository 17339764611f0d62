"""What the sections of the page of `ikectx lab bench` share: rows of a summary, cells, tables. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Rows = Mapping[str, Row]

UNKNOWN = "–"


def scenarios(summary: Mapping[str, Any], part: str) -> Rows:
    """The rows of a part of `PARTS`; none where it was not run."""
    found: Rows = summary["parts"].get(part, {}).get("scenarios", {})
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += ["| " + " | ".join(cell(one) for one in row) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.1f}"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return UNKNOWN if value is None else str(value)


def two(directions: Mapping[str, float] | None) -> str:
    """Figures of both directions, up first."""
    if directions is None:
        return UNKNOWN
    return " / ".join(cell(directions.get(name)) for name in ("up", "down"))


def trips(directions: Mapping[str, float] | None, round_trip_ms: float) -> str:
    """The same in round trips. Unknown on a link that has no delay to speak of."""
    if directions is None or round_trip_ms < 1:
        return UNKNOWN
    return " / ".join(f"{directions[name] / round_trip_ms:.1f}" for name in ("up", "down"))


def times(ratio: float | None) -> str:
    return UNKNOWN if ratio is None else f"{ratio:.1f}"


def by_host(figures: Mapping[str, float | None] | None, hosts: Sequence[str]) -> list[object]:
    return [(figures or {}).get(host) for host in hosts]


def in_order(found: Iterable[Iterable[str]]) -> list[str]:
    """Each name once, in the order that they come in."""
    return list(dict.fromkeys(name for one in found for name in one))
