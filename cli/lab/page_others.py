"""What the page of `ikectx lab bench` says about handovers beside other SAs (`many_others`). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .aims import BESIDE_OTHERS
from .page_parts import UNKNOWN, by_host, cell, table

HOSTS = ("psg", "nsg", "mn")


def beside(found: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """The gaps of each mode, with more and more other SAs at both gateways."""
    if not found:
        return
    yield "## With other SAs at both gateways"
    for one in found:
        esp = {"libipsec": "ESP in user space", "kernel": "the kernel's ESP"}[one["machine"]["esp"]]
        clock = {"virtual": "virtual time", "real": "real time"}[one["machine"]["clock"]]
        runs = "one run" if one["runs"] == 1 else f"medians of {one['runs']} runs"
        where = "natively" if one["machine"]["guest"] == "host" else one["machine"]["guest"]
        yield f"{where}, {esp}, {clock}, {runs}, a probe each {one['interval_ms']:g} ms:"
        yield table(
            (
                *("mode", "other SAs", "up, ms", "down, ms", "times the first: up", "down", "lost"),
                *("agents' CPU ms: psg, nsg, mn", "charons'"),
            ),
            map(_row, in_order(one["rows"])),
        )
    yield (
        "*up, down*: the longest gap beyond what the link itself was dark in the same run, with the "
        "probe's own interval in it. *times the first*: how many times that beside the fewest others; "
        f"the aim is {BESIDE_OTHERS:g} (≤: reached, >: not). CPU is the user and system time of the "
        "processes from the request until the move has ended. charon has 16 HA segments "
        "(`segment_count`): when an SA becomes active, those of its segment are passive for a moment. With "
        "the kernel's ESP the gateways' charons have the settings of "
        "[many-sas.conf](../examples/config/many-sas.conf). In "
        "a push with ESP in user space the mobile node takes nothing from the new gateway before it has "
        "rekeyed its CHILD_SA, for which that gateway's charon has to be active."
    )


def in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By mode, in the order they came, each from few others to many."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    return sorted(rows, key=lambda row: (modes.index(row["mode"]), row["sas"]))


def _row(row: Mapping[str, Any]) -> Sequence[object]:
    times = row["times"] or {}
    return [
        *(row["mode"], row["sas"], row["up"], row["down"]),
        *(_times(times.get(way)) for way in ("up", "down")),
        row["lost"],
        *(", ".join(map(cell, by_host(row[name], HOSTS))) for name in ("cpu_ms", "charon_ms")),
    ]


def _times(times: float | None) -> str:
    if times is None:
        return UNKNOWN
    return f"{times:.2f} {'≤' if times <= BESIDE_OTHERS else '>'} {BESIDE_OTHERS:g}"
