"""`doctor` on a charon with many SAs."""

from __future__ import annotations

from pathlib import Path

import pytest

from ikectx_cli.config import parse
from ikectx_cli.doctor.many import MANY
from ikectx_cli.settings import Setting, load
from tests.healthy_world import TOML, Fake, bad

EXAMPLE = Path(__file__).parents[3] / "examples" / "config" / "many-sas.conf"


class Crowded(Fake):
    """A gateway with that many SAs, and these settings of charon besides."""

    def __init__(self, folder: Path, count: int, **settings: str) -> None:
        super().__init__(parse(TOML, folder / "ikectx.toml"))
        self.answers["stats"] = {"plugins": ["vici", "ha"], "ikesas": {"total": str(count)}}
        self.more = {f"charon.{key}": Setting(value, "") for key, value in settings.items()}

    def settings(self, which: str) -> dict[str, Setting] | None:
        known = super().settings(which)
        return known if known is None or which == "swanctl.conf" else {**known, **self.more}


def found(world: Fake) -> list[str]:
    return [finding.found for finding in bad(world) if finding.check == "many SAs"]


def test_the_defaults_are_for_few(tmp_path: Path) -> None:
    assert found(Crowded(tmp_path, MANY - 1)) == []
    table, routes = found(Crowded(tmp_path, MANY))
    assert f"{MANY} IKE_SAs in a table of 1 row" in table and "charon.install_routes" in routes


@pytest.mark.parametrize(
    "settings, notes",
    [
        ({"ikesa_table_size": "4096", "install_routes": "no"}, 0),
        ({"ikesa_table_size": "64", "install_routes": "no"}, 0),
        ({"ikesa_table_size": "32", "install_routes": "no"}, 1),
        ({"ikesa_table_size": "4096", "install_routes": "yes"}, 1),
        ({"ikesa_table_size": "4096"}, 1),
    ],
)
def test_each_setting_counts(tmp_path: Path, settings: dict[str, str], notes: int) -> None:
    assert len(found(Crowded(tmp_path, 1000, **settings))) == notes


def test_esp_in_user_space_needs_its_routes(tmp_path: Path) -> None:
    world = Crowded(tmp_path, 5000, ikesa_table_size="4096")
    world.answers["stats"]["plugins"].append("kernel-libipsec")
    assert found(world) == []


def test_what_it_says_to_write_satisfies_it(tmp_path: Path) -> None:
    world = Crowded(tmp_path, 5000)
    assert {EXAMPLE.name in finding.fix for finding in bad(world) if finding.check == "many SAs"} == {True}
    world.more = load(str(EXAMPLE), "")
    assert found(world) == []


def test_settings_that_cannot_be_read_are_not_judged(tmp_path: Path) -> None:
    world = Crowded(tmp_path, 5000)
    world.ha = None
    assert found(world) == []
