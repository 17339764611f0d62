"""`doctor` about relays."""

from __future__ import annotations

from pathlib import Path

from ikectx_cli.doctor.checks import CHECKS
from ikectx_cli.doctor.findings import examine
from tests.cli.doctor.test_inside import a_world
from tests.healthy_world import only


def test_a_host_that_does_not_forward(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    found = {finding.check: finding.found for finding in examine(world, CHECKS)}
    assert found["relay"] == "packets of mobile nodes behind a NAT can be passed on"
    world.stuck = {4, 6}
    assert "ip_forward=1" in only(world, "relay", "warn", "does not forward IPv4").fix


def test_a_firewall_that_drops(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    world.drops = ["inet filter forward"]
    assert "protocol 50" in only(world, "relay", "note", "inet filter forward").fix
    world.drops = None
    assert only(world, "relay", "note", "not known").level == "note"
