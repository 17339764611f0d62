"""What several commands of `ikectx lab` have in common: options, and how they say and write something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ikectx.errors import UsageError

from ..toml_table import text_of
from . import guest as lab_guest

Command = TypeVar("Command", bound=Callable[..., Any])

MOST_OCTETS = 64 << 20
"""Of a file that is read; those of this project have some 100 KiB."""
MOST_RUNS = 10_000
"""Runs of one scenario."""

guest_option = click.option(
    "--guest",
    type=click.Choice(["auto", *lab_guest.WAYS]),
    default="auto",
    show_default=True,
    help="The kernel: this machine's (host), User-Mode Linux, or QEMU; auto: the first of them with ESP.",
)
clock_option = click.option(
    "--time",
    "clock",
    type=click.Choice(lab_guest.CLOCKS),
    default="real",
    show_default=True,
    help="virtual: time stands still while a program runs and jumps while all wait (UML, one CPU).",
)
root_option = click.option(
    "--root",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False, exists=True, resolve_path=True),
    default="/",
    help="Run on the installation in this folder (UML); nothing is written there.",
)
cpus_option = click.option(
    "--cpus", type=click.IntRange(1, 8), help="CPUs of the guest.  [default: 1, with KVM up to 4]"
)

from_option = click.option(
    "--from",
    "files",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Run nothing: take what --json printed before; several files are put together.",
)

esp_option = click.option(
    "--esp",
    type=click.Choice(["kernel", "libipsec"]),
    default="kernel",
    show_default=True,
    help="Where ESP is done: the guest's kernel, or charon (then auto is this machine).",
)


def page_option(what: str) -> Callable[[Command], Command]:
    """The option for a page that is made from the outcome; `what`: its help."""
    path = click.Path(path_type=Path, dir_okay=False)
    return click.option("--page", "target", metavar="FILE", type=path, help=what)


def milliseconds(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """A delay. Errors: click.BadParameter, also for nan."""
    if value is not None and not 0 <= value <= 10_000:
        raise click.BadParameter(f"{value:g} is not from 0 to 10000 ms", ctx, param)
    return value


def read(path: Path) -> str:
    """What a command of the lab wrote before. Errors: UsageError."""
    try:
        return text_of(path, MOST_OCTETS)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at octet {error.start}") from None


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None


def say(line: str) -> None:
    click.echo(line, err=True)
