"""What a mobile node's owner copies: the scripts parse, and ask for the right handovers."""

from __future__ import annotations

import configparser
import os
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
HOOK = EXAMPLES / "networkmanager" / "90-ikectx"
SCRIPT = EXAMPLES / "handover.sh"

NEAR = """\
# connection  gateway
office*       nsg

home          psg  at the end of the street
"""


@pytest.mark.parametrize("script", [HOOK, SCRIPT])
def test_scripts_parse_and_can_be_run(script: Path) -> None:
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)


def fake(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def run_hook(tmp_path: Path, *argv: str, **environment: str) -> str:
    """What the hook asked the agent for."""
    (tmp_path / "near").write_text(NEAR)
    asked = tmp_path / "asked"
    tool = fake(tmp_path, "ikectx", f'echo "$*" >> {asked}; echo moved')
    fake(tmp_path, "logger", f"cat > {tmp_path}/logged; touch {tmp_path}/over")
    done = subprocess.run(
        [HOOK, *argv],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "IKECTX_NEAR": str(tmp_path / "near"),
            "IKECTX": str(tool),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return asked.read_text().strip() if asked.exists() else ""


@pytest.mark.parametrize(
    ("argv", "environment", "asked"),
    [
        (
            ("wlan0", "up"),
            {"CONNECTION_ID": "office upstairs", "IP4_ADDRESS_0": "198.51.100.7/24 198.51.100.1"},
            "mobile handover --to nsg --address 198.51.100.7",
        ),
        (
            ("eth0", "up"),
            {"CONNECTION_ID": "home", "IP6_ADDRESS_0": "2001:db8::7/64 fe80::1"},
            "mobile handover --to psg --address 2001:db8::7",
        ),
        (("eth0", "up"), {"CONNECTION_ID": "home"}, "mobile handover --to psg"),
        (("eth0", "up"), {"CONNECTION_ID": "elsewhere"}, ""),
        (("eth0", "down"), {"CONNECTION_ID": "home"}, ""),
        (("ipsec0", "up"), {"CONNECTION_ID": "home"}, ""),
        (("", "hostname"), {}, ""),
    ],
)
def test_the_networkmanager_hook(
    tmp_path: Path, argv: tuple[str, ...], environment: dict[str, str], asked: str
) -> None:
    assert run_hook(tmp_path, *argv, **environment) == asked


def test_the_script(tmp_path: Path) -> None:
    events = [
        "2: eth0    inet 192.0.2.7/24 brd 192.0.2.255 scope global eth0\\       valid_lft forever",
        "Deleted 2: eth0    inet 192.0.2.7/24 brd 192.0.2.255 scope global eth0\\       valid_lft forever",
        "3: wlan0    inet6 fe80::7/64 scope link \\       valid_lft forever",
        "3: wlan0    inet6 2001:db8::7/64 scope global tentative dynamic \\       valid_lft 86400sec",
        "3: wlan0    inet6 2001:db8::7/64 scope global dynamic \\       valid_lft 86400sec",
        "4: docker0    inet 172.17.0.1/16 brd 172.17.255.255 scope global docker0\\       valid_lft forever",
    ]
    (tmp_path / "events").write_text("\n".join(events) + "\n")
    fake(tmp_path, "ip", f'[ "$*" = "-o monitor address" ] && cat {tmp_path}/events')
    fake(tmp_path, "ikectx", 'echo "ikectx $*"; [ "$4" = psg ]')
    done = subprocess.run(
        [SCRIPT, "wlan0=nsg", "eth0=psg"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert done.returncode == 0, done
    assert done.stdout.splitlines() == [
        "eth0 has 192.0.2.7: to psg",
        "ikectx mobile handover --to psg --address 192.0.2.7",
        "wlan0 has 2001:db8::7: to nsg",
        "ikectx mobile handover --to nsg --address 2001:db8::7",
    ]
    assert done.stderr == "failed with 1\n"
    assert subprocess.run([SCRIPT], capture_output=True, check=False).returncode == 2


def test_the_unit_runs_the_mobile_nodes_agent_before_charon() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(EXAMPLES / "systemd" / "ikectx-mobile.service")
    assert unit["Unit"]["Before"] == "strongswan.service"
    assert unit["Service"]["ExecStart"].endswith("ikectx mobile serve")
    assert unit["Service"]["Type"] == "notify"
