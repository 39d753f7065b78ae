"""What a component says of itself without torch: its settings, parameters, state and cost.

A `Spec` is a frozen pydantic model that stands beside an `nn.Module`. The resolver fills it from a card's node:

- a plain field is written in the card;
- a field marked `Inherited()` is taken from the enclosing node (`dim`, `head_dim`, ...) and may not be written;
- a field marked `Slot(...)` is itself a node with a `kind`, filled by whichever component is registered for it.

After resolution a Spec is complete: modules read it and never invent defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True, slots=True)
class Inherited:
    """Marks a field whose value comes from the enclosing node of the card."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Marks a field that holds a component (or, annotated as a tuple, a list of them).

    name: the slot whose kinds may stand here.
    default: the kind of a node that names none; a function gets the enclosing node's plain fields.
    absent: what a missing node means: "required" (pydantic's own rule), "build" the default kind from an
        empty node, or "inherit" the node of the same field name from the enclosing nodes.
    bind: the child's inherited field -> the field of this node that gives its value.
    runs: the list holds runs, `{repeat: n, ...node}` or `{repeat: n, pattern: [node, ...]}`.
    """

    name: str
    default: str | Callable[[Mapping[str, Any]], str] | None = None
    absent: Literal["required", "build", "inherit"] = "required"
    bind: Mapping[str, str] = field(default_factory=dict)
    runs: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """What one of `ranks` equal ranks holds of a model: the share of number `rank`.

    whole_experts: of a mixture, some experts whole, in place of a part of each.
    """

    rank: int
    ranks: int
    whole_experts: bool = False


class IndivisibleError(ValueError):
    """A size that cannot be shared out. divisor: what must be a multiple of the number of ranks, or 0."""

    def __init__(self, where: str, why: str, divisor: int = 0) -> None:
        self.where, self.why, self.divisor = where, why, divisor
        super().__init__(f"{where}: {why}")


@dataclass(frozen=True, slots=True)
class Split:
    """Marks a size that ranks share out: heads, hidden lanes, experts, the vocabulary.

    copies: of fewer than there are ranks, several ranks keep the same one. uneven: shares may differ by one.
    """

    copies: bool = False
    uneven: bool = False

    def share(self, where: str, size: int, share: Share) -> int:
        """This rank's size. Raises IndivisibleError."""
        if self.uneven:
            return (share.rank + 1) * size // share.ranks - share.rank * size // share.ranks
        if size % share.ranks == 0:
            return size // share.ranks
        if self.copies and share.ranks % size == 0:
            return 1
        raise IndivisibleError(where, f"{size}, which {share.ranks} does not divide", size)


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rows of a projection that rope turns: of each head of `head_dim` rows, `rotary_dim` from `offset` on."""

    head_dim: int
    rotary_dim: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor inside a stored parameter.

    index: per leading axis an int or a (start, stop) pair; axes that are not named are taken whole.
    """

    index: tuple[int | tuple[int, int], ...]
    rotary: Rotary | None = None


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter as the module stores it.

    shape: full shape, before any sharding.
    shard: the axis that tensor parallelism splits; None keeps a copy on every rank.
    segments: stretches of that axis, by their lengths, of which each rank holds its share of each; none: it is one.
    once: added to a sum over ranks, so that it may stand on one of them only; the others hold zeros.
    parts: the checkpoint tensors that it is fused from, by name relative to the component; empty: one tensor
        of the parameter's own name.
    init: how random weights are drawn. active: the share of it that one token uses.
    product: multiplied with every token (False for tables that are looked up and for scales).
    exact: keeps its numbers where weights are quantised: what chooses, and what is not multiplied with as it stands.
    dtype: "model", or "float32" for what must not be rounded.
    """

    shape: tuple[int, ...]
    shard: int | None = None
    segments: tuple[int, ...] = ()
    once: bool = False
    parts: Mapping[str, Part] = field(default_factory=dict)
    rotary: Rotary | None = None
    init: Literal["normal", "ones", "zeros"] = "normal"
    active: float = 1.0
    product: bool = True
    exact: bool = False
    dtype: Literal["model", "float32"] = "model"

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A checkpoint-level tensor: the piece of a stored parameter that one name in a file fills."""

    name: str
    shape: tuple[int, ...]
    param: str
    index: tuple[int | slice, ...]
    rotary: Rotary | None


class Spec(BaseModel):
    """Base of every component's settings. Subclasses set `module` and describe parameters, state and cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: ClassVar[str]
    """Dotted path of the class built from this Spec, e.g. `zoo.components.ffn.gated:Gated`."""

    kind: str

    def parameters(self) -> dict[str, Param]:
        """This component's own parameters by attribute path, children's excluded."""
        return {}

    def children(self) -> dict[str, Spec]:
        """Child components by attribute path; by default the fields that hold Specs, `name.i` for lists."""
        found: dict[str, Spec] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Spec):
                found[name] = value
            elif isinstance(value, tuple) and value and isinstance(value[0], Spec):
                found.update({f"{name}.{i}": item for i, item in enumerate(value)})
        return found

    def divided(self, share: Share, where: str = "model") -> Self:
        """The settings of one rank's share: sizes marked `Split` are divided, here and in all components below.

        Raises IndivisibleError naming the size, at `where` in the card.
        """
        found: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            value, place = getattr(self, name), f"{where}.{name}"
            mark = next((mark for mark in info.metadata if isinstance(mark, Split)), None)
            if mark is not None and value is not None:
                found[name] = mark.share(place, value, share)
            elif isinstance(value, Spec):
                found[name] = value.divided(share, place)
            elif isinstance(value, tuple) and value and isinstance(value[0], Spec):
                found[name] = tuple(item.divided(share, f"{place}.{i}") for i, item in enumerate(value))
        return self.model_copy(update=found)

    def needs(self, earlier: Sequence[Spec]) -> int | None:
        """The layer, of those before its own, whose work in the same step it uses, so that one device must have both;
        None for nothing but the stream, the embeddings and what it `borrows`."""
        return None

    def sums(self) -> tuple[str, ...]:
        """Modules of this component, by attribute path, whose outputs on all ranks add up to the whole; "" is itself.

        By default the owners of parameters that are split along their last axis, the inputs of a product. Of what a
        component that sums its own output holds, nothing else is summed.
        """
        split = [n for n, p in self.parameters().items() if p.product and p.shard == len(p.shape) - 1 > 0]
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in split))

    def means(self, share: Share) -> tuple[str, ...]:
        """Norms of this component, by attribute path, over lanes that ranks share: their modules have `across`."""
        return ()

    def flops(self, context: int) -> float:
        """Floating-point operations for one token at `context` cached tokens, children excluded."""
        return sum(2.0 * p.numel * p.active for p in self.parameters().values() if p.product)

    def working(self, rows: int, seen: int, itemsize: int) -> int:
        """Bytes that it holds at once in a step of `rows` tokens that see up to `seen`, children excluded: by default
        what goes into its products and comes out of them, `itemsize` bytes for each number."""
        matrices = (p for p in self.parameters().values() if p.product and len(p.shape) > 1)
        chosen = ((p, p.active * p.shape[0] if p.active < 1 and len(p.shape) == 3 else 1.0) for p in matrices)
        return round(rows * itemsize * sum(sum(p.shape[-2:]) * count for p, count in chosen))

    def kept_room(self, sequences: int, seen: int, itemsize: int, threads: int) -> int:
        """Bytes that its kernel on a CPU keeps between steps: what a few rows of each of so many sequences need in
        between, which see up to `seen` tokens."""
        return 0

    def pace(self) -> str | None:
        """What beside sizes decides how fast it runs, in words from the general to the special; None for a part whose
        time is that of its products, or counts with what stands around it."""
        return None

    def state(self) -> StateSpec | None:
        """What a mixer, or a block around one, keeps of a sequence between steps; None keeps nothing."""
        return None

    def borrows(self) -> Borrowed | None:
        """What a mixer reads of an earlier layer's state, beside its own; None for nothing."""
        return None

    def walk(self, path: str = "") -> Iterator[tuple[str, Spec]]:
        """This Spec and all below it, with their attribute paths."""
        yield path, self
        for name, child in self.children().items():
            yield from child.walk(f"{path}.{name}" if path else name)

    def passes(self) -> Iterator[Spec]:
        """This Spec and all below it, each as often as a token goes through it."""
        yield self
        for child in self.children().values():
            yield from child.passes()

    def all_parameters(self) -> dict[str, Param]:
        """Every stored parameter of the tree by its full attribute path."""
        return {
            f"{path}.{name}" if path else name: param
            for path, spec in self.walk()
            for name, param in spec.parameters().items()
        }

    def tensors(self) -> Iterator[Tensor]:
        """Every checkpoint-level tensor of the tree, fused parameters taken apart."""
        for path, spec in self.walk():
            prefix = f"{path}." if path else ""
            for name, param in spec.parameters().items():
                if not param.parts:
                    yield Tensor(prefix + name, param.shape, prefix + name, (), param.rotary)
                for part_name, part in param.parts.items():
                    yield _part_tensor(prefix, name, param, part_name, part)


def _part_tensor(prefix: str, name: str, param: Param, part_name: str, part: Part) -> Tensor:
    index = tuple(i if isinstance(i, int) else slice(*i) for i in part.index)
    kept = tuple(i.stop - i.start for i in index if isinstance(i, slice))
    return Tensor(prefix + part_name, kept + param.shape[len(index) :], prefix + name, index, part.rotary)


@dataclass(frozen=True, slots=True)
class Borrowed:
    """Another layer's state: which layer, counted from 0, and what it must keep."""

    layer: int
    kept: StateSpec


class StateSpec(Spec):
    """What one layer keeps of a sequence between steps: the `cache` slot. Subclasses set both sizes."""

    def elements(self, tokens: int) -> int:
        """Cached elements of one layer for one sequence of `tokens` tokens."""
        raise NotImplementedError

    def serves(self, other: StateSpec) -> bool:
        """Whether a layer that needs `other` can read this state."""
        return self == other

    def lent(self) -> StateSpec | None:
        """What another device keeps of this state for layers of its own that borrow it: the first `elements(1)` numbers
        of every row that is appended here. None where rows cannot be handed on."""
        return None

    def nbytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of one layer for one sequence, with `itemsize` bytes for a number in the cache's dtype."""
        return itemsize * self.elements(tokens)

    def parts(self) -> tuple[StateSpec | None, ...]:
        """What is stored apart: more than one thing for a block of several mixers."""
        return (self,)
