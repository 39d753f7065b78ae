"""The table of docs/parity.md, made of what the tests of every card have found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

Table = dict[str, tuple[str, tuple[float, ...]]]

HEAD = """# Parity

Every card, shrunk to a small model of the same structure, against the class of transformers that the published
checkpoint names: random weights, saved by that class in its own files, read by zoo, float32. A figure is the largest
difference between two logits over the largest logit: of a prompt read at once, in chunks of five tokens, and token by
token; and of what transformers computes from what zoo saves of the model, where the class's settings can be written.
Cards that see or hear are compared with images and sounds in the prompt. The tests ask for less than 1e-4.

Made on {date} by `make parity`, with torch {torch} and transformers {transformers}. Cards of one structure share their
figures. [Where transformers differs from a publisher](formats.md#where-transformers-differs-from-the-publisher), zoo
follows the publisher.

| card | class | at once | in chunks | by tokens | saved |
|---|---|---:|---:|---:|---:|
"""


@pytest.fixture(scope="session")
def parity_table() -> Iterator[Table]:
    """Filled by the tests. Written to the file that ZOO_PARITY_PAGE names when they are done."""
    table: Table = {}
    yield table
    page = os.environ.get("ZOO_PARITY_PAGE")
    if page:
        versions = {name: version(name).partition("+")[0] for name in ("torch", "transformers")}
        rows = [
            f"| `{name}` | `{kind}` | {' | '.join(f'{error:.0e}' for error in errors)} |\n"
            for name, (kind, errors) in sorted(table.items())
        ]
        head = HEAD.format(date=date.today().isoformat(), **versions)
        Path(page).write_text(head + "".join(rows), encoding="utf-8")
