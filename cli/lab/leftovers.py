"""What the store of a gateway's agent still has of SAs that have ended."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ikectx.disk.place import open_store
from ikectx.engine.ledger import Role, Row, loads
from vici_bridge.away.origins import Origin, Place

ROLES: tuple[Role, ...] = ("source", "target")
MAY_STAY = {"token", "update-spi", "last-handover", "asked", "deadline"}
"""Notes that belong to no SA, or are dropped when they are due."""


def left(state: Path) -> list[str]:
    """Rows of the ledger and notes, without those that stay for a while on purpose. Errors: StoreError.

    These are the row of an SA that came, with nothing to do any more, and the origin of an SA that ended.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:  # a copy: the agent has the store open
        for path in state.glob("state.*"):
            if not path.name.endswith("-shm"):
                shutil.copy2(path, folder)
        with contextlib.closing(open_store(folder)) as store:
            for role in ROLES:
                for _, octets in store.rows(role):
                    row: Row[Any] = loads(role, octets)
                    if row.step or role == "source" or row.facts.stage != "imported":
                        found.append(f"{role} row, step {row.step or 'none'}: {row.facts}")
            kinds = store._db.execute("SELECT DISTINCT kind FROM items").fetchall()
            for (kind,) in kinds:
                for key, value in store.items(kind):
                    if kind == "origin" and Origin.loads(key, value).place is Place.ENDED:
                        continue
                    if kind not in MAY_STAY:
                        found.append(f"note {kind}")
    return found
