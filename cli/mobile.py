"""`ikectx mobile`: the agent of a mobile node, and what one asks it for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from vici_bridge.vici import ControlClient

    from .mobile_config import MobileFile

PATIENCE = 4000.0
"""Seconds for a handover that was announced to be completed (an hour at most, by configuration)."""


class Given(Protocol):
    """What stood before the command: `ikectx --config FILE --socket PATH mobile ...`."""

    config_given: str | None
    socket_given: str | None


class _Setup:
    """Where the configuration is, and the agent behind it."""

    def __init__(self, config: str | None, socket: str | None) -> None:
        self._config = config
        self._socket = socket

    def config(self) -> MobileFile:
        from .mobile_config import config_path, load

        return load(config_path(self._config))

    def agent(self, timeout: float | None = 30.0) -> ControlClient:
        from vici_bridge.vici import ControlClient

        return ControlClient(self._socket or self.config().control.socket, timeout=timeout)


@click.group()
@click.option(
    "--config",
    metavar="FILE",
    help="Configuration file; default: $IKECTX_MOBILE_CONFIG, else /etc/ikectx/mobile.toml.",
)
@click.option("--socket", metavar="PATH", help="Control socket, instead of the configured one.")
@click.pass_context
def mobile(ctx: click.Context, config: str | None, socket: str | None) -> None:
    """On a mobile node: ask for handovers, beside a stock charon."""
    given: Given | None = ctx.obj
    if given is not None:
        config, socket = config or given.config_given, socket or given.socket_given
    ctx.obj = _Setup(config, socket)


@mobile.command()
@click.option("--config", metavar="FILE", help="The same as before the command.")
@click.pass_obj
def serve(setup: _Setup, config: str | None) -> int:
    """Run the agent of this mobile node; it must start before charon."""
    loaded = (_Setup(config, None) if config else setup).config()
    from .mobile_agent import run

    return run(loaded)


@mobile.command()
@click.option("--to", required=True, metavar="NAME", help="The [[gateway]] that is to serve from now on.")
@click.option(
    "--predictive",
    "how",
    flag_value="predictive",
    help="Announce the move while still at the old place; it completes at a new address, or when "
    "`handover --to` is called again.",
)
@click.option("--reactive", "how", flag_value="reactive", help="Forget what was announced, and move now.")
@click.option("--now", is_flag=True, help="With --predictive: complete it at once, without a new address.")
@click.option(
    "--address", metavar="LOCAL", help="Our address at the new place; default: as packets are routed."
)
@click.option("--ike", metavar="NAME", help="The IKE_SA of this connection.")
@click.option("--ike-id", type=click.IntRange(0), metavar="N", help="The IKE_SA of this number (see status).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead.")
@click.pass_obj
def handover(
    setup: _Setup,
    to: str,
    how: str | None,
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
    from vici_bridge.vici import json_of

    if now and how != "predictive":
        raise UsageError("--now goes with --predictive")
    if address and how == "predictive" and not now:
        raise UsageError("--address is for the move itself; an announcement does not know it yet")
    query: dict[str, Any] = {"to": to, "ike": ike, "ike-id": ike_id}
    steps = {"predictive": ["announce", "arrive"] if now else ["announce"]}.get(how or "", ["arrive"])
    live = not as_json and sys.stdout.isatty()

    def show(item: Mapping[str, Any] | None) -> None:
        if item and not as_json:
            _progress(item, live=live)

    report: dict[str, Any] = {}
    with setup.agent(timeout=PATIENCE) as agent:
        if how == "reactive":
            agent.request("cancel")
        for what in steps:
            request = {**query, "what": what, "address": address if what == "arrive" else None}
            answer = agent.stream("handover", "handover-progress", request, lambda item: show(json_of(item)))
            report = json_of(answer) or {}
            if report.get("result") not in ("announced", "moved"):
                break
    code = int(report.get("exit_code", 1))
    if as_json:
        from .render import dump

        click.echo(dump({"ok": code == 0, **report}, indent=2 if sys.stdout.isatty() else None))
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
    """One line a step."""
    from .render import printable

    text = printable(item.get("detail") or PHASES.get(str(item.get("phase")), item.get("phase")))
    ms = float(item.get("ms") or 0)
    click.secho(f"{ms:7.0f} ms  {text}" if ms else f"{'':10}  {text}", dim=live, err=not live)


def show_report(report: Mapping[str, Any]) -> None:
    """What moved, from where to where, and what it took; or what failed, and what to do."""
    from .render import say

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
    if report.get("exit_code"):
        if result == "moved":
            say(f"  but: {report.get('detail')}")
        if report.get("hint"):
            say(f"  {report['hint']}")


@mobile.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead.")
@click.pass_obj
def status(setup: _Setup, as_json: bool) -> None:
    """The agent, charon, its SAs and the gateways, and what was announced."""
    from vici_bridge.vici import json_of

    with setup.agent() as agent:
        value = json_of(agent.request("status"))
    from .render import dump, tree

    if as_json:
        click.echo(dump(value, indent=2 if sys.stdout.isatty() else None))
    else:
        click.echo(tree(value))


@mobile.command()
@click.pass_obj
def cancel(setup: _Setup) -> None:
    """Forget a move that was announced; the gateways forget it, too, when its time is over."""
    from vici_bridge.vici import json_of

    with setup.agent() as agent:
        found = (json_of(agent.request("cancel")) or {}).get("cancelled")
    click.echo("cancelled" if found else "nothing was announced")
