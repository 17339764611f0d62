"""What keeps the product readable: class names, arguments, short modules, and a map of its folders."""

from __future__ import annotations

import ast
import functools
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FILES = [
    file
    for package in ("ikectx", "vici_bridge", "mobike_ext", "cli")
    for file in sorted((ROOT / package).rglob("*.py"))
]
ARGUMENTS = 8
LINES = 600


@functools.cache
def parsed(file: Path) -> ast.Module:
    """All files are parsed once, because that takes seconds."""
    return ast.parse(file.read_text())


@functools.cache
def classes() -> list[tuple[str, ast.ClassDef]]:
    """Each class of the product, with its module."""
    return [(str(file.relative_to(ROOT)), node) for file in FILES for node in _classes(parsed(file).body)]


def _classes(body: Iterable[ast.stmt]) -> Iterator[ast.ClassDef]:
    """Those of a module, and those in its classes and functions."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.If):
            yield from _classes(node.body)


def test_no_two_classes_of_the_product_have_one_name() -> None:
    names = Counter(node.name for _, node in classes())
    assert names["Gateway"] == 1
    assert [name for name, count in names.items() if count > 1] == []


def test_no_constructor_takes_more_than_eight_arguments() -> None:
    """Those that are written out; a dataclass is a record, whose fields are given by name then."""
    found: dict[str, int] = {}
    for module, node in classes():
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                taken = method.args
                own = len(taken.posonlyargs) + len(taken.args) + len(taken.kwonlyargs) - 1
                found[f"{module} {node.name}"] = own
    assert found["ikectx/gateway.py Gateway"] == ARGUMENTS
    assert {name: count for name, count in found.items() if count > ARGUMENTS} == {}
    made = [*dict.fromkeys(node.name for _, node in classes()), "cls"]
    many = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in FILES
        if "lab" not in file.parts
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Call) and len(node.args) > ARGUMENTS
        if isinstance(node.func, ast.Name) and node.func.id in made
    ]
    assert many == [], "more than eight in an order"


def test_no_function_takes_more_than_eight_arguments_in_an_order() -> None:
    """Those of a command are its options, which click gives by name."""
    many = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if len(node.args.posonlyargs) + len(node.args.args) > ARGUMENTS
        if not any("command" in ast.unparse(one) for one in node.decorator_list)
    ]
    assert many == []


def test_nothing_asks_an_object_whether_it_has_a_method() -> None:
    """A port has plain methods, with defaults for those that a daemon may lack."""
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == "hasattr" or (node.func.id == "getattr" and isinstance(node.args[1], ast.Constant))
    ]
    assert found == []


def test_cryptographic_primitives_come_from_one_package() -> None:
    """The lab's checksums of files are none."""
    found = {
        f"{file.relative_to(ROOT)} {name}"
        for file in FILES
        if "lab" not in file.parts
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([one.name for one in node.names] if isinstance(node, ast.Import) else [node.module])
        if name in ("hmac", "hashlib", "crypt")
    }
    assert found == set()


def test_no_module_has_more_than_six_hundred_lines() -> None:
    found = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: count for name, count in found.items() if count > LINES} == {}


def test_a_few_contracts_say_who_may_import_whom_and_a_page_has_all_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert len(settings["tool"]["importlinter"]["contracts"]) <= 6
    listing = (ROOT / "docs" / "design.md").read_text().partition("    ikectx/\n")[2].partition("\n\n")[0]
    folders = {str(file.parent.relative_to(ROOT)) for file in FILES if file.parent.parent != ROOT}
    assert [folder for folder in sorted(folders) if f" {Path(folder).name}/ " not in listing] == []
