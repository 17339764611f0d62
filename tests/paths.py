"""Counts what the critical paths of handovers consist of, and writes it beside the scenarios: path.json.

    python -m tests.paths [SCENARIO...]     of all that have a path.json, else of those named

Each runs `RUNS` times in virtual time, and the largest numbers count. A run that is traced (`ikectx lab run
--time virtual --trace`) then fails where its critical path has more messages, or calls of charon and kernel.
"""

from __future__ import annotations

import json
import subprocess
import sys

from ikectx_cli.lab.critical import counts, most
from ikectx_cli.lab.scenario import FOLDER
from ikectx_cli.lab.trace import TimeLine

RUNS = 3


def main(names: list[str]) -> int:
    names = names or sorted(path.parent.name for path in FOLDER.glob("*/path.json"))
    words = [sys.executable, "-m", "ikectx_cli.main", "lab", "run", *names, "--repeat", str(RUNS), "--brief"]
    words += ["--time", "virtual", "--trace", "build", "--json"]
    reports = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=False).stdout)
    failed = 0
    for name in names:
        # what stands in the file now is no reason to fail
        good = [
            one
            for one in reports
            if one["scenario"] == name and (one["ok"] or one["error"].startswith("critical path: "))
        ]
        failed += RUNS - len(good)
        if len(good) == RUNS:
            found = most(counts(TimeLine.from_json(one["trace"][0])) for one in good)
            (FOLDER / name / "path.json").write_text(json.dumps(found, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
