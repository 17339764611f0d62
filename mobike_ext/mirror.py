"""`Mirror`: a mobile node's own request for the SPIs that its gateway has asked for, as it is noted. No I/O.

An agent that starts sends a noted request again, octet for octet, because the gateway gives the same answer
only to the same octets (for 60 s)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ikectx.errors import reading
from ikectx.numbers import Protocol
from ikectx.sa.context import Endpoint, IkeContext
from ikectx.sa.keys import DrawnIvs, iv_length
from ikectx.wire.ikev2 import RetransmitPolicy

from .notify import UpdateSpi
from .requester import SaEnd
from .spi_update import FRESH_OCTETS, SpiUpdate

POLICY = RetransmitPolicy(0.25, 1.3, 6)
"""3.2 s in all: if the new gateway has given up waiting by then, its rekeys must find charon active."""
_DATAGRAMS = 8


@dataclass(frozen=True, slots=True)
class Mirror:
    """A request of this node's own, with everything that its octets depend on. It has fresh octets: not for
    logs.

    Without `asks` it is empty, and only uses up its message ID.
    """

    message_id: int
    local: Endpoint
    remote: Endpoint
    asks: tuple[UpdateSpi, ...]
    iv: bytes
    fresh: bytes

    def dumps(self) -> bytes:
        """The stored form."""
        value = {
            "id": self.message_id,
            "ends": [[str(end.address), end.port] for end in (self.local, self.remote)],
            "asks": [[int(one.protocol), one.old.hex(), one.new.hex(), one.choose] for one in self.asks],
            "iv": self.iv.hex(),
            "fresh": self.fresh.hex(),
        }
        return json.dumps(value).encode()

    @classmethod
    def loads(cls, data: bytes) -> Mirror:
        """Errors: StoreError."""
        with reading("the note of a mobile node's UPDATE_SPI"):
            value: Any = json.loads(data)
            local, remote = (Endpoint.of(address, int(port)) for address, port in value["ends"])
            asks = tuple(
                UpdateSpi(Protocol(protocol), bytes.fromhex(old), bytes.fromhex(new), choose=bool(choose))
                for protocol, old, new, choose in value["asks"]
            )
            iv, fresh = bytes.fromhex(value["iv"]), bytes.fromhex(value["fresh"])
            return cls(int(value["id"]), local, remote, asks, iv, fresh)

    @classmethod
    def fresh_one(
        cls,
        context: IkeContext,
        message_id: int,
        ends: tuple[Endpoint, Endpoint],
        asks: tuple[UpdateSpi, ...],
        draw: Callable[[int], bytes],
    ) -> Mirror:
        """A new request between `ends` (ours, the gateway's). `draw` gives so many random octets."""
        octets = _DATAGRAMS * iv_length(context.current.encr)
        return cls(message_id, *ends, asks, draw(octets), draw(FRESH_OCTETS))

    def machine(self, context: IkeContext) -> SpiUpdate:
        """The machine for this request, the same each time."""
        return SpiUpdate(
            SaEnd(context.current, self.message_id, self.local, self.remote, POLICY),
            self.asks,
            iv=DrawnIvs.of(self.iv),
            fresh=self.fresh,
        )
