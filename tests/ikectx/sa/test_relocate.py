"""Other outer addresses, and what of a context follows them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ikectx.sa.context import Endpoint, IkeContext, TrafficSelector
from ikectx.sa.relocate import relocate
from tests.peers import a_context

THERE = Endpoint.of("198.51.100.77", 4501)
HERE = Endpoint.of("203.0.113.9", 4500)


def host(end: Endpoint) -> TrafficSelector:
    return TrafficSelector(end.address, end.address)


@pytest.fixture
def transport() -> IkeContext:
    """Its first child has the outer addresses as selectors, and something else beside the MN's."""
    context = a_context()
    first, *others = context.children
    first = replace(
        first, local_ts=(host(context.local),), remote_ts=(host(context.remote), *first.remote_ts)
    )
    return replace(context, children=(first, *others))


def test_selectors_that_are_the_mns_address_move_along_with_it(transport: IkeContext) -> None:
    before = transport.children[0]
    moved = relocate(transport, remote=THERE)
    assert (moved.local, moved.remote) == (transport.local, THERE)
    assert moved.children[0].local_ts == before.local_ts
    assert moved.children[0].remote_ts == (host(THERE), *before.remote_ts[1:])
    assert moved.children[1:] == transport.children[1:]


def test_selectors_that_are_our_address_move_along_with_it(transport: IkeContext) -> None:
    before = transport.children[0]
    moved = relocate(transport, local=HERE)
    assert moved == replace(
        transport,
        local=HERE,
        children=(replace(before, local_ts=(host(HERE),)), *transport.children[1:]),
    )
    both = relocate(transport, local=HERE, remote=THERE)
    assert both == relocate(moved, remote=THERE)


def test_a_range_that_only_holds_the_address_stays() -> None:
    context = a_context()
    address = context.local.address
    wide = TrafficSelector(address, address + 1)
    context = replace(context, children=(replace(context.children[0], local_ts=(wide,)),))
    assert relocate(context, local=HERE).children == context.children


def test_an_mn_that_changed_the_family_leaves_our_address_open() -> None:
    before = a_context()
    for there in (THERE, Endpoint.of("2001:db8::77")):
        moved = relocate(before, remote=there)
        assert moved.remote == there and moved.children == before.children
        same = there.address.version == before.local.address.version
        assert (moved.local == before.local) == same
        assert same or int(moved.local.address) == 0
        assert moved.local.port == before.local.port


def test_both_ends_are_of_one_family() -> None:
    with pytest.raises(ValueError, match="families"):
        relocate(a_context(), local=Endpoint.of("2001:db8::1"), remote=THERE)
