"""charon's views to contexts: mapping, relocation, selectors, updown environment."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from ikectx.errors import WireError
from ikectx.numbers import Encr, IdType, Prf
from ikectx.sa.context import (
    NO_TAGS,
    ChildContext,
    Endpoint,
    Identity,
    IkeContext,
    IkeGeneration,
    Lifetime,
    Secret,
    Tags,
    TrafficSelector,
)
from vici_bridge.vici.views import (
    aged,
    child_lifetime,
    child_view,
    ike_lifetime,
    missing_algorithms,
    overlap,
    peer_context,
    prefixes,
    sa_view,
    sa_views,
)

# What charon 5.9.8 answered to list-sas for one IKE_SA, shortened; addresses are documentation's.
VIEW = {
    "name": "mn",
    "uniqueid": "3",
    "version": "2",
    "state": "ESTABLISHED",
    "local-host": "192.0.2.1",
    "local-port": "4500",
    "local-id": "psg.example",
    "remote-host": "198.51.100.7",
    "remote-port": "41000",
    "remote-id": "mn@example.org",
    "initiator-spi": "00c0ffee00c0ffee",
    "responder-spi": "1122334455667788",
    "nat-remote": "yes",
    "rekey-time": "13012",
    "established": "12",
    "tasks-passive": [],
    "tasks-active": ["IKE_DPD"],
    "remote-vips": ["10.4.0.10", "fd04::10"],
    "child-sas": {
        "net-1": {
            "name": "net",
            "uniqueid": "1",
            "reqid": "1",
            "state": "INSTALLED",
            "encap": "yes",
            "spi-in": "c1234567",
            "spi-out": "00000fed",
            "rekey-time": "3000",
            "life-time": "3900",
            "local-ts": ["10.3.0.0/24"],
            "remote-ts": ["10.4.0.10/32"],
        }
    },
}


def selector(text: str, protocol: int = 0, port: int | None = None) -> TrafficSelector:
    low, _, high = text.partition("-")
    return TrafficSelector(
        ip_address(low),
        ip_address(high or low),
        protocol,
        0 if port is None else port,
        65535 if port is None else port,
    )


def context() -> IkeContext:
    generation = IkeGeneration(
        bytes(range(8)),
        bytes(range(8, 16)),
        False,
        bytes(32),
        bytes(32),
        Secret(bytes(32)),
        Prf.HMAC_SHA2_256,
        Encr.AES_GCM_16,
        256,
    )
    child = ChildContext(
        name="net",
        generation=0,
        initiator=False,
        spi_in=b"\xc1\x23\x45\x67",
        spi_out=b"\x00\x00\x0f\xed",
        nonce_i=bytes(32),
        nonce_r=bytes(32),
        encr=Encr.AES_GCM_16,
        encr_bits=256,
        local_ts=(selector("10.3.0.0-10.3.0.255"),),
        remote_ts=(selector("10.4.0.10"),),
    )
    return IkeContext(
        connection="mn",
        generations=(generation,),
        local_id=Identity(IdType.FQDN, b"psg.example"),
        remote_id=Identity(IdType.RFC822_ADDR, b"mn@example.org"),
        local=Endpoint.of("192.0.2.1", 4500),
        remote=Endpoint.of("198.51.100.7", 41000),
        children=(child,),
        remote_vips=(ip_address("10.4.0.10"),),
    )


def test_a_view_of_list_sas_becomes_typed() -> None:
    (view,) = sa_views([VIEW, {**VIEW, "version": "1"}])
    assert view.spis == (bytes.fromhex("00c0ffee00c0ffee"), bytes.fromhex("1122334455667788"))
    assert view.remote == Endpoint.of("198.51.100.7", 41000)
    assert view.tasks == ("IKE_DPD",)
    assert view.rekey == 13012 and view.reauth is None
    assert view.children[0].spi_out == b"\x00\x00\x0f\xed" and view.children[0].encap


@pytest.mark.parametrize(
    ("key", "value"),
    [("uniqueid", "x"), ("local-host", "nowhere"), ("remote-port", "99999"), ("initiator-spi", "zz")],
)
def test_a_view_with_nonsense_is_a_wire_error(key: str, value: str) -> None:
    with pytest.raises(WireError):
        sa_view("mn", {**VIEW, key: value})


def test_an_sa_without_addresses_yet_is_listed_beside_the_others() -> None:
    # between IKE_ADD and IKE_UPDATE, and before a responder has answered (strongSwan 5.9.8)
    early = {**VIEW, "state": "CONNECTING", "local-host": "%any", "remote-host": "%any6", "child-sas": {}}
    view, other = sa_views([early, VIEW])
    assert (str(view.local.address), str(view.remote.address)) == ("0.0.0.0", "::")
    assert other.state == "ESTABLISHED"


def test_prefixes_of_a_range_and_without_duplicates() -> None:
    assert prefixes([selector("10.0.0.1-10.0.0.4"), selector("10.0.0.4"), selector("fd00::")]) == [
        "10.0.0.1/32",
        "10.0.0.2/31",
        "10.0.0.4/32",
        "fd00::/128",
    ]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("10.4.0.0/24", "10.4.0.10/32[tcp/80]", True),
        ("10.4.0.10/32", "10.4.0.11..10.4.0.20", False),
        ("0.0.0.0/0", "10.1.1.1/32", True),
        ("fd00::/8", "10.0.0.0/8", False),
    ],
)
def test_overlap(a: str, b: str, expected: bool) -> None:
    assert overlap([a], [b]) is expected


def test_marks_and_if_ids_are_read_as_charon_lists_them() -> None:
    child = {**VIEW["child-sas"]["net-1"]}  # type: ignore[index]
    assert child_view(child).tags == NO_TAGS
    listed = {**child, "mark-in": "0000002a", "mark-out": "00000142", "mark-mask-out": "00000fff"}
    assert child_view(listed).tags == Tags((42, 0xFFFFFFFF), (0x142, 0xFFF))
    assert child_view({**child, "if-id-in": "0000000b"}).tags == Tags(if_id_in=11)
    with pytest.raises(WireError):
        child_view({**child, "mark-in": "1ffffffff"})
    with pytest.raises(WireError):
        child_view({**child, "if-id-out": "x"})


def test_the_peer_entry_names_methods_as_people_do() -> None:
    peer = peer_context(
        "mn",
        {
            "local-1": {"class": "public key", "id": "psg.example"},
            "remote-1": {"class": "EAP", "eap-type": "EAP_MSCHAPV2", "id": "%any"},
            "children": {"net": {}},
        },
    )
    assert [auth.method for auth in peer.local_auth] == ["pubkey"]
    assert [auth.method for auth in peer.remote_auth] == ["eap-mschapv2"]
    assert peer.children == ("net",)


def test_missing_algorithms_compare_across_naming_habits() -> None:
    loaded = {"prf": {"PRF_HMAC_SHA2_256": "openssl"}, "aead": {"AES_GCM_16": "openssl"}, "integrity": {}}
    assert missing_algorithms(context(), loaded) == []
    assert missing_algorithms(context(), {"prf": {"PRF_HMAC_SHA1": "openssl"}}) == ["PRF_HMAC_SHA2_256"]
    assert missing_algorithms(context(), {}) == []


def test_as_time_goes_by_less_is_left() -> None:
    child = {**VIEW["child-sas"]["net-1"], "rekey-time": "60", "life-time": "90"}  # type: ignore[index]
    view = sa_view("mn", {**VIEW, "rekey-time": "100", "established": "5", "child-sas": {"net-1": child}})
    assert view.reauth is None
    later = aged(view, 20)
    assert (later.rekey, later.reauth, later.established) == (80, None, 25)
    assert [(one.rekey, one.life) for one in later.children] == [(40, 70)]
    assert aged(view, 0) == view


def test_what_is_overdue_has_nothing_left() -> None:
    """charon counts on below 0 while it cannot rekey; another gateway takes no such lifetime."""
    late = {**VIEW, "rekey-time": "-3", "reauth-time": "-1"}
    child = {**VIEW["child-sas"]["net-1"], "rekey-time": "-20", "life-time": "-2"}  # type: ignore[index]
    assert ike_lifetime(sa_view("mn", late)) == Lifetime(rekey=0, reauth=0)
    assert child_lifetime(child_view(child)) == Lifetime(rekey=0, hard=0)
    assert ike_lifetime(sa_view("mn", {**VIEW, "rekey-time": ""})) == Lifetime()
