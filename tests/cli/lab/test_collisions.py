"""The arithmetic of colliding SPIs, against a simulation and by hand."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from ikectx.errors import UsageError
from ikectx_cli.lab.collisions import RANGE, expected, line, rows, simulate
from ikectx_cli.lab.commands import lab


def test_by_hand() -> None:
    # 1 SA onto 1, 4 SPIs: one in four
    found = expected(1, 1, 4)
    assert (found.one, found.any_one, found.many, found.any_many) == (0.25, 0.25, 0.25, 0.25)
    # 2 SAs of one gateway onto 1, 4 SPIs: 1/4 + 1/3; none: 3/4 * 2/3
    found = expected(2, 1, 4)
    assert found.one == pytest.approx(1 / 4 + 1 / 3)
    assert found.any_one == pytest.approx(1 / 2)
    # of two gateways: 1/4 + 2/4; none: 3/4 * 2/4
    assert found.many == pytest.approx(3 / 4)
    assert found.any_many == pytest.approx(1 - 3 / 8)


def test_the_two_forms_agree_where_the_range_is_wide() -> None:
    found = expected(1000, 1000)
    assert found.spis == RANGE == 1 << 28
    assert found.one == pytest.approx(1000 * 1000 / RANGE, rel=1e-5)
    assert found.any_one == pytest.approx(1 - math.exp(-found.approximate), rel=1e-4)


def test_long_sums_are_integrals(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = expected(2000, 500, 100_000)
    monkeypatch.setattr("ikectx_cli.lab.collisions._EXACT", 10)
    quick = expected(2000, 500, 100_000)
    assert quick.one == pytest.approx(exact.one, rel=1e-3)
    assert quick.any_one == pytest.approx(exact.any_one, rel=1e-3)
    assert quick.many == pytest.approx(exact.many)


@pytest.mark.parametrize(
    ("moved", "serving", "spis"), [(1000, 1000, 4096), (100, 100, 300), (50, 5, 64), (1, 1, 2)]
)
def test_the_simulation_agrees(moved: int, serving: int, spis: int) -> None:
    found = expected(moved, serving, spis)
    chance = simulate(moved, serving, spis, seed=7, runs=400)
    assert chance is not None
    assert abs(chance.one - found.one) < 5 * chance.one_error + 1e-9
    assert abs(chance.many - found.many) < 5 * chance.many_error + 1e-9


def test_the_simulation_is_the_same_for_each_seed() -> None:
    assert simulate(20, 20, 100, seed=3, runs=10) == simulate(20, 20, 100, seed=3, runs=10)
    assert simulate(20, 20, 100, seed=3, runs=10) != simulate(20, 20, 100, seed=4, runs=10)


@pytest.mark.parametrize(("moved", "serving", "spis"), [(-1, 0, 4), (0, -1, 4), (1, 1, 0), (3, 2, 4)])
def test_what_cannot_be(moved: int, serving: int, spis: int) -> None:
    with pytest.raises(UsageError):
        expected(moved, serving, spis)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(400, 100_000))
@settings(max_examples=200, deadline=None)
def test_probabilities_are_probabilities(moved: int, serving: int, spis: int) -> None:
    found = expected(moved, serving, spis)
    assert 0 <= found.any_one <= 1 and 0 <= found.any_many <= 1
    # at least one is never more likely than there are collisions to expect
    assert found.any_one <= found.one + 1e-9
    assert found.any_many <= found.many + 1e-9
    assert found.approximate <= found.one + 1e-9


def test_words() -> None:
    assert "0.000931" in line(500, 500)
    table = rows(expected(10, 10, 100), simulate(10, 10, 100, runs=5))
    assert len(table) == 4
    assert all(len(row) == 3 for row in table)
    assert "5 runs" in table[-1][0]


def test_the_command() -> None:
    runner = CliRunner()
    words = ["collisions", "--moved", "100", "--serving", "50", "--range", "1000", "--runs", "50"]
    shown = runner.invoke(lab, words)
    assert shown.exit_code == 0, shown.output
    assert "from one gateway" in shown.output and "simulated, mean of 50 runs" in shown.output
    told = json.loads(runner.invoke(lab, [*words, "--json"]).output)
    assert told["expected"]["approximate"] == 5.0
    assert abs(told["simulated"]["one"] - told["expected"]["one"]) < 2


def test_what_would_take_minutes_is_not_simulated() -> None:
    words = ["collisions", "--moved", "100000000", "--serving", "5"]
    shown = CliRunner().invoke(lab, words)
    assert shown.exit_code == 0, shown.output
    assert "simulated" not in shown.output
    told = json.loads(CliRunner().invoke(lab, [*words, "--json"]).output)
    assert told["simulated"] is None
    assert told["expected"]["moved"] == 100_000_000
