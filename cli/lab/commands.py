"""`ikectx lab`: three charons, a router and a server on one machine, and scenarios that run on them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ikectx.errors import KernelError, UsageError

from ..answers import json_option, show_json
from . import guest as lab_guest
from . import scenario as lab_scenario
from . import start as lab_start
from .bench_command import bench
from .boot import Job, tidy
from .config import Tunnel
from .fleet import MOST
from .hosts import DEFAULT_NAME, Lab, names, sweep
from .kills_command import kills
from .net import HOSTS, has_kernel_esp, load_modules
from .options import (
    MOST_RUNS,
    clock_option,
    cpus_option,
    esp_option,
    guest_option,
    milliseconds,
    root_option,
    say,
    write,
)

MOST_SPIS = 1 << 64
"""IKE SPIs that there are."""


def _a_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Of folders, network namespaces and processes. Errors: click.BadParameter."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,15}", value):
        what = "is not 1 to 16 small letters, digits and hyphens"
        raise click.BadParameter(f"{value!r} {what}", ctx, param)
    return value


def _a_folder(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """One that can be made where it is not: said before anything runs. Errors: click.BadParameter."""
    if value and not os.path.isdir(Path(value).absolute().parent):
        raise click.BadParameter(f"there is no folder {Path(value).absolute().parent}", ctx, param)
    return value


name_option = click.option(
    "--name", default=DEFAULT_NAME, show_default=True, callback=_a_name, help="Of the lab."
)


@click.group(short_help="A testbed of network namespaces.")
def lab() -> None:
    """A testbed of network namespaces: mobile node, two gateways, router, server."""


@lab.command()
@name_option
@click.option(
    "--delay",
    default=20.0,
    show_default=True,
    callback=milliseconds,
    help="One-way delay of the access link in ms.",
)
@click.option(
    "--gateway-delay",
    default=1.0,
    show_default=True,
    callback=milliseconds,
    help="One-way delay between the gateways in ms.",
)
@click.option(
    "--esp",
    type=click.Choice(["kernel", "libipsec"]),
    default="kernel",
    show_default=True,
    help="Where ESP is done: this kernel, or charon.",
)
@click.option(
    "--auth",
    type=click.Choice(["psk", "cert", "eap"]),
    default="psk",
    show_default=True,
    help="How the mobile node and the gateways prove who they are.",
)
@click.option(
    "--family", type=click.Choice(["4", "6"]), default="4", show_default=True, help="Outer IP version."
)
@click.option("--agents/--no-agents", default=True, show_default=True, help="Also run the gateways' agents.")
@click.option("--connect/--no-connect", default=False, help="Also connect the mobile node to psg.")
@json_option
def up(
    name: str,
    delay: float,
    gateway_delay: float,
    esp: str,
    auth: str,
    family: str,
    agents: bool,
    connect: bool,
    as_json: bool,
) -> None:
    """Bring a lab up and leave it standing."""
    if esp != "libipsec":
        load_modules()
        if not has_kernel_esp():
            hint = "--esp libipsec, or in a guest: ikectx lab guest -- sh -c 'ikectx lab up && ...'"
            raise KernelError("this kernel has no ESP", hint=hint)
    sweep()
    made = Lab.new(name, delay_ms=delay, gateway_delay_ms=gateway_delay)
    with tidy():
        try:
            tunnel = Tunnel(auth=auth, family=int(family), inner=int(family), libipsec=esp == "libipsec")
            made.up(tunnel, agents=agents, keep=True)
            if connect:
                made.connect()
        except BaseException:
            made.down()
            raise
    if as_json:
        show_json({"name": name, "work": made.work, "warnings": list(made.warnings)})
        return
    for warning in made.warnings:
        click.echo(f"note: {warning}", err=True)
    click.echo(f"lab {name} is up in {made.work}: ikectx lab exec {{{','.join(HOSTS)}}} -- COMMAND")


@lab.command()
@name_option
@click.option("--all", "every", is_flag=True, help="All that `lab up` made.")
def down(name: str, every: bool) -> None:
    """Take a lab down, with everything in it."""
    sweep()
    for one in names(kept=True) if every else [name]:
        Lab.find(one).down()


@lab.command(
    "exec", context_settings={"ignore_unknown_options": True}, short_help="Run a command on one of its hosts."
)
@name_option
@click.argument("host", type=click.Choice(HOSTS))
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def exec_(name: str, host: str, command: tuple[str, ...]) -> None:
    """Run COMMAND on HOST (a shell does not take part: give `sh -c` for one)."""
    click.get_current_context().exit(Lab.find(name).attach(host, command))


@lab.command(
    context_settings={"ignore_unknown_options": True},
    short_help="Run a command on a kernel with ESP.",
)
@guest_option
@clock_option
@root_option
@cpus_option
@click.option(
    "--memory", metavar="MIB", type=click.IntRange(128, 1 << 20), help="Of the guest.  [default: 1536]"
)
@click.option(
    "--share",
    type=click.Path(path_type=Path, file_okay=False, exists=True, resolve_path=True),
    help="The one folder in which the guest's writes are kept.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def guest(
    guest: str,
    clock: str,
    root: Path,
    cpus: int | None,
    memory: int | None,
    share: Path | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND as root in a guest, in this folder; its exit status is that of COMMAND.

    What it writes is lost or refused, but for --share (and where the guest is this machine itself).
    """
    job = Job(command, lab_guest.folder_in(root), share, root=root, clock=clock, cpus=cpus or 0)
    if memory is not None:
        job = replace(job, memory_mib=memory)
    with tidy():
        click.get_current_context().exit(lab_guest.run_job(guest, job, _through, say))


def _through(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


@lab.command()
@json_option
def scenarios(as_json: bool) -> None:
    """List the scenarios."""
    found = {name: lab_scenario.load(name).description for name in lab_scenario.names()}
    if as_json:
        click.echo(json.dumps(found, indent=2))
    for name, description in () if as_json else found.items():
        click.echo(f"{name:28} {description}")


@lab.command(short_help="Run scenarios.")
@click.argument("names", nargs=-1, metavar="SCENARIO...")
@click.option("--all", "every", is_flag=True, help="Every scenario.")
@guest_option
@clock_option
@root_option
@cpus_option
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Run so many guests side by side; each takes the next scenario when it is free.",
)
@esp_option
@click.option(
    "--delay",
    type=float,
    callback=milliseconds,
    help="One-way delay of the access link in ms, instead of the scenario's.",
)
@click.option(
    "--gateway-delay",
    type=float,
    callback=milliseconds,
    help="One-way delay between the gateways in ms, instead of the scenario's.",
)
@click.option(
    "--others",
    "crowd",
    type=click.IntRange(0, MOST // 2),
    default=0,
    show_default=True,
    help="So many other SAs at each gateway.",
)
@click.option(
    "--repeat",
    type=click.IntRange(1, MOST_RUNS),
    default=1,
    show_default=True,
    help="Run each so many times.",
)
@click.option(
    "--brief",
    is_flag=True,
    help="Without what only figures need: the ways of today, and on an emulated CPU a fine probe.",
)
@click.option(
    "--logs",
    type=click.Path(file_okay=False),
    default="",
    callback=_a_folder,
    help="Keep logs in this folder.",
)
@click.option(
    "--trace",
    "picture",
    metavar="[FILE.svg]",
    is_flag=False,
    flag_value="",
    default=None,
    help="Draw each handover as a time line over all hosts; without FILE, or in a folder, as SCENARIO.svg.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON (several scenarios: a list).")
@click.option("--quiet", is_flag=True, help="No progress on standard error.")
def run(
    names: tuple[str, ...],
    every: bool,
    guest: str,
    clock: str,
    root: Path,
    cpus: int | None,
    jobs: int,
    esp: str,
    delay: float | None,
    gateway_delay: float | None,
    crowd: int,
    repeat: int,
    brief: bool,
    logs: str,
    picture: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run scenarios on a kernel with ESP: this machine's, or a guest's (--guest).

    Those it does not come to, because it is ended, count as failed.
    """
    chosen = lab_scenario.neighbours(lab_scenario.names()) if every else names
    wanted = [name for name in chosen for _ in range(repeat)]
    if picture is not None:
        _traces_to(picture, len(wanted))
    if not wanted:
        raise UsageError("which scenario?", hint="ikectx lab scenarios lists them; --all runs them all")
    request = lab_start.RunRequest(
        tuple(wanted),
        esp,
        guest,
        clock,
        str(root),
        cpus or 0,
        jobs,
        delay,
        gateway_delay,
        crowd,
        logs,
        brief,
        picture is not None,
    )
    single = len(wanted) == 1 and not every
    found: dict[int, dict[str, Any]] = {}
    try:
        reports = lab_start.run(request, (lambda _line: None) if quiet else say, found)
    except (KeyboardInterrupt, KernelError) as error:
        if found or isinstance(error, KeyboardInterrupt):
            _tell(lab_start.complete(request, found), as_json, single=single)
        raise
    _tell(reports, as_json, single=single)
    if picture is not None:
        _draw(reports, picture)
    if not all(report["ok"] for report in reports):
        click.get_current_context().exit(1)


def _draw(reports: Sequence[dict[str, Any]], where: str) -> None:
    """Writes the time lines of each run that has some, to a file or into a folder. Errors: UsageError."""
    from .timeline import picture
    from .trace import TimeLine

    found = [report for report in reports if report.get("trace")]
    if not found:
        raise UsageError("no handover ran that could be drawn", hint="a time line needs `traffic start`")
    for report in found:
        again = f"-{report['run']}" if "run" in report else ""
        path = Path(where) if where.endswith(".svg") else Path(where, f"{report['scenario']}{again}.svg")
        there = f"{report['guest']}, {report['clock']} time, strongSwan {report['strongswan']}"
        lines = [TimeLine.from_json(line) for line in report["trace"]]
        write(path, picture(lines, there, (report.get("traffic") or {}).get("dark_ms")))


def _traces_to(where: str, runs: int) -> None:
    """Can time lines be written there? Said before anything runs. Errors: UsageError."""
    folder = Path(where).parent if where.endswith(".svg") else Path(where or ".")
    if where.endswith(".svg") and runs > 1:
        raise UsageError(f"--trace {where}: {runs} runs need a folder, not a file")
    if not os.path.isdir(folder):  # which raises nothing, whatever the name
        hint = "a scenario's name goes before --trace" if where in lab_scenario.names() else ""
        raise UsageError(f"--trace {where}: there is no folder {folder}", hint=hint)


def _tell(reports: Sequence[dict[str, Any]], as_json: bool, *, single: bool) -> None:
    if as_json:
        click.echo(json.dumps(reports[0] if single else reports, indent=2))
    else:
        lab_start.show(reports)


@lab.command(short_help="Expected SPI collisions, and a simulation.")
@click.option("--moved", type=click.IntRange(0, MOST_SPIS), required=True, help="SAs that move.")
@click.option(
    "--serving", type=click.IntRange(0, MOST_SPIS), required=True, help="SAs the gateway has already."
)
@click.option(
    "--range",
    "spis",
    type=click.IntRange(1, MOST_SPIS),
    help="SPIs to choose from; charon's 2^28 by default.",
)
@click.option(
    "--runs",
    type=click.IntRange(0, 1_000_000),
    default=0,
    help="Simulated moves; 0: as some seconds allow, if any.",
)
@click.option(
    "--seed",
    type=click.IntRange(-(1 << 63), (1 << 63) - 1),
    default=1,
    show_default=True,
    help="Of the simulation.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def collisions(moved: int, serving: int, spis: int | None, runs: int, seed: int, as_json: bool) -> None:
    """Expected SPI collisions of SAs that move to a gateway, with a simulation beside the formulas."""
    from . import collisions as arithmetic

    found = arithmetic.expected(moved, serving, spis or arithmetic.RANGE)
    chance = arithmetic.simulate(moved, serving, found.spis, seed=seed, runs=runs)
    if as_json:
        simulated = None if chance is None else asdict(chance)
        click.echo(json.dumps({"expected": asdict(found), "simulated": simulated}, indent=2))
        return
    click.echo(f"{moved} SAs moved onto {serving}, {found.spis} SPIs")
    table = [("", "from one gateway", "from many gateways"), *arithmetic.rows(found, chance)]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


lab.add_command(bench)
lab.add_command(kills)
