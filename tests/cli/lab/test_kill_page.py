"""What `ikectx lab kills` prints and the page that is made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ikectx.errors import UsageError
from ikectx_cli.lab.kill_cases import cases
from ikectx_cli.lab.kill_page import merge, page, read, summarise

ONE, TWO, THREE = (one.name for one in cases("push")[:3])


def report(name: str, error: str = "", *warnings: str) -> dict[str, Any]:
    found = {"scenario": name, "ok": not error, "error": error, "warnings": list(warnings)}
    return {**found, "guest": "uml", "clock": "virtual", "strongswan": "5.9.8"}


def test_what_is_printed() -> None:
    found = summarise([report(ONE), report(TWO, "nobody\nserves | it")], "ikectx lab kills")
    assert (found["cases"], found["passed"], found["failed"]) == (2, 1, [TWO])
    assert read(json.dumps(found), "a.json") == found


def test_the_last_run_of_a_case_counts() -> None:
    first = summarise([report(ONE), report(TWO, "bad")], "one")
    second = summarise([report(TWO), report(THREE, "", "psg: `ikectx reclaim 12` was needed")], "two")
    found = merge([first, second])
    assert (found["cases"], found["passed"], found["failed"]) == (3, 3, [])
    assert found["commands"] == {THREE: ["psg: `ikectx reclaim 12` was needed"]}
    assert found["command"] == "one\ntwo"


def test_the_page_has_each_fault_and_what_failed() -> None:
    text = page(summarise([report(ONE), report(TWO, "nobody\nserves | it")], "ikectx lab kills"))
    assert "1 of 2 cases passed" in text
    assert f"| `{TWO}` | nobody serves / it |" in text
    assert "kill -9 of psg's agent" in text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cases": 1}', "{", '"x"'])
def test_a_file_that_is_something_else(text: str) -> None:
    with pytest.raises(UsageError, match=r"a\.json"):
        read(text, "a.json")
