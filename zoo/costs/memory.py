"""What a run needs of memory, reckoned before anything is loaded: weights, cache, and what a step holds in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import Any

from zoo.components.compiled import packs
from zoo.components.kinds import KINDS, quantised, weight_bytes
from zoo.costs.work import BYTES, Work, chunk_tokens, grain_tokens
from zoo.machine import cores
from zoo.registry.errors import CapacityError, RequestError
from zoo.units import human_bytes

CACHE_SHARE = 0.8
"""Of what a device has free beside the weights: the most that caches take. The rest is for what steps hold in between,
and for others."""

SHORT = 512
"""Tokens of a sequence for which there must be room: with less a model does not run."""

PROCESS_BYTES = 320 << 20
"""Python, torch and zoo themselves, before a model."""

COPIES = 4
"""Of the residual stream that a block holds: its input, its normed one, what it adds, their sum."""


def stored_bytes(work: Work, *, packed: bool = False) -> int:
    """Bytes of all parameters of a model in its dtype, or as they are quantised. packed: as a CPU keeps them that packs
    bfloat16."""
    model, size = work.plan.model, BYTES[work.dtype]
    kinds = quantised(model, KINDS[work.quantize]) if work.quantize else {}
    parameters = model.all_parameters().items()
    return sum(weight_bytes(param, size, kinds.get(name), packed=packed) for name, param in parameters)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run on a device with `free` bytes: sequences of `context` tokens, `batch` at a time.

    The one home of whether a model fits: it runs if there is room for a sequence of `context` tokens where somebody
    `asked` for so many, else for one of SHORT. More sequences take turns.
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
    asked: bool = False
    elsewhere: Callable[[MemoryPlan], list[str]] | None = field(default=None, compare=False)

    @cached_property
    def weights(self) -> int:
        """Of all parameters as they are stored."""
        packed = self.device == "cpu" and self.work.dtype == "bfloat16" and packs()
        return stored_bytes(self.work, packed=packed)

    @property
    def cache(self) -> int:
        """Of all sequences, in the steps by which a sequence's room grows."""
        return self.batch * self.work.cache_bytes(self._grown)

    @property
    def _grown(self) -> int:
        grain = grain_tokens(self.device)
        return -(-self.context // grain) * grain

    @property
    def working(self) -> int:
        """Of the step with the most rows: the residual stream, the part that holds most beside it, the logits."""
        rows, size, model = min(self.context, chunk_tokens(self.device)), BYTES[self.work.dtype], self.work.model
        widest = max(spec.working(rows, self.context, size) for spec in self.work.specs)
        stream = rows * model.dim * (COPIES * size + 2 * BYTES["float32"])
        logits = self.batch * model.vocab_size * (size + 2 * BYTES["float32"])
        return stream + widest + logits + self.scratch + self.kernels

    @property
    def kernels(self) -> int:
        """What kernels of a CPU keep between steps, which share it."""
        if self.device != "cpu":
            return 0
        size, threads = BYTES[self.work.dtype], cores()
        return max(spec.kept_room(self.batch, self.context, size, threads) for spec in self.work.specs)

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
        return 0 if self._other is None else self._other.weights + self._other.cache

    @cached_property
    def _other(self) -> MemoryPlan | None:
        """Of the model that guesses alone."""
        if self.guesser is None:
            return None
        length = min(self.context, self.guesser.model.context_length)
        return replace(self, work=self.guesser, context=length, guesser=None)

    @property
    def spare(self) -> int:
        """Left free beside the working memory, where that is less than what caches leave."""
        return max(0, ceil(self._caches / CACHE_SHARE) - self._caches - self.working)

    @property
    def _caches(self) -> int:
        return self.cache + (0 if self._other is None else self._other.cache)

    @property
    def total(self) -> int:
        return self._fixed + self._growing

    @property
    def _fixed(self) -> int:
        """However long sequences are."""
        return self.process + self.weights + (0 if self._other is None else self._other.weights)

    @property
    def _growing(self) -> int:
        return max(self._caches + self.working, ceil(self._caches / CACHE_SHARE))

    @property
    def fits(self) -> bool:
        """Whether all of it has room."""
        return self.total <= self.free

    @property
    def least(self) -> int:
        """The tokens of a sequence without which the model does not run."""
        return self.context if self.asked else min(self.context, SHORT)

    @cached_property
    def most(self) -> int:
        """The most tokens up to `context` that a sequence can have; 0 if there is room for none."""
        return self.largest_context(self.context)

    @property
    def runs(self) -> bool:
        """Whether the model can be loaded."""
        return self.most >= self.least

    @property
    def verdict(self) -> str:
        """Whether it fits, in words."""
        if self.most == self.context:
            return "fits"
        if self.runs:
            return f"fits up to {self.most} of {self.context} tokens"
        return "does not fit" + (f", with {self.most} tokens it does" if self.most else "")

    def largest_context(self, most: int) -> int:
        """The longest sequences, up to `most` tokens, that fit; 0 if none do."""
        low, high, room = 0, most, self.free - self._fixed
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if replace(self, context=middle)._growing <= room else (low, middle - 1)
        return low

    @property
    def note(self) -> str:
        """The plan in a sentence."""
        told = f"memory for {self.context} tokens: {self._shares('cache')}, of {human_bytes(self.free)} free"
        return told if self.fits else f"{told}; {self.verdict}" + (f"; {self.hint}" if self.hint else "")

    def to_dict(self) -> dict[str, Any]:
        """The bytes by what they are for, and whether they fit."""
        names = ("weights", "cache", "working", "spare", "process", "total", "free")
        sizes: dict[str, Any] = {f"{name}_bytes": getattr(self, name) for name in names}
        told = {"context": self.context, "dtype": self.work.dtype, "largest_context": self.most}
        words = {"verdict": self.verdict, "advice": self.advice, "hint": self.hint}
        return sizes | told | {"fits": self.fits, "runs": self.runs} | words

    def refusal(self, where: str) -> CapacityError:
        """The error for a model that does not run, which says what would fit."""
        short = replace(self, context=self.least)
        shares = short._shares(f"cache for {self.least} tokens", with_process=True)
        hint = self.hint or "use another device or a smaller model"
        return CapacityError(
            "the model does not fit in memory",
            where=where,
            found=f"{human_bytes(self.free)} free",
            expected=f"{human_bytes(short.total)} ({shares})",
            hint=f"{hint}; `zoo inspect` shows what each needs",
        )

    def _shares(self, cache: str, *, with_process: bool = False) -> str:
        """The parts and their bytes, those that there are none of left out."""
        parts = {"weights": self.weights, "the model that guesses": self.guessing, cache: self.cache}
        parts |= {"work in between": self.working, "left free": self.spare}
        parts |= {"Python and torch": self.process if with_process else 0}
        return ", ".join(f"{name} {human_bytes(count)}" for name, count in parts.items() if count or name == cache)

    @property
    def hint(self) -> str:
        """What would fit, as a sentence; nothing where nothing is known to, or all does."""
        what = f"for all {self.context} tokens" if self.runs else "what would fit"
        return f"{what}: {', or '.join(self.advice)}" if self.advice else ""

    @cached_property
    def advice(self) -> list[str]:
        """What would make all fit, each a phrase, where a part does; else what would make a part or all fit. Empty
        where nothing is known to, or nothing is needed."""
        if self.fits:
            return []
        found = []
        if self.guesser is not None and replace(self, guesser=None).fits:
            found.append("no --draft, or --draft lookup")
        if self.most and not self.runs:
            found.append(f"--max-context {self.most}")
        if self.work.codable:
            found += self.changed("--cache-dtype int8", cache_dtype="int8")
        if BYTES[self.work.dtype] > BYTES["bfloat16"]:
            found += self.changed("--dtype bfloat16", dtype="bfloat16")
        for kind in KINDS if self.device in ("cpu", "cuda") else ():
            # In what is quantised already there is nothing to win but by fewer bits.
            if self.work.quantize not in ("int4", kind):
                found += self.changed(f"--quantize {kind}", quantize=kind)
        found += [] if self.elsewhere is None else self.elsewhere(self)
        # Where a part fits anyway, a way to another part is none to all.
        return [way for way in found if not (self.runs and "--max-context" in way)]

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
