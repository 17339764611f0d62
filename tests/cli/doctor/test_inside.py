"""`doctor` on the inside: where packets for a mobile node that moved go on to, and pools that fill."""

from __future__ import annotations

from pathlib import Path

import pytest

from ikectx_cli.config import parse
from ikectx_cli.doctor.checks import CHECKS
from ikectx_cli.doctor.findings import examine
from ikectx_cli.reach import PacketWay
from tests.healthy_world import TOML, VIA, Fake, Pki, only


def a_world(folder: Path, text: str = TOML) -> Fake:
    (folder / "ikectx.toml").write_text(text)
    (folder / "state").mkdir(mode=0o700)
    Pki().write(folder)
    return Fake(parse(text, folder / "ikectx.toml"))


def test_a_peer_whose_inner_address_answers(tmp_path: Path) -> None:
    found = {finding.check: finding.found for finding in examine(a_world(tmp_path), CHECKS)}
    assert found["inside"] == "nsg: forward_via 10.0.0.3 answers by lan0"


@pytest.mark.parametrize(
    ("way", "there", "level", "found"),
    [
        (PacketWay("lo", local=True), True, "fail", "is an address of this gateway"),
        (PacketWay(), None, "fail", "no route leads there"),
        (PacketWay("lan0"), True, "fail", "is behind a router"),
        (PacketWay("wan0", direct=True), True, "warn", "go there in the clear"),
        (PacketWay("lan0", direct=True), False, "fail", "does not answer"),
        (PacketWay("lan0", direct=True), None, "note", "may be there all the same"),
    ],
)
def test_an_inner_address_that_will_not_do(
    tmp_path: Path, way: PacketWay, there: bool | None, level: str, found: str
) -> None:
    world = a_world(tmp_path)
    world.way, world.there = way, there
    assert only(world, "inside", level, found).found.startswith("nsg: forward_via 10.0.0.3 ")


def test_a_host_that_redirects_servers_to_the_other_gateway(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    world.redirecting = {"lan0"}
    found = only(
        world, "inside", "warn", "nsg: forward_via 10.0.0.3 answers by lan0, where this host sends ICMP"
    )
    assert found.fix.endswith("all.send_redirects=0 net.ipv4.conf.lan0.send_redirects=0")
    world.there = False
    only(world, "inside", "fail", "does not answer")


def test_a_peer_without_an_inner_address(tmp_path: Path) -> None:
    world = a_world(tmp_path, TOML.replace(VIA, ""))
    fix = only(world, "inside", "warn", "nsg has no forward_via: SAs of home are not moved there").fix
    assert "announces = true" in fix and "--no-detour" in fix
    world.answers["conns"] = [{"name": name} for name in "gfedcba"] + [{"name": "home"}]
    assert "SAs of a, b, c, d, e, ... are" in only(world, "inside", "warn", "nsg has").found


def test_a_peer_without_an_inner_address_where_scripts_announce(tmp_path: Path) -> None:
    world = a_world(tmp_path, TOML.replace(VIA, "").replace('/updown"\n', '/updown"\nannounces = true\n'))
    found = {finding.check: (finding.level, finding.found) for finding in examine(world, CHECKS)}
    assert found["inside"] == ("ok", "nsg has no forward_via, and the scripts of home announce")


@pytest.mark.parametrize(
    ("online", "offline", "level"), [(100, 80, "ok"), (100, 91, "note"), (200, 54, "warn"), (254, 0, "warn")]
)
def test_a_pool_that_fills(tmp_path: Path, online: int, offline: int, level: str) -> None:
    world = a_world(tmp_path)
    pool = {"base": "10.9.0.0", "size": "254", "online": str(online), "offline": str(offline)}
    world.answers["pools"] = {"rw": pool}
    (finding,) = (finding for finding in examine(world, CHECKS) if finding.check == "pools")
    assert finding.level == level and f"{online + offline} of 254 addresses" in finding.found
    assert ("that ever connect" in finding.fix) == (level != "ok")
