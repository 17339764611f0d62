"""Messages that make charon have an SA, and the record that reads them back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ikectx.errors import CharonError
from ikectx.numbers import Prf, Status
from ikectx.sa.context import Identity, Secret
from ikectx.sa.name import SaName
from tests.record_world import CONTEXT, G1, G2, G3, I1, I2, NSG, VIP, child
from vici_bridge.ha import messages as ha
from vici_bridge.ha.chain import import_messages, undo_messages
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.messages import Attr, HaMessage, HaType
from vici_bridge.ha.record import COND_PPK, Ignored, Record, mid_messages, uncovered


@pytest.mark.parametrize("version", [3, 4, 5])
def test_import_and_record_are_inverse(version: int) -> None:
    context = replace(CONTEXT, local=NSG)
    if version == 5:
        context = replace(context, private_conditions=2, private_extensions=4)
    messages = import_messages(context, version)
    assert {message.version for message in messages} == {version}
    record = Record()
    changes = [record.feed(HaMessage.parse(message.serialize())) for message in messages]
    assert not [change for change in changes if isinstance(change, Ignored)]
    assert record.names() == (context.spis,)
    assert record.context(context.spis) == context


def test_sas_are_found_by_their_other_end_without_looking_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record()
    shown: list[Identity] = []
    others = [replace(CONTEXT.remote_id, data=f"n{number}.example".encode()) for number in range(50)]
    for number, identity in enumerate([CONTEXT.remote_id, *others]):
        latest = replace(CONTEXT.current, spi_r=number.to_bytes(8))
        record.learn(replace(CONTEXT, generations=(latest,), children=(), remote_id=identity), 5)
    show = Identity.__str__
    monkeypatch.setattr(Identity, "__str__", lambda identity: shown.append(identity) or show(identity))  # type: ignore[func-returns-value]
    assert record.of("n7.example") == (SaName(CONTEXT.current.spi_i, (8).to_bytes(8)),)
    assert record.of("nobody.example") == () and shown == []


def test_import_order() -> None:
    messages = import_messages(CONTEXT, 5)
    ids = [(message.type.name, message.need(Attr.IKE_ID, IkeId)) for message in messages]
    assert ids == [
        ("IKE_ADD", I1.hidden()),
        ("IKE_UPDATE", I1.hidden()),
        ("CHILD_ADD", I1.hidden()),
        ("IKE_ADD", I2),
        ("IKE_UPDATE", I2),
        ("IKE_UPDATE", I2),
        ("IKE_MID_INITIATOR", I2),
        ("IKE_MID_RESPONDER", I2),
        ("CHILD_ADD", I2),
        ("CHILD_ADD", I2),
    ]
    # the oldest stands on its own SK_d and names nobody; the next one takes its children over
    assert messages[0].get(Attr.IKE_REKEY_ID) is None
    assert messages[3].get(Attr.IKE_REKEY_ID) == I1.hidden()
    assert messages[3].get(Attr.OLD_SKD) == G2.old_skd
    for message in messages:
        if message.type is HaType.IKE_UPDATE:
            assert message.attributes[0][0] is Attr.IKE_ID  # charon stops reading without
    assert all(message.get(Attr.CONFIG_NAME) is not None for message in (messages[1], messages[4]))
    # an ancestor that was itself rekeyed keeps its OLD_SKD but not its IKE_REKEY_ID
    chain = replace(CONTEXT, generations=(G2, G3), children=(child(1, 0),))
    oldest = import_messages(chain, 5)[0]
    assert oldest.get(Attr.IKE_REKEY_ID) is None
    assert oldest.get(Attr.OLD_SKD) == G2.old_skd
    assert oldest.get(Attr.ALG_OLD_PRF) == Prf.HMAC_SHA2_256


def test_message_ids_of_zero_are_left_out() -> None:
    fresh = replace(CONTEXT, mid_initiator=0, mid_responder=2)
    assert [m.type for m in mid_messages(fresh, 5)] == [HaType.IKE_MID_RESPONDER]
    (message,) = mid_messages(replace(CONTEXT, mid_initiator=7, mid_responder=0), 5)
    assert message == ha.ike_mid(5, I2, initiator=True, mid=7)


def test_undo() -> None:
    assert undo_messages(CONTEXT, 3) == [ha.ike_delete(3, I2), ha.ike_delete(3, I1.hidden())]


@pytest.mark.parametrize(
    ("change", "version"),
    [
        ({"conditions": COND_PPK}, 5),
        ({"local_vips": (VIP,)}, 5),
        ({"generations": (replace(G1, add_kes=b"\0\x24"),), "children": ()}, 3),
        ({"generations": (G1,), "children": (replace(child(1), add_secret=Secret(b"x")),)}, 3),
    ],
)
def test_not_covered(change: dict[str, Any], version: int) -> None:
    context = replace(CONTEXT, **change)
    assert uncovered(CONTEXT, version) is Status.OK
    reason = uncovered(context, version)
    assert reason is not Status.OK
    with pytest.raises(CharonError) as error:
        import_messages(context, version)
    assert error.value.status is reason
