"""Strangers who send CTARs from forged addresses keep nobody from moving: real charons beside a flood."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from ikectx_cli.lab import attacker as lab_attacker
from ikectx_cli.lab.config import Tunnel

from .test_mobile import hands_over, settled
from .world import World, spis, until

pytestmark = pytest.mark.live


@pytest.fixture(scope="module", autouse=True)
def afterwards(session_world: World) -> Iterator[None]:
    """The tests after these find the mobile node without an agent, as they are used to."""
    yield
    session_world.broken = True


@pytest.fixture
def mobile(world: World) -> Iterator[World]:
    """The mobile node has an agent and its SA is up at psg."""
    if not world.lab.tunnel.mobile or ("mn", "agent") not in world.lab.started:
        world.anew(Tunnel(libipsec=True, mobile=True))
    world.up(mobile=True)
    yield world
    world.lab.net.mend()


def packets(world: World) -> int:
    """What mn2 has sent."""
    (link,) = json.loads(world.must("mn2", "ip", "-s", "-j", "link", "show", "dev", "eth0"))
    return int(link["stats64"]["tx"]["packets"])


@contextlib.contextmanager
def flood(world: World, kind: str, rate: float) -> Iterator[dict[str, Any]]:
    """So many forged CTARs a second to both gateways meanwhile; what was sent, once it has ended."""
    lab = world.lab
    out = lab.work / "mn2" / "attacker.out"
    out.unlink(missing_ok=True)
    order = lab_attacker.Order(kind, rate, 300.0, str(lab.work), spis(world.one("mn")), 0)
    told: dict[str, Any] = {}
    before = packets(world)
    lab.spawn("mn2", "attacker", lab_attacker.words(order))
    try:
        until(lambda: packets(world) >= before + rate, "a second's forgeries were sent", 30.0)
        yield told
    finally:
        lab.stop("mn2", "attacker")
        told |= json.loads(out.read_text().splitlines()[-1])


def test_transfers_beside_forged_ctars_with_the_sa_s_spis(mobile: World) -> None:
    # mn2 -> both gateways: CTARs with the SA's SPIs in tokens of no key, from forged addresses, 20 a second.
    # Ten a second made 7 of 13 transfers fail with "being moved already"
    with flood(mobile, "ctar-known", 20) as told:
        for source, to in (("psg", "nsg"), ("nsg", "psg")) * 3:
            mobile.move(source, to)
            settled(mobile, to)
    assert told["sent"] >= 20


def test_a_handover_after_forged_ctars_for_spis_that_nobody_has(mobile: World) -> None:
    # mn2 -> both gateways: CTARs with random SPIs, 100 a second; of each second's at most 20 are looked at.
    # 1,024 that were looked at made nsg deaf for five minutes: tests/across/test_unproven tries as many
    before = packets(mobile)
    with flood(mobile, "ctar-random", 100) as told:
        until(lambda: packets(mobile) > before + 1100, "more were sent than are ever remembered", 60.0)
    assert told["sent"] > 1000
    hands_over(mobile, "nsg", "--reactive")
    for host in ("psg", "nsg"):
        assert len(mobile.log(host, "agent.out")) < 50_000


def test_a_handover_beside_a_thousand_forged_ctars_a_second(mobile: World) -> None:
    # the same, and meanwhile MN -> nsg: CTAR; nsg -> MN: CTAA COOKIE; MN -> nsg: CTAR with it; then as ever
    with flood(mobile, "ctar-random", 1000) as told:
        for to in ("nsg", "psg", "nsg"):
            report = hands_over(mobile, to, "--reactive")
            assert report["result"] == "moved"
    assert told["sent"] > 1000
