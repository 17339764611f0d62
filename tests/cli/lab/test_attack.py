"""The bench of attacks: what its attacker sends, what becomes of figures, and which options go together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner

from ikectx.errors import UsageError, WireError
from ikectx.wire.cookies import Cookies, ask, fixed_part, split
from ikectx.wire.cxtp import Ctar, CtReq, Pctd, parse_message
from ikectx.wire.tokens import Purpose, find
from ikectx_cli.lab import (
    attack as lab_attack,
)
from ikectx_cli.lab import (
    attacker as lab_attacker,
)
from ikectx_cli.lab import (
    bench as lab_bench,
)
from ikectx_cli.lab import (
    damage as lab_damage,
)
from ikectx_cli.lab import (
    page as lab_page,
)
from ikectx_cli.lab.attacker import Order, Pace, datagrams, messages
from ikectx_cli.lab.commands import lab as lab_command
from ikectx_cli.lab.damage import KINDS, Sample, report
from ikectx_cli.lab.hosts import Lab
from ikectx_cli.lab.net import OUTER

SPIS = ("11" * 8, "22" * 8)


def order(kind: str, **changes: Any) -> Order:
    return Order(
        **{"kind": kind, "rate": 100.0, "seconds": 0.2, "work": "", "spis": SPIS, "most": 4, **changes}
    )


def test_a_pace_owes_what_it_did_not_send_but_for_long_pauses() -> None:
    pace = Pace(8, 0.0)
    assert [pace.due(at) for at in (0.0625, 0.125, 0.3125, 0.5)] == [0, 1, 1, 2]
    assert pace.due(60.0) == 8


@pytest.mark.parametrize("kind", ["ctar-random", "ctar-known", "ctar-mn"])
def test_forgeries_are_ctars_that_only_their_keys_tell_from_good_ones(kind: str) -> None:
    made = datagrams(order(kind), 8)
    seen = set()
    for to, octets in made:
        source, target = (socket.inet_ntoa(octets[at : at + 4]) for at in (12, 16))
        assert target == to and struct.unpack_from("!H", octets, 22) == (5091,)
        assert (source == OUTER["mn"][4]) == (kind == "ctar-mn")
        token = find(Ctar.parse(octets[28:]).blocks)
        assert token is not None
        assert (token.spi_i.hex() == SPIS[0]) == (kind != "ctar-random")
        here = "psg" if to == OUTER["psg"][4] else "nsg"
        assert here == (token.nsg if token.purpose is Purpose.ARRIVE else token.psg)
        seen.add((here, token.purpose))
    assert len(seen) == 4


def test_a_cookie_is_sent_back_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    here, jar = "127.0.0.1", Cookies(b"secret")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gateway:
        gateway.bind((here, 0))
        gateway.settimeout(0.02)
        monkeypatch.setattr(lab_attacker, "sources", lambda: [here] * lab_attacker.ADDRESSES)
        monkeypatch.setattr(lab_attacker, "CXTP_PORT", gateway.getsockname()[1])
        monkeypatch.setattr(lab_attacker, "OUTER", {host: {4: here} for host in OUTER})
        right = []

        def look() -> bool:
            with contextlib.suppress(TimeoutError):
                octets, (host, port) = gateway.recvfrom(2048)
                fixed = fixed_part(octets)
                cookie, rest = split(octets, fixed)
                assert find(Ctar.parse(rest).blocks) is not None
                if jar.right(cookie, host, port, 1.0):
                    right.append(port)
                else:
                    gateway.sendto(ask(octets, fixed, jar.make(host, port, 1.0)), (host, port))
            return len(right) > 3

        told = lab_attacker.talk(order("ctar-cookie", rate=2000.0, seconds=20), look)
    assert told["with a cookie"] >= 3 and told["answers"] and told["sent"] > told["with a cookie"]


def test_garbage_is_mostly_no_ctar() -> None:
    def parses(octets: bytes) -> bool:
        try:
            return bool(Ctar.parse(octets[28:]))
        except WireError:
            return False

    assert sum(parses(octets) for _, octets in datagrams(order("garbage"), 100)) < 30


def test_a_flood_is_of_messages_that_a_peer_may_send() -> None:
    made = [parse_message(octets) for octets in messages(order("flood"), 10)]
    assert {type(one).__name__ for one in made} == {"Pctd", "Ctd", "CtReq"}
    assert any(isinstance(one, Pctd) and one.blocks for one in made)
    assert any(isinstance(one, CtReq) and one.token for one in made)


def test_half_open_connections_are_opened_again_where_they_are_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(lab_attacker, "sources", lambda: ["127.0.0.1"] * lab_attacker.ADDRESSES)
        monkeypatch.setattr(lab_attacker, "CXTP_PORT", server.getsockname()[1])
        monkeypatch.setattr(lab_attacker, "OUTER", {host: {4: "127.0.0.1"} for host in OUTER})
        server.settimeout(0.02)
        accepted: list[socket.socket] = []

        def look() -> bool:  # the first is cut off at once, and one more comes for it
            with contextlib.suppress(TimeoutError):
                accepted.append(server.accept()[0])
            if accepted:
                accepted[0].close()
            return len(accepted) == 5

        told = lab_attacker.half_open(order("half-open", most=2, seconds=30), look)
    assert told["cut off"] == 1 and told["sent"] == 5 and told["held at most"] == 4


def test_a_flood_stops_when_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nobody(_order: Order) -> Any:
        raise ConnectionRefusedError

    monkeypatch.setattr(lab_attacker, "dial", nobody)
    monkeypatch.setattr(lab_attacker, "messages", lambda _order: [b"x"])

    async def scenario() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, stop.set)
        told = await lab_attacker.flood(order("flood", seconds=60), stop)
        assert told == {"refused": 1}
        assert (await lab_attacker.links(order("links"), asyncio.Event()))["held at most"] == 0

    asyncio.run(scenario())


def samples() -> list[Sample]:
    return [
        Sample(50 << 20, 20, 100, 1000, 1.0),
        Sample(60 << 20, 30, 5000, 9000, 2.0),
        Sample(51 << 20, 20, 6100, 2000, 2.5),
    ]


def a_report(**changes: Any) -> dict[str, Any]:
    none, beside = {"ms": [100.0, 120.0], "failed": []}, {"ms": [220.0], "failed": ["after 1.0 s: BUSY"]}
    moves = {"transfer": {"none": none, "beside": beside}, "handover": {"none": none, "beside": none}}
    sent = {"sent": 1000, "cut off": 3, "seconds": 10.0, "cpu_seconds": 1.5}
    waits = [3.0, float("inf"), 8.0]
    told = report(
        "flood",
        {"rate": 100.0, "seconds": 10.0},
        sent,
        moves,
        {"psg": samples(), "nsg": samples()},
        waits,
        {},
    )
    return {**told, **changes}


def test_a_report_compares_medians_of_one_run() -> None:
    told = json.loads(json.dumps(a_report()))
    assert told["transfer"]["times"] == 2.0 and told["handover"]["times"] == 1.0
    assert told["agents"]["psg"] == {
        "memory": {"before": 50 << 20, "most": 60 << 20, "after": 51 << 20},
        "descriptors": {"before": 20, "most": 30, "after": 20},
        "state": {"before": 1000, "most": 9000, "after": 2000},
        "log": 6000,
        "cpu_seconds": 1.5,
    }
    assert told["status"] == {"asked": 3, "no_answer": 1, "median_ms": 5.5, "longest_ms": 8.0}
    assert lab_damage.times([], [1.0]) is None


def test_what_may_not_be_so() -> None:
    told = a_report()
    assert lab_damage.missed(told) == ["1 of the transfers beside the attack failed"]
    told["agents"]["psg"]["memory"]["after"] += 1 << 20
    slow = {"none": {"ms": [100.0], "failed": []}, "beside": {"ms": [201.0], "failed": []}, "times": 2.01}
    assert lab_damage.missed({**told, "attack": "ctar-random", "transfer": slow}) == [
        "a transfer takes 2.01 times as long beside the attack, not at most 2",
        "the agent of psg holds 2.0 MiB more afterwards, not at most 1.0",
    ]


def test_tables_tell_what_failed() -> None:
    told = a_report()
    first = lab_damage.row(told)
    assert len(first) == len(lab_damage.HEAD)
    assert (
        "110 / 220 (2.0 times), 1 of 2 failed" in first
        and "6, at most 8, 1 of 3 without answer" in " ".join(first)
    )
    assert "1000, 3 cut off" in first and "100" in first
    assert [line[2] for line in lab_damage.victims(told)] == ["50.0 / 60.0 / 51.0"] * 2
    assert "transfer: after 1.0 s: BUSY" in lab_damage.tables(told)
    nothing = {"none": {"ms": [], "failed": []}, "beside": {"ms": [], "failed": ["x"]}, "times": None}
    assert "– / –, 1 of 1 failed" in lab_damage.row(a_report(transfer=nothing))


def test_the_size_of_a_folder_counts_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(bytes(100))
    (tmp_path / "gone").symlink_to("nowhere")
    assert 100 < lab_attack.size(tmp_path) < 10_000_000


def test_no_sample_of_an_agent_that_does_not_run(tmp_path: Path) -> None:
    assert lab_attack.sample(cast(Lab, SimpleNamespace(started={}, work=tmp_path)), "psg") is None


@pytest.mark.parametrize(
    "words",
    [
        ["--attack", "flood", "reactive"],
        ["--attack", "flood", "--drain", "3"],
        ["--attack", "flood", "--time", "virtual"],
        ["--rate", "3"],
        ["--seconds", "30", "--drain", "3"],
        ["--attack", "flood", "--from", __file__],
    ],
)
def test_options_that_do_not_go_together(words: list[str]) -> None:
    done = CliRunner().invoke(lab_command, ["bench", *words])
    assert isinstance(done.exception, UsageError)


def test_bench_prints_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fake(*words: Any, **rest: Any) -> dict[str, Any]:
        asked.append((words, rest["libipsec"]))
        return a_report()

    monkeypatch.setattr(lab_attack, "run", fake)
    done = CliRunner().invoke(lab_command, ["bench", "--attack", "flood", "--esp", "libipsec", "--json"])
    assert json.loads(done.stdout)["command"] == (
        "ikectx lab bench --esp libipsec --attack flood --rate 1000 --seconds 60"
    )
    assert asked == [(("flood", KINDS["flood"].rate, 60.0, "auto"), True)]
    done = CliRunner().invoke(lab_command, ["bench", "--attack", "flood", "--rate", "5", "--seconds", "9"])
    assert "before / at the most / after" in done.stdout and asked[1][0] == ("flood", 5.0, 9.0, "auto")


def printed(**changes: Any) -> dict[str, Any]:
    """As `--attack --json` prints it."""
    kernel = {"kernel": "6.1", "cpus": 2, "syscall_us": 0.2, "thread_us": 13.0}
    machine = {"cpu": "x", "cores": 2, "kernel": "6.1", "scheduled": "like others, on 2"}
    rest = {"strongswan": "5.9.8", "guest": "host", "clock": "real", "esp": "libipsec", "code": "1234567"}
    return (
        {**a_report(), "command": "ikectx lab bench --attack flood", "machine": kernel, "host": machine}
        | rest
        | changes
    )


def test_a_report_goes_into_the_page() -> None:
    text = json.dumps(printed())
    files = {name: lab_bench.read(text, name) for name in ("before.json", "after.json")}
    merged = lab_bench.merge(files, "ikectx lab bench --from before.json --from after.json")
    assert merged["command"].splitlines()[0] == "ikectx lab bench --attack flood --json > before.json"
    again = lab_bench.read(json.dumps(merged), "merged.json")
    shown = lab_page.page(again)
    assert "## Under attack" in shown and shown.count("| 1234567 | flood | psg | 50.0 / 60.0 / 51.0 |") == 2
    assert "| attacks | x | 2 |" in shown
    older = {key: value for key, value in merged.items() if key != "attacks"}
    assert "Under attack" not in lab_page.page(lab_bench.read(json.dumps(older), "older.json"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"agents": {"psg": {}}}, r"the attack\.agents\.psg\.memory must be an object"),
        ({"transfer": 7}, r"the attack\.transfer must be an object"),
        ({"rate": True}, r"the attack\.rate must be a number"),
        (
            {"status": {"asked": 1, "no_answer": 0, "median_ms": "x", "longest_ms": None}},
            "median_ms must be a number",
        ),
        ({"host": {}}, r"the attack\.host\.cpu must be text"),
    ],
)
def test_a_file_that_is_no_report_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"file: .*{words}"):
        lab_bench.read(json.dumps(printed(**changes)), "file")
    summary = lab_bench.read(json.dumps(printed()), "file")
    if "host" not in changes:
        damaged = {**summary, "attacks": [{**summary["attacks"][0], **changes}]}
        with pytest.raises(UsageError, match=r"attacks\.0"):
            lab_bench.read(json.dumps(damaged), "file")
    with pytest.raises(UsageError, match="attacks must be a list"):
        lab_bench.read(json.dumps({**summary, "attacks": {}}), "file")
