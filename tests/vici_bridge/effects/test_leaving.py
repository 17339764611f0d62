"""freeze, thaw, release: what must happen once, what keeps no SA waiting, agents that are killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.engine.ports import MoveReport, RelayTo
from ikectx.errors import BusyError, CharonError, KernelError, LinkError, RefusedError, UnknownSaError
from ikectx.sa.context import Endpoint, FinalState, IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.relocate import relocate
from tests.across.test_go_on import outbound, run, sends, served
from tests.gateway_world import Place
from tests.killing import Assassin, Killed, names, places
from tests.worlds import until
from vici_bridge.effects import runner as runner_module
from vici_bridge.effects import source as source_module
from vici_bridge.effects import thaw as thaw_module
from vici_bridge.effects.freeze import DIVERT, FREEZE
from vici_bridge.effects.release import RELEASE
from vici_bridge.effects.source import CharonSource
from vici_bridge.effects.speaking import tell_ids
from vici_bridge.effects.thaw import THAW
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.vici.views import SaView

JUMP = 2000


@dataclass
class Gateway:
    """pSG with one SA, whose agent may be another. `mn`: answers when it is called back."""

    here: Place
    context: IkeContext
    scripts: list[str] = field(default_factory=list)
    called: list[int] = field(default_factory=list)
    rekeyed: list[int] = field(default_factory=list)
    deleted: int = 0
    mn: bool = True
    source: CharonSource = field(init=False)

    def __post_init__(self) -> None:
        async def rekey(*, child_id: int) -> None:
            self.rekeyed.append(child_id)

        self.here.charon.rekey = rekey  # type: ignore[attr-defined]
        self.begin()

    def begin(self) -> None:
        """An agent starts."""
        for task in list(self.here.host._tasks):
            task.cancel()
        self.here.begin()

        async def script(context: IkeContext, *, up: bool, reqids: Any, unique_id: int) -> None:
            assert reqids and unique_id
            self.scripts.append("up" if up else "down")

        self.here.host.updown = script  # type: ignore[method-assign]
        self.source = CharonSource(self.here.host, self._mover, self._ender)

    async def _mover(self, here: IkeContext, final: FinalState, arrived: object) -> MoveReport:
        assert here.spis in self.here.mute.muted, "charon would speak beside the agent"
        self.called.append(final.mid_initiator)
        if not self.mn:
            raise LinkError("silent")
        return MoveReport(messages=2, requests=1)

    async def _ender(self, here: IkeContext, ids: object) -> bool:
        assert here.spis in self.here.mute.muted, "charon would speak beside the agent"
        self.deleted += 1
        return True

    @property
    def number(self) -> int:
        """The last outbound sequence number."""
        return outbound(self.here, self.context).replay.oseq

    def end(self) -> None:
        """Somebody has charon delete the SA; its Delete stays without an answer."""
        (sa,) = self.here.charon.sas.values()
        sa.state, sa.view = "DELETING", None


@asynccontextmanager
async def gateway() -> AsyncIterator[Gateway]:
    async with served() as (here, _, context):
        there = Gateway(here, context)
        yield there
        for task in list(there.here.host._tasks):
            task.cancel()


# --- killed agents ----------------------------------------------------------------------------------------

VARIANTS = {
    "divert": ["plain"],
    "freeze": ["plain", "sending", "diverted", "relay"],
    "thaw": ["plain", "renaming", "sending", "ended", "early", "diverted", "relay"],
    "release": ["plain", "sending", "ended", "relay"],
}
STEPS = {"divert": DIVERT, "freeze": FREEZE, "thaw": THAW, "release": RELEASE}


async def walk(there: Gateway, step: str, variant: str) -> None:
    """Up to the step, and the step itself."""
    how: dict[str, Any] = {"sending": variant == "sending", "renaming": variant == "renaming"}
    if variant == "relay":
        how["relay"] = RelayTo(Endpoint(there.context.local.address, 20000), ip_address("192.0.2.9"))
    if step == "divert" or variant == "diverted":
        await there.source.divert(there.context, "nsg")
        assert not sends(there.here, there.context)
    if step == "divert":
        return
    if variant == "early":
        there.here.host.leaving.note(there.context.spis, policies=())
    else:
        await there.source.freeze(there.context, "nsg", **how)
    there.here.store.flush()  # as the journal does it
    if variant == "ended":
        there.end()
    if step != "freeze":
        await once_more(there, step)


async def once_more(there: Gateway, step: str) -> None:
    """What the engine does in that state, also after a start."""
    if step == "release":
        await there.source.release(there.context)
    else:
        await there.source.thaw(there.context, JUMP)


def test_packets_follow_before_charon_is_asked_for_anything() -> None:
    names = [effect.name for effect in RELEASE.effects]
    assert names.index("packets follow") < min(names.index("traps"), names.index("delete in charon"))


async def killed(step: str, variant: str, effect: str, after: bool, patch: pytest.MonkeyPatch) -> list[str]:
    """One agent is killed there, the next one does the step again. Gives the effects that were done."""
    async with gateway() as there:
        began = there.number
        assassin = Assassin(effect, after)
        patch.setattr(source_module, step.upper(), assassin.waits_in(STEPS[step]))
        try:
            await walk(there, step, variant)
            assert not effect, f"nobody was killed at {effect}"
        except Killed:
            patch.setattr(source_module, step.upper(), STEPS[step])
            there.begin()
            there.source.resume()
            await once_more(there, step)
        ran = list(assassin.ran)
        if step in ("divert", "freeze") and not effect:
            await once_more(there, step)
        await until(lambda: not there.here.host.leaving.all())
        assert there.here.mute.muted == set()
        if step == "release" or variant == "ended":
            assert there.here.charon.sas == {}
            assert [rule.esp for rule in there.here.nat.rules] == [True] * (variant == "relay")
            twice = effect.startswith("script") and after
            assert there.scripts.count("down") == 1 + twice
            assert there.scripts.count("up") == 0
            assert (there.deleted >= 1) is (step == "thaw")
        else:
            assert sends(there.here, there.context)
            assert there.here.nat.rules == set()
            # numbers were used up once, whatever was done again (the packet just sent is one)
            jumps = {JUMP}
            if variant == "sending":
                jumps = {4 * source_module.SENDING_PACKETS} | (jumps if step == "freeze" else set())
            assert there.number - began - 1 in jumps
            asked = variant != "early" and step != "divert" and (step == "thaw" or not effect)
            if asked:
                assert there.called
                assert there.scripts[-2:] == ["down", "up"]
            assert bool(there.rekeyed) is (variant == "renaming")
        return ran


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left for later is tried soon."""
    monkeypatch.setattr(runner_module, "AGAIN", (0.01, 0.01))


@pytest.mark.parametrize(("step", "variant"), [(step, one) for step in VARIANTS for one in VARIANTS[step]])
def test_an_agent_may_be_killed_anywhere(
    step: str, variant: str, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    # in an agent that is dead nothing is undone
    async def dead(self: CharonSource, context: IkeContext, jump: int) -> bool:
        raise Killed

    real = CharonSource._take_back

    async def scenario() -> None:
        ran = await killed(step, variant, "", False, monkeypatch)
        for effect, after in places(ran):
            with monkeypatch.context() as patch:
                if step == "freeze":
                    patch.setattr(CharonSource, "_take_back", _dies_once(dead, real))
                await killed(step, variant, effect, after, patch)

    run(scenario())


def _dies_once(dead: Any, real: Any) -> Any:
    calls: list[int] = []

    async def take_back(self: CharonSource, context: IkeContext, jump: int) -> bool:
        calls.append(1)
        return bool(await (dead if len(calls) == 1 else real)(self, context, jump))

    return take_back


def test_each_effect_has_its_killed_agent(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    async def scenario() -> None:
        for step, variants in VARIANTS.items():
            ran: set[str] = set()
            for variant in variants:
                ran |= set(await killed(step, variant, "", False, monkeypatch))
            assert ran == names(STEPS[step])

    run(scenario())


# --- single bugs ------------------------------------------------------------------------------------------


def test_b1_a_silent_mn_does_not_keep_an_sa_mute(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took longer than a step may, was begun anew each time, and used up numbers each time."""
    monkeypatch.setattr(thaw_module, "CALL_BACK", 0.2)

    async def scenario() -> None:
        async with gateway() as there:
            tried: list[int] = []

            async def hangs(here: IkeContext, final: FinalState, arrived: object) -> MoveReport:
                tried.append(final.mid_initiator)
                await asyncio.sleep(3600)
                raise AssertionError

            there.source._mover = hangs
            final = await there.source.freeze(there.context, "nsg", renaming=True)
            began = there.number
            async with asyncio.timeout(5):
                await there.source.thaw(there.context, JUMP)
            assert there.number == began + JUMP
            assert there.here.mute.muted == set()
            assert sends(there.here, there.context)
            # each message ID that can be the next one had its turn
            assert tried == [final.mid_initiator + n for n in range(5)]

    run(scenario())


def test_a_silent_mn_is_called_back_until_it_answers(quick: None) -> None:
    """It has heard what was asked, and only its answers were lost: charon would ask under numbers that are
    used."""

    async def scenario() -> None:
        async with gateway() as there:
            final = await there.source.freeze(there.context, "nsg")
            there.mn = False
            await there.source.thaw(there.context, JUMP)
            assert sends(there.here, there.context)
            assert there.here.mute.muted == set()
            assert there.here.mute.answering == {there.context.spis}, "charon asks nothing, nor hears answers"
            with pytest.raises(BusyError, match="nobody knows which message ID"):
                await there.source.export(there.context.spis)
            away = await there.source.export(there.context.spis, away=True)
            assert (away.mid_initiator, away.unsure) == (final.mid_initiator, True)
            view = there.here.host.view

            async def asks(sa: SaName, *, search: bool = True) -> SaView | None:
                """charon has asked something that nobody heard."""
                found = await view(sa, search=search)
                return found and replace(found, tasks=("CHILD_REKEY",), waits=True)

            there.here.host.view = asks  # type: ignore[method-assign]
            there.mn = True
            await until(lambda: not there.here.host.leaving.all())
            assert len(there.rekeyed) == 1, "charon takes it out of its queue when it is told something"
            there.here.host.view = view  # type: ignore[method-assign]
            assert there.here.mute.muted == there.here.mute.answering == set()
            exported = await there.source.export(there.context.spis)
            assert exported.mid_initiator == there.called[-1] + 1 > final.mid_initiator

    run(scenario())


async def _cannot(*_: Any, **__: Any) -> None:
    raise KernelError("the script cannot be started")


def test_a_mobile_node_is_not_called_back_for_a_move_that_it_has_answered() -> None:
    """Only the script of that move is left for later when the next move fails before it asked anything."""

    async def scenario() -> None:
        async with gateway() as there:
            sa = there.context.spis
            there.here.host.updown = _cannot  # type: ignore[method-assign]
            await there.source.freeze(there.context, "nsg")
            await there.source.thaw(there.context, JUMP)
            assert there.called and "script anew" in there.here.host.leaving.of(sa).later
            there.called.clear()
            await tell_ids(there.here.host, IkeId.of(there.context.current), 12)  # charon goes on asking
            there.here.mute.said = 1
            there.mn = False
            with pytest.raises(BusyError):
                await there.source.freeze(await there.source.export(sa), "nsg")
            assert not there.called
            assert there.here.mute.muted == there.here.mute.answering == set()

    run(scenario())


def test_a_mobile_node_that_has_answered_is_not_called_back_again(quick: None) -> None:
    """charon does not answer the agent just then."""

    async def scenario() -> None:
        async with gateway() as there:
            view = there.here.host.view

            async def slow(sa: SaName, *, search: bool = True) -> SaView | None:
                if there.called and sa not in there.here.mute.muted:
                    raise CharonError("charon does not answer")
                return await view(sa, search=search)

            await there.source.freeze(there.context, "nsg")
            there.here.host.view = slow  # type: ignore[method-assign]
            await there.source.thaw(there.context, JUMP)
            assert there.called and not there.here.host.leaving.all()

    run(scenario())


def test_a_silent_mn_is_called_back_before_a_script_is_tried_again() -> None:
    async def scenario() -> None:
        async with gateway() as there:
            there.here.host.updown = _cannot  # type: ignore[method-assign]
            await there.source.freeze(there.context, "nsg")
            there.mn = False
            await there.source.thaw(there.context, JUMP)
            there.mn = True
            there.called.clear()
            began = asyncio.get_running_loop().time()
            await until(lambda: there.called)
            assert asyncio.get_running_loop().time() - began < 10

    run(scenario())


def test_charon_rekeys_nothing_while_the_mobile_node_is_silent(quick: None) -> None:
    async def scenario() -> None:
        async with gateway() as there:
            await there.source.freeze(there.context, "nsg", renaming=True)
            there.mn = False
            await there.source.thaw(there.context, JUMP)
            assert there.here.mute.answering and not there.rekeyed
            there.mn = True
            await until(lambda: not there.here.host.leaving.all())
            assert there.rekeyed

    run(scenario())


def test_a_silent_mn_that_leaves_by_itself_is_still_in_doubt() -> None:
    async def scenario() -> None:
        async with gateway() as there:
            sa = there.context.spis
            await there.source.freeze(there.context, "nsg")
            there.mn = False
            await there.source.thaw(there.context, JUMP)
            again = await there.source.export(sa, away=True)
            assert (await there.source.freeze(again, "nsg", away=True)).unsure
            there.source.not_taken(sa)
            there.called.clear()
            await there.source.thaw(again, JUMP)
            assert there.called and there.here.mute.answering == {sa}

    run(scenario())


def test_an_sa_that_is_ended_while_its_mobile_node_is_silent_is_ended_there_too(quick: None) -> None:
    async def scenario() -> None:
        async with gateway() as there:
            await there.source.freeze(there.context, "nsg")
            there.mn = False
            await there.source.thaw(there.context, JUMP)
            there.end()  # charon's Delete is dropped
            there.mn = True
            await until(lambda: not there.here.host.leaving.all())
            assert there.deleted and not there.here.charon.sas
            assert there.here.mute.muted == there.here.mute.answering == set()

    run(scenario())


def test_one_that_is_called_back_leaves_as_any_other() -> None:
    """Its row said that its packets were led away already: two gateways sent under the same numbers."""

    async def scenario() -> None:
        async with gateway() as there:
            await there.source.divert(there.context, "nsg")
            await there.source.freeze(there.context, "nsg")
            there.mn = False
            await there.source.thaw(there.context, JUMP)
            began = there.number
            assert sends(there.here, there.context)
            again = await there.source.export(there.context.spis, away=True)
            await there.source.freeze(again, "nsg", away=True)
            assert not sends(there.here, there.context)
            await there.source.thaw(again, JUMP)
            assert sends(there.here, there.context) and there.number >= began + JUMP

    run(scenario())


def test_one_that_was_about_to_leave_and_changed_its_address_is_served_there() -> None:
    """MOBIKE, after its policies were taken out and before anything was frozen."""

    async def scenario() -> None:
        async with gateway() as there:
            await there.source.divert(there.context, "nsg")
            old, new = there.context.remote, Endpoint.of("203.0.113.77", there.context.remote.port)
            (sa,) = there.here.charon.sas.values()
            sa.remote, sa.view = new, None
            kernel = there.here.sad
            for one in list(kernel.sas.values()):
                moved = replace(
                    one,
                    source=new.address if one.source == old.address else one.source,
                    destination=new.address if one.destination == old.address else one.destination,
                )
                del kernel.sas[one.destination, one.spi]
                kernel.sas[moved.destination, moved.spi] = moved
            await there.source.thaw(there.context, JUMP)
            outward = [one for one in kernel.policies.values() if one.direction == "out" and one.templates]
            assert {one.destination for policy in outward for one in policy.templates} == {new.address}
            (outbound,) = [one for one in kernel.sas.values() if one.destination == new.address]
            assert outbound.replay.oseq >= JUMP

    run(scenario())


def test_an_sa_that_was_mute_without_a_note_can_be_moved_once_it_is_served() -> None:
    """An agent is killed at the freeze before it has noted anything; the journal's thaw ends that."""

    async def scenario() -> None:
        async with gateway() as there:
            sa = there.context.spis
            there.here.mute.mute_in(sa)
            there.here.host.orphans.known.add(sa)
            with pytest.raises(RefusedError, match="is frozen here"):
                await there.source.export(sa)
            await there.source.thaw(there.context, JUMP)
            assert there.here.mute.muted == set() and there.here.host.orphans.known == set()
            await there.source.export(sa)

    run(scenario())


def test_an_sa_that_has_ended_is_not_called_back(quick: None) -> None:
    async def scenario() -> None:
        async with gateway() as there:
            await there.source.freeze(there.context, "nsg")
            there.mn = False
            await there.source.thaw(there.context, JUMP)
            called = len(there.called)
            there.here.charon.sas.clear()
            await until(lambda: not there.here.host.leaving.all())
            assert len(there.called) == called

    run(scenario())


def test_b1_a_thaw_that_is_cut_off_goes_on_where_it_was() -> None:
    async def scenario() -> None:
        async with gateway() as there:
            await there.source.freeze(there.context, "nsg")
            began = there.number
            hanging = asyncio.Event()

            async def script(*_: Any, **__: Any) -> None:
                hanging.set()
                await asyncio.sleep(3600)

            there.here.host.updown = script  # type: ignore[method-assign]
            while not hanging.is_set():  # a busy machine may not come so far in that time
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):  # the engine's limit of a step
                        await there.source.thaw(there.context, JUMP)
            async with asyncio.timeout(5):
                await there.source.thaw(there.context, JUMP)
            assert there.number == began + JUMP
            assert there.here.mute.muted == set()
            assert there.here.host.leaving.of(there.context.spis).later == ("script anew",)

    run(scenario())


def test_b1_a_script_that_hangs_is_called_again_in_the_background(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    slow = [replace(one, limit=0.02) if one.name.startswith("script") else one for one in RELEASE.effects]
    monkeypatch.setattr(source_module, "RELEASE", replace(RELEASE, effects=tuple(slow)))

    async def scenario() -> None:
        async with gateway() as there:
            calls: list[bool] = []

            async def script(context: IkeContext, *, up: bool, **_: Any) -> None:
                calls.append(up)
                if len(calls) < 2:
                    await asyncio.sleep(3600)

            await there.source.freeze(there.context, "nsg")
            there.here.host.updown = script  # type: ignore[method-assign]
            async with asyncio.timeout(5):
                await there.source.release(there.context)
            assert there.here.charon.sas == {}
            await until(lambda: not there.here.host.leaving.all())
            assert calls == [False, False]

    run(scenario())


def test_what_was_left_for_later_is_done_by_the_next_agent(quick: None) -> None:
    async def scenario() -> None:
        async with gateway() as there:

            async def cannot(*_: Any, **__: Any) -> None:
                raise KernelError("the updown script cannot be started")

            await there.source.freeze(there.context, "nsg")
            there.here.host.updown = cannot  # type: ignore[method-assign]
            await there.source.release(there.context)
            assert there.scripts == []
            there.here.store.flush()
            there.begin()
            there.source.resume()
            await until(lambda: not there.here.host.leaving.all())
            assert there.scripts == ["down"]

    run(scenario())


@pytest.mark.parametrize("dies", ["exception", "agent"])
def test_b7_the_script_says_down_once_though_release_was_interrupted(dies: str) -> None:
    async def scenario() -> None:
        async with gateway() as there:
            await there.source.freeze(there.context, "nsg")
            delete = there.here.host.delete

            async def interrupted(*args: Any) -> None:
                await delete(*args)
                raise KernelError("interrupted")

            there.here.host.delete = interrupted  # type: ignore[method-assign]
            with pytest.raises(KernelError):
                await there.source.release(there.context)
            assert there.here.charon.sas == {}
            there.here.host.delete = delete  # type: ignore[method-assign]
            if dies == "agent":
                there.begin()
            await there.source.release(there.context)
            await there.source.release(there.context)
            assert there.scripts == ["down"]

    run(scenario())


def test_b9_an_sa_that_charon_lost_is_told_as_lost() -> None:
    async def scenario() -> None:
        async with gateway() as there:
            await there.source.freeze(there.context, "nsg")
            there.here.charon.sas.clear()
            with pytest.raises(UnknownSaError, match="while it was frozen"):
                await there.source.thaw(there.context, JUMP)
            assert there.here.mute.muted == set()
            assert there.here.host.leaving.all() == []
            assert there.called == there.scripts == []

    run(scenario())


@pytest.mark.parametrize("left", ["inbound", "nothing", "another SA"])
def test_the_policies_of_an_sa_that_charon_lost_are_put_back_beside_what_it_left(left: str) -> None:
    """charon that was killed leaves the others in the kernel, and packets left in the clear until the mobile
    node had an SA again. After a loss of power there is nothing, and nobody would remove them. An SA that the
    mobile node has set up meanwhile keeps its own."""

    async def scenario() -> None:
        async with gateway() as there:
            sad = there.here.sad
            before = {key: one for key, one in sad.policies.items() if one.templates}
            await there.source.freeze(there.context, "nsg")
            there.here.charon.sas.clear()
            if left == "nothing":
                sad.sas.clear()
                sad.policies.clear()
            anew = {
                key: replace(one, templates=tuple(replace(each, spi=b"anew") for each in one.templates))
                for key, one in before.items()
            }
            if left == "another SA":
                sad.policies.update(anew)
            with pytest.raises(UnknownSaError):
                await there.source.thaw(there.context, JUMP)
            ours = {key: one for key, one in sad.policies.items() if one.templates}
            wanted = {"inbound": before, "nothing": {}, "another SA": anew}[left]
            assert {key: one.templates for key, one in ours.items()} == {
                key: one.templates for key, one in wanted.items()
            }

    run(scenario())


def test_b12_an_exchange_that_begins_while_ids_are_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with gateway() as there:
            kept_back = 0
            catch_up = there.here.host.catch_up

            async def begins(sa: Any) -> None:
                nonlocal kept_back
                kept_back = 1
                await catch_up(sa)

            there.here.host.catch_up = begins  # type: ignore[method-assign]
            there.here.mute.dropped = lambda spis: kept_back  # type: ignore[method-assign]
            with pytest.raises(BusyError, match="while it was being frozen"):
                await there.source.freeze(there.context, "nsg")
            assert sends(there.here, there.context)
            assert there.here.mute.muted == set()

    run(scenario())


def test_b2_what_was_only_prepared_elsewhere_makes_numbers_jump() -> None:
    async def scenario() -> None:
        async with gateway() as there:
            began = there.number
            await there.source.thaw(there.context, JUMP)
            assert there.number == began + JUMP
            assert sends(there.here, there.context)
            assert there.called == there.scripts == []
            # also where charon was busy just then
            there.here.host.catch_up = busy  # type: ignore[method-assign]
            began = there.number
            with pytest.raises(BusyError):
                await there.source.freeze(there.context, "nsg")
            assert there.number >= began + 2 * source_module.OSEQ_JUMP

    run(scenario())


async def busy(sa: object) -> None:
    raise BusyError("charon began an exchange")


def test_b6_an_agent_that_starts_ends_esp_at_the_addresses_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with gateway() as there:
            await there.source.freeze(there.context, "nsg", sending=True)
            there.here.store.flush()
            there.begin()
            old = relocate(there.context, remote=Endpoint.of("198.51.100.200", 4500))
            monkeypatch.setattr(there.here.host, "context", lambda sa: old)  # the MN has moved since
            there.source.resume()
            assert not sends(there.here, there.context)
            assert there.here.host.leaving.of(there.context.spis).facts.policies

    run(scenario())


def test_b6_what_cannot_be_ended_keeps_no_agent_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with gateway() as there:
            await there.source.freeze(there.context, "nsg", sending=True)
            there.here.store.flush()
            there.begin()

            def cannot(*_: Any, **__: Any) -> None:
                raise KernelError("unreachable", errno=101)

            monkeypatch.setattr(there.here.host.away, "leave", cannot)
            there.source.resume()

    run(scenario())
