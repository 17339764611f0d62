"""Time lines of handovers between real charons: every step is in them, and no key."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ikectx import trace
from ikectx_cli.lab import scenario as lab_scenario
from ikectx_cli.lab.hosts import TRACE
from ikectx_cli.lab.net import GATEWAYS
from ikectx_cli.lab.series import run_here
from ikectx_cli.lab.timeline import picture
from ikectx_cli.lab.trace import TimeLine

from .world import World

STEPS = {
    "handover": {
        "psg": ["export", "choose a way", "freeze", "release"],
        "nsg": ["check", "prepare", "take", "move", "activate"],
        "mn": [],
    },
    "predictive": {
        "psg": ["export", "freeze", "release"],
        "nsg": ["check", "get ready", "prepare", "take", "move", "activate"],
        "mn": ["quiet", "renumber", "readdress", "loud"],
    },
}
MESSAGES = {
    "handover": [
        *(("psg", "nsg", "PCTD"), ("nsg", "psg", "CTDR"), ("psg", "nsg", "CTD")),
        *(("nsg", "mn", "INFORMATIONAL request"), ("mn", "nsg", "INFORMATIONAL response")),
        ("nsg", "psg", "CTDR"),
    ],
    "predictive": [
        *(("mn", "psg", "CTAR"), ("psg", "nsg", "PCTD"), ("nsg", "psg", "CTDR"), ("psg", "mn", "CTAA")),
        *(("mn", "nsg", "CTAR"), ("nsg", "psg", "CT-Req"), ("psg", "nsg", "CTD"), ("nsg", "psg", "CTDR")),
        ("nsg", "mn", "CTAA"),
    ],
}


@pytest.mark.live
def test_every_step_and_message_of_a_handover_is_in_its_time_line() -> None:
    reports: dict[str, Any] = {}
    scenarios = [lab_scenario.load(name).brief(slow=False) for name in STEPS]
    steps = (("connect",), ("traffic", "start"), ("agent", "nsg", "stop"), ("transfer", "psg", "nsg"))
    run_here(
        [*scenarios, replace(scenarios[0], name="failing", steps=steps)],
        libipsec=True,
        say=lambda _words: None,
        done=lambda report: reports.update({report.scenario: report}),
        traced=True,
    )
    for name, hosts in STEPS.items():
        assert reports[name].ok, reports[name].error
        (told,) = reports[name].trace
        line = TimeLine.from_json(told)
        for host, steps in hosts.items():
            found = [one.step for one in line.spans if one.host == host and one.kind == "step"]
            assert list(dict.fromkeys(found)) == steps, (name, host)
        assert all(0 <= one.begin <= one.end <= line.end + 1e-6 for one in line.spans if one.kind == "step")
        assert len({one.of for one in line.spans if one.host in GATEWAYS and one.kind == "step"}) == 1
        arrows = [one for one in line.arrows if one.received is not None and "CREATE" not in one.message]
        _in_order(arrows, MESSAGES[name])
        assert all(one.sent <= (one.received or 0) for one in arrows)
        assert line.up.arrived and line.down.arrived
        assert bool(line.changes) == (name == "predictive")
        assert "freeze" in picture([line])
    # what goes wrong is what somebody wants to see
    assert reports["failing"].error.startswith("transfer"), reports["failing"].error
    (told,) = reports["failing"].trace
    found = {(one["step"], one["failed"]) for one in told["spans"] if one["host"] == "psg"}
    assert {("export", ""), ("connect", "LinkError")} <= found


def _in_order(arrows: list[Any], wanted: list[tuple[str, str, str]]) -> None:
    """These messages are among the arrows in this order; message IDs do not matter."""
    words = (
        (one.source, one.target, " ".join(word for word in one.message.split() if not word.isdigit()))
        for one in arrows
    )
    for one in wanted:
        assert one in words, (one, arrows)


@pytest.mark.live
def test_no_key_is_in_what_agents_trace(world: World) -> None:
    lab = world.lab
    world.broken = True  # agents after this test note nothing
    try:
        lab.traced = True
        world.anew(world.tunnel)
        world.up()
        keys = [key for _, key in world.keys("psg")]
        report = world.move("psg", "nsg")
        world.settle("nsg")
        assert keys
        names = report["sa"]
        for host in GATEWAYS:
            path = lab.work / host / TRACE
            text = path.read_text()
            lines = [json.loads(one) for one in text.splitlines()]
            assert any(line.get("step") for line in lines) and any(line.get("message") for line in lines)
            assert {key for line in lines for key in line} <= {
                *("step", "kind", "begin", "end", "of", "failed"),
                *("message", "way", "peer", "octets", "at"),
            }
            for secret in (*keys, *names):
                assert str(secret).lower() not in text.lower()
            assert "is written to" in (lab.work / host / "agent.out").read_text()
            assert path.stat().st_mode & 0o777 == 0o600
    finally:
        lab.traced = False
        for host in GATEWAYS:
            (lab.work / host / TRACE).unlink(missing_ok=True)
    assert trace.VARIABLE not in lab.environment("psg")
