"""One target in a process of its own, guided by coverage (atheris): the result is one line of JSON."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import atheris

HANG = 20
"""Seconds after which libFuzzer ends the process, with the input in the folder."""
OURS = ("ikectx", "vici_bridge", "mobike_ext", "ikectx_cli")
SETTLED = 0.2
"""Part of the inputs after which memory must not grow: caches are full by then."""


class Tried:
    """What came of the inputs so far. `inputs`: after how many it writes the result and ends the process."""

    def __init__(self, target: Any, inputs: int, folder: Path) -> None:
        self._target, self._inputs, self._folder = target, inputs, folder
        self._count, self._slowest, self._before = 0, 0.0, 0
        self._found: dict[str, dict[str, Any]] = {}

    def one(self, octets: bytes) -> None:
        began = time.thread_time()
        try:
            self._target.decode(octets)
        except self._target.errors as error:
            if not str(error).isprintable():
                self._note("text", "an error that is not escaped", octets)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = next((f for f in reversed(frames) if not f.filename.startswith(sys.prefix)), frames[-1])
            place = f"{Path(where.filename).name}:{where.lineno}"
            self._note(f"{type(error).__name__} {place}", f"{error}"[:200], octets)
        took = time.thread_time() - began
        if took > self._slowest:
            self._slowest = took
            (self._folder / "slowest").write_bytes(octets)
        self._count += 1
        if self._count == int(self._inputs * SETTLED):
            self._before = self._blocks()
        if self._count == self._inputs:
            self._end()

    def _note(self, what: str, text: str, octets: bytes) -> None:
        found = self._found.setdefault(what, {"text": text, "times": 0, "octets": octets.hex()})
        found["times"] += 1
        if len(octets) * 2 < len(found["octets"]):
            found["octets"], found["text"] = octets.hex(), text

    @staticmethod
    def _blocks() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    def _end(self) -> None:
        result = {
            "inputs": self._count,
            "slowest_ms": round(self._slowest * 1000, 1),
            "grown_blocks": self._blocks() - self._before,
            "found": self._found,
        }
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
        os._exit(0)


def main(name: str, inputs: int, folder: Path) -> None:
    with atheris.instrument_imports(include=list(OURS)):
        from .targets import TARGETS

    target = TARGETS[name]
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    longest = max(2048, 2 * max(map(len, target.seeds)))
    options = (f"-timeout={HANG}", f"-max_len={longest}", f"-artifact_prefix={folder}/", "-rss_limit_mb=4096")
    atheris.Setup([sys.argv[0], *options, str(corpus)], Tried(target, inputs, folder).one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
