"""What `ikectx lab kills` found: JSON that can be put together, and the page docs/reliability.md. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ikectx.errors import UsageError

from .kill_cases import FAULTS, MODES, SECONDS, SELDOM, cases
from .page_parts import table

KEYS = {"command", "cases", "passed", "failed", "why", "ran", "commands", "strongswan", "guest", "clock"}


def summarise(reports: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    """What came of a run. why: of each case that failed. commands: those that an operator had to give, by
    case. ran: the names of all cases."""
    failed = [report for report in reports if not report["ok"]]
    asked = {
        report["scenario"]: [word for word in report.get("warnings", ()) if "was needed" in word]
        for report in reports
    }
    return {
        "command": command,
        "cases": len(reports),
        "passed": len(reports) - len(failed),
        "failed": [report["scenario"] for report in failed],
        "why": {report["scenario"]: report.get("error", "") for report in failed},
        "ran": [report["scenario"] for report in reports],
        "commands": {name: words for name, words in asked.items() if words},
        "strongswan": next((one["strongswan"] for one in reports if one.get("strongswan")), ""),
        "guest": next((one["guest"] for one in reports if one.get("guest")), ""),
        "clock": next((one["clock"] for one in reports if one.get("clock")), ""),
    }


def read(text: str, file: str) -> dict[str, Any]:
    """What --json printed. Errors: UsageError."""
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or not found.keys() >= KEYS:
            raise ValueError
        if not all(isinstance(name, str) for name in found["ran"]):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise UsageError(f"{file}: not what `ikectx lab kills --json` prints") from None
    return found


def merge(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One of several; of a case that ran more than once the last one counts."""
    why: dict[str, str] = {}
    ran: dict[str, None] = {}
    asked: dict[str, list[str]] = {}
    for one in summaries:
        for name in one["ran"]:
            ran[name] = None
            why.pop(name, None)
            asked.pop(name, None)
        why |= one["why"]
        asked |= one["commands"]
    return {
        "command": "\n".join(dict.fromkeys(one["command"] for one in summaries)),
        "cases": len(ran),
        "passed": len(ran) - len(why),
        "failed": sorted(why),
        "why": why,
        "ran": list(ran),
        "commands": asked,
        **{key: summaries[-1][key] for key in ("strongswan", "guest", "clock")},
    }


def page(found: Mapping[str, Any]) -> str:
    """The Markdown page."""
    parts = [
        "# Reliability",
        "Whatever takes part in a move is killed, cut off, hung or filled up at each of its points, with "
        "real charons and the kernel's ESP. The points are taken from the state tables and from the steps' "
        "own lists, so that a new effect, state or message brings its cases along.",
        f"{found['passed']} of {found['cases']} cases passed, of {len(cases())} that there are; strongSwan "
        f"{found['strongswan']}, {found['guest']}, {found['clock']} time:",
        f"```\n{found['command']}\n```",
        "A case has passed if, after everything runs again, each transfer ends by itself, or after the one "
        "command that `ikectx status` names at a gateway or the mobile node; a mobile node that was silent "
        "has been called back; exactly one gateway serves it; traffic flows both ways; both ends rekey the "
        "child and the IKE_SA; after the end of the SA no SA, policy, rule, route, row of the ledger or note "
        "is left; no packet left a gateway in the clear; and no ESP sequence number or IV of IKE was used "
        "twice under a key. Where a charon was killed, the mobile node may have to connect anew, because the "
        "SA ended with charon.",
        "## By mode and fault",
        "Passed / ran. A fault lasts " + ", ".join(f"{seconds:g}" for seconds in SECONDS) + " seconds.",
        _matrix(found),
        "## Modes",
        table(
            ("Mode", "What happens", "Cases"),
            [(name, mode.what, len(cases(name))) for name, mode in MODES.items()],
        ),
        *_failed(found["why"]),
        *_commands(found["commands"]),
        "## Effects without a case",
        table(("Effect", "Needed for"), [(f"`{name}`", what) for name, what in SELDOM.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _matrix(found: Mapping[str, Any]) -> str:
    rows = []
    for name, fault in FAULTS.items():
        cells = []
        for mode in MODES:
            ran = [one for one in found["ran"] if one.startswith(f"{mode}.") and one.endswith(f".{name}")]
            good = sum(one not in found["why"] for one in ran)
            cells.append(f"{good} / {len(ran)}" if ran else "")
        rows.append((fault.what, *cells))
    return table(("Fault", *MODES), rows)


def _failed(why: Mapping[str, str]) -> Iterable[str]:
    if why:
        yield "## Failed"
        lines = [(f"`{name}`", " ".join(text.split())[:300].replace("|", "/")) for name, text in why.items()]
        yield table(("Case", "Why"), lines)


def _commands(asked: Mapping[str, Sequence[str]]) -> Iterable[str]:
    if asked:
        yield "## Commands that were needed"
        yield table(("Case", "Command"), [(f"`{name}`", "; ".join(words)) for name, words in asked.items()])
