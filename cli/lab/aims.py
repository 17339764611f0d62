"""`ikectx lab bench --handovers`: what a handover must reach in each mode, and whether runs did. Pure.

A gap is that of the probe, whose own interval is in it, less what the mobile node's link itself was dark in
the same run. An aim is a number of ms, packets or times, in virtual time and by a real clock (one CPU), or a
round trip and so many ms: the mobile node's through the tunnel, or that between the gateways.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from .critical import paths
from .critical import rows as critical_rows
from .critical_chart import LANES
from .report import longer
from .trace import TimeLine

if TYPE_CHECKING:
    from rich.console import RenderableType

Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Aim:
    """At most (`least`: at least) so much, in virtual time and by a real clock, beyond what `over` takes.

    `over`: rtt, of the mobile node through the tunnel; gateways, between them; stock, what the mobile
    node's own charon takes where its gateway stays the same.
    """

    virtual: float
    real: float
    over: tuple[str, ...] = ()
    least: bool = False


@dataclass(frozen=True, slots=True)
class AimedMode:
    """A way to move an SA: the scenario that shows it, and what it must reach, by the name of the figure."""

    title: str
    scenario: str
    aims: Mapping[str, Aim]


def _times(virtual: float, real: float) -> Aim:
    return Aim(virtual, real, least=True)


INTERVAL_MS = 5.0
"""Of the probe, if nobody wants another one."""
BESIDE_OTHERS = 1.2
"""A gap beside many other SAs is to be at most so many times that beside the fewest."""
HELD = "predictive-held"

_NONE = Aim(0, 0)
_STAYS = {"lost": Aim(0, 1), "lost_at_gateways": _NONE, "psk": _times(25, 18), "eap": _times(50, 36)}
_FAST = {"up": Aim(5, 30), "lost_after_link": _NONE}

MODES = (
    AimedMode(
        "predictive",
        "predictive",
        {**_FAST, "down": Aim(2, 40, ("rtt",)), "psk": _times(4, 3), "eap": _times(8, 5)},
    ),
    AimedMode(
        "predictive, downlink held",
        HELD,
        {**_FAST, "lost_down": _NONE, "late": Aim(100, 100)},
    ),
    AimedMode(
        "reactive",
        "reactive",
        {
            "up": Aim(5, 60, ("gateways",)),
            "down": Aim(5, 60, ("rtt", "gateways")),
            "psk": _times(2.5, 2),
            "eap": _times(6, 4),
        },
    ),
    AimedMode(
        "by packet, stock MN",
        "by-packet",
        {"up": Aim(5, 60, ("stock",)), "down": Aim(5, 60, ("stock",)), "psk": _times(1, 1)},
    ),
    AimedMode("push, stock MN", "handover", _STAYS),
    AimedMode("pull, stock MN", "pull", _STAYS),
    AimedMode("push, MN with agent", "handover-agent", {"lost": _NONE}),
)

SCENARIOS = tuple(mode.scenario for mode in MODES)

WORDS = {
    "lost": "lost",
    "lost_at_gateways": "at gateways",
    "lost_after_link": "up, after the link",
    "lost_down": "down",
    "late": "late",
}
"""What the counts of packets are called."""


def figures(run: Run) -> dict[str, float | None]:
    """What one run has of each figure. None: it was not measured."""
    traffic = run["traffic"]
    beyond = traffic["beyond_dark_ms"] or {"up": None, "down": None}
    ours = longer(traffic["beyond_dark_ms"])
    anew = {one["name"]: longer(one["beyond_dark_ms"]) for one in run.get("baseline", ())}
    flying = sum(count for cause, count in traffic["causes"].items() if cause.endswith("in flight"))
    return {
        "up": beyond["up"],
        "down": beyond["down"],
        "lost": traffic["lost"],
        "lost_at_gateways": flying,
        "lost_after_link": traffic["up"].get("lost_after_link"),
        "lost_down": traffic["down"]["lost"],
        "late": traffic["up"]["late"] + traffic["down"]["late"],
        **{name: theirs / ours if ours and theirs is not None else None for name, theirs in anew.items()},
    }


def _limit(aim: Aim, name: str, runs: Sequence[Run], *, virtual: bool) -> float | None:
    """What the aim is in these runs. None: what it is over was not measured."""
    over = 0.0
    for what in aim.over:
        found = [_known(run, what, name) for run in runs]
        if any(one is None for one in found):
            return None
        over += median(one for one in found if one is not None)
    return round(over + (aim.virtual if virtual else aim.real), 1)


def _known(run: Run, what: str, name: str) -> float | None:
    if what == "rtt":
        return float(run["traffic"]["round_trip_ms"])
    if what == "gateways":
        return float(run.get("gateways_round_trip_ms", 0.0))
    gaps = (run.get("stays") or {}).get("beyond_dark_ms")
    return None if gaps is None else float(gaps[name])


def judged(reports: Iterable[Run]) -> list[dict[str, Any]]:
    """A row for each mode that ran: its figures (medians of the runs), each beside its aim."""
    groups: dict[str, list[Run]] = {}
    for report in reports:
        if report.get("traffic"):
            groups.setdefault(str(report["scenario"]), []).append(report)
    return [_row(mode, groups[mode.scenario]) for mode in MODES if mode.scenario in groups]


def _row(mode: AimedMode, runs: Sequence[Run]) -> dict[str, Any]:
    virtual = runs[0].get("clock") == "virtual"
    each = [figures(run) for run in runs]
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for one in each for name in one):
        values = [value for one in each if (value := one.get(name)) is not None]
        aim = mode.aims.get(name)
        limit = None if aim is None else _limit(aim, name, runs, virtual=virtual)
        if not values and limit is None:
            continue
        value = round(median(values), 1) if values else None
        reached = None
        if aim is not None and limit is not None:
            reached = value is not None and (value >= limit if aim.least else value <= limit)
        found[name] = {"is": value, "aim": limit, "reached": reached}
    lines = [TimeLine.from_json(one) for one in runs[0].get("trace", ())[:1]]
    wanted = [one["reached"] for one in found.values() if one["reached"] is not None]
    return {
        "mode": mode.title,
        "scenario": mode.scenario,
        "runs": len(runs),
        "ok": sum(bool(run["ok"]) for run in runs),
        "reached": all(wanted),
        "figures": found,
        "path": {way: [leg.as_json() for leg in legs] for line in lines for way, legs in paths(line).items()},
    }


def cell(figure: Mapping[str, Any] | None, *, least: bool = False) -> str:
    """A figure beside its aim: `4 ≤ 5` where it is reached, `80 > 5` where not."""
    if figure is None or figure["is"] is None:
        return "–"
    if figure["aim"] is None:
        return f"{figure['is']:g}"
    signs = ("≥", "<") if least else ("≤", ">")
    return f"{figure['is']:g} {signs[0 if figure['reached'] else 1]} {figure['aim']:g}"


def packets(row: Mapping[str, Any]) -> list[str]:
    """What is told of lost and late packets: the count of all lost, and each one that has an aim."""
    found = row["figures"]
    shown = [name for name in WORDS if name in found and (name == "lost" or found[name]["aim"] is not None)]
    return [cell(found[name]) + ("" if name == "lost" else f" {WORDS[name]}") for name in shown]


COLUMNS = ("mode", "up, ms", "down, ms", "lost", "PSK", "EAP", "certificates")


def cells(row: Mapping[str, Any], line: str) -> list[str]:
    """A row of the table, as `COLUMNS`; `line` stands between lines of one cell."""
    found = row["figures"]
    gaps = [cell(found.get(name)) for name in ("up", "down")]
    times = [cell(found.get(name), least=True) for name in ("psk", "eap", "cert")]
    return [row["mode"], *gaps, line.join(packets(row)), *times]


def shown(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The table for a terminal of 80 columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*COLUMNS[:-1], "cert.", padding=(0, 0), show_lines=True)
    for row in rows:
        texts = [Text(one) for one in cells(row, "\n")]
        for text in texts[1:]:
            text.highlight_regex(r"[-0-9.]+ [>\n<] [-0-9.]+", "bold red")
        texts[0].stylize("green" if row["reached"] else "bold red")
        table.add_row(*texts)
    return table


def shown_paths(rows: Iterable[Mapping[str, Any]]) -> RenderableType:
    """What the first packet behind each gap waited for, or the whole move where there is no gap."""
    from rich.table import Table

    table = Table("mode", "way", "host", "step", padding=(0, 1, 0, 0))
    for name in ("start", "end, ms"):
        table.add_column(name, justify="right")
    for row in rows:
        for number, line in enumerate(critical_rows(row.get("path", {}))):
            table.add_row(row["mode"] if not number else "", *line)
        table.add_section()
    return table


def wrong(modes: object, where: str = "the judgement") -> str:
    """What rows that were read from a file lack; empty: nothing."""
    if not isinstance(modes, list) or not all(isinstance(row, dict) for row in modes):
        return f"{where}.modes must be objects"
    for number, row in enumerate(modes):
        texts, counts = (row.get("mode"), row.get("scenario")), (row.get("runs"), row.get("ok"))
        found = row.get("figures")
        if not all(isinstance(one, str) for one in texts) or not all(isinstance(one, int) for one in counts):
            return f"{where}.modes.{number} must have mode, scenario, runs, ok, reached and figures"
        if not isinstance(row.get("reached"), bool) or not isinstance(found, dict):
            return f"{where}.modes.{number} must have reached and figures"
        if any(not _is_leg(leg) for legs in row.get("path", {}).values() for leg in legs):
            return f"{where}.modes.{number}.path must have legs"
        for name, figure in found.items():
            if not isinstance(figure, dict) or not all(
                one is None or isinstance(one, int | float)
                for one in map(figure.get, ("is", "aim", "reached"))
            ):
                return f"{where}.modes.{number}.figures.{name} must have is, aim and reached"
    return ""


def _is_leg(leg: object) -> bool:
    """Whether that is a `critical.Leg` as JSON."""
    if not isinstance(leg, dict) or leg.get("host") not in LANES or leg.get("target") not in ("", *LANES):
        return False
    times = (leg.get("start_ms"), leg.get("end_ms"))
    return isinstance(leg.get("step"), str) and all(isinstance(one, int | float) for one in times)
