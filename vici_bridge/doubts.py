"""`Doubts`: whose message IDs may have been used while neither an agent nor the kernel took note. I/O.

An SA with a number too low would be deaf to its MN, and would take an old request for a new one. So one of
which that may be true stays where it is until both numbers have been noted, or told by charon, since.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable

from ikectx.errors import KernelError, UnknownSaError
from ikectx.name import SaName
from ikectx.ports import Store

from .message_ids import MessageIds

log = logging.getLogger(__name__)

_DOUBT = "doubt"
"""Kind of store entry: this SA may have used message IDs while nobody, not even the kernel, took note."""


class Doubts:
    """`noted`: what the kernel notes of the messages that leave."""

    def __init__(self, store: Store) -> None:
        self.noted = MessageIds()
        self._store = store
        self._told: set[tuple[SaName, bool]] = set()
        """Whose message IDs charon has told in this life of the agent; True: those of its own requests."""

    async def begin(self, before: Iterable[SaName]) -> None:
        """Have the kernel note. SAs of `before` are in doubt if nobody noted their messages meanwhile."""
        try:
            if await asyncio.to_thread(self.noted.prepare):
                return
        except KernelError as error:
            log.warning(
                "message IDs that are used while no agent runs will not be known: %s (%s)", error, error.hint
            )
        for sa in before:
            self._store.put(_DOUBT, sa.key, b"")

    def close(self) -> None:
        """Leave; the kernel goes on noting."""
        self.noted.close()

    def told(self, sa: SaName, initiator: bool) -> None:
        """charon has told the next ID of its requests (`initiator`), or of those it expects."""
        self._told.add((sa, initiator))

    def gone(self, sa: SaName) -> None:
        """charon has the SA no longer."""
        self._told -= {(sa, True), (sa, False)}
        self._store.delete(_DOUBT, sa.key)

    def keep(self, listed: Collection[SaName]) -> None:
        """charon has these SAs, and no others."""
        keys = {sa.key for sa in listed}
        for key, _ in self._store.items(_DOUBT):
            if key not in keys:
                self._store.delete(_DOUBT, key)

    def after(self, sa: SaName) -> tuple[int, int]:
        """See `MessageIds.after`; where the kernel cannot say, nothing was noted."""
        try:
            return self.noted.after(sa)
        except KernelError as error:
            log.warning("message IDs cannot be looked up: %s", error)
            return 0, 0

    def check(self, sa: SaName) -> None:
        """Errors: UnknownSaError where an SA of before may have used message IDs unnoted."""
        if self._store.get(_DOUBT, sa.key) is None:
            return
        noted = zip((True, False), self.after(sa), strict=True)
        if not all(after or (sa, initiator) in self._told for initiator, after in noted):
            raise UnknownSaError(
                "its message IDs are not known: it may have spoken while nothing noted them",
                hint="they are known when gateway and MN have each asked the other something (DPD does); "
                "or rekey the IKE_SA, or `ikectx resync`",
            )
        self._store.delete(_DOUBT, sa.key)
