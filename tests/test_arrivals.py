"""MNs that hand over by themselves, at two gateways in one process: announced, or only arrived."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from itertools import product
from typing import Any

import pytest

from ikectx.arrivals import (
    ARRIVAL_IGNORED,
    ARRIVAL_TABLE,
    ArrivalInput,
    ArrivalState,
    endpoint,
)
from ikectx.asking import refused_request
from ikectx.context import Endpoint, IkeContext
from ikectx.cxtp import (
    ContextDataBlock,
    Ctaa,
    Ctar,
    Ctc,
    Ctd,
    Ctdr,
    CtReq,
    Message,
    Pctd,
    TokenAlgorithm,
    compute_token,
)
from ikectx.errors import BusyError, CharonError, LinkError, RefusedError, StateError
from ikectx.links import PeerConfig
from ikectx.machine import Machine
from ikectx.numbers import Fpt, Status
from ikectx.ports import Verdict
from ikectx.serving import MobileConfig
from ikectx.tokens import Purpose, token_key
from ikectx.transfer import OSEQ_JUMP

from .mobile_nodes import AWAY, CXTP, MobileNode, kinds, requests, serve
from .peers import Fate, MemoryGateway, a_context
from .test_by_packet import probe
from .worlds import ALL, FAST, run, world

# -- the table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "what"), list(product(ArrivalState, ArrivalInput)))
def test_every_arrival_pair(state: ArrivalState, what: ArrivalInput) -> None:
    machine = Machine(ARRIVAL_TABLE, ARRIVAL_IGNORED, state, 0.0, timers={}, timeout=ArrivalInput.BAD)
    known, ignored = (state, what) in ARRIVAL_TABLE, (state, what) in ARRIVAL_IGNORED
    assert not (known and ignored)
    if known:
        after, *actions = ARRIVAL_TABLE[state, what]
        assert machine.feed(what, 1.0) == tuple(actions)
        assert machine.state is after
    elif ignored:
        assert machine.feed(what, 1.0) == ()
        assert machine.state is state
    else:
        with pytest.raises(StateError):
            machine.feed(what, 1.0)


def test_a_copy_surprises_no_state() -> None:
    for state in ArrivalState:
        pair = (state, ArrivalInput.AGAIN)
        assert pair in ARRIVAL_IGNORED or ARRIVAL_TABLE[pair][0] is state


# -- where the MN is -------------------------------------------------------------------------------------

PLAIN = replace(a_context(), remote=Endpoint.of("198.51.100.7", 500))
NATED = replace(PLAIN, conditions=1)
HERE, NAT = ip_address("203.0.113.5"), ip_address("203.0.113.99")
PLACES: list[tuple[IkeContext, Any, Any, Endpoint | None]] = [
    (PLAIN, HERE, HERE, Endpoint(HERE, 500)),
    (PLAIN, None, HERE, Endpoint(HERE, 500)),
    (a_context(), HERE, HERE, Endpoint(HERE, 4500)),  # on 4500 already
    (NATED, HERE, HERE, Endpoint(HERE, 4500)),
    (NATED, HERE, NAT, Endpoint(NAT, 4500)),
    (PLAIN, HERE, NAT, None),
    (a_context(), HERE, NAT, None),
]


@pytest.mark.parametrize(("context", "care_of", "source", "where"), PLACES)
def test_where_the_mn_is(context: IkeContext, care_of: Any, source: Any, where: Endpoint | None) -> None:
    if where is not None:
        assert endpoint(context, care_of, source) == where
        return
    with pytest.raises(RefusedError) as caught:
        endpoint(context, care_of, source)
    assert caught.value.status is Status.NO_ADDRESS


# -- announced, then arrived -----------------------------------------------------------------------------


def test_an_mn_announces_moves_and_arrives() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            answer = await w.a.agent.ctar(*mn.announce())
            assert mn.says(answer, Purpose.ANNOUNCE) is Status.OK
            # the context is ahead, installed nowhere, and a serves
            assert kinds(w) == [Pctd, Ctdr]
            offer = w.network.seen[0]
            assert isinstance(offer, Pctd)
            key = token_key(mn.context.current, mn.sequence).reveal()
            assert (offer.algorithm, offer.key) == (TokenAlgorithm.HMAC_SHA256_128, key)
            assert w.b.daemon.calls == ["check"]
            assert w.owner(mn.sa) == "a"
            assert [w.sides[name].only_open()["state"] for name in "ab"] == ["awaiting", "held"]
            for side in (w.a, w.b):
                (entry,) = side.store.open_transfers()
                assert entry.context is not None
                assert key not in entry.context  # it is for the MN's arrival, and for no disk
            await asyncio.sleep(0.02)
            answer = await w.b.agent.ctar(*mn.arrive())
            assert mn.says(answer) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert kinds(w) == [Pctd, Ctdr, CtReq, Ctd, Ctdr]
            ctar = mn.arrive()[0]
            (request,) = requests(w)
            assert (request.mn, request.sequence, request.token) == (mn.home, ctar.sequence, ctar.token)
            assert request.blocks == ctar.blocks
            assert w.a.daemon.calls == ["export", "freeze", "release"]
            assert w.b.daemon.calls == ["check", "prepare", "take", "activate"]
            assert w.b.daemon.moves == []  # the MN moves its own side
            assert w.b.daemon.served[mn.sa].remote == AWAY
            assert {str(message.mn) for message in w.network.seen} == {"198.51.100.7"}
            assert w.b.agent.history()[0]["mn_address"] == "198.51.100.7"
            (event,) = [event for event in w.a.events if event.report is not None]
            assert event.report is not None
            assert (event.report.result, event.report.address) == ("moved", "mn")
            assert set(event.report.phases_ms) >= {"announce", "await", "freeze", "confirm"}

    run(scenario())


def test_what_was_announced_lives_on_only_for_its_time() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, predictive=0.05)) as w:
            mn = serve(w, a_context())
            assert mn.says(await w.a.agent.ctar(*mn.announce()), Purpose.ANNOUNCE) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "a"
            assert w.b.daemon.calls == ["check"]
            assert [side.agent.history()[0]["state"] for side in (w.a, w.b)] in (
                ["kept", "aborted"],
                ["refused", "aborted"],
            )
            assert any(isinstance(message, Ctc) for message in w.network.seen)
            # it arrives all the same: as one that nobody announced
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"

    run(scenario())


def test_an_announced_move_is_cancelled_by_either_side() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            await w.a.agent.ctar(*mn.announce())
            with pytest.raises(BusyError):
                await w.a.agent.transfer(mn.sa, "b")
            assert w.a.agent.cancel(str(w.a.only_open()["transfer_id"]))
            await w.quiet()
            assert w.owner(mn.sa) == "a"
            again = replace(mn, sequence=5)
            assert again.says(await w.a.agent.ctar(*again.announce()), Purpose.ANNOUNCE) is Status.OK
            await w.b.agent.stop()
            await asyncio.sleep(0.01)
            assert w.a.daemon.calls.count("freeze") == 0

    run(scenario())


def test_others_behind_the_nat_move_while_one_is_awaited() -> None:
    async def scenario() -> None:
        async with world() as w:
            mns = [serve(w, a_context(number), sequence=number) for number in (1, 2, 3)]
            for mn in mns[:2]:
                assert mn.says(await w.a.agent.ctar(*mn.announce()), Purpose.ANNOUNCE) is Status.OK
            assert (await w.a.agent.transfer(mns[2].sa, "b")).result == "moved"
            answers = await asyncio.gather(*(w.b.agent.ctar(*mn.arrive()) for mn in mns[:2]))
            assert [mn.says(answer) for mn, answer in zip(mns, answers, strict=False)] == [Status.OK] * 2
            await w.quiet()
            assert [w.owner(mn.sa) for mn in mns] == [*"bbb"]

    run(scenario())


def test_an_mn_that_is_faster_than_its_context() -> None:
    async def scenario() -> None:
        async with world() as w:
            # it arrives while nSG checks what came ahead
            mn = serve(w, a_context())
            gate = w.b.daemon.wait["check"] = asyncio.Event()
            announcing = asyncio.create_task(w.a.agent.ctar(*mn.announce()))
            while "check" not in w.b.daemon.calls:
                await asyncio.sleep(0.001)
            arriving = asyncio.create_task(w.b.agent.ctar(*mn.arrive()))
            await asyncio.sleep(0.01)
            gate.set()
            assert mn.says(await arriving) is Status.OK
            await announcing
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert kinds(w) == [Pctd, Ctdr, CtReq, Ctd, Ctdr]
        async with world() as w:
            # it arrives before what pSG sends ahead
            mn = serve(w, a_context())
            late: list[bytes] = []
            deliver = w.network.hold(lambda message: isinstance(message, Pctd), late)
            announcing = asyncio.create_task(w.a.agent.ctar(*mn.announce()))
            while not late:
                await asyncio.sleep(0.001)
            arriving = asyncio.create_task(w.b.agent.ctar(*mn.arrive()))
            while not requests(w):
                await asyncio.sleep(0.001)
            deliver()
            assert mn.says(await arriving) is Status.OK
            await announcing
            await w.quiet()
            assert w.owner(mn.sa) == "b"

    run(scenario())


def test_an_sa_that_changed_since_it_was_announced_comes_whole() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            await w.a.agent.ctar(*mn.announce())
            w.a.daemon.fail["freeze"] = [BusyError("a CHILD_SA was rekeyed")]
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert len(requests(w)) == 2
            assert w.b.daemon.calls == [
                *("check", "prepare", "undo"),
                *("check", "prepare", "take", "activate"),
            ]
            # or that sent more than the numbers left free
            mn = serve(w, a_context(2), sequence=2)
            await w.a.agent.ctar(*mn.announce())
            w.a.daemon.sent(mn.sa, OSEQ_JUMP)
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"

    run(scenario())


# -- only arrived ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["198.51.100.7", "2001:db8::7"])
@pytest.mark.parametrize("new", ["203.0.113.5", "2001:db8:5::5"])
def test_an_mn_arrives_unannounced(address: str, new: str) -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context(mn=address), at=Endpoint.of(new, 4500))
            answer = await w.b.agent.ctar(*mn.arrive())
            assert mn.says(answer) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert kinds(w) == [CtReq, Ctd, Ctdr]
            assert w.a.daemon.calls == ["export", "freeze", "release"]
            assert w.b.daemon.calls == ["check", "prepare", "take", "activate"]
            assert w.b.daemon.served[mn.sa].remote == Endpoint.of(new, 4500)
            assert {str(message.mn) for message in w.network.seen} == {address}
            assert w.b.daemon.served[mn.sa].epoch == 1

    run(scenario())


def test_an_mn_without_a_wants_no_answer() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            assert await w.b.agent.ctar(*mn.arrive(acknowledge=False)) is None
            await w.quiet()
            assert w.owner(mn.sa) == "b"

    run(scenario())


@pytest.mark.parametrize("announced", [True, False])
def test_an_mn_behind_a_nat_knows_another_address(announced: bool) -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, replace(a_context(), conditions=1))
            mn.more = {"mn": ip_address("10.9.9.9")}
            if announced:
                assert mn.says(await w.a.agent.ctar(*mn.announce()), Purpose.ANNOUNCE) is Status.OK
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert ("check" in w.b.daemon.calls, len(requests(w))) == (True, 1)

    run(scenario())


def test_there_and_back_by_every_mode() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            at = "a"
            for turn in range(1, 7):
                to = "b" if at == "a" else "a"
                mn = replace(mn, sequence=turn, psg=at, nsg=to, at=Endpoint.of(f"203.0.113.{turn}", 4500))
                if turn % 3:
                    answer = await w.sides[at].agent.ctar(*mn.announce())
                    assert mn.says(answer, Purpose.ANNOUNCE) is Status.OK
                assert mn.says(await w.sides[to].agent.ctar(*mn.arrive())) is Status.OK
                await w.quiet()
                at = w.owner(mn.sa)
                assert at == to
                assert w.sides[at].daemon.served[mn.sa].epoch == turn
                # the next transfer names it by the address it has now
                mn.context = replace(mn.context, remote=mn.at)

    run(scenario())


# -- copies ----------------------------------------------------------------------------------------------


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
            while "prepare" not in w.b.daemon.calls:
                await asyncio.sleep(0.001)
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


def test_only_so_many_ctars_are_remembered_and_no_forged_ones() -> None:
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
            assert answers == [Status.OK, Status.OK, None]
            assert len(requests(w)) == 7
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


# -- refusals --------------------------------------------------------------------------------------------


def test_a_refusal_is_told_to_the_mn_with_proof_where_we_have_the_key() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            w.b.daemon.verdicts = [Verdict(Fpt.PAD, Status.NO_CONNECTION, "home")]
            answer = await w.a.agent.ctar(*mn.announce())
            assert mn.says(answer, Purpose.ANNOUNCE) is Status.NO_CONNECTION
            answer = await w.b.agent.ctar(*mn.arrive())
            assert mn.says(answer) is Status.NO_CONNECTION
            await w.quiet()
            assert w.owner(mn.sa) == "a"
            # a does not serve it: without its context nobody can prove anything
            gone = MobileNode(a_context(5), sequence=5)
            answer = await w.b.agent.ctar(*gone.arrive())
            assert gone.says(answer) is None
            assert answer is not None
            assert [status.status for status in Ctaa.parse(answer).statuses] == [Status.UNKNOWN_SA]
            assert await w.b.agent.ctar(*gone.arrive()) == answer

    run(scenario())


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("step", ["prepare", "after:prepare", "take", "after:take", "activate"])
def test_a_failure_at_nsg_is_undone_and_told(step: str, announced: bool) -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            if announced:
                await w.a.agent.ctar(*mn.announce())
            w.b.daemon.fail[step] = [CharonError("no")]
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.CHARON
            await w.quiet()
            assert w.owner(mn.sa) == "a"
            again = replace(mn, sequence=2)
            assert again.says(await w.b.agent.ctar(*again.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"

    run(scenario())


@pytest.mark.parametrize("announced", [True, False])
def test_a_nat_that_the_sas_are_not_made_for_is_refused(announced: bool) -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            if announced:
                await w.a.agent.ctar(*mn.announce())
            here, _ = mn.arrive()
            assert mn.says(await w.b.agent.ctar(here, Endpoint.of("203.0.113.99", 1024))) is Status.NO_ADDRESS
            await w.quiet()
            assert w.owner(mn.sa) == "a"
            assert "take" not in w.b.daemon.calls
        async with world() as w:
            mn = serve(w, replace(a_context(), conditions=1))
            if announced:
                await w.a.agent.ctar(*mn.announce())
            here, _ = mn.arrive()
            assert mn.says(await w.b.agent.ctar(here, Endpoint.of("203.0.113.99", 1024))) is Status.OK
            assert w.b.daemon.served[mn.sa].remote == Endpoint.of("203.0.113.99", 4500)

    run(scenario())


def test_a_psg_that_is_busy_or_down_is_asked_until_the_time_is_over() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, request=0.15)) as w:
            mn = serve(w, a_context())
            w.a.daemon.fail["export"] = [BusyError("a rekey is in flight") for _ in range(3)]
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            assert len(requests(w)) == 4
            await w.quiet()
            mn = serve(w, a_context(2), sequence=2)
            w.a.daemon.fail["export"] = [BusyError("a rekey is in flight") for _ in range(1000)]
            answer = await w.b.agent.ctar(*mn.arrive())
            assert answer is not None
            assert [status.status for status in Ctaa.parse(answer).statuses] == [Status.BUSY]
            # a busy pSG does not answer an announcement: the MN's retransmission may have more luck
            told = mn.announce()
            assert await w.a.agent.ctar(*told) is None
            w.a.daemon.fail.clear()
            assert mn.says(await w.a.agent.ctar(*told), Purpose.ANNOUNCE) is Status.OK
            await w.a.kill()
            mn.sequence = 3
            answer = await w.b.agent.ctar(*mn.arrive())
            assert answer is not None
            assert [status.status for status in Ctaa.parse(answer).statuses] == [Status.UNREACHABLE]
            await w.a.start()

    run(scenario())


class RenamingGateway(MemoryGateway):
    """Gives every SA new names."""

    later: bool | None = None

    def tell_later(self, context: IkeContext, later: bool) -> None:
        self.calls.append("later" if later else "now")
        self.later = later

    def must_tell(self, context: IkeContext) -> bool:
        return not self.later

    def new_names(self, context: IkeContext) -> tuple[ContextDataBlock, ...]:
        return (ContextDataBlock(Fpt.NEW_SPIS, b"12345678abcd"),)


def test_new_names_are_told_in_the_answer_or_else_by_ike() -> None:
    async def scenario() -> None:
        for announced in (True, False):
            async with world(rights=ALL) as w:
                await w.b.stop()
                w.b.daemon = RenamingGateway("b", w.ether)
                await w.b.start()
                mn = serve(w, a_context())
                if announced:
                    await w.a.agent.ctar(*mn.announce())
                answer = await w.b.agent.ctar(*mn.arrive())
                assert mn.says(answer) is Status.OK
                assert answer is not None
                assert Ctaa.parse(answer).blocks[0] == w.b.daemon.new_names(mn.context)[0]
                steps = ["later", "check", "later", "prepare", "take", "activate"]
                assert w.b.daemon.calls == steps
                w.b.daemon.calls.clear()
                # nobody answers a packet, nor a push
                other = serve(w, a_context(2), sequence=2)
                await w.b.agent.packet(probe(other.context), Endpoint.of("192.0.2.2", 4500), AWAY, ["a"])
                steps = ["now", "check", "now", "prepare", "take", "move", "activate"]
                assert w.b.daemon.calls == steps

    run(scenario())


# -- a bad peer ------------------------------------------------------------------------------------------


def test_a_peer_cannot_use_a_token_for_somebody_else() -> None:
    async def scenario() -> None:
        async with world(names=("a", "b", "c")) as w:
            mn = serve(w, a_context())
            ctar = mn.arrive()[0]  # for b
            link = await w.sides["c"].agent._running().get(PeerConfig("a", "a"))
            await link.send(CtReq(ctar.mn, ctar.sequence, ctar.token, ctar.blocks))
            await asyncio.sleep(0.02)
            (answer,) = [message for message in w.network.seen if isinstance(message, Ctdr)]
            assert refused_request(answer) == (Status.NOT_ALLOWED, ctar.sequence)
            assert "freeze" not in w.a.daemon.calls
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK

    run(scenario())


def test_a_whole_context_that_nobody_asked_for_is_refused_for_good() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            late: list[bytes] = []
            deliver = w.network.hold(lambda message: isinstance(message, Ctd), late)
            arriving = asyncio.create_task(w.b.agent.ctar(*mn.arrive()))
            while not late:
                await asyncio.sleep(0.001)
            await w.b.kill()  # and it has forgotten that it asked
            arriving.cancel()
            await w.b.start()
            deliver()
            await w.quiet()
            assert w.owner(mn.sa) == "a"
            assert w.b.daemon.calls == []

    run(scenario())


# -- what is lost ----------------------------------------------------------------------------------------


def at(number: int, fate: Fate) -> Callable[[Message], Fate]:
    count = 0

    def decide(message: Message) -> Fate:
        nonlocal count
        count += 1
        return fate if count == number else "deliver"

    return decide


@pytest.mark.parametrize("fate", ["lose-cut", "deliver-cut"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_link_that_breaks_at_any_message_of_an_announced_move(number: int, fate: Fate) -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            w.network.fate = at(number, fate)
            said = mn.says(await w.a.agent.ctar(*mn.announce()), Purpose.ANNOUNCE)
            assert said is (
                Status.UNREACHABLE if number <= 2 and (number, fate) != (2, "deliver-cut") else Status.OK
            )
            await asyncio.sleep(0.005)
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"

    run(scenario())


@pytest.mark.parametrize("fate", ["lose-cut", "deliver-cut"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_link_that_breaks_at_any_message_of_an_unannounced_move(number: int, fate: Fate) -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            w.network.fate = at(number, fate)
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert w.b.daemon.calls.count("take") == 1

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


__all__ = ["LinkError"]
