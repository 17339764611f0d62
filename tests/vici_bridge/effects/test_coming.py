"""prepare, take, activate and undo: agents that are killed anywhere, and what keeps nobody waiting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.engine.ports import MoveReport
from ikectx.errors import RefusedError
from ikectx.sa.context import NO_TAGS, Endpoint, FinalChild, IkeContext, Tags
from ikectx.sa.relocate import relocate
from tests.across.test_go_on import run
from tests.gateway_world import Place, Talk
from tests.killing import Assassin, Killed, names, places
from tests.vici_bridge.effects.test_sink import a_context, final_of, place, rival
from tests.worlds import until
from vici_bridge.effects import prepare as prepare_module
from vici_bridge.effects import runner as runner_module
from vici_bridge.effects import sink as sink_module
from vici_bridge.effects.activate import ACTIVATE
from vici_bridge.effects.early import EARLY, is_early
from vici_bridge.effects.hush import HUSH, hushing
from vici_bridge.effects.prepare import PREPARE
from vici_bridge.effects.take import TAKE
from vici_bridge.effects.undo import UNDO
from vici_bridge.kernel.xfrm import KernelPolicy, Mark
from vici_bridge.policy.new_names import Agreed, Plan, Wish

STEPS = {"prepare": PREPARE, "take": TAKE, "activate": ACTIVATE, "undo": UNDO}


@dataclass
class Gateway:
    """nSG, whose agent may be another. `variant`: which SPIs of the SA are taken here, or none; "early": the
    mobile node has announced itself; "asked": it waits for an answer."""

    variant: str
    here: Place = field(init=False)
    context: IkeContext = field(init=False)
    scripts: list[str] = field(default_factory=list)
    report: MoveReport = field(default_factory=MoveReport)

    def __post_init__(self) -> None:
        self.here = place(late=0)
        self.context = a_context(1)
        self.here.mobiles.add(self.context)
        if self.variant not in ("", "early", "asked"):
            other = rival(self.context, self.variant, shared=self.variant == "outbound")
            self.here.mobiles.add(other)
            self.here.charon.serve(other)
        self.begin()

    def begin(self) -> None:
        """An agent starts."""
        self.stop()
        self.here.begin()

        async def script(context: IkeContext, *, up: bool, reqids: Any, unique_id: int) -> None:
            assert reqids and unique_id
            self.scripts.append("up" if up else "down")

        self.here.host.updown = script  # type: ignore[method-assign]

    def stop(self) -> None:
        if hasattr(self.here, "host"):
            for task in list(self.here.host._tasks):
                task.cancel()

    async def do(self, step: str) -> None:
        """What the engine does in this state, and what it writes behind it."""
        sink, context, final = self.here.sink, self.context, final_of(self.context)
        match step:
            case "prepare":
                if self.variant == "early":
                    await sink.ready(context, False)
                    self.context = context = relocate(context, remote=Endpoint.of("198.51.100.77", 4500))
                    self.here.mobiles.add(context)
                sink.tell_later(context, self.variant == "asked")
                await sink.prepare(context, False)
            case "take":
                await sink.take(context, final)
            case "move" if self.variant != "asked":
                self.report = await sink.move_peer(context, final)
            case "activate":
                await sink.activate(context, final, self.report)
            case "undo":
                await sink.undo(context)
        self.here.store.flush()


@asynccontextmanager
async def gateway(variant: str) -> AsyncIterator[Gateway]:
    there = Gateway(variant)
    yield there
    there.stop()


WAY = ["prepare", "take", "move", "activate"]


async def killed(
    step: str, variant: str, upto: str, effect: str, after: bool, patch: pytest.MonkeyPatch
) -> list[str]:
    """One agent is killed there, the next one does what the journal says. Gives what was done."""
    steps = [*WAY[: WAY.index(upto) + 1], "undo"] if step == "undo" else WAY
    async with gateway(variant) as there:
        assassin = Assassin(effect, after)
        patch.setattr(sink_module, step.upper(), assassin.waits_in(STEPS[step]))
        for one in steps:
            try:
                await there.do(one)
            except Killed:
                patch.setattr(sink_module, step.upper(), STEPS[step])
                there.begin()
                there.here.sink.resume()
                if one == "prepare":
                    # what was only prepared is undone by an agent that starts, and tried anew
                    await there.do("undo")
                await there.do(one)
        assert assassin.struck is bool(effect)
        host = there.here.host
        await until(lambda: not [row for row in host.coming.all() if row.later or row.facts.relay])
        if step == "undo":
            assert there.context.spis not in [sa.generation.spis for sa in there.here.charon.sas.values()]
            del there.here.mobiles.have[str(there.context.remote_id)]
            assert host.coming.all() == []
            if upto != "prepare":
                twice = effect == "script down" and after
                drew = there.scripts.count("up")
                assert there.scripts == ["up"] * drew + ["down"] * (drew + twice)
        else:
            # that it has ended is written with what follows at once
            last = variant == "asked" and effect == "names are over"
            again = (effect in ("script up", "script after the answer") and after) or last
            assert there.scripts == ["up"] * (1 + again)
        there.here.sound()
        assert not [sa for sa in there.here.sad.sas.values() if is_early(sa)]
        await until(lambda: all(one.selector.user != EARLY for one in there.here.sad.dump_policies()))
        assert not hushed(there.here)
        assert host.expected == set()
        assert there.here.relay.now == set()
        return list(assassin.ran)


def hushed(here: Place) -> list[KernelPolicy]:
    return [one for one in here.sad.dump_policies() if one.selector.user == HUSH]


VARIANTS = [
    *((step, variant, "activate") for step in ("prepare", "take", "activate") for variant in ("", "inbound")),
    ("activate", "outbound", "activate"),
    *((step, "asked", "activate") for step in ("take", "activate")),
    ("prepare", "ike", "activate"),
    *((step, "early", "activate") for step in ("prepare", "take", "activate")),
    *(
        ("undo", variant, upto)
        for variant in ("", "inbound", "outbound", "early")
        for upto in ("prepare", "take")
    ),
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left for later is tried soon."""
    monkeypatch.setattr(runner_module, "AGAIN", (0.01, 0.01))


@pytest.mark.parametrize(("step", "variant", "upto"), VARIANTS)
def test_an_agent_may_be_killed_anywhere(
    step: str, variant: str, upto: str, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    real = sink_module.CharonSink.undo

    async def scenario() -> None:
        ran = await killed(step, variant, upto, "", False, monkeypatch)
        for effect, after in places(ran):
            with monkeypatch.context() as patch:
                if step == "prepare":
                    patch.setattr(sink_module.CharonSink, "undo", _dies_once(real))
                await killed(step, variant, upto, effect, after, patch)

    run(scenario())


def _dies_once(real: Any) -> Any:
    """In an agent that is dead nothing is undone."""
    calls: list[int] = []

    async def undo(self: Any, context: IkeContext) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise Killed
        await real(self, context)

    return undo


def test_each_effect_has_its_killed_agent(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    async def scenario() -> None:
        ran: dict[str, set[str]] = {step: set() for step in STEPS}
        for step, variant, upto in VARIANTS:
            ran[step] |= set(await killed(step, variant, upto, "", False, monkeypatch))
        assert ran == {step: names(STEPS[step]) for step in STEPS}

    run(scenario())


def test_a_script_that_hangs_does_not_keep_an_undo_waiting(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """The other gateway waits for its end, and nobody serves the SA until then."""
    effects = tuple(
        runner_module.replace(one, limit=0.02) if one.name == "script down" else one for one in UNDO.effects
    )
    monkeypatch.setattr(sink_module, "UNDO", runner_module.replace(UNDO, effects=effects))

    async def scenario() -> None:
        async with gateway("") as there:
            await there.do("prepare")
            await there.do("take")
            calls: list[bool] = []

            async def script(context: IkeContext, *, up: bool, **_: Any) -> None:
                calls.append(up)
                if len(calls) < 2:
                    await asyncio.sleep(3600)

            there.here.host.updown = script  # type: ignore[method-assign]
            async with asyncio.timeout(5):
                await there.do("undo")
            assert there.here.charon.sas == {}
            await until(lambda: not there.here.host.coming.all())
            assert calls == [False, False]

    run(scenario())


def test_what_could_not_be_planned_deletes_no_sa_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with gateway("ike") as there:
            monkeypatch.setattr(there.here.sink._renames, "plan", refused)
            before = dict(there.here.charon.sas)
            with pytest.raises(RefusedError):
                await there.do("prepare")
            await there.do("undo")
            assert there.here.charon.sas == before
            assert there.here.host.coming.all() == []

    run(scenario())


def refused(*_: Any, **__: Any) -> None:
    raise RefusedError("no free SPI is left")


def test_b7_the_script_says_up_once_though_take_was_interrupted() -> None:
    async def scenario() -> None:
        async with gateway("") as there:
            await there.do("prepare")
            await there.do("take")
            there.begin()  # the journal still says that it is being taken
            await there.do("take")
            await there.do("move")
            await there.do("activate")
            assert there.scripts == ["up"]

    run(scenario())


@pytest.mark.parametrize("used", [0, 1])
def test_b19_the_mn_says_which_id_is_next_after_a_rekey_that_was_cut_off(used: int) -> None:
    """The next agent asked under an ID that was used for the end of the rekey, or charon did."""

    async def scenario() -> None:
        async with gateway("inbound") as there:
            mobiles, asked = there.here.mobiles, []
            mobiles.stock.add(str(there.context.remote_id))

            def cut_off(here: IkeContext, wish: Wish) -> Talk:
                def first() -> Iterator[Agreed]:
                    yield replace(next(mobiles._agree(here, wish)), unfinished=True)
                    raise Killed

                return Talk(first())

            async def settler(here: IkeContext, final: Any) -> int:
                asked.append(final.mid_initiator)
                return int(final.mid_initiator) + used

            there.here.sink._renamer = cut_off
            await there.do("prepare")
            await there.do("take")
            with pytest.raises(Killed):
                await there.do("move")
            there.begin()
            there.here.sink._settler = settler
            await there.do("move")
            await there.do("activate")
            assert len(asked) == 1
            (sa,) = [one for one in there.here.charon.sas.values() if one.mids[0]]
            assert sa.mids[0] == asked[0] + used

    run(scenario())


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("variant", ["inbound", "outbound", "ike"])
def test_an_agent_may_be_killed_between_an_exchange_and_what_follows(variant: str, stock: bool) -> None:
    """Before and after each exchange with the mobile node, and when what it agreed to has been installed."""

    async def killed(at: int) -> bool:
        points = iter(range(100))

        def point() -> None:
            if next(points) == at:
                raise Killed

        async with gateway(variant) as there:
            if stock:
                there.here.mobiles.stock.add(str(there.context.remote_id))
            await there.do("prepare")
            await there.do("take")
            sink = there.here.sink
            become = sink._renames.become

            class Dying(Talk):
                async def next(self) -> Agreed | None:
                    point()
                    agreed = await super().next()
                    point()
                    return agreed

            async def dying(here: IkeContext, agreed: Agreed) -> Plan:
                plan = await become(here, agreed)
                point()
                return plan

            sink._renamer = lambda here, wish: Dying(there.here.mobiles._agree(here, wish))
            sink._renames.become = dying  # type: ignore[method-assign]
            try:
                await there.do("move")
            except Killed:
                there.begin()
                there.here.sink.resume()
                await there.do("move")
            await there.do("activate")
            there.here.sound()
        return next(points) > at

    async def scenario() -> None:
        at = 0
        while await killed(at):
            at += 1
        assert at == 3 * (1 + stock) + 2  # the last exchange is none

    run(scenario())


@pytest.mark.parametrize("variant", ["", "inbound", "outbound"])
def test_no_packet_leaves_before_its_numbers_are_known(variant: str) -> None:
    """The network, or the other gateway, leads packets here already: one comes before each step."""

    async def scenario() -> None:
        async with gateway(variant) as there:
            here, (child,) = there.here, there.context.children
            inner, dropped = child.remote_ts[0].start, 0

            def packet() -> None:
                nonlocal dropped
                policies = here.sad.policies.values()
                if any(one.direction == "out" and inner in one.destination for one in policies):
                    here.sad.step = lambda: None
                    dropped += here.sad.send(inner) is None
                    here.sad.step = packet

            views = here.charon.views

            def asked() -> Any:
                packet()
                return views()

            here.sad.step = here.charon.step = packet
            here.charon.views = asked  # type: ignore[method-assign]
            await there.do("prepare")
            packet()
            first = child.outbound.seq + here.host.config.oseq_jump + 1
            assert min(number for _, number in here.sad.sent) == first
            assert dropped
            assert not hushed(here)

    run(scenario())


def test_numbers_that_packets_leave_under_are_not_written() -> None:
    """The old gateway has sent some more packets before the freeze, and leads others here since then."""

    async def scenario() -> None:
        async with gateway("") as there:
            here, (child,) = there.here, there.context.children
            inner = child.remote_ts[0].start
            await there.do("prepare")

            def packets() -> None:
                here.sad.step = lambda: None
                for _ in range(4):
                    assert here.sad.send(inner) is not None
                here.sad.step = packets

            last = replace(child.outbound, seq=child.outbound.seq + 5)
            final = replace(
                final_of(there.context), children=(FinalChild(child.spi_in, child.inbound, last),)
            )
            here.sad.step = packets
            await here.sink.take(there.context, final)
            numbers = [number for _, number in here.sad.sent]
            assert len(set(numbers)) == len(numbers)
            assert min(numbers) > last.seq

    run(scenario())


def test_packets_are_dropped_until_the_next_agent_has_undone_the_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one before was killed when charon had the SA and its numbers were not written."""

    def killed_here(*_: Any) -> None:
        raise Killed

    async def scenario() -> None:
        async with gateway("") as there:
            here, (child,) = there.here, there.context.children
            inner = child.remote_ts[0].start
            with monkeypatch.context() as patch:
                patch.setattr(prepare_module, "write_replay", killed_here)
                patch.setattr(sink_module.CharonSink, "undo", _dies_once(sink_module.CharonSink.undo))
                with pytest.raises(Killed):
                    await there.do("prepare")
            there.begin()
            left = replace(
                hushed(here)[0], priority=1, selector=replace(hushed(here)[0].selector, source_prefix=8)
            )
            here.sad.replace_policy(left)
            here.sink.resume()
            assert here.sad.send(inner) is None
            assert left not in hushed(here), "of no SA that is known"
            await there.do("undo")
            assert not hushed(here)

    run(scenario())


def test_packets_of_others_leave_meanwhile() -> None:
    """Of SAs that a mark or an interface tells apart, and all packets if its networks have all addresses."""
    context = a_context(1)
    (child,) = context.children

    def to(start: str, end: str, tags: Tags = NO_TAGS) -> list[KernelPolicy]:
        wide = replace(child.remote_ts[0], start=ip_address(start), end=ip_address(end))
        return hushing(replace(context, children=(replace(child, remote_ts=(wide,), tags=tags),)), HUSH)

    assert [str(one.destination) for one in to("10.3.0.4", "10.3.0.6")] == ["10.3.0.4/30"]
    assert to("0.0.0.0", "255.255.255.255") == []
    assert to("198.51.0.0", "198.51.255.255") == [], "the mobile node's outer address"
    tags = Tags(mark_out=(7, 0xFF), if_id_out=9)
    (policy,) = to("0.0.0.0", "255.255.255.255", tags)
    assert (policy.mark, policy.if_id) == (Mark(7, 0xFF), 9)
