"""SAs that come in at once: none of them overlooks another, though all have looked before the first came."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address

import pytest

from ikectx.numbers import Status
from ikectx.sa.name import SaName
from tests import hand_loop
from tests.across.test_go_on import served
from tests.gateway_world import Place
from tests.vici_bridge.effects.test_sink import a_context, final_of, move, place, rival, run
from vici_bridge.effects.looks import MANY
from vici_bridge.ha.messages import Attr, HaMessage, HaType
from vici_bridge.ha.segment import ALL, segment_of
from vici_bridge.policy.present import Present
from vici_bridge.vici import list_sas as listing_module
from vici_bridge.vici.codec import Message
from vici_bridge.vici.views import SaView


def that_looks_before_others_come(here: Place, gate: asyncio.Event, count: int) -> list[int]:
    """The first `count` listings are told when `gate` is open; each look appends how many SAs it saw."""
    looks: list[int] = []
    read = here.host.views

    async def views() -> list[SaView]:
        seen = await read()
        looks.append(len(seen))
        if len(looks) <= count:
            await gate.wait()
        return seen

    here.host.views = views  # type: ignore[method-assign]
    return looks


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("kinds", [("inbound",), ("responder",)], ids="-".join)
def test_those_that_looked_at_once_get_different_names(kinds: tuple[str, ...], kernel: bool) -> None:
    async def scenario() -> None:
        here, gate = place(kernel=kernel), asyncio.Event()
        first = a_context(1)
        second = rival(first, *kinds)
        for one in (first, second):
            here.mobiles.add(one)
        looks = that_looks_before_others_come(here, gate, 1)
        work = [asyncio.create_task(move(here, one)) for one in (first, second)]
        while not looks:
            await asyncio.sleep(0.001)
        gate.set()
        await asyncio.gather(*work)
        assert looks == [0], "one look is for both"
        assert len(here.charon.views()) == 2
        assert sum(wish.children != () or wish.ike != b"" for wish in here.mobiles.asked) == 1
        here.sound()

    run(scenario())


def test_a_name_given_meanwhile_is_taken() -> None:
    """The first has been told another name, and that is the one the second has."""

    async def scenario() -> None:
        here, gate = place(), asyncio.Event()
        other, first = rival(a_context(1), "inbound"), a_context(1)
        here.charon.serve(other)
        for one in (other, first):
            here.mobiles.add(one)
        await here.sink.prepare(first, False)
        plan = here.sink._renames.plan_of(here.sink._here(first))
        assert plan is not None
        second = a_context(2, mn="198.51.100.8")
        child = replace(second.children[0], spi_in=plan.children[0].new_in)
        second = replace(second, children=(child,))
        here.mobiles.add(second)
        looked, now = asyncio.Event(), here.host.known.now

        async def slowly() -> Present:
            present = await now()
            looked.set()
            await gate.wait()
            return present

        here.host.known.now = slowly  # type: ignore[method-assign]
        coming = asyncio.create_task(here.sink.prepare(second, False))
        await looked.wait()
        here.host.known.now = now  # type: ignore[method-assign]
        final = final_of(first)
        await here.sink.take(first, final)
        report = await here.sink.move_peer(first, final)
        await here.sink.activate(first, final, report)
        assert here.sink._renames.plan_of(here.sink._here(first)) is None, "nothing is promised any more"
        gate.set()
        await coming
        taken = {(view.spi_i, child.spi_in) for view in here.charon.views() for child in view.children}
        assert len({spi for _, spi in taken}) == len(taken) == 3
        assert here.charon.offences == []

    run(scenario())


def test_sas_of_a_charon_that_has_ended_are_in_nobodys_way() -> None:
    """An SA that was taken just before charon died kept its mobile node away for ten seconds."""

    async def scenario() -> None:
        here = place()
        sa, looks = a_context(1), here.sink._looks
        await here.sink.prepare(sa, False)
        assert [view.spis for view in (await looks.look(sa)).present.views] == [sa.spis]
        here.charon.sas.clear()
        here.host._charon_state(up=False)
        assert not list((await looks.look(sa)).present.views)

    run(scenario())


def listings(here: Place) -> list[str]:
    """A word for each time that charon is asked for an SA, or for all. What it says is remembered."""
    asked: list[str] = []
    one, every, seen = here.host.view, here.host.views, here.host.listing._seen

    async def view(sa: SaName, *, search: bool = True) -> SaView | None:
        asked.append("one")
        found = await one(sa)
        seen.pop(sa, None)
        if found is not None:
            seen[sa] = asyncio.get_running_loop().time(), found
        return found

    async def views() -> list[SaView]:
        asked.append("all")
        found = await every()
        seen.update({view.spis: (asyncio.get_running_loop().time(), view) for view in found})
        return found

    here.host.view = view  # type: ignore[method-assign]
    here.host.views = views  # type: ignore[method-assign]
    return asked


def test_how_often_charon_is_asked_for_its_sas_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six times at both gateways. Each look that is left finds a change of charon that nothing else tells;
    the SPD is not dumped."""
    monkeypatch.setattr(listing_module, "MOMENT", 60.0)  # however slow this machine is

    async def scenario() -> None:
        async with served() as (old, source, _):
            new = place()
            at_old, at_new = listings(old), listings(new)
            await asyncio.sleep(0.1)  # since the last order to charon
            (sa,) = await old.host.views()  # by which a command chooses
            context = await source.export(sa.spis)
            new.mobiles.add(context)
            assert await new.sink.check(context, False) == []
            await new.sink.prepare(context, False)
            assert at_new == ["all", "one"], "what the check found is not asked for again; charon installs"
            final = await source.freeze(context, "nsg")
            assert at_old == ["all", "one"], "charon is mute and has the SA as it was exported"
            await new.sink.take(context, final)
            report = await new.sink.move_peer(context, final)
            await new.sink.activate(context, final, report)
            assert at_new[2:] == ["one"], "it is active"
            await source.release(context)
            assert at_old[2:] == ["one"], "it is deleted; charon has been quiet, so nobody ended it"
            assert len(at_old) + len(at_new) == 6
            new.sound()

    run(scenario())


def test_an_sa_that_is_active_already_has_nothing_toggled() -> None:
    """Between the two messages all SAs of charon would be PASSIVE."""

    async def scenario() -> None:
        here, first = place(), a_context(1)
        second = a_context(2, mn="198.51.100.8")
        for one in (first, second):
            here.mobiles.add(one)
            await here.sink.prepare(one, False)
        sent: list[HaType] = []
        hear = here.charon.hear

        def heard(message: HaMessage) -> None:
            sent.append(message.type)
            hear(message)

        here.charon.hear = heard  # type: ignore[method-assign]
        for one in (first, second):
            final = final_of(one)
            await here.sink.take(one, final)
            report = await here.sink.move_peer(one, final)
            await here.sink.activate(one, final, report)
        here.sound()
        assert sent.count(HaType.SEGMENT_TAKE) == 1, "the first's activated both"
        await here.host.segments.activate()
        assert sent.count(HaType.SEGMENT_TAKE) == 2

    run(scenario())


@pytest.mark.parametrize(("told", "has"), [(16, 16), (1, 16), (16, 1)])
def test_an_sa_becomes_active_whatever_number_of_segments_the_agent_was_told(told: int, has: int) -> None:
    """charon ignores segments that it does not have (`ha_segments.c`)."""

    async def scenario() -> None:
        here, first = place(segments=told), a_context(1)
        here.mobiles.add(first)
        sent: list[int] = []
        hear = here.charon.hear

        def heard(message: HaMessage) -> None:
            if message.type in (HaType.SEGMENT_TAKE, HaType.SEGMENT_DROP):
                segment = message.need(Attr.SEGMENT, int)
                sent.append(segment)
                if segment not in (ALL, segment_of(first.remote.address, has) or 1):
                    return
            hear(message)

        here.charon.hear = heard  # type: ignore[method-assign]
        await move(here, first)
        here.sound()
        assert [view.state for view in here.charon.views()] == ["ESTABLISHED"]
        assert sent == {(16, 16): [5, 5], (1, 16): [ALL, ALL], (16, 1): [5, 5, ALL, ALL]}[told, has]

    hand_loop.run(scenario())


def test_an_sa_that_came_between_a_check_and_its_prepare_is_seen() -> None:
    async def scenario() -> None:
        here, first = place(), a_context(1)
        second = rival(first, "responder")
        for one in (first, second):
            here.mobiles.add(one)
        assert await here.sink.check(second, False) == []
        await here.sink.prepare(first, False)
        asked = listings(here)
        await here.sink.prepare(second, False)
        assert "all" not in asked
        plan = here.sink._renames.plan_of(here.sink._here(second))
        assert plan is not None and plan.ike
        assert here.charon.offences == []

    run(scenario())


def test_of_a_thousand_connections_only_that_of_the_sa_is_asked_for() -> None:
    """All are needed only where the networks behind this gateway matter, which the others tell as well."""

    async def scenario() -> None:
        here, first = place(), a_context(1)
        (rw,) = first.children
        (network,) = rw.remote_ts
        asked: list[object] = []
        others = here.host.vici.connections

        async def connections(names: object = None) -> Mapping[str, Message]:
            asked.append(names)
            return await others()

        here.host.vici.connections = connections  # type: ignore[method-assign]
        for _ in range(2):
            assert await here.sink.check(first, False) == []
        assert asked == [["home"]], "once within a moment"
        outside = replace(network, start=ip_address("10.7.0.0"), end=ip_address("10.7.0.255"))
        second = replace(first, children=(replace(rw, remote_ts=(outside,)),))
        assert [one.status for one in await here.sink.check(second, False)] == [Status.SELECTORS]
        assert asked == [["home"], None]

    run(scenario())


@pytest.mark.parametrize("online", [MANY, MANY + 1])
def test_of_many_leases_only_those_of_the_pool_with_the_virtual_ip_are_asked_for(online: int) -> None:
    """A gateway with thousands of mobile nodes has as many leases, and a handover waits for them."""

    async def scenario() -> None:
        here, first = place(), a_context(1)
        (vip,) = first.remote_vips
        elsewhere = replace(first, remote_vips=(ip_address("10.9.0.1"),))
        asked: list[tuple[str, bool]] = []
        lease = {"0": {"address": str(vip), "identity": "somebody", "status": "online"}}

        async def pools(name: str = "", *, leases: bool = False) -> Mapping[str, Message]:
            asked.append((name, leases))
            told = {"base": "10.3.0.1", "size": "65534", "online": str(online)}
            mobile = {**told, **({"leases": lease} if leases else {})}
            return {"mobile": mobile} if name else {"mobile": mobile, "x": {"base": "10.4.0.1", "size": "0"}}

        here.host.vici.pools = pools  # type: ignore[method-assign]
        many = [("", False)] if online > MANY else [("", True)]
        for context, more in (
            (first, [("", True)]),
            (first, [*many, ("mobile", True)] if online > MANY else many),
            (elsewhere, many),
        ):
            asked.clear()
            await asyncio.sleep(1)
            for _ in range(2):
                found = [one.status for one in await here.sink.check(context, False)]
                assert (Status.VIP_IN_USE in found) is (context is first)
            assert asked == more, "once within a moment"

    hand_loop.run(scenario())
