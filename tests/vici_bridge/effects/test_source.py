"""pSG's side, where it can be tried without a charon."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest

from ikectx.errors import BusyError, UnknownSaError
from ikectx.sa.context import Address, FinalState, IkeContext
from ikectx.sa.name import SaName
from tests.across.test_go_on import nobody, served
from tests.gateway_world import Place
from tests.hand_loop import run
from tests.peers import a_context
from tests.vici_bridge.effects.test_sink import place
from vici_bridge.effects.leaving import outbound_of
from vici_bridge.effects.sink import CharonSink
from vici_bridge.effects.source import CharonSource
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.record import MidChanged, Rekeyed
from vici_bridge.host import CharonHost
from vici_bridge.kernel.xfrm import KernelSa
from vici_bridge.vici.views import SaView

HANDED = [(True, True, False), (True, False, True), (False, True, True)]
"""Does the other gateway hold the context? Is ESP the kernel's? Does it have no part of the SA then?"""


def test_sas_are_found_by_the_address_of_their_mn() -> None:
    async def scenario() -> None:
        here, first, second = place(), a_context(1), a_context(2)  # their mobile nodes are behind one NAT
        for one in (first, second):
            here.charon.serve(one)
        source = CharonSource(here.host, nobody)
        assert await source.find(first.remote.address) == [first.spis, second.spis]
        here.charon.sas[IkeId.of(second.current)].state = "PASSIVE"
        here.charon.sas[IkeId.of(second.current)].view = None
        assert await source.find(first.remote.address) == [first.spis]
        assert await source.find(ip_address("203.0.113.99")) == []

    run(scenario())


def test_virtual_ips_are_those_that_charon_lists() -> None:
    """After an IKE rekey a resync tells none of them, and the other gateway would refuse the selectors."""

    async def scenario() -> None:
        async with served() as (here, source, context):
            (view,) = here.charon.views()

            async def listed(sa: SaName) -> SaView:
                return replace(view, remote_vips=(ip_address("10.3.9.9"),))

            here.host.view = listed  # type: ignore[method-assign]
            assert (await source.export(context.spis)).remote_vips == (ip_address("10.3.9.9"),)

    asyncio.run(scenario())


def test_charon_is_asked_for_an_export_only_if_something_may_have_changed() -> None:
    """The freeze asks anyway, and compares."""

    async def scenario() -> None:
        async with served() as (here, source, context):
            host, sa = here.host, context.spis
            (view,) = here.charon.views()
            asked: list[SaName] = []

            async def listed(sa: SaName) -> SaView:
                asked.append(sa)
                return view

            async def shows(view: SaView) -> None:
                """charon shows it so, when somebody lists it."""
                await asyncio.sleep(0.01)
                host.listing._seen[sa] = asyncio.get_running_loop().time(), view
                await asyncio.sleep(0.01)

            host.view = listed  # type: ignore[method-assign]
            await host.known.now()
            asked.clear()
            await shows(replace(view, rekey=7200))
            await asyncio.sleep(30.0)
            assert (await source.export(sa)).lifetime.rekey == 7170 and asked == []
            host._fed(MidChanged(sa, initiator=False, mid=7))
            await source.export(sa)
            assert asked == []
            # a request of charon's may be unanswered still
            host._fed(MidChanged(sa, initiator=True, mid=7))
            await source.export(sa)
            assert asked == [sa]
            asked.clear()
            await shows(replace(view, tasks=("IKE_DPD",)))
            await source.export(sa)
            assert asked == [sa]

    run(scenario())


class CountedKernel:
    marked = False

    """Inbound SAs by SPI, each with a request id; counts what it is asked."""

    def __init__(self, reqids: dict[bytes, int]) -> None:
        self.reqids = reqids
        self.asked = 0

    def get_sas(self, names: Sequence[tuple[Address, bytes]]) -> list[Any]:
        self.asked += len(names)
        return [SimpleNamespace(reqid=self.reqids[spi]) if spi in self.reqids else None for _, spi in names]


def a_source(kernel: CountedKernel, departed: dict[SaName, tuple[IkeContext, float]]) -> CharonSource:
    """A source whose charon is destroying these SAs, each with the time since its last request."""
    host = SimpleNamespace(
        kernel=kernel,
        heard=SimpleNamespace(departed=lambda: departed),
        config=SimpleNamespace(addresses=(a_context().local.address,)),
        leaving=None,
        spawn=None,
        listing=SimpleNamespace(crowd=None),
    )
    return CharonSource(host, None)  # type: ignore[arg-type]


def test_a_mobile_node_that_has_just_connected_anew_falls_silent() -> None:
    before, after = a_context(1), a_context(2)
    kernel = CountedKernel({context.children[0].spi_in: 7 for context in (before, after)})
    departed = {before.spis: (before, 0.1), after.spis: (after, 60.0)}
    source = a_source(kernel, departed)
    assert source.departing_by_reqid(7, {"home"}) == (after.spis, after, 60.0)


def test_b15_the_hook_looks_into_the_kernel_once_for_each_sa_and_only_where_it_matters() -> None:
    contexts = {(one := a_context(number)).spis: one for number in range(1, 101)}
    spis = [context.children[0].spi_in for context in contexts.values()]
    kernel = CountedKernel({spi: number for number, spi in enumerate(spis, 1)})
    departed = {sa: (context, 60.0) for sa, context in contexts.items()}
    source = a_source(kernel, departed)
    # charon stops, and asks its script for all of them
    for reqid in range(1, 101):
        assert source.departing_by_reqid(reqid, ()) is None
    assert kernel.asked == 0
    for reqid, (sa, context) in enumerate(contexts.items(), 1):
        assert source.departing_by_reqid(reqid, {"home"}) == (sa, context, 60.0)
    assert source.departing_by_reqid(101, {"home"}) is None
    assert kernel.asked == 100


def test_b16_nothing_is_exported_that_the_other_gateway_does_not_apply() -> None:
    """charon there makes its own policies, and holds the SA against its own connection."""

    async def scenario() -> None:
        async with served() as (here, source, context):
            assert context.policies == ()
            assert context.peer is not None
            assert [auth.method for auth in context.peer.remote_auth] == ["psk"]
            assert context.peer.children == ("rw",)
            assert (context.peer.local_auth, context.peer.proposals, context.peer.pools) == ((), (), ())
            # one figure for both directions: the one that is nearer to its limit
            (child,) = context.children
            for name, packets in (
                ((context.local.address, child.spi_in), 70),
                ((context.remote.address, child.spi_out), 90),
            ):
                here.sad.count_on(here.sad.sas[name], packets * 100, packets)
            used = (await source.export(context.spis)).children[0].lifetime
            assert (used.bytes_used, used.packets_used) == (9000, 90)

    asyncio.run(scenario())


def far_ahead(here: Place, context: IkeContext, packets: int) -> KernelSa:
    """So many packets have left by the SA since it was exported."""
    (child,) = context.children
    _, sa = here.host.kernel_pair(context, child)
    assert sa is not None
    sent = replace(sa.replay, oseq=child.outbound.seq + packets)
    here.sad.sas[sa.destination, sa.spi] = replace(sa, replay=sent)
    return sa


def test_an_export_that_is_too_old_is_not_frozen_and_nothing_is_sent_on() -> None:
    """The other gateway is prepared to go on at the exported numbers and the jump: packets that were sent on
    to it would leave under numbers that were used here."""

    async def scenario() -> None:
        async with served() as (here, source, context):
            jump = here.host.config.oseq_jump
            far_ahead(here, context, jump)
            left: list[SaName] = []
            leave = here.host.away.leave

            def counted(context: IkeContext, *more: Any, **other: Any) -> Any:
                left.append(context.spis)
                return leave(context, *more, **other)

            here.host.away.leave = counted  # type: ignore[method-assign]
            with pytest.raises(BusyError, match=f"{jump} packets .* since it was exported") as caught:
                await source.freeze(context, "nsg")
            assert "oseq_jump" in caught.value.hint
            assert left == []
            assert here.sad.send(context.remote_vips[0]) == context.children[0].spi_out
            assert not here.host.leaving.all()
            # exported anew it can go
            assert (await source.freeze(await source.export(context.spis), "nsg")).children
            assert left == [context.spis]

    asyncio.run(scenario())


def test_an_sa_that_nobody_is_prepared_for_goes_however_much_was_sent() -> None:
    """Then the other gateway gets the numbers of the freeze, before it sends anything."""

    async def scenario() -> None:
        async with served() as (here, source, context):
            sa = far_ahead(here, context, here.host.config.oseq_jump)
            source.hands_over(context.spis)
            final = await source.freeze(context, "nsg")
            assert final.children[0].outbound.seq == here.sad.sas[sa.destination, sa.spi].replay.oseq

    asyncio.run(scenario())


def test_a_freeze_asks_the_kernel_for_its_policies_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SaName] = []

    def counted(host: CharonHost, context: IkeContext) -> Any:
        asked.append(context.spis)
        return outbound_of(host, context)

    async def scenario() -> None:
        async with served() as (_, source, context):
            monkeypatch.setattr("vici_bridge.effects.freeze.outbound_of", counted)
            await source.freeze(await source.export(context.spis), "nsg")
            assert asked == [context.spis]

    asyncio.run(scenario())


@pytest.mark.parametrize(("held", "kernel", "unprepared"), HANDED)
def test_packets_go_at_once_to_a_gateway_that_can_have_the_sa_ready(
    held: bool, kernel: bool, unprepared: bool
) -> None:
    """Of ESP in user space nothing is: what was sent on to it would leave in the clear."""
    told: list[bool] = []

    async def scenario() -> None:
        async with served() as (here, source, context):
            if not kernel:
                here.host.kernel = None
            leave = here.host.away.leave

            def noted(*words: Any, **more: Any) -> Any:
                told.append(more["unprepared"])
                return leave(*words, **more)

            here.host.away.leave = noted  # type: ignore[method-assign]
            source.hands_over(context.spis, held=held)
            await source.freeze(context, "nsg")

    asyncio.run(scenario())
    assert told == [unprepared]


def test_an_sa_that_was_rekeyed_meanwhile_is_busy_not_unknown() -> None:
    """The exit code was that for an SA that does not exist, so that scripts did not try again."""

    async def scenario() -> None:
        async with served() as (here, source, context):

            async def nothing(sa: SaName) -> SaView | None:
                return None

            here.host.view = nothing  # type: ignore[method-assign]
            with pytest.raises(UnknownSaError):
                await source.export(context.spis)
            here.host._fed(Rekeyed(context.spis, SaName(b"new init", b"new resp")))
            with pytest.raises(BusyError, match="rekeyed meanwhile"):
                await source.export(context.spis)

    asyncio.run(scenario())


def test_charon_and_the_kernel_say_how_an_sa_stands() -> None:
    """A journal that is an old copy says something else."""

    async def scenario() -> None:
        async with served() as (here, source, context):
            sa, mute = context.spis, here.host.mute
            assert await source.stands(sa, True) == "served"
            await source.freeze(context, "nsg")
            assert await source.stands(sa, False) == "frozen"
            mute.unmute(sa)  # as after `nft flush ruleset` while no agent ran
            assert await source.stands(sa, False) == "unknown"
            assert mute.listing() == []
            assert await source.stands(sa, True) == "frozen"
            assert {one.direction for one in mute.listing()} == {"in", "out"}
            mute.unmute(sa)

            async def gone(sa: SaName) -> None:
                return None

            here.host.view = gone  # type: ignore[method-assign,assignment]
            assert await source.stands(sa, True) == "gone"

    asyncio.run(scenario())


def test_only_an_sa_that_is_active_and_not_mute_is_served_for_certain() -> None:
    async def scenario() -> None:
        async with served() as (here, _, context):
            sink = CharonSink(here.host, None)  # type: ignore[arg-type]
            final = FinalState(*context.spis, 0, 0, 1)
            found = await sink.still_here(final, context.remote.address, "")
            assert (
                found.serves and "under the same SPIs" in found.words and found.mn == str(context.remote_id)
            )
            here.host.mute.mute_out(context.spis)
            found = await sink.still_here(final, context.remote.address, "")
            assert not found.serves and "under the same SPIs" in found.words
            other = FinalState(bytes(8), bytes(8), 0, 0, 1)
            assert not (await sink.still_here(other, ip_address("203.0.113.9"), "")).words

    asyncio.run(scenario())
