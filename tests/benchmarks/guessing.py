"""What guessing ahead costs where nothing is right, and gives where much is.

One random model, and one of a fraction of its size that guesses. Answers are written down beforehand: what both models
compute is replaced by the next written token, so that how many guesses are right is known, whatever the weights are.
All answers are made at once, each by an engine of its own that takes one step in turn, so that a drifting machine
moves all of them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.shapes import Shape
from tests.benchmarks.sides import Zoo
from zoo.engine.draft_model import DraftModel
from zoo.engine.engine import Engine
from zoo.engine.pack import Batch
from zoo.engine.request import Request, SamplingParams, Usage
from zoo.engine.runner import Runner

PROMPT = 256
PLAIN = "nothing"
CHANGED = 24
"""Tokens of a copied text up to the next one that is not copied."""


def scripted(runner: Runner, tokens: Sequence[int]) -> None:
    """Lets a model compute as always, and say the token after each position of a text instead."""
    run = runner.run

    @torch.inference_mode()
    def replaced(batch: Batch) -> Tensor:
        logits_RV, rows_R = run(batch), batch.rows_R
        positions = (batch.positions_T if rows_R is None else batch.positions_T[rows_R]).tolist()
        said_R = torch.tensor([tokens[position + 1] for position in positions], dtype=torch.int64)
        return logits_RV.zero_().scatter_(1, said_R[:, None], 1.0)

    runner.run = replaced  # type: ignore[method-assign]


@dataclass
class Answer:
    """One answer in the making. tokens: its prompt and what it says."""

    engine: Engine
    tokens: list[int]
    count: int
    steps: list[tuple[float, int]] = field(default_factory=list)
    usage: Usage | None = None

    def start(self) -> None:
        params = SamplingParams(max_tokens=self.count, ignore_eos=True)
        self.engine.submit(Request(self.tokens[:PROMPT], params))
        self.steps, self.usage = [], None

    def step(self) -> None:
        """One step, timed, once its first token is there."""
        start = time.perf_counter()
        for chunk in self.engine.step():
            self.steps.append((time.perf_counter() - start, len(chunk.tokens)))
            self.usage = chunk.completion.usage if chunk.completion else None

    @property
    def seconds_per_token(self) -> float:
        """After the first token."""
        return sum(seconds for seconds, _ in self.steps[1:]) / sum(tokens for _, tokens in self.steps[1:])


def measured(shape: Shape, count: int, rounds: int, **changes: Any) -> dict[str, Any]:
    """Seconds per token of answers of `count` tokens, and how often they are as fast as without guesses."""
    sides = [Zoo(each.card(**changes), weights="random", dtype="bfloat16") for each in (shape, smaller(shape))]
    answers = _answers(sides, shape.vocab, count)
    rates: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        for answer in answers.values():
            answer.start()
        while going := [answer for answer in answers.values() if answer.usage is None]:
            for answer in going:
                answer.step()
        rates.append({name: answer.seconds_per_token for name, answer in answers.items()})
    for side in sides:
        side.close()
    return {"prompt": PROMPT, "answer": count, "rows": [_row(name, answers[name], rates[1:]) for name in answers]}


def smaller(shape: Shape) -> Shape:
    """A shape of about a twentieth of the parameters."""
    return replace(
        shape,
        dim=shape.dim // 4,
        layers=max(1, shape.layers // 2),
        heads=shape.heads // 4,
        kv_heads=max(1, shape.kv_heads // 4),
        hidden=shape.hidden // 4,
    )


def _answers(sides: Sequence[Zoo], vocab: int, count: int) -> dict[str, Answer]:
    """By what guesses and what is said."""
    model, other = (side.model for side in sides)
    draw, length = torch.Generator().manual_seed(1), PROMPT + count + 1
    unlike: list[int] = torch.randint(3, vocab, (length,), generator=draw).tolist()
    pairs: list[int] = torch.randint(3, 11, (length,), generator=draw).tolist()
    copied = [unlike[place if place % CHANGED == 0 else place % PROMPT] for place in range(length)]
    always, often = ([3 + token % 7 if place % n == 0 else token for place, token in enumerate(unlike)] for n in (1, 5))

    def answer(draft: Any, said: list[int], guessed: Sequence[int] = ()) -> Answer:
        sizes: dict[str, Any] = {"max_context": len(said), "max_batch_size": 1, "prefix_cache": False}
        engine = Engine(model.module, model.plan, dtype=torch.bfloat16, draft=draft, **sizes)
        scripted(engine.parts[1], said)
        source = engine._scheduler.drafting and engine._scheduler.drafting.source
        if isinstance(source, DraftModel):
            scripted(source.runner, guessed)
        return Answer(engine, said, count)

    small = (other.module, other.plan)
    return {
        PLAIN: answer(None, unlike),
        "lookup, nothing repeats": answer("lookup", unlike),
        "lookup, pairs repeat, what follows differs": answer("lookup", pairs),
        "a model, always wrong": answer(small, unlike, always),
        f"lookup, a copy, each {CHANGED}th token changed": answer("lookup", copied),
        "a model, each 5th wrong": answer(small, unlike, often),
        "a model, always right": answer(small, unlike, unlike),
    }


def _row(name: str, answer: Answer, rates: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds, each beside the answer without guesses of its own round."""
    assert answer.usage is not None
    return {
        "guesses": name,
        "seconds_per_token": median(rate[name] for rate in rates),
        "speed": median(rate[PLAIN] / rate[name] for rate in rates),
        "drafted_tokens": answer.usage.drafted_tokens,
        "accepted_tokens": answer.usage.accepted_tokens,
    }
