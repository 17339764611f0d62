"""What is kept of an SA that left: its stages, its form in the store, and what of it a new SA takes away."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ikectx.errors import StoreError
from ikectx.numbers import Mode
from ikectx.sa.context import Endpoint
from ikectx.sa.name import SaName
from tests.vici_bridge.vici.test_views import context, selector
from vici_bridge.away.departures import (
    ALLOW_PRIORITY,
    BLOCK_PRIORITY,
    OURS,
    SENT,
    STAGES,
    Departure,
    News,
    Stage,
    allow_of,
    bare_blocks,
    block_of,
    detourable,
)
from vici_bridge.kernel.nat_rule import NatRule
from vici_bridge.kernel.xfrm import ALLOW, BLOCK, KernelPolicy, Mark, Selector, Template

SERVER, NODE = ip_network("10.3.0.0/24"), ip_network("10.4.0.10/32")
PROTECTING = KernelPolicy(
    "out",
    Selector.between(SERVER, NODE),
    371327,
    templates=(Template(ip_address("192.0.2.1"), ip_address("198.51.100.7"), reqid=1),),
    mark=Mark(5, 0xFF),
    if_id=7,
    index=9,
    extra=((8, b"label"), (99, b"else")),
)
BLOCKING = block_of(PROTECTING)
DEPARTURE = Departure(
    SaName(b"initiato", b"responde"),
    "mn@example.org",
    "nsg",
    "nsg",
    1,
    1e9,
    prefixes=("10.4.0.10/32",),
    led=("10.4.0.10/32",),
    via=(ip_address("10.3.0.3"),),
    blocks=(BLOCKING,),
    allows=(allow_of(BLOCKING, 4),),
    relay=NatRule(
        Endpoint.of("198.51.100.7", 4511), Endpoint.of("192.0.2.1", 4500), 20000, ip_address("192.0.2.9")
    ),
)


def test_a_block_matches_what_the_policy_did_and_is_another_for_charon() -> None:
    assert BLOCKING.action == BLOCK
    assert BLOCKING.priority == BLOCK_PRIORITY > ALLOW_PRIORITY
    assert BLOCKING.templates == ()
    assert BLOCKING.selector == replace(PROTECTING.selector, user=OURS)
    assert (BLOCKING.mark, BLOCKING.if_id) == (PROTECTING.mark, PROTECTING.if_id)
    assert BLOCKING.extra == ((8, b"label"),), "only a security label says which packets it matches"
    allowing = allow_of(BLOCKING, 4)
    assert (allowing.action, allowing.priority) == (ALLOW, ALLOW_PRIORITY)
    assert allowing.selector == replace(BLOCKING.selector, ifindex=4, user=SENT), (
        "it takes no place of a block"
    )


@pytest.mark.parametrize(("mark", "if_id"), [(Mark(42, 0xFF), 0), (None, 42)])
def test_beside_a_device_that_marks_packets_they_are_dropped_as_well(mark: Mark | None, if_id: int) -> None:
    """The device (VTI, XFRM interface) may go with the SA; then they would leave by another."""
    everything = ip_network("0.0.0.0/0")
    policy = KernelPolicy("out", Selector.between(everything, everything), mark=mark, if_id=if_id)
    block = block_of(policy)
    vip = ip_network("10.4.0.10")
    here = replace(context(), remote_vips=(vip.network_address, ip_address("fd04::10")))
    (bare,) = bare_blocks(block, here, 7)
    assert (bare.mark, bare.if_id, bare.selector.ifindex, bare.action) == (None, 0, 7, BLOCK)
    assert (bare.source, bare.destination) == (everything, vip), "the rest is not the mobile node's alone"
    assert bare_blocks(block, here, 0) == [], "there is no device towards it"
    assert bare_blocks(block_of(replace(policy, mark=None, if_id=0)), here, 7) == []


def test_the_stages_are_complete() -> None:
    assert set(STAGES) == {(stage, news) for stage in Stage for news in News}
    for stage in Stage:
        now = replace(DEPARTURE, stage=stage)
        assert bool(now.sent_on) == (stage in (Stage.LEAVING, Stage.AWAY))
        coming = now.told(News.COMES)
        assert coming.stage is Stage.COMING
        for late in (News.READY, News.HERE, News.MOVED, News.STAYS):
            assert coming.told(late).sent_on == (), "the other gateway may send its packets here"
        assert now.told(News.ENDS).sent_on == ()
    assert replace(DEPARTURE, stage=Stage.HANDED).told(News.READY).sent_on
    waiting = replace(DEPARTURE, stage=Stage.COMING).told(News.STAYS)
    assert waiting.told(News.HERE).sent_on


def test_it_is_read_as_it_was_stored() -> None:
    assert Departure.loads(DEPARTURE.key, DEPARTURE.dumps()) == DEPARTURE
    shown = json.loads(json.dumps(DEPARTURE.to_json()))
    assert shown["prefixes"] == ["10.4.0.10/32"]
    assert shown["via"] == ["10.3.0.3"]
    assert shown["blocked"] == ["10.3.0.0/24 -> 10.4.0.10/32"]


def test_what_older_agents_stored_is_read() -> None:
    """They stored the prefixes alone: to whom the SA went nobody knows, so nobody's word can end it."""
    old = Departure.loads(DEPARTURE.key, b'["10.4.0.10/32", "fd04::10/128"]')
    assert old.sa == DEPARTURE.sa
    assert old.peer == ""
    assert old.sent_on == ("10.4.0.10/32", "fd04::10/128")


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"5", b"null", b'{"version": 2}', DEPARTURE.dumps().replace(b"away", b"afar")]
)
def test_what_makes_no_sense_is_an_error(raw: bytes) -> None:
    with pytest.raises(StoreError):
        Departure.loads(DEPARTURE.key, raw)


USED = [
    ("mn@example.org", "10.3.0.0/24", "10.4.0.10/32", True, True),
    ("mn@example.org", "0.0.0.0/0", "10.4.0.0/16", True, True),
    ("mn@example.org", "10.3.0.7/32", "10.4.0.10/32", True, False),
    ("mn@example.org", "10.3.0.0/24", "10.4.0.11/32", False, False),
    ("mn@example.org", "::/0", "::/0", False, False),
    ("other@example.org", "10.3.0.0/24", "10.4.0.10/32", True, True),
    ("other@example.org", "10.3.0.0/24", "10.4.0.0/16", False, False),
    ("other@example.org", "0.0.0.0/0", "0.0.0.0/0", False, False),
]


@pytest.mark.parametrize(("who", "ours", "theirs", "led", "opened"), USED)
def test_a_new_sa_takes_away_what_it_covers(
    who: str, ours: str, theirs: str, led: bool, opened: bool
) -> None:
    left = replace(DEPARTURE, relay=None).without(who, [([ip_network(ours)], [ip_network(theirs)])])
    assert (left.prefixes == ()) == led
    assert (left.blocks == ()) == opened
    assert left.empty == (led and opened)


def test_a_detour_never_takes_an_outer_address_that_others_share() -> None:
    here = context()
    host = replace(here.children[0], remote_ts=(selector("198.51.100.7"),))
    assert detourable(here) == ["10.4.0.10/32"]
    assert detourable(replace(here, children=(host,))) == ["198.51.100.7/32"]
    assert detourable(replace(here, children=(host,), conditions=1 << 2)) == []
    transport = replace(host, mode=Mode.TRANSPORT)
    assert detourable(replace(here, children=(transport,))) == []
