"""The critical path of a handover: of all steps and messages, those that packets waited for. Pure.

It is found from its end: what ended last on the host before that moment, then what ended last before that
began, and so on, across hosts where it was a message, back to when the link changed or the handover was asked
for. Calls of charon and the kernel are counted (`counts`), not told one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .trace import TLS, TimeLine

UNSEEN = 1.0
"""Milliseconds in which nothing that is traced happens, from which on that is a row of its own."""
SAME = 0.05
"""Milliseconds that two moments may differ by and be the same."""

FIRST = "first packet"


@dataclass(frozen=True, slots=True)
class Leg:
    """A part of the path: a step on a host, or a message from it to `target`, from when to when, in ms."""

    host: str
    step: str
    begin: float
    end: float
    target: str = ""

    def as_json(self) -> dict[str, Any]:
        """Milliseconds with one decimal."""
        times = {"start_ms": round(self.begin, 1), "end_ms": round(self.end, 1)}
        return {"host": self.host, "step": self.step, **times, "target": self.target}


def paths(line: TimeLine) -> dict[str, list[Leg]]:
    """By direction, what the first packet behind the gap waited for; without gaps `done`, the last step's."""
    found = {}
    for name, flow, host, target in (("up", line.up, "mn", "srv"), ("down", line.down, "nsg", "mn")):
        if flow.first is not None and flow.transit is not None:
            sent = flow.first - flow.transit
            found[name] = [*_before(line, host, sent), Leg(host, FIRST, sent, flow.first, target)]
    if not found and (steps := [span for span in line.spans if span.kind == "step"]):
        last = max(steps, key=lambda span: span.end)
        found["done"] = _before(line, last.host, last.end)
    return found


def _before(line: TimeLine, host: str, moment: float) -> list[Leg]:
    """What a host waited for until a moment, in order."""
    floor = line.changes[0].begin if line.changes else 0.0
    every = [Leg(span.host, span.step, span.begin, span.end) for span in line.spans if span.kind != "call"]
    every += [
        Leg(arrow.source, arrow.message, arrow.sent, arrow.received, arrow.target)
        for arrow in line.arrows
        if arrow.received is not None
    ]
    found: list[Leg] = []
    while True:
        ended = [leg for leg in every if (leg.target or leg.host) == host and leg.end <= moment + SAME]
        ended = [leg for leg in ended if leg.end > floor and leg not in found]
        if not ended:
            break
        latest = max(leg.end for leg in ended)
        # of a step and its last part, which end together, the step
        leg = min((one for one in ended if one.end >= latest - SAME), key=lambda one: one.begin)
        if moment - leg.end >= UNSEEN:
            found.append(Leg(host, "waits", leg.end, moment))
        found.append(leg)
        host, moment = leg.host, leg.begin
        if moment <= floor:
            break
    if line.changes and moment - floor >= UNSEEN:
        found.append(Leg(host, "waits", floor, moment))
    return found[::-1]


def rows(found: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str, str, str, str]]:
    """Of `paths` as JSON, lines of a table: way, host, step, start, end. What ways begin with stands once."""
    lines = []
    first = next(iter(found.values()), [])
    for way, legs in found.items():
        same = [one == two for one, two in zip(first, legs, strict=False)]
        shared = 0 if legs is first else next((place for place, is_same in enumerate(same) if not is_same), 0)
        for number, leg in enumerate(legs[shared:]):
            place = f"{leg['host']} > {leg['target']}" if leg["target"] else leg["host"]
            times = (f"{leg['start_ms']:.1f}", f"{leg['end_ms']:.1f}")
            name = f"{way}, then" if shared else way
            lines.append((name if not number else "", place, leg["step"], *times))
    return lines


def counts(line: TimeLine) -> dict[str, Any]:
    """Of one handover: messages by kind and way, and calls of charon and the kernel by step of each host.

    Calls count for the step in which they begin, those outside of all steps for none (``).
    """
    messages: Counter[str] = Counter()
    for arrow in line.arrows:
        kind = "gateways" if arrow.over == TLS else "air"
        messages[f"{kind}: {arrow.source} > {arrow.target} {arrow.message}"] += 1
    steps = [span for span in line.spans if span.kind == "step"]
    calls: dict[str, Counter[str]] = {}
    for call in (span for span in line.spans if span.kind == "call"):
        holder = [
            step
            for step in steps
            if step.host == call.host and step.begin <= call.begin and call.end <= step.end
        ]
        name = max(holder, key=lambda step: step.begin).step if holder else ""
        calls.setdefault(f"{call.host} {name}".strip(), Counter())[call.step.split(" ")[0]] += 1
    return {
        "messages": dict(sorted(messages.items())),
        "calls": {name: dict(sorted(found.items())) for name, found in sorted(calls.items())},
    }


def round_trips(legs: Sequence[Leg]) -> Counter[str]:
    """How many messages of the path went between each pair of kinds of hosts: `air` and `gateways`."""
    found: Counter[str] = Counter()
    for leg in legs:
        if leg.target and leg.step != FIRST:
            found["air" if "mn" in (leg.host, leg.target) else "gateways"] += 1
    return found
