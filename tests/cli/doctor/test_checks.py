"""`doctor`: each mistake in a world made for it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from ikectx.errors import CharonError, KernelError, LinkError
from ikectx_cli import commands
from ikectx_cli.config import parse
from ikectx_cli.doctor.checks import CHECKS, FOR_ROOT
from ikectx_cli.doctor.findings import Finding, examine
from ikectx_cli.doctor.world import PeerAnswer, UdpOwner
from ikectx_cli.settings import load
from tests.healthy_world import CHARON, HA, TOML, Fake, Pki, bad, only


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


@pytest.fixture
def world(tmp_path: Path, pki: Pki) -> Fake:
    (tmp_path / "ikectx.toml").write_text(TOML)
    (tmp_path / "state").mkdir(mode=0o700)
    pki.write(tmp_path)
    return Fake(parse(TOML, tmp_path / "ikectx.toml"))


def test_all_is_well(world: Fake) -> None:
    findings = examine(world, CHECKS)
    assert {finding.level for finding in findings} == {"ok"}
    assert {finding.check for finding in findings} == {name for name, _ in CHECKS} - {
        "kinds",
        "pools",
        "protection",
    }


def test_charon_is_away(world: Fake) -> None:
    for what in ("version", "stats", "conns", "pools"):
        world.answers[what] = CharonError("charon's VICI socket cannot be used", hint="start strongSwan")
    world.pids["charon"] = None
    findings = bad(world)
    assert findings[0] == Finding("charon", "fail", "charon's VICI socket cannot be used", "start strongSwan")
    for finding in findings[1:]:
        assert (finding.level, finding.found) == ("note", "not checked, because of charon")


def test_ha_plugin_missing_or_deaf(world: Fake) -> None:
    world.answers["stats"] = {"plugins": ["vici"]}
    fix = only(world, "ha plugin", "fail", "not loaded the ha plugin").fix
    assert "libcharon-extra-plugins" in fix
    assert "\n    local = 127.0.0.1\n    remote = 127.0.0.2\n    monitor = no\n" in fix
    assert world.ha is not None
    world.ha["load"] = "yes"
    fix = only(world, "ha plugin", "fail", "it has not been restarted").fix
    assert "after it: systemctl restart strongswan" in fix and "local =" not in fix
    world.answers["stats"] = {"plugins": ["ha"]}
    del world.owners["127.0.0.1"]
    only(world, "ha plugin", "fail", "does not listen on 127.0.0.1:4510")


@pytest.mark.parametrize(
    "key, value, level, found",
    [
        ("monitor", None, "fail", "monitor is yes, not no"),
        ("monitor", "yes", "fail", "monitor is yes, not no"),
        ("local", "127.0.0.9", "fail", "local is 127.0.0.9, not 127.0.0.1"),
        ("remote", None, "fail", "remote is not set, not 127.0.0.2"),
        ("resync", None, "warn", "resync is on"),
        ("secret", "hush", "fail", "secret is set"),
    ],
)
def test_ha_settings(world: Fake, key: str, value: str | None, level: str, found: str) -> None:
    assert world.ha is not None
    world.ha.pop(key, None)
    if value is not None:
        world.ha[key] = value
    finding = only(world, "ha settings", level, found)
    assert "hush" not in finding.found + finding.fix


def test_segments_are_what_charon_has_unless_somebody_says_otherwise(world: Fake) -> None:
    assert world.ha is not None
    world.ha["segment_count"] = "4"
    assert bad(world) == []
    world.config = replace(world.config, charon=replace(world.config.charon, segments=16))
    fix = only(world, "ha settings", "fail", "segment_count is 4, not 16").fix
    assert "\n    segment_count = 16\n" in fix


def test_ha_settings_unreadable(world: Fake) -> None:
    world.ha = None
    only(world, "ha settings", "note", "cannot be read")


def test_ha_socket(world: Fake) -> None:
    world.owners["127.0.0.2"] = UdpOwner(99, "nc")
    assert "gets the keys" in only(world, "ha socket", "fail", "taken by nc (pid 99)").found
    world.owners["127.0.0.2"] = UdpOwner(0, "a process that cannot be seen")
    assert bad(world) == []
    del world.owners["127.0.0.2"]
    only(world, "ha socket", "fail", "nobody listens")


AGENTS = ("ha version", "order", "kinds", "identities")
"""Checks that ask the agent what it knows."""


def test_agent_away_or_confused(world: Fake) -> None:
    world.answers["status"] = world.answers["list-contexts"] = LinkError("no agent listens", hint="start it")
    world.pids["agent"] = None
    del world.owners["127.0.0.2"]
    levels = {(finding.check, finding.level) for finding in bad(world)}
    assert levels == {("ha socket", "warn"), ("agent", "fail"), *((name, "note") for name in AGENTS)}
    world.answers["status"] = {"name": "other", "charon": {**CHARON, "reachable": False}}
    world.answers["list-contexts"] = []
    texts = [finding.found for finding in bad(world) if finding.check == "agent"]
    assert "has the name 'other'" in texts[0] and "cannot reach charon" in texts[1]


def test_charon_was_upgraded_under_the_agent(world: Fake) -> None:
    world.answers["version"] = {"daemon": "charon-systemd", "version": "6.0.1"}
    found = only(world, "ha version", "fail", "charon is 6.0.1 (HA wire version 4)")
    assert "takes it for 5.9.8 (3)" in found.found and "restart the agent" in found.fix
    problem = "charon 6.9.0 speaks HA wire version 9, this ikectx knows 3, 4, 5"
    world.answers["status"]["charon"] = {**CHARON, "ha_version": 9, "problem": problem}
    assert "upgrade ikectx" in only(world, "ha version", "fail", problem).fix


def test_sas_of_a_kind_that_stays(world: Fake) -> None:
    ah = {
        "name": "home",
        "ike_id": 7,
        "state": "ESTABLISHED",
        "known": True,
        "reason": "it is AH",
        "hint": "x",
    }
    world.answers["list-contexts"] = [ah, {**ah, "state": "PASSIVE"}]
    only(world, "kinds", "note", "home #7 cannot be moved: it is AH")


def test_message_ids_that_are_noted_wrongly_or_not_at_all(world: Fake) -> None:
    world.notes = False
    assert "restart the agent" in only(world, "message ids", "fail", "are not those that leave").fix
    world.notes = None
    only(world, "message ids", "warn", "are not noted")
    world.notes = KernelError("no raw socket", hint="run it as root")
    assert only(world, "message ids", "note", "no raw socket").fix == "run it as root"
    world.notes, world.pids["agent"] = None, None
    del world.owners["127.0.0.2"]
    assert ("message ids", "note") in {(item.check, item.level) for item in bad(world)}


def test_charon_started_before_the_agent(world: Fake) -> None:
    world.answers["list-contexts"] = [{"name": "home", "known": False}]
    assert (
        "came up while the agent was away"
        in only(world, "order", "warn", "1 SAs cannot be moved (home)").found
    )
    world.starts = {10: 200, 20: 100}
    assert "Before=strongswan.service" in only(world, "order", "warn", "charon started before").fix


def test_message_ids_that_nobody_noted(world: Fake) -> None:
    unnoted = {"name": "home", "known": False, "reason": "its message IDs are not known", "hint": "resync"}
    world.answers["list-contexts"] = [unnoted]
    finding = only(world, "order", "warn", "1 SAs cannot be moved (home): its message IDs are not known")
    assert finding.fix == "resync"


def test_capabilities(world: Fake) -> None:
    world.caps = 1 << 12
    only(world, "capabilities", "fail", "the agent has no CAP_NET_RAW")
    world.caps = 0
    only(world, "capabilities", "fail", "no CAP_NET_ADMIN and no CAP_NET_RAW")
    world.caps = None
    only(world, "capabilities", "note", "cannot be read")


def test_secret_files(world: Fake) -> None:
    world.config.transfer.key.chmod(0o640)
    assert "chmod 0600" in only(world, "secret files", "fail", "open to others (0640)").fix
    world.config.transfer.key.chmod(0o600)
    world.config.state_dir.chmod(0o755)
    assert "chmod 0700" in only(world, "secret files", "fail", "the store of keys").fix
    world.config.state_dir.chmod(0o700)
    os.chown(world.config.state_dir, 65534, -1)
    only(world, "secret files", "warn", "belongs to user 65534")
    world.user = 65534
    assert bad(world) == []


@pytest.mark.parametrize(
    "options, level, found",
    [
        ({"days": 29}, "warn", "expires in 29.0 days"),
        ({"days": -2, "since": 9}, "fail", "expired 2 days ago"),
        ({"since": -2}, "fail", "not valid yet"),
        ({"name": "gw7"}, "note", "holds gw7, not 'psg'"),
        ({"name": "psg", "dns": ["gw8.example"]}, "note", "holds gw8.example, not 'psg'"),
        ({"usages": [ExtendedKeyUsageOID.SERVER_AUTH]}, "fail", "not for clientAuth"),
    ],
)
def test_certificates(
    world: Fake, pki: Pki, tmp_path: Path, options: dict[str, Any], level: str, found: str
) -> None:
    pki.write(tmp_path, **options)
    only(world, "certificates", level, found)


def test_certificate_files(world: Fake, pki: Pki, tmp_path: Path) -> None:
    other = Pki()
    (tmp_path / "ca.pem").write_bytes(other.ca.public_bytes(serialization.Encoding.PEM))
    only(world, "certificates", "fail", "was not issued by a CA")
    pki.write(tmp_path)
    own = (tmp_path / "own.key").read_bytes()
    pki.write(tmp_path)
    (tmp_path / "own.key").write_bytes(own)
    only(world, "certificates", "fail", "is not the key of")
    (tmp_path / "own.key").write_text("no PEM")
    only(world, "certificates", "fail", "not PEM")
    (tmp_path / "own.key").unlink()
    only(world, "certificates", "fail", "No such file")


def test_revocation_lists(world: Fake, pki: Pki, tmp_path: Path) -> None:
    def expect(level: str, found: str, days: float, *numbers: int, expired: str = "refuse") -> None:
        pki.revoke(tmp_path, *numbers, days=days)
        toml = f'[transfer]\nrevocation_lists = ["ca.crl"]\nexpired_lists = "{expired}"'
        world.config = parse(TOML.replace("[transfer]", toml), tmp_path / "ikectx.toml")
        if level != "ok":
            only(world, "certificates", level, found)
        else:
            assert bad(world) == []

    expect("ok", "", 7)
    expect("warn", "due to be replaced in 1", 0.5)
    expect("fail", "3.0 days past its next update: peers are refused", -3)
    expect("warn", "past its next update, and counts", -3, expired="accept")
    own = x509.load_pem_x509_certificate((tmp_path / "own.pem").read_bytes())
    expect("fail", "of this gateway: its certificate was revoked on", 7, own.serial_number)
    (tmp_path / "ca.crl").write_text("no list")
    only(world, "certificates", "fail", "has no revocation list in PEM")
    (tmp_path / "ca.crl").unlink()
    only(world, "certificates", "fail", "ca.crl: No such file")


def test_what_strangers_can_do(world: Fake) -> None:
    world.stranger = ["connect to /run/ikectx.vici"]
    only(world, "ha socket", "fail", "a user without rights can connect to /run/ikectx.vici")
    world.stranger = ["bind 127.0.0.1:4510, and so on"]
    assert "ikectx.socket; set ha_users" in only(world, "ha socket", "fail", "can bind 127").fix
    world.stranger = None
    assert bad(world) == []
    world.owners["127.0.0.2"] = UdpOwner(1, "systemd")
    only(world, "ha socket", "warn", "systemd keeps 127.0.0.2:4510 for the agent")


def test_clock(world: Fake) -> None:
    os.utime(world.config.path, (world.time + 3600, world.time + 3600))
    only(world, "clock", "fail", "behind")


def test_kernel(world: Fake, tmp_path: Path) -> None:
    world.trials["ip"] = (False, "RTNETLINK answers: Protocol not supported")
    assert "esp4" in only(world, "kernel", "fail", "Protocol not supported").fix
    world.trials = {"ip": (None, "only root can try it"), "nft": (None, "only root can try it")}
    assert [finding.level for finding in bad(world)] == ["note", "note"]
    world.trials = {"nft": (False, "Operation not supported")}
    only(world, "kernel", "fail", "nftables does not work")
    world.tools = {"ip"}
    assert "nftables" in only(world, "kernel", "fail", "nft is missing").fix
    world.trials, world.tools = {}, {"nft"}
    only(world, "kernel", "fail", "ip is missing")


def test_user_space_esp(world: Fake, tmp_path: Path) -> None:
    text = TOML.replace("[gateway]", '[charon]\nesp = "libipsec"\n[gateway]')
    world.config = parse(text, tmp_path / "ikectx.toml")
    only(world, "kernel", "note", "user-space ESP")
    world.foreign = {"/dev/net/tun"}
    only(world, "kernel", "fail", "/dev/net/tun")


def test_where_mobile_nodes_ask(world: Fake, tmp_path: Path) -> None:
    text = TOML + '[mobile]\nlisten = ["192.0.2.1", "[2001:db8::1]:5091"]\n'
    asked = Fake(parse(text, tmp_path / "ikectx.toml"))
    assert bad(asked) == []
    asked.foreign = {"2001:db8::1"}
    only(asked, "addresses", "fail", "[mobile] listen: 2001:db8::1 is not an address of this machine")


def test_addresses(world: Fake) -> None:
    world.foreign = {"192.0.2.1"}
    assert [finding.found.split(":")[0] for finding in bad(world)] == [
        "[gateway] addresses",
        "[transfer] listen",
    ]


@pytest.mark.parametrize(
    "answer, found, fix",
    [
        (PeerAnswer(failed="Connection refused"), "Connection refused", "firewall"),
        (PeerAnswer(frozenset({"gw9"}), 0.0), "certificate for gw9", 'identity = "gw9"'),
        (PeerAnswer(frozenset(), 0.0), "certificate for nobody", "identity"),
        (PeerAnswer(frozenset({"nsg"}), 0.0, refused=True), "does not accept us", 'name = "psg"'),
        (PeerAnswer(frozenset({"nsg"}), 9e12), "not valid yet", "clock"),
        (PeerAnswer(frozenset({"nsg"}), 0.0, 1.0), "the certificate of nsg expired", "renew it"),
    ],
)
def test_peers(world: Fake, answer: PeerAnswer, found: str, fix: str) -> None:
    world.peer = answer
    assert fix in only(world, "peers", "fail", found).fix


def test_certificates_of_others_that_expire(world: Fake) -> None:
    world.peer = PeerAnswer(frozenset({"nsg"}), 0.0, world.time + 20 * 86400)
    only(world, "peers", "warn", "the certificate of nsg expires in 20.0 days")
    world.peer = PeerAnswer(frozenset({"nsg"}), 0.0, 9e12)
    world.time = x509.load_pem_x509_certificate(
        world.config.transfer.ca.read_bytes()
    ).not_valid_after_utc.timestamp()
    assert ("certificates", "warn") in {(item.check, item.level) for item in bad(world)}


def test_without_root(world: Fake) -> None:
    world.root = False
    findings = {finding.check: finding for finding in examine(world, CHECKS, FOR_ROOT)}
    assert not set(FOR_ROOT) & set(findings) and findings["agent"].level == "ok"
    assert findings["rights"].level == "warn" and "charon, ha plugin" in findings["rights"].found


def test_no_peers(world: Fake, tmp_path: Path) -> None:
    world.config = parse(TOML.partition("[[peer]]")[0], tmp_path / "ikectx.toml")
    only(world, "peers", "warn", "no [[peer]]")


def test_connections(world: Fake) -> None:
    world.answers["conns"] = []
    only(world, "connections", "warn", "no connection 'home'")
    world.answers["conns"] = [{"name": "home"}]
    world.swanctl["connections.a.b.children.net.updown"] = "/x"
    fix = only(world, "connections", "warn", "connection 'a.b' has an updown script").fix
    assert fix == 'write [connections.a.b] updown = "/x"'


def test_updown_scripts_that_nobody_runs(world: Fake, tmp_path: Path) -> None:
    path = tmp_path / "ikectx.toml"
    world.config = parse(f'updown_helper = "/run/helper"\n{TOML}', path)
    assert not bad(world)
    world.foreign = {"/run/helper"}
    fix = only(world, "connections", "fail", "nobody runs updown scripts: the socket /run/helper").fix
    assert fix == "systemctl enable --now ikectx-updown.socket"


def test_the_command(
    world: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("ikectx_cli.doctor.world.World", lambda config, control: world)
    args = ["--config", str(tmp_path / "ikectx.toml"), "doctor"]
    assert commands.run(args) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 note, 0 warn, 0 fail")
    world.answers["stats"] = {"plugins": []}
    assert commands.run(args) == 1
    assert (
        "fail ha plugin: charon has not loaded the ha plugin\n    apt-get install" in capsys.readouterr().out
    )
    assert world.ha is not None
    world.ha = {"monitor": "yes"}
    commands.run(args)
    assert (
        capsys.readouterr().out.count("\n    ha {\n        load = yes\n") == 2
    )  # one with how to install it
    world.ha = dict(HA)
    assert commands.run([*args, "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["ok"] is False
    assert {"check", "level", "found", "fix"} == set(value["findings"][0])


def test_the_sample_for_strongswan_passes(world: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Path(__file__).parent.parent.parent.parent / "examples" / "config" / "ha.conf"
    settings = {f"charon.plugins.{key}": setting for key, setting in load(str(sample)).items()}
    assert len(settings) == 6
    monkeypatch.setattr(world, "settings", lambda which: settings)
    assert [finding for finding in bad(world) if finding.check == "ha settings"] == []


def test_what_may_begin_an_sa_is_named(world: Fake) -> None:
    key = "connections.home.children.net.start_action"
    world.swanctl[key] = "trap|start"
    assert "home/net has start_action = trap|start" in only(world, "starts", "note", "may begin").found
    world.swanctl[key] = "none"
    assert bad(world) == []


def test_what_reauthentication_does_is_named(world: Fake) -> None:
    world.answers["list-contexts"] = [{"name": "home", "known": True, "warning": "home: ends its tunnel"}]
    only(world, "identities", "note", "ends its tunnel")
