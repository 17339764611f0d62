"""The note of a mobile node's move, and the guard policies that lead its packets meanwhile."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest

from ikectx.errors import StoreError, UsageError
from ikectx.sa.context import Endpoint, ReplayState
from tests.mobile_world import NEW, NSG, OLD, PSG, a_node_context
from vici_bridge.effects.mobile_move import ChildMove, MobileMove, guards_of, leads, plan_move
from vici_bridge.kernel.xfrm import (
    ALLOW,
    BLOCK,
    Encap,
    KernelPolicy,
    KernelSa,
    Mark,
    Selector,
    Template,
)


def test_a_note_comes_back_as_it_was() -> None:
    move = MobileMove(
        OLD,
        PSG,
        NEW,
        NSG,
        (
            ChildMove(b"abcd", b"efgh", b"ijkl", b"mnop", 7, 99, ReplayState(1 << 40, 64, 5, True)),
            ChildMove(b"1234", b"5678", b"1234", b"5678", 8),
        ),
        (NSG, Endpoint.of("2001:db8::2", 4500)),
        (b"\1\2", b""),
        (b"12345678", b"abcdefgh"),
        True,
    )
    assert MobileMove.loads(move.dumps()) == move
    for raw in (b"", b"{}", b"[]", move.dumps()[:-1], move.dumps().replace(b"ends", b"end")):
        with pytest.raises(StoreError):
            MobileMove.loads(raw)


def test_renames_must_be_of_this_sa() -> None:
    context = a_node_context()
    for wrong in ({b"none": b"1234"}, {b"\xc1\0\0\0": b"12345678"}, {b"12345678": b"87654321"}):
        with pytest.raises(UsageError):
            plan_move(context, [], NEW, NSG, wrong)


def test_guards_match_all_that_the_policy_does_and_go_before_it() -> None:
    selector = Selector.between(ip_network("10.4.0.10/32"), ip_network("10.3.0.0/24"))
    template = Template(OLD.address, PSG.address, reqid=3)
    for mark in (None, Mark(0x10, 0xFF), Mark(1 << 31, 1 << 31)):
        policy = KernelPolicy("out", selector, 371327, templates=(template,), mark=mark, index=9)
        value, mask = (mark.value, mark.mask) if mark is not None else (0, 0)
        for block in (False, True):
            pair = guards_of(policy, block=block)
            assert {guard.action for guard in pair} == {BLOCK if block else ALLOW}
            for guard in pair:
                assert guard.priority < policy.priority
                assert (guard.selector, guard.index) == (selector, 0)
                assert guard.templates == (() if block else (template,))
                assert KernelPolicy.parse(guard.raw).mark == guard.mark != mark
            for packet in (0, 0x10, 0xFFFFFFFF, 1 << 31, 1 << 30, 0x80000010):
                inside = packet & mask == value
                marks = [guard.mark for guard in pair if guard.mark is not None]
                assert sum(packet & one.mask == one.value for one in marks) == inside


@pytest.mark.parametrize("block", [False, True])
def test_a_policy_that_looks_at_all_bits_of_the_mark_has_a_guard_by_another_name(block: bool) -> None:
    """`mark_out = 42` does: it could not be guarded, and its SA was lost by each handover."""
    selector = Selector.between(ip_network("10.4.0.10/32"), ip_network("10.3.0.0/24"))
    policy = KernelPolicy("out", selector, 371327, mark=Mark(42, 0xFFFFFFFF), index=9)
    (guard,) = guards_of(policy, block=block)
    assert (guard.action, guard.mark, guard.index) == (BLOCK if block else ALLOW, policy.mark, 0)
    assert guard.priority < policy.priority
    assert guard.selector != selector == replace(guard.selector, user=0)
    assert KernelPolicy.parse(guard.raw).selector == guard.selector


def test_the_way_an_sa_leads() -> None:
    sa = KernelSa(OLD.address, PSG.address, b"abcd", encap=Encap(4500, 4500))
    assert leads(sa, OLD, PSG)
    assert not leads(None, OLD, PSG)
    assert not leads(sa, PSG, OLD)
    assert not leads(sa, OLD, replace(PSG, port=40000))
    assert leads(replace(sa, encap=None), OLD, replace(PSG, port=40000))
