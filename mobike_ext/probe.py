"""Finds the message ID of our next request by empty INFORMATIONAL requests to the mobile node, sans-IO.

The gateway that lets an SA go has sent a request m that the mobile node, being elsewhere, has not answered:
it may have received it or not. An empty request (RFC 7296, 1.4) with the ID m is answered by a mobile node
that has not, and by one that has and repeats its answer to any request with that ID. charon (5.9.8) repeats
it for the same octets only, so a mobile node of that kind is silent; then m + 1 is sent as well. The
conclusions are:

    an answer to m, and m + 1 was never sent     the next is m + 1
    an answer to m + 1                           the next is m + 2
    an answer to m after m + 1 was sent          the node may have that by now: it is sent until answered

See `requester` for what counts as an answer. The same octets make the same messages, so that it can be begun
again after a crash. Verbs: `receive`, `to_send`, `next_timer`, `handle_timer`, `next_event`; `now` is
seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Never

from ikectx.errors import UsageError
from ikectx.machine import Table
from ikectx.numbers import Exchange
from ikectx.sa.context import Endpoint, IkeGeneration
from ikectx.sa.keys import DrawnIvs
from ikectx.wire.ikev2 import RetransmitPolicy
from ikectx.wire.payloads import AnyPayload

from .requester import Asking, RequesterMachine, SaEnd, Silent


class ProbeState(Enum):
    """NEW: nothing was sent. FIRST: m was sent. BOTH: m + 1 was sent, too. SECOND: m was answered, m + 1
    waits. The rest are final."""

    NEW = "new"
    FIRST = "first"
    BOTH = "both"
    SECOND = "second"
    SETTLED = "settled"
    SILENT = "silent"


class ProbeInput(Enum):
    """Inputs of the machine. LATER: it is time for m + 1. GIVE_UP: of the last request that waits."""

    START = "start"
    LATER = "later"
    ANSWER_FIRST = "answer to m"
    ANSWER_SECOND = "answer to m + 1"
    GIVE_UP = "give up"


_S, _I = ProbeState, ProbeInput
TABLE: Table[ProbeState, ProbeInput, Never] = {
    (_S.NEW, _I.START): (_S.FIRST,),
    (_S.FIRST, _I.LATER): (_S.BOTH,),
    (_S.FIRST, _I.ANSWER_FIRST): (_S.SETTLED,),
    (_S.BOTH, _I.ANSWER_FIRST): (_S.SECOND,),
    (_S.BOTH, _I.ANSWER_SECOND): (_S.SETTLED,),
    (_S.BOTH, _I.GIVE_UP): (_S.SILENT,),
    (_S.SECOND, _I.ANSWER_SECOND): (_S.SETTLED,),
    (_S.SECOND, _I.GIVE_UP): (_S.SILENT,),
}

ALONE = 2
"""Sendings of m before m + 1 is sent, too."""


class MidProbe(RequesterMachine[ProbeState, ProbeInput, Silent]):
    """Finds the message ID after `message_id` (m) that the mobile node at `remote` expects of us.

    ivs: for m and for m + 1, each of `keys.iv_length(generation.encr)` octets. local: the address for
    answers. payloads: of both requests, if they are to tell the mobile node something as well.
    """

    def __init__(
        self,
        generation: IkeGeneration,
        message_id: int,
        local: Endpoint,
        remote: Endpoint,
        *,
        ivs: tuple[bytes | DrawnIvs, bytes | DrawnIvs],
        policy: RetransmitPolicy | None = None,
        payloads: Sequence[AnyPayload] = (),
    ) -> None:
        policy = policy or RetransmitPolicy()
        self._asks = [Asking(SaEnd(generation, message_id + n, local, remote, policy)) for n in (0, 1)]
        super().__init__(self._asks[0], TABLE, ProbeState.NEW)
        self.next_id = message_id
        """The message ID of our next request, once it is found."""
        self._alone = sum(policy.wait(sent) for sent in range(1, min(ALONE, policy.tries) + 1))
        if any(len(iv) != self._asks[0].iv_length for iv in ivs) or ivs[0] == ivs[1]:
            raise UsageError(f"two IVs of {self._asks[0].iv_length} octets are needed, not equal")
        pairs = zip(self._asks, ivs, strict=True)
        self._requests = [ask.seal(Exchange.INFORMATIONAL, payloads, iv) for ask, iv in pairs]

    @property
    def sent(self) -> int:
        """Datagrams sent so far."""
        return sum(ask.requests + ask.retransmissions for ask in self._asks)

    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        if self.state is ProbeState.NEW:
            self._ask(0)
            self._enter(ProbeInput.START)
            self._later(now + self._alone, self._ask_both)
        return [] if self.done else [one for ask in self._asks for one in ask.to_send(now)]

    def next_timer(self) -> float | None:
        timers = [self._due, *(ask.next_timer() for ask in self._asks)]
        return None if self.done else min((due for due in timers if due is not None), default=None)

    def handle_timer(self, now: float) -> None:
        for ask in self._asks:
            ask.handle_timer(now)
        self._wake(now)
        if self.state is not ProbeState.FIRST and not any(ask.waits for ask in self._asks):
            self._enter(ProbeInput.GIVE_UP, Silent(self.sent))

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        del now
        if self.done:
            return  # an answer to m after the one to m + 1 has no new information
        for ask, what in zip(self._asks, (ProbeInput.ANSWER_FIRST, ProbeInput.ANSWER_SECOND), strict=True):
            if ask.waits and ask.receive(datagram, source) is not None:
                self._enter(what)
                self.next_id = ask.message_id
                return

    def _ask(self, number: int) -> None:
        self._asks[number].ask(Exchange.INFORMATIONAL, self._requests[number])

    def _ask_both(self) -> None:
        self._ask(1)
        self._enter(ProbeInput.LATER)
