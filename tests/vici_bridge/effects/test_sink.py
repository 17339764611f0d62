"""SAs whose names are taken at the gateway they come to: detection, new names, every way it can end."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ikectx.engine.ports import SENDING_PACKETS, MoveReport
from ikectx.errors import KernelError, LinkError, RefusedError
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Endpoint, FinalChild, FinalState, IkeContext, Lifetime
from ikectx.sa.keys import sk_keys
from ikectx.wire.spis import ESP, IKE, NewSpi, parse_new_spis
from tests import peers
from tests.gateway_world import OURS, Mobiles, Place
from tests.hand_loop import run
from tests.vici_bridge.test_deadlines import MemoryStore
from tests.worlds import until
from vici_bridge.effects import prepare as prepare_module
from vici_bridge.effects import runner as runner_module
from vici_bridge.effects import sink as sink_module
from vici_bridge.kernel.relay import RelayRule
from vici_bridge.vici.views import EXT_MOBIKE

LOW, HIGH = 0xC0000000, 0xC0000FFF
THEIRS = 0xD0000000, 0xD0000FFF
"""SPIs that mobile nodes choose from. Of the 4,096 above they would now and then choose one that this gateway
has for the same node as a placeholder."""


def a_context(number: int, mn: str = "198.51.100.7") -> IkeContext:
    return replace(peers.a_context(number, mn=mn), extensions=EXT_MOBIKE)


def place(**config: Any) -> Place:
    config = {"spi_min": LOW, "spi_max": HIGH, **config}
    return Place(MemoryStore(), Mobiles(*THEIRS), **config)


def final_of(context: IkeContext) -> FinalState:
    children = tuple(
        FinalChild(child.spi_in, replace(child.inbound, seq=150), replace(child.outbound, seq=300))
        for child in context.children
    )
    return FinalState(*context.spis, 7, 9, context.epoch + 1, children)


async def move(here: Place, context: IkeContext) -> MoveReport:
    final = final_of(context)
    await here.sink.prepare(context, False)
    await here.sink.take(context, final)
    report = await here.sink.move_peer(context, final)
    await here.sink.activate(context, final, report)
    return report


async def come(here: Place, context: IkeContext) -> None:
    """The same for a mobile node that moves by itself, and waits for an answer."""
    here.mobiles.add(context)
    here.sink.tell_later(context)
    await move(here, context)


def rival(context: IkeContext, *kinds: str, shared: bool = False) -> IkeContext:
    """Another MN's SA that has these names of `context`'s."""
    other = a_context(77, mn=str(context.remote.address) if shared else "198.51.100.99")
    other = replace(other, remote=Endpoint(other.remote.address, 4999))
    child, mine = other.children[0], context.children[0]
    if "inbound" in kinds:
        child = replace(child, spi_in=mine.spi_in)
    if "outbound" in kinds:
        child = replace(child, spi_out=mine.spi_out)
    other = replace(other, children=(child,))
    if "ike" in kinds:
        other = replace(
            other, generations=(replace(other.current, spi_i=context.spis[0], spi_r=context.spis[1]),)
        )
    if "responder" in kinds:
        other = replace(other, generations=(replace(other.current, spi_r=context.spis[1]),))
    return other


def chained(context: IkeContext) -> IkeContext:
    """The same after an IKE rekey, its child not rekeyed yet."""
    old = context.current
    new = replace(
        old,
        spi_i=b"\x33MNi" + old.spi_i[4:],
        spi_r=b"\x44GWr" + old.spi_r[4:],
        nonce_i=bytes(reversed(old.nonce_i)),
        old_skd=sk_keys(old).sk_d,
        old_prf=old.prf,
    )
    return replace(context, generations=(old, new))


KINDS = [
    (),
    ("inbound",),
    ("outbound",),
    ("inbound", "outbound"),
    ("ike",),
    ("responder",),
    ("ike", "inbound", "outbound"),
]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_both_sas_live(kinds: tuple[str, ...], chain: bool, stock: bool, kernel: bool) -> None:
    async def scenario() -> None:
        here = place(kernel=kernel)
        context = a_context(1)
        if chain:
            context = chained(context)
        other = rival(context, *kinds, shared="outbound" in kinds)
        here.mobiles.add(other)
        here.charon.serve(other)
        here.mobiles.add(context)
        if stock:
            here.mobiles.stock.add(str(context.remote_id))
        await move(here, context)
        here.sound()
        assert len(here.charon.sas) == 2
        if not kinds:
            assert here.mobiles.asked == []
        if "ike" in kinds:
            assert context.spis not in here.mute.ever, "the other SA was mute"
        sa = here.charon.sas[list(here.charon.sas)[1]]
        here.host.record.context((sa.id.spi_i, sa.id.spi_r))

    run(scenario())


def test_the_name_of_an_ancestor_is_taken() -> None:
    async def scenario() -> None:
        here = place()
        context = chained(a_context(1))
        other = a_context(77, mn="198.51.100.99")
        old = context.generations[0]
        other = replace(other, generations=(replace(other.current, spi_i=old.spi_i, spi_r=old.spi_r),))
        here.mobiles.add(other)
        here.charon.serve(other)
        here.mobiles.add(context)
        await move(here, context)
        here.sound()
        assert here.mobiles.asked == []
        # and what leaves later takes only its own name away
        await here.host.delete(here.host.record.context(context.spis))
        assert len(here.charon.sas) == 1
        assert here.charon.offences == []

    run(scenario())


def test_numbers_go_on_under_the_new_spi() -> None:
    async def scenario() -> None:
        here = place()
        context = a_context(1)
        other = rival(context, "inbound")
        for one in (other, context):
            here.mobiles.add(one)
        here.charon.serve(other)
        final = final_of(context)
        await here.sink.prepare(context, False)
        await here.sink.take(context, final)
        vip = context.remote_vips[0]
        # what stands in sends under the SPI that the MN knows
        assert here.sad.send(vip) == context.children[0].spi_out
        report = await here.sink.move_peer(context, final)
        now = here.mobiles.have[str(context.remote_id)].children[0]
        assert now.spi_out != context.children[0].spi_out
        assert here.sad.send(vip) == now.spi_out
        outbound = here.sad.sas[context.remote.address, now.spi_out]
        assert outbound.replay.oseq > 300 + 1000
        await here.sink.activate(context, final, report)
        here.sound()

    run(scenario())


def test_packets_are_received_under_the_new_spi_before_the_mn_is_told() -> None:
    async def scenario() -> None:
        here = place()
        context = a_context(1)
        other = rival(context, "inbound")
        here.charon.serve(other)
        here.mobiles.add(other)
        here.mobiles.add(context)
        await here.sink.prepare(context, False)
        plan = here.sink._renames.plan_of(context)
        assert plan is not None
        ours = here.sad.sas[OURS.address, plan.children[0].new_in]
        shape = plan.shape(here.sink._here(context))
        inbound, _ = here.host.kernel_pair(shape, shape.children[0])
        assert inbound is not None and ours.encr_key == inbound.encr_key
        # 40 packets come under it; that is not forgotten
        got = replace(ours.replay, seq=40, bitmap=(1 << 32) - 1)
        here.sad.sas[OURS.address, ours.spi] = replace(ours, replay=got)
        await here.sink.take(context, final_of(context))
        report = await here.sink.move_peer(context, final_of(context))
        assert here.sad.sas[OURS.address, ours.spi].replay.seq == 40
        await here.sink.activate(context, final_of(context), report)
        here.sound()

    run(scenario())


@pytest.mark.parametrize("kinds", KINDS[1:], ids="-".join)
def test_undone_before_the_mn_was_told(kinds: tuple[str, ...]) -> None:
    async def scenario() -> None:
        here = place()
        context = a_context(1)
        other = rival(context, *kinds, shared="outbound" in kinds)
        here.mobiles.add(other)
        here.charon.serve(other)
        before = dict(here.sad.sas)
        await here.sink.prepare(context, False)
        assert len(here.charon.sas) == 2
        await here.sink.undo(context)
        await here.sink.undo(context)
        assert here.sad.sas == before
        here.sound()
        # the MN does not answer
        here.mobiles.add(context)
        here.mobiles.silent.add(str(context.remote_id))
        with pytest.raises(LinkError):
            await move(here, context)
        await here.sink.undo(context)
        del here.mobiles.have[str(context.remote_id)]
        assert here.sad.sas == before
        here.sound()

    run(scenario())


def test_an_import_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(prepare_module, "INSTALL_TIMEOUT", 0.05)
        here = place()
        context = a_context(1)
        other = rival(context, "ike", "inbound")
        here.mobiles.add(other)
        here.charon.serve(other)
        before = dict(here.sad.sas)
        here.charon.refuse_children = True
        with pytest.raises(Exception, match="did not install"):
            await here.sink.prepare(context, False)
        assert here.sad.sas == before
        here.sound()

    run(scenario())


@pytest.mark.parametrize(
    ("kinds", "statuses"),
    [
        (("inbound",), [Status.ESP_SPI_IN_USE]),
        (("outbound",), [Status.ESP_SPI_IN_USE]),
        (("ike",), [Status.IKE_SPI_IN_USE]),
    ],
)
def test_refused_by_configuration(kinds: tuple[str, ...], statuses: list[Status]) -> None:
    async def scenario() -> None:
        here = place(collision="refuse")
        context = a_context(1)
        here.charon.serve(rival(context, *kinds, shared="outbound" in kinds))
        verdicts = await here.sink.check(context, False)
        assert [verdict.status for verdict in verdicts] == statuses
        assert "collision" in verdicts[0].detail
        with pytest.raises(RefusedError):
            await here.sink.prepare(context, False)

    run(scenario())


def test_rekeyed_by_configuration() -> None:
    async def scenario() -> None:
        here = place(collision="rekey")
        context = a_context(1)
        other = rival(context, "inbound")
        here.mobiles.add(other)
        here.charon.serve(other)
        here.mobiles.add(context)
        await move(here, context)
        here.sound()
        assert [wish.update for wish in here.mobiles.asked] == [False]

    run(scenario())


def test_what_is_sent_under_an_old_spi_goes_to_the_other_gateway_meanwhile() -> None:
    async def scenario() -> None:
        here = place(late=0)
        context = a_context(1)
        for other in (rival(context, "inbound"), context):
            here.mobiles.add(other)
        here.charon.serve(rival(context, "inbound"))
        here.mobiles.stock.add(str(context.remote_id))
        await move(here, context)
        wanted = RelayRule(context.remote, context.children[0].spi_in, context.local.address)
        assert here.relay.ever == {wanted}
        await until(lambda: not here.relay.now)
        assert here.host.coming.of(context.spis).facts.relay is None

    run(scenario())


def test_b21_an_agent_that_stops_at_once_leaves_no_relay() -> None:
    async def scenario() -> None:
        here = place(late=60)
        context = a_context(1)
        for other in (rival(context, "inbound"), context):
            here.mobiles.add(other)
        here.charon.serve(rival(context, "inbound"))
        here.mobiles.stock.add(str(context.remote_id))
        await move(here, context)
        assert here.relay.now
        here.store.flush()  # as the journal does it
        for task in list(here.host._tasks):
            task.cancel()
        here.begin()
        assert here.relay.now
        here.sink.resume()
        await until(lambda: here.host.coming.of(context.spis).facts.relay is None)  # noted after it has ended
        assert not here.relay.now

    run(scenario())


@pytest.mark.parametrize("stock", [True, False])
def test_what_an_mn_knows_is_remembered(stock: bool) -> None:
    """That it does not know something is not: its agent may just have been starting."""

    async def scenario() -> None:
        here = place()
        context = a_context(1)
        other = replace(rival(context, "inbound"), remote_id=context.local_id)
        here.charon.serve(other)
        here.mobiles.add(context)
        if stock:
            here.mobiles.stock.add(str(context.remote_id))
        await move(here, context)
        assert [wish.update for wish in here.mobiles.asked] == [True]
        assert here.host.agents.has(context) is not stock

    run(scenario())


@pytest.mark.parametrize("how", ["told by the gateway before", "configured", "neither"])
def test_whose_agent_is_waited_for(how: str) -> None:
    async def scenario() -> None:
        context = a_context(1)
        here = place(agents=frozenset({context.connection} if how == "configured" else ()))
        context = replace(context, update_spi=how == "told by the gateway before")
        here.charon.serve(rival(context, "inbound"))
        here.mobiles.add(context)
        await move(here, context)
        assert [wish.agent for wish in here.mobiles.asked] == [how != "neither"]

    run(scenario())


def test_an_mn_that_waits_for_an_answer_is_told_by_it() -> None:
    async def scenario() -> None:
        here = place()
        context = a_context(1)
        other = rival(context, "inbound", "ike")
        here.mobiles.add(other)
        here.charon.serve(other)
        here.sink.tell_later(context)
        final = final_of(context)
        assert await here.sink.check(context, False) == []
        await here.sink.prepare(context, False)
        await here.sink.take(context, final)
        assert here.sink.new_names(context) == ()
        await here.sink.activate(context, final, MoveReport())
        (block,) = here.sink.new_names(context)
        assert block.fpt is Fpt.NEW_SPIS
        child, ike = parse_new_spis(block.data)
        assert (child.protocol, child.old) == (ESP, context.children[0].spi_in)
        assert ike == NewSpi(IKE, context.spis[1], ike.new)
        # what the MN makes of it
        renamed = replace(context.current, spi_r=ike.new)
        children = (replace(context.children[0], spi_in=child.new),)
        here.mobiles.add(replace(context, generations=(context.current, renamed), children=children))
        here.sound()
        (sa,) = (sa for sa in here.charon.sas.values() if sa.remote_id == str(context.remote_id))
        assert sa.mids == [0, 0]

    run(scenario())


def test_a_kept_address_can_need_other_spis_all_the_same() -> None:
    async def scenario() -> None:
        here = place()
        context = replace(a_context(1), local=OURS)
        other = rival(context, "inbound")
        for one in (other, context):
            here.mobiles.add(one)
        here.charon.serve(other)
        final = final_of(context)
        here.sink.tell_later(context, False)
        await here.sink.prepare(context, True)
        assert here.sink.must_tell(context)
        await here.sink.take(context, final)
        report = await here.sink.move_peer(context, final)
        await here.sink.activate(context, final, report)
        here.sound()
        (wish,) = here.mobiles.asked
        assert wish.addresses is False
        # and where no SPI is taken there is nothing to tell
        free = replace(a_context(5), local=OURS)
        await here.sink.prepare(free, True)
        assert not here.sink.must_tell(free)
        assert await here.sink.move_peer(free, final_of(free)) == MoveReport()

    run(scenario())


def test_an_answer_cannot_ask_for_an_outbound_spi() -> None:
    async def scenario() -> None:
        here = place()
        context = a_context(1)
        here.charon.serve(rival(context, "outbound", shared=True))
        here.sink.tell_later(context)
        (verdict,) = await here.sink.check(context, False)
        assert verdict.status is Status.ESP_SPI_IN_USE
        assert "is the MN's" in verdict.detail

    run(scenario())


def test_two_transfers_are_promised_different_names() -> None:
    async def scenario() -> None:
        # all but three SPIs are in use: two for the first SA, none is left for the second
        here = place(spi_min=0xC0000100, spi_max=0xC0000105)
        contexts = [a_context(number) for number in (1, 2)]
        for number, context in enumerate(contexts):
            child = replace(context.children[0], spi_in=(0xC0000100 + number).to_bytes(4))
            contexts[number] = replace(context, children=(child,))
            other = a_context(50 + number, mn=f"198.51.100.{60 + number}")
            mine = replace(other.children[0], spi_in=child.spi_in)
            here.charon.serve(replace(other, children=(mine,)))
        results = await asyncio.gather(
            *(here.sink.prepare(context, False) for context in contexts), return_exceptions=True
        )
        assert results == [None, None]
        plans = [here.sink._renames.plan_of(context) for context in contexts]
        names = [spi for plan in plans if plan for one in plan.children for spi in (one.new_in, one.hold_in)]
        assert len(set(names)) == 4
        third = a_context(3)
        third = replace(third, children=(replace(third.children[0], spi_in=bytes.fromhex("c0000100")),))
        with pytest.raises(RefusedError, match="no free SPI"):
            await here.sink.prepare(third, False)
        assert here.charon.offences == []

    run(scenario())


# --- an agent that dies ------------------------------------------------------------------------------


class Crash(BaseException):
    """The agent's process is gone."""


def test_sas_come_in_at_once_unless_they_share_a_name() -> None:
    """charon is given the second while it installs the first; one whose SPI that takes waits for it."""

    async def scenario() -> None:
        here = place()
        contexts = [a_context(number, mn=f"198.51.100.{number}") for number in (1, 2)]
        twin = rival(contexts[0], "inbound")
        began: list[str] = []
        both = asyncio.Event()
        send = here.host.ha_link.send

        async def sent(messages: Iterable[bytes]) -> None:
            began.append("begins")
            if len(began) == 2:
                both.set()
            await both.wait()
            await send(messages)
            began.append("ends")

        here.host.ha_link.send = sent  # type: ignore[method-assign]
        await asyncio.gather(*(here.sink.prepare(one, False) for one in (*contexts, twin)))
        assert began == ["begins", "begins", "ends", "ends", "begins", "ends"]
        assert len(here.charon.sas) == 3
        assert here.sink.renames(twin) and not here.sink.renames(contexts[0])

    run(scenario())


class DyingStore(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.left = 1 << 30

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Crash

    def put(self, kind: str, key: str, value: bytes, *, soon: bool = False) -> None:
        self.step()
        super().put(kind, key, value, soon=soon)

    def delete(self, kind: str, key: str, *, soon: bool = False) -> None:
        self.step()
        super().delete(kind, key, soon=soon)

    def keep(self, role: str, key: str, row: bytes | None, *, soon: bool = False) -> None:
        self.step()
        super().keep(role, key, row, soon=soon)


async def _drive(here: Place, context: IkeContext, done: list[str]) -> None:
    """The engine's steps from where it was; `done` is its journal."""
    final = final_of(context)
    report = MoveReport()
    while True:
        state = done[-1]
        if state == "new":
            done.append("preparing")
            await here.sink.prepare(context, False)
            done.append("prepared")
        elif state in ("preparing", "prepared*"):
            await here.sink.undo(context)
            done.append("aborted")
            return
        elif state == "prepared":
            done.append("owning")
        elif state == "owning":
            await here.sink.take(context, final)
            done.append("moving")
        elif state == "moving":
            report = await here.sink.move_peer(context, final)
            done.append("activating")
        elif state == "activating":
            await here.sink.activate(context, final, report)
            done.append("owned")
            return


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("kinds", [("inbound",), ("ike", "inbound", "outbound")], ids="-".join)
def test_killed_at_any_moment(kinds: tuple[str, ...], stock: bool) -> None:
    """The next agent ends or undoes it, and the other SA lives."""

    async def once(at: int) -> bool:
        store = DyingStore()
        here = Place(store, Mobiles(*THEIRS), spi_min=LOW, spi_max=HIGH)
        here.charon.step = here.sad.step = store.step
        context = chained(a_context(1))
        other = rival(context, *kinds, shared="outbound" in kinds)
        here.mobiles.add(other)
        here.charon.serve(other)
        here.mobiles.add(context)
        if stock:
            here.mobiles.stock.add(str(context.remote_id))
        kept = {name: sa.encr_key for name, sa in here.sad.sas.items()}
        done = ["new"]
        store.left = at
        try:
            await _drive(here, context, done)
            ended = True
        except (Crash, asyncio.CancelledError):
            ended = False
        store.left = 1 << 30
        if not ended:
            here.begin()
            await _drive(here, context, done)
        assert kept.items() <= {name: sa.encr_key for name, sa in here.sad.sas.items()}.items()
        # a reservation nobody knows of ends by itself
        here.sad.sas = {name: sa for name, sa in here.sad.sas.items() if sa.encr_name}
        if done[-1] == "aborted":
            del here.mobiles.have[str(context.remote_id)]
        here.sound()
        return ended

    async def scenario() -> None:
        at = 0
        while not await once(at):
            at += 1
        assert at > 30

    run(scenario())


@pytest.mark.parametrize("kinds", [("outbound",), ("ike", "inbound", "outbound")], ids="-".join)
@pytest.mark.parametrize("stock", [False, True])
def test_packets_for_the_mn_come_here_when_it_has_been_told(kinds: tuple[str, ...], stock: bool) -> None:
    # until then nothing that left here would reach it, and the other gateway goes on sending
    async def scenario() -> None:
        here = place()
        drawn: list[bool] = []

        async def updown(context: IkeContext, *, up: bool, **more: Any) -> None:
            drawn.append(up)

        here.host.updown = updown  # type: ignore[method-assign]
        context = a_context(1)
        other = rival(context, *kinds, shared=True)
        for one in (other, context):
            here.mobiles.add(one)
        if stock:
            here.mobiles.stock.add(str(context.remote_id))
        here.charon.serve(other)
        final = final_of(context)
        await here.sink.prepare(context, False)
        assert here.sink.cannot_send(context) and here.sink.renames(context)
        await here.sink.take(context, final)
        assert drawn == []
        report = await here.sink.move_peer(context, final)
        now = here.mobiles.have[str(context.remote_id)].children[0]
        outbound = here.sad.sas[context.remote.address, now.spi_out]
        same_keys = (now.nonce_i, now.nonce_r) == (context.children[0].nonce_i, context.children[0].nonce_r)
        assert same_keys is not stock
        if same_keys:
            # farther on than the other gateway may get
            assert outbound.replay.oseq >= 300 + 2 * SENDING_PACKETS
        # what the MN sent before it had changed over is on its way
        known = [] if "inbound" in kinds else [child.spi_in for child in context.children]
        assert here.sad.restored == known
        await here.sink.activate(context, final, report)
        await here.sink.activate(context, final, report)
        assert drawn == [True]
        assert not here.sink.cannot_send(context)
        here.sound()

    run(scenario())


@pytest.mark.parametrize("kinds", [(), ("inbound",), ("ike",)], ids="-".join)
def test_packets_for_the_mn_come_here_at_once_where_its_spi_is_free(kinds: tuple[str, ...]) -> None:
    async def scenario() -> None:
        here = place()
        context = a_context(1)
        for one in (other := rival(context, *kinds), context):
            here.mobiles.add(one)
        if kinds:
            here.charon.serve(other)
        await here.sink.prepare(context, False)
        assert not here.sink.cannot_send(context)
        assert here.sink.renames(context) is ("inbound" in kinds)
        await here.sink.take(context, final_of(context))
        assert here.host.coming.of(context.spis).facts.drawn

    run(scenario())


def test_without_numbers_for_both_only_one_gateway_sends() -> None:
    async def scenario() -> None:
        here = place()
        context = a_context(1)
        child = context.children[0]
        many = replace(child.outbound, seq=(1 << 32) - 8 * SENDING_PACKETS)
        context = replace(context, children=(replace(child, outbound=many, esn=False), *context.children[1:]))
        here.charon.serve(rival(context, "outbound", shared=True))
        await here.sink.prepare(context, False)
        assert not here.sink.cannot_send(context)

    run(scenario())


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("kinds", [(), ("inbound",)], ids="-".join)
def test_what_was_only_prepared_is_undone(kinds: tuple[str, ...], restarted: bool) -> None:
    """An SA that keeps its names leaves nothing else in the ledger than that it is being installed."""

    async def scenario() -> None:
        here = place()
        context = a_context(1)
        if kinds:
            here.charon.serve(rival(context, *kinds))
        await here.sink.prepare(context, False)
        assert here.host.importing(context.spis)
        if restarted:
            here.begin()
        await here.sink.undo(context)
        assert context.spis not in [view.spis for view in here.charon.views()]
        assert not here.host.importing(context.spis) and here.mute.muted == set()

    run(scenario())


@pytest.mark.parametrize("anew", [False, True])
def test_what_a_charon_that_was_killed_has_left_in_the_kernel_is_undone(
    monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    """The other gateway would be told for good that the kernel here has the SA. `anew`: charon runs again."""

    async def scenario() -> None:
        here = place()
        context = a_context(1)
        before = dict(here.sad.sas)
        await here.sink.prepare(context, False)
        assert here.sad.sas != before
        here.charon.sas.clear()
        monkeypatch.setattr(here.host, "listening", lambda: anew)
        await here.sink.undo(context)
        assert here.sad.sas == before

    run(scenario())


def test_what_is_undone_before_the_mn_was_told_has_drawn_nothing() -> None:
    async def scenario() -> None:
        here = place()
        drawn: list[bool] = []

        async def updown(context: IkeContext, *, up: bool, **more: Any) -> None:
            drawn.append(up)

        here.host.updown = updown  # type: ignore[method-assign]
        context = a_context(1)
        here.charon.serve(rival(context, "outbound", shared=True))
        await here.sink.prepare(context, False)
        await here.sink.take(context, final_of(context))
        await here.sink.undo(context)
        assert drawn == []

    run(scenario())


@pytest.mark.parametrize("kinds", [(), ("outbound",)], ids="-".join)
def test_no_sa_is_owned_without_its_updown_script(
    kinds: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without descriptors for it, what is being taken is undone, and needs no script for that."""

    async def scenario() -> None:
        here = place(updown={"home": f'echo "$PLUTO_VERB" >> {tmp_path}/ran'})
        context = a_context(1)
        here.mobiles.add(context)
        if kinds:
            here.charon.serve(rival(context, *kinds, shared=True))
        final = final_of(context)
        monkeypatch.setattr(subprocess, "Popen", no_descriptors)
        await here.sink.prepare(context, False)
        with pytest.raises(KernelError, match=r"updown script .* cannot be started: Too many open files"):
            await here.sink.take(context, final)
            report = await here.sink.move_peer(context, final)
            await here.sink.activate(context, final, report)
        await here.sink.undo(context)
        assert not (tmp_path / "ran").exists()
        assert context.spis not in [view.spis for view in here.charon.views()]

    run(scenario())


@pytest.mark.parametrize("waits", [False, True])
def test_a_mobile_node_that_waits_for_an_answer_does_not_wait_for_the_script(waits: bool) -> None:
    """One that is told by this gateway may send at once, so a device that the script makes must be there."""

    async def scenario() -> None:
        here = place()
        done: list[str] = []
        tell, speak = here.sink._mover, here.host.carried_out

        async def updown(context: IkeContext, *, up: bool, **more: Any) -> None:
            done.append("script")

        async def carried_out() -> None:
            done.append("charon speaks")
            await speak()

        async def mover(*args: Any) -> MoveReport:
            done.append("the mobile node is told")
            return await tell(*args)

        here.host.updown = updown  # type: ignore[method-assign]
        here.host.carried_out = carried_out  # type: ignore[method-assign]
        here.sink._mover = mover
        context = a_context(1)
        here.mobiles.add(context)
        if waits:
            here.sink.tell_later(context)
        final = final_of(context)
        await here.sink.prepare(context, False)
        await here.sink.take(context, final)
        report = MoveReport() if waits else await here.sink.move_peer(context, final)
        await here.sink.activate(context, final, report)
        told = ["script", "the mobile node is told", "charon speaks"]
        assert done == (["charon speaks", "script"] if waits else told)

    run(scenario())


@pytest.mark.parametrize("restarted", [False, True])
def test_a_script_that_cannot_be_started_is_started_when_it_can_be(
    restarted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no descriptors for it. The SA is served meanwhile, and the script gets its numbers then."""
    monkeypatch.setattr(runner_module, "AGAIN", (0.05, 0.05))
    monkeypatch.setattr(runner_module, "ENDLESS", 0.05)

    async def scenario() -> None:
        here = place(updown={"home": f'echo "$PLUTO_VERB $PLUTO_REQID" >> {tmp_path}/ran'})
        context = a_context(1)
        with monkeypatch.context() as without:
            without.setattr(subprocess, "Popen", no_descriptors)
            await come(here, context)
            assert here.host.coming.of(context.spis).later == ("script after the answer",)
            here.sink._swept = 0
            here.sink._sweep(int(time.time()) + 3600)  # when other such rows are forgotten
            await asyncio.sleep(0.3)  # it is tried in vain
        if restarted:
            here.store.flush()  # with the journal's next state
            for task in list(here.host._tasks):
                task.cancel()
            here.begin()
            here.sink.resume()
        await until(lambda: not any(row.later for row in here.host.coming.all()))
        reqid = here.charon.views()[-1].children[0].reqid
        assert (tmp_path / "ran").read_text() == f"up-client {reqid}\n"

    asyncio.run(scenario())  # a script is a process, which takes real time


def test_a_script_that_cannot_be_started_is_not_for_an_sa_that_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "AGAIN", (0.05, 0.05))

    async def scenario() -> None:
        here = place(updown={"home": f'echo "$PLUTO_VERB" >> {tmp_path}/ran'})
        with monkeypatch.context() as without:
            without.setattr(subprocess, "Popen", no_descriptors)
            await come(here, a_context(1))
        here.charon.sas.clear()
        await until(lambda: not any(row.later for row in here.host.coming.all()))
        assert not (tmp_path / "ran").exists()

    asyncio.run(scenario())


def test_a_script_that_cannot_be_run_for_an_undo_is_run_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packets for the MN would still be led here; charon, which had the numbers, has no such SA any more."""
    monkeypatch.setattr(runner_module, "AGAIN", (0.05, 0.05))

    async def scenario() -> None:
        here = place(updown={"home": f'echo "$PLUTO_VERB $PLUTO_REQID" >> {tmp_path}/ran'})
        context = a_context(1)
        await here.sink.prepare(context, False)
        await here.sink.take(context, final_of(context))
        with monkeypatch.context() as without:
            without.setattr(subprocess, "Popen", no_descriptors)
            await here.sink.undo(context)  # the other gateway does not wait for the script
        await until(lambda: not here.host.coming.all())
        up, down = (tmp_path / "ran").read_text().splitlines()
        assert up.startswith("up-client ") and down == up.replace("up", "down", 1)

    asyncio.run(scenario())  # a script is a process, which takes real time


def test_an_agent_that_ended_before_the_script_ran_runs_it(tmp_path: Path) -> None:
    """Where packets come here only after the MN has been told, `activate` has the script run."""

    async def scenario() -> None:
        here = place(updown={"home": f'echo "$PLUTO_VERB" >> {tmp_path}/ran'})
        context = a_context(1)
        here.mobiles.add(context)
        here.charon.serve(rival(context, "outbound", shared=True))
        final = final_of(context)
        await here.sink.prepare(context, False)
        await here.sink.take(context, final)
        report = await here.sink.move_peer(context, final)

        async def dies(*_: object, **more: object) -> None:
            raise peers.Crash("in the script")

        here.host.updown = dies  # type: ignore[method-assign]
        with pytest.raises(peers.Crash):
            await here.sink.activate(context, final, report)
        here.begin()
        await here.sink.activate(context, final, report)
        assert (tmp_path / "ran").read_text() == "up-client\n"

    asyncio.run(scenario())  # a script is a process, which takes real time


def no_descriptors(*_: object, **more: object) -> None:
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("kinds", [(), ("inbound",)], ids="-".join)
def test_activating_what_is_active_sets_no_message_id_back(kinds: tuple[str, ...]) -> None:
    # the agent was killed before the journal said that the SA is here, and charon has spoken meanwhile
    async def scenario() -> None:
        here = place()
        context = a_context(1)
        for one in (rival(context, *kinds), context):
            here.mobiles.add(one)
        if kinds:
            here.charon.serve(rival(context, *kinds))
        final = final_of(context)
        report = await move(here, context)
        orders: list[int] = []
        here.charon.step = lambda: orders.append(1)
        here.begin()
        await here.sink.activate(context, final, report)
        await here.sink.undo(context)
        assert orders == []
        here.sound()

    run(scenario())


def test_notes_of_what_came_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        here = place()
        clock = [2_000_000_000.0]
        monkeypatch.setattr(sink_module.time, "time", lambda: clock[0])
        first, second, third = a_context(1), a_context(2, "198.51.100.8"), a_context(3, "198.51.100.9")
        for context, seconds in ((first, 0.0), (second, 30.0), (third, 700.0)):
            clock[0] += seconds
            here.mobiles.add(context)
            await move(here, context)
        assert [row.sa for row in here.host.coming.all()] == [third.spis]

    run(scenario())


def test_b16_octets_and_packets_go_on_being_counted() -> None:
    async def scenario() -> None:
        here = place()
        context = a_context(1)
        lifetime = Lifetime(rekey=3000, hard=3600, bytes_limit=1 << 30, bytes_used=1 << 20, packets_used=4000)
        context = replace(context, children=(replace(context.children[0], lifetime=lifetime),))
        here.mobiles.add(context)
        await move(here, context)
        (child,) = context.children
        for name in ((OURS.address, child.spi_in), (context.remote.address, child.spi_out)):
            usage = here.sad.sas[name].usage
            assert (usage.bytes, usage.packets) == (1 << 20, 4000)

    run(scenario())


def test_b16_a_child_that_was_rekeyed_on_the_way_is_counted_anew() -> None:
    async def scenario() -> None:
        here = place(collision="rekey")
        context = a_context(1)
        lifetime = Lifetime(bytes_used=1 << 20, packets_used=4000)
        context = replace(context, children=(replace(context.children[0], lifetime=lifetime),))
        here.charon.serve(rival(context, "inbound"))
        here.mobiles.add(context)
        await move(here, context)
        assert {sa.usage.packets for sa in here.sad.sas.values()} == {0}

    run(scenario())
