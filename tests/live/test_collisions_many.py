"""A hundred SAs whose names are drawn from tiny ranges, between real charons: all live, all names differ.

User-space ESP has no range to draw from, so it is the other way round: nsg has SAs of others already, with
names drawn from those that the mobile node's SAs have at psg. For each whose names are taken (see
test_collisions) nsg asks the mobile node for others, in vain, and rekeys.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ikectx_cli.lab_net import OUTER
from vici_bridge.ha import wire_version

from .test_collisions import FREE, IMPORT
from .world import World, spis, until

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

COUNT = 100
OTHERS = 60


@pytest.fixture(autouse=True)
def addresses(world: World) -> Iterator[None]:
    for number in range(COUNT):
        world.must("mn", "ip", "address", "add", f"10.1.0.{20 + number}/24", "dev", "eth0")
    yield
    world.forget("mn")
    for number in range(COUNT):
        world.must("mn", "ip", "address", "del", f"10.1.0.{20 + number}/24", "dev", "eth0")


def several(world: World) -> None:
    """The SAs at psg, all from the one charon of mn."""
    names = [f"n{number}" for number in range(COUNT)]
    sections = [
        f"""  {name} {{
    version = 2
    proposals = aes128gcm16-prfsha256-x25519
    remote_addrs = {OUTER["psg"][4]}
    local_addrs = 10.1.0.{20 + number}
    vips = 10.4.0.{20 + number}
    local {{ auth = psk
      id = {name}.example }}
    remote {{ auth = psk
      id = psg.example }}
    children {{ net {{ remote_ts = 10.3.0.0/24
      esp_proposals = aes128gcm16 }} }}
  }}"""
        for number, name in enumerate(names)
    ]
    gateway = "pools { inner { addrs = 10.4.0.0/24 } }\n"
    gateway += "connections { mn { pools = inner\n remote { id = %any } } }\n"
    mobile = "connections {\n" + "\n".join(sections) + "\n}\n"
    world.lab.reload(world.tunnel, {"mn": mobile, "psg": gateway, "nsg": gateway})
    for name in names:
        world.lab.initiate("mn", name, "net")
    assert len(world.lab.list_sas("psg")) == COUNT


def rivals(world: World, folder: Path) -> dict[str, Any]:
    """SAs of others at nsg; their names by their identities."""
    dice = Random(1)
    sas = dice.sample(world.lab.list_sas("psg"), OTHERS)
    version = wire_version(str(world.lab.vici("nsg").version()["version"]))
    told = []
    for number, sa in enumerate(sas):
        child = next(iter(sa["child-sas"].values()))
        names = {
            **FREE,
            "spi_i": f"{number:016x}",
            "spi_r": f"{0xFF00 + number:016x}",
            "spi_in": f"ca{number:06x}",
            "spi_out": f"cb{number:06x}",
            "local": OUTER["nsg"][4],
            "version": version,
            "vip": f"10.5.0.{number}",
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
    world.lab.stop("nsg", "agent")
    script = folder / "import.py"
    script.write_text(IMPORT)
    world.must("nsg", sys.executable, str(script), *map(json.dumps, told))
    world.lab.start_agent("nsg")
    until(lambda: world.status("nsg")["charon"]["reachable"], "nsg's agent has found charon")
    until(lambda: len(world.lab.list_sas("nsg")) == OTHERS, "nsg has the other SAs")
    return others(world)


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


def test_a_hundred(world: World, tmp_path: Path) -> None:
    several(world)
    before = rivals(world, tmp_path)
    done = world.transfer("psg", "nsg", "--all")
    assert done.code == 0, done
    assert [report["result"] for report in done.json["reports"]] == ["moved"] * COUNT

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

    until(agreed, "both ends agree about all", 60)
    assert others(world) == before
    listed = world.lab.list_sas("nsg")
    inbound = [spi for sa in listed for spi, _ in names(sa)]
    outbound = [(sa["remote-host"], spi) for sa in listed for _, spi in names(sa)]
    for unique in (inbound, outbound, [spis(sa)[1] for sa in listed]):
        assert len(set(unique)) == len(unique) == COUNT + OTHERS
    # each can be rekeyed by either side: nobody has lost its keys
    old = {spis(sa) for sa in world.lab.list_sas("mn")}
    for host in ("mn", "nsg"):
        for sa in world.lab.list_sas(host):
            if not sa["remote-id"].startswith("other") and int(sa["uniqueid"]) % 5 == 0:
                world.lab.vici(host).rekey(ike_id=int(sa["uniqueid"]))
    until(lambda: agreed() and len(old & {spis(sa) for sa in world.lab.list_sas("mn")}) < COUNT, "rekeys", 60)
    assert others(world) == before
