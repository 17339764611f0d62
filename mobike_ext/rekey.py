"""New SPIs for a peer without UPDATE_SPI, by a standard rekey of this agent, sans-IO.

    ChildRekey   nSG -> MN   CREATE_CHILD_SA   N(REKEY_SA), [N(USE_TRANSPORT_MODE),] SA, Ni, [KEi,] TSi, TSr
                 MN -> nSG   CREATE_CHILD_SA   [N(USE_TRANSPORT_MODE),] SA, Nr, [KEr,] TSi, TSr
                 nSG -> MN   INFORMATIONAL     D(old CHILD_SA), answered by the MN's D
    IkeRekey     nSG -> MN   CREATE_CHILD_SA   SA, Ni, KEi
                 MN -> nSG   CREATE_CHILD_SA   SA, Nr, KEr
                 nSG -> MN   INFORMATIONAL     D(IKE_SA), under the old SPIs; the answer is empty

RFC 7296, 1.3.2, 1.3.3, 2.8 and 2.18. The algorithms, the mode and the selectors are those of the old SA, with
the key exchange that it had: a child that had none is offered with the IKE_SA's if the peer insists on one.
TEMPORARY_FAILURE (the peer is in the middle of another exchange, 2.25) is tried again after a pause,
INVALID_KE_PAYLOAD with the method that it names. A rekey that fails leaves the old SA as it was. If the
Delete is not answered the new SA is used nevertheless. If the answer cannot be used, the peer is told to
delete the SA that it made.

The peer's requests stay unanswered meanwhile, see `address_update`. See `requester` for what counts as an
answer. All randomness comes in as one argument; the same octets make the same messages, so a caller that
keeps them can begin again after a crash, as long as the message ID is the same.

Between the answer and the Delete the caller installs the new SA: `installed`, or `abandon`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Never

from ikectx.errors import RefusedError, StateError, UsageError, WireError
from ikectx.machine import Table
from ikectx.numbers import Exchange, KeMethod, Mode, Notify, Payload, Protocol, Status
from ikectx.sa.context import NO_SECRET, ChildContext, IkeGeneration, Lifetime, ReplayState, Secret
from ikectx.sa.keys import DrawnIvs, sk_d
from ikectx.wire.ikev2 import IkeMessage
from ikectx.wire.payloads import (
    AnyPayload,
    DeletePayload,
    KePayload,
    NoncePayload,
    NotifyPayload,
    Proposal,
    SaPayload,
    TsPayload,
)

from . import dh
from .notify import usable_spi
from .offers import child_offer, chosen_of, ike_offer, narrowed
from .requester import Asking, Fresh, Requester, SaEnd, Silent

REKEY_OCTETS = 2048
"""Fresh random octets that a rekey needs."""
NONCE_LENGTH = 32
MOST_METHODS = 4
"""Key exchange methods that are tried, each as the peer names it; there are no fresh octets for more."""
PAUSES = (1.0, 2.0)
"""Seconds before each further try after TEMPORARY_FAILURE (RFC 7296, 2.25, leaves them open)."""
_DATAGRAMS = 8
"""Fragments that a request may have, for which IVs are reserved."""


# --- events ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChildRekeyed:
    """The child that replaces the old one. `deleted`: the peer has confirmed that the old one is gone.

    Its counters begin at 0, its lifetime follows from the connection's settings (none here).
    """

    child: ChildContext
    deleted: bool


@dataclass(frozen=True, slots=True)
class IkeRekeyed:
    """The IKE_SA that replaces the old one; both message IDs are 0, and the children go on with it."""

    generation: IkeGeneration
    deleted: bool


@dataclass(frozen=True, slots=True)
class RekeyFailed:
    """The peer refused with `notify`, or gave an answer that cannot be used (INVALID_SYNTAX, and `why`)."""

    notify: Notify
    why: str = ""


@dataclass(frozen=True, slots=True)
class ChildMade:
    """The peer has the new child, and receives on it. Install it, then call `installed`.

    The old one is deleted only after that, because on the Delete the peer begins to send on the new one
    (charon 5.9.8 to 6.0.x).
    """

    child: ChildContext


@dataclass(frozen=True, slots=True)
class IkeMade:
    """The peer has the new IKE_SA. Call `installed` to go on with the Delete of the old one."""

    generation: IkeGeneration


RekeyEvent = ChildMade | IkeMade | ChildRekeyed | IkeRekeyed | RekeyFailed | Silent


# --- the table ---------------------------------------------------------------------------------------


class RekeyState(Enum):
    """NEW: nothing was sent. ASKING: for the new SA. PAUSED: until the next try. MADE: the caller installs
    it.

    DELETING: the old SA. DISCARDING: the new one, which is useless. The rest are final.
    """

    NEW = "new"
    ASKING = "asking"
    PAUSED = "paused"
    MADE = "made"
    DELETING = "deleting"
    DISCARDING = "discarding"
    DONE = "done"
    FAILED = "failed"
    SILENT = "silent"


class RekeyInput(Enum):
    """Inputs of the machine."""

    START = "the first sending"
    MADE = "an answer with the new SA"
    BUSY = "an answer that asks for patience"
    ERROR = "an answer with another error, or once too often"
    USELESS = "an answer with an SA that is not what was asked for"
    PAUSE_OVER = "the time to try again"
    INSTALLED = "the caller has installed the new SA"
    ABANDON = "the caller could not"
    DELETED = "the answer to the Delete"
    GIVE_UP = "the last retransmission timer"


_S, _I = RekeyState, RekeyInput

TABLE: Table[RekeyState, RekeyInput, Never] = {
    (_S.NEW, _I.START): (_S.ASKING,),
    (_S.ASKING, _I.MADE): (_S.MADE,),
    (_S.ASKING, _I.BUSY): (_S.PAUSED,),
    (_S.ASKING, _I.ERROR): (_S.FAILED,),
    (_S.ASKING, _I.USELESS): (_S.DISCARDING,),
    (_S.ASKING, _I.GIVE_UP): (_S.SILENT,),
    (_S.PAUSED, _I.PAUSE_OVER): (_S.ASKING,),
    (_S.MADE, _I.INSTALLED): (_S.DELETING,),
    (_S.MADE, _I.ABANDON): (_S.DISCARDING,),
    (_S.DELETING, _I.DELETED): (_S.DONE,),
    (_S.DELETING, _I.GIVE_UP): (_S.DONE,),
    (_S.DISCARDING, _I.DELETED): (_S.FAILED,),
    (_S.DISCARDING, _I.GIVE_UP): (_S.FAILED,),
}


# --- the machine -------------------------------------------------------------------------------------


class _Rekey(Requester[RekeyState, RekeyInput, RekeyEvent]):
    """The common part of both rekeys. A subclass defines the request, the result of an answer, and the
    Delete.

    protocol: of the SA that is rekeyed. ke: the method of the first try. The rest as for `ChildRekey`.
    """

    def __init__(
        self,
        end: SaEnd,
        protocol: Protocol,
        new_spi: bytes,
        fresh: bytes,
        ke: KeMethod,
    ) -> None:
        if not usable_spi(protocol, new_spi):
            raise UsageError(f"an SPI of {protocol.name} cannot be {new_spi.hex()}")
        if len(fresh) < REKEY_OCTETS:
            raise UsageError(f"{REKEY_OCTETS} fresh octets are needed, not {len(fresh)}")
        super().__init__(Asking(end), TABLE, RekeyState.NEW)
        self.generation = end.generation
        self._new_spi = new_spi
        self._fresh = Fresh(fresh)
        self._nonce = self._fresh.take(NONCE_LENGTH)
        self._ke = ke
        self._pair = self._key_pair(ke)
        # A restarted caller may build a different message. Use separate IV streams, so that no IV is used for
        # two plaintexts.
        self._old_ivs, self._useless_ivs = self._ivs(), self._ivs()
        self._tried = {ke}
        self._pauses = list(PAUSES)
        self._result: ChildRekeyed | IkeRekeyed | RekeyFailed | None = None

    # what a subclass says

    @abstractmethod
    def _wanted(self) -> list[AnyPayload]:
        """The payloads of the CREATE_CHILD_SA request."""

    @abstractmethod
    def _made(self, message: IkeMessage) -> ChildRekeyed | IkeRekeyed:
        """The result of the answer, deleted: False. WireError: it cannot be used."""

    @abstractmethod
    def _old(self) -> DeletePayload:
        """The Delete after the new SA was installed."""

    @abstractmethod
    def _useless(self) -> DeletePayload | None:
        """The Delete for a new SA that is useless; None: it cannot be named here."""

    def _otherwise(self) -> KeMethod | None:
        """The key exchange to offer after NO_PROPOSAL_CHOSEN."""
        return None

    # verbs

    def installed(self) -> None:
        """After `ChildMade` or `IkeMade`: the new SA can be used here; the old one is deleted now."""
        if self.state is not RekeyState.MADE:
            raise StateError("no new SA waits to be installed")
        self._send(Exchange.INFORMATIONAL, [self._old()], self._old_ivs)
        self._enter(RekeyInput.INSTALLED)

    def skip(self, count: int) -> None:
        """After `ChildMade` or `IkeMade`: other requests have used so many message IDs meanwhile."""
        self._asking.skip(count)

    def abandon(self, why: str) -> None:
        """After `ChildMade`: the new child cannot be installed here, so the peer deletes it again.

        A new IKE_SA cannot be given back (StateError): the peer has moved its children to it.
        """
        useless = self._useless()
        if self.state is not RekeyState.MADE or useless is None:
            raise StateError("no new CHILD_SA waits to be installed")
        self._result = RekeyFailed(Notify.TEMPORARY_FAILURE, why)
        self._send(Exchange.INFORMATIONAL, [useless], self._useless_ivs)
        self._enter(RekeyInput.ABANDON)

    # steps

    def _begin(self) -> None:
        self._ask()
        self._enter(RekeyInput.START)

    def _go_on(self) -> None:
        self._ask()
        self._enter(RekeyInput.PAUSE_OVER)

    def _unanswered(self) -> None:
        if self.state is RekeyState.ASKING:
            self._enter(RekeyInput.GIVE_UP, Silent(self._asking.sent))
        else:
            self._tell_result(RekeyInput.GIVE_UP)

    def _answered(self, message: IkeMessage, now: float) -> None:
        if self.state is not RekeyState.ASKING:
            self._tell_result(RekeyInput.DELETED, deleted=message.error is None)
        elif message.error is not None:
            self._refused(message.error, now)
        else:
            self._use(message)

    def _tell_result(self, what: RekeyInput, *, deleted: bool = False) -> None:
        """The exchange with the Delete has ended, and with it the rekey."""
        result = self._result
        if isinstance(result, ChildRekeyed | IkeRekeyed):
            result = replace(result, deleted=deleted)
        self._enter(what, *([] if result is None else [result]))

    def _ask(self) -> None:
        self._send(Exchange.CREATE_CHILD_SA, self._wanted(), self._ivs())

    def _ivs(self) -> DrawnIvs:
        """IVs for the datagrams of one request."""
        return DrawnIvs.of(self._fresh.take(_DATAGRAMS * self._asking.iv_length))

    def _send(self, exchange: Exchange, payloads: Sequence[AnyPayload], ivs: DrawnIvs) -> None:
        self._asking.ask(exchange, self._asking.seal(exchange, payloads, ivs))

    def _refused(self, error: NotifyPayload, now: float) -> None:
        other: KeMethod | None = None
        if error.notify == Notify.TEMPORARY_FAILURE and self._pauses:
            self._enter(RekeyInput.BUSY)
            self._later(now + self._pauses.pop(0), self._go_on)
            return
        if error.notify == Notify.INVALID_KE_PAYLOAD and len(error.data) == 2:
            other = KeMethod(int.from_bytes(error.data))
        elif error.notify == Notify.NO_PROPOSAL_CHOSEN:
            other = self._otherwise()
        spent = len(self._tried) == MOST_METHODS
        if other is None or other in self._tried or spent or not dh.known(other):
            self._enter(RekeyInput.ERROR, RekeyFailed(error.notify))
            return
        self._ke, self._pair = other, self._key_pair(other)
        self._tried.add(other)
        self._ask()

    def _use(self, message: IkeMessage) -> None:
        try:
            self._result = result = self._made(message)
        except WireError as error:
            self._result = RekeyFailed(Notify.INVALID_SYNTAX, str(error))
            useless = self._useless()
            if useless is None:
                self._enter(RekeyInput.ERROR, self._result)
            else:
                self._send(Exchange.INFORMATIONAL, [useless], self._useless_ivs)
                self._enter(RekeyInput.USELESS)
            return
        made = ChildMade(result.child) if isinstance(result, ChildRekeyed) else IkeMade(result.generation)
        self._enter(RekeyInput.MADE, made)

    def _key_pair(self, method: KeMethod) -> dh.KeyPair | None:
        if method is KeMethod.NONE:
            return None
        return dh.KeyPair.of(method, self._fresh.take(dh.fresh_length(method)))

    def _ke_payloads(self) -> list[AnyPayload]:
        return [] if self._pair is None else [KePayload(self._ke, self._pair.public)]

    def _keys(self, message: IkeMessage) -> tuple[bytes, Secret]:
        """(the peer's nonce, g^ir)."""
        nonces = [p.nonce for p in message.payloads if isinstance(p, NoncePayload)]
        if len(nonces) != 1:
            raise WireError(f"{len(nonces)} nonces in the answer")
        values = [p for p in message.payloads if isinstance(p, KePayload)]
        if self._pair is None:
            return nonces[0], NO_SECRET
        if len(values) != 1 or values[0].method != self._ke:
            raise WireError("the answer lacks the public value")
        return nonces[0], self._pair.shared(values[0].data)


class ChildRekey(_Rekey):
    """Rekeys `child` of the IKE_SA of `end`.

    index: of that IKE_SA in its context, for the new child. new_spi: on which this gateway will receive,
    reserved by the caller. fresh: `REKEY_OCTETS`, random. ke: a method that must be used; None: as the old
    child. RefusedError with NOT_COVERED for IPComp, BEET mode and additional key exchanges.
    """

    def __init__(
        self,
        end: SaEnd,
        index: int,
        child: ChildContext,
        *,
        new_spi: bytes,
        fresh: bytes,
        ke: KeMethod | None = None,
    ) -> None:
        reason = ""
        if child.ipcomp:
            reason = "it compresses (IPComp)"
        elif child.mode not in (Mode.TUNNEL, Mode.TRANSPORT):
            reason = f"its mode is {child.mode.name}"
        elif child.add_kes:
            reason = "it had additional key exchanges (RFC 9370)"
        elif child.protocol not in (Protocol.ESP, Protocol.AH):
            reason = f"its protocol is {child.protocol.name}"
        if reason:
            raise _not_covered(f"CHILD_SA {child.name} cannot be rekeyed from here: {reason}")
        self.child = child
        self._index = index
        self._asked_for = ke
        super().__init__(end, child.protocol, new_spi, fresh, child.ke if ke is None else ke)

    def _offered(self) -> Proposal:
        return child_offer(self.child, self._ke, self._new_spi)

    def _wanted(self) -> list[AnyPayload]:
        child = self.child
        transport = [NotifyPayload(Notify.USE_TRANSPORT_MODE)] if child.mode is Mode.TRANSPORT else []
        return [
            NotifyPayload(Notify.REKEY_SA, protocol=child.protocol, spi=child.spi_in),
            *transport,
            SaPayload((self._offered(),)),
            NoncePayload(self._nonce),
            *self._ke_payloads(),
            TsPayload(Payload.TSI, child.local_ts),
            TsPayload(Payload.TSR, child.remote_ts),
        ]

    def _otherwise(self) -> KeMethod | None:
        if self._asked_for is None and self.child.ke is KeMethod.NONE:
            return self.generation.ke
        return None

    def _made(self, message: IkeMessage) -> ChildRekeyed:
        child = self.child
        chosen = chosen_of(message, self._offered())
        nonce, secret = self._keys(message)
        if bool(message.notifies(Notify.USE_TRANSPORT_MODE)) != (child.mode is Mode.TRANSPORT):
            raise WireError("the answer is for another mode")
        new = replace(
            child,
            generation=self._index,
            initiator=True,
            spi_in=self._new_spi,
            spi_out=chosen.spi,
            nonce_i=self._nonce,
            nonce_r=nonce,
            ke=self._ke,
            secret=secret,
            add_secret=NO_SECRET,
            local_ts=narrowed(message, Payload.TSI, child.local_ts),
            remote_ts=narrowed(message, Payload.TSR, child.remote_ts),
            inbound=ReplayState(window=child.inbound.window, esn=child.esn),
            outbound=ReplayState(window=child.outbound.window, esn=child.esn),
            lifetime=Lifetime(),
        )
        return ChildRekeyed(new, deleted=False)

    def _old(self) -> DeletePayload:
        return DeletePayload(self.child.protocol, (self.child.spi_in,))

    def _useless(self) -> DeletePayload | None:
        return DeletePayload(self.child.protocol, (self._new_spi,))


class IkeRekey(_Rekey):
    """Rekeys the IKE_SA of `end`; this gateway is the new one's original initiator.

    new_spi: 8 octets, ours. The rest as for `ChildRekey`; ke None: the method the IKE_SA was made with.
    """

    def __init__(
        self,
        end: SaEnd,
        *,
        new_spi: bytes,
        fresh: bytes,
        ke: KeMethod | None = None,
    ) -> None:
        generation = end.generation
        if generation.add_kes:
            raise _not_covered("the IKE_SA had additional key exchanges (RFC 9370): its charon must rekey it")
        method = generation.ke if ke is None else ke
        if method is KeMethod.NONE:
            raise UsageError("an IKE_SA is not rekeyed without a key exchange")
        super().__init__(end, Protocol.IKE, new_spi, fresh, method)

    def _offered(self) -> Proposal:
        return ike_offer(self.generation, self._ke, self._new_spi)

    def _wanted(self) -> list[AnyPayload]:
        return [SaPayload((self._offered(),)), NoncePayload(self._nonce), *self._ke_payloads()]

    def _made(self, message: IkeMessage) -> IkeRekeyed:
        old = self.generation
        chosen = chosen_of(message, self._offered())
        nonce, secret = self._keys(message)
        new = replace(
            old,
            spi_i=self._new_spi,
            spi_r=chosen.spi,
            initiator=True,
            nonce_i=self._nonce,
            nonce_r=nonce,
            secret=secret,
            ke=self._ke,
            add_secret=NO_SECRET,
            old_skd=sk_d(old),
            old_prf=old.prf,
        )
        return IkeRekeyed(new, deleted=False)

    def _old(self) -> DeletePayload:
        return DeletePayload(Protocol.IKE)

    def _useless(self) -> DeletePayload | None:
        return None  # its SPI may be invalid


def _not_covered(message: str) -> RefusedError:
    return RefusedError(
        message, hint="let its peer rekey it first, or refuse collisions", status=Status.NOT_COVERED
    )
