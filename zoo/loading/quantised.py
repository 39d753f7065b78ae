"""Quantised weights as publishers ship them: a tensor of codes and its companions, seen as one tensor. No torch.

What files hold, beside the plain tensors (X a name's beginning):

    FP8     X.weight in E4M3, multiplied with X.qscale_weight (Mistral's own files), X.weight_scale_inv (transformers
            and DeepSeek, a multiplier in spite of its name) or X.weight_scale (compressed-tensors): one number, one
            for each row, or one for each block of 128 x 128. Stacked experts: X, and X_scale_inv
    NVFP4   X.weight_packed, two E2M1 in a byte, the even column low; X.weight_scale in E4M3 for each 16 columns, all
            divided by X.weight_global_scale
    MXFP4   X_blocks (..., columns / 32, 16) and X_scales, powers of two with a bias of 127, for each 32 columns; or
            packed and named as NVFP4. The former keeps its name: it stands transposed to the plain tensor X

Sources: the public readers of transformers (finegrained_fp8, mxfp4), compressed-tensors and vLLM, and the OCP
Microscaling Formats (MX) Specification 1.0. Scales of activations are for products in eight or four bits and are not
read; all else must be accounted for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from zoo.loading.reader import Coding, TensorInfo, shape_text
from zoo.registry.errors import WeightsError

BLOCK = 128
"""Rows, and columns, of an FP8 block."""

GROUPS = {"F8_E4M3": 16, "U8": 32, "F8_E8M0": 32}
"""Columns that share a scale of four-bit codes, by the type of the scale."""

HINT = "use the checkpoint's bfloat16 edition"


@dataclass(frozen=True, slots=True)
class Scheme:
    """Endings of names: of the codes, in type `dtype`, of their possible scales, and of what they appear as.

    optional: an eight-bit tensor without a scale is none of this scheme, while packed codes must have theirs.
    """

    dtype: str
    codes: str
    scales: tuple[str, ...]
    unread: tuple[str, ...]
    plain: str
    optional: bool = False
    divisor: str | None = None


SCHEMES = (
    Scheme(
        "F8_E4M3",
        ".weight",
        (".qscale_weight", ".weight_scale_inv", ".weight_scale"),
        (".qscale_act", ".activation_scale", ".input_scale"),
        ".weight",
        optional=True,
    ),
    Scheme("F8_E4M3", "", ("_scale_inv", "_scale"), ("_activation_scale",), "", optional=True),
    Scheme(
        "U8",
        ".weight_packed",
        (".weight_scale",),
        (".input_global_scale",),
        ".weight",
        divisor=".weight_global_scale",
    ),
    Scheme("U8", "_blocks", ("_scales",), (), "_blocks"),
)

UNREAD = {
    ".qweight": "GPTQ or AWQ",
    ".weight_zero_point": "compressed-tensors with zero points",
    ".weight_shape": "compressed-tensors in whole numbers",
    ".weight_scale_2": "ModelOpt's NVFP4",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".biases": "MLX",
}
"""Endings of names that only occur in what is not read yet."""


def folded(headers: Mapping[str, TensorInfo], where: str) -> dict[str, TensorInfo]:
    """The headers with every quantised tensor and its companions as one, of the full shape, under the plain name.

    Raises WeightsError for a scheme that is not read, for scales that are missing or of a wrong shape.
    """
    _refuse_unread(headers, where)
    found: dict[str, TensorInfo] = {}
    for info in headers.values():
        whole = _whole(info, headers)
        if whole is not None and whole.name != info.name and whole.name in headers:
            raise WeightsError(f"tensor {whole.name!r} is there plain and quantised", where=where, found=info.name)
        found[info.name] = whole or info
    members = {companion.name for info in found.values() if info.coding for companion in info.coding.companions}
    return {info.name: info for name, info in found.items() if name not in members}


def _refuse_unread(headers: Mapping[str, TensorInfo], where: str) -> None:
    for name in headers:
        for ending, title in UNREAD.items():
            if name.endswith(ending):
                raise WeightsError(
                    f"weights quantised by {title} are not read yet",
                    where=where,
                    found=name,
                    expected="FP8, NVFP4 or MXFP4, or plain weights",
                    hint=HINT,
                )


def _whole(info: TensorInfo, headers: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The full tensor that a tensor of codes stands for; None for what is none."""
    for scheme in SCHEMES:
        if info.dtype != scheme.dtype or info.pickled or not info.name.endswith(scheme.codes):
            continue
        stem = info.name[: len(info.name) - len(scheme.codes)]
        scale = next((headers[stem + end] for end in scheme.scales if stem + end in headers), None)
        if scale is not None:
            return _coded(info, stem, scheme, scale, headers)
        if not scheme.optional:
            raise _missing(info, stem + scheme.scales[0])
    return None


def _coded(
    info: TensorInfo, stem: str, scheme: Scheme, scale: TensorInfo, headers: Mapping[str, TensorInfo]
) -> TensorInfo:
    unread = tuple(headers[stem + end] for end in scheme.unread if stem + end in headers)
    if scheme.dtype == "F8_E4M3":
        coding = Coding("FP8", scale, _blocks(info, info.shape, scale, (BLOCK, BLOCK)), None, unread)
        return replace(info, coding=coding)
    shape = _unpacked(info, scheme)
    group = GROUPS.get(scale.dtype)
    if group is None:
        raise _wrong_scale(info, scale, scale.dtype, " or ".join(GROUPS))
    divisor = headers.get(f"{stem}{scheme.divisor}")
    if group == 16 and divisor is None:
        raise _missing(info, f"{stem}{scheme.divisor}")
    if divisor is not None and (divisor.dtype != "F32" or prod(divisor.shape) != 1):
        raise _wrong_scale(info, divisor, f"{shape_text(divisor.shape)} {divisor.dtype}", "one F32")
    blocks = _blocks(info, shape, scale, (1, group))
    coding = Coding("NVFP4" if group == 16 else "MXFP4", scale, blocks, divisor, unread)
    return replace(info, name=stem + scheme.plain, shape=shape, dtype="F4", coding=coding)


def _unpacked(info: TensorInfo, scheme: Scheme) -> tuple[int, ...]:
    """The shape of four-bit codes, two of which are in each byte."""
    if scheme.codes != "_blocks":
        return (*info.shape[:-1], 2 * info.shape[-1])
    if len(info.shape) < 3 or info.shape[-1] != 16:
        raise WeightsError(
            f"{info.name!r} is not packed as MXFP4 is",
            where=str(info.file),
            found=shape_text(info.shape),
            expected="blocks of 16 bytes along the last axis",
        )
    return (*info.shape[:-2], 32 * info.shape[-2])


def _blocks(info: TensorInfo, shape: tuple[int, ...], scale: TensorInfo, size: tuple[int, int]) -> tuple[int, ...]:
    """How many elements of the tensor share a scale along each axis, by the shapes alone."""
    found = tuple(_along(shape, _padded(shape, scale), size))
    eights = size[1] == BLOCK
    columns = (size[1], *shape[-1:]) if eights else (size[1],)
    typed = scale.dtype in ("F32", "BF16", "F16", "F8_E8M0") if eights else scale.dtype in GROUPS
    if len(shape) < 2 or len(found) != len(shape) or found[-1] not in columns or not typed:
        ways = (
            "one number, one for each row, or one for each 128 x 128 block"
            if eights
            else f"one for each {size[1]} columns"
        )
        raise _wrong_scale(info, scale, f"{shape_text(scale.shape)} {scale.dtype}", f"{ways}, of {shape_text(shape)}")
    return found


def _padded(shape: tuple[int, ...], scale: TensorInfo) -> tuple[int, ...]:
    """The scale's shape with as many axes as the tensor has: a list of scales belongs to its first axis."""
    return scale.shape + (1,) * (len(shape) - len(scale.shape))


def _along(shape: tuple[int, ...], scales: tuple[int, ...], size: tuple[int, int]) -> Iterator[int]:
    """The block of each axis, up to the first one that does not fit; leading axes are taken whole or one by one."""
    sizes = (1,) * (len(shape) - 2) + size
    for length, count, block in zip(shape, scales, sizes, strict=False):
        if count == 1:
            yield length
        elif count == length:
            yield 1
        elif count == -(-length // block):
            yield block
        else:
            return


def _missing(info: TensorInfo, name: str) -> WeightsError:
    return WeightsError(
        f"the scales of the quantised tensor {info.name!r} are missing",
        where=str(info.file),
        expected=name,
        hint="fetch the model again",
    )


def _wrong_scale(info: TensorInfo, scale: TensorInfo, found: str, expected: str) -> WeightsError:
    return WeightsError(
        f"the scales {scale.name!r} do not fit {info.name!r}", where=str(scale.file), found=found, expected=expected
    )
