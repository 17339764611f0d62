"""What an attack on a lab's gateways has done: figures in, a report, tables and a row of the page out. Pure.

Every ratio is that of medians within one run: beside the attack against before and after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class AttackKind:
    """An attack. `rate`: datagrams, connections or messages a second where none is asked for. `most`:
    connections that it holds at a time, to each gateway."""

    what: str
    rate: float
    most: int = 0


KINDS = {
    "ctar-random": AttackKind("forged CTARs for SPIs that nobody has, from addresses that nobody has", 10000),
    "ctar-known": AttackKind(
        "forged CTARs with the SPIs of the mobile node's SA, from such addresses", 10000
    ),
    "ctar-mn": AttackKind("the same from the mobile node's own address", 10000),
    "ctar-cookie": AttackKind(
        "the same from 32 addresses of the attacker's, which returns the cookies it gets", 1000
    ),
    "garbage": AttackKind("datagrams that are no CTAR, from addresses that nobody has", 10000),
    "half-open": AttackKind("TCP connections on which nothing is sent, from 32 addresses", 500, 1500),
    "links": AttackKind(
        "TLS connections of a peer with a certificate of its own, on which nothing is sent", 50, 1000
    ),
    "flood": AttackKind("offers, contexts and requests of such a peer on one connection", 1000),
}

HOSTS = ("psg", "nsg")
LONGER = 2.0
"""At most so many times as long may a transfer and a handover take beside an attack."""
MORE = 1 << 20
"""Octets of memory that may stay taken after it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An agent at one moment: `memory` (VmRSS) and `log` and `state` (agent.out, state_dir) in octets, open
    `descriptors`, `cpu` time in seconds."""

    memory: int
    descriptors: int
    log: int
    state: int
    cpu: float


def figures(samples: Sequence[Sample], name: str) -> dict[str, int]:
    """Of a figure: before, at the most, and after."""
    values = [int(getattr(one, name)) for one in samples]
    return {"before": values[0], "most": max(values), "after": values[-1]}


def agent(samples: Sequence[Sample]) -> dict[str, Any]:
    """What an agent used, from before the attack until some time after it."""
    told = {name: figures(samples, name) for name in ("memory", "descriptors", "state")}
    log = samples[-1].log - samples[0].log
    return {**told, "log": log, "cpu_seconds": round(samples[-1].cpu - samples[0].cpu, 1)}


def missed(one: Mapping[str, Any]) -> list[str]:
    """What of a report is worse than it may be, in words; a peer's own flood may slow transfers down more."""
    found = []
    for name in ("transfer", "handover"):
        if failed := len(one[name]["beside"]["failed"]):
            found.append(f"{failed} of the {name}s beside the attack failed")
        if (ratio := one[name]["times"]) is not None and ratio > LONGER and one["attack"] != "flood":
            found.append(f"a {name} takes {ratio:g} times as long beside the attack, not at most {LONGER:g}")
    for host, agent in one["agents"].items():
        more = agent["memory"]["after"] - agent["memory"]["before"]
        if more > MORE:
            found.append(
                f"the agent of {host} holds {_mib(more)} MiB more afterwards, not at most {_mib(MORE)}"
            )
    return found


def times(none: Sequence[float], beside: Sequence[float]) -> float | None:
    """How many times as long as beside none it takes beside the attack."""
    if not none or not beside or not median(none):
        return None
    return round(median(beside) / median(none), 2)


def report(
    kind: str,
    asked: Mapping[str, float],
    sent: Mapping[str, Any],
    moves: Mapping[str, Mapping[str, Mapping[str, Sequence[Any]]]],
    samples: Mapping[str, Sequence[Sample]],
    answers_ms: Sequence[float],
    rest: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON of a run. `moves`: by transfer and handover, none and beside, `ms` and the words of those that
    `failed`. `answers_ms`: how long `ikectx status` waited beside the attack, inf where it got no answer."""
    answered = [one for one in answers_ms if one != float("inf")]
    return {
        "attack": kind,
        "what": KINDS[kind].what,
        **asked,
        "sent": dict(sent),
        **{
            name: {**one, "times": times(one["none"]["ms"], one["beside"]["ms"])}
            for name, one in moves.items()
        },
        "agents": {host: agent(found) for host, found in samples.items()},
        "status": {
            "asked": len(answers_ms),
            "no_answer": len(answers_ms) - len(answered),
            "median_ms": round(median(answered), 1) if answered else None,
            "longest_ms": round(max(answered), 1) if answered else None,
        },
        **rest,
    }


_MOVES = {"ms": "numbers", "failed": "texts"}
_MOVED = {"none": _MOVES, "beside": _MOVES, "times": "a number or null"}
_THREE = dict.fromkeys(("before", "most", "after"), "a number")
_AGENT = {
    **dict.fromkeys(("memory", "descriptors", "state"), _THREE),
    **dict.fromkeys(("log", "cpu_seconds"), "a number"),
}
SHAPE: Mapping[str, Any] = {
    **dict.fromkeys(("attack", "what", "code"), "a text"),
    **dict.fromkeys(("rate", "seconds"), "a number"),
    "sent": dict.fromkeys(("sent", "seconds", "cpu_seconds"), "a number"),
    "transfer": _MOVED,
    "handover": _MOVED,
    "agents": dict.fromkeys(HOSTS, _AGENT),
    "status": {
        **dict.fromkeys(("asked", "no_answer"), "a number"),
        **dict.fromkeys(("median_ms", "longest_ms"), "a number or null"),
    },
}
"""What `tables` and `page` look at in a report."""


def wrong(value: Any, shape: Any = SHAPE, where: str = "the attack") -> str:
    """What a report that was read from a file lacks; empty: nothing."""
    if isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            return f"{where} must be an object"
        found = (wrong(value.get(name), below, f"{where}.{name}") for name, below in shape.items())
        return next(filter(None, found), "")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    good = {
        "a text": isinstance(value, str),
        "a number": number,
        "a number or null": number or value is None,
        "numbers": isinstance(value, list) and all(isinstance(one, int | float) for one in value),
        "texts": isinstance(value, list) and all(isinstance(one, str) for one in value),
    }
    return "" if good[shape] else f"{where} must be {shape}"


# --- tables ----------------------------------------------------------------------------------------------


def _mib(octets: float) -> str:
    return f"{octets / (1 << 20):.1f}"


def _moved(one: Mapping[str, Any]) -> str:
    """Median beside none and beside the attack, in ms; how many failed there, if some did."""
    both = [f"{median(found['ms']):.0f}" if found["ms"] else "–" for found in (one["none"], one["beside"])]
    failed = len(one["beside"]["failed"])
    of = failed + len(one["beside"]["ms"])
    ratio = f" ({one['times']:.1f} times)" if one["times"] is not None else ""
    return " / ".join(both) + ratio + (f", {failed} of {of} failed" if failed else "")


def _three(one: Mapping[str, int], *, mib: bool) -> str:
    return " / ".join(_mib(one[name]) if mib else str(one[name]) for name in ("before", "most", "after"))


HEAD = (
    "attack",
    "sent",
    "of them a second",
    "CPU s",
    "transfer, ms",
    "the MN's handover, ms",
    "`status`, ms",
)
VICTIMS = ("attack", "agent", "memory, MiB", "descriptors", "state_dir, MiB", "log, KiB", "CPU s")


def row(one: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells below `HEAD` for one report."""
    sent, status = one["sent"], one["status"]
    lost = f", {status['no_answer']} of {status['asked']} without answer" if status["no_answer"] else ""
    asked = f"{status['median_ms']:.0f}, at most {status['longest_ms']:.0f}" if status["longest_ms"] else "–"
    count = sent.get("sent", 0)
    return (
        one["attack"],
        str(count)
        + "".join(f", {sent[name]} {name}" for name in ("held at most", "cut off") if sent.get(name)),
        f"{count / sent['seconds']:.0f}" if sent["seconds"] else "–",
        f"{sent['cpu_seconds']:.0f}",
        _moved(one["transfer"]),
        _moved(one["handover"]),
        asked + lost,
    )


def victims(one: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    """The cells below `VICTIMS` for one report, a line an agent."""
    for host, found in one["agents"].items():
        yield (
            one["attack"],
            host,
            _three(found["memory"], mib=True),
            _three(found["descriptors"], mib=False),
            _three(found["state"], mib=True),
            f"{found['log'] / 1024:.0f}",
            f"{found['cpu_seconds']:.0f}",
        )


BESIDE = (
    "One lab with real charons; the attacker is on a host of its own (mn2), which the gateways have as one "
    "more peer. *transfer* and *the MN's handover* (reactive, after a change of its access network): medians "
    "of those beside none (before the attack and after it) and beside the attack, in the same run, from the "
    "request to the answer; what failed is not in a median. A stock charon takes up to a second of its own. "
    "*`status`*: how long both agents' answers to `ikectx status` took, asked once a second. *CPU s* is what "
    "the attacker used: it shares two cores with three charons and three agents."
)
COST = (
    "Memory (resident set), open descriptors and state_dir: before the attack, at the most, 45 s after it. "
    "*log*: what the agent wrote meanwhile. state_dir holds a write-ahead log, which is not cut back."
)


def page(
    attacks: Sequence[Mapping[str, Any]],
) -> Iterable[tuple[tuple[str, ...], list[tuple[str, ...]], str]]:
    """Heads, rows and words of the page's tables."""
    if attacks:
        yield ("commit", *HEAD), [(one["code"], *row(one)) for one in attacks], BESIDE
        rows = [(one["code"], *cells) for one in attacks for cells in victims(one)]
        yield ("commit", *VICTIMS), rows, COST


def tables(one: Mapping[str, Any]) -> list[RenderableType]:
    """The report for a terminal."""
    from rich.table import Table

    first = Table(*(name.replace("`", "") for name in HEAD), title=f"{one['attack']}: {one['what']}")
    first.add_row(*row(one))
    second = Table(*VICTIMS, title="before / at the most / after")
    for cells in victims(one):
        second.add_row(*cells)
    failed = [
        f"{name}: {text}" for name in ("transfer", "handover") for text in one[name]["beside"]["failed"]
    ]
    return [first, second, *dict.fromkeys(failed), *missed(one)]
