"""The nftables rule of those who may send to the HA addresses."""

from __future__ import annotations

import pytest

from ikectx.errors import KernelError
from vici_bridge.kernel import ha_users


def test_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(ha_users, "run_nft", told.append)
    ha_users.HaUsers(["root"], 990, ["127.0.0.2", "::1"], 4510).install()
    assert told[0].splitlines()[-2:] == [
        "add rule inet ikectx_ha out ip daddr 127.0.0.2 udp dport 4510 meta skuid != { 0, 990 } counter drop",
        "add rule inet ikectx_ha out ip6 daddr ::1 udp dport 4510 meta skuid != { 0, 990 } counter drop",
    ]
    with pytest.raises(KernelError, match="no user 'no-such-user'"):
        ha_users.HaUsers(["no-such-user"], 0, ["127.0.0.2"], 4510)
