"""What is still there of SAs that have ended: in a host's kernel, and in the store of a gateway's agent."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ikectx.disk.place import open_store
from ikectx.engine.ledger import Role, Row, loads
from vici_bridge.away.origins import Origin, Place
from vici_bridge.kernel import detour

from .net import run

DETOUR = f"table local proto {detour.PROTOCOL}"
"""How `ip route` finds what an agent keeps of routes by way of another gateway."""

OF_SAS = r"(?m)^\s+(?:dir|proto \w+ spi) .*"
"""In what `ip xfrm` shows, SAs, and policies but those of sockets, which charon has for its own messages."""
WAITS = r"(?m)^src .*\n\s+proto \w+ spi 0x0{8} .*(?:\n\s.*)*"
"""Among the states that `ip xfrm` shows, a packet's wait for an SA, which the kernel ends by itself."""

NOTED = "table inet ikectx_ids"
"""The rules by which the kernel notes message IDs for an agent: what it has noted may stay."""

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


def of_sas(enter: Sequence[str]) -> str:
    """What a host's kernel has of SAs, without keys. Takes away what may stay a while. `enter`: what runs a
    program at the host. Two programs ask the kernel, because after SAs or policies `ip -batch` shows nothing
    of the other (iproute2 6.1)."""
    flush = f"route flush {DETOUR}\n"
    run([*enter, "ip", "-6", "-force", "-batch", "-"], text=flush, check=False)
    policies = run([*enter, "ip", "-force", "-batch", "-"], text=f"{flush}xfrm policy\n", check=False).stdout
    states = run([*enter, "ip", "xfrm", "state", "list", "nokeys"], check=False).stdout
    rules = run([*enter, "nft", "list", "ruleset"], check=False).stdout
    tables = [table for table in re.split(r"(?m)^(?=table )", rules) if not table.startswith(NOTED)]
    return "\n".join(
        re.findall(OF_SAS, policies + re.sub(WAITS, "", states))
        + re.findall(r"elements = .*", "".join(tables))
    )
