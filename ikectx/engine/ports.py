"""The IKE daemon, the store and the clock as the engine sees them: protocols, no I/O.

`vici_bridge` implements source and sink for charon; integrators implement them for an IKE daemon of their
own; tests implement them with dictionaries. All of them raise only `ikectx.errors`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from ikectx.errors import RefusedError
from ikectx.numbers import Status
from ikectx.sa.context import Address as IpAddress
from ikectx.sa.context import Endpoint, FinalState, IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from ikectx.wire.cxtp import ContextDataBlock
from ikectx.wire.profile import Told


@dataclass(frozen=True, slots=True)
class MoveReport:
    """Cost of the exchange with the mobile node: messages and octets (UDP payload) on the wire, ms."""

    messages: int = 0
    octets: int = 0
    retransmissions: int = 0
    requests: int = 0
    """Message IDs that requests of ours have used."""
    answered: int = 0
    """Message IDs of requests of the mobile node that were answered by the agent, not by charon."""
    proven_by_traffic: bool = False

    def counts(self) -> dict[str, int]:
        """All of it, by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __add__(self, other: MoveReport) -> MoveReport:
        """The sum of both; proof by traffic counts if one of them has it."""
        return MoveReport(
            messages=self.messages + other.messages,
            octets=self.octets + other.octets,
            retransmissions=self.retransmissions + other.retransmissions,
            requests=self.requests + other.requests,
            answered=self.answered + other.answered,
            proven_by_traffic=self.proven_by_traffic or other.proven_by_traffic,
        )


Address = Told | Literal["invite", "auto"]
"""How the mobile node gets to the new gateway. update: the new gateway tells it its address. keep: the
gateway's address moves along. mn: the mobile node is there, or will go there, by itself. relay: it stays
where it is, and the old gateway passes its packets on and back. invite: its agent is told to go there, and
then mn. auto: as the source chooses (`ContextSource.invites`, `ContextSource.choose`)."""


def told(address: Address) -> Told:
    """What the other gateway would be told of a way that nobody has chosen for this SA."""
    return "update" if address == "auto" else "mn" if address == "invite" else address


@dataclass(frozen=True, slots=True)
class Way:
    """How one mobile node gets to one gateway, and why so, in words (empty: there was no choice).

    `seen_at`: with "relay", the endpoint of this gateway that stands for the mobile node.
    """

    address: Told
    why: str = ""
    seen_at: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class RelayTo:
    """Packets of a mobile node are passed on `to` the gateway that serves it, from `seen_at` of this one."""

    seen_at: Endpoint
    to: IpAddress


SENDING_SECONDS = 10.0
"""Seconds for which a mobile node receives under old SPIs, at most (UPDATE_SPI)."""
SENDING_PACKETS = 1 << 23
"""Packets of each CHILD_SA. The other gateway starts, under the same keys, at a number twice as far ahead."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a gateway has of an SA that its journal does not know, in words; empty: nothing, or it cannot say.

    `serves`: charon here certainly serves it, under the SPIs by which the other gateway knows it. `mn`: the
    mobile node's identity then. `idle`: charon certainly has it under those SPIs, and does not serve it.
    """

    words: str = ""
    serves: bool = False
    mn: str = ""
    idle: bool = False


Stand = Literal["served", "frozen", "gone", "unknown"]
"""How an SA stands at charon and the kernel, whatever the journal says. frozen: its IKE is mute, or its ESP
is stopped, as for an SA that was let go."""


@runtime_checkable
class ContextSource(Protocol):
    """The gateway that serves an IKE_SA now (old gateway).

    Inherit from it: what a daemon can do without has a default here, which does nothing.
    """

    @abstractmethod
    async def find(self, mn: IpAddress) -> Sequence[SaName]:
        """The IKE_SAs served here whose mobile node has this outer address. Errors: CharonError."""

    @abstractmethod
    def recorded(self, sa: SaName) -> IkeContext:
        """The SA as it was last recorded: its keys are right; counters, addresses and message IDs may be old.

        It must ask neither charon nor the kernel and cost next to nothing, because strangers can cause this
        call. Errors: UnknownSaError, RefusedError for an SA that cannot be moved.
        """

    async def stands(self, sa: SaName, let_go: bool) -> Stand:
        """How the SA stands here, asked when a journal that may be an old one has a transfer of it open.

        `let_go`: the journal says that it was let go; it is made mute again then if somebody has emptied
        nftables. Errors: KernelError, CharonError.
        """
        return "unknown"

    @abstractmethod
    async def export(self, sa: SaName, *, away: bool = False) -> IkeContext:
        """The context as it is now. Errors: UnknownSaError, BusyError, CharonError, KernelError.

        If `away`, the mobile node has proven that it is elsewhere. Then ignore an unanswered liveness check
        or address update, which does not make the SA busy, because the mobile node has left and will not
        answer. The returned context is marked `unsure`.
        """

    @abstractmethod
    async def freeze(
        self,
        context: IkeContext,
        to: str,
        *,
        away: bool = False,
        sending: bool = False,
        renaming: bool = False,
        relay: RelayTo | None = None,
    ) -> FinalState:
        """Let go of the SA: after this call the gateway sends neither IKE nor ESP for it.

        Inbound ESP is still decrypted. `to` is the name of the gateway that gets the SA: packets for the
        mobile node that still arrive may be sent on there. `sending`: ESP is still sent, under the old SPIs,
        for `SENDING_SECONDS`, `SENDING_PACKETS` or until `release`, because the other gateway has other SPIs
        and cannot send before the mobile node knows them. `renaming`: the other gateway gives CHILD_SAs other
        SPIs, which the mobile node may have when the freeze is undone. `away`: as for `export`. `relay`: the
        mobile node is not told of the other gateway; pass its IKE on from now on, and its ESP from `release`
        on. It is not passed where the source never chose "relay". Errors:
        BusyError if the SA changed since `context` was exported or has an exchange in flight; nothing is
        frozen then, and nothing diverted.
        """

    @abstractmethod
    async def thaw(self, context: IkeContext, oseq_jump: int) -> None:
        """Undo `freeze` and serve the SA again; outbound sequence numbers jump. Idempotent; works after a
        crash.

        If the freeze was called with `renaming`, the CHILD_SAs are rekeyed, because the mobile node may have
        dropped the old ones. Also called where nothing was frozen and the other gateway had prepared the SA,
        because it may have sent packets under the same keys. Errors: UnknownSaError where the SA was lost
        while it was frozen: no trace of it is left then, and nobody serves it.
        """

    @abstractmethod
    async def release(self, context: IkeContext) -> None:
        """Delete the SA silently, keep decrypting late packets for a while. Idempotent."""

    async def divert(self, context: IkeContext, to: str) -> None:
        """The mobile node leaves at once, and the gateway `to` holds its packets: send them on there.

        IKE and inbound ESP are served as before. `freeze` or `thaw` follows.
        """
        return None

    # A source that can choose how a mobile node gets to the other gateway:

    async def choose(self, context: IkeContext, to: str, address: Address) -> Way:
        """How the mobile node gets to the gateway `to`. `address`: what the operator wants.

        Changes nothing; called before the SA is offered. With "relay" `freeze` is told the other gateway's
        address. Errors: RefusedError where that is not possible, or nothing is.
        """
        if address == "relay":
            raise RefusedError("this gateway cannot pass packets on", status=Status.NOT_COVERED)
        return Way(told(address))

    def invites(self, sa: SaName, address: Address) -> bool:
        """Whether the mobile node's own agent is to be told to go to the other gateway, instead of an offer.

        Must ask nobody. Errors: UnknownSaError, RefusedError if `address` is "invite" and that is not
        possible.
        """
        if address == "invite":
            raise RefusedError("this gateway cannot invite mobile nodes", status=Status.NOT_COVERED)
        return False

    async def invite(self, sa: SaName, to: str) -> None:
        """Tell the mobile node's agent to ask the gateway `to` for its SA; empty: tell the mobile node the
        addresses of this gateway (RFC 4555, 3.6). Errors: as `export`; in the latter case LinkError
        (silent)."""
        raise RefusedError("this gateway cannot invite mobile nodes", status=Status.NOT_COVERED)

    # A source that sends packets on to the gateway that has an SA now (`ikectx.wire.whereabouts`):

    def hands_over(self, sa: SaName, *, held: bool = False) -> None:
        """Called before `freeze`: the SA goes to a gateway that has no part of it yet, and that may send
        packets for it here; or, if `held`, that has its context and what `ContextSink.ready` made of it."""
        return None

    def not_taken(self, sa: SaName) -> None:
        """Called before `thaw`: the other gateway refused the SA before it did anything for it.

        So the mobile node's routes are left as they are, and the mobile node is not asked where it is,
        because the other gateway has neither attracted its packets nor spoken to it.
        """
        return None

    def stays(self, sa: SaName) -> None:
        """The SA was to leave, and is still served here: the gateways that it came from are to be told so."""
        return None


@runtime_checkable
class ContextSink(Protocol):
    """The gateway that is to serve the SA (new gateway).

    Inherit from it: what a daemon can do without has a default here. The defaults are those of a daemon that
    never changes SPIs, and cannot ask the mobile node anything.
    """

    @abstractmethod
    async def check(self, context: IkeContext, keep_address: bool) -> Sequence[Verdict]:
        """Reasons against taking the SA; changes nothing. Empty, or all OK: none.

        `keep_address`: the gateway's address moves along, so the mobile node is not told a new one.
        """

    async def ready(self, context: IkeContext, keep_address: bool, *, leaving: bool = False) -> bool:
        """The mobile node has announced that it will come: install what can be before its address is known.

        Nothing is sent under the SA's keys. Called after `check`; `prepare` follows, or `not_coming`. What
        fails here is left to `prepare`. `leaving`: it leaves at once, so hold packets for it until `prepare`,
        and return True if that is done: the other gateway then sends them here.
        """
        return False

    def not_coming(self, context: IkeContext) -> None:
        """The SA does not come: forget what `ready` and `tell_later` prepared."""
        self.tell_later(context, False)

    @abstractmethod
    async def prepare(self, context: IkeContext, keep_address: bool) -> None:
        """Install without owning: PASSIVE in charon, SAs and policies in the kernel. All or nothing."""

    @abstractmethod
    async def take(self, context: IkeContext, final: FinalState) -> None:
        """Own the SA: set the final counters, bring routes and updown up. ESP flows through here from now on.

        May be called again after a crash, as may the next two: outbound numbers are only ever raised.
        """

    @abstractmethod
    async def move_peer(self, context: IkeContext, final: FinalState) -> MoveReport:
        """Tell the mobile node the gateway's new address. Errors: LinkError (silent), RefusedError."""

    @abstractmethod
    async def activate(self, context: IkeContext, final: FinalState, report: MoveReport) -> None:
        """Set the message IDs; charon does IKE for the SA from now on."""

    @abstractmethod
    async def undo(self, context: IkeContext) -> None:
        """Undo `prepare` and `take`, with nothing left over. Idempotent; works after a crash."""

    def shown(self, context: IkeContext, request: tuple[bytes, ...]) -> None:
        """Called before `prepare`: the mobile node's IKE request, from its endpoint in the context to this
        gateway, that nobody has answered; empty: there is none. `activate` gives it to the daemon, which else
        gets it with its next repetition."""

    def relayed(self, context: IkeContext, peer: str) -> None:
        """Called before `check` and `prepare`: the mobile node stays at `peer`'s address, and is not told;
        empty: it does not.

        Its endpoint in the context is one of `peer`, which passes on what is sent there. Errors: RefusedError
        where this gateway cannot do without the mobile node's own address, which is the default.
        """
        if peer:
            raise RefusedError("this gateway takes no SAs by relay", status=Status.NOT_COVERED)

    def heard_at(self, context: IkeContext) -> IpAddress | None:
        """The address here to which a relayed mobile node's packets are to be passed on."""
        return None

    def came_from(self, context: IkeContext, peer: str) -> None:
        """Called before and with `take`: `peer` gives the SA, and is to be told later where the SA is."""
        return None

    async def settle(self, context: IkeContext, final: FinalState) -> FinalState:
        """`final` without `unsure`, by an empty request to the mobile node (RFC 7296, 1.4) between `take` and
        `activate`. May be called again after a crash. Errors: LinkError (silent); RefusedError with
        NOT_COVERED where this gateway cannot ask, which is the default."""
        raise RefusedError(
            "the other gateway does not know its next message ID, and this one cannot ask the MN",
            status=Status.NOT_COVERED,
        )

    async def still_here(self, final: FinalState, mn: IpAddress, who: str) -> Evidence:
        """The parts of an SA that no journal has, but charon or the kernel has. Changes nothing.

        `mn`: the outer address by which the other gateway knows the mobile node; `who`: its identity, empty
        if that is not known. The SA may have other SPIs here. Errors: CharonError, KernelError, WireError if
        one of them cannot be asked.
        """
        return Evidence()

    # A sink that can change SPIs that are already in use. If the mobile node waits for a CTAA, the new SPIs
    # are sent in it, not by `move_peer`.

    def tell_later(self, context: IkeContext, later: bool) -> None:
        """Called before `check` and `prepare`: True if the mobile node waits for an answer with the new
        SPIs."""
        return None

    def must_tell(self, context: IkeContext) -> bool:
        """True if the SA has new SPIs and no answer will tell them to the mobile node, so that `move_peer`
        must."""
        return False

    def renames(self, context: IkeContext) -> bool:
        """True if CHILD_SAs of the prepared SA have SPIs here that the mobile node does not know."""
        return False

    def cannot_send(self, context: IkeContext) -> bool:
        """True if the mobile node does not know the outbound SPIs of the prepared SA, until `move_peer` tells
        it."""
        return False

    def new_names(self, context: IkeContext) -> Sequence[ContextDataBlock]:
        """Blocks for the answer (CTAA, `Fpt.NEW_SPIS`), called once the SA is active; empty: SPIs are
        unchanged."""
        return ()


Renamer = ContextSink
"""A sink that can change SPIs, as a public name of its own: until those methods were part of `ContextSink`,
it was a protocol apart."""


class Store(Protocol):
    """A durable store, encrypted at rest. Keys are text, values octets."""

    def put(self, kind: str, key: str, value: bytes, *, soon: bool = False) -> None:
        """Keep a note. `soon`: together with what is written next."""

    def get(self, kind: str, key: str) -> bytes | None: ...

    def delete(self, kind: str, key: str, *, soon: bool = False) -> None:
        """Forget it; it need not exist. `soon`: together with what is written next."""

    def items(self, kind: str) -> Sequence[tuple[str, bytes]]: ...

    def rows(self, role: str) -> Sequence[tuple[str, bytes]]:
        """The ledger's rows of that role, by the key of the SA's name (`ikectx.engine.ledger`)."""

    def keep(self, role: str, key: str, row: bytes | None, *, soon: bool = False) -> None:
        """Keep a row of the ledger; None: forget it. `soon`: together with what is written next."""

    def set_aside(self, place: str, key: str, why: str) -> None:
        """Take out of `place` what cannot be read, keep it for people to look at, and say so.

        `place`: "items|KIND" or "ledger|ROLE".
        """
