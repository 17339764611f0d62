"""`ikectx mobile`: the agent of a mobile node, and the requests to it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..answers import (
    WORDS,
    Setup,
    an_address,
    json_option,
    rotate_key,
    serve_config_option,
    show_answer,
    show_json,
)

if TYPE_CHECKING:
    from .config import MobileFile

PATIENCE = 4000.0
"""Seconds in which an announced handover must be completed (an hour at most, by configuration)."""


def _load(given: str | None) -> MobileFile:
    from .config import config_path, load

    return load(config_path(given))


@click.group()
@click.option(
    "--config",
    metavar="FILE",
    type=WORDS,
    help="Configuration file; default: $IKECTX_MOBILE_CONFIG, else /etc/ikectx/mobile.toml.",
)
@click.option(
    "--socket",
    metavar="PATH",
    type=WORDS,
    help="Control socket; default: $IKECTX_SOCKET, else the configured one.",
)
@click.pass_context
def mobile(ctx: click.Context, config: str | None, socket: str | None) -> None:
    """On a mobile node: ask for handovers, beside a stock charon."""
    before: Setup[Any] | None = ctx.obj
    if before is not None:
        config, socket = config or before.given[0], socket or before.given[1]
    ctx.obj = Setup(_load, "systemctl start ikectx-mobile, or ikectx mobile serve", (config, socket))


@mobile.command(short_help="Run the agent of this mobile node.")
@serve_config_option
@click.pass_obj
def serve(setup: Setup[MobileFile], config: str | None) -> int:
    """Run the agent of this mobile node; it must start before charon."""
    loaded = setup.config(config)
    from .agent import run

    return run(loaded)


@mobile.command(short_help="Move the IKE_SA to another gateway.")
@click.option("--to", required=True, metavar="NAME", type=WORDS, help="The [[gateway]] that gets the SA.")
@click.option(
    "--predictive",
    is_flag=True,
    help="Announce the move while still at the old place; it completes at a new address, or when "
    "`handover --to` is called again.",
)
@click.option(
    "--leaving",
    is_flag=True,
    help="With --predictive: it leaves at once; packets for it wait at the new gateway until it arrives.",
)
@click.option("--reactive", is_flag=True, help="Forget an announced move, and move now.")
@click.option("--now", is_flag=True, help="With --predictive: complete it at once, without a new address.")
@click.option(
    "--address",
    callback=an_address,
    metavar="LOCAL",
    help="Our address at the new place; default: as packets are routed.",
)
@click.option("--ike", metavar="NAME", type=WORDS, help="The IKE_SA of this connection.")
@click.option(
    "--ike-id",
    type=click.IntRange(0, 0xFFFFFFFF),
    metavar="N",
    help="The IKE_SA of this number (see status).",
)
@json_option
@click.pass_obj
def handover(
    setup: Setup[MobileFile],
    to: str,
    predictive: bool,
    leaving: bool,
    reactive: bool,
    now: bool,
    address: str | None,
    ike: str | None,
    ike_id: int | None,
    as_json: bool,
) -> int:
    """Move this node's IKE_SA, with its CHILD_SAs, to another gateway, without a new IKE_AUTH.

    Without --predictive it moves now: it completes what was announced, or asks the new gateway to get the SA
    from the old one.
    """
    from ikectx.errors import UsageError
    from vici_bridge.vici.client import json_of

    if predictive and reactive:
        raise UsageError("--predictive and --reactive cannot go together")
    if ike is not None and ike_id is not None:
        raise UsageError("--ike and --ike-id cannot go together")
    if leaving and not predictive:
        raise UsageError("--leaving goes with --predictive")
    if now and not predictive:
        raise UsageError("--now goes with --predictive")
    if address and predictive and not now:
        raise UsageError("--address is for the move itself; an announcement does not know it yet")
    query: dict[str, Any] = {"to": to, "ike": ike, "ike-id": ike_id, "anew": "yes" if reactive else None}
    query["leaving"] = "yes" if leaving else None
    steps = ["announce"] * predictive + ["arrive"] * (now or not predictive)
    live = not as_json and sys.stdout.isatty()

    def show(item: Mapping[str, Any] | None) -> None:
        if item and not as_json:
            _progress(item, live=live)

    report: dict[str, Any] = {}
    with setup.agent(timeout=PATIENCE) as agent:
        for what in steps:
            request = {**query, "what": what, "address": address if what == "arrive" else None}
            answer = agent.stream("handover", "handover-progress", request, lambda item: show(json_of(item)))
            report = json_of(answer) or {}
            if report.get("result") not in ("announced", "moved"):
                break
    code = int(report.get("exit_code", 1))
    if as_json:
        show_json({"ok": code == 0, **report})
    else:
        show_report(report)
    return code


PHASES = {
    "held": "the SA is passive",
    "looking": "charon is looking for its gateway; it goes on meanwhile",
    "asking": "",
    "announced": "",
    "asked": "answered",
    "readdressed": "the SA has its new addresses",
    "active": "the SA is active",
}


def _progress(item: Mapping[str, Any], *, live: bool) -> None:
    """Print one line for each step."""
    from ..render import printable

    text = printable(item.get("detail") or PHASES.get(str(item.get("phase")), item.get("phase")))
    ms = float(item.get("ms") or 0)
    click.secho(f"{ms:7.0f} ms  {text}" if ms else f"{'':10}  {text}", dim=live, err=not live)


def show_report(report: Mapping[str, Any]) -> None:
    """Print what moved, from where to where, at what cost; or what failed, and what to do."""
    from ..render import say, show_path

    result, name = report.get("result"), report.get("connection")
    old, new = report.get("old") or {}, report.get("new") or {}
    to, source = report.get("to"), report.get("from")
    if result == "moved":
        say(f"{name} moved from {source} to {to}")
        say(f"  {old.get('local')} - {old.get('remote')}  ->  {new.get('local')} - {new.get('remote')}")
        inner = ", ".join([*report.get("children", ()), *report.get("vips", ())])
        say(f"  with {inner or 'no CHILD_SA'}")
    elif result == "announced":
        say(f"{source} has sent the context of {name} to {to}; {source} serves until this node moves")
        say(f"  it completes at a new address, or by: ikectx mobile handover --to {to}")
    elif result == "already":
        say(f"{name} is served by {to} already")
        return
    else:
        say(f"{name} was not moved to {to}: {report.get('detail') or result}")
        say(f"  served by: {report.get('serves') or 'not known'}")
    say(
        f"  on the air: {report.get('messages', 0)} messages, {report.get('octets', 0)} octets"
        + (f", {report['retransmissions']} of them sent again" if report.get("retransmissions") else "")
        + f"; {float(report.get('ms') or 0):.0f} ms"
    )
    show_path(report.get("path") or ())
    if report.get("exit_code"):
        if result == "moved":
            say(f"  but: {report.get('detail')}")
        if report.get("hint"):
            say(f"  {report['hint']}")


@mobile.command(short_help="The agent, its SAs, and announced moves.")
@json_option
@click.pass_obj
def status(setup: Setup[MobileFile], as_json: bool) -> None:
    """The agent, charon, its SAs and the gateways, and announced moves."""
    show_answer(setup.ask("status"), as_json)


@mobile.command(short_help="Forget an announced move.")
@json_option
@click.pass_obj
def cancel(setup: Setup[MobileFile], as_json: bool) -> None:
    """Forget an announced move; the gateways forget it, too, when its time is over."""
    answer = setup.ask("cancel") or {}
    if as_json:
        show_json(answer)
    else:
        click.echo("cancelled" if answer.get("cancelled") else "nothing was announced")


@mobile.command(short_help="Check this mobile node.")
@json_option
@click.pass_obj
def doctor(setup: Setup[MobileFile], as_json: bool) -> int:
    """Check this mobile node for frequent mistakes, and say what to write where."""
    from .config import config_path

    return diagnose(config_path(setup.given[0]), setup.given[1], as_json)


def diagnose(path: Path, socket: str | None, as_json: bool) -> int:
    """Check a mobile node and print what was found; returns the exit code. Errors: ConfigError."""
    from ..doctor.elsewhere import nothing_yet, on_mobile_node
    from ..doctor.findings import concluded
    from ..doctor.world import World
    from .config import load

    file = load(path)
    config = replace(nothing_yet(path), state_dir=file.state_dir, charon=file.charon, control=file.control)
    return concluded(on_mobile_node(World(config, socket or file.control.socket)), as_json)


mobile.add_command(rotate_key)
