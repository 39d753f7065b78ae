"""Questions about one card, and their answers: one sentence per topic with the card's own figures.

The ways to ask stand in questions.yaml. Every sixth way is kept out of training, to measure what is understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from facts import LICENCES, MAKERS, Facts

HELD_OUT_EVERY = 6

Say = Callable[[Facts], str]
Ways = tuple[list[str], list[str]]
"""Whole questions, and frames with a noun filled in."""
Pieces = Callable[[Facts], tuple[str, ...]]


@dataclass(frozen=True)
class Topic:
    """One thing to ask of a card. `pieces` gives what a right answer must hold."""

    key: str
    nouns: tuple[str, ...]
    ways: tuple[str, ...]
    follow_ups: tuple[str, ...]
    answer: Say
    pieces: Pieces


@dataclass(frozen=True)
class Questions:
    """All topics, the frames that nouns are put into, and the ways to repeat a question for another card."""

    topics: tuple[Topic, ...]
    frames: tuple[str, ...]
    follow_up_frames: tuple[str, ...]
    again: tuple[str, ...]

    def templates(self, topic: Topic, held_out: bool) -> Ways:
        """Ways to ask with the card's name in them."""
        return split(topic.ways, held_out), filled(self.frames, topic.nouns, held_out)

    def follow_ups(self, topic: Topic, held_out: bool) -> Ways:
        """Ways to ask about the card of the turn before."""
        return split(topic.follow_ups, held_out), filled(self.follow_up_frames, topic.nouns, held_out)


def split(ways: Sequence[str], held_out: bool) -> list[str]:
    """The ways kept for training, or those held out."""
    return [way for i, way in enumerate(ways) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out]


def filled(frames: Sequence[str], nouns: Sequence[str], held_out: bool) -> list[str]:
    """Every noun in every frame kept for training, or in every one held out."""
    return [re.sub("{[nx]}", noun, frame) for frame in split(frames, held_out) for noun in nouns]


def load() -> Questions:
    """questions.yaml joined with the answers below; every topic stands in both."""
    raw = yaml.safe_load(Path(__file__).with_name("questions.yaml").read_text(encoding="utf-8"))
    assert raw["topics"].keys() == ANSWERS.keys(), raw["topics"].keys() ^ ANSWERS.keys()
    topics = tuple(
        Topic(
            key,
            tuple(text.get("nouns", "").splitlines()),
            tuple(text["ways"].splitlines()),
            tuple(text["follow_ups"].splitlines()),
            *ANSWERS[key],
        )
        for key, text in raw["topics"].items()
    )
    frames, follow_ups, again = (tuple(raw[k].splitlines()) for k in ("frames", "follow_up_frames", "again"))
    return Questions(topics, frames, follow_ups, again)


def billions(count: int) -> str:
    """A number of parameters in words: 46.7 billion, 2.9 million."""
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def gigabytes(card: Facts) -> str:
    """Bytes of the weights in bfloat16, in words."""
    size = 2 * card.parameters
    return f"{size / 1e9:.1f} gigabytes" if size >= 1e9 else f"{size / 1e6:.1f} megabytes"


def licence(card: Facts) -> str:
    return LICENCES[card.license]


def day(card: Facts) -> str:
    return f"{card.released.day} {card.released:%B %Y}" if card.released else "no date"


def _describe(card: Facts) -> str:
    kind = "a dense model"
    if card.experts:
        kind = f"a mixture of {card.experts} experts per layer, {card.experts_per_token} of them active for each token"
    return (
        f"{card.name} is {kind}, made by {MAKERS[card.family]}. "
        f"It has {billions(card.parameters)} parameters and a context of {card.context:,} tokens."
    )


def _experts(card: Facts) -> str:
    if not card.experts:
        return f"{card.name} is a dense model: it has no experts."
    return (
        f"{card.name} has {card.experts} experts in each layer, and each token uses {card.experts_per_token} of them."
    )


def _experts_pieces(card: Facts) -> tuple[str, ...]:
    return (f"{card.experts} experts", f"uses {card.experts_per_token} of") if card.experts else ("no experts",)


def _parameters(card: Facts) -> str:
    active = f", of which each token uses {billions(card.active)}" if card.experts else ""
    return f"{card.name} has {billions(card.parameters)} parameters{active}."


def _window(card: Facts) -> str:
    if not card.windows:
        return f"{card.name} has no sliding window: every layer sees the whole context."
    size, count = card.windows[0]
    if count == card.layers:
        return f"{card.name} has a sliding window of {size:,} tokens in every layer."
    return (
        f"{card.name} has a sliding window of {size:,} tokens in {count} of its {card.layers} layers; "
        "the others see the whole context."
    )


def _window_pieces(card: Facts) -> tuple[str, ...]:
    return (f"window of {card.windows[0][0]:,}",) if card.windows else ("no sliding window",)


def _hidden(card: Facts) -> str:
    what = "Each expert" if card.experts else "The feed-forward layer"
    return f"{what} of {card.name} has a hidden size of {card.hidden:,}."


def _released(card: Facts) -> str:
    return f"{card.name} was released on {day(card)}." if card.released else f"The card of {card.name} gives no date."


def _hub(card: Facts) -> str:
    if card.hub is None:
        return f"The weights of {card.name} come with zoo; nothing needs to be fetched."
    return f"The weights of {card.name} are on the Hugging Face hub at {card.hub}."


def _pull(card: Facts) -> str:
    return f"To fetch the weights of {card.name}, type: zoo pull {card.id}" if card.hub else _hub(card)


def _chat(card: Facts) -> str:
    if "chat" in card.features:
        return f"To chat with {card.name}, type: zoo chat {card.id}"
    return f"{card.name} is a base model: it continues text and was not tuned for chat."


def _tuned(card: Facts) -> str:
    return f"{card.name} was tuned for chat." if "chat" in card.features else f"{card.name} is a base model."


def _feature(feature: str, yes: str, no: str) -> tuple[Say, Pieces]:
    return (
        lambda card: f"{card.name} {yes if feature in card.features else no}.",
        lambda card: (yes if feature in card.features else no,),
    )


def _says(sentence: str, *pieces: str) -> tuple[Say, Pieces]:
    """A sentence and its pieces as formats of `c`, the card."""
    return lambda card: sentence.format(c=card), lambda card: tuple(piece.format(c=card) for piece in pieces)


ANSWERS: dict[str, tuple[Say, Pieces]] = {
    "describe": (_describe, lambda c: (f"{billions(c.parameters)} parameters", f"{c.context:,} tokens")),
    "experts": (_experts, _experts_pieces),
    "parameters": (_parameters, lambda c: (f"{billions(c.parameters)} parameters",)),
    "context": _says("{c.name} has a context of {c.context:,} tokens.", "context of {c.context:,} tokens"),
    "licence": (lambda c: f"{c.name} is under {licence(c)}.", lambda c: (licence(c),)),
    "released": (_released, lambda c: (day(c),)),
    "tokenizer": _says("{c.name} uses version {c.tokenizer} of the Mistral tokenizer.", "version {c.tokenizer} of"),
    "window": (_window, _window_pieces),
    "layers": _says("{c.name} has {c.layers} layers.", "has {c.layers} layers"),
    "dim": _says("{c.name} has a dimension of {c.dim:,}.", "dimension of {c.dim:,}."),
    "heads": _says(
        "{c.name} has {c.heads} query heads, which share {c.kv_heads} key/value heads.",
        "{c.heads} query heads",
        "{c.kv_heads} key/value heads",
    ),
    "head_dim": _says("Each attention head of {c.name} has a size of {c.head_dim}.", "size of {c.head_dim}."),
    "hidden": (_hidden, lambda c: (f"hidden size of {c.hidden:,}.",)),
    "vocab": _says("{c.name} has a vocabulary of {c.vocab:,} tokens.", "vocabulary of {c.vocab:,} tokens"),
    "theta": _says("{c.name} uses rope with a theta of {c.theta:,.0f}.", "theta of {c.theta:,.0f}."),
    "hub": (_hub, lambda c: (c.hub or "come with zoo",)),
    "run": _says('To run {c.name}, type: zoo run {c.id} --prompt "Hello"', "zoo run {c.id} --prompt"),
    "chat": (_chat, lambda c: (f"zoo chat {c.id}" if "chat" in c.features else "base model",)),
    "pull": (_pull, lambda c: (f"zoo pull {c.id}" if c.hub else "come with zoo",)),
    "tools": _feature("tools", "can call tools", "was not taught to call tools"),
    "fim": _feature("fim", "can fill in the middle", "was not taught to fill in the middle"),
    "chatty": (_tuned, lambda c: ("tuned for chat" if "chat" in c.features else "base model",)),
    "system": _feature("system", "takes a system prompt", "takes no system prompt"),
    "memory": (lambda c: f"The weights of {c.name} take {gigabytes(c)} in bfloat16.", lambda c: (gigabytes(c),)),
    "maker": (lambda c: f"{c.name} was made by {MAKERS[c.family]}.", lambda c: (f"by {MAKERS[c.family]}",)),
    "id": _says("{c.name} has a card in zoo: {c.id}.", ": {c.id}."),
}
