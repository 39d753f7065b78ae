"""The C source of matrices in eight and four bits (quantised.c), called with the addresses of tensors."""

from __future__ import annotations

import ctypes
import logging
from functools import cache

import torch
from torch import Tensor

from zoo.components import native
from zoo.components.kinds import GROUP, KINDS, LANES, Kind
from zoo.components.native.calls import Library

log = logging.getLogger("zoo.components")

_SIZE, _ADDRESS, _COUNT = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
_ARGUMENTS = {
    "zoo_quantised_product": [_COUNT, _COUNT, *[_SIZE] * 3, _ADDRESS, _SIZE, *[_ADDRESS] * 4, _COUNT, _ADDRESS, _COUNT],
    "zoo_quantise": [_COUNT, *[_SIZE] * 2, _ADDRESS, _SIZE, _COUNT, *[_ADDRESS] * 3, _COUNT, *[_ADDRESS] * 2, _COUNT],
}
_TYPES = {torch.float32: 0, torch.bfloat16: 1}

SCRATCH = GROUP + 8
"""Bytes for each group of a row: its codes, its scale, and what its sum starts at."""

EIGHT_BITS = 2
"""What `zoo_tiles` in tiles.c says of tiles that multiply codes."""

UNTILED = 8
"""Rows up to which tiles are not used: these wait for memory."""


def there() -> bool:
    """Whether the source was compiled and the processor has AVX-512 with VNNI."""
    return native.missing() is None and _library() is not None


def product(
    kind: Kind, codes: Tensor, scales: Tensor, shape: torch.Size, x_TI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """x W^T + b of (T, I) rows in x's dtype. The sums of a row depend on no other row."""
    return _product(kind, codes, scales, shape, x_TI, bias_O, len(x_TI) > UNTILED and by_tiles())


@cache
def by_tiles() -> bool:
    """Whether many rows are multiplied by AMX tiles: where there are some, and they give what AVX-512 gives."""
    if native.library().level != native.TILES or not native.library().handle.zoo_tiles() & EIGHT_BITS:
        return False
    draw = torch.Generator().manual_seed(0)
    for kind in KINDS.values():
        codes = torch.randint(256, (3, 70, kind.bits, 64), dtype=torch.uint8, generator=draw)
        scales = torch.rand((3, 70, LANES) if kind.grouped else (3, LANES), generator=draw)
        scales = scales.bfloat16() if kind.grouped else scales
        rows = (torch.Size((41, 70 * GROUP - 5)), torch.randn(37, 70 * GROUP - 5, generator=draw), None)
        if not torch.equal(*(_product(kind, codes, scales, *rows, tiled) for tiled in (True, False))):
            log.warning("zoo: products of %s weights by tiles are wrong on this processor and are left out", kind.name)
            return False
    return True


def _product(
    kind: Kind, codes: Tensor, scales: Tensor, shape: torch.Size, x_TI: Tensor, bias_O: Tensor | None, tiled: bool
) -> Tensor:
    library = _library()
    assert library is not None, "asked for without `there`"
    x, bias = _readable(x_TI), None if bias_O is None else bias_O.to(_type(x_TI)).contiguous()
    y_TO = torch.empty(len(x), shape[0], dtype=x.dtype)
    room = -(-len(x) // LANES) * LANES if tiled else len(x)
    scratch = torch.empty(room * codes.shape[1] * SCRATCH, dtype=torch.uint8)
    library.zoo_quantised_product(
        tiled,
        kind.bits,
        len(x),
        shape[1],
        shape[0],
        x.data_ptr(),
        x.stride(0),
        codes.data_ptr(),
        scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y_TO.data_ptr(),
        _TYPES[x.dtype],
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return y_TO.to(x_TI.dtype)


def quantise(kind: Kind, weight_OI: Tensor, codes: Tensor, scales: Tensor, tried: Tensor) -> tuple[float, float]:
    """Fills `codes` and `scales` of a matrix; returns the squared norms of the error and of the weight.

    tried: float32, the codes that the largest weight of a group may get.
    """
    library = _library()
    assert library is not None, "asked for without `there`"
    weight, threads = _readable(weight_OI), torch.get_num_threads()
    sums = torch.empty(2, dtype=torch.float64)
    scratch = torch.empty(threads * codes.shape[1] * GROUP * LANES, dtype=torch.uint8)
    library.zoo_quantise(
        kind.bits,
        *weight.shape,
        weight.data_ptr(),
        weight.stride(0),
        _TYPES[weight.dtype],
        codes.data_ptr(),
        scales.data_ptr(),
        tried.data_ptr(),
        len(tried),
        sums.data_ptr(),
        scratch.data_ptr(),
        threads,
    )
    lost, size = sums.tolist()
    return lost, size


def _type(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in _TYPES else torch.float32


def _readable(x: Tensor) -> Tensor:
    """Rows without gaps within them, in a type that the source reads."""
    x = x.to(_type(x))
    return x if x.stride(1) == 1 else x.contiguous()


@cache
def _library() -> Library | None:
    """The loaded library, where it has these functions and the processor their instructions."""
    handle = native.library().handle
    if not hasattr(handle, "zoo_quantised_level"):
        return None  # built before there was this source
    for name, arguments in _ARGUMENTS.items():
        getattr(handle, name).declare(arguments)
    return handle if handle.zoo_quantised_level() else None
