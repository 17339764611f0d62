"""The MN's machine: every pair of its table, what counts as an answer, and when it is in doubt."""

from __future__ import annotations

import itertools
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import UsageError
from ikectx.node.mobility import (
    MOBILE_FINAL,
    MOBILE_TABLE,
    NO_ROUTE,
    Activated,
    GaveUp,
    Handover,
    HandoverCancelled,
    HandoverEvent,
    HandoverMode,
    HandoverPrepared,
    HandoverRefused,
    Limits,
    MobileInput,
    MobileState,
    Retry,
    Route,
    Router,
    Unprepared,
)
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Endpoint
from ikectx.wire.cxtp import ContextDataBlock, Ctaa, Ctar, StatusBlock
from ikectx.wire.tokens import Purpose, seal_ctaa, token_key, verify
from tests.peers import a_context

MN = ip_address("198.51.100.7")
PSG = Router("psg", ip_address("192.0.2.1"), Endpoint.of("192.0.2.1", 5091))
NSG = Router("nsg", ip_address("192.0.2.2"), Endpoint.of("192.0.2.2", 5091))
CARE_OF = Endpoint.of("203.0.113.7", 4500)
ELSEWHERE = Endpoint.of("192.0.2.66", 5091)
GENERATION = a_context().current
SEQUENCE = 0xCAFE0001
KEY = token_key(GENERATION, SEQUENCE)
UNIX = 1_790_000_000.0
BUSY = (StatusBlock(Fpt.IKEV2_SA, Status.BUSY),)
MLD_FAILED = (StatusBlock(Fpt.MLD, Status.FAILED),)

S, I = MobileState, MobileInput  # noqa: E741


ROUTE = Route(MN, PSG, NSG)


def handover(mode: HandoverMode = HandoverMode.AUTO, route: Route = ROUTE, **more: object) -> Handover:
    given: dict[str, object] = {"care_of": CARE_OF} if mode is HandoverMode.REACTIVE else {}
    given |= {"sequence": SEQUENCE, "unix": UNIX} | more
    return Handover(GENERATION, mode, route, **given)  # type: ignore[arg-type]


def answer(
    purpose: Purpose,
    statuses: tuple[StatusBlock, ...] = (),
    blocks: tuple[ContextDataBlock, ...] = (),
) -> bytes:
    return seal_ctaa(KEY, MN, SEQUENCE, statuses, blocks, purpose=purpose).serialize()


def events(machine: Handover) -> list[HandoverEvent]:
    return list(iter(machine.next_event, None))


def sent(machine: Handover, now: float) -> Ctar:
    ((octets, _),) = machine.to_send(now)
    return Ctar.parse(octets)


def in_state(state: MobileState, mode: HandoverMode = HandoverMode.AUTO) -> Handover:
    """A machine in that state, at time 0, with its events read."""
    machine = handover(mode)
    if state is S.CANCELLED:
        machine.cancel()
    elif state is not S.NEW:
        machine.to_send(0)
        steps = {
            S.PREPARED: [Purpose.ANNOUNCE],
            S.UNPREPARED: [Purpose.ANNOUNCE],
            S.ARRIVING: [],
            S.ANNOUNCING: [],
            S.ACTIVATED: [Purpose.ARRIVE],
            S.REFUSED: [Purpose.ARRIVE],
            S.SILENT: [],
        }[state]
        if state in (S.ARRIVING, S.ACTIVATED, S.REFUSED, S.SILENT):
            machine.moved(CARE_OF, 0)
            machine.to_send(0)
        for purpose in steps:
            failed = BUSY if state in (S.UNPREPARED, S.REFUSED) else ()
            source = PSG.cxtp if purpose is Purpose.ANNOUNCE else NSG.cxtp
            machine.receive(answer(purpose, failed), source, 0)
        if state is S.SILENT:
            machine.cancel()
    events(machine)
    assert machine.state is state
    return machine


# the table


def test_a_final_state_is_never_left() -> None:
    assert MOBILE_FINAL.isdisjoint(state for state, _ in MOBILE_TABLE)
    assert {state for state, _ in MOBILE_TABLE} | MOBILE_FINAL == set(S)


def test_only_an_accepted_arrival_activates() -> None:
    assert [pair for pair, new in MOBILE_TABLE.items() if new == (S.ACTIVATED,)] == [(S.ARRIVING, I.ACCEPT)]
    # what is left once the arrival is out is an end that is honest about it
    ends = {new for (state, _), (new,) in MOBILE_TABLE.items() if state is S.ARRIVING}
    assert ends == {S.ACTIVATED, S.REFUSED, S.SILENT}


def drive(machine: Handover, what: MobileInput) -> None:
    """Make `what` happen from outside."""
    purpose, router = (Purpose.ARRIVE, NSG) if machine.state is S.ARRIVING else (Purpose.ANNOUNCE, PSG)
    match what:
        case I.ANNOUNCE:
            machine.to_send(0)
        case I.MOVED:
            machine.moved(CARE_OF, 0)
        case I.ACCEPT:
            machine.receive(answer(purpose), router.cxtp, 0)
        case I.REJECT:
            machine.receive(answer(purpose, BUSY), router.cxtp, 0)
        case I.GIVE_UP | I.FALL_BACK:
            while (due := machine.next_timer()) is not None and machine.state is not S.UNPREPARED:
                machine.handle_timer(due)
                machine.to_send(due)
        case I.CANCEL:
            machine.cancel()


@pytest.mark.parametrize("mode", [HandoverMode.PREDICTIVE, HandoverMode.AUTO])
@pytest.mark.parametrize(("state", "what"), list(itertools.product(S, I)))
def test_every_pair(state: MobileState, what: MobileInput, mode: HandoverMode) -> None:
    falls_back = mode is HandoverMode.AUTO and state in (S.ANNOUNCING, S.PREPARED)
    if (state is S.UNPREPARED and mode is HandoverMode.PREDICTIVE) or (
        what is I.FALL_BACK and not falls_back
    ):
        return  # does not happen
    taken = what
    if falls_back and (what is I.GIVE_UP or (state, what) == (S.ANNOUNCING, I.REJECT)):
        taken = I.FALL_BACK
    machine = in_state(state, mode)
    drive(machine, what)
    (expected,) = MOBILE_TABLE.get((state, taken), (state,))
    assert machine.state is expected
    if expected in MOBILE_FINAL and state not in MOBILE_FINAL:
        assert len(events(machine)) == 1
    if state in MOBILE_FINAL:
        assert events(machine) == []
        assert machine.to_send(100) == []
        assert machine.next_timer() is None


# the ways through


def test_predictive() -> None:
    machine = handover(HandoverMode.PREDICTIVE)
    ((octets, to),) = machine.to_send(0)
    assert to == PSG.cxtp
    ctar = Ctar.parse(octets)
    assert (ctar.mn, ctar.router, ctar.sequence, ctar.acknowledge) == (MN, NSG.address, SEQUENCE, True)
    now = UNIX + 1
    token = verify(KEY, ctar, purpose=Purpose.ANNOUNCE, psg="psg", nsg="nsg", now=now, skew=0, rfc=False)
    assert token is not None
    assert (token.care_of, token.expiry, token.spis) == (None, int(UNIX) + 60, a_context().spis)
    machine.receive(answer(Purpose.ANNOUNCE), PSG.cxtp, 1)
    assert [type(e) for e in events(machine)] == [HandoverPrepared]
    assert machine.to_send(1) == []

    machine.moved(CARE_OF, 10)
    ((octets, to),) = machine.to_send(10)
    assert to == NSG.cxtp
    ctar = Ctar.parse(octets)
    assert (ctar.router, ctar.sequence) == (PSG.address, SEQUENCE)
    token = verify(KEY, ctar, purpose=Purpose.ARRIVE, psg="psg", nsg="nsg", now=now, skew=0, rfc=False)
    assert token is not None
    assert (token.care_of, token.expiry) == (CARE_OF, int(UNIX) + 70)
    new_spis = (ContextDataBlock(Fpt.NEW_SPIS, b"new"),)
    machine.receive(answer(Purpose.ARRIVE, blocks=new_spis), NSG.cxtp, 11)
    (event,) = events(machine)
    assert isinstance(event, Activated)
    assert event.ctaa.blocks[0].fpt == Fpt.NEW_SPIS
    outcome = machine.outcome
    assert (outcome.state, outcome.in_doubt, outcome.announced) == (S.ACTIVATED, False, True)
    assert (outcome.messages, outcome.retransmissions) == (4, 0)
    assert outcome.blocks[0].fpt == Fpt.NEW_SPIS
    assert "new gateway serves" in outcome.text


def test_reactive_without_knowing_its_own_address() -> None:
    machine = handover(HandoverMode.REACTIVE, care_of=None)
    ctar = sent(machine, 0)
    token = verify(KEY, ctar, purpose=Purpose.ARRIVE, psg="psg", nsg="nsg", now=UNIX, skew=0, rfc=False)
    assert token is not None
    assert token.care_of is None
    # a failure of a context that is not the SA's does not hold it
    machine.receive(answer(Purpose.ARRIVE, MLD_FAILED), NSG.cxtp, 1)
    assert machine.outcome.state is S.ACTIVATED
    assert machine.outcome.statuses == MLD_FAILED
    assert not machine.outcome.announced


@pytest.mark.parametrize("fpt", [Fpt.IKEV2_SA, Fpt.PAD, Fpt.REQUEST, Fpt(0xFF99)])
def test_any_failure_of_ours_is_a_refusal(fpt: Fpt) -> None:
    machine = in_state(S.ARRIVING)
    failed = (StatusBlock(fpt, Status.UNKNOWN_SA),)
    machine.receive(answer(Purpose.ARRIVE, (*MLD_FAILED, *failed)), NSG.cxtp, 1)
    assert events(machine) == [HandoverRefused(failed, authentic=True, in_doubt=False)]


def test_who_moves_before_the_answer_arrives_at_once() -> None:
    machine = handover(HandoverMode.PREDICTIVE)
    machine.to_send(0)
    machine.moved(CARE_OF, 1)
    assert sent(machine, 1).router == PSG.address
    # the late answer of pSG is not nSG's
    machine.receive(answer(Purpose.ANNOUNCE), PSG.cxtp, 2)
    assert machine.ignored == 1
    assert not machine.done
    machine.receive(answer(Purpose.ARRIVE), NSG.cxtp, 3)
    assert machine.state is S.ACTIVATED


@pytest.mark.parametrize("mode", [HandoverMode.PREDICTIVE, HandoverMode.AUTO])
def test_an_announcement_that_is_refused(mode: HandoverMode) -> None:
    machine = handover(mode)
    machine.to_send(0)
    machine.receive(answer(Purpose.ANNOUNCE, BUSY), PSG.cxtp, 1)
    if mode is HandoverMode.PREDICTIVE:
        assert events(machine) == [HandoverRefused(BUSY, authentic=True, in_doubt=False)]
        assert "refused: the old gateway" in machine.outcome.text
    else:
        assert events(machine) == [Unprepared(BUSY)]
        assert machine.next_timer() is None
        machine.moved(CARE_OF, 500)
        assert sent(machine, 500).sequence == SEQUENCE


@pytest.mark.parametrize("mode", [HandoverMode.PREDICTIVE, HandoverMode.AUTO])
def test_what_was_prepared_expires(mode: HandoverMode) -> None:
    machine = handover(mode, limits=Limits(hold=30.0))
    machine.to_send(0)
    machine.receive(answer(Purpose.ANNOUNCE), PSG.cxtp, 1)
    events(machine)
    assert machine.next_timer() == 31
    machine.handle_timer(30.9)
    assert machine.state is S.PREPARED
    machine.handle_timer(31)
    expected: HandoverEvent = Unprepared() if mode is HandoverMode.AUTO else GaveUp(1, in_doubt=False)
    assert events(machine) == [expected]
    assert not machine.outcome.in_doubt


def test_retransmissions_double_and_repeat_the_octets() -> None:
    machine = handover(HandoverMode.REACTIVE)
    ((first, _),) = machine.to_send(0)
    times, now = [0.0], 0.0
    while (due := machine.next_timer()) is not None:
        now = due
        machine.handle_timer(now)
        for octets, to in machine.to_send(now):
            assert (octets, to) == (first, NSG.cxtp)
            times.append(now)
    assert times == [0, 2, 6, 14, 29, 44]
    assert now == 45
    assert events(machine) == [GaveUp(6, in_doubt=True)]
    assert machine.outcome.retransmissions == 5
    assert machine.outcome.octets == 6 * len(first)
    assert "not known" in machine.outcome.text


def test_what_could_not_leave_is_sent_soon_and_is_no_try() -> None:
    machine = handover(HandoverMode.REACTIVE, limits=Limits(Retry(1.0, 4.0, 10.0)))
    first = sent(machine, 0)
    machine.not_sent(0)
    for at in (NO_ROUTE, 2 * NO_ROUTE):
        assert machine.next_timer() == pytest.approx(at)
        machine.handle_timer(at)
        assert sent(machine, at) == first
        machine.not_sent(at)
    machine.handle_timer(3 * NO_ROUTE)
    sent(machine, 3 * NO_ROUTE)
    seen = machine.outcome
    assert (seen.messages, seen.octets, seen.retransmissions) == (1, len(first.serialize()), 0)
    assert machine.next_timer() == pytest.approx(1.0 + 3 * NO_ROUTE)


def test_who_never_sent_is_in_no_doubt() -> None:
    machine, now = handover(HandoverMode.REACTIVE, limits=Limits(Retry(1.0, 4.0, 10.0))), 0.0
    while machine.state is S.ARRIVING or machine.state is S.NEW:
        if machine.to_send(now):
            machine.not_sent(now)
        due = machine.next_timer()
        assert due is not None and due <= 10.0
        now = max(now, due)
        machine.handle_timer(now)
    assert (machine.state, machine.outcome.in_doubt, now) == (S.SILENT, False, 10.0)


def test_an_announcement_without_answer_leaves_no_doubt() -> None:
    machine = handover(HandoverMode.PREDICTIVE, limits=Limits(Retry(1, 1, 3)))
    for now in range(4):
        machine.handle_timer(now)
        machine.to_send(now)
    assert events(machine) == [GaveUp(3, in_doubt=False)]
    assert "no answer: the old gateway" in machine.outcome.text


def test_cancel() -> None:
    machine = in_state(S.PREPARED)
    machine.cancel()
    assert events(machine) == [HandoverCancelled()]
    assert "old gateway" in machine.outcome.text
    machine = in_state(S.ARRIVING)
    machine.cancel()
    assert events(machine) == [GaveUp(1, in_doubt=True)]
    # nothing had left yet
    machine = handover(HandoverMode.AUTO)
    machine.moved(CARE_OF, 0)
    machine.cancel()
    assert events(machine) == [GaveUp(0, in_doubt=False)]


def test_a_move_while_arriving_changes_nothing() -> None:
    machine = in_state(S.ARRIVING)
    machine.moved(Endpoint.of("203.0.113.99"), 1)
    assert machine.to_send(1) == []
    assert machine.care_of == CARE_OF


# what counts


def plain(statuses: tuple[StatusBlock, ...] = BUSY) -> bytes:
    return Ctaa(MN, statuses).serialize()


def test_a_refusal_without_tag_counts_when_two_sendings_got_it() -> None:
    machine = in_state(S.ARRIVING)
    machine.receive(plain(), NSG.cxtp, 0.1)
    machine.receive(plain(), NSG.cxtp, 0.2)  # a duplicate: still the first sending's
    assert machine.state is S.ARRIVING
    machine.handle_timer(2)
    machine.to_send(2)
    machine.receive(plain(), ELSEWHERE, 2.1)
    machine.receive(Ctaa(ip_address("192.0.2.99"), BUSY).serialize(), NSG.cxtp, 2.2)
    assert machine.state is S.ARRIVING
    machine.receive(plain(), NSG.cxtp, 2.3)
    assert events(machine) == [HandoverRefused(BUSY, authentic=False, in_doubt=True)]
    assert "without proof: which gateway" in machine.outcome.text


def test_an_authentic_answer_wins_over_a_refusal_without_tag() -> None:
    machine = in_state(S.ARRIVING)
    machine.receive(plain(), NSG.cxtp, 0.1)
    machine.receive(answer(Purpose.ARRIVE), ELSEWHERE, 0.2)  # its tag says whose it is
    assert machine.state is S.ACTIVATED


def test_success_without_tag_never_counts() -> None:
    for octets in (plain(()), plain(MLD_FAILED), plain((StatusBlock(Fpt.IKEV2_SA),))):
        machine = in_state(S.ARRIVING)
        for now in (2, 6, 14):
            machine.receive(octets, NSG.cxtp, now)
            machine.handle_timer(now)
            machine.to_send(now)
            machine.receive(octets, NSG.cxtp, now)
        assert machine.state is S.ARRIVING


def test_a_refusal_with_a_wrong_tag_is_nothing() -> None:
    for wrong in (
        answer(Purpose.ANNOUNCE, BUSY),
        seal_ctaa(token_key(GENERATION, 1), MN, SEQUENCE, BUSY, purpose=Purpose.ARRIVE).serialize(),
        seal_ctaa(KEY, ip_address("192.0.2.99"), SEQUENCE, BUSY, purpose=Purpose.ARRIVE).serialize(),
    ):
        machine = in_state(S.ARRIVING)
        for now in (2, 6, 14):
            machine.receive(wrong, NSG.cxtp, now)
            machine.handle_timer(now)
            machine.to_send(now)
        assert machine.state is S.ARRIVING
        assert machine.ignored == 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=4), st.sampled_from(list(S)))
def test_noise_changes_nothing(datagrams: list[bytes], state: MobileState) -> None:
    machine = in_state(state)
    before = machine.outcome
    for octets in (*datagrams, answer(Purpose.ANNOUNCE)[:-1], sent(handover(), 0).serialize()):
        machine.receive(octets, NSG.cxtp, 0.5)
    assert machine.outcome == before
    assert machine.state is state
    assert events(machine) == []


# arguments


def test_gateways_of_another_family_are_named_by_the_token_alone() -> None:
    six = Router("nsg", ip_address("2001:db8::2"), Endpoint.of("2001:db8::2", 5091))
    machine = handover(HandoverMode.AUTO, Route(MN, PSG, six))
    ((octets, to),) = machine.to_send(0)
    assert Ctar.parse(octets).router == ip_address("0.0.0.0")
    assert to == PSG.cxtp
    machine.moved(Endpoint.of("2001:db8::7"), 1)
    ((octets, to),) = machine.to_send(1)
    assert (Ctar.parse(octets).mn, Ctar.parse(octets).router, to) == (MN, PSG.address, six.cxtp)
    six_mn = handover(HandoverMode.AUTO, Route(ip_address("2001:db8::7"), PSG, NSG))
    assert sent(six_mn, 0).router == ip_address("::")


def test_arguments_that_cannot_be_meant() -> None:
    for lifetime in (0, 301):
        with pytest.raises(UsageError):
            Limits(lifetime=lifetime)
    with pytest.raises(UsageError):
        Route(MN, PSG, replace(NSG, name="psg"))
    for retry in ((0, 1, 1), (2, 1, 1), (1, 1, 0)):
        with pytest.raises(UsageError):
            Retry(*retry)


def test_no_key_in_any_repr() -> None:
    machine = in_state(S.ARRIVING)
    for shown in (repr(vars(machine)), repr(machine.outcome)):
        assert KEY.reveal().hex() not in shown
        assert repr(KEY.reveal())[2:-1] not in shown


def a_question(cookie: bytes, mn: object = MN) -> bytes:
    return Ctaa(mn, (), (ContextDataBlock(Fpt.COOKIE, cookie),)).serialize()  # type: ignore[arg-type]


def test_a_cookie_is_sent_back_at_once_and_kept() -> None:
    machine = handover(HandoverMode.REACTIVE)
    first = sent(machine, 0.0)
    machine.receive(a_question(b"123456789abc"), NSG.cxtp, 0.1)
    again = sent(machine, 0.1)
    assert again == replace(first, blocks=(ContextDataBlock(Fpt.COOKIE, b"123456789abc"), *first.blocks))
    assert machine.next_timer() == 2.0  # as if nobody had asked
    machine.handle_timer(2.0)
    assert sent(machine, 2.0) == again
    machine.receive(a_question(b"cba987654321"), NSG.cxtp, 2.1)
    assert sent(machine, 2.1).blocks[1:] == first.blocks
    assert machine.next_timer() == 6.0
    machine.receive(answer(Purpose.ARRIVE), NSG.cxtp, 2.2)
    assert machine.outcome.state is S.ACTIVATED
    outcome = machine.outcome
    assert (outcome.messages, outcome.retransmissions) == (7, 1)


def test_questions_for_cookies_change_nothing_else() -> None:
    """Anybody on the way can ask, as often as they like."""
    machine = handover(HandoverMode.REACTIVE)
    first = sent(machine, 0.0)
    for octets, source in (
        (a_question(b"123456789abc"), ELSEWHERE),
        (a_question(b"123456789abc", MN + 1), NSG.cxtp),
        (a_question(bytes(100)), NSG.cxtp),
    ):
        machine.receive(octets, source, 0.1)
        assert machine.to_send(0.1) == []
    for number in range(10):
        machine.receive(a_question(bytes([number + 1]) * 12), NSG.cxtp, 0.2)
        assert len(machine.to_send(0.2)) == (number < 3)
    assert machine.next_timer() == 2.0
    machine.handle_timer(2.0)
    assert sent(machine, 2.0).blocks[1:] == first.blocks
    # a new CTAR begins without
    machine = handover(HandoverMode.PREDICTIVE)
    sent(machine, 0.0)
    machine.receive(a_question(b"123456789abc"), PSG.cxtp, 0.1)
    sent(machine, 0.1)
    machine.receive(answer(Purpose.ANNOUNCE), PSG.cxtp, 0.2)
    machine.moved(CARE_OF, 1.0)
    assert sent(machine, 1.0).blocks[0].fpt is not Fpt.COOKIE
