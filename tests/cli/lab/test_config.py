"""What the lab writes for its daemons."""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509

from ikectx_cli import config, settings
from ikectx_cli.lab import leftovers
from ikectx_cli.lab.config import Tunnel, gateway_conf, mobile_conf, strongswan_conf, write_all
from ikectx_cli.lab.net import CHARONS, GATEWAYS, MOBILES
from ikectx_cli.mobile import config as mobile_config

SHAPES = [
    Tunnel(),
    Tunnel(family=6, inner=6, auth="cert", encap=True),
    Tunnel(auth="eap", children=2, connection={"dpd_delay": "3s"}, child={"replay_window": 0}),
    Tunnel(initiator="gateway", vip=False, mode="transport", shared=True),
    Tunnel(inside="announce", forward_via=False),
    Tunnel(inside="bird"),
    Tunnel(family=6, mobile=True, by_packet=True, second=True, transfer={"collision": "rekey"}),
]


def read(path: Path) -> dict[str, str]:
    return {name: one.value for name, one in settings.load(str(path)).items()}


@pytest.mark.parametrize("tunnel", SHAPES)
def test_the_way_of_today_has_nobody_who_asks_for_sas_by_a_packet(tmp_path: Path, tunnel: Tunnel) -> None:
    write_all(tmp_path, tunnel.of_today("psk"), {})
    for host in GATEWAYS:
        assert config.load(tmp_path / host / "ikectx.toml").by_packet is None


@pytest.mark.parametrize("tunnel", SHAPES)
def test_every_file_reads(tmp_path: Path, tunnel: Tunnel) -> None:
    more = {"mn": "connections {\n psg {\n mobike = no\n }\n}\n", "nsg.strongswan": "charon { retry = 3 }\n"}
    write_all(tmp_path, tunnel, more)
    for host in tunnel.charons:
        conf, swan = read(tmp_path / host / "strongswan.conf"), read(tmp_path / host / "swanctl.conf")
        assert conf["charon-systemd.plugins.vici.socket"] == f"unix://{tmp_path}/{host}/charon.vici"
        assert (conf.get("charon-systemd.plugins.ha.monitor") == "no") == (
            host in (*GATEWAYS, *tunnel.agents, "mn2")
        )
        assert ("charon.retry" in conf) == (host == "nsg")
        assert swan["secrets.ike-lab.secret"]
    if tunnel.mobile:
        node = mobile_config.load(tmp_path / "mn" / "mobile.toml")
        assert {gateway.name for gateway in node.node.gateways} == set(GATEWAYS)
    mobile = read(tmp_path / "mn" / "swanctl.conf")
    assert mobile["connections.psg.mobike"] == "no"
    for host in GATEWAYS:
        swan = read(tmp_path / host / "swanctl.conf")
        assert swan["connections.mn.children.net.updown"] == f"{tmp_path}/{host}/updown"
        assert swan["connections.mn.children.net.esp_proposals"] == tunnel.esp
        assert ("connections.mn.children.net2.mode" in swan) == (tunnel.children == 2)
        agent = config.load(tmp_path / host / "ikectx.toml")
        assert agent.name == host and len(agent.peers) == 1
        assert agent.mobile is not None and (agent.by_packet is not None) == tunnel.by_packet
        assert agent.transfer.collision == tunnel.transfer.get("collision", "update")
        assert set(agent.connections) == set(MOBILES)
        assert agent.connections["mn"].announces == (tunnel.inside == "announce")
        for mobile in tunnel.mobiles:
            assert swan[f"connections.{mobile}.remote.id"] == f"{mobile}.example"
            assert swan.get(f"connections.{mobile}.pools") == (mobile if tunnel.vip else None)
        script = (tmp_path / host / "updown").read_text()
        assert ("/dev/udp/10.2." in script) == tunnel.shared
        assert ("/dev/udp/10.3." in script) == (tunnel.inside == "announce")
        assert ("examples/bird/updown" in script) == (tunnel.inside == "bird")
        assert len(agent.peers[0].forward_via) == 2 * tunnel.forward_via
        assert subprocess.run(["bash", "-n", tmp_path / host / "updown"], check=False).returncode == 0


def test_a_certificate_names_its_host_and_its_key_is_private(tmp_path: Path) -> None:
    write_all(tmp_path, Tunnel(), {})
    before = (tmp_path / "pki" / "ca.pem").read_bytes()
    write_all(tmp_path, Tunnel(), {})
    assert (tmp_path / "pki" / "ca.pem").read_bytes() == before
    root = x509.load_pem_x509_certificate(before)
    for host in CHARONS:
        found = x509.load_pem_x509_certificate((tmp_path / host / "x509" / "own.pem").read_bytes())
        found.verify_directly_issued_by(root)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert {host, f"{host}.example"} <= set(names.get_values_for_type(x509.DNSName))
        key = tmp_path / host / "private" / "own.pem"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_shapes_of_a_tunnel(tmp_path: Path) -> None:
    assert "vips = 10.4.0.10" in mobile_conf(Tunnel())
    bare = mobile_conf(Tunnel(vip=False, inner=6))
    assert "vips" not in bare and "local_ts = fd04::10/128" in bare
    assert "encap = yes" in mobile_conf(Tunnel(encap=True))
    assert "remote_addrs = fd02:9::1" in mobile_conf(Tunnel(shared=True, family=6))
    gateway = gateway_conf(tmp_path, "nsg", Tunnel(auth="eap", initiator="gateway", vip=False))
    assert "eap_id = %any" in gateway and "remote_addrs = 10.1.0.10" in gateway and "pools" not in gateway
    assert "local_ts" not in mobile_conf(Tunnel(mode="transport", vip=False))
    assert "stdout" not in strongswan_conf(tmp_path, "psg")
    assert "path = stdout" in strongswan_conf(tmp_path, "psg", polls=True)
    libipsec = strongswan_conf(tmp_path, "psg", libipsec=True)
    assert "kernel-libipsec kernel-netlink" in libipsec


def test_what_a_kernel_has_of_sas() -> None:
    shown = """src 10.4.0.10/32 dst 10.3.0.0/24
\tdir out priority 371327 ptype main
\ttmpl src 10.1.0.10 dst 10.2.1.2
\t\tproto esp spi 0xc0ffee02 reqid 1 mode tunnel
src 0.0.0.0/0 dst 0.0.0.0/0
\tsocket in priority 0 ptype main
src 10.1.0.10 dst 10.2.1.2
\tproto esp spi 0xc0ffee02 reqid 1 mode tunnel
\treplay-window 0
"""
    found = [line.split()[:3] for line in re.findall(leftovers.OF_SAS, shown)]
    assert found == [["dir", "out", "priority"], *[["proto", "esp", "spi"]] * 2]
    assert not re.findall(leftovers.OF_SAS, "".join(shown.splitlines(keepends=True)[4:6]))


def test_a_packet_that_waits_for_an_sa_is_none() -> None:
    shown = """src 10.2.2.2 dst 10.1.0.10
\tproto esp spi 0x00000000 reqid 1229651968 mode tunnel
\treplay-window 0
\tdir out
src 10.1.0.10 dst 10.2.1.2
\tproto esp spi 0xc0ffee02 reqid 1 mode tunnel
\tdir in
"""
    found = re.findall(leftovers.OF_SAS, re.sub(leftovers.WAITS, "", shown))
    assert [line.split()[:3] for line in found] == [["proto", "esp", "spi"], ["dir", "in"]]
