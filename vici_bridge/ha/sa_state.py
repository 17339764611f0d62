"""One IKE_SA from the ha stream: a frozen state, and the effect of each message on it.

Pure functions below `record`, which keeps many of these.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from operator import attrgetter, is_

from ikectx.errors import IkectxError, WireError
from ikectx.numbers import Encr, Integ, KeMethod, Mode, Prf
from ikectx.sa.context import (
    NO_SECRET,
    Address,
    ChildContext,
    Endpoint,
    Identity,
    IkeGeneration,
    Secret,
    TrafficSelector,
)
from ikectx.sa.keys import sk_d
from ikectx.sa.name import SaName

from .ike_id import IkeId
from .messages import MARKER, Attr, HaMessage, child_add, ike_add, ike_mid, ike_update


@dataclass(frozen=True, slots=True)
class SaState:
    """One IKE_SA. `connection` None: not up. `replaces`: it has not adopted its children yet. `leaving`:
    deleted for a successor that is not up yet. `alien`: inbound SPIs of children without ESP (AH)."""

    version: int
    generations: tuple[IkeGeneration, ...]
    replaces: SaName | None = None
    leaving: bool = False
    connection: str | None = None
    local_id: Identity | None = None
    remote_id: Identity | None = None
    remote_eap_id: Identity | None = None
    local: Endpoint | None = None
    remote: Endpoint | None = None
    conditions: tuple[int, int] = (0, 0)
    extensions: tuple[int, int] = (0, 0)
    local_vips: tuple[Address, ...] = ()
    remote_vips: tuple[Address, ...] = ()
    peer_addresses: tuple[Endpoint, ...] = ()
    mid_initiator: int = 0
    mid_responder: int = 0
    children: tuple[ChildContext, ...] = ()
    alien: tuple[bytes, ...] = ()

    @property
    def current(self) -> IkeGeneration:
        return self.generations[-1]


_parts = attrgetter(*(part.name for part in fields(SaState) if not part.name.startswith("mid_")))


def read_generation(message: HaMessage) -> IkeGeneration:
    ike = message.need(Attr.IKE_ID, IkeId)
    old_skd, old_prf = message.find(Attr.OLD_SKD, Secret), message.get(Attr.ALG_OLD_PRF)
    return IkeGeneration(
        spi_i=ike.spi_i,
        spi_r=ike.spi_r,
        initiator=ike.initiator,
        nonce_i=message.need(Attr.NONCE_I, bytes),
        nonce_r=message.need(Attr.NONCE_R, bytes),
        secret=message.need(Attr.SECRET, Secret),
        prf=Prf(message.need(Attr.ALG_PRF, int)),
        encr=Encr(message.need(Attr.ALG_ENCR, int)),
        encr_bits=message.number(Attr.ALG_ENCR_LEN),
        integ=Integ(message.number(Attr.ALG_INTEG)),
        ke=KeMethod(message.number(Attr.ALG_KE)),
        add_secret=message.find(Attr.ADD_SECRET, Secret) or NO_SECRET,
        add_kes=message.find(Attr.ALG_ADD_KES, bytes) or b"",
        old_skd=old_skd if old_prf is not None else None,
        old_prf=Prf(message.number(Attr.ALG_OLD_PRF))
        if old_skd is not None and old_prf is not None
        else None,
    )


def further_keys(generation: IkeGeneration, message: HaMessage) -> IkeGeneration:
    """One more key exchange of the same IKE_SA (IKE_INTERMEDIATE, RFC 9370): the form of a rekey."""
    try:
        skd = sk_d(generation)
    except IkectxError as error:
        raise WireError(f"its keys cannot be derived: {error}") from None
    return replace(
        generation,
        nonce_i=message.need(Attr.NONCE_I, bytes),
        nonce_r=message.need(Attr.NONCE_R, bytes),
        secret=message.need(Attr.SECRET, Secret),
        add_secret=message.find(Attr.ADD_SECRET, Secret) or NO_SECRET,
        old_skd=skd,
        old_prf=generation.prf,
    )


def read_child(message: HaMessage, generation: int) -> ChildContext:
    return ChildContext(
        name=message.need(Attr.CONFIG_NAME, str),
        generation=generation,
        initiator=bool(message.need(Attr.INITIATOR, int)),
        spi_in=message.need(Attr.INBOUND_SPI, bytes),
        spi_out=message.need(Attr.OUTBOUND_SPI, bytes),
        nonce_i=message.need(Attr.NONCE_I, bytes),
        nonce_r=message.need(Attr.NONCE_R, bytes),
        encr=Encr(message.need(Attr.ALG_ENCR, int)),
        local_ts=message.every(Attr.LOCAL_TS, TrafficSelector),
        remote_ts=message.every(Attr.REMOTE_TS, TrafficSelector),
        encr_bits=message.number(Attr.ALG_ENCR_LEN),
        integ=Integ(message.number(Attr.ALG_INTEG)),
        ke=KeMethod(message.number(Attr.ALG_KE)),
        secret=message.find(Attr.SECRET, Secret) or NO_SECRET,
        add_secret=message.find(Attr.ADD_SECRET, Secret) or NO_SECRET,
        add_kes=message.find(Attr.ALG_ADD_KES, bytes) or b"",
        mode=Mode(message.number(Attr.IPSEC_MODE, Mode.TUNNEL)),
        esn=bool(message.number(Attr.ESN)),
        ipcomp=message.number(Attr.IPCOMP),
        cpi_in=message.number(Attr.INBOUND_CPI),
        cpi_out=message.number(Attr.OUTBOUND_CPI),
    )


def told(sa: SaState, message: HaMessage) -> SaState:
    """The state after an IKE_UPDATE: values that it does not have stay; a list that it has replaces the old
    one."""
    local_vips = message.every(Attr.LOCAL_VIP, Endpoint)
    remote_vips = message.every(Attr.REMOTE_VIP, Endpoint)
    return replace(
        sa,
        connection=message.find(Attr.CONFIG_NAME, str) or sa.connection,
        local_id=message.find(Attr.LOCAL_ID, Identity) or sa.local_id,
        remote_id=message.find(Attr.REMOTE_ID, Identity) or sa.remote_id,
        remote_eap_id=message.find(Attr.REMOTE_EAP_ID, Identity) or sa.remote_eap_id,
        local=message.find(Attr.LOCAL_ADDR, Endpoint) or sa.local,
        remote=message.find(Attr.REMOTE_ADDR, Endpoint) or sa.remote,
        conditions=_bits(sa.conditions, message, Attr.CONDITIONS),
        extensions=_bits(sa.extensions, message, Attr.EXTENSIONS),
        local_vips=tuple(vip.address for vip in local_vips) or sa.local_vips,
        remote_vips=tuple(vip.address for vip in remote_vips) or sa.remote_vips,
        peer_addresses=message.every(Attr.PEER_ADDR, Endpoint) or sa.peer_addresses,
    )


def _bits(known: tuple[int, int], message: HaMessage, attr: Attr) -> tuple[int, int]:
    """(public, private) bits; before wire version 5 there is no marker and nothing private."""
    public, private = known
    for value in message.every(attr, int):
        if message.version < 5:
            public, private = value, 0
        elif value & MARKER:
            private = value & ~MARKER
        else:
            public = value
    return public, private


def adopt(new: SaState, old: SaState) -> SaState:
    """The successor with everything that charon hands down to it: chain, children, virtual IPs, addresses,
    ids."""
    shift = len(old.generations)
    own = tuple(replace(child, generation=child.generation + shift) for child in new.children)
    return pruned(
        replace(
            new,
            generations=old.generations + new.generations,
            replaces=None,
            children=old.children + own,
            alien=old.alien + new.alien,
            remote_eap_id=new.remote_eap_id or old.remote_eap_id,
            local_vips=new.local_vips or old.local_vips,
            remote_vips=new.remote_vips or old.remote_vips,
            peer_addresses=new.peer_addresses or old.peer_addresses,
        )
    )


def pruned(sa: SaState) -> SaState:
    """The state without ancestors that no child's keys stem from: each later one has the SK_d that it
    needs."""
    last = len(sa.generations) - 1
    kept = sorted({child.generation for child in sa.children} | {last})
    if len(kept) == last + 1:
        return sa
    place = {old: new for new, old in enumerate(kept)}
    return replace(
        sa,
        generations=tuple(sa.generations[index] for index in kept),
        children=tuple(replace(child, generation=place[child.generation]) for child in sa.children),
    )


def only_ids_differ(one: SaState, other: SaState) -> bool:
    """Whether both have the same parts, but for message IDs; parts that are equal may count as others."""
    return all(map(is_, _parts(one), _parts(other)))


def messages_of(sa: SaState) -> list[HaMessage]:
    """The messages that would make this state, which is how it is stored; but for its message IDs."""
    messages: list[HaMessage] = []
    before: IkeId | None = None
    for index, generation in enumerate(sa.generations):
        ike = IkeId.of(generation)
        messages.append(ike_add(sa.version, generation, sa.remote, replaces=before))
        messages.append(
            ike_update(
                sa.version,
                ike,
                local_id=sa.local_id,
                remote_id=sa.remote_id,
                remote_eap_id=sa.remote_eap_id,
                local=sa.local,
                remote=sa.remote,
                conditions=sa.conditions,
                extensions=sa.extensions,
                name=sa.connection,
                peer_addresses=sa.peer_addresses,
                local_vips=sa.local_vips,
                remote_vips=sa.remote_vips,
            )
        )
        messages += [child_add(sa.version, ike, child) for child in sa.children if child.generation == index]
        before = ike
    return messages


def ids_of(sa: SaState) -> list[HaMessage]:
    """The messages with its message IDs. 0 says nothing."""
    ike, ids = IkeId.of(sa.current), ((True, sa.mid_initiator), (False, sa.mid_responder))
    return [ike_mid(sa.version, ike, initiator=ours, mid=mid) for ours, mid in ids if mid]
