"""A lab's time lines: what is put together from what hosts noted."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ikectx.errors import CharonError
from ikectx_cli.lab import capture as lab_capture
from ikectx_cli.lab import trace as lab_trace
from ikectx_cli.lab.hosts import TRACE
from ikectx_cli.lab.net import OUTER
from ikectx_cli.lab.trace import (
    CXTP,
    IKE,
    TLS,
    Arrow,
    LinkChange,
    ProbeFlow,
    Span,
    TimeLine,
    Tracing,
    Window,
    as_handed_over,
    between_gateways,
    flow,
    neighbours,
    on_the_air,
    spans,
    time_line,
    with_sequel,
)

START = 1_790_000_000_000_000_000
WINDOW = Window("handover: transfer psg nsg", START, START + 100_000_000)


def at(ms: float) -> int:
    return START + round(ms * 1e6)


def step(name: str, begin: float, end: float, **more: Any) -> dict[str, Any]:
    return {"step": name, "kind": "step", "begin": at(begin), "end": at(end), "of": "0102", **more}


def cxtp(way: str, name: str, peer: str, ms: float) -> dict[str, Any]:
    return {"message": name, "way": way, "peer": peer, "at": at(ms), "octets": 8}


def packet(
    ms: float, total: int, *, sent: bool, far: str, interface: str = "eth0", **more: Any
) -> dict[str, Any]:
    found = {"time": at(ms), "sum": total, "sent": sent, "far": far, "interface": interface, "octets": 100}
    return found | (more or {"exchange": 37, "message_id": 2, "response": False})


def test_spans_of_all_hosts_are_sorted_and_those_of_other_handovers_left_out() -> None:
    notes = {
        "psg": [step("freeze", 5, 6), step("export", -3, -1), step("release", 20, 300, failed="CharonError")],
        "nsg": [step("check", 2, 3), step("take", 101, 102), cxtp("sent", "Ctdr", "psg", 3)],
    }
    found = spans(notes, WINDOW)
    assert [(one.host, one.step, one.begin, one.end) for one in found] == [
        ("nsg", "check", 2, 3),
        ("psg", "freeze", 5, 6),
        ("psg", "release", 20, 300),
    ]
    assert (found[0].of, found[2].failed) == ("0102", "CharonError")


def test_messages_between_gateways_keep_their_order() -> None:
    notes = {
        "psg": [
            cxtp("sent", "Pctd", "nsg", 1),
            cxtp("received", "Ctdr", "nsg", 4),
            cxtp("sent", "Ctd", "nsg", 5),
            cxtp("received", "Ctdr", "nsg", 9),
        ],
        "nsg": [
            cxtp("received", "Pctd", "psg", 2),
            cxtp("sent", "Ctdr", "psg", 3),
            cxtp("received", "Ctd", "psg", 6),
            cxtp("sent", "Ctdr", "psg", 8),
            cxtp("sent", "CtReq", "psg", 99),
        ],
    }
    found = between_gateways(notes, WINDOW)
    assert [(one.source, one.target, one.message, one.sent, one.received) for one in found] == [
        ("psg", "nsg", "PCTD", 1, 2),
        ("nsg", "psg", "CTDR", 3, 4),
        ("psg", "nsg", "CTD", 5, 6),
        ("nsg", "psg", "CTDR", 8, 9),
        ("nsg", "psg", "CT-Req", 99, None),
    ]
    assert {one.over for one in found} == {TLS}


def test_an_answer_that_came_before_is_not_taken_for_a_later_one() -> None:
    notes = {
        "psg": [cxtp("received", "Ctdr", "nsg", -10), cxtp("received", "Ctdr", "nsg", 4)],
        "nsg": [cxtp("sent", "Ctdr", "psg", 3)],
    }
    assert [one.received for one in between_gateways(notes, WINDOW)] == [4]


def test_a_packet_is_known_again_at_the_other_host() -> None:
    captures = {
        "mn": [
            packet(1, 11, sent=True, far=OUTER["nsg"][4], cxtp=1),
            packet(60, 12, sent=False, far=OUTER["nsg"][4], cxtp=2),
        ],
        "nsg": [
            packet(21, 11, sent=False, far="10.5.0.10", cxtp=1),
            packet(40, 12, sent=True, far="10.5.0.10", cxtp=2),
        ],
        "psg": [],
    }
    assert on_the_air(captures, WINDOW) == (
        Arrow("mn", "nsg", "CTAR", CXTP, 1, 21, 100),
        Arrow("nsg", "mn", "CTAA", CXTP, 40, 60, 100),
    )


def test_what_arrives_is_the_last_copy_that_was_sent_before() -> None:
    captures = {
        "mn": [packet(ms, 11, sent=True, far=OUTER["psg"][4]) for ms in (1, 30, 70)],
        "psg": [packet(50, 11, sent=False, far="10.1.0.10"), packet(130, 11, sent=False, far="10.1.0.10")],
    }
    found = on_the_air(captures, WINDOW)
    # also where it arrives when the handover is over
    assert [(one.target, one.sent, one.received) for one in found] == [
        ("psg", 1, None),
        ("psg", 30, 50),
        ("psg", 70, 130),
    ]
    assert found[0].message == "INFORMATIONAL 2 request" and found[0].over == IKE


def test_copies_that_all_arrive_do_so_in_their_order() -> None:
    """charon answers a request that came twice in a shorter time than an answer takes."""
    captures = {
        "nsg": [packet(ms, 11, sent=True, far="10.1.0.10") for ms in (50, 58)],
        "mn": [packet(ms, 11, sent=False, far=OUTER["nsg"][4]) for ms in (70, 78)],
    }
    assert [(one.sent, one.received) for one in on_the_air(captures, WINDOW)] == [(50, 70), (58, 78)]


def test_what_is_lost_goes_to_whoever_has_the_address() -> None:
    far = [OUTER["psg"][6], "10.2.2.3", "10.3.0.2", "192.0.2.9"]
    captures = {"mn": [packet(n, n, sent=True, far=address) for n, address in enumerate(far)]}
    assert [one.target for one in on_the_air(captures, WINDOW)] == ["psg", "nsg", "psg", ""]


def test_the_delay_of_the_link_is_no_part_of_when_a_packet_was_sent() -> None:
    notes = [
        packet(21, 1, sent=True, far="", interface="eth0"),
        packet(21, 1, sent=True, far="", interface="eth1"),
        packet(21, 1, sent=False, far="", interface="eth0"),
    ]
    assert [note["time"] for note in as_handed_over(notes, {"eth0": 20_000_000})] == [at(1), at(21), at(21)]


def test_the_wait_for_a_link_address_is_a_part() -> None:
    def note(ms: float, address: str, *, asks: bool, sent: bool) -> dict[str, Any]:
        return {"time": at(ms), "neighbour": address, "asks": asks, "sent": sent, "interface": "eth1"}

    notes = [
        note(5, "10.5.0.1", asks=True, sent=True),
        note(6, "10.5.0.1", asks=True, sent=True),
        note(7, "10.5.0.10", asks=True, sent=False),
        note(8, "10.5.0.10", asks=False, sent=True),
        note(45, "10.5.0.1", asks=False, sent=False),
        note(50, "fd05::1", asks=True, sent=True),
        note(90, "fd05::1", asks=False, sent=False),
    ]
    assert neighbours(notes, WINDOW) == (
        Span("mn", "ARP", "part", 5, 45),
        Span("mn", "neighbour discovery", "part", 50, 90),
    )


def test_the_routers_wait_for_the_nodes_address_is_told_apart() -> None:
    notes = [
        {"time": at(5), "neighbour": "fd05::10", "asks": True, "sent": True, "interface": "to-mn-new"},
        {"time": at(45), "neighbour": "fd05::10", "asks": False, "sent": False, "interface": "to-mn-new"},
    ]
    nothing = {"mn": {"sent": [], "received": []}, "srv": {"sent": [], "received": []}}
    line = time_line(WINDOW, {}, {}, {"core": notes}, [], nothing, 5.0)
    assert line.spans == (Span("mn", "router's neighbour discovery", "part", 5, 45),)


def test_what_follows_closely_belongs_to_a_handover() -> None:
    notes = {
        "mn": [step("readdress", 90, 130), step("loud", 135, 140), step("quiet", 400, 410)],
        "nsg": [{**step("vici", 150, 151), "kind": "call"}, cxtp("sent", "Ctdr", "psg", 180)],
    }
    captures = {"mn": [packet(270, 1, sent=True, far="")]}
    assert with_sequel(WINDOW, at(1000), notes, captures).end == at(270)
    assert with_sequel(WINDOW, at(1000), notes, {}).end == at(180)
    assert with_sequel(WINDOW, at(137), notes, {}).end == at(137)
    assert with_sequel(WINDOW, at(1000), {}, {}) == WINDOW


def probe(lost: set[int], count: int = 40, delay: float = 20) -> tuple[list[list[int]], list[list[int]]]:
    """A probe every 5 ms from -50 ms on."""
    sent = [[number, at(-50 + 5 * number), 0] for number in range(count)]
    return sent, [[number, at(-50 + 5 * number + delay)] for number in range(count) if number not in lost]


def test_the_gap_is_between_the_arrivals_before_and_after_it() -> None:
    found = flow(*probe(set(range(12, 20))), WINDOW, 5.0)
    assert (found.last, found.first, found.gap) == (25, 70, 45)
    assert found.lost == (10, 15, 20, 25, 30, 35, 40, 45)
    # with a twentieth of the window around it
    assert found.arrived[:3] == (-5, 0, 5) and found.arrived[-1] == 105


def test_no_gap_is_none() -> None:
    found = flow(*probe({12}), WINDOW, 5.0)
    assert (found.last, found.first, found.gap, found.lost) == (None, None, None, (10,))


def test_a_gap_may_begin_before_the_handover_is_noticed() -> None:
    found = flow(*probe(set(range(4, 14))), WINDOW, 5.0)
    assert (found.last, found.first) == (-15, 40)


def whole() -> TimeLine:
    up, down = probe(set(range(12, 20))), probe(set(range(14, 26)))
    ends = {"mn": {"sent": up[0], "received": down[1]}, "srv": {"sent": down[0], "received": up[1]}}
    notes = {"mn": [step("quiet", 2, 3)], "psg": [step("freeze", 10, 12)], "nsg": [step("take", 12, 13)]}
    captures = {"mn": [packet(4, 1, sent=True, far=OUTER["nsg"][4])], "nsg": [], "psg": []}
    return time_line(WINDOW, notes, captures, {}, [("relocate", at(1), at(2))], ends, 5.0)


def test_a_time_line_ends_with_what_is_last() -> None:
    line = whole()
    assert line.end == 100.0 == line.down.first
    assert (line.changes, line.up.first) == ((LinkChange("relocate", 1, 2),), 70)
    assert [one.step for one in line.spans] == ["quiet", "freeze", "take"]


def test_a_number_that_was_sent_several_ways_is_lost_once() -> None:
    sent, received = probe({12})
    assert flow([*sent, *sent], [*received, *received], WINDOW, 5.0) == flow(sent, received, WINDOW, 5.0)


def test_json_and_back() -> None:
    line = whole()
    assert TimeLine.from_json(json.loads(json.dumps(line.as_json()))) == line
    assert TimeLine.from_json(TimeLine("x", 1, 0.0, up=ProbeFlow((1.0,))).as_json()).up == ProbeFlow((1.0,))


# --- what a lab notes --------------------------------------------------------------------------------------


class FakeLab:
    """As much of a lab as `Tracing` asks for."""

    def __init__(self, work: Path, *, traced: bool = True) -> None:
        self.work = work
        self.traced = traced
        self.net = SimpleNamespace(namespace=lambda host: f"x-{host}")
        for host in ("mn", "psg", "nsg", "srv"):
            (work / host).mkdir()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was started and stopped; the capture at nsg fails where "nsg dies" is in it."""
    said: list[str] = []

    class FakeCapture:
        def __init__(self, _lab: object, host: str, _names: str, kind: str = "messages") -> None:
            self.name = f"{kind} {host}"

        def start(self) -> None:
            said.append(f"start {self.name}")

        def stop(self) -> list[Any]:
            said.append(f"stop {self.name}")
            if "nsg dies" in said and "nsg" in self.name:
                raise CharonError("nsg: the capture died")
            return []

    qdisc = [{"kind": "netem", "options": {"delay": {"delay": 0.02}}}, {"kind": "noqueue", "options": {}}]
    monkeypatch.setattr(lab_trace, "Capture", FakeCapture)
    monkeypatch.setattr(lab_trace, "run", lambda words: SimpleNamespace(stdout=json.dumps(qdisc)))
    return said


def test_a_lab_that_is_not_traced_notes_nothing(tmp_path: Path, log: list[str]) -> None:
    tracing = Tracing(FakeLab(tmp_path, traced=False), "handover")  # type: ignore[arg-type]
    tracing.start()
    tracing.asked()
    tracing.over("transfer psg nsg")
    with tracing.change("mn moves"):
        pass
    assert tracing.stop([], 5.0) == [] and log == [] and not tracing.running


def written(lab: FakeLab) -> None:
    """A probe that has sent nothing, and one step of psg's agent with half a line after it."""
    for host in ("mn", "srv"):
        (lab.work / host / "probe-mn.json").write_text(json.dumps({"sent": [], "received": []}))
    now = time.time_ns()
    line = {"step": "freeze", "kind": "step", "begin": now, "end": now + 1_000_000, "of": ""}
    (lab.work / "psg" / TRACE).write_text(json.dumps(line) + '\n{"step": "rel')


def test_each_handover_has_a_time_line_of_its_own(tmp_path: Path, log: list[str]) -> None:
    lab = FakeLab(tmp_path)
    tracing = Tracing(lab, "move-ten-times")  # type: ignore[arg-type]
    tracing.start()
    tracing.over("ping")
    tracing.asked()
    tracing.over("move psg nsg")
    tracing.asked()
    written(lab)
    tracing.over("move nsg psg")
    one, two = tracing.stop([], 5.0)
    assert (one["name"], two["name"]) == ("move-ten-times: move psg nsg", "move-ten-times: move nsg psg")
    assert [span["step"] for span in two["spans"]] == ["freeze"] and one["spans"] == []
    assert sorted(line.removeprefix("start ") for line in log[:4]) == sorted(
        line.removeprefix("stop ") for line in log[4:]
    )
    assert tracing.stop([], 5.0) == []


def test_without_a_handover_the_time_line_is_of_all_the_traffic(tmp_path: Path, log: list[str]) -> None:
    lab = FakeLab(tmp_path)
    tracing = Tracing(lab, "silent-mn")  # type: ignore[arg-type]
    tracing.start()
    written(lab)
    with tracing.change("mn moves"):
        pass
    (line,) = tracing.stop([], 5.0)
    assert line["name"] == "silent-mn: all of the traffic"
    assert [span["step"] for span in line["spans"]] == ["freeze"]
    assert [change["what"] for change in line["changes"]] == ["mn moves"]


def test_a_capture_that_fails_leaves_none_running(tmp_path: Path, log: list[str]) -> None:
    lab = FakeLab(tmp_path)
    tracing = Tracing(lab, "handover")  # type: ignore[arg-type]
    tracing.start()
    written(lab)
    log.append("nsg dies")
    with pytest.raises(CharonError, match="the capture died"):
        tracing.stop([], 5.0)
    assert sum(line.startswith("stop") for line in log) == 4 and not tracing.running


# --- the capture's part ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
def test_a_packets_other_end_and_its_sum_are_the_same_on_every_host(version: int) -> None:
    payload = bytes(range(40))
    udp = struct.pack("!HHHH", 500, 500, 8 + len(payload), 0xAAAA) + payload

    def whole(ttl: int) -> bytes:
        if version == 4:
            head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, ttl, 17, 0)
            return head + bytes([10, 1, 0, 10, 10, 2, 1, 2]) + udp
        ends = bytes.fromhex("fd01" + "00" * 13 + "10" + "fd0200010000" + "00" * 9 + "02")
        return struct.pack("!IHBB", 6 << 28, len(udp), 17, ttl) + ends + udp

    here = lab_capture.known_again(whole(64), sent=True)
    there = lab_capture.known_again(whole(63), sent=False)
    assert here["sum"] == there["sum"]
    assert here["far"] == OUTER["psg"][version] and there["far"] == OUTER["mn"][version]


def test_arp_and_neighbour_discovery_are_read() -> None:
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + bytes(6) + bytes([10, 5, 0, 10]) + bytes(6)
    arp += bytes([10, 5, 0, 1])
    reply = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + bytes(6) + bytes([10, 5, 0, 1]) + bytes(6)
    reply += bytes([10, 5, 0, 10])
    assert lab_capture.parse_neighbour(arp) == {"neighbour": "10.5.0.1", "asks": True}
    assert lab_capture.parse_neighbour(reply) == {"neighbour": "10.5.0.1", "asks": False}
    target = bytes.fromhex("fd05" + "00" * 13 + "01")
    for kind, asks in ((135, True), (136, False)):
        icmp = bytes([kind, 0, 0, 0, 0, 0, 0, 0]) + target
        six = struct.pack("!IHBB", 6 << 28, len(icmp), 58, 255) + bytes(32) + icmp
        assert lab_capture.parse_neighbour(six) == {"neighbour": "fd05::1", "asks": asks}
        assert lab_capture.parse_neighbour(six[:60]) is None
    assert lab_capture.parse_neighbour(arp[:20]) is None
    assert lab_capture.parse_neighbour(bytes([0x45]) + bytes(60)) is None
