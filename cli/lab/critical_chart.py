"""Draws the critical paths of several handovers under each other as SVG. Pure.

A block for each, on a scale of its own: lanes of mobile node, new and old gateway; a bar is a step, a line
between lanes a message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .critical import FIRST
from .timeline import COLOURS, NARROW, TITLES

WIDTH, LEFT, RIGHT = 1000, 60, 20
LANE, BAR, HEAD, FONT = 34, 16, 26, 10
LANES = {"mn": 0, "srv": 1, "nsg": 1, "psg": 2}
"""The lane of a host; what goes to the server passes the new gateway."""
MESSAGE, PACKET, WAITS = "#7a2a8f", "#2a7a4b", "#d9d9d9"
STEPS = (5, 10, 20, 50, 100, 200, 500)
"""Distances of marks on the axis, in ms."""

Legs = Sequence[Mapping[str, Any]]


def _legs(path: Mapping[str, Legs]) -> list[Mapping[str, Any]]:
    """What is in any of the ways, once."""
    found: list[Mapping[str, Any]] = []
    for legs in path.values():
        found += [leg for leg in legs if leg not in found]
    return found


def picture(rows: Iterable[Mapping[str, Any]]) -> str:
    """The paths of `aims.judged` that have one. Times begin where the earliest leg does."""
    blocks = [(str(row["mode"]), _legs(row.get("path") or {})) for row in rows]
    blocks = [(mode, legs) for mode, legs in blocks if legs]
    height = len(blocks) * (HEAD + 3 * LANE + 14) + 10
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="{FONT}"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for number, (mode, legs) in enumerate(blocks):
        out += _block(mode, legs, 10 + number * (HEAD + 3 * LANE + 14))
    return "\n".join([*out, "</svg>"]) + "\n"


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where a block stands: its top, the moment at its left edge (ms), and pixels a millisecond."""

    top: float
    began: float
    scale: float

    def x(self, ms: float) -> float:
        return LEFT + (ms - self.began) * self.scale

    def y(self, host: str) -> float:
        return self.top + HEAD + LANES[host] * LANE


def _block(mode: str, legs: Legs, top: float) -> Iterable[str]:
    began = min(float(leg["start_ms"]) for leg in legs)
    last = max(max(float(leg["end_ms"]) for leg in legs) - began, 1.0)
    scale = (WIDTH - LEFT - RIGHT) / last
    frame = _Frame(top, began, scale)
    yield _text(LEFT, top + 10, f"{mode}, {last:.0f} ms", 'font-size="12" font-weight="bold"')
    for host, name in TITLES.items():
        yield _box(LEFT, frame.y(host), last * scale, COLOURS[host][1])
        yield _text(LEFT - 8, frame.y(host) + 12, name, 'text-anchor="end"')
    distance = next((one for one in STEPS if one * scale >= 40), STEPS[-1])
    for mark in range(0, int(last) + 1, distance):
        place = LEFT + mark * scale
        yield _line((place, top + HEAD - 8), (place, frame.y("psg") + BAR), 'stroke="#ddd"')
        yield _text(place, top + HEAD - 1, str(mark), 'fill="#667" text-anchor="middle" font-size="8"')
    for leg in legs:
        yield from _message(leg, frame) if leg["target"] else _step(leg, frame)


def _step(leg: Mapping[str, Any], frame: _Frame) -> Iterable[str]:
    start, end, top = frame.x(leg["start_ms"]), frame.x(leg["end_ms"]), frame.y(leg["host"])
    waits = leg["step"] == "waits"
    width = max(1.0, end - start)
    yield _box(start, top, width, WAITS if waits else COLOURS[leg["host"]][0], _tip(leg, frame))
    if width >= len(leg["step"]) * FONT * NARROW + 4:
        yield _text(start + 3, top + 12, leg["step"], f'fill="{"#222" if waits else "#fff"}"')


def _message(leg: Mapping[str, Any], frame: _Frame) -> Iterable[str]:
    """A line from the edge of one lane to that of the other, with its name where there is room."""
    colour = PACKET if leg["step"] == FIRST else MESSAGE
    start, end = frame.x(leg["start_ms"]), frame.x(leg["end_ms"])
    above, below = frame.y(leg["host"]), frame.y(leg["target"])
    above, below = (above + BAR, below) if below > above else (above, below + BAR)
    yield _line((start, above), (end, below), f'stroke="{colour}" stroke-width="1.5"', _tip(leg, frame))
    if end - start >= len(leg["step"]) * FONT * NARROW * 0.8:
        style = f'fill="{colour}" font-size="8" text-anchor="middle"'
        yield _text((start + end) / 2, (above + below) / 2 - 2, leg["step"], style)


def _tip(leg: Mapping[str, Any], frame: _Frame) -> str:
    times = [f"{leg[name] - frame.began:.1f}" for name in ("start_ms", "end_ms")]
    return f"{leg['step']}, {' to '.join(times)} ms"


def _title(tip: str) -> str:
    return f"<title>{escape(tip)}</title>" if tip else ""


def _text(x: float, y: float, words: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def _box(x: float, y: float, width: float, fill: str, tip: str = "") -> str:
    size = f'width="{width:.1f}" height="{BAR}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{fill}">{_title(tip)}</rect>'


def _line(start: tuple[float, float], end: tuple[float, float], style: str, tip: str = "") -> str:
    (x1, y1), (x2, y2) = start, end
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f"<line {ends} {style}>{_title(tip)}</line>"
