"""Reports to medians, a page and a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ikectx.errors import UsageError
from ikectx_cli import lab, lab_scenario
from ikectx_cli.commands import run
from ikectx_cli.lab_bench import MODES, SCENARIOS, merge, page, picture, read, row, summarise
from ikectx_cli.lab_measure import parse_counters


def report(lost: int, gap: float, **changes: object) -> dict[str, Any]:
    base: dict[str, Any] = {
        "scenario": "handover",
        "ok": True,
        "esp": "kernel",
        "strongswan": "5.9.8",
        "traffic": {
            "lost": lost,
            "sent": 1000,
            "longest_gap_ms": gap,
            "interval_ms": 5.0,
            "causes": {"up: EPERM at mn": lost},
        },
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
    text = page(summarise([report(2, 10.0)], command="ikectx lab bench --runs 1"))
    assert "ikectx lab bench --runs 1" in text
    assert "| handover | 5 | 2 | 2 | 10 | 2 | 400 | 4 | 452 |" in text
    assert "100 (10.0 x)" in text
    assert "MobiArch'08" in text


def test_the_table_of_mobiarch_has_their_rows_and_every_mode_of_this_run() -> None:
    away = report(9, 40.0, scenario="reactive", ratio=12.5)
    native = [report(9, 7.0, scenario="reactive")]
    own = page(summarise([away], native)).split("own speed")[1]
    assert "| reactive | 5 | 9 | 9 | 7 | 70 | 1 to 10.0 |" in own
    text = page(summarise([report(2, 10.0), away], native)).split("## The table of MobiArch'08")[1]
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
    text = page(summarise([report(2, 10.0), one]))
    assert "| collision-all | 5 | 1 | 1 | 10 | 3 | 2 | 400 |" in text
    assert "| collision-all | ikectx" not in text
    lines = text.split("taken at nSG")[1].splitlines()
    head, row = lines[2], next(line for line in lines if line.startswith("| collision-all"))
    assert head.count("|") == row.count("|")
    assert "taken at nSG" not in page(summarise([report(2, 10.0)]))


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


# -- results that were saved

ROOT = Path(__file__).parent.parent
PUBLISHED = ("docs/benchmarks/modes.json", "docs/benchmarks/collisions.json")


def bench(*words: str) -> int:
    return run(["lab", "bench", *words])


def saved(folder: Path, name: str, *reports: dict[str, Any], command: str = "ikectx lab bench") -> str:
    path = folder / name
    path.write_text(json.dumps(summarise(reports, command=command)))
    return str(path)


def test_the_published_page_is_what_the_program_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/benchmarks").symlink_to(ROOT / "docs/benchmarks")
    monkeypatch.chdir(tmp_path)
    page_file = "docs/benchmarks.md"
    assert bench("--from", PUBLISHED[0], "--from", PUBLISHED[1], "--page", page_file) == 0
    published = (ROOT / page_file).read_text()
    assert (tmp_path / page_file).read_text() == published
    assert (tmp_path / "docs/benchmarks.svg").read_text() == (ROOT / "docs/benchmarks.svg").read_text()
    printed = capsys.readouterr().out
    assert printed == published.replace("![Gaps](benchmarks.svg)\n\n", "")


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_results_name_nothing_of_the_machine_they_are_from(file: str) -> None:
    text = (ROOT / file).read_text()
    assert "/" not in text
    assert read(text, file) == json.loads(text)


def test_what_json_prints_is_read_back_whole() -> None:
    away = report(9, 40.0, scenario="reactive", ratio=None, others={"mn2": {"lost": 3}})
    summary = summarise([report(2, 10.0), away], [away], "ikectx lab bench --runs 1")
    assert read(json.dumps(summary), "x.json") == summary
    one = merge({"x.json": summary}, "ikectx lab bench --from x.json")
    assert {**one, "command": summary["command"]} == summary


def test_each_command_stands_by_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = saved(tmp_path, "a.json", report(2, 10.0), command="ikectx lab bench handover")
    second = saved(tmp_path, "b.json", report(1, 5.0, scenario="pull"), command="ikectx lab bench pull")
    assert bench("--from", first, "--from", second, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["scenarios"]) == ["handover", "pull"]
    assert summary["command"].splitlines() == [
        f"ikectx lab bench handover --json > {first}",
        f"ikectx lab bench pull --json > {second}",
        f"ikectx lab bench --from {first} --from {second}",
    ]
    assert "| pull | 5 | 1 | 1 | 5 |" in page(summary)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({}, "handover is in "),
        ({"scenario": "pull", "strongswan": "6.0.1"}, "strongswan was 5.9.8 in .*, 6.0.1 in "),
        ({"scenario": "pull", "esp": "libipsec"}, "esp was kernel in "),
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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not an object"),
        ("{}", "command must be text"),
        (json.dumps({**summarise([]), "native": []}), "native must be objects by name"),
        (json.dumps({**summarise([]), "scenarios": {"a": {}}}), r"scenarios\.a\.runs must be a number"),
        *(
            (
                json.dumps({**summarise([]), "native": {"a": {**ROW, key: value}}}),
                rf"native\.a\.{key} must be {kind}",
            )
            for key, value, kind in (
                ("lost", 1, "numbers"),
                ("gap_ms", None, "a number"),
                ("gap_ms", True, "a number"),
                ("ratio", "1", "a number or null"),
                ("causes", {"x": "y"}, "numbers by name"),
                ("ways", {"PSK": 1}, "objects by name"),
            )
        ),
        (
            json.dumps({**summarise([]), "scenarios": {"a": {**ROW, "ways": {"PSK": {}}}}}),
            r"scenarios\.a\.ways\.PSK\.interruption_ms must be a number",
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
            read(json.dumps({**summarise([]), "scenarios": {"a": rest}}), "x.json")


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
    asked: list[tuple[tuple[str, ...], str]] = []

    def fake(request: Any, _say: object) -> list[dict[str, Any]]:
        asked.append((request.names, f"{request.guest} {request.esp}"))
        return [report(2, 10.0, scenario=name, ok=name != "pull") for name in request.names]

    monkeypatch.setattr(lab.lab_start, "run", fake)
    monkeypatch.setattr(lab.lab_start, "guests", lambda _request: ("qemu",))
    assert bench("--runs", "2", "--guest", "qemu", "handover", "reactive", "pull", "--json") == 1
    summary = json.loads(capsys.readouterr().out)
    assert summary["command"] == "ikectx lab bench --runs 2 --guest qemu handover reactive pull"
    twice = ("handover", "handover", "reactive", "reactive", "pull", "pull")
    assert asked == [(twice, "qemu kernel"), (("reactive", "reactive"), "auto libipsec")]
    assert list(summary["native"]) == ["reactive"]
    assert "all are counted: pull (2 of 2 runs)." in page(summary)
    assert "Not every run" not in page(summarise([report(2, 10.0)]))


def test_what_was_measured_is_told_though_the_page_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs take an hour: nothing of them may be lost."""
    monkeypatch.setattr(lab.lab_start, "run", lambda *_: [report(2, 10.0)])
    monkeypatch.setattr(lab.lab_start, "guests", lambda _request: ("uml", "qemu"))
    (tmp_path / "page.svg").mkdir()
    assert bench("handover", "--page", str(tmp_path / "page.md")) == 2
    out, err = capsys.readouterr()
    assert "| handover | 5 | 2 | 2 | 10 |" in out
    assert "page.svg: Is a directory" in err
