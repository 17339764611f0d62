"""Hypothesis strategies for contexts: arbitrary, but such as the dataclasses and profiles allow."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from ikectx.numbers import Encr, Fpt, IdType, Integ, KeMethod, Mode, Prf, Protocol
from ikectx.sa.context import (
    Address,
    AuthRound,
    ChildContext,
    Endpoint,
    FinalChild,
    FinalState,
    Identity,
    IkeContext,
    IkeGeneration,
    Lifetime,
    PeerContext,
    PolicyContext,
    ReplayState,
    Secret,
    Tags,
    TrafficSelector,
)
from ikectx.wire import cbor
from ikectx.wire.profile import TransferHeader


def uints(bits: int) -> st.SearchStrategy[int]:
    """Unsigned numbers of at most `bits` bits."""
    return st.integers(0, (1 << bits) - 1)


def of(enum: Any, bits: int = 16) -> st.SearchStrategy[Any]:
    """Members of an open enum: mostly known ones."""
    return st.sampled_from(list(enum)) | uints(bits).map(enum)


def tuples(
    items: st.SearchStrategy[Any], least: int = 0, most: int = 3
) -> st.SearchStrategy[tuple[Any, ...]]:
    """Tuples of any length between the two."""
    return st.lists(items, min_size=least, max_size=most).map(tuple)


names = st.text(max_size=12)
secrets = st.binary(max_size=40).map(Secret)
nonces = st.binary(min_size=16, max_size=40)
addresses = st.ip_addresses(v=4) | st.ip_addresses(v=6)
ports = st.sampled_from([500, 4500]) | uints(16)
endpoints = st.builds(Endpoint, addresses, ports)
identities = st.builds(Identity, of(IdType, 8), st.binary(max_size=20))

tags = st.just(Tags()) | st.builds(
    Tags, st.tuples(uints(32), uints(32)), st.tuples(uints(32), uints(32)), uints(32), uints(32)
)
lifetimes = st.just(Lifetime()) | st.builds(
    Lifetime,
    *[st.none() | st.integers(-100, 1 << 40)] * 3,
    *[st.none() | uints(64)] * 2,
    *[uints(64)] * 2,
)


@st.composite
def selectors(draw: st.DrawFn) -> TrafficSelector:
    """Hosts, prefixes and ranges of both families, with and without protocol and ports."""
    start: Address = draw(addresses)
    size = 32 if start.version == 4 else 128
    end: Address
    match draw(st.sampled_from(["host", "prefix", "range"])):
        case "prefix":
            span = (1 << draw(st.integers(0, size))) - 1
            start = type(start)(int(start) & ~span)
            end = type(start)(int(start) | span)
        case "range":
            end = draw(st.ip_addresses(v=start.version))
        case _:
            end = start
    if draw(st.booleans()):
        return TrafficSelector(start, end)
    return TrafficSelector(start, end, draw(uints(8)), draw(uints(16)), draw(uints(16)), draw(st.booleans()))


@st.composite
def replay_states(draw: st.DrawFn) -> ReplayState:
    """Outbound counters, full windows, windows with holes, and nonsense that fits."""
    esn = draw(st.booleans())
    seq = draw(st.integers(0, 40) | uints(64 if esn else 32))
    window = draw(st.sampled_from([0, 1, 32, 64, 1024, 4096]))
    bitmap = (1 << min(seq, window)) - 1
    if window:
        bitmap ^= draw(st.just(0) | uints(min(window, 70)) | uints(window))
    return ReplayState(seq, window, bitmap, esn)


@st.composite
def generations(draw: st.DrawFn) -> IkeGeneration:
    """An IKE_SA, made by IKE_SA_INIT or by a rekey."""
    rekeyed = draw(st.booleans())
    return IkeGeneration(
        draw(st.binary(min_size=8, max_size=8)),
        draw(st.binary(min_size=8, max_size=8)),
        draw(st.booleans()),
        draw(nonces),
        draw(nonces),
        draw(secrets),
        draw(of(Prf)),
        draw(of(Encr)),
        draw(uints(16)),
        draw(of(Integ)),
        draw(of(KeMethod)),
        draw(st.just(Secret()) | secrets),
        draw(st.just(b"") | st.binary(max_size=7)),
        draw(secrets) if rekeyed else None,
        draw(of(Prf)) if rekeyed else None,
    )


@st.composite
def children(draw: st.DrawFn, chain: tuple[IkeGeneration, ...]) -> ChildContext:
    """A CHILD_SA of one of the generations, with its nonces or its own."""
    number = draw(st.integers(0, len(chain) - 1))
    first = draw(st.booleans())
    return ChildContext(
        name=draw(names),
        generation=number,
        initiator=draw(st.booleans()),
        spi_in=draw(st.binary(min_size=4, max_size=4)),
        spi_out=draw(st.binary(min_size=4, max_size=4)),
        nonce_i=chain[number].nonce_i if first else draw(nonces),
        nonce_r=chain[number].nonce_r if first else draw(nonces),
        encr=draw(of(Encr)),
        local_ts=draw(tuples(selectors(), least=1)),
        remote_ts=draw(tuples(selectors(), least=1)),
        encr_bits=draw(uints(16)),
        integ=draw(of(Integ)),
        ke=draw(of(KeMethod)),
        secret=draw(st.just(Secret()) | secrets),
        add_secret=draw(st.just(Secret()) | secrets),
        add_kes=draw(st.just(b"") | st.binary(max_size=7)),
        protocol=draw(of(Protocol, 8)),
        mode=draw(of(Mode, 8)),
        esn=draw(st.booleans()),
        ipcomp=draw(uints(16)),
        cpi_in=draw(uints(16)),
        cpi_out=draw(uints(16)),
        inbound=draw(replay_states()),
        outbound=draw(replay_states()),
        lifetime=draw(lifetimes),
        tags=draw(tags),
    )


rounds = st.builds(AuthRound, names, names, names, tuples(names))


@st.composite
def unknowns(draw: st.DrawFn, generation_count: int, child_count: int) -> tuple[tuple[int, int, bytes], ...]:
    """Entries of a later version, in the profiles and inside generations and children."""
    leaf = st.none() | st.booleans() | st.integers(-(1 << 64), (1 << 64) - 1) | st.binary(max_size=9) | names
    inner = leaf | st.lists(leaf, max_size=3) | st.dictionaries(uints(16), leaf, max_size=3)
    values = inner | st.lists(inner, max_size=3) | st.dictionaries(uints(16), inner, max_size=3)
    items = {Fpt.IKEV2_SA: generation_count, Fpt.SAD: child_count, Fpt.SPD: 0, Fpt.PAD: 0}
    found: dict[tuple[int, int], bytes] = {}
    for fpt, value in draw(st.lists(st.tuples(st.sampled_from(list(items)), values), max_size=3)):
        key = draw(st.integers(0, items[fpt])) << 16 | draw(st.integers(40, 0xFFFF))
        found[int(fpt), key] = cbor.dumps(value)
    return tuple((fpt, key, data) for (fpt, key), data in sorted(found.items()))


@st.composite
def contexts(draw: st.DrawFn) -> IkeContext:
    """Any context the profiles can carry."""
    outer = st.builds(Endpoint, st.ip_addresses(v=4 if draw(st.booleans()) else 6), ports)
    connection = draw(names)
    chain = draw(tuples(generations(), least=1))
    sas: tuple[ChildContext, ...] = draw(tuples(children(chain)))
    local_id, remote_id = draw(identities), draw(identities)
    policies: list[PolicyContext] = []
    for number, child in enumerate(sas):
        for _ in range(draw(st.integers(0, 4))):
            policies.append(
                PolicyContext(
                    number,
                    draw(st.sampled_from(["in", "out", "fwd"])),
                    draw(st.integers(0, len(child.local_ts) - 1)),
                    draw(st.integers(0, len(child.remote_ts) - 1)),
                    draw(st.sampled_from([0, 1, 399999]) | uints(32)),
                )
            )
    peer = draw(
        st.none()
        | st.builds(
            PeerContext,
            st.just(connection) | names,
            tuples(st.just(AuthRound("psk", str(local_id))) | rounds, most=2),
            tuples(st.just(AuthRound("psk", str(remote_id))) | rounds, most=2),
            st.just(tuple(dict.fromkeys(child.name for child in sas))) | tuples(names),
            tuples(names),
            tuples(names),
        )
    )
    return IkeContext(
        connection=connection,
        generations=chain,
        local_id=local_id,
        remote_id=remote_id,
        local=draw(outer),
        remote=draw(outer),
        children=sas,
        remote_eap_id=draw(st.none() | identities),
        local_vips=draw(tuples(addresses)),
        remote_vips=draw(tuples(addresses)),
        peer_addresses=draw(tuples(endpoints)),
        conditions=draw(uints(64)),
        extensions=draw(uints(64)),
        private_conditions=draw(uints(64)),
        private_extensions=draw(uints(64)),
        mid_initiator=draw(uints(32)),
        mid_responder=draw(uints(32)),
        lifetime=draw(lifetimes),
        policies=tuple(policies),
        peer=peer,
        epoch=draw(uints(64)),
        update_spi=draw(st.booleans()),
        unknown=draw(unknowns(len(chain), len(sas))),
    )


transfers = st.builds(
    TransferHeader,
    st.binary(min_size=8, max_size=8),
    st.sampled_from(["prepare", "check", "hold"]),
    st.sampled_from(["update", "keep", "mn"]),
)

finals = st.builds(
    FinalState,
    st.binary(min_size=8, max_size=8),
    st.binary(min_size=8, max_size=8),
    uints(32),
    uints(32),
    uints(64),
    st.lists(
        st.builds(FinalChild, st.binary(min_size=4, max_size=4), replay_states(), replay_states()),
        max_size=3,
        unique_by=lambda child: child.spi_in,
    ).map(tuple),
)
