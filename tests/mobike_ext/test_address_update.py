"""exchange.py: the gateway's address update against a mobile node made of the same rooms."""

from __future__ import annotations

import secrets
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.errors import UsageError
from ikectx.numbers import Encr, Exchange, Integ, Notify
from ikectx.sa.context import Endpoint, IkeGeneration
from ikectx.sa.keys import DrawnIvs, iv_length
from ikectx.wire.ikev2 import IkeHeader, IkeMessage, add_marker, nat_detection_hash, seal_message
from ikectx.wire.payloads import AnyPayload, NotifyPayload, serialize_payloads
from mobike_ext.address_update import (
    TABLE,
    AddressNotice,
    AddressUpdate,
    AddressUpdateInput,
    AddressUpdateState,
    Condition,
    Moved,
    Refused,
)
from mobike_ext.requester import SaEnd, Silent
from tests.air import events
from tests.ikectx.sa.test_keys import CHARON, charon_generation
from tests.mobile_ike import COOKIE, FAST, MN, NSG, SA, Node


def update(generation: IkeGeneration = SA, iv: bytes | None = None, **notice: object) -> AddressUpdate:
    end = SaEnd(generation, 7, NSG, MN, FAST)
    said = AddressNotice(**({"cookie2": COOKIE} | notice))  # type: ignore[arg-type]
    return AddressUpdate(end, said, secrets.token_bytes(iv_length(generation.encr)) if iv is None else iv)


def started(**changes: object) -> tuple[AddressUpdate, IkeMessage, bytes]:
    machine = update(SA, **changes)
    [(datagram, destination)] = machine.to_send(0)
    assert destination == MN
    return machine, Node().read(datagram), datagram


@pytest.mark.parametrize(
    ("encr", "bits", "integ"),
    [(Encr.AES_GCM_16, 128, Integ.NONE), (Encr.AES_CBC, 256, Integ.HMAC_SHA2_256_128)],
)
def test_b3_the_iv_depends_on_all_that_is_encrypted(encr: Encr, bits: int, integ: Integ) -> None:
    sa = replace(SA, encr=encr, encr_bits=bits, integ=integ)
    size = iv_length(encr)

    def sent(**changes: Any) -> bytes:
        [(datagram, _)] = update(sa, **({"iv": DrawnIvs.of(bytes(size))} | changes)).to_send(0)
        return datagram[4 + 28 + 4 :]

    others = [
        sent(additional=()),
        sent(additional=(ip_address("203.0.113.1"),)),
        sent(conditions=Condition.NAT_FAKE | Condition.NAT_ANY),
        sent(cookie2=bytes(16)),
        sent(iv=DrawnIvs.of(bytes(size - 1) + b"\1")),
    ]
    assert sent() == sent()  # built again after a crash: the same octets
    assert len({one[:size] for one in (sent(), *others)}) == 6


# --- the exchange ------------------------------------------------------------------------------------------


def test_one_round_trip() -> None:
    # nSG -> MN: HDR(7), SK { N(UPDATE_SA_ADDRESSES), N(NAT_D_SRC), N(NAT_D_DST), N(COOKIE2) }
    machine, request, datagram = started()
    assert request.header.exchange is Exchange.INFORMATIONAL
    assert (request.header.message_id, request.header.initiator, request.header.response) == (7, False, False)
    assert request.payloads == (
        NotifyPayload(Notify.UPDATE_SA_ADDRESSES),
        NotifyPayload(Notify.NAT_DETECTION_SOURCE_IP, nat_detection_hash(SA.spi_i, SA.spi_r, NSG)),
        NotifyPayload(Notify.NAT_DETECTION_DESTINATION_IP, nat_detection_hash(SA.spi_i, SA.spi_r, MN)),
        NotifyPayload(Notify.COOKIE2, COOKIE),
    )
    assert machine.to_send(0) == []
    # MN -> nSG: HDR(7), SK { N(NAT_D_SRC), N(NAT_D_DST), N(COOKIE2) }
    answer = Node().accept(datagram)
    machine.receive(answer, MN, 0.02)
    assert events(machine) == [Moved()]
    assert machine.done
    assert machine.next_timer() is None
    assert machine.to_send(10) == []
    report = machine.report
    assert (report.messages, report.octets) == (2, len(datagram) + len(answer))
    assert (report.retransmissions, report.requests, report.proven_by_traffic) == (0, 1, False)


@pytest.mark.parametrize("initiator", [False, True])
@pytest.mark.parametrize(
    ("encr", "bits", "integ"),
    [
        (Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128),
        (Encr.AES_CTR, 256, Integ.AES_XCBC_96),
        (Encr.CHACHA20_POLY1305, 0, Integ.NONE),
    ],
)
def test_either_original_role_and_other_ciphers(initiator: bool, encr: Encr, bits: int, integ: Integ) -> None:
    generation = replace(SA, initiator=initiator, encr=encr, encr_bits=bits, integ=integ)
    machine = update(generation)
    [(datagram, _)] = machine.to_send(0)
    node = Node(generation)
    assert node.read(datagram).header.initiator is initiator
    machine.receive(node.accept(datagram), MN, 0)
    assert events(machine) == [Moved()]


def test_ipv6_and_port_500_without_marker() -> None:
    gateway, me = Endpoint.of("2001:db8::20", 500), Endpoint.of("2001:db8::7", 500)
    machine = AddressUpdate(SaEnd(SA, 0, gateway, me), AddressNotice(COOKIE), bytes(8))
    [(datagram, destination)] = machine.to_send(0)
    assert datagram.startswith(SA.spi_i)
    assert destination == me
    machine.receive(Node(me=me).accept(datagram, gateway), me, 0)
    assert events(machine) == [Moved()]


def test_losses_are_mended_with_the_same_octets() -> None:
    machine, _, datagram = started()
    now, sent = 0.0, [datagram]
    for _ in range(2):
        due = machine.next_timer()
        assert due is not None
        machine.handle_timer(due - 0.001)
        assert machine.to_send(due) == []
        machine.handle_timer(due)
        now = due
        sent += [octets for octets, _ in machine.to_send(now)]
    assert sent == [datagram] * 3
    # the MN saw two of the three and answered both, alike
    answer = Node().accept(datagram)
    machine.receive(answer, MN, now)
    machine.receive(answer, MN, now)
    assert events(machine) == [Moved()]
    assert (machine.report.retransmissions, machine.report.messages, machine.ignored) == (2, 4, 1)


def test_silence() -> None:
    machine, _, datagram = started()
    while (due := machine.next_timer()) is not None:
        machine.handle_timer(due)
        machine.to_send(due)
    assert events(machine) == [Silent(3)]
    assert machine.report.requests == 1
    # too late: the transfer may have been undone already
    machine.receive(Node().accept(datagram), MN, 100)
    assert events(machine) == []
    assert machine.state is AddressUpdateState.SILENT


@pytest.mark.parametrize(
    "notify", [Notify.UNACCEPTABLE_ADDRESSES, Notify.UNEXPECTED_NAT_DETECTED, Notify.INVALID_SYNTAX]
)
def test_refusals(notify: Notify) -> None:
    machine, request, _ = started()
    machine.receive(Node().answer(request, [NotifyPayload(notify), *request.notifies(Notify.COOKIE2)]), MN, 0)
    assert events(machine) == [Refused(notify)]
    assert machine.state is AddressUpdateState.REFUSED


@pytest.mark.parametrize("cookies", [[], [bytes(16)], [COOKIE, COOKIE]])
def test_the_cookie_must_come_back(cookies: list[bytes]) -> None:
    machine, request, _ = started()
    machine.receive(Node().answer(request, [NotifyPayload(Notify.COOKIE2, c) for c in cookies]), MN, 0)
    assert events(machine) == [Refused(Notify.COOKIE2)]


def test_b17_traffic_proves_nothing_but_the_mobile_node_is_asked_longer() -> None:
    # whoever sits between the MN and the old gateway can send the MN's packets to the new one
    machine, _, datagram = started()
    sent = 1
    machine.traffic_seen()
    assert (machine.state, events(machine)) == (AddressUpdateState.WAITING, [])
    while (due := machine.next_timer()) is not None:
        machine.handle_timer(due)
        machine.traffic_seen()
        sent += len(machine.to_send(due))
    assert sent == 2 * FAST.tries
    assert events(machine) == [Silent(sent)]
    assert not machine.report.proven_by_traffic
    # an answer to one of the later requests counts
    machine, _, datagram = started()
    machine.traffic_seen()
    for _ in range(FAST.tries + 1):
        machine.handle_timer(machine.next_timer() or 0)
        machine.to_send(machine.next_timer() or 100)
    machine.receive(Node().accept(datagram), MN, 100)
    assert events(machine) == [Moved()]


def test_traffic_before_anything_was_sent_changes_nothing() -> None:
    machine = update()
    machine.traffic_seen()
    assert (machine.state, events(machine), machine.report.requests) == (AddressUpdateState.NEW, [], 0)


@pytest.mark.parametrize("case", CHARON, ids=lambda c: c["label"])
def test_what_charon_took_and_answered(case: dict[str, Any]) -> None:
    gateway, node = Endpoint.of("10.9.0.2", 4500), Endpoint.of("10.9.0.9", 4500)
    machine = AddressUpdate(
        SaEnd(charon_generation(case), case["message_id"], gateway, node),
        AddressNotice(bytes.fromhex(case["cookie2"]), Condition.NAT_THERE | Condition.NAT_ANY),
        bytes.fromhex(case["iv"]),
    )
    [(datagram, destination)] = machine.to_send(0)
    reader = Node(charon_generation(case), node)
    sent, taken = (reader.read(one, gateway) for one in (datagram, bytes.fromhex(case["request"])))
    # what charon was sent had a true source hash; both tell it of a NAT, one by either hash
    others = [
        [p for p in one.payloads if p not in one.notifies(Notify.NAT_DETECTION_SOURCE_IP)]
        for one in (sent, taken)
    ]
    assert (sent.header, others[0], destination) == (taken.header, others[1], node)
    machine.receive(bytes.fromhex(case["answer"]), node, 0.1)
    # libipsec at the mobile node forces encapsulation by a false source hash: nothing changed
    assert events(machine) == [Moved()]


# --- what is no answer -------------------------------------------------------------------------------------


def test_what_does_not_count_as_an_answer() -> None:
    machine, request, datagram = started()
    node, good = Node(), Node().accept(datagram)
    cookie: list[AnyPayload] = list(request.notifies(Notify.COOKIE2))
    elsewhere = [Endpoint.of("198.51.100.8", 4500), Endpoint.of("198.51.100.7", 4501)]
    for source in elsewhere:
        machine.receive(good, source, 0)
    for octets in (
        good[:-1] + bytes([good[-1] ^ 1]),
        good[4:],
        datagram,
        b"",
        b"\xff",
        node.answer(request, cookie, message_id=8),
        node.answer(request, cookie, message_id=6),
        node.answer(request, cookie, spi_i=b"another!"),
        node.answer(request, cookie, exchange=Exchange.CREATE_CHILD_SA),
    ):
        machine.receive(octets, MN, 0)
    assert machine.ignored == 2 + 9
    assert machine.state is AddressUpdateState.WAITING
    machine.receive(good, MN, 0)
    assert events(machine) == [Moved()]


def test_an_unauthenticated_error_does_not_end_it() -> None:
    machine, request, _ = started()
    head = replace(request.header, response=True, initiator=True)
    first, body = serialize_payloads([NotifyPayload(Notify.INVALID_IKE_SPI)])
    clear = replace(head, next_payload=first, length=28 + len(body)).serialize() + body
    machine.receive(bytes(4) + clear, MN, 0)
    assert (machine.ignored, machine.state) == (1, AddressUpdateState.WAITING)


def test_requests_of_the_mobile_node_wait_for_charon() -> None:
    machine, _, _ = started()
    node = Node()
    dpd = IkeHeader(SA.spi_i, SA.spi_r, Exchange.INFORMATIONAL, 7, initiator=True, response=False)
    machine.receive(add_marker(seal_message(node.outbound, dpd, [], bytes(8)), MN, NSG), MN, 0)
    assert (machine.ignored, machine.to_send(0), events(machine)) == (0, [], [])


# --- NAT ---------------------------------------------------------------------------------------------------

HERE, THERE, FAKE, SOME = Condition.NAT_HERE, Condition.NAT_THERE, Condition.NAT_FAKE, Condition.NAT_ANY
OTHER_BITS = 0x4040


@pytest.mark.parametrize(
    ("before", "mn_sees_gateway_at", "mn_is_at", "refused"),
    [
        (0, NSG, MN, None),
        (0, NSG, Endpoint.of("10.0.0.2", 4500), Notify.NAT_DETECTION_SOURCE_IP),
        (0, Endpoint.of("203.0.113.1", 4500), MN, Notify.NAT_DETECTION_DESTINATION_IP),
        (THERE | SOME, NSG, Endpoint.of("10.0.0.2", 4500), None),
        (FAKE | SOME, NSG, MN, None),
        (FAKE | SOME, NSG, Endpoint.of("10.0.0.2", 4500), None),
        (THERE | SOME, NSG, MN, None),
        (HERE | SOME, NSG, MN, None),
        (HERE | SOME, Endpoint.of("203.0.113.1", 4500), MN, None),
    ],
)
def test_a_nat_needs_esp_in_udp(
    before: int, mn_sees_gateway_at: Endpoint, mn_is_at: Endpoint, refused: Notify | None
) -> None:
    machine, request, _ = started(conditions=before | OTHER_BITS)
    node = Node()
    hashes = node.nat_detection(mn_sees_gateway_at, here=mn_is_at)
    machine.receive(node.answer(request, [*hashes, *request.notifies(Notify.COOKIE2)]), MN, 0)
    assert events(machine) == [Refused(refused) if refused else Moved()]


@pytest.mark.parametrize("nat", [FAKE, HERE, THERE])
def test_esp_in_udp_goes_on_in_udp(nat: Condition) -> None:
    """A gateway without a NAT takes over from one behind a NAT, or that forces the encapsulation."""
    _, request, _ = started(conditions=int(nat | SOME))
    [source] = request.notifies(Notify.NAT_DETECTION_SOURCE_IP)
    [destination] = request.notifies(Notify.NAT_DETECTION_DESTINATION_IP)
    assert source.data != nat_detection_hash(SA.spi_i, SA.spi_r, NSG)
    assert len(source.data) == 20
    assert destination.data == nat_detection_hash(SA.spi_i, SA.spi_r, MN)


def test_an_answer_without_nat_detection_says_nothing_about_it() -> None:
    machine, request, _ = started(conditions=int(THERE | SOME))
    machine.receive(Node().answer(request, list(request.notifies(Notify.COOKIE2))), MN, 0)
    assert events(machine) == [Moved()]


# --- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", AddressUpdateState)
@pytest.mark.parametrize("what", AddressUpdateInput)
def test_every_cell_of_the_table(state: AddressUpdateState, what: AddressUpdateInput) -> None:
    expected = {
        (AddressUpdateState.NEW, AddressUpdateInput.START): AddressUpdateState.WAITING,
        (AddressUpdateState.WAITING, AddressUpdateInput.ACCEPT): AddressUpdateState.MOVED,
        (AddressUpdateState.WAITING, AddressUpdateInput.REJECT): AddressUpdateState.REFUSED,
        (AddressUpdateState.WAITING, AddressUpdateInput.GIVE_UP): AddressUpdateState.SILENT,
    }
    assert TABLE.get((state, what), (state,)) == (expected.get((state, what), state),)


def test_wrong_arguments() -> None:
    with pytest.raises(UsageError):
        update(cookie2=b"short")
    with pytest.raises(UsageError):
        update(iv=bytes(12))
    with pytest.raises(UsageError):
        SaEnd(SA, 0, NSG, Endpoint.of("2001:db8::1"))


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (None, []),
        ((), [(Notify.NO_ADDITIONAL_ADDRESSES, b"")]),
        (
            ("192.0.2.77", "2001:db8::77"),
            [
                (Notify.ADDITIONAL_IP4_ADDRESS, bytes([192, 0, 2, 77])),
                (Notify.ADDITIONAL_IP6_ADDRESS, bytes.fromhex("20010db8000000000000000000000077")),
            ],
        ),
    ],
)
def test_the_gateways_further_addresses_take_the_place_of_the_old_ones(
    addresses: tuple[str, ...] | None, expected: list[tuple[Notify, bytes]]
) -> None:
    """RFC 4555, 3.6: without this the MN would fall back to an address of pSG."""
    given = None if addresses is None else [ip_address(one) for one in addresses]
    machine = update(additional=given)
    ((datagram, _),) = machine.to_send(0.0)
    message = Node().read(datagram)
    kinds = (
        Notify.ADDITIONAL_IP4_ADDRESS,
        Notify.ADDITIONAL_IP6_ADDRESS,
        Notify.NO_ADDITIONAL_ADDRESSES,
    )
    assert [(n.notify, n.data) for kind in kinds for n in message.notifies(kind)] == expected
