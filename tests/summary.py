"""Adds up a report for run.sh: prints "passed failed skipped", then lines: failures, places, reasons to skip.

summary.py FILE.xml: JUnit, as pytest writes it. FILE.json: what `ikectx lab run --all --json` or
`ikectx lab kills --json` prints.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WHERE = ("guest", "clock", "strongswan")
"""What a scenario's report tells of where it ran."""

WIDTH = 300
"""Characters of a line: more is in the log."""


@dataclass
class Sum:
    """What a report comes to."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """How often, by reason."""
    ran: Counter[str] = field(default_factory=Counter)
    """How many scenarios, by where."""

    def lines(self) -> Iterable[str]:
        yield f"{self.passed} {len(self.failed)} {self.skipped.total()}"
        for text in self.failed:
            yield f"failed {text}"
        for where, count in self.ran.items():
            yield f"ran {count}: {where}"
        for reason, count in self.skipped.items():
            yield f"skipped {count}: {reason}"


def junit(path: Path) -> Sum:
    found = Sum()
    for case in ET.parse(path).getroot().iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found.failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif skip is not None:
            found.skipped[skip.get("message", "")] += 1
        else:
            found.passed += 1
    return found


def scenarios(path: Path) -> Sum:
    found = Sum()
    told: dict[str, Any] | list[dict[str, Any]] = json.loads(path.read_text())
    if isinstance(told, dict) and "cases" in told:
        failed = [f"{name}: {told['why'][name]}" for name in told["failed"]]
        where = ", ".join(f"{name} {told.get(name) or '?'}" for name in WHERE)
        return Sum(told["passed"], failed, ran=Counter({where: told["cases"]}))
    for report in told if isinstance(told, list) else [told]:
        if not report.get("skipped"):
            found.ran[", ".join(f"{name} {report.get(name) or '?'}" for name in WHERE)] += 1
        if report.get("skipped"):
            found.skipped[report["skipped"]] += 1
        elif report.get("ok"):
            found.passed += 1
        else:
            found.failed.append(f"{report['scenario']}: {report.get('error')}")
    return found


def main(path: Path) -> int:
    try:
        found = (scenarios if path.suffix == ".json" else junit)(path)
    except (OSError, ValueError, ET.ParseError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    for line in found.lines():
        print(" ".join(line.split())[:WIDTH])
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
