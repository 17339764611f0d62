"""What the page of `ikectx lab bench` says about CPU time: of transfers, of one SA that moves often, of a
drain, and what it goes into. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bench import COLLISIONS, PARTS
from .net import GATEWAYS
from .page_parts import Row, by_host, cell, in_order, scenarios, table, two


def cpu(summary: Mapping[str, Any]) -> Iterable[str]:
    """CPU time of the agents for one transfer."""
    shown = [part for part in ("native", "real") if any(map(_used, scenarios(summary, part).values()))]
    if not shown:
        return
    hosts = ("mn", "psg", "nsg")
    names = in_order(scenarios(summary, part) for part in shown)
    yield "## CPU time of each agent for one transfer, ms"
    yield table(
        ("scenario", *(f"{PARTS[part]}: {host}" for part in shown for host in hosts)),
        (
            (
                name,
                *(
                    used
                    for part in shown
                    for used in by_host(scenarios(summary, part).get(name, {}).get("cpu_ms"), hosts)
                ),
            )
            for name in names
            if name not in COLLISIONS
        ),
    )
    yield (
        "User and system time of the agent's process, all its threads, from the request until the transfer "
        "has ended at all hosts; medians of the runs. User-Mode Linux counts ticks of 10 ms in which the "
        "process is at work, which is a sample. Natively ESP is in user space, and a mobile node's "
        "CHILD_SAs are rekeyed behind the move, which the agents hear of; the access link has no delay there "
        "where the machine's kernel has no netem."
    )


def _used(one: Row) -> bool:
    return one["cpu_ms"] is not None and any(used is not None for used in one["cpu_ms"].values())


def to_and_fro(found: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """One SA that moves often."""
    found = [one for one in found if not one.get("profile_ms")]
    if not found:
        return
    yield "## CPU time of one move, ms"
    hosts = ("psg", "nsg")
    yield table(
        ("moves", "guest", "ESP", "agents: both", "psg", "nsg", "charons: psg", "nsg"),
        (
            (
                *(one["moves"], one["machine"]["guest"], one["machine"]["esp"]),
                sum(used or 0 for used in one["cpu_ms"].values()),
                *(*by_host(one["cpu_ms"], hosts), *by_host(one["charon_ms"], hosts)),
            )
            for one in found
        ),
    )
    yield (
        "User and system time of the processes, all their threads, on average: one SA moves to and fro by "
        "`ikectx transfer`, so that each gateway is as often the old one as the new one. The aim is 15 for "
        "both agents."
    )


def drains(found: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """A gateway whose SAs all move at once."""
    found = [one for one in found if not one.get("profile_ms")]
    if not found:
        return
    yield "## A gateway is drained: all its SAs move by one `transfer --all`"
    yield table(
        (
            *("SAs", "guest", "clock", "ESP", "seconds", "SAs a second"),
            *("CPU ms for each SA: psg", "nsg", "their charons, and mn's"),
            "memory KiB for each SA, both agents",
            *("lost by one of them", "longest gap up / down, ms"),
        ),
        (
            (
                *(one["sas"], one["machine"]["guest"], one["machine"]["clock"], one["machine"]["esp"]),
                *(one["seconds"], one["sas"] / one["seconds"] if one["seconds"] else None),
                *by_host(one["cpu_ms_per_sa"], ("psg", "nsg")),
                " + ".join(map(cell, by_host(one.get("charon_ms_per_sa"), ("psg", "nsg", "mn")))),
                *(one["memory_kib_per_sa"], f"{one['lost']} of {one['sent']}", two(one["gap_ms"])),
            )
            for one in found
        ),
    )
    many = sorted({one["segments"] for one in found if one.get("segments")})
    yield (
        "No name collides. "
        + "".join(f"charon has {number} HA segments (`segment_count`). " for number in many)
        + "CPU and memory are those of the agents; memory is what their resident sets have "
        "grown by since before the SAs came up. One of the mobile nodes has traffic in both directions all "
        "the time, every 5 ms. With ESP in user space each SA is rekeyed behind its move, and what is lost "
        "is lost towards the mobile node while its own SA moves: it takes nothing from the new gateway "
        "before that rekey. There a charon goes through lists of its SAs and policies for each packet and "
        "each SA (libipsec), so the charons' share grows with the number (`perf record -p` of the mobile "
        "nodes' charon while `ikectx lab bench --esp libipsec --drain 600` runs: 55 % in libipsec)."
    )


@dataclass(frozen=True, slots=True)
class _Profile:
    """What the agents' CPU time went into, in ms by host and part, and their charons' in ms by host."""

    title: str
    agents: Mapping[str, Mapping[str, float]]
    charons: Mapping[str, float | None]

    def part(self, name: str) -> list[float]:
        return [self.agents[host].get(name, 0.0) for host in GATEWAYS]

    def whole(self) -> list[float]:
        return [sum(self.agents[host].values()) for host in GATEWAYS]

    def cells(self, figures: Sequence[float | None]) -> list[object]:
        """Of both hosts, their sum, and its share of the agents' time in %."""
        both, every = sum(used or 0.0 for used in figures), sum(self.whole())
        return [*figures, both, round(100 * both / every) if every else None]


def profiles(moves: Sequence[Mapping[str, Any]], drains: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Where the CPU time of an SA goes: a part of the agents in a line, and their charons."""
    runs = [
        _Profile(title, found["profile_ms"], found[charons])
        for found, title, charons in (
            *((one, f"{one['moves']} moves", "charon_ms") for one in moves),
            *((one, f"drain of {one['sas']}", "charon_ms_per_sa") for one in drains),
        )
        if found.get("profile_ms")
    ]
    if not runs:
        return
    names = in_order(parts for run in runs for parts in run.agents.values())
    names.sort(key=lambda name: -sum(runs[0].part(name)))
    yield "## Where the CPU time of an SA goes, ms"
    yield table(
        ("part", *(f"{run.title}: {what}" for run in runs for what in ("psg", "nsg", "both", "% of both"))),
        (
            *([name, *(each for run in runs for each in run.cells(run.part(name)))] for name in names),
            ["the agents", *(each for run in runs for each in run.cells(run.whole()))],
            ["their charons", *(each for run in runs for each in run.cells(_of(run.charons)))],
        ),
    )
    yield (
        "By samples of the CPU time, user and system, in runs of their own, which take somewhat more than "
        "those above: a sample each tick of the kernel's (4 ms here), for the part that the innermost of the "
        "product's own modules belongs to. Of a few hundred samples, a part of 10 % may be 8 or 12. What "
        "Python's library and SQLite do for a part counts for it. *The event loop*: what asyncio takes for "
        "its rounds, beside what it runs in them. In a drain psg is the old gateway, nsg the new one; moves "
        "to and fro make each of them both."
    )


def _of(figures: Mapping[str, float | None]) -> list[float | None]:
    return [figures.get(host) for host in GATEWAYS]
