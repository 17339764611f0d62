"""The page and the picture of `ikectx lab bench`: a summary of `lab_bench` in, Markdown and SVG out. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import aims as lab_aims
from . import damage as lab_damage
from . import page_cpu, page_others
from .bench import ALONE, COLLISIONS, MODES, PARTS, place
from .critical import rows as critical_rows
from .page_parts import Row, in_order, scenarios, table, times, trips, two

MOBIARCH = (
    ("MobiArch'08: IKEv1 main mode, anew", 1500, 11, 2182),
    ("MobiArch'08: IKEv1 aggressive mode, anew", 1300, 8, 1896),
    ("MobiArch'08: IKEv1 with context transfer", 20, 1, 106),
)
"""Delay, messages and octets on the MN's side as measured in MobiArch'08 (racoon, UDP 50 ms apart)."""

CLOCKS = ("real", "virtual")
"""The parts with the kernel's ESP, which stand side by side."""


def page(summary: Mapping[str, Any], image: str = "") -> str:
    """The Markdown page docs/benchmarks.md. `image`: the file that holds the `picture`, if it is shown."""
    command = str(summary["command"])
    made = "commands" if "\n" in command else "command"
    parts = [
        "# Benchmarks",
        f"Made by the {made} below; strongSwan {summary['strongswan']}.",
        f"```\n{command}\n```",
        *_failed(summary),
        *_machines(summary),
        *_gaps(summary, image),
        *_ways(summary),
        *_lost(summary),
        *_messages(summary),
        *page_cpu.cpu(summary),
        *_handovers(summary.get("handovers", ()), image),
        *page_others.beside(summary.get("others", ())),
        *page_cpu.to_and_fro(summary.get("moves", ())),
        *page_cpu.drains(summary["drains"]),
        *page_cpu.profiles(summary.get("moves", ()), summary["drains"]),
        *_attacks(summary.get("attacks", ())),
        *_collisions(summary),
        *_phases(summary),
        *_mobiarch(summary),
    ]
    return "\n\n".join(parts) + "\n"


def _moves(summary: Mapping[str, Any]) -> dict[str, dict[str, Row]]:
    """Scenarios but those of collisions, each with its rows by part, in the order they came."""
    found: dict[str, dict[str, Row]] = {}
    for part in CLOCKS:
        for name, one in scenarios(summary, part).items():
            if name not in COLLISIONS:
                found.setdefault(name, {})[part] = one
    return found


# -- sections -----------------------------------------------------------------------------------


def _failed(summary: Mapping[str, Any]) -> Iterable[str]:
    """The warning above figures of runs that did not do what their scenario asks for."""
    failed = [
        f"{name}, {PARTS[part]} ({one['runs'] - one['ok']} of {one['runs']} runs)"
        for part, found in summary["parts"].items()
        for name, one in found["scenarios"].items()
        if one["ok"] < one["runs"]
    ]
    if failed:
        yield f"**Not every run did what its scenario asks for**; all are counted: {', '.join(failed)}."


def _machines(summary: Mapping[str, Any]) -> Iterable[str]:
    """What machine each part was, and what its kernel costs."""
    places: list[tuple[str, Mapping[str, Any]]] = [
        (PARTS[part], found["machine"]) for part, found in summary["parts"].items()
    ]
    told = [place(machine) for _name, machine in places]
    for what in ALONE:
        for one in summary.get(what, ()):
            if place(one["machine"]) not in told:
                places.append((what, one["machine"]))
                told.append(place(one["machine"]))
    if not places:
        return
    yield "## The machine"
    yield table(
        (
            *("", "CPU", "cores", "scheduled", "kernel", "guest", "its kernel", "its CPUs", "clock", "ESP"),
            *("Python", "a system call, µs", "a turn of another thread, µs"),
        ),
        (
            (
                *(name, one["cpu"], one["cores"], one["scheduled"], one["kernel"]),
                *(
                    ("none", "", "")
                    if one["guest"] == "host"
                    else (one["guest"], one["guest_kernel"], one["guest_cpus"])
                ),
                *(one["clock"], one["esp"], place(one)["python"] or "–"),
                *(one["syscall_us"], one["thread_us"]),
            )
            for name, one in places
        ),
    )
    yield (
        "`uml` is User-Mode Linux, a kernel that is a program: what a process computes takes as long as on "
        "the machine itself, what it asks the kernel for takes as long as the last two columns say "
        "(measured at the beginning of the runs). A row with `real-time, on 1` has `taskset -c 1 chrt -r "
        "1` in front of the command, because such a call is a switch between two programs, which takes "
        "longer between cores. Agents and charons ask often, so their part of a gap is longer there than "
        "where the own kernel has ESP. In *virtual time* the clock stands still while any program runs, "
        "and jumps to the next timer while all wait: round trips, timers and pauses are left, exact and "
        "the same in every run. A real machine is between the two."
    )


def _gaps(summary: Mapping[str, Any], image: str) -> Iterable[str]:
    """The gaps of our way, by both clocks."""
    found = _moves(summary)
    if not found:
        return
    shown = [part for part in CLOCKS if any(part in rows for rows in found.values())]
    yield "## Gaps in the traffic"
    yield table(
        (
            "scenario",
            *(
                f"{PARTS[part]}: {what}"
                for part in shown
                for what in ("longest gap, each run, ms", *_GAP_COLUMNS)
            ),
        ),
        (
            (
                name,
                *(cell for part in shown for cell in _gap_cells(rows.get(part))),
            )
            for name, rows in found.items()
        ),
    )
    yield (
        "Times in ms, up (from the MN) and down (to it) apart, medians of the runs; the probe sends every 5 "
        "ms in both directions through the tunnel, so that 5 ms are no gap. The access link has a delay of "
        "20 ms one way. *link dark*: where the MN changes its access network, how long the link itself "
        "carries nothing. It is measured in the same run, by a probe in clear between the MN's outer "
        "addresses and nSG, in a change of its own without a tunnel; the new link's neighbours have to be "
        "asked for both times. *beyond*: the gap less that, which is what the handover adds; also in round "
        "trips through the tunnel. Where the MN stays where it is (`handover`, `pull`), its link is never "
        "dark."
    )
    if image:
        yield f"![Gaps]({image})"


_GAP_COLUMNS = ("median", "link dark", "beyond", "in round trips")


def _gap_cells(one: Row | None) -> Sequence[object]:
    if one is None:
        return [""] * (1 + len(_GAP_COLUMNS))
    beyond = one["beyond_ms"]
    return [
        one["gaps"],
        two(one["gap_ms"]),
        two(one["dark_ms"]),
        two(beyond),
        trips(beyond, one["round_trip_ms"]),
    ]


def _ways(summary: Mapping[str, Any]) -> Iterable[str]:
    """Ours against connecting anew."""
    found = {
        name: rows for name, rows in _moves(summary).items() if any(one["ways"] for one in rows.values())
    }
    if not found:
        return
    shown = [part for part in CLOCKS if any(part in rows for rows in found.values())]
    yield "## Against the ways of today, in the same run"
    columns = ("gap", "beyond the dark time", "times ours", "times ours beyond")
    yield table(
        ("scenario", "way", *(f"{PARTS[part]}: {what}" for part in shown for what in columns)),
        (
            (name, label, *(cell for part in shown for cell in _way_cells(rows.get(part), way)))
            for name, rows in found.items()
            for label, way in [
                ("ikectx", ""),
                *((f"anew, {way}", way) for way in in_order(one["ways"] for one in rows.values())),
            ]
        ),
    )
    yield (
        "*anew* is what an MN does today: it sets up a tunnel with nSG from scratch (IKE_SA_INIT, "
        "IKE_AUTH), with the same probes over the same links; where it moves, after the same change of its "
        "access network, else after it has deleted its tunnel with pSG. *times ours*: how many times as "
        "long as ours it takes, by the slower direction, within each run (median); below 1 it is faster "
        "than ours."
    )


def _way_cells(one: Row | None, way: str) -> Sequence[object]:
    if one is None or (way and way not in one["ways"]):
        return [""] * 4
    if not way:
        return [two(one["gap_ms"]), two(one["beyond_ms"]), "", ""]
    found = one["ways"][way]
    ratios = times(found["ratio"]), times(found["ratio_beyond"])
    return [two(found["gap_ms"]), two(found["beyond_ms"]), *ratios]


def _lost(summary: Mapping[str, Any]) -> Iterable[str]:
    """Lost packets of each run, and where they went."""
    found = _moves(summary)
    if not found:
        return
    yield "## Where each lost packet went"
    yield table(
        ("scenario", "clock", "lost, each run", "median", "of", "where, all runs"),
        (
            (name, part, one["lost"], one["lost_median"], one["sent"], _causes(one["causes"]))
            for name, rows in found.items()
            for part, one in rows.items()
        ),
    )
    yield (
        "`EPERM` and `ENETUNREACH` at the mobile node are its own: charon there puts a drop policy in place "
        "of the old one and takes its virtual IP away and back while it moves its SAs (`IpInAddrErrors`, "
        "`Ip6InAddrErrors`: packets that came meanwhile). No product at the gateways can avoid them. Where "
        "the MN changes its network, packets to the old address and from it are lost until nSG serves."
    )


def _causes(causes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in causes.items()) or "none lost"


def _messages(summary: Mapping[str, Any]) -> Iterable[str]:
    """What is sent for a handover; the same by every clock."""
    found = _moves(summary)
    if not found:
        return
    yield "## Messages"
    yield table(
        ("scenario", "way", "on the air: messages", "octets", "between gateways: messages", "octets"),
        (
            line
            for name, rows in found.items()
            for one in [next(iter(rows.values()))]
            for line in [
                (
                    *(name, "ikectx", one["air_messages"], one["air_octets"]),
                    *(one["gateway_messages"], one["gateway_octets"]),
                ),
                *(
                    (name, f"anew, {way}", theirs["messages"], theirs["octets"], "", "")
                    for way, theirs in one["ways"].items()
                ),
            ]
        ),
    )
    yield "Octets on the air are those of whole IP packets; CXTP's are those of its messages, without TLS."


def _handovers(found: Sequence[Mapping[str, Any]], image: str) -> Iterable[str]:
    """Each mode beside what it must reach, by each clock."""
    if not found:
        return
    yield "## What a handover must reach"
    for one in found:
        clock = {"virtual": "Virtual time", "real": "Real time"}[one["machine"]["clock"]]
        runs = max(row["runs"] for row in one["modes"])
        crowd = f", {one['crowd']} other SAs at each gateway" if one.get("crowd") else ""
        probe = f", a probe each {one.get('interval_ms', lab_aims.INTERVAL_MS):g} ms"
        yield f"{clock}, {'one run' if runs == 1 else f'medians of {runs} runs'}{probe}{crowd}:"
        yield table(
            (*lab_aims.COLUMNS, "reached"),
            ([*lab_aims.cells(row, "<br>"), "yes" if row["reached"] else "no"] for row in one["modes"]),
        )
    yield (
        "*up, down*: the longest gap beyond what the link itself was dark, in ms, with the probe's own "
        "interval in it, beside what it must be (≤: reached, >: not). Predictive, down, 42 ms are the way "
        "itself: 20 of the request, 2 between the gateways, 20 of the first packet; what is above that is "
        "the probe's interval, and 1 ms with the finer one. *lost*: packets of the probe; "
        "*at gateways*: those that no counter of the mobile node's own kernel explains; *late*: 10 ms "
        "longer under way than the fastest. *PSK, EAP, certificates*: how many times as long as ours "
        "connecting anew takes, gap beyond dark against gap beyond dark, by the slower direction, in the "
        "same run. The gateways are 1 ms from each other, one way. By packet the mobile node's own charon "
        "takes what it takes where its gateway stays the same, which is measured in the same run, and the "
        "aim is that and so much more. Where the server's packets go on to the old gateway, the first one "
        "by the detour has a way that is 1 ms longer: a gap of 5 ms becomes one of 6."
    )
    rows = [row for one in found for row in one["modes"] if row.get("path")]
    if not rows:
        return
    yield "### What packets wait for"
    if image:
        yield f"![Critical paths]({paths_image(image)})"
    yield table(
        ("mode", "way", "host", "step", "start, ms", "end, ms"), (line for row in rows for line in _path(row))
    )
    yield (
        "In virtual time, from the moment at which the mobile node's link changed or the move was asked for: "
        "what the first packet behind the gap waited for, up and down; without a gap, what the whole move "
        "waited for while packets flowed. A line from host to host is a message. `waits`: nothing that is "
        "traced; before the first packet that is also the probe's interval."
    )


def paths_image(image: str) -> str:
    """The file of the picture of critical paths, beside the page's other one."""
    return image.removesuffix(".svg") + "-paths.svg"


def _path(row: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    """The critical path of a mode, as lines of a table."""
    for number, line in enumerate(critical_rows(row.get("path", {}))):
        yield [row["mode"] if not number else "", *line]


def _attacks(attacks: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """What attacks cost the gateways, and a mobile node."""
    for number, (head, rows, words) in enumerate(lab_damage.page(attacks)):
        if number == 0:
            yield "## Under attack"
        yield table(head, rows)
        yield words


def _collisions(summary: Mapping[str, Any]) -> Iterable[str]:
    """The section about SPIs that are taken at nSG."""
    rows = scenarios(summary, "real")
    found = {name: rows[name] for name in COLLISIONS if name in rows}
    if not found:
        return
    yield "## SPIs that are taken at nSG"
    yield table(
        (
            *("scenario", "mn lost, each run", "median", "longest gap up / down, ms", "mn2 lost, each run"),
            *("air: messages", "octets"),
        ),
        (
            (
                *(name, one["lost"], one["lost_median"], two(one["gap_ms"]), one["others_lost"]),
                *(one["air_messages"], one["air_octets"]),
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
        "where the MN is still at its old place."
    )


def _phases(summary: Mapping[str, Any]) -> Iterable[str]:
    """Where the time goes, at the gateway that tells."""
    found = [(name, part, one) for name, rows in _moves(summary).items() for part, one in rows.items()]
    if not found:
        return
    phases = in_order(one["phases_ms"] for _name, _part, one in found)
    yield "## Where the time goes (median ms, pSG's view)"
    yield table(
        ("scenario", "clock", *phases),
        ((name, part, *(one["phases_ms"].get(phase) for phase in phases)) for name, part, one in found),
    )
    yield (
        "`confirm` is what nSG does between CTD and CTDR: take, the exchange with the mobile node, "
        "activation. With push and pull, traffic flows in all phases. The phases of a pull are nSG's. "
        "[timeline.md](timeline.md) shows what waits for what."
    )


def _mobiarch(summary: Mapping[str, Any]) -> Iterable[str]:
    """The table of MobiArch'08 with every way to connect anew that was measured, then every mode."""
    real, virtual = scenarios(summary, "real"), scenarios(summary, "virtual")
    lines: list[Sequence[object]] = [(*one, "") for one in MOBIARCH]
    for name in (name for name in MODES if name in real):
        for way, found in real[name]["ways"].items():
            there = virtual.get(name, {}).get("ways", {}).get(way, {}).get("interruption_ms", "")
            label = f"IKEv2 anew, {way} ({name})"
            lines.append((label, found["interruption_ms"], found["messages"], found["octets"], there))
    for name, label in MODES.items():
        if name in real:
            one = real[name]
            there = _longest(virtual[name]) if name in virtual else ""
            lines.append((label, _longest(one), one["air_messages"], one["air_octets"], there))
    if not any(name in real for name in MODES):
        return
    yield "## The table of MobiArch'08, with IKEv2"
    yield table(("way", "delay ms", "messages, MN side", "octets", "virtual time: delay ms"), lines)
    yield (
        "The first three rows are as published in MobiArch'08 (IKEv1 by racoon, Mobile IPv6, UDP packets 50 "
        "ms apart, without the delay of Mobile IPv6 itself) and not made by the commands above: other "
        "machines, another link. The rest are these runs': the longest gap of the probe in either "
        "direction, with the change of the access network in it where the MN moves, and all IKE and CXTP "
        "messages on the MN's links."
    )


def _longest(one: Row) -> float:
    return float(max(one["gap_ms"].values()))


# -- picture ------------------------------------------------------------------------------------

BAR = 460
LINE = 26


def picture(summary: Mapping[str, Any]) -> str:
    """The gaps as an SVG bar chart, one bar a way and scenario; the part that is the dark link's is light."""
    bars: list[tuple[str, float, float]] = []
    for name, rows in _moves(summary).items():
        one = next(iter(rows.values()))
        ways = {"ikectx": one, **{f"anew, {way}": found for way, found in one["ways"].items()}}
        for way, found in ways.items():
            dark = max((found["dark_ms"] or {"": 0.0}).values())
            bars.append((f"{name}: {way}", _longest(found), dark))
    longest = max((value for _, value, _ in bars), default=1.0) or 1.0
    height = LINE * len(bars) + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="930" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<text x="10" y="20" font-weight="bold">Longest gap in the traffic, ms (median)'
        "; light: the link itself is dark</text>",
    ]
    for number, (label, value, dark) in enumerate(bars):
        top = 34 + LINE * number
        width, light = (max(1.0, BAR * part / longest) for part in (value, min(dark, value)))
        colour = "#2a7a4b" if label.endswith(": ikectx") else "#9a9a9a"
        out.append(f'<text x="360" y="{top + 14}" text-anchor="end">{label}</text>')
        out.append(f'<rect x="370" y="{top}" width="{width:.1f}" height="18" fill="{colour}"/>')
        if dark:
            style = 'height="18" fill="#ffffff" fill-opacity="0.6"'
            out.append(f'<rect x="370" y="{top}" width="{light:.1f}" {style}/>')
        out.append(f'<text x="{376 + width:.1f}" y="{top + 14}">{value:.0f}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
