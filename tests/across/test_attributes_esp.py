"""A moved SA has each attribute that the new gateway's charon would have given it: real charons, kernel ESP.

The same mobile node's SA comes to nsg once by a move and once by a connection of its own, with settings of
swanctl.conf that end in the kernel. Then the SAs and policies of both are compared, all but what belongs to
one SA alone: SPIs, keys, counters, numbers, times.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import unified_diff

import pytest

from ikectx_cli.lab.config import Tunnel
from ikectx_cli.lab.hosts import Lab
from vici_bridge.vici.client import ControlClient, json_of

pytestmark = pytest.mark.kernel_esp

ITS_OWN = (
    r"spi 0x\w+ ?\(\w+\)",
    r"0x[0-9a-f]{32,}( \(\d+ bits\))?",
    r"reqid \d+ ?\(0x\w+\)",
    r"index \d+",
    r"seq(-hi)? 0x\w+",
    r"(?s)bitmap-length.*?(?=\n\t\w)",
    r"(?s)anti-replay context:.*?(?=\n\t[a-z])",
    r"(?s)lifetime current:.*?(?=\n\t\w|\Z)",
    r"(?s)stats:.*?(?=\n\t\w|\Z)",
    r"expire (add|use): .*",
)
"""What differs between two SAs that were negotiated in the same way."""

SETTINGS = {
    "headers, marks, limits": Tunnel(
        child={
            "copy_df": False,
            "copy_ecn": False,
            "copy_dscp": "in",
            "replay_window": 96,
            "tfc_padding": 1000,
            "set_mark_in": "0x10",
            "set_mark_out": "0x20/0xff",
            "priority": 200,
            "policies_fwd_out": True,
            "life_bytes": 1000000000,
            "rekey_bytes": 900000000,
            "rand_bytes": 0,
            "life_packets": 1000000,
            "rekey_packets": 900000,
            "rand_packets": 0,
        }
    ),
    "in UDP, compressed, SHA-256 of 96 bits": Tunnel(
        encap=True,
        esp="aes128-sha256",
        child={"copy_dscp": "yes", "ipcomp": True, "sha256_96": True, "replay_window": 0},
    ),
    "IPv6, extended numbers, no DSCP": Tunnel(
        family=6, inner=6, esp="aes128gcm16-esn", child={"copy_dscp": "no", "hw_offload": "auto"}
    ),
    "marks and interfaces": Tunnel(
        child={"mark_in": "0x1", "mark_out": "0x2/0xff", "if_id_in": 7, "if_id_out": 8, "copy_dscp": "out"}
    ),
    "BEET": Tunnel(mode="beet", child={"copy_dscp": "no"}),
    "transport": Tunnel(mode="transport", vip=False, shared=True, child={"copy_df": False}),
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    made = Lab.new(delay_ms=0)
    try:
        made.up(Tunnel())
        yield made
    finally:
        made.down()


def attributes(lab: Lab) -> dict[str, list[str]]:
    """nsg's SAs and policies, without what is an SA's own."""
    found = {}
    for what in ("state", "policy"):
        text = lab.command("nsg", ["ip", "-d", "-s", "xfrm", what]).stdout
        entries = re.split(r"(?m)^(?=src )", text)
        found[what] = sorted(shown for one in entries if (shown := _shared(one)))
    return found


def _shared(entry: str) -> str:
    if " action block" in entry or "socket" in entry:
        return ""
    for pattern in ITS_OWN:
        entry = re.sub(pattern, "", entry)
    return "\n".join(line.strip() for line in entry.splitlines() if line.strip())


def anew(lab: Lab, tunnel: Tunnel) -> None:
    """No SA is left, and the daemons have these settings."""
    if lab.tunnel.same_daemons(tunnel) and not lab.clear():
        lab.reload(tunnel)
    else:
        lab.configure(tunnel)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_moved_sa_is_like_one_that_was_negotiated_here(lab: Lab, name: str) -> None:
    tunnel = SETTINGS[name]
    anew(lab, tunnel)
    lab.connect("psg")
    query = {"to": "nsg", "address": "keep" if tunnel.shared else "update"}
    with ControlClient(str(lab.work / "psg" / "ikectx.vici"), timeout=60.0) as agent:
        answer = json_of(agent.stream("transfer", "transfer-progress", query))
    assert [one["result"] for one in answer["reports"]] == ["moved"], answer
    moved = attributes(lab)
    anew(lab, tunnel)
    lab.connect("nsg")
    own = attributes(lab)
    assert len(moved["state"]) >= 2 and len(moved["policy"]) >= 2  # one to forward by, too, in tunnel mode
    for what in moved:
        pairs = "\n".join(moved[what]).splitlines(), "\n".join(own[what]).splitlines()
        differs = "\n".join(unified_diff(*pairs, "moved", "negotiated", lineterm="", n=9))
        assert not differs, differs
