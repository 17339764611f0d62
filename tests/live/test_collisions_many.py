"""Many SAs whose names are drawn from tiny ranges, between real charons: all live, all names differ.

User-space ESP has no range to draw from, so it is the other way round: nsg has SAs of others already, with
names drawn from those that the mobile nodes' SAs have at psg. For each whose names are taken (see
test_collisions) nsg asks the mobile node for others, in vain, and rekeys.

IKECTX_MANY says how many SAs move (100); six tenths as many are at nsg before, each with names of one of
them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ikectx_cli.lab.fleet import Fleet

from .test_collisions import take_in
from .world import World, spis, until

COUNT = int(os.environ.get("IKECTX_MANY") or 100)
OTHERS = COUNT * 6 // 10
pytestmark = [pytest.mark.live, pytest.mark.timeout(120 + 2 * COUNT)]


@pytest.fixture
def fleet(world: World) -> Iterator[Fleet]:
    with Fleet(world.lab, COUNT).connected() as fleet:
        yield fleet


def rivals(world: World, folder: Path) -> set[str]:
    """SAs of others come to nsg; the identities of the mobile nodes that have a name in common with one."""
    dice = Random(4067)
    sas = dice.sample(world.lab.list_sas("psg"), OTHERS)
    told = []
    for number, sa in enumerate(sas):
        child = next(iter(sa["child-sas"].values()))
        names = {
            "spi_i": f"{number:016x}",
            "spi_r": f"{0xFF0000 + number:016x}",
            "spi_in": f"ca{number:06x}",
            "spi_out": f"cb{number:06x}",
            "vip": str(ip_address("10.64.0.0") + number),
            "id": f"other{number}.example",
        }
        kind = dice.choice(["inbound", "inbound", "outbound", "ike", "all"])
        if kind in ("inbound", "all"):
            names["spi_in"] = child["spi-in"]
        if kind in ("outbound", "all"):
            names |= {"spi_out": child["spi-out"], "remote": sa["remote-host"]}
        if kind in ("ike", "all"):
            names |= {"spi_i": sa["initiator-spi"], "spi_r": sa["responder-spi"]}
        told.append(names)
    take_in(world, folder, *told)
    return {sa["remote-id"] for sa in sas}


def others(world: World) -> dict[str, Any]:
    return {
        sa["remote-id"]: (sa["uniqueid"], spis(sa), sorted(names(sa)))
        for sa in world.lab.list_sas("nsg")
        if sa["remote-id"].startswith("other")
    }


def names(sa: Any) -> set[tuple[str, str]]:
    return {
        (child["spi-in"], child["spi-out"])
        for child in sa["child-sas"].values()
        if child["state"] == "INSTALLED"
    }


def test_many(world: World, fleet: Fleet, tmp_path: Path) -> None:
    assert world.status("psg")["sas"] == COUNT  # nothing that psg's charon said of them was lost
    colliding = rivals(world, tmp_path)
    before = others(world)
    fleet.move("psg", "nsg")

    def agreed() -> bool:
        here = {
            sa["remote-id"]: sa for sa in world.lab.list_sas("nsg") if not sa["remote-id"].startswith("other")
        }
        mobile = {sa["local-id"]: sa for sa in world.lab.list_sas("mn")}
        return (
            here.keys() == mobile.keys()
            and len(mobile) == COUNT
            and all(
                spis(here[name]) == spis(mobile[name])
                and here[name]["state"] == mobile[name]["state"] == "ESTABLISHED"
                and {(b, a) for a, b in names(here[name])} == names(mobile[name])
                and len(names(mobile[name])) == 1
                for name in here
            )
        )

    until(agreed, "both ends agree about all", 60 + COUNT / 10)
    assert others(world) == before
    assert world.lab.list_sas("psg") == []
    listed = world.lab.list_sas("nsg")
    inbound = [spi for sa in listed for spi, _ in names(sa)]
    outbound = [(sa["remote-host"], spi) for sa in listed for _, spi in names(sa)]
    for unique in (inbound, outbound, [spis(sa)[1] for sa in listed]):
        assert len(set(unique)) == len(unique) == COUNT + OTHERS
    # all that collided were given other names, nobody else was
    log = world.log("nsg", "agent.out")
    assert (
        set(re.findall(r"(\S+): (?:SPI \S+ is|its IKE SPIs are taken, ours is) to become", log)) == colliding
    )
    assert len(re.findall("does not know UPDATE_SPI: its SAs are rekeyed", log)) == OTHERS
    fleet.ping()
    # each can be rekeyed by either side: nobody has lost its keys
    old = {spis(sa) for sa in world.lab.list_sas("mn")}
    asked = 0
    for host, own, digits in (("mn", "local-id", "05"), ("nsg", "remote-id", "27")):
        for sa in world.lab.list_sas(host):
            if re.fullmatch(rf"n\d*[{digits}]\.example", sa[own]):
                asked += world.lab.vici(host).rekey(ike_id=int(sa["uniqueid"]))
    assert asked == COUNT * 4 // 10

    def rekeyed() -> int:
        return len({spis(sa) for sa in world.lab.list_sas("mn")} - old)

    until(lambda: rekeyed() == asked and agreed(), "rekeys", 60 + COUNT / 10)
    assert others(world) == before
    fleet.ping()
