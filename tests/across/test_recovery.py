"""Failures of every step, links cut at every message, agents that die at every moment.

Throughout: never two senders for one SA, no sequence number used twice, and in the end exactly one owner.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ikectx.engine.report import TransferReport
from ikectx.engine.tables import OSEQ_JUMP
from ikectx.errors import (
    BusyError,
    CharonError,
    IkectxError,
    KernelError,
    LinkError,
    RefusedError,
    StateError,
    UnknownSaError,
)
from ikectx.numbers import Status
from ikectx.sa.name import SaName
from ikectx.wire.cxtp import Ctc, Ctd, Ctdr, Pctd
from tests.hand_loop import run
from tests.peers import Fate, a_context, fate_at, losing
from tests.worlds import FAST, World, held_move, one_move, until, world

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
    step: str, error: Exception, result: str, status: Status, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with world() as w:
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
            ours = isinstance(error, IkectxError)
            shown = str(error) if ours else "take failed with a ValueError, see the log"
            assert shown in str(w.b.agent.history()[0]["detail"])
            assert ours or str(error) not in caplog.text  # who knows what is in it
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
def test_a_failure_at_the_source(step: str, error: IkectxError, result: str, status: Status) -> None:
    async def scenario() -> None:
        async with world() as w:
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


def test_undo_is_tried_until_it_works_and_only_then_the_source_thaws() -> None:
    async def scenario() -> None:
        async with world() as w:
            w.b.daemon.fail = {"activate": [CharonError("no")], "undo": [CharonError("no")] * 4}
            sa, report = await one_move(w)
            assert (report.result, report.status) == ("kept", Status.CHARON)
            assert w.b.daemon.calls.count("undo") == 5
            assert w.owner(sa) == "a"

    run(scenario())


def test_a_thaw_that_fails_is_reported_and_tried_on() -> None:
    async def scenario() -> None:
        async with world() as w:
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


def test_a_clean_up_that_fails_does_not_hide_that_it_moved() -> None:
    async def scenario() -> None:
        async with world() as w:
            w.a.daemon.fail["release"] = [CharonError("VICI is gone")] * 7
            sa, report = await one_move(w)
            assert (report.result, report.status, report.exit_code) == ("moved", Status.OK, 0)
            assert "the clean-up here failed, it is tried again: VICI is gone" in report.text
            await w.quiet()
            assert w.owner(sa) == "b"

    run(scenario())


def test_a_step_that_hangs_is_ended() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, step=0.05)) as w:
            w.a.daemon.wait["freeze"] = asyncio.Event()
            sa, report = await one_move(w)
            assert report.result == "kept"
            assert "freeze did not end within 0.05 s" in report.text
            await w.quiet()
            assert w.owner(sa) == "a"

    run(scenario())


def test_an_agent_that_starts_says_how_old_its_transfer_is() -> None:
    """By that a gateway whose store was lost tells whether it may have had the SA by it before."""

    async def scenario() -> None:
        async with world() as w:
            w.network.fate = losing(Ctd)
            sa = w.a.daemon.serve(a_context())
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await until(lambda: any(isinstance(message, Ctd) for message in w.network.seen))
            await w.a.kill()
            await asyncio.gather(moving, return_exceptions=True)
            w.network.seen.clear()
            await asyncio.sleep(2.0)
            await w.a.start()
            await until(lambda: any(isinstance(message, Ctd) for message in w.network.seen))
            (again, *_) = (message for message in w.network.seen if isinstance(message, Ctd))
            assert 2000 <= again.elapsed < 3000

    run(scenario())


@pytest.mark.parametrize("state", ["offered", "freezing", "released", "thawing", "cleaning", "done"])
def test_a_source_that_cannot_journal_does_not_let_go(state: str) -> None:
    async def scenario() -> None:
        async with world() as w:
            w.a.store.broken = state
            sa, report = await one_move(w)
            if state in ("thawing", "cleaning", "done"):
                assert report.result == "moved"  # the next start would find its way from "released"
            else:
                assert report.result == "kept"
                assert "the disk is full" in report.text
            await asyncio.sleep(0.02)
            w.a.store.broken = ""
            await w.a.restart()
            await w.quiet()
            assert w.owner(sa) == ("b" if report.result == "moved" else "a")

    run(scenario())


@pytest.mark.parametrize(
    "state",
    ["checking", "preparing", "prepared", "owning", "moving", "activating", "owned", "undoing", "aborted"],
)
@pytest.mark.parametrize("fails", ["", "move"])
def test_a_target_that_cannot_journal_does_not_take(state: str, fails: str) -> None:
    async def scenario() -> None:
        async with world() as w:
            w.b.store.broken = state
            if fails:
                w.b.daemon.fail[fails] = [LinkError("silent")]
            sa = w.a.daemon.serve(a_context())
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await until(lambda: moving.done() or w.b.store.refused)
            assert w.ether.slips == []
            w.b.store.broken = ""
            report = await moving
            await asyncio.sleep(0.01)
            await w.b.restart()
            await w.quiet()
            assert w.owner(sa) == ("b" if report.result == "moved" else "a")
            assert (report.result == "moved") == (state not in ("preparing", "owning") and not fails)

    run(scenario())


@pytest.mark.parametrize(("gateway", "state"), [("a", "kept"), ("a", "done"), ("b", "aborted")])
def test_an_end_that_could_not_be_journaled_is_journaled_later(gateway: str, state: str) -> None:
    # or `status` would list the transfer until the next start, and that would undo it once more
    async def scenario() -> None:
        async with world() as w:
            node = getattr(w, gateway)
            node.store.broken = state
            if state != "done":
                w.b.daemon.fail["move"] = [LinkError("silent")]
            sa, _report = await one_move(w)
            await until(lambda: node.store.refused)
            assert node.agent.status()["transfers"]
            node.store.broken = ""
            await until(lambda: not node.agent.status()["transfers"])
            assert w.owner(sa) == ("b" if state == "done" else "a")

    run(scenario())


# -- links that break ------------------------------------------------------------------------------------


CUTS = [(number, fate) for number in (1, 2, 3, 4) for fate in ("lose-cut", "deliver-cut")]


@pytest.mark.parametrize(("number", "fate"), CUTS)
def test_a_link_that_breaks_at_any_message(number: int, fate: Fate) -> None:
    async def scenario() -> None:
        async with world() as w:
            w.network.fate = fate_at(number, fate)
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


def test_a_link_that_breaks_while_freezing_is_noticed_before_letting_go() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa, moving, gate = await held_move(w, w.a, "freeze")
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


def test_what_was_prepared_and_never_fetched_is_undone_and_the_source_told() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, hold=0.03)) as w:
            gate = w.a.daemon.wait["freeze"] = asyncio.Event()
            sa = w.a.daemon.serve(a_context())
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await w.b.reaches("undo")
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


def test_a_target_that_never_answers_the_offer_is_given_up() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, offer=0.03)) as w:
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


def test_a_slow_target_is_asked_again_and_answers_each() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, confirm=0.02)) as w:
            gate = w.b.daemon.wait["take"] = asyncio.Event()
            sa = w.a.daemon.serve(a_context())
            other = w.a.daemon.serve(a_context(2))  # of the same MN: its answers must not be mixed up
            moving = asyncio.create_task(w.a.agent.transfer_all([sa, other], "b"))
            await until(lambda: sum(isinstance(message, Ctd) for message in w.network.seen) >= 4)
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


def test_doubt_is_reported_and_resolved_in_the_background() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, in_doubt=0.05)) as w:
            w.network.fate = losing(Ctd)
            sa, report = await one_move(w)
            assert (report.result, report.status, report.exit_code) == ("in-doubt", Status.UNREACHABLE, 5)
            assert f"ikectx resolve {report.transfer_id} --reclaim" in report.hint
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


async def served_unheard(w: World) -> tuple[SaName, asyncio.Task[TransferReport]]:
    """b serves the SA, and a has not heard of it."""
    gate = w.b.daemon.wait["activate"] = asyncio.Event()
    sa = w.a.daemon.serve(a_context())
    moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
    await w.b.reaches("activate")
    w.network.fate = losing(Ctdr)
    gate.set()
    await until(lambda: sa in w.b.daemon.served)
    return sa, moving


async def served_without_store(w: World) -> tuple[SaName, asyncio.Task[TransferReport]]:
    """b serves the SA, a has not heard of it, and b's store is gone, as the hint of a damaged store says."""
    sa, moving = await served_unheard(w)
    await w.b.kill()
    (w.folder / "b.db").unlink()
    w.b.has = "gaps"
    w.network.fate = lambda message: "deliver"
    return sa, moving


def test_b4_an_unknown_transfer_is_looked_up_in_charon_before_it_is_denied() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa, moving = await served_without_store(w)
            w.b.daemon.certain = False  # it has it, PASSIVE or mute
            await w.b.start()
            report = await moving
            # nobody has said no, so a must not begin to send beside b
            assert (report.result, report.status) == ("in-doubt", Status.IN_DOUBT)
            assert "charon has it" in report.text
            assert "end the SA there" in report.hint
            assert f"ikectx resolve {report.transfer_id} --reclaim" in report.hint
            assert report.exit_code == LinkError.exit_code
            assert w.ether.senders[sa] == {"b"}
            assert w.b.agent.history() == []  # no tombstone: the next copy is looked up again
            assert "thaw" not in w.a.daemon.calls
            # the operator ends it there; the next copy of the CTD is denied
            del w.b.daemon.served[sa]
            w.ether.silent("b", sa)
            await w.quiet()
            assert w.ether.slips == []
            assert w.owner(sa) == "a"

    run(scenario())


def test_b4_an_sa_that_charon_serves_is_written_down_again() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa, moving = await served_without_store(w)
            await w.b.start()
            report = await moving
            assert report.result == "moved"
            await w.quiet()
            assert w.owner(sa) == "b" and w.ether.slips == []
            (entry,) = w.b.agent.history()
            assert (entry["result"], entry["epoch"]) == ("moved", 1)
            assert "charon has it" in str(entry["detail"])
            (line,) = w.b.agent.audit()
            assert (line["outcome"], line["from"]) == ("moved", "a")
            # and the epoch is known again: it can go back
            back = await w.b.agent.transfer(sa, "a")
            await w.quiet()
            assert (back.result, w.owner(sa)) == ("moved", "a")

    run(scenario())


def test_the_operator_may_give_up() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, in_doubt=0.02)) as w:
            sa, moving = await served_unheard(w)
            doubt = await moving
            assert (doubt.result, [one.transfer_id for one in w.a.agent.in_doubt()]) == (
                "in-doubt",
                [doubt.transfer_id],
            )
            report = await w.a.agent.resolve(doubt.transfer_id, "give-up", "operator (uid 5)")
            assert "given up here by the operator (uid 5)" in report.text
            assert w.a.agent.in_doubt() == []
            assert sa not in w.a.daemon.served and w.owner(sa) == "b"
            with pytest.raises(StateError, match="no transfer"):
                await w.a.agent.resolve(doubt.transfer_id, "reclaim")

    run(scenario())


def restore(folder: Path, backup: Path) -> None:
    """The store of a, as the backup has it; without one if that has none."""
    for name in ("a.db", "a.db-wal", "a.db-shm"):
        (folder / name).unlink(missing_ok=True)
        if (backup / name).exists():
            shutil.copy(backup / name, folder / name)


def unconfirmed(w: World) -> Callable[[object], Fate]:
    """Loses the answers to CTDs of a."""
    return lambda message: "lose" if isinstance(message, Ctdr) and w.a.daemon.frozen else "deliver"


@pytest.mark.parametrize("when", ["before", "prepared"])
def test_a_store_from_before_the_freeze_makes_no_second_owner(when: str) -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, in_doubt=0.02)) as w:
            sa = w.a.daemon.serve(a_context())
            backup = w.folder / "backup"
            if when == "before":
                shutil.copytree(w.folder, backup)
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await w.b.reaches("prepare")
            if when == "prepared":
                shutil.copytree(w.folder, backup)
            w.network.fate = losing(Ctdr) if when == "before" else losing(Ctd)
            w.network.fate = lambda message: (
                "lose" if isinstance(message, Ctdr) and sa in w.a.daemon.frozen else "deliver"
            )
            gate.set()
            await until(lambda: sa in w.b.daemon.served)
            assert (await moving).result == "in-doubt"
            await w.a.kill()
            restore(w.folder, backup)
            w.network.fate = lambda message: "deliver"
            await w.a.start()
            await w.quiet()
            assert w.ether.senders[sa] == {"b"} and w.ether.slips == []
            assert "thaw" not in w.a.daemon.calls and sa in w.a.daemon.frozen
            if when == "prepared":
                (entry,) = w.a.agent.history()
                assert (entry["result"], entry["state"]) == ("lost", "lost")
                assert "the store is an old copy" in str(entry["detail"])

    run(scenario())


def test_a_store_from_a_move_before_does_not_drop_an_sa_that_came_back() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, in_doubt=0.02)) as w:
            w.network.fate = lambda message: (
                "lose" if isinstance(message, Ctdr) and w.a.daemon.frozen else "deliver"
            )
            sa, doubt = await one_move(w)
            assert doubt.result == "in-doubt"
            await w.a.kill()
            backup = w.folder / "backup"
            shutil.copytree(w.folder, backup)
            w.network.fate = lambda message: "deliver"
            await w.a.start()
            await w.quiet()
            assert (await w.b.agent.transfer(sa, "a")).result == "moved"
            await w.quiet()
            await w.a.kill()
            restore(w.folder, backup)
            await w.a.start()
            await w.quiet()
            assert w.owner(sa) == "a" and w.ether.slips == []
            assert w.a.agent.history()[0]["result"] == "kept"

    run(scenario())


def test_b4_charon_that_cannot_be_asked_denies_nothing() -> None:
    async def scenario() -> None:
        async with world() as w:
            w.network.fate = losing(Ctd)
            sa = w.a.daemon.serve(a_context())
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await until(lambda: any(isinstance(message, Ctd) for message in w.network.seen))
            await w.b.kill()
            (w.folder / "b.db").unlink()
            w.b.daemon.passive.clear()
            w.b.daemon.fail["look"] = [CharonError("charon is not running")]
            w.network.fate = lambda message: "deliver"
            await w.b.start()
            report = await moving
            assert (report.result, report.status) == ("in-doubt", Status.IN_DOUBT)
            assert "charon is not running" in report.text
            await w.quiet()  # charon is back, and has nothing
            assert w.owner(sa) == "a"

    run(scenario())


def test_the_operator_may_reclaim() -> None:
    async def scenario() -> None:
        async with world(timing=replace(FAST, in_doubt=0.02)) as w:
            sa = w.a.daemon.serve(a_context())
            with pytest.raises(StateError, match="no transfer 00 is open"):
                await w.a.agent.resolve("00", "reclaim")
            w.network.fate = losing(Ctd)
            doubt = await w.a.agent.transfer(sa, "b")
            w.network.kill("b")
            report = await w.a.agent.resolve(doubt.transfer_id, "reclaim", "operator (uid 5)")
            assert report.result == "kept"
            assert "reclaimed by the operator (uid 5)" in report.text
            assert "operator (uid 5)" in str(w.a.agent.audit()[0]["reason"])
            assert report.epoch == 2
            await w.quiet()
            assert w.owner(sa) == "a"

    run(scenario())


def test_a_cancel_before_the_letting_go_keeps() -> None:
    async def scenario() -> None:
        async with world() as w:
            for step, at in (("prepare", w.b), ("freeze", w.a)):
                gate = at.daemon.wait[step] = asyncio.Event()
                context = a_context(len(step))
                sa = w.a.daemon.serve(context)
                at.daemon.calls.clear()
                moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
                await at.reaches(step)
                assert w.a.agent.cancel(str(w.a.only_open()["transfer_id"]))
                gate.set()
                report = await moving
                assert report.result == "kept"
                assert "cancelled here" in report.text
                await w.quiet()
                assert w.owner(sa) == "a"
            assert not w.a.agent.cancel("no hex")

    run(scenario())


def test_a_caller_who_goes_away_cancels() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa, moving, gate = await held_move(w, w.b, "prepare")
            moving.cancel()
            await asyncio.gather(moving, return_exceptions=True)
            gate.set()
            await w.quiet()
            assert w.owner(sa) == "a"

    run(scenario())


def test_stopping_leaves_nothing_half_done() -> None:
    async def scenario() -> None:
        async with world() as w:
            sa, moving, gate = await held_move(w, w.a, "freeze")
            asyncio.get_running_loop().call_later(0.01, gate.set)
            await w.b.agent.stop()  # undoes what it had prepared
            assert w.b.daemon.passive == {}
            await w.a.agent.stop()
            assert (await moving).result == "kept"
            assert w.owner(sa) == "a"

    run(scenario())


# -- what is not there any more, and what may have been sent elsewhere --------------------------------------


def test_b9_an_sa_that_charon_gave_up_is_reported_as_lost() -> None:
    async def scenario() -> None:
        async with world() as w:
            w.b.daemon.fail["move"] = [LinkError("silent")]
            w.a.daemon.fail["thaw"] = [UnknownSaError("charon has lost the IKE_SA while it was frozen")]
            sa, report = await one_move(w)
            assert (report.result, report.exit_code) == ("lost", UnknownSaError.exit_code)
            assert "has lost the IKE_SA" in report.text
            assert report.state_here == "a does not serve the MN: its charon has the SA no more"
            await w.quiet()
            assert w.ether.senders[sa] == set()
            assert [one["result"] for one in w.a.agent.history()] == ["lost"]

    run(scenario())


@pytest.mark.parametrize("ends", ["cancelled", "refused", "silent"])
def test_b2_a_transfer_that_ends_after_the_offer_goes_past_what_was_sent_there(ends: str) -> None:
    """The other gateway had the SA's keys: packets for the MN may have left there."""

    async def scenario() -> None:
        async with world() as w:
            if ends == "refused":
                w.b.daemon.fail["prepare"] = [CharonError("charon did not install the SA")]
            else:
                w.network.fate = losing(Ctdr)
            sa = w.a.daemon.serve(a_context())
            gate = w.b.daemon.wait["prepare"] = asyncio.Event()
            moving = asyncio.create_task(w.a.agent.transfer(sa, "b"))
            await w.b.reaches("prepare")
            gate.set()
            if ends == "cancelled":
                assert w.a.agent.cancel(str(w.a.only_open()["transfer_id"]))
            report = await moving
            assert report.result in ("kept", "refused")
            assert w.a.daemon.calls.count("thaw") == 1
            await w.quiet()
            assert w.owner(sa) == "a"

    run(scenario())


def test_what_was_never_offered_makes_no_numbers_jump() -> None:
    async def scenario() -> None:
        async with world() as w:
            w.network.kill("b")
            _, report = await one_move(w)
            assert report.result == "kept"
            assert "thaw" not in w.a.daemon.calls

    run(scenario())


@pytest.mark.parametrize("fails", ["check", "prepare"])
def test_b28_a_transfer_that_comes_to_nothing_leaves_no_word_that_it_waits_for_an_answer(fails: str) -> None:
    async def scenario() -> None:
        async with world() as w:
            said: list[bool] = []
            w.b.daemon.tell_later = lambda context, later: said.append(later)  # type: ignore[attr-defined]
            w.b.daemon.fail[fails] = [CharonError("by hand")]
            await one_move(w)
            await w.quiet()
            assert said[-1] is False
            assert len(said) == {"check": 2, "prepare": 3}[fails]

    run(scenario())
