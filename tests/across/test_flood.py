"""What one peer's flood gets: bounds on queue, open transfers and journal, and a link whose answers fit."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from ikectx.engine import inbox
from ikectx.engine.journal import JournalEntry, Role
from ikectx.engine.offer_answer import offer_status
from ikectx.engine.unknown_transfers import DENIED, Denied
from ikectx.errors import StoreError
from ikectx.net.links import WINDOW
from ikectx.numbers import Status
from ikectx.wire.cxtp import Ctc, Ctd, Ctdr, Pctd, parse_message
from ikectx.wire.full_ctd import encode_whole, final_of
from ikectx.wire.profile import TransferHeader, encode
from tests.across.test_strangers import first, letting_go, strangers
from tests.hand_loop import run
from tests.peers import MemoryStream, a_context
from tests.worlds import one_move, until, world


def held(number: int, intent: str = "hold") -> Pctd:
    """An offer for a mobile node of its own."""
    context = a_context(number, mn=f"198.51.{number >> 8}.{number & 255}")
    header = TransferHeader(number.to_bytes(8), intent, "mn" if intent == "hold" else "update")  # type: ignore[arg-type]
    return Pctd(context.remote.address, encode(context, transfer=header))


def test_the_next_message_of_a_link_is_read_when_one_is_handled(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with strangers(tmp_path, "a") as (daemon, gateway, (a,)):
            gate = daemon.wait["check"] = asyncio.Event()
            stream = a._stream
            assert isinstance(stream, MemoryStream) and stream.other is not None
            unread = stream.other.inbox
            for number in range(1, 1001):
                await a.send(held(number, "check"))
            await asyncio.sleep(1.0)
            assert daemon.calls.count("check") == WINDOW
            assert unread.qsize() >= 1000 - WINDOW - 1
            assert gateway.history() == []
            gate.set()
            for _ in range(1000):
                assert first(await next_answer(stream)) is Status.OK
            assert unread.empty()

    run(scenario())


def test_a_flood_leaves_no_timers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with strangers(tmp_path, "a") as (_, _, (a,)):
            loop = asyncio.get_running_loop()
            for number in range(1, 301):
                assert first(await a.ask(held(number, "check"))) is Status.OK
            waiting = [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
            assert len(waiting) < 20

    run(scenario())


async def next_answer(stream: MemoryStream) -> Ctdr:
    answer = parse_message(await stream.read())
    assert isinstance(answer, Ctdr)
    return answer


def test_a_peer_has_only_so_many_transfers_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "OPEN", 5)

    async def scenario() -> None:
        async with strangers(tmp_path, "a", "c") as (_, gateway, (a, c)):
            for number in range(1, 6):
                assert first(await a.ask(held(number))) is Status.OK
            refused = await a.ask(held(6))
            assert first(refused) is Status.BUSY
            assert "5 transfers of a are open here" in [each.detail for each in offer_status(refused)[1]]
            assert first(await a.ask(held(1))) is Status.OK  # which is one of those five
            assert first(await a.ask(held(7, "check"))) is Status.OK  # which would stay open for nothing
            assert first(await c.ask(held(8))) is Status.OK  # another peer's are its own
            assert len(gateway.history()) == 6
            await a.send(Ctc(held(1).mn))
            await until(lambda: gateway.history()[-1]["state"] == "aborted")
            assert first(await a.ask(held(9))) is Status.OK

    run(scenario())


def test_what_a_peer_offers_holds_only_so_many_octets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "OPEN_OCTETS", 3 * len(held(1).serialize()))

    async def scenario() -> None:
        async with strangers(tmp_path, "a") as (_, _, (a,)):
            said = [first(await a.ask(held(number))) for number in range(1, 6)]
            assert said == [Status.OK, Status.OK, Status.OK, Status.BUSY, Status.BUSY]

    run(scenario())


def test_what_nobody_offered_leaves_no_row_in_the_journal(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with strangers(tmp_path, "a") as (_, gateway, (a,)):
            for number in range(1, 101):
                context = replace(a_context(number), epoch=1)
                whole = TransferHeader(b"whole" + number.to_bytes(3), address="mn")
                all_of_it = Ctd(
                    context.remote.address, encode_whole(context, final_of(context), transfer=whole)
                )
                assert first(await a.ask(letting_go(number.to_bytes(8), number))) is Status.UNKNOWN_TRANSFER
                assert first(await a.ask(all_of_it)) is Status.UNKNOWN_TRANSFER
                assert first(await a.ask(all_of_it)) is Status.UNKNOWN_TRANSFER
            assert gateway.history() == []

    run(scenario())


def test_denied_transfers_are_remembered_up_to_a_number() -> None:
    denied = Denied()
    idents = [number.to_bytes(8) for number in range(DENIED + 1)]
    for ident in idents:
        denied.add(ident)
    assert idents[0] not in denied
    assert all(ident in denied for ident in idents[1:])


@pytest.mark.parametrize("error", [StoreError("the disk is full"), ValueError("a mistake")])
def test_b11_a_message_that_cannot_be_answered_ends_its_link(error: Exception) -> None:
    """Its answer would be missing, and the next one be taken for it: every later offer timed out."""

    async def scenario() -> None:
        async with world() as w:
            find, errors = w.b.store.find, [error]

            def fails_once(role: Role, transfer_id: bytes) -> JournalEntry | None:
                if errors:
                    raise errors.pop()
                return find(role, transfer_id)

            w.b.store.find = fails_once  # type: ignore[method-assign]
            sa, report = await one_move(w)
            assert report.result == "kept" and report.status is Status.UNREACHABLE
            report = await w.a.agent.transfer(sa, "b")
            assert report.result == "moved"
            assert w.owner(sa) == "b"

    run(scenario())
