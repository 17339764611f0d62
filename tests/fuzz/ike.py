"""What comes in IKE messages: before they are decrypted, and from somebody who has the keys."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from ikectx.errors import WireError
from ikectx.numbers import Exchange, Notify, Payload
from ikectx.sa.keys import SealKey, iv_length, seal, seal_key, sealed_length
from ikectx.wire import ikev2
from ikectx.wire.ikev2 import IkeHeader, IkeMessage, add_marker, strip_marker
from ikectx.wire.payloads import AnyPayload, NotifyPayload, parse_payloads, serialize_payloads
from ikectx_cli.lab import capture, clear
from mobike_ext import watch
from mobike_ext.naming import answered, asked_for
from mobike_ext.notify import Invitation, UpdateSpi, UpdateSpiRefused, UpdateSpiSupported
from mobike_ext.packet_io import udp_in
from mobike_ext.responder import Asked
from mobike_ext.unknown import UnknownSas
from tests import rekey_peer
from tests.ikectx.sa.test_keys import CHARON, charon_generation
from tests.ikectx.wire.test_ikev2 import SAMPLES
from tests.mobike_ext import test_address_update as address_update
from tests.mobike_ext import test_naming as naming
from tests.mobike_ext import test_responder as responding
from tests.mobike_ext import test_spi_update as spi_update
from tests.mobike_ext.test_watch import MN6, US6, ip_packet, part, probe
from tests.mobile_ike import MN, NSG, SA, Node
from tests.vector_text import read_vectors

from .target import Copies, Target

IKE_KEY = seal_key(SA, by_initiator=True)
HEADER = IkeHeader(SA.spi_i, SA.spi_r, Exchange.INFORMATIONAL, 7, initiator=True, response=False)
INSIDE = (NotifyPayload(Notify.UPDATE_SA_ADDRESSES), NotifyPayload(Notify.COOKIE2, bytes(range(16))))
KEYS = {
    (one := charon_generation(case)).spi_i: seal_key(one, by_initiator=not one.initiator) for case in CHARON
}
FRAGMENTS = ikev2.seal_fragments(IKE_KEY, HEADER, SAMPLES, bytes(256), 120)


# --- chains of payloads: the type of the first one, then the payloads -------------------------------------


def chain(payloads: list[AnyPayload] | tuple[AnyPayload, ...]) -> bytes:
    first, octets = serialize_payloads(payloads)
    return bytes([first]) + octets


def chain_of(octets: bytes) -> tuple[AnyPayload, ...]:
    return parse_payloads(Payload(octets[0]), octets[1:]) if octets else ()


def payloads_of(octets: bytes) -> None:
    """What is read can be written; reserved bits and critical flags of known payloads may be lost."""
    payloads = chain_of(octets)
    assert parse_payloads(*serialize_payloads(payloads)) == payloads
    with contextlib.suppress(WireError):
        IkeMessage(HEADER, payloads).check()


def notifies_of(octets: bytes) -> None:
    for payload in chain_of(octets):
        if isinstance(payload, NotifyPayload):
            readers: tuple[Callable[[NotifyPayload], Any], ...] = (
                UpdateSpi.parse,
                partial(UpdateSpi.parse, answer=True),
                UpdateSpiRefused.parse,
                UpdateSpiSupported.parse,
                Invitation.parse,
            )
            for read in readers:
                with contextlib.suppress(WireError):
                    value = read(payload)
                    assert value.serialize() == payload or getattr(value, "version", 1) > 1


def naming_of(octets: bytes) -> None:
    message = IkeMessage(replace(HEADER, response=True), chain_of(octets))
    asked_for(message)
    found = answered(naming.ASKED, message)
    assert found is None or bool(found.pairs) != bool(found.reasons)


# --- datagrams --------------------------------------------------------------------------------------------


def message_of(octets: bytes) -> None:
    """Whole, or as a fragment behind another one, under the key of the SA that it names."""
    key = KEYS.get(octets[:8], IKE_KEY)
    with contextlib.suppress(WireError):
        ikev2.open_message(key, octets)
    gathers = ikev2.Reassembly(key)
    if key is IKE_KEY:
        gathers.add(FRAGMENTS[0])
    gathers.add(octets)


def datagram_of(octets: bytes) -> None:
    """Machines that wait for an answer hear any datagram, and go on waiting. So do those that listen."""
    UnknownSas(lambda: 0.0).receive(octets, NSG, MN, 1.0)
    for waiting in _waiting():
        before = waiting.state
        waiting.receive(octets, MN, 0)
        assert waiting.state is before
    responding.responder().receive(octets, NSG, 0)


@cache
def _waiting() -> tuple[Any, ...]:
    """Kept for all datagrams, because their keys take longer than a datagram."""
    rekey, (update, *_) = rekey_peer.child_rekey(), address_update.started()
    rekey.to_send(0)
    return rekey, update


def packet_of(octets: bytes) -> None:
    """IP packets off the wire."""
    watch.parse_packet(octets)
    udp_in(octets)
    for read in (capture.parse, capture.parse_neighbour, partial(clear.parse, mode="transport")):
        read(octets)


# --- authentic nonsense -----------------------------------------------------------------------------------


def sealed(key: SealKey, header: IkeHeader, octets: bytes) -> bytes:
    """A chain of payloads, sealed by somebody who has the keys."""
    first, inner = (octets[0], octets[1:]) if octets else (0, b"")
    size = 4 + sealed_length(key, len(inner))
    head = replace(header, next_payload=Payload.SK, length=28 + size).serialize()
    head += bytes([first, 0]) + size.to_bytes(2)
    return head + seal(key, head, inner, bytes(iv_length(key.encr)))


@cache
def asking(make: Callable[[], Any]) -> Copies:
    """A machine that has sent its first request, and the request."""
    machine = make()
    return Copies((machine, machine.to_send(0)[0][0]))


def answer_to(make: Callable[[], Any], octets: bytes) -> None:
    """The peer's answer to the first request of a machine."""
    machine, datagram = asking(make).copy()
    header = IkeHeader.parse(strip_marker(datagram, NSG, MN))
    header = replace(header, initiator=not header.initiator, response=True)
    machine.receive(add_marker(sealed(IKE_KEY, header, octets), MN, NSG), MN, 0)
    while machine.next_event() is not None:
        pass
    machine.to_send(0)


def request_of(octets: bytes) -> None:
    """A gateway's request to a mobile node's agent."""
    machine = responding.responder()
    header = replace(HEADER, initiator=False)
    machine.receive(add_marker(sealed(responding.TO_NODE, header, octets), NSG, MN), NSG, 0)
    while (event := machine.next_event()) is not None:
        if isinstance(event, Asked):
            machine.answer(bytes(range(256)), 0)


def good_answer(make: Callable[[], Any], peer: Any) -> bytes:
    """What a peer answers to that machine, as a chain."""
    datagram = make().to_send(0)[0][0]
    if isinstance(peer, Node):
        answer = peer.accept(datagram)
    else:
        peer.receive(datagram, NSG, 0)
        answer = peer.to_send(0)[0][0]
    return chain(ikev2.open_message(IKE_KEY, strip_marker(answer, MN, NSG)).payloads)


def answered_by(make: Callable[[], Any], peer: Any) -> Target:
    refusal = chain([NotifyPayload(Notify.TEMPORARY_FAILURE)])
    return Target(partial(answer_to, make), (good_answer(make, peer), refusal), ())


NOTIFIES = (
    chain([Invitation("nsg").serialize()]),
    *(
        bytes((Payload.NOTIFY, 0, 0)) + (4 + len(octets)).to_bytes(2) + octets
        for octets in read_vectors("update_spi_notifies.txt").values()
    ),
)
RECORDED = tuple(bytes.fromhex(case["answer"])[4:] for case in CHARON)
DATAGRAMS = (*responding.BOTH, add_marker(probe(), NSG, MN), add_marker(part(1, 2), NSG, MN))

TARGETS = {
    "IKE message": Target(
        message_of,
        (ikev2.seal_message(IKE_KEY, HEADER, INSIDE, bytes(8)), *FRAGMENTS, *RECORDED),
    ),
    "IKE datagram": Target(datagram_of, DATAGRAMS, ()),
    "IP packet": Target(
        packet_of, (ip_packet(bytes(4) + probe()), ip_packet(bytes(4) + probe(), US6, MN6)), ()
    ),
    "IKE payloads": Target(payloads_of, (chain(SAMPLES), chain(INSIDE))),
    "notifies": Target(notifies_of, NOTIFIES),
    "names in an answer": Target(naming_of, (chain([naming.YES, naming.CHOSEN]),)),
    "request for other SPIs": Target(request_of, (chain(responding.ASK), *NOTIFIES), ()),
    "answer to other SPIs": answered_by(spi_update.update, spi_update.agent()),
    "answer to other addresses": answered_by(address_update.update, Node()),
    "answer to a rekey of a CHILD_SA": answered_by(
        partial(rekey_peer.child_rekey, rekey_peer.PFS), rekey_peer.Peer()
    ),
    "answer to a rekey of an IKE_SA": answered_by(rekey_peer.ike_rekey, rekey_peer.Peer()),
}
