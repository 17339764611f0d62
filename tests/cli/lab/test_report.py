"""Reports: their keys, what makes one fail, and how they look."""

from __future__ import annotations

import io
import json
from typing import Any

from rich.console import Console

from ikectx_cli.lab.config import Tunnel
from ikectx_cli.lab.measure import Direction, Traffic
from ikectx_cli.lab.report import ScenarioReport, label, repeated, summary, tables
from ikectx_cli.lab.scenario import Scenario

KEYS = {"scenario", "ok", "esp", "strongswan", "same_spis", "same_keys", "traffic", "air", "gateways"}
KEYS |= {"phases_ms", "cpu_ms", "charon_ms", "baseline", "ratio", "ratio_beyond_dark"}

MOVE = {"from": "psg", "to": "nsg", "phases_ms": {"export": 4.0}, "cxtp_messages": 4, "cxtp_octets": 452}
AIR = {"messages": 2, "octets": 370, "by_exchange": {"INFORMATIONAL": 2}}

NOTHING: dict[str, list[dict[str, Any]]] = {"psg": [], "nsg": []}
ONE = {"interface": "eth0", "from": "10.3.0.10", "to": "10.4.0.10", "protocol": 17, "packets": 7}
LEFT = {"psg": [ONE, {**ONE, "interface": "lan0"}], "nsg": []}


def scenario(**keys: Any) -> Scenario:
    return Scenario("handover", "a move", (("connect",),), **keys)


def traffic(gap: float, *, lost: int = 0, recovered: bool = True, down: float = 5.0) -> Traffic:
    one = Direction(100, {"EPERM": lost} if lost else {}, 0, 0, gap, recovered, transit_ms=20.0)
    return Traffic(one, Direction(100, {}, 0, 0, down, True, transit_ms=20.0))


def moved(gap: float = 20.0, *, lost: int = 2) -> ScenarioReport:
    report = ScenarioReport("handover", "a move", "kernel", strongswan="5.9.8")
    report.add_traffic(traffic(gap, lost=lost), AIR, 0)
    report.add_transfer([MOVE])
    report.add_proof(True, True)
    return report


def shown(report: ScenarioReport) -> str:
    out = io.StringIO()
    console = Console(width=200, file=out)
    for part in tables(report.as_json()):
        console.print(part)
    console.print(summary([report.as_json()]))
    return out.getvalue()


def test_a_good_move() -> None:
    report = moved()
    report.add_baseline("psk", "PSK", traffic(300.0, lost=60), AIR, 250.0, LEFT)
    report.add_baseline("eap", "EAP", traffic(500.0, lost=90), AIR, 450.0, NOTHING)
    report.judge(scenario(lost=4))
    value = json.loads(json.dumps(report.as_json()))
    assert report.ok and set(value) >= KEYS and "error" not in value
    assert value["gateways"] == {"messages": 4, "octets": 452} and value["phases_ms"] == {"export": 4.0}
    assert value["ratio"] == 15.0
    assert [(one["name"], one["interruption_ms"], one["lost"]) for one in value["baseline"]] == [
        ("psk", 300.0, 60),
        ("eap", 500.0, 90),
    ]
    assert [one["clear"] for one in value["baseline"]] == [{"psg": 14, "nsg": 0}, {"psg": 0, "nsg": 0}]
    text = shown(report)
    assert all(
        words in text for words in ("2 of 200", "452 octets", "the same", "2 up: EPERM at mn", "15.0")
    ), text


def test_where_the_node_stays_its_link_is_never_dark() -> None:
    report = moved()
    report.add_baseline("psk", "PSK", traffic(300.0, lost=60), AIR, 250.0, {})
    report.judge(scenario(lost=4))
    value = report.as_json()
    assert value["traffic"]["dark_ms"] == {"up": 0.0, "down": 0.0}
    assert value["traffic"]["beyond_dark_ms"] == {"up": 20.0, "down": 5.0} == value["traffic"]["gap_ms"]
    assert value["baseline"][0]["beyond_dark_ms"] == {"up": 300.0, "down": 5.0}
    assert value["ratio_beyond_dark"] == value["ratio"] == 15.0
    assert "link dark" not in shown(report) and "7.5 / 0.1" in shown(report)


def away(gap: float, down: float) -> ScenarioReport:
    report = ScenarioReport("predictive", "a node that moves", "kernel", strongswan="5.9.8")
    report.add_traffic(traffic(gap, lost=2, down=down), AIR, 0)
    report.add_transfer([MOVE])
    report.add_proof(True, True)
    report.add_baseline("psk", "PSK", traffic(300.0, lost=60, down=310.0), AIR, 250.0, {}, relocated=True)
    return report


MOVES = Scenario("predictive", "a node that moves", (("handover", "nsg", "predictive"),))


def test_of_a_gap_the_dark_time_of_the_link_is_not_the_handovers() -> None:
    report = away(115.0, 120.0)
    report.dark_ms = {"up": 40.0, "down": 41.0}
    report.judge(MOVES)
    value = report.as_json()
    assert value["traffic"]["dark_ms"] == value["baseline"][0]["dark_ms"] == {"up": 40.0, "down": 41.0}
    assert value["traffic"]["beyond_dark_ms"] == {"up": 75.0, "down": 79.0}
    assert value["baseline"][0]["beyond_dark_ms"] == {"up": 260.0, "down": 269.0}
    assert (value["ratio"], value["ratio_beyond_dark"]) == (2.6, 3.4)
    text = shown(report)
    assert all(words in text for words in ("link dark", "40 / 41", "75 / 79", "1.9 / 2.0", "1 to 3.4")), text


def test_a_dark_time_that_was_not_measured_is_not_made_up() -> None:
    report = away(115.0, 120.0)
    report.judge(MOVES)
    value = report.as_json()
    assert report.ok and value["traffic"]["dark_ms"] is None is value["traffic"]["beyond_dark_ms"]
    assert value["ratio_beyond_dark"] is None and value["ratio"] == 2.6
    assert "?" in shown(report)


def test_cpu_time_adds_up_over_transfers_and_is_unknown_where_no_agent_is() -> None:
    report = moved()
    for _ in range(2):
        report.add_cpu({"mn": None, "psg": 10.5, "nsg": 20.0}, {"mn": 1.0, "psg": 2.0, "nsg": None})
    report.judge(scenario(lost=4))
    assert report.as_json()["cpu_ms"] == {"mn": None, "psg": 21.0, "nsg": 40.0}
    assert report.as_json()["charon_ms"] == {"mn": 2.0, "psg": 4.0, "nsg": None}
    assert "CPU time of the agents: psg 21 ms, nsg 40 ms" in shown(report)


def test_what_fails_a_move() -> None:
    spis, gap, lost, gone, check = moved(), moved(90.0), moved(lost=9), moved(), moved()
    spis.add_proof(False, False)
    gone.add_traffic(traffic(20.0, recovered=False), AIR, 0)
    check.checks.append({"name": "psg has let go", "ok": False, "why": "exit 1 instead of 0"})
    words = (
        "SPIs are not the same",
        "a gap of 90.0 ms",
        "9 packets lost",
        "did not come back",
        "psg has let go",
    )
    for report, word in zip((spis, gap, lost, gone, check), words, strict=True):
        report.judge(scenario(lost=4, gap_ms=50.0))
        assert not report.ok and word in report.error, word
        assert word in report.as_json()["error"] and "FAILED" in shown(report)


def test_a_packet_in_the_clear_fails_a_move() -> None:
    report = moved()
    report.add_clear(NOTHING)
    report.judge(scenario())
    assert report.ok and report.as_json()["clear"] == {"psg": 0, "nsg": 0}
    assert "left in the clear: 0 by psg, 0 by nsg" in shown(report)
    report.add_clear(LEFT)
    report.add_clear({})
    report.judge(scenario())
    assert report.error == "14 packets of a mobile node's traffic left psg in the clear"
    assert report.as_json()["clear"] == {"psg": 14, "nsg": 0}
    told = "psg: in the clear: 7 packets from 10.3.0.10 to 10.4.0.10 (protocol 17) by eth0"
    assert report.warnings[0] == told and told in shown(report)


def test_one_bad_proof_among_many_decides() -> None:
    report = ScenarioReport("ten", esp="kernel")
    for good in (True, False, True):
        report.add_transfer([MOVE])
        report.add_proof(good, good)
    report.judge(scenario())
    assert (report.same_spis, report.same_keys, report.ok) == (False, False, False)
    assert report.gateways == {"messages": 12, "octets": 1356} and len(report.as_json()["transfers"]) == 3


def test_with_user_space_esp_keys_are_not_seen_and_the_peer_rekeys() -> None:
    report = ScenarioReport("handover", esp="libipsec")
    report.add_transfer([MOVE])
    report.add_proof(True, None)
    report.add_traffic(traffic(4000.0, lost=80), {**AIR, "messages": 5}, 0)
    report.judge(scenario(lost=4, messages=2))
    assert report.ok and report.same_keys is None


def test_what_a_stock_charon_loses_while_it_has_no_cpu_counts_in_virtual_time_alone() -> None:
    """A busy machine stretches the change of addresses at the mobile node; no gateway can help that."""
    for stolen, mobile, ok in ((True, False, True), (True, True, False), (False, False, False)):
        report = moved(lost=52)
        report.judge(scenario(lost=20, tunnel=Tunnel(mobile=mobile)), stolen=stolen)
        assert (report.ok, report.error) == (ok, "" if ok else "52 packets lost, allowed are 20")
    report = moved(lost=0)
    flying = Traffic(Direction(100, {}, 21, 0, 20.0, True), Direction(100, {}, 0, 0, 5.0, True))
    report.add_traffic(flying, AIR, 0)
    report.judge(scenario(lost=20), stolen=True)
    assert report.error == "21 packets lost, allowed are 20"


def test_a_limit_for_what_is_lost_while_a_gateway_works_holds_in_virtual_time_alone() -> None:
    for stolen in (True, False):
        report = moved(lost=0)
        flying = Traffic(Direction(100, {}, 3, 0, 20.0, True), Direction(100, {}, 0, 0, 5.0, True))
        report.add_traffic(flying, AIR, 0)
        report.judge(scenario(lost=2, exact=True), stolen=stolen)
        assert report.error == ("" if stolen else "3 packets lost, allowed are 2")


def test_limits_on_messages() -> None:
    loud, long = moved(), moved()
    loud.judge(scenario(messages=0))
    long.judge(scenario(gateway_octets=400))
    assert loud.error == "2 messages on the air, not 0"
    assert long.error == "452 octets between the gateways, allowed are 400"


def test_a_scenario_that_could_not_run() -> None:
    failed, skipped = (
        ScenarioReport.failed(scenario(), "no kernel"),
        ScenarioReport.skipped(scenario(), "needs kernel ESP"),
    )
    assert not failed.ok and failed.as_json()["error"] == "no kernel"
    assert skipped.ok and skipped.as_json()["skipped"] == "needs kernel ESP"
    assert "no kernel" in shown(failed) and "needs kernel ESP" in shown(skipped)


def test_which_of_many_runs_failed() -> None:
    told = [
        {**ScenarioReport(name, ok=number != 2).as_json(), "run": number}
        for name in ("pull", "left")
        for number in (1, 2, 3)
        if name == "pull" or number != 2
    ]
    assert repeated(told) == ["pull: 1 of 3 runs failed (2)"]
    assert repeated([ScenarioReport("pull").as_json()]) == []
    assert [label(told[1]), label(ScenarioReport("pull").as_json())] == ["pull-2", "pull"]


def test_packets_to_the_mobile_node_and_late_ones_have_limits_of_their_own() -> None:
    report = moved()
    down = Direction(100, {}, 3, 0, 20.0, True, transit_ms=20.0, late=7)
    report.add_traffic(Traffic(Direction(100, {}, 0, 0, 5.0, True, late=1), down), AIR, 0)
    report.judge(scenario(lost_down=2, late=7))
    assert not report.ok
    assert "3 packets to mn lost, allowed are 2" in report.error
    assert "8 packets came late, allowed are 7" in report.error
