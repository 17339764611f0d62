"""Early ESP: ready before the mobile node comes, sent to where it is, and handed over to charon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ikectx.sa.context import Endpoint, IkeContext, ReplayState
from ikectx.sa.relocate import relocate
from tests.across.test_go_on import run
from tests.vici_bridge.effects.test_coming import Gateway, gateway
from tests.vici_bridge.effects.test_sink import final_of
from tests.worlds import until
from vici_bridge.effects.beside import keep_packets
from vici_bridge.effects.early import EARLY, MARGIN, is_early
from vici_bridge.ha.record import ChildAdded
from vici_bridge.kernel.xfrm import KernelPolicy, KernelSa

NEW = Endpoint.of("198.51.100.77", 4500)


@asynccontextmanager
async def announced() -> AsyncIterator[tuple[Gateway, IkeContext]]:
    async with gateway("") as there:
        await there.here.sink.ready(there.context, False)
        yield there, relocate(there.context, remote=NEW)


def early(there: Gateway) -> tuple[list[KernelSa], list[KernelPolicy]]:
    sad = there.here.sad
    sas = [sa for sa in sad.sas.values() if is_early(sa)]
    return sas, [one for one in sad.dump_policies() if one.selector.user == EARLY]


def test_who_has_announced_itself_is_heard_and_nothing_is_sent() -> None:
    async def scenario() -> None:
        async with announced() as (there, _):
            (child,) = there.context.children
            sas, policies = early(there)
            assert [sa.spi for sa in sas] == [child.spi_in]
            # what the old gateway has decrypted is not decrypted here once more
            jump = there.here.host.config.oseq_jump
            replay = sas[0].replay
            assert (replay.seq, replay.bitmap) == (child.inbound.seq + jump, (1 << replay.window) - 1)
            assert [one.direction for one in policies] == ["in"]
            # what the old gateway has decrypted comes in the clear
            assert all(template.optional for one in policies for template in one.templates)
            assert there.here.charon.sas == {}
            assert there.here.mute.muted == set()
            assert there.here.host.coming.all() == []
            assert all(sa.limits.hard_add for sa in sas)
            assert all(one.limits.hard_add for one in policies)

    run(scenario())


def test_its_packets_are_led_to_it_before_charon_is_asked_and_no_number_leaves_twice() -> None:
    """A packet leaves before each step of charon and the kernel."""

    async def scenario() -> None:
        async with announced() as (there, context):
            here, (child,) = there.here, context.children
            inner = child.remote_ts[0].start
            sent: list[bytes | None] = []

            def packet() -> None:
                if any(one.direction == "out" for one in here.sad.policies.values()):
                    here.sad.step = lambda: None
                    sent.append(here.sad.send(inner))
                    here.sad.step = packet

            views = here.charon.views

            def asked() -> list[object]:
                packet()
                return views()  # type: ignore[return-value]

            here.sad.step = here.charon.step = packet
            here.charon.views = asked  # type: ignore[method-assign,assignment]
            await here.sink.prepare(context, False)
            here.charon.views = views  # type: ignore[method-assign]
            outbound = here.sad.sas[NEW.address, child.spi_out]
            assert not is_early(outbound)
            jump = here.host.config.oseq_jump
            assert outbound.replay.oseq > child.outbound.seq + jump + MARGIN
            led = sent[sent.index(child.spi_out) :]
            assert led[-1] == child.spi_out
            assert None in led, "held while charon changes"
            await here.sink.take(context, final_of(context))
            report = await here.sink.move_peer(context, final_of(context))
            await here.sink.activate(context, final_of(context), report)
            assert early(there)[0] == []
            assert here.sad.send(inner) == child.spi_out
            here.sad.step = here.charon.step = lambda: None
            await until(lambda: early(there) == ([], []))
            assert here.sad.send(inner) == child.spi_out

    run(scenario())


@pytest.mark.parametrize("late", [False, True], ids=["while it is activated", "just after"])
def test_a_rekey_just_after_the_move_finds_no_policy_that_leads_to_the_pair_before_it(late: bool) -> None:
    # charon deletes that pair: what such a policy takes would wait for it, and be lost
    async def scenario() -> None:
        async with announced() as (there, context):
            here, sink = there.here, there.here.sink
            added = ChildAdded(context.spis, bytes.fromhex("c0ffee01"))
            assert here.host.on_change is not None
            here.host.on_change(added)
            assert early(there)[1], "one that waits for its mobile node stays"
            await sink.prepare(context, False)
            await sink.take(context, final_of(context))
            report = await sink.move_peer(context, final_of(context))
            if late:
                await sink.activate(context, final_of(context), report)
            assert early(there)[1]
            here.host.on_change(added)
            assert early(there) == ([], [])
            if not late:
                await sink.activate(context, final_of(context), report)
            assert here.sad.send(context.children[0].remote_ts[0].start) == context.children[0].spi_out

    run(scenario())


def test_who_does_not_come_leaves_nothing() -> None:
    async def scenario() -> None:
        async with announced() as (there, _):
            memory = there.here.sink._memory
            assert there.context.spis in memory.places
            there.here.sink.not_coming(there.context)
            assert early(there) == ([], [])
            assert there.here.sad.sas == {}
            assert (memory.places, memory.judged) == ({}, {})  # which have the keys

    run(scenario())


def test_an_agent_that_starts_removes_what_was_ready() -> None:
    async def scenario() -> None:
        async with announced() as (there, context):
            there.here.sink._lead(context)
            assert early(there) != ([], [])
            there.begin()
            there.here.sink.resume()
            assert early(there) == ([], [])

    run(scenario())


def test_numbers_that_were_heard_early_are_not_heard_again() -> None:
    async def scenario() -> None:
        async with announced() as (there, context):
            here, (child,) = there.here, context.children
            inbound = next(sa for sa in early(there)[0] if sa.spi == child.spi_in)
            heard = inbound.replay.seq + 7
            there.here.sad.set_replay(inbound, ReplayState(heard, 32, 1), outbound=False)
            await here.sink.prepare(context, False)
            now = here.sad.sas[inbound.destination, child.spi_in]
            assert not is_early(now) and now.replay.seq == heard

    run(scenario())


@pytest.mark.parametrize(
    ("before", "writable", "warned"), [("0\n", False, False), ("1\n", True, False), ("1\n", False, True)]
)
def test_the_kernel_is_told_to_keep_packets_unless_the_unit_has_done_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    before: str,
    writable: bool,
    warned: bool,
) -> None:
    setting = tmp_path / "xfrm_larval_drop"
    setting.write_text(before)
    if not writable:
        monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr("vici_bridge.effects.beside.LARVAL_DROP", setting)
    keep_packets()
    assert ("dropped, not held" in caplog.text) is warned
    assert warned or setting.read_text() == "0\n"


def refuse(path: Path, text: str) -> None:
    raise OSError(30, "Read-only file system", str(path))
