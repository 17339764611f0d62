"""probe.py: the message ID that a mobile node expects, whether it answers any copy or equal octets only."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import UsageError
from ikectx.numbers import Exchange
from ikectx.sa.context import Endpoint
from ikectx.wire.ikev2 import IkeHeader, RetransmitPolicy, add_marker, seal_message, strip_marker
from mobike_ext.probe import TABLE, MidProbe, ProbeInput, ProbeState
from mobike_ext.requester import Silent
from tests.mobile_ike import MN, NSG, SA, Node

POLICY = RetransmitPolicy(initial=1, factor=2, tries=4)
M = 7


def probe(policy: RetransmitPolicy = POLICY) -> MidProbe:
    return MidProbe(SA, M, NSG, MN, ivs=(bytes(8), bytes([1] * 8)), policy=policy)


class Mobile(Node):
    """Answers its next request and copies of the last one; `strict`: copies are the same octets (charon)."""

    def __init__(self, expects: int, *, strict: bool) -> None:
        super().__init__()
        self.expects = expects
        self.strict = strict
        self.last = b"what the old gateway sent"

    def hears(self, datagram: bytes) -> bytes | None:
        message = self.read(datagram)
        assert message.header.exchange is Exchange.INFORMATIONAL
        assert not message.payloads
        mid = message.header.message_id
        if mid == self.expects:
            self.expects += 1
            self.last = datagram
        elif mid != self.expects - 1 or (self.strict and datagram != self.last):
            return None
        header = IkeHeader(SA.spi_i, SA.spi_r, Exchange.INFORMATIONAL, mid, not SA.initiator, response=True)
        sealed = seal_message(self.outbound, header, (), mid.to_bytes(8))
        return add_marker(sealed, MN, NSG)


def walk(machine: MidProbe, node: Mobile, lost: Callable[[], bool] = lambda: False) -> float:
    """Run it to its end; seconds."""
    now = 0.0
    while not machine.done:
        for datagram, to in machine.to_send(now):
            assert to == MN
            answer = None if lost() else node.hears(datagram)
            if answer is not None and not lost():
                machine.receive(answer, MN, now)
        timer = machine.next_timer()
        if machine.done or timer is None:
            break
        now = max(now, timer)
        machine.handle_timer(now)
    assert machine.to_send(now) == []
    return now


@pytest.mark.parametrize("strict", [False, True])
def test_the_mn_never_had_the_request(strict: bool) -> None:
    machine, node = probe(), Mobile(M, strict=strict)
    assert walk(machine, node) == 0
    assert (machine.state, machine.next_id, machine.sent) == (ProbeState.SETTLED, M + 1, 1)
    assert node.expects == M + 1


def test_the_mn_had_it_and_repeats_its_answer() -> None:
    machine, node = probe(), Mobile(M + 1, strict=False)
    walk(machine, node)
    assert machine.next_id == node.expects == M + 1


def test_the_mn_had_it_and_repeats_its_answer_for_the_same_octets_only() -> None:
    machine, node = probe(), Mobile(M + 1, strict=True)
    assert walk(machine, node) == 3
    assert machine.next_id == node.expects == M + 2
    assert machine.sent == 4  # m twice before m + 1 was, and once together with it
    # a crash, and the same again
    again = probe()
    walk(again, node)
    assert again.next_id == node.expects == M + 2


def test_silence() -> None:
    machine = probe()
    walk(machine, Mobile(M, strict=True), lambda: True)
    assert machine.state is ProbeState.SILENT
    assert machine.next_event() == Silent(8)
    assert machine.next_event() is None


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2), st.booleans(), st.lists(st.booleans(), max_size=40))
def test_what_it_finds_is_what_the_mn_expects(ahead: int, strict: bool, losses: list[bool]) -> None:
    machine, node = probe(RetransmitPolicy(initial=1, factor=1.5, tries=6)), Mobile(M + ahead, strict=strict)
    if ahead == 2:
        first = probe()  # one that crashed before this
        walk(first, Mobile(M, strict=True), lambda: True)
        node = Mobile(M + 1, strict=strict)
        for datagram in (machine._requests[1], machine._requests[0]):
            node.hears(datagram[0])
    queue = list(losses)
    walk(machine, node, lambda: bool(queue) and queue.pop(0))
    if machine.state is ProbeState.SETTLED:
        assert machine.next_id == node.expects
    else:
        assert any(losses)


def test_what_is_no_answer() -> None:
    machine, node = probe(), Mobile(M, strict=True)
    (datagram, _) = machine.to_send(0.0)[0]
    answer = node.hears(datagram)
    assert answer is not None
    for wrong, source in (
        (datagram, MN),
        (b"", MN),
        (answer[:-1] + bytes([answer[-1] ^ 1]), MN),
        (answer, Endpoint.of("198.51.100.8", 4500)),
    ):
        machine.receive(wrong, source, 0.0)
        assert machine.state is ProbeState.FIRST
    machine.receive(answer, MN, 0.0)
    machine.receive(answer, MN, 0.0)
    assert machine.next_id == M + 1
    assert machine.next_timer() is None
    machine.handle_timer(99.0)
    assert machine.state is ProbeState.SETTLED


def test_a_late_answer_to_the_first_request_does_not_take_the_second_one_back() -> None:
    machine, node = probe(), Mobile(M, strict=False)
    ((first, _),) = machine.to_send(0.0)
    late = node.hears(first)
    while machine.state is ProbeState.FIRST:
        machine.handle_timer(machine.next_timer() or 0.0)
    second = node.hears(machine.to_send(9.0)[-1][0])
    assert late is not None
    assert second is not None
    machine.receive(second, MN, 9.1)
    machine.receive(late, MN, 9.2)
    assert (machine.state, machine.next_id) == (ProbeState.SETTLED, M + 2)


@pytest.mark.parametrize(("state", "what"), list(product(ProbeState, ProbeInput)))
def test_every_cell_of_the_table(state: ProbeState, what: ProbeInput) -> None:
    expected = {
        (ProbeState.NEW, ProbeInput.START): ProbeState.FIRST,
        (ProbeState.FIRST, ProbeInput.LATER): ProbeState.BOTH,
        (ProbeState.FIRST, ProbeInput.ANSWER_FIRST): ProbeState.SETTLED,
        (ProbeState.BOTH, ProbeInput.ANSWER_FIRST): ProbeState.SECOND,
        (ProbeState.BOTH, ProbeInput.ANSWER_SECOND): ProbeState.SETTLED,
        (ProbeState.BOTH, ProbeInput.GIVE_UP): ProbeState.SILENT,
        (ProbeState.SECOND, ProbeInput.ANSWER_SECOND): ProbeState.SETTLED,
        (ProbeState.SECOND, ProbeInput.GIVE_UP): ProbeState.SILENT,
    }
    assert TABLE.get((state, what), (state,)) == (expected.get((state, what), state),)


def test_two_requests_do_not_share_an_iv() -> None:
    with pytest.raises(UsageError):
        MidProbe(SA, M, NSG, MN, ivs=(bytes(8), bytes(8)))
    with pytest.raises(UsageError):
        MidProbe(SA, M, NSG, MN, ivs=(bytes(8), bytes(7)))


def test_before_and_after_nothing_is_due() -> None:
    machine = probe()
    assert machine.next_timer() is None
    machine.handle_timer(50.0)
    assert machine.state is ProbeState.NEW
    assert strip_marker(machine.to_send(0.0)[0][0], NSG, MN)[:8] == SA.spi_i
