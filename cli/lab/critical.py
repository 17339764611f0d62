"""The critical path of a handover: of all steps and messages, those that packets waited for. Pure.

It is found from its end: what ended last on the host before that moment, then what ended last before that
began, and so on, across hosts where it was a message, back to when the link changed or the handover was asked
for. Calls of charon and the kernel are counted (`counts`), not told one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .trace import Span, TimeLine

UNSEEN = 1.0
"""Milliseconds in which nothing that is traced happens, from which on that is a row of its own."""
SAME = 0.05
"""Milliseconds that two moments may differ by and be the same."""

FIRST, WAITS = "first packet", "waits"
POLLS = ("vici list-sas",)
"""Calls that are repeated until charon has done something: how often depends on its threads. Within one part
of a step they count once."""
JOURNAL = "journal"
"""A call that is no question to charon or the kernel."""


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
    steps = {span.step for span in line.spans if span.kind == "step"}
    every = [Leg(span.host, span.step, span.begin, span.end) for span in line.spans if span.kind != "call"]
    every = [leg for leg in every if leg.end - leg.begin > SAME or leg.step in steps]
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
            found.append(Leg(host, WAITS, leg.end, moment))
        found.append(leg)
        host, moment = leg.host, leg.begin
        if moment <= floor:
            break
    if line.changes and moment - floor >= UNSEEN:
        found.append(Leg(host, WAITS, floor, moment))
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


def counts(line: TimeLine) -> dict[str, dict[str, int]]:
    """What the critical path consists of, in numbers: of each step with its host, the calls of charon and the
    kernel in it, by kind; of each message, how often it went (`times`)."""
    found: dict[str, Counter[str]] = {}
    legs = dict.fromkeys(leg for legs in paths(line).values() for leg in legs)
    for leg in legs:
        if leg.target and leg.step != FIRST:
            found.setdefault(f"{leg.host} > {leg.target} {leg.step}", Counter())["times"] += 1
    spans = [span for span in line.spans if span.kind != "call"]
    asked: set[tuple[Span, str]] = set()
    for call in (span for span in line.spans if span.kind == "call" and span.step != JOURNAL):
        around = [
            one for one in spans if one.host == call.host and one.begin <= call.begin <= call.end <= one.end
        ]
        # of steps that hold it, the innermost that is on the path
        steps = [one for one in around if one.kind == "step"]
        on_path = [one for one in steps if Leg(one.host, one.step, one.begin, one.end) in legs]
        if not on_path:
            continue
        inner = max(around, key=_depth)
        if call.step in POLLS and (inner, call.step) in asked:
            continue
        asked.add((inner, call.step))
        step = max(on_path, key=_depth)
        found.setdefault(f"{call.host} {step.step}", Counter())[call.step.split(" ")[0]] += 1
    return {name: dict(sorted(one.items())) for name, one in sorted(found.items())}


def _depth(span: Span) -> tuple[float, float]:
    """The largest of spans around a moment is the innermost."""
    return span.begin, -span.end


def more(now: Mapping[str, Mapping[str, int]], allowed: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """What a critical path has that it is not to have. `allowed`: `counts` of one that is as it should be."""
    for name, found in now.items():
        for what, count in found.items():
            most = allowed.get(name, {}).get(what, 0)
            if count > most:
                words = "messages" if what == "times" else f"calls of {what}"
                yield f"critical path: {name}: {count} {words}, allowed are {most}"


def most(runs: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Of several runs' `counts`, the largest numbers: polls of a daemon come now and then too early."""
    found: dict[str, dict[str, int]] = {}
    for run in runs:
        for name, one in run.items():
            own = found.setdefault(name, {})
            own.update({what: max(count, own.get(what, 0)) for what, count in one.items()})
    return found
