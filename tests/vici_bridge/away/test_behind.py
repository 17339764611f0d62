"""What stands behind an SA that came from another gateway: its packets are dropped when it ends."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest

from ikectx.errors import KernelError, StoreError
from tests.vici_bridge.away.test_absences import IN, MN, OUT, Gateway
from tests.vici_bridge.test_deadlines import MemoryStore
from tests.vici_bridge.vici.test_views import context
from vici_bridge.away.behind import BEHIND, KIND, Behind
from vici_bridge.away.pairs import pairs_of
from vici_bridge.kernel.xfrm import Mark

HERE = context()


def charon_ends(gateway: Gateway) -> None:
    """charon takes away the policies of its SAs, and those alone."""
    for key, policy in list(gateway.kernel.policies.items()):
        if policy.templates:
            del gateway.kernel.policies[key]


def blocks(gateway: Gateway) -> int:
    return sum(policy.selector.user == BEHIND for policy in gateway.kernel.policies.values())


@pytest.fixture
def gateway() -> Gateway:
    """nSG, to which the SA has come."""
    here = Gateway()
    here.protect(HERE)
    here.away.behind.stand(HERE, {1})
    return here


def test_it_matters_when_the_sa_is_gone(gateway: Gateway) -> None:
    assert gateway.packet() == "protected"
    charon_ends(gateway)
    assert gateway.packet() == "dropped"
    assert gateway.packet("10.4.0.99") == "in the clear", "it is nobody's here"


def test_it_outlives_the_agent_and_a_flushed_spd(gateway: Gateway) -> None:
    gateway.kernel.policies.clear()
    gateway.begin()
    assert gateway.packet() == "dropped"
    gateway.store.delete(KIND, gateway.away.behind.listing()[0].key)
    gateway.begin()
    assert blocks(gateway) == 0, "the store says what stands"


def test_it_stays_for_its_own_mobile_node_and_goes_for_another(gateway: Gateway) -> None:
    behind, pairs = gateway.away.behind, pairs_of(HERE)
    behind.serves(str(HERE.remote_id), pairs)
    behind.serves("other@example.org", [((ip_network("10.99.0.0/24"),), (ip_network(MN),))])
    behind.serves("other@example.org", [((ip_network("10.3.0.0/24"),), (ip_network("10.4.0.0/24"),))])
    assert blocks(gateway) == 1
    gateway.away.serves((b"other..i", b"other..r"), "other@example.org", pairs)
    assert (blocks(gateway), behind.listing()) == (0, [])


def test_coming_again_changes_nothing(gateway: Gateway) -> None:
    gateway.away.behind.stand(HERE, {1})
    assert (blocks(gateway), len(gateway.away.behind.listing())) == (1, 1)


def test_a_policy_for_everything_has_nothing_behind_it_but_with_a_mark(gateway: Gateway) -> None:
    (policy,) = gateway.protect(HERE, "0.0.0.0/0")[1:]
    gateway.away.behind.stand(HERE, {1})
    assert blocks(gateway) == 1
    marked = replace(policy, mark=Mark(42, 0xFFFFFFFF))
    gateway.kernel.policies[marked.direction, marked.selector, marked.mark] = marked
    gateway.away.behind.stand(HERE, {1})
    assert blocks(gateway) == 2


def test_the_outer_address_of_a_mobile_node_is_not_shut(gateway: Gateway) -> None:
    gateway.protect(HERE, f"{HERE.remote.address}/32")
    gateway.away.behind.stand(HERE, {1})
    assert [str(block.policy.destination) for block in gateway.away.behind.listing()] == [MN]


@pytest.mark.parametrize("name", [str(HERE.remote_id), ":".join(part.hex() for part in HERE.spis)])
def test_the_operator_lets_packets_pass(gateway: Gateway, name: str) -> None:
    assert gateway.away.behind.end("nobody") == 0
    shown = gateway.away.behind.listing()[0].to_json()
    assert shown["blocked"] == "10.3.0.0/24 -> 10.4.0.10/32" and shown["mn"] == str(HERE.remote_id)
    assert gateway.away.behind.end(name) == 1
    charon_ends(gateway)
    assert gateway.packet() == "in the clear"


def test_a_kernel_that_refuses_stops_nothing(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: object) -> None:
        raise KernelError("no memory", errno=12)

    monkeypatch.setattr(gateway.kernel, "replace_policy", refuses)
    gateway.away.behind.stand(HERE, {1})
    gateway.away.behind.restore()
    assert caplog.text.count("may leave in the clear when") == 2


def test_it_stands_if_the_store_is_full_and_is_written_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, put = Gateway(), MemoryStore.put
    here.protect(HERE)

    def full(store: MemoryStore, kind: str, key: str, value: bytes, *, soon: bool = False) -> None:
        if not soon:
            raise StoreError("database or disk is full")
        put(store, kind, key, value, soon=soon)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "put", full)
        here.away.behind.stand(HERE, {1})
    charon_ends(here)
    assert here.packet() == "dropped"
    assert "not stored yet" in caplog.text
    here.store.put("note", "another", b"")
    here.begin()
    assert here.packet() == "dropped"


def test_what_cannot_be_read_is_left_there(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    gateway.store.put(KIND, "x", b'{"sa": 1}')
    gateway.begin()
    assert "the block x cannot be read" in caplog.text and blocks(gateway) == 1


def test_a_store_that_was_lost_opens_no_block(gateway: Gateway) -> None:
    for key, _ in gateway.store.items(KIND):
        gateway.store.delete(KIND, key)
    charon_ends(gateway)
    gateway.begin(keeps=True)
    assert gateway.packet() == "dropped"
    gateway.begin()
    assert gateway.packet() == "in the clear"


def test_with_esp_in_user_space_nothing_stands() -> None:
    gateway = Gateway(kernel=False)
    gateway.away.behind.stand(HERE, {1})
    assert gateway.away.behind.listing() == []


def test_the_store_and_the_kernel_hold_the_same(gateway: Gateway) -> None:
    again = Behind(gateway.store, None, lambda to: OUT)
    again.load()
    assert again.listing() == gateway.away.behind.listing()


def prepared() -> Gateway:
    here = Gateway()
    here.protect(HERE)
    here.away.awaits(HERE, {1})
    return here


def test_what_is_prepared_and_then_undone_leaves_nothing_in_the_clear() -> None:
    """pSG sends packets on from its freeze until it hears that nSG has undone the SA."""
    gateway = prepared()
    charon_ends(gateway)
    assert gateway.packet() == "dropped"
    gateway.begin()
    assert gateway.packet() == "dropped"


def test_the_way_to_psg_may_lead_through_nsg() -> None:
    gateway = prepared()
    charon_ends(gateway)
    gateway.routes.default = IN
    assert gateway.packet() == "in the clear", "it leaves for pSG, by another device than to the mobile node"


def test_what_was_to_be_relayed_does_not_leave_by_the_default_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to the mobile node's outer address is that to pSG, which passes its packets on."""
    here = Gateway()
    here.protect(HERE)
    monkeypatch.setattr(
        here.routes, "device_now", lambda to: {"192.0.2.1": OUT, "2001:db8::1": 0}.get(to, IN)
    )
    here.away.awaits(HERE, {1}, relayed=True)
    charon_ends(here)
    assert here.packet() == "dropped"
    here.begin()
    assert here.packet() == "dropped" and blocks(here) == 2


def test_when_it_serves_all_is_dropped_by_one_policy() -> None:
    gateway = prepared()
    assert blocks(gateway) == 1
    gateway.away.behind.stand(HERE, {1})
    (block,) = gateway.away.behind.listing()
    assert (blocks(gateway), block.policy.selector.ifindex) == (1, 0)
    gateway.away.awaits(HERE, {1})  # it comes again
    assert (blocks(gateway), gateway.away.behind.listing()) == (1, [block])
    charon_ends(gateway)
    gateway.routes.default = IN
    assert gateway.packet() == "dropped"
