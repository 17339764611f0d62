"""`ikectx lab bench`: several runs of the handover scenarios, and drains and attacks, as medians and ratios.

    reports of runs -> summarise --+-> a summary (what --json prints) -> merge -> lab_page
    a drain, attack .. -> alone ---+
    what --json printed before -> read ---------------------------------^

Every ratio is taken within one run (the move against the same tunnel's ways of today over the same links),
so that neither the machine's speed nor its load is in it. Pure: reports in, data out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ikectx.errors import UsageError

from . import aims as lab_aims
from . import damage as lab_damage
from .report import longer

MODES = {
    "handover": "push: psg sends",
    "pull": "pull: nsg asks psg",
    "predictive": "predictive: the MN tells psg, moves, tells nsg",
    "reactive": "reactive: the MN moves, tells nsg",
    "by-packet": "by packet: a stock MN moves, nsg sees its IKE message",
}
"""The scenario that shows a mode of CXTP with IPv4, and what it is called in a table."""

COLLISIONS = (
    *("collision-inbound", "collision-outbound", "collision-ike", "collision-all"),
    *("collision-agent", "collision-reactive"),
)

SCENARIOS = (
    *("handover", "handover-v6", "handover-encap", "handover-keep"),
    *(name + version for name in MODES if name != "handover" for version in ("", "-v6")),
)
"""What is run where no scenario is named. `COLLISIONS` are run by their names."""

NATIVE = tuple(MODES)
"""What is run with ESP in user space where no scenario is named: it costs the agents the same there."""

PARTS = {
    "real": "real time",
    "virtual": "virtual time",
    "native": "natively, ESP in user space",
}
"""Kinds of runs that stand side by side: with the kernel's ESP by a real clock, or a virtual one; or with ESP
by charon, which needs no guest."""


ALONE = ("drains", "attacks", "handovers", "moves", "others")
"""What a summary has beside scenarios' rows: lists of what ran by an option of its own."""


def by_scenario(reports: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Reports of runs that measured something, in the order they came."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        if report.get("traffic"):
            groups.setdefault(str(report["scenario"]), []).append(report)
    return groups


def row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the runs of one scenario; losses of each run by themselves."""
    traffic = [run["traffic"] for run in runs]
    causes: Counter[str] = Counter()
    for one in traffic:
        causes.update(one.get("causes", {}))
    ways: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for run in runs:
        for base in run.get("baseline", ()):
            ways.setdefault(str(base.get("title") or base["name"]), []).append((base, run["traffic"]))
    return {
        "runs": len(runs),
        "ok": sum(bool(run["ok"]) for run in runs),
        "lost": [one["lost"] for one in traffic],
        "lost_median": median(one["lost"] for one in traffic),
        "sent": median(one["sent"] for one in traffic),
        "gaps": [one["longest_gap_ms"] for one in traffic],
        **_gaps(traffic),
        "interval_ms": traffic[0]["interval_ms"],
        "causes": dict(sorted(causes.items())),
        "others_lost": [sum(one["lost"] for one in run.get("others", {}).values()) for run in runs],
        "air_messages": median(run["air"]["messages"] for run in runs),
        "air_octets": median(run["air"]["octets"] for run in runs),
        "gateway_messages": median(run["gateways"]["messages"] for run in runs),
        "gateway_octets": median(run["gateways"]["octets"] for run in runs),
        "phases_ms": _phases(run["phases_ms"] for run in runs if run.get("phases_ms")),
        "cpu_ms": by_name(run.get("cpu_ms") for run in runs),
        "ratio": _median(run.get("ratio") for run in runs),
        "ratio_beyond": _median(run.get("ratio_beyond_dark") for run in runs),
        "ways": {
            name: {
                "interruption_ms": median(base["interruption_ms"] for base, _ours in found),
                **_gaps([base for base, _ours in found]),
                "lost": median(base["lost"] for base, _ours in found),
                "messages": median(base["messages"] for base, _ours in found),
                "octets": median(base["octets"] for base, _ours in found),
                "ratio": _times(found, lambda way: longer(way["gap_ms"])),
                "ratio_beyond": _times(found, lambda way: longer(way["beyond_dark_ms"])),
            }
            for name, found in ways.items()
        },
    }


def _gaps(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the gaps, the dark times and what is beyond them: medians by direction."""
    return {
        "gap_ms": by_name(one["gap_ms"] for one in found),
        "dark_ms": by_name(one["dark_ms"] for one in found),
        "beyond_ms": by_name(one["beyond_dark_ms"] for one in found),
        "round_trip_ms": _median(one["round_trip_ms"] for one in found),
    }


def _times(
    found: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    figure: Callable[[Mapping[str, Any]], float | None],
) -> float | None:
    """How many times ours theirs is: the median of what it is within each run."""
    pairs = [(figure(theirs), figure(ours)) for theirs, ours in found]
    return _median(theirs / ours for theirs, ours in pairs if theirs is not None and ours)


def _median(figures: Iterable[float | None]) -> float | None:
    known = [one for one in figures if one is not None]
    return round(median(known), 1) if known else None


def by_name(found: Iterable[Mapping[str, float | None] | None]) -> dict[str, float | None] | None:
    """Medians by name, of what is known. None: nothing is."""
    kept = [one for one in found if one is not None]
    names = dict.fromkeys(name for one in kept for name in one)
    return {name: _median(one.get(name) for one in kept) for name in names} or None


def _phases(phases: Iterable[Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for one in phases:
        for name, ms in one.items():
            found.setdefault(name, []).append(ms)
    return {name: round(median(values), 1) for name, values in found.items()}


def summarise(
    reports: Iterable[Mapping[str, Any]], host: Mapping[str, Any], command: str = ""
) -> dict[str, Any]:
    """All scenarios' rows in their part of `PARTS`, and on what machine that was; `command` ran them.

    `host`: `lab_machine.host` of the machine, in a guest of which it may have been.
    """
    groups = by_scenario(reports)
    runs = [run for found in groups.values() for run in found]
    first: Mapping[str, Any] = runs[0] if runs else {}
    part = "native" if first.get("esp") == "libipsec" else str(first.get("clock", "real"))
    rows = {name: row(found) for name, found in groups.items()}
    return {
        "command": command,
        "strongswan": first.get("strongswan", ""),
        "parts": {part: {"machine": machine(runs, host), "scenarios": rows}} if rows else {},
        **{name: [] for name in ALONE},
    }


def alone(what: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The same of one of `ALONE` (`what`), as its option prints it."""
    own = ("command", "strongswan", "guest", "clock", "esp", "machine", "host")
    told = {key: value for key, value in found.items() if key not in own}
    return {
        "command": found["command"],
        "strongswan": found["strongswan"],
        "parts": {},
        **{name: [] for name in ALONE},
        what: [{**told, "machine": machine([found], found["host"])}],
    }


def machine(runs: Sequence[Mapping[str, Any]], host: Mapping[str, Any]) -> dict[str, Any]:
    """Where runs were, all of them in the same place: this machine, the guest, and what its kernel costs."""
    first: Mapping[str, Any] = runs[0] if runs else {}
    known = [run["machine"] for run in runs if run.get("machine")]
    return {
        **host,
        "guest": first.get("guest", ""),
        "clock": first.get("clock", ""),
        "esp": first.get("esp", ""),
        "guest_kernel": known[0]["kernel"] if known else "",
        "guest_cpus": known[0]["cpus"] if known else 0,
        "syscall_us": _median(one["syscall_us"] for one in known),
        "thread_us": _median(one["thread_us"] for one in known),
    }


_TWO = {"gap_ms": "numbers by name", **dict.fromkeys(("dark_ms", "beyond_ms"), "numbers by name or null")}
_WAY = {
    **dict.fromkeys(("interruption_ms", "lost", "messages", "octets", "round_trip_ms"), "a number"),
    **_TWO,
    **dict.fromkeys(("ratio", "ratio_beyond"), "a number or null"),
}
_ROW = {
    **dict.fromkeys(("runs", "ok", "lost_median", "sent", "interval_ms", "round_trip_ms"), "a number"),
    **dict.fromkeys(("air_messages", "air_octets", "gateway_messages", "gateway_octets"), "a number"),
    **dict.fromkeys(("lost", "others_lost", "gaps"), "numbers"),
    **dict.fromkeys(("causes", "phases_ms"), "numbers by name"),
    **_TWO,
    "cpu_ms": "numbers by name or null",
    **dict.fromkeys(("ratio", "ratio_beyond"), "a number or null"),
    "ways": "objects by name",
}
"""Keys of a row, and what they hold."""

_HOST = {**dict.fromkeys(("cpu", "kernel", "scheduled"), "text"), "cores": "a number"}
_COSTS = dict.fromkeys(("syscall_us", "thread_us"), "a number or null")
_HERE = {"kernel": "text", "cpus": "a number", **_COSTS}
_MACHINE = {
    **_HOST,
    **dict.fromkeys(("guest", "clock", "esp", "guest_kernel"), "text"),
    "guest_cpus": "a number",
    **_COSTS,
}

_OF_DRAIN = {
    **dict.fromkeys(("command", "strongswan", "guest", "clock", "esp"), "text"),
    **dict.fromkeys(("machine", "host"), "an object"),
}
_DRAIN = {
    **dict.fromkeys(("sas", "seconds", "memory_kib_per_sa", "lost", "sent", "interval_ms"), "a number"),
    **dict.fromkeys(("cpu_ms_per_sa", "gap_ms", "memory_kib"), "numbers by name or null"),
}

_PROFILE = {"profile_ms": "numbers by two names"}
_NONE: Mapping[str, Any] = {"profile_ms": {}}
"""A drain or moves without --profile have none."""

_CIRCUMSTANCES = dict.fromkeys(("crowd", "interval_ms"), "a number")
"""Of a judgement; older ones do not have them."""
_OTHERS = {**dict.fromkeys(("runs", "interval_ms"), "a number"), "rows": "objects"}
_OTHERS_ROW = {
    **dict.fromkeys(("sas", "runs", "ok"), "a number"),
    "mode": "text",
    **dict.fromkeys(("up", "down", "lost"), "a number or null"),
    **dict.fromkeys(("cpu_ms", "charon_ms", "times"), "numbers by name or null"),
}
"""A mode beside so many other SAs: `many_others`."""
_MOVES = {"moves": "a number", **dict.fromkeys(("cpu_ms", "charon_ms"), "numbers by name or null")}


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one of `ALONE` is read: a key only it has, what it is called, its keys, what older ones lack."""

    key: str
    words: str
    keys: Mapping[str, str]
    lacking: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    wrong: Callable[[Any, str], str] = lambda _one, _where: ""


_KINDS = {
    "drains": _Kind("sas", "the drain", {**_DRAIN, **_PROFILE}, _NONE),
    "moves": _Kind("moves", "the moves", {**_MOVES, **_PROFILE}, _NONE),
    "others": _Kind("rows", "what was beside others", _OTHERS, rows=_OTHERS_ROW),
    "attacks": _Kind("attack", "the attack", {}, wrong=lambda one, where: lab_damage.wrong(one, where=where)),
    "handovers": _Kind(
        "modes",
        "the judgement",
        _CIRCUMSTANCES,
        {"crowd": 0, "interval_ms": 0},
        wrong=lambda one, where: lab_aims.wrong(one.get("modes"), where),
    ),
}


def _is(value: object, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match kind:
        case "text":
            return isinstance(value, str)
        case "a number":
            return number
        case "a number or null":
            return number or value is None
        case "numbers":
            return isinstance(value, list) and all(_is(one, "a number") for one in value)
        case "numbers by name":
            return isinstance(value, dict) and all(_is(one, "a number") for one in value.values())
        case "numbers by name or null":
            return value is None or (
                isinstance(value, dict) and all(_is(one, "a number or null") for one in value.values())
            )
        case "numbers by two names":
            return isinstance(value, dict) and all(_is(one, "numbers by name") for one in value.values())
        case "objects":
            return isinstance(value, list) and all(isinstance(one, dict) for one in value)
        case "an object":
            return isinstance(value, dict)
        case _:
            return isinstance(value, dict) and all(isinstance(one, dict) for one in value.values())


def read(text: str, file: str) -> dict[str, Any]:
    """A summary that --json printed to `file`. Errors: UsageError, which names file and key."""

    def wrong(what: str) -> UsageError:
        return UsageError(f"{file}: {what}", hint="it must be what `ikectx lab bench --json` prints")

    def check(value: object, keys: Mapping[str, str], where: str) -> None:
        if not isinstance(value, dict):
            raise wrong(f"{where} must be an object")
        for key, kind in keys.items():
            if key not in value or not _is(value[key], kind):
                raise wrong(f"{where}.{key} must be {kind}")

    def look(one: Any, kind: _Kind, where: str, more: Mapping[str, str]) -> None:
        check({**kind.lacking, **one} if isinstance(one, dict) else one, {**more, **kind.keys}, where)
        for number, row in enumerate(one["rows"] if kind.rows else ()):
            check(row, kind.rows, f"{where}.rows.{number}")
        if why := kind.wrong(one, where):
            raise wrong(why)

    try:
        summary = json.loads(text)
    except (ValueError, RecursionError):
        raise wrong("not JSON") from None
    if not isinstance(summary, dict):
        raise wrong("not an object")
    for what, kind in _KINDS.items():
        if kind.key in summary and "parts" not in summary:
            look(summary, kind, kind.words, _OF_DRAIN)
            check(summary["machine"], _HERE, f"{kind.words}.machine")
            check(summary["host"], _HOST, f"{kind.words}.host")
            return alone(what, summary)
    check(summary, {"command": "text", "strongswan": "text", "parts": "objects by name"}, "the result")
    for name, part in summary["parts"].items():
        if name not in PARTS:
            raise wrong(f"parts.{name}: there are {', '.join(PARTS)}")
        check(part, {"scenarios": "objects by name"}, f"parts.{name}")
        check(part.get("machine"), _MACHINE, f"parts.{name}.machine")
        for scenario, one in part["scenarios"].items():
            check(one, _ROW, f"{name}.{scenario}")
            for way, found in one["ways"].items():
                check(found, _WAY, f"{name}.{scenario}.ways.{way}")
    for what, kind in _KINDS.items():
        if not isinstance(found := summary.get(what, None if what == "drains" else []), list):
            raise wrong(f"{what} must be a list")
        for number, one in enumerate(found):
            look(one, kind, f"{what}.{number}", {})
            check(one.get("machine"), _MACHINE, f"{what}.{number}.machine")
    return summary


def place(machine: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for figures that stand in one column; what its kernel costs differs each time.

    Older summaries do not tell of `python`: it is "" then.
    """
    known = {"python": "", **machine}
    return {key: value for key, value in known.items() if key not in ("syscall_us", "thread_us")}


def merge(summaries: Mapping[str, Mapping[str, Any]], command: str) -> dict[str, Any]:
    """One summary of several, {file: summary}, as `command` makes it of the files.

    Errors: UsageError where they do not go together: another strongSwan, another machine, a scenario twice.
    """
    merged: dict[str, Any] = {"command": "", "parts": {}, **{name: [] for name in ALONE}}
    came: dict[tuple[str, str], str] = {}
    for file, summary in summaries.items():
        first = next(iter(summaries))
        if merged.setdefault("strongswan", summary["strongswan"]) != summary["strongswan"]:
            ours = merged["strongswan"]
            raise UsageError(f"strongswan was {ours} in {first}, {summary['strongswan']} in {file}")
        for name, part in summary["parts"].items():
            own = merged["parts"].setdefault(name, {"machine": part["machine"], "scenarios": {}})
            theirs = place(part["machine"])
            for key, value in place(own["machine"]).items():
                if theirs[key] != value:
                    told = f"{value or 'not told'}, {theirs[key] or 'not told'} in {file}"
                    raise UsageError(f"{PARTS[name]}: {key} was {told}")
            for scenario, one in part["scenarios"].items():
                if (name, scenario) in came:
                    raise UsageError(f"{scenario} is in {came[name, scenario]} and in {file}")
                came[name, scenario] = file
                own["scenarios"][scenario] = one
        for what in ALONE:
            merged[what] += summary.get(what, [])
    merged["drains"].sort(key=lambda one: (one["machine"]["esp"], one["sas"]))
    ran = [f"{summary['command']} --json > {file}" for file, summary in summaries.items()]
    return {**merged, "command": "\n".join([*ran, command])}
