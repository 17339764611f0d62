"""`doctor` where IPsec protects the connections between gateways."""

from __future__ import annotations

from pathlib import Path

import pytest

from ikectx.errors import KernelError, LinkError
from ikectx_cli.config import parse
from ikectx_cli.doctor.checks import CHECKS
from ikectx_cli.doctor.findings import Finding, examine
from ikectx_cli.doctor.world import PeerAnswer
from tests.healthy_world import IPSEC, VIA, Protected, bad, only


@pytest.fixture
def protected(tmp_path: Path) -> Protected:
    path = tmp_path / "ikectx.toml"
    path.write_text(IPSEC)
    (tmp_path / "state").mkdir(mode=0o700)
    return Protected(parse(IPSEC, path))


def test_protected_by_ipsec(protected: Protected) -> None:
    findings = examine(protected, CHECKS)
    assert {finding.level for finding in findings} == {"ok"}
    assert protected.protected[:2] == [
        "tcp between 192.0.2.1:49152 and 198.51.100.1:5091",
        "tcp between 192.0.2.1:5091 and 198.51.100.1:49152",
    ]
    found = {finding.check: finding.found for finding in findings}
    assert found["protection"] == "nsg (198.51.100.1): ESP protects tcp to and from 198.51.100.1"
    assert found["certificates"].startswith("not needed")
    assert found["peers"].endswith("is reached")


def unprotected(world: Protected, level: str, found: str) -> Finding:
    """What is said of the protection; the peer is not spoken to then."""
    first, second = bad(world)
    assert (first.check, first.level) == ("protection", level)
    assert found in first.found
    assert (second.check, second.level) == ("peers", "note")
    assert "not tried, because its connection" in second.found
    return first


def test_not_protected_by_ipsec(protected: Protected) -> None:
    protected.error = LinkError("no IPsec policy protects it", hint="in swanctl.conf: a child")
    assert unprotected(protected, "fail", "no IPsec policy").fix == "in swanctl.conf: a child"
    protected.error = KernelError("refused", hint="as root")
    unprotected(protected, "note", "not checked: refused")
    protected.error = None
    protected.plain = PeerAnswer(refused=True)
    assert "exactly one [[peer]]" in only(protected, "peers", "fail", "does not accept us").fix
    protected.plain = PeerAnswer(failed="Connection refused")
    only(protected, "peers", "fail", "Connection refused")


def test_peers_known_by_address(protected: Protected, tmp_path: Path) -> None:
    text = IPSEC + '[[peer]]\nname = "third"\naddress = "198.51.100.1:5092"\n' + VIA
    world = Protected(parse(text, tmp_path / "ikectx.toml"))
    only(world, "protection", "fail", "198.51.100.1 is the address of nsg and of third")
    text = IPSEC.replace("198.51.100.1", "nowhere.invalid")
    unprotected(Protected(parse(text, tmp_path / "ikectx.toml")), "fail", "nowhere.invalid")


def test_the_sa_between_the_gateways_is_not_to_be_moved(protected: Protected) -> None:
    gateways = {"name": "gateways", "known": False, "remote": "198.51.100.1:4500"}
    protected.answers["list-contexts"].append(gateways)
    assert not bad(protected)
    protected.answers["list-contexts"].append({**gateways, "name": "home", "remote": "203.0.113.7:4500"})
    only(protected, "order", "warn", "1 SAs cannot be moved (home)")
    protected.answers["list-contexts"].pop()
    protected.swanctl |= {
        "connections.gateways.remote_addrs": "198.51.100.1",
        "connections.gateways.children.cxtp.start_action": "trap",
    }
    assert not bad(protected)
    protected.swanctl["connections.gateways.remote_addrs"] = "%any"
    only(protected, "starts", "note", "gateways/cxtp has start_action = trap")
