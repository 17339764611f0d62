"""`ikectx history`: transfers of the past, the audit log, and whether anybody changed it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikectx.errors import LinkError, StoreError

from . import render
from .answers import Setup, show_json

if TYPE_CHECKING:
    from ikectx.disk.audit import Verified

    from .config import Config


def verify(setup: Setup[Config], store: Path | None, key: Path | None, head: str, as_json: bool) -> int:
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

    if not (store / "state.db").exists():
        raise StoreError(f"{store / 'state.db'} does not exist", hint="--store names a store's directory")
    db, log = opened(store / "state.db", read_key(key_file(key) or store / "state.key"))
    with contextlib.closing(db):
        return log.verify(head)


def _told(found: Mapping[str, Any], as_json: bool) -> int:
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


def show_audit(items: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of the audit log, newest first."""
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
