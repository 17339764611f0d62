"""The critical path of a handover: what packets waited for, and how it is drawn."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from ikectx_cli.lab import critical, critical_chart
from ikectx_cli.lab.critical import Leg, counts, more, most, paths, rows
from ikectx_cli.lab.report import ScenarioReport
from ikectx_cli.lab.scenario import Scenario
from ikectx_cli.lab.trace import CXTP, TLS, Arrow, LinkChange, ProbeFlow, Span, TimeLine

STEPS = (
    Span("mn", "announce", "step", 0, 5),
    Span("mn", "quiet", "step", 11, 13),
    Span("mn", "vici list-sas", "call", 11.5, 12),
    Span("nsg", "prepare", "step", 33, 40),
    Span("nsg", "counters", "part", 38, 40),
    Span("nsg", "netlink XFRM", "call", 38, 39),
    Span("nsg", "netlink XFRM", "call", 39, 39.5),
    Span("nsg", "journal", "call", 50, 51),
    Span("psg", "release", "step", 60, 90),
)
ARROWS = (
    Arrow("mn", "nsg", "CTAR", CXTP, 13, 33, 90),
    Arrow("mn", "nsg", "CTAR", CXTP, 14, None, 90),
    Arrow("nsg", "mn", "CTAA", CXTP, 40, 60, 90),
    Arrow("nsg", "psg", "CTDR", TLS, 41, 42, 90),
)
MOVED = TimeLine(
    "x",
    0,
    100,
    STEPS,
    ARROWS,
    (LinkChange("moves", 10, 10.5),),
    ProbeFlow(last=30, first=85, transit=20),
    ProbeFlow(),
)


def test_it_leads_back_over_hosts_to_the_change_of_the_link() -> None:
    assert paths(MOVED) == {
        "up": [
            Leg("mn", "waits", 10, 11),
            Leg("mn", "quiet", 11, 13),
            Leg("mn", "CTAR", 13, 33, "nsg"),
            Leg("nsg", "prepare", 33, 40),
            Leg("nsg", "CTAA", 40, 60, "mn"),
            Leg("mn", "waits", 60, 65),
            Leg("mn", critical.FIRST, 65, 85, "srv"),
        ]
    }


def test_where_no_packet_waits_it_is_that_of_the_whole_move() -> None:
    line = TimeLine("x", 0, 100, STEPS, ARROWS)
    found = paths(line)
    assert list(found) == ["done"] and found["done"][-1] == Leg("psg", "release", 60, 90)


def test_messages_on_the_path_and_calls_meanwhile_are_counted() -> None:
    assert counts(MOVED) == {
        "mn > nsg CTAR": {"times": 1},
        "mn quiet": {"vici": 1},
        "nsg > mn CTAA": {"times": 1},
        "nsg prepare": {"netlink": 2},
    }


def test_what_is_more_than_allowed_is_named_with_its_step() -> None:
    allowed = counts(MOVED)
    assert list(more(counts(MOVED), allowed)) == []
    now = {**allowed, "nsg prepare": {"netlink": 3, "vici": 1}, "nsg > psg CT-Req": {"times": 1}}
    assert list(more(now, allowed)) == [
        "critical path: nsg prepare: 3 calls of netlink, allowed are 2",
        "critical path: nsg prepare: 1 calls of vici, allowed are 0",
        "critical path: nsg > psg CT-Req: 1 messages, allowed are 0",
    ]
    assert most([allowed, now])["nsg prepare"] == {"netlink": 3, "vici": 1}


@pytest.mark.parametrize(
    ("stolen", "traced", "ok"), [(False, True, False), (True, True, True), (False, False, True)]
)
def test_a_run_in_virtual_time_fails_with_the_step_that_does_more(
    stolen: bool, traced: bool, ok: bool
) -> None:
    path = {**counts(MOVED), "nsg prepare": {"netlink": 1}}
    scenario = Scenario("x", "", (), path=path)
    report = ScenarioReport("x", trace=[MOVED.as_json()] if traced else [])
    report.judge(scenario, stolen=stolen)
    assert report.ok == ok and ("nsg prepare: 2 calls of netlink" in report.error) != ok


def test_a_table_and_a_picture() -> None:
    path = {way: [leg.as_json() for leg in legs] for way, legs in paths(MOVED).items()}
    assert rows(path)[2] == ("", "mn > nsg", "CTAR", "13.0", "33.0")
    drawn = critical_chart.picture([{"mode": "a & b", "path": path}, {"mode": "none"}])
    texts = [one.text for one in ElementTree.fromstring(drawn).iter() if one.text]
    assert "a & b, 75 ms" in texts and "prepare, 23.0 to 30.0 ms" in texts and "none" not in str(texts)


def test_what_both_ways_begin_with_is_told_once() -> None:
    path = {way: [leg.as_json() for leg in legs] for way, legs in paths(MOVED).items()}
    other = {"host": "nsg", "step": "waits", "start_ms": 40.0, "end_ms": 44.0, "target": ""}
    lines = rows({**path, "down": [*path["up"][:4], other]})
    assert lines[-1] == ("down, then", "nsg", "waits", "40.0", "44.0") and len(lines) == 8
