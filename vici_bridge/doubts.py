"""`Doubts`: SAs whose message IDs may have been used while neither an agent nor the kernel noted them. I/O.

With a message ID that is too low, an SA would be deaf to its mobile node, and would take an old request for a
new one. So an SA of which that may be true stays where it is until both message IDs have been noted, or
reported by charon, since then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence

from ikectx.engine.ports import Store
from ikectx.errors import KernelError, UnknownSaError
from ikectx.sa.name import SaName
from vici_bridge.kernel.message_ids import MessageIds

log = logging.getLogger(__name__)

_DOUBT = "doubt"
"""Kind of store entry: this SA may have used message IDs that neither an agent nor the kernel noted. It
is not in the ledger, because SAs that never move have it, too."""


class Doubts:
    """`noted`: the kernel's notes of the messages that leave."""

    def __init__(self, store: Store, ports: Sequence[int] = (500, 4500)) -> None:
        """`ports`: charon's."""
        self.noted = MessageIds(ports)
        self._store = store
        self._keys = {key for key, _ in store.items(_DOUBT)}
        """SAs in doubt, by the keys of their entries."""
        self._told: set[tuple[SaName, bool]] = set()
        """SAs whose message IDs charon has reported since this agent started; True: those of its own
        requests."""

    async def begin(self, before: Iterable[SaName]) -> None:
        """Make the kernel note message IDs. SAs of `before` are in doubt if their messages were not noted."""
        try:
            if await asyncio.to_thread(self.noted.prepare):
                return
        except KernelError as error:
            log.warning(
                "message IDs that are used while no agent runs will not be known: %s (%s)", error, error.hint
            )
        for sa in before:
            self._store.put(_DOUBT, sa.key, b"")
            self._keys.add(sa.key)

    async def again(self) -> bool:
        """Make the kernel note message IDs again, if somebody has removed its rules. Returns whether they
        were there.

        No SA is in doubt by that, because charon reports to this agent meanwhile. Errors: KernelError.
        """
        return await asyncio.to_thread(self.noted.prepare)

    def close(self) -> None:
        """Stop; the kernel goes on noting."""
        self.noted.close()

    def told(self, sa: SaName, initiator: bool) -> None:
        """charon has reported the next ID of its requests (`initiator`), or of those that it expects."""
        self._told.add((sa, initiator))

    def gone(self, sa: SaName) -> None:
        """charon has the SA no longer."""
        self._told -= {(sa, True), (sa, False)}
        self._forget(sa.key)

    def keep(self, listed: Collection[SaName]) -> None:
        """charon has exactly these SAs."""
        keys = {sa.key for sa in listed}
        for key in self._keys - keys:
            self._forget(key)

    def _forget(self, key: str) -> None:
        if key in self._keys:
            self._store.delete(_DOUBT, key)
            self._keys.discard(key)

    def after(self, sa: SaName) -> tuple[int, int]:
        """See `MessageIds.after`; if the kernel cannot be asked, nothing counts as noted."""
        try:
            return self.noted.after(sa)
        except KernelError as error:
            log.warning("message IDs cannot be looked up: %s", error)
            return 0, 0

    def check(self, sa: SaName) -> None:
        """Errors: UnknownSaError if the SA may have used message IDs that were not noted."""
        if sa.key not in self._keys:
            return
        noted = zip((True, False), self.after(sa), strict=True)
        if not all(after or (sa, initiator) in self._told for initiator, after in noted):
            raise UnknownSaError(
                "its message IDs are not known, because it may have sent messages while neither an agent "
                "nor the kernel noted them",
                hint="they are known after gateway and MN have each sent the other a request (as DPD does); "
                "or rekey the IKE_SA, or `ikectx resync`",
            )
        self._forget(sa.key)
