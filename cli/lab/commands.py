"""`ikectx lab`: three charons, a router and a server on one machine, and scenarios that run on them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ikectx.errors import KernelError, UsageError

from ..answers import a_number, json_option, show_json
from ..toml_table import text_of
from . import guest as lab_guest
from . import machine as lab_machine
from . import scenario as lab_scenario
from . import start as lab_start
from .boot import Job, tidy
from .config import Tunnel
from .damage import KINDS
from .fleet import MOST
from .hosts import DEFAULT_NAME, Lab, names, sweep
from .net import HOSTS, has_kernel_esp, load_modules

MOST_OCTETS = 64 << 20
"""Of a file for --from; those of this project have some 100 KiB."""
MOST_RUNS = 10_000
"""Runs of one scenario."""
MOST_SPIS = 1 << 64
"""IKE SPIs that there are."""

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

esp_option = click.option(
    "--esp",
    type=click.Choice(["kernel", "libipsec"]),
    default="kernel",
    show_default=True,
    help="Where ESP is done: the guest's kernel, or charon (then auto is this machine).",
)


def _a_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Of folders, network namespaces and processes. Errors: click.BadParameter."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,15}", value):
        what = "is not 1 to 16 small letters, digits and hyphens"
        raise click.BadParameter(f"{value!r} {what}", ctx, param)
    return value


def _milliseconds(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """A delay. Errors: click.BadParameter, also for nan."""
    if value is not None and not 0 <= value <= 10_000:
        raise click.BadParameter(f"{value:g} is not from 0 to 10000 ms", ctx, param)
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
    callback=_milliseconds,
    help="One-way delay of the access link in ms.",
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
    name: str, delay: float, esp: str, auth: str, family: str, agents: bool, connect: bool, as_json: bool
) -> None:
    """Bring a lab up and leave it standing."""
    if esp != "libipsec":
        load_modules()
        if not has_kernel_esp():
            hint = "--esp libipsec, or in a guest: ikectx lab guest -- sh -c 'ikectx lab up && ...'"
            raise KernelError("this kernel has no ESP", hint=hint)
    sweep()
    made = Lab.new(name, delay_ms=delay)
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
        click.get_current_context().exit(lab_guest.run_job(guest, job, _through, _say))


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
    callback=_milliseconds,
    help="One-way delay of the access link in ms, instead of the scenario's.",
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
        tuple(wanted), esp, guest, clock, str(root), cpus or 0, jobs, delay, logs, brief, picture is not None
    )
    single = len(wanted) == 1 and not every
    found: dict[int, dict[str, Any]] = {}
    try:
        with tidy():
            reports = lab_start.run(request, (lambda _line: None) if quiet else _say, found)
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
        _write(path, picture(lines, there, (report.get("traffic") or {}).get("dark_ms")))


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


@lab.command(short_help="Run scenarios several times; print medians.")
@click.option(
    "--runs", type=click.IntRange(1, MOST_RUNS), default=5, show_default=True, help="Runs of each scenario."
)
@guest_option
@clock_option
@esp_option
@click.option(
    "--drain",
    type=click.IntRange(1, MOST),
    metavar="N",
    help="No scenarios: bring up N SAs at psg and move all of them to nsg at once.",
)
@click.option(
    "--attack",
    type=click.Choice(tuple(KINDS)),
    help="No scenarios: attack the gateways, and measure what that does to them and to a mobile node.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0.1, 1_000_000),
    callback=a_number,
    help="Of --attack: datagrams, connections or messages a second.  [default: as the attack has it]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(5, 86_400),
    callback=a_number,
    help="Of --attack: for how long.  [default: 60]",
)
@click.option(
    "--from",
    "files",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Run nothing: take what --json printed before; several files are put together.",
)
@click.option(
    "--page",
    "target",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the page there, in Markdown, and a picture beside it, in SVG.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.argument("names", nargs=-1, metavar="[SCENARIO...]")
def bench(
    runs: int,
    guest: str,
    clock: str,
    esp: str,
    drain: int | None,
    attack: str | None,
    rate: float | None,
    seconds: float | None,
    files: tuple[Path, ...],
    target: Path | None,
    as_json: bool,
    names: tuple[str, ...],
) -> None:
    """Run the handover scenarios several times, a drain, or an attack; print medians, ratios and losses."""
    from . import bench as lab_bench
    from . import page as lab_page

    _bench_options(
        files=files, names=names, drain=drain, attack=attack, clock=clock, of_attack=(rate, seconds)
    )
    if target is not None and not (target.name and os.path.isdir(target.absolute().parent)):
        raise UsageError(f"--page {target}: there is no such folder")
    picture = target.with_suffix(".svg") if target is not None else None
    ok, found = True, dict[str, Any]()
    options = [f"--guest {guest}"] if guest != "auto" else []
    options += [
        *(["--time virtual"] if clock == "virtual" else []),
        *(["--esp libipsec"] if esp != "kernel" else []),
    ]
    if files:
        summary = _saved(files, target)
    elif drain:
        command = " ".join(["ikectx lab bench", *options, f"--drain {drain}"])
        found |= {"command": command, **_emptied(drain, guest, clock, esp)}
        summary = lab_bench.drained(found)
    elif attack:
        _attacked(attack, rate, seconds, guest, esp, options, as_json=as_json)
        return
    else:
        default = lab_bench.NATIVE if esp == "libipsec" else lab_bench.SCENARIOS
        wanted = tuple(name for name in names or default for _ in range(runs))
        request = lab_start.RunRequest(wanted, esp=esp, guest=guest, clock=clock)
        with tidy():
            reports = lab_start.run(request, _say)
        words = ["ikectx lab bench", f"--runs {runs}", *options, *names]
        summary = lab_bench.summarise(reports, lab_machine.host(), " ".join(words))
        ok = all(report["ok"] for report in reports)
    told = found if drain else summary
    click.echo(json.dumps(told, indent=2) if as_json else lab_page.page(summary), nl=as_json)
    if target is not None and picture is not None:
        _write(picture, lab_page.picture(summary))
        _write(target, lab_page.page(summary, picture.name))
    if not ok:
        click.get_current_context().exit(1)


def _bench_options(
    *,
    files: Sequence[Path],
    names: Sequence[str],
    drain: int | None,
    attack: str | None,
    clock: str,
    of_attack: Sequence[float | None],
) -> None:
    """Errors: UsageError for options of `bench` that do not go together."""
    if files and (names or drain or attack):
        without = "it goes without scenarios, --drain and --attack"
        raise UsageError(f"--from takes what has run already: {without}")
    if drain and (names or attack):
        raise UsageError("--drain has SAs of its own: it goes without scenarios and without --attack")
    if attack and names:
        raise UsageError("--attack has moves of its own: it goes without scenarios")
    if attack and clock == "virtual":
        raise UsageError(
            "--attack needs --time real", hint="no flood costs anything while the clock stands still"
        )
    if not attack and any(one is not None for one in of_attack):
        raise UsageError("--rate and --seconds are of --attack")


def _attacked(
    kind: str,
    rate: float | None,
    seconds: float | None,
    guest: str,
    esp: str,
    options: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Runs an attack and prints its report. Raises IkectxError."""
    from . import attack as lab_attack
    from . import damage as lab_damage

    rate, seconds = rate or KINDS[kind].rate, seconds or 60.0
    words = [*options, f"--attack {kind}", f"--rate {rate:g}", f"--seconds {seconds:g}"]
    with tidy():
        found = lab_attack.run(kind, rate, seconds, guest, libipsec=esp == "libipsec", say=_say)
    told = {"command": " ".join(["ikectx lab bench", *words]), **found}
    if as_json:
        click.echo(json.dumps(told, indent=2))
    else:
        lab_start.print_all(lab_damage.tables(told))


def _emptied(size: int, guest: str, clock: str, esp: str) -> dict[str, Any]:
    """What a drain took. Raises IkectxError."""
    from . import emptying as lab_emptying

    with tidy():
        return lab_emptying.run(size, guest, clock, libipsec=esp == "libipsec", say=_say)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None


def _saved(files: Sequence[Path], target: Path | None) -> dict[str, Any]:
    """One summary of the files'. Errors: UsageError."""
    from . import bench as lab_bench

    found: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            found[str(file)] = lab_bench.read(text_of(file, MOST_OCTETS), str(file))
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise UsageError(f"{file}: not UTF-8 at octet {error.start}") from None
    words = [f"--from {file}" for file in found] + ([] if target is None else [f"--page {target}"])
    return lab_bench.merge(found, " ".join(["ikectx lab bench", *words]))


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
        simulated = chance.to_json() if chance is not None else None
        click.echo(json.dumps({"expected": found.to_json(), "simulated": simulated}, indent=2))
        return
    click.echo(f"{moved} SAs moved onto {serving}, {found.spis} SPIs")
    table = [("", "from one gateway", "from many gateways"), *arithmetic.rows(found, chance)]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _say(line: str) -> None:
    click.echo(line, err=True)
