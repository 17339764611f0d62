"""A class's name tells a reader which class it is, wherever in the product it is met."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("ikectx", "vici_bridge", "mobike_ext", "cli")


def test_no_two_classes_of_the_product_have_one_name() -> None:
    names: Counter[str] = Counter()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            parsed = ast.walk(ast.parse(file.read_text()))
            names.update({node.name for node in parsed if isinstance(node, ast.ClassDef)})
    assert names["Gateway"] == 1
    assert [name for name, count in names.items() if count > 1] == []
