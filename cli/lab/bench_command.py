"""`ikectx lab bench`: what a person may write, and what is run for it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ikectx.errors import UsageError

from ..answers import a_number
from . import aims as lab_aims
from . import machine as lab_machine
from . import start as lab_start
from .damage import KINDS
from .fleet import MOST
from .options import (
    MOST_RUNS,
    clock_option,
    esp_option,
    from_option,
    guest_option,
    page_option,
    read,
    say,
    write,
)


@click.command(short_help="Run scenarios several times; print medians.")
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
    "--moves",
    type=click.IntRange(1, MOST),
    metavar="N",
    help="No scenarios: move one SA N times between both gateways, and measure the CPU time for a move.",
)
@click.option(
    "--profile",
    is_flag=True,
    help="Of --drain and --moves: also what the CPU time of both agents goes into, by samples.",
)
@click.option(
    "--handovers",
    is_flag=True,
    help="No scenarios by name: every mode of a handover, beside what it must reach.",
)
@click.option(
    "--others",
    "crowd",
    type=click.IntRange(0, MOST // 2),
    multiple=True,
    metavar="N",
    help="No scenarios: push, predictive and reactive beside N other SAs at each gateway; several times: the "
    "gaps beside many against those beside few. Of --handovers: with so many others.",
)
@click.option(
    "--probe",
    "interval_ms",
    type=click.FloatRange(0.1, 5),
    callback=a_number,
    metavar="MS",
    help="Of --handovers and --others: how often the probe sends, which is in each gap.  [default: 5]",
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
@from_option
@page_option("Write the page there, in Markdown, and a picture beside it, in SVG.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.argument("names", nargs=-1, metavar="[SCENARIO...]")
def bench(
    runs: int,
    guest: str,
    clock: str,
    esp: str,
    drain: int | None,
    moves: int | None,
    profile: bool,
    handovers: bool,
    crowd: tuple[int, ...],
    interval_ms: float | None,
    attack: str | None,
    rate: float | None,
    seconds: float | None,
    files: tuple[Path, ...],
    target: Path | None,
    as_json: bool,
    names: tuple[str, ...],
) -> None:
    """Run the handover scenarios several times, a drain, or an attack; print medians, ratios and losses.

    With --handovers and --others: a row for each mode, and exit code 1 where one does not reach what it must.
    """
    from . import bench as lab_bench
    from . import critical_chart as lab_critical_chart
    from . import emptying, many_others, to_and_fro
    from . import page as lab_page

    _bench_options(
        files=files,
        names=names,
        alone={
            "--drain": bool(drain),
            "--moves": bool(moves),
            "--attack": bool(attack),
            "--handovers": handovers,
            "--others": bool(crowd) and not handovers,
        },
        clock=clock,
        of_attack=(rate, seconds),
        profile=profile,
    )
    if handovers and len(crowd) > 1:
        raise UsageError("--handovers takes --others once", hint="--others alone compares several numbers")
    if target is not None and not (target.name and os.path.isdir(target.absolute().parent)):
        raise UsageError(f"--page {target}: there is no such folder")
    picture = target.with_suffix(".svg") if target is not None else None
    ok, found = True, dict[str, Any]()
    options = [f"--guest {guest}"] if guest != "auto" else []
    options += [
        *(["--time virtual"] if clock == "virtual" else []),
        *(["--esp libipsec"] if esp != "kernel" else []),
    ]
    profiled = ["--profile"] if profile else []
    libipsec = esp == "libipsec"
    if files:
        summary = _saved(files, target)
    elif drain:
        found["command"] = " ".join(["ikectx lab bench", *options, f"--drain {drain}", *profiled])
        found |= emptying.run(drain, guest, clock, libipsec=libipsec, profile=profile, say=say)
        summary = lab_bench.alone("drains", found)
    elif moves:
        found["command"] = " ".join(["ikectx lab bench", *options, f"--moves {moves}", *profiled])
        found |= to_and_fro.run(moves, guest, clock, libipsec=libipsec, profile=profile, say=say)
        summary = lab_bench.alone("moves", found)
    elif handovers:
        words = ["ikectx lab bench", "--handovers", f"--runs {runs}", *options]
        words += [*_others(crowd), *_probe(interval_ms)]
        found |= {"command": " ".join(words), **_judged(runs, guest, clock, esp, sum(crowd), interval_ms)}
        summary = lab_bench.alone("handovers", found)
        ok = all(row["reached"] for row in found["modes"])
    elif crowd:
        words = ["ikectx lab bench", *_others(crowd), f"--runs {runs}", *options, *_probe(interval_ms)]
        fine = interval_ms or lab_aims.INTERVAL_MS
        ran = many_others.run(crowd, runs, guest, clock, libipsec=libipsec, interval_ms=fine, say=say)
        found |= {"command": " ".join(words), **ran}
        summary = lab_bench.alone("others", found)
        ok = all(row["reached"] and row["ok"] == row["runs"] for row in found["rows"])
    elif attack:
        _attacked(attack, rate, seconds, guest, esp, options, as_json=as_json)
        return
    else:
        default = lab_bench.NATIVE if libipsec else lab_bench.SCENARIOS
        wanted = tuple(name for name in names or default for _ in range(runs))
        request = lab_start.RunRequest(wanted, esp=esp, guest=guest, clock=clock)
        reports = lab_start.run(request, say)
        words = ["ikectx lab bench", f"--runs {runs}", *options, *names]
        summary = lab_bench.summarise(reports, lab_machine.host(), " ".join(words))
        ok = all(report["ok"] for report in reports)
    told = found or summary
    if handovers and not as_json:
        lab_start.print_all([lab_aims.shown(found["modes"]), lab_aims.shown_paths(found["modes"])])
    else:
        click.echo(json.dumps(told, indent=2) if as_json else lab_page.page(summary), nl=as_json)
    if target is not None and picture is not None:
        write(picture, lab_page.picture(summary))
        rows = [row for one in summary["handovers"] for row in one["modes"] if row.get("path")]
        if rows:
            write(picture.with_name(lab_page.paths_image(picture.name)), lab_critical_chart.picture(rows))
        write(target, lab_page.page(summary, picture.name))
    if not ok:
        click.get_current_context().exit(1)


def _bench_options(
    *,
    files: Sequence[Path],
    names: Sequence[str],
    alone: Mapping[str, bool],
    clock: str,
    of_attack: Sequence[float | None],
    profile: bool,
) -> None:
    """Errors: UsageError for options of `bench` that do not go together; `alone` go with nothing else."""
    chosen = [name for name, given in {"--from": bool(files), **alone}.items() if given]
    if chosen and (names or len(chosen) > 1):
        others = ", ".join(name for name in ("--from", *alone) if name != chosen[0])
        raise UsageError(f"{chosen[0]} goes without scenarios, and without {others}")
    attack = alone["--attack"]
    if attack and clock == "virtual":
        raise UsageError(
            "--attack needs --time real", hint="no flood costs anything while the clock stands still"
        )
    if not attack and any(one is not None for one in of_attack):
        raise UsageError("--rate and --seconds are of --attack")
    if profile and not (alone["--drain"] or alone["--moves"]):
        raise UsageError("--profile is of --drain and --moves")
    if profile and clock == "virtual":
        raise UsageError("--profile needs --time real", hint="nothing costs virtual time")


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
    found = lab_attack.run(kind, rate, seconds, guest, libipsec=esp == "libipsec", say=say)
    told = {"command": " ".join(["ikectx lab bench", *words]), **found}
    missed = lab_damage.missed(told)
    if as_json:
        click.echo(json.dumps({**told, "missed": missed}, indent=2))
    else:
        lab_start.print_all(lab_damage.tables(told))
    if missed:
        raise click.exceptions.Exit(1)


def _others(crowd: Sequence[int]) -> list[str]:
    return [f"--others {size}" for size in crowd if size]


def _probe(interval_ms: float | None) -> list[str]:
    return [f"--probe {interval_ms:g}"] if interval_ms else []


def _judged(
    runs: int, guest: str, clock: str, esp: str, crowd: int, interval_ms: float | None
) -> dict[str, Any]:
    """Every mode beside what it must reach. Raises IkectxError."""
    # a kernel holds 100 packets: fewer ms of a finer probe
    names = [name for name in lab_aims.SCENARIOS if interval_ms is None or name != lab_aims.HELD]
    request = lab_start.RunRequest(
        tuple(name for name in names for _ in range(runs)),
        esp=esp,
        guest=guest,
        clock=clock,
        crowd=crowd,
        interval_ms=interval_ms,
        # it costs system calls, and so nothing while the clock stands still
        trace=clock == "virtual" and interval_ms is None,
    )
    reports = lab_start.run(request, say)
    first = reports[0]
    return {
        **{key: first[key] for key in ("strongswan", "guest", "clock", "esp", "machine")},
        "host": lab_machine.host(),
        "crowd": crowd,
        "interval_ms": interval_ms or lab_aims.INTERVAL_MS,
        "modes": lab_aims.judged(reports),
    }


def _saved(files: Sequence[Path], target: Path | None) -> dict[str, Any]:
    """One summary of the files'. Errors: UsageError."""
    from . import bench as lab_bench

    found: dict[str, dict[str, Any]] = {}
    for file in files:
        found[str(file)] = lab_bench.read(read(file), str(file))
    words = [f"--from {file}" for file in found] + ([] if target is None else [f"--page {target}"])
    return lab_bench.merge(found, " ".join(["ikectx lab bench", *words]))
