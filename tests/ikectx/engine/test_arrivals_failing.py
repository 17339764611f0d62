"""MNs that arrive and are refused, links that break and peers that do what they may not meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from ikectx.engine.requests import refused_request
from ikectx.errors import BusyError, CharonError
from ikectx.numbers import Fpt, Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import Endpoint, IkeContext
from ikectx.sa.verdict import Verdict
from ikectx.wire.cxtp import ContextDataBlock, Ctaa, Ctd, Ctdr, CtReq
from ikectx.wire.tokens import Purpose
from tests.across.test_by_packet import probe
from tests.hand_loop import run
from tests.mobile_nodes import AWAY, MobileNode, requests, serve
from tests.peers import Fate, MemoryGateway, a_context, fate_at
from tests.worlds import ALL, FAST, until, world

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


def test_an_sa_that_cannot_be_exported_is_no_mistake_of_the_program(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with world(timing=FAST) as w:
            sa = w.a.daemon.serve(a_context())
            for error, status in (
                (BusyError("a rekey is in flight"), Status.BUSY),
                (CharonError("charon hangs"), CharonError("").status),
            ):
                w.a.daemon.fail["export"] = [error] * 1000
                report = await w.a.agent.transfer(sa, "b")
                assert (report.status, str(error) in report.text) == (status, True), report
                w.a.daemon.fail.clear()
            assert (await w.a.agent.transfer(sa, "b")).result == "moved"

    run(scenario())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


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
            await asyncio.sleep(0.1)
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
            link.send(CtReq(ctar.mn, ctar.sequence, ctar.token, ctar.blocks))
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
            await until(lambda: late)
            await w.b.kill()  # and it has forgotten that it asked
            arriving.cancel()
            await w.b.start()
            deliver()
            await w.quiet()
            assert w.owner(mn.sa) == "a"
            assert w.b.daemon.calls == ["look"]  # does charon have it? nothing is done to it

    run(scenario())


# -- what is lost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["lose-cut", "deliver-cut"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_link_that_breaks_at_any_message_of_an_announced_move(number: int, fate: Fate) -> None:
    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            w.network.fate = fate_at(number, fate)
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
            w.network.fate = fate_at(number, fate)
            assert mn.says(await w.b.agent.ctar(*mn.arrive())) is Status.OK
            await w.quiet()
            assert w.owner(mn.sa) == "b"
            assert w.b.daemon.calls.count("take") == 1

    run(scenario())
