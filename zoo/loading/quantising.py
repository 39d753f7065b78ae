"""How matrices are stored while they are loaded: which are quantised, and what it cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from zoo.components import fused
from zoo.components.kinds import LANES, Kind, quantised
from zoo.components.linear import fastest
from zoo.components.matrix import Holder, Making
from zoo.components.quantised import Quantised, QuantisedFilling, is_native
from zoo.loading.targets import Storing
from zoo.registry.errors import RequestError
from zoo.registry.plan import Plan
from zoo.units import human_bytes


def storing_of(plan: Plan, kind: Kind | None, device: torch.device) -> Storing:
    """Stores the plan's large matrices as `kind`, where there is one, and others as the device reads them fastest.

    Raises RequestError for a kind on a device without such products, and for a model without large matrices.
    """
    if kind and device.type not in ("cpu", "cuda"):
        raise RequestError(
            "quantised weights do not run on this device",
            where=f"quantize={kind.name}",
            found=str(device),
            expected="cpu or cuda",
            hint="leave `quantize` out, or use `--device cpu`",
        )
    kinds = quantised(plan.model, kind) if kind else {}

    def storing(param: str, like: torch.Tensor) -> Making | None:
        if param in kinds:
            own = kinds[param]
            begin = partial(QuantisedFilling, own) if device.type == "cpu" else None
            return Making(partial(Quantised.of, own), begin, LANES)
        return fastest(like) if device.type == "cpu" else None

    return storing


def quantised_parts(module: nn.Module) -> Iterator[tuple[str, Quantised]]:
    """Every quantised matrix below a module, with the path of its parameter."""
    for path, part in module.named_modules():
        for name, matrices in part.stored.items() if isinstance(part, Holder) else ():
            yield from ((f"{path}.{name}", matrix) for matrix in matrices if isinstance(matrix, Quantised))


def described(module: nn.Module) -> str:
    """What a loaded module's quantised weights are, and their error; nothing where there are none."""
    kinds: dict[Kind, list[tuple[str, Quantised]]] = defaultdict(list)
    for param, matrix in quantised_parts(module):
        kinds[matrix.kind].append((param, matrix))
    if not kinds:
        return ""
    matrices = [matrix for parts in kinds.values() for _, matrix in parts]
    return "; ".join(_described(kind, parts) for kind, parts in kinds.items()) + _pace(matrices[0].device)


def _pace(device: torch.device) -> str:
    """That products with them are slow, where they are."""
    if device.type == "cpu":
        return "" if is_native() else "; without native kernels for them, which makes them slow (`zoo doctor` says why)"
    runs = "products" in fused.wanted() and fused.works(device, "products")
    return "" if runs else "; without the Triton kernel for them, which makes them slow"


def _described(kind: Kind, parts: list[tuple[str, Quantised]]) -> str:
    lost, size = (sum(getattr(matrix, name) for _, matrix in parts) for name in ("lost", "size"))
    worst, param = max((_error(matrix.lost, matrix.size), param) for param, matrix in parts)
    count = "1 matrix" if len(parts) == 1 else f"{len(parts)} matrices"
    taken = human_bytes(sum(matrix.nbytes for _, matrix in parts))
    error = f"error of the weights {100 * _error(lost, size):.2f} %"
    most = "" if len(parts) == 1 else f", at most {100 * worst:.2f} % ({param})"
    return f"{kind.name}: {count} in {taken}, {error}{most}"


def _error(lost: float, size: float) -> float:
    """The norm of what was lost by the norm of all."""
    return float((lost / size) ** 0.5) if size else 0.0
