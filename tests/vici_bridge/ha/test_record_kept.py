"""The record as it is kept: written and read again, without what charon no longer has, after any loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import StoreError
from tests.record_world import (
    CONTEXT,
    G1,
    G2,
    G3,
    I1,
    I2,
    I3,
    MN,
    REAL,
    VIP,
    again,
    child,
    fed,
    first,
    states,
    stream,
    up,
)
from vici_bridge.ha import messages as ha
from vici_bridge.ha.chain import import_messages
from vici_bridge.ha.messages import HaMessage
from vici_bridge.ha.record import Deleted, Record, RecordChange, Rekeyed

# --- at rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_dump_and_load_after_each_real_message(name: str) -> None:
    record = Record()
    for message in stream(name):
        record.feed(message)
        assert states(again(record)) == states(record)


def test_dump_and_load_in_the_middle_of_a_rekey() -> None:
    record = fed(*first(), ha.ike_add(5, G2, MN, replaces=I1), ha.ike_delete(5, I1))
    loaded = again(record)
    assert loaded.feed(up(I2)) == Rekeyed(I1.spis, I2.spis)
    assert loaded.context(I2.spis).children == (child(1),)


def test_a_great_many_children() -> None:
    """A peer decides how many there are; the record must come back all the same."""
    record = fed(*first())
    for number in range(1500):
        spi = (0xC0000000 + number).to_bytes(4)
        record.feed(ha.child_add(5, I1, replace(child(1), spi_in=spi)))
    assert states(again(record)) == states(record)


def test_dump_is_incremental() -> None:
    record = fed(*first(), ha.ike_add(5, G2, MN), up(I2))
    assert [key for key, value in record.dump() if value] == [I1.spis.key, I2.spis.key]
    assert record.dump() == []
    record.feed(ha.ike_mid(5, I2, initiator=True, mid=1))
    assert [key for key, _ in record.dump()] == [I2.spis.key]
    record.feed(ha.ike_delete(5, I2))
    assert record.dump() == [(I2.spis.key, None)]
    record.dirty.add(I1.spis)  # the store failed: once more
    assert [key for key, _ in record.dump()] == [I1.spis.key]
    loaded = again(record)
    assert loaded.dump() == []


def test_damaged_store() -> None:
    ((key, value),) = fed(*first()).dump()
    assert value is not None
    for data in (b"", b"\x00", value[:-1], value.replace(b"roam\0", b"roam\1"), b"\x86" + b"\x00" * 6):
        record = Record()
        with pytest.raises(StoreError) as error:
            record.load([(key, data)])
        assert G1.secret.reveal().hex() not in str(error.value)
        assert len(record) == 0
    with pytest.raises(StoreError, match="another IKE_SA"):
        Record().load([(I2.spis.key, value)])


# --- what charon no longer has ------------------------------------------------------------------


def test_retain() -> None:
    record = fed(*first(), ha.ike_add(5, G2, MN), up(I2))
    mark = record.mark()
    record.feed(ha.ike_add(5, G3, MN))  # came while charon was being asked
    assert record.retain({I2.spis}, mark) == (Deleted(I1.spis),)
    assert record.names() == (I2.spis,)
    assert I3.spis in record
    assert set(record.retain(())) == {Deleted(I2.spis), Deleted(I3.spis)}
    assert len(record) == 0


def test_retain_during_a_rekey() -> None:
    """charon does not list the new IKE_SA before it is up; the old one may be gone from the list by then."""
    messages = [*first(), ha.ike_add(5, G2, MN, replaces=I1)]
    record = fed(*messages)
    assert record.retain({I1.spis}) == ()
    assert I2.spis in record
    record = fed(*messages, ha.ike_delete(5, I1))
    assert record.retain({I2.spis}) == ()
    assert record.feed(up(I2)) == Rekeyed(I1.spis, I2.spis)
    assert record.context(I2.spis).children == (child(1),)
    record = fed(*messages)
    assert record.retain(()) == (Deleted(I1.spis),)
    assert len(record) == 0


def test_forget() -> None:
    record = fed(*first(), ha.ike_add(5, G2, MN, replaces=I1), ha.ike_add(5, G3, MN))
    record.forget(I1.spis)
    assert I1.spis not in record
    assert I2.spis not in record
    assert I3.spis in record
    record.forget(I1.spis)


# --- any order, any loss ------------------------------------------------------------------------

SOUP = [
    *first(),
    ha.ike_mid(5, I1, initiator=False, mid=2),
    ha.ike_add(5, G2, MN, replaces=I1),
    ha.ike_add(5, G3, MN, replaces=I1),
    ha.ike_add(5, G3, MN, replaces=I2),
    ha.ike_delete(5, I1),
    up(I2),
    up(I3),
    ha.child_add(5, I2, child(2)),
    ha.child_add(5, I3, child(3)),
    ha.child_delete(5, I2, child(1).spi_in),
    ha.child_delete(5, I3, child(2).spi_in),
    ha.ike_delete(5, I2),
    ha.ike_delete(5, I3),
    ha.ike_update(5, I3, remote_vips=(VIP,)),
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(SOUP), max_size=40))
def test_any_order(messages: list[HaMessage]) -> None:
    """Lost, repeated and disordered datagrams never raise, and what is known stays whole and storable."""
    record = Record()
    for message in messages:
        change: RecordChange = record.feed(message)
        assert repr(change)
        for name in record.names():
            context = record.context(name)
            assert context.spis == name
            needed = {one.generation for one in context.children} | {len(context.generations) - 1}
            assert needed == set(range(len(context.generations)))
    assert states(again(record)) == states(record)
    record.retain(())
    record.retain(())
    assert len(record) == 0
    assert record._heirs == {}


def test_secrets_do_not_show() -> None:
    record = fed(*first(), ha.ike_add(5, G2, MN, replaces=I1), up(I2))
    shown = repr(record.context(I2.spis)) + repr(record._sas) + repr(import_messages(CONTEXT, 5))
    for one in (G1, G2):
        for secret in (one.secret, one.old_skd):
            if secret is not None:
                assert repr(secret.reveal())[2:-1] not in shown
                assert secret.reveal().hex() not in shown
