"""Two gateways in one process: moves, dry runs, refusals, busy SAs, and what operators read of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ikectx import driver, gateway
from ikectx.disk import syncs
from ikectx.disk.store import SqliteStore
from ikectx.engine.journaled import TransferPolicy
from ikectx.engine.ports import Address
from ikectx.engine.report import TransferEvent
from ikectx.engine.tables import OSEQ_JUMP
from ikectx.errors import (
    BusyError,
    CharonError,
    ConfigError,
    LinkError,
    RefusedError,
    StateError,
    UnknownSaError,
    UsageError,
)
from ikectx.gateway import Gateway
from ikectx.numbers import Fpt, IdType, Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import Identity, IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from ikectx.wire.cxtp import ContextDataBlock, Ctd, Ctdr, Pctd
from ikectx.wire.tokens import Purpose
from tests.hand_loop import HandLoop, run
from tests.mobile_nodes import serve
from tests.peers import CountedStore, Ether, MemoryGateway, a_context
from tests.worlds import KEY, World, one_move, until, world

# -- moves -----------------------------------------------------------------------------------------------


def test_an_sa_moves() -> None:
    async def scenario() -> None:
        async with world() as w:
            seen: list[TransferEvent] = []
            sa, report = await one_move(w, progress=seen.append)
            await w.quiet()
            assert w.owner(sa) == "b"
            assert (report.result, report.status, report.exit_code) == ("moved", Status.OK, 0)
            assert (report.from_, report.to, report.mn, report.mn_address) == (
                "a",
                "b",
                "mn1.example",
                "198.51.100.7",
            )
            assert report.text == "b serves mn1.example now"
            assert report.attempts == 1
            assert report.epoch == 1
            # PCTD, CTDR, CTD, CTDR and nothing else
            assert [type(message) for message in w.network.seen] == [Pctd, Ctdr, Ctd, Ctdr]
            assert report.cxtp_messages == 4
            assert report.cxtp_octets == sum(len(message.serialize()) for message in w.network.seen)
            assert set(report.phases_ms) == {"export", "connect", "prepare", "freeze", "confirm", "release"}
            # each side did its steps in order
            assert w.a.daemon.calls == ["export", "freeze", "release"]
            assert w.b.daemon.calls == ["check", "prepare", "take", "move", "activate"]
            assert sa in w.a.daemon.late
            states = [event.state for event in seen]
            assert states == ["offered", "freezing", "released", "cleaning", "done"]
            assert [event.report is not None for event in seen] == [False] * 4 + [True]
            states = [event.state for event in w.b.events]
            assert states == [
                *("checking", "preparing", "prepared", "owning", "moving", "activating", "owned")
            ]
            assert {event.role for event in w.b.events} == {"target"}

    run(scenario())


def test_the_journal_is_synced_although_no_move_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    sync, write = SqliteStore.sync, SqliteStore.write
    written = 0

    def note_write(store: SqliteStore, *entries: Any, **how: Any) -> None:
        nonlocal written
        written += 1
        write(store, *entries, **how)

    def note_sync(store: SqliteStore) -> None:
        synced.append(written)
        sync(store)

    monkeypatch.setattr(SqliteStore, "write", note_write)
    monkeypatch.setattr(SqliteStore, "sync", note_sync)

    async def scenario() -> None:
        async with world() as w:
            await one_move(w)
            await w.quiet()
            await asyncio.sleep(3.0)
            assert synced
            assert synced[-1] == written

    run(scenario())


def test_an_sa_that_is_prepared_or_let_go_is_synced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that lost its power knows where packets for the mobile node go."""
    synced: list[tuple[str, ...]] = []
    states: list[str] = []
    sync, write = SqliteStore.sync, SqliteStore.write

    def note_write(store: SqliteStore, *entries: Any, **how: Any) -> None:
        write(store, *entries, **how)
        states.extend(entry.state for entry in entries)

    def note_sync(store: SqliteStore) -> None:
        sync(store)
        time.sleep(0.1)
        synced.append(tuple(states))

    monkeypatch.setattr(syncs, "REST", 1e6)
    monkeypatch.setattr(SqliteStore, "write", note_write)
    monkeypatch.setattr(SqliteStore, "sync", note_sync)

    async def scenario() -> None:
        async with world() as w:
            await one_move(w)
            await until(lambda: len(synced) == 3)
            assert "preparing" in synced[0] and "freezing" not in synced[0], "packets come here from then on"
            assert "released" in synced[1]
            assert "owning" in synced[2], "packets of an SA that was taken over are blocked when it ends"

    run(scenario())


def test_what_blocks_packets_is_synced_before_they_are_sent_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mobile node that leaves: its packets are held at the new gateway from the announcement on."""
    order: list[str] = []
    sync = SqliteStore.sync

    def note_sync(store: SqliteStore) -> None:
        sync(store)
        order.append("synced")

    async def ready(context: IkeContext, keep_address: bool, *, leaving: bool = False) -> bool:
        order.append("ready")
        return leaving

    async def scenario() -> None:
        async with world() as w:
            mn = serve(w, a_context())
            leaves = (ContextDataBlock(Fpt.LEAVING, b""),)
            monkeypatch.setattr(w.b.daemon, "ready", ready)
            monkeypatch.setattr(SqliteStore, "sync", note_sync)
            monkeypatch.setattr(w.a.daemon, "divert", lambda *_: noted())
            assert mn.says(await w.a.agent.ctar(*mn.announce(blocks=leaves)), Purpose.ANNOUNCE) is Status.OK
            assert order[: order.index("diverted")][-2:] == ["ready", "synced"]

    async def noted() -> None:
        order.append("diverted")

    monkeypatch.setattr(syncs, "REST", 1e6)
    run(scenario())


def test_a_slow_disk_takes_one_thread_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = most = 0
    written = synced = 0
    write = SqliteStore.write

    def note_write(store: SqliteStore, *entries: Any, **how: Any) -> None:
        nonlocal written
        written += 1
        write(store, *entries, **how)

    async def slow_sync() -> None:
        nonlocal busy, most, synced
        busy, began = busy + 1, written
        most = max(most, busy)
        await asyncio.sleep(0.5)
        busy, synced = busy - 1, began

    def thread(
        loop: asyncio.AbstractEventLoop, executor: None, work: Callable[..., None]
    ) -> asyncio.Future[None]:
        if work.__name__ == "sync":
            return loop.create_task(slow_sync())
        return real(loop, executor, work)

    real = HandLoop.run_in_executor
    monkeypatch.setattr(SqliteStore, "write", note_write)
    monkeypatch.setattr(HandLoop, "run_in_executor", thread)

    async def scenario() -> None:
        async with world() as w:
            for number in range(1, 6):
                sa = w.a.daemon.serve(a_context(number, mn=f"198.51.100.{number}"))
                assert (await w.a.agent.transfer(sa, "b")).result == "moved"
                await asyncio.sleep(0.05)
            assert most == 2, "one of each gateway"
            await asyncio.sleep(4.0)
            assert synced == written, "what was written meanwhile is synced afterwards"

    run(scenario())


def test_what_arrives_is_what_was_sent_with_the_last_counters() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa = w.a.daemon.serve(a_context())
            sent = await w.a.daemon.export(sa)
            await w.a.agent.transfer(sa, "b")
            assert w.b.daemon.served[sa] == replace(sent, epoch=1)
            # b began at a's last number (as of the freeze, not of the export) plus the jump
            assert w.a.daemon.mine[sa] > a_context().children[0].outbound.seq
            assert w.b.daemon.mine[sa] == w.a.daemon.mine[sa] + w.b.daemon.jump + 1000

    run(scenario())


def test_keep_tells_the_mn_nothing() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa, report = await one_move(w, address="keep")
            assert report.result == "moved"
            assert report.address == "keep"
            assert w.owner(sa) == "b"
            assert w.b.daemon.moves == []

    run(scenario())


def test_there_and_back_ten_times() -> None:
    async def scenario() -> None:
        async with world(names=("a", "b", "c")) as w:
            sa = w.a.daemon.serve(a_context())
            at = "a"
            for turn, to in enumerate("bcabababca"):
                report = await w.sides[at].agent.transfer(sa, to)
                assert report.result == "moved", report
                assert report.epoch == turn + 1
                at = to
                await w.quiet()
                assert w.owner(sa) == at

    run(scenario())


def test_one_connection_carries_both_directions() -> None:
    async def scenario() -> None:
        async with world() as w:
            mine = [w.a.daemon.serve(a_context(number, mn=f"198.51.100.{number}")) for number in (1, 2, 3)]
            theirs = [w.b.daemon.serve(a_context(number, mn=f"198.51.100.{number}")) for number in (4, 5)]
            shared = w.b.daemon.serve(a_context(6, mn="198.51.100.3"))  # two MNs, one address, both ways
            assert (await w.a.agent.transfer(mine[0], "b")).result == "moved"
            both = await asyncio.gather(
                w.a.agent.transfer_all(mine[1:], "b"), w.b.agent.transfer_all([*theirs, shared], "a")
            )
            assert {report.result for reports in both for report in reports} == {"moved"}
            await w.quiet()
            assert [w.owner(sa) for sa in (*mine, *theirs, shared)] == [*"bbbaaa"]
            assert len(w.network._wires) == 2

    run(scenario())


def test_the_next_sas_begin_when_a_quarter_of_those_that_move_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        async with world() as w:
            sas = [w.a.daemon.serve(a_context(n, mn=f"198.51.100.{n}")) for n in range(1, 13)]
            gates = {sa: asyncio.Event() for sa in sas}
            begun: list[SaName] = []
            freeze = w.a.daemon.freeze

            async def waiting(context: IkeContext, *args: Any, **named: Any) -> Any:
                begun.append(context.spis)
                await gates[context.spis].wait()
                return await freeze(context, *args, **named)

            monkeypatch.setattr(w.a.daemon, "freeze", waiting)
            moving = asyncio.create_task(w.a.agent.transfer_all(sas, "b", parallel=8))
            await until(lambda: len(begun) == 8)
            gates[sas[0]].set()
            await until(lambda: sas[0] in w.b.daemon.served)
            await asyncio.sleep(0.1)
            assert len(begun) == 8
            gates[sas[1]].set()
            await until(lambda: len(begun) == 10)
            for gate in gates.values():
                gate.set()
            assert {report.result for report in await moving} == {"moved"}
            assert begun[0] in sas[:8] and {*begun} == {*sas}

    run(scenario())


def test_a_slow_sa_holds_up_the_others_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with world() as w:
            slow, *sas = [w.a.daemon.serve(a_context(n, mn=f"198.51.100.{n}")) for n in range(1, 8)]
            gate, freeze = asyncio.Event(), w.a.daemon.freeze

            async def waiting(context: IkeContext, *args: Any, **named: Any) -> Any:
                if context.spis == slow:
                    await gate.wait()
                return await freeze(context, *args, **named)

            monkeypatch.setattr(w.a.daemon, "freeze", waiting)
            moving = asyncio.create_task(w.a.agent.transfer_all([slow, *sas], "b", parallel=2))
            await until(lambda: all(sa in w.b.daemon.served for sa in sas))
            assert slow in w.a.daemon.served
            gate.set()
            assert {report.result for report in await moving} == {"moved"}

    monkeypatch.setattr(gateway, "SLOW", 0.05)
    run(scenario())


def test_sas_that_are_prepared_one_after_another_are_frozen_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with world() as w:
            loop = asyncio.get_running_loop()
            alone, *sas = [w.a.daemon.serve(a_context(n, mn=f"198.51.100.{n}")) for n in range(1, 6)]
            takes = dict(zip([alone, *sas], (0.005, 0.005, 0.01, 0.015, 0.2), strict=True))
            prepared: list[float] = []
            frozen: dict[SaName, float] = {}
            prepare, freeze = w.b.daemon.prepare, w.a.daemon.freeze

            async def preparing(context: IkeContext, *args: Any, **named: Any) -> Any:
                await asyncio.sleep(takes[context.spis])
                prepared.append(loop.time())
                return await prepare(context, *args, **named)

            async def freezing(context: IkeContext, *args: Any, **named: Any) -> Any:
                frozen[context.spis] = loop.time()
                return await freeze(context, *args, **named)

            monkeypatch.setattr(w.b.daemon, "prepare", preparing)
            monkeypatch.setattr(w.a.daemon, "freeze", freezing)
            assert (await w.a.agent.transfer(alone, "b")).result == "moved"
            assert frozen[alone] == prepared[-1], "one that moves alone waits for nothing"
            reports = await w.a.agent.transfer_all(sas, "b")
            assert {report.result for report in reports} == {"moved"}
            *together, late = (frozen[sa] for sa in sas)
            assert set(together) == {prepared[1] + driver.GATHER}, "no longer for one that is late"
            assert late == prepared[-1]

    run(scenario())


def test_moves_that_nobody_waits_for_any_longer_are_cancelled() -> None:
    async def scenario() -> None:
        async with world() as w:
            sas = [w.a.daemon.serve(a_context(n, mn=f"198.51.100.{n}")) for n in range(1, 6)]
            w.a.daemon.wait["freeze"] = asyncio.Event()
            moving = asyncio.create_task(w.a.agent.transfer_all(sas, "b", parallel=2))
            await w.a.reaches("freeze")
            moving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await moving
            w.a.daemon.wait["freeze"].set()
            await w.quiet()
            for sa in sas:
                assert w.owner(sa) == "a"

    run(scenario())


def test_many_move_at_once_but_one_for_each_mn() -> None:
    async def scenario() -> None:
        async with world() as w:
            # five MNs with an address each, five behind one NAT
            contexts = [
                a_context(number, mn=f"198.51.100.{number}" if number <= 5 else "203.0.113.9")
                for number in range(1, 11)
            ]
            sas = [w.a.daemon.serve(context) for context in contexts]
            reports = await w.a.agent.transfer_all([*sas, sas[0]], "b", parallel=6)
            assert [report.sa for report in reports] == sas
            assert {report.result for report in reports} == {"moved"}
            await w.quiet()
            for sa in sas:
                assert w.owner(sa) == "b"
            # one connection carried them all, and of the NATed never two were under way
            assert len(w.network._wires) == 2
            under_way = 0
            for message in w.network.seen:
                if str(message.mn) == "203.0.113.9":
                    under_way += {Pctd: 1, Ctd: 0, Ctdr: 0}[type(message)]
                    assert under_way <= 1
                    if isinstance(message, Ctdr) and _ends(w, message):
                        under_way -= 1

    def _ends(w: World, message: Ctdr) -> bool:
        """The second CTDR of a transfer ends it."""
        answers = [m for m in w.network.seen if isinstance(m, Ctdr) and m.mn == message.mn]
        return [id(m) for m in answers].index(id(message)) % 2 == 1

    run(scenario())


def test_v6_mobile_nodes_move_too() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa = w.a.daemon.serve(a_context(mn="2001:db8::7"))
            report = await w.a.agent.transfer(sa, "b")
            assert report.result == "moved"
            assert report.mn_address == "2001:db8::7"
            assert w.owner(sa) == "b"

    run(scenario())


# -- dry runs --------------------------------------------------------------------------------------------


def test_a_dry_run_asks_and_touches_nothing() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa, report = await one_move(w, dry_run=True)
            assert (report.result, report.status, report.dry_run) == ("kept", Status.OK, True)
            assert report.text == "b would take it"
            assert report.exit_code == 0
            assert w.a.daemon.calls == ["export"]
            assert w.b.daemon.calls == ["check"]
            assert w.a.agent.history() == w.b.agent.history() == []
            assert w.owner(sa) == "a"
            w.b.daemon.verdicts = [Verdict(Fpt.PAD, Status.NO_CONNECTION, "home")]
            report = await w.a.agent.transfer(sa, "b", dry_run=True)
            assert (report.result, report.status) == ("refused", Status.NO_CONNECTION)
            assert report.exit_code == RefusedError.exit_code
            w.b.daemon.fail["check"] = [CharonError("charon is not there")]
            report = await w.a.agent.transfer(sa, "b", dry_run=True)
            assert (report.result, report.status) == ("refused", Status.CHARON)
            w.network.kill("b")
            report = await w.a.agent.transfer(sa, "b", dry_run=True)
            assert (report.result, report.status) == ("kept", Status.UNREACHABLE)
            assert report.exit_code == LinkError.exit_code

    run(scenario())


# -- refusals --------------------------------------------------------------------------------------------


def test_a_refusal_names_context_status_and_remedy() -> None:
    async def scenario() -> None:
        async with world() as w:
            w.b.daemon.verdicts = [
                Verdict(Fpt.SAD, Status.OK),
                Verdict(Fpt.PAD, Status.NO_CONNECTION, "home"),
            ]
            sa, report = await one_move(w)
            assert (report.result, report.status, report.exit_code) == ("refused", Status.NO_CONNECTION, 4)
            assert report.text == "b: the other gateway has no connection of that name: home"
            assert report.hint == "load a connection of that name at the other gateway"
            assert report.state_here == "a serves the MN"
            assert report.state_there == "b does not own it"
            failed = [verdict for verdict in report.verdicts if verdict.status is not Status.OK]
            assert [(verdict.fpt, verdict.status) for verdict in failed] == [(Fpt.PAD, Status.NO_CONNECTION)]
            assert w.a.daemon.calls == ["export"]
            assert w.b.daemon.calls == ["check"]
            assert w.owner(sa) == "a"
            await w.quiet()
            assert w.b.agent.history()[0]["detail"] == "home"
            # mended, it moves
            w.b.daemon.verdicts = []
            assert (await w.a.agent.transfer(sa, "b")).result == "moved"
            assert w.owner(sa) == "b"

    run(scenario())


def test_a_peer_without_the_right_to_push_is_refused() -> None:
    async def scenario() -> None:
        async with world(rights=frozenset({"pull"})) as w:
            sa, report = await one_move(w)
            assert (report.result, report.status) == ("refused", Status.NOT_ALLOWED)
            assert "push" in report.hint
            assert w.b.daemon.calls == []
            assert w.owner(sa) == "a"

    run(scenario())


@pytest.mark.parametrize(
    ("brings", "taken"),
    [
        ({"connections": ("home", "work")}, True),
        ({"connections": ("work",)}, False),
        ({"identities": ("*.example.org", "*.example")}, True),
        ({"identities": ("*.example.org",)}, False),
        ({"connections": ("home",), "identities": ("*@example",)}, False),
    ],
)
def test_a_peer_brings_only_what_it_may(brings: dict[str, tuple[str, ...]], taken: bool) -> None:
    async def scenario() -> None:
        async with world(brings=brings) as w:
            sa, report = await one_move(w)
            assert report.result == ("moved" if taken else "refused")
            if not taken:
                assert report.status is Status.NOT_ALLOWED
                assert "a may not bring SAs of" in report.text
                assert w.b.daemon.calls == []
            assert w.owner(sa) == ("b" if taken else "a")

    run(scenario())


@pytest.mark.parametrize(
    ("goes", "moves"),
    [
        ({"to_connections": ("home", "work")}, True),
        ({"to_connections": ("work",)}, False),
        ({"to_identities": ("*.example",)}, True),
        ({"to_identities": ("*.example.org",)}, False),
    ],
)
@pytest.mark.parametrize("pulled", [False, True])
def test_only_what_may_go_to_a_peer_goes_there(
    goes: dict[str, tuple[str, ...]], moves: bool, pulled: bool
) -> None:
    async def scenario() -> None:
        async with world(brings=goes, rights=frozenset({"push", "pull"})) as w:
            sa = w.a.daemon.serve(a_context())
            if pulled:
                report = await w.b.agent.pull("a", a_context().remote.address)
            else:
                report = await w.a.agent.transfer(sa, "b")
            assert report.result == ("moved" if moves else "refused" if pulled else "kept"), report
            if not moves:
                assert report.status is Status.NOT_ALLOWED
                assert w.b.daemon.calls == []
                assert pulled or "may not go to b" in report.text
            await w.quiet()
            assert w.owner(sa) == ("b" if moves else "a")

    run(scenario())


def test_where_there_is_an_eap_identity_it_is_that_one_that_counts() -> None:
    peer = PeerConfig("a", "a", identities=("*@example.org",))
    sa = replace(a_context(), remote_eap_id=Identity(IdType.RFC822_ADDR, b"carol@example.org"))
    assert peer.may_not_bring(sa) == ""
    rogue = replace(sa, remote_eap_id=Identity(IdType.FQDN, b"root\nevil"))
    assert peer.may_not_bring(rogue) == "a may not bring SAs of root?evil here"
    with pytest.raises(RefusedError, match=r"SAs of root\?evil may not go to a"):
        PeerConfig("a", "a", to_identities=("*@example.org",)).may_get(rogue)


def test_an_owner_who_was_succeeded_is_refused() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa, _ = await one_move(w)
            # a's charon comes back from a snapshot with the SA, and a's journal is gone too
            await w.a.kill()
            (w.folder / "a.db").unlink()
            w.a.daemon.served[sa] = a_context()
            await w.a.start()
            report = await w.a.agent.transfer(sa, "b")
            assert (report.result, report.status) == ("refused", Status.STALE_EPOCH)
            assert "history" in report.hint
            # nor may it claim b's own epoch
            w.a.daemon.served[sa] = a_context(epoch=1)
            report = await w.a.agent.transfer(sa, "b")
            assert report.status is Status.STALE_EPOCH
            assert w.b.daemon.calls.count("check") == 1

    run(scenario())


def test_what_is_asked_wrongly_is_an_error() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa = w.a.daemon.serve(a_context())
            with pytest.raises(UsageError, match="no peer is called 'x'") as caught:
                await w.a.agent.transfer(sa, "x")
            assert caught.value.hint == "configured peers: b"
            with pytest.raises(UsageError):
                await w.a.agent.transfer_all([sa], "x")
            with pytest.raises(UnknownSaError):
                await w.a.agent.transfer(SaName(bytes(8), bytes(8)), "b")
            with pytest.raises(UnknownSaError):
                await w.a.agent.transfer(SaName(bytes(8), bytes(8)), "b", dry_run=True)
            first, second = await w.a.agent.transfer_all([SaName(bytes(8), bytes(8)), sa], "b")
            assert (first.result, first.status, first.exit_code) == ("refused", Status.UNKNOWN_SA, 6)
            assert first.state_here == "a has no such SA"
            assert second.result == "moved"
            # a gateway that stopped moves nothing
            await w.a.agent.stop()
            with pytest.raises(StateError, match="does not run"):
                await w.a.agent.transfer(sa, "b")

    run(scenario())


def test_one_sa_is_moved_once_at_a_time() -> None:
    async def scenario() -> None:
        async with world(names=("a", "b", "c")) as w:
            sa = w.a.daemon.serve(a_context())
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            first = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await w.b.reaches("prepare")
            # b itself refuses an SA that is on its way to it from elsewhere
            w.sides["c"].daemon.served[sa] = a_context()
            report = await w.sides["c"].agent.transfer(sa, "b")
            assert report.status is Status.BUSY
            assert report.attempts == 5
            del w.sides["c"].daemon.served[sa]
            gate.set()
            assert (await first).result == "moved"
            assert w.owner(sa) == "b"

    run(scenario())


def test_a_gateway_that_is_down_leaves_the_sa_served() -> None:
    async def scenario() -> None:
        async with world() as w:
            w.network.kill("b")
            sa, report = await one_move(w)
            assert (report.result, report.status, report.exit_code) == ("kept", Status.UNREACHABLE, 5)
            assert "certificates" in report.hint
            assert "connection refused" in report.text
            assert w.a.daemon.calls == ["export"]
            assert w.owner(sa) == "a"
            assert w.a.agent.history()[0]["result"] == "kept"

    run(scenario())


# -- busy ------------------------------------------------------------------------------------------------


def test_a_busy_sa_is_tried_again_with_a_new_export() -> None:
    async def scenario() -> None:
        async with world() as w:
            w.a.daemon.fail = {
                "export": [BusyError("a rekey is in flight")],
                "freeze": [BusyError("an exchange is in flight"), BusyError("it changed")],
            }
            sa, report = await one_move(w)
            assert (report.result, report.attempts) == ("moved", 4)
            assert w.a.daemon.calls == [
                *["export"] * 2,
                "freeze",
                "export",
                "freeze",
                "export",
                "freeze",
                "release",
            ]
            await w.quiet()
            assert w.owner(sa) == "b"
            assert [one["result"] for one in w.a.agent.history()] == ["moved", "kept", "kept"]

    run(scenario())


def test_an_sa_that_stays_busy_stays() -> None:
    async def scenario() -> None:
        async with world() as w:
            w.a.daemon.fail["freeze"] = [BusyError("an exchange is in flight") for _ in range(5)]
            sa, report = await one_move(w)
            assert (report.result, report.status, report.attempts) == ("kept", Status.BUSY, 5)
            assert report.hint.startswith("try again")
            assert report.exit_code == BusyError.exit_code
            await w.quiet()
            assert w.owner(sa) == "a"
            assert "thaw" not in w.a.daemon.calls  # a busy SA was not frozen
            w.b.daemon.fail["prepare"] = [BusyError("charon reloads")]
            assert (await w.a.agent.transfer(sa, "b")).result == "moved"

    run(scenario())


def test_an_sa_that_outruns_the_jump_is_exported_anew() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa = w.a.daemon.serve(a_context())
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await w.b.reaches("prepare")
            w.a.daemon.sent(sa, OSEQ_JUMP)
            gate.set()
            report = await moving
            assert (report.result, report.attempts) == ("moved", 2)
            assert w.a.daemon.calls == [*("export", "freeze", "thaw"), *("export", "freeze", "release")]
            await w.quiet()
            assert w.owner(sa) == "b"

    run(scenario())


# -- what operators read ----------------------------------------------------------------------------------


def test_two_peers_of_one_name_are_a_mistake(tmp_path: Path) -> None:
    store = CountedStore(tmp_path / "x.db", KEY)
    daemon = MemoryGateway("a", Ether())
    for peers in (
        [PeerConfig("b", "h"), PeerConfig("b", "i")],
        [PeerConfig("b", "h"), PeerConfig("c", "i", certificate_name="B")],
    ):
        with pytest.raises(ConfigError, match="two peers have one name"):
            Gateway("a", daemon, daemon, store, peers)
    store.close()


def test_status_and_history_are_plain_json_without_secrets() -> None:
    async def scenario() -> None:
        async with world() as w:
            _, report = await one_move(w)
            await w.quiet()
            text = json.dumps(
                [report.to_json(), w.a.agent.status(), w.b.agent.history(), w.a.agent.history()]
            )
            for secret in (b"g to the ir", a_context().current.secret.reveal()):
                assert secret.decode("latin-1") not in text
                assert secret.hex() not in text
            air = w.b.agent.history()[0]["air"]
            assert isinstance(air, dict)
            assert {name: took for name, took in air.items() if took} == {
                "messages": 2,
                "octets": 300,
                "requests": 1,
            }
            phases = w.b.agent.history()[0]["phases_ms"]
            assert {"checking", "preparing", "prepared", "owning", "moving", "activating"} <= set(phases)  # type: ignore[call-overload]
            assert w.a.agent.status()["peers"] == [
                {"name": "b", "host": "b", "port": 5091, "rights": ["push"], "connected": True}
            ]
            # what is over has no keys in the journal any more
            for side in (w.a, w.b):
                entry = side.store.find(
                    "source" if side is w.a else "target", bytes.fromhex(report.transfer_id)
                )
                assert entry is not None
                assert entry.context is entry.final is None

    run(scenario())


@pytest.mark.parametrize("jump", [0, OSEQ_JUMP + 1])
def test_b18_no_gateway_jumps_further_than_the_other_one_assumes(jump: int) -> None:
    with pytest.raises(ConfigError, match=f"oseq_jump is {jump}"):
        TransferPolicy(oseq_jump=jump)


def test_b18_a_source_that_jumped_less_takes_back_above_all_that_the_target_sent() -> None:
    async def scenario() -> None:
        async with world() as w:
            w.a.daemon.jump, w.b.daemon.jump = 1000, OSEQ_JUMP
            parts = w.a.engine._parts
            config = replace(parts.config, policy=TransferPolicy(parts.timing, oseq_jump=1000))
            w.a.engine.transfers._parts = replace(parts, config=config)
            w.b.daemon.fail["move"] = [LinkError("no answer to 5 requests")]
            sa, report = await one_move(w)
            assert report.result == "kept"
            await w.quiet()
            assert w.owner(sa) == "a"  # no number was used twice

    run(scenario())


def test_b30_a_transfer_is_tried_at_least_once() -> None:
    with pytest.raises(ConfigError, match="at least once"):
        TransferPolicy(busy_attempts=0)


def test_a_daemon_that_lacks_methods_is_refused_at_once_and_told_where_they_are(tmp_path: Path) -> None:
    class Partly:
        async def find(self, mn: object) -> tuple[SaName, ...]:
            return ()

    whole = MemoryGateway("a", Ether())
    store = CountedStore(tmp_path / "a.db", KEY)
    for source, sink, name in ((Partly(), whole, "ContextSource"), (whole, Partly(), "ContextSink")):
        with pytest.raises(UsageError, match=f"Partly lacks methods of {name}") as caught:
            Gateway("a", source, sink, store, [])  # type: ignore[arg-type]
        assert caught.value.hint.startswith(f"inherit from ikectx.{name}")
    store.close()


# -- mobile nodes that do not go ------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["auto", "update"])
def test_a_mobile_node_that_did_not_go_where_it_was_told_is_relayed(address: Address) -> None:
    async def scenario() -> None:
        async with world() as w:
            w.b.daemon.fail["move"] = [LinkError("silent", status=Status.PEER_SILENT)]
            sa, report = await one_move(w, address=address)
            if address == "update":
                assert (report.result, report.status, report.attempts) == ("kept", Status.PEER_SILENT, 1)
                assert "--address relay" in report.hint
                assert w.owner(sa) == "a"
                return
            assert (report.result, report.attempts) == ("moved", 2)
            assert (report.address, report.why) == ("relay", "it did not go to b's address")
            assert w.owner(sa) == "b"

    run(scenario())


def test_a_transfer_is_known_by_its_name() -> None:
    async def scenario() -> None:
        async with world() as w:
            _, report = await one_move(w)
            for side in (w.a, w.b):
                assert side.agent.knows(report.transfer_id)
                assert not side.agent.knows("00" * 8) and not side.agent.knows("no name")

    run(scenario())
