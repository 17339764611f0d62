"""How long charon waits for a mobile node, from its own settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from ikectx_cli.config import CharonConfig
from ikectx_cli.settings import LEFT_QUIETLY, Setting, give_up, left_quietly, with_numbers, within_patience


def settings(**values: str) -> dict[str, Setting]:
    return {f"charon.retransmit_{key}": Setting(value, "strongswan.conf") for key, value in values.items()}


def test_when_charon_gives_up() -> None:
    assert round(give_up({})) == 165
    assert give_up(settings(tries="3", timeout="1.0", base="1.2")) == pytest.approx(5.368)
    assert give_up(settings(tries="3", timeout="1", base="10", limit="5")) == 16
    assert give_up(settings(tries="0", jitter="50")) == 2
    assert round(give_up(settings(tries="many", timeout=""))) == 165
    daemon = {"charon-systemd.retransmit_tries": Setting("0", ""), **settings(tries="5")}
    assert give_up(daemon) == 4


def test_less_than_charon_s_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "strongswan.conf"
    monkeypatch.setenv("STRONGSWAN_CONF", str(file))
    none = f"unix://{tmp_path}/charon.vici"
    assert left_quietly(none) == LEFT_QUIETLY  # not known
    file.write_text("charon {\n retransmit_tries = 3\n retransmit_timeout = 1\n retransmit_base = 1.2\n}\n")
    assert left_quietly(none) == pytest.approx(0.8 * 5.368)
    file.write_text("charon {\n}\n")
    assert left_quietly(none) == LEFT_QUIETLY


def test_a_mobile_node_is_asked_no_longer_than_charon_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "strongswan.conf"
    monkeypatch.setenv("STRONGSWAN_CONF", str(file))
    none = f"unix://{tmp_path}/charon.vici"
    assert within_patience(none, 5, 0.5) == (5, 0.5)  # 11.3 s of 165
    file.write_text("charon {\n retransmit_tries = 3\n retransmit_timeout = 1\n retransmit_base = 1.2\n}\n")
    assert within_patience(none, 5, 0.5) == (
        2,
        0.5,
    )  # 1.4 s, and charon repeats last at 3.6; three would take 3.0
    file.write_text("charon {\n retransmit_tries = 0\n retransmit_timeout = 0.5\n}\n")
    assert within_patience(none, 5, 0.5) == (1, pytest.approx(0.4))


def test_numbers_that_are_not_set_are_charons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "strongswan.conf"
    conf.write_text("charon { port = 700\n plugins { ha { segment_count = 16 } } }\n")
    monkeypatch.setenv("STRONGSWAN_CONF", str(conf))
    vici = f"unix://{tmp_path}/none.vici"
    found = with_numbers(CharonConfig(vici=vici))
    assert (found.port, found.port_nat_t, found.ha_buflen, found.segments) == (700, 4500, 2048, 16)
    found = with_numbers(CharonConfig(vici=vici, port=500, segments=3))
    assert (found.port, found.segments) == (500, 3)
    conf.unlink()
    assert with_numbers(CharonConfig(vici=vici)).segments == 1
