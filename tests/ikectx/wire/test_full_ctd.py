"""A CTD with the whole context: merged, and told from one that only lets go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ikectx.errors import WireError
from ikectx.numbers import Fpt
from ikectx.sa.context import IkeContext
from ikectx.wire import cbor
from ikectx.wire.cxtp import ContextDataBlock, Ctd, parse_message
from ikectx.wire.full_ctd import decode_last, encode_whole, final_of, merge
from ikectx.wire.profile import encode_final
from tests.profile_samples import PROFILE_VECTORS, TRANSFER, TYPICAL, TYPICAL_FINAL

WHOLE = replace(TRANSFER, address="mn")


def test_a_whole_context_holds_the_last_counters_and_message_ids() -> None:
    blocks = encode_whole(TYPICAL, TYPICAL_FINAL, transfer=WHOLE)
    got = decode_last(parse_ctd(blocks).blocks)
    context, transfer = got
    assert isinstance(context, IkeContext)
    assert transfer == WHOLE
    assert final_of(context) == TYPICAL_FINAL
    assert context == merge(TYPICAL, TYPICAL_FINAL)
    assert replace(context, children=TYPICAL.children, mid_initiator=3, mid_responder=17) == TYPICAL
    assert blocks == tuple(PROFILE_VECTORS["whole"])


def test_a_ctd_that_lets_go_is_told_from_a_whole_one() -> None:
    blocks = encode_final(TYPICAL_FINAL, TRANSFER.transfer_id)
    assert decode_last(parse_ctd(blocks).blocks) == (TYPICAL_FINAL, TRANSFER.transfer_id)
    for neither in ((), (ContextDataBlock(Fpt.IKEV2_SA, cbor.dumps({0: 1, 1: bytes(9)})),)):
        with pytest.raises(WireError):
            decode_last(neither)


def test_a_final_state_of_another_sa_is_not_merged() -> None:
    for final in (replace(TYPICAL_FINAL, spi_i=bytes(8)), replace(TYPICAL_FINAL, children=())):
        with pytest.raises(WireError, match="not of this SA"):
            encode_whole(TYPICAL, final, transfer=WHOLE)


def parse_ctd(blocks: tuple[ContextDataBlock, ...]) -> Ctd:
    got = parse_message(Ctd(TYPICAL.remote.address, blocks).serialize())
    assert isinstance(got, Ctd)
    return got
