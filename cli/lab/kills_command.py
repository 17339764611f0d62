"""`ikectx lab kills`: runs cases of `kill_cases` and tells which have failed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ikectx.errors import KernelError

from . import start as lab_start
from .options import clock_option, from_option, guest_option, page_option, read, root_option, say, write

MOST_CASES = 1_000_000


def _part(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, int]:
    """The first number and the step of "2/3": (1, 3)."""
    which, _, of = text.partition("/")
    if not (which.isdecimal() and of.isdecimal() and 1 <= int(which) <= int(of) <= MOST_CASES):
        raise click.BadParameter(f"{text!r} is not one such as 1/2")
    return int(which) - 1, int(of)


@click.command(short_help="Kill, cut and hang whatever takes part in a move, at each of its points.")
@click.option(
    "--sample",
    "count",
    type=click.IntRange(1, MOST_CASES),
    metavar="N",
    help="So many, of each mode and fault in turn.",
)
@click.option(
    "--seed", type=click.IntRange(0, (1 << 63) - 1), default=1, show_default=True, help="Of the sample."
)
@click.option("--mode", metavar="MODE", default="", help="Only cases of this mode.")
@click.option(
    "--part",
    metavar="K/N",
    default="1/1",
    callback=_part,
    help="Only the Kth of N parts of these: the others run elsewhere, and --from joins their outcomes.",
)
@click.option("--list", "only_list", is_flag=True, help="Run nothing: print the cases.")
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Run so many guests side by side.",
)
@guest_option
@clock_option
@root_option
@click.option("--logs", type=click.Path(file_okay=False), default="", help="Keep logs in this folder.")
@from_option
@page_option("Write the page there, in Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on standard error.")
@click.argument("names", nargs=-1, metavar="[CASE...]")
def kills(
    count: int | None,
    seed: int,
    mode: str,
    part: tuple[int, int],
    only_list: bool,
    jobs: int,
    guest: str,
    clock: str,
    root: Path,
    logs: str,
    files: tuple[Path, ...],
    target: Path | None,
    as_json: bool,
    quiet: bool,
    names: tuple[str, ...],
) -> None:
    """Run cases: a fault at a point of a move, after which exactly one gateway must serve the mobile node.

    A CASE is MODE.HOST.POINT.FAULT, as --list prints it; without any, all of them are run, or a sample.
    """
    from . import kill_cases, kill_page

    every = [kill_cases.case(name) for name in names] or kill_cases.cases(mode)
    chosen = (every if count is None else kill_cases.sample(every, count, seed))[part[0] :: part[1]]
    if only_list:
        _list(chosen, as_json)
        return
    if files:
        found = kill_page.merge([kill_page.read(read(file), str(file)) for file in files])
    else:
        request = lab_start.RunRequest(
            tuple(one.name for one in chosen),
            guest=guest,
            clock=clock,
            root=str(root),
            jobs=jobs,
            logs=logs,
            kills=True,
        )
        found = kill_page.summarise(
            _run(request, quiet=quiet), _command(guest, clock, mode, count, seed, part, names)
        )
    if target is not None:
        write(target, kill_page.page(found))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for name, why in found["why"].items():
            click.echo(f"{name}: {why}")
        click.echo(f"{found['cases']} cases, {found['passed']} passed, {len(found['failed'])} failed")
    if found["failed"]:
        click.get_current_context().exit(1)


def _run(request: lab_start.RunRequest, *, quiet: bool) -> list[dict[str, Any]]:
    """The reports; where it is ended, of the cases that came to their end. Raises IkectxError."""
    found: dict[int, dict[str, Any]] = {}
    try:
        return lab_start.run(request, (lambda _line: None) if quiet else say, found)
    except (KeyboardInterrupt, KernelError):
        if not found:
            raise
        return [found[number] for number in sorted(found)]


def _command(
    guest: str,
    clock: str,
    mode: str,
    count: int | None,
    seed: int,
    part: tuple[int, int],
    names: Sequence[str],
) -> str:
    """The command line that runs the same cases."""
    words = ["ikectx lab kills"]
    words += [f"--guest {guest}"] if guest != "auto" else []
    words += [f"--time {clock}"] if clock != "real" else []
    words += [f"--mode {mode}"] if mode else []
    words += [f"--sample {count} --seed {seed}"] if count is not None else []
    words += [f"--part {part[0] + 1}/{part[1]}"] if part[1] > 1 else []
    return " ".join([*words, *names])


def _list(cases: Sequence[Any], as_json: bool) -> None:
    names = [one.name for one in cases]
    click.echo(json.dumps(names, indent=2) if as_json else "\n".join(names))
