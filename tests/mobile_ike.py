"""A mobile node's IKE beside the machines of `mobike_ext`: an IKE_SA, and a node that answers like charon."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from ikectx.numbers import Encr, Notify, Prf
from ikectx.sa.context import Endpoint, IkeGeneration, Secret
from ikectx.sa.keys import iv_length, seal_key
from ikectx.wire.ikev2 import (
    IkeMessage,
    RetransmitPolicy,
    add_marker,
    nat_detection_hash,
    open_message,
    seal_message,
    strip_marker,
)
from ikectx.wire.payloads import AnyPayload, NotifyPayload
from mobike_ext.address_update import AddressNotice
from mobike_ext.naming import Names
from mobike_ext.notify import UpdateSpi
from mobike_ext.requester import SaEnd
from mobike_ext.spi_update import MIRROR_WAIT, PeerRequests, SpiUpdate

NSG = Endpoint.of("192.0.2.20", 4500)
MN = Endpoint.of("198.51.100.7", 4500)
COOKIE = bytes(range(16))
FAST = RetransmitPolicy(initial=1, factor=2, tries=3)

SA = IkeGeneration(
    spi_i=b"initiatr",
    spi_r=b"responde",
    initiator=False,
    nonce_i=bytes(range(32)),
    nonce_r=bytes(range(50, 82)),
    secret=Secret(b"shared" * 6),
    prf=Prf.HMAC_SHA2_256,
    encr=Encr.AES_GCM_16,
    encr_bits=256,
)


def asks_for(
    end: SaEnd,
    renames: Sequence[UpdateSpi],
    *,
    iv: bytes,
    fresh: bytes,
    address: AddressNotice | None = None,
    expected_id: int | None = None,
    patience: float = MIRROR_WAIT,
    names: Names | None = None,
    announce: bool = False,
) -> SpiUpdate:
    """A machine that asks for new SPIs; without `expected_id` the peer's own requests are charon's."""
    meanwhile = None if expected_id is None else PeerRequests(expected_id, patience, names)
    return SpiUpdate(
        end, renames, iv=iv, fresh=fresh, address=address, meanwhile=meanwhile, announce=announce
    )


class Node:
    """A mobile node: opens what the gateway seals and answers as stock charon does."""

    def __init__(self, generation: IkeGeneration = SA, me: Endpoint = MN) -> None:
        self.generation = generation
        self.me = me
        self.inbound = seal_key(generation, by_initiator=generation.initiator)
        self.outbound = seal_key(generation, by_initiator=not generation.initiator)

    def read(self, datagram: bytes, gateway: Endpoint = NSG) -> IkeMessage:
        return open_message(self.inbound, strip_marker(datagram, gateway, self.me))

    def nat_detection(self, gateway: Endpoint, *, here: Endpoint | None = None) -> list[AnyPayload]:
        spis = self.generation.spis
        return [
            NotifyPayload(Notify.NAT_DETECTION_SOURCE_IP, nat_detection_hash(*spis, here or self.me)),
            NotifyPayload(Notify.NAT_DETECTION_DESTINATION_IP, nat_detection_hash(*spis, gateway)),
        ]

    def answer(
        self, request: IkeMessage, payloads: list[AnyPayload], gateway: Endpoint = NSG, **header: object
    ) -> bytes:
        head = replace(request.header, initiator=not request.header.initiator, response=True, **header)  # type: ignore[arg-type]
        iv = secrets.token_bytes(iv_length(self.generation.encr))
        return add_marker(seal_message(self.outbound, head, payloads, iv), self.me, gateway)

    def accept(self, datagram: bytes, gateway: Endpoint = NSG) -> bytes:
        request = self.read(datagram, gateway)
        return self.answer(
            request, [*self.nat_detection(gateway), *request.notifies(Notify.COOKIE2)], gateway
        )
