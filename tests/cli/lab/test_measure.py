"""The lab's arithmetic: losses and their causes, gaps, IKE on the air, SAs and their keys."""

from __future__ import annotations

import json
import struct
from errno import ENETUNREACH, EPERM
from typing import Any

import pytest

from ikectx_cli.lab import announce as lab_announce
from ikectx_cli.lab import capture as lab_capture
from ikectx_cli.lab.measure import Direction, Traffic, air, dark, direction, kernel_sas, moved

MS = 1_000_000


def sends(
    count: int, *, late: dict[int, float] | None = None, errors: dict[int, int] | None = None
) -> list[Any]:
    """`count` datagrams 5 ms apart; `late`: by how many ms one left too late; `errors`: errno."""
    late, errors = late or {}, errors or {}
    return [(n, int((n * 5 + late.get(n, 0)) * MS), errors.get(n, 0)) for n in range(count)]


def arrivals(sent: list[Any], *, without: set[int] | None = None, transit: float = 20.0) -> list[Any]:
    return [
        (n, stamp + int(transit * MS))
        for n, stamp, error in sent
        if not error and n not in (without or set())
    ]


def test_nothing_lost() -> None:
    sent = sends(100)
    one = direction(sent, arrivals(sent))
    assert (one.sent, one.lost, one.longest_gap_ms, one.recovered) == (100, 0, 5.0, True)


def test_what_was_not_sent_is_told_from_what_was_lost() -> None:
    sent = sends(100, errors={50: EPERM, 51: EPERM, 52: ENETUNREACH})
    one = direction(sent, arrivals(sent, without={60, 61}))
    assert one.refused == {"EPERM": 2, "ENETUNREACH": 1}
    assert (one.in_flight, one.lost) == (2, 5)
    assert one.longest_gap_ms == 20.0
    assert [number for number, _ in one.lost_at] == [50, 51, 52, 60, 61]


def test_what_a_queue_has_held_is_late_and_a_detour_is_not() -> None:
    sent = sends(100)
    held = arrivals(sent[:50]) + arrivals(sent[50:60], transit=100.0) + arrivals(sent[60:], transit=22.0)
    assert direction(sent, held).late == 10


def test_losses_after_the_new_link_is_there_are_counted_by_themselves() -> None:
    sent = sends(100)
    one = direction(sent, arrivals(sent, without={48, 49, 50, 51}))
    told = Traffic(one, one).as_json(link_ns=sent[50][1])
    assert (told["up"]["lost"], told["up"]["lost_after_link"]) == (4, 2)
    assert "lost_after_link" not in Traffic(one, one).as_json()["down"]


def test_a_late_sender_is_no_gap() -> None:
    sent = sends(100, late={n: 40 for n in range(50, 100)})
    assert direction(sent, arrivals(sent)).longest_gap_ms == 5.0


def test_a_slower_path_is_a_gap() -> None:
    sent = sends(100)
    slow = arrivals(sent[:50]) + arrivals(sent[50:], transit=50.0)
    assert direction(sent, slow).longest_gap_ms == 35.0


def test_duplicates_and_strangers() -> None:
    sent = sends(10)
    one = direction(sent, [*arrivals(sent), (3, 0), (77, 0)])
    assert (one.duplicates, one.lost) == (1, 0)


def test_traffic_that_does_not_come_back() -> None:
    sent = sends(100)
    assert not direction(sent, arrivals(sent, without=set(range(60, 100)))).recovered
    assert not direction(sent, []).recovered
    assert direction(sent, arrivals(sent, without=set(range(90, 100)))).recovered


def test_what_was_sent_when_the_other_end_stopped_does_not_count() -> None:
    """On a busy machine one end stops a second after the other."""
    sent = sends(600)
    ended = 1500 * MS
    heard = [one for one in arrivals(sent) if one[1] <= ended]
    one = direction(sent, heard, 5.0, ended)
    assert (one.sent, one.lost, one.recovered) == (201, 0, True)
    assert not direction(sent, [one for one in heard if one[0] < 150], 5.0, ended).recovered
    assert not direction(sent, heard, 5.0).recovered


def test_a_loss_is_told_with_its_cause_and_time() -> None:
    up = Direction(200, {"EPERM": 2}, 0, 0, 15.0, True, [(7, 1000 * MS), (8, 1005 * MS)])
    down = Direction(200, {}, 3, 0, 20.0, True, [(1, 990 * MS)] * 3)
    shown = Traffic(up, down, 5.0, {"mn": {"XfrmOutPolBlock": 2, "XfrmInNoPols": 2}}).as_json(1000 * MS)
    assert (shown["sent"], shown["lost"], shown["longest_gap_ms"]) == (400, 5, 20.0)
    assert shown["causes"] == {"up: EPERM at mn": 2, "down: XfrmInNoPols at mn": 2, "down: in flight": 1}
    assert shown["up"]["lost_at_ms"] == [0.0, 5.0] and shown["down"]["lost_at_ms"][0] == -10.0
    json.dumps(shown)


def test_a_round_trip_is_the_shortest_way_in_both_directions() -> None:
    sent = sends(100)
    fast = direction(sent, arrivals(sent, transit=20.0) + arrivals(sent[:1], transit=19.0))
    assert Traffic(fast, direction(sent, arrivals(sent, transit=21.5))).round_trip_ms == 41.5


def test_a_link_is_dark_for_its_gap_less_the_interval_of_its_probe() -> None:
    sent = sends(100)
    whole, hole = direction(sent, arrivals(sent)), direction(sent, arrivals(sent, without=set(range(50, 58))))
    assert dark(Traffic(whole, hole)) == {"up": 0.0, "down": 40.0}
    assert dark(Traffic(whole, direction(sent, arrivals(sent[:50])))) is None


def test_counters_that_moved() -> None:
    before = {"mn": {"A": 1, "B": 2}, "psg": {"A": 0}}
    after = {"mn": {"A": 1, "B": 5}, "psg": {"A": 0}, "nsg": {"A": 1}}
    assert moved(before, after) == {"mn": {"B": 3}, "nsg": {"A": 1}}


def ike(exchange: int, *, response: bool = False, following: int = 46) -> bytes:
    header = struct.pack(
        "!8s8sBBBBII", b"\1" * 8, b"\2" * 8, following, 0x20, exchange, 0x20 * response, 7, 80
    )
    return header + bytes(52)


def packet(ports: tuple[int, int], payload: bytes, version: int = 4) -> bytes:
    udp = struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload
    if version == 4:
        return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), bytes(4)) + udp
    return struct.pack("!IHBB16s16s", 0x60000000, len(udp), 17, 64, bytes(16), bytes(16)) + udp


@pytest.mark.parametrize("version", [4, 6])
def test_ike_is_read_on_both_ports(version: int) -> None:
    head = 20 if version == 4 else 40
    plain = lab_capture.parse(packet((500, 500), ike(34), version))
    marked = lab_capture.parse(packet((4500, 4500), bytes(4) + ike(37, response=True, following=53), version))
    assert plain is not None and marked is not None
    assert (plain["exchange"], plain["octets"], plain["response"], plain["fragment"]) == (
        34,
        head + 88,
        False,
        False,
    )
    assert (marked["exchange"], marked["octets"], marked["response"], marked["fragment"]) == (
        37,
        head + 92,
        True,
        True,
    )
    assert plain["spi_i"] == "01" * 8 and plain["message_id"] == 7


@pytest.mark.parametrize("version", [4, 6])
def test_cxtp_is_read_by_its_type(version: int) -> None:
    head = 28 if version == 4 else 48
    notes = [
        lab_capture.parse(packet(ports, payload, version))
        for ports, payload in (
            ((40000, 5091), b"\x11" + bytes(99)),
            ((5091, 40000), b"\x12" + bytes(39)),
            ((5091, 5091), b""),
        )
    ]
    assert notes == [
        {"octets": head + 100, "cxtp": 1},
        {"octets": head + 40, "cxtp": 2},
        {"octets": head, "cxtp": 0},
    ]
    told = air([{**note, "time": 1} for note in notes if note])
    assert told["by_exchange"] == {"CTAR": 1, "CTAA": 1, "CXTP ?": 1}


def test_what_is_too_short_is_nothing() -> None:
    whole = packet((500, 500), ike(34))
    assert [lab_capture.parse(whole[:size]) for size in range(20 + 8 + 28)] == [None] * 56


def run_filter(data: bytes) -> bool:
    """Classic BPF, as much of it as the capture's program uses."""
    lines = [tuple(map(int, one.split())) for one in lab_capture.PROGRAM.replace("\n", "").split(";")]
    load = {48: 1, 40: 2, 32: 4, 72: 2, 64: 4}
    at = accumulator = index = 0
    while True:
        code, true, false, value = lines[at]
        at += 1
        if code in load:
            start = value + (index if code in (72, 64) else 0)
            if start + load[code] > len(data):
                return False
            accumulator = int.from_bytes(data[start : start + load[code]], "big")
        elif code == 177:
            index = (data[value] & 15) * 4
        elif code == 84:
            accumulator &= value
        elif code == 21:
            at += true if accumulator == value else false
        elif code == 69:
            at += true if accumulator & value else false
        else:
            assert code == 6
            return value > 0


@pytest.mark.parametrize("version", [4, 6])
def test_the_filter_takes_ike_and_nothing_else(version: int) -> None:
    taken = [((500, 500), ike(34)), ((4500, 4500), bytes(4) + ike(37)), ((1024, 4500), bytes(4) + ike(37))]
    taken += [((40000, 5091), b"\x11" + bytes(60)), ((5091, 5091), b"\x12")]
    left = [((4500, 4500), b"\xc0\1\2\3" + bytes(60)), ((4500, 4500), b"\xff"), ((53, 1000), bytes(64))]
    assert [run_filter(packet(*one, version)) for one in taken] == [True] * 5
    assert [run_filter(packet(*one, version)) for one in left] == [False] * 3


def test_the_air_counts_from_a_moment() -> None:
    notes = [
        {"time": 1, "octets": 300, "exchange": 34},
        {"time": 5, "octets": 100, "exchange": 37},
        {"time": 6, "octets": 90, "exchange": 37},
        {"time": 7, "octets": 50, "exchange": 99},
    ]
    assert air(notes, 5) == {"messages": 3, "octets": 240, "by_exchange": {"99": 1, "INFORMATIONAL": 2}}
    assert air([]) == {"messages": 0, "octets": 0, "by_exchange": {}}


XFRM = """src 10.1.0.10 dst 10.2.1.2
	proto esp spi 0xc7d3f8a1 reqid 1 mode tunnel
	replay-window 0 flag af-unspec
	aead rfc4106(gcm(aes)) 0x0102030405060708090a0b0c0d0e0f1011121314 128
	anti-replay context: seq 0x0, oseq 0x3, bitmap 0x00000000
src 10.2.1.2 dst 10.1.0.10
	proto esp spi 0xcafe0001 reqid 1 mode transport
	auth-trunc hmac(sha256) 0xaa 128
	enc cbc(aes) 0xbb
src :: dst 10.1.0.10
	proto comp spi 0x00001234 reqid 1 mode tunnel
"""


def test_kernel_sas_are_told_by_a_digest_of_their_keys() -> None:
    one, two = kernel_sas(XFRM, b"salt")
    assert (one.src, one.dst, one.spi, one.mode) == ("10.1.0.10", "10.2.1.2", "0xc7d3f8a1", "tunnel")
    assert (two.spi, two.mode) == ("0xcafe0001", "transport")
    assert one.keys != two.keys and "0102" not in repr(one)
    assert kernel_sas(XFRM.replace("0xbb", "0xbc"), b"salt")[1].keys != two.keys
    assert kernel_sas(XFRM, b"other")[0].keys != one.keys
    # another place and other counters are the same keys
    assert (
        kernel_sas(XFRM.replace("oseq 0x3", "oseq 0x9").replace("10.2.1.2", "10.2.2.2"), b"salt")[0].keys
        == one.keys
    )
    assert kernel_sas("", b"salt") == []


def test_what_the_kernel_wants_an_sa_for_is_none() -> None:
    """A packet that met a policy without an SA leaves one of SPI 0 there for up to 165 s (an acquire)."""
    wanted = "src 10.1.0.10 dst 10.2.1.2\n\tproto esp spi 0x00000000 reqid 1 mode tunnel\n\treplay-window 0\n"
    assert kernel_sas(wanted, b"salt") == []
    assert kernel_sas(wanted + XFRM, b"salt") == kernel_sas(XFRM, b"salt")


def test_an_announcement_becomes_a_route() -> None:
    message = lab_announce.route_message("up", "10.4.0.10/32", "10.3.0.2", 7)
    size, kind, flags, sequence, _ = struct.unpack_from("=IHHII", message)
    assert (size, kind, flags, sequence) == (len(message), 24, 1 | 4 | 0x100 | 0x400, 7)
    assert message[16:24] == bytes([2, 32, 0, 0, 254, 4, 0, 1])
    assert message.endswith(struct.pack("=HH", 8, 5) + bytes([10, 3, 0, 2]))
    gone = lab_announce.route_message("down", "fd04::10/128", "fd03::2", 8)
    assert struct.unpack_from("=IHH", gone) == (len(gone), 25, 5)


@pytest.mark.parametrize(
    "words",
    [("up", "10.4.0.10/32", "fd03::2"), ("over", "10.4.0.10/32", "10.3.0.2"), ("up", "x", "10.3.0.2")],
)
def test_a_wrong_announcement_is_refused(words: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError):
        lab_announce.route_message(*words, 1)
