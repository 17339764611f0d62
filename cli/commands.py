"""The commands of `ikectx` (click). Heavy imports stand inside the commands, so that each starts fast.

Exit codes: those of `ikectx.errors`, 0 for success, 130 after Ctrl-C; `EXIT_CODES` is what --help shows.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ikectx.errors import IkectxError, UnknownSaError, UsageError

from . import __version__, past
from .answers import (
    WORDS,
    Setup,
    an_address,
    confirm,
    json_option,
    rotate_key,
    serve_config_option,
    show_answer,
    show_json,
)

if TYPE_CHECKING:
    from pathlib import Path

    from vici_bridge.vici.client import ControlClient

    from .config import Config

EXIT_CODES = """\
\b
Exit codes:
   0  done (transfer: every SA moved; doctor: nothing failed)
   1  failed for a reason not listed here
   2  wrong argument or configuration
   3  malformed message or data
   4  refused by the other gateway or the mobile node, or because such an SA cannot be moved
   5  not reachable: agent, other gateway or mobile node
   6  no SA of that name, or more than one
   7  busy: an exchange or another transfer is under way, try again
   8  not possible in the present state of a transfer
   9  the agent's store cannot be used
  10  charon does not run, or refused
  11  the kernel refused
 130  interrupted
"""


class _Commands(click.Group):
    """Loads `lab` and `mobile` only when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), "mobile", "lab"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "lab":
            from .lab.commands import lab

            return lab
        if cmd_name == "mobile":
            from .mobile.commands import mobile

            return mobile
        return super().get_command(ctx, cmd_name)


def _load(given: str | None) -> Config:
    from .config import config_path, load

    return load(config_path(given))


@click.group(cls=_Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    metavar="FILE",
    type=WORDS,
    help="Configuration file; default: $IKECTX_CONFIG, else /etc/ikectx/ikectx.toml.",
)
@click.option(
    "--socket",
    metavar="PATH",
    type=WORDS,
    envvar="IKECTX_SOCKET",
    help="Control socket; default: $IKECTX_SOCKET, else the configured one.",
)
@click.version_option(__version__, prog_name="ikectx")
@click.pass_context
def cli(ctx: click.Context, config: str | None, socket: str | None) -> None:
    """Moves a live IKEv2 SA, with its CHILD_SAs, from one strongSwan gateway to another."""
    ctx.obj = Setup(_load, "systemctl start ikectx, or ikectx serve", (config, socket))


@cli.command()
@serve_config_option
@click.pass_obj
def serve(setup: Setup[Config], config: str | None) -> int:
    """Run the agent of this gateway; it must start before charon."""
    loaded = setup.config(config)
    from .agent import run as run_agent

    return run_agent(loaded)


@cli.command("updown-helper", short_help="Run updown scripts for an agent that is not root.")
@serve_config_option
@click.pass_obj
def updown_helper(setup: Setup[Config], config: str | None) -> int:
    """Run the updown scripts of ikectx.toml as this user, for the agent, on the socket that systemd gives."""
    loaded = setup.config(config)
    from .helper import run as run_helper

    return run_helper(loaded)


@cli.command("list")
@json_option
@click.pass_obj
def list_(setup: Setup[Config], as_json: bool) -> None:
    """The IKE_SAs of this gateway, with their CHILD_SAs."""
    with setup.agent() as agent:
        items = agent.listing("list-contexts", "list-context")
    if as_json:
        show_json(items)
        return
    from . import render

    if not items:
        click.echo("no IKE_SAs")
        return
    rows = [
        (
            item.get("ike_id"),
            item.get("name"),
            item.get("state"),
            item.get("remote_eap_id") or item.get("remote_id"),
            item.get("remote"),
            item.get("vips"),
            f"{item.get('spi_i', '')}:{item.get('spi_r', '')}",
            [child.get("name") for child in item.get("children", ())],
            render.duration(item.get("established")),
            f"by {way}" if (way := item.get("way")) in ("relay", "invite") else item.get("movable"),
        )
        for item in items
    ]
    headers = [
        "id",
        "connection",
        "state",
        "peer",
        "address",
        "virtual IP",
        "SPIs",
        "children",
        "up",
        "movable",
    ]
    render.table(headers, rows, styles={"ESTABLISHED": "green", "no": "yellow"})
    for item in items:
        if item.get("reason"):
            render.say(f"{item.get('name')} #{item.get('ike_id')} cannot be moved: {item['reason']}")
        elif item.get("why"):
            render.say(f"{item.get('name')} #{item.get('ike_id')} is moved by {item['way']}: {item['why']}")
    for warning in dict.fromkeys(str(item.get("warning") or "") for item in items):
        if warning:
            render.say(f"warning: {warning}")


@cli.command(short_help="The whole context of one SA.")
@click.argument("sa", type=WORDS)
@click.option("--secrets", is_flag=True, help="Show keys and shared secrets too.")
@json_option
@click.pass_obj
def show(setup: Setup[Config], sa: str, secrets: bool, as_json: bool) -> None:
    """The whole context of one SA: its id, connection, an SPI in hexadecimal, or its peer."""
    from vici_bridge.vici.client import json_of

    with setup.agent() as agent:
        query = {**name_of(agent, sa), "secrets": "yes" if secrets else "no"}
        context = json_of(agent.request("show-context", query))
    if as_json:
        show_json(context)
        return
    from . import render

    click.echo(render.tree(context))


def name_of(agent: ControlClient, sa: str) -> dict[str, str]:
    """The agent's key and value for a person's name of an SA: the first way in which it names one SA."""
    items = agent.listing("list-contexts", "list-context")
    if any(str(item.get("ike_id")) == sa for item in items):
        return {"ike-id": sa}
    if any(item.get("name") == sa for item in items):
        return {"ike": sa}
    if any(sa in (item.get("remote_id"), item.get("remote_eap_id")) for item in items):
        return {"peer": sa}
    text = sa.lower().removeprefix("0x")
    if len(text) >= 4 and all(char in "0123456789abcdef:" for char in text) and text.count(":") < 2:
        return {"spi": text.partition(":")[0]}
    if any(str(item.get("remote", "")).rpartition(":")[0].strip("[]") == sa for item in items):
        return {"peer": sa}
    raise UnknownSaError(
        f"no IKE_SA has that number, connection, peer, address or SPI: {sa}",
        hint="`ikectx list` shows those there are",
    )


@cli.command()
@click.option("--to", required=True, metavar="NAME", type=WORDS, help="The [[peer]] that gets the SAs.")
@click.option("--ike", metavar="NAME", type=WORDS, help="All IKE_SAs of this connection.")
@click.option(
    "--ike-id", type=click.IntRange(0, 0xFFFFFFFF), metavar="N", help="The IKE_SA of this number (see list)."
)
@click.option(
    "--spi",
    metavar="HEX",
    type=WORDS,
    help="The IKE_SA with this SPI, its own or a CHILD_SA's; the beginning is enough.",
)
@click.option(
    "--peer", metavar="ID", type=WORDS, help="The IKE_SAs of the mobile node with this identity or address."
)
@click.option("--all", "every", is_flag=True, help="All IKE_SAs.")
@click.option("--dry-run", is_flag=True, help="Run all checks at both ends, move nothing.")
@click.option(
    "--address",
    type=click.Choice(["auto", "move", "update", "keep", "relay", "invite"]),
    default="auto",
    show_default=True,
    help="move (or update): tell the mobile node the other gateway's address; keep: the address moves along "
    "by itself; relay: the mobile node stays at this gateway's address, which passes its packets on; invite: "
    "its own agent is told to go there; auto: move, but for a mobile node behind a NAT invite if it has an "
    "agent, else relay, as without MOBIKE.",
)
@click.option(
    "--no-detour",
    is_flag=True,
    help="Drop packets that still arrive here, because the network inside follows by itself.",
)
@json_option
@click.pass_obj
def transfer(
    setup: Setup[Config],
    /,
    to: str,
    dry_run: bool,
    address: str,
    no_detour: bool,
    as_json: bool,
    **names: Any,
) -> int:
    """Move IKE_SAs, with their CHILD_SAs, to another gateway. Without a name: the one there is."""
    query = {
        "to": to,
        **selection(**names),
        "dry-run": "yes" if dry_run else None,
        "address": address,
        "no-detour": "yes" if no_detour else None,
    }
    return moved(setup, "transfer", query, as_json, dry_run)


@cli.command(short_help="Fetch an SA from another gateway.")
@click.option(
    "--from", "from_", required=True, metavar="NAME", type=WORDS, help="The [[peer]] that serves it now."
)
@click.option(
    "--mn",
    callback=an_address,
    required=True,
    metavar="ADDRESS",
    help="The mobile node's outer address, as known there.",
)
@click.option(
    "--sa", metavar="SPIi:SPIr", type=WORDS, help="Which of several IKE_SAs of that address (see list there)."
)
@click.option("--dry-run", is_flag=True, help="Run all checks at both ends, move nothing.")
@json_option
@click.pass_obj
def pull(setup: Setup[Config], /, from_: str, mn: str, sa: str | None, dry_run: bool, as_json: bool) -> int:
    """Fetch the IKE_SA of a mobile node, with its CHILD_SAs, from another gateway."""
    query = {"from": from_, "mn": mn, "sa": sa, "dry-run": "yes" if dry_run else None}
    return moved(setup, "pull", query, as_json, dry_run)


def moved(setup: Setup[Config], command: str, query: dict[str, Any], as_json: bool, dry_run: bool) -> int:
    """Ask the agent for transfers, show them while they run, and their reports; returns the exit code."""
    from vici_bridge.vici.client import json_of

    from .lab import collisions
    from .progress import Progress

    live = not as_json and sys.stdout.isatty()
    with Progress(live=live) as progress, setup.agent(timeout=None) as agent:
        if live:
            answer = agent.stream(
                command, f"{command}-progress", query, lambda item: progress.event(json_of(item))
            )
        else:  # the agent need not report each step of thousands
            answer = agent.request(command, query)
        reports: list[dict[str, Any]] = (json_of(answer) or {}).get("reports", [])
        state = json_of(agent.request("status")) if dry_run and reports else {}
        warnings = _warnings(agent, reports) if dry_run and reports and command == "transfer" else []
    code = next((int(report.get("exit_code", 1)) for report in reports if report.get("exit_code")), 0)
    # the other gateway's number of SAs is not known, so it is assumed to be that of this one
    sizes = (len(reports), int(state.get("sas", 0)), int(state.get("spis", collisions.RANGE)))
    if as_json:
        told: dict[str, Any] = {"ok": code == 0, "dry_run": dry_run, "reports": reports}
        if warnings:
            told["warnings"] = warnings
        if dry_run and sum(sizes[:2]) <= sizes[2]:
            told["collisions"] = asdict(collisions.expected(*sizes))
        show_json(told)
        return code
    from . import render
    from .progress import show_reports

    show_reports(reports)
    for warning in warnings:
        render.say(f"warning: {warning}")
    if dry_run and reports and sum(sizes[:2]) <= sizes[2]:
        click.echo(collisions.line(*sizes))
    return code


def _warnings(agent: ControlClient, reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What may happen to the SAs of these reports after a move, once each."""
    names = {str(report.get("mn")) for report in reports}
    listed = agent.listing("list-contexts", "list-context")
    theirs = [sa for sa in listed if names & {str(sa.get("remote_id")), str(sa.get("remote_eap_id"))}]
    return [one for one in dict.fromkeys(str(sa.get("warning") or "") for sa in theirs) if one]


def selection(
    *, ike: str | None, ike_id: int | None, spi: str | None, peer: str | None, every: bool
) -> dict[str, Any]:
    """The agent's keys for the named SAs. Errors: UsageError for more than one way of naming."""
    given = {"--ike": ike, "--ike-id": ike_id, "--spi": spi, "--peer": peer, "--all": every or None}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} cannot go together")
    if spi is not None:
        spi = spi.lower().removeprefix("0x")
        if not spi or spi.strip("0123456789abcdef"):
            raise UsageError(f"--spi {spi!r} is not hexadecimal")
    return {"ike": ike, "ike-id": ike_id, "spi": spi, "peer": peer, "all": "yes" if every else None}


@cli.command()
@json_option
@click.pass_obj
def status(setup: Setup[Config], as_json: bool) -> None:
    """The agent, charon, the peers, and transfers that are open."""
    answer = setup.ask("status")
    if as_json:
        show_json(answer)
        return
    from . import render

    click.echo(render.tree(_for_people(answer)))


def _for_people(status: dict[str, Any]) -> dict[str, Any]:
    """The agent's status in words: the time it has run, and which peers it has a connection with."""
    from . import render

    shown = {**status, "uptime": render.duration(status.get("uptime"))}
    shown.pop("spis", None)  # the size of the range that new SPIs come from, for other commands
    shown["peers"] = [dict(peer) for peer in status.get("peers", ())]
    for peer in shown["peers"]:
        connected = peer.pop("connected", False)
        peer["connection"] = "open" if connected else "none at present; it is opened when it is needed"
    return shown


@cli.command(short_help="SAs that left this gateway, and where their packets go.")
@click.option(
    "--end", metavar="SA", type=WORDS, help="Send nothing on any more for this SA: SPIi:SPIr, or its peer."
)
@click.option("--unblock", is_flag=True, help="With --end: do not drop its packets either.")
@json_option
@click.pass_obj
def detours(setup: Setup[Config], end: str | None, unblock: bool, as_json: bool) -> None:
    """SAs that left this gateway: which gateway has them, and how packets that still arrive for them are
    treated.

    They are sent on as long as the other gateway serves the SA. Packets that cannot be sent on are dropped,
    until the address is used here again.
    """
    if unblock and end is None:
        raise UsageError("--unblock needs --end", hint="name the SA whose packets may leave in the clear")
    query = {"end": end, "unblock": "yes" if unblock else None}
    answer = setup.ask("detours", query)
    if as_json:
        show_json(answer["detours"])
        return
    from .progress import show_detours

    show_detours(answer["detours"])
    if behind := answer["behind"]:
        print(
            f"for {len(behind)} more selectors, of SAs that came here, packets are dropped when the SA ends"
        )


@cli.command(short_help="Make charon report all its SAs again.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def resync(setup: Setup[Config], yes: bool, as_json: bool) -> None:
    """Make charon report all its SAs to the agent again. charon rekeys every CHILD_SA to do so."""
    confirm(yes, "charon will rekey every CHILD_SA; go on?")
    answer = setup.ask("resync")
    if as_json:
        show_answer(answer, as_json)
    else:
        click.echo(
            "charon reports its SAs, and rekeys every CHILD_SA: `ikectx list` says which are movable by now"
        )


cli.add_command(rotate_key)


@cli.command(short_help="Read certificates and revocation lists again.")
@json_option
@click.pass_obj
def reload(setup: Setup[Config], as_json: bool) -> None:
    """Read this gateway's certificate and key, the CAs and the revocation lists again, at once.

    The agent does so by itself within 10 seconds. Connections whose certificate is revoked now are closed.
    If a file cannot be used, what was read before stays in use."""
    show_answer(setup.ask("reload"), as_json)


@cli.command(short_help="Stop an open transfer.")
@click.argument("transfer", type=WORDS)
@json_option
@click.pass_obj
def cancel(setup: Setup[Config], transfer: str, as_json: bool) -> None:
    """Stop an open TRANSFER (its id; see status), as long as this gateway still serves the SA."""
    show_answer(setup.ask("cancel", {"transfer": transfer}), as_json)


def _there(path: Path) -> bool:
    """True also for one that this user may not look for: to read it tells that."""
    try:
        return path.exists()
    except PermissionError:
        return True


@cli.command(short_help="Check this gateway, and say what to write where.")
@json_option
@click.pass_obj
def doctor(setup: Setup[Config], as_json: bool) -> int:
    """Check this machine for frequent mistakes, and say what to write where.

    It is a gateway, or a mobile node if it only has /etc/ikectx/mobile.toml (`ikectx mobile doctor`).
    """
    from .config import config_path
    from .doctor.checks import CHECKS, FOR_ROOT
    from .doctor.elsewhere import before, nothing_yet
    from .doctor.findings import concluded, examine
    from .doctor.world import World
    from .mobile.commands import diagnose
    from .mobile.config import config_path as mobile_path

    path = config_path(setup.given[0])
    if setup.given[0] is None and not _there(path):
        if _there(mobile_path(None)):
            return diagnose(mobile_path(None), setup.given[1], as_json)
        return concluded(before(World(nothing_yet(path), "")), as_json)
    config = setup.config()
    return concluded(examine(World(config, config.control.socket), CHECKS, FOR_ROOT), as_json)


@cli.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    short_help="The hook for updown in swanctl.conf.",
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def updown(ctx: click.Context, args: tuple[str, ...]) -> None:
    """The hook for `updown =` in swanctl.conf; `ikectx updown --help` tells more."""
    from . import updown as hook

    assert ctx.parent is not None
    given = [f"--{name}={value}" for name, value in ctx.parent.params.items() if value]
    hook.main([*given, *args])


for _command in (past.history, past.resolve, past.reclaim):
    cli.add_command(_command)


def run(args: Sequence[str]) -> int:
    """Run the command line; every error becomes one message and its exit code."""
    as_json = "--json" in args
    try:
        if any("\0" in word for word in args):
            raise click.UsageError("an argument holds a NUL octet")
        code = cli.main(list(args), prog_name="ikectx", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        if as_json:
            show_json(error_json(error.format_message(), "", error.exit_code, "MALFORMED"))
        return error.exit_code
    except IkectxError as error:
        from .render import printable

        lines = [str(error), *([error.hint] if error.hint else [])]
        click.echo("\n".join(f"ikectx: {printable(line, keep=chr(10))}" for line in lines), err=True)
        if as_json:
            show_json(error_json(str(error), error.hint, error.exit_code, error.status.name))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("ikectx: interrupted", err=True)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


def error_json(message: str, hint: str, code: int, status: str) -> dict[str, Any]:
    """The JSON of an error, for --json."""
    return {"ok": False, "error": message, "hint": hint, "exit_code": code, "status": status}
