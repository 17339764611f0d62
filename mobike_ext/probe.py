"""Which message ID has our next request? Asked of the MN by empty INFORMATIONAL requests, sans-IO.

The gateway that lets an SA go has sent a request m that the MN, being elsewhere, has not answered: it may
have had it or not. An empty request (RFC 7296, 1.4) with the ID m is answered by an MN that has not, and by
one that has and repeats its answer to whatever has that ID. charon (5.9.8) repeats it for the same octets
only, so an MN of that kind is silent; then m + 1 is asked with as well. What is known from that:

    an answer to m, and m + 1 was never sent     the next is m + 1
    an answer to m + 1                           the next is m + 2
    an answer to m after m + 1 was sent          the MN may have had that by now: it is sent until answered

What counts as an answer: `asking`. The same octets make the same messages, so that it can be begun again
after a crash. Verbs: `receive`, `to_send`, `next_timer`, `handle_timer`, `next_event`; `now` is seconds.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from ikectx.context import Endpoint, IkeGeneration
from ikectx.errors import UsageError
from ikectx.ikev2 import RetransmitPolicy
from ikectx.numbers import Exchange

from .asking import Asking
from .exchange import Silent


class State(Enum):
    """NEW: nothing sent. FIRST: m was sent. BOTH: and m + 1. SECOND: m was answered, m + 1 waits. The rest
    are ends."""

    NEW = "new"
    FIRST = "first"
    BOTH = "both"
    SECOND = "second"
    SETTLED = "settled"
    SILENT = "silent"


class Input(Enum):
    """What happens. LATER: it is time for m + 1. GIVE_UP: of the last request that waits."""

    START = "start"
    LATER = "later"
    ANSWER_FIRST = "answer to m"
    ANSWER_SECOND = "answer to m + 1"
    GIVE_UP = "give up"


_S, _I = State, Input
TABLE: dict[tuple[State, Input], State] = {
    (_S.NEW, _I.START): _S.FIRST,
    (_S.FIRST, _I.LATER): _S.BOTH,
    (_S.FIRST, _I.ANSWER_FIRST): _S.SETTLED,
    (_S.BOTH, _I.ANSWER_FIRST): _S.SECOND,
    (_S.BOTH, _I.ANSWER_SECOND): _S.SETTLED,
    (_S.BOTH, _I.GIVE_UP): _S.SILENT,
    (_S.SECOND, _I.ANSWER_SECOND): _S.SETTLED,
    (_S.SECOND, _I.GIVE_UP): _S.SILENT,
}
"""What is not here changes nothing."""

ALONE = 2
"""Sendings of m before m + 1 is sent, too."""


class MidProbe:
    """Finds the message ID after `message_id` (m) that the MN at `remote` expects of us.

    ivs: for m and for m + 1, each of `keys.iv_length(generation.encr)` octets. local: where answers come to.
    """

    def __init__(
        self,
        generation: IkeGeneration,
        message_id: int,
        local: Endpoint,
        remote: Endpoint,
        *,
        ivs: tuple[bytes, bytes],
        policy: RetransmitPolicy | None = None,
    ) -> None:
        policy = policy or RetransmitPolicy()
        self._asks = [Asking(generation, message_id + n, local, remote, policy=policy) for n in (0, 1)]
        self.local = local
        self.remote = remote
        self.spis = self._asks[0].spis
        self.state = State.NEW
        self.next_id = message_id
        """Of our next request, once it is settled."""
        self._alone = sum(policy.wait(sent) for sent in range(1, min(ALONE, policy.tries) + 1))
        self._later = 0.0
        self._waiting: set[int] = set()
        self._events: deque[Silent] = deque()
        if any(len(iv) != self._asks[0].iv_length for iv in ivs) or ivs[0] == ivs[1]:
            raise UsageError(f"two IVs of {self._asks[0].iv_length} octets are needed, not equal")
        pairs = zip(self._asks, ivs, strict=True)
        self._requests = [ask.seal(Exchange.INFORMATIONAL, (), iv) for ask, iv in pairs]

    @property
    def done(self) -> bool:
        """An end is reached."""
        return self.state in (State.SETTLED, State.SILENT)

    @property
    def sent(self) -> int:
        """Datagrams sent so far."""
        return sum(ask.requests + ask.retransmissions for ask in self._asks)

    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        """UDP payloads (marker included) to send now, and where to. The first call starts it."""
        if self.state is State.NEW:
            self._later = now + self._alone
            self._ask(0)
            self._enter(Input.START)
        return [] if self.done else [one for n in sorted(self._waiting) for one in self._asks[n].to_send(now)]

    def next_timer(self) -> float | None:
        """When `handle_timer` is due; None: never."""
        if self.done or self.state is State.NEW:
            return None
        due = [timer for n in self._waiting if (timer := self._asks[n].next_timer()) is not None]
        return min([*due, *([self._later] if self.state is State.FIRST else [])], default=None)

    def handle_timer(self, now: float) -> None:
        """Time has passed; may make something to send, or a `Silent`."""
        if self.done:
            return
        for number in sorted(self._waiting):
            if not self._asks[number].handle_timer(now):
                self._waiting.discard(number)
        if self.state is State.FIRST and now >= self._later:
            self._ask(1)
            self._enter(Input.LATER)
        if not self._waiting and self.state in (State.BOTH, State.SECOND):
            self._events.append(Silent(self.sent))
            self._enter(Input.GIVE_UP)

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        """A UDP payload that came to `local`. Never raises."""
        del now
        for number, what in ((0, Input.ANSWER_FIRST), (1, Input.ANSWER_SECOND)):
            if number in self._waiting and self._asks[number].receive(datagram, source) is not None:
                self._waiting.discard(number)
                self._enter(what)
                self.next_id = self._asks[number].message_id
                return

    def next_event(self) -> Silent | None:
        """`Silent`, if it was."""
        return self._events.popleft() if self._events else None

    def _ask(self, number: int) -> None:
        self._asks[number].ask(Exchange.INFORMATIONAL, self._requests[number])
        self._waiting.add(number)

    def _enter(self, what: Input) -> None:
        self.state = TABLE.get((self.state, what), self.state)
