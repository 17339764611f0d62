"""What operators look at when a move is over, or is not: `history` with the audit log, `resolve`,
`reclaim`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ikectx.errors import LinkError, StoreError, UsageError

from .answers import WORDS, Setup, confirm, json_option, show_answer, show_json

if TYPE_CHECKING:
    from ikectx.disk.audit import Verified

    from .config import Config


@click.command(short_help="Transfers of the past, and the audit log.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000_000),
    default=100,
    show_default=True,
    help="At most so many, newest first.",
)
@click.option("--audit", is_flag=True, help="The audit log: who asked for each move, epochs, counters.")
@click.option(
    "--verify", is_flag=True, help="Check that nobody changed the audit log; works without agent, too."
)
@click.option(
    "--head",
    metavar="NUMBER:MAC",
    type=WORDS,
    help="With --verify: the head noted at an earlier one.",
)
@click.option(
    "--store", metavar="DIR", type=click.Path(path_type=Path), help="With --verify: a store, say a backup."
)
@click.option("--key", metavar="FILE", type=click.Path(path_type=Path), help="With --store: its key.")
@json_option
@click.pass_obj
def history(
    setup: Setup[Config],
    limit: int,
    audit: bool,
    verify: bool,
    head: str | None,
    store: Path | None,
    key: Path | None,
    as_json: bool,
) -> int:
    """Transfers of the past, in both directions, or the audit log of moves."""
    if not verify and (head or store or key):
        raise UsageError("--head, --store and --key go with --verify")
    if verify:
        return _verify(setup, store, key, head or "", as_json)
    query = {"limit": limit, "audit": "yes" if audit else None}
    with setup.agent() as agent:
        items = agent.listing("history", "history-entry", query)
    if as_json:
        show_json(items)
        return 0
    from .progress import show_history

    (_show_audit if audit else show_history)(items)
    return 0


def _verify(setup: Setup[Config], store: Path | None, key: Path | None, head: str, as_json: bool) -> int:
    """Check the audit log: by the agent if it runs, else, or with `store`, in the store itself.

    Returns the exit code. Errors: StoreError, UsageError, ConfigError.
    """
    if store is None:
        try:
            return _told(setup.ask("verify-history", {"head": head}), as_json)
        except LinkError:
            store, key = setup.config().state_dir, key or setup.config().state_key
    return _told(_offline(store, key, head).to_json(), as_json)


def _offline(store: Path, key: Path | None, head: str) -> Verified:
    from ikectx.disk.audit import opened
    from ikectx.disk.place import read_key

    from .service import key_file

    try:
        (store / "state.db").open("rb").close()
    except FileNotFoundError:
        raise StoreError(
            f"{store / 'state.db'} does not exist", hint="--store names a store's directory"
        ) from None
    except OSError as error:
        hint = "run it as root" if isinstance(error, PermissionError) else "--store names a store's directory"
        raise StoreError(f"{store / 'state.db'}: {error.strerror}", hint=hint) from None
    with opened(store / "state.db", read_key(key_file(key) or store / "state.key")) as log:
        return log.verify(head)


def _told(found: Mapping[str, Any], as_json: bool) -> int:
    from . import render

    findings = found.get("findings") or ()
    if as_json:
        show_json(dict(found))
    else:
        pruned = f", {found['pruned']} older ones were pruned" if found.get("pruned") else ""
        render.say(f"{found['rows']} rows{pruned}; head {found['head']}")
        for finding in findings:
            render.say(finding)
        render.say(
            "the audit log is not what the agent wrote: somebody changed the store, or the disk did"
            if findings
            else "nothing was changed, removed or put in another order. Note the head elsewhere and give it "
            "as --head later, because an older copy of the whole store is only found by that"
        )
    return StoreError.exit_code if findings else 0


def _show_audit(items: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of the audit log, newest first."""
    from . import render

    if not items:
        print("the audit log is empty")
        return
    rows = [
        (
            item.get("number"),
            render.when(item.get("at")),
            item.get("asked_by") or "not known",
            item.get("mn"),
            f"{item.get('from')} to {item.get('to')}",
            item.get("outcome"),
            (item.get("epoch") or {}).get("after"),
            item.get("reason"),
        )
        for item in items
    ]
    render.table(
        ("row", "when", "asked by", "mobile node", "move", "outcome", "epoch", "reason"), rows, wraps="reason"
    )


@click.command(short_help="Decide about an SA of which nobody says who serves it.")
@click.argument("name", metavar="[TRANSFER | SPIi:SPIr]", type=WORDS, required=False)
@click.option("--reclaim", is_flag=True, help="Serve it here again: the other gateway is gone for good.")
@click.option("--give-up", is_flag=True, help="Drop it here: the other gateway serves it, or nobody is to.")
@click.option("--yes", is_flag=True, help="Do so; without --yes it is only shown.")
@json_option
@click.pass_obj
def resolve(
    setup: Setup[Config], name: str | None, reclaim: bool, give_up: bool, yes: bool, as_json: bool
) -> int:
    """Show SAs that this gateway let go and that no gateway is known to serve, with what is known of both
    sides, and decide about one of them.

    Before --reclaim look at the other gateway: two gateways that serve one SA break it.
    """
    if reclaim and give_up:
        raise UsageError("--reclaim and --give-up cannot go together")
    if (reclaim or give_up or yes) and name is None:
        raise UsageError("a decision is about one transfer", hint="`ikectx resolve` shows which there are")
    if yes and not (reclaim or give_up):
        raise UsageError("--yes needs --reclaim or --give-up")
    decision = "reclaim" if reclaim else "give-up" if give_up else None
    answer = setup.ask("resolve", {"transfer": name, "decision": decision if yes else None}, timeout=120)
    if as_json:
        show_json(answer)
    else:
        _show_doubts(answer["in_doubt"])
        _show_decision(decision, yes, answer.get("report"))
    return _reclaimed(answer["report"]) if decision == "reclaim" and yes else 0


def _reclaimed(report: Mapping[str, Any]) -> int:
    """The exit code of a reclaim. The report is that of the transfer, which failed if the SA is served
    here."""
    return 0 if report.get("result") == "kept" else int(report.get("exit_code", 0))


def _show_decision(decision: str | None, done: bool, report: Mapping[str, Any] | None) -> None:
    from . import render

    if decision is None:
        return
    if not done:
        render.say(f"nothing was changed: give --yes to {decision.replace('-', ' ')}")
    elif report is None:
        render.say("given up: charon here has forgotten it")
    else:
        for line in (report.get("text"), report.get("state_here"), report.get("hint")):
            if line:
                render.say(str(line))


def _show_doubts(items: Sequence[Mapping[str, Any]]) -> None:
    from . import render

    if not items:
        print("nothing is in doubt here")
        return
    for item in items:
        here, there = item["here"], item.get("there")
        rows: list[tuple[Any, ...]] = []
        rows.append(("gateway", here["gateway"], there and there["gateway"]))
        rows.append(("state", here["state"], there["state"] if there else "not known"))
        rows.append(("epoch", here["epoch"], there and f"{there['epoch']}, if it owns it"))
        rows.append(("charon", here["charon"], there and (there["said"] or "has said nothing")))
        rows.append(("kernel", here["kernel"], None))
        if there:
            heard = "not since this agent's start"
            if there["last_heard"]:
                heard = render.when(there["last_heard"])
            rows.append(("last heard", None, f"{heard}; {'' if there['connected'] else 'not '}connected now"))
        of = item["transfer"] or "no transfer is known"
        render.say(f"{item['mn'] or 'a mobile node'}, SA {item['sa']}, {of}")
        render.table(("", "this gateway", "the other"), rows)
        render.say(item["advice"])


@click.command(short_help="The same as resolve TRANSFER --reclaim.")
@click.argument("transfer", type=WORDS)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def reclaim(setup: Setup[Config], transfer: str, yes: bool, as_json: bool) -> int:
    """Serve an SA here again that this gateway handed over in TRANSFER and that no gateway is known to serve.

    Use it only if the other gateway is down for good, because two gateways that serve one SA break it.
    `ikectx resolve` shows what is known of both.
    """
    confirm(yes, "Is it certain that the other gateway does not serve it?")
    answer = setup.ask("resolve", {"transfer": transfer, "decision": "reclaim"}, timeout=120)
    show_answer(answer["report"], as_json)
    return _reclaimed(answer["report"])
