"""What a step must do at least, from the Specs: bytes to read, numbers to multiply. The one home of this arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from zoo.components.cache.spec import CacheDtype, RecurrentCacheSpec
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.kinds import HEAD, KINDS, Kind, in_panels, kind_of, packed_bytes
from zoo.registry.plan import Plan
from zoo.registry.spec import Param, Spec, StateSpec

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""

INSTEAD = {("float16", "cpu"): "float32"}
"""Formats of cards that a kind of device does not compute well, and what it takes if nothing else is asked for."""

CODES = "cache_dtype"
"""The field of a state's Spec that names the codes in which it is kept."""

CHUNK_TOKENS = {"cpu": 512}
OTHER_CHUNK_TOKENS = 2048


GRAIN_TOKENS = {"cpu": 256}
OTHER_GRAIN_TOKENS = 16
"""Tokens by which the room of a sequence grows: of a slab's step, and of a page."""


def usual_dtype(dtype: str, device: str) -> str:
    """The format in which a kind of device computes a card of this one if nothing is asked for."""
    return INSTEAD.get((dtype, device), dtype)


def grain_tokens(device: str) -> int:
    """Tokens by which the room of a sequence grows, by kind of device."""
    return GRAIN_TOKENS.get(device, OTHER_GRAIN_TOKENS)


def chunk_tokens(device: str) -> int:
    """Rows that the engine computes at once, by kind of device: what a long prompt is cut into."""
    return CHUNK_TOKENS.get(device, OTHER_CHUNK_TOKENS)


@dataclass(frozen=True, slots=True)
class Step:
    """What the engine computes at once: `rows` new tokens of each of `sequences`, after `past` cached ones.

    wanted: rows in all whose logits are asked for.
    """

    sequences: int
    rows: int
    past: int
    wanted: int

    @classmethod
    def decode(cls, batch: int, context: int) -> Step:
        """One new token for each sequence, which sees `context` earlier ones."""
        return cls(batch, 1, context, batch)

    @property
    def tokens(self) -> int:
        return self.sequences * self.rows

    @property
    def middle(self) -> int:
        """How many earlier tokens a row sees on average."""
        return self.past + (self.rows - 1) // 2


def prefill(prompt: int, chunk: int) -> Iterator[Step]:
    """The steps that read a prompt of one sequence, `chunk` tokens at a time."""
    for start in range(0, prompt, chunk):
        rows = min(chunk, prompt - start)
        yield Step(1, rows, start, int(start + rows == prompt))


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that activations are multiplied with, or `experts` of them, of which a token uses `chosen`.

    dtype: "model", or "float32" for what is never rounded. kind: of its quantised weights, or None. head: only rows
    whose logits are wanted go through it.
    """

    outputs: int
    inputs: int
    experts: int = 1
    chosen: float = 1.0
    dtype: str = "model"
    kind: str | None = None
    head: bool = False

    @property
    def numel(self) -> int:
        """Of one expert."""
        return self.outputs * self.inputs

    def rows(self, step: Step) -> int:
        """The rows that go in."""
        return step.wanted if self.head else step.tokens

    def touched(self, rows: int) -> float:
        """How many of the experts these rows are expected to use, if all are equally likely."""
        return self.experts * (1 - (1 - self.chosen / self.experts) ** rows)


@dataclass(frozen=True)
class Work:
    """The work of a model's steps. dtype: the format of weights and cache. quantize: the kind of large matrices.

    cache_dtype: codes of the cache, where they are others than the model's. packed: bfloat16 matrices are.
    """

    plan: Plan
    dtype: str
    quantize: str | None = None
    cache_dtype: CacheDtype | None = None
    packed: bool = False

    @property
    def model(self) -> DecoderSpec:
        """The decoder's Spec."""
        assert isinstance(self.plan.model, DecoderSpec)
        return self.plan.model

    @cached_property
    def specs(self) -> Counter[Spec]:
        """Every Spec that a token of text goes through, and how often."""
        return Counter(self.model.passes())

    @cached_property
    def matrices(self) -> Counter[Matrix]:
        """Every matrix, and how many like it a token goes through."""
        found: Counter[Matrix] = Counter()
        for spec, count in self.specs.items():
            for name, param in spec.parameters().items():
                head = isinstance(spec, DecoderSpec) and name in (HEAD, "embed.weight")
                kind = kind_of(param, KINDS[self.quantize], name == HEAD) if self.quantize else None
                if param.product and (matrix := _matrix(param, kind, head)) is not None:
                    found[matrix] += count
        return found

    @property
    def cache_itemsize(self) -> int:
        """Bytes of a number in the cache."""
        return BYTES[self.dtype]

    def nbytes(self, matrix: Matrix) -> float:
        """Bytes of one expert of a matrix as it is stored."""
        if matrix.kind is not None:
            return KINDS[matrix.kind].nbytes(matrix.outputs, matrix.inputs)
        if self.packed and matrix.dtype == "model" and in_panels(matrix.outputs, matrix.inputs):
            return packed_bytes(matrix.outputs, matrix.inputs)
        return matrix.numel * BYTES["float32" if matrix.dtype == "float32" else self.dtype]

    def weight_bytes(self, step: Step) -> float:
        """Bytes of weights that the step must read: each matrix once, of a mixture the experts that are chosen."""
        return sum(
            count * matrix.touched(matrix.rows(step)) * self.nbytes(matrix) for matrix, count in self.matrices.items()
        )

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of cache that one sequence of `tokens` tokens holds."""
        return sum(state.nbytes(tokens, self.cache_itemsize) for state in self._states)

    @property
    def codable(self) -> bool:
        """Whether layers keep what could have codes, and has none."""
        return any(getattr(state, CODES, "") is None for state in self._states)

    @cached_property
    def _states(self) -> list[StateSpec]:
        """What each layer keeps, where it keeps something."""
        codes = {} if self.cache_dtype is None else {CODES: self.cache_dtype}
        kept = [state for state in self.model.states() if state]
        return [state.model_copy(update=codes) if hasattr(state, CODES) else state for state in kept]

    def read_bytes(self, step: Step) -> float:
        """Bytes that the step must read: weights, and each sequence's cache once."""
        return self.weight_bytes(step) + step.sequences * self.cache_bytes(step.past)

    def multiply_adds(self, step: Step) -> float:
        """Multiply-adds of the step: half of its floating-point operations. Logits count where they are wanted."""
        head = sum(count * m.numel for m, count in self.matrices.items() if m.head)
        each = sum(count * spec.flops(step.middle) for spec, count in self._owned.items()) / 2
        return step.tokens * (each - head) + step.wanted * head

    def elements(self, step: Step) -> float:
        """Activations that go into products and come out of them: what small operations work on in between."""
        return sum(
            count * matrix.rows(step) * matrix.chosen * (matrix.outputs + matrix.inputs)
            for matrix, count in self.matrices.items()
        )

    def mixing(self, spec: Spec, context: int) -> float:
        """Multiply-adds of one token with what earlier ones left, beside the products with weights."""
        products = sum(p.numel * p.active for p in spec.parameters().values() if p.product)
        return spec.flops(context) / 2 - products

    @staticmethod
    def channels(spec: Spec) -> int:
        """Channels whose states a token moves on; none where earlier tokens are kept as they are."""
        state = spec.state()
        return state.inner_dim if isinstance(state, RecurrentCacheSpec) else 0

    @cached_property
    def parts(self) -> Counter[Spec]:
        """The Specs whose time is more than that of their products."""
        return Counter({spec: count for spec, count in self.specs.items() if spec.pace()})

    @cached_property
    def _owned(self) -> Counter[Spec]:
        """Specs as `flops` counts them: what several layers share is counted by those layers."""
        encoders = self.model.encoders()
        return Counter(spec for path, spec in self.model.walk() if path.partition(".")[0] not in encoders)


def _matrix(param: Param, kind: Kind | None, head: bool) -> Matrix | None:
    """The matrix that a parameter is; None for what works on single channels."""
    name = None if kind is None else kind.name
    if len(param.shape) == 2:
        outputs, inputs = param.shape
        return Matrix(outputs, inputs, dtype=param.dtype, kind=name, head=head)
    if len(param.shape) == 3 and param.active < 1:
        experts, outputs, inputs = param.shape
        return Matrix(outputs, inputs, experts, param.active * experts, param.dtype, name)
    return None
