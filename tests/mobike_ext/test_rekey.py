"""rekey.py: children and IKE_SAs rekeyed by the agent, with a peer that answers as RFC 7296 says."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import RefusedError, StateError, UsageError
from ikectx.numbers import Encr, Exchange, Integ, KeMethod, Mode, Notify, Payload, Protocol, Status
from ikectx.sa.context import ChildContext, Lifetime, ReplayState, TrafficSelector
from ikectx.sa.keys import child_keys, sk_keys
from ikectx.wire.ikev2 import IkeHeader, add_marker, seal_message, strip_marker
from ikectx.wire.payloads import (
    AnyPayload,
    DeletePayload,
    KePayload,
    NoncePayload,
    NotifyPayload,
    Proposal,
    SaPayload,
    Transform,
    TransformType,
    TsPayload,
)
from mobike_ext.rekey import (
    REKEY_OCTETS,
    TABLE,
    ChildMade,
    ChildRekey,
    ChildRekeyed,
    IkeMade,
    IkeRekey,
    IkeRekeyed,
    RekeyFailed,
    RekeyInput,
    RekeyState,
)
from mobike_ext.requester import Silent
from tests.air import Air
from tests.mobile_ike import MN, NSG, SA
from tests.rekey_peer import (
    CHILD,
    IKE_SA,
    NEW,
    PEERS,
    PFS,
    TEMPORARY,
    Caller,
    Peer,
    child_rekey,
    ike_rekey,
    of,
    results,
    run,
)

ESP, AH, IKE = Protocol.ESP, Protocol.AH, Protocol.IKE


# --- children ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("child", [CHILD, PFS], ids=["plain", "with-ke"])
def test_a_child(child: ChildContext) -> None:
    # nSG -> MN  CREATE_CHILD_SA(7)  N(REKEY_SA), SA, Ni, [KEi,] TSi, TSr;  MN -> nSG  SA, Nr, [KEr,] TSi, TSr
    # nSG -> MN  INFORMATIONAL(8)    D(old);                                MN -> nSG  D(old)
    machine, peer = child_rekey(child), Peer()
    event = run(machine, peer)
    create, delete = peer.requests
    [nonce] = of(create, NoncePayload)
    assert isinstance(nonce, NoncePayload)
    assert event == ChildRekeyed(
        replace(
            child,
            initiator=True,
            spi_in=NEW,
            spi_out=PEERS,
            nonce_i=nonce.nonce,
            nonce_r=peer.nonce,
            secret=peer.secret,
            inbound=ReplayState(window=32),
            outbound=ReplayState(),
            lifetime=Lifetime(),
        ),
        deleted=True,
    )
    assert [(m.header.exchange, m.header.message_id) for m in (create, delete)] == [
        (Exchange.CREATE_CHILD_SA, 7),
        (Exchange.INFORMATIONAL, 8),
    ]
    kinds = [payload.type for payload in create.payloads]
    ke = [Payload.KE] if child is PFS else []
    assert kinds == [Payload.NOTIFY, Payload.SA, Payload.NONCE, *ke, Payload.TSI, Payload.TSR]
    assert create.payloads[0] == NotifyPayload(Notify.REKEY_SA, protocol=ESP, spi=child.spi_in)
    assert delete.payloads == (DeletePayload(ESP, (child.spi_in,)),)
    report = machine.report
    assert (report.messages, report.requests, report.retransmissions) == (4, 2, 0)
    # both ends derive the same keys, each for its own direction
    assert isinstance(event, ChildRekeyed)
    mine = child_keys(IKE_SA, event.child)
    theirs = replace(event.child, initiator=False, spi_in=PEERS, spi_out=NEW, secret=peer.secret)
    assert child_keys(IKE_SA, theirs) == mine


def test_the_offer_on_the_wire() -> None:
    child = replace(
        PFS, encr=Encr.AES_CBC, encr_bits=256, integ=Integ.HMAC_SHA2_256_128, esn=True, mode=Mode.TRANSPORT
    )
    machine, peer = child_rekey(child), Peer()
    event = run(machine, peer)
    [sa] = of(peer.requests[0], SaPayload)
    assert sa == SaPayload(
        (
            Proposal(
                1,
                ESP,
                (
                    Transform.encr(Encr.AES_CBC, 256),
                    Transform(TransformType.INTEG, Integ.HMAC_SHA2_256_128),
                    Transform(TransformType.KE, KeMethod.ECP_256),
                    Transform(TransformType.ESN, 1),
                ),
                NEW,
            ),
        )
    )
    assert peer.requests[0].notifies(Notify.USE_TRANSPORT_MODE)
    assert isinstance(event, ChildRekeyed)
    assert event.child.inbound.esn
    assert event.child.mode is Mode.TRANSPORT


def test_authentication_headers() -> None:
    child = replace(CHILD, protocol=AH, encr=Encr(0), encr_bits=0, integ=Integ.HMAC_SHA2_256_128)
    machine, peer = child_rekey(child), Peer()
    assert isinstance(run(machine, peer), ChildRekeyed)
    [sa] = of(peer.requests[0], SaPayload)
    assert isinstance(sa, SaPayload)
    assert [t.type for t in sa.proposals[0].transforms] == [TransformType.INTEG, TransformType.ESN]
    assert peer.requests[1].payloads == (DeletePayload(AH, (child.spi_in,)),)


def test_a_key_exchange_can_be_demanded() -> None:
    event = run(child_rekey(ke=KeMethod.CURVE_25519), Peer())
    assert isinstance(event, ChildRekeyed)
    assert event.child.ke is KeMethod.CURVE_25519
    assert len(event.child.secret) == 32


def test_the_same_octets_make_the_same_messages() -> None:
    fresh = secrets.token_bytes(REKEY_OCTETS)
    first, again = child_rekey(PFS, fresh=fresh), child_rekey(PFS, fresh=fresh)
    assert first.to_send(0) == again.to_send(5)
    assert child_rekey(PFS).to_send(0) != first.to_send(0)


def test_selectors_may_be_narrowed() -> None:
    dynamic = TrafficSelector(ip_address("10.3.0.1"), ip_address("10.3.0.1"), dynamic=True)
    wide = TrafficSelector(ip_address("10.1.0.0"), ip_address("10.1.255.255"))
    child = replace(CHILD, local_ts=(wide,), remote_ts=(dynamic, wide))
    narrow = TrafficSelector(ip_address("10.1.7.0"), ip_address("10.1.7.255"), 17, 5000, 5000)

    def twist(payloads: list[AnyPayload]) -> list[AnyPayload]:
        kept = [payload for payload in payloads if not isinstance(payload, TsPayload)]
        plain = replace(dynamic, dynamic=False)
        return [*kept, TsPayload(Payload.TSI, (narrow,)), TsPayload(Payload.TSR, (wide, plain))]

    peer = Peer()
    peer.twist = twist
    event = run(child_rekey(child), peer)
    assert isinstance(event, ChildRekeyed)
    assert event.child.local_ts == (narrow,)
    assert event.child.remote_ts == (dynamic, wide)  # the same set: as it was


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": 6},
        {"start_port": 4999},
        {"end_port": 6001},
        {"start": ip_address("10.0.255.255")},
        {"end": ip_address("10.2.0.0")},
    ],
)
def test_selectors_may_not_be_widened(changes: dict[str, Any]) -> None:
    ours = TrafficSelector(ip_address("10.1.0.0"), ip_address("10.1.255.255"), 17, 5000, 6000)
    peer = Peer()
    peer.twist = lambda payloads: [
        TsPayload(p.type, (replace(ours, **changes),)) if isinstance(p, TsPayload) else p for p in payloads
    ]
    event = run(child_rekey(replace(CHILD, local_ts=(ours,), remote_ts=(ours,))), peer)
    assert isinstance(event, RekeyFailed)


# --- IKE_SAs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initiator", [False, True])
@pytest.mark.parametrize(
    ("encr", "bits", "integ"),
    [(Encr.AES_GCM_16, 256, Integ.NONE), (Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128)],
)
def test_an_ike_sa(initiator: bool, encr: Encr, bits: int, integ: Integ) -> None:
    # nSG -> MN  CREATE_CHILD_SA(7)  SA, Ni, KEi;  MN -> nSG  SA, Nr, KEr
    # nSG -> MN  INFORMATIONAL(8)    D();          MN -> nSG  nothing
    old = replace(IKE_SA, initiator=initiator, encr=encr, encr_bits=bits, integ=integ)
    machine, peer = ike_rekey(old), Peer(old)
    event = run(machine, peer)
    create, delete = peer.requests
    [nonce] = of(create, NoncePayload)
    assert isinstance(nonce, NoncePayload)
    new = replace(
        old,
        spi_i=b"new-ours",
        spi_r=b"peers-ik",
        initiator=True,
        nonce_i=nonce.nonce,
        nonce_r=peer.nonce,
        secret=peer.secret,
        old_skd=sk_keys(old).sk_d,
        old_prf=old.prf,
    )
    assert event == IkeRekeyed(new, deleted=True)
    assert delete.payloads == (DeletePayload(IKE),)
    assert [payload.type for payload in create.payloads] == [Payload.SA, Payload.NONCE, Payload.KE]
    [sa] = of(create, SaPayload)
    assert isinstance(sa, SaPayload)
    [proposal] = sa.proposals
    assert (proposal.protocol, proposal.spi) == (IKE, b"new-ours")
    types = [transform.type for transform in proposal.transforms]
    assert types == [
        TransformType.ENCR,
        *([TransformType.INTEG] if integ is not Integ.NONE else []),
        TransformType.PRF,
        TransformType.KE,
    ]


# --- between answer and Delete ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [child_rekey, ike_rekey])
def test_the_old_sa_stays_until_the_new_one_is_installed(make: Callable[[], ChildRekey | IkeRekey]) -> None:
    machine, peer, air = make(), Peer(), Air()
    with pytest.raises(StateError):
        machine.installed()
    air.run(machine, peer, until=100)
    assert (machine.state, machine.next_timer(), len(peer.requests)) == (RekeyState.MADE, None, 1)
    made = machine.next_event()
    machine.installed()
    air.run(machine, peer, until=1)
    result = machine.next_event()
    if isinstance(made, ChildMade):
        assert result == ChildRekeyed(made.child, deleted=True)
    else:
        assert isinstance(made, IkeMade)
        assert result == IkeRekeyed(made.generation, deleted=True)
    with pytest.raises(StateError):
        machine.installed()


def test_a_child_that_cannot_be_installed_is_given_back() -> None:
    machine, peer, air = child_rekey(), Peer(), Air()
    air.run(machine, peer, until=1)
    machine.abandon("the kernel has no memory")
    air.run(machine, peer, until=1)
    assert peer.requests[1].payloads == (DeletePayload(ESP, (NEW,)),)
    assert results(machine) == [RekeyFailed(Notify.TEMPORARY_FAILURE, "the kernel has no memory")]
    with pytest.raises(StateError):
        machine.abandon("again")
    other = ike_rekey()
    Air().run(other, Peer(), until=1)
    with pytest.raises(StateError):
        other.abandon("it cannot")


def test_what_the_caller_decides_has_an_iv_of_its_own() -> None:
    """It may decide otherwise after a crash, with the same octets: GCM is broken by one IV for two texts."""
    fresh, ivs = secrets.token_bytes(REKEY_OCTETS), set[bytes]()
    for decide in (lambda machine: machine.installed(), lambda machine: machine.abandon("no memory")):
        machine = child_rekey(fresh=fresh)
        Air().run(machine, Peer(), until=1)
        decide(machine)
        [(datagram, _)] = machine.to_send(2)
        ivs.add(strip_marker(datagram, NSG, MN)[32:40])
    assert len(ivs) == 2


@pytest.mark.parametrize("make", [child_rekey, ike_rekey])
def test_message_ids_are_skipped_between_answer_and_delete_only(
    make: Callable[[], ChildRekey | IkeRekey],
) -> None:
    machine, peer, air = make(), Peer(), Air()
    machine.to_send(0)
    with pytest.raises(StateError):
        machine.skip(1)
    machine = make()
    air.run(machine, peer, until=1)
    machine.skip(2)
    peer.expected += 2
    machine.installed()
    with pytest.raises(StateError):
        machine.skip(1)
    air.run(machine, peer, until=1)
    assert peer.requests[1].header.message_id == 10
    assert machine.state is RekeyState.DONE


# --- links, limits, arguments ------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([0.0, 0.2, 0.5]), st.booleans(), st.sampled_from([None, 200]))
def test_on_a_bad_link(seed: int, loss: float, of_child: bool, limit: int | None) -> None:
    peer = Peer(errors=(TEMPORARY,) if seed % 3 == 0 else ())
    machine = child_rekey(PFS, limit=limit) if of_child else ike_rekey(limit=limit)
    Air(seed, loss=loss, double=0.3, delay=(0.0, 2.0)).run(Caller(machine), peer, until=100)
    [event] = results(machine)
    created = [m for m in peer.requests if m.header.exchange is Exchange.CREATE_CHILD_SA]
    if isinstance(event, ChildRekeyed):
        assert event.child.secret == peer.secret
        assert len(created) == 1 + (seed % 3 == 0)
    elif isinstance(event, IkeRekeyed):
        assert event.generation.secret == peer.secret
    else:
        assert isinstance(event, Silent)


def test_requests_of_the_peer_wait_for_charon() -> None:
    machine, peer = child_rekey(), Peer()
    machine.to_send(0)
    head = IkeHeader(SA.spi_i, SA.spi_r, Exchange.INFORMATIONAL, 0, initiator=True, response=False)
    machine.receive(add_marker(seal_message(peer.out, head, [], bytes(8)), MN, NSG), MN, 0)
    assert (machine.ignored, machine.state) == (0, RekeyState.ASKING)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_authentic_nonsense_never_raises(data: st.DataObject) -> None:
    """Some payloads of a good answer, in any order, some of them twice."""
    peer = Peer()

    def twist(payloads: list[AnyPayload]) -> list[AnyPayload]:
        more = [NotifyPayload(Notify.TEMPORARY_FAILURE), KePayload(KeMethod.ECP_256, b"\1" * 64)]
        return data.draw(st.lists(st.sampled_from([*payloads, *more]), max_size=7))

    peer.twist = twist
    machine = child_rekey(PFS) if data.draw(st.booleans()) else ike_rekey()
    Air().run(Caller(machine), peer, until=100)
    assert machine.done


@pytest.mark.parametrize(
    "changes",
    [
        {"ipcomp": 2},
        {"mode": Mode.BEET},
        {"add_kes": b"\0\x24"},
        {"protocol": Protocol.NONE},
    ],
)
def test_children_that_are_not_covered(changes: dict[str, object]) -> None:
    with pytest.raises(RefusedError) as caught:
        child_rekey(replace(CHILD, **changes))  # type: ignore[arg-type]
    assert caught.value.status is Status.NOT_COVERED
    assert caught.value.hint


def test_what_else_is_refused() -> None:
    with pytest.raises(RefusedError) as caught:
        ike_rekey(replace(IKE_SA, add_kes=b"\0\x24"))
    assert caught.value.status is Status.NOT_COVERED
    with pytest.raises(RefusedError) as caught:
        child_rekey(ke=KeMethod.ML_KEM_768)
    assert caught.value.status is Status.ALGORITHM
    for wrong in ({"new_spi": b"\0\0\0\1"}, {"new_spi": b"eightoct"}, {"fresh": b"short"}):
        with pytest.raises(UsageError):
            child_rekey(**wrong)  # type: ignore[arg-type]
    for wrong in ({"new_spi": bytes(8)}, {"new_spi": NEW}):
        with pytest.raises(UsageError):
            ike_rekey(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        ike_rekey(SA)  # nobody knows with which method it was made


@pytest.mark.parametrize("state", RekeyState)
@pytest.mark.parametrize("what", RekeyInput)
def test_every_cell_of_the_table(state: RekeyState, what: RekeyInput) -> None:
    expected = {
        (RekeyState.NEW, RekeyInput.START): RekeyState.ASKING,
        (RekeyState.ASKING, RekeyInput.MADE): RekeyState.MADE,
        (RekeyState.ASKING, RekeyInput.BUSY): RekeyState.PAUSED,
        (RekeyState.ASKING, RekeyInput.ERROR): RekeyState.FAILED,
        (RekeyState.ASKING, RekeyInput.USELESS): RekeyState.DISCARDING,
        (RekeyState.ASKING, RekeyInput.GIVE_UP): RekeyState.SILENT,
        (RekeyState.PAUSED, RekeyInput.PAUSE_OVER): RekeyState.ASKING,
        (RekeyState.MADE, RekeyInput.INSTALLED): RekeyState.DELETING,
        (RekeyState.MADE, RekeyInput.ABANDON): RekeyState.DISCARDING,
        (RekeyState.DELETING, RekeyInput.DELETED): RekeyState.DONE,
        (RekeyState.DELETING, RekeyInput.GIVE_UP): RekeyState.DONE,
        (RekeyState.DISCARDING, RekeyInput.DELETED): RekeyState.FAILED,
        (RekeyState.DISCARDING, RekeyInput.GIVE_UP): RekeyState.FAILED,
    }
    assert TABLE.get((state, what), (state,)) == (expected.get((state, what), state),)
