"""What an agent's CPU time goes into, by samples."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ikectx_cli.lab.sampled import LOOP, PARTS, part

ROUND = ("asyncio.base_events", "_run_once")


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        ([("selectors", "select"), ROUND, ("ikectx_cli.service", "run")], LOOP),
        ([("asyncio.events", "_run"), ROUND], LOOP),
        (
            [
                ("asyncio.base_events", "call_soon"),
                ("ikectx.driver", "pump"),
                ("asyncio.events", "_run"),
                ROUND,
            ],
            "engine and driver",
        ),
        ([("json", "dumps"), ("ikectx.disk.journal_rows", "write")], "store, journal and audit log"),
        ([("vici_bridge.vici.client", "list_sas")], "VICI"),
        ([("vici_bridge.vici.control", "send")], "the operator's socket and the log"),
        ([("logging", "emit"), ("vici_bridge.away.absences", "left")], "the operator's socket and the log"),
        ([("vici_bridge.host", "view")], "the steps and their runner"),
        ([("mobike_ext", "f")], "the exchange with the mobile node"),
        ([("ikectxy", "f")], LOOP),
        ([], LOOP),
    ],
)
def test_a_sample_counts_for_the_innermost_part_of_the_product(
    stack: list[tuple[str, str]], expected: str
) -> None:
    assert part(stack) == expected


def test_parts_are_named_after_what_there_is() -> None:
    named = [name for names in PARTS.values() for name in names]
    assert len(set(named)) == len(named)
    assert [name for name in named if importlib.util.find_spec(name) is None] == []


def test_a_process_that_is_sampled_writes_all_the_time_it_used(tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
from pathlib import Path
from ikectx.wire import cbor
from ikectx_cli.lab import sampled
sampled.sample(Path(sys.argv[1]))
os.kill(os.getpid(), signal.SIGUSR1)
end = time.process_time() + 0.2
while time.process_time() < end:
    cbor.dumps({1: list(range(100))}, "numbers")
os.kill(os.getpid(), signal.SIGUSR2)
"""
    file = tmp_path / "samples.json"
    subprocess.run([sys.executable, "-c", program, str(file)], check=True)
    spent = json.loads(file.read_text())
    assert list(spent) == list(PARTS) and [one.name for one in tmp_path.iterdir()] == ["samples.json"]
    # the last tick is not over yet
    assert 100 < sum(spent.values()) < 1000
    assert spent["contexts and messages to octets and back"] > 50
