"""One target in a process of its own, guided by coverage (atheris, which is libFuzzer in Python)."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import atheris

OURS = ("ikectx", "vici_bridge", "mobike_ext", "ikectx_cli")
with (
    contextlib.redirect_stderr(io.StringIO()),  # a line for each module
    atheris.instrument_imports(include=list(OURS)),  # before anything else has imported them
):
    from .targets import TARGETS

HANG = 20
"""Seconds after which libFuzzer ends the process, with the input in the folder."""
SETTLED = 0.2
"""Part of the inputs after which memory must not grow: caches are full by then."""


class Lines(logging.Handler):
    """Makes each line of the log, and writes none."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()


class Tried:
    """What came of the inputs so far. `inputs`: after how many it tells the result and ends the process."""

    def __init__(self, name: str, inputs: int, folder: Path, tell: Connection) -> None:
        self._target, self._inputs, self._folder, self._tell = TARGETS[name], inputs, folder, tell
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
        self._tell.send(
            {
                "inputs": self._count,
                "seconds": round(time.process_time(), 1),
                "slowest_ms": round(self._slowest * 1000, 1),
                "grown_blocks": self._blocks() - self._before,
                "found": self._found,
            }
        )
        self._tell.close()
        os._exit(0)


def run(name: str, inputs: int, folder: Path, tell: Connection) -> None:
    """Never returns. What libFuzzer says goes to the folder's log."""
    with (folder / "log").open("w") as log:
        os.dup2(log.fileno(), 2)
    logging.basicConfig(handlers=[Lines()], force=True)
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    seeds = TARGETS[name].seeds
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    longest = max(2048, 2 * max(map(len, seeds)))
    options = (f"-timeout={HANG}", f"-max_len={longest}", f"-artifact_prefix={folder}/", "-rss_limit_mb=4096")
    atheris.Setup([sys.argv[0], *options, str(corpus)], Tried(name, inputs, folder, tell).one)
    atheris.Fuzz()
