"""The updown environment that the agent gives: each name as charon's own plugin gives it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from ikectx.numbers import IdType
from ikectx.sa.context import Identity, Tags, TrafficSelector
from tests.vici_bridge.vici.test_views import context, selector
from vici_bridge.vici.environment import ts_pairs, updown_environment
from vici_bridge.vici.views import COND_EAP_AUTHENTICATED


def test_the_updown_environment_is_charons() -> None:
    here = replace(context(), conditions=1 << 2)
    child = here.children[0]
    (pair,) = ts_pairs(child)
    env = updown_environment(here, child, pair, up=True, interface="eth0", reqid=7, unique_id=3)
    assert env["PLUTO_VERB"] == "up-client"
    assert env["PLUTO_MY_CLIENT"] == "10.3.0.0/24" and env["PLUTO_PEER_CLIENT"] == "10.4.0.10/32"
    assert env["PLUTO_PEER_SOURCEIP"] == env["PLUTO_PEER_SOURCEIP4_1"] == "10.4.0.10"
    assert env["PLUTO_UDP_ENC"] == "41000" and env["PLUTO_MY_PORT"] == "0"
    assert not {name for name in env if "MARK" in name or "IF_ID" in name or "ACCESS" in name}
    host = updown_environment(
        here, child, (selector("192.0.2.1"), pair[1]), up=False, interface="", reqid=7, unique_id=3
    )
    assert host["PLUTO_VERB"] == "down-host" and host["PLUTO_INTERFACE"] == "unknown"


def test_marks_if_ids_and_host_access_are_told() -> None:
    tagged = replace(context().children[0], tags=Tags((42, 0xFFFFFFFF), (7, 0xFF), 11, 12), ipcomp=2)
    (pair,) = ts_pairs(tagged)
    env = updown_environment(
        context(), tagged, pair, up=True, interface="eth0", reqid=7, unique_id=3, host_access=True
    )
    assert (env["PLUTO_MARK_IN"], env["PLUTO_MARK_OUT"]) == ("42/0xffffffff", "7/0x000000ff")
    assert (env["PLUTO_IF_ID_IN"], env["PLUTO_IF_ID_OUT"]) == ("11", "12")
    assert env["PLUTO_HOST_ACCESS"] == env["PLUTO_IPCOMP"] == "1"


def test_an_identity_is_told_after_eap_even_if_it_had_none_of_its_own() -> None:
    here = replace(context(), conditions=COND_EAP_AUTHENTICATED, remote_eap_id=None)
    child = here.children[0]
    (pair,) = ts_pairs(child)

    def told(user: Identity | None) -> str:
        sa = replace(here, remote_eap_id=user)
        env = updown_environment(sa, child, pair, up=True, interface="", reqid=1, unique_id=1)
        return env["PLUTO_XAUTH_ID"]

    assert told(None) == str(here.remote_id)
    assert told(Identity(IdType.FQDN, b"carol")) == "carol"


def ports(protocol: int, low: int, high: int) -> TrafficSelector:
    return TrafficSelector(ip_address("10.1.0.0"), ip_address("10.1.255.255"), protocol, low, high)


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (ports(1, 8 << 8, 8 << 8), ports(1, 8 << 8, 8 << 8), ("8", "0")),
        (ports(1, 0, 65535), ports(1, 0, 65535), ("0", "0")),
        (ports(0, 0, 65535), ports(1, 3 << 8 | 4, 3 << 8 | 4), ("3", "4")),
        (ports(58, 128 << 8, 129 << 8), ports(58, 0, 65535), ("128", "0")),
        (ports(6, 80, 80), ports(6, 1024, 2047), ("80", "1024:2047")),
        (ports(17, 0, 65535), ports(17, 65535, 0), ("0", "65535:0")),
    ],
)
def test_ports_of_icmp_are_type_and_code(
    mine: TrafficSelector, theirs: TrafficSelector, expected: tuple[str, str]
) -> None:
    child = replace(context().children[0], local_ts=(mine,), remote_ts=(theirs,))
    env = updown_environment(context(), child, (mine, theirs), up=True, interface="", reqid=1, unique_id=1)
    assert (env["PLUTO_MY_PORT"], env["PLUTO_PEER_PORT"]) == expected
