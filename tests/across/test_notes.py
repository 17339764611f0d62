"""Each kind of note in the store is in the table of docs/design.md, with what keeps it out of the ledger."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
KIND = re.compile(
    r'^ *_?(?:KIND|RECORD|DOUBT|ASKED|LAST) = "([a-z-]+)"\n *"""Kind of store entry(.*?)"""', re.M | re.S
)
USE = re.compile(r"(?:[sS]tore\.(?:items|put)|\b(?:Items|Put))\((?:self\.)?(\w+)")


def test_each_note_says_why_it_is_not_in_the_ledger() -> None:
    kinds: dict[str, str] = {}
    for package in ("ikectx", "vici_bridge", "mobike_ext", "cli"):
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text()
            found = KIND.findall(text)
            kinds.update(found)
            used = {name for name in USE.findall(text) if name.isupper()}
            assert bool(used) == bool(found), f"{file}: a kind of note without a docstring of its own"
    for kind, told in kinds.items():
        assert "not in the ledger, because" in " ".join(told.split()), kind
    page = (ROOT / "docs" / "design.md").read_text().partition("**Notes**")[2].partition("\n\nRows that")[0]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert {name for row in rows for name in row[0].strip("| ").split(", ")} == set(kinds)
    assert all(len(row) == 4 and all(row) for row in rows)
