"""Notes of a mobile node's agent that outlive its process: SAs in question, and the last report."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from typing import Any

from ikectx.engine.ports import Store
from ikectx.sa.name import SaName

ASKED = "asked"
"""Kind of store entry: the new gateway was asked for this SA, and its answer is not known. It is not in the
ledger, because no change of the SA has begun."""
LAST = "last-handover"
"""Kind of store entry: the last report. It is not in the ledger, because its SA may be gone."""


class Notes:
    """The notes in the store. Errors of all methods: StoreError."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def asked(self, sa: SaName, *, to: str, from_: str, connection: str) -> None:
        """The new gateway `to` is asked for an SA that the old gateway `from_` serves."""
        note = {
            "to": to,
            "from": from_,
            "connection": connection,
            "spi_i": sa.spi_i.hex(),
            "spi_r": sa.spi_r.hex(),
            "since": round(time.time(), 3),
        }
        self._store.put(ASKED, sa.key, json.dumps(note).encode())

    def answered(self, sa: SaName) -> None:
        """The gateway that serves the SA is known."""
        self._store.delete(ASKED, sa.key)

    def in_question(self) -> list[dict[str, Any]]:
        """SAs that a new gateway was asked for without an answer that counts, by this agent or one before
        it."""
        return [json.loads(raw) for _, raw in self._store.items(ASKED)]

    def only(self, listed: Collection[SaName]) -> None:
        """charon has these SAs: one in question that it does not have was rekeyed, or is gone."""
        known = {sa.key for sa in listed}
        for key, _ in self._store.items(ASKED):
            if key not in known:
                self._store.delete(ASKED, key)

    def ended(self, report: Mapping[str, Any]) -> None:
        """Keep the report of a handover that has ended."""
        self._store.put(LAST, LAST, json.dumps(report).encode())

    def last(self) -> Any:
        """The last report, also of an agent before this one; None: there was none."""
        raw = self._store.get(LAST, LAST)
        return None if raw is None else json.loads(raw)
