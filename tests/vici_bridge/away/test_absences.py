"""SAs that left a gateway: nothing of theirs leaves it in the clear, whenever an agent dies."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ikectx.errors import KernelError, StoreError, UnknownSaError
from ikectx.sa.context import Endpoint, IkeContext
from ikectx.sa.name import SaName
from tests.kernel_tables import KernelTables
from tests.vici_bridge.test_deadlines import MemoryStore
from tests.vici_bridge.vici.test_views import context, selector
from vici_bridge.away import passing as relays
from vici_bridge.away.absences import GUESTS, KIND, Away
from vici_bridge.away.departures import OURS, SENT, News, Stage
from vici_bridge.away.pairs import pairs_of
from vici_bridge.away.passing import rule_for
from vici_bridge.kernel.xfrm import ALLOW, KernelPolicy, Selector, Template

IN, OUT = 3, 2
"""Devices: towards the other gateways, and the default route's."""
WAYS = {"nsg": (ip_address("10.3.0.3"),), "third": (ip_address("10.3.0.4"),)}
MN = "10.4.0.10/32"


class Died(BaseException):
    """The agent was killed."""


class Fuse:
    """Counts what an agent does; it dies at one of these steps."""

    def __init__(self) -> None:
        self.left = -1

    def step(self) -> None:
        if self.left == 0:
            raise Died
        self.left -= 1


class Routes:
    """Those of the kernel by way of other gateways."""

    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse
        self.leads: dict[str, Any] = {}
        self.shut_up: set[str] = set()
        self.questions = 0
        self.default = OUT
        self.link = IN
        """0: the device towards the other gateways is down."""

    def device_to(self, prefix: Any, via: Sequence[Any]) -> int:
        self.questions += 1
        return self.link if via else 0

    def device_now(self, prefix: str) -> int:
        return self.default

    def add(self, prefixes: Iterable[str], via: Sequence[Any], inside: object = ()) -> list[Any]:
        self.fuse.step()
        if not self.link:
            raise KernelError("unreachable", errno=101)
        self.leads.update((prefix, via[0]) for prefix in prefixes)
        return []

    def remove(self, prefixes: Iterable[Any]) -> None:
        for prefix in prefixes:
            self.fuse.step()
            self.leads.pop(str(prefix), None)

    def shut(self, prefixes: Iterable[str]) -> list[Any]:
        self.fuse.step()
        self.shut_up |= set(prefixes)
        return []

    def open_up(self, prefixes: Iterable[Any]) -> None:
        self.shut_up -= set(map(str, prefixes))

    def listing(self, *, shut: bool = False) -> list[Any]:
        return [ip_network(prefix) for prefix in (self.shut_up if shut else self.leads)]


class Store(MemoryStore):
    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse = fuse

    def put(self, kind: str, key: str, value: bytes, *, soon: bool = False) -> None:
        self.fuse.step()
        super().put(kind, key, value, soon=soon)

    def delete(self, kind: str, key: str, *, soon: bool = False) -> None:
        self.fuse.step()
        super().delete(kind, key, soon=soon)


class Gateway:
    """pSG: its kernel and its store stay, its agent may be another."""

    def __init__(self, *, kernel: bool = True) -> None:
        self.fuse = Fuse()
        self.kernel = KernelTables(self.fuse.step)
        self.user_space = not kernel
        self.routes = Routes(self.fuse)
        self.store = Store(self.fuse)
        self.wall = itertools.count(1e9)
        self.away: Away
        self.begin()

    def begin(self, *, keeps: bool = False) -> None:
        """An agent starts. `keeps`: its store lacks SAs that left."""
        self.fuse.left = -1
        kernel: Any = None if self.user_space else self.kernel
        routes: Any = self.routes
        self.away = Away(self.store, kernel, routes, WAYS, wall=lambda: next(self.wall))
        self.away.load()
        if keeps:
            self.away.keep_blocks()
        self.away.restore()

    def protect(self, here: IkeContext, *more: str) -> list[KernelPolicy]:
        """charon's policies for an SA."""
        made = []
        for theirs in (MN, *more):
            selectors = Selector.between(ip_network("10.3.0.0/24"), ip_network(theirs))
            template = Template(here.local.address, here.remote.address, reqid=1)
            made.append(KernelPolicy("out", selectors, 370000, templates=(template,)))
        for policy in made:
            self.kernel.policies[policy.direction, policy.selector, policy.mark] = policy
        return made

    def packet(self, to: str = "10.4.0.10", device: int = IN) -> str:
        """What becomes of one from a server to the mobile node."""
        leads = [via for prefix, via in self.routes.leads.items() if ip_address(to) in ip_network(prefix)]
        if not leads and any(ip_address(to) in ip_network(one) for one in self.routes.shut_up):
            return "dropped"
        inside = device
        device = inside if leads and self.routes.link else self.routes.default
        found = [
            one
            for one in self.kernel.policies.values()
            if ip_address(to) in one.destination and one.selector.ifindex in (0, device)
        ]
        best = min(found, key=lambda one: one.priority, default=None)
        if best is not None and best.action != ALLOW:
            return "dropped"
        if best is not None and best.templates:
            return "protected"
        return f"sent on to {leads[0]}" if leads and device == inside else "in the clear"


def serves(gateway: Gateway, here: IkeContext) -> None:
    gateway.away.serves(here.spis, str(here.remote_id), pairs_of(here))


def left(gateway: Gateway, here: IkeContext | None = None, to: str = "nsg") -> IkeContext:
    """An SA that has left, to the end."""
    here = here or context()
    policies = gateway.protect(here)
    gateway.away.leave(here, to, policies)
    for policy in policies:
        gateway.kernel.delete_policy(policy)
    gateway.away.left(here.spis)
    return here


def test_packets_go_to_where_the_sa_is_and_nowhere_else() -> None:
    gateway = Gateway()
    here = left(gateway)
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.begin()
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.routes.leads.clear()  # the device went down and came up
    assert gateway.packet() == "dropped"
    gateway.kernel.policies.clear()  # charon's starter flushes the SPD
    gateway.away.restore()
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.protect(here)  # it connects anew, and no agent has heard of that
    assert gateway.packet() == "protected"
    serves(gateway, here)
    assert gateway.packet() == "protected"
    assert gateway.away.listing() == []
    assert gateway.routes.leads == {}
    assert [one for one in gateway.kernel.policies.values() if one.selector.user in (OURS, SENT)] == []


def test_the_way_to_a_gateway_is_asked_for_once_for_all_that_leave() -> None:
    gateway = Gateway()
    many = {ip_network(f"10.4.{number}.0/24") for number in range(100)}
    inside = ip_network("10.3.0.0/24")  # the other gateway's address is in it
    assert gateway.away.stranded(many | {inside}, "nsg") == {inside}
    assert gateway.routes.questions == 1
    gateway.routes.link = 0
    assert gateway.away.stranded(many, "nsg") == many
    assert gateway.away.stranded(many, "who?") == many


def test_a_store_that_was_lost_opens_no_block() -> None:
    gateway = Gateway()
    here = left(gateway)
    gateway.store = Store(gateway.fuse)
    gateway.begin(keeps=True)
    assert gateway.packet() == "dropped"
    gateway.protect(here)  # it connects anew
    assert gateway.packet() == "protected"
    gateway.begin(keeps=True)
    assert gateway.packet() == "protected"


def test_without_a_way_packets_are_dropped_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    gateway = Gateway()
    left(gateway, to="unknown")
    assert gateway.packet() == "dropped"
    assert "forward_via" in caplog.text
    caplog.clear()
    announcing = Gateway()
    announcing.away._announced = {context().connection}
    left(announcing, to="unknown")
    assert announcing.packet() == "dropped"
    assert "forward_via" not in caplog.text, "the network leads its packets there"
    other = Gateway()
    other.routes.link = 0
    left(other)
    assert other.packet() == "dropped"
    other.routes.link = IN
    other.away.restore()
    assert other.packet() == "sent on to 10.3.0.3"


def test_a_link_that_goes_and_comes() -> None:
    gateway = Gateway()
    left(gateway)
    gateway.routes.link = 0
    gateway.routes.leads.clear()
    gateway.away.look_again()
    assert gateway.packet() == "dropped"
    assert gateway.away.listing()[0].to_json()["prefixes"] == []
    gateway.routes.link = IN + 4  # made anew, it has another number
    gateway.away.look_again()
    assert gateway.packet(device=IN + 4) == "sent on to 10.3.0.3"
    gateway.routes.leads.clear()
    assert gateway.packet(device=IN + 4) == "dropped"
    gateway.away.look_again()
    assert gateway.packet(device=IN + 4) == "sent on to 10.3.0.3"
    assert gateway.packet(device=IN) == "dropped", "nothing is left for the device that has gone"


def test_one_device_for_all() -> None:
    """Inside and outside are one network: a policy by device would let packets leave by the default route."""
    gateway = Gateway()
    gateway.routes.default = IN
    here = left(gateway)
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.routes.leads.clear()
    assert gateway.packet() == "dropped"
    gateway.begin()
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.away.end(here.spis, unblock=False)
    assert gateway.packet() == "dropped"
    gateway.away.comes(here)
    gateway.protect(here)
    gateway.away.opens(here)
    assert gateway.packet() == "protected"
    serves(gateway, here)
    assert gateway.routes.shut_up == set()


def test_what_is_taken_back_is_as_it_was() -> None:
    gateway = Gateway()
    here = context()
    policies = gateway.protect(here)
    gateway.away.leave(here, "nsg", policies)
    gateway.kernel.delete_policy(policies[0])
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.kernel.replace_policy(policies[0])
    gateway.away.back(here.spis)
    gateway.away.back(here.spis)
    assert gateway.packet() == "protected"
    assert list(gateway.kernel.policies.values()) == policies
    assert (gateway.routes.leads, gateway.store.items(KIND)) == ({}, [])


def test_what_a_full_disk_kept_is_taken_back_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway()
    here = context()
    gateway.away.leave(here, "nsg", gateway.protect(here))

    def full(*_: object, **__: object) -> None:
        raise StoreError("database or disk is full")

    with monkeypatch.context() as disk:
        disk.setattr(gateway.store, "delete", full)
        with pytest.raises(StoreError):
            gateway.away.back(here.spis)
    gateway.away.back(here.spis)
    assert gateway.away.listing() == [] and not gateway.store.items(KIND)


def test_an_sa_that_comes_back_is_sent_on_to_nobody() -> None:
    """The gateway that has it sends its packets here as soon as it has let go: no loop at any moment."""
    gateway = Gateway()
    here = left(gateway)
    gateway.away.comes(here)
    assert gateway.packet() == "dropped"
    gateway.begin()
    assert gateway.packet() == "dropped"
    gateway.away.stays(here)
    assert gateway.packet() == "dropped", "it may be on its way still"
    assert gateway.away.hear("third", here.spis, 1, News.HERE, "") is None, "it was not given to that one"
    assert gateway.away.hear("nsg", here.spis, 7, News.HERE, "") is None
    assert gateway.packet() == "dropped"
    gateway.away.hear("nsg", here.spis, 1, News.HERE, "")
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.away.comes(here)
    gateway.protect(here)
    serves(gateway, here)
    assert gateway.packet() == "protected"
    assert gateway.away.listing() == []


def test_two_that_share_an_address_do_not_end_each_other() -> None:
    """An MN moved, connected here again with the same address while no agent ran, and moved again."""
    gateway = Gateway()
    first = left(gateway)
    generation = replace(first.generations[0], spi_i=b"another.")
    second = left(gateway, replace(first, generations=(generation,)), to="third")
    assert gateway.packet() == "sent on to 10.3.0.4"
    gateway.away.end(second.spis, unblock=True)
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.away.end(first.spis, unblock=False)
    assert gateway.packet() == "dropped"
    assert [row.stage for row in gateway.away.listing()] == [Stage.ENDED]
    gateway.away.end(first.spis, unblock=True)
    assert gateway.packet() == "in the clear"
    with pytest.raises(UnknownSaError):
        gateway.away.end(first.spis, unblock=True)


def test_it_goes_on_from_there(caplog: pytest.LogCaptureFixture) -> None:
    gateway = Gateway()
    here = left(gateway)
    gateway.away.hear("nsg", here.spis, 1, News.MOVED, "third")
    assert gateway.packet() == "sent on to 10.3.0.4"
    gateway.begin()
    assert gateway.packet() == "sent on to 10.3.0.4"
    gateway.away.hear("nsg", here.spis, 1, News.MOVED, "far")
    assert gateway.packet() == "sent on to 10.3.0.3", (
        "to a gateway we know no way to, by the one we gave it to"
    )
    assert gateway.away.listing()[0].at == "far"
    assert gateway.away.hear("third", here.spis, 1, News.ENDS, "") is None
    assert "third reports on" in caplog.text
    gateway.away.hear("nsg", here.spis, 1, News.ENDS, "")
    assert gateway.packet() == "dropped"
    gateway.away.hear("nsg", here.spis, 1, News.HERE, "")
    assert gateway.packet() == "sent on to 10.3.0.3", "the mobile node came back there"
    gateway.away.end(here.spis, unblock=False)
    gateway.away.hear("nsg", here.spis, 1, News.HERE, "")
    assert gateway.packet() == "dropped", "the operator has the last word"


def test_who_has_nothing_of_it_yet_may_send_its_packets_here() -> None:
    gateway = Gateway()
    here = context()
    policies = gateway.protect(here)
    gateway.away.leave(here, "nsg", policies, unprepared=True)
    gateway.kernel.delete_policy(policies[0])
    assert gateway.packet() == "dropped"
    gateway.begin()
    assert gateway.packet() == "dropped"
    gateway.away.left(here.spis)
    assert gateway.packet() == "sent on to 10.3.0.3"


def test_packets_are_sent_on_as_soon_as_the_other_gateway_is_ready() -> None:
    gateway = Gateway()
    here = context()
    policies = gateway.protect(here)
    gateway.away.leave(here, "nsg", policies, unprepared=True)
    gateway.kernel.delete_policy(policies[0])
    gateway.away.ready("third", here.spis, 1)
    gateway.away.ready("nsg", here.spis, 7)
    gateway.away.ready("nsg", replace(here.generations[0], spi_i=b"another.").spis, 1)
    assert gateway.packet() == "dropped", "it was given to nsg, in epoch 1"
    for _ in range(2):
        gateway.away.ready("nsg", here.spis, 1)
        assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.begin()
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.away.left(here.spis)
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.away.comes(here)
    gateway.away.ready("nsg", here.spis, 1)
    assert gateway.packet() == "dropped", "late: nsg may send its packets here now"


def test_an_sa_that_is_taken_back_is_not_sent_on_by_a_late_notice() -> None:
    gateway = Gateway()
    here = context()
    policies = gateway.protect(here)
    gateway.away.leave(here, "nsg", policies, unprepared=True)
    gateway.away.ready("nsg", here.spis, 1)
    gateway.away.back(here.spis)
    gateway.away.ready("nsg", here.spis, 1)
    assert gateway.packet() == "protected"
    assert gateway.away.listing() == []


def test_a_route_of_an_older_agent_stays(caplog: pytest.LogCaptureFixture) -> None:
    gateway = Gateway()
    gateway.store.put(KIND, context().spis[0].hex() + context().spis[1].hex(), b'["10.4.0.10/32"]')
    gateway.store.put(KIND, "else", b"unreadable")
    gateway.routes.leads[MN] = "10.3.0.3"
    gateway.begin()
    assert gateway.packet() == "sent on to 10.3.0.3"
    assert "cannot be read" in caplog.text
    (row,) = gateway.away.listing()
    assert row.to_json()["at"] == ""
    gateway.away.end(row.sa, unblock=True)
    assert gateway.routes.leads == {}


def test_esp_in_user_space() -> None:
    gateway = Gateway(kernel=False)
    here = context()
    gateway.away.leave(here, "nsg", ())
    gateway.away.left(here.spis)
    assert gateway.packet() == "sent on to 10.3.0.3"
    gateway.routes.leads.clear()
    assert gateway.packet() == "dropped"
    gateway.away.comes(here)
    gateway.away.opens(here)
    assert gateway.routes.shut_up == set()
    gateway.away.stays(here)
    assert gateway.routes.shut_up == {MN}
    gateway.away.hear("nsg", here.spis, 1, News.HERE, "")
    gateway.away.end(here.spis, unblock=False)
    assert gateway.packet() == "dropped"
    serves(gateway, here)
    assert (gateway.routes.shut_up, gateway.routes.leads) == (set(), {})


def leave(gateway: Gateway, here: IkeContext, policies: Sequence[KernelPolicy]) -> None:
    gateway.away.leave(here, "nsg", policies)
    for policy in policies:
        gateway.kernel.delete_policy(policy)
    gateway.away.left(here.spis)


STEPS: dict[str, Callable[[Gateway, IkeContext], Any]] = {
    "leaves": lambda gateway, here: leave(gateway, here, gateway.protect(here)),
    "is ended": lambda gateway, here: [gateway.away.end(here.spis, unblock=False)],
    "comes, and stays": lambda gateway, here: [gateway.away.comes(here), gateway.away.stays(here)],
    "moves on": lambda gateway, here: [gateway.away.hear("nsg", here.spis, 1, News.MOVED, "third")],
    "is awaited": lambda gateway, here: [gateway.away.ready("nsg", here.spis, 1)],
}


@pytest.mark.parametrize("what", STEPS)
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "user space"])
def test_killed_between_any_two_steps(what: str, kernel: bool) -> None:
    """Whenever the agent dies, no packet leaves in the clear: not then, nor after the next one's start."""
    died = 0
    for at in range(40):
        gateway = Gateway(kernel=kernel)
        here = context()
        if what == "is awaited":
            policies = gateway.protect(here)
            gateway.away.leave(here, "nsg", policies, unprepared=True)
            gateway.kernel.delete_policy(policies[0])
        elif what != "leaves":
            left(gateway)
        gateway.fuse.left = at
        try:
            STEPS[what](gateway, here)
        except Died:
            died += 1
        else:
            break
        if kernel or what != "leaves":
            assert gateway.packet() != "in the clear", at
        gateway.begin()
        if kernel or gateway.away.listing():
            assert gateway.packet() != "in the clear", at
    assert 1 < died < 40


def test_several_prefixes_end_one_by_one() -> None:
    gateway = Gateway()
    here = context()
    child = here.children[0]
    two = replace(
        here, children=(replace(child, remote_ts=(selector("10.4.0.10"), selector("10.4.1.0-10.4.1.255"))),)
    )
    policies = gateway.protect(two, "10.4.1.0/24")
    leave(gateway, two, policies)
    assert gateway.packet("10.4.1.9") == "sent on to 10.3.0.3"
    serves(gateway, here)
    assert gateway.packet("10.4.1.9") == "sent on to 10.3.0.3"
    assert gateway.routes.leads == {"10.4.1.0/24": ip_address("10.3.0.3")}
    serves(gateway, two)
    assert gateway.away.listing() == []


def test_looking_again_changes_nothing_where_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway()
    left(gateway)
    monkeypatch.setattr(gateway.away, "_change", lambda *_: pytest.fail("changed"))
    gateway.away.look_again()


def relay(gateway: Gateway) -> IkeContext:
    """An SA that has left, whose mobile node stays."""
    here = context()
    policies = gateway.protect(here)
    gateway.away.leave(here, "nsg", policies, relay=rule_for(here, 20000, ip_address("192.0.2.9")))
    for policy in policies:
        gateway.kernel.delete_policy(policy)
    return here


def places(gateway: Gateway) -> list[tuple[str, bool]]:
    """The mobile nodes' places from which packets are passed on, and whether their ESP is."""
    rows = gateway.away.listing()
    return [(str(rule.mn), rule.esp) for row in rows for rule in row.rules.values()]


def test_a_relay_begins_and_ends_with_the_departure() -> None:
    gateway = Gateway()
    here = relay(gateway)
    mn = str(here.remote)
    assert places(gateway) == [(mn, False)]
    gateway.begin()
    assert places(gateway) == [(mn, False)]
    gateway.away.left(here.spis)
    assert places(gateway) == [(mn, True)]
    gateway.begin()
    assert places(gateway) == [(mn, True)]
    gateway = Gateway()
    here = relay(gateway)
    gateway.away.back(here.spis)
    assert places(gateway) == []
    here = relay(gateway)
    gateway.away.left(here.spis)
    gateway.away.comes(here)  # it is still at the other gateway
    assert places(gateway) == [(mn, True)]
    serves(gateway, here)
    assert places(gateway) == []


def test_a_relay_outlives_the_sa_until_the_answer_to_its_delete_has_passed() -> None:
    async def scenario(*, anew: bool) -> None:
        gateway = Gateway()
        here = relay(gateway)
        gateway.away.left(here.spis)
        gateway.away.roamed(gateway.away.listing()[0], Endpoint.of("198.51.100.77", 1234), here.local)
        passing = gateway.away.passing
        seen_at = [
            Endpoint(here.local.address, rule.port) for rule in gateway.away.listing()[0].rules.values()
        ]
        assert len(seen_at) == 2
        gateway.away.hear("nsg", here.spis, here.epoch + 1, News.ENDS, "")
        assert places(gateway) == []
        lasting = [passing.of(place) for place in seen_at]
        assert [rule is not None and rule.esp for rule in lasting] == [False, False]
        if anew:
            serves(gateway, here)  # the mobile node is here again, so nothing of it is for the other gateway
        else:
            await asyncio.sleep(0.01)
        assert [passing.of(place) for place in seen_at] == [None, None]

    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(scenario(anew=True))
        patch.setattr(relays, "LINGER", 0.0)
        asyncio.run(scenario(anew=False))


def test_a_relayed_node_that_roams_is_passed_on_from_there_too() -> None:
    gateway = Gateway()
    here = relay(gateway)
    gateway.away.left(here.spis)
    there = [Endpoint.of("203.0.113.9", 4500 + n) for n in range(GUESTS + 1)]
    row = gateway.away.relayed(here.spis)
    assert row is not None
    assert gateway.away.roamed(row, here.remote, here.local) is None
    # the other gateway's address is of the other IP version
    assert (
        gateway.away.roamed(row, Endpoint.of("2001:db8::9", 4500), Endpoint.of("2001:db8::1", 4500)) is None
    )
    assert len(places(gateway)) == 1
    for place in there:
        row = gateway.away.relayed(here.spis)
        assert row is not None
        guest = gateway.away.roamed(row, place, here.local)
        assert guest is not None
        assert gateway.away.passing.of(Endpoint(here.local.address, guest.port)) == guest
    gateway.begin()
    # its first place stays, the others are the last ones
    assert [mn for mn, _ in places(gateway)] == [str(here.remote), *map(str, there[1:])]
    # those to which the other gateway answers stay before others
    gateway.away.passing.answered = lambda: {rule.port for rule in row.guests[:2]}  # type: ignore[method-assign]
    row = gateway.away.relayed(here.spis)
    assert row is not None
    gateway.away.roamed(row, there[0], here.local)
    assert [mn for mn, _ in places(gateway)] == [str(here.remote), *map(str, (there[1], there[2], there[0]))]
    later = SaName(b"rekeyed1", b"rekeyed2")
    gateway.away.renamed("nsg", here.spis, here.epoch + 1, later)
    gateway.away.renamed("other", here.spis, here.epoch + 1, SaName(b"strange1", b"strange2"))
    gateway.begin()
    assert gateway.away.relayed(later) == gateway.away.relayed(here.spis) is not None
    assert gateway.away.relayed(SaName(b"strange1", b"strange2")) is None


def test_other_spis_of_a_relayed_nodes_esp_are_led_back_to_it() -> None:
    gateway = Gateway()
    here = relay(gateway)
    gateway.away.left(here.spis)
    spis = (b"new1", b"new2")
    gateway.away.renamed("nsg", here.spis, here.epoch + 1, here.spis, spis)
    gateway.begin()
    row = gateway.away.relayed(here.spis)
    assert row is not None and row.relay is not None
    assert (row.relay.plain, row.relay.spis) == (True, spis)


def test_a_relay_goes_on_where_its_node_has_come_to_another_address_of_this_gateway_only() -> None:
    """The other gateway does not know that address, and says that the mobile node has come itself."""
    gateway = Gateway()
    here = relay(gateway)
    gateway.away.left(here.spis)
    gateway.away.roamed(gateway.away.listing()[0], here.remote, Endpoint.of("192.0.2.77", here.local.port))
    gateway.away.came("nsg", here.spis, here.epoch + 1)
    assert len(places(gateway)) == 2


def test_a_relay_ends_when_its_node_has_come_to_the_other_gateway_itself() -> None:
    gateway = Gateway()
    here = relay(gateway)
    gateway.away.left(here.spis)
    gateway.away.roamed(gateway.away.listing()[0], Endpoint.of("198.51.100.77", 1234), here.local)
    gateway.away.came("other", here.spis, here.epoch + 1)  # it was not given the SA
    gateway.away.came("nsg", here.spis, here.epoch)
    assert len(places(gateway)) == 2
    gateway.away.came("nsg", here.spis, here.epoch + 1)
    assert places(gateway) == []
    gateway.begin()
    assert places(gateway) == []
    assert gateway.away.listing()[0].sent_on, "its packets from inside are still sent on"
