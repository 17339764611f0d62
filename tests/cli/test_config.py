"""The configuration file: what is read, and that every mistake names file, line and key."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import ConfigError
from ikectx.peer import HostPort
from ikectx_cli.config import (
    ByPacketConfig,
    CharonConfig,
    Config,
    ControlConfig,
    GatewayConfig,
    MobileSection,
    PeerSection,
    TransferConfig,
    config_path,
    load,
    parse,
)
from vici_bridge.policy.allowed import Rules

PATH = Path("/etc/ikectx/ikectx.toml")

MINIMAL = """\
name = "psg"

[gateway]
addresses = ["192.0.2.1", "2001:db8::1"]

[transfer]
listen = ["192.0.2.1:5091"]
certificate = "psg.pem"
key = "psg.key"
ca = "/etc/ssl/ca.pem"
"""

FULL = (
    MINIMAL
    + """\
oseq_jump = 2048
late_seconds = 3
prepare_timeout = 10
mn_tries = 4
mn_timeout = 0.25
concurrency = 4

[control]
socket = "/run/other.vici"
group = "vpn"

[charon]
vici = "unix:///run/other-charon.vici"
ha_local = "127.0.0.3"
ha_remote = "127.0.0.4"
ha_port = 4511
segments = 2
esp = "libipsec"

[connections.home]
updown = "/usr/lib/ipsec/_updown"
handover_to = "nsg"
announces = true
agents = true
local_ids = ["psg.example"]
virtual_ips = ["10.9.0.0/16", "10.8.0.1-10.8.0.9"]
ike_proposals = ["aes128-sha256-x25519"]
esp_proposals = "null-sha256"

[connections."with.dot"]

[[peer]]
name = "nsg"
address = "198.51.100.1:5092"
rights = ["push", "pull"]
forward_via = ["10.0.0.3"]
connections = ["home"]
identities = ["*@example.org"]
connects_from = ["203.0.113.0/28", "2001:db8::7"]

[[peer]]
name = "third"
identity = "vpn3.example"
address = "2001:db8::3"
"""
)


def test_minimal() -> None:
    config = parse(MINIMAL, PATH)
    assert config.name == "psg"
    assert config.state_dir == Path("/var/lib/ikectx")
    assert config.control.socket == "/run/ikectx.vici"
    assert config.charon.kernel_esp and config.charon.segments == 0
    assert config.gateway.addresses == (ip_address("192.0.2.1"), ip_address("2001:db8::1"))
    assert config.transfer.listen == (HostPort("192.0.2.1", 5091),)
    assert config.transfer.certificate == Path("/etc/ikectx/psg.pem")
    assert config.transfer.ca == Path("/etc/ssl/ca.pem")
    assert (config.transfer.oseq_jump, config.transfer.late_seconds, config.transfer.mn_timeout) == (
        65536,
        5,
        0.5,
    )
    with pytest.raises(ConfigError, match="nsg"):
        config.peer("nsg")


def test_full() -> None:
    config = parse(FULL, PATH)
    assert config.control.group == "vpn"
    assert (config.charon.ha_local, config.charon.ha_port, config.charon.kernel_esp) == (
        "127.0.0.3",
        4511,
        False,
    )
    assert config.transfer.concurrency == 4
    assert config.connections["home"].handover_to == "nsg"
    assert config.connections["home"].agents and not config.connections["with.dot"].agents
    assert config.connections["home"].announces and not config.connections["with.dot"].announces
    assert config.connections["with.dot"].updown is None
    rules = config.connections["home"].rules
    assert rules.local_ids == ("psg.example",)
    assert [str(each) for each in rules.virtual_ips] == ["10.9.0.0-10.9.255.255", "10.8.0.1-10.8.0.9"]
    assert [str(each) for each in (*rules.ike, *rules.esp)] == ["aes128-sha256-x25519", "null-sha256"]
    assert config.peers[0].identities == ("*@example.org",) and config.peers[0].connections == ("home",)
    assert config.connections["with.dot"].rules == Rules()
    nsg, third = config.peers
    assert nsg.rights == ("push", "pull") and nsg.forward_via == (ip_address("10.0.0.3"),)
    assert [str(each) for each in nsg.connects_from] == ["203.0.113.0/28", "2001:db8::7/128"]
    assert third.connects_from == ()
    assert nsg.address == HostPort("198.51.100.1", 5092)
    assert nsg.identity == "nsg" and third.identity == "vpn3.example"
    assert third.rights == ("push",)
    assert third.address == HostPort("2001:db8::3", 5091)
    assert config.peer("third") is third
    assert (nsg.host, nsg.port) == ("198.51.100.1", 5092) and str(third.address) == "[2001:db8::3]:5091"
    named = parse(FULL.replace("198.51.100.1:5092", "gw.example.org:1"), PATH).peers[0]
    assert named.address == HostPort("gw.example.org", 1)


def test_mobile_nodes_and_packets_are_served_only_where_the_file_says_so() -> None:
    assert parse(MINIMAL, PATH).mobile is None and parse(MINIMAL, PATH).by_packet is None
    config = parse(
        FULL + '[mobile]\nlisten = "[2001:db8::1]"\nrfc_token = true\nsource_rate = 0.5\n'
        '[by_packet]\nask = ["third", "nsg"]\n',
        PATH,
    )
    assert config.mobile == MobileSection((HostPort("2001:db8::1"),), source_rate=0.5, rfc_token=True)
    assert config.by_packet == ByPacketConfig(("third", "nsg"))
    with pytest.raises(ConfigError, match=r"by_packet.ask 'fourth' is not a \[\[peer\]\]"):
        parse(FULL + '[by_packet]\nask = "fourth"\n', PATH)


def test_ipsec_between_gateways_needs_no_certificates() -> None:
    text = re.sub(r"(?m)^(certificate|key|ca) = .*\n", "", MINIMAL)
    with pytest.raises(ConfigError, match="certificate is missing"):
        parse(text, PATH)
    config = parse(text.replace("[transfer]", '[transfer]\ntransport = "ipsec"\nprotocol = "sctp"'), PATH)
    assert (config.transfer.transport, config.transfer.protocol) == ("ipsec", "sctp")
    with pytest.raises(ConfigError, match="sctp"):
        parse(MINIMAL.replace("[transfer]", '[transfer]\nprotocol = "sctp"'), PATH)


def replaced(old: str, new: str) -> str:
    assert old in FULL
    return FULL.replace(old, new, 1)


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


@pytest.mark.parametrize(
    "text, meant", [("true", "ike"), ("false", "no"), ("'child'", "child"), ("'ike'", "ike"), ("'no'", "no")]
)
def test_what_is_rekeyed_after_a_move(text: str, meant: str) -> None:
    config = parse(replaced("concurrency = 4", f"rekey_after = {text}"), PATH)
    assert config.transfer.rekey_after == meant


@pytest.mark.parametrize(
    "old, new, key, why",
    [
        ('name = "psg"', "", "name", "is missing"),
        ('name = "psg"', "name = 7", "name", "must be a text"),
        ('name = "psg"', 'name = "p sg"', "name", "letters"),
        ('["192.0.2.1", "2001:db8::1"]', "[]", "gateway.addresses", "must not be empty"),
        ('["192.0.2.1", "2001:db8::1"]', '["192.0.2.256"]', "gateway.addresses", "must be an IP address"),
        ('["192.0.2.1", "2001:db8::1"]', '["::1", "::1"]', "gateway.addresses", "twice"),
        ('"192.0.2.1:5091"', '"192.0.2.1:99999"', "transfer.listen", "as in"),
        ('"192.0.2.1:5091"', '"gw.example:5091"', "transfer.listen", "as in"),
        ('key = "psg.key"', "", "transfer.key", "is missing"),
        ('key = "psg.key"', "key = true", "transfer.key", "must be a text"),
        ("concurrency = 4", "rekey_after = 'esp'", "transfer.rekey_after", "'no' or 'child' or 'ike'"),
        ("oseq_jump = 2048", "oseq_jump = 0", "transfer.oseq_jump", "from 1 to"),
        ("oseq_jump = 2048", "oseq_jump = 1048577", "transfer.oseq_jump", "from 1 to 1048576"),  # B18
        ("oseq_jump = 2048", "oseq_jump = true", "transfer.oseq_jump", "whole number"),
        ("mn_timeout = 0.25", 'mn_timeout = "1"', "transfer.mn_timeout", "number of seconds"),
        ("mn_timeout = 0.25", "mn_timeout = nan", "transfer.mn_timeout", "number of seconds"),
        ("late_seconds = 3", "late_second = 3", "transfer.late_second", "is not known"),
        ('"/run/other.vici"', '"other.vici"', "control.socket", "absolute"),
        ('"unix:///run/other-charon.vici"', '"tcp://1.2.3.4"', "charon.vici", "unix socket"),
        ('ha_local = "127.0.0.3"', 'ha_local = "127.0.0.4"', "charon.ha_local", "differ"),
        ('esp = "libipsec"', 'esp = "user"', "charon.esp", "'kernel' or 'libipsec'"),
        ("segments = 2", "segments = 17", "charon.segments", "from 0 to 16"),
        ('"10.9.0.0/16"', '"10.9.0.0/99"', "connections.home.virtual_ips", "must be a network"),
        ('"10.8.0.1-10.8.0.9"', '"10.8.0.9-10.8.0.1"', "connections.home.virtual_ips", "must be a network"),
        ('"203.0.113.0/28"', '"203.0.113.1/28"', "peer.connects_from", "without host bits"),
        ('"null-sha256"', '"default"', "connections.home.esp_proposals", "no algorithm known here"),
        ('handover_to = "nsg"', 'handover_to = "nsh"', "connections.home.handover_to", "not a"),
        (
            '[connections."with.dot"]',
            '[connections."with.dot"]\nup = 1',
            'connections."with.dot".up',
            "not known",
        ),
        ('name = "nsg"', 'name = "psg"', "peer.name", "itself"),
        ('name = "third"', 'name = "nsg"', "peer.name", "twice"),
        ('rights = ["push", "pull"]', 'rights = ["shove"]', "peer.rights", "'push' or 'pull'"),
        ('address = "2001:db8::3"', "", "peer.address", "is missing"),
        ('address = "2001:db8::3"', "address = [1]", "peer.address", "text"),
        ('address = "2001:db8::3"', 'address = "1.2.3"', "peer.address", "as in"),
        ('address = "2001:db8::3"', 'address = "a b:5"', "peer.address", "as in"),
        ('address = "2001:db8::3"', 'address = "host:0"', "peer.address", "as in"),
    ],
)
def test_mistakes_name_file_line_and_key(old: str, new: str, key: str, why: str) -> None:
    text = replaced(old, new)
    with pytest.raises(ConfigError) as caught:
        parse(text, PATH)
    message = str(caught.value)
    place, _, rest = message.partition(": ")
    assert place.startswith(f"{PATH}:")
    assert rest.startswith(f"{key} ") and why in rest
    number = int(place.rsplit(":", 1)[1])
    leaf = key.rsplit(".", 1)[-1]
    if "missing" in why:
        table = {
            "name": 1,
            "key": line_of(text, "[transfer]"),
            "address": line_of(text, 'name = "third"') - 1,
        }
        assert number == table[leaf], message
    else:
        assert text.splitlines()[number - 1].strip().startswith(leaf), message


def test_hints() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(replaced("late_seconds = 3", "late_second = 3"), PATH)
    assert caught.value.hint == "did you mean late_seconds?"
    with pytest.raises(ConfigError) as caught:
        parse("peers = 1\n" + FULL, PATH)
    assert caught.value.hint == "did you mean peer?"


@pytest.mark.parametrize(
    "text, line",
    [("name = \n", 1), ('name = "a"\n\n[gateway\n', 3), ("a = 1\na = 2\n", 2), ('x = """\n', 2)],
)
def test_not_toml(text: str, line: int) -> None:
    with pytest.raises(ConfigError, match=f"^{PATH}:{line}: not TOML"):
        parse(text, PATH)


def test_a_number_that_python_does_not_read_is_not_toml() -> None:
    with pytest.raises(ConfigError, match="too many digits"):
        parse("a = " + "1" * 5000, PATH)


@pytest.mark.parametrize(
    "section", ["gateway = 1", "peer = 1", "peer = [1]", "connections = []", "control = 'x'"]
)
def test_sections_of_the_wrong_kind(section: str) -> None:
    key = section.partition(" ")[0]
    table = '[gateway]\naddresses = ["192.0.2.1", "2001:db8::1"]\n'
    assert table in MINIMAL
    text = section + "\n" + MINIMAL.replace(table, "" if key == "gateway" else table)
    with pytest.raises(ConfigError, match=f"^{PATH}:1: {key} must be"):
        parse(text, PATH)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="No such file") as caught:
        load(tmp_path / "none.toml")
    assert caught.value.hint.endswith("$IKECTX_CONFIG")
    with pytest.raises(ConfigError, match="directory"):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "latin.toml")
    (tmp_path / "ok.toml").write_text(MINIMAL)
    assert isinstance(load(tmp_path / "ok.toml"), Config)
    monkeypatch.delenv("IKECTX_CONFIG", raising=False)
    assert config_path(None) == PATH
    monkeypatch.setenv("IKECTX_CONFIG", "/x.toml")
    assert config_path(None) == Path("/x.toml")
    assert config_path("/y.toml") == Path("/y.toml")


ROOT = Path(__file__).parent.parent.parent


def test_the_sample_shows_every_key_with_its_default() -> None:
    text = (ROOT / "examples" / "config" / "ikectx.toml").read_text()
    sample = parse(text, PATH)
    assert sample.peers[0].name == "nsg" and sample.connections["home"].handover_to == "nsg"
    given_all = parse(re.sub(r"(?m)^# (?=[a-z_]+ = )", "", text), PATH)
    assert replace(given_all, control=sample.control, updown_helper=None) == sample
    assert sample.mobile is not None and sample.by_packet is not None and sample.by_packet.ask == ("nsg",)
    for kind in (
        ControlConfig,
        CharonConfig,
        GatewayConfig,
        TransferConfig,
        MobileSection,
        ByPacketConfig,
        PeerSection,
    ):
        assert all(f"{key} = " in text for key in kind.__slots__), kind


def test_the_readme_configures() -> None:
    snippets = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    configs = [parse(dedent(snippet), PATH) for snippet in snippets]
    assert "pull" in configs[0].peer("nsg").rights


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_gives_a_config_or_one_clear_error(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(FULL) - 1))
    length = data.draw(st.integers(0, 12))
    junk = data.draw(st.text(st.sampled_from("[]{}=\"'.#\n 09ax-"), max_size=6))
    try:
        parse(FULL[:at] + junk + FULL[at + length :], PATH)
    except ConfigError as error:
        assert str(error).startswith(f"{PATH}:")
