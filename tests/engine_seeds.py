"""Try many seeds of `engine_world`:  python -m tests.engine_seeds --seeds 100000 --jobs 2 --json

`--world lost-stores`: those of `forgetful_world`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from tests.engine_world import MODES, World
from tests.forgetful_world import Forgetful

_CHUNK = 250
WORLDS = {"engine": World, "lost-stores": Forgetful}


def tried(seed: int, world: str = "engine") -> str:
    """What is wrong with that seed, in words; empty: nothing."""
    try:
        WORLDS[world](seed).run()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
    return ""


def some(first: int, count: int, world: str = "engine") -> dict[int, str]:
    """Those of these seeds that fail, and why."""
    logging.disable(logging.CRITICAL)
    try:
        return {seed: why for seed in range(first, first + count) if (why := tried(seed, world))}
    finally:
        logging.disable(logging.NOTSET)


def all_of(first: int, count: int, jobs: int, world: str) -> Iterator[dict[int, str]]:
    """The same in parts, in so many processes."""
    parts = [(at, min(_CHUNK, first + count - at), world) for at in range(first, first + count, _CHUNK)]
    if jobs == 1:
        yield from (some(*part) for part in parts)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(some, *zip(*parts, strict=True))


def main() -> int:
    """The exit code is 1 if a seed fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--world", choices=WORLDS, default="engine", help="what may go wrong")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    given = parser.parse_args()
    began, failed = time.monotonic(), {}
    for part in all_of(given.first, given.seeds, given.jobs, given.world):
        failed.update(part)
        if not given.json:
            for seed, why in part.items():
                print(f"seed {seed} ({MODES[seed % len(MODES)]}): {why}", flush=True)
    took = time.monotonic() - began
    if given.json:
        by_mode = Counter(MODES[seed % len(MODES)] for seed in failed)
        result = {
            "seeds": given.seeds,
            "first": given.first,
            "seconds": round(took, 1),
            "failed": len(failed),
        }
        print(json.dumps({**result, "by_mode": by_mode, "why": dict(list(failed.items())[:20])}))
    else:
        print(f"{given.seeds} seeds in {took:.1f} s, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
