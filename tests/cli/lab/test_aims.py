"""What a handover must reach: figures of runs beside their aims."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ikectx.errors import UsageError
from ikectx_cli.lab import aims
from ikectx_cli.lab.bench import alone, merge, read
from ikectx_cli.lab.page import page
from ikectx_cli.lab.scenario import names


def run(scenario: str, up: float, down: float, *, clock: str = "virtual", **more: Any) -> dict[str, Any]:
    """A report of a run, as far as figures are taken from it."""
    one = {"lost": 0, "late": 0, "lost_after_link": 0}
    anew = [("psk", 200.0), ("eap", 400.0)]
    return {
        "scenario": scenario,
        "ok": True,
        "clock": clock,
        "traffic": {
            "lost": 3,
            "causes": {"up: in flight": 1, "down: IpInAddrErrors at mn": 2},
            "beyond_dark_ms": {"up": up, "down": down},
            "round_trip_ms": 40.0,
            "up": one,
            "down": {**one, "lost": 2, "late": 7},
        },
        "baseline": [{"name": name, "beyond_dark_ms": {"up": ms, "down": ms / 2}} for name, ms in anew],
        "gateways_round_trip_ms": 2.0,
        **more,
    }


def test_round_trips_are_in_the_aim() -> None:
    (row,) = aims.judged([run("reactive", 7.0, 47.5)])
    found = row["figures"]
    assert found["up"] == {"is": 7.0, "aim": 7.0, "reached": True}
    assert found["down"] == {"is": 47.5, "aim": 47.0, "reached": False}
    assert found["psk"] == {"is": 4.2, "aim": 2.5, "reached": True}
    assert not row["reached"]


def test_a_real_clock_has_aims_of_its_own_and_medians() -> None:
    runs = [run("predictive", up, 60.0, clock="real") for up in (90.0, 29.0, 30.0)]
    (row,) = aims.judged(runs)
    assert (row["runs"], row["figures"]["up"]["is"], row["figures"]["up"]["aim"]) == (3, 30.0, 30)
    assert row["figures"]["down"]["aim"] == 80.0 and row["reached"]


def test_by_packet_is_measured_against_what_the_stock_charon_takes() -> None:
    stays = {"beyond_dark_ms": {"up": 150.0, "down": 190.0}}
    (known,) = aims.judged([run("by-packet", 150.0, 199.0, stays=stays)])
    assert [known["figures"][name]["aim"] for name in ("up", "down")] == [155.0, 195.0]
    (unknown,) = aims.judged([run("by-packet", 150.0, 190.0)])
    assert unknown["figures"]["up"]["reached"] is None


def test_what_the_mobile_nodes_kernel_dropped_was_not_lost_at_a_gateway() -> None:
    (row,) = aims.judged([run("handover", 5.0, 5.0)])
    assert row["figures"]["lost"]["is"] == 3 and not row["figures"]["lost"]["reached"]
    assert row["figures"]["lost_at_gateways"] == {"is": 1.0, "aim": 0.0, "reached": False}


def test_every_mode_has_a_scenario() -> None:
    assert set(aims.SCENARIOS) <= set(names())


def test_cells() -> None:
    assert aims.cell({"is": 4.0, "aim": 5.0, "reached": True}) == "4 ≤ 5"
    assert aims.cell({"is": 2.4, "aim": 4.0, "reached": False}, least=True) == "2.4 < 4"
    assert aims.cell({"is": 6.0, "aim": None, "reached": None}) == "6"
    assert aims.cell(None) == "–"


@pytest.mark.parametrize(
    ("modes", "word"),
    [
        ({}, "must be objects"),
        ([{}], "must have mode"),
        ([{"mode": "x", "scenario": "x", "runs": 1, "ok": 1, "reached": 1}], "must have reached"),
        (
            [{"mode": "x", "scenario": "x", "runs": 1, "ok": 1, "reached": True, "figures": {"up": 3}}],
            "figures.up must have",
        ),
    ],
)
def test_damaged_rows_are_named(modes: Any, word: str) -> None:
    assert word in aims.wrong(modes)


def test_the_page_shows_each_mode_beside_its_aim() -> None:
    machine = {"kernel": "7.2", "cpus": 1, "syscall_us": None, "thread_us": None}
    host = {"cpu": "x", "kernel": "6", "scheduled": "y", "cores": 2}
    found = {
        "command": "ikectx lab bench --handovers",
        **{"strongswan": "5.9.8", "guest": "uml", "clock": "virtual", "esp": "kernel"},
        **{"machine": machine, "host": host},
        "modes": aims.judged([run("predictive", 4.0, 60.0), run("handover", 5.0, 5.0)]),
    }
    assert read(json.dumps(found), "x.json") == alone("handovers", found)
    shown = page(merge({"x.json": alone("handovers", found)}, "c"))
    assert "| predictive | 4 ≤ 5 | 60 > 42 |" in shown
    assert "Virtual time, one run, a probe each 5 ms:" in shown
    finer = alone("handovers", {**found, "interval_ms": 0.5, "crowd": 7})
    assert "one run, a probe each 0.5 ms, 7 other SAs at each gateway:" in page(merge({"x.json": finer}, "c"))
    with pytest.raises(UsageError, match="interval_ms must be a number"):
        read(json.dumps({**found, "interval_ms": "x"}), "x.json")
    assert read(json.dumps(merge({"x.json": alone("handovers", found)}, "c")), "y.json")["handovers"]
