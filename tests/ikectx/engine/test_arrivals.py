"""MNs that hand over by themselves, at two gateways in one process: announced, or only arrived."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address
from itertools import product
from typing import Any

import pytest

from ikectx.engine.arrivals import (
    ARRIVAL_IGNORED,
    ARRIVAL_TABLE,
    ArrivalInput,
    ArrivalState,
    endpoint,
)
from ikectx.engine.journal import JournalEntry
from ikectx.engine.tables import OSEQ_JUMP
from ikectx.errors import BusyError, RefusedError, WireError
from ikectx.machine import Machine
from ikectx.numbers import Status
from ikectx.sa.context import Endpoint, IkeContext
from ikectx.wire.cxtp import Ctc, Ctd, Ctdr, CtReq, Pctd, TokenAlgorithm
from ikectx.wire.tokens import Purpose, token_key
from ikectx.wire.whereabouts import What, Whereabouts
from tests.hand_loop import run
from tests.mobile_nodes import AWAY, kinds, of_transfers, requests, serve
from tests.peers import a_context, check_pair
from tests.worlds import FAST, until, world

# -- the table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "what"), list(product(ArrivalState, ArrivalInput)))
def test_every_arrival_pair(state: ArrivalState, what: ArrivalInput) -> None:
    machine = Machine(ARRIVAL_TABLE, state, ignored=ARRIVAL_IGNORED)
    check_pair(machine, ARRIVAL_TABLE, ARRIVAL_IGNORED, what)


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
            ctar, source = mn.arrive()
            answer = await w.b.agent.ctar(ctar, source)
            assert mn.says(answer) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert kinds(w) == [Pctd, Ctdr, CtReq, Ctd, Ctdr]
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
        async with world(timing=replace(FAST, predictive=5.0)) as w:
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
            await w.b.reaches("check")
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
            await until(lambda: late)
            arriving = asyncio.create_task(w.b.agent.ctar(*mn.arrive()))
            await until(lambda: requests(w))
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
            assert {str(message.mn) for message in of_transfers(w)} == {address}
            assert w.b.daemon.served[mn.sa].epoch == 1

    run(scenario())


def test_packets_can_be_sent_on_before_the_new_gateway_serves_the_sa() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            heard: list[tuple[str, Whereabouts]] = []
            w.a.agent._driver.hear = lambda peer, news: heard.append((peer, news))
            may_take = w.b.daemon.wait["take"] = asyncio.Event()
            answer = asyncio.create_task(w.b.agent.ctar(*mn.arrive()))
            await w.b.reaches("take")
            await until(lambda: heard)
            assert mn.sa in w.a.daemon.frozen, "it may be taken back"
            may_take.set()
            assert mn.says(await answer) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert heard == [("b", Whereabouts(mn.sa, 1, What.READY))]
            assert w.a.daemon.calls == ["export", "freeze", "release"]

    run(scenario())


def test_an_mn_is_not_told_again_that_its_sa_is_here_once_it_has_left() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK, "the answer may have been lost"
            assert (await w.b.agent.transfer(mn.sa, "a")).result == "moved"
            assert await w.b.agent.ctar(*mn.arrive()) is None
            assert w.owner(mn.sa) == "a"

    run(scenario())


def test_the_disk_waits_for_messages_of_one_round_only() -> None:
    """Where messages leave in each round, the journal is written all the same."""

    async def scenario() -> None:
        async with world() as w:
            mn, driver = serve(w, a_context()), w.b.agent._driver
            following, busy = driver.engine.next_output, 1000

            def next_output() -> object:
                nonlocal busy
                busy = max(0, busy - 1)
                driver._sent = driver._sent or busy > 0
                return following()

            driver.engine.next_output = next_output  # type: ignore[method-assign,assignment]
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            assert busy > 0

    run(scenario())


def test_a_message_does_not_wait_for_the_disk() -> None:
    """Beside the notice the journal is to be written, because the SA is taken next."""

    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            write, said = w.b.store.write, dict[str, bool]()

            def written(*entries: JournalEntry, durable: bool = True) -> None:
                said.update({entry.state: of_transfers(w) != w.network.seen for entry in entries})
                write(*entries, durable=durable)

            w.b.store.write = written  # type: ignore[method-assign]
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert (said["receiving"], said["owning"]) == (False, True)

    run(scenario())


@pytest.mark.parametrize("step", ["check", "prepare"])
def test_no_packets_are_asked_for_where_they_cannot_be_sent(step: str) -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            w.b.daemon.fail[step] = [RefusedError("no", status=Status.NOT_ALLOWED)]
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is not Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "a"
            assert of_transfers(w) == w.network.seen

    run(scenario())


def test_no_packets_are_asked_for_before_the_mn_knows_other_spis() -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            w.b.daemon.renaming.add(mn.sa)
            await w.b.agent.ctar(*mn.arrive())
            await w.quiet()
            assert of_transfers(w) == w.network.seen

    run(scenario())


def test_an_old_gateway_that_knows_no_notice_waits_for_the_ctdr(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: Ctd) -> tuple[Whereabouts, ...]:
        raise WireError("no such block")

    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            monkeypatch.setattr("ikectx.engine.notices.parse_notice", unknown)
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            denied = w.network.seen[-1] if w.network.seen[-1] not in of_transfers(w) else w.network.seen[-2]
            assert isinstance(denied, Ctdr) and not denied.complete

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


def test_b4_what_may_not_come_is_not_denied_where_charon_has_it() -> None:
    """b took the SA, lost its journal, and may not take SAs of that connection any more; its MN asks."""

    async def scenario() -> None:
        async with world(brings={"connections": ("another",)}) as w:
            mn = serve(w, a_context(), at=Endpoint.of("203.0.113.5", 4500))
            w.b.daemon.served[mn.sa] = a_context()
            asking = asyncio.create_task(w.b.agent.ctar(*mn.arrive()))
            await until(lambda: any(isinstance(message, Ctdr) for message in w.network.seen))
            assert (await asking) is not None
            assert w.a.only_open()["state"] == "released"
            assert "thaw" not in w.a.daemon.calls
            del w.b.daemon.served[mn.sa]
            await w.quiet()  # the next copy of the CTD is denied
            assert w.owner(mn.sa) == "a"

    run(scenario())
