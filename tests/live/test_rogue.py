"""A rogue peer with the right `push` brings nothing that nsg's connection does not allow. Real charon."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from ikectx.numbers import UNTOUCHED

from .rogue import ATTACKS
from .world import World

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.live


def test_each_attack_is_refused_with_its_reason(world: World) -> None:
    # TLS as psg, PCTD each; CTDR with its own status and REASON. Some are offered in earnest: nothing stands
    world.up()
    before = world.must("nsg", "ip", "xfrm", "policy")
    pushed = ["identity", "identity that forges", "server", "SPI 5", "message ID"]
    rogue = [sys.executable, "-m", "tests.live.rogue", f"{world.lab.work}/psg", *pushed]
    said = json.loads(world.must("psg", "sh", "-c", f"cd {ROOT} && exec {shlex.join(rogue)}"))
    assert said.pop("none (check)") == []
    assert len(said) == len(ATTACKS) - 1 + len(pushed)
    for name, verdicts in said.items():
        assert verdicts, f"{name} was taken"
        assert {status for _, status, _ in verdicts} <= {one.name for one in UNTOUCHED}, (name, verdicts)
        assert all(words.isprintable() and "configuration there" not in words for _, _, words in verdicts)
    assert any("root.evil" in words for _, _, words in said["identity (prepare)"])
    assert world.lab.list_sas("nsg") == []
    assert world.must("nsg", "ip", "xfrm", "policy") == before
    log = world.log("nsg", "agent.out")
    words = "the mobile node's identity is root.evil, connection mn asks for mn.example"
    assert f"from psg: check: {words}" in log
    assert "a?ERROR ikectx: forged?[31m" in log and "\x1b" not in log
    assert not [line for line in log.splitlines() if line.startswith("ERROR ikectx: forged")]
    assert world.idle("nsg")
    world.ping()
