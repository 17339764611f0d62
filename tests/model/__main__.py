"""Check the transfer's model exhaustively: `python -m tests.model [--faults N] [--print]`."""

from __future__ import annotations

import sys

import click

from .promela import check, model


@click.command()
@click.option("--faults", default=3, show_default=True, help="How many things may go wrong in one run.")
@click.option("--print", "only_print", is_flag=True, help="Print the model instead of checking it.")
def main(faults: int, only_print: bool) -> None:
    text = model(faults)
    if only_print:
        click.echo(text)
        return
    found = check(text)
    click.echo(f"{found.states} states, {found.errors} errors, at most {faults} faults")
    if found.errors or not found.complete:
        click.echo(found.trail or "not all states were visited", err=True)
        sys.exit(1)


main()
