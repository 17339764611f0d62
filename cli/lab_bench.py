"""`ikectx lab bench`: several runs of the handover scenarios, told as medians and ratios in a page.

    reports of runs -> summarise -> a summary (what --json prints) -> merge -> page, picture
    what --json printed before -> read ---------------------------------^

Every ratio is taken within one run (the move against the same tunnel's ways of today over the same links),
so that neither the machine's speed nor its emulation is in it. Pure: reports in, text out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from ikectx.errors import UsageError

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

NATIVE = tuple(name for name in SCENARIOS if name.split("-v")[0] in ("predictive", "reactive", "by-packet"))
"""Scenarios that are as good with ESP in user space: whoever moves an SA there has its SAs made anew."""

MOBIARCH = (
    ("MobiArch'08: IKEv1 main mode, anew", 1500, 11, 2182),
    ("MobiArch'08: IKEv1 aggressive mode, anew", 1300, 8, 1896),
    ("MobiArch'08: IKEv1 with context transfer", 20, 1, 106),
)
"""Delay, messages and octets on the MN's side as measured in MobiArch'08 (racoon, UDP 50 ms apart)."""


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
    ways: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        for base in run.get("baseline", ()):
            ways.setdefault(str(base.get("title") or base["name"]), []).append(base)
    return {
        "runs": len(runs),
        "ok": sum(bool(run["ok"]) for run in runs),
        "lost": [one["lost"] for one in traffic],
        "lost_median": median(one["lost"] for one in traffic),
        "sent": median(one["sent"] for one in traffic),
        "gap_ms": median(one["longest_gap_ms"] for one in traffic),
        "interval_ms": traffic[0]["interval_ms"],
        "causes": dict(sorted(causes.items())),
        "others_lost": [sum(one["lost"] for one in run.get("others", {}).values()) for run in runs],
        "air_messages": median(run["air"]["messages"] for run in runs),
        "air_octets": median(run["air"]["octets"] for run in runs),
        "gateway_messages": median(run["gateways"]["messages"] for run in runs),
        "gateway_octets": median(run["gateways"]["octets"] for run in runs),
        "phases_ms": _phases(run["phases_ms"] for run in runs if run.get("phases_ms")),
        "ratio": median(ratios) if (ratios := [run["ratio"] for run in runs if run.get("ratio")]) else None,
        "ways": {
            name: {
                "interruption_ms": median(one["interruption_ms"] for one in found),
                "lost": median(one["lost"] for one in found),
                "messages": median(one["messages"] for one in found),
                "octets": median(one["octets"] for one in found),
            }
            for name, found in ways.items()
        },
    }


def _phases(phases: Iterable[Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for one in phases:
        for name, ms in one.items():
            found.setdefault(name, []).append(ms)
    return {name: round(median(values), 1) for name, values in found.items()}


def summarise(
    reports: Iterable[Mapping[str, Any]], native: Iterable[Mapping[str, Any]] = (), command: str = ""
) -> dict[str, Any]:
    """All scenarios' rows, what ESP and which strongSwan they ran on, and the command that ran them.

    `native`: reports of runs beside them that were not in the virtual machine the others were in.
    """
    groups = by_scenario(reports)
    first = next(iter(groups.values()))[0] if groups else {}
    return {
        "command": command,
        "esp": first.get("esp", ""),
        "strongswan": first.get("strongswan", ""),
        "scenarios": {name: row(runs) for name, runs in groups.items()},
        "native": {name: row(runs) for name, runs in by_scenario(native).items()},
    }


_WAY = dict.fromkeys(("interruption_ms", "lost", "messages", "octets"), "a number")
_ROW = {
    **dict.fromkeys(("runs", "ok", "lost_median", "sent", "gap_ms", "interval_ms"), "a number"),
    **dict.fromkeys(("air_messages", "air_octets", "gateway_messages", "gateway_octets"), "a number"),
    **dict.fromkeys(("lost", "others_lost"), "numbers"),
    **dict.fromkeys(("causes", "phases_ms"), "numbers by name"),
    "ratio": "a number or null",
    "ways": "objects by name",
}
"""Keys of a row, and what they hold."""


def _is(value: object, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match kind:
        case "a number":
            return number
        case "a number or null":
            return number or value is None
        case "numbers":
            return isinstance(value, list) and all(_is(one, "a number") for one in value)
        case "numbers by name":
            return isinstance(value, dict) and all(_is(one, "a number") for one in value.values())
        case _:
            return isinstance(value, dict) and all(isinstance(one, dict) for one in value.values())


def read(text: str, file: str) -> dict[str, Any]:
    """A summary that --json printed to `file`. Errors: UsageError, which names file and key."""

    def wrong(what: str) -> UsageError:
        return UsageError(f"{file}: {what}", hint="it must be what `ikectx lab bench --json` prints")

    def check(value: Mapping[str, Any], keys: Mapping[str, str], where: str) -> None:
        for key, kind in keys.items():
            if key not in value or not _is(value[key], kind):
                raise wrong(f"{where}.{key} must be {kind}")

    try:
        summary = json.loads(text)
    except (ValueError, RecursionError):
        raise wrong("not JSON") from None
    if not isinstance(summary, dict):
        raise wrong("not an object")
    for key in ("command", "esp", "strongswan"):
        if not isinstance(summary.get(key), str):
            raise wrong(f"{key} must be text")
    check(summary, dict.fromkeys(("scenarios", "native"), "objects by name"), "the result")
    for part in ("scenarios", "native"):
        for name, one in summary[part].items():
            check(one, _ROW, f"{part}.{name}")
            for way, found in one["ways"].items():
                check(found, _WAY, f"{part}.{name}.ways.{way}")
    return summary


def merge(summaries: Mapping[str, Mapping[str, Any]], command: str) -> dict[str, Any]:
    """One summary of several, {file: summary}, as `command` makes it of the files.

    Errors: UsageError where they do not go together: another strongSwan, another ESP, a scenario twice.
    """
    merged: dict[str, Any] = {"command": "", "scenarios": {}, "native": {}}
    came: dict[tuple[str, str], str] = {}
    for file, summary in summaries.items():
        for key in ("strongswan", "esp"):
            if merged.setdefault(key, summary[key]) != summary[key]:
                first = next(iter(summaries))
                raise UsageError(f"{key} was {merged[key]} in {first}, {summary[key]} in {file}")
        for part in ("scenarios", "native"):
            for name, one in summary[part].items():
                if (part, name) in came:
                    raise UsageError(f"{name} is in {came[part, name]} and in {file}")
                came[part, name] = file
                merged[part][name] = one
    ran = [f"{summary['command']} --json > {file}" for file, summary in summaries.items()]
    return {**merged, "command": "\n".join([*ran, command])}


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += ["| " + " | ".join(_cell(cell) for cell in one) + " |" for one in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


PROBE = ("probe, every ms", "lost, each run", "median", "longest gap ms")


def _probe(one: Mapping[str, Any]) -> Sequence[object]:
    """What the probe found, for columns `PROBE`."""
    return one["interval_ms"], one["lost"], one["lost_median"], one["gap_ms"]


def _failed(summary: Mapping[str, Any]) -> Iterable[str]:
    """The warning above figures of runs that did not do what their scenario asks for."""
    rows = [(name, one) for part in ("scenarios", "native") for name, one in summary[part].items()]
    failed = [
        f"{name} ({one['runs'] - one['ok']} of {one['runs']} runs)"
        for name, one in rows
        if one["ok"] < one["runs"]
    ]
    if failed:
        yield f"**Not every run did what its scenario asks for**; all are counted: {', '.join(failed)}."


def page(summary: Mapping[str, Any], image: str = "") -> str:
    """The Markdown page docs/benchmarks.md. `image`: the file that holds the `picture`, if it is shown."""
    rows: Mapping[str, Mapping[str, Any]] = summary["scenarios"]
    command = str(summary["command"])
    made = "commands below" if "\n" in command else "command below, in one go"
    parts = [
        "# Benchmarks",
        f"Made by the {made}; strongSwan "
        f"{summary['strongswan']}, ESP by the {summary['esp']}. Times of an emulated machine are long, so "
        "compare by the ratio, which is taken inside each run; counts do not depend on the machine.",
        f"```\n{command}\n```",
        *_failed(summary),
        "## A live handover, UDP probe both ways, access link of 20 ms one way",
        _table(
            (
                "scenario",
                *PROBE,
                "air: messages",
                "octets",
                "CXTP: messages",
                "octets",
            ),
            (
                (
                    name,
                    *_probe(one),
                    one["air_messages"],
                    one["air_octets"],
                    one["gateway_messages"],
                    one["gateway_octets"],
                )
                for name, one in rows.items()
                if name not in COLLISIONS
            ),
        ),
        "Octets on the air are those of whole IP packets; CXTP's are those of its messages, without TLS.",
        "### Where each lost packet went",
        _table(
            ("scenario", "packets, all runs", "where"),
            (
                (name, count, cause)
                for name, one in rows.items()
                for cause, count in (one["causes"] or {"none lost": 0}).items()
            ),
        ),
        "`EPERM` and `ENETUNREACH` at the mobile node are its own: charon there puts a drop policy in place "
        "of the old one and takes its virtual IP away and back while it moves its SAs (`IpInAddrErrors`, "
        "`Ip6InAddrErrors`: packets that came meanwhile). No product at the gateways can avoid them. Where "
        "the MN changes its network, packets to the old address and from it are lost until nSG serves.",
        *_collisions(rows),
        *_native(summary["native"]),
        "## Against the ways of today, in the same run",
        _table(
            ("scenario", "way", "interruption ms", "lost", "messages on the air", "octets"),
            (line for name, one in rows.items() if one["ways"] for line in _ways(name, one)),
        ),
        *([f"![Gaps]({image})"] if image else []),
        "## Where the time goes (median ms, pSG's view)",
        _table(
            ("scenario", *(phases := _names(rows))),
            ((name, *(one["phases_ms"].get(phase) for phase in phases)) for name, one in rows.items()),
        ),
        "`confirm` is what nSG does between CTD and CTDR: take, the exchange with the mobile node, "
        "activation. With push and pull, traffic flows in all phases. The phases of a pull are nSG's.",
        "## The table of MobiArch'08, with IKEv2",
        _table(
            (
                *("way", "delay ms", "messages, MN side", "octets", "against anew, same run"),
                *("natively: delay ms", "against anew"),
            ),
            [*((*one, "", "", "") for one in MOBIARCH), *_mobiarch(rows, summary["native"])],
        ),
        "The first three rows are as published in MobiArch'08 (IKEv1 by racoon, Mobile IPv6, UDP packets "
        "50 ms apart, without the delay of Mobile IPv6 itself) and not made by the commands above: other "
        "machines, another link. The rest are this run's: the longest gap of the probe, with the change "
        "of the access network in it where the MN moves, and all IKE and CXTP messages on the MN's links. "
        "*anew* is what an MN does today (IKE_SA_INIT, IKE_AUTH), measured in the runs of the scenario in "
        "brackets.",
        "*natively*: the same scenarios on the machine itself, with ESP in user space, and without delay "
        "on the access link where its kernel has no netem. In the virtual machine every step of an agent "
        "(Python) takes 10 to 20 times its time, and where the MN has a part in the handover, traffic "
        "waits for it; CTARs sent again there are among the messages. Push and pull let traffic flow "
        "meanwhile.",
    ]
    return "\n\n".join(parts) + "\n"


def _native(rows: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """The section about runs that were not emulated."""
    if not rows:
        return
    yield "## At this machine's own speed: ESP in user space, no virtual machine"
    yield _table(
        ("scenario", *PROBE, "anew, PSK: gap ms", ""),
        (
            (
                name,
                *_probe(one),
                one["ways"].get("PSK", {}).get("interruption_ms", ""),
                _times(one["ratio"]),
            )
            for name, one in rows.items()
        ),
    )
    yield (
        "Here the mobile node's CHILD_SAs are rekeyed behind the handover, since user-space ESP cannot be "
        "given other addresses, so messages are not compared; the gap holds the change of the access "
        "network, for which charon alone waits 100 ms. Without netem in the kernel the access link has no "
        "delay."
    )


def _collisions(rows: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """The section about SPIs that are taken at nSG."""
    found = {name: rows[name] for name in COLLISIONS if name in rows}
    if not found:
        return
    yield "## SPIs that are taken at nSG"
    yield _table(
        (
            "scenario",
            "probe, every ms",
            "mn lost, each run",
            "median",
            "gap ms",
            "mn2 lost, each run",
            "air: messages",
            "octets",
        ),
        (
            (
                name,
                *_probe(one),
                one["others_lost"],
                one["air_messages"],
                one["air_octets"],
            )
            for name, one in found.items()
        ),
    )
    yield (
        "nSG serves another mobile node, mn2, under names that mn's SA has at pSG: the inbound ESP SPI, the "
        "outbound one (both behind one NAT), both IKE SPIs, all of them. mn is a stock charon, which nSG "
        "rekeys, but in `collision-agent` (UPDATE_SPI) and `collision-reactive` (new SPIs in the CTAA, "
        "after a change of the access network). Where the outbound SPI is taken, nSG can only send under the "
        "new one, which the MN knows when it has answered; until then pSG goes on sending under the old one, "
        "where the MN is still at its old place. On the emulated CPU of a virtual machine all that an agent "
        "or charon does between two packets takes 10 to 20 times as long."
    )


def _mobiarch(
    rows: Mapping[str, Mapping[str, Any]], native: Mapping[str, Mapping[str, Any]]
) -> Iterable[Sequence[object]]:
    """Rows for the same columns: every way to connect anew that was measured, then every mode."""
    for name, one in rows.items():
        for way, found in one["ways"].items() if name in MODES else ():
            here = native.get(name, {}).get("ways", {}).get(way, {}).get("interruption_ms", "")
            label = f"IKEv2 anew, {way} ({name})"
            yield label, found["interruption_ms"], found["messages"], found["octets"], "", here, ""
    for name, label in MODES.items():
        if name in rows:
            one, here = rows[name], native.get(name, {})
            figures = one["gap_ms"], one["air_messages"], one["air_octets"], _times(one["ratio"])
            yield label, *figures, here.get("gap_ms", ""), _times(here.get("ratio"))


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"1 to {ratio:.1f}"


def _names(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    seen: dict[str, None] = {}
    for one in rows.values():
        seen.update(dict.fromkeys(one["phases_ms"]))
    return list(seen)


def _ways(name: str, one: Mapping[str, Any]) -> Iterable[Sequence[object]]:
    yield (name, "ikectx", one["gap_ms"], one["lost_median"], one["air_messages"], one["air_octets"])
    for way, found in one["ways"].items():
        factor = f" ({found['interruption_ms'] / one['gap_ms']:.1f} x)" if one["gap_ms"] else ""
        yield (
            name,
            f"anew, {way}",
            f"{found['interruption_ms']:.0f}{factor}",
            found["lost"],
            found["messages"],
            found["octets"],
        )


BAR = 460
LINE = 26


def picture(summary: Mapping[str, Any]) -> str:
    """The interruptions as an SVG bar chart, one bar a way and scenario."""
    bars = [
        (f"{name}: {way}", float(value))
        for name, one in summary["scenarios"].items()
        if name not in COLLISIONS
        for way, value in [
            ("ikectx", one["gap_ms"]),
            *((f"anew, {title}", found["interruption_ms"]) for title, found in one["ways"].items()),
        ]
    ]
    longest = max((value for _, value in bars), default=1.0) or 1.0
    height = LINE * len(bars) + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<text x="10" y="20" font-weight="bold">Longest gap in the traffic, ms (median)</text>',
    ]
    for number, (label, value) in enumerate(bars):
        top = 34 + LINE * number
        width = max(1.0, BAR * value / longest)
        colour = "#2a7a4b" if label.endswith(": ikectx") else "#9a9a9a"
        out.append(f'<text x="330" y="{top + 14}" text-anchor="end">{label}</text>')
        out.append(f'<rect x="340" y="{top}" width="{width:.1f}" height="18" fill="{colour}"/>')
        out.append(f'<text x="{346 + width:.1f}" y="{top + 14}">{value:.0f}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
