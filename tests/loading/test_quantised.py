"""Quantised weights: numbers against their definitions, element by element, and against transformers' own readers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from zoo.assemble import assemble
from zoo.components.decoder.model import Decoder
from zoo.loading import load
from zoo.loading.files import locate
from zoo.loading.layouts import read_layouts
from zoo.loading.load import load_weights
from zoo.loading.quantised import UNREAD
from zoo.loading.verify import verify_files
from zoo.registry.catalog import Resource
from zoo.registry.errors import WeightsError
from zoo.registry.resolve import Plan
from zoo.registry.spec import Param, Part, Spec

Plans = Callable[..., Plan]
Names = Callable[[Plan], dict[str, tuple[int, ...]]]
Tensors = dict[str, torch.Tensor]

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3(code: int) -> float:
    """Sign, four bits of exponent with a bias of 7, three of fraction; no infinities."""
    exponent, fraction = code >> 3 & 15, code & 7
    size = math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10)
    return -size if code & 128 else size


def e2m1(code: int) -> float:
    return -E2M1[code & 7] if code & 8 else E2M1[code & 7]


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random bytes but for E4M3's two that are no numbers."""
    made = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return made.masked_fill((made & 127) == 127, 5)


def positive(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.03 + 0.001


# Each scheme makes of a name and a shape the file's tensors and the numbers that they stand for.

Made = tuple[Tensors, torch.Tensor]


def fp8(stem: str, shape: tuple[int, int], scale: torch.Tensor, ending: str, block: tuple[int, int]) -> Made:
    data = codes(*shape, seed=len(stem))
    values = torch.empty(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            values[row, column] = e4m3(int(data[row, column]))
    grid = scale.float().reshape(-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    rows = torch.arange(shape[0]) // block[0]
    columns = torch.arange(shape[1]) // block[1]
    return {f"{stem}.weight": data.view(torch.float8_e4m3fn), stem + ending: scale}, values * grid[rows][:, columns]


def per_tensor(stem: str, shape: tuple[int, int]) -> Made:
    tensors, values = fp8(stem, shape, positive()[None][0], ".qscale_weight", shape)
    return {**tensors, f"{stem}.qscale_act": torch.tensor(0.1)}, values


def per_row(stem: str, shape: tuple[int, int]) -> Made:
    scale = positive(shape[0], 1).bfloat16()
    return fp8(stem, shape, scale, ".weight_scale", (1, shape[1]))


def per_block(stem: str, shape: tuple[int, int]) -> Made:
    scale = positive(-(-shape[0] // 128), -(-shape[1] // 128))
    return fp8(stem, shape, scale, ".weight_scale_inv", (128, 128))


def fours(data: torch.Tensor) -> torch.Tensor:
    """The low half of a byte is the even column."""
    values = torch.empty(*data.shape[:-1], 2 * data.shape[-1])
    for place in torch.cartesian_prod(*map(torch.arange, data.shape)).tolist():
        byte = int(data[tuple(place)])
        values[(*place[:-1], 2 * place[-1])] = e2m1(byte & 15)
        values[(*place[:-1], 2 * place[-1] + 1)] = e2m1(byte >> 4)
    return values


def nvfp4(stem: str, shape: tuple[int, int]) -> Made:
    data = codes(shape[0], shape[1] // 2)
    scale = codes(shape[0], shape[1] // 16, seed=1) & 127
    scales = torch.tensor([[e4m3(code) for code in row] for row in scale.tolist()])
    whole = torch.tensor([700.0])
    tensors = {
        f"{stem}.weight_packed": data,
        f"{stem}.weight_scale": scale.view(torch.float8_e4m3fn),
        f"{stem}.weight_global_scale": whole,
        f"{stem}.input_global_scale": torch.tensor([3.0]),
    }
    return tensors, fours(data) * (scales / whole).repeat_interleave(16, dim=1)


def mxfp4(stem: str, shape: tuple[int, int]) -> Made:
    data, scale = codes(shape[0], shape[1] // 2), codes(shape[0], shape[1] // 32, seed=1) % 9 + 118
    powers = torch.tensor([[2.0 ** (code - 127) for code in row] for row in scale.tolist()])
    tensors = {f"{stem}.weight_packed": data, f"{stem}.weight_scale": scale}
    return tensors, fours(data) * powers.repeat_interleave(32, dim=1)


SCHEMES: dict[str, Callable[[str, tuple[int, int]], Made]] = {
    "FP8": per_tensor,
    "FP8 by rows": per_row,
    "FP8 by blocks": per_block,
    "NVFP4": nvfp4,
    "MXFP4": mxfp4,
}


def quantised(plan: Plan, names: Names, scheme: str) -> tuple[Tensors, Tensors]:
    """A native checkpoint with quantised projections: its files, and the same in plain numbers."""
    files: Tensors = {}
    plain: Tensors = {}
    for number, (name, shape) in enumerate(names(plan).items()):
        if ".w" in name and len(shape) == 2:
            made, plain[name] = SCHEMES[scheme](name.removesuffix(".weight"), (shape[0], shape[1]))
            files |= made
        else:
            plain[name] = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            files[name] = plain[name].bfloat16()
            plain[name] = files[name].float()
    return files, plain


def loaded(plan: Plan, path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    module = assemble(plan, dtype)
    load_weights(module, plan, locate(path))
    return module


WIDE = {"dim": 160, "vocab_size": 31}
MIXER = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 40}
"""Sizes that 128 does not divide: blocks are cut off at both edges."""


@pytest.mark.parametrize("buffer", [1, 20_000, 32 << 20])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_equals_plain(
    tmp_path: Path, plan_of: Plans, native_names: Names, scheme: str, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through permuted heads, fused projections and stacked experts, in pieces of any size."""
    plan = plan_of("moe", MIXER, **WIDE)
    if scheme in ("NVFP4", "MXFP4"):
        plan = plan_of("moe", {**MIXER, "head_dim": 32}, **WIDE, **hidden(64))
    (tmp_path / "coded").mkdir()
    (tmp_path / "plain").mkdir()
    files, plain = quantised(plan, native_names, scheme)
    save_file(files, tmp_path / "coded" / "consolidated.safetensors")
    save_file(plain, tmp_path / "plain" / "consolidated.safetensors")
    monkeypatch.setattr(load, "BUFFER", buffer)
    expected = dict(loaded(plan, tmp_path / "plain").named_parameters())
    for name, parameter in loaded(plan, tmp_path / "coded").named_parameters():
        assert torch.equal(parameter, expected[name]), name
    for name, parameter in loaded(plan, tmp_path / "coded", torch.bfloat16).named_parameters():
        assert torch.equal(parameter, expected[name].bfloat16()), name


def hidden(size: int) -> dict[str, Any]:
    expert = {"kind": "gated", "hidden_dim": size}
    ffn = {"kind": "moe", "num_experts": 3, "experts_per_token": 2, "expert": expert}
    mixer = {"kind": "attention", "rope": {"theta": 1.0e4}, **MIXER, "head_dim": 32}
    return {"layers": [{"repeat": 2, "mixer": mixer, "ffn": ffn}]}


def test_figures_count_companions(tmp_path: Path, plan_of: Plans, native_names: Names) -> None:
    plan = plan_of("dense", MIXER, **WIDE)
    files, plain = quantised(plan, native_names, "FP8")
    save_file(files, tmp_path / "consolidated.safetensors")
    report = verify_files(plan, tmp_path)
    assert report.ok
    assert report.bytes == sum(tensor.numel() * tensor.element_size() for tensor in files.values())
    assert report.tensors == len(files)
    assert report.placed == len(plain)
    assert report.schemes == ("FP8",)


def test_companions_in_another_shard(tmp_path: Path, plan_of: Plans, native_names: Names) -> None:
    plan = plan_of("dense", MIXER, **WIDE)
    files, plain = quantised(plan, native_names, "FP8 by blocks")
    scales = {name: tensor for name, tensor in files.items() if "scale" in name}
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "consolidated.safetensors")
    rest = {name: tensor for name, tensor in files.items() if name not in scales}
    for number, part in enumerate((scales, rest), 1):
        save_file(part, tmp_path / f"consolidated-0000{number}-of-00002.safetensors")
    expected = dict(loaded(plan, tmp_path / "plain").named_parameters())
    for name, parameter in loaded(plan, tmp_path).named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("grid", [(), (1, 1), (3, 2)])
def test_fp8_equals_transformers(tmp_path: Path, plan_of: Plans, grid: tuple[int, ...]) -> None:
    """On shapes that blocks divide, as transformers asks for."""
    data = codes(384, 256).view(torch.float8_e4m3fn)
    scale = positive(*grid)
    expected = Fp8Dequantize(None)._dequantize_one(data, scale, torch.float32)
    assert torch.equal(alone(tmp_path, plan_of, {"w.weight": data, "w.weight_scale_inv": scale}, (384, 256)), expected)


class Alone(Spec):
    """One tensor, or a stack of three."""

    module = "none:None"
    kind: str = "alone"
    shape: tuple[int, ...]

    def parameters(self) -> dict[str, Param]:
        parts = {f"w.{e}.weight": Part((e,)) for e in range(3)} if len(self.shape) == 3 else {}
        return {"w.weight": Param(self.shape, parts=parts)}


def alone(tmp_path: Path, plan_of: Plans, tensors: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    """The one parameter of a module, loaded from these tensors."""
    (tmp_path / "alone.yaml").write_text(
        "tensors: {w.weight: w.weight, w: {to: 'w.{e}.weight', transform: stack}, "
        "w_blocks: {to: 'w.{e}.weight', transform: stack}}"
    )
    table = read_layouts({"alone": Resource("alone", tmp_path / "alone.yaml", "test")})
    save_file(tensors, tmp_path / "alone.safetensors")
    module = torch.nn.Module()
    module.w = torch.nn.Module()
    module.w.weight = torch.nn.Parameter(torch.empty(shape, device="meta"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.loading.files.layout_named", lambda name: table[name])
        patch.setattr("zoo.loading.load.layout_named", lambda name: table[name])
        patch.setattr("zoo.loading.files.layouts", lambda: table)
        load_weights(module, Plan(plan_of().card, Alone(shape=shape)), locate(tmp_path / "alone.safetensors"))
    return module.w.weight.detach()


def test_gpt_oss_experts_equal_transformers(tmp_path: Path, plan_of: Plans) -> None:
    """Which turns them around as well: its products are x W."""
    blocks, scales = codes(3, 10, 2, 16), codes(3, 10, 2, seed=1) % 9 + 118
    found = alone(tmp_path, plan_of, {"w_blocks": blocks, "w_scales": scales}, (3, 10, 64))
    assert torch.equal(found.transpose(1, 2), convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


@pytest.mark.parametrize("grid", [(), (3,), (3, 1, 1), (3, 2, 2), (3, 130, 1)])
def test_stacked_fp8(tmp_path: Path, plan_of: Plans, grid: tuple[int, ...]) -> None:
    data, scale = codes(3, 130, 140).view(torch.float8_e4m3fn), positive(*grid)
    found = alone(tmp_path, plan_of, {"w": data, "w_scale_inv": scale}, (3, 130, 140))
    for e in range(3):
        one = scale if grid == () else scale[e]
        rows = one.expand(1, 1) if one.ndim < 2 else one
        size = (128, 128) if rows.shape == (2, 2) else (-(-130 // rows.shape[0]), 140)
        spread = rows.repeat_interleave(size[0], 0)[:130].repeat_interleave(size[1], 1)[:, :140]
        assert torch.equal(found[e], data[e].float() * spread)


W = "layers.0.attention.wv"
NOT_READ = "are not read yet; found layers.0.x"


def add(name: str, tensors: Tensors) -> None:
    tensors[name] = torch.ones(1)


BAD: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "no scale": ("FP8", lambda t: t.pop(f"{W}.qscale_weight"), rf"{W}.weight is F8_E4M3 without scales\)"),
    "no scale of fours": ("NVFP4", lambda t: t.pop(f"{W}.weight_scale"), f"are missing; expected {W}.weight_scale"),
    "no global scale": (
        "NVFP4",
        lambda t: t.pop(f"{W}.weight_global_scale"),
        f"are missing; expected {W}.weight_global_scale",
    ),
    "a scale for each column": (
        "FP8",
        lambda t: t.update({f"{W}.qscale_weight": torch.ones(1, 160)}),
        r"do not fit .*; found \[1, 160\] F32; expected one number, one for each row, or one for each 128 x 128 block",
    ),
    "a scale of bytes": (
        "FP8",
        lambda t: t.update({f"{W}.qscale_weight": torch.ones(1, dtype=torch.uint8)}),
        r"do not fit .*found \[1\] U8",
    ),
    "blocks of another size": (
        "FP8 by blocks",
        lambda t: t.update({f"{W}.weight_scale_inv": torch.ones(3, 3)}),
        r"found \[3, 3\] F32",
    ),
    "an odd packing": (
        "NVFP4",
        lambda t: t.update({f"{W}.weight_packed": codes(32, 79)}),
        rf"{W}.weight is \[32, 158\], the card says \[32, 160\]",
    ),
    "another width": (
        "NVFP4",
        lambda t: t.update({f"{W}.weight_packed": codes(32, 70)}),
        r"found \[32, 10\] F8_E4M3; expected one for each 16 columns, of \[32, 140\]",
    ),
    "scales for other columns": (
        "MXFP4",
        lambda t: t.update({f"{W}.weight_scale": codes(32, 10)}),
        r"found \[32, 10\] U8; expected one for each 32 columns",
    ),
    "scales of whole numbers": (
        "NVFP4",
        lambda t: t.update({f"{W}.weight_scale": torch.ones(32, 10, dtype=torch.int32)}),
        "found I32; expected F8_E4M3 or U8 or F8_E8M0",
    ),
    "several global scales": (
        "NVFP4",
        lambda t: t.update({f"{W}.weight_global_scale": torch.ones(32)}),
        r"found \[32\] F32; expected one F32",
    ),
    "a scale without its weight": ("FP8", lambda t: t.pop(f"{W}.weight"), f"in the files only: {W}.qscale_"),
    "plain and quantised": (
        "NVFP4",
        lambda t: t.update({f"{W}.weight": torch.ones(32, 160)}),
        "is there plain and quantised",
    ),
    "blocks of another packing": (
        "FP8",
        lambda t: t.update({"w_blocks": codes(3, 8), "w_scales": codes(3, 1)}),
        "not packed as MXFP4 is",
    ),
    **{title: ("FP8", partial(add, f"layers.0.x{ending}"), f"{title}.*{NOT_READ}") for ending, title in UNREAD.items()},
}


@pytest.mark.parametrize("name", BAD)
def test_faults(tmp_path: Path, plan_of: Plans, native_names: Names, name: str) -> None:
    scheme, change, message = BAD[name]
    plan = plan_of("dense", {**MIXER, "head_dim": 32}, **WIDE)
    if scheme in ("NVFP4", "MXFP4"):
        plan = plan_of("moe", {**MIXER, "head_dim": 32}, **WIDE, **hidden(64))
    files, _ = quantised(plan, native_names, scheme)
    change(files)
    save_file(files, tmp_path / "consolidated.safetensors")
    with pytest.raises(WeightsError, match=message):
        loaded(plan, tmp_path)
