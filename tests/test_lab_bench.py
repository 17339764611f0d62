"""Reports to medians, a page and a picture."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from ikectx_cli import lab_scenario
from ikectx_cli.lab_bench import MODES, SCENARIOS, page, picture, summarise
from ikectx_cli.lab_measure import parse_counters


def report(lost: int, gap: float, **changes: object) -> dict[str, Any]:
    base: dict[str, Any] = {
        "scenario": "handover",
        "ok": True,
        "esp": "kernel",
        "strongswan": "5.9.8",
        "traffic": {"lost": lost, "sent": 1000, "longest_gap_ms": gap, "causes": {"up: EPERM at mn": lost}},
        "air": {"messages": 2, "octets": 400},
        "gateways": {"messages": 4, "octets": 452},
        "phases_ms": {"export": 4.0, "confirm": gap},
        "baseline": [
            {
                "name": "psk",
                "title": "PSK",
                "interruption_ms": 10 * gap,
                "lost": 90,
                "messages": 6,
                "octets": 1900,
            }
        ],
        "ratio": 10.0,
    }
    return base | changes


def test_medians_and_each_runs_losses() -> None:
    summary = summarise([report(2, 10.0), report(0, 5.0), report(1, 30.0), report(9, 9.0, traffic=None)])
    row = summary["scenarios"]["handover"]
    assert (row["runs"], row["lost"], row["lost_median"], row["gap_ms"]) == (3, [2, 0, 1], 1, 10.0)
    assert row["causes"] == {"up: EPERM at mn": 3}
    assert row["phases_ms"] == {"export": 4.0, "confirm": 10.0}


def test_the_page_holds_command_losses_and_ratio() -> None:
    text = page(summarise([report(2, 10.0)]), "ikectx lab bench --runs 1")
    assert "ikectx lab bench --runs 1" in text
    assert "| handover | 5 | 2 | 2 | 10 | 2 | 400 | 4 | 452 |" in text
    assert "100 (10.0 x)" in text
    assert "MobiArch'08" in text


def test_the_table_of_mobiarch_has_their_rows_and_every_mode_of_this_run() -> None:
    away = report(9, 40.0, scenario="reactive", ratio=12.5)
    native = [report(9, 7.0, scenario="reactive")]
    own = page(summarise([away], native), "x").split("own speed")[1]
    assert "| reactive | 5 | 9 | 9 | 7 | 70 | 1 to 10.0 |" in own
    text = page(summarise([report(2, 10.0), away], native), "x").split("## The table of MobiArch'08")[1]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert [row.split(" | ")[1:4] for row in rows[:3]] == [
        ["1500", "11", "2182"],
        ["1300", "8", "1896"],
        ["20", "1", "106"],
    ]
    assert rows[3:] == [
        "| IKEv2 anew, PSK (handover) | 100 | 6 | 1900 |  |  |  |",
        "| IKEv2 anew, PSK (reactive) | 400 | 6 | 1900 |  | 70 |  |",
        "| push: psg sends | 10 | 2 | 400 | 1 to 10.0 |  |  |",
        "| reactive: the MN moves, tells nsg | 40 | 2 | 400 | 1 to 12.5 | 7 | 1 to 10.0 |",
    ]


def test_collisions_have_a_table_of_their_own() -> None:
    one = report(1, 10.0, scenario="collision-all", others={"mn2": {"lost": 3}}, baseline=[])
    text = page(summarise([report(2, 10.0), one]), "x")
    assert "| collision-all | 5 | 1 | 1 | 10 | 3 | 2 | 400 |" in text
    assert "| collision-all | ikectx" not in text
    lines = text.split("taken at nSG")[1].splitlines()
    head, row = lines[2], next(line for line in lines if line.startswith("| collision-all"))
    assert head.count("|") == row.count("|")
    assert "taken at nSG" not in page(summarise([report(2, 10.0)]), "x")


def test_every_mode_is_measured_and_is_there() -> None:
    assert set(MODES) <= set(SCENARIOS)
    assert set(SCENARIOS) <= set(lab_scenario.names())


def test_the_picture_is_a_picture() -> None:
    root = ElementTree.fromstring(picture(summarise([report(2, 10.0)])))
    assert len(root.findall("{http://www.w3.org/2000/svg}rect")) == 2


def test_drop_counters_of_three_files() -> None:
    text = (
        "XfrmInNoStates          \t7\nIp: Forwarding InAddrErrors InDiscards\nIp: 2 5 0\nTcp: 1 2\nTcp: 3 4\n"
        "Ip6InReceives                   \t99\nIp6InAddrErrors                 \t3\n"
    )
    assert parse_counters(text) == {"XfrmInNoStates": 7, "IpInAddrErrors": 5, "Ip6InAddrErrors": 3}
