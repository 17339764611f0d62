"""Deletes an IKE_SA at the peer in place of a charon that no longer has it, sans-IO.

    MN -> gateway   INFORMATIONAL  D(IKE)      answered empty (RFC 7296, 1.4.1)

charon destroys an SA that is PASSIVE without a Delete to the peer (strongSwan 5.9.8), whose SA remains: it
goes on sending packets and keeps the virtual IP. The agent that made the SA PASSIVE sends the Delete.

charon may have had a request under way, and the gateway may have received it or not. Then the Delete is sent
under both message IDs: a gateway ignores the one that is not the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Never

from ikectx.errors import UsageError
from ikectx.machine import Table
from ikectx.numbers import Exchange, Protocol
from ikectx.sa.context import Endpoint, IkeGeneration
from ikectx.wire.ikev2 import RetransmitPolicy
from ikectx.wire.payloads import DeletePayload

from .requester import Asking, RequesterMachine, SaEnd, Silent

POLICY = RetransmitPolicy(0.5, 1.5, 9)
"""37 s in all, because a gateway that is taking the SA, or taking it back, answers only when it has it."""


class FarewellState(Enum):
    """NEW: nothing was sent. WAITING: for an answer. The rest are final; SILENT: the peer may not have the
    SA."""

    NEW = "new"
    WAITING = "waiting"
    DELETED = "deleted"
    SILENT = "silent"


class FarewellInput(Enum):
    """Inputs of the machine. GIVE_UP: of the last request that waits."""

    START = "start"
    ANSWER = "answer"
    GIVE_UP = "give up"


TABLE: Table[FarewellState, FarewellInput, Never] = {
    (FarewellState.NEW, FarewellInput.START): (FarewellState.WAITING,),
    (FarewellState.WAITING, FarewellInput.ANSWER): (FarewellState.DELETED,),
    (FarewellState.WAITING, FarewellInput.GIVE_UP): (FarewellState.SILENT,),
}


class Farewell(RequesterMachine[FarewellState, FarewellInput, Silent]):
    """Deletes the IKE_SA of `generation` at `remote`.

    message_ids: our next request may have one of these. iv: random, `keys.iv_length` octets for each of them.
    local: the address that answers come to. Errors: UsageError.
    """

    def __init__(
        self,
        generation: IkeGeneration,
        message_ids: Sequence[int],
        local: Endpoint,
        remote: Endpoint,
        *,
        iv: bytes,
        policy: RetransmitPolicy = POLICY,
    ) -> None:
        self._asks = [Asking(SaEnd(generation, number, local, remote, policy)) for number in message_ids]
        if not self._asks:
            raise UsageError("a Delete has a message ID")
        super().__init__(self._asks[0], TABLE, FarewellState.NEW)
        size = self._asks[0].iv_length
        if len(iv) != size * len(self._asks):
            raise UsageError(f"{size} octets for an IV are needed for each message ID")
        delete = [DeletePayload(Protocol.IKE)]
        self._requests = [
            ask.seal(Exchange.INFORMATIONAL, delete, iv[size * n : size * (n + 1)])
            for n, ask in enumerate(self._asks)
        ]

    @property
    def sent(self) -> int:
        """Datagrams sent so far."""
        return sum(ask.requests + ask.retransmissions for ask in self._asks)

    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        if self.state is FarewellState.NEW:
            for ask, request in zip(self._asks, self._requests, strict=True):
                ask.ask(Exchange.INFORMATIONAL, request)
            self._enter(FarewellInput.START)
        return [] if self.done else [one for ask in self._asks for one in ask.to_send(now)]

    def next_timer(self) -> float | None:
        timers = [ask.next_timer() for ask in self._asks]
        return None if self.done else min((due for due in timers if due is not None), default=None)

    def handle_timer(self, now: float) -> None:
        for ask in self._asks:
            ask.handle_timer(now)
        if self.state is FarewellState.WAITING and not any(ask.waits for ask in self._asks):
            self._enter(FarewellInput.GIVE_UP, Silent(self.sent))

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        del now
        waiting = [] if self.done else [ask for ask in self._asks if ask.waits]
        if any(ask.receive(datagram, source) is not None for ask in waiting):
            self._enter(FarewellInput.ANSWER)
