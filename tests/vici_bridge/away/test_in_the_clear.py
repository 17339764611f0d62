"""Cases in which packets of an SA that left, or came and ended, would leave a gateway in the clear."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest

from ikectx.errors import KernelError
from ikectx.numbers import Mode
from ikectx.sa.context import IkeContext
from tests.vici_bridge.away.test_absences import IN, MN, OUT, Gateway, left, places, relay
from tests.vici_bridge.vici.test_views import context, selector
from vici_bridge.away.departures import News, Stage
from vici_bridge.kernel.xfrm import ALLOW, BLOCK, KernelPolicy, Mark, Selector, Template
from vici_bridge.vici.views import COND_NAT_THERE


@pytest.mark.parametrize("first", ["ready", "left"])
def test_one_device_for_all_after_an_unprepared_move(first: str) -> None:
    """nSG's own packets may come here at first, so nothing is sent on, or shut, before it says otherwise."""
    gateway = Gateway()
    gateway.routes.default = IN
    here = context()
    policies = gateway.protect(here)
    gateway.away.leave(here, "nsg", policies, unprepared=True)
    for policy in policies:
        gateway.kernel.delete_policy(policy)
    if first == "ready":
        gateway.away.ready("nsg", here.spis, 1)
    gateway.away.left(here.spis)
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.routes.leads.clear()  # the link goes and comes
    assert gateway.packet() == "dropped"
    gateway.begin()
    gateway.routes.leads.clear()
    assert gateway.packet() == "dropped"


def marked(gateway: Gateway, *, unprepared: bool = False) -> IkeContext:
    """An SA that has left, whose packets a device marked."""
    here = context()
    selectors = Selector.between(ip_network("10.3.0.0/24"), ip_network(MN))
    template = Template(here.local.address, here.remote.address, reqid=1)
    policy = KernelPolicy("out", selectors, 370000, templates=(template,), mark=Mark(5, 0xFFFFFFFF))
    gateway.kernel.policies[policy.direction, policy.selector, policy.mark] = policy
    gateway.away.leave(here, "nsg", [policy], unprepared=unprepared)
    gateway.kernel.delete_policy(policy)
    gateway.away.left(here.spis)
    return here


def bare(gateway: Gateway) -> list[int]:
    """The devices of what drops packets without a mark."""
    policies = gateway.kernel.policies.values()
    return [p.selector.ifindex for p in policies if p.mark is None and p.action == BLOCK]


@pytest.mark.parametrize("unprepared", [False, True])
def test_one_device_for_all_and_marks(unprepared: bool) -> None:
    """What lets marked packets pass to nSG takes no place of what drops those without a mark."""
    gateway = Gateway()
    gateway.routes.default = IN
    here = marked(gateway, unprepared=unprepared)
    assert bare(gateway) == [IN]
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.away.hear("nsg", here.spis, 1, News.ENDS, "")
    assert bare(gateway) == [IN] and gateway.packet() == "dropped"


@pytest.mark.parametrize("how", ["look", "begin"])
def test_the_device_towards_the_mobile_node_is_made_anew(how: str) -> None:
    gateway = Gateway()
    here = marked(gateway)
    gateway.away.hear("nsg", here.spis, 1, News.ENDS, "")
    assert bare(gateway) == [OUT]
    gateway.routes.default = OUT + 7  # as pppd does
    gateway.away.look_again() if how == "look" else gateway.begin()
    assert bare(gateway) == [OUT + 7]
    gateway.routes.default = 0  # there is no way just now
    gateway.away.look_again() if how == "look" else gateway.begin()
    assert bare(gateway) == [OUT + 7]


@pytest.mark.parametrize("how", ["look", "begin"])
def test_the_device_of_what_was_only_prepared_is_made_anew(how: str) -> None:
    gateway = Gateway()
    (policy,) = gateway.protect(context())
    gateway.away.awaits(context(), {1})
    gateway.kernel.delete_policy(policy)
    gateway.routes.default = OUT + 7
    gateway.away.look_again() if how == "look" else gateway.begin()
    assert [p.selector.ifindex for p in gateway.kernel.policies.values()] == [OUT + 7]
    assert gateway.packet(device=OUT + 7) == "dropped"


OUTER = context().remote.address


@pytest.mark.parametrize(
    ("mode", "nat", "blocked"),
    [(Mode.TUNNEL, 0, True), (Mode.TUNNEL, COND_NAT_THERE, False), (Mode.TRANSPORT, 0, False)],
)
def test_a_mobile_node_without_a_virtual_ip(mode: Mode, nat: int, blocked: bool) -> None:
    """Behind its SA stands a block at nSG exactly if pSG sends packets for its outer address on."""
    here = context()
    child = replace(here.children[0], remote_ts=(selector(str(OUTER)),), mode=mode)
    here = replace(here, remote_vips=(), children=(child,), conditions=here.conditions | nat)
    old, new = Gateway(), Gateway()
    for gateway in (old, new):
        (policy,) = gateway.protect(here, f"{OUTER}/32")[1:]
    old.away.leave(here, "nsg", [policy])
    old.away.left(here.spis)
    assert bool(old.routes.leads) is blocked
    new.away.awaits(here, {1})
    new.away.behind.stand(here, {1})
    new.kernel.delete_policy(policy)
    assert new.packet(str(OUTER)) == ("dropped" if blocked else "in the clear")


class Nat:
    """nftables, which is out of memory once."""

    port = 1

    def __init__(self) -> None:
        self.fails = True
        self.rules: list[object] = []

    def change(self, old: object, new: list[object]) -> None:
        if self.fails:
            self.fails = False
            raise KernelError("nftables: out of memory", errno=12)
        self.rules = new


def test_a_relay_that_could_not_begin_is_tried_again() -> None:
    gateway = Gateway()
    here = relay(gateway)
    nat = gateway.away.passing._nat = Nat()  # type: ignore[assignment]
    with pytest.raises(KernelError):
        gateway.away.left(here.spis)
    assert gateway.away.left(here.spis) is not None
    assert nat.rules and places(gateway) == [(str(here.remote), True)]


def test_a_detour_that_could_not_end_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway()
    here = left(gateway)

    def busy(*_: object) -> None:
        raise KernelError("busy", errno=16)

    with monkeypatch.context() as patch:
        patch.setattr(gateway.routes, "remove", busy)
        with pytest.raises(KernelError):
            gateway.away.hear("nsg", here.spis, 1, News.ENDS, "")
    gateway.away.hear("nsg", here.spis, 1, News.ENDS, "")  # the peer repeats it
    assert gateway.away.listing()[0].stage is Stage.ENDED
    assert gateway.packet() == "dropped"
    assert not [p for p in gateway.kernel.policies.values() if p.action == ALLOW and not p.templates]
