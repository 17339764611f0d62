"""Changes of SPIs, apart from the exchange: requests, decisions, answers, and the effect on keys.

There are two points of view. On the wire an UPDATE_SPI names the SPI as the *sender of the request* sees it
(`notify`). A `Renaming` is the view of this side: `inbound` is true if we receive on that SPI, whoever asked.

Requests of both ends may cross:
- One names an SPI as its own, the other asks the owner to choose (R): this is the same change, begun twice.
  The owner names the same new SPI in both exchanges, so both ends have the same SPIs whichever comes first.
- They change different ESP or AH SPIs: both are applied, because neither affects the other.
- Both ends change their own SPI of the IKE_SA: the new keys would need a pair of SPIs that neither knows yet.
  The IKE_SA's original initiator refuses as busy, the other one agrees, and may ask again under the new SPIs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol as Interface

from ikectx.errors import RefusedError, UsageError, WireError
from ikectx.numbers import Exchange, Notify, Protocol
from ikectx.sa.context import IkeContext, IkeGeneration
from ikectx.sa.keys import seal_key
from ikectx.wire.ikev2 import IkeHeader, IkeMessage, Reassembly
from ikectx.wire.payloads import NotifyPayload

from .notify import Reason, UpdateSpi, UpdateSpiRefused, UpdateSpiSupported, usable_spi

MOST = 16
"""UPDATE_SPI in one request."""


@dataclass(frozen=True, slots=True)
class Renaming:
    """One SPI and its new value. `inbound`: we receive on it; of an IKE_SA that is the SPI we chose."""

    protocol: Protocol
    inbound: bool
    old: bytes
    new: bytes


class Names(Interface):
    """This side's knowledge of SPIs. Answers at once, raises nothing."""

    def known(self, protocol: Protocol, spi: bytes, inbound: bool) -> bool:
        """Whether an SA of this IKE_SA (or itself) has that SPI; `inbound`: one that we receive on."""

    def usable(self, protocol: Protocol, old: bytes, new: bytes) -> bool:
        """Whether we can send to `new` instead of `old`: no other SA of ours to that address has it."""

    def reserve(self, protocol: Protocol, old: bytes) -> bytes | None:
        """A random new SPI to receive on, reserved from now on; the same one again for the same `old`."""

    def objection(self, protocol: Protocol, spi: bytes, inbound: bool) -> Reason | None:
        """NOT_ALLOWED by policy, BUSY with a rekey or another change of that SA, or nothing."""


def ask(protocol: Protocol, old: bytes, new: bytes) -> UpdateSpi:
    """Change an SPI on which we receive."""
    return UpdateSpi(protocol, old, new)


def ask_peer(protocol: Protocol, old: bytes) -> UpdateSpi:
    """Have the peer change an SPI on which it receives."""
    return UpdateSpi(protocol, old, choose=True)


def mirrored(pairs: Iterable[Renaming]) -> tuple[UpdateSpi, ...]:
    """The requests of the side that was asked for `pairs`, if its answer cannot contain them."""
    return tuple(
        ask(one.protocol, one.old, one.new) if one.inbound else ask_peer(one.protocol, one.old)
        for one in pairs
    )


# --- the side that is asked ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision about a request: all of `pairs`, or none, with a reason for each UPDATE_SPI."""

    asked: tuple[UpdateSpi, ...]
    pairs: tuple[Renaming, ...] = ()
    reasons: tuple[Reason, ...] = ()

    def refused(self, reason: Reason) -> Decision:
        """The same request, refused."""
        return Decision(self.asked, (), (reason,) * len(self.asked))

    def payloads(self) -> list[NotifyPayload]:
        """One notify for each UPDATE_SPI, in their order."""
        if self.reasons:
            zipped = zip(self.asked, self.reasons, strict=True)
            return [UpdateSpiRefused(one.protocol, one.old, reason).serialize() for one, reason in zipped]
        made = zip(self.asked, self.pairs, strict=True)
        return [replace(one, new=pair.new).serialize() for one, pair in made]


def asked_for(message: IkeMessage) -> tuple[UpdateSpi, ...]:
    """All UPDATE_SPI of a request. If one is malformed, the request counts as one without any.

    So a later version gets the answer of a peer that does not know the notify.
    """
    try:
        return tuple(UpdateSpi.parse(one) for one in message.notifies(Notify.UPDATE_SPI))
    except WireError:
        return ()


def decide(asked: tuple[UpdateSpi, ...], names: Names, *, most: int = MOST) -> Decision:
    """Decide about a request. SPIs are reserved only after all other checks have passed."""
    if len(asked) > most:
        return Decision(asked).refused(Reason.NOT_ALLOWED)
    reasons = [_objection(one, names) for one in asked]
    named = [(one.protocol, one.choose, one.old) for one in asked]
    offered = [(one.protocol, one.new) for one in asked if not one.choose]
    for at, one in enumerate(asked):
        if reasons[at] is None and named.count(named[at]) > 1:
            reasons[at] = Reason.NOT_ALLOWED
        if reasons[at] is None and not one.choose and offered.count((one.protocol, one.new)) > 1:
            reasons[at] = Reason.UNUSABLE
    pairs: list[Renaming] = []
    if not any(reasons):
        for at, one in enumerate(asked):
            new = names.reserve(one.protocol, one.old) if one.choose else one.new
            if new is None or new == one.old or not usable_spi(one.protocol, new):
                reasons[at] = Reason.UNUSABLE
                break
            pairs.append(Renaming(one.protocol, one.choose, one.old, new))
    first = next((reason for reason in reasons if reason is not None), None)
    if first is None:
        return Decision(asked, tuple(pairs))
    return Decision(asked, (), tuple(first if reason is None else reason for reason in reasons))


def _objection(one: UpdateSpi, names: Names) -> Reason | None:
    if not names.known(one.protocol, one.old, one.choose):
        return Reason.UNKNOWN_SA
    objection = names.objection(one.protocol, one.old, one.choose)
    if objection is None and not one.choose and not names.usable(one.protocol, one.old, one.new):
        return Reason.UNUSABLE
    return objection


# --- the side that asks --------------------------------------------------------------------------------


def answered(asked: Sequence[UpdateSpi], message: IkeMessage) -> Decision | None:
    """The answer to `asked`, as we see it; None: it has no such notify. WireError: it is malformed."""
    kinds = (Notify.UPDATE_SPI, Notify.UPDATE_SPI_REFUSED)
    found = [p for p in message.payloads if isinstance(p, NotifyPayload) and p.notify in kinds]
    if not found:
        return None
    if len(found) != len(asked):
        raise WireError(f"{len(found)} answers to {len(asked)} UPDATE_SPI")
    pairs: list[Renaming] = []
    reasons: list[Reason] = []
    for one, notify in zip(asked, found, strict=True):
        if notify.notify == Notify.UPDATE_SPI_REFUSED:
            refused = UpdateSpiRefused.parse(notify)
            same = (refused.protocol, refused.old) == (one.protocol, one.old)
            reasons.append(refused.reason)
        else:
            agreed = UpdateSpi.parse(notify, answer=True)
            same = (agreed.protocol, agreed.old, agreed.choose) == (one.protocol, one.old, one.choose)
            same = same and one.new in (b"", agreed.new)
            pairs.append(Renaming(one.protocol, not one.choose, one.old, agreed.new))
        if not same:
            raise WireError("the answer to another UPDATE_SPI")
    return Decision(tuple(asked), () if reasons else tuple(pairs), tuple(reasons))


def asks_for_names(generation: IkeGeneration, datagram: bytes) -> bool:
    """Whether an IKE datagram (no marker) is a whole request of the peer's with UPDATE_SPI in it."""
    try:
        if IkeHeader.parse(datagram).exchange != Exchange.INFORMATIONAL:
            return False
        incoming = Reassembly(seal_key(generation, by_initiator=not generation.initiator))
        message = incoming.add(datagram)
    except (WireError, RefusedError):
        return False
    return message is not None and not message.header.response and bool(message.notifies(Notify.UPDATE_SPI))


def supported_by(message: IkeMessage) -> int:
    """The version of N(UPDATE_SPI_SUPPORTED) in a message, 0 without one that can be read."""
    for notify in message.notifies(Notify.UPDATE_SPI_SUPPORTED):
        try:
            return UpdateSpiSupported.parse(notify).version
        except WireError:
            continue
    return 0


# --- what becomes of the SAs ---------------------------------------------------------------------------


def renamed_generation(
    generation: IkeGeneration, *, spi_i: bytes | None = None, spi_r: bytes | None = None
) -> IkeGeneration:
    """The IKE_SA under its new SPIs, None: the old one.

    Its SK_* (`keys.sk_keys`) come from the same SKEYSEED and nonces and the new SPIs, so they are new, too;
    both message IDs begin at 0. charon derives the same from an IKE_ADD with IKE_REKEY_ID, but no OLD_SKD.
    """
    new = replace(generation, spi_i=spi_i or generation.spi_i, spi_r=spi_r or generation.spi_r)
    if (new.spi_i, new.spi_r) == (generation.spi_i, generation.spi_r):
        raise UsageError("neither SPI of the IKE_SA changes")
    if not (usable_spi(Protocol.IKE, new.spi_i) and usable_spi(Protocol.IKE, new.spi_r)):
        raise UsageError("an IKE SPI is 0")
    return new


def renamed_ike(generation: IkeGeneration, pairs: Iterable[Renaming]) -> IkeGeneration | None:
    """The IKE_SA after `pairs`, None: they do not change it."""
    spis: dict[bool, bytes] = {}
    for one in pairs:
        if one.protocol is Protocol.IKE:
            of_initiator = one.inbound == generation.initiator
            if one.old != (generation.spi_i if of_initiator else generation.spi_r):
                raise UsageError("the IKE_SA has no such SPI")
            spis[of_initiator] = one.new
    return renamed_generation(generation, spi_i=spis.get(True), spi_r=spis.get(False)) if spis else None


def renamed_context(context: IkeContext, pairs: Sequence[Renaming]) -> IkeContext:
    """The context under its new SPIs.

    Only SPIs of children change. A changed IKE_SA is one more generation: children go on with the SK_d of the
    one that they name, and both message IDs are 0. Errors: UsageError for an SPI that the context does not
    have.
    """
    children = list(context.children)
    for one in pairs:
        if one.protocol is Protocol.IKE:
            continue
        for at, child in enumerate(context.children):
            named = child.spi_in if one.inbound else child.spi_out
            if (child.protocol, named) == (one.protocol, one.old):
                now = children[at]
                spi_in, spi_out = (one.new, now.spi_out) if one.inbound else (now.spi_in, one.new)
                children[at] = replace(now, spi_in=spi_in, spi_out=spi_out)
                break
        else:
            raise UsageError(f"no CHILD_SA has the SPI {one.old.hex()}")
    renamed = replace(context, children=tuple(children))
    generation = renamed_ike(context.current, pairs)
    if generation is None:
        return renamed
    return replace(renamed, generations=(*context.generations, generation), mid_initiator=0, mid_responder=0)
