"""Handovers beside more and more other SAs: what is asked, told, and shown on the page."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ikectx.errors import UsageError
from ikectx_cli.commands import run
from ikectx_cli.lab import many_others
from ikectx_cli.lab.bench import alone, merge, read
from ikectx_cli.lab.page import page

CPU = {"mn": 5.0, "psg": 20.0, "nsg": 30.5}
WHERE = {
    "esp": "libipsec",
    "strongswan": "5.9.8",
    "guest": "host",
    "clock": "real",
    "machine": {"kernel": "6.1.0", "cpus": 2, "syscall_us": 0.2, "thread_us": 13.0},
    "host": {"cpu": "Some CPU", "cores": 2, "kernel": "6.1.0", "scheduled": "like others, on 2"},
}


def a_run(up: float, down: float, lost: int = 1, **changes: object) -> dict[str, Any]:
    """The report of a run."""
    traffic = {
        "beyond_dark_ms": {"up": up, "down": down},
        "causes": {},
        "lost": lost,
        "up": {"late": 0},
        "down": {"late": 0, "lost": lost},
    }
    return {"ok": True, "traffic": traffic, "cpu_ms": CPU, "charon_ms": CPU, **changes}


def a_row(sas: int, mode: str, *gaps: tuple[float, float]) -> dict[str, Any]:
    return {"sas": sas, "mode": mode, **many_others.medians([a_run(*gap) for gap in gaps])}


def measured() -> dict[str, Any]:
    rows = [
        *(a_row(1, "push", (5.0, 20.0), (6.0, 22.0), (5.0, 21.0)), a_row(1, "reactive", (50.0, 60.0))),
        *(a_row(100, "push", (5.0, 35.0)), a_row(100, "reactive", (51.0, 72.0))),
    ]
    return {"runs": 3, "interval_ms": 5.0, "rows": many_others.compared(rows), **WHERE}


def bench(*words: str) -> int:
    return run(["lab", "bench", *words])


def test_rows_have_medians_and_times_the_first() -> None:
    push, _, more, reactive = measured()["rows"]
    assert (push["up"], push["down"], push["runs"], push["ok"]) == (5.0, 21.0, 3, 3)
    assert (push["times"], push["reached"]) == ({"up": 1.0, "down": 1.0}, True)
    assert (more["times"], more["reached"]) == ({"up": 1.0, "down": 1.67}, False)
    assert (reactive["times"], reactive["reached"]) == ({"up": 1.02, "down": 1.2}, True)
    assert push["cpu_ms"] == CPU


def test_a_run_that_measured_nothing_is_counted_and_reaches_nothing() -> None:
    failed = a_run(1.0, 1.0, ok=False, traffic=None, cpu_ms=None, charon_ms=None)
    told = {"sas": 1, "mode": "push", **many_others.medians([failed])}
    assert (told["runs"], told["ok"], told["up"], told["cpu_ms"]) == (1, 0, None, None)
    (row,) = many_others.compared([told])
    assert (row["times"], row["reached"]) == ({"up": None, "down": None}, False)
    made = {**measured(), "command": "x", "rows": [row]}
    assert "| push | 1 | – | – | – | – | – |" in page(read(json.dumps(made), "x.json"))


def test_the_page_has_each_mode_from_few_to_many() -> None:
    made = {**measured(), "command": "ikectx lab bench --others 1 --others 100"}
    assert read(json.dumps(made), "x.json") == alone("others", made)
    merged = merge({"x.json": alone("others", made)}, "c")
    assert read(json.dumps(merged), "all.json")["others"] == merged["others"]
    text = page(merged)
    assert "natively, ESP in user space, real time, medians of 3 runs, a probe each 5 ms:" in text
    lines = [line for line in text.splitlines() if line.startswith(("| push |", "| reactive |"))]
    cpu = "20, 30, 5"
    assert lines == [
        f"| push | 1 | 5 | 21 | 1.00 ≤ 1.2 | 1.00 ≤ 1.2 | 1 | {cpu} | {cpu} |",
        f"| push | 100 | 5 | 35 | 1.00 ≤ 1.2 | 1.67 > 1.2 | 1 | {cpu} | {cpu} |",
        f"| reactive | 1 | 50 | 60 | 1.00 ≤ 1.2 | 1.00 ≤ 1.2 | 1 | {cpu} | {cpu} |",
        f"| reactive | 100 | 51 | 72 | 1.02 ≤ 1.2 | 1.20 ≤ 1.2 | 1 | {cpu} | {cpu} |",
    ]
    assert "With other SAs" not in page(merge({"a": {**alone("others", made), "others": []}}, "c"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": 1}, "rows must be objects"),
        ({"rows": [{}]}, r"rows\.0\.sas must be a number"),
        ({"runs": "3"}, "runs must be a number"),
        ({"machine": {}}, r"machine\.kernel must be text"),
    ],
)
def test_a_file_that_holds_something_else(changes: dict[str, Any], says: str) -> None:
    made = {**measured(), "command": "x", **changes}
    with pytest.raises(UsageError, match=says):
        read(json.dumps(made), "x.json")


def test_the_command_says_what_ran_and_whether_the_aim_was_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def fake(sizes: Any, *words: object, say: object, **more: object) -> dict[str, Any]:
        asked.append((*sizes, *words, *more.values()))
        return measured()

    monkeypatch.setattr(many_others, "run", fake)
    words = ("--others", "1", "--others", "100", "--runs", "3", "--esp", "libipsec", "--json")
    assert bench(*words) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["command"] == "ikectx lab bench --others 1 --others 100 --runs 3 --esp libipsec"
    assert asked == [(1, 100, 3, "auto", "real", True, 5.0)]
    assert bench(*words[:4], "--probe", "1") == 1
    assert "## With other SAs at both gateways" in capsys.readouterr().out
    assert asked[1] == (1, 100, 5, "auto", "real", False, 1.0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--others", "1", "handover"), "--others goes without scenarios"),
        (("--others", "1", "--drain", "3"), "goes without scenarios"),
        (("--others", "1", "--others", "2", "--handovers"), "--handovers takes --others once"),
        (("--others", "1", "--profile"), "--profile is of --drain and --moves"),
    ],
)
def test_what_does_not_go_with_others(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*words) == 2
    assert says in capsys.readouterr().err
