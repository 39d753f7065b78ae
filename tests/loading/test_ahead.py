"""What is asked for before it is read: all of it, once, in order, and not far ahead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from zoo.loading import ahead
from zoo.loading.ahead import ReadAhead, Span

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """File, start and stop of each time that something was asked for, in small steps."""
    found: list[tuple[str, int, int]] = []

    def record(file: int, start: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        found.append((Path(f"/proc/self/fd/{file}").readlink().name, start, start + count))

    monkeypatch.setattr(os, "posix_fadvise", record)
    monkeypatch.setattr(ahead, "WINDOW", 20)
    monkeypatch.setattr(ahead, "STEP", 8)
    return found


def test_spans_are_asked_for_in_order_and_not_far_ahead(tmp_path: Path, asked: list[Any]) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(60))
    spans = [Span(tmp_path / "a", 3, 30), Span(tmp_path / "a", 30, 30), Span(tmp_path / "b", 10, 41)]
    with ReadAhead(spans) as reader:
        assert asked == [("a", 3, 11), ("a", 11, 19), ("a", 19, 27)]
        for read in range(1, 59):
            reader.has_read(1)
            assert sum(stop - start for _, start, stop in asked) < read + 20 + 8
    assert asked[3:] == [("a", 27, 30), ("b", 10, 18), ("b", 18, 26), ("b", 26, 34), ("b", 34, 41)]


def test_files_that_are_not_there_are_left_to_the_reader(tmp_path: Path, asked: list[Any]) -> None:
    (tmp_path / "b").write_bytes(bytes(60))
    with ReadAhead([Span(tmp_path / "a", 0, 16), Span(tmp_path / "b", 0, 4)]):
        assert asked == [("b", 0, 4)]


def test_nothing_changes_where_the_system_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    with ReadAhead([Span(tmp_path / "a", 0, 16)]) as reader:
        reader.has_read(16)
