"""A small card, written to a file and changed by replacing text."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.registry.card import Card, load_card

CARD = """\
name: small
context_length: 64
model:
  dim: 16
  vocab_size: 32
  norm: {kind: rms, eps: 1.0e-5}
  layers:
    - repeat: 2
      mixer: {kind: attention, num_heads: 4, num_kv_heads: 2, head_dim: 4, rope: {theta: 1.0e4}}
      ffn: {kind: gated, hidden_dim: 24}
"""


@pytest.fixture
def card_text() -> str:
    return CARD


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Card]:
    """Writes a text as `small.yaml` in the current folder and loads it; errors then name `small.yaml:<line>`."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "small.yaml") -> Card:
        Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
        return load_card(f"./{name}")

    return write


@pytest.fixture
def changed(write: Callable[..., Card]) -> Callable[[str, str], Card]:
    """The small card with one piece of its text replaced."""

    def changed(old: str, new: str) -> Card:
        assert old in CARD
        return write(CARD.replace(old, new, 1))

    return changed
