"""Kinds of quantised weights, and which parameters of a model are stored in them. Imports no torch.

    int8    whole numbers from -127 to 127, and a float32 scale for each output
    int4    whole numbers from -8 to 7, and a bfloat16 scale for each 32 inputs of an output

Matrices of blocks and the head are stored so: projections of attention and of recurrent mixers, feed-forwards, each
expert of a mixture. The head keeps eight bits where the others have four: its error is the logits' own. What is looked
up, chooses (routers, indexers) or is small keeps its numbers, and so do encoders of images and sounds, whose weights
are few beside the language model's.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.components.decoder.spec import DecoderSpec
from zoo.registry.errors import RequestError, nearest
from zoo.registry.spec import Param, Spec

GROUP = 32
"""Inputs that share a scale of a row, and of four-bit weights. Matrices are filled up with zeros to whole groups."""

LANES = 16
"""Outputs of a block, or of a panel, which lie side by side. Matrices are filled up with zeros to whole blocks."""

PACKED_BITS = 12
"""Of a packed weight in bfloat16."""

PACKED_INPUTS = 8
"""Inputs that are packed together. Packed matrices are filled up with zeros to whole ones of these, and of blocks."""

PACKED_HEAD = 24
"""Bytes that describe a block of packed weights."""

HEAD = "head.weight"

SMALL = 1 << 13
"""Elements below which a matrix keeps its numbers: their bytes and their time count for nothing."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to store a matrix. bits: of a code. grouped: a scale for each group of inputs, else one for each output."""

    name: str
    bits: int
    grouped: bool

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a matrix with its scales."""
        blocks, groups = -(-outputs // LANES), -(-inputs // GROUP)
        scales = 2 * groups if self.grouped else 4
        return blocks * LANES * (groups * GROUP * self.bits // 8 + scales)


INT8, INT4 = Kind("int8", 8, grouped=False), Kind("int4", 4, grouped=True)

KINDS = {kind.name: kind for kind in (INT8, INT4)}


def kind_named(name: str) -> Kind:
    """Raises RequestError for a name that is none."""
    if not isinstance(name, str) or name not in KINDS:
        raise RequestError(
            "unknown kind of quantised weights",
            where="quantize",
            found=repr(name),
            expected=f"one of {', '.join(KINDS)}",
            hint=nearest(str(name), KINDS),
        )
    return KINDS[name]


def quantised(model: Spec, kind: Kind) -> dict[str, Kind]:
    """The kind of every parameter that is quantised, by its path. Raises RequestError where there is none."""
    encoders = tuple(f"{name}." for name in model.encoders()) if isinstance(model, DecoderSpec) else ()
    candidates = {
        name: param
        for name, param in model.all_parameters().items()
        if _is_matrix(param) and not (encoders and name.startswith(encoders))
    }
    kinds = {name: kind_of(param, kind, name == HEAD) for name, param in candidates.items()}
    found = {name: own for name, own in kinds.items() if own is not None}
    if not found:
        raise RequestError(
            "no matrix of this model is large enough to be quantised",
            where=f"quantize={kind.name}",
            found=f"{max(map(_elements, candidates.values()), default=0)} elements in the largest",
            expected=f"{SMALL} at least",
            hint="leave `quantize` out: so small a model gains nothing by it",
        )
    return found


def kind_of(param: Param, kind: Kind, head: bool) -> Kind | None:
    """The kind of a parameter outside of encoders; None for one that keeps its numbers."""
    if not _is_matrix(param) or _elements(param) < SMALL:
        return None
    return INT8 if head else kind


def weight_bytes(param: Param, itemsize: int, kind: Kind | None, *, packed: bool = False) -> int:
    """Bytes of a parameter with `itemsize` bytes for a number of the model's dtype, or as `kind` where it has one.

    packed: matrices in bfloat16 are, where their sizes allow it.
    """
    if kind is None and not (packed and _packs(param)):
        return param.numel * (4 if param.dtype == "float32" else itemsize)
    matrix = kind.nbytes if kind else packed_bytes
    outputs, inputs = param.shape[-2:]
    return param.numel // (outputs * inputs) * matrix(outputs, inputs)


def in_panels(outputs: int, inputs: int) -> bool:
    """Whether bfloat16 matrices of these sizes are put into panels, where there are any (native/panels.py)."""
    return outputs >= LANES and inputs % 2 == 0


def packed_bytes(outputs: int, inputs: int) -> int:
    """Bytes of a matrix in packed panels, but for the few weights that no code stands for."""
    blocks, filled = -(-outputs // LANES), -(-inputs // PACKED_INPUTS) * PACKED_INPUTS
    return blocks * (LANES * filled * PACKED_BITS // 8 + PACKED_HEAD)


def _packs(param: Param) -> bool:
    fits = len(param.shape) >= 2 and in_panels(*param.shape[-2:])
    return fits and param.product and param.dtype == "model"


def _is_matrix(param: Param) -> bool:
    return len(param.shape) >= 2 and param.product and param.dtype == "model" and not param.exact


def _elements(param: Param) -> int:
    """Of one matrix of the parameter."""
    return param.shape[-2] * param.shape[-1]
