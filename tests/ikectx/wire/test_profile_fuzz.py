"""Profiles of any content, mutated ones and noise: exact round trips, and no error but WireError."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import cbor2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ikectx.errors import WireError
from ikectx.sa.context import FinalState, IkeContext
from ikectx.wire.cxtp import ContextDataBlock, Ctd, Pctd, parse_message
from ikectx.wire.profile import PROFILES, TransferHeader, decode, decode_final, encode, encode_final
from tests import strategies
from tests.profile_samples import RICH, TRANSFER, TYPICAL, TYPICAL_FINAL, UNKNOWN, rewrite

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(strategies.contexts(), strategies.transfers)
def test_any_context_round_trips(context: IkeContext, transfer: TransferHeader) -> None:
    sent = Pctd(context.remote.address, encode(context, transfer=transfer))
    got = parse_message(sent.serialize())
    assert isinstance(got, Pctd)
    assert decode(got.blocks) == (context, transfer)
    assert encode(context, transfer=transfer) == sent.blocks


@FUZZ
@given(strategies.finals, st.binary(min_size=8, max_size=8))
def test_any_final_state_round_trips(final: FinalState, transfer_id: bytes) -> None:
    sent = Ctd(ip_address("::1"), encode_final(final, transfer_id))
    got = parse_message(sent.serialize())
    assert isinstance(got, Ctd)
    assert decode_final(got.blocks) == (final, transfer_id)


VALID = (
    encode(TYPICAL, transfer=TRANSFER),
    encode(RICH, transfer=TRANSFER),
    encode(replace(RICH, unknown=UNKNOWN), transfer=TRANSFER),
    encode_final(TYPICAL_FINAL, TRANSFER.transfer_id),
)


items = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.integers(0, 1 << 64)
    | st.binary(max_size=40)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.integers(0, 25), inner, max_size=6),
    max_leaves=12,
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.builds(
            ContextDataBlock,
            st.sampled_from(PROFILES),
            st.binary(max_size=60) | items.map(lambda v: cbor2.dumps(v, canonical=True)),
        ),
        max_size=4,
        unique_by=lambda block: block.fpt,
    )
)
def test_noise_raises_only_wire_error(blocks: list[ContextDataBlock]) -> None:
    for read in (decode, decode_final):
        try:
            read(blocks)
        except WireError:
            continue


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.data())
def test_well_formed_nonsense_raises_only_wire_error(_: int, draw: st.DataObject) -> None:
    """A valid profile with one value of it replaced by another of some type."""
    fpt = draw.draw(st.sampled_from(PROFILES))

    def nonsense(profile: Any) -> None:
        value = profile
        while True:
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            if not keys:
                return
            key = draw.draw(st.sampled_from(keys))
            if isinstance(value[key], dict | list) and draw.draw(st.booleans()):
                value = value[key]
                continue
            value[key] = draw.draw(items)
            return

    try:
        context, transfer = decode(rewrite(RICH, fpt, nonsense))
    except WireError:
        return
    assert decode(encode(context, transfer=transfer)) == (context, transfer)
