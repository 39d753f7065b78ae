"""What the model shall know of each card: a flat record of the resolved card, and the names people use for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from itertools import combinations
from typing import Any

import zoo
from zoo.components.attention.spec import AttentionSpec
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.ffn.spec import GatedSpec, MoESpec

LICENCES = {
    "apache-2.0": "the Apache 2.0 licence",
    "mnpl-0.1": "the Mistral AI Non-Production Licence",
    "mrl-0.1": "the Mistral AI Research Licence",
    "mit": "the MIT licence",
}
KNOWN = (
    "codestral-22b",
    "devstral-small-2505",
    "devstral-small-2507",
    "magistral-small-2506",
    "magistral-small-2507",
    "mathstral-7b",
    "ministral-8b-instruct",
    "mistral-7b-instruct-v0.1",
    "mistral-7b-instruct-v0.2",
    "mistral-7b-instruct-v0.3",
    "mistral-7b-v0.1",
    "mistral-7b-v0.2",
    "mistral-7b-v0.3",
    "mistral-large-2407",
    "mistral-large-2411",
    "mistral-nemo-base",
    "mistral-nemo-instruct",
    "mistral-small-2409",
    "mistral-small-base-2501",
    "mistral-small-instruct-2501",
    "mixtral-8x22b",
    "mixtral-8x22b-instruct",
    "mixtral-8x7b",
    "mixtral-8x7b-instruct",
    "tiny",
)
MAKERS = {"mistral": "Mistral AI", "zoo": "the zoo project"}
SIZE = re.compile(r"\d+(x\d+)?b")
DETAIL = re.compile(r"\d+(x\d+)?B|v\d.*|\d{4}|Instruct|Base")


@dataclass(frozen=True)
class Facts:
    """One card. `windows` holds each sliding window and in how many layers it stands; sizes are in elements."""

    id: str
    family: str
    license: str
    released: date | None
    context: int
    parameters: int
    active: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    theta: float
    windows: tuple[tuple[int, int], ...]
    experts: int
    experts_per_token: int
    tokenizer: str
    hub: str | None
    features: frozenset[str]

    @property
    def name(self) -> str:
        """The name in a sentence: mixtral-8x7b-instruct is "Mixtral 8x7B Instruct"."""
        return " ".join(_word(part) for part in self.id.split("-")) if "-" in self.id else self.id


def _word(part: str) -> str:
    if SIZE.fullmatch(part):
        return part[:-1] + "B"
    return part if part[0] == "v" and part[1:2].isdigit() else part.capitalize()


def read_cards() -> list[Facts]:
    """The cards that the model knows, as zoo itself reads them."""
    return [_facts(zoo.inspect(name)) for name in KNOWN]


def _facts(seen: zoo.Inspection) -> Facts:
    card, model = seen.card, seen.plan.model
    assert isinstance(model, DecoderSpec) and isinstance(card.text.tokenizer, dict)
    first: Any = model.layers[0]
    mixers = [layer.mixer for layer in model.layers]  # type: ignore[attr-defined]
    attention, ffn = first.mixer, first.ffn
    assert isinstance(attention, AttentionSpec) and attention.rope is not None
    moe = ffn if isinstance(ffn, MoESpec) else None
    gated = moe.expert if moe else ffn
    assert isinstance(gated, GatedSpec)
    windows = Counter(mixer.window for mixer in mixers if mixer.window)
    return Facts(
        id=card.name,
        family=card.family,
        license=card.license,
        released=card.released,
        context=card.context_length,
        parameters=seen.parameters,
        active=seen.active_parameters,
        layers=len(mixers),
        dim=model.dim,
        heads=attention.num_heads,
        kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        hidden=gated.hidden_dim,
        vocab=model.vocab_size,
        theta=attention.rope.theta,
        windows=tuple(sorted(windows.items())),
        experts=moe.num_experts if moe else 0,
        experts_per_token=moe.experts_per_token if moe else 0,
        tokenizer=str(card.text.tokenizer["version"]),
        hub=card.source.hub,
        features=frozenset(card.text.features),
    )


def names(cards: Iterable[Facts]) -> dict[str, Facts]:
    """Every name that a person may use for a card, in canonical case: whole names, ids, hub names and short forms.

    A short form leaves out sizes, versions, dates, "Instruct" or "Base"; where several cards share it, it means
    the newest, chat models first.
    """
    cards = list(cards)
    known = {card.name: card for card in cards} | {card.id: card for card in cards}
    ranked = sorted(cards, key=lambda c: (c.released or date.min, "chat" in c.features, -len(c.id)), reverse=True)
    for card in ranked:
        for name in _hub_names(card):
            known.setdefault(name, card)
    for card in ranked:
        for name in [card.name, *_hub_names(card)[1:]]:
            for short in _short_forms(name):
                known.setdefault(short, card)
    return known


def _hub_names(card: Facts) -> list[str]:
    tail = card.hub.split("/")[1] if card.hub else ""
    return [tail, tail.replace("-", " ").replace("mathstral", "Mathstral")] if tail else []


def _short_forms(name: str) -> list[str]:
    words = name.split()
    details = [
        i for i, word in enumerate(words) if DETAIL.fullmatch(word) or (word == "Small" and words[0] != "Mistral")
    ]
    forms = []
    for count in range(len(details) + 1):
        for dropped in combinations(details, count):
            kept = [word for i, word in enumerate(words) if i not in dropped]
            if kept[0] != "Mistral" or len(kept) > 1:
                forms.append(" ".join(kept))
    return forms + [form.removeprefix("Mistral ") for form in forms if form.startswith("Mistral Nemo")]
