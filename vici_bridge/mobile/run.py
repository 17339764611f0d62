"""The state of one handover of a mobile node, shared by the modules that carry it out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ikectx.errors import StateError
from ikectx.node.mobility import Handover
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.sa.name import SaName

from .node import GatewayEntry
from .report import MobileReport

Progress = Callable[[Mapping[str, Any]], None]


_NAMELESS = SaName(b"", b"")


@dataclass(slots=True)
class HandoverRun:
    """The state of one handover."""

    sa: SaName
    psg: GatewayEntry
    nsg: GatewayEntry
    context: IkeContext
    report: MobileReport
    machine: Handover
    tell: Progress
    held: bool = False
    """True if the SA is passive because of this handover."""
    holding: asyncio.Task[None] | None = None
    """Makes it passive, beside the request to the new gateway."""
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the request to the new gateway has left, and at the latest when it has ended."""
    heard_more: bool = False
    """True if charon has had a request of the old gateway that the new one was not told of."""
    inner: tuple[Address, ...] = ()
    """Predictive: own addresses that are reached through the SA, and are none of a new place."""
    moved: asyncio.Future[Address] | None = None
    """Predictive: the new local address, if the node was reported to be at its new place."""
    at: Endpoint | None = None
    """Predictive: the node's endpoint at its new place, as soon as it is known."""
    named: bool = False
    """True if that address was given, so that no other one may be used."""
    prepared: asyncio.Future[None] | None = None
    until: float = 0.0
    """End of the announcement's time, by the loop's clock."""
    task: asyncio.Task[MobileReport] | None = None
    since: float = field(default_factory=time.monotonic)
    now: SaName = _NAMELESS
    """The SA's last name: `sa`, unless its IKE SPIs were taken at the new gateway."""
    was_held: bool = False
    """True if the SA was passive because of this handover at some time."""
    by_ike: IkeContext | None = None
    """The SA after the new gateway has moved it by IKE."""
    asks: bool = False
    """True if charon has sent the old gateway a request without an answer, which it should send the new
    one."""

    def beyond(self, here: Endpoint) -> Endpoint:
        """The new gateway's endpoint for an SA that is `here`. Errors: StateError."""
        address = self.nsg.address(here.address.version)
        if address is None:
            raise StateError(f"{self.nsg.name} has no address of the family of {here.address}")
        return Endpoint(address, self.context.remote.port)

    def phase(self, name: str, detail: str = "") -> None:
        """Note that a step has ended."""
        now = time.monotonic()
        ms = (now - self.since) * 1000
        self.report.phases[name] = self.report.phases.get(name, 0.0) + ms
        self.since = now
        self.tell({"phase": name, "ms": round(ms, 1), "to": self.nsg.name, "detail": detail})
