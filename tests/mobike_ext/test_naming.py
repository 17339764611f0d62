"""naming.py: who agrees to which names, what answers say, and what becomes of contexts and keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.hmac import HMAC

from ikectx.errors import UsageError, WireError
from ikectx.numbers import Exchange, Notify, Protocol
from ikectx.sa.keys import child_keys, sk_keys, skeyseed
from ikectx.wire.ikev2 import IkeHeader, IkeMessage
from ikectx.wire.payloads import NotifyPayload
from mobike_ext.naming import (
    MOST,
    Decision,
    Renaming,
    answered,
    ask,
    ask_peer,
    asked_for,
    decide,
    mirrored,
    renamed_context,
    renamed_generation,
    renamed_ike,
    supported_by,
)
from mobike_ext.notify import Reason, UpdateSpi, UpdateSpiRefused, UpdateSpiSupported
from tests.air import Names
from tests.mobile_ike import SA
from tests.peers import a_context

ESP, AH, IKE = Protocol.ESP, Protocol.AH, Protocol.IKE
THEIRS, OURS = b"\xc1\0\0\1", b"\xc2\0\0\2"
"""SPIs as the side that is asked sees them: we send on THEIRS, receive on OURS."""
NEW, OTHER = b"\xc9\0\0\1", b"\xc9\0\0\2"
HEADER = IkeHeader(b"initiatr", b"responde", Exchange.INFORMATIONAL, 5, initiator=True, response=False)


def names(**changes: object) -> Names:
    sas = {(ESP, False, THEIRS), (ESP, True, OURS), (AH, False, THEIRS), (IKE, False, b"responde")}
    return Names(sas | {(IKE, True, b"initiatr")}, **changes)  # type: ignore[arg-type]


def message(*payloads: NotifyPayload) -> IkeMessage:
    return IkeMessage(HEADER, payloads)


# --- the side that is asked ----------------------------------------------------------------------------


def test_all_kinds_at_once() -> None:
    asked = (
        ask(ESP, THEIRS, NEW),
        ask_peer(ESP, OURS),
        ask(AH, THEIRS, NEW),
        ask(IKE, b"responde", b"newnamed"),
        ask_peer(IKE, b"initiatr"),
    )
    world = names()
    decision = decide(asked, world)
    assert not decision.reasons
    assert decision.pairs == (
        Renaming(ESP, False, THEIRS, NEW),
        Renaming(ESP, True, OURS, world.reserved[OURS]),
        Renaming(AH, False, THEIRS, NEW),
        Renaming(IKE, False, b"responde", b"newnamed"),
        Renaming(IKE, True, b"initiatr", world.reserved[b"initiatr"]),
    )
    notifies = decision.payloads()
    assert [UpdateSpi.parse(one, answer=True).new for one in notifies] == [p.new for p in decision.pairs]
    # what the other side makes of it: the same names, seen from there
    theirs = answered(asked, message(*notifies))
    assert theirs is not None
    assert [replace(one, inbound=not one.inbound) for one in theirs.pairs] == list(decision.pairs)


@pytest.mark.parametrize(
    ("asked", "changes", "reasons"),
    [
        ([ask(ESP, OURS, NEW)], {}, [1]),  # we receive on it: R would be right
        ([ask_peer(ESP, THEIRS)], {}, [1]),
        ([ask(ESP, b"\xc1\0\0\7", NEW)], {}, [1]),
        ([ask(AH, OURS, NEW)], {}, [1]),
        ([ask(IKE, b"initiatr", b"newnamed")], {}, [1]),
        ([ask(ESP, THEIRS, NEW)], {"taken": {NEW}}, [2]),
        ([ask_peer(ESP, OURS)], {"full": True}, [2]),
        ([ask(ESP, THEIRS, NEW)], {"objections": {THEIRS: Reason.NOT_ALLOWED}}, [3]),
        ([ask(ESP, THEIRS, NEW)], {"objections": {THEIRS: Reason.BUSY}}, [4]),
        ([ask(ESP, THEIRS, NEW), ask(ESP, THEIRS, OTHER)], {}, [3, 3]),
        ([ask(ESP, THEIRS, NEW), ask_peer(ESP, OURS)], {"objections": {OURS: Reason.BUSY}}, [4, 4]),
        (
            [ask(ESP, THEIRS, NEW), ask_peer(ESP, OURS), ask(AH, b"\xc1\0\0\7", NEW)],
            {"objections": {OURS: Reason.BUSY}},
            [4, 4, 1],
        ),
        ([ask(ESP, THEIRS, NEW)] * (MOST + 1), {}, [3] * (MOST + 1)),
    ],
)
def test_one_refusal_refuses_all(
    asked: list[UpdateSpi], changes: dict[str, object], reasons: list[int]
) -> None:
    world = names(**changes)
    decision = decide(tuple(asked), world)
    assert (decision.pairs, list(decision.reasons)) == ((), reasons)
    assert not world.reserved
    notifies = decision.payloads()
    assert [UpdateSpiRefused.parse(one).reason for one in notifies] == reasons
    heard = answered(asked, message(*notifies))
    assert heard == Decision(tuple(asked), (), tuple(map(Reason, reasons)))


def test_two_sas_cannot_get_one_name() -> None:
    world = names()
    world.sas.add((ESP, False, b"\xc1\0\0\3"))
    two = (ask(ESP, THEIRS, NEW), ask(ESP, b"\xc1\0\0\3", NEW))
    assert decide(two, world).reasons == (Reason.UNUSABLE, Reason.UNUSABLE)
    # of ESP and AH they can
    assert decide((ask(ESP, THEIRS, NEW), ask(AH, THEIRS, NEW)), world).pairs


def test_a_request_that_is_not_understood_asks_for_nothing() -> None:
    good = ask(ESP, THEIRS, NEW).serialize()
    assert asked_for(message(good)) == (ask(ESP, THEIRS, NEW),)
    assert asked_for(message(good, replace(good, data=b"\x02" + good.data[1:]))) == ()
    assert asked_for(message()) == ()


def test_mirrored() -> None:
    pairs = (Renaming(ESP, False, THEIRS, NEW), Renaming(ESP, True, OURS, OTHER))
    assert mirrored(pairs) == (ask_peer(ESP, THEIRS), ask(ESP, OURS, OTHER))


# --- the side that asks --------------------------------------------------------------------------------

ASKED = (ask(ESP, THEIRS, NEW), ask_peer(ESP, OURS))
YES = ask(ESP, THEIRS, NEW).serialize()
CHOSEN = UpdateSpi(ESP, OURS, OTHER, choose=True).serialize()
NO = UpdateSpiRefused(ESP, THEIRS, Reason.BUSY).serialize()


def test_answers() -> None:
    assert answered(ASKED, message()) is None
    assert answered(ASKED, message(NotifyPayload(Notify.COOKIE2, bytes(16)))) is None
    found = answered(ASKED, message(NotifyPayload(Notify(50000)), YES, CHOSEN))
    assert found is not None
    assert found.pairs == (Renaming(ESP, True, THEIRS, NEW), Renaming(ESP, False, OURS, OTHER))
    # one refusal among others refuses, however the rest is answered
    half = answered(ASKED, message(NO, CHOSEN))
    assert half is not None
    assert (half.pairs, half.reasons) == ((), (Reason.BUSY,))


@pytest.mark.parametrize(
    "notifies",
    [
        [YES],
        [YES, CHOSEN, CHOSEN],
        [CHOSEN, YES],
        [YES, YES],
        [ask(ESP, THEIRS, OTHER).serialize(), CHOSEN],
        [ask(AH, THEIRS, NEW).serialize(), CHOSEN],
        [YES, ask_peer(ESP, OURS).serialize()],
        [YES, ask(ESP, OURS, OTHER).serialize()],
        [NO, UpdateSpiRefused(ESP, THEIRS, Reason.BUSY).serialize()],
        [NO, UpdateSpiRefused(AH, OURS, Reason.BUSY).serialize()],
        [YES, replace(CHOSEN, data=CHOSEN.data[:-1])],
        [ask(ESP, OURS, THEIRS).serialize(), CHOSEN],  # it names as new what was asked about
    ],
)
def test_answers_that_make_no_sense(notifies: list[NotifyPayload]) -> None:
    with pytest.raises(WireError):
        answered(ASKED, message(*notifies))


def test_supported_by() -> None:
    one = UpdateSpiSupported().serialize()
    assert supported_by(message()) == 0
    assert supported_by(message(replace(one, data=b""), one)) == 1
    assert supported_by(message(replace(one, data=b"\7more"))) == 7


# --- what becomes of the SAs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spi_i", "spi_r"), [(b"newnamei", None), (None, b"newnamer"), (b"newnamei", b"newnamer")]
)
def test_keys_of_a_renamed_ike_sa(spi_i: bytes | None, spi_r: bytes | None) -> None:
    new = renamed_generation(SA, spi_i=spi_i, spi_r=spi_r)
    assert (new.spi_i, new.spi_r) == (spi_i or SA.spi_i, spi_r or SA.spi_r)
    assert skeyseed(new) == skeyseed(SA)
    # by hand: prf+(SKEYSEED, Ni | Nr | SPIi' | SPIr')
    wanted, last = b"", b""
    for count in range(1, 12):
        mac = HMAC(skeyseed(SA).reveal(), hashes.SHA256())
        mac.update(last + SA.nonce_i + SA.nonce_r + new.spi_i + new.spi_r + bytes([count]))
        last = mac.finalize()
        wanted += last
    keys = sk_keys(new)
    got = b"".join(key.reveal() for key in (keys.sk_d, keys.sk_ei, keys.sk_er, keys.sk_pi, keys.sk_pr))
    assert got == wanted[: len(got)]
    before = sk_keys(SA)
    assert all(getattr(keys, name) != getattr(before, name) for name in ("sk_d", "sk_ei", "sk_er"))


def test_a_rekeyed_ike_sa_is_renamed_from_the_same_skeyseed() -> None:
    rekeyed = replace(SA, old_skd=sk_keys(SA).sk_d, old_prf=SA.prf)
    new = renamed_generation(rekeyed, spi_r=b"newnamer")
    assert skeyseed(new) == skeyseed(rekeyed) != skeyseed(SA)


def test_what_is_no_renaming_of_an_ike_sa() -> None:
    for spis in ({}, {"spi_i": SA.spi_i}, {"spi_r": bytes(8)}, {"spi_r": b"short"}):
        with pytest.raises((UsageError, ValueError)):
            renamed_generation(SA, **spis)
    assert renamed_ike(SA, [Renaming(ESP, True, OURS, NEW)]) is None
    with pytest.raises(UsageError):
        renamed_ike(SA, [Renaming(IKE, True, SA.spi_i, b"newnamed")])


@pytest.mark.parametrize("initiator", [False, True])
def test_either_end_may_be_the_initiator(initiator: bool) -> None:
    generation = replace(SA, initiator=initiator)
    mine, theirs = (SA.spi_i, SA.spi_r) if initiator else (SA.spi_r, SA.spi_i)
    new = renamed_ike(
        generation, [Renaming(IKE, True, mine, b"newmine!"), Renaming(IKE, False, theirs, b"theirs!!")]
    )
    assert new is not None
    assert (new.spi_i, new.spi_r) == ((b"newmine!", b"theirs!!") if initiator else (b"theirs!!", b"newmine!"))


def test_a_context_under_its_new_names() -> None:
    context = a_context(7)
    (child,) = context.children
    pairs = [Renaming(ESP, True, child.spi_in, NEW), Renaming(ESP, False, child.spi_out, OTHER)]
    new = renamed_context(context, pairs)
    assert new == replace(context, children=(replace(child, spi_in=NEW, spi_out=OTHER),))
    # ESP keys do not depend on the SPIs
    assert child_keys(new.current, new.children[0]) == child_keys(context.current, child)


def test_a_context_whose_ike_sa_is_renamed() -> None:
    context = a_context(7)
    ours = context.spis[1]  # the gateway is the responder
    new = renamed_context(context, [Renaming(IKE, True, ours, b"newnamed")])
    assert new.spis == (context.spis[0], b"newnamed")
    assert new.generations[:-1] == context.generations
    assert (new.mid_initiator, new.mid_responder) == (0, 0)
    # its child goes on with the keys it has
    (child,) = new.children
    assert child_keys(new.generations[child.generation], child) == child_keys(
        context.current, context.children[0]
    )


def test_a_context_without_that_spi() -> None:
    with pytest.raises(UsageError):
        renamed_context(a_context(7), [Renaming(ESP, True, NEW, OTHER)])
