"""Whether there is a way for packets of SAs that are to leave; and which one that left is meant."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ikectx.errors import UnknownSaError, UsageError
from ikectx.sa.name import SaName
from ikectx_cli.agent import Agent
from ikectx_cli.config import ConnectionConfig
from ikectx_cli.detours import find, need_ways
from tests.vici_bridge.vici.test_views import VIEW
from vici_bridge.away.departures import Departure
from vici_bridge.kernel.xfrm_parts import Network
from vici_bridge.vici.views import sa_view

SA = sa_view("home", {**VIEW, "tasks-active": []})
ANNOUNCES = {"home": ConnectionConfig("home", announces=True)}


def no_way(prefixes: Collection[Network], to: str) -> Collection[Network]:
    return prefixes


def test_without_a_way_a_transfer_is_refused_before_it_begins() -> None:
    with pytest.raises(
        UsageError, match=r"no way from here to nsg .*10\.4\.0\.10/32.*nothing was moved"
    ) as caught:
        need_ways([SA], "nsg", no_way, {})
    assert caught.value.exit_code == 2
    for way_out in ("forward_via", "connections.home", "--no-detour"):
        assert way_out in caught.value.hint


def test_it_is_not_refused_where_packets_find_the_way() -> None:
    need_ways([SA], "nsg", lambda prefixes, to: set(), {})
    need_ways([SA], "nsg", no_way, ANNOUNCES)
    need_ways([], "nsg", no_way, {})


@pytest.mark.parametrize("theirs", [str(SA.remote.address) + "/32", "0.0.0.0/0", "10.0.0.1..10.0.0.9"])
def test_what_is_never_sent_on_asks_for_no_way(theirs: str) -> None:
    child = replace(SA.children[0], remote_ts=(theirs,))
    need_ways([replace(SA, children=(child,))], "nsg", no_way, {})


def test_ports_do_not_hide_an_address() -> None:
    child = replace(SA.children[0], remote_ts=("10.4.0.10/32[tcp/80]",))
    with pytest.raises(UsageError):
        need_ways([replace(SA, children=(child,))], "nsg", no_way, {})


def test_one_that_left_has_two_names() -> None:
    one = Departure(SaName(b"initiato", b"responde"), "mn@example.org", "nsg", "nsg", 1, 0.0)
    other = replace(one, sa=SaName(b"another.", b"responde"))
    assert find([one], "mn@example.org") == one.sa
    assert find([one, other], str(other.sa)) == other.sa
    with pytest.raises(UnknownSaError, match="2 SAs"):
        find([one, other], "mn@example.org")
    with pytest.raises(UnknownSaError, match="no SA"):
        find([], "mn@example.org")


def test_a_name_that_fits_several_ends_nothing() -> None:
    """The blocks went, and then the error came: packets could leave in the clear."""
    one = Departure(SaName(b"initiato", b"responde"), "mn@example.org", "nsg", "nsg", 1, 0.0)
    rows, ended = [one, replace(one, sa=SaName(b"another.", b"responde"))], list[str]()
    behind = SimpleNamespace(end=ended.append, listing=list)
    agent = SimpleNamespace(_host=SimpleNamespace(away=SimpleNamespace(behind=behind, listing=lambda: rows)))
    with pytest.raises(UnknownSaError, match="2 SAs"):
        asyncio.run(Agent.detours(cast(Any, agent), {"end": "mn@example.org", "unblock": "yes"}))
    assert not ended
