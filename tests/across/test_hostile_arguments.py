"""Every option and argument of every command, with what nobody means: exit 2 and words, never a traceback."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from ikectx.errors import LinkError
from ikectx_cli import answers, commands
from ikectx_cli.lab import (
    attack as lab_attack,
)
from ikectx_cli.lab import (
    commands as lab,
)
from ikectx_cli.lab import (
    emptying as lab_emptying,
)
from ikectx_cli.lab import (
    guest as lab_guest,
)
from ikectx_cli.lab import (
    start as lab_start,
)
from ikectx_cli.lab.hosts import Lab
from vici_bridge.vici import client as vici

ROOT = commands.cli
SPOKEN = (0, 2, 4, 5, 6)
"""Exit codes of a command line that is right, or whose error has a name: nobody is asked in these tests."""


def walk(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from walk(below, (*words, name))


COMMANDS = [(words, command) for words, command in walk(ROOT, ()) if words != ("updown",)]


def valued(command: click.Command) -> list[click.Parameter]:
    return [
        one for one in command.params if not (isinstance(one, click.Option) and (one.is_flag or one.count))
    ]


def spelled(param: click.Parameter, value: str) -> list[str]:
    if isinstance(param, click.Argument):
        return ["--", value]
    return [f"{param.opts[0]}={value}"]


NEEDED = {
    "to": "nsg",
    "from_": "psg",
    "mn": "10.0.0.1",
    "sa": "1",
    "transfer": "1",
    "host": "psg",
    "command": "true",
}
NEEDED |= {"moved": "1", "serving": "1", "end": "1", "attack": "flood"}


def line(words: tuple[str, ...], command: click.Command, param: click.Parameter, value: str) -> list[str]:
    """A command line that is right but for this one value."""
    options, rest = [], []
    for one in command.params:
        word = NEEDED.get(str(one.name), "x")
        if one is param or not (one.required or (param.name in ("rate", "seconds") and one.name == "attack")):
            continue
        (rest if isinstance(one, click.Argument) else options).extend(
            [word] if isinstance(one, click.Argument) else spelled(one, word)
        )
    given = spelled(param, value)
    where = [*options, *given, *rest] if isinstance(param, click.Option) else [*options, "--", value, *rest]
    return [*words, *where]


NUMBERS = (
    "",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "0x10",
    "1.5.2",
    "9" * 20,
    "9" * 5000,
    "-" + "9" * 30,
    "٣",
    "\udcff",
    "\0",
)
ADDRESSES = (
    "",
    "::%x",
    "fe80::1%eth0",
    "10.0.0.256",
    "1.2.3",
    "10.0.0.1/24",
    "0x7f.1",
    "-1",
    "9" * 5000,
    "\udcff",
    "\0",
    "::ffff:1.2.3.4%1",
)
NAMES = ("", " ", "\0", "a\0b", "\udcff", "x" * 5000, "é" * 3000)
PATHS = ("", "\0", "/dev/null/x", "/" + "x" * 300, "x" * 5000, "/proc/self/mem", "/no/such/file")


def is_number(param: click.Parameter) -> bool:
    return isinstance(param.type, click.types.IntParamType | click.types.FloatParamType)


def cases() -> Iterator[Any]:
    for words, command in COMMANDS:
        for param in valued(command):
            named = f"{'-'.join(words) or 'ikectx'}-{param.name}"
            if is_number(param):
                yield pytest.param(words, command, param, NUMBERS, id=f"{named}-number")
            elif param.callback is answers.an_address:
                yield pytest.param(words, command, param, ADDRESSES, id=f"{named}-address")
            elif param.type is answers.WORDS:
                yield pytest.param(words, command, param, NAMES, id=f"{named}-name")


def other_cases() -> Iterator[Any]:
    for words, command in COMMANDS:
        for param in valued(command):
            if not is_number(param) and param.type is not answers.WORDS:
                yield pytest.param(words, command, param, id=f"{'-'.join(words) or 'ikectx'}-{param.name}")


@pytest.fixture(autouse=True)
def nobody_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No agent answers, and no lab, guest or namespace is made."""

    def away(*_args: Any, **_rest: Any) -> Any:
        raise LinkError("nobody there")

    monkeypatch.setattr(vici, "_connect", away)
    for owner, name in [
        (lab_start, "run"),
        (lab_attack, "run"),
        (lab_emptying, "run"),
        (lab_guest, "run_job"),
        (Lab, "new"),
        (Lab, "find"),
        (lab, "sweep"),
    ]:
        monkeypatch.setattr(owner, name, away)
    monkeypatch.setattr(lab, "load_modules", lambda: None)
    monkeypatch.setattr(lab, "has_kernel_esp", lambda: True)
    monkeypatch.setenv("IKECTX_SOCKET", str(tmp_path / "no.socket"))
    config = tmp_path / "ikectx.toml"
    config.write_text("")
    monkeypatch.setenv("IKECTX_CONFIG", str(config))
    monkeypatch.setenv("IKECTX_MOBILE_CONFIG", str(config))
    monkeypatch.chdir(tmp_path)


def test_there_is_something_to_try() -> None:
    assert len(COMMANDS) > 20 and len(list(cases())) > 25


@pytest.mark.parametrize(("words", "command", "param", "values"), list(cases()))
def test_what_is_no_number_address_or_name_is_exit_2(
    words: tuple[str, ...],
    command: click.Command,
    param: click.Parameter,
    values: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for value in values:
        if is_number(param) and value in ("-1", "inf", "1e999", "٣") and _takes(param, value):
            continue  # a number in its range, as Python reads it
        code = commands.run(line(words, command, param, value))
        told = capsys.readouterr()
        assert code == 2, (value[:40], code, told)
        assert "Traceback" not in told.err and len(told.err) < 6000


def _takes(param: click.Parameter, value: str) -> bool:
    try:
        param.type.convert(value, param, None)
    except click.BadParameter:
        return False
    return True


@pytest.mark.parametrize(("words", "command", "param"), list(other_cases()))
def test_nothing_else_ends_in_a_traceback(
    words: tuple[str, ...], command: click.Command, param: click.Parameter, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in dict.fromkeys((*NAMES, *PATHS, *ADDRESSES, *NUMBERS)):
        code = commands.run(line(words, command, param, value))
        assert code in SPOKEN, (value[:40], code, capsys.readouterr())


@pytest.mark.parametrize("path", ["/dev/zero", "/", "/proc/self/mem", "/no/such/file", "\udcff"])
@pytest.mark.parametrize("words", [["serve"], ["doctor"], ["mobile", "serve"]])
def test_a_configuration_that_is_none_is_exit_2(
    words: list[str], path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = commands.run([*words[:-1], f"--config={path}", words[-1]])
    assert code == 2, capsys.readouterr()


def test_a_huge_configuration_is_not_read_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = tmp_path / "huge.toml"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    assert commands.run([f"--config={huge}", "serve"]) == 2
    assert "more than 1048576 octets" in capsys.readouterr().err
    assert commands.run(["lab", "bench", f"--from={huge}"]) == 2


def test_a_socket_path_that_is_too_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert commands.run([f"--socket=/tmp/{'x' * 200}", "status"]) == 2
    assert "too long" in capsys.readouterr().err
    assert isinstance(socket.AF_UNIX, int)
