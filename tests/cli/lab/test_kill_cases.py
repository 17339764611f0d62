"""Cases of `ikectx lab kills`: they come from the tables and the steps, and none of these is forgotten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from ikectx.engine.tables import SourceAction, TargetAction
from ikectx.errors import UsageError
from ikectx_cli.lab import kill_cases
from ikectx_cli.lab.kill_cases import (
    BEFORE,
    FAULTS,
    MESSAGE_OF,
    MODES,
    OTHER_ACTIONS,
    STEP_OF,
    case,
    cases,
    effect_point,
    points,
    sample,
    steps,
    walk,
)
from ikectx_cli.lab.kills_command import kills

KILLS = Path(__file__).parents[2] / "kills.txt"
"""The cases that tests/run.sh runs."""


def test_each_action_is_a_step_a_message_or_neither_and_some_mode_has_it() -> None:
    known = {*STEP_OF, *MESSAGE_OF, *OTHER_ACTIONS}
    assert known == {*SourceAction, *TargetAction}
    walked = {action for mode in MODES.values() for *_, action in walk(mode) if action is not None}
    assert {*STEP_OF} <= walked


def test_each_step_and_each_of_its_effects_has_a_point_or_a_reason_why_not() -> None:
    there = {point.name for mode in MODES for point in points(mode)}
    for step in steps().values():
        for effect in step.effects:
            name = effect_point("" if effect.postponed else step.name, effect.name, BEFORE)
            assert name in there or name.removesuffix(f".{BEFORE}") in kill_cases.SELDOM


def test_nothing_is_named_as_seldom_that_there_is_not() -> None:
    every = {effect_point(step.name, effect.name, "") for step in steps().values() for effect in step.effects}
    assert {f"{name}." for name in kill_cases.SELDOM} <= every


def test_a_new_effect_brings_its_cases_along(monkeypatch: pytest.MonkeyPatch) -> None:
    freeze = steps()["freeze"]
    more = replace(freeze, effects=(*freeze.effects, replace(freeze.effects[0], name="something new")))
    monkeypatch.setattr(kill_cases, "steps", lambda: {**steps(), "freeze": more})
    names = {one.name for one in cases("push")}
    assert {
        "push.psg.freeze.something-new.before.agent-psg",
        "push.psg.freeze.something-new.after.agent-psg",
    } <= names


def test_names_are_unique_and_lead_back() -> None:
    every = cases("reactive")
    assert len({one.name for one in every}) == len(every)
    assert case(every[17].name) == every[17]


@pytest.mark.parametrize("name", ["", "push", "push.psg.nothing.agent-psg", "swim.psg.x.agent-psg"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(UsageError):
        case(name)


def test_those_that_run_each_time_are_cases_of_each_mode() -> None:
    names = KILLS.read_text().split()
    assert len(set(names)) == 61
    assert {case(name).point.mode for name in names} == {*MODES}


def test_what_befalls_the_mobile_node_is_not_tried_once_more_in_a_drain() -> None:
    hosts = [FAULTS[one.fault].hosts for one in cases("drain")]
    assert hosts and not any("mn" in one for one in hosts)


def test_in_a_drain_some_sas_pass_the_point_first() -> None:
    assert {one.passes for one in cases("drain")} == {*range(6)}
    assert {one.passes for one in cases("push")} == {0}


def test_every_fault_is_tried_in_some_mode() -> None:
    assert {one.fault for mode in MODES for one in cases(mode)} == {*FAULTS}


def test_a_sample_is_the_same_for_a_seed_and_has_each_mode() -> None:
    every = [one for mode in ("push", "pull", "reactive") for one in cases(mode)]
    some = sample(every, 60, 7)
    assert some == sample(every, 60, 7) != sample(every, 60, 8)
    assert len({one.name for one in some}) == 60
    assert {one.point.mode for one in some} == {"push", "pull", "reactive"}


def test_the_parts_of_a_sample_are_the_whole() -> None:
    def listed(*words: str) -> list[str]:
        done = CliRunner().invoke(kills, ["--list", "--sample", "25", *words])
        return done.output.split()

    parts = [listed("--part", f"{part}/3") for part in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(listed())
    assert CliRunner().invoke(kills, ["--list", "--part", "3/2"]).exit_code == 2
