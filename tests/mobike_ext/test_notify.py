"""notify.py: the notifies of UPDATE_SPI, octet by octet."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st

from ikectx.errors import UsageError, WireError
from ikectx.numbers import Notify, Protocol
from ikectx.wire.payloads import NotifyPayload, parse_payloads, serialize_payloads
from mobike_ext.notify import Invitation, Reason, UpdateSpi, UpdateSpiRefused, UpdateSpiSupported
from tests.vector_text import read_vectors

IN, OUT, NEW = b"\xc1\0\0\1", b"\xc2\0\0\2", b"\xc9\x12\x34\x56"
GATEWAY, NODE = b"\x22GWr\0\0\0\1", b"\x11MNi\0\0\0\1"
ESP, AH, IKE = Protocol.ESP, Protocol.AH, Protocol.IKE

Any_ = UpdateSpiSupported | UpdateSpi | UpdateSpiRefused

EXPECTED: dict[str, Any_] = {
    "supported": UpdateSpiSupported(),
    "esp": UpdateSpi(ESP, IN, NEW),
    "esp-choose": UpdateSpi(ESP, OUT, choose=True),
    "esp-chosen": UpdateSpi(ESP, OUT, b"\xca\xfe\xba\xbe", choose=True),
    "ah": UpdateSpi(AH, b"\0\0\1\0", b"\xff\xff\xff\xff"),
    "ike": UpdateSpi(IKE, GATEWAY, bytes(7) + b"\2"),
    "ike-choose": UpdateSpi(IKE, NODE, choose=True),
    "refused-unknown": UpdateSpiRefused(ESP, IN, Reason.UNKNOWN_SA),
    "refused-unusable": UpdateSpiRefused(AH, b"\0\0\1\0", Reason.UNUSABLE),
    "refused-policy": UpdateSpiRefused(ESP, OUT, Reason.NOT_ALLOWED),
    "refused-busy": UpdateSpiRefused(IKE, GATEWAY, Reason.BUSY),
}
VECTORS = read_vectors("update_spi_notifies.txt")


def payload(octets: bytes) -> NotifyPayload:
    whole = bytes(2) + (len(octets) + 4).to_bytes(2) + octets
    (found,) = parse_payloads(NotifyPayload.type, whole)
    assert isinstance(found, NotifyPayload)
    return found


def parse(notify: NotifyPayload, name: str = "") -> Any_:
    if notify.notify == Notify.UPDATE_SPI:
        return UpdateSpi.parse(notify, answer=name == "esp-chosen")
    kind = UpdateSpiSupported if notify.notify == Notify.UPDATE_SPI_SUPPORTED else UpdateSpiRefused
    return kind.parse(notify)


def test_each_vector_is_expected() -> None:
    assert VECTORS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_vectors_there_and_back(name: str) -> None:
    assert parse(payload(VECTORS[name]), name) == EXPECTED[name]
    assert EXPECTED[name].serialize().serialize() == VECTORS[name]


def test_numbers() -> None:
    assert (Notify.UPDATE_SPI_SUPPORTED, Notify.UPDATE_SPI, Notify.UPDATE_SPI_REFUSED) == (
        41960,
        41961,
        41962,
    )
    assert not payload(VECTORS["refused-busy"]).is_error
    assert list(Reason) == [1, 2, 3, 4]


# --- what does not follow the format -------------------------------------------------------------------

ASK = UpdateSpi(ESP, IN, NEW).serialize()
CHOOSE = UpdateSpi(ESP, OUT, choose=True).serialize()
ASK_IKE = UpdateSpi(IKE, GATEWAY, b"newnames").serialize()
REFUSED = UpdateSpiRefused(ESP, IN, Reason.BUSY).serialize()


@pytest.mark.parametrize(
    ("notify", "changes"),
    [
        (ASK, {"protocol": Protocol.NONE}),
        (ASK, {"protocol": Protocol(4)}),
        (ASK, {"protocol": IKE}),
        (ASK, {"spi": b""}),
        (ASK, {"spi": b"\0\0\0\xff"}),  # 255 is reserved
        (ASK, {"spi": bytes(4)}),
        (ASK, {"spi": b"eightoct"}),
        (ASK, {"data": b""}),
        (ASK, {"data": b"\0\0\0"}),
        (ASK, {"data": bytes(4)}),  # no new SPI
        (ASK, {"data": bytes(4) + b"\0\0\0\xff"}),
        (ASK, {"data": bytes(4) + NEW[:3]}),
        (ASK, {"data": bytes(4) + NEW + b"\0"}),
        (ASK, {"data": bytes(4) + IN}),  # the old one
        (ASK, {"data": b"\2\0\0\0" + NEW}),
        (ASK, {"data": b"\x80\0\0\0" + NEW}),
        (ASK, {"data": b"\0\1\0\0" + NEW}),
        (ASK, {"data": b"\0\0\0\1" + NEW}),
        (CHOOSE, {"data": b"\1\0\0\0" + NEW}),
        (CHOOSE, {"data": b"\1\0\1\0"}),
        (ASK_IKE, {"spi": bytes(8)}),
        (ASK_IKE, {"spi": GATEWAY[:4]}),
        (ASK_IKE, {"data": bytes(4) + bytes(8)}),
        (ASK_IKE, {"data": bytes(4) + NEW}),
        (ASK, {"notify": Notify.COOKIE2}),
        (REFUSED, {"data": b""}),
        (REFUSED, {"data": b"\0"}),
        (REFUSED, {"data": b"\4\0"}),
        (REFUSED, {"spi": b"\0\0\0\1"}),
        (REFUSED, {"protocol": Protocol.NONE, "spi": b""}),
    ],
)
def test_what_does_not_parse(notify: NotifyPayload, changes: dict[str, object]) -> None:
    wrong = replace(notify, **changes)  # type: ignore[arg-type]
    kind = UpdateSpiRefused if notify is REFUSED else UpdateSpi
    with pytest.raises(WireError):
        kind.parse(wrong)


def test_flag_r_in_requests_and_answers() -> None:
    chosen = replace(CHOOSE, data=CHOOSE.data + NEW)
    assert UpdateSpi.parse(CHOOSE) == UpdateSpi(ESP, OUT, choose=True)
    assert UpdateSpi.parse(chosen, answer=True).new == NEW
    with pytest.raises(WireError):
        UpdateSpi.parse(chosen)
    with pytest.raises(WireError):
        UpdateSpi.parse(CHOOSE, answer=True)
    assert UpdateSpi.parse(ASK, answer=True) == UpdateSpi.parse(ASK)


def test_a_later_version_and_a_later_reason() -> None:
    one = UpdateSpiSupported().serialize()
    assert UpdateSpiSupported.parse(replace(one, data=b"\2and more")) == UpdateSpiSupported(2)
    assert UpdateSpiRefused.parse(replace(REFUSED, data=b"\x63")).reason == Reason(99)
    for wrong in (b"", b"\0", b"\1\0"):
        with pytest.raises(WireError):
            UpdateSpiSupported.parse(replace(one, data=wrong))
    with pytest.raises(WireError):
        UpdateSpiSupported.parse(replace(one, protocol=ESP, spi=IN))


@pytest.mark.parametrize(
    ("protocol", "old", "new", "choose"),
    [
        (ESP, IN, b"", False),
        (ESP, IN, IN, False),
        (ESP, IN, b"\0\0\0\1", False),
        (ESP, b"\0\0\0\1", NEW, False),
        (ESP, GATEWAY, NEW, False),
        (IKE, GATEWAY, bytes(8), False),
        (Protocol.NONE, IN, NEW, False),
        (ESP, b"", b"", True),
    ],
)
def test_what_cannot_be_asked(protocol: Protocol, old: bytes, new: bytes, choose: bool) -> None:
    with pytest.raises(UsageError):
        UpdateSpi(protocol, old, new, choose)


def test_what_cannot_be_refused() -> None:
    with pytest.raises(UsageError):
        UpdateSpiRefused(ESP, b"\0\0\0\1", Reason.BUSY)
    for reason in (0, 256):
        with pytest.raises(UsageError):
            UpdateSpiRefused(ESP, IN, Reason(reason))


@pytest.mark.parametrize("version", [0, 256])
def test_what_cannot_be_announced(version: int) -> None:
    with pytest.raises(UsageError):
        UpdateSpiSupported(version)


# --- foreign octets ------------------------------------------------------------------------------------

kinds = st.sampled_from([Notify.UPDATE_SPI_SUPPORTED, Notify.UPDATE_SPI, Notify.UPDATE_SPI_REFUSED])
protocols = st.sampled_from([*Protocol]) | st.integers(0, 255).map(Protocol)
spis = st.binary(max_size=9) | st.sampled_from([IN, OUT, GATEWAY])
data = st.binary(max_size=14) | st.binary(min_size=4, max_size=4).map(lambda new: bytes(4) + new)


def test_an_invitation() -> None:
    told = Invitation("nsg").serialize()
    assert (told.notify, told.protocol, told.spi, told.data) == (41963, Protocol.NONE, b"", b"\1nsg")
    assert Invitation.parse(payload(serialize_payloads([told])[1][4:])) == Invitation("nsg")
    for data in (b"", b"\1", b"\2nsg", b"\1\xff", b"\1" + bytes(256)):
        with pytest.raises(WireError):
            Invitation.parse(NotifyPayload(Notify.INVITATION, data))
    with pytest.raises(WireError):
        Invitation.parse(NotifyPayload(Notify.INVITATION, b"\1nsg", ESP, IN))
    for name in ("", "x" * 256):
        with pytest.raises(UsageError):
            Invitation(name)
