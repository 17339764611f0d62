"""Adds up a report for run.sh: prints "passed failed skipped"; what was skipped or failed on standard error.

summary.py FILE.xml: JUnit, as pytest writes it. FILE.json: what `ikectx lab run --all --json` prints.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any


def junit(path: Path) -> tuple[int, int, int]:
    cases = list(ET.parse(path).getroot().iter("testcase"))
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skips = [skip for case in cases if (skip := case.find("skipped")) is not None]
    for reason, count in Counter(skip.get("message", "") for skip in skips).items():
        print(f"skipped {count}: {reason}", file=sys.stderr)
    return len(cases) - bad - len(skips), bad, len(skips)


def scenarios(path: Path) -> tuple[int, int, int]:
    reports: list[dict[str, Any]] = json.loads(path.read_text())
    good = bad = skipped = 0
    for report in reports:
        if report.get("skipped"):
            skipped += 1
            print(f"skipped {report['scenario']}: {report['skipped']}", file=sys.stderr)
        elif report.get("ok"):
            good += 1
        else:
            bad += 1
            print(
                f"failed {report['scenario']}: {report.get('error') or report.get('checks')}", file=sys.stderr
            )
    return good, bad, skipped


if __name__ == "__main__":
    given = Path(sys.argv[1])
    print(*(scenarios if given.suffix == ".json" else junit)(given))
