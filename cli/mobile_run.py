"""One handover of a mobile node under way: what its rooms tell each other of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ikectx.context import Address, Endpoint, IkeContext
from ikectx.mobility import Handover
from ikectx.name import SaName

from .mobile_config import GatewayEntry
from .mobile_report import Report

Progress = Callable[[Mapping[str, Any]], None]


_NAMELESS = SaName(b"", b"")


@dataclass(slots=True)
class Run:
    """One handover under way."""

    sa: SaName
    psg: GatewayEntry
    nsg: GatewayEntry
    context: IkeContext
    report: Report
    machine: Handover
    tell: Progress
    held: bool = False
    """The SA is passive by us."""
    moved: asyncio.Future[Address] | None = None
    """Predictive: the new local address, where somebody has said that the node is at its new place."""
    at: Endpoint | None = None
    """Predictive: where the node is, as soon as that is known."""
    named: bool = False
    """Somebody has named that address: no other one will do."""
    prepared: asyncio.Future[None] | None = None
    until: float = 0.0
    """When the announcement's time is over, by the loop's clock."""
    task: asyncio.Task[Report] | None = None
    since: float = field(default_factory=time.monotonic)
    now: SaName = _NAMELESS
    """What the SA is called at last: `sa`, unless its IKE SPIs were taken at nSG."""
    was_held: bool = False
    """The SA was passive by us at some time."""
    by_ike: IkeContext | None = None
    """The SA after nSG has moved it by IKE."""
    asks: bool = False
    """charon has asked pSG something that nobody answered, and is to ask nSG."""

    def phase(self, name: str, detail: str = "") -> None:
        """A step has ended."""
        now = time.monotonic()
        ms = (now - self.since) * 1000
        self.report.phases[name] = self.report.phases.get(name, 0.0) + ms
        self.since = now
        self.tell({"phase": name, "ms": round(ms, 1), "to": self.nsg.name, "detail": detail})
