"""How many cases there are."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).parent
SECTIONS = ("weights", "text", "generation", "extensions", "network", "machine")


def cases(section: str) -> list[str]:
    """A section's cases: the keys of the tables that tests are parametrized by, and the tests that go through none."""
    tree = ast.parse((FOLDER / f"test_{section}.py").read_text(encoding="utf-8"))
    tables = {
        ast.unparse(statement.target): [ast.literal_eval(key) for key in statement.value.keys if key is not None]
        for statement in tree.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Dict)
    }
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    marks = {test.name: " ".join(map(ast.unparse, test.decorator_list)) for test in tests}
    used = [name for name in tables if any(f", {name})" in mark for mark in marks.values())]
    alone = [test for test, mark in marks.items() if not any(f", {name})" in mark for name in used)]
    return [f"{name}: {key}" for name in used for key in tables[name]] + alone


def test_there_are_enough() -> None:
    counts = {section: len(cases(section)) for section in SECTIONS}
    assert sum(counts.values()) >= 300, counts
    assert min(counts.values()) >= 25, counts


def test_each_is_another() -> None:
    for section in SECTIONS:
        found = cases(section)
        assert len({*found}) == len(found)
