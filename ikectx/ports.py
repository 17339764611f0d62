"""The outside world as the engine sees it: five protocols, no I/O.

`vici_bridge` implements source and sink for charon; an integrator implements them
for an IKE daemon of their own; tests implement them in a dictionary. All raise only
`ikectx.errors`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .context import Address, FinalState, IkeContext
from .cxtp import ContextDataBlock
from .errors import RefusedError
from .name import SaName
from .numbers import Fpt, Status


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check's outcome for one kind of context; `status` OK: nothing against it."""

    fpt: Fpt
    status: Status
    detail: str = ""


@dataclass(frozen=True, slots=True)
class MoveReport:
    """What the exchange with the MN took: messages and octets (UDP payload) on the air, ms."""

    messages: int = 0
    octets: int = 0
    retransmissions: int = 0
    requests: int = 0
    """Message IDs used up by requests of ours."""
    answered: int = 0
    """Message IDs of requests of the MN's that were answered here, not by charon."""
    proven_by_traffic: bool = False

    def __add__(self, other: MoveReport) -> MoveReport:
        """What both took together; one proof by traffic is enough."""
        return MoveReport(
            messages=self.messages + other.messages,
            octets=self.octets + other.octets,
            retransmissions=self.retransmissions + other.retransmissions,
            requests=self.requests + other.requests,
            answered=self.answered + other.answered,
            proven_by_traffic=self.proven_by_traffic or other.proven_by_traffic,
        )


SENDING_SECONDS = 10.0
"""As long as an MN receives under old SPIs, at most (UPDATE_SPI)."""
SENDING_PACKETS = 1 << 23
"""For each CHILD_SA. The other gateway begins, under the same keys, twice as far on."""


class ContextSource(Protocol):
    """The gateway that serves an IKE_SA now (pSG)."""

    async def find(self, mn: Address) -> Sequence[SaName]:
        """The IKE_SAs served here whose MN has this outer address. Errors: CharonError."""

    def recorded(self, sa: SaName) -> IkeContext:
        """The SA as it was last heard of: its keys are right, counters, addresses and message IDs may be old.

        Strangers can have this called, so it must ask nobody and cost next to nothing. Errors:
        UnknownSaError, RefusedError for an SA that cannot be moved.
        """

    async def export(self, sa: SaName, *, away: bool = False) -> IkeContext:
        """The context as it is now. Errors: UnknownSaError, BusyError, CharonError, KernelError.

        `away`: the MN has proven that it is elsewhere, so that a request of ours that says nothing of
        CHILD_SAs (a liveness check, addresses) stays without an answer. It does not make the SA busy then:
        the context is `unsure`.
        """

    async def freeze(
        self,
        context: IkeContext,
        to: str,
        *,
        away: bool = False,
        sending: bool = False,
        renaming: bool = False,
    ) -> FinalState:
        """Let go: from its return on this gateway sends neither IKE nor ESP for the SA.

        `sending`: ESP goes on, under the old SPIs, for `SENDING_SECONDS`, `SENDING_PACKETS` or until
        `release`, since the other gateway has others and cannot send before the MN knows them.
        `renaming`: the other gateway gives CHILD_SAs other SPIs, which the MN may have when this is undone.
        `to` is the name of the gateway it goes to: packets for the MN that still arrive may be sent on there.
        Inbound ESP goes on being decrypted. Errors: BusyError when the SA changed since `context` was
        exported or has an exchange in flight; nothing is frozen then. `away`: as for `export`.
        """

    async def thaw(self, context: IkeContext, oseq_jump: int) -> None:
        """Undo `freeze` and serve on; outbound sequence numbers jump. Idempotent; works after a crash.

        Where the freeze was told of a `renaming`, the CHILD_SAs are rekeyed: the MN may lack the old ones.
        """

    async def release(self, context: IkeContext) -> None:
        """Delete the SA silently, keep decrypting late packets for a while. Idempotent."""


class ContextSink(Protocol):
    """The gateway that is to serve it (nSG)."""

    async def check(self, context: IkeContext, keep_address: bool) -> Sequence[Verdict]:
        """All that speaks against taking it; touches nothing. Empty or all OK: none.

        `keep_address`: the gateway's address moves along, so the MN is not told a new one.
        """

    async def prepare(self, context: IkeContext, keep_address: bool) -> None:
        """Install without owning: PASSIVE in charon, SAs and policies in the kernel. All or nothing."""

    async def take(self, context: IkeContext, final: FinalState) -> None:
        """Own it: final counters in, routes and updown up. ESP flows through here from now on.

        May be called again after a crash, as may the two that follow: outbound numbers are only ever raised.
        """

    async def move_peer(self, context: IkeContext, final: FinalState) -> MoveReport:
        """Tell the MN the gateway's new address. Errors: LinkError (silent), RefusedError."""

    async def activate(self, context: IkeContext, final: FinalState, report: MoveReport) -> None:
        """Message IDs in, charon talks IKE for it from now on."""

    async def undo(self, context: IkeContext) -> None:
        """Take back `prepare` and `take`: nothing of it stays. Idempotent; works after a crash."""


class Renamer(Protocol):
    """What a sink has, too, that gives SAs new SPIs where theirs are in use. Where the MN moves by itself,
    `move_peer` does not tell it: an answer that it waits for does, or else nothing would."""

    def tell_later(self, context: IkeContext, later: bool) -> None:
        """Before `check` and `prepare`: does the MN wait for an answer, which will tell it the new SPIs?"""

    def must_tell(self, context: IkeContext) -> bool:
        """The SA has new SPIs, and no answer will tell the MN: `move_peer` must."""

    def renames(self, context: IkeContext) -> bool:
        """Once it is prepared: its CHILD_SAs have SPIs here that the MN does not know."""

    def cannot_send(self, context: IkeContext) -> bool:
        """Once it is prepared: its outbound SPIs are not known to the MN, which `move_peer` will tell."""

    def new_names(self, context: IkeContext) -> Sequence[ContextDataBlock]:
        """Blocks for the answer (CTAA, `Fpt.NEW_SPIS`), asked for once the SA is active; none: the old."""


def tell_later(sink: ContextSink, context: IkeContext, later: bool) -> None:
    """To `sink`, if it renames."""
    call = getattr(sink, "tell_later", None)
    if call is not None:
        call(context, later)


def must_tell(sink: ContextSink, context: IkeContext) -> bool:
    """Of `sink`; False if it does not rename."""
    call = getattr(sink, "must_tell", None)
    return call is not None and bool(call(context))


def renames(sink: ContextSink, context: IkeContext) -> bool:
    """Of `sink`; False if it does not rename."""
    call = getattr(sink, "renames", None)
    return call is not None and bool(call(context))


def cannot_send(sink: ContextSink, context: IkeContext) -> bool:
    """Of `sink`; False if it does not rename."""
    call = getattr(sink, "cannot_send", None)
    return call is not None and bool(call(context))


def new_names(sink: ContextSink, context: IkeContext) -> tuple[ContextDataBlock, ...]:
    """Of `sink`; none if it does not rename."""
    call = getattr(sink, "new_names", None)
    return () if call is None else tuple(call(context))


class Follower(Protocol):
    """What a source and a sink have, too, that send packets on to where an SA is (`whereabouts`)."""

    def came_from(self, context: IkeContext, peer: str) -> None:
        """Before `take`, and again with it: the gateway that gives the SA, which is to hear where it is."""

    def hands_over(self, sa: SaName) -> None:
        """Before `freeze`: it goes to a gateway that has nothing of it yet, and may send its packets here."""

    def not_taken(self, sa: SaName) -> None:
        """Before `thaw`: the other gateway refused the SA before it did anything for it.

        Nothing there has drawn packets for the MN or spoken to it, so that nothing of that has to be put
        right: the MN's routes are left as they are, and the MN is not asked where it is.
        """

    def stays(self, sa: SaName) -> None:
        """The SA was to go, and is served here still: the gateways that it came from are to hear that."""


def come_from(sink: ContextSink, context: IkeContext, peer: str) -> None:
    """To `sink`, if it is a `Follower`."""
    call = getattr(sink, "came_from", None)
    if call is not None:
        call(context, peer)


def hand_over(source: ContextSource, sa: SaName) -> None:
    """To `source`, if it is a `Follower`."""
    call = getattr(source, "hands_over", None)
    if call is not None:
        call(sa)


def take_nothing(source: ContextSource, sa: SaName) -> None:
    """To `source`, if it is a `Follower`: see `Follower.not_taken`."""
    call = getattr(source, "not_taken", None)
    if call is not None:
        call(sa)


def stay(source: ContextSource, sa: SaName) -> None:
    """To `source`, if it is a `Follower`."""
    call = getattr(source, "stays", None)
    if call is not None:
        call(sa)


class Witness(Protocol):
    """What a sink has, too, that can say whether an SA is at this gateway although no journal tells of it."""

    async def still_here(self, final: FinalState, mn: Address) -> str:
        """What charon or the kernel has of that SA, in words; empty: nothing. Touches nothing.

        `mn`: the outer address by which the other gateway knows the MN. The SA may have other SPIs here.
        Errors: CharonError, KernelError, WireError when one of them cannot be asked.
        """


async def still_here(sink: ContextSink, final: FinalState, mn: Address) -> str:
    """Of `sink`; empty if it cannot say. Errors: as `Witness.still_here`."""
    call: Callable[[FinalState, Address], Awaitable[str]] | None = getattr(sink, "still_here", None)
    return "" if call is None else await call(final, mn)


class Settler(Protocol):
    """What a sink has, too, that can find out from the MN what the next request's message ID is."""

    async def settle(self, context: IkeContext, final: FinalState) -> FinalState:
        """`final`, no longer `unsure`: by an empty request to the MN (RFC 7296, 1.4) between `take` and
        `activate`. May be called again after a crash. Errors: LinkError (silent)."""


async def settle(sink: ContextSink, context: IkeContext, final: FinalState) -> FinalState:
    """By `sink`. Errors: also RefusedError with NOT_COVERED, if it cannot."""
    call: Callable[[IkeContext, FinalState], Awaitable[FinalState]] | None = getattr(sink, "settle", None)
    if call is None:
        raise RefusedError(
            "the other gateway does not know its next message ID, and this one cannot ask the MN",
            status=Status.NOT_COVERED,
        )
    return await call(context, final)


class Store(Protocol):
    """Durable, encrypted where it rests. Keys are text, values octets."""

    def put(self, kind: str, key: str, value: bytes) -> None: ...

    def get(self, kind: str, key: str) -> bytes | None: ...

    def delete(self, kind: str, key: str) -> None: ...

    def items(self, kind: str) -> Sequence[tuple[str, bytes]]: ...


class Clock(Protocol):
    """Monotonic seconds."""

    def now(self) -> float: ...
