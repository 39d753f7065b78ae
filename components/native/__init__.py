"""Kernels in C for what PyTorch leaves on the table on a CPU, an optional part of an installation.

The C sources beside this file are built by setuptools where there is a compiler, and loaded here by ctypes. Where it is
not there, or the processor has no AVX-512, everything runs by PyTorch's own kernels: `missing` says why, `zoo doctor`
what that costs. ZOO_NATIVE=off leaves the kernels out, and the name of a level makes that be used.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.components.compiled import kernels_file
from zoo.components.native.calls import Library
from zoo.registry.errors import ZooError

log = logging.getLogger("zoo.components")

TOLERANCE = 1e-2
"""Relative error that the check at first use allows: the rounding of bfloat16 is 4e-3."""

FEW = 8
"""Rows up to which a product is the kernels' work."""

NONE, MULTIPLY_ADD, DOT, TILES = range(4)
"""What `zoo_level` in kernels.c answers."""

OFF, PLAIN = "ZOO_NATIVE=off", "this processor has no AVX-512"
NOT_BUILT = "not built when zoo was installed, `zoo doctor` says why"
OLDER = "built from older sources than these, install zoo again"
"""What `unusable` answers."""

LEVELS = {"multiply-add": MULTIPLY_ADD, "dot": DOT, "tiles": TILES}

SINGLE = 4
"""Rows up to which panels are multiplied by multiply-adds where there are tiles, which give the same numbers."""

_SIZE, _ADDRESS, _COUNT = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
_ROWS: list[Any] = [_ADDRESS, _SIZE]
_STEP: list[Any] = [_COUNT, _SIZE, _ADDRESS, _SIZE]
_PANELS: list[Any] = [*[_SIZE] * 3, _ADDRESS, _SIZE, *[_ADDRESS] * 4, _SIZE, _ADDRESS, _COUNT]
_ARGUMENTS = {
    "zoo_product": [_COUNT, *[_SIZE] * 3, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _COUNT],
    "zoo_panels_by_dots": _PANELS,
    "zoo_pack_panels": [*[_SIZE] * 2, _ADDRESS, _SIZE, *[_ADDRESS] * 3, _SIZE, _COUNT],
    "zoo_unpack_panels": [*[_SIZE] * 4, *[_ADDRESS] * 3, _COUNT],
    "zoo_panels_by_multiply_adds": [*_PANELS[:-2], _COUNT],
    "zoo_panels_by_tiles": _PANELS,
    "zoo_tiles": [],
    "zoo_rms": [_SIZE, _SIZE, _ADDRESS, _SIZE, _ADDRESS, ctypes.c_double, _ADDRESS, _COUNT],
    "zoo_rms_plus_one": [_SIZE, _SIZE, _ADDRESS, _SIZE, _ADDRESS, ctypes.c_double, _ADDRESS, _COUNT],
    "zoo_add": [_SIZE, _SIZE, *_ROWS * 2, _ADDRESS, ctypes.c_double, _ADDRESS, _ADDRESS, _COUNT],
    "zoo_gate": [_SIZE, _SIZE, _ADDRESS, _SIZE, _ADDRESS, _COUNT],
    "zoo_rotate": [*[_SIZE] * 4, _ADDRESS, _SIZE, _SIZE, _ADDRESS, _ADDRESS, _ADDRESS, _COUNT],
    "zoo_prompts": [
        *[*[_SIZE] * 6, ctypes.c_double, _ADDRESS, _SIZE, _SIZE],
        *[_ADDRESS, _SIZE, _ADDRESS, _SIZE, *[_ADDRESS] * 5, _COUNT],
    ],
    "zoo_read": [_ADDRESS, _SIZE, _COUNT],
    "zoo_convolution": [*_STEP, *[_SIZE] * 2, *_ROWS, *[_ADDRESS] * 3, _COUNT],
    "zoo_ssd": [*_STEP, *[_SIZE] * 4, *_ROWS * 4, *[_ADDRESS] * 4, _COUNT],
    "zoo_selective": [*_STEP, *[_SIZE] * 2, *_ROWS * 5, *[_ADDRESS] * 4, _COUNT],
    "zoo_gated_norm": [_COUNT, *[_SIZE] * 3, _ADDRESS, *_ROWS, _ADDRESS, ctypes.c_float, _ADDRESS, _COUNT],
    "zoo_logits": [*[_SIZE] * 3, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS, _COUNT],
    "zoo_order": [*[_SIZE] * 3, *[_ADDRESS] * 4],
    "zoo_experts": [_COUNT, _SIZE, _COUNT, *[_SIZE] * 3, _ADDRESS, _SIZE, *[_ADDRESS] * 7, _COUNT],
    "zoo_weighted": [*[_SIZE] * 4, *[_ADDRESS] * 5, _COUNT],
    "zoo_draw": [_SIZE, _SIZE, _ADDRESS, _SIZE, *[_ADDRESS] * 3, _COUNT],
    "zoo_alone": [],
    "zoo_pack": [_SIZE, _SIZE, _ADDRESS, _SIZE, _ADDRESS, _COUNT],
}
_OTHERS = ("zoo_attend", "zoo_keep", "zoo_lower", "zoo_lift")
"""Declared where they are called."""


def runs(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> bool:
    """Whether `product` is the way to multiply these: a few bfloat16 rows on a CPU, without gradients."""
    return (
        weight_OI.dtype is torch.bfloat16
        and x_TI.dtype is torch.bfloat16
        and (bias_O is None or bias_O.dtype is torch.bfloat16)
        and 0 < x_TI.shape[0] <= FEW
        and weight_OI.device.type == "cpu"
        and weight_OI.is_contiguous()
        and x_TI.ndim == 2
        and x_TI.stride(1) == 1
        and not torch.is_grad_enabled()
        and missing() is None
    )


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, summed in float32 in an order that does not depend on the number of rows. See `product_reference`."""
    return library().product(x_TI, weight_OI, bias_O)


def product_reference(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The formula, in float32, rounded once."""
    bias = None if bias_O is None else bias_O.float()
    return F.linear(x_TI.float(), weight_OI.float(), bias).to(x_TI.dtype)


@cache
def missing() -> str | None:
    """Why the kernels are not in use, None where they are. Raises ZooError for a ZOO_NATIVE that cannot be."""
    reason = unusable()
    if reason is not None:
        return reason
    choice = _choice()
    if choice in LEVELS:
        library().use(LEVELS[choice])
    from zoo.components.native.check import differences, settle_tiles

    settle_tiles(library())
    wrong = [f"{name} is off by {error:.0e}" for name, error in differences() if not error < TOLERANCE]
    if wrong:
        log.warning("zoo: the native kernels are left out on this processor: %s", "; ".join(wrong))
        return f"on this processor {wrong[0]}"
    return None


def unusable() -> str | None:
    """Why there are no kernels that could be checked, found without any work; None where there are."""
    if _choice() == "off":
        return OFF
    if kernels_file() is None:
        # Nobody misses what the processor could not run either.
        capability = torch.backends.cpu.get_cpu_capability()
        return NOT_BUILT if any(name in capability for name in ("AVX512", "AMX")) else PLAIN
    if library().level == NONE:
        return PLAIN
    return OLDER if library().absent else None


def refusal(what: str, error: Callable[[], float]) -> str | None:
    """Why kernels that have a check of their own are not in use, None where they are. error: their relative one."""
    reason = missing()
    if reason is None and not (found := error()) < TOLERANCE:
        log.warning("zoo: the native %s is off by %.0e on this processor and is left out", what, found)
        reason = f"off by {found:.0e} on this processor"
    return reason


def _choice() -> str:
    choice, allowed = os.environ.get("ZOO_NATIVE", "auto"), ("auto", "off", *LEVELS)
    if choice not in allowed:
        raise _refused("unknown use of native kernels", choice, allowed)
    return choice


def _refused(message: str, found: str, allowed: Sequence[str]) -> ZooError:
    return ZooError(
        message, where="ZOO_NATIVE", found=repr(found), expected=f"one of {', '.join(repr(name) for name in allowed)}"
    )


class Kernels:
    """The loaded library.

    level: how it computes products, one of NONE, MULTIPLY_ADD, DOT and TILES. single: rows up to which TILES means
    multiply-adds all the same. absent: what it lacks.
    """

    def __init__(self, path: Path, level: int | None = None) -> None:
        self.handle = Library(path)
        self.level = self.handle.zoo_level() if level is None else level
        self.single = SINGLE
        self.absent = [name for name in (*_ARGUMENTS, *_OTHERS) if not hasattr(self.handle, name)]
        if not self.absent:
            for name, arguments in _ARGUMENTS.items():
                getattr(self.handle, name).declare(arguments)

    def use(self, level: int) -> None:
        """Computes products so. Raises ZooError where the processor or the compiler offers no such way."""
        names = {own: name for name, own in LEVELS.items()}
        if level not in (MULTIPLY_ADD, self.level):
            offered = dict.fromkeys((names[MULTIPLY_ADD], names[self.level]))
            raise _refused("this processor has no such products", names[level], [*offered])
        self.level = level

    def product(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """As `product`, by this library."""
        (rows, inputs), outputs = x_TI.shape, weight_OI.shape[0]
        y_TO = torch.empty(rows, outputs, dtype=x_TI.dtype)
        self.handle.zoo_product(
            self.level,
            rows,
            inputs,
            outputs,
            x_TI.data_ptr(),
            x_TI.stride(0),
            weight_OI.data_ptr(),
            None if bias_O is None else bias_O.data_ptr(),
            y_TO.data_ptr(),
            outputs,
            torch.get_num_threads(),
        )
        return y_TO

    def panels(
        self, x_TI: Tensor, words: Tensor, outputs: int, bias_O: Tensor | None, heads: Tensor | None = None
    ) -> Tensor:
        """x W^T + b of any number of rows, with a matrix in panels (zoo.components.native.panels).

        heads: of packed panels, whose blocks `words` are then.
        """
        if x_TI.ndim != 2 or x_TI.stride(1) != 1:
            flat_TO = self.panels(x_TI.reshape(-1, x_TI.shape[-1]).contiguous(), words, outputs, bias_O, heads)
            return flat_TO.view(*x_TI.shape[:-1], outputs)
        rows, inputs = x_TI.shape
        y_TO = torch.empty(rows, outputs, dtype=x_TI.dtype)
        sizes = (rows, inputs, outputs, x_TI.data_ptr(), x_TI.stride(0))
        matrix = (None if heads is None else heads.data_ptr(), words.data_ptr())
        places = (*matrix, None if bias_O is None else bias_O.data_ptr(), y_TO.data_ptr(), outputs)
        threads = torch.get_num_threads()
        if self.level == DOT:
            room = torch.empty(rows * inputs, dtype=x_TI.dtype)
            self.handle.zoo_panels_by_dots(*sizes, *places, room.data_ptr(), threads)
        elif self.level == TILES and rows > self.single:
            packed = torch.empty(-(-rows // 16) * -(-inputs // 32) * 512, dtype=x_TI.dtype)
            self.handle.zoo_panels_by_tiles(*sizes, *places, packed.data_ptr(), threads)
        else:
            self.handle.zoo_panels_by_multiply_adds(*sizes, *places, threads)
        return y_TO


@cache
def library() -> Kernels:
    path = kernels_file()
    assert path is not None, "asked for without `missing`"
    return Kernels(path)
