"""HA messages against datagrams put together by hand, and against bytes nobody meant."""

from __future__ import annotations

import logging
from ipaddress import ip_address
from pathlib import Path

import pytest

from ikectx.errors import WireError
from ikectx.numbers import Encr, IdType, Integ, KeMethod, Mode, Prf
from ikectx.sa.context import ChildContext, Endpoint, Identity, IkeGeneration, Secret, TrafficSelector
from vici_bridge.ha import messages as ha
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.messages import Attr, HaMessage, HaType
from vici_bridge.ha.version import wire_version

VECTORS = Path(__file__).parent.parent.parent / "vectors"


def handmade() -> dict[str, bytes]:
    """The messages of ha_handmade.txt by name."""
    found: dict[str, str] = {}
    name = ""
    for line in (VECTORS / "ha_handmade.txt").read_text().splitlines():
        if line.startswith("== "):
            name = line[3:].strip()
        elif name:
            found[name] = found.get(name, "") + line.split("#")[0]
    return {key: bytes.fromhex(value) for key, value in found.items()}


DATA = handmade()

OLD = IkeId(bytes.fromhex("a1a2a3a4a5a6a7a8"), bytes.fromhex("b1b2b3b4b5b6b7b8"), False)
NEW = IkeId(bytes.fromhex("c1c2c3c4c5c6c7c8"), bytes.fromhex("d1d2d3d4d5d6d7d8"), True)
MN4, GW4 = Endpoint.of("192.0.2.1", 4500), Endpoint.of("198.51.100.1", 4500)
MN6 = Endpoint.of("2001:db8::1", 500)
GW_ID = Identity(IdType.FQDN, b"gw.ex")

GENERATION = IkeGeneration(
    OLD.spi_i,
    OLD.spi_r,
    False,
    b"\x01" * 16,
    b"\x02" * 17,
    Secret(bytes.fromhex("deadbeef")),
    Prf.HMAC_SHA2_256,
    Encr.AES_CBC,
    128,
    Integ.HMAC_SHA2_256_128,
    KeMethod.CURVE_25519,
)


def rekeyed(ke: KeMethod, add_kes: bytes = b"", add_secret: bytes = b"") -> IkeGeneration:
    return IkeGeneration(
        NEW.spi_i,
        NEW.spi_r,
        True,
        b"\x03" * 16,
        b"\x04" * 16,
        Secret(bytes.fromhex("cafebabe")),
        Prf.HMAC_SHA2_512,
        Encr.AES_GCM_16,
        256,
        ke=ke,
        add_kes=add_kes,
        add_secret=Secret(add_secret),
        old_skd=Secret(bytes.fromhex("aabbcc")),
        old_prf=Prf.HMAC_SHA2_256,
    )


def selector(
    start: str, end: str, protocol: int = 0, ports: tuple[int, int] = (0, 65535), dynamic: bool = False
) -> TrafficSelector:
    return TrafficSelector(ip_address(start), ip_address(end), protocol, *ports, dynamic)


CHILD3 = ChildContext(
    "net",
    0,
    True,
    bytes.fromhex("12345678"),
    bytes.fromhex("9abcdef0"),
    b"\x05" * 16,
    b"\x06" * 16,
    Encr.AES_GCM_16,
    (selector("10.1.0.0", "10.1.255.255"), selector("2001:db8:0:1::", "2001:db8:0:1::ff", 6, (80, 81))),
    (selector("10.3.0.1", "10.3.0.1", dynamic=True),),
    128,
    ke=KeMethod.CURVE_25519,
    secret=Secret(b"\xbe\xef"),
    esn=True,
    ipcomp=2,
    cpi_in=0x1234,
    cpi_out=0x5678,
)
CHILD4 = ChildContext(
    "net",
    0,
    False,
    bytes.fromhex("12345678"),
    bytes.fromhex("9abcdef0"),
    b"\x05" * 16,
    b"\x06" * 16,
    Encr.AES_CBC,
    (selector("10.1.0.0", "10.1.255.255"),),
    (selector("10.3.0.1", "10.3.0.1"),),
    256,
    Integ.HMAC_SHA2_256_128,
    mode=Mode.TRANSPORT,
)

BUILT: dict[str, HaMessage] = {
    "v3_ike_add": ha.ike_add(3, GENERATION, MN4),
    "v3_ike_add_rekey": ha.ike_add(3, rekeyed(KeMethod.ECP_256), MN6, replaces=OLD),
    "v3_ike_update": ha.ike_update(
        3,
        OLD,
        local_id=GW_ID,
        remote_id=Identity(IdType.RFC822_ADDR, b"mn@e.x"),
        remote_eap_id=Identity(IdType.FQDN, b"alice"),
        local=GW4,
        remote=MN4,
        conditions=(5, 0),
        extensions=(0x13, 0),
        name="roam",
        peer_addresses=(Endpoint.of("192.0.2.2", 0), Endpoint.of("2001:db8::2", 0)),
    ),
    "v3_ike_update_vip": ha.ike_update(3, OLD, remote_vips=(ip_address("10.3.0.1"),)),
    "v3_mid_initiator": ha.ike_mid(3, OLD, initiator=True, mid=7),
    "v3_mid_responder": ha.ike_mid(3, OLD, initiator=False, mid=65538),
    "v3_ike_delete": ha.ike_delete(3, OLD),
    "v3_child_add": ha.child_add(3, OLD, CHILD3),
    "v3_child_delete": ha.child_delete(3, OLD, CHILD3.spi_in),
    "v3_segment_drop": ha.segment_drop(3, 1),
    "v3_segment_take": ha.segment_take(3, 0),
    "v3_status": HaMessage(3, HaType.STATUS, ((Attr.SEGMENT, 1), (Attr.SEGMENT, 3))),
    "v3_resync": ha.resync(3, (1, 2)),
    "v3_ike_iv": HaMessage(
        3,
        HaType.IKE_IV,
        ((Attr.IKE_ID, IkeId(OLD.spi_i, OLD.spi_r, True, 1)), (Attr.IV, bytes.fromhex("1122334455667788"))),
    ),
    "v4_ike_add": ha.ike_add(
        4, rekeyed(KeMethod.CURVE_25519, bytes.fromhex("00240025"), b"\xf0\x0d"), MN6, replaces=OLD
    ),
    "v4_child_add": ha.child_add(4, OLD, CHILD4),
    "v4_ike_update": ha.ike_update(4, OLD, conditions=(5, 1), extensions=(0x13, 0), name="roam"),
    "v5_ike_update": ha.ike_update(
        5,
        OLD,
        local_id=GW_ID,
        remote_id=Identity(IdType.KEY_ID, b"\x01\x02\x03"),
        local=GW4,
        remote=MN4,
        conditions=(0x4005, 1),
        extensions=(0x20013, 0),
        name="roam",
    ),
    "v5_mid_responder": ha.ike_mid(5, OLD, initiator=False, mid=7),
    "v5_child_delete": ha.child_delete(5, OLD, CHILD3.spi_in),
    "v5_segment_take": ha.segment_take(5, 1),
}


def test_every_vector_has_its_message() -> None:
    assert set(DATA) == set(BUILT)


@pytest.mark.parametrize("name", sorted(DATA))
def test_vector(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read, compared with what our constructors make, and written back."""
    monkeypatch.setattr("sys.byteorder", "little")
    message = HaMessage.parse(DATA[name])
    assert message == BUILT[name]
    assert message.serialize() == DATA[name]
    assert HaMessage.parse(BUILT[name].serialize()) == message


def test_spi_and_cpi_follow_the_hosts_byte_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.byteorder", "big")
    data = ha.child_add(3, OLD, CHILD3).serialize()
    assert bytes.fromhex("1b 12345678 1c 9abcdef0 1d 1234 1e 5678") in data
    message = HaMessage.parse(data)
    assert message.need(Attr.INBOUND_SPI, bytes) == CHILD3.spi_in
    assert message.number(Attr.OUTBOUND_CPI) == 0x5678


@pytest.mark.parametrize("name", sorted(DATA))
def test_cut_short(name: str) -> None:
    """Every shorter datagram is refused or ends between two attributes; nothing else is raised."""
    whole = HaMessage.parse(DATA[name])
    for end in range(len(DATA[name])):
        try:
            part = HaMessage.parse(DATA[name][:end])
        except WireError:
            continue
        assert part.attributes == whole.attributes[: len(part.attributes)]


@pytest.mark.parametrize("name", sorted(DATA))
def test_unknown_attribute_or_version(name: str) -> None:
    for number in (0, 44, 255):
        with pytest.raises(WireError):
            HaMessage.parse(DATA[name] + bytes([number]) + b"\0" * 8)
    for version in (0, 1, 2, 6, 255):
        with pytest.raises(WireError):
            HaMessage.parse(bytes([version]) + DATA[name][1:])


def test_tables_agree_with_each_other() -> None:
    assert ha.TABLES[4] is ha.TABLES[5]
    names = [[attr for attr, _ in table.values()] for table in (ha.TABLE_A, ha.TABLE_B)]
    assert list(ha.TABLE_A) == list(range(1, 42))
    assert list(ha.TABLE_B) == list(range(1, 44))
    assert [n for n in names[1] if n not in (Attr.ADD_SECRET, Attr.ALG_ADD_KES)] == names[0]
    assert set(names[1]) == set(Attr)
    assert {attr: body for attr, body in ha.TABLE_A.values()}.items() <= dict(ha.TABLE_B.values()).items()


def test_unknown_type_keeps_its_number() -> None:
    message = HaMessage.parse(bytes([5, 77, 36, 0, 1]))
    assert message.type == 77
    assert message.serialize() == bytes([5, 77, 36, 0, 1])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x03",
        bytes([3, 1, 1, 2]) + b"\0" * 16 + b"\x02",  # initiator is neither 0 nor 1
        bytes([3, 2, 6, 0, 0, 3, 1, 2, 3, 4]),  # address family 3
        bytes([3, 6, 31, 9, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 1, 2, 3, 4]),  # selector of type 9
        bytes([3, 6, 31, 7, 0, 0, 0, 0, 0, 7, 1, 2, 3, 4, 1, 2, 3, 4]),  # dynamic is neither 0 nor 1
        bytes([3, 2, 8]) + b"roam",  # no NUL
        bytes([3, 2, 8]) + b"\xff\xfe\0",  # not UTF-8
        bytes([3, 1, 17, 0xFF, 0xFF]) + b"\0" * 9,  # a secret longer than the datagram
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(WireError):
        HaMessage.parse(data)


def test_values_that_do_not_fit() -> None:
    with pytest.raises(WireError):
        ha.ike_update(3, OLD, local_id=Identity(IdType.KEY_ID, b"x" * 256)).serialize()
    with pytest.raises(WireError):
        ha.ike_update(3, OLD, name="a\0b").serialize()
    with pytest.raises(WireError):
        ha.ike_mid(3, OLD, initiator=True, mid=1 << 32).serialize()
    with pytest.raises(WireError):
        HaMessage(5, HaType.IKE_ADD, ((Attr.SECRET, Secret(b"x" * 2048)),)).serialize()
    with pytest.raises(WireError):
        ha.child_delete(5, OLD, b"123").serialize()


def test_what_is_sent_is_checked() -> None:
    with pytest.raises(ValueError, match="version"):
        HaMessage(6, HaType.STATUS).serialize()
    with pytest.raises(ValueError, match="ADD_SECRET"):
        HaMessage(3, HaType.IKE_ADD, ((Attr.ADD_SECRET, Secret(b"x")),)).serialize()
    with pytest.raises(ValueError, match="SECRET cannot be a bytes"):
        HaMessage(3, HaType.IKE_ADD, ((Attr.SECRET, b"x"),)).serialize()
    with pytest.raises(ValueError, match="8 octets"):
        IkeId(b"", b"", True)


def test_access() -> None:
    message = HaMessage.parse(DATA["v5_ike_update"])
    assert message.all(Attr.CONDITIONS) == (0x4005, 0x80000001)
    assert message.get(Attr.CONDITIONS) == 0x80000001
    assert message.get(Attr.MID) is None
    assert message.number(Attr.MID, 9) == 9
    assert message.every(Attr.PEER_ADDR, Endpoint) == ()
    assert message.need(Attr.IKE_ID, IkeId).spis == OLD.spis
    with pytest.raises(WireError, match="IKE_UPDATE has no REMOTE_VIP"):
        message.need(Attr.REMOTE_VIP, Endpoint)


def test_secrets_do_not_show(caplog: pytest.LogCaptureFixture) -> None:
    for name, secrets in (("v4_ike_add", ("cafebabe", "f00d", "aabbcc")), ("v3_child_add", ("beef",))):
        message = HaMessage.parse(DATA[name])
        logging.getLogger("test").warning("%s %r", message, message)
        for secret in secrets:
            raw = bytes.fromhex(secret)
            for shown in (secret, repr(raw)[2:-1]):
                assert shown not in caplog.text


@pytest.mark.parametrize(
    ("strongswan", "wire"),
    [
        ("5.9.8", 3),
        ("6.0.0", 3),
        ("6.0.1", 4),
        ("6.0.2", 5),
        ("6.0.6", 5),
        ("6.1", 5),
        ("6.0.2dr1", 5),
        ("6.0.1rc1", 4),
    ],
)
def test_wire_version(strongswan: str, wire: int) -> None:
    assert wire_version(strongswan) == wire
