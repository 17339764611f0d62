"""What a peer may send to a gateway: messages out of turn, of other transfers, that do not fit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from ikectx.disk.store import SqliteStore
from ikectx.driver import GatewayHooks
from ikectx.engine.journal import JournalHas
from ikectx.engine.journaled import TransferPolicy
from ikectx.engine.offer_answer import offer_status
from ikectx.errors import CharonError, StoreError
from ikectx.gateway import Gateway
from ikectx.net.links import Stream
from ikectx.numbers import Status
from ikectx.peer import PeerConfig
from ikectx.timing import Timing
from ikectx.wire.cxtp import Ctaa, Ctc, Ctd, Ctdr, CtReq, Message, Pctd, parse_message
from ikectx.wire.full_ctd import encode_whole, final_of
from ikectx.wire.profile import TransferHeader, encode, encode_final
from tests.hand_loop import run
from tests.peers import Ether, MemoryGateway, Network, a_context
from tests.worlds import KEY

TIMING = Timing(offer=1.0, stop=0.3)
MN = a_context().remote.address


class Stranger:
    """A peer of b that sends what it likes."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def ask(self, message: Message) -> Ctdr:
        await self._stream.write(message.serialize())
        answer = parse_message(await self._stream.read())
        assert isinstance(answer, Ctdr)
        return answer

    async def send(self, message: Message) -> None:
        await self._stream.write(message.serialize())

    async def closed(self) -> bool:
        return await self._stream.read() == b""


@asynccontextmanager
async def strangers(
    folder: Path, *names: str, rights: frozenset[str] = frozenset({"push"}), has: JournalHas = "whole"
) -> AsyncIterator[tuple[MemoryGateway, Gateway, list[Stranger]]]:
    network = Network()
    daemon = MemoryGateway("b", Ether())
    store = SqliteStore(folder / "b.db", KEY)
    store.has = has
    peers = [PeerConfig(name, name, rights=rights) for name in names]
    gateway = Gateway(
        "b",
        daemon,
        daemon,
        store,
        peers,
        policy=TransferPolicy(TIMING),
        hooks=GatewayHooks(dial=network.dial_from("b")),
    )
    await gateway.start()
    network.up["b"] = gateway
    yield daemon, gateway, [Stranger(await network.dial_from(name)(PeerConfig("b", "b"))) for name in names]
    await gateway.stop()
    await network.close()
    store.close()


def first(answer: Ctdr) -> Status:
    return next((block.status for block in answer.statuses if block.status is not Status.OK), Status.OK)


def offer(ident: bytes, number: int = 1, **header: str) -> Pctd:
    context = a_context(number)
    return Pctd(context.remote.address, encode(context, transfer=TransferHeader(ident, **header)))  # type: ignore[arg-type]


def letting_go(ident: bytes, number: int = 1, epoch: int = 1) -> Ctd:
    context = a_context(number)
    final = replace(final_of(context), epoch=epoch)
    return Ctd(context.remote.address, encode_final(final, ident))


def test_a_peer_s_bad_messages_touch_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with strangers(tmp_path, "a") as (daemon, gateway, (a,)):
            # blocks that are missing, or another MN's
            assert first(await a.ask(Pctd(MN))) is Status.MALFORMED
            assert first(await a.ask(replace(offer(b"12345678"), mn=MN + 1))) is Status.MALFORMED
            assert first(await a.ask(Ctd(MN))) is Status.MALFORMED
            # what asks for nothing, or makes no sense here
            await a.send(CtReq(MN, 1))
            await a.send(Ctaa(MN))
            await a.send(Ctc(MN))
            assert daemon.calls == []
            assert gateway.history() == []

    run(scenario())


def test_a_ctd_nobody_announced_is_refused_for_good(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with strangers(tmp_path, "a", "c") as (daemon, gateway, (a, c)):
            ident = b"12345678"
            assert first(await a.ask(letting_go(ident))) is Status.UNKNOWN_TRANSFER
            # its PCTD comes late: the source serves again by now
            assert first(await a.ask(offer(ident))) is Status.UNKNOWN_TRANSFER
            assert first(await a.ask(letting_go(ident))) is Status.UNKNOWN_TRANSFER
            assert first(await c.ask(letting_go(ident))) is Status.UNKNOWN_TRANSFER
            assert daemon.calls == ["look", "look"]  # for each peer once
            assert gateway.history() == []

    run(scenario())


def test_an_sa_that_could_not_be_looked_for_is_none_that_was_idle(tmp_path: Path) -> None:
    """The journal is an older copy, and may lack that the SA came and was moved on."""

    async def scenario() -> None:
        async with strangers(tmp_path, "a", has="old") as (daemon, _, (a,)):
            daemon.fail["look"] = [CharonError("no answer")]
            for _ in range(2):
                assert first(await a.ask(letting_go(b"12345678"))) is Status.IN_DOUBT

    run(scenario())


def test_b4_a_whole_ctd_that_nobody_asked_for_is_in_doubt_where_charon_has_the_sa(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with strangers(tmp_path, "a") as (daemon, gateway, (a,)):
            context = replace(a_context(), epoch=1)
            daemon.served[context.spis] = context
            daemon.certain = False
            header = TransferHeader(b"12345678", address="mn")
            ctd = Ctd(MN, encode_whole(context, final_of(context), transfer=header))
            answer = await a.ask(ctd)
            assert first(answer) is Status.IN_DOUBT
            assert answer.complete  # to an older gateway that is neither yes nor no
            assert offer_status(answer)[0] is Status.IN_DOUBT
            assert offer_status(answer)[1][0].detail == "charon has it"
            assert gateway.history() == []
            del daemon.served[context.spis]
            assert first(await a.ask(ctd)) is Status.UNKNOWN_TRANSFER

    run(scenario())


def test_b4_an_sa_that_charon_serves_is_written_down_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with strangers(tmp_path, "a", has="gaps") as (daemon, gateway, (a,)):
            context = replace(a_context(), epoch=1)
            daemon.served[context.spis] = context

            def whole(ident: bytes) -> Ctd:
                header = TransferHeader(ident, address="mn")
                return Ctd(MN, encode_whole(context, final_of(context), transfer=header))

            for _ in range(2):
                assert first(await a.ask(whole(b"12345678"))) is Status.OK
            for ident in (b"87654321", b"abcdefgh"):  # a peer may make up as many as it likes
                assert first(await a.ask(whole(ident))) is Status.IN_DOUBT
            assert [entry["transfer_id"] for entry in gateway.history()] == [b"12345678".hex()]

    run(scenario())


def test_an_sa_is_written_down_as_soon_as_the_disk_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StoreError("the disk is full")

    async def scenario() -> None:
        async with strangers(tmp_path, "a", "c", has="gaps") as (daemon, gateway, (a, c)):
            daemon.served[a_context().spis] = a_context()
            assert first(await c.ask(letting_go(b"87654321", epoch=1 << 40))) is Status.IN_DOUBT
            with monkeypatch.context() as disk:
                disk.setattr(SqliteStore, "write", full)
                await a.send(letting_go(b"12345678"))
                assert await a.closed()
            assert first(await c.ask(letting_go(b"12345678"))) is Status.OK
            assert [entry["result"] for entry in gateway.history()] == ["moved"]

    run(scenario())


def test_b4_a_peer_without_the_right_to_push_has_nothing_written_down(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with strangers(tmp_path, "a", rights=frozenset()) as (daemon, gateway, (a,)):
            context = replace(a_context(), epoch=1)
            daemon.served[context.spis] = context
            header = TransferHeader(b"12345678", address="mn")
            ctd = Ctd(MN, encode_whole(context, final_of(context), transfer=header))
            assert first(await a.ask(ctd)) is Status.IN_DOUBT
            assert gateway.history() == []

    run(scenario())


def test_only_the_source_lets_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with strangers(tmp_path, "a", "c") as (daemon, _, (a, c)):
            ident = b"12345678"
            assert first(await a.ask(offer(ident))) is Status.OK
            assert first(await c.ask(letting_go(ident))) is Status.UNKNOWN_TRANSFER
            assert first(await c.ask(offer(b"87654321"))) is Status.BUSY
            await c.send(Ctc(MN))
            assert daemon.calls == ["check", "prepare"]
            # twice the same question, twice the same answer, one preparation
            assert first(await a.ask(offer(ident))) is Status.OK
            assert first(await a.ask(letting_go(ident))) is Status.OK
            assert first(await a.ask(letting_go(ident))) is Status.OK
            assert first(await a.ask(offer(ident))) is Status.OK
            assert daemon.calls == ["check", "prepare", "take", "move", "activate"]
            # what is owned is nobody's to cancel, and no stranger's to ask about
            await a.send(Ctc(MN))
            # a denial could be to the source itself, under another name since
            assert first(await c.ask(letting_go(ident))) is Status.IN_DOUBT
            assert a_context().spis in daemon.served

    run(scenario())


def test_a_ctd_that_does_not_fit_its_pctd_undoes_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with strangers(tmp_path, "a") as (daemon, _, (a,)):
            await a.ask(offer(b"12345678"))
            assert first(await a.ask(letting_go(b"12345678", epoch=2))) is Status.STALE_EPOCH
            assert daemon.calls == ["check", "prepare", "undo"]
            await a.ask(offer(b"23456789"))
            assert first(await a.ask(letting_go(b"23456789", number=2))) is Status.UNKNOWN_SA
            assert daemon.passive == {}
            await a.ask(offer(b"34567890"))
            assert first(await a.ask(Ctd(MN))) is Status.MALFORMED
            assert daemon.passive == {}
            assert first(await a.ask(letting_go(b"34567890"))) is Status.UNKNOWN_TRANSFER

    run(scenario())


def test_a_new_offer_takes_the_place_of_the_old(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with strangers(tmp_path, "a") as (daemon, _, (a,)):
            assert first(await a.ask(offer(b"12345678"))) is Status.OK
            assert first(await a.ask(offer(b"23456789"))) is Status.OK
            assert daemon.calls == ["check", "prepare", "undo", "check", "prepare"]
            assert first(await a.ask(letting_go(b"12345678"))) is Status.UNKNOWN_TRANSFER
            assert first(await a.ask(letting_go(b"23456789"))) is Status.OK

    run(scenario())


def test_a_damaged_ctd_for_what_is_owned_gets_no_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with strangers(tmp_path, "a") as (daemon, _, (a,)):
            await a.ask(offer(b"12345678"))
            await a.ask(letting_go(b"12345678"))
            await a.send(Ctd(MN))
            assert await a.closed()  # "no" would let the source serve it as well
            assert a_context().spis in daemon.served

    run(scenario())
