"""Fresh keys after a move: the IKE_SA first, then its children, asked for until it has happened."""

from __future__ import annotations

from dataclasses import replace

from tests.vici_bridge.test_deadlines import MemoryStore
from tests.vici_bridge.vici.test_views import VIEW
from vici_bridge.rekey_after_move import AGAIN, TRIES, FreshKeys
from vici_bridge.vici.views import SaView, sa_view

SA = sa_view("mn", {**VIEW, "tasks-active": []})
SPIS_IN = [child.spi_in for child in SA.children]


def rekeyed_ike(sa: SaView) -> SaView:
    return replace(sa, spi_i=b"\x77" * 8, spi_r=b"\x78" * 8, unique_id=sa.unique_id + 1)


def rekeyed_children(sa: SaView) -> SaView:
    old = tuple(replace(child, state="REKEYED") for child in sa.children)
    new = tuple(
        replace(child, spi_in=bytes([0xC9, 0, 0, n]), unique_id=90 + n) for n, child in enumerate(sa.children)
    )
    return replace(sa, children=old + new)


def test_the_ike_sa_is_first_and_its_children_follow_at_once() -> None:
    store = MemoryStore()
    fresh = FreshKeys(store)
    fresh.want(SA.spis, SPIS_IN)
    assert fresh.due([SA], 1000.0) == [("ike", SA.unique_id)]
    assert fresh.due([SA], 1000.0 + AGAIN / 2) == []  # it takes its time
    after = rekeyed_ike(SA)
    wanted = [("child", child.unique_id) for child in SA.children]
    assert wanted and fresh.due([after], 1001.0) == wanted
    assert fresh.due([rekeyed_children(after)], 1002.0) == []
    assert len(fresh) == 0 and store.items("fresh") == []


def exchanged(sa: SaView) -> SaView:
    return replace(sa, children=tuple(replace(child, key_exchange=True) for child in sa.children))


def test_children_alone_if_their_keys_have_an_exchange() -> None:
    store = MemoryStore()
    fresh = FreshKeys(store)
    fresh.want(SA.spis, SPIS_IN, "child")
    wanted = [("child", child.unique_id) for child in SA.children]
    assert FreshKeys(store).due([SA], 1000.0) == wanted
    assert fresh.due([exchanged(rekeyed_children(SA))], 1001.0) == []
    assert len(fresh) == 0


def test_children_whose_keys_have_no_exchange_are_not_enough() -> None:
    fresh = FreshKeys(MemoryStore())
    fresh.want(SA.spis, SPIS_IN, "child")
    assert fresh.due([SA], 1000.0) == [("child", child.unique_id) for child in SA.children]
    assert fresh.due([rekeyed_children(SA)], 1001.0) == [("ike", SA.unique_id)]
    after = rekeyed_ike(rekeyed_children(SA))
    again = [("child", 90 + n) for n in range(len(SA.children))]
    assert fresh.due([after], 1002.0) == again


def test_no_rekey() -> None:
    fresh = FreshKeys(MemoryStore())
    fresh.want(SA.spis, SPIS_IN, "no")
    assert len(fresh) == 0


def test_children_that_somebody_else_rekeyed_before_the_ike_sa_are_rekeyed_after_it() -> None:
    fresh = FreshKeys(MemoryStore())
    fresh.want(SA.spis, SPIS_IN)
    by_mn = rekeyed_children(SA)
    assert fresh.due([by_mn], 1000.0) == [("ike", SA.unique_id)]
    wanted = [("child", 90 + n) for n in range(len(SA.children))]
    assert fresh.due([rekeyed_ike(by_mn)], 1001.0) == wanted


def test_a_rekey_that_came_to_nothing_is_asked_for_again_but_not_for_ever() -> None:
    fresh = FreshKeys(MemoryStore())
    fresh.want(SA.spis, SPIS_IN)
    asked = [fresh.due([SA], 1000.0 + AGAIN * n) for n in range(TRIES + 2)]
    assert asked == [[("ike", SA.unique_id)]] * TRIES + [[], []]
    assert len(fresh) == 0


def test_nothing_is_asked_of_an_sa_that_is_busy_or_not_active() -> None:
    fresh = FreshKeys(MemoryStore())
    fresh.want(SA.spis, SPIS_IN)
    assert fresh.due([replace(SA, state="PASSIVE")], 1000.0) == []
    assert fresh.due([replace(SA, tasks=("IKE_DPD",))], 1001.0) == []
    assert fresh.due([SA], 1002.0) == [("ike", SA.unique_id)]


def test_an_sa_that_has_gone_is_forgotten() -> None:
    fresh = FreshKeys(MemoryStore())
    fresh.want(SA.spis, SPIS_IN)
    assert fresh.due([], 1000.0) == [] and len(fresh) == 0


def test_it_outlives_the_agent_and_a_damaged_note_does_no_harm() -> None:
    store = MemoryStore()
    FreshKeys(store).want(SA.spis, SPIS_IN)
    store.put("fresh", "damaged", b"[1]")
    again = FreshKeys(store)
    assert again.due([SA], 1000.0) == [("ike", SA.unique_id)]
    assert len(store.items("fresh")) == 1
