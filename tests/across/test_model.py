"""The transfer's model, checked by spin: it has the rows of the code, is right, and finds what is wrong."""

from __future__ import annotations

import pytest

from ikectx.engine.tables import (
    SOURCE_TABLE,
    TARGET_TABLE,
    SourceAction,
    SourceInput,
    SourceState,
    TargetAction,
    TargetInput,
    TargetState,
)
from tests.model.promela import check, model, name, rows

S, SI, SA = SourceState, SourceInput, SourceAction
T, TI, TA = TargetState, TargetInput, TargetAction


def test_the_models_transitions_are_those_of_the_tables() -> None:
    code = {
        (name(a, state), name(b, what), name(a, after), "|".join(name(c, one) for one in todo) or "0")
        for table, (a, b, c) in ((SOURCE_TABLE, ("S", "SI", "SA")), (TARGET_TABLE, ("T", "TI", "TA")))
        for (state, what), (after, *todo) in table.items()
    }
    assert rows(model(1)) == code


def test_two_faults_make_no_second_owner_and_lose_no_sa() -> None:
    found = check(model(2))
    assert (found.errors, found.complete) == (0, True), found.trail
    assert found.states > 80_000


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({(S.RELEASED, SI.TIMEOUT): (S.THAWING, SA.THAW)}, {}),
        ({}, {(T.OWNING, TI.FAILED): (T.ABORTED, TA.ANSWER)}),
        ({}, {(T.PREPARED, TI.TIMEOUT): (T.PREPARED, TA.SEND_CTC)}),
    ],
    ids=["takes back too early", "denies what it may send", "waits for ever"],
)
def test_spin_finds_a_wrong_row(
    source: dict[tuple[SourceState, SourceInput], tuple[SourceState, SourceAction]],
    target: dict[tuple[TargetState, TargetInput], tuple[TargetState, TargetAction]],
) -> None:
    assert check(model(1, {**SOURCE_TABLE, **source}, {**TARGET_TABLE, **target})).errors
