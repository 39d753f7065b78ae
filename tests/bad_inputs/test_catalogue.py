"""How many cases there are, and that each says what it is about."""

from __future__ import annotations

import ast
from pathlib import Path

SECTIONS = sorted(Path(__file__).parent.glob("test_*.py"))


def cases(file: Path) -> list[str]:
    """The names of a section's cases: the keys of its tables, and its test functions that go through no table."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tables = {
        statement.target.id: [ast.literal_eval(key) for key in statement.value.keys if key is not None]
        for statement in tree.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(statement.value, ast.Dict)
    }
    functions = {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    tests = {name: text for name, text in functions.items() if name.startswith("test_")}
    found = [f"{table}: {key}" for table, keys in tables.items() for key in keys]
    alone = [name for name, text in tests.items() if not any(f"{table}[name]" in text for table in tables)]
    unused = [table for table in tables if not any(f"{table}[name]" in text for text in tests.values())]
    assert unused == [], f"{file.name}: tables that no test goes through"
    return found + alone


def test_there_are_enough() -> None:
    counts = {file.stem.removeprefix("test_"): len(cases(file)) for file in SECTIONS if file != Path(__file__)}
    assert counts.keys() == {"weights", "text", "generation", "extensions", "network", "machine"}
    assert sum(counts.values()) >= 250, counts
    assert min(counts.values()) >= 25, counts
