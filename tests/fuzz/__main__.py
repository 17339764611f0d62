"""Try decoders with a million damaged inputs each, guided by coverage:

    python -m tests.fuzz [TARGET...] [--inputs 1000000] [--jobs 1] [--json]

It needs atheris (`pip install -e .[fuzz]`). Inputs that led somewhere new stay in build/fuzz, and the next
run begins with them. The exit code is 1 if anything was found: an exception that is not the target's, an
error whose text is not printable, a hang, or memory that grows.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

try:
    from . import guided
except ModuleNotFoundError as missing:
    sys.exit(f"{missing}: pip install -e .[fuzz]")

FOLDER = Path(__file__).parent.parent.parent / "build" / "fuzz"
SPARE_BLOCKS = 5000
"""Objects more than before that are no growth, beside one in a hundred inputs."""
RESULT = "result.json"
FORK = multiprocessing.get_context("fork")
"""All that is imported, with its instruments, is there in the child at once."""


def _folder(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def tried(name: str, inputs: int) -> dict[str, Any]:
    """The result of one target: {target, inputs, seconds (of processor time), coverage, slowest_ms,
    grown_blocks, found}."""
    folder = FOLDER / _folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    hear, tell = FORK.Pipe(duplex=False)
    child = FORK.Process(target=guided.run, args=(name, inputs, folder, tell))
    child.start()
    tell.close()
    result: dict[str, Any] = {"target": name}
    try:
        result |= hear.recv()
    except EOFError:
        child.join()
        text = f"it ended early with {child.exitcode}: see {folder}/log"
        result |= {"inputs": 0, "found": {"hang or crash": {"text": text, "times": 1, "octets": ""}}}
    child.join()
    told = re.findall(r"cov: (\d+)", (folder / "log").read_text(errors="replace"))
    result["coverage"] = int(told[-1]) if told else 0
    if result.get("grown_blocks", 0) > SPARE_BLOCKS + inputs // 100:
        text = f"{result['grown_blocks']} objects more after {inputs} inputs"
        result["found"]["growth"] = {"text": text, "times": 1, "octets": ""}
    (folder / RESULT).write_text(json.dumps(result))
    return result


def table() -> str:
    """The last result of each target that has one, as rows in Markdown."""
    files = [FOLDER / _folder(name) / RESULT for name in guided.TARGETS]
    rows = [json.loads(file.read_text()) for file in files if file.exists()]
    head = (
        "| target | inputs | seconds | edges | slowest ms | found |\n| --- | --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(
        f"| {row['target']} | {row['inputs']:,} | {row.get('seconds', 0):.0f} | {row['coverage']} | "
        f"{row.get('slowest_ms', 0):.1f} | {len(row['found'])} |"
        for row in rows
    )


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['target']:34} {result['inputs']:9} inputs in {result.get('seconds', 0):6.1f} s, "
        f"coverage {result['coverage']:5}, "
        f"slowest {result.get('slowest_ms', 0):7.1f} ms, {result.get('grown_blocks', 0):6} objects more, "
        f"{len(result['found'])} found",
        flush=True,
    )
    for what, found in result["found"].items():
        print(f"    {what}, {found['times']} times: {found['text']}\n    {found['octets'][:400]}", flush=True)


@click.command(help=__doc__)
@click.argument("names", nargs=-1, metavar="[TARGET...]")
@click.option("--inputs", default=1_000_000, show_default=True, help="How many for each target.")
@click.option("--jobs", default=1, show_default=True, help="Targets at once.")
@click.option("--list", "only_list", is_flag=True, help="Name the targets.")
@click.option("--table", "only_table", is_flag=True, help="What the last runs found, in Markdown.")
@click.option("--json", "as_json", is_flag=True, help="The results as JSON.")
def main(
    names: Sequence[str], inputs: int, jobs: int, only_list: bool, only_table: bool, as_json: bool
) -> None:
    targets = list(guided.TARGETS)
    if only_table:
        click.echo(table())
        return
    if only_list:
        click.echo(json.dumps(targets) if as_json else "\n".join(targets))
        return
    if unknown := set(names) - set(targets):
        raise click.UsageError(f"there is no target {', '.join(sorted(unknown))}; --list names them")
    results = []
    with ThreadPoolExecutor(jobs) as pool:
        for result in pool.map(lambda name: tried(name, inputs), names or targets):
            results.append(result)
            if not as_json:
                show(result)
    if as_json:
        click.echo(json.dumps(results))
    sys.exit(1 if any(result["found"] for result in results) else 0)


main()
