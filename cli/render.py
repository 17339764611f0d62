"""Output for people and programs: JSON without secrets, tables, times.

Nothing here imports rich at the top: on a pipe, tables are plain columns, and an agent needs JSON only.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from ikectx.escape import escaped
from ikectx.sa.context import Endpoint, Identity, IkeContext, ReplayState, Secret, TrafficSelector


def dump(value: object, *, indent: int | None = None) -> str:
    r"""JSON text; what is not printable in its strings is written as \uNNNN, as terminals obey some of it.

    Raises TypeError for a `Secret`, and for anything else that is not plain data.
    """
    text = json.dumps(value, indent=indent, default=_plain, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)


def _plain(value: object) -> object:
    if isinstance(value, Secret):
        raise TypeError("a secret must not go into JSON")
    if isinstance(value, Endpoint | Identity | IPv4Address | IPv6Address | Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} must not go into JSON")


def context_json(context: IkeContext, *, secrets: bool = False) -> dict[str, Any]:
    """A context as plain data. Keys and secrets are named but not shown, unless `secrets`.

    With `secrets` the SK_* of each generation and the keys of each CHILD_SA are derived and shown too.
    """
    shown: dict[str, Any] = {
        "spi_i": context.spis.spi_i.hex(),
        "spi_r": context.spis.spi_r.hex(),
        **_data(context, secrets),
    }
    if not secrets:
        shown["unknown"] = [{"fpt": fpt, "key": key, "octets": len(raw)} for fpt, key, raw in context.unknown]
        return shown
    from ikectx.sa.keys import child_keys, sk_keys, skeyseed

    for generation, out in zip(context.generations, shown["generations"], strict=True):
        derived = _data(sk_keys(generation), secrets)
        out["keys"] = {"skeyseed": skeyseed(generation).reveal().hex(), **derived}
    for child, out in zip(context.children, shown["children"], strict=True):
        out["keys"] = _data(child_keys(context.generations[child.generation], child), secrets)
    return shown


def _data(value: object, secrets: bool) -> Any:
    """Plain data of dataclasses, enums (by name), octets (hexadecimal), addresses and identities."""
    if isinstance(value, Secret):
        if not len(value):
            return None
        return value.reveal().hex() if secrets else f"<secret, {len(value)} octets>"
    if isinstance(value, TrafficSelector):
        return selector_text(value)
    if isinstance(value, ReplayState):
        return {"seq": value.seq, "window": value.window, "bitmap": hex(value.bitmap), "esn": value.esn}
    if isinstance(value, Endpoint | Identity | IPv4Address | IPv6Address):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Enum):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _data(getattr(value, field.name), secrets) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_data(item, secrets) for item in value]
    return value


def selector_text(selector: TrafficSelector) -> str:
    """As swanctl writes it: 10.0.0.0/24, 10.0.0.1-10.0.0.9, with [protocol/ports] if it is limited."""
    from ipaddress import summarize_address_range

    start, end = selector.start, selector.end
    networks = list(summarize_address_range(start, end)) if int(start) <= int(end) else []
    text = str(networks[0]) if len(networks) == 1 else f"{start}-{end}"
    if selector.protocol or (selector.start_port, selector.end_port) != (0, 65535):
        ports = f"/{selector.start_port}"
        if selector.end_port != selector.start_port:
            ports = (
                ""
                if (selector.start_port, selector.end_port) == (0, 65535)
                else f"{ports}-{selector.end_port}"
            )
        text += f"[{selector.protocol}{ports}]"
    return text + (" dynamic" if selector.dynamic else "")


def duration(seconds: object) -> str:
    """Seconds as people read them: 45 s, 12 min, 3 h 20 min, 2 d 4 h; a dash for nothing."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        return "-"
    left = int(abs(seconds))
    sign = "-" if seconds < 0 else ""
    if left < 120:
        return f"{sign}{left} s"
    if left < 7200:
        return f"{sign}{left // 60} min"
    if left < 172800:
        return f"{sign}{left // 3600} h {left % 3600 // 60} min"
    return f"{sign}{left // 86400} d {left % 86400 // 3600} h"


def when(seconds: object) -> str:
    """Seconds since 1970 as local date and time."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        return "-"
    from datetime import datetime

    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return "-"


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    styles: Mapping[str, str] | None = None,
    wraps: str = "",
) -> None:
    """A table on standard output: with lines and colours on a terminal, else columns that never wrap.

    A terminal that is too narrow for the columns gets a paragraph for each row, in which each value stands
    after its header. `styles`: colour of a cell by its text. `wraps`: the header of a column of prose, which
    may take several lines in the table.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        print(columns(headers, cells))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    needed = sum(
        min(width, PROSE) if header == wraps else width for header, width in zip(headers, widths, strict=True)
    )
    if needed + 3 * len(headers) + 1 > console.width:
        for row in cells:
            lines = paragraph(headers, row, console.width)
            text = Text("\n".join(lines))
            for header, cell in zip(headers, row, strict=True):
                if style := (styles or {}).get(cell):
                    text.highlight_words([f"{header} {cell}"], style)
            console.print(text, soft_wrap=True)
        return
    out = Table(header_style="bold")
    for header in headers:
        out.add_column(header, no_wrap=header != wraps, overflow="fold")
    for row in cells:
        out.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in row))
    console.print(out)


PROSE = 24
"""Characters that a line of a column of prose must have at the least."""


def paragraph(headers: Sequence[str], row: Sequence[str], width: int) -> list[str]:
    """A row as lines of at most `width`: each value after its header, those without a value left out."""
    from textwrap import wrap

    lines: list[str] = []
    for header, value in zip(headers, row, strict=True):
        if value == "-":
            continue
        part = f"{header} {value}".strip()
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            indentation = "    " if lines else ""
            lines += wrap(part, width, initial_indent=indentation, subsequent_indent="        ")
    return lines


def columns(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Headers and rows as columns, two spaces apart."""
    lines = [headers, *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(headers))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    if value is None or value in ("", [], ()):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return printable(value)


def printable(value: object, keep: str = "") -> str:
    """The text without characters that control a terminal; for all text from a peer or a mobile node.

    `keep`: characters that are left as they are all the same.
    """
    return escaped(str(value), keep)


def say(text: str) -> None:
    """Print one line, parts of which may come from outside."""
    print(printable(text))


def tree(value: Mapping[str, Any], indent: int = 0) -> str:
    """Nested data as indented `key: value` lines."""
    lines: list[str] = []
    pad = "  " * indent
    for name, item in value.items():
        key = printable(name)
        if isinstance(item, Mapping):
            lines.append(f"{pad}{key}:")
            lines.append(tree(item, indent + 1))
        elif isinstance(item, list | tuple) and item and all(isinstance(part, Mapping) for part in item):
            for number, part in enumerate(item):
                lines.append(f"{pad}{key}[{number}]:")
                lines.append(tree(part, indent + 1))
        else:
            lines.append(f"{pad}{key}: {_cell(item)}")
    return "\n".join(line for line in lines if line)


def show_path(steps: Sequence[Mapping[str, Any]]) -> None:
    """Print the steps of a transfer on the clock of the host that reports them; nothing where it has none."""
    if steps:
        rows = [
            (one.get("step"), one.get("host"), f"{one.get('start_ms', 0):.1f}", f"{one.get('end_ms', 0):.1f}")
            for one in steps
        ]
        table(("step", "host", "start, ms", "end, ms"), rows)
