"""`ikectx lab`: three charons, a router and a server on one machine, and scenarios that run on them."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from ikectx.errors import IkectxError

from .lab_config import Tunnel
from .lab_hosts import DEFAULT_NAME, Lab, names, sweep
from .lab_net import HOSTS
from .lab_vm import run_in_vm


@click.group()
def lab() -> None:
    """A testbed of network namespaces: mobile node, two gateways, router, server."""


@lab.command()
@click.option("--name", default=DEFAULT_NAME, show_default=True)
@click.option("--delay", default=20.0, show_default=True, help="One-way delay of the access link in ms.")
@click.option("--esp", type=click.Choice(["kernel", "libipsec"]), default="kernel", show_default=True)
@click.option("--auth", type=click.Choice(["psk", "cert", "eap"]), default="psk", show_default=True)
@click.option(
    "--family", type=click.Choice(["4", "6"]), default="4", show_default=True, help="Outer IP version."
)
@click.option("--agents/--no-agents", default=True, show_default=True)
@click.option("--connect/--no-connect", default=False, help="Also connect the mobile node to psg.")
def up(  # noqa: PLR0917  one parameter an option
    name: str, delay: float, esp: str, auth: str, family: str, agents: bool, connect: bool
) -> None:
    """Bring a lab up and leave it standing."""
    made = Lab.new(name, delay_ms=delay)
    try:
        tunnel = Tunnel(auth=auth, family=int(family), inner=int(family), libipsec=esp == "libipsec")
        made.up(tunnel, agents=agents, keep=True)
        if connect:
            made.connect()
    except BaseException:
        made.down()
        raise
    for warning in made.warnings:
        click.echo(f"note: {warning}", err=True)
    click.echo(f"lab {name} is up in {made.work}: ikectx lab exec {{{','.join(HOSTS)}}} -- COMMAND")


@lab.command()
@click.option("--name", default=DEFAULT_NAME, show_default=True)
@click.option("--all", "every", is_flag=True, help="All labs of this machine.")
def down(name: str, every: bool) -> None:
    """Take a lab down, with everything in it."""
    sweep()
    for one in names() if every else [name]:
        Lab.find(one).down()


@lab.command("exec", context_settings={"ignore_unknown_options": True})
@click.option("--name", default=DEFAULT_NAME, show_default=True)
@click.argument("host", type=click.Choice(HOSTS))
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def exec_(name: str, host: str, command: tuple[str, ...]) -> None:
    """Run COMMAND on HOST (a shell does not take part: give `sh -c` for one)."""
    sys.exit(Lab.find(name).attach(host, command))


@lab.command(context_settings={"ignore_unknown_options": True})
@click.option("--rw", is_flag=True, help="The command may write this machine's file system.")
@click.option(
    "--share", type=click.Path(path_type=Path, file_okay=False), help="A folder both sides can write."
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def vm(rw: bool, share: Path | None, command: tuple[str, ...]) -> None:
    """Run COMMAND as root in a VM with Debian's kernel, here, and power off."""
    with tidy():
        sys.exit(run_in_vm(command, shared=share, writable=rw))


@contextlib.contextmanager
def tidy() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like Ctrl-C, so that every `finally` runs."""

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """`python -m ikectx_cli.lab`: the group by itself, errors as the command line shows them."""
    try:
        lab(standalone_mode=True)
    except IkectxError as error:
        click.echo(f"error: {error}" + (f" ({error.hint})" if error.hint else ""), err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
