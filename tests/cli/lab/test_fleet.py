"""What the charons of a lab are told that will have thousands of SAs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from ikectx_cli.lab.fleet import prepare
from ikectx_cli.lab.hosts import Lab
from ikectx_cli.lab.net import CHARONS, GATEWAYS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("libipsec", [False, True])
def test_charons_with_many_sas_find_them_by_hash_and_read_no_routes_where_they_need_none(
    tmp_path: Path, libipsec: bool
) -> None:
    lab = cast(Lab, SimpleNamespace(work=tmp_path))
    prepare(lab, "mn2", libipsec=libipsec)
    told = {path.parent.name: path.read_text() for path in tmp_path.glob("*/more-sas.conf")}
    assert set(told) == {*CHARONS, "mn2"}
    assert all("ikesa_table_size = 4096" in text for text in told.values())
    without = {"mn2"} if libipsec else {"mn2", *GATEWAYS}
    assert {host for host, text in told.items() if "install_routes = no" in text} == without
    assert {host for host, text in told.items() if "roam_events = no" in text} == {"mn2"}


def test_the_gateways_have_what_operators_are_told(tmp_path: Path) -> None:
    prepare(cast(Lab, SimpleNamespace(work=tmp_path)))
    text = (ROOT / "examples" / "config" / "many-sas.conf").read_text()
    told = {line.strip() for line in text.splitlines() if " = " in line}
    assert len(told) == 3
    for host in GATEWAYS:
        assert told <= {line.strip() for line in (tmp_path / host / "more-sas.conf").read_text().splitlines()}
