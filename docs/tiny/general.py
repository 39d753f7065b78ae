"""What the model knows beside single cards: general.yaml, with the names in braces filled from the cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from facts import Facts
from questions import Ways, billions, filled, gigabytes, licence, split


@dataclass(frozen=True)
class Entry:
    """One thing to know: the answer, the ways to ask for it, and frames to put names of it into."""

    answer: str
    ways: tuple[str, ...]
    frames: tuple[str, ...]
    names: tuple[str, ...]

    def templates(self, held_out: bool) -> Ways:
        """Ways to ask."""
        return split(self.ways, held_out), filled(self.frames, self.names, held_out)


def entries(cards: Sequence[Facts]) -> list[Entry]:
    """Everything in general.yaml. `cards` must hold `tiny`, whose own figures the model gives as "I have ..."."""
    tiny = next(card for card in cards if card.id == "tiny")
    others = [card for card in cards if card is not tiny]
    values = _own(tiny) | _lists(others) | _extremes(others)
    raw = yaml.safe_load(Path(__file__).with_name("general.yaml").read_text(encoding="utf-8"))
    return [_entry(item, raw, values) for item in raw["entries"]]


def _entry(item: dict[str, str], raw: dict[str, str], values: dict[str, str]) -> Entry:
    kind = next((kind for kind in ("concept", "command") if kind in item), None)
    frames, names = (raw[kind].splitlines(), item[kind].splitlines()) if kind else ([], [])
    return Entry(item["answer"].format_map(values), tuple(item["ways"].splitlines()), tuple(frames), tuple(names))


def _own(tiny: Facts) -> dict[str, str]:
    return {
        "parameters": billions(tiny.parameters),
        "active": billions(tiny.active),
        "experts": str(tiny.experts),
        "experts_per_token": str(tiny.experts_per_token),
        "layers": str(tiny.layers),
        "context": f"{tiny.context:,}",
        "window": f"{tiny.windows[0][0]:,}",
        "licence": licence(tiny),
        "memory": gigabytes(tiny),
        "heads": str(tiny.heads),
        "kv_heads": str(tiny.kv_heads),
    }


def _lists(cards: Sequence[Facts]) -> dict[str, str]:
    return {
        "windowed": _join([c for c in cards if c.windows]),
        "mixtures": _join([c for c in cards if c.experts]),
        "restricted": _join([c for c in cards if c.license != "apache-2.0"]),
        "fillers": _join([c for c in cards if "fim" in c.features]),
        "thinkers": _join([c for c in cards if "thinking" in c.features]),
    }


def _join(cards: Sequence[Facts]) -> str:
    found = [card.name for card in cards]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " and " + found[-1]


def _extremes(cards: Sequence[Facts]) -> dict[str, str]:
    largest = max(cards, key=lambda c: (c.parameters, -len(c.id)))
    smallest = min(cards, key=lambda c: (c.parameters, len(c.id)))
    dated = [(card.released, card.name) for card in cards if card.released]
    return {
        "largest": largest.name,
        "largest_size": billions(largest.parameters),
        "smallest": smallest.name,
        "smallest_size": billions(smallest.parameters),
        "newest": max(dated)[1],
        "longest": f"{max(card.context for card in cards):,}",
    }
