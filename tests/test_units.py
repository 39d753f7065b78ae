"""Bytes and counts as people read them."""

import pytest

from zoo.units import human_bytes, human_count


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (14_495_514_624, "13.5 GiB"), (3 << 40, "3.0 TiB")],
)
def test_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1_500, "1.5 K"), (7_248_023_552, "7.248 B"), (3e12, "3 T")]
)
def test_counts(count: float, text: str) -> None:
    assert human_count(count) == text
