"""What the charons of a lab are told that will have thousands of SAs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from ikectx_cli.lab.fleet import prepare
from ikectx_cli.lab.hosts import Lab
from ikectx_cli.lab.net import CHARONS


def test_charons_with_many_sas_find_them_by_hash_and_those_of_mobile_nodes_read_no_routes(
    tmp_path: Path,
) -> None:
    lab = cast(Lab, SimpleNamespace(work=tmp_path))
    prepare(lab, "mn2")
    told = {path.parent.name: path.read_text() for path in tmp_path.glob("*/more-sas.conf")}
    assert set(told) == {*CHARONS, "mn2"}
    assert all("ikesa_table_size = 4096" in text for text in told.values())
    assert {host for host, text in told.items() if "install_routes = no" in text} == {"mn2"}
