"""The record of charon's ha stream: fed with what charons 5.9.8 and 6.0.6 really sent, and might send."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ikectx.errors import RefusedError, UnknownSaError
from ikectx.numbers import KeMethod, Prf, Status
from ikectx.sa.context import Secret
from ikectx.sa.keys import child_keys, sk_keys
from ikectx.sa.name import SaName
from tests.record_world import (
    G1,
    G2,
    G3,
    I1,
    I2,
    I3,
    MN,
    NSG,
    REAL,
    VIP,
    again,
    child,
    fed,
    first,
    stream,
    up,
    vector,
)
from vici_bridge.ha import messages as ha
from vici_bridge.ha import record as record_module
from vici_bridge.ha.chain import import_messages
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.messages import Attr, HaMessage, HaType
from vici_bridge.ha.record import (
    Added,
    ChildAdded,
    ChildDeleted,
    Deleted,
    Ignored,
    MidChanged,
    Record,
    Rekeyed,
    Rekeying,
    Updated,
    uncovered,
)

# --- what charon really sent --------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_real_datagrams_are_written_back(name: str) -> None:
    for kind, datagram in vector(name)["datagrams"]:
        message = HaMessage.parse(bytes.fromhex(datagram))
        assert message.type.name == kind
        assert message.serialize().hex() == datagram


def test_real_rekeys() -> None:
    """Peer and gateway rekey child and IKE_SA in turn; one child of the last but one IKE_SA is left."""
    record, seen = Record(), []
    for message in stream("5.9.8_rekeys"):
        change = record.feed(message)
        seen.append(type(change))
    assert seen[:5] == [Added, MidChanged, Updated, ChildAdded, Updated]
    assert seen.count(Rekeying) == seen.count(Rekeyed) == 2
    assert seen.count(ChildAdded) == 4
    assert seen.count(ChildDeleted) == 3
    (name,) = record.names()
    context = record.context(name)
    assert context.connection == "roam"
    assert (str(context.local_id), str(context.remote_id)) == ("gw.example", "mn.example")
    assert context.remote_vips == (VIP,)  # told once, long before, and inherited twice
    assert [generation.initiator for generation in context.generations] == [False, True]
    assert [one.generation for one in context.children] == [0]
    assert context.children[0].ke is KeMethod.CURVE_25519
    assert (context.mid_initiator, context.mid_responder) == (0, 0)


def test_real_keys() -> None:
    """The keys that follow from the record are those charon logged, for every generation and child."""
    keys = vector("5.9.8_rekeys")["keys"]
    ike, children = iter(keys["ike"]), iter(keys["children"])
    record = Record()
    for message in stream("5.9.8_rekeys"):
        change = record.feed(message)
        if isinstance(change, ChildAdded):
            context, wanted = record.context(change.sa), next(children)
            (added,) = (one for one in context.children if one.spi_in == change.spi_in)
            derived = child_keys(context.generations[added.generation], added)
            assert derived.encr_i.reveal().hex() == wanted["encr_i"]
            assert derived.encr_r.reveal().hex() == wanted["encr_r"]
        elif isinstance(change, Updated | Rekeyed):
            name = change.new if isinstance(change, Rekeyed) else change.sa
            if message.get(Attr.CONFIG_NAME) is None:
                continue
            sk, logged = sk_keys(record.context(name).current), next(ike)
            for part in ("sk_d", "sk_ei", "sk_er", "sk_pi", "sk_pr"):
                assert getattr(sk, part).reveal().hex() == logged[part]
    assert next(ike, None) is None
    assert next(children, None) is None


def test_real_rekeys_with_additional_key_exchanges() -> None:
    """RFC 9370, wire version 5: IKE_INTERMEDIATE makes a second IKE_ADD, rekeys have an ADD_SECRET.

    Every key derived from the record is the one that charon logged.
    """
    data, record = vector("6.0.6_rekeys"), Record()
    logged, seen = data["keys"], {"ike": 0, "children": 0}
    for message in stream("6.0.6_rekeys"):
        change = record.feed(message)
        assert message.version == 5
        if message.type is HaType.IKE_ADD:
            seen["ike"] += 1
        if isinstance(change, ChildAdded):
            context, wanted = record.context(change.sa), logged["children"][seen["children"]]
            seen["children"] += 1
            (added,) = (one for one in context.children if one.spi_in == change.spi_in)
            derived = child_keys(context.generations[added.generation], added)
            assert derived.encr_i.reveal().hex() == wanted["encr_i"]
            assert derived.encr_r.reveal().hex() == wanted["encr_r"]
        elif message.get(Attr.CONFIG_NAME) is not None:
            assert isinstance(change, Updated | Rekeyed)
            name = change.new if isinstance(change, Rekeyed) else change.sa
            sk = sk_keys(record.context(name).current)
            for part in ("sk_d", "sk_ei", "sk_er", "sk_pi", "sk_pr"):
                assert getattr(sk, part).reveal().hex() == logged["ike"][seen["ike"] - 1][part]
    assert seen == {"ike": 4, "children": 4}
    (name,) = record.names()
    context = record.context(name)
    assert [one.initiator for one in context.generations] == [False, True]
    assert [(one.ke, one.add_kes.hex()) for one in context.generations] == [
        (KeMethod.CURVE_25519, f"{KeMethod.ML_KEM_768:04x}")
    ] * 2
    assert [one.add_kes.hex() for one in context.children] == [f"{KeMethod.ML_KEM_512:04x}"]
    assert str(context.remote_eap_id) == "carol"
    assert not uncovered(context, 5)
    assert uncovered(context, 3) is Status.KEY_EXCHANGES
    moved = fed(*import_messages(replace(context, local=NSG), 5))
    assert moved.context(name) == replace(context, local=NSG)


def test_real_collisions() -> None:
    """Rekeys from both ends at once: the record's children are those charon listed at that moment."""
    data = vector("5.9.8_collisions")
    messages, record = stream("5.9.8_collisions"), Record()
    for message in messages[: data["listed_after"]]:
        record.feed(message)
    (name,) = record.names()
    context = record.context(name)
    assert [[one.spi_in.hex(), one.spi_out.hex()] for one in context.children] == data["listed"]
    assert {one.generation for one in context.children} == {0, 1, 2}
    for message in messages[data["listed_after"] :]:
        record.feed(message)
    assert len(record) == 0
    assert {value for _, value in record.dump()} == {None}


def test_real_resync() -> None:
    """The replay changes nothing that is known; an empty record learns the IKE_SA and a new child by it."""
    messages = stream("5.9.8_resync")
    replay = [message.type for message in messages].index(HaType.IKE_ADD, 7)
    record = fed(*messages[:replay])
    (name,) = record.names()
    before = record.context(name)
    assert isinstance(record.feed(messages[replay]), Ignored)
    record.feed(messages[replay + 1])
    assert record.context(name) == before
    end = [message.type for message in messages].index(HaType.CHILD_DELETE)
    for message in messages[replay + 2 : end + 1]:
        record.feed(message)
    after = record.context(name)
    assert [one.generation for one in after.children] == [0]
    assert len(after.generations) == 1
    late = fed(*messages[replay : end + 1])
    assert replace(late.context(name), remote_vips=(VIP,)) == after


def test_real_second_gateway() -> None:
    """What was imported is fed to the record; the stream of the importing charon goes on from there."""
    source = fed(*stream("5.9.8_rekeys"))
    context = replace(source.context(source.names()[0]), local=NSG)
    record = fed(*import_messages(context, 3))
    assert record.context(context.spis) == context
    for message in stream("5.9.8_taken"):
        record.feed(message)
    (name,) = record.names()
    assert name != context.spis
    moved = record.context(name)
    assert moved.children == context.children
    assert moved.generations[0] == context.generations[0]
    assert moved.current.old_skd == sk_keys(context.current).sk_d
    assert moved.remote_vips == context.remote_vips


# --- what it might send -------------------------------------------------------------------------


def test_life_of_an_sa() -> None:
    record = Record()
    name = I1.spis
    assert record.feed(ha.ike_add(5, G1, MN)) == Added(name)
    assert record.names() == ()
    with pytest.raises(UnknownSaError):
        record.context(name)
    assert record.feed(up(I1, conditions=(5, 6), extensions=(7, 8))) == Updated(name)
    assert record.names() == (name,)
    assert record.feed(ha.child_add(5, I1, child(1))) == ChildAdded(name, child(1).spi_in)
    assert record.feed(ha.ike_mid(5, I1, initiator=True, mid=4)) == MidChanged(name, True, 4)
    assert record.feed(ha.ike_mid(5, I1, initiator=False, mid=6)) == MidChanged(name, False, 6)
    context = record.context(name)
    assert (context.conditions, context.private_conditions) == (5, 6)
    assert (context.extensions, context.private_extensions) == (7, 8)
    assert (context.mid_initiator, context.mid_responder) == (4, 6)
    assert context.children == (child(1),)
    assert record.feed(ha.child_delete(5, I1, child(1).spi_in)) == ChildDeleted(name, child(1).spi_in)
    assert record.context(name).children == ()
    assert record.feed(ha.ike_delete(5, I1)) == Deleted(name)
    assert len(record) == 0


def test_what_is_dumped_after_one_message_is_what_a_new_record_would_dump() -> None:
    record, messages = Record(), [ha.ike_add(5, G1, MN), up(I1), ha.child_add(5, I1, child(1))]
    messages += [ha.ike_mid(5, I1, initiator=True, mid=mid) for mid in (4, 4, 5)]
    messages += [ha.child_delete(5, I1, child(1).spi_in), ha.ike_mid(5, I1, initiator=False, mid=6)]
    messages += [ha.ike_update(5, I1, local=MN, remote=MN), ha.ike_delete(5, I1)]
    messages += [ha.ike_add(5, G1, MN), up(I1), ha.ike_mid(5, I1, initiator=True, mid=5)]
    stored: dict[str, bytes | None] = {}
    for count, message in enumerate(messages, 1):
        record.feed(message)
        stored.update(record.dump())
        anew = Record()
        for each in messages[:count]:
            anew.feed(each)
        assert stored == dict(anew.dump())


def test_rekey_keeps_the_ancestor_as_long_as_a_child_needs_it() -> None:
    record = fed(*first())
    assert record.feed(ha.ike_add(5, G2, MN, replaces=I1)) == Rekeying(I1.spis, I2.spis)
    assert isinstance(record.feed(ha.ike_delete(5, I1)), Ignored)
    with pytest.raises(UnknownSaError):
        record.context(I1.spis)
    assert record.feed(up(I2)) == Rekeyed(I1.spis, I2.spis)
    assert record.context(I2.spis).generations == (G1, G2)
    record.feed(ha.child_add(5, I2, child(2)))
    assert [one.generation for one in record.context(I2.spis).children] == [0, 1]
    # a second rekey while children of both live, then the middle one is needed no more
    for message in (ha.ike_add(5, G3, MN, replaces=I2), ha.ike_delete(5, I2), up(I3)):
        record.feed(message)
    assert record.context(I3.spis).generations == (G1, G2, G3)
    record.feed(ha.child_delete(5, I3, child(2).spi_in))
    context = record.context(I3.spis)
    assert context.generations == (G1, G3)
    assert context.children == (child(1),)
    assert context.remote_vips == (VIP,)
    record.feed(ha.child_delete(5, I3, child(1).spi_in))
    assert record.context(I3.spis).generations == (G3,)


@pytest.mark.parametrize("winner", [0, 1])
def test_both_ends_rekey_at_once(winner: int) -> None:
    """Two IKE_ADDs for one old IKE_SA; the one called up has won, nothing of the other stays."""
    record = fed(*first(), ha.ike_add(5, G2, MN, replaces=I1), ha.ike_add(5, G3, MN, replaces=I1))
    record.feed(ha.ike_mid(5, (I3, I2)[winner], initiator=True, mid=1))  # the loser is deleted by an exchange
    record.feed(ha.ike_delete(5, I1))
    ike = (I2, I3)[winner]
    assert record.feed(up(ike)) == Rekeyed(I1.spis, ike.spis)
    assert record.names() == (ike.spis,)
    assert len(record) == 1


def test_rekey_that_fails_leaves_the_sa_and_its_name() -> None:
    record = fed(*first(), ha.ike_add(5, G2, MN, replaces=I1))
    assert record.names() == (I1.spis,)
    assert record.context(I1.spis).children == (child(1),)
    assert record.retain({I1.spis}) == ()
    assert len(record) == 2
    assert record.feed(ha.ike_delete(5, I2)) == Deleted(I2.spis)
    assert record.feed(ha.ike_delete(5, I1)) == Deleted(I1.spis)


def test_new_spis_without_a_new_key_exchange() -> None:
    """UPDATE_SPI through ha: IKE_REKEY_ID but no OLD_SKD. The children's keys stem from the old SPIs."""
    renamed = replace(G1, spi_i=b"x" * 8, spi_r=b"y" * 8)
    record = fed(*first(), ha.ike_add(5, renamed, MN, replaces=I1), up(IkeId.of(renamed)))
    context = record.context(IkeId.of(renamed).spis)
    assert context.generations == (G1, renamed)
    assert context.children[0].generation == 0
    assert fed(*import_messages(context, 5)).context(context.spis) == context


def test_children_added_before_the_rekeyed_sa_is_up() -> None:
    record = fed(*first(), ha.ike_add(5, G2, MN, replaces=I1), ha.child_add(5, I2, child(2)), up(I2))
    assert [one.generation for one in record.context(I2.spis).children] == [0, 1]


def test_same_spi_again_replaces_the_child() -> None:
    """CHILD_DELETE may be lost; a CHILD_SA is its inbound SPI."""
    changed = replace(child(1), spi_out=b"\x01\x02\x03\x04")
    record = fed(*first(), ha.child_add(5, I1, changed))
    assert record.context(I1.spis).children == (changed,)


def test_same_ike_spis_with_other_nonces_is_another_sa() -> None:
    record = fed(*first())
    assert record.feed(ha.ike_add(5, replace(G1, nonce_i=b"n" * 32), MN)) == Added(I1.spis)
    assert record.names() == ()


def test_what_strangers_begin_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """charon does not report the end of an IKE_SA that never was up."""
    monkeypatch.setattr(record_module, "MAX_COMING", 3)
    record = fed(*first())

    def begun(number: int) -> SaName:
        generation = replace(G2, spi_i=number.to_bytes(8), spi_r=number.to_bytes(8))
        record.feed(ha.ike_add(5, generation, MN))
        return SaName(generation.spi_i, generation.spi_r)

    names = [begun(number) for number in range(1, 11)]
    assert [name in record for name in names] == [False] * 7 + [True] * 3
    assert record.names() == (I1.spis,)
    record.feed(up(IkeId(*names[-1], I1.initiator)))
    for number in range(20, 30):
        begun(number)
    assert set(record.names()) == {I1.spis, names[-1]}, "those that are up stay"


def test_further_key_exchanges() -> None:
    """RFC 9370 in IKE_INTERMEDIATE: charon sends IKE_ADD again, without algorithms, before the SA is up."""
    again = HaMessage(
        5,
        HaType.IKE_ADD,
        (
            (Attr.IKE_VERSION, 2),
            (Attr.IKE_ID, I1),
            (Attr.NONCE_I, G1.nonce_i),
            (Attr.NONCE_R, G1.nonce_r),
            (Attr.SECRET, Secret(b"kem" * 8)),
            (Attr.REMOTE_ADDR, MN),
        ),
    )
    assert isinstance(Record().feed(again), Ignored)
    record = fed(ha.ike_add(5, G1, MN))
    assert record.feed(again) == Updated(I1.spis)
    record.feed(up(I1))
    known = record.context(I1.spis)
    assert known.generations == (
        replace(G1, secret=Secret(b"kem" * 8), old_skd=sk_keys(G1).sk_d, old_prf=G1.prf),
    )
    for message in (ha.ike_add(5, G1, MN), again):  # as RESYNC replays them
        assert isinstance(record.feed(message), Ignored)
    assert record.context(I1.spis) == known
    strange = fed(ha.ike_add(5, replace(G1, prf=Prf(99)), MN))
    assert isinstance(strange.feed(again), Ignored)


def test_children_without_esp_are_not_covered() -> None:
    whole = ha.child_add(5, I1, child(2))
    ah = replace(whole, attributes=tuple(one for one in whole.attributes if one[0] is not Attr.ALG_ENCR))
    record = fed(*first())
    assert record.feed(ah) == ChildAdded(I1.spis, child(2).spi_in)
    with pytest.raises(RefusedError) as error:
        record.context(I1.spis)
    assert error.value.status is Status.NOT_ESP
    assert again(record).names() == (I1.spis,)
    assert record.feed(ha.child_delete(5, I1, child(2).spi_in)) == ChildDeleted(I1.spis, child(2).spi_in)
    assert record.context(I1.spis).children == (child(1),)


def test_unknown_and_senseless_messages_are_ignored() -> None:
    record = Record()
    messages = [
        up(I1),
        ha.ike_mid(5, I1, initiator=True, mid=1),
        ha.ike_delete(5, I1),
        ha.child_add(5, I1, child(1)),
        ha.child_delete(5, I1, child(1).spi_in),
        ha.segment_take(5, 1),
        ha.segment_drop(5, 1),
        ha.resync(5, (1,)),
        HaMessage(5, HaType.STATUS),
        HaMessage(5, HaType(99)),
        HaMessage(5, HaType.IKE_ADD),
        HaMessage(5, HaType.IKE_ADD, ((Attr.IKE_ID, replace(I1, version=1)),)),
    ]
    for message in messages:
        assert isinstance(record.feed(message), Ignored)
    assert len(record) == 0
    assert record.dump() == []
    record = fed(ha.ike_add(5, G1, MN), up(I1))
    short = HaMessage(5, HaType.IKE_ADD, ((Attr.IKE_ID, I2), (Attr.ALG_PRF, 5), (Attr.NONCE_I, b"short")))
    for message in (
        short,
        HaMessage(5, HaType.CHILD_ADD, ((Attr.IKE_ID, I1),)),
        HaMessage(5, HaType.CHILD_DELETE, ((Attr.IKE_ID, I1),)),
        HaMessage(5, HaType.IKE_MID_INITIATOR, ((Attr.IKE_ID, I1),)),
        ha.ike_mid(5, I1, initiator=True, mid=0),
        ha.child_delete(5, I1, b"none"),
    ):
        assert isinstance(record.feed(message), Ignored)
    assert record.context(I1.spis).children == ()
