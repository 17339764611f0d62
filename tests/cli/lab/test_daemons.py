"""IKE daemons other than charon in the lab."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from ikectx.errors import CharonError
from ikectx_cli.lab import daemons
from ikectx_cli.lab.config import PSK, Tunnel, write_credentials

STATES = """src 10.1.0.10 dst 10.2.1.2
\tproto esp spi 0xc71042d4 reqid 16389 mode tunnel
\treplay-window 0 flag af-unspec esn
src 10.2.1.2 dst 10.1.0.10
\tproto esp spi 0x75b6e2f4 reqid 16389 mode tunnel
src 10.1.0.10 dst 10.2.1.2
\tproto esp spi 0x00000000 reqid 0 mode tunnel
"""


@pytest.mark.parametrize("kind", daemons.KINDS)
def test_what_a_daemon_reads_is_for_it_alone(tmp_path: Path, kind: str) -> None:
    write_credentials(tmp_path)
    daemons.write(kind, tmp_path / "mn", Tunnel(daemon=kind))
    secret = [
        path for path in (tmp_path / "mn" / "etc").iterdir() if path.is_file() and PSK in path.read_text()
    ]
    assert secret
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}


def test_a_connection_for_each_gateway(tmp_path: Path) -> None:
    text = daemons.KINDS["libreswan"].files(Tunnel(connection={"mobike": False}, encap=True))["ipsec.conf"]
    psg, nsg = text.split("conn ")[1:]
    assert "right=10.2.1.2" in psg and "right=10.2.2.2" in nsg
    assert "mobike=no" in psg and "encapsulation=yes" in psg


def test_the_kernel_tells_what_another_daemon_has() -> None:
    (sa,) = daemons.listed("libreswan", STATES)
    assert sa["child-sas"] == {
        "net-75b6e2f4": {"name": "net", "state": "INSTALLED", "spi-in": "75b6e2f4", "spi-out": "c71042d4"}
    }
    assert daemons.listed("libreswan", "") == []


def test_a_package_that_is_not_unpacked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(daemons.UNPACKED, str(tmp_path))
    with pytest.raises(CharonError, match="usr/sbin/iked is not there"):
        daemons.words("openiked", tmp_path)


def test_only_hosts_with_charon_are_asked_by_vici() -> None:
    tunnel = Tunnel(daemon="libreswan", second=True)
    assert tunnel.others == {"mn": "libreswan"}
    assert tunnel.charons == ("mn2", "psg", "nsg")
    assert tunnel.hosts == ("mn", "mn2", "psg", "nsg")
    assert not tunnel.same_daemons(Tunnel(second=True))
