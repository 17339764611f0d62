"""Prints "passed failed skipped" of a JUnit report, and on standard error why tests were skipped."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import Counter


def main(path: str) -> None:
    cases = list(ET.parse(path).getroot().iter("testcase"))
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skips = [skip for case in cases if (skip := case.find("skipped")) is not None]
    for reason, count in Counter(skip.get("message", "") for skip in skips).items():
        print(f"skipped {count}: {reason}", file=sys.stderr)
    print(len(cases) - bad - len(skips), bad, len(skips))


if __name__ == "__main__":
    main(sys.argv[1])
