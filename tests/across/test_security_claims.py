"""docs/security.md names tests for what it claims: they are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "security.md").read_text()
MODEL = TEXT[TEXT.index("## Threat model") : TEXT.index("## A stranger")]
NAMED = sorted(set(re.findall(r"`((?:\w+/)+test_\w+\.py)(?:::(\w+))?`", MODEL)))


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda part: part or "whole")
def test_a_test_that_is_named_is_there(path: str, name: str) -> None:
    text = (TESTS / path).read_text()
    assert re.search(rf"def {name}\(" if name else r"def test_", text), f"{path} has no test {name}"


def test_a_scenario_that_is_named_is_there() -> None:
    found = set(re.findall(r"scenario `([\w-]+)`", MODEL))
    assert len(found) > 5
    assert [one for one in sorted(found) if not (TESTS / "scenarios" / one / "scenario.toml").is_file()] == []


def test_every_claim_names_a_test() -> None:
    rows = [line for line in MODEL.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    claims = [line for line in rows if not line.rstrip("| ").endswith("tested by")]
    assert len(claims) > 25
    assert [line for line in claims if "`" not in line.split(" | ")[-1]] == []
