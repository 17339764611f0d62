"""mobile.toml: what is read, and that every mistake names file, line and key."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from textwrap import dedent

import pytest

from ikectx.errors import ConfigError
from ikectx.peer import HostPort
from ikectx_cli.config import CharonConfig, ControlConfig
from ikectx_cli.mobile.config import (
    MobileFile,
    config_path,
    load,
    parse,
)
from vici_bridge.mobile.node import GatewayEntry, MobileNode, MobileSettings

PATH = Path("/etc/ikectx/mobile.toml")
EXAMPLE = Path(__file__).parent.parent.parent.parent / "examples" / "config" / "mobile.toml"

MINIMAL = """\
[[gateway]]
name = "psg"
address = "192.0.2.1"

[[gateway]]
name = "nsg"
address = ["198.51.100.1", "2001:db8:2::1"]
cxtp = "nsg.example:5092"
"""


def test_a_minimal_file() -> None:
    config = parse(MINIMAL, PATH)
    psg = GatewayEntry("psg", (ip_address("192.0.2.1"),))
    nsg = GatewayEntry(
        "nsg", (ip_address("198.51.100.1"), ip_address("2001:db8:2::1")), HostPort("nsg.example", 5092)
    )
    assert config == MobileFile(
        MobileNode(PATH, (psg, nsg)), Path("/var/lib/ikectx"), ControlConfig(), CharonConfig()
    )


def test_every_key() -> None:
    text = (
        dedent("""\
        state_dir = "state"
        [control]
        socket = "/run/x.vici"
        group = "netdev"
        [charon]
        vici = "unix:///run/y.vici"
        esp = "libipsec"
        [mobile]
        addresses = ["203.0.113.7", "2001:db8::7"]
        retry = 0.5
        retry_max = 4
        give_up = 10
        lifetime = 30
        predictive = 90
        oseq_jump = 1024
        """)
        + MINIMAL
    )
    config = parse(text, PATH)
    assert config.state_dir == Path("/etc/ikectx/state")
    assert config.control == ControlConfig("/run/x.vici", "netdev")
    assert config.charon == CharonConfig(vici="unix:///run/y.vici", esp="libipsec")
    addresses = (ip_address("203.0.113.7"), ip_address("2001:db8::7"))
    assert config.node.settings == MobileSettings(addresses, 0.5, 4.0, 10.0, 30.0, 90.0, 1024)


def test_the_example_shows_the_defaults(tmp_path: Path) -> None:
    shown = load(EXAMPLE)
    assert [gateway.name for gateway in shown.node.gateways] == ["psg", "nsg"]
    uncommented = tmp_path / "mobile.toml"
    lines = EXAMPLE.read_text().splitlines()
    defaults = [line.removeprefix("# ") for line in lines if " = " in line or line.startswith("[")]
    left_out = ("group", "addresses", "cxtp")  # these have no default value to show
    text = "\n".join(line for line in defaults if line.split(" = ")[0] not in left_out)
    uncommented.write_text(text)
    config = load(uncommented)
    assert (config.control, config.charon, config.node.settings, config.state_dir) == (
        ControlConfig(),
        CharonConfig(),
        MobileSettings(),
        Path("/var/lib/ikectx"),
    )


def test_gateways_by_name_and_address() -> None:
    config = parse(MINIMAL, PATH).node
    psg, nsg = config.gateways
    assert config.gateway("nsg") is nsg
    assert config.gateway_at(ip_address("2001:db8:2::1")) is nsg
    assert config.gateway_at(ip_address("192.0.2.9")) is None
    assert (psg.address(4), psg.address(6)) == (ip_address("192.0.2.1"), None)
    assert psg.ask(4) == psg.ask(6) == HostPort("192.0.2.1", 5091)
    assert nsg.ask(6) == HostPort("nsg.example", 5092)
    with pytest.raises(ConfigError, match="no \\[\\[gateway\\]\\] named 'x'") as caught:
        config.gateway("x")
    assert caught.value.hint == "known: psg, nsg"


def test_a_file_that_cannot_be_read_says_how_to_name_another(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file") as caught:
        load(tmp_path / "none.toml")
    assert caught.value.hint.endswith("$IKECTX_MOBILE_CONFIG")


def test_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IKECTX_MOBILE_CONFIG", raising=False)
    assert config_path(None) == PATH
    monkeypatch.setenv("IKECTX_MOBILE_CONFIG", "/x.toml")
    assert config_path(None) == Path("/x.toml")
    assert config_path("y.toml") == Path("y.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "gateway is missing"),
        (MINIMAL + '[[gateway]]\nname = "psg"\naddress = "192.0.2.7"\n', "'psg' is there twice"),
        (MINIMAL + '[[gateway]]\nname = "x"\naddress = "192.0.2.1"\n', "192.0.2.1 is there twice"),
        (MINIMAL + '[[gateway]]\nname = "x"\naddress = []\n', "must not be empty"),
        (MINIMAL + '[[gateway]]\nname = "x"\n', "address is missing"),
        (
            MINIMAL + '[[gateway]]\nname = "x"\naddress = ["192.0.2.8", "192.0.2.9"]\n',
            "must be one address, or one IPv4",
        ),
        ("[mobile]\nretry = 9\nretry_max = 8\n" + MINIMAL, "retry must not be above retry_max"),
        ("[mobile]\nretries = 9\n" + MINIMAL, "mobile.retries is not known"),
        ("[mobile]\nlifetime = 301\n" + MINIMAL, "must be a number of seconds from 1 to 300"),
        ("[transfer]\n" + MINIMAL, "transfer is not known"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")) as caught:
        parse(text, PATH)
    assert str(caught.value).startswith(f"{PATH}:")
