"""answering.py: requests for other names, fresh ones and all others."""

from __future__ import annotations

import secrets
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import StateError
from ikectx.numbers import Exchange, Notify, Payload, Protocol
from ikectx.sa.context import Endpoint
from ikectx.sa.keys import seal_key
from ikectx.wire.ikev2 import (
    IkeHeader,
    IkeMessage,
    add_marker,
    nat_detection_hash,
    open_message,
    seal_fragments,
)
from ikectx.wire.ikev2 import strip_marker as strip
from ikectx.wire.payloads import AnyPayload, DeletePayload, NotifyPayload, RawPayload
from mobike_ext.address_update import Condition
from mobike_ext.naming import MOST, Renaming, ask, ask_peer
from mobike_ext.notify import Invitation, Reason, UpdateSpi, UpdateSpiRefused, UpdateSpiSupported
from mobike_ext.responder import (
    TABLE,
    Action,
    Asked,
    PeerSupports,
    ResponderInput,
    ResponderRole,
    ResponderState,
    SpiResponder,
)
from tests.air import Names
from tests.mobile_ike import COOKIE, MN, NSG, SA

ESP, IKE = Protocol.ESP, Protocol.IKE
THEIRS, OURS, NEW = b"\xc1\0\0\1", b"\xc2\0\0\2", b"\xc9\0\0\1"
NODE_SA = replace(SA, initiator=True)
"""The IKE_SA as the mobile node has it, which is asked here."""
TO_NODE = seal_key(SA, by_initiator=False)
FROM_NODE = seal_key(SA, by_initiator=True)
IV = bytes(range(256))


def names(**changes: object) -> Names:
    sas = {(ESP, False, THEIRS), (ESP, True, OURS), (IKE, False, SA.spi_r), (IKE, True, SA.spi_i)}
    return Names(sas, **changes)  # type: ignore[arg-type]


def responder(world: Names | None = None, **options: object) -> SpiResponder:
    return SpiResponder(NODE_SA, 7, MN, world or names(), **options)  # type: ignore[arg-type]


def request(
    *payloads: AnyPayload, source: Endpoint = NSG, limit: int | None = None, **header: object
) -> list[bytes]:
    head = IkeHeader(SA.spi_i, SA.spi_r, Exchange.INFORMATIONAL, 7, initiator=False, response=False)
    head = replace(head, **header)  # type: ignore[arg-type]
    sealed = seal_fragments(TO_NODE, head, payloads, secrets.token_bytes(512), limit)
    return [add_marker(one, source, MN) for one in sealed]


ASK = (ask(ESP, THEIRS, NEW).serialize(), ask_peer(ESP, OURS).serialize())
BOTH = request(*ASK)


def told(machine: SpiResponder) -> Asked:
    event = machine.next_event()
    assert isinstance(event, Asked)
    assert machine.next_event() is None
    return event


def asked(machine: SpiResponder, datagrams: list[bytes], now: float = 0.0, source: Endpoint = NSG) -> Asked:
    for one in datagrams:
        machine.receive(one, source, now)
    return told(machine)


def read(machine: SpiResponder, to: Endpoint = NSG) -> IkeMessage:
    [(datagram, where)] = machine.to_send(0)
    assert where == to
    return open_message(FROM_NODE, strip(datagram, MN, to))


# --- the exchange ------------------------------------------------------------------------------------------


def test_a_request_is_told_and_answered() -> None:
    # nSG -> MN  HDR(7), SK { N(UPDATE_SPI), N(UPDATE_SPI, R) };  MN -> nSG  the same with both new SPIs
    world = names()
    machine = responder(world)
    event = asked(machine, BOTH)
    chosen = world.reserved[OURS]
    pairs = (Renaming(ESP, False, THEIRS, NEW), Renaming(ESP, True, OURS, chosen))
    assert event == Asked(NSG, moves=False, pairs=pairs, message_id=7)
    assert machine.to_send(0) == []
    machine.answer(IV, 0)
    answer = read(machine)
    assert answer.header.response
    assert (answer.header.message_id, answer.header.initiator) == (7, True)
    assert answer.payloads == (
        ask(ESP, THEIRS, NEW).serialize(),
        UpdateSpi(ESP, OURS, chosen, choose=True).serialize(),
    )
    assert (machine.state, machine.expected_id, machine.report.answered) == (ResponderState.ANSWERED, 8, 1)
    assert (machine.report.messages, machine.report.requests) == (2, 0)


def test_duplicates_get_the_same_octets_and_never_rename_twice() -> None:
    machine = responder()
    asked(machine, BOTH)
    machine.receive(BOTH[0], NSG, 0.5)  # before there is an answer
    assert machine.next_event() is None
    machine.answer(IV, 1)
    first = machine.to_send(1)
    for now in (1.5, 2.5, 100):
        machine.receive(BOTH[0], NSG, now)
        assert machine.to_send(now) == first
        assert machine.next_event() is None
    assert (machine.report.answered, machine.expected_id) == (1, 8)
    # the same content sealed anew is no retransmission
    machine.receive(request(*ASK)[0], NSG, 101)
    assert (machine.to_send(101), machine.next_event()) == ([], None)


def test_late_and_early_and_replayed_requests() -> None:
    machine = responder()
    for number in (0, 6, 8, 9, 1 << 31):
        machine.receive(request(*ASK, message_id=number)[0], NSG, 0)
    assert (machine.ignored, machine.next_event()) == (5, None)
    asked(machine, BOTH)
    machine.answer(IV, 0)
    asked(machine, request(ask(ESP, OURS, NEW).serialize(), message_id=8), 5)
    machine.answer(IV, 5)
    machine.to_send(5)
    machine.receive(BOTH[0], NSG, 6)  # the peer has long had the answer to this one
    assert (machine.next_event(), machine.to_send(6)) == (None, [])


def test_the_next_request_is_another() -> None:
    machine = responder()
    asked(machine, BOTH)
    machine.answer(IV, 0)
    machine.to_send(0)
    event = asked(machine, request(ask(ESP, THEIRS, b"\xc9\0\0\3").serialize(), message_id=8), 2)
    assert event.message_id == 8
    machine.answer(IV, 2)
    assert read(machine).header.message_id == 8


def test_addresses_move_with_the_names() -> None:
    machine = responder(conditions=0x4000)
    spis = SA.spis
    behind = Endpoint.of("203.0.113.5", 61000)
    event = asked(
        machine,
        request(
            NotifyPayload(Notify.UPDATE_SA_ADDRESSES),
            NotifyPayload(Notify.NAT_DETECTION_SOURCE_IP, nat_detection_hash(*spis, NSG)),
            NotifyPayload(Notify.NAT_DETECTION_DESTINATION_IP, nat_detection_hash(*spis, MN)),
            NotifyPayload(Notify.COOKIE2, COOKIE),
            NotifyPayload(Notify.ADDITIONAL_IP4_ADDRESS, bytes([192, 0, 2, 77])),
            NotifyPayload(Notify.ADDITIONAL_IP6_ADDRESS, b"short"),
            *ASK,
        ),
        source=behind,
    )
    assert (event.source, event.moves) == (behind, True)
    assert event.conditions == 0x4000 | Condition.NAT_ANY | Condition.NAT_THERE
    assert event.additional == (ip_address("192.0.2.77"),)
    machine.answer(IV, 0)
    answer = read(machine, behind)
    assert [n.data for n in answer.notifies(Notify.COOKIE2)] == [COOKIE]
    [source] = answer.notifies(Notify.NAT_DETECTION_SOURCE_IP)
    [destination] = answer.notifies(Notify.NAT_DETECTION_DESTINATION_IP)
    assert source.data == nat_detection_hash(*spis, MN)
    assert destination.data == nat_detection_hash(*spis, behind)
    assert len(answer.notifies(Notify.UPDATE_SPI)) == 2


def test_an_address_update_alone_and_no_further_addresses() -> None:
    machine = responder()
    bare = NotifyPayload(Notify.UPDATE_SA_ADDRESSES)
    event = asked(machine, request(bare, NotifyPayload(Notify.NO_ADDITIONAL_ADDRESSES)))
    assert (event.moves, event.pairs, event.reasons, event.additional) == (True, (), (), ())
    machine.answer(IV, 0)
    assert len(read(machine).payloads) == 2
    assert asked(machine, request(bare, message_id=8)).additional is None


def test_the_address_stands_where_the_names_are_refused() -> None:
    machine = responder(names(objections={OURS: Reason.NOT_ALLOWED}))
    event = asked(machine, request(NotifyPayload(Notify.UPDATE_SA_ADDRESSES), *ASK))
    assert (event.moves, event.pairs, event.reasons) == (True, (), (Reason.NOT_ALLOWED,) * 2)
    machine.answer(IV, 0)
    answer = read(machine)
    refused = [UpdateSpiRefused.parse(one) for one in answer.notifies(Notify.UPDATE_SPI_REFUSED)]
    assert [(one.old, one.reason) for one in refused] == [(THEIRS, 3), (OURS, 3)]
    assert answer.notifies(Notify.NAT_DETECTION_SOURCE_IP)


def test_the_caller_may_refuse_after_all() -> None:
    machine = responder()
    asked(machine, BOTH)
    machine.answer(IV, 0, Reason.UNUSABLE)
    answer = read(machine)
    assert [
        UpdateSpiRefused.parse(one).reason for one in answer.payloads if isinstance(one, NotifyPayload)
    ] == [
        2,
        2,
    ]


def test_nothing_to_answer() -> None:
    machine = responder()
    with pytest.raises(StateError):
        machine.answer(IV, 0)
    asked(machine, BOTH)
    machine.answer(IV, 0)
    with pytest.raises(StateError):
        machine.answer(IV, 0)


def test_a_request_of_a_later_version_is_answered_as_by_a_peer_without() -> None:
    machine = responder()
    later = replace(ASK[0], data=b"\x80" + ASK[0].data[1:])
    event = asked(machine, request(later, NotifyPayload(Notify.COOKIE2, COOKIE)))
    assert (event.pairs, event.reasons) == ((), ())
    machine.answer(IV, 0)
    assert [p.type for p in read(machine).payloads] == [Payload.NOTIFY]


def test_support_is_announced_and_answered() -> None:
    machine = responder()
    machine.receive(request(UpdateSpiSupported().serialize())[0], NSG, 0)
    assert machine.next_event() == PeerSupports(1)
    told(machine)
    machine.answer(IV, 0)
    assert read(machine).payloads == (UpdateSpiSupported().serialize(),)


# --- limits ------------------------------------------------------------------------------------------------


def test_one_exchange_a_second() -> None:
    machine = responder()
    asked(machine, BOTH, 10.0)
    machine.answer(IV, 10.0)
    machine.to_send(10.0)
    again = request(ask(ESP, THEIRS, b"\xc9\0\0\3").serialize(), message_id=8)
    event = asked(machine, again, 10.9)
    assert event.reasons == (Reason.BUSY,)
    machine.answer(IV, 10.9)
    machine.to_send(10.9)
    third = request(ask(ESP, THEIRS, b"\xc9\0\0\4").serialize(), message_id=9)
    assert asked(machine, third, 12.0).pairs
    # address updates are not limited
    machine.answer(IV, 12.0)
    bare = request(NotifyPayload(Notify.UPDATE_SA_ADDRESSES), message_id=10)
    assert asked(machine, bare, 12.1).reasons == ()


def test_sixteen_in_a_request() -> None:
    machine = responder()
    many = [ask(ESP, b"\xc1\0\1" + bytes([n]), NEW).serialize() for n in range(MOST + 1)]
    assert asked(machine, request(*many)).reasons == (Reason.NOT_ALLOWED,) * (MOST + 1)


# --- the IKE_SA itself -------------------------------------------------------------------------------------


def test_old_spis_answer_for_a_minute_and_nothing_else() -> None:
    machine = responder()
    datagrams = request(ask(IKE, SA.spi_r, b"newnamed").serialize())
    event = asked(machine, datagrams, 100)
    assert event.pairs == (Renaming(IKE, False, SA.spi_r, b"newnamed"),)
    machine.answer(IV, 100)
    first = machine.to_send(100)
    assert (machine.state, machine.retired, machine.next_timer()) == (ResponderState.RETIRED, True, 160)
    machine.receive(request(*ASK, message_id=8)[0], NSG, 110)
    assert (machine.next_event(), machine.to_send(110)) == (None, [])
    machine.handle_timer(159)
    machine.receive(datagrams[0], NSG, 159)
    assert machine.to_send(159) == first
    machine.handle_timer(160)
    assert (machine.state, machine.done, machine.next_timer()) == (ResponderState.CLOSED, True, None)
    machine.receive(datagrams[0], NSG, 161)
    assert machine.to_send(161) == []


# --- fragments ---------------------------------------------------------------------------------------------


def test_fragments_both_ways() -> None:
    machine = responder(limit=100)
    parts = request(*ASK, NotifyPayload(Notify.COOKIE2, COOKIE), limit=100)
    assert len(parts) == 2
    machine.receive(parts[1], NSG, 0)
    machine.receive(parts[1], NSG, 0)
    assert machine.next_event() is None
    machine.receive(parts[0], NSG, 0)
    told(machine)
    machine.answer(IV, 0)
    sent = machine.to_send(0)
    assert len(sent) == 2
    assert machine.report.messages == 4
    # of a repeated request the first fragment gets the answer, the others nothing
    machine.receive(parts[1], NSG, 1)
    assert machine.to_send(1) == []
    machine.receive(parts[0], NSG, 1)
    assert machine.to_send(1) == sent


# --- what is not for us ------------------------------------------------------------------------------------


def test_what_is_left_to_charon() -> None:
    machine = responder()
    for datagrams in (
        request(),  # dead peer detection
        request(NotifyPayload(Notify.COOKIE2, COOKIE)),
        request(DeletePayload(ESP, (THEIRS,)), *ASK),
        request(RawPayload(Payload.CP, bytes(4)), *ASK),
        request(RawPayload(Payload.NONCE, bytes(32)), exchange=Exchange.CREATE_CHILD_SA),
    ):
        machine.receive(datagrams[0], NSG, 0)
    assert (machine.others, machine.ignored, machine.to_send(0)) == (5, 0, [])
    assert (machine.next_event(), machine.expected_id) == (None, 7)
    asked(machine, BOTH)


def test_addresses_may_be_left_to_charon() -> None:
    machine = responder(role=ResponderRole.SPIS)
    machine.receive(request(NotifyPayload(Notify.UPDATE_SA_ADDRESSES), *ASK)[0], NSG, 0)
    assert (machine.others, machine.next_event()) == (1, None)
    asked(machine, BOTH)


def test_what_is_no_request_to_us() -> None:
    machine = responder()
    good = BOTH[0]
    mine = seal_fragments(FROM_NODE, IkeHeader.parse(good[4:]), ASK, bytes(8))[0]
    wrong = [
        good[:-1] + bytes([good[-1] ^ 1]),
        good[4:],
        b"\xff",
        b"",
        bytes(4) + mine,
        *request(*ASK, initiator=True),
        *request(*ASK, response=True),
        *request(*ASK, spi_i=b"another!"),
        *request(*ASK, RawPayload(Payload(200), b"", critical=True)),
    ]
    for octets in wrong:
        machine.receive(octets, NSG, 0)
    assert (machine.ignored, machine.others, machine.next_event()) == (len(wrong), 0, None)
    asked(machine, BOTH)


# --- watching a copy ---------------------------------------------------------------------------------------


def test_a_machine_that_only_watches() -> None:
    machine = responder(role=ResponderRole.WATCH)
    event = asked(machine, BOTH)
    assert event.pairs[0] == Renaming(ESP, False, THEIRS, NEW)
    with pytest.raises(StateError):
        machine.answer(IV, 0)
    machine.receive(BOTH[0], NSG, 0.5)  # charon's answer was lost
    assert machine.next_event() is None
    machine.receive(request(message_id=8)[0], NSG, 1)
    machine.receive(request(UpdateSpiSupported().serialize(), message_id=11)[0], NSG, 5)
    assert machine.next_event() == PeerSupports(1)
    assert told(machine).message_id == 11
    assert (machine.others, machine.to_send(6), machine.report.answered) == (1, [], 0)


# --- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ResponderState)
@pytest.mark.parametrize("what", ResponderInput)
def test_every_cell_of_the_table(state: ResponderState, what: ResponderInput) -> None:
    expected = {
        (ResponderState.LISTENING, ResponderInput.REQUEST): (ResponderState.ASKED, Action.TELL),
        (ResponderState.ASKED, ResponderInput.ANSWER): (ResponderState.ANSWERED, Action.SEND),
        (ResponderState.ASKED, ResponderInput.ANSWER_IKE): (ResponderState.RETIRED, Action.SEND),
        (ResponderState.ASKED, ResponderInput.ELSEWHERE): (ResponderState.LISTENING,),
        (ResponderState.ANSWERED, ResponderInput.REQUEST): (ResponderState.ASKED, Action.TELL),
        (ResponderState.ANSWERED, ResponderInput.DUPLICATE): (ResponderState.ANSWERED, Action.RESEND),
        (ResponderState.RETIRED, ResponderInput.DUPLICATE): (ResponderState.RETIRED, Action.RESEND),
        (ResponderState.RETIRED, ResponderInput.EXPIRE): (ResponderState.CLOSED,),
    }
    assert TABLE.get((state, what)) == expected.get((state, what))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(
            NotifyPayload,
            st.sampled_from([n for n in Notify if n > 16384]),
            st.binary(max_size=20),
            st.sampled_from(Protocol),
            st.binary(max_size=9),
        ),
        max_size=4,
    )
)
def test_authentic_nonsense_never_raises(notifies: list[NotifyPayload]) -> None:
    machine = responder()
    machine.receive(request(*notifies)[0], NSG, 0)
    while (event := machine.next_event()) is not None:
        if isinstance(event, Asked):
            machine.answer(IV, 0)
            read(machine, NSG)


def test_an_invitation_is_reported_by_who_watches_alone() -> None:
    told = request(Invitation("nsg").serialize())
    machine = responder(role=ResponderRole.WATCH)
    event = asked(machine, told)
    assert (event.invitation, event.pairs, event.moves) == ("nsg", (), False)
    machine = responder()
    machine.receive(told[0], NSG, 0)
    assert (machine.others, machine.next_event()) == (1, None)
