"""A dry run tells whose virtual IP charon may give to another mobile node."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from ikectx_cli.leases import full, warned
from tests.cli.test_move_log import REPORT

MINE, OTHER = ip_address("10.9.0.2"), ip_address("10.8.0.2")


def pool(online: int, offline: int) -> dict[str, object]:
    return {"base": "10.9.0.1", "size": "3", "online": str(online), "offline": str(offline)}


@pytest.mark.parametrize(("online", "offline", "warns"), [(1, 1, False), (1, 2, True), (3, 0, True)])
def test_a_full_pool_is_named_for_its_own_addresses_only(online: int, offline: int, warns: bool) -> None:
    pools = {"six": {"base": "2001:db8::", "size": "1", "online": "1"}, "mobile": pool(online, offline)}
    assert full(pools, MINE) == ("mobile" if warns else "")
    for elsewhere in (OTHER, ip_address("10.9.0.4"), ip_address("10.9.0.0"), ip_address("::10.9.0.2")):
        assert full(pools, elsewhere) == ""
    (report,) = warned([REPORT], {REPORT.sa: (MINE, OTHER)}, pools)
    assert (report != REPORT) == warns
    if warns:
        assert report.text.startswith(REPORT.text) and "may get 10.9.0.2, too" in report.why
        assert report.why in report.text


def test_what_would_be_refused_is_told_as_it_is() -> None:
    refused = replace(REPORT, exit_code=4)
    assert warned([refused], {REPORT.sa: (MINE,)}, {"mobile": pool(3, 0)}) == [refused]
    assert warned([REPORT], {}, {"mobile": pool(3, 0)}) == [REPORT]
