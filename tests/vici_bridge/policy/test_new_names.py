"""Names of SAs that come to a gateway: what is taken, what they get, what is written down."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.engine.ports import MoveReport
from ikectx.errors import RefusedError, StoreError
from ikectx.sa.context import Secret
from ikectx.sa.keys import skeyseed
from tests.peers import a_context
from tests.vici_bridge.vici.test_views import VIEW, context
from vici_bridge.policy.new_names import (
    SPI_MAX,
    SPI_MIN,
    ChildPlan,
    Plan,
    Taken,
    clash,
    draw_ike_spi,
    draw_spi,
    own_spi,
    with_own_spi,
    without_exchange,
)
from vici_bridge.policy.present import Present
from vici_bridge.vici.views import sa_view

HERE = context()
CHILD = HERE.children[0]
LOCAL, REMOTE = HERE.local.address, HERE.remote.address
SEED = Secret(bytes(range(100, 132)))
NAMES = ChildPlan(CHILD.spi_in, CHILD.spi_out, b"new!", b"hold", b"out!")
PLAN = Plan(HERE.spis, b"our new.", (NAMES,), SEED)


def test_names_of_charons_sas() -> None:
    found = Present([sa_view("mn", VIEW)]).taken()
    assert found.pairs == {(bytes.fromhex(VIEW["initiator-spi"]), bytes.fromhex(VIEW["responder-spi"]))}  # type: ignore[arg-type]
    assert found.ike == {bytes.fromhex(VIEW["responder-spi"])}  # type: ignore[arg-type]
    assert found.esp == {(LOCAL, CHILD.spi_in), (REMOTE, CHILD.spi_out)}


@pytest.mark.parametrize(
    ("taken", "seen"),
    [
        (Taken(), (False, False, False)),
        (Taken(esp=frozenset({(LOCAL, CHILD.spi_in)})), (False, True, False)),
        (Taken(esp=frozenset({(REMOTE, CHILD.spi_out)})), (False, False, True)),
        # the same SPI to another address is another name
        (Taken(esp=frozenset({(REMOTE, CHILD.spi_in), (LOCAL, CHILD.spi_out)})), (False, False, False)),
        (Taken(ike=frozenset({HERE.spis[1]})), (True, False, False)),
        # the MN's SPI alone is no name of ours
        (Taken(ike=frozenset({HERE.spis[0]})), (False, False, False)),
        (Taken(pairs=frozenset({HERE.spis})), (True, False, False)),
    ],
)
def test_what_clashes(taken: Taken, seen: tuple[bool, bool, bool]) -> None:
    found = clash(HERE, taken)
    assert (found.ike, bool(found.inbound), bool(found.outbound)) == seen
    assert bool(found) is any(seen)


def test_a_clash_that_an_answer_cannot_mend() -> None:
    assert without_exchange(HERE, clash(HERE, Taken(esp=frozenset({(LOCAL, CHILD.spi_in)})))) == ""
    assert "the MN's" in without_exchange(HERE, clash(HERE, Taken(esp=frozenset({(REMOTE, CHILD.spi_out)}))))


def test_our_ike_spi_is_that_of_our_role() -> None:
    generation = HERE.current
    assert own_spi(generation) == generation.spi_r
    assert own_spi(replace(generation, initiator=True)) == generation.spi_i
    changed = with_own_spi(generation, b"12345678")
    assert (changed.spi_i, changed.spi_r) == (generation.spi_i, b"12345678")
    assert skeyseed(changed) == skeyseed(generation)
    assert with_own_spi(replace(generation, initiator=True), b"12345678").spi_i == b"12345678"


def test_what_stands_in_until_the_mn_agrees() -> None:
    shape = PLAN.shape(HERE)
    assert [(c.spi_in, c.spi_out) for c in shape.children] == [(b"hold", b"out!")]
    assert shape.spis == (HERE.spis[0], b"our new.")
    assert shape.children[0].generation == 0  # its keys are those of the name it came with
    assert (shape.mid_initiator, shape.mid_responder) == (0, 0)
    assert PLAN.left(HERE) == (NAMES,)
    assert PLAN.ike_left(HERE) == b"our new."
    # the child is agreed upon, the IKE_SA not yet
    now = replace(HERE, children=(replace(CHILD, spi_in=b"new!", spi_out=b"mn's"),), mid_initiator=4)
    half = replace(PLAN, told=now)
    assert [(c.spi_in, c.spi_out) for c in half.shape(HERE).children] == [(b"new!", b"mn's")]
    assert half.shape(HERE).spis == (HERE.spis[0], b"our new.")
    assert half.left(HERE) == ()
    assert half.ike_left(HERE) == b"our new."
    # both are
    done = replace(now, generations=(HERE.current, with_own_spi(HERE.current, b"our new.")))
    assert replace(PLAN, told=done).shape(HERE).generations == done.generations
    assert replace(PLAN, told=done).ike_left(HERE) == b""


def test_what_a_plan_keeps_from_others() -> None:
    found = PLAN.reserved(LOCAL, REMOTE)
    assert found.esp == {(LOCAL, b"new!"), (LOCAL, b"hold"), (REMOTE, b"out!")}
    assert found.ike == {b"our new."}
    assert clash(replace(HERE, children=(replace(CHILD, spi_in=b"new!"),)), found).inbound == {0}


@pytest.mark.parametrize("told", [None, replace(a_context(3), policies=(), peer=None)])
def test_a_plan_at_rest(told: object) -> None:
    report = MoveReport(1, 2, 3, 4, 5, True)
    plan = replace(PLAN, told=told, moved=True, how="rekey", report=report, later=True)  # type: ignore[arg-type]
    again = Plan.loads(plan.dumps())
    assert replace(again, told=None) == replace(plan, told=None)
    if plan.told is None:
        assert again.told is None
    else:
        assert again.told is not None
        assert again.told.generations == plan.told.generations
        assert [c.secret for c in again.told.children] == [c.secret for c in plan.told.children]
        assert again.told.spis == plan.told.spis


def test_a_plan_that_cannot_be_read() -> None:
    data = PLAN.dumps()
    for damaged in (b"", data[:-1], b"\x00" + data, data + b"\x00"):
        with pytest.raises(StoreError) as caught:
            Plan.loads(damaged)
        assert SEED.reveal().hex() not in str(caught.value)


def test_no_secret_is_shown() -> None:
    assert SEED.reveal().hex() not in repr(PLAN)
    assert repr(SEED.reveal())[2:20] not in repr(PLAN)


@given(st.integers(0, 1 << 30), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_drawn_spis_are_free(seed: int, count: int) -> None:
    dice = Random(seed)
    low = dice.choice([0, 256, SPI_MIN])
    high = max(low, 256) + 50
    taken = Taken()
    drawn = set()
    for _ in range(count):
        spi = draw_spi(LOCAL, taken, dice.randint, low, high)
        assert spi not in drawn and max(low, 256) <= int.from_bytes(spi) <= high
        drawn.add(spi)
        taken |= Taken(frozenset({(LOCAL, spi)}))


def test_no_spi_is_left() -> None:
    taken = Taken(frozenset((LOCAL, number.to_bytes(4)) for number in range(300, 310)))
    with pytest.raises(RefusedError, match="no SPI"):
        draw_spi(LOCAL, taken, Random(1).randint, 300, 309)
    assert draw_spi(ip_address("192.0.2.77"), taken, Random(1).randint, 300, 309)
    assert SPI_MAX - SPI_MIN + 1 == 1 << 28


def test_a_new_ike_spi_is_nobodys() -> None:
    answers = iter([bytes(8), b"theirs..", b"of pairs", b"free one"])
    taken = Taken(ike=frozenset({b"theirs.."}), pairs=frozenset({(b"of pairs", b"12345678")}))
    assert draw_ike_spi(taken, lambda count: next(answers)) == b"free one"
