"""When charon last reported IKE of each SA, and what those SAs were that it is just destroying."""

from __future__ import annotations

import contextlib
import time

from ikectx.errors import IkectxError
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from vici_bridge.ha import messages as ha
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.record import Record

DEPARTED = 20.0
"""Seconds for which an SA is remembered that charon is destroying."""


class LastHeard:
    """Kept beside the record, which forgets an SA as soon as charon reports that it goes."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._spoke: dict[SaName, float] = {}
        self._departed: dict[SaName, tuple[IkeContext, float, float]] = {}

    def spoke(self, sa: SaName) -> None:
        """charon has reported a message ID of it."""
        self._spoke[sa] = time.monotonic()

    def forget(self, sa: SaName) -> None:
        """It was deleted, has moved away, or was rekeyed."""
        self._spoke.pop(sa, None)

    def quiet(self, sa: SaName) -> float:
        """Seconds since the last IKE request in either direction that was reported to this agent."""
        return time.monotonic() - self._spoke.get(sa, 0.0)

    def keep(self, message: ha.HaMessage) -> None:
        """Before the record is fed: keep what the message is about to end.

        charon sends IKE_DELETE, then runs updown scripts, then clears the kernel (5.9.8, 6.0.6).
        """
        now = time.monotonic()
        self._departed = {sa: kept for sa, kept in self._departed.items() if now - kept[1] < DEPARTED}
        ike = message.find(ha.Attr.IKE_ID, IkeId)
        if message.type is ha.HaType.IKE_DELETE and ike is not None and ike.spis in self._record:
            with contextlib.suppress(IkectxError):
                self._departed[ike.spis] = (self._record.context(ike.spis), now, self.quiet(ike.spis))

    def departed(self) -> dict[SaName, tuple[IkeContext, float]]:
        """SAs that charon is just destroying, with the time since their last IKE request (seconds)."""
        return {sa: (context, quiet) for sa, (context, _, quiet) in self._departed.items()}

    def context(self, sa: SaName) -> IkeContext:
        """The record's context, or that of an SA charon is destroying. Errors: as `Record.context`."""
        kept = self._departed.get(sa)
        return kept[0] if kept is not None and sa not in self._record else self._record.context(sa)
