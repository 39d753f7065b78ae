"""What speculative decoding gives: the same answer with drafts and without, by turns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from zoo.bench.measure import random_prompts

if TYPE_CHECKING:
    from zoo.engine.request import Completion
    from zoo.model import Model

LEAST = 64
"""New tokens, where the context has room: drafts need something to go by."""


@dataclass(frozen=True)
class Guessing:
    """The answer to a prompt that says the same twice. tokens_per_second: medians, after the first token.

    drafted_tokens, accepted_tokens: of one answer; how many are right depends on what is asked more than on a machine.
    """

    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    without_drafts: float
    drafted_tokens: int
    accepted_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_guessing(model: Model, *, prompt_tokens: int, new_tokens: int, repeats: int = 3) -> Guessing:
    """Greedy, end tokens ignored; a first round does not count. For a model that was loaded with `draft`."""
    room = model.engine.sizes.max_context
    half = max(1, min(prompt_tokens, room // 2) // 2)
    prompt = 2 * random_prompts(model, 1, half)[0]
    count = min(max(new_tokens, LEAST), room - len(prompt))

    def answer(drafts: int | None) -> Completion:
        model.engine.reset_prefix_cache()
        return model.generate([prompt], max_tokens=count, ignore_eos=True, drafts=drafts)[0]

    rounds = [(answer(None), answer(0)) for _ in range(repeats + 1)][1:]
    guessed, plain = (median(c.timings.tokens_per_second for c in column) for column in zip(*rounds, strict=True))
    usage = rounds[-1][0].usage
    return Guessing(len(prompt), count, guessed, plain, usage.drafted_tokens, usage.accepted_tokens)
