"""rename.py: new names for SAs, with an agent at the other end, a stock peer, on bad links, both at once."""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import UsageError
from ikectx.numbers import Encr, Exchange, Integ, Notify, Protocol
from ikectx.sa.context import Endpoint, IkeGeneration
from ikectx.sa.keys import iv_length, seal_key
from ikectx.wire.ikev2 import IkeHeader, add_marker, seal_message
from ikectx.wire.payloads import AnyPayload, NotifyPayload
from mobike_ext.address_update import AddressNotice, Moved, Refused
from mobike_ext.naming import MOST, Renaming, ask, ask_peer, mirrored, renamed_ike
from mobike_ext.notify import Reason, UpdateSpi, UpdateSpiRefused, UpdateSpiSupported
from mobike_ext.requester import SaEnd, Silent
from mobike_ext.responder import PeerSupports, ResponderRole, SpiResponder
from mobike_ext.spi_update import (
    BUSY_PAUSE,
    FRESH_OCTETS,
    MIRROR_WAIT,
    TABLE,
    PeerRenamed,
    Renamed,
    RenameRefused,
    SpiUpdate,
    SpiUpdateInput,
    SpiUpdateState,
    Unsupported,
)
from tests.air import Air, Names, events
from tests.air import Node as Agent
from tests.mobile_ike import COOKIE, FAST, MN, NSG, SA, Node, asks_for

ESP, IKE = Protocol.ESP, Protocol.IKE
OURS, THEIRS, NEW = b"\xc1\0\0\1", b"\xc2\0\0\2", b"\xc9\0\0\1"
"""SPIs as nSG sees them, which asks here."""
NODE_SA = replace(SA, initiator=True)
NOTICE = AddressNotice(COOKIE)
BOTH = (ask(ESP, OURS, NEW), ask_peer(ESP, THEIRS))
MINE = (ask(ESP, OURS, NEW),)
ALL = (*BOTH, ask(IKE, SA.spi_r, b"newnamed"))


def node_names(**changes: object) -> Names:
    sas = {(ESP, False, OURS), (ESP, True, THEIRS), (IKE, False, SA.spi_r), (IKE, True, SA.spi_i)}
    return Names(sas, **changes)  # type: ignore[arg-type]


def agent(world: Names | None = None, refusal: Reason | None = None, **options: object) -> Agent:
    world = world or node_names()
    machine = SpiResponder(NODE_SA, 7, MN, world, **options)  # type: ignore[arg-type]
    return Agent(machine, world, refusal=refusal)


def update(
    renames: tuple[UpdateSpi, ...] = BOTH,
    generation: IkeGeneration = SA,
    limit: int | None = None,
    **changes: object,
) -> SpiUpdate:
    options: dict[str, object] = {
        "address": NOTICE,
        "iv": secrets.token_bytes(8 * iv_length(generation.encr)),
        "fresh": secrets.token_bytes(FRESH_OCTETS),
    }
    end = SaEnd(generation, 7, NSG, MN, FAST, limit)
    return asks_for(end, renames, **(options | changes))  # type: ignore[arg-type]


def from_node(renames: tuple[UpdateSpi, ...], message_id: int = 3, **changes: object) -> SpiUpdate:
    """A request of the mobile node's agent."""
    options: dict[str, object] = {
        "iv": secrets.token_bytes(64),
        "fresh": secrets.token_bytes(FRESH_OCTETS),
    }
    end = SaEnd(NODE_SA, message_id, MN, NSG, FAST)
    return asks_for(end, renames, **(options | changes))  # type: ignore[arg-type]


def pairs_of(world: Names) -> tuple[Renaming, ...]:
    """What nSG must have made of `BOTH`."""
    return (Renaming(ESP, True, OURS, NEW), Renaming(ESP, False, THEIRS, world.reserved[THEIRS]))


# --- one exchange ------------------------------------------------------------------------------------------


def test_one_round_trip_moves_addresses_and_names() -> None:
    # nSG -> MN  HDR(7), SK { N(UPDATE_SA_ADDRESSES), N(NAT_D) x 2, N(COOKIE2), N(UPDATE_SPI) x 2 }
    # MN -> nSG  HDR(7), SK { N(UPDATE_SPI) x 2, N(NAT_D) x 2, N(COOKIE2) }
    machine, node, air = update(), agent(), Air()
    air.run(machine, node)
    assert events(machine) == [Moved(), Renamed(pairs_of(node.names))]
    assert (machine.state, machine.done, machine.next_timer()) == (SpiUpdateState.RENAMED, True, None)
    assert node.names.sas >= {(ESP, False, NEW), (ESP, True, node.names.reserved[THEIRS])}
    assert node.asked[0].moves
    report = machine.report
    assert (report.messages, report.requests, report.answered, report.retransmissions) == (2, 1, 0, 0)
    assert report.octets == sum(len(datagram) for _, datagram in air.sent)


def test_the_request_on_the_wire() -> None:
    machine = update(ALL, announce=True, address=AddressNotice(COOKIE, additional=()))
    [(datagram, _)] = machine.to_send(0)
    payloads = Node().read(datagram).payloads
    kinds = [p.notify for p in payloads if isinstance(p, NotifyPayload)]
    assert kinds == [
        Notify.UPDATE_SA_ADDRESSES,
        Notify.NAT_DETECTION_SOURCE_IP,
        Notify.NAT_DETECTION_DESTINATION_IP,
        Notify.COOKIE2,
        Notify.NO_ADDITIONAL_ADDRESSES,
        *[Notify.UPDATE_SPI] * 3,
        Notify.UPDATE_SPI_SUPPORTED,
    ]


def test_names_alone() -> None:
    machine, node = update(address=None), agent()
    Air().run(machine, node)
    assert events(machine) == [Renamed(pairs_of(node.names))]
    assert not node.asked[0].moves


def test_the_ike_sa_and_its_children_at_once() -> None:
    machine, node = update(ALL), agent()
    Air().run(machine, node, until=5)
    moved, renamed = events(machine)
    assert (moved, isinstance(renamed, Renamed)) == (Moved(), True)
    assert isinstance(renamed, Renamed)
    here = renamed_ike(SA, renamed.pairs)
    there = renamed_ike(NODE_SA, node.asked[0].pairs)
    assert here is not None
    assert there is not None
    assert (here.spi_i, here.spi_r) == (there.spi_i, there.spi_r) == (SA.spi_i, b"newnamed")
    assert seal_key(here, by_initiator=True) == seal_key(there, by_initiator=True)
    assert node.machine.retired


@pytest.mark.parametrize("initiator", [False, True])
@pytest.mark.parametrize(
    ("encr", "bits", "integ"),
    [(Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128), (Encr.CHACHA20_POLY1305, 0, Integ.NONE)],
)
def test_either_original_role_and_other_ciphers(initiator: bool, encr: Encr, bits: int, integ: Integ) -> None:
    generation = replace(SA, initiator=initiator, encr=encr, encr_bits=bits, integ=integ)
    world = node_names()
    node = Agent(SpiResponder(replace(generation, initiator=not initiator), 7, MN, world), world)
    machine = update(BOTH, generation)
    Air().run(machine, node)
    assert events(machine) == [Moved(), Renamed(pairs_of(world))]


def test_fragments_both_ways() -> None:
    many = tuple(ask(ESP, bytes([0xC1, 0, 1, n]), bytes([0xC9, 0, 1, n])) for n in range(MOST))
    world = Names({(ESP, False, one.old) for one in many})
    machine, node, air = update(many, limit=200), agent(world, limit=200), Air()
    air.run(machine, node)
    assert [type(event) for event in events(machine)] == [Moved, Renamed]
    assert all(len(datagram) <= 204 for _, datagram in air.sent)
    assert len(air.sent) > 4
    assert machine.report.messages == len(air.sent) == node.machine.report.messages
    assert machine.report.requests == 1


def test_without_names_it_is_an_address_update() -> None:
    machine, node = update(()), agent()
    Air().run(machine, node)
    assert events(machine) == [Moved(), Renamed(())]
    announcing = update((), address=None, announce=True)
    node = agent()
    Air().run(announcing, node)
    assert (node.supports, events(announcing)) == (1, [PeerSupports(1), Renamed(())])


# --- answers -----------------------------------------------------------------------------------------------


def answer(machine: SpiUpdate, *payloads: AnyPayload, addresses: bool = True) -> None:
    """What a mobile node answers to the request that waits."""
    [(datagram, _)] = machine.to_send(0)
    node = Node()
    request = node.read(datagram)
    more = [*node.nat_detection(NSG), *request.notifies(Notify.COOKIE2)] if addresses else []
    machine.receive(node.answer(request, [*payloads, *more]), MN, 0)


def test_a_stock_peer() -> None:
    machine = update()
    answer(machine)
    assert events(machine) == [Moved(), Unsupported()]
    assert machine.state is SpiUpdateState.UNSUPPORTED


def test_a_refusal_leaves_the_address_moved() -> None:
    machine, node = update(), agent(node_names(objections={THEIRS: Reason.NOT_ALLOWED}))
    Air().run(machine, node)
    assert events(machine) == [Moved(), RenameRefused((Reason.NOT_ALLOWED,) * 2)]
    assert (ESP, False, OURS) in node.names.sas


def test_the_address_itself_is_refused() -> None:
    machine = update()
    answer(machine, NotifyPayload(Notify.UNACCEPTABLE_ADDRESSES))
    assert events(machine) == [Refused(Notify.UNACCEPTABLE_ADDRESSES)]
    assert machine.state is SpiUpdateState.REJECTED
    machine = update()
    answer(machine, *(one.serialize() for one in MINE), addresses=False)
    assert events(machine) == [Refused(Notify.COOKIE2)]


def test_an_error_or_nonsense_without_addresses() -> None:
    machine = update(address=None)
    answer(machine, NotifyPayload(Notify.INVALID_SYNTAX), addresses=False)
    assert events(machine) == [RenameRefused((), Notify.INVALID_SYNTAX)]
    machine = update()
    answer(machine, ask(ESP, OURS, NEW).serialize())  # one answer to two
    assert events(machine) == [Moved(), RenameRefused((), Notify.INVALID_SYNTAX)]


def test_a_nat_needs_esp_in_udp() -> None:
    machine, elsewhere = update(), Endpoint.of("203.0.113.1", 4500)
    [(datagram, _)] = machine.to_send(0)
    node = Node()
    request = node.read(datagram)
    told = [*node.nat_detection(elsewhere), *request.notifies(Notify.COOKIE2)]
    machine.receive(node.answer(request, told), MN, 0)
    assert events(machine) == [Refused(Notify.NAT_DETECTION_DESTINATION_IP)]
    assert machine.state is SpiUpdateState.REJECTED


def test_silence() -> None:
    machine = update()
    Air().run(machine)
    assert events(machine) == [Silent(3)]
    assert (machine.state, machine.report.requests) == (SpiUpdateState.SILENT, 1)


# --- busy --------------------------------------------------------------------------------------------------


def test_busy_is_tried_again_once() -> None:
    world = node_names(objections={OURS: Reason.BUSY})
    machine, node, air = update(), agent(world), Air()
    air.run(machine, node, until=1)
    assert (machine.state, events(machine)) == (SpiUpdateState.PAUSED, [Moved()])
    world.objections.clear()
    air.run(machine, node, until=1)
    assert events(machine) == [Renamed(pairs_of(world))]
    assert [(one.moves, one.message_id) for one in node.asked] == [(True, 7), (False, 8)]
    assert machine.report.requests == 2
    assert BUSY_PAUSE >= 1 / 1.0  # the other side's rate


def test_busy_twice_is_a_refusal() -> None:
    machine, node = update(), agent(node_names(objections={OURS: Reason.BUSY}))
    Air().run(machine, node)
    assert events(machine) == [Moved(), RenameRefused((Reason.BUSY, Reason.BUSY))]
    assert (machine.state, len(node.asked)) == (SpiUpdateState.REFUSED, 2)


def test_a_caller_that_cannot_do_it_now() -> None:
    machine, node = update(), agent(refusal=Reason.BUSY)
    Air().run(machine, node)
    assert events(machine)[-1] == RenameRefused((Reason.BUSY, Reason.BUSY))


# --- the peer's own request --------------------------------------------------------------------------------


def test_an_agent_beside_a_charon_that_does_not_know() -> None:
    # nSG -> MN  as ever; MN's charon answers without the notify; its agent, within 500 ms:
    # MN -> nSG  HDR(3), SK { N(UPDATE_SPI, R), N(UPDATE_SPI) };  nSG -> MN  the same, both new SPIs in it
    machine = update(expected_id=3)
    world = node_names()
    watcher = SpiResponder(NODE_SA, 7, MN, world, role=ResponderRole.WATCH)
    [(datagram, _)] = machine.to_send(0)
    watcher.receive(datagram, NSG, 0.01)
    answer_of_charon = Node().accept(datagram)
    machine.receive(answer_of_charon, MN, 0.02)
    assert (machine.state, machine.next_timer()) == (SpiUpdateState.MIRROR, 0.02 + MIRROR_WAIT)
    event = watcher.next_event()
    assert event is not None
    theirs = from_node(mirrored(event.pairs))  # type: ignore[union-attr]
    air = Air()
    air.now = 0.1
    air.run(theirs, machine, until=5)
    assert events(machine) == [Moved(), Renamed(pairs_of(world))]
    [renamed] = events(theirs)
    assert isinstance(renamed, Renamed)
    assert [(p.old, p.new, not p.inbound) for p in renamed.pairs] == [
        (p.old, p.new, p.inbound) for p in pairs_of(world)
    ]
    assert (machine.report.requests, machine.report.answered, machine.report.messages) == (1, 1, 4)


def test_an_agent_that_is_known_of_is_waited_for() -> None:
    """It had no CPU for seconds, or begins anew: nothing is rekeyed beside its request."""
    machine = update(expected_id=3, patience=11.0)
    answer(machine)
    machine.handle_timer(10.9)
    assert (machine.state, machine.next_timer()) == (SpiUpdateState.MIRROR, 11.0)
    theirs = from_node((ask_peer(ESP, OURS), ask(ESP, THEIRS, b"\xcf\0\0\1")))
    air = Air()
    air.now = 10.9
    air.run(theirs, machine, until=11)
    assert machine.state is SpiUpdateState.RENAMED
    silent = update(expected_id=3, patience=11.0)
    answer(silent)
    silent.handle_timer(11.0)
    assert silent.state is SpiUpdateState.UNSUPPORTED


def test_an_agent_that_does_not_come() -> None:
    machine = update(expected_id=3)
    answer(machine)
    assert events(machine) == [Moved()] if machine.done else True
    machine.handle_timer(MIRROR_WAIT - 0.01)
    assert machine.state is SpiUpdateState.MIRROR
    machine.handle_timer(MIRROR_WAIT)
    assert events(machine)[-1] == Unsupported()
    # too late: another way is taken already
    theirs = from_node(
        mirrored((Renaming(ESP, False, OURS, NEW), Renaming(ESP, True, THEIRS, b"\xcf\0\0\1")))
    )
    Air().run(theirs, machine, until=1)
    assert events(machine) == []
    assert theirs.state is SpiUpdateState.PAUSED


def test_the_agents_request_may_be_faster_than_charons_answer() -> None:
    machine = update(expected_id=3)
    [(datagram, _)] = machine.to_send(0)
    theirs = from_node((ask_peer(ESP, OURS), ask(ESP, THEIRS, b"\xcf\0\0\1")))
    Air().run(theirs, machine, until=0.5)
    assert (machine.state, events(machine)) == (SpiUpdateState.AGREED, [])
    machine.receive(Node().accept(datagram), MN, 0.6)
    pairs = (Renaming(ESP, True, OURS, NEW), Renaming(ESP, False, THEIRS, b"\xcf\0\0\1"))
    assert events(machine) == [Moved(), Renamed(pairs)]


def test_an_agreement_without_charons_answer() -> None:
    machine = update(expected_id=3)
    machine.to_send(0)
    theirs = from_node((ask_peer(ESP, OURS), ask(ESP, THEIRS, b"\xcf\0\0\1")))
    air = Air()
    air.drop = lambda source, datagram: source == NSG and machine.state is not SpiUpdateState.AGREED
    air.run(theirs, machine, until=60)
    assert machine.state is SpiUpdateState.RENAMED
    assert [type(event) for event in events(machine)] == [Moved, Renamed]


def test_half_a_mirror_is_none() -> None:
    machine = update(expected_id=3)
    answer(machine)
    theirs = from_node((ask_peer(ESP, OURS),))
    Air().run(theirs, machine, until=0.3)
    assert machine.state is SpiUpdateState.MIRROR
    assert theirs.state is SpiUpdateState.PAUSED


def test_requests_of_the_peer_are_charons_where_nothing_is_expected() -> None:
    machine = update()
    machine.to_send(0)
    theirs = from_node((ask_peer(ESP, OURS),))
    Air().run(theirs, machine, until=0.3)
    assert machine.report.answered == 0


def test_dead_peer_detection_is_charons_anyway() -> None:
    machine = update(expected_id=3)
    machine.to_send(0)
    dpd = IkeHeader(SA.spi_i, SA.spi_r, Exchange.INFORMATIONAL, 3, initiator=True, response=False)
    datagram = add_marker(seal_message(Node().outbound, dpd, [], bytes(8)), MN, NSG)
    machine.receive(datagram, MN, 0)
    assert (machine.report.answered, machine.to_send(0)) == (0, [])


# --- both ends at once -------------------------------------------------------------------------------------


def test_both_ask_for_the_same() -> None:
    mine = update(expected_id=3)
    theirs = from_node((ask_peer(ESP, OURS), ask(ESP, THEIRS, b"\xcf\0\0\1")), expected_id=7)
    # nSG leaves the addresses out, so that either end may answer the other
    mine = update(expected_id=3, address=None)
    Air().run(mine, theirs, until=5)
    pairs = (Renaming(ESP, True, OURS, NEW), Renaming(ESP, False, THEIRS, b"\xcf\0\0\1"))
    assert events(mine) == [Renamed(pairs)]
    assert events(theirs) == [Renamed(tuple(replace(p, inbound=not p.inbound) for p in pairs))]
    assert (mine.report.answered, theirs.report.answered) == (1, 1)


def test_both_ask_for_different_children() -> None:
    other, renamed = b"\xc2\0\0\7", b"\xcf\0\0\7"
    here = Names({(ESP, False, other), (ESP, True, OURS)})
    there = Names({(ESP, False, OURS), (ESP, True, other)})
    mine = update(MINE, address=None, expected_id=3, names=here)
    theirs = from_node((ask(ESP, other, renamed),), expected_id=7, names=there)
    Air().run(mine, theirs, until=5)
    ours, peers = Renaming(ESP, True, OURS, NEW), Renaming(ESP, True, other, renamed)
    assert events(mine) == [PeerRenamed((replace(peers, inbound=False),)), Renamed((ours,))]
    assert events(theirs) == [PeerRenamed((replace(ours, inbound=False),)), Renamed((peers,))]


def test_both_rename_the_ike_sa() -> None:
    # MN (original initiator) -> nSG  N(UPDATE_SPI, IKE): agreed; nSG -> MN  N(UPDATE_SPI, IKE): busy
    here = Names({(IKE, False, SA.spi_i), (IKE, True, SA.spi_r)})
    there = Names({(IKE, False, SA.spi_r), (IKE, True, SA.spi_i)})
    mine = update((ask(IKE, SA.spi_r, b"newnamer"),), address=None, expected_id=3, names=here)
    theirs = from_node((ask(IKE, SA.spi_i, b"newnamei"),), expected_id=7, names=there)
    Air().run(mine, theirs, until=30)
    pair = Renaming(IKE, True, SA.spi_i, b"newnamei")
    assert events(theirs) == [Renamed((pair,))]
    assert events(mine) == [PeerRenamed((replace(pair, inbound=False),)), RenameRefused((Reason.BUSY,))]
    assert (mine.report.requests, theirs.report.requests) == (1, 1)


# --- a bad link --------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from([0.0, 0.2, 0.5, 0.8]),
    st.sampled_from([MINE, BOTH, ALL]),
    st.sampled_from([None, 120]),
)
def test_on_a_bad_link_both_ends_agree(
    seed: int, loss: float, renames: tuple[UpdateSpi, ...], limit: int | None
) -> None:
    world = node_names(seed=seed)
    before = set(world.sas)
    machine, node = update(renames, limit=limit), agent(world, limit=limit)
    Air(seed, loss=loss, double=0.3, delay=(0.0, 3.0)).run(machine, node, until=100)
    assert len(node.asked) <= 1  # renamed at most once, whatever the link did
    told = [type(event) for event in events(machine)]
    if machine.state is SpiUpdateState.RENAMED:
        assert told == [Moved, Renamed]
        assert world.sas != before
    else:
        assert (machine.state, told) == (SpiUpdateState.SILENT, [Silent])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([0.0, 0.3, 0.6]), st.floats(0, 0.4))
def test_on_a_bad_link_both_may_ask(seed: int, loss: float, late: float) -> None:
    mine = update(expected_id=3, address=None)
    theirs = from_node((ask_peer(ESP, OURS), ask(ESP, THEIRS, b"\xcf\0\0\1")), expected_id=7)
    air = Air(seed, loss=loss, double=0.3, delay=(0.0, 1.5))
    air.run(mine, until=late)
    air.run(mine, theirs, until=100)
    pairs = {(OURS, NEW), (THEIRS, b"\xcf\0\0\1")}
    for one in (mine, theirs):
        for event in events(one):
            if isinstance(event, Renamed):
                assert {(p.old, p.new) for p in event.pairs} == pairs
        assert one.state in (SpiUpdateState.RENAMED, SpiUpdateState.SILENT)
        assert one.report.answered <= 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 255)), min_size=1, max_size=3))
def test_damage_changes_nothing(damage: list[tuple[int, int]]) -> None:
    machine = update(expected_id=3)
    [(datagram, _)] = machine.to_send(0)
    good = Node().accept(datagram)
    bad = bytearray(good)
    for place, change in damage:
        bad[place % len(bad)] ^= change
    if bytes(bad) != good:
        machine.receive(bytes(bad), MN, 0)
        assert machine.state is SpiUpdateState.WAITING
    machine.receive(good, MN, 0)
    assert machine.state is SpiUpdateState.MIRROR


# --- the table ---------------------------------------------------------------------------------------------

ENDS = (
    SpiUpdateState.RENAMED,
    SpiUpdateState.REFUSED,
    SpiUpdateState.REJECTED,
    SpiUpdateState.UNSUPPORTED,
    SpiUpdateState.SILENT,
)


@pytest.mark.parametrize("state", SpiUpdateState)
@pytest.mark.parametrize("what", SpiUpdateInput)
def test_every_cell_of_the_table(state: SpiUpdateState, what: SpiUpdateInput) -> None:
    asking = {
        SpiUpdateInput.ACCEPT: SpiUpdateState.RENAMED,
        SpiUpdateInput.DENY: SpiUpdateState.REFUSED,
        SpiUpdateInput.PLAIN: SpiUpdateState.UNSUPPORTED,
        SpiUpdateInput.PLAIN_YET: SpiUpdateState.MIRROR,
        SpiUpdateInput.MIRRORED: SpiUpdateState.AGREED,
        SpiUpdateInput.GIVE_UP: SpiUpdateState.SILENT,
    }
    agreed = (
        SpiUpdateInput.ACCEPT,
        SpiUpdateInput.DENY,
        SpiUpdateInput.BUSY,
        SpiUpdateInput.PLAIN,
        SpiUpdateInput.PLAIN_YET,
        SpiUpdateInput.GIVE_UP,
    )
    settled = {SpiUpdateInput.MIRRORED: SpiUpdateState.RENAMED}
    expected: dict[SpiUpdateState, dict[SpiUpdateInput, SpiUpdateState]] = {
        SpiUpdateState.NEW: {SpiUpdateInput.START: SpiUpdateState.WAITING},
        SpiUpdateState.WAITING: asking
        | {SpiUpdateInput.BUSY: SpiUpdateState.PAUSED, SpiUpdateInput.REJECT: SpiUpdateState.REJECTED},
        SpiUpdateState.AGAIN: asking | {SpiUpdateInput.BUSY: SpiUpdateState.REFUSED},
        SpiUpdateState.AGREED: dict.fromkeys(agreed, SpiUpdateState.RENAMED)
        | {SpiUpdateInput.REJECT: SpiUpdateState.REJECTED},
        SpiUpdateState.PAUSED: settled | {SpiUpdateInput.PAUSE_OVER: SpiUpdateState.AGAIN},
        SpiUpdateState.MIRROR: settled | {SpiUpdateInput.LATE: SpiUpdateState.UNSUPPORTED},
    }
    assert TABLE.get((state, what), (state,)) == (expected.get(state, {}).get(what, state),)
    assert state not in ENDS or (state, what) not in TABLE


def test_wrong_arguments() -> None:
    with pytest.raises(UsageError):
        AddressNotice(b"short")
    for wrong in (
        {"iv": b"short"},
        {"fresh": b"short"},
        {"renames": tuple(ask(ESP, OURS, bytes([1, 0, 0, n])) for n in range(MOST + 1))},
        {"renames": (UpdateSpi(ESP, OURS, NEW, choose=True),)},
    ):
        with pytest.raises(UsageError):
            update(**wrong)


def test_what_nodes_may_say_besides() -> None:
    machine = update(MINE)
    answer(machine, MINE[0].serialize(), UpdateSpiSupported().serialize(), NotifyPayload(Notify(50000), b"?"))
    assert events(machine) == [PeerSupports(1), Moved(), Renamed((Renaming(ESP, True, OURS, NEW),))]
    machine = update(MINE)
    answer(machine, UpdateSpiRefused(ESP, OURS, Reason(77)).serialize())
    assert events(machine) == [Moved(), RenameRefused((Reason(77),))]
