"""Reports and drains to medians, a page and a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ikectx.errors import UsageError
from ikectx_cli.commands import run
from ikectx_cli.lab import commands as lab
from ikectx_cli.lab import emptying as lab_emptying
from ikectx_cli.lab import scenario as lab_scenario
from ikectx_cli.lab.bench import MODES, SCENARIOS, alone, merge, read, row, summarise
from ikectx_cli.lab.measure import parse_counters
from ikectx_cli.lab.page import page, picture

HOST = {"cpu": "Some CPU", "cores": 2, "kernel": "6.1.0", "scheduled": "like others, on 2"}
PYTHON = {"python": "3.11.2"}
HERE = {"kernel": "7.2.13", "cpus": 1, "syscall_us": 15.0, "thread_us": 120.0}


def both(figure: float) -> dict[str, float]:
    return {"up": figure, "down": figure + 1}


def report(lost: int, gap: float, *, dark: float = 0.0, **changes: object) -> dict[str, Any]:
    split = {
        "dark_ms": both(dark) if dark else {"up": 0.0, "down": 0.0},
        "beyond_dark_ms": both(gap - dark),
        "round_trip_ms": 40.0,
    }
    base: dict[str, Any] = {
        "scenario": "handover",
        "ok": True,
        "esp": "kernel",
        "strongswan": "5.9.8",
        "guest": "uml",
        "clock": "real",
        "machine": HERE,
        "traffic": {
            "lost": lost,
            "sent": 1000,
            "longest_gap_ms": gap + 1,
            "gap_ms": both(gap),
            **split,
            "interval_ms": 5.0,
            "causes": {"up: EPERM at mn": lost},
        },
        "air": {"messages": 2, "octets": 400},
        "gateways": {"messages": 4, "octets": 452},
        "phases_ms": {"export": 4.0, "confirm": gap},
        "cpu_ms": {"mn": None, "psg": 10.0 + gap, "nsg": 20.0},
        "baseline": [
            {
                "name": "psk",
                "title": "PSK",
                "interruption_ms": 10 * (gap + 1),
                "gap_ms": {"up": 10 * gap, "down": 10 * (gap + 1)},
                **split,
                "beyond_dark_ms": {"up": 10 * gap - dark, "down": 10 * (gap + 1) - dark},
                "lost": 90,
                "messages": 6,
                "octets": 1900,
            }
        ],
        "ratio": 10.0,
        "ratio_beyond_dark": 10.0,
    }
    return base | changes


def summed(*reports: dict[str, Any], command: str = "ikectx lab bench") -> dict[str, Any]:
    return summarise(reports, HOST, command)


def drain(**changes: object) -> dict[str, Any]:
    base: dict[str, Any] = {
        "command": "ikectx lab bench --drain 200",
        "sas": 200,
        "seconds": 14.0,
        "sas_per_second": 14.3,
        "cpu_ms_per_sa": {"psg": 48.0, "nsg": 58.0},
        "memory_kib_per_sa": 40.5,
        "memory_kib": {"psg": 4000, "nsg": 4100},
        "lost": 3,
        "sent": 6000,
        "gap_ms": both(20.0),
        "interval_ms": 5.0,
        "recovered": True,
        "esp": "kernel",
        "strongswan": "5.9.8",
        "guest": "uml",
        "clock": "real",
        "machine": HERE,
        "host": HOST,
    }
    return base | changes


def profiled(**parts: float) -> dict[str, Any]:
    return drain(
        charon_ms_per_sa={"psg": 2.0, "nsg": 3.0, "mn": 9.0},
        profile_ms={"psg": {name: ms / 2 for name, ms in parts.items()}, "nsg": parts},
    )


def line(text: str, section: str, begins: str) -> str:
    """The row of a table of that section that begins so."""
    part = text.split(f"## {section}")[1].split("\n## ", maxsplit=1)[0]
    return next(one for one in part.splitlines() if one.startswith(f"| {begins} |"))


def test_medians_and_each_runs_losses() -> None:
    summary = summed(report(2, 10.0), report(0, 5.0), report(1, 30.0), report(9, 9.0, traffic=None))
    row = summary["parts"]["real"]["scenarios"]["handover"]
    assert (row["runs"], row["lost"], row["lost_median"]) == (3, [2, 0, 1], 1)
    assert row["gap_ms"] == {"up": 10.0, "down": 11.0} and row["gaps"] == [11.0, 6.0, 31.0]
    assert row["causes"] == {"up: EPERM at mn": 3}
    assert row["phases_ms"] == {"export": 4.0, "confirm": 10.0}
    assert row["cpu_ms"] == {"mn": None, "psg": 20.0, "nsg": 20.0}


def test_ratios_are_of_one_run_each() -> None:
    slow = report(2, 100.0)
    slow["baseline"][0]["gap_ms"] = both(100.0)
    found = row([report(2, 10.0), slow, report(2, 10.0)])["ways"]["PSK"]
    assert found["ratio"] == 10.0


def test_what_is_not_known_in_some_runs_is_the_median_of_the_rest() -> None:
    lacks = report(2, 10.0)
    lacks["traffic"] |= {"dark_ms": None, "beyond_dark_ms": None}
    assert row([lacks, report(2, 10.0, dark=4.0)])["beyond_ms"] == {"up": 6.0, "down": 7.0}
    alone = row([lacks])
    assert alone["dark_ms"] is None is alone["beyond_ms"] and alone["ways"]["PSK"]["ratio_beyond"] is None
    assert "| 10 / 11 | – | – | – |" in page(summed(lacks))


def test_the_page_holds_command_gaps_and_what_of_them_is_the_links() -> None:
    text = page(summed(report(2, 115.0, dark=40.0), command="ikectx lab bench --runs 1"))
    assert "ikectx lab bench --runs 1" in text
    assert line(text, "Gaps", "handover") == "| handover | 116 | 115 / 116 | 40 / 41 | 75 / 76 | 1.9 / 1.9 |"
    assert line(text, "Against", "handover | anew, PSK").endswith(
        "| 1150 / 1160 | 1110 / 1120 | 10.0 | 14.7 |"
    )
    assert line(text, "Messages", "handover | ikectx").endswith("| 2 | 400 | 4 | 452 |")
    assert "| handover | real | 2 | 2 | 1000 | 2 up: EPERM at mn |" in text


def test_real_and_virtual_time_stand_side_by_side() -> None:
    virtual = report(0, 5.0, clock="virtual", cpu_ms=dict.fromkeys(("mn", "psg", "nsg")))
    summary = merge({"a": summed(report(2, 10.0)), "b": summed(virtual)}, "c")
    text = page(summary)
    assert line(text, "Gaps", "handover").count("|") == 12
    assert "| 10 / 11 |" in line(text, "Gaps", "handover") and "| 5 / 6 |" in line(text, "Gaps", "handover")
    # computing takes no virtual time
    assert line(text, "CPU time", "handover") == "| handover | – | 20 | 20 |"


def test_the_page_says_what_machine_it_was() -> None:
    text = page(
        merge({"a": summed(report(2, 10.0)), "b": alone("drains", drain(esp="libipsec", guest="host"))}, "c")
    )
    assert (
        line(text, "The machine", "real time") == "| real time | Some CPU | 2 | like others, on 2 | 6.1.0 "
        "| uml | 7.2.13 | 1 | real | kernel | – | 15 | 120 |"
    )
    assert "| none |" in line(text, "The machine", "drains")
    told = summarise([report(2, 10.0)], {**HOST, **PYTHON}, "a command")
    assert "| kernel | 3.11.2 | 15 |" in page(merge({"a": told}, "c"))


def test_figures_of_one_column_are_by_one_python() -> None:
    one = summarise([report(2, 10.0)], HOST, "a command")
    other = summarise([report(3, 10.0, scenario="pull")], {**HOST, **PYTHON}, "a command")
    with pytest.raises(UsageError, match=r"python was not told, 3\.11\.2 in b"):
        merge({"a": one, "b": other}, "c")


def test_cpu_time_natively_and_in_a_guest() -> None:
    native = report(9, 7.0, esp="libipsec", guest="host", cpu_ms={"mn": 30.5, "psg": 1.0, "nsg": 2.0})
    text = page(merge({"a": summed(report(2, 10.0)), "b": summed(native)}, "c"))
    assert line(text, "CPU time", "handover") == "| handover | 30 | 1 | 2 | – | 20 | 20 |"
    assert "natively" not in text.split("## Gaps")[1].split("\n## ")[0]


def test_a_drain_is_told_with_what_one_sa_costs() -> None:
    text = page(
        merge({"a": alone("drains", drain()), "b": alone("drains", drain(sas=1000, seconds=100.0))}, "c")
    )
    start = "| 200 | uml | real | kernel | 14 | 14 | 48 | 58 | – + – + – | 40 | 3 of 6000 | 20 / 21 |"
    assert start in text and text.index(start) < text.index("| 1000 | uml | real | kernel | 100 | 10 |")
    assert "Gaps" not in text and "No name collides. CPU" in text
    segments = page(merge({"a": alone("drains", drain(segments=16))}, "c"))
    assert "No name collides. charon has 16 HA segments (`segment_count`). CPU" in segments


def test_the_table_of_mobiarch_has_their_rows_and_every_mode_of_this_run() -> None:
    away = report(9, 40.0, scenario="reactive")
    virtual = report(9, 20.0, scenario="reactive", clock="virtual")
    summary = merge({"a": summed(report(2, 10.0), away), "b": summed(virtual)}, "c")
    text = page(summary).split("## The table of MobiArch'08")[1]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert [row.split(" | ")[1:4] for row in rows[:3]] == [
        ["1500", "11", "2182"],
        ["1300", "8", "1896"],
        ["20", "1", "106"],
    ]
    assert rows[3:] == [
        "| IKEv2 anew, PSK (handover) | 110 | 6 | 1900 |  |",
        "| IKEv2 anew, PSK (reactive) | 410 | 6 | 1900 | 210 |",
        "| push: psg sends | 11 | 2 | 400 |  |",
        "| reactive: the MN moves, tells nsg | 41 | 2 | 400 | 21 |",
    ]


def test_collisions_have_a_table_of_their_own() -> None:
    one = report(1, 10.0, scenario="collision-all", others={"mn2": {"lost": 3}}, baseline=[])
    text = page(summed(report(2, 10.0), one))
    assert "| collision-all | 1 | 1 | 10 / 11 | 3 | 2 | 400 |" in text
    assert text.count("| collision-all |") == 1
    assert "taken at nSG" not in page(summed(report(2, 10.0)))


def test_every_table_has_as_many_cells_in_each_row() -> None:
    one = report(1, 10.0, scenario="collision-all", others={"mn2": {"lost": 3}}, baseline=[])
    virtual = report(0, 5.0, scenario="pull", clock="virtual", baseline=[])
    native = report(9, 7.0, esp="libipsec", guest="host", scenario="reactive")
    files = {"a": summed(report(2, 10.0), one), "b": summed(virtual), "c": summed(native)}
    text = page(merge({**files, "d": alone("drains", drain())}, "e"))
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table


def test_every_mode_is_measured_and_is_there() -> None:
    assert set(MODES) <= set(SCENARIOS)
    assert set(SCENARIOS) <= set(lab_scenario.names())
    for name in MODES:
        verbs = [step for step in lab_scenario.load(name).steps if isinstance(step, tuple)]
        assert {step[1] for step in verbs if step[0] == "baseline"} == {"psk", "cert", "eap"}
        assert (("dark",) in verbs) is lab_scenario.load(name).relocates


def test_the_picture_is_a_picture() -> None:
    found = ElementTree.fromstring(picture(summed(report(2, 10.0)))).findall(
        "{http://www.w3.org/2000/svg}rect"
    )
    assert len(found) == 2
    dark = picture(summed(report(2, 115.0, dark=40.0)))
    assert len(ElementTree.fromstring(dark).findall("{http://www.w3.org/2000/svg}rect")) == 4


def test_drop_counters_of_three_files() -> None:
    text = (
        "XfrmInNoStates          \t7\nIp: Forwarding InAddrErrors InDiscards\nIp: 2 5 0\nTcp: 1 2\nTcp: 3 4\n"
        "Ip6InReceives                   \t99\nIp6InAddrErrors                 \t3\n"
    )
    assert parse_counters(text) == {"XfrmInNoStates": 7, "IpInAddrErrors": 5, "Ip6InAddrErrors": 3}


# -- results that were saved

ROOT = Path(__file__).parent.parent.parent.parent
PUBLISHED = tuple(
    sorted(f"docs/benchmarks/{path.name}" for path in (ROOT / "docs/benchmarks").glob("*.json"))
)
COMMAND = re.compile(r"^ikectx lab bench (--from .*)$", re.MULTILINE)


def bench(*words: str) -> int:
    return run(["lab", "bench", *words])


def saved(folder: Path, name: str, *reports: dict[str, Any], command: str = "ikectx lab bench") -> str:
    path = folder / name
    path.write_text(json.dumps(summed(*reports, command=command)))
    return str(path)


def test_the_published_page_is_what_the_program_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/benchmarks").symlink_to(ROOT / "docs/benchmarks")
    monkeypatch.chdir(tmp_path)
    page_file = "docs/benchmarks.md"
    published = (ROOT / page_file).read_text()
    told = COMMAND.search(published)
    assert told is not None
    words = told[1].split()
    assert sorted(words[1:-2:2]) == list(PUBLISHED)
    assert bench(*words) == 0
    assert (tmp_path / page_file).read_text() == published
    for name in ("benchmarks.svg", "benchmarks-paths.svg"):
        assert (tmp_path / "docs" / name).read_text() == (ROOT / "docs" / name).read_text()
    printed = capsys.readouterr().out
    assert printed == re.sub(r"!\[.*\]\(benchmarks.*\)\n\n", "", published)


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_results_name_nothing_of_the_machine_they_are_from(file: str) -> None:
    text = (ROOT / file).read_text()
    assert "/" not in text
    found = json.loads(text)
    kinds = {"sas": "drains", "attack": "attacks", "modes": "handovers", "moves": "moves", "rows": "others"}
    kinds = {} if "parts" in found else kinds
    made = next((alone(kind, found) for key, kind in kinds.items() if key in found), found)
    assert read(text, file) == made


def test_where_the_cpu_time_goes_stands_beside_the_figure() -> None:
    made = profiled(VICI=2.0, engine=6.0)
    assert read(json.dumps(made), "x.json") == alone("drains", made)
    text = page(merge({"a": alone("drains", drain()), "b": alone("drains", made)}, "c"))
    assert text.count("| 200 | uml | real |") == 1, "what sampling costs is not in the figures"
    where = "Where the CPU time of an SA goes"
    assert line(text, where, "engine") == "| engine | 3 | 6 | 9 | 75 |"
    assert line(text, where, "VICI") == "| VICI | 1 | 2 | 3 | 25 |"
    assert text.index("| engine | 3") < text.index("| VICI | 1"), "the largest first"
    assert line(text, where, "the agents") == "| the agents | 4 | 8 | 12 | 100 |"
    assert line(text, where, "their charons") == "| their charons | 2 | 3 | 5 | 42 |"
    assert where not in page(alone("drains", drain()))
    with pytest.raises(UsageError, match="profile_ms must be numbers by two names"):
        read(json.dumps(made | {"profile_ms": {"psg": {"VICI": "2"}}}), "x.json")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--profile"], "--profile is of --drain and --moves"),
        (["--profile", "--handovers"], "--profile is of --drain and --moves"),
        (["--profile", "--moves", "3", "--time", "virtual"], "--profile needs --time real"),
    ],
)
def test_what_has_no_profile(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*words) == 2
    assert why in capsys.readouterr().err


def test_what_json_prints_is_read_back_whole() -> None:
    away = report(9, 40.0, scenario="reactive", ratio=None, others={"mn2": {"lost": 3}})
    summary = summed(report(2, 10.0), away, command="ikectx lab bench --runs 1")
    assert read(json.dumps(summary), "x.json") == summary
    assert read(json.dumps(drain()), "x.json") == alone("drains", drain())
    one = merge({"x.json": summary}, "ikectx lab bench --from x.json")
    assert {**one, "command": summary["command"]} == summary


def test_each_command_stands_by_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = saved(tmp_path, "a.json", report(2, 10.0), command="ikectx lab bench handover")
    second = saved(tmp_path, "b.json", report(1, 5.0, scenario="pull"), command="ikectx lab bench pull")
    assert bench("--from", first, "--from", second, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["parts"]["real"]["scenarios"]) == ["handover", "pull"]
    assert summary["command"].splitlines() == [
        f"ikectx lab bench handover --json > {first}",
        f"ikectx lab bench pull --json > {second}",
        f"ikectx lab bench --from {first} --from {second}",
    ]
    assert "| pull | real | 1 | 1 | 1000 |" in page(summary)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({}, "handover is in "),
        ({"scenario": "pull", "strongswan": "6.0.1"}, "strongswan was 5.9.8 in .*, 6.0.1 in "),
        ({"scenario": "pull", "guest": "qemu"}, "real time: guest was uml, qemu in "),
        ({"scenario": "pull", "machine": {**HERE, "cpus": 2}}, "guest_cpus was 1, 2 in "),
    ],
)
def test_results_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any], says: str
) -> None:
    first = saved(tmp_path, "a.json", report(2, 10.0))
    second = saved(tmp_path, "b.json", report(1, 5.0, **other))
    target = tmp_path / "page.md"
    assert bench("--from", first, "--from", second, "--page", str(target)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(says, err)
    assert not target.exists()


ROW = row([report(2, 10.0)])


def with_row(one: dict[str, Any]) -> dict[str, Any]:
    machine = summed(report(2, 10.0))["parts"]["real"]["machine"]
    return {**summed(), "parts": {"real": {"machine": machine, "scenarios": {"a": one}}}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not an object"),
        ("{}", "command must be text"),
        (json.dumps({**summed(), "parts": []}), "the result.parts must be objects by name"),
        (json.dumps({**summed(), "parts": {"x": {}}}), "parts.x: there are real, virtual, native"),
        (json.dumps({**summed(), "parts": {"real": {"scenarios": {}}}}), "machine must be an object"),
        (json.dumps({**summed(), "drains": {}}), "drains must be a list"),
        (json.dumps({**summed(), "drains": [{}]}), r"drains\.0\.sas must be a number"),
        (json.dumps({**drain(), "machine": 1}), r"the drain\.machine must be an object"),
        (json.dumps({**drain(), "host": {}}), r"the drain\.host\.cpu must be text"),
        (json.dumps(with_row({})), r"real\.a\.runs must be a number"),
        *(
            (
                json.dumps(with_row({**ROW, key: value})),
                rf"real\.a\.{key} must be {kind}",
            )
            for key, value, kind in (
                ("lost", 1, "numbers"),
                ("lost_median", None, "a number"),
                ("sent", True, "a number"),
                ("gap_ms", None, "numbers by name"),
                ("cpu_ms", {"psg": "1"}, "numbers by name or null"),
                ("ratio", "1", "a number or null"),
                ("causes", {"x": "y"}, "numbers by name"),
                ("ways", {"PSK": 1}, "objects by name"),
            )
        ),
        (
            json.dumps(with_row({**ROW, "ways": {"PSK": {}}})),
            r"real\.a\.ways\.PSK\.interruption_ms must be a number",
        ),
    ],
)
def test_a_file_that_holds_something_else(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        read(text, "x.json")
    assert str(caught.value).startswith("x.json: ")


def test_a_row_is_checked_in_every_key() -> None:
    for key in ROW:
        rest = {name: value for name, value in ROW.items() if name != key}
        with pytest.raises(UsageError, match=key):
            read(json.dumps(with_row(rest)), "x.json")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--from", "{}/a.json", "pull"), "without scenarios"),
        (("--from", "{}/none.json"), "none.json"),
        (("--from", "{}/a.json", "--page", "{}/no/such.md"), "no such folder"),
        (("--page", "{}/no/such.md"), "no such folder"),
        (("--page", "{}/no/such.md", "no-such-scenario"), "no such folder"),
    ],
)
def test_what_cannot_be_written_or_read_is_said_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.setattr(lab.lab_start, "run", lambda *_: pytest.fail("it runs"))
    saved(tmp_path, "a.json", report(2, 10.0))
    assert bench(*(word.format(tmp_path) for word in words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err


def test_runs_name_the_command_that_ran_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def fake(request: Any, _say: object) -> list[dict[str, Any]]:
        asked.append(request)
        return [
            report(2, 10.0, scenario=name, ok=name != "pull", clock=request.clock, esp=request.esp)
            for name in request.names
        ]

    monkeypatch.setattr(lab.lab_start, "run", fake)
    words = ("--runs", "2", "--guest", "uml", "--time", "virtual", "handover", "pull", "--json")
    assert bench(*words) == 1
    summary = json.loads(capsys.readouterr().out)
    assert summary["command"] == "ikectx lab bench --runs 2 --guest uml --time virtual handover pull"
    assert (asked[0].names, asked[0].clock) == (("handover", "handover", "pull", "pull"), "virtual")
    assert list(summary["parts"]) == ["virtual"]
    assert "all are counted: pull, virtual time (2 of 2 runs)." in page(summary)
    assert "Not every run" not in page(summed(report(2, 10.0)))
    assert bench("--runs", "1", "--esp", "libipsec", "--json") == 1
    assert asked[1].names == tuple(MODES) and asked[1].esp == "libipsec"
    assert list(json.loads(capsys.readouterr().out)["parts"]) == ["native"]


def test_a_drain_prints_what_one_sa_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def fake(size: int, *words: str, libipsec: bool, profile: bool, say: object) -> dict[str, Any]:
        assert not profile
        asked.append((size, *words, libipsec))
        return {key: value for key, value in drain(sas=size).items() if key != "command"}

    monkeypatch.setattr(lab_emptying, "run", fake)
    target = tmp_path / "page.md"
    assert bench("--guest", "uml", "--drain", "200", "--json", "--page", str(target)) == 0
    told = json.loads(capsys.readouterr().out)
    assert asked == [(200, "uml", "real", False)]
    assert told["command"] == "ikectx lab bench --guest uml --drain 200"
    assert (told["sas"], told["seconds"], told["lost"], told["memory_kib_per_sa"]) == (200, 14.0, 3, 40.5)
    assert told["cpu_ms_per_sa"] == {"psg": 48.0, "nsg": 58.0}
    assert "A gateway is drained" in target.read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--drain", "5", "handover"), "goes without scenarios"),
        (("--drain", "0"), "0 is not in the range"),
        (("--drain", "5", "--guest", "host", "--time", "virtual"), "has no virtual time"),
    ],
)
def test_a_drain_of_what_cannot_be(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert bench(*words) == 2
    assert says in capsys.readouterr().err


def test_of_a_drain_totals_become_figures_for_one_sa() -> None:
    told = lab_emptying.summary(
        200, 14.04, {"psg": 9600.0, "nsg": None}, {"psg": 4000, "nsg": 4100}, {"lost": 0}
    )
    assert told == {
        "sas": 200,
        "seconds": 14.04,
        "sas_per_second": 14.2,
        "cpu_ms_per_sa": {"psg": 48.0, "nsg": None},
        "memory_kib_per_sa": 40.5,
        "memory_kib": {"psg": 4000, "nsg": 4100},
        "lost": 0,
    }


def test_what_was_measured_is_told_though_the_page_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs take an hour: nothing of them may be lost."""
    monkeypatch.setattr(lab.lab_start, "run", lambda *_: [report(2, 10.0)])
    monkeypatch.setattr(lab.lab_start, "guests", lambda _request: ("uml", "qemu"))
    (tmp_path / "page.svg").mkdir()
    assert bench("handover", "--page", str(tmp_path / "page.md")) == 2
    out, err = capsys.readouterr()
    assert "| handover | real | 2 | 2 | 1000 |" in out
    assert "page.svg: Is a directory" in err
