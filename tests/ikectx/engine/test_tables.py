"""The machines' tables: every pair, every interleaving, timers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest

from ikectx.engine.tables import (
    SOURCE_DURABLE,
    SOURCE_FINAL,
    SOURCE_IGNORED,
    SOURCE_SERVES,
    SOURCE_SOON,
    SOURCE_TABLE,
    TARGET_DURABLE,
    TARGET_FINAL,
    TARGET_IGNORED,
    TARGET_OWNS,
    TARGET_SOON,
    TARGET_TABLE,
    SourceAction,
    SourceInput,
    SourceState,
    TargetAction,
    TargetInput,
    TargetState,
    final_fits,
    first_failure,
    new_source,
    new_target,
    offer_fits,
)
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import FinalChild, FinalState
from ikectx.sa.verdict import Verdict
from ikectx.timing import Timing
from tests.peers import HandClock, a_context, check_pair

S, SI, SA = SourceState, SourceInput, SourceAction
T, TI, TA = TargetState, TargetInput, TargetAction


# -- every pair ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "what"), list(product(SourceState, SourceInput)))
def test_every_source_pair(state: SourceState, what: SourceInput) -> None:
    check_pair(new_source(0.0, Timing(), state), SOURCE_TABLE, SOURCE_IGNORED, what)


@pytest.mark.parametrize(("state", "what"), list(product(TargetState, TargetInput)))
def test_every_target_pair(state: TargetState, what: TargetInput) -> None:
    check_pair(new_target(0.0, Timing(), state), TARGET_TABLE, TARGET_IGNORED, what)


# What the world may do at any moment must have a row (or be ignored) in every state that can see it.


@pytest.mark.parametrize("state", SourceState)
def test_the_link_the_peer_and_the_operator_surprise_no_source_state(state: SourceState) -> None:
    for what in (SI.LINK_LOST, SI.CANCEL, SI.CTC, SI.TIMEOUT, SI.REQUESTED):
        new_source(0.0, Timing(), state).feed(what, 1.0)


@pytest.mark.parametrize("state", TargetState)
def test_the_peer_and_the_clock_surprise_no_target_state(state: TargetState) -> None:
    for what in (TI.CTC, TI.TIMEOUT):
        new_target(0.0, Timing(), state).feed(what, 1.0)


def test_a_restart_is_known_in_every_open_state() -> None:
    for source in set(SourceState) - SOURCE_FINAL:
        assert (source, SI.RESTART) in SOURCE_TABLE
    for target in set(TargetState) - TARGET_FINAL - {T.NEW}:
        assert (target, TI.RESTART) in TARGET_TABLE


def test_final_states_are_never_left() -> None:
    assert {after for (before, _), (after, *_) in SOURCE_TABLE.items() if before in SOURCE_FINAL} == set()
    for (before, _), (after, *_) in TARGET_TABLE.items():
        assert before not in TARGET_FINAL or after is before


def test_a_source_that_sent_the_ctd_serves_again_only_when_told() -> None:
    back = {
        what
        for (before, what), (after, *_) in SOURCE_TABLE.items()
        if before is S.RELEASED and after in SOURCE_SERVES
    }
    assert back == {SI.REJECTED, SI.RECLAIM}


def test_ownership_begins_with_the_ctd_and_ends_in_an_undo() -> None:
    entered = {
        (b, w) for (b, w), (a, *_) in TARGET_TABLE.items() if b not in TARGET_OWNS and a in TARGET_OWNS
    }
    assert entered == {(T.PREPARED, TI.CTD), (T.RECEIVING, TI.OK)}
    left = {a for (b, _), (a, *_) in TARGET_TABLE.items() if b in TARGET_OWNS and a not in TARGET_OWNS}
    assert left == {T.UNDOING}
    assert {T.OWNING, T.OWNED, T.ABORTED} == TARGET_DURABLE
    assert S.RELEASED in SOURCE_DURABLE


def test_what_is_written_soon_leads_where_the_state_before_leads_after_a_crash() -> None:
    soon = {
        (before, after, TARGET_TABLE.get((before, TI.RESTART)), TARGET_TABLE[after, TI.RESTART])
        for (before, _), (after, *_) in TARGET_TABLE.items()
        if after in TARGET_SOON and before is not after
    }
    undo = (T.UNDOING, TA.UNDO)
    assert soon == {
        (T.NEW, T.CHECKING, None, (T.ABORTED,)),  # nobody knows of it, and nothing was done
        (T.PREPARING, T.PREPARED, undo, undo),
        (T.INSTALLING, T.PREPARED, undo, undo),
    }
    # who asks once more is told that the other one owns it, and is where it was
    assert {S.CLEANING} == SOURCE_SOON
    assert {before for (before, _), (after, *_) in SOURCE_TABLE.items() if after in SOURCE_SOON} == {
        *(S.RELEASED, S.CLEANING)
    }
    assert not TARGET_SOON & (TARGET_OWNS | TARGET_DURABLE) and not SOURCE_SOON & SOURCE_DURABLE


# -- every interleaving ----------------------------------------------------------------------------------
#
# Both machines, and a network that loses, repeats, delays and reorders messages (each connection keeps
# order, but a transfer may see several). Steps end well or badly, either agent crashes in any state. The
# network is a set: a message in it may arrive any number of times, at any time, or never. The first input of
# the source decides how the transfer goes: pushed, announced by its MN, or asked for when the MN is there.

MODES = {SI.OK: "pctd", SI.ANNOUNCE: "hold", SI.REQUESTED: "whole"}
BUSY_SOURCE = (S.FREEZING, S.CLEANING, S.THAWING)
BUSY_TARGET = (
    *(T.ANNOUNCED, T.INSTALLING, T.ADMITTING, T.RECEIVING, T.CHECKING, T.PREPARING),
    *(T.OWNING, T.MOVING, T.ACTIVATING, T.UNDOING),
)


class World(NamedTuple):
    source: SourceState
    target: TargetState
    net: frozenset[str]
    flows: bool  # the target sends
    mode: str = ""


def _source(world: World, what: SourceInput) -> World:
    if (world.source, what) not in SOURCE_TABLE:
        return world
    state, *actions = SOURCE_TABLE[world.source, what]
    mode = MODES.get(what, "") if world.source is S.NEW else world.mode
    last = "whole" if mode == "whole" else "ctd"
    sent = {SA.SEND_PCTD: mode, SA.SEND_CTD: last, SA.SEND_CTC: "ctc"}
    net = world.net | {sent[a] for a in actions if a in sent}
    return world._replace(source=state, net=net, mode=mode)


def _target(world: World, what: TargetInput, asked: str = "") -> World:
    if (world.target, what) not in TARGET_TABLE:
        return world
    state, *actions = TARGET_TABLE[world.target, what]
    net, flows = world.net, world.flows or state is T.OWNING
    if state is T.ABORTED:
        flows = False
    if TA.ANSWER in actions:
        # an answer belongs to the message it answers: a link pairs them, in order
        good = state in (T.HELD, T.PREPARED, T.OWNED)
        last = "whole" if world.mode == "whole" else "ctd"
        asked = asked or (last if world.flows else world.mode)
        net |= {f"{asked}-{'ok' if good else 'no'}"}
        if not good:
            net |= {f"{other}-no" for other in ("pctd", "hold", "ctd", "whole") if other in world.net}
    if TA.SEND_CTC in actions:
        net |= {"ctc-back"}
    if TA.REQUEST in actions:
        net |= {"request"}
    return world._replace(target=state, net=net, flows=flows)


def _next(world: World) -> Iterator[World]:
    # it begins in one of three ways
    if world.source is S.NEW:
        for source in (*MODES, SI.FAILED, SI.BUSY):
            yield _source(world, source)
    # steps of the ports end
    if world.source in BUSY_SOURCE:
        for source in (SI.OK, SI.FAILED, SI.BUSY, SI.GONE):
            yield _source(world, source)
    if world.target in BUSY_TARGET:
        for target in (TI.OK, TI.FAILED):
            yield _target(world, target)
    # the world interferes
    for source in (SI.LINK_LOST, SI.LINK_UP, SI.TIMEOUT, SI.CANCEL, SI.RESTART):
        yield _source(world, source)
    for target in (TI.TIMEOUT, TI.RESTART):
        yield _target(world, target)
    # messages arrive
    if world.target not in BUSY_TARGET:
        yield from _arrivals(world)
    asked = {S.OFFERED: "pctd", S.ANNOUNCED: "hold"}.get(world.source)
    if world.source is S.RELEASED:
        asked = "whole" if world.mode == "whole" else "ctd"
    if f"{asked}-ok" in world.net:
        yield _source(world, SI.ACCEPTED)
    if f"{asked}-no" in world.net:
        yield _source(world, SI.REJECTED)
    if "ctc-back" in world.net:
        yield _source(world, SI.CTC)
    if "request" in world.net and world.source is not S.NEW:
        yield _source(world, SI.REQUESTED)


def _arrivals(world: World) -> Iterator[World]:
    """What a target that waits may see: messages, and the MN of what it holds."""
    for name, what in (("pctd", TI.PCTD), ("hold", TI.ANNOUNCE), ("ctd", TI.CTD)):
        if name in world.net:
            yield _target(world, what, name)
    if "ctd" in world.net and world.target in (T.HELD, T.PREPARED):
        yield _target(world, TI.MISFIT, "ctd")
    if "whole" in world.net:
        yield _target(world, TI.WHOLE, "whole")
        if world.target is T.NEW:
            yield _target(world, TI.CTD, "whole")  # the target has forgotten that it asked
    if "ctc" in world.net:
        yield _target(world, TI.CTC)
    if world.target in (T.HELD, T.PREPARED) and world.mode == "hold":
        yield _target(world, TI.ARRIVED)


def _worlds() -> dict[World, set[World]]:
    first = World(S.NEW, T.NEW, frozenset(), flows=False)
    found: dict[World, set[World]] = {}
    left = [first]
    while left:
        world = left.pop()
        if world in found:
            continue
        found[world] = {after for after in _next(world) if after != world}
        left.extend(found[world])
    return found


def _two_owners(worlds: dict[World, set[World]]) -> list[World]:
    return [
        world
        for world in worlds
        if world.source in SOURCE_SERVES and (world.flows or world.target in TARGET_OWNS)
    ]


def _stuck(worlds: dict[World, set[World]]) -> set[World]:
    """Those from which no end with exactly one owner can be reached any more."""
    before: dict[World, set[World]] = {world: set() for world in worlds}
    for world, afters in worlds.items():
        for after in afters:
            before[after].add(world)
    good = [
        world
        for world in worlds
        if (world.source is S.DONE and world.target is T.OWNED)
        or (world.source in (S.KEPT, S.REFUSED) and world.target in (T.ABORTED, T.NEW))
        # charon at the source gave it up: there is nothing left to own
        or (world.source is S.LOST and world.target in (T.ABORTED, T.NEW))
    ]
    reached = set(good)
    while good:
        for world in before[good.pop()] - reached:
            reached.add(world)
            good.append(world)
    return set(worlds) - reached


def test_no_interleaving_has_two_owners_and_all_can_end_with_one() -> None:
    worlds = _worlds()
    assert len(worlds) > 190
    assert {world.source for world in worlds} == set(SourceState)
    assert {world.target for world in worlds} == set(TargetState)
    assert _two_owners(worlds) == []
    assert _stuck(worlds) == set()
    for world in worlds:
        if world.source in SOURCE_FINAL and world.target in TARGET_FINAL:
            assert (world.source is S.DONE) == (world.target is T.OWNED), world


@pytest.mark.parametrize("mode", MODES.values())
def test_each_way_of_moving_can_end_moved_and_kept(mode: str) -> None:
    ends = {(world.source, world.target) for world in _worlds() if world.mode == mode}
    assert (S.DONE, T.OWNED) in ends
    assert (S.KEPT, T.ABORTED) in ends


SLIPS = [
    (SOURCE_TABLE, (S.RELEASED, SI.LINK_LOST), (S.THAWING, SA.THAW)),
    (SOURCE_TABLE, (S.RELEASED, SI.RESTART), (S.THAWING, SA.THAW)),
    (TARGET_TABLE, (T.OWNING, TI.FAILED), (T.UNDOING, TA.UNDO, TA.ANSWER)),
    (TARGET_TABLE, (T.ABORTED, TI.PCTD), (T.CHECKING, TA.CHECK)),
    (SOURCE_TABLE, (S.RELEASED, SI.REJECTED), (S.RELEASED,)),
    (TARGET_TABLE, (T.HELD, TI.ARRIVED), (T.OWNING, TA.TAKE)),
    (TARGET_TABLE, (T.ABORTED, TI.WHOLE), (T.ADMITTING, TA.CHECK)),
    (SOURCE_TABLE, (S.NEW, SI.REQUESTED), (S.FREEZING, SA.SEND_CTD, SA.FREEZE)),
]


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: "-".join(slip[1]))
def test_the_walk_finds_slips(slip: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    table, pair, row = slip
    monkeypatch.setitem(table, pair, row)
    worlds = _worlds()
    assert _two_owners(worlds) or _stuck(worlds)


# -- timers and phases -----------------------------------------------------------------------------------


def test_a_timer_runs_only_where_something_is_waited_for() -> None:
    clock = HandClock()
    machine = new_source(clock.now(), Timing(offer=2.0, confirm=5.0))
    assert machine.next_timer() is None
    clock.forward(0.5)
    assert machine.feed(SI.OK, clock.now()) == (SA.SEND_PCTD,)
    assert machine.next_timer() == pytest.approx(2.5)
    clock.forward(2.0)
    assert machine.feed(SI.TIMEOUT, clock.now()) == (SA.SEND_CTC,)
    assert machine.state is S.KEPT
    assert machine.next_timer() is None
    assert machine.phases(clock.now() + 1.0) == {S.NEW: 500.0, S.OFFERED: 2000.0, S.KEPT: 1000.0}
    assert machine.spent == {S.NEW: pytest.approx(0.5), S.OFFERED: pytest.approx(2.0)}


def test_a_released_source_sends_its_ctd_again_and_again() -> None:
    machine = new_source(0.0, Timing(confirm=5.0), S.RELEASED)
    for now in (5.0, 10.0, 15.0):
        assert machine.next_timer() == pytest.approx(now)
        assert machine.feed(SI.TIMEOUT, now) == (SA.SEND_CTD,)
        assert machine.state is S.RELEASED


def test_a_prepared_target_does_not_wait_for_ever() -> None:
    machine = new_target(0.0, Timing(hold=3.0))
    for what in (TI.PCTD, TI.OK, TI.OK):
        machine.feed(what, 1.0)
    assert machine.state is T.PREPARED
    assert machine.next_timer() == pytest.approx(4.0)
    assert machine.feed(TI.TIMEOUT, 4.0) == (TA.SEND_CTC, TA.UNDO)


def test_what_an_mn_announced_is_kept_for_a_while_by_both() -> None:
    source = new_source(0.0, Timing(predictive=8.0))
    source.feed(SI.ANNOUNCE, 0.0)
    source.feed(SI.ACCEPTED, 1.0)
    assert source.next_timer() == pytest.approx(9.0)
    assert source.feed(SI.TIMEOUT, 9.0) == (SA.SEND_CTC,)
    assert source.state is S.KEPT
    target = new_target(0.0, Timing(predictive=8.0, hold=3.0))
    target.feed(TI.ANNOUNCE, 0.0)
    target.feed(TI.OK, 1.0)
    assert target.next_timer() == pytest.approx(9.0)
    # the source is asked to let go before charon is given the SA
    assert target.feed(TI.ARRIVED, 7.0) == (TA.REQUEST, TA.PREPARE)
    assert target.feed(TI.OK, 7.0) == ()
    # asking again begins the wait anew
    assert target.feed(TI.ARRIVED, 9.0) == (TA.REQUEST,)
    assert target.next_timer() == pytest.approx(12.0)
    assert target.feed(TI.TIMEOUT, 12.0) == (TA.SEND_CTC, TA.UNDO)


def test_back_off_doubles_to_its_limit() -> None:
    timing = Timing(backoff=0.5, backoff_max=3.0)
    assert [timing.wait(tries) for tries in (0, 1, 2, 3, 1000)] == [0.5, 1.0, 2.0, 3.0, 3.0]


# -- epochs ----------------------------------------------------------------------------------------------


def test_an_offer_of_an_owner_who_was_succeeded_is_stale() -> None:
    context = dataclasses.replace(a_context(), epoch=3)
    assert offer_fits(context, 0) is Status.OK
    assert offer_fits(context, 3) is Status.OK  # we gave it to him: ours became 3 when we let go
    assert offer_fits(context, 4) is Status.STALE_EPOCH
    assert offer_fits(context, 3, owned=3) is Status.STALE_EPOCH  # epoch 3 is we
    assert offer_fits(context, 3, owned=2) is Status.OK
    assert offer_fits(dataclasses.replace(context, epoch=1 << 63), 0) is Status.MALFORMED


def test_a_ctd_must_fit_its_pctd() -> None:
    context = dataclasses.replace(a_context(), epoch=3)
    child = context.children[0]
    children = (FinalChild(child.spi_in, child.inbound, child.outbound),)
    final = FinalState(context.spis[0], context.spis[1], 2, 5, 4, children)
    assert final_fits(context, final, 3) is Status.OK
    assert final_fits(context, final, 4) is Status.STALE_EPOCH
    assert final_fits(context, dataclasses.replace(final, epoch=3), 0) is Status.STALE_EPOCH
    assert final_fits(context, dataclasses.replace(final, epoch=5), 0) is Status.STALE_EPOCH
    assert final_fits(context, dataclasses.replace(final, children=()), 3) is Status.UNKNOWN_SA
    assert final_fits(context, dataclasses.replace(final, spi_i=bytes(8)), 3) is Status.UNKNOWN_SA


def test_the_first_failure_stands_for_all() -> None:
    assert first_failure([]) is Status.OK
    verdicts = [Verdict(Fpt.PAD, Status.OK), Verdict(Fpt.SAD, Status.KERNEL), Verdict(Fpt.SPD, Status.CHARON)]
    assert first_failure(verdicts) is Status.KERNEL
