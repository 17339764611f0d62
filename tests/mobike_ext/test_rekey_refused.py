"""rekey.py: peers that refuse a rekey, are silent about it, or give an answer of no use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address

import pytest

from ikectx.numbers import Encr, Integ, KeMethod, Notify, Payload, Protocol
from ikectx.sa.context import TrafficSelector
from ikectx.wire.payloads import (
    AnyPayload,
    DeletePayload,
    KePayload,
    NoncePayload,
    NotifyPayload,
    RawSelector,
    SaPayload,
    Transform,
    TransformType,
    TsPayload,
)
from mobike_ext.dh import known
from mobike_ext.rekey import (
    MOST_METHODS,
    PAUSES,
    ChildRekey,
    ChildRekeyed,
    IkeRekey,
    IkeRekeyed,
    RekeyFailed,
    RekeyState,
)
from mobike_ext.requester import Silent
from tests.air import Air
from tests.mobile_ike import MN
from tests.rekey_peer import (
    IKE_SA,
    NEW,
    PFS,
    TEMPORARY,
    Caller,
    Peer,
    Twist,
    child_rekey,
    ike_rekey,
    of,
    results,
    run,
)

ESP, AH = Protocol.ESP, Protocol.AH


# --- errors ------------------------------------------------------------------------------------------------

NO_PROPOSAL = NotifyPayload(Notify.NO_PROPOSAL_CHOSEN)


def wants(method: KeMethod) -> NotifyPayload:
    return NotifyPayload(Notify.INVALID_KE_PAYLOAD, method.to_bytes(2))


@pytest.mark.parametrize(
    "notify",
    [
        Notify.NO_PROPOSAL_CHOSEN,
        Notify.CHILD_SA_NOT_FOUND,
        Notify.NO_ADDITIONAL_SAS,
        Notify.TS_UNACCEPTABLE,
        Notify.INVALID_SYNTAX,
        Notify.INVALID_KE_PAYLOAD,
        Notify(9999),
    ],
)
@pytest.mark.parametrize("make", [lambda: child_rekey(PFS), ike_rekey])
def test_errors_end_it(notify: Notify, make: Callable[[], ChildRekey | IkeRekey]) -> None:
    machine, peer = make(), Peer(errors=(NotifyPayload(notify),))
    assert run(machine, peer) == RekeyFailed(notify)
    assert (machine.state, machine.report.requests, len(peer.requests)) == (RekeyState.FAILED, 1, 1)


@pytest.mark.parametrize("make", [child_rekey, ike_rekey])
def test_patience(make: Callable[[], ChildRekey | IkeRekey]) -> None:
    machine, peer = make(), Peer(errors=(TEMPORARY,) * len(PAUSES))
    assert isinstance(run(machine, peer), ChildRekeyed | IkeRekeyed)
    assert machine.report.requests == len(PAUSES) + 2
    machine, peer = make(), Peer(errors=(TEMPORARY,) * (len(PAUSES) + 1))
    assert run(machine, peer) == RekeyFailed(Notify.TEMPORARY_FAILURE)


def test_the_pauses() -> None:
    machine, peer, air = child_rekey(), Peer(errors=(TEMPORARY,)), Air()
    air.run(Caller(machine), peer, until=0.5)
    assert machine.state is RekeyState.PAUSED
    assert machine.next_timer() == pytest.approx(0.02 + PAUSES[0])
    assert machine.to_send(0.6) == []
    machine.handle_timer(0.7)
    assert machine.state is RekeyState.PAUSED


@pytest.mark.parametrize("make", [lambda: child_rekey(PFS), ike_rekey])
def test_another_key_exchange_is_wanted(make: Callable[[], ChildRekey | IkeRekey]) -> None:
    machine, peer = make(), Peer(errors=(wants(KeMethod.MODP_2048),))
    event = run(machine, peer)
    made = event.child if isinstance(event, ChildRekeyed) else event.generation  # type: ignore[union-attr]
    assert made.ke is KeMethod.MODP_2048
    assert made.secret == peer.secret
    [ke] = of(peer.requests[1], KePayload)
    assert isinstance(ke, KePayload)
    assert (ke.method, len(ke.data)) == (KeMethod.MODP_2048, 256)
    assert peer.requests[1].header.message_id == 8


@pytest.mark.parametrize(
    "errors",
    [
        (wants(KeMethod.ML_KEM_768),),
        (wants(KeMethod.ECP_256),),  # what was offered
        (wants(KeMethod.ECP_384), wants(KeMethod.ECP_256)),
        (wants(KeMethod.NONE),),
    ],
)
def test_a_key_exchange_that_cannot_be(errors: tuple[NotifyPayload, ...]) -> None:
    assert run(child_rekey(PFS), Peer(errors=errors)) == RekeyFailed(Notify.INVALID_KE_PAYLOAD)


def test_a_peer_that_wants_one_key_exchange_after_the_other() -> None:
    generation = replace(IKE_SA, encr=Encr.AES_CBC, encr_bits=256, integ=Integ.HMAC_SHA2_256_128)
    wanted = tuple(wants(method) for method in KeMethod if known(method) and method is not PFS.ke)
    machine = child_rekey(PFS, generation)
    peer = Peer(generation, errors=(*(TEMPORARY,) * len(PAUSES), *wanted))
    assert run(machine, peer) == RekeyFailed(Notify.INVALID_KE_PAYLOAD)
    assert len(peer.requests) == len(PAUSES) + MOST_METHODS
    few = wanted[: MOST_METHODS - 1]
    peer = Peer(generation, errors=(*(TEMPORARY,) * len(PAUSES), *few))
    assert isinstance(run(child_rekey(PFS, generation), peer), ChildRekeyed)


def test_a_peer_that_insists_on_a_key_exchange() -> None:
    machine, peer = child_rekey(), Peer(errors=(NO_PROPOSAL,))
    event = run(machine, peer)
    assert isinstance(event, ChildRekeyed)
    assert event.child.ke is IKE_SA.ke
    assert run(child_rekey(), Peer(errors=(NO_PROPOSAL,) * 2)) == RekeyFailed(Notify.NO_PROPOSAL_CHOSEN)
    # not where the caller, or the old child, said which
    assert isinstance(run(child_rekey(ke=KeMethod.NONE), Peer(errors=(NO_PROPOSAL,))), RekeyFailed)


@pytest.mark.parametrize("make", [child_rekey, ike_rekey])
def test_silence(make: Callable[[], ChildRekey | IkeRekey]) -> None:
    machine = make()
    Air().run(machine)
    assert results(machine) == [Silent(3)]
    assert (machine.state, machine.report.requests) == (RekeyState.SILENT, 1)


@pytest.mark.parametrize("make", [child_rekey, ike_rekey])
def test_the_new_sa_stands_where_the_delete_is_not_answered(
    make: Callable[[], ChildRekey | IkeRekey],
) -> None:
    machine, peer, air = make(), Peer(), Air()
    air.drop = lambda source, datagram: source == MN and len(peer.requests) > 1
    air.run(Caller(machine), peer)
    [event] = results(machine)
    assert isinstance(event, ChildRekeyed | IkeRekeyed)
    assert not event.deleted
    assert machine.report.requests == 2


# --- answers of no use -------------------------------------------------------------------------------------


def without(kind: type) -> Twist:
    return lambda payloads: [payload for payload in payloads if not isinstance(payload, kind)]


def other_sa(**changes: object) -> Twist:
    def twist(payloads: list[AnyPayload]) -> list[AnyPayload]:
        return [
            SaPayload((replace(p.proposals[0], **changes),)) if isinstance(p, SaPayload) else p  # type: ignore[arg-type]
            for p in payloads
        ]

    return twist


def selectors(*found: TrafficSelector | RawSelector) -> Twist:
    return lambda payloads: [TsPayload(p.type, found) if isinstance(p, TsPayload) else p for p in payloads]


ANYTHING = TrafficSelector(ip_address("0.0.0.0"), ip_address("255.255.255.255"))
SIX = TrafficSelector(ip_address("2001:db8::"), ip_address("2001:db8::1"))

USELESS: list[Twist] = [
    without(SaPayload),
    without(NoncePayload),
    without(KePayload),
    other_sa(spi=b"\0\0\0\1"),
    other_sa(spi=b""),
    other_sa(protocol=AH),
    other_sa(transforms=(Transform.encr(Encr.AES_GCM_16, 256),)),
    lambda payloads: [*payloads, NoncePayload(bytes(32))],
    lambda payloads: [
        KePayload(KeMethod.ECP_256, bytes(64)) if p.type == Payload.KE else p for p in payloads
    ],
    lambda payloads: [KePayload(KeMethod.ECP_384, b"") if p.type == Payload.KE else p for p in payloads],
]
CHILD_ONLY: list[Twist] = [
    without(TsPayload),
    selectors(),
    selectors(ANYTHING),
    selectors(SIX),
    selectors(RawSelector(9, 0, b"?")),
    lambda payloads: [*payloads, NotifyPayload(Notify.USE_TRANSPORT_MODE)],
]


@pytest.mark.parametrize("twist", USELESS + CHILD_ONLY)
def test_a_child_that_is_of_no_use_is_deleted_again(twist: Twist) -> None:
    peer = Peer()
    peer.twist = twist
    machine = child_rekey(PFS)
    event = run(machine, peer)
    assert isinstance(event, RekeyFailed)
    assert event.notify is Notify.INVALID_SYNTAX
    assert event.why
    assert peer.requests[1].payloads == (DeletePayload(ESP, (NEW,)),)
    assert (machine.state, machine.report.requests) == (RekeyState.FAILED, 2)


@pytest.mark.parametrize("twist", USELESS)
def test_an_ike_sa_that_is_of_no_use(twist: Twist) -> None:
    peer = Peer()
    peer.twist = twist
    event = run(ike_rekey(), peer)
    assert isinstance(event, RekeyFailed)
    assert len(peer.requests) == 1


def test_a_delete_of_what_is_of_no_use_may_be_lost() -> None:
    peer, air = Peer(), Air()
    peer.twist = without(SaPayload)
    machine = child_rekey()
    air.drop = lambda source, datagram: source == MN and len(peer.requests) > 1
    air.run(Caller(machine), peer)
    [event] = results(machine)
    assert isinstance(event, RekeyFailed)


def test_proposals_may_say_that_there_is_no_key_exchange() -> None:
    def twist(payloads: list[AnyPayload]) -> list[AnyPayload]:
        return [
            SaPayload(
                (
                    replace(
                        p.proposals[0],
                        transforms=(*reversed(p.proposals[0].transforms), Transform(TransformType.KE, 0)),
                    ),
                )
            )
            if isinstance(p, SaPayload)
            else p
            for p in payloads
        ]

    peer = Peer()
    peer.twist = twist
    assert isinstance(run(child_rekey(), peer), ChildRekeyed)
