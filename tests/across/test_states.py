"""docs/states.md is what the state tables of the code say."""

from __future__ import annotations

from ikectx.engine import tables
from tests import states


def test_the_page_is_current() -> None:
    assert states.main(["--check"]) == 0


def test_a_table_is_drawn_whole() -> None:
    chart = states.chart("t", "w", tables, tables.SOURCE_TABLE, tables.SOURCE_FINAL)
    assert len(chart.rows) == len(tables.SOURCE_TABLE)
    text = "\n".join([*states.picture(chart), *states.text(chart)])
    for state in tables.SourceState:
        assert str(state) in text
    assert "released --> cleaning: accepted" in text
    assert chart.final == {str(state) for state in tables.SOURCE_FINAL}


def test_every_machine_is_on_the_page() -> None:
    titles = [one.title for one in states.charts()]
    assert len(set(titles)) == len(titles) == 10
    for one in states.charts():
        assert one.start in {state for state, *_ in one.rows}
        assert one.final
