"""Tokens of MNs that arrive: each does once, a bad one gets no answer at all."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.engine.journaled import MobileConfig
from ikectx.errors import CharonError, StateError
from ikectx.numbers import Status
from ikectx.sa.context import Endpoint
from ikectx.wire.cxtp import Ctaa, Ctar, Pctd, TokenAlgorithm, compute_token
from ikectx.wire.tokens import token_key
from tests.hand_loop import run
from tests.mobile_nodes import AWAY, CXTP, MobileNode, kinds, requests, serve
from tests.peers import a_context
from tests.worlds import World, world

# -- copies ----------------------------------------------------------------------------------------------


async def refused_arrival(w: World) -> tuple[MobileNode, bytes, Endpoint, bytes]:
    """A mobile node, its CTAR, where that came from, and the CTAA: nSG could not take the SA."""
    mn = serve(w, a_context())
    w.b.daemon.fail["take"] = [CharonError("no")]
    here, there = mn.arrive()
    refusal = await w.b.agent.ctar(here, there)
    assert refusal is not None and mn.says(refusal) is Status.CHARON
    return mn, here, there, refusal


def test_an_announcement_that_comes_behind_the_arrival_is_none() -> None:
    """It would be held at nSG, which would take the SA for a copy of the arrival that it has refused."""

    async def scenario() -> None:
        async with world() as w:
            mn, here, there, refusal = await refused_arrival(w)
            await w.quiet()
            assert await w.a.agent.ctar(*mn.announce()) is None
            assert await w.b.agent.ctar(here, there) == refusal
            await w.quiet()
            assert w.owner(mn.sa) == "a"

    run(scenario())


@pytest.mark.parametrize("announced", [True, False])
def test_a_retransmission_gets_the_same_answer_and_begins_nothing(announced: bool) -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            told, source = mn.announce()
            if announced:
                first = await w.a.agent.ctar(told, source)
                assert first is not None
                assert await w.a.agent.ctar(told, source) == first
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            here, there = mn.arrive()
            arriving = asyncio.create_task(w.b.agent.ctar(here, there))
            await w.b.reaches("prepare")
            assert await w.b.agent.ctar(here, there) is None  # under way
            gate.set()
            answer = await arriving
            assert mn.says(answer) is Status.OK
            await w.quiet()
            seen = len(w.network.seen)
            assert await w.b.agent.ctar(here, there) == answer
            # seen before, but from elsewhere, or not quite the same
            assert await w.b.agent.ctar(here, replace(there, port=1)) is None
            assert await w.b.agent.ctar(mn.arrive(expiry=1 << 31)[0], there) is None
            if announced:
                assert await w.a.agent.ctar(told, Endpoint.of("203.0.113.66", CXTP)) is None
            assert len(w.network.seen) == seen
            assert w.owner(mn.sa) == "b"
            # after its time it is nothing any more
            w.wall = 120.0
            assert await w.b.agent.ctar(here, there) is None
            assert await w.a.agent.ctar(told, source) is None

    run(scenario())


def test_a_refusal_is_not_repeated_when_another_transfer_has_brought_the_sa() -> None:
    """The mobile node would believe that the old gateway serves it."""

    async def scenario() -> None:
        async with world() as w:
            mn, here, there, refused = await refused_arrival(w)
            assert await w.b.agent.ctar(here, there) == refused
            await w.quiet()
            assert (await w.a.agent.transfer(mn.sa, "b")).result == "moved"
            again = await w.b.agent.ctar(here, there)
            assert again is None or mn.says(again) is not Status.CHARON
            assert w.owner(mn.sa) == "b"

    run(scenario())


def test_a_token_does_once_even_when_the_gateway_has_forgotten() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            told, here = mn.announce(), mn.arrive()
            await w.a.agent.ctar(*told)
            assert mn.says(await w.b.agent.ctar(*here)) is Status.OK
            await w.quiet()
            assert (await w.b.agent.transfer(mn.sa, "a")).result == "moved"
            for side in (w.a, w.b):
                await side.stop()
                await side.start()
            # the SA is at a again, and who recorded the CTARs cannot move it to b
            served = w.a.daemon.served[mn.sa]
            assert served.remote == AWAY
            w.a.daemon.served[mn.sa] = replace(served, remote=mn.context.remote)
            assert await w.a.agent.ctar(*told) is None
            assert await w.b.agent.ctar(*here) is None
            await w.quiet()
            assert w.owner(mn.sa) == "a"
            # used tokens are forgotten when they have expired
            assert len(w.a.store.items("token")) == 2
            w.wall = 500.0
            mn = replace(mn, sequence=9, lifetime=560.0, context=w.a.daemon.served[mn.sa])
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            assert len(w.a.store.items("token")) == 1

    run(scenario())


# -- tokens that are not good ----------------------------------------------------------------------------

STRANGER = a_context(99).current
WRONG: list[dict[str, Any]] = [
    {"nsg": "c"},
    {"psg": "c"},
    {"nsg": "nobody"},
    {"psg": "nobody"},
    {"expiry": 1},
    {"expiry": (1 << 32) - 1},
    {"spis": a_context(2).spis},
    {"sequence": 77},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: next(iter(wrong)))
@pytest.mark.parametrize("held", [False, True])
def test_a_ctar_without_a_good_token_gets_nothing(wrong: dict[str, Any], held: bool) -> None:
    async def scenario() -> None:
        async with world(names=("a", "b", "c")) as w:
            mn = serve(w, a_context())
            serve(w, a_context(2, mn="198.51.100.20"))
            if held:
                await w.a.agent.ctar(*mn.announce())
            here, there = mn.arrive(**wrong)
            if "sequence" in wrong:
                here = replace(here, sequence=mn.sequence)  # a tag for another one
            told, home = mn.announce(**wrong)
            if "sequence" in wrong:
                told = replace(told, sequence=mn.sequence)
            for _ in range(2):  # nor has a copy more luck
                assert mn.says(await w.b.agent.ctar(here, there)) is None
                if wrong != {"nsg": "c"}:  # it may go there, too
                    assert await w.a.agent.ctar(told, home) is None
            assert w.a.daemon.calls.count("freeze") == 0
            assert w.b.daemon.calls == ["check"] * held
            # and the MN itself is not kept from moving
            if wrong not in ({"psg": "c"}, {"nsg": "c"}):
                assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK

    run(scenario())


def test_ctars_are_nothing_without_a_configuration() -> None:
    async def scenario() -> None:
        async with world() as w:
            await w.a.stop()
            w.mobile = None
            await w.a.start()
            mn = serve(w, a_context())
            with pytest.raises(StateError, match="mobile"):
                await w.a.agent.ctar(*mn.announce())
            assert await w.b.agent.ctar(*mn.arrive()) is None
            assert w.a.daemon.calls == []

    run(scenario())


def test_a_ctar_that_holds_no_token_or_nonsense_gets_nothing() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            here, there = mn.arrive()
            assert await w.b.agent.ctar(replace(here, blocks=()), there) is None
            assert await w.b.agent.ctar(replace(here, blocks=here.blocks * 2), there) is None
            cut = replace(here.blocks[0], data=here.blocks[0].data[:20])
            assert await w.b.agent.ctar(replace(here, blocks=(cut,)), there) is None
            assert kinds(w) == []

    run(scenario())


def test_only_so_many_ctars_of_a_gateway_are_remembered_and_no_forged_ones() -> None:
    async def scenario() -> None:
        async with world() as w:
            await w.b.stop()
            w.mobile = MobileConfig(memory=2)
            await w.b.start()
            mns = [serve(w, a_context(n, mn=f"198.51.100.{n}"), sequence=n) for n in (1, 2, 3)]
            for sequence in range(1, 6):
                forged = replace(mns[0].arrive(sequence=sequence)[0], token=1)
                assert await w.b.agent.ctar(forged, AWAY) is None
            assert len(requests(w)) == 5
            answers = [mn.says(await w.b.agent.ctar(*mn.arrive())) for mn in mns]
            assert answers == [Status.OK] * 3
            assert len(requests(w)) == 8
            # the copy of one that was forgotten begins nothing either: its SA is here
            assert mns[0].says(await w.b.agent.ctar(*mns[0].arrive())) is Status.OK
            assert len(requests(w)) == 8
            w.wall = 95.0  # they have expired
            later = replace(mns[2], lifetime=150.0)
            assert later.says(await w.b.agent.ctar(*later.arrive())) is Status.OK

    run(scenario())


# -- the RFC's token -------------------------------------------------------------------------------------


def rfc(mn: MobileNode, router: str) -> Ctar:
    key = token_key(mn.context.current, mn.sequence).reveal()
    token = compute_token(key, mn.home, mn.sequence)
    return Ctar(mn.home, ip_address(router), mn.sequence, token, (), acknowledge=True)


def test_the_rfc_s_token_does_where_it_is_allowed() -> None:
    async def scenario() -> None:
        for announced in (True, False):
            async with world() as w:
                mn = serve(w, a_context())
                home, there = Endpoint(mn.home, CXTP), Endpoint(AWAY.address, CXTP)
                assert await w.b.agent.ctar(rfc(mn, "192.0.2.1"), there) is None
                for side in (w.a, w.b):
                    await side.stop()
                    w.mobile = MobileConfig(rfc_token=True)
                    w.addresses = {"a": "192.0.2.1", "b": "192.0.2.2"}
                    await side.start()
                if announced:
                    answer = await w.a.agent.ctar(rfc(mn, "192.0.2.2"), home)
                    assert answer == Ctaa(mn.home).serialize()
                    offer = next(message for message in w.network.seen if isinstance(message, Pctd))
                    assert offer.algorithm is TokenAlgorithm.HMAC_SHA1
                wrong = replace(rfc(mn, "192.0.2.1"), token=1, sequence=3)
                assert await w.b.agent.ctar(wrong, there) is None
                assert await w.b.agent.ctar(rfc(mn, "192.0.2.77"), there) is None
                mn.sequence += not announced
                answer = await w.b.agent.ctar(rfc(mn, "192.0.2.1"), there)
                assert answer == Ctaa(mn.home).serialize()
                await w.quiet()
                assert w.owner(mn.sa) == "b"
                assert w.b.daemon.served[mn.sa].remote == AWAY

    run(scenario())


def test_a_ctar_leaves_no_secret_in_logs_and_reports(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            await w.a.agent.ctar(*mn.announce())
            await w.b.agent.ctar(*mn.arrive())
            await w.quiet()
            text = caplog.text + json.dumps([w.a.agent.history(), w.b.agent.history(), w.b.agent.status()])
            key = token_key(mn.context.current, mn.sequence).reveal()
            assert key.hex() not in text
            assert mn.context.current.secret.reveal().hex() not in text

    with caplog.at_level("DEBUG"):
        run(scenario())
