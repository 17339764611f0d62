"""The engine's tables as Promela, the language of the model checker spin (spinroot.com), and spin's run.

The tables become two inlines, so a transition of the model is a row of the code's; `world.pml` has the rest
of the world. Sets of states become macros.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ikectx.engine import tables
from ikectx.engine.tables import (
    SourceAction,
    SourceInput,
    SourceState,
    TargetAction,
    TargetInput,
    TargetState,
)

WORLD = Path(__file__).parent / "world.pml"
SAYS_YES = (TargetState.HELD, TargetState.PREPARED, TargetState.OWNED)
"""States in which the new gateway's CTDR accepts."""
SOURCE_TIMERS = (SourceState.OFFERED, SourceState.ANNOUNCED, SourceState.AWAITING, SourceState.RELEASED)
TARGET_TIMERS = (TargetState.PREPARED, TargetState.HELD)

Table = Mapping[tuple[Any, Any], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What spin found. `states`: how many it visited. `trail`: the last steps before the error, if one."""

    errors: int
    states: int
    complete: bool
    trail: str = ""


def name(prefix: str, one: StrEnum) -> str:
    """The macro of one state, input or action."""
    return f"{prefix}_{one.name}"


def _numbers(prefix: str, kind: type[StrEnum], *, bits: bool = False) -> list[str]:
    return [f"#define {name(prefix, one)} {1 << n if bits else n}" for n, one in enumerate(kind)]


def _any(prefix: str, states: Collection[StrEnum]) -> str:
    return " || ".join(f"(x) == {name(prefix, one)}" for one in sorted(states)) or "false"


def _inline(title: str, letter: str, inputs: str, actions: str, table: Table) -> list[str]:
    lines = [f"inline {title}(i) {{", "\tif"]
    for (state, what), (after, *todo) in table.items():
        bits = "|".join(name(actions, one) for one in todo) or "0"
        lines.append(
            f"\t:: {letter.lower()} == {name(letter, state)} && (i) == {name(inputs, what)} -> "
            f"{letter.lower()} = {name(letter, after)}; {letter.lower()}_todo = {bits}"
        )
    return [*lines, "\t:: else -> skip", "\tfi", "}"]


def model(
    faults: int,
    source: Table = tables.SOURCE_TABLE,
    target: Table = tables.TARGET_TABLE,
) -> str:
    """The whole model with these tables; `faults`: how many things may go wrong in one run."""
    lines = [
        f"#define FAULTS {faults}",
        *_numbers("S", SourceState),
        *_numbers("SI", SourceInput),
        *_numbers("SA", SourceAction, bits=True),
        *_numbers("T", TargetState),
        *_numbers("TI", TargetInput),
        *_numbers("TA", TargetAction, bits=True),
        f"#define SERVES(x) ({_any('S', tables.SOURCE_SERVES)})",
        f"#define OWNS(x) ({_any('T', tables.TARGET_OWNS)})",
        f"#define S_IS_FINAL(x) ({_any('S', tables.SOURCE_FINAL)})",
        f"#define T_IS_FINAL(x) ({_any('T', tables.TARGET_FINAL)})",
        f"#define S_IS_DURABLE(x) ({_any('S', tables.SOURCE_DURABLE)})",
        f"#define T_IS_DURABLE(x) ({_any('T', tables.TARGET_DURABLE)})",
        f"#define S_IS_SOON(x) ({_any('S', tables.SOURCE_SOON)})",
        f"#define T_IS_SOON(x) ({_any('T', tables.TARGET_SOON)})",
        f"#define S_HAS_TIMER(x) ({_any('S', SOURCE_TIMERS)})",
        f"#define T_HAS_TIMER(x) ({_any('T', TARGET_TIMERS)})",
        f"#define T_SAYS_YES(x) ({_any('T', SAYS_YES)})",
        *_inline("source_table", "S", "SI", "SA", source),
        *_inline("target_table", "T", "TI", "TA", target),
        WORLD.read_text(),
    ]
    return "\n".join(lines) + "\n"


def rows(text: str) -> set[tuple[str, str, str, str]]:
    """The transitions that a model has: (state, input, next state, actions), by their macros' names."""
    row = re.compile(r":: [st] == ([ST]_\w+) && \(i\) == (\w+) -> [st] = (\w+); [st]_todo = ([\w|]+)")
    return set(row.findall(text))


def check(text: str) -> Verdict:
    """Let spin visit all states of a model: assertions, end states, cycles without progress.

    Errors: FileNotFoundError without spin or a C compiler; subprocess.CalledProcessError for a wrong model.
    """
    for tool in ("spin", "gcc"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not installed (Debian's package {tool})")
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        (where / "model.pml").write_text(text)
        _run(where, "spin", "-a", "model.pml")
        _run(
            where, "gcc", "-O0", "-DNP", "-DNOREDUCE", "-DMEMLIM=2048", "-DVECTORSZ=256", "-o", "pan", "pan.c"
        )
        told = _run(where, "./pan", "-l", "-m1000000", "-w22")
        errors = int(re.findall(r"errors: (\d+)", told)[0])
        states = int(re.findall(r"(\d+) states, stored", told)[0])
        trail = ""
        if errors:
            steps = _run(where, "spin", "-t", "-p", "-g", "model.pml").splitlines()
            trail = "\n".join([*re.findall(r"pan:\d+: .*", told), *steps[-120:]])
        return Verdict(errors, states, "max search depth too small" not in told, trail)


def _run(where: Path, *words: str) -> str:
    done = subprocess.run(words, cwd=where, check=False, capture_output=True, text=True)
    if done.returncode and words[0] != "./pan":
        raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
    return done.stdout + done.stderr
