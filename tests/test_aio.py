"""Two gateways in one process: moves, refusals, failures of every step, cuts and crashes at every moment.

Throughout: never two senders for one SA, no sequence number used twice, and in the end exactly one owner.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from ikectx.aio import Gateway
from ikectx.cxtp import Ctc, Ctd, Ctdr, Message, Pctd
from ikectx.errors import (
    BusyError,
    CharonError,
    ConfigError,
    IkectxError,
    KernelError,
    LinkError,
    RefusedError,
    StateError,
    UnknownSaError,
    UsageError,
)
from ikectx.links import PeerConfig
from ikectx.numbers import Fpt, Status
from ikectx.ports import SaName, Verdict
from ikectx.transfer import OSEQ_JUMP, Timing, TransferEvent, TransferReport

from .peers import (
    CountedStore,
    Ether,
    Fate,
    Fuse,
    MemoryGateway,
    Network,
    a_context,
    lossy,
)

FAST = Timing(
    connect=0.2,
    offer=0.3,
    confirm=0.1,
    hold=0.15,
    step=1.0,
    in_doubt=5.0,
    idle=5.0,
    keepalive=1.0,
    backoff=0.002,
    backoff_max=0.02,
    busy_backoff=0.002,
    stop=0.3,
)
KEY = bytes(range(32))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where the machine allows: journals are synced, disks are slow."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


class Side:
    """A gateway of the test: charon and kernel in memory, an agent that can die and come back."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.world = world
        self.daemon = MemoryGateway(name, world.ether)
        self.events: list[TransferEvent] = []
        self.fuse = Fuse()
        self.agent: Gateway
        self.store: CountedStore

    async def start(self, at: int = 0) -> None:
        """A new agent; with `at` it dies at that moment."""
        self.fuse = Fuse(at, lambda: self.world.network.kill(self.name))
        self.daemon.fuse = self.fuse
        self.store = CountedStore(self.world.folder / f"{self.name}.db", KEY)
        self.store.fuse = self.fuse
        peers = [
            PeerConfig(name, name, rights=self.world.rights) for name in self.world.names if name != self.name
        ]
        self.agent = Gateway(
            self.name,
            self.daemon,
            self.daemon,
            self.store,
            peers,
            timing=self.world.timing,
            dial=self.world.network.dial_from(self.name),
            observer=self.events.append,
        )
        await self.agent.start()
        if not self.fuse.blown:
            self.world.network.up[self.name] = self.agent

    def only_open(self) -> dict[str, object]:
        """The one open transfer, as `status` shows it."""
        transfers = self.agent.status()["transfers"]
        assert isinstance(transfers, list)
        (one,) = transfers
        assert isinstance(one, dict)
        return one

    async def kill(self) -> None:
        """No clean-up: tasks vanish, connections break, the journal stays as it is."""
        self.fuse.blown = True
        self.world.network.kill(self.name)
        for task in list(self.agent._tasks):
            task.cancel()
        await asyncio.gather(*self.agent._tasks, return_exceptions=True)
        self.store.close()

    async def stop(self) -> None:
        self.world.network.kill(self.name)
        await self.agent.stop()
        self.store.close()


class World:
    """Gateways a and b (and c), and the MNs between them."""

    def __init__(self, folder: Path, names: tuple[str, ...] = ("a", "b")) -> None:
        self.folder = folder
        self.names = names
        self.timing = FAST
        self.rights = frozenset({"push"})
        self.ether = Ether()
        self.network = Network()
        self.sides = {name: Side(name, self) for name in names}
        self.a, self.b = self.sides["a"], self.sides["b"]

    async def quiet(self, seconds: float = 3.0) -> None:
        """Until no journal has an open transfer."""
        async with asyncio.timeout(seconds):
            while any(side.store.open_transfers() for side in self.sides.values()):
                await asyncio.sleep(0.003)

    def owner(self, sa: SaName) -> str:
        """Who serves the SA; all invariants hold."""
        assert self.ether.slips == []
        senders = self.ether.senders[sa]
        assert len(senders) == 1, f"senders: {senders}"
        name = next(iter(senders))
        for side in self.sides.values():
            daemon = side.daemon
            assert sa not in daemon.passive, f"{side.name} kept what it prepared"
            assert (sa in daemon.served) == (side.name == name)
            assert sa not in daemon.frozen, f"{side.name} is still frozen"
        return name


@asynccontextmanager
async def world(
    folder: Path,
    *,
    names: tuple[str, ...] = ("a", "b"),
    timing: Timing = FAST,
    rights: frozenset[str] = frozenset({"push"}),
    crash: tuple[str, int] = ("", 0),
) -> AsyncIterator[World]:
    made = World(folder, names)
    made.timing, made.rights = timing, rights
    for side in made.sides.values():
        await side.start(crash[1] if side.name == crash[0] else 0)
    try:
        yield made
    finally:
        for side in made.sides.values():
            await side.stop()
        await made.network.close()


Scenario = Callable[[], Coroutine[Any, Any, None]]


def run(scenario: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scenario

    asyncio.run(bounded())


async def one_move(w: World, **how: Any) -> tuple[SaName, TransferReport]:
    sa = w.a.daemon.serve(a_context())
    return sa, await w.a.agent.transfer(sa, "b", **how)


# -- moves -----------------------------------------------------------------------------------------------


def test_an_sa_moves(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
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
            assert [event.state for event in seen] == [
                *("offered", "freezing", "released", "cleaning", "done"),
                "done",
            ]
            assert [event.report is not None for event in seen] == [False] * 5 + [True]
            states = [event.state for event in w.b.events]
            assert states == [
                *("checking", "preparing", "prepared", "owning", "moving", "activating", "owned")
            ]
            assert {event.role for event in w.b.events} == {"target"}

    run(scenario())


def test_what_arrives_is_what_was_sent_with_the_last_counters(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            sa = w.a.daemon.serve(a_context())
            sent = await w.a.daemon.export(sa)
            await w.a.agent.transfer(sa, "b")
            assert w.b.daemon.served[sa] == replace(sent, epoch=1)
            # b began at a's last number (as of the freeze, not of the export) plus the jump
            assert w.a.daemon.mine[sa] > a_context().children[0].outbound.seq
            assert w.b.daemon.mine[sa] == w.a.daemon.mine[sa] + w.b.daemon.jump + 1000

    run(scenario())


def test_keep_tells_the_mn_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            sa, report = await one_move(w, address="keep")
            assert report.result == "moved"
            assert report.address == "keep"
            assert w.owner(sa) == "b"
            assert w.b.daemon.moves == []

    run(scenario())


def test_there_and_back_ten_times(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, names=("a", "b", "c")) as w:
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


def test_many_move_at_once_but_one_for_each_mn(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
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


def test_v6_mobile_nodes_move_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            sa = w.a.daemon.serve(a_context(mn="2001:db8::7"))
            report = await w.a.agent.transfer(sa, "b")
            assert report.result == "moved"
            assert report.mn_address == "2001:db8::7"
            assert w.owner(sa) == "b"

    run(scenario())


# -- dry runs --------------------------------------------------------------------------------------------


def test_a_dry_run_asks_and_touches_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
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


def test_a_refusal_names_context_status_and_remedy(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            w.b.daemon.verdicts = [
                Verdict(Fpt.SAD, Status.OK),
                Verdict(Fpt.PAD, Status.NO_CONNECTION, "home"),
            ]
            sa, report = await one_move(w)
            assert (report.result, report.status, report.exit_code) == ("refused", Status.NO_CONNECTION, 4)
            assert report.text == "b: the other gateway has no connection of that name"
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


def test_a_peer_without_the_right_to_push_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, rights=frozenset({"pull"})) as w:
            sa, report = await one_move(w)
            assert (report.result, report.status) == ("refused", Status.NOT_ALLOWED)
            assert "push" in report.hint
            assert w.b.daemon.calls == []
            assert w.owner(sa) == "a"

    run(scenario())


def test_an_owner_who_was_succeeded_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            sa, _ = await one_move(w)
            # a's charon comes back from a snapshot with the SA, and a's journal is gone too
            await w.a.kill()
            (tmp_path / "a.db").unlink()
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


def test_what_is_asked_wrongly_is_an_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            sa = w.a.daemon.serve(a_context())
            with pytest.raises(UsageError, match="no peer is called 'x'") as caught:
                await w.a.agent.transfer(sa, "x")
            assert caught.value.hint == "configured peers: b"
            with pytest.raises(UsageError):
                await w.a.agent.transfer_all([sa], "x")
            with pytest.raises(UnknownSaError):
                await w.a.agent.transfer((bytes(8), bytes(8)), "b")
            with pytest.raises(UnknownSaError):
                await w.a.agent.transfer((bytes(8), bytes(8)), "b", dry_run=True)
            first, second = await w.a.agent.transfer_all([(bytes(8), bytes(8)), sa], "b")
            assert (first.result, first.status, first.exit_code) == ("refused", Status.UNKNOWN_SA, 6)
            assert first.state_here == "a has no such SA"
            assert second.result == "moved"
            # a gateway that stopped moves nothing
            await w.a.agent.stop()
            with pytest.raises(StateError, match="does not run"):
                await w.a.agent.transfer(sa, "b")

    run(scenario())


def test_one_sa_is_moved_once_at_a_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, names=("a", "b", "c")) as w:
            sa = w.a.daemon.serve(a_context())
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            first = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            while "prepare" not in w.b.daemon.calls:
                await asyncio.sleep(0.001)
            with pytest.raises(BusyError, match="being moved already"):
                await w.a.agent.transfer(sa, "c")
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


def test_a_gateway_that_is_down_leaves_the_sa_served(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            w.network.kill("b")
            sa, report = await one_move(w)
            assert (report.result, report.status, report.exit_code) == ("kept", Status.UNREACHABLE, 5)
            assert "connection refused" in report.text
            assert w.a.daemon.calls == ["export"]
            assert w.owner(sa) == "a"
            assert w.a.agent.history()[0]["result"] == "kept"

    run(scenario())


# -- busy ------------------------------------------------------------------------------------------------


def test_a_busy_sa_is_tried_again_with_a_new_export(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
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


def test_an_sa_that_stays_busy_stays(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            w.a.daemon.fail["freeze"] = [BusyError("an exchange is in flight") for _ in range(5)]
            sa, report = await one_move(w)
            assert (report.result, report.status, report.attempts) == ("kept", Status.BUSY, 5)
            assert report.exit_code == BusyError.exit_code
            await w.quiet()
            assert w.owner(sa) == "a"
            assert "thaw" not in w.a.daemon.calls  # a busy SA was not frozen
            w.b.daemon.fail["prepare"] = [BusyError("charon reloads")]
            assert (await w.a.agent.transfer(sa, "b")).result == "moved"

    run(scenario())


def test_an_sa_that_outruns_the_jump_is_exported_anew(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            sa = w.a.daemon.serve(a_context())
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            while "prepare" not in w.b.daemon.calls:
                await asyncio.sleep(0.001)
            w.a.daemon.sent(sa, OSEQ_JUMP)
            gate.set()
            report = await moving
            assert (report.result, report.attempts) == ("moved", 2)
            assert w.a.daemon.calls == [*("export", "freeze", "thaw"), *("export", "freeze", "release")]
            await w.quiet()
            assert w.owner(sa) == "b"

    run(scenario())


# -- failures of each step -------------------------------------------------------------------------------

SINK = [
    ("check", CharonError("charon is gone"), "refused", Status.CHARON),
    ("prepare", KernelError("no such algorithm", errno=38), "refused", Status.KERNEL),
    ("after:prepare", CharonError("the SA did not appear"), "refused", Status.CHARON),
    ("take", KernelError("no buffer space", errno=105), "kept", Status.KERNEL),
    ("after:take", KernelError("no route", errno=113), "kept", Status.KERNEL),
    ("move", LinkError("no answer to 5 requests"), "kept", Status.PEER_SILENT),
    ("move", RefusedError("UNACCEPTABLE_ADDRESSES"), "kept", Status.PEER_REFUSED),
    ("after:move", RefusedError("wrong cookie"), "kept", Status.PEER_REFUSED),
    ("activate", CharonError("still PASSIVE"), "kept", Status.CHARON),
    ("after:activate", CharonError("not seen ESTABLISHED"), "kept", Status.CHARON),
    ("take", ValueError("a mistake of the integrator"), "kept", Status.FAILED),
]


@pytest.mark.parametrize(
    ("step", "error", "result", "status"), SINK, ids=[f"{s[0]}-{s[3].name}" for s in SINK]
)
def test_a_failure_at_the_target_is_undone(
    tmp_path: Path, step: str, error: Exception, result: str, status: Status
) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            w.b.daemon.fail[step] = [error]
            sa, report = await one_move(w)
            await w.quiet()
            assert (report.result, report.status) == (result, status)
            assert report.exit_code == RefusedError.exit_code
            assert report.hint
            assert report.state_here == "a serves the MN"
            assert w.owner(sa) == "a"
            assert w.b.daemon.calls[-1] == ("undo" if step != "check" else "check")
            assert w.b.agent.history()[0]["result"] == "aborted"
            assert str(error) in str(w.b.agent.history()[0]["detail"])
            if result == "kept":
                # it went past all that b may have sent
                assert w.a.daemon.mine[sa] > 2 * OSEQ_JUMP
            # nothing is left in the way of the next try, whose epoch is past both
            again = await w.a.agent.transfer(sa, "b")
            assert again.result == "moved"
            assert again.epoch == (3 if result == "kept" else 1)
            assert w.owner(sa) == "b"

    run(scenario())


SOURCE = [
    ("export", CharonError("VICI is gone"), "kept", Status.CHARON),
    ("freeze", KernelError("nft: no such table"), "kept", Status.KERNEL),
    ("after:freeze", CharonError("cannot read the counters"), "kept", Status.CHARON),
    ("release", CharonError("VICI is gone"), "moved", Status.OK),
    ("after:release", KernelError("no such policy"), "moved", Status.OK),
]


@pytest.mark.parametrize(("step", "error", "result", "status"), SOURCE, ids=[s[0] for s in SOURCE])
def test_a_failure_at_the_source(
    tmp_path: Path, step: str, error: IkectxError, result: str, status: Status
) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            w.a.daemon.fail[step] = [error]
            sa, report = await one_move(w)
            await w.quiet()
            assert (report.result, report.status) == (result, status)
            assert w.owner(sa) == ("a" if result == "kept" else "b")
            if result == "kept":
                assert (report.text, report.exit_code) == (str(error), error.exit_code)
                # packets for the MN may have reached b, which was prepared, while a was frozen
                assert (w.a.daemon.mine[sa] > 2 * OSEQ_JUMP) == (step == "after:freeze")
                again = await w.a.agent.transfer(sa, "b")
                assert again.result == "moved"

    run(scenario())


def test_undo_is_tried_until_it_works_and_only_then_the_source_thaws(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            w.b.daemon.fail = {"activate": [CharonError("no")], "undo": [CharonError("no")] * 4}
            sa, report = await one_move(w)
            assert (report.result, report.status) == ("kept", Status.CHARON)
            assert w.b.daemon.calls.count("undo") == 5
            assert w.owner(sa) == "a"

    run(scenario())


def test_a_thaw_that_fails_is_reported_and_tried_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            w.b.daemon.fail["move"] = [LinkError("silent")]
            w.a.daemon.fail["thaw"] = [CharonError("VICI is gone")] * 7
            sa, report = await one_move(w)
            assert report.result == "in-doubt"
            assert report.text == "VICI is gone"
            assert report.state_here == "a owns the SA but could not start serving it again"
            assert report.exit_code == CharonError.exit_code
            await w.quiet()
            assert w.owner(sa) == "a"
            assert w.a.agent.history()[0]["result"] == "kept"
            assert w.a.agent.history()[0]["status"]["name"] == "PEER_SILENT"  # type: ignore[index]

    run(scenario())


def test_a_clean_up_that_fails_does_not_hide_that_it_moved(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            w.a.daemon.fail["release"] = [CharonError("VICI is gone")] * 7
            sa, report = await one_move(w)
            assert (report.result, report.status, report.exit_code) == ("moved", Status.OK, 0)
            assert "the clean-up here failed, it is tried again: VICI is gone" in report.text
            await w.quiet()
            assert w.owner(sa) == "b"

    run(scenario())


def test_a_step_that_hangs_is_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, timing=replace(FAST, step=0.05)) as w:
            w.a.daemon.wait["freeze"] = asyncio.Event()
            sa, report = await one_move(w)
            assert report.result == "kept"
            assert "freeze did not end within 0.05 s" in report.text
            await w.quiet()
            assert w.owner(sa) == "a"

    run(scenario())


@pytest.mark.parametrize("state", ["offered", "freezing", "released", "thawing", "cleaning", "done"])
def test_a_source_that_cannot_journal_does_not_let_go(tmp_path: Path, state: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            w.a.store.broken = state
            sa, report = await one_move(w)
            if state in ("thawing", "cleaning", "done"):
                assert report.result == "moved"  # the next start would find its way from "released"
            else:
                assert report.result == "kept"
                assert "the disk is full" in report.text
            await asyncio.sleep(0.02)
            w.a.store.broken = ""
            await w.a.kill()
            await w.a.start()
            await w.quiet()
            assert w.owner(sa) == ("b" if report.result == "moved" else "a")

    run(scenario())


@pytest.mark.parametrize(
    "state",
    ["checking", "preparing", "prepared", "owning", "moving", "activating", "owned", "undoing", "aborted"],
)
@pytest.mark.parametrize("fails", ["", "move"])
def test_a_target_that_cannot_journal_does_not_take(tmp_path: Path, state: str, fails: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            w.b.store.broken = state
            if fails:
                w.b.daemon.fail[fails] = [LinkError("silent")]
            sa = w.a.daemon.serve(a_context())
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await asyncio.wait({moving}, timeout=0.05)
            assert w.ether.slips == []
            w.b.store.broken = ""
            report = await moving
            await asyncio.sleep(0.01)
            await w.b.kill()
            await w.b.start()
            await w.quiet()
            assert w.owner(sa) == ("b" if report.result == "moved" else "a")
            taken = state in ("checking", "moving", "activating", "owned", "undoing", "aborted") and not fails
            assert (report.result == "moved") == taken

    run(scenario())


# -- links that break ------------------------------------------------------------------------------------


def cut_at(number: int, fate: Fate) -> Callable[[Message], Fate]:
    count = 0

    def decide(message: Message) -> Fate:
        nonlocal count
        count += 1
        return fate if count == number else "deliver"

    return decide


CUTS = [(number, fate) for number in (1, 2, 3, 4) for fate in ("lose-cut", "deliver-cut")]


@pytest.mark.parametrize(("number", "fate"), CUTS)
def test_a_link_that_breaks_at_any_message(tmp_path: Path, number: int, fate: Fate) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            w.network.fate = cut_at(number, fate)
            sa, report = await one_move(w)
            await w.quiet()
            owner = w.owner(sa)
            assert (report.result == "moved") == (owner == "b")
            if number <= 2 and fate != "deliver-cut":
                # before the letting-go: kept, and nothing was frozen
                assert (report.result, report.status) == ("kept", Status.UNREACHABLE)
                assert "freeze" not in w.a.daemon.calls
            if number >= 3:
                # after it: asked again until answered
                assert report.result == "moved"
                sent = sum(isinstance(message, Ctd) for message in w.network.seen)
                assert sent >= 2 or fate == "deliver-cut"
                assert w.b.daemon.calls.count("take") == 1

    run(scenario())


def test_a_link_that_breaks_while_freezing_is_noticed_before_letting_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            gate = w.a.daemon.wait["freeze"] = asyncio.Event()
            sa = w.a.daemon.serve(a_context())
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            while "freeze" not in w.a.daemon.calls:
                await asyncio.sleep(0.001)
            for _, wire in w.network._wires:
                wire.break_()
            await asyncio.sleep(0.005)
            gate.set()
            report = await moving
            assert (report.result, report.status) == ("kept", Status.UNREACHABLE)
            assert not any(isinstance(message, Ctd) for message in w.network.seen)
            await w.quiet()
            assert w.owner(sa) == "a"

    run(scenario())


def test_what_was_prepared_and_never_fetched_is_undone_and_the_source_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, timing=replace(FAST, hold=0.03)) as w:
            gate = w.a.daemon.wait["freeze"] = asyncio.Event()
            sa = w.a.daemon.serve(a_context())
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            while "undo" not in w.b.daemon.calls:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.005)
            assert isinstance(w.network.seen[-1], Ctc)
            gate.set()
            report = await moving
            assert (report.result, report.status) == ("kept", Status.UNKNOWN_TRANSFER)
            assert report.text == "b cancelled it"
            assert not any(isinstance(message, Ctd) for message in w.network.seen)
            await w.quiet()
            assert w.owner(sa) == "a"

    run(scenario())


def test_a_target_that_never_answers_the_offer_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, timing=replace(FAST, offer=0.03)) as w:
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            sa, report = await one_move(w)
            assert (report.result, report.status) == ("kept", Status.UNREACHABLE)
            assert report.text == "b did not answer in time"
            # b's late answer is no answer to the next offer for that MN
            again = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await asyncio.sleep(0.005)
            assert not again.done()
            assert "freeze" not in w.a.daemon.calls
            gate.set()
            assert (await again).result == "moved"
            await w.quiet()
            assert w.owner(sa) == "b"

    run(scenario())


def test_a_slow_target_is_asked_again_and_answers_each(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, timing=replace(FAST, confirm=0.02)) as w:
            gate = w.b.daemon.wait["take"] = asyncio.Event()
            sa = w.a.daemon.serve(a_context())
            other = w.a.daemon.serve(a_context(2))  # of the same MN: its answers must not be mixed up
            moving = asyncio.create_task(w.a.agent.transfer_all([sa, other], "b"))
            while sum(isinstance(message, Ctd) for message in w.network.seen) < 4:
                await asyncio.sleep(0.001)
            w.b.daemon.fail["after:prepare"] = [CharonError("not this one")]
            gate.set()
            first, second = await moving
            assert (first.result, second.result) == ("moved", "refused")
            await w.quiet()
            answers = sum(isinstance(message, Ctdr) for message in w.network.seen)
            assert answers == sum(isinstance(message, Pctd | Ctd) for message in w.network.seen)
            assert w.owner(sa) == "b"
            assert w.owner(other) == "a"

    run(scenario())


# -- doubt -----------------------------------------------------------------------------------------------


def test_doubt_is_reported_and_resolved_in_the_background(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, timing=replace(FAST, in_doubt=0.05)) as w:
            sa = w.a.daemon.serve(a_context())
            w.network.fate = lambda m: "lose-cut" if isinstance(m, Ctd) else "deliver"
            report = await w.a.agent.transfer(sa, "b")
            assert (report.result, report.status, report.exit_code) == ("in-doubt", Status.UNREACHABLE, 5)
            assert f"ikectx reclaim {report.transfer_id}" in report.hint
            assert "has let go" in report.state_here
            assert w.ether.senders[sa] == set()
            open_one = w.a.only_open()
            assert (open_one["state"], open_one["transfer_id"]) == ("released", report.transfer_id)
            assert not w.a.agent.cancel(report.transfer_id)  # too late
            with pytest.raises(BusyError):
                await w.a.agent.transfer(sa, "b")
            w.network.fate = lambda m: "deliver"
            await w.quiet()
            # b had waited less than its hold time, so it took it in the end
            assert w.owner(sa) == "b"
            assert w.a.events[-1].report is not None
            assert w.a.events[-1].report.result == "moved"

    run(scenario())


def test_the_operator_may_reclaim(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, timing=replace(FAST, in_doubt=0.02)) as w:
            sa = w.a.daemon.serve(a_context())
            with pytest.raises(StateError, match="no transfer 00 is open"):
                await w.a.agent.reclaim("00")
            w.network.fate = lambda m: "lose-cut" if isinstance(m, Ctd) else "deliver"
            doubt = await w.a.agent.transfer(sa, "b")
            w.network.kill("b")
            report = await w.a.agent.reclaim(doubt.transfer_id)
            assert report.result == "kept"
            assert "reclaimed by the operator" in report.text
            assert report.epoch == 2
            await w.quiet()
            assert w.owner(sa) == "a"

    run(scenario())


def test_a_cancel_before_the_letting_go_keeps(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            for step, at in (("prepare", w.b), ("freeze", w.a)):
                gate = at.daemon.wait[step] = asyncio.Event()
                context = a_context(len(step))
                sa = w.a.daemon.serve(context)
                at.daemon.calls.clear()
                moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
                while step not in at.daemon.calls:
                    await asyncio.sleep(0.001)
                assert w.a.agent.cancel(str(w.a.only_open()["transfer_id"]))
                gate.set()
                report = await moving
                assert report.result == "kept"
                assert "cancelled here" in report.text
                await w.quiet()
                assert w.owner(sa) == "a"
            assert not w.a.agent.cancel("no hex")

    run(scenario())


def test_a_caller_who_goes_away_cancels(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            sa = w.a.daemon.serve(a_context())
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            while "prepare" not in w.b.daemon.calls:
                await asyncio.sleep(0.001)
            moving.cancel()
            await asyncio.gather(moving, return_exceptions=True)
            gate.set()
            await w.quiet()
            assert w.owner(sa) == "a"

    run(scenario())


def test_stopping_leaves_nothing_half_done(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            gate = w.a.daemon.wait["freeze"] = asyncio.Event()
            sa = w.a.daemon.serve(a_context())
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            while "freeze" not in w.a.daemon.calls:
                await asyncio.sleep(0.001)
            asyncio.get_running_loop().call_later(0.01, gate.set)
            await w.b.agent.stop()  # undoes what it had prepared
            assert w.b.daemon.passive == {}
            await w.a.agent.stop()
            assert (await moving).result == "kept"
            assert w.owner(sa) == "a"

    run(scenario())


# -- crashes ---------------------------------------------------------------------------------------------


async def until_dead_or_done(side: Side, work: asyncio.Task[Any]) -> None:
    while not side.fuse.blown and not work.done():
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.003)


async def _moments(folder: Path, fails: str) -> dict[str, int]:
    """How many moments each agent has in this transfer at which it could die."""
    async with world(folder) as w:
        if fails:
            w.b.daemon.fail[fails] = [LinkError("silent")]
        await one_move(w)
        await w.quiet()
        return {name: side.fuse.count for name, side in w.sides.items()}


@pytest.mark.parametrize("fails", ["", "move", "prepare"])
@pytest.mark.parametrize("victim", ["a", "b"])
def test_an_agent_that_dies_at_any_moment(tmp_path: Path, victim: str, fails: str) -> None:
    """Before and after each write of the journal, and before and after each step takes effect."""

    async def crash_at(moment: int, folder: Path) -> str:
        folder.mkdir()
        async with world(folder, crash=(victim, moment)) as w:
            if fails:
                w.b.daemon.fail[fails] = [LinkError("silent")]
            sa = w.a.daemon.serve(a_context())
            side = w.sides[victim]
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await until_dead_or_done(side, moving)
            assert side.fuse.blown
            assert w.ether.slips == []
            await side.kill()
            await side.start()
            await w.quiet()
            moving.cancel()
            await asyncio.gather(moving, return_exceptions=True)
            return w.owner(sa)

    async def scenario() -> None:
        (tmp_path / "count").mkdir()
        moments = (await _moments(tmp_path / "count", fails))[victim]
        assert moments >= 6
        owners = [await crash_at(moment, tmp_path / str(moment)) for moment in range(1, moments + 1)]
        # it may end either way, but both gateways stay of one mind: once b, never a again
        assert owners == sorted(owners) or fails

    logging.getLogger("ikectx").setLevel(logging.CRITICAL)
    try:
        run(scenario())
    finally:
        logging.getLogger("ikectx").setLevel(logging.NOTSET)


STEPS = ("check", "prepare", "take", "move", "activate", "undo", "freeze", "thaw", "release")


@pytest.mark.parametrize("seed", range(12))
def test_anything_may_happen(tmp_path: Path, seed: int) -> None:
    """Links break, steps fail and agents die, all by dice: in the end there is one owner who is sane."""

    async def scenario() -> None:
        dice = random.Random(seed)
        async with world(tmp_path) as w:
            sa = w.a.daemon.serve(a_context())
            at = "a"
            for turn in range(4):
                w.network.fate = lossy(dice.randrange(1000), 0.25)
                for side in w.sides.values():
                    for step in (
                        "check",
                        "prepare",
                        "take",
                        "move",
                        "activate",
                        "undo",
                        "freeze",
                        "thaw",
                        "release",
                    ):
                        some = [CharonError("by dice")] * (dice.random() < 0.15)
                        side.daemon.fail[dice.choice([step, f"after:{step}"])] = list(some)
                victim = dice.choice(["a", "b", ""])
                if victim:
                    await w.sides[victim].kill()
                    await w.sides[victim].start(dice.randint(1, 25))
                to = "b" if at == "a" else "a"
                moving = asyncio.create_task(w.sides[at].agent.transfer(sa, to))
                if victim:
                    await until_dead_or_done(w.sides[victim], moving)
                    w.network.fate = lambda message: "deliver"
                    await w.sides[victim].kill()
                    await w.sides[victim].start()
                await asyncio.wait({moving}, timeout=0.3)
                w.network.fate = lambda message: "deliver"
                await w.quiet()
                moving.cancel()
                await asyncio.gather(moving, return_exceptions=True)
                at = w.owner(sa)
                assert turn < 4

    logging.getLogger("ikectx").setLevel(logging.CRITICAL)
    try:
        run(scenario())
    finally:
        logging.getLogger("ikectx").setLevel(logging.NOTSET)


def test_recovery_says_what_it_does(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            sa = w.a.daemon.serve(a_context())
            w.network.fate = lambda m: "lose-cut" if isinstance(m, Ctd) else "deliver"
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            while not any(isinstance(message, Ctd) for message in w.network.seen):
                await asyncio.sleep(0.001)
            await w.a.kill()
            await w.b.kill()
            moving.cancel()
            await w.b.start()
            w.network.up.clear()
            await w.a.start()
            assert await w.a.agent.recover() == []  # start did it
            open_one = w.a.only_open()
            assert open_one["state"] == "released"
            w.network.up["b"] = w.b.agent
            w.network.fate = lambda m: "deliver"
            await w.quiet()
            assert w.owner(sa) == "a"  # b's new agent had undone what was prepared

    run(scenario())


def test_a_peer_gone_from_the_configuration_does_not_stop_the_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, timing=replace(FAST, in_doubt=0.02)) as w:
            sa = w.a.daemon.serve(a_context())
            w.network.fate = lambda m: "lose-cut" if isinstance(m, Ctd) else "deliver"
            doubt = await w.a.agent.transfer(sa, "b")
            await w.a.kill()
            w.names = ("a",)
            await w.a.start()
            w.network.kill("b")
            report = await w.a.agent.reclaim(doubt.transfer_id)
            assert report.result == "kept"
            await w.quiet()
            assert w.owner(sa) == "a"

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


def test_status_and_history_are_plain_json_without_secrets(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            _, report = await one_move(w)
            await w.quiet()
            text = json.dumps(
                [report.to_json(), w.a.agent.status(), w.b.agent.history(), w.a.agent.history()]
            )
            for secret in (b"g to the ir", a_context().current.secret.reveal()):
                assert secret.decode("latin-1") not in text
                assert secret.hex() not in text
            assert w.b.agent.history()[0]["air"] == {
                "messages": 2,
                "octets": 300,
                "retransmissions": 0,
                "requests": 1,
                "proven_by_traffic": 0,
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
