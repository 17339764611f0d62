"""Where a mobile node is while its new link comes up: which address counts, and when. Hand-moved clock."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.errors import LinkError
from ikectx.node.mobility import HandoverOutcome, MobileState
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Address, Endpoint, TrafficSelector
from ikectx.wire.cxtp import StatusBlock
from tests.asking_node import World
from tests.hand_loop import run
from tests.mobile_world import NEW, NSG, OLD, PSG
from vici_bridge.mobile.parties import inner_addresses
from vici_bridge.mobile.place import OTHER_KIND, LocalPlace

FOUR, SIX = ip_address("192.0.2.2"), ip_address("2001:db8:2::1")
"""The gateway's addresses."""
OWN4, OWN6, ULA = ip_address("203.0.113.77"), ip_address("2001:db8:9::9"), ip_address("fd05::10")


class Ways:
    """The local address that leads to each gateway address."""

    def __init__(self) -> None:
        self.ways: dict[Address, list[Address]] = {}

    def __call__(self, remote: Address, avoid: Collection[Address]) -> Address | None:
        return next((one for one in self.ways.get(remote, []) if one not in avoid), None)


def test_the_sas_own_ip_version_at_once() -> None:
    ways = Ways()
    place = LocalPlace(ways, [SIX, FOUR], 4)
    ways.ways = {SIX: [OWN6], FOUR: [OWN4]}
    assert (place.look(0.0), place.due) == (OWN4, None)


@pytest.mark.parametrize("late", [0.012, 0.3])
def test_another_ip_version_is_not_taken_while_the_own_one_may_come(late: float) -> None:
    ways = Ways()
    place = LocalPlace(ways, [FOUR, SIX], 4)
    ways.ways = {SIX: [ULA]}
    assert (place.look(5.0), place.due) == (None, 5.0 + OTHER_KIND)
    ways.ways[FOUR] = [OWN4]
    assert (place.look(5.0 + late), place.due) == (OWN4, None)


def test_another_ip_version_where_there_is_no_own_one_for_long() -> None:
    ways = Ways()
    place = LocalPlace(ways, [FOUR, SIX], 4)
    ways.ways = {SIX: [OWN6]}
    assert place.look(5.0) is None
    assert place.look(5.5) is None
    assert place.due == 5.0 + OTHER_KIND
    assert place.look(5.0 + OTHER_KIND) == OWN6


def test_a_ula_comes_last_where_the_gateway_has_none() -> None:
    ways = Ways()
    place = LocalPlace(ways, [SIX], 6)
    ways.ways = {SIX: [ULA]}
    assert place.look(0.0) is None
    ways.ways = {SIX: [OWN6]}
    assert place.look(0.1) == OWN6
    ways.ways = {ip_address("fd02::2"): [ULA]}
    assert LocalPlace(ways, [ip_address("fd02::2")], 6).look(0.0) == ULA


def test_as_long_as_packets_go_by_the_old_address_the_node_has_not_moved() -> None:
    ways = Ways()
    place = LocalPlace(ways, [FOUR, SIX], 4, left=OLD.address)
    ways.ways = {FOUR: [OLD.address], SIX: [OWN6]}
    assert (place.look(0.0), place.due) == (None, None)
    ways.ways = {FOUR: [OWN4], SIX: [OWN6]}
    assert place.look(0.1) == OWN4


def test_a_refused_address_is_not_taken_again() -> None:
    ways = Ways()
    place = LocalPlace(ways, [FOUR, SIX], 4)
    ways.ways = {FOUR: [OWN4]}
    assert place.look(0.0) == OWN4
    place.refuse(OWN4)
    assert (place.look(0.1), place.due) == (None, None)
    ways.ways = {FOUR: [OWN4, NEW.address, ip_address("203.0.113.50")]}
    place.refuse(NEW.address)
    assert place.look(0.2) == ip_address("203.0.113.50")


# The agent.


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("late", [0.012, 0.3])
def test_predictive_where_a_ula_comes_before_the_address(late: float) -> None:
    async def scenario() -> None:
        w = World()
        w.outside.ways = {NSG.address: OLD.address}
        await w.handovers.announce("nsg")
        w.outside.ways = {SIX: ULA}
        w.handovers.addresses_changed()
        await asyncio.sleep(late)
        assert w.gateways.seen == []
        w.outside.ways[NSG.address] = NEW.address
        w.handovers.addresses_changed()
        report = await w.handovers._pending.task  # type: ignore[union-attr,misc]
        assert (report.result, report.new, report.mode) == ("moved", (NEW, NSG), "predictive")

    run(scenario())


def test_an_address_of_an_inner_network_is_none_of_a_new_place() -> None:
    # where a link has a route and no address yet, Linux sends from any other address
    async def scenario() -> None:
        w = World()
        (child,) = w.mobile.context.children
        network, inner = (ip_address(f"10.77.0.{last}") for last in (0, 1))
        selectors = (*child.local_ts, TrafficSelector(network, inner))
        w.mobile.context = replace(w.mobile.context, children=(replace(child, local_ts=selectors),))
        w.outside.own = [OLD.address, inner]
        await w.handovers.announce("nsg")
        w.outside.ways = {NSG.address: inner}
        w.handovers.addresses_changed()
        await asyncio.sleep(3.0)
        assert w.gateways.seen == []
        w.outside.ways[NSG.address] = NEW.address
        w.handovers.addresses_changed()
        report = await w.handovers._pending.task  # type: ignore[union-attr,misc]
        assert (report.result, report.new) == ("moved", (NEW, NSG))

    run(scenario())


def test_an_outer_address_in_a_traffic_selector_says_nothing_of_the_next() -> None:
    async def scenario() -> None:
        w = World()
        context = w.mobile.context
        (child,) = context.children
        everything = TrafficSelector(ip_address("0.0.0.0"), ip_address("255.255.255.255"))
        w.outside.own = [OLD.address, NEW.address]
        for selectors in ((everything,), (child.local_ts[0], everything)):
            shaped = replace(context, children=(replace(child, local_ts=selectors),))
            assert inner_addresses(w.outside, shaped) == context.local_vips

    run(scenario())


@pytest.mark.parametrize("late", [0.012, 0.3])
def test_reactive_where_a_ula_comes_before_the_address(late: float) -> None:
    async def scenario() -> None:
        w = World()
        w.outside.ways = {SIX: ULA}
        began, work = now(), asyncio.create_task(w.arrive())
        await asyncio.sleep(late)
        assert w.gateways.seen == []
        assert not w.handovers.lock.locked(), "charon answers gateways meanwhile"
        w.outside.ways[NSG.address] = NEW.address
        w.handovers.addresses_changed()
        report = await work
        assert (report.result, report.new) == ("moved", (NEW, NSG))
        assert now() - began == pytest.approx(late)

    run(scenario())


def test_another_ip_version_where_that_is_all_there_is_for_a_second() -> None:
    async def scenario() -> None:
        w = World()
        w.outside.ways = {SIX: OWN6}
        began = now()
        report = await w.arrive()
        assert report.new == (Endpoint(OWN6, 4500), Endpoint(SIX, 4500))
        assert now() - began == pytest.approx(OTHER_KIND)

    run(scenario())


def test_no_way_at_all() -> None:
    async def scenario() -> None:
        w = World()
        w.outside.ways = {}
        began = now()
        with pytest.raises(LinkError, match="leads to nsg"):
            await w.arrive()
        assert now() - began == pytest.approx(OTHER_KIND)
        assert w.steps() == []

    run(scenario())


class Choosy:
    """nSG takes the SA at one address only; each request has a sequence number of its own."""

    def __init__(self, w: World, good: Address, status: Status = Status.NO_ADDRESS) -> None:
        self.good, self.status = good, status
        self.asked: list[tuple[int, Address]] = []
        self._gateways = w.gateways
        w.handovers._run = self

    async def __call__(self, machine: Any, *args: Any, **more: Any) -> HandoverOutcome:
        gateways = self._gateways
        moves, gateways.state = more.get("moves"), MobileState.ACTIVATED

        async def told() -> Endpoint | None:
            place: Endpoint | None = await moves
            self._judge(machine, place)
            return place

        if moves is None:
            self._judge(machine, machine.care_of)
        else:
            more["moves"] = told()
        return await gateways(machine, *args, **more)

    def _judge(self, machine: Any, place: Endpoint | None) -> None:
        assert place is not None
        self.asked.append((machine.sequence, place.address))
        gateways, refused = self._gateways, place.address != self.good
        gateways.state = MobileState.REFUSED if refused else MobileState.ACTIVATED
        gateways.statuses = (StatusBlock(Fpt.IKEV2_SA, self.status),) if refused else ()


def test_a_refusal_that_another_address_can_cure_does_not_end_an_announced_move() -> None:
    async def scenario() -> None:
        w = World()
        nsg = Choosy(w, NEW.address)
        w.outside.ways = {NSG.address: OLD.address}
        await w.handovers.announce("nsg")
        pending = w.handovers._pending
        assert pending is not None and pending.task is not None
        w.outside.ways = {NSG.address: ip_address("203.0.113.50")}
        w.handovers.addresses_changed()
        await asyncio.sleep(20)
        assert (w.mobile.state, w.mobile.remote) == ("ESTABLISHED", PSG)
        assert w.handovers.status() is not None
        w.handovers.addresses_changed()  # nothing new
        await asyncio.sleep(1)
        assert len(nsg.asked) == 1
        w.outside.ways = {NSG.address: NEW.address}
        w.handovers.addresses_changed()
        report = await pending.task
        assert (report.result, report.new, report.announced) == ("moved", (NEW, NSG), True)
        assert [address for _, address in nsg.asked] == [ip_address("203.0.113.50"), NEW.address]
        assert nsg.asked[0][0] != nsg.asked[1][0], "a token counts once"
        assert w.handovers.status() is None
        assert w.handovers.notes.last()["result"] == "moved"
        assert w.handovers.notes.in_question() == []

    run(scenario())


def test_a_refusal_ends_it_with_the_time_of_the_announcement() -> None:
    async def scenario() -> None:
        w = World()
        nsg = Choosy(w, OWN4)
        w.outside.ways = {NSG.address: OLD.address}
        await w.handovers.announce("nsg")
        began, pending = now(), w.handovers._pending
        assert pending is not None and pending.task is not None
        w.outside.ways = {NSG.address: NEW.address, SIX: OWN6}
        w.handovers.addresses_changed()
        report = await pending.task
        assert (report.result, report.status, report.serves) == ("refused", Status.NO_ADDRESS, "psg")
        # after the first refusal the other IP version, which is refused as well
        assert [address for _, address in nsg.asked] == [NEW.address, OWN6]
        assert now() - began == pytest.approx(30)
        assert w.mobile.state == "ESTABLISHED"
        assert w.handovers.status() is None

    run(scenario())


@pytest.mark.parametrize("named", [False, True])
def test_a_refusal_that_no_address_cures_and_one_of_an_address_that_was_named(named: bool) -> None:
    async def scenario() -> None:
        w = World()
        nsg = Choosy(w, OWN4, Status.NO_ADDRESS if named else Status.NO_CONNECTION)
        await w.handovers.announce("nsg")
        began = now()
        report = await w.arrive(address=NEW.address if named else None)
        assert (report.result, report.serves) == ("refused", "psg")
        assert len(nsg.asked) == 1
        assert now() == began
        assert w.handovers.status() is None

    run(scenario())


def test_calling_it_off_between_two_addresses() -> None:
    async def scenario() -> None:
        w = World()
        Choosy(w, OWN4)
        w.outside.ways = {NSG.address: OLD.address}
        await w.handovers.announce("nsg")
        w.outside.ways = {NSG.address: NEW.address}
        w.handovers.addresses_changed()
        await asyncio.sleep(1)
        assert w.handovers.status() is not None
        assert await w.handovers.cancel()
        assert w.handovers.status() is None
        assert w.mobile.state == "ESTABLISHED"

    run(scenario())
