"""Which mobile nodes are known to have an agent of their own: those that know UPDATE_SPI. I/O (the store)."""

from __future__ import annotations

import time

from ikectx.engine.ports import Store
from ikectx.sa.context import Identity, IkeContext

from .host_config import HostConfig

_KIND = "update-spi"
"""Kind of store entry, by the mobile node's identity: it knows UPDATE_SPI, and when that was seen (s since
1970). It is not in the ledger, because it is about the node, not about a transfer of an SA."""
_LASTS = 86400.0


class KnownAgents:
    """Agents of mobile nodes, as the configuration, the gateway before and they themselves have told."""

    def __init__(self, config: HostConfig, store: Store) -> None:
        self._config = config
        self._store = store

    def has(self, context: IkeContext) -> bool:
        """Whether the mobile node of that SA is known to have one."""
        known = context.update_spi or context.connection in self._config.agents
        return known or self._shown(context.remote_id)

    def _shown(self, mn: Identity) -> bool:
        """Whether that mobile node has shown in the last day that it knows UPDATE_SPI."""
        raw = self._store.get(_KIND, str(mn))
        return raw is not None and time.time() - int.from_bytes(raw[1:]) < _LASTS

    def note(self, mn: Identity) -> None:
        """The mobile node has shown that it knows UPDATE_SPI. Errors: StoreError."""
        self._store.put(_KIND, str(mn), b"\1" + int(time.time()).to_bytes(8))
