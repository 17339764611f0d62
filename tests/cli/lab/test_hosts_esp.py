"""What the lab sees of SAs in a host's kernel, by the live kernel."""

from __future__ import annotations

import subprocess

import pytest

from ikectx_cli.lab.leftovers import of_sas
from ikectx_cli.lab.restoring import MADE
from tests.netns import Namespace

pytestmark = pytest.mark.kernel_esp

ENDS = "src 192.0.2.1 dst 192.0.2.2"
KEYS = f"enc cbc(aes) 0x{'00' * 16} auth hmac(sha256) 0x{'00' * 32}"


def test_sas_and_policies_are_both_seen() -> None:
    """A charon that crashed leaves both."""
    host = Namespace()
    with host.entered():
        assert of_sas(()) == ""
        host.run(f"ip xfrm state add {ENDS} proto esp spi 0x1001 mode tunnel {KEYS}")
        assert of_sas(()).strip() == "proto esp spi 0x00001001 reqid 0 mode tunnel"
        host.run(
            f"ip xfrm policy add src 10.0.0.0/24 dst 10.0.1.0/24 dir out tmpl {ENDS} proto esp mode tunnel"
        )
        seen = of_sas(())
        assert "spi 0x00001001" in seen and "dir out" in seen
        host.run("ip xfrm state flush")
        assert "spi 0x00001001" not in (seen := of_sas(())) and "dir out" in seen


def test_agents_keep_their_tables_when_a_network_is_put_back() -> None:
    host = Namespace()
    with host.entered():
        for table in ("inet ikectx", "ip nat", "inet ikectx_esp", "inet cut"):
            host.run(f"nft add table {table}")
        subprocess.run(["sh", "-c", MADE], check=True)
        assert host.run("nft list tables").splitlines() == [
            "table inet ikectx",
            "table inet ikectx_esp",
        ]
