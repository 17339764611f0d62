"""A connection between two gateways as the kernel sees it: addresses, ports, protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ikectx.sa.context import Endpoint

Transport = Literal["tcp", "sctp"]


@dataclass(frozen=True, slots=True)
class Flow:
    """A connection's two ends as seen from here."""

    local: Endpoint
    remote: Endpoint
    protocol: Transport = "tcp"

    def __post_init__(self) -> None:
        if self.local.address.version != self.remote.address.version:
            raise ValueError("both ends of a connection are of one address family")

    def __str__(self) -> str:
        return f"{self.protocol} between {self.local} and {self.remote}"
