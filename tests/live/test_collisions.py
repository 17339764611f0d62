"""SPIs that are taken at nSG: the SA moves all the same, and the one that has the name does not notice.

The other SA is one that was taken in over the HA socket, with exactly the names that the mobile node's has at
psg. The mobile node is a stock charon, which does not know UPDATE_SPI. What travels:

    nsg -> MN   INFORMATIONAL    N(UPDATE_SA_ADDRESSES), N(UPDATE_SPI)...; answered without the last
    nsg -> MN   CREATE_CHILD_SA  N(REKEY_SA), SA, Ni, TSi, TSr for each child, and for the IKE_SA: SA, Ni, KE
    nsg -> MN   INFORMATIONAL    D of what was rekeyed
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vici_bridge.ha.version import wire_version

from .world import World, spis, until

pytestmark = pytest.mark.live

IMPORT = """
import json, secrets, socket, sys, time
from ikectx.sa.context import ChildContext, Endpoint, Identity, IkeContext, IkeGeneration, Secret
from ikectx.sa.context import TrafficSelector
from ikectx.numbers import Encr, IdType, KeMethod, Prf
from ipaddress import ip_address
from vici_bridge.ha.chain import import_messages

octets = secrets.token_bytes
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.bind(("127.0.0.2", 4510))
for told in map(json.loads, sys.argv[1:]):
    generation = IkeGeneration(
        bytes.fromhex(told["spi_i"]), bytes.fromhex(told["spi_r"]), False, octets(32), octets(32),
        Secret(octets(32)), Prf.HMAC_SHA2_256, Encr.AES_GCM_16, 128, ke=KeMethod.CURVE_25519,
    )
    vip, net = ip_address(told["vip"]), ip_address("10.3.0.0")
    child = ChildContext(
        "net", 0, False, bytes.fromhex(told["spi_in"]), bytes.fromhex(told["spi_out"]),
        octets(32), octets(32), Encr.AES_GCM_16,
        (TrafficSelector(net, net + 255),), (TrafficSelector(vip, vip),), encr_bits=128,
    )
    context = IkeContext(
        "mn", (generation,), Identity(IdType.FQDN, b"nsg.example"),
        Identity(IdType.FQDN, told["id"].encode()), Endpoint.of(told["local"], 4500),
        Endpoint.of(told["remote"], 4501), (child,), remote_vips=(vip,),
        conditions=0b1001,  # NAT: user-space ESP is in UDP
    )
    for message in import_messages(context, told["version"]):
        link.sendto(message.serialize(), ("127.0.0.1", 4510))
    time.sleep(0.01)
"""
FREE = {
    "spi_i": "1111111111111111",
    "spi_r": "2222222222222222",
    "spi_in": "caaaaaaa",
    "spi_out": "cbbbbbbb",
    "remote": "10.9.9.9",
    "vip": "10.4.0.99",
    "id": "other.example",
}


def other_at_nsg(world: World, folder: Path, **names: str) -> dict[str, Any]:
    """An SA of somebody else's at nsg, with these names; what charon lists of it."""
    take_in(world, folder, names)
    return names_of(world.one("nsg"))


def take_in(world: World, folder: Path, *sas: Mapping[str, str]) -> None:
    """SAs of others come to nsg, with these names and for the rest those of `FREE`."""
    version = wire_version(str(world.lab.vici("nsg").version()["version"]))
    told = [json.dumps({**FREE, "local": "10.2.2.2", "version": version, **names}) for names in sas]
    script = folder / "import.py"
    script.write_text(IMPORT)
    world.lab.stop("nsg", "agent")
    world.must("nsg", sys.executable, str(script), *told)
    world.lab.start_agent("nsg")
    until(lambda: world.status("nsg")["charon"]["reachable"], "nsg's agent has found charon")
    until(
        lambda: [len(sa["child-sas"]) for sa in world.lab.list_sas("nsg")] == [1] * len(sas),
        "nsg has the other SAs, each with its child",
    )


def names_of(sa: Mapping[str, Any]) -> dict[str, Any]:
    children = [
        (child["uniqueid"], child["state"], child["spi-in"], child["spi-out"])
        for child in sa["child-sas"].values()
    ]
    return {"id": sa["uniqueid"], "spis": spis(sa), "remote": sa["remote-host"], "children": children}


def served(world: World) -> dict[str, Any]:
    """The mobile node's SA at nsg."""
    found = [sa for sa in world.lab.list_sas("nsg") if sa["remote-id"] != "other.example"]
    assert len(found) == 1
    return found[0]


def others(world: World) -> dict[str, Any]:
    (found,) = (sa for sa in world.lab.list_sas("nsg") if sa["remote-id"] == "other.example")
    return names_of(found)


def agreed(world: World) -> bool:
    """Both ends have the same IKE_SA with the same children, and nothing under way."""
    here, mobile = served(world), world.one("mn")
    pairs = [
        {
            (child["spi-in"], child["spi-out"])
            for child in sa["child-sas"].values()
            if child["state"] == "INSTALLED"
        }
        for sa in (here, mobile)
    ]
    busy = any(sa.get(kind) for sa in (here, mobile) for kind in ("tasks-active", "tasks-queued"))
    return (
        spis(here) == spis(mobile)
        and here["state"] == mobile["state"] == "ESTABLISHED"
        and {(b, a) for a, b in pairs[0]} == pairs[1]
        and len(pairs[0]) == world.tunnel.children
        and not busy
    )


def lives_on(world: World, other: Mapping[str, Any]) -> None:
    """The SA can do all an SA does, the other one is what it was, and no two have one name."""
    until(lambda: agreed(world), "both ends agree")
    world.ping()
    assert others(world) == other
    for host in ("mn", "nsg"):
        sa = world.one("mn") if host == "mn" else served(world)
        child = next(child for child in sa["child-sas"].values() if child["state"] == "INSTALLED")
        world.lab.vici(host).rekey(child_id=int(child["uniqueid"]))
        until(
            lambda host=host, old=child["spi-in"]: (
                agreed(world)
                and old
                not in {
                    one["spi-in"]
                    for one in (world.one("mn") if host == "mn" else served(world))["child-sas"].values()
                    if one["state"] == "INSTALLED"
                }
            ),
            f"child rekey by {host}",
        )
        before = spis(world.one("mn"))
        world.lab.vici(host).rekey(ike_id=int(sa["uniqueid"]))
        until(lambda before=before: agreed(world) and spis(world.one("mn")) != before, f"IKE rekey by {host}")
    world.ping()
    assert others(world) == other
    inbound = [child["spi-in"] for sa in world.lab.list_sas("nsg") for child in sa["child-sas"].values()]
    assert len(set(inbound)) == len(inbound)
    world.lab.vici("mn").request("terminate", {"ike-id": world.one("mn")["uniqueid"], "timeout": "5000"})
    until(lambda: len(world.lab.list_sas("nsg")) == 1, "the MN's Delete arrived")
    assert others(world) == other


def names_at_psg(world: World) -> dict[str, str]:
    sa = world.one("psg")
    child = next(iter(sa["child-sas"].values()))
    return {
        "spi_i": sa["initiator-spi"],
        "spi_r": sa["responder-spi"],
        "spi_in": child["spi-in"],
        "spi_out": child["spi-out"],
        "remote": sa["remote-host"],
    }


KINDS = {
    "inbound": ("spi_in",),
    "outbound": ("spi_out", "remote"),
    "ike": ("spi_i", "spi_r"),
    "ike-responder": ("spi_r",),
    "all": ("spi_i", "spi_r", "spi_in", "spi_out", "remote"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_mobile_node(world: World, tmp_path: Path, kind: str) -> None:
    world.up()
    names = names_at_psg(world)
    other = other_at_nsg(world, tmp_path, **{key: names[key] for key in KINDS[kind]})
    done = world.transfer("psg", "nsg")
    assert done.code == 0, done
    assert done.report["result"] == "moved"
    assert world.lab.list_sas("psg") == []
    lives_on(world, other)


def test_refused_where_the_configuration_says_so(world: World, tmp_path: Path) -> None:
    world.up()
    other = other_at_nsg(world, tmp_path, spi_in=names_at_psg(world)["spi_in"])
    with world.agent_with("nsg", "[transfer]\n", '[transfer]\ncollision = "refuse"\n'):
        done = world.transfer("psg", "nsg")
        assert done.code == 4, done
        assert done.report["status"]["name"] == "ESP_SPI_IN_USE"
        assert others(world) == other
        world.ping()
        assert world.one("psg")["state"] == "ESTABLISHED"


def test_taken_back_after_the_mn_agreed(world: World, tmp_path: Path) -> None:
    # nsg rekeys the child of the stock mobile node, then its charon dies; psg calls the MN back
    # (UPDATE_SA_ADDRESSES) and rekeys: CREATE_CHILD_SA N(REKEY_SA), answered CHILD_SA_NOT_FOUND, and another
    # CREATE_CHILD_SA. With ESP in user space the MN rekeys by itself when it is moved; if it is first, psg
    # answers CHILD_SA_NOT_FOUND. nsg runs its updown script when the MN has agreed, and not before.
    world.up()
    names = names_at_psg(world)
    other_at_nsg(world, tmp_path, **{key: names[key] for key in KINDS["outbound"]})
    script = world.lab.work / "nsg" / "updown"
    text = script.read_text()
    charon = world.lab.started["nsg", "charon"]
    script.write_text(f"#!/bin/sh\nkill -9 {charon.pid}\n")
    try:
        done = world.transfer("psg", "nsg")
        charon.wait(timeout=5)
    finally:
        script.write_text(text)
        world.lab.stop("nsg", "charon")
        world.lab.start_charon("nsg")
    assert done.code != 0, done
    world.settle("psg")
    by_psg = "may have other SPIs" in world.log("psg", "agent.out")
    assert by_psg or re.search(r"unable to rekey, ESP CHILD_SA with SPI \w+ not found", world.log("psg"))
    world.talks("psg")
