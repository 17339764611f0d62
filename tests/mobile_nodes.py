"""MNs as tests need them: CTARs with their tokens, and what a CTAA says to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from ikectx.numbers import Status
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import Ctaa, Ctar, CtReq, Message
from ikectx.wire.tokens import Purpose, make_ctar, open_ctaa, token_key
from ikectx.wire.whereabouts import NOBODY
from tests.hand_loop import wall
from tests.worlds import World

AWAY = Endpoint.of("203.0.113.5", 4500)
"""Where the MN is after it has moved, as IKE sees it."""
CXTP = 5091


@dataclass
class MobileNode:
    """One SA's other end; `serve` sets it up at gateway a."""

    context: IkeContext
    sequence: int = 0x11223344
    at: Endpoint = AWAY
    psg: str = "a"
    nsg: str = "b"
    lifetime: float = 60.0
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def sa(self) -> SaName:
        return self.context.spis

    @property
    def home(self) -> Address:
        return self.context.remote.address

    def ctar(self, purpose: Purpose, **other: Any) -> Ctar:
        told: dict[str, Any] = {
            "mn": self.home,
            "router": ip_address("192.0.2.9" if self.home.version == 4 else "2001:db8::9"),
            "sequence": self.sequence,
            "purpose": purpose,
            "spis": self.sa,
            "psg": self.psg,
            "nsg": self.nsg,
            "expiry": round(wall() + self.lifetime),
            "care_of": self.at if purpose is Purpose.ARRIVE else None,
            **self.more,
            **other,
        }
        made = make_ctar(token_key(self.context.current, told["sequence"]), **told)
        return Ctar.parse(made.serialize())

    def announce(self, **other: Any) -> tuple[Ctar, Endpoint]:
        return self.ctar(Purpose.ANNOUNCE, **other), Endpoint(self.home, CXTP)

    def arrive(self, **other: Any) -> tuple[Ctar, Endpoint]:
        return self.ctar(Purpose.ARRIVE, **other), Endpoint(self.at.address, CXTP)

    def says(self, answer: bytes | None, purpose: Purpose = Purpose.ARRIVE) -> Status | None:
        """What an answer with a good tag says; None for one without, and for none."""
        if answer is None:
            return None
        ctaa = Ctaa.parse(answer)
        key = token_key(self.context.current, self.sequence)
        if not open_ctaa(key, ctaa, self.sequence, purpose=purpose):
            return None
        return next((block.status for block in ctaa.statuses), Status.OK)


def serve(w: World, context: IkeContext, **more: Any) -> MobileNode:
    """An MN with this SA at gateway a."""
    w.a.daemon.serve(context)
    return MobileNode(context, **more)


def of_transfers(w: World) -> list[Message]:
    """What the gateways sent each other, but for notices of where SAs are and their answers."""
    return [message for message in w.network.seen if getattr(message, "mn", None) != NOBODY]


def kinds(w: World) -> list[type[Message]]:
    return [type(message) for message in of_transfers(w)]


def requests(w: World) -> list[CtReq]:
    return [message for message in w.network.seen if isinstance(message, CtReq)]
