"""What people and programs see: JSON without secrets, tables, times."""

from __future__ import annotations

import ast
import json
from ipaddress import ip_address
from pathlib import Path

import pytest

from ikectx.errors import RefusedError
from ikectx.numbers import Encr, IdType, Integ, Prf
from ikectx.sa.context import (
    ChildContext,
    Endpoint,
    Identity,
    IkeContext,
    IkeGeneration,
    ReplayState,
    Secret,
    TrafficSelector,
)
from ikectx_cli import commands, render
from ikectx_cli.doctor.findings import Finding, show_findings
from ikectx_cli.mobile.commands import show_report
from ikectx_cli.progress import Progress, show_history, show_reports
from tests.control_agent import REFUSED, REPORT


def context() -> IkeContext:
    selector = TrafficSelector(ip_address("10.0.0.0"), ip_address("10.0.0.255"))
    generation = IkeGeneration(
        b"\x11" * 8,
        b"\x22" * 8,
        False,
        bytes(16),
        bytes(16),
        Secret(b"\xab\xcd" * 16),
        Prf.HMAC_SHA2_256,
        Encr.AES_GCM_16,
        256,
    )
    child = ChildContext(
        "net",
        0,
        False,
        b"\xc0\xff\xee\x00",
        b"\xde\xad\xbe\xef",
        bytes(16),
        bytes(16),
        Encr.AES_CBC,
        (selector,),
        (selector,),
        encr_bits=128,
        integ=Integ.HMAC_SHA2_256_128,
        secret=Secret(b"\xee\xff" * 16),
        inbound=ReplayState(9, 32, 7),
    )
    return IkeContext(
        "home",
        (generation,),
        Identity(IdType.FQDN, b"gw.example.org"),
        Identity(IdType.RFC822_ADDR, b"mn@example.org"),
        Endpoint.of("192.0.2.1", 4500),
        Endpoint.of("2001:db8::5".replace("2001:db8::5", "203.0.113.5"), 4500),
        (child,),
        unknown=((0xFF01, 99, b"\x41\xab\xcd"),),
    )


def test_context_json_redacts_unless_asked() -> None:
    shown = render.context_json(context())
    text = render.dump(shown)
    assert "abcd" * 3 not in text and "eeff" * 3 not in text and "keys" not in text
    assert shown["generations"][0]["secret"] == "<secret, 32 octets>"
    assert shown["unknown"] == [{"fpt": 0xFF01, "key": 99, "octets": 3}]
    assert shown["children"][0]["local_ts"] == ["10.0.0.0/24"]
    assert shown["children"][0]["inbound"]["bitmap"] == "0x7"
    assert (shown["spi_i"], shown["local"]) == ("11" * 8, "192.0.2.1:4500")
    full = render.context_json(context(), secrets=True)
    assert full["generations"][0]["secret"] == "abcd" * 16
    assert len(full["generations"][0]["keys"]["sk_d"]) == 64
    assert len(full["children"][0]["keys"]["integ_i"]) == 64
    assert "<secret" not in render.dump(full)
    assert "mn@example.org" in render.tree(full)


def test_dump_refuses_secrets() -> None:
    with pytest.raises(TypeError, match="secret"):
        render.dump({"a": [Secret(b"x")]})
    with pytest.raises(TypeError):
        render.dump(object())
    assert json.loads(render.dump({"a": ip_address("10.0.0.1")})) == {"a": "10.0.0.1"}


def test_texts() -> None:
    assert [render.duration(value) for value in (None, 5, 119.9, 600, 12000, 200000, -30, True)] == [
        "-",
        "5 s",
        "119 s",
        "10 min",
        "3 h 20 min",
        "2 d 7 h",
        "-30 s",
        "-",
    ]
    assert (
        render.when(None) == "-"
        and render.when(1e30) == "-"
        and render.when(1700000000).startswith("2023-11-1")
    )
    first, last = ip_address("10.0.0.1"), ip_address("10.0.0.9")
    assert render.selector_text(TrafficSelector(first, last)) == "10.0.0.1-10.0.0.9"
    assert render.selector_text(TrafficSelector(last, first)) == "10.0.0.9-10.0.0.1"
    assert (
        render.selector_text(TrafficSelector(first, first, 17, 53, 53, True)) == "10.0.0.1/32[17/53] dynamic"
    )
    assert render.selector_text(TrafficSelector(first, first, 6, 1, 9)) == "10.0.0.1/32[6/1-9]"
    assert render.selector_text(TrafficSelector(first, first, 6)) == "10.0.0.1/32[6]"


def test_a_peers_name_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    render.table(("peer",), [("\x1b[2Jgone\n",)])
    assert capsys.readouterr().out == "peer\n\\x1b[2Jgone\\x0a\n"


FROM_OUTSIDE = "\x1b[2Jgone"


def test_the_steps_of_one_transfer_stand_on_one_time_line(capsys: pytest.CaptureFixture[str]) -> None:
    step = {"step": "freeze", "host": "psg\x1b[2J", "start_ms": 1.0, "end_ms": 2.5}
    show_reports([{"mn": "carol", "result": "moved", "path": [step]}])
    out = capsys.readouterr().out
    assert out.splitlines()[-1].split() == ["freeze", "psg\\x1b[2J", "1.0", "2.5"]
    show_reports([{"mn": "carol", "result": "moved", "path": [step]}] * 2)
    assert "freeze" not in capsys.readouterr().out


def test_a_report_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """What the other gateway writes of its verdicts, and what an MN calls itself, are foreign."""
    verdict = {"context": FROM_OUTSIDE, "status": {"code": 1, "text": FROM_OUTSIDE}, "detail": FROM_OUTSIDE}
    keys = ("mn", "transfer_id", "result", "text", "hint", "state_here", "state_there")
    show_reports([{**REFUSED, **dict.fromkeys(keys, FROM_OUTSIDE), "verdicts": [verdict]}])
    show_history([{"role": FROM_OUTSIDE, "peer": FROM_OUTSIDE, "detail": FROM_OUTSIDE}])
    print(render.tree({FROM_OUTSIDE: FROM_OUTSIDE, "a": {FROM_OUTSIDE: 1}, "b": [{FROM_OUTSIDE: 1}]}))
    show_report({"connection": FROM_OUTSIDE, "detail": FROM_OUTSIDE, "hint": FROM_OUTSIDE, "exit_code": 1})
    show_findings([Finding(FROM_OUTSIDE, "fail", FROM_OUTSIDE, FROM_OUTSIDE)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("\\x1b[2Jgone") > 15


def test_json_cannot_steer_the_terminal() -> None:
    """DEL, CSI in one octet, a mark that turns the direction, a separator of lines, half a pair."""
    told = {"mn": "a\x7f\x9b2J\u202eb\u2028\ud800\U000e0001\x1b", "ü": ["😀"]}
    for indent in (None, 2):
        text = render.dump(told, indent=indent)
        assert all(line.isprintable() for line in text.split("\n"))
        assert json.loads(text) == told
        assert "ü" in text and "😀" in text


PRINTED = {"printable", "dump", "tree", "columns", "line", "len", "join"}
"""Calls that escape what they are given, or give a number."""


def is_safe(value: ast.expr | None) -> bool:
    """Whether nothing in the expression is somebody else's text."""
    match value:
        case None | ast.Constant() | ast.Name(id="HELP"):
            return True
        case ast.JoinedStr(values=parts):
            return all(map(is_safe, parts))
        case ast.FormattedValue(value=inside):
            return is_safe(inside)
        case ast.IfExp(body=one, orelse=other):
            return is_safe(one) and is_safe(other)
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=args):
            return name in PRINTED or (name == "rstrip" and not args and is_safe(value.func.value))  # type: ignore[attr-defined]
    return False


OWN = {
    ("updown.py", "ikectx: the agent on"),
    ("updown.py", "ikectx: the updown script cannot be run"),
}
"""To charon's log: a path of the configuration, and the system's words."""


def test_whatever_is_printed_goes_through_the_one_escape() -> None:
    wrong = []
    for path in Path(render.__file__).parent.rglob("*.py"):
        if "lab" in path.parts:
            continue  # a lab's hosts are its own
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or ast.unparse(call.func) not in ("print", "click.echo"):
                continue
            text = ast.unparse(call)
            if not all(map(is_safe, call.args)) and not any(
                path.name == name and start in text for name, start in OWN
            ):
                wrong.append(f"{path.name}:{call.lineno}: {text}")
    assert not wrong, wrong


def test_an_error_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RefusedError(f"nsg: {FROM_OUTSIDE}\nsecond line", hint=FROM_OUTSIDE)

    monkeypatch.setattr(commands.cli, "main", refused)
    assert commands.run(["status"]) == 4
    assert capsys.readouterr().err == "ikectx: nsg: \\x1b[2Jgone\nsecond line\nikectx: \\x1b[2Jgone\n"


def test_progress_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with Progress(live=True) as progress:
        progress.event({"transfer": "1", "phase": FROM_OUTSIDE, "mn": FROM_OUTSIDE, "detail": FROM_OUTSIDE})
        texts = [str(cell) for column in progress._table().columns for cell in column.cells]
    assert sum("\\x1b[2Jgone" in text for text in texts) == 3
    assert not any("\x1b" in text for text in texts)


def test_tables_and_progress_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    render.table(("mn", "result"), [("[red]x", "moved")], styles={"moved": "green"})
    assert "[red]x" in capsys.readouterr().out
    with Progress(live=True) as progress:
        for number in range(25):
            progress.event({"transfer": str(number), "phase": "offered", "mn": "a", "ms": 1.0})
        progress.event({"transfer": "1", "phase": "done", "report": REPORT})
        progress.event(None)


def test_a_terminal_that_is_too_narrow_for_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    headers = ("id", "peer", "SPIs", "children", "movable")
    row = (1, "mn@example.org", "a" * 33, ["net", "a-child-with-a-longer-name"], False)
    render.table(headers, [row], styles={"no": "yellow"})
    assert capsys.readouterr().out.splitlines() == [
        f"id 1  peer mn@example.org  SPIs {'a' * 33}",
        "    children net, a-child-with-a-longer-name  movable no",
    ]
    render.table(headers, [(*row[:3], None, True)])
    assert "┃" in capsys.readouterr().out
    prose = "as many words as there are, of which each has its place in the column of the table"
    render.table(("check", "found"), [("kernel", prose)], wraps="found")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "┃" in lines[1] and len(lines) == 6


def test_paragraphs_heed_the_width() -> None:
    words = " ".join(["word"] * 30)
    assert max(map(len, render.paragraph(("a", "b"), ("1", words), 40))) <= 40
    assert render.paragraph(("a", "b"), ("-", "2"), 40) == ["b 2"]
