"""Draws the state tables of the code as docs/states.md: each as a picture and as text.

    python -m tests.states            write docs/states.md anew
    python -m tests.states --check    exit code 1 if it is not what the code says now

The pictures are Mermaid state diagrams, which GitHub and GitLab draw from the text.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ikectx.engine import arrivals, tables
from ikectx.node import mobility
from mobike_ext import address_update, farewell, probe, rekey, responder, spi_update

PAGE = Path(__file__).resolve().parent.parent / "docs" / "states.md"

Row = tuple[str, str, str, tuple[str, ...]]
"""State, input, next state, actions."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One table: what it is, where it stands, where it begins and ends."""

    title: str
    what: str
    module: str
    rows: tuple[Row, ...]
    start: str
    final: frozenset[str]


def rows_of(table: Mapping[Any, Any]) -> tuple[Row, ...]:
    """The rows of a table (`ikectx.machine.Table`), those of a state together."""
    found = [
        (_word(state), _word(what), _word(after), tuple(map(_word, actions)))
        for (state, what), (after, *actions) in table.items()
    ]
    order = list(dict.fromkeys(state for state, *_ in found))
    return tuple(sorted(found, key=lambda row: order.index(row[0])))


def _word(one: Enum) -> str:
    return str(one.value) if isinstance(one.value, str) else one.name.lower().replace("_", "-")


def chart(
    title: str,
    what: str,
    module: Any,
    table: Mapping[Any, Any],
    final: Collection[Any] | None = None,
    start: str = "new",
) -> Chart:
    """`final`: the states that end it; without it those that no row leaves."""
    rows = rows_of(table)
    left = {state for state, _, after, _ in rows if state != after}
    ends = {after for _, _, after, _ in rows} - left if final is None else set(map(_word, final))
    return Chart(title, what, module.__name__, rows, start, frozenset(ends))


def charts() -> list[Chart]:
    """All state tables of the product."""
    return [
        chart(
            "The old gateway in a transfer",
            "It serves the mobile node until it has let go, and may take it back until the new one owns it.",
            tables,
            tables.SOURCE_TABLE,
            tables.SOURCE_FINAL,
        ),
        chart(
            "The new gateway in a transfer",
            "It checks and installs first, and owns the SA once it has the last counters of the old one.",
            tables,
            tables.TARGET_TABLE,
            tables.TARGET_FINAL,
        ),
        chart(
            "A request of a mobile node at the new gateway",
            "A CTAR (RFC 4067, 2.5.2) from its arrival to its answer.",
            arrivals,
            arrivals.ARRIVAL_TABLE,
        ),
        chart(
            "A mobile node that asks",
            "It may announce itself at the old gateway, and asks the new one when it is there.",
            mobility,
            mobility.MOBILE_TABLE,
        ),
        chart(
            "UPDATE_SA_ADDRESSES (RFC 4555)",
            "The new gateway tells the mobile node its address.",
            address_update,
            address_update.TABLE,
        ),
        chart(
            "UPDATE_SPI",
            "The new gateway agrees with the mobile node on other SPIs, because its own are taken.",
            spi_update,
            spi_update.TABLE,
        ),
        chart(
            "UPDATE_SPI, the end that is asked",
            "What an agent answers.",
            responder,
            responder.TABLE,
            start="listening",
        ),
        chart(
            "The rekey that stands in for UPDATE_SPI",
            "For peers that do not know UPDATE_SPI (RFC 7296, 2.8).",
            rekey,
            rekey.TABLE,
        ),
        chart(
            "The probe for a message ID",
            "An empty INFORMATIONAL request (RFC 7296, 1.4) finds out which message ID is next.",
            probe,
            probe.TABLE,
        ),
        chart(
            "The Delete that charon could not send",
            "An INFORMATIONAL request with D (RFC 7296, 1.4.1) for an SA that was ended in a handover.",
            farewell,
            farewell.TABLE,
        ),
    ]


def _name(state: str) -> str:
    """A state as Mermaid takes it."""
    return state.replace("-", "_").replace(" ", "_")


def picture(one: Chart) -> Iterable[str]:
    """The Mermaid diagram. What leads from a state to itself is in the text only."""
    yield "```mermaid"
    yield "stateDiagram-v2"
    yield f"    [*] --> {_name(one.start)}"
    ways: dict[tuple[str, str], list[str]] = {}
    for state, what, after, _ in one.rows:
        if state != after:
            ways.setdefault((state, after), []).append(what)
    for (state, after), inputs in ways.items():
        yield f"    {_name(state)} --> {_name(after)}: {', '.join(inputs)}"
    for state in dict.fromkeys(after for _, _, after, _ in one.rows):
        if state in one.final:
            yield f"    {_name(state)} --> [*]"
    yield "```"


def text(one: Chart) -> Iterable[str]:
    """The rows as a Markdown table, those of one state together."""
    acts = any(actions for *_, actions in one.rows)
    yield "| in state | when | to state |" + (" and then |" if acts else "")
    yield "| --- | --- | --- |" + (" --- |" if acts else "")
    before = ""
    for state, what, after, actions in one.rows:
        shown = "" if state == before else state
        yield f"| {shown} | {what} | {after} |" + (f" {', '.join(actions)} |" if acts else "")
        before = state


def page() -> str:
    """docs/states.md as the code has it."""
    lines = [
        "# State tables",
        "",
        "Drawn from the code by `python -m tests.states`; a test keeps this page current. Each machine is a",
        "literal table: what stands in none of its rows changes nothing, because it came late or twice, or",
        "is an error.",
        "[protocol.md](protocol.md) has the messages, [design.md](design.md) what each step does.",
    ]
    for one in charts():
        lines += [
            "",
            f"## {one.title}",
            "",
            f"{one.what} (`{one.module}`)",
            "",
            *picture(one),
            "",
            *text(one),
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    if argv == ["--check"]:
        current = PAGE.exists() and PAGE.read_text() == page()
        if not current:
            print(f"{PAGE.name} is not what the tables say: python -m tests.states", file=sys.stderr)
        return 0 if current else 1
    if argv:
        print(__doc__, file=sys.stderr)
        return 2
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
