"""nSG gets an SA by a packet of its MN: asked of the neighbours, proven at pSG, never moved twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from ikectx.engine.report import TransferReport
from ikectx.errors import BusyError, CharonError, UsageError
from ikectx.numbers import Exchange, Fpt, Status
from ikectx.sa.context import Endpoint, IkeContext
from ikectx.sa.verdict import Verdict
from ikectx.wire.cxtp import Ctd, Ctdr, CtReq
from ikectx.wire.payloads import NoncePayload
from tests.hand_loop import run
from tests.ikectx.wire.test_packet_proof import fragments, request
from tests.mobile_nodes import kinds, requests
from tests.peers import Fate, a_context, fate_at
from tests.worlds import ALL, FAST, World, world

NEW = Endpoint.of("203.0.113.5", 4500)
HERE = Endpoint.of("192.0.2.2", 4500)


def probe(context: IkeContext, *, mid: int | None = None) -> bytes:
    """The MN's next request, as nSG hears it."""
    return request(context, mid=context.mid_responder if mid is None else mid)


async def seen(w: World, datagram: bytes, *ask: str) -> TransferReport | None:
    return await w.b.agent.packet(datagram, HERE, NEW, ask or ("a",))


def test_a_packet_brings_its_sa() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            context = a_context()
            sa = w.a.daemon.serve(context)
            report = await seen(w, probe(context))
            assert report is not None
            assert (report.result, report.status, report.address) == ("moved", Status.OK, "mn")
            # the CT-Req names the only address b knows, the CTD the one a knows
            assert report.mn_address == "198.51.100.7"
            assert [str(message.mn) for message in w.network.seen] == [
                *("203.0.113.5", "198.51.100.7", "198.51.100.7")
            ]
            assert kinds(w) == [CtReq, Ctd, Ctdr]
            (asked,) = requests(w)
            assert asked.token == 0
            assert {block.fpt for block in asked.blocks} == {Fpt.PROOF}
            await w.quiet()
            assert w.owner(sa) == "b"
            served = w.b.daemon.served[sa]
            assert (served.remote, served.local) == (NEW, HERE)
            assert served.mid_responder == context.mid_responder
            assert w.b.daemon.calls == ["check", "prepare", "take", "activate"]
            assert w.b.daemon.moves == []
            assert w.b.daemon.requests == [(probe(context),)]  # charon answers it

    run(scenario())


def test_fragments_are_one_proof() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            context = a_context()
            sa = w.a.daemon.serve(context)
            parts = fragments(context, NoncePayload(bytes(250)), mid=context.mid_responder)
            report = await w.b.agent.packet(parts, HERE, NEW, ["a"])
            assert report is not None
            assert report.result == "moved"
            await w.quiet()
            assert w.owner(sa) == "b"
            assert w.b.daemon.requests == [tuple(parts)]

    run(scenario())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda context: probe(context, mid=context.mid_responder - 1),
        lambda context: probe(context)[:-1] + bytes([probe(context)[-1] ^ 1]),
        lambda context: request(context, mid=context.mid_responder, by_mn=False),
        lambda context: request(context, mid=context.mid_responder, response=True),
        lambda context: request(context, mid=context.mid_responder, exchange=Exchange.IKE_AUTH),
        lambda context: probe(a_context(9)),
    ],
    ids=["old", "damaged", "gateway", "response", "exchange", "other"],
)
def test_what_proves_nothing_moves_nothing(spoil: Callable[[IkeContext], bytes]) -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            context = a_context()
            sa = w.a.daemon.serve(context)
            report = await seen(w, spoil(context))
            assert report is None
            assert "freeze" not in w.a.daemon.calls
            assert w.b.daemon.calls == []
            await w.quiet()
            assert w.owner(sa) == "a"

    run(scenario())


def test_a_request_that_psg_cannot_judge_yet_is_shown_again() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            context = a_context()
            sa = w.a.daemon.serve(context)
            showing = asyncio.create_task(seen(w, probe(context, mid=context.mid_responder + 1)))
            await w.a.reaches("export")
            # a hears of the request between
            w.a.daemon.served[sa] = replace(context, mid_responder=context.mid_responder + 1)
            report = await showing
            assert report is not None
            assert (report.result, report.attempts > 1) == ("moved", True)
            await w.quiet()
            assert w.owner(sa) == "b"

    run(scenario())


def test_a_request_that_overtakes_the_proof_is_noticed() -> None:
    async def scenario() -> None:
        async with world(rights=ALL, timing=replace(FAST, request=0.05)) as w:
            context = a_context()
            sa = w.a.daemon.serve(context)
            gate = w.a.daemon.wait["freeze"] = asyncio.Event()
            showing = asyncio.create_task(seen(w, probe(context)))
            await w.a.reaches("freeze")
            w.a.daemon.advance = 1
            gate.set()
            report = await showing
            assert report is not None
            assert report.result != "moved"
            await w.quiet()
            assert w.owner(sa) == "a"
            assert "thaw" in w.a.daemon.calls

    run(scenario())


@pytest.mark.parametrize(
    ("status", "told"), [(Status.VIP_IN_USE, True), (Status.SELECTORS_OVERLAP, False), (Status.KERNEL, False)]
)
def test_psg_hears_that_nsg_did_nothing_for_what_it_refuses(status: Status, told: bool) -> None:
    """The MN has connected to nSG anew meanwhile: no route is to lead back to the SA that it gave up."""

    async def scenario() -> None:
        async with world(rights=ALL) as w:
            context = a_context()
            sa = w.a.daemon.serve(context)
            untaken: list[object] = []
            w.a.daemon.not_taken = untaken.append  # type: ignore[attr-defined]
            w.b.daemon.verdicts = [Verdict(Fpt.IKEV2_SA, status, "used by mn.example")]
            report = await seen(w, probe(context))
            assert report is not None
            assert (report.result, report.status) == ("refused", status)
            await w.quiet()
            assert w.owner(sa) == "a"
            assert w.a.daemon.calls[-2:] == ["freeze", "thaw"]
            assert untaken == ([sa] if told else [])

    run(scenario())


def test_neighbours_are_asked_in_order_until_one_has_it() -> None:
    async def scenario() -> None:
        async with world(names=("a", "b", "c"), rights=ALL) as w:
            context = a_context()
            sa = w.a.daemon.serve(context)
            report = await seen(w, probe(context), "c", "a")
            assert report is not None
            assert (report.result, report.from_) == ("moved", "a")
            assert [str(m.status) for r in w.network.seen if isinstance(r, Ctdr) for m in r.statuses] != []
            await w.quiet()
            assert w.owner(sa) == "b"
            await w.sides["c"].kill()
            again = a_context(2)
            w.a.daemon.serve(again)
            report = await seen(w, probe(again), "c", "a")
            assert report is not None
            assert report.result == "moved"
            with pytest.raises(UsageError, match="no peer is called 'x'"):
                await seen(w, probe(again), "x")

    run(scenario())


def test_who_may_not_show_packets_gets_nothing() -> None:
    async def scenario() -> None:
        async with world(rights=frozenset({"push", "pull"})) as w:
            context = a_context()
            sa = w.a.daemon.serve(context)
            assert await seen(w, probe(context)) is None
            assert w.a.daemon.calls == []
            assert w.owner(sa) == "a"

    run(scenario())


def test_packets_that_name_no_sa_are_not_asked_about() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            assert await seen(w, b"short") is None
            assert await seen(w, b"initiate" + bytes(20)) is None  # an IKE_SA_INIT
            with pytest.raises(UsageError):
                await seen(w, b"")
            assert kinds(w) == []

    run(scenario())


def test_a_busy_sa_is_asked_for_again_and_a_failure_is_undone() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            context = a_context()
            sa = w.a.daemon.serve(context)
            w.a.daemon.fail["freeze"] = [BusyError("an exchange is in flight")]
            w.b.daemon.fail["activate"] = [CharonError("no")]
            report = await seen(w, probe(context))
            assert report is not None
            assert (report.result, report.status) == ("kept", Status.CHARON)
            assert len(requests(w)) == 2
            await w.quiet()
            assert w.owner(sa) == "a"
            report = await seen(w, probe(context))
            assert report is not None
            assert (report.result, report.epoch) == ("moved", 3)
            await w.quiet()
            assert w.owner(sa) == "b"

    run(scenario())


def test_two_packets_of_one_mn_move_it_once() -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            context = a_context()
            sa = w.a.daemon.serve(context)
            both = await asyncio.gather(seen(w, probe(context)), seen(w, probe(context)))
            assert [report.result for report in both if report is not None] == ["moved"]
            await w.quiet()
            assert w.owner(sa) == "b"
            assert w.b.daemon.calls.count("take") == 1
            # an old packet does not bring it back
            assert await w.a.agent.packet(probe(context), HERE, NEW, ["b"]) is not None
            await w.quiet()
            assert w.owner(sa) == "a"  # the same message ID is still the next one: b's charon saw no request

    run(scenario())


@pytest.mark.parametrize("fate", ["lose-cut", "deliver-cut"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_link_that_breaks_at_any_message(number: int, fate: Fate) -> None:
    async def scenario() -> None:
        async with world(rights=ALL) as w:
            context = a_context()
            sa = w.a.daemon.serve(context)
            w.network.fate = fate_at(number, fate)
            report = await seen(w, probe(context))
            await w.quiet()
            assert report is not None
            assert report.result == "moved"
            assert w.owner(sa) == "b"

    run(scenario())
