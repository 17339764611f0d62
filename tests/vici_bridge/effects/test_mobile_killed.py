"""A mobile node's agent that is killed before or after any effect of ahead, quiet, readdress and loud."""

from __future__ import annotations

from typing import Any

import pytest

from tests.across.test_mobile_crashes import SHAPES
from tests.killing import Assassin, Killed, names, places
from tests.mobile_world import NEW, NSG, OLD, PSG, Node, a_move, a_node_context, at, do, quick
from vici_bridge.effects import mobile as mobile_module
from vici_bridge.effects.ahead import AHEAD, HOME
from vici_bridge.effects.loud import LOUD
from vici_bridge.effects.quiet import QUIET
from vici_bridge.effects.readdress import READDRESS

__all__ = ["quick"]

STEPS = {"ahead": AHEAD, "quiet": QUIET, "readdress": READDRESS, "loud": LOUD}


async def killed(
    step: str, shape: str, effect: str, after: bool, kernel: bool, patch: pytest.MonkeyPatch
) -> list[str]:
    """One agent is killed there, the next one makes the SA active, where it is. Gives what was done."""
    local, remote, renames = SHAPES[shape]
    node = Node(a_node_context(), kernel=kernel)
    assassin = Assassin(effect, after)
    with patch.context() as while_it_lives:
        while_it_lives.setattr(mobile_module, step.upper(), assassin.waits_in(STEPS[step]))
        while_it_lives.setattr(mobile_module.CharonMobile, "_take_back", dead)
        try:
            await a_move(node, local, remote, renames)
        except Killed:
            assert effect
    assert assassin.struck is bool(effect)
    node.begin()
    await node.mobile.resume()
    moved = (node.charon.local, node.charon.remote) == (local, remote)
    assert moved or (node.charon.local, node.charon.remote) == (OLD, PSG)
    assert moved or step != "loud"
    at(node, node.charon.local, node.charon.remote)
    return list(assassin.ran)


async def dead(self: Any, work: Any) -> None:
    """An agent that is dead takes nothing back."""
    raise Killed


@pytest.mark.parametrize("shape", ["beside", "all renamed"])
@pytest.mark.parametrize("step", list(STEPS))
def test_an_agent_may_be_killed_anywhere(step: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        for effect, after in places(await killed(step, shape, "", False, True, monkeypatch)):
            await killed(step, shape, effect, after, True, monkeypatch)

    do(scenario())


def test_the_way_back_from_a_place_that_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        for effect in ("", *names(HOME)):
            for after in (False, True):
                node = Node(a_node_context(children=2))
                assassin = Assassin(effect, after)
                monkeypatch.setattr(mobile_module, "HOME", assassin.waits_in(HOME))
                await node.mobile.ahead(await node.mobile.export(node.sa), NEW, NSG)
                try:
                    await node.mobile.home(node.sa)
                    assert not effect
                except Killed:
                    node.begin()
                    await node.mobile.resume()
                at(node, OLD, PSG)
                assert node.kernel is not None and node.kernel.lost == 0

    do(scenario())


def test_each_effect_has_its_killed_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        for step, effects in STEPS.items():
            ran = await killed(step, "all renamed", "", False, step != "loud", monkeypatch)
            assert set(ran) == names(effects)

    do(scenario())
