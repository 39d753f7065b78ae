"""What a run needs of memory, reckoned before anything is loaded: weights, cache, and what a step holds in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from zoo.components.kinds import KINDS, quantised, weight_bytes
from zoo.costs.work import BYTES, Work, chunk_tokens
from zoo.loading.hub.types import human_bytes
from zoo.registry.errors import CapacityError, RequestError

PROCESS_BYTES = 320 << 20
"""Python, torch and zoo themselves, before a model."""

COPIES = 4
"""Of the residual stream that a block holds: its input, its normed one, what it adds, their sum."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run on a device with `free` bytes: sequences of `context` tokens, `batch` at a time.

    process: Python and torch, where they are not running yet. working: of the largest step. guesser: the work of a
    model beside it that guesses its tokens. elsewhere: names the devices over which a plan would fit; None where there
    are no more than this one.
    """

    work: Work
    context: int
    free: int
    batch: int = 1
    device: str = "cpu"
    process: int = PROCESS_BYTES
    guesser: Work | None = None
    elsewhere: Callable[[MemoryPlan], list[str]] | None = field(default=None, compare=False)

    @cached_property
    def weights(self) -> int:
        """Of all parameters as they are stored."""
        model, kind = self.work.plan.model, self.work.quantize
        kinds = quantised(model, KINDS[kind]) if kind else {}
        size = BYTES[self.work.dtype]
        return sum(weight_bytes(param, size, kinds.get(name)) for name, param in model.all_parameters().items())

    @property
    def cache(self) -> int:
        """Of all sequences."""
        return self.batch * self.work.cache_bytes(self.context)

    @property
    def working(self) -> int:
        """Of the step with the most rows: the residual stream, the part that holds most beside it, the logits."""
        rows, size, model = min(self.context, chunk_tokens(self.device)), BYTES[self.work.dtype], self.work.model
        widest = max(spec.working(rows, self.context, size) for spec in self.work.specs)
        stream = rows * model.dim * (COPIES * size + 2 * BYTES["float32"])
        return stream + widest + self.batch * model.vocab_size * (size + 2 * BYTES["float32"]) + self.scratch

    @property
    def scratch(self) -> int:
        """Of the largest quantised matrix that a GPU makes numbers for prompts; experts are multiplied as they lie."""
        if self.device == "cpu":
            return 0
        sizes = (m.numel for m in self.work.matrices if m.kind is not None and m.experts == 1)
        return max(sizes, default=0) * BYTES[self.work.dtype]

    @property
    def guessing(self) -> int:
        """Of the model that guesses: weights, and a cache as long as both read."""
        if self.guesser is None:
            return 0
        length = min(self.context, self.guesser.model.context_length)
        other = replace(self, work=self.guesser, context=length, guesser=None)
        return other.weights + other.cache

    @property
    def total(self) -> int:
        return self.process + self.weights + self.guessing + self.cache + self.working

    @property
    def fits(self) -> bool:
        return self.total <= self.free

    def largest_context(self, most: int) -> int:
        """The longest sequences, up to `most` tokens, that fit; 0 if none do."""
        low, high, room = 0, most, self.free - self.process - self.weights
        while low < high:
            middle = (low + high + 1) // 2
            other = replace(self, context=middle)
            taken = other.cache + other.working + other.guessing
            low, high = (middle, high) if taken <= room else (low, middle - 1)
        return low

    @property
    def note(self) -> str:
        """The plan in a sentence."""
        length = self.context if self.fits else self.largest_context(self.context)
        cut = "" if self.fits else f"; {length} tokens fit"
        return f"memory for {self.context} tokens: {self._shares('cache')}, of {human_bytes(self.free)} free{cut}"

    def to_dict(self) -> dict[str, int]:
        """The bytes by what they are for."""
        names = ("weights", "cache", "working", "process", "total")
        return {f"{name}_bytes": getattr(self, name) for name in names}

    def refusal(self, where: str, tokens: int) -> CapacityError:
        """The error for a run that cannot hold `tokens` tokens, which says what would fit."""
        short, advice = replace(self, context=tokens), self.advice()
        shares = short._shares(f"cache for {tokens} tokens", with_process=True)
        fitting = f"what would fit: {', or '.join(advice)}" if advice else "use another device or a smaller model"
        return CapacityError(
            "the model does not fit in memory",
            where=where,
            found=f"{human_bytes(self.free)} free",
            expected=f"{human_bytes(short.total)} ({shares})",
            hint=f"{fitting}; `zoo inspect` shows what each needs",
        )

    def _shares(self, cache: str, *, with_process: bool = False) -> str:
        """The parts and their bytes, those that there are none of left out."""
        parts = {"weights": self.weights, "the model that guesses": self.guessing, cache: self.cache}
        parts |= {"work in between": self.working, "Python and torch": self.process if with_process else 0}
        return ", ".join(f"{name} {human_bytes(count)}" for name, count in parts.items() if count or name == cache)

    def advice(self) -> list[str]:
        """What would fit, each a phrase; empty where nothing is known to."""
        found = ["a smaller max_batch_size"] if self.batch > 1 and replace(self, batch=1).fits else []
        one = replace(self, batch=1)
        if self.guesser is not None and replace(one, guesser=None).fits:
            found.append("no --draft, or --draft lookup")
        length = one.largest_context(self.context)
        if 0 < length < self.context:
            found.append(f"--max-context {length}")
        if BYTES[self.work.dtype] > BYTES["bfloat16"]:
            found += one.changed("--dtype bfloat16", dtype="bfloat16")
        for kind in KINDS if self.device in ("cpu", "cuda") else ():
            # In what is quantised already there is nothing to win but by fewer bits.
            if self.work.quantize not in ("int4", kind):
                found += one.changed(f"--quantize {kind}", quantize=kind)
        return found if self.elsewhere is None else [*found, *self.elsewhere(one)]

    def changed(self, name: str, **changes: Any) -> list[str]:
        """The option, if the run fits with it or a shorter one does; nothing if none does."""
        try:
            guesser = None if self.guesser is None else replace(self.guesser, **changes)
            other = replace(self, work=replace(self.work, **changes), guesser=guesser)
            length = other.largest_context(self.context)
        except RequestError:
            return []
        if not length:
            return []
        return [name if length == self.context else f"{name} with --max-context {length}"]
