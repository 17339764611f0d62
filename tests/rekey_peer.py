"""An IKE daemon that takes part in rekeys as RFC 7296 says, made of the library's rooms."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace

from ikectx.numbers import Exchange, KeMethod, Notify, Protocol
from ikectx.sa.context import ChildContext, Endpoint, IkeGeneration, Secret
from ikectx.sa.keys import iv_length, seal_key
from ikectx.wire.ikev2 import IkeMessage, Reassembly, add_marker, seal_message, strip_marker
from ikectx.wire.payloads import (
    AnyPayload,
    DeletePayload,
    KePayload,
    NoncePayload,
    NotifyPayload,
    SaPayload,
    TsPayload,
)
from mobike_ext.dh import KeyPair, fresh_length
from mobike_ext.rekey import REKEY_OCTETS, ChildMade, ChildRekey, IkeMade, IkeRekey, RekeyEvent, RekeyState
from mobike_ext.requester import SaEnd
from tests.air import Agent, Air, events
from tests.mobile_ike import FAST, MN, NSG, SA
from tests.peers import a_context

PEERS = b"\xcf\0\0\2"
"""The SPI that the peer chooses."""
NEW = b"\xc9\0\0\1"
"""The one that the gateway chooses."""
IKE_SA = replace(SA, ke=KeMethod.CURVE_25519)
CHILD = replace(a_context().children[0], spi_in=b"\xc1\0\0\1", spi_out=b"\xc2\0\0\2")
PFS = replace(CHILD, ke=KeMethod.ECP_256, secret=Secret(bytes(32)))
TEMPORARY = NotifyPayload(Notify.TEMPORARY_FAILURE)

Twist = Callable[[list[AnyPayload]], list[AnyPayload]]
"""What becomes of an answer's payloads."""


class Peer:
    """A mobile node's IKE daemon: CREATE_CHILD_SA, Delete, and the same octets for retransmissions."""

    def __init__(self, generation: IkeGeneration = IKE_SA, *, errors: tuple[NotifyPayload, ...] = ()) -> None:
        self.local = MN
        self.generation = generation
        self.errors = list(errors)
        self.twist: Twist = lambda payloads: payloads
        self.requests: list[IkeMessage] = []
        self.secret = Secret()
        self.nonce = secrets.token_bytes(24)
        self.expected = 7
        self._in = Reassembly(seal_key(generation, by_initiator=generation.initiator))
        self.out = seal_key(generation, by_initiator=not generation.initiator)
        self._last: tuple[bytes, bytes] | None = None
        self._send: list[tuple[bytes, Endpoint]] = []

    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        send, self._send = self._send, []
        return send

    def next_timer(self) -> float | None:
        return None

    def handle_timer(self, now: float) -> None:
        pass

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        if self._last is not None and datagram == self._last[0]:
            self._send.append((self._last[1], source))
            return
        message = self._in.add(strip_marker(datagram, source, MN))
        if message is None or message.header.message_id != self.expected:
            return
        self.expected += 1
        self.requests.append(message)
        head = replace(message.header, initiator=not message.header.initiator, response=True)
        iv = secrets.token_bytes(iv_length(self.generation.encr))
        answer = add_marker(seal_message(self.out, head, self._answer(message), iv), MN, source)
        self._last = datagram, answer
        self._send.append((answer, source))

    def _answer(self, request: IkeMessage) -> list[AnyPayload]:
        if request.header.exchange is Exchange.INFORMATIONAL:
            [delete] = [p for p in request.payloads if isinstance(p, DeletePayload)]
            return [DeletePayload(delete.protocol, (CHILD.spi_out,))] if delete.spis else []
        if self.errors:
            return [self.errors.pop(0)]
        answer: list[AnyPayload] = []
        for payload in request.payloads:
            match payload:
                case SaPayload(proposals=(offered,)):
                    spi = PEERS if offered.protocol is not Protocol.IKE else b"peers-ik"
                    answer.append(SaPayload((replace(offered, spi=spi),)))
                case NoncePayload():
                    answer.append(NoncePayload(self.nonce))
                case KePayload(method=method, data=data):
                    pair = KeyPair.of(method, secrets.token_bytes(fresh_length(method)))
                    self.secret = pair.shared(data)
                    answer.append(KePayload(method, pair.public))
                case NotifyPayload(notify=Notify.USE_TRANSPORT_MODE) | TsPayload():
                    answer.append(payload)
        return self.twist(answer)


class Caller(Agent):
    """The agent around a machine: it has installed the new SA as soon as that is made."""

    def __init__(self, machine: ChildRekey | IkeRekey) -> None:
        self.machine: ChildRekey | IkeRekey = machine

    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        if self.machine.state is RekeyState.MADE:
            self.machine.installed()
        return self.machine.to_send(now)


# --- what is rekeyed ---------------------------------------------------------------------------------------


def child_rekey(
    child: ChildContext = CHILD,
    generation: IkeGeneration = IKE_SA,
    limit: int | None = None,
    **changes: object,
) -> ChildRekey:
    options = {"new_spi": NEW, **_options()} | changes
    return ChildRekey(SaEnd(generation, 7, NSG, MN, FAST, limit), 0, child, **options)  # type: ignore[arg-type]


def ike_rekey(generation: IkeGeneration = IKE_SA, limit: int | None = None, **changes: object) -> IkeRekey:
    options = {"new_spi": b"new-ours", **_options()} | changes
    return IkeRekey(SaEnd(generation, 7, NSG, MN, FAST, limit), **options)  # type: ignore[arg-type]


def _options() -> dict[str, object]:
    return {"fresh": secrets.token_bytes(REKEY_OCTETS)}


def results(machine: ChildRekey | IkeRekey) -> list[RekeyEvent]:
    """How it ended; what was made on the way is left out."""
    return [event for event in events(machine) if not isinstance(event, ChildMade | IkeMade)]


def run(machine: ChildRekey | IkeRekey, peer: Peer) -> RekeyEvent:
    """The one result of a rekey on a good link."""
    Air().run(Caller(machine), peer)
    assert machine.done
    [event] = results(machine)
    return event


def of(message: IkeMessage, kind: type) -> list[AnyPayload]:
    """Its payloads of one kind."""
    return [payload for payload in message.payloads if isinstance(payload, kind)]
