"""Triton kernels against the plain formulas that they stand for: compiled on a GPU, else interpreted."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.components import few, fused, quantised, quantised_gpu
from zoo.components.attention import paged
from zoo.components.attention.kernels import attention_rows
from zoo.components.attention.paged import attention_pages, keep_rows
from zoo.components.cache.code import RowCode
from zoo.components.cache.spec import CacheDtype
from zoo.components.ffn.gated import gate
from zoo.components.ffn.moe import MoE
from zoo.components.kinds import KINDS, Kind
from zoo.components.mamba import single
from zoo.components.mamba.convolution import CausalConv
from zoo.components.mamba.scan import ssd
from zoo.components.norm.rms import rms_reference
from zoo.components.quantised import Quantised
from zoo.components.rope.rotary import rotate
from zoo.engine import runner
from zoo.engine.engine import Engine
from zoo.registry.errors import ZooError
from zoo.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = "TRITON_INTERPRET"
NARROW = 8e-3 if DEVICE == "cuda" else 2e-2
"""Of bfloat16: one last bit, or two where the interpreter cuts numbers off that a GPU rounds."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

PAGE = 16


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED in os.environ, reason="the kernel is tested as it is")
def test_interpreted_kernels() -> None:
    """In a process of its own: Triton decides when it is imported whether it compiles or interprets."""
    environment = os.environ | {INTERPRETED: "1"}
    command = [sys.executable, "-m", "pytest", "-v", "--import-mode=importlib", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b0 skipped|\b1 skipped", done.stdout), done.stdout


each_kernel = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and INTERPRETED not in os.environ),
    reason="needs Triton, and a process of its own where it interprets",
)


@each_kernel
@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("coded", [None, "int8", "fp8"])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "width", "pages", "window", "softcap"),
    [
        (1, 8, 2, 16, 5, None, None),
        (3, 6, 2, 24, 20, None, None),
        (3, 8, 8, 32, 40, 70, None),
        (4, 4, 1, 64, 33, None, 5.0),
        (2, 4, 2, 80, 18, 260, 3.0),
        (2, 40, 2, 128, 17, 1, None),
        (2, 3, 3, 9, 17, None, None),
        (1, 2, 1, 9, 330, None, None),
    ],
)
def test_attention_over_pages(
    batch: int,
    heads: int,
    groups: int,
    width: int,
    pages: int,
    window: int | None,
    softcap: float | None,
    sunk: bool,
    coded: CacheDtype | None,
) -> None:
    """Over numbers, and over codes: the formula gets what these stand for."""
    generator, code = torch.Generator().manual_seed(pages), RowCode(coded, (width,), torch.float32)
    pool = code.encode(torch.randn(batch * pages + 1, 2, PAGE, groups, width, generator=generator))
    tables_BP = 1 + torch.randperm(batch * pages, generator=generator).view(batch, pages)
    filled_B = torch.randint(1, pages * PAGE + 1, (batch,), generator=generator)
    filled_B[0] = pages * PAGE
    q_BHd = torch.randn(batch, heads, width, generator=generator)
    sinks_H = torch.linspace(-1.0, 8.0, heads) if sunk else None
    sunk_H = None if sinks_H is None else sinks_H.to(DEVICE)
    k_BGSd, v_BGSd = (code.decode(pool[:, i][tables_BP].flatten(1, 2)).transpose(1, 2) for i in range(2))
    slots_S = torch.arange(pages * PAGE)
    seen_BS = slots_S < filled_B[:, None]
    if window is not None:
        seen_BS &= slots_S >= filled_B[:, None] - window
    how: dict[str, Any] = {"scale": 0.3, "softcap": softcap}
    expected = attention_rows(q_BHd, k_BGSd, v_BGSd, seen_BS=seen_BS, memo={}, sinks_H=sinks_H, **how)
    inputs = [value.to(DEVICE) for value in (q_BHd, pool, tables_BP, filled_B)]
    found = attention_pages(*inputs, window=window, sinks_H=sunk_H, coded=coded, **how)
    assert relative_error(found.cpu(), expected) < 1e-5


DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "lanes", "width"), [(1, 5, 8, 8), (7, 40, 128, 128), (3, 6, 20, 48), (4, 3, 12, 12)]
)
def test_rotation(rows: int, heads: int, lanes: int, width: int, dtype: torch.dtype) -> None:
    """Of heads that are a part of wider rows, as queries and keys are."""
    x_THd = draw(rows, heads + 2, width).to(dtype)[:, :heads]
    angles_Tr = draw(rows, lanes // 2)
    cos, sin = angles_Tr.cos(), angles_Tr.sin()
    angles = torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)
    expected = rotate(x_THd, angles)
    found = fused.rotate(x_THd.to(DEVICE), *(angle.to(DEVICE) for angle in angles))
    assert relative_error(found.cpu().float(), expected.float()) < (1e-6 if dtype is torch.float32 else NARROW)


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 24), (5, 1500)])
def test_gate(rows: int, width: int, dtype: torch.dtype) -> None:
    x_T2F = draw(rows, 2 * width).to(dtype)
    expected = gate(x_T2F, "silu")
    found = fused.gate(x_T2F.to(DEVICE))
    assert relative_error(found.cpu().float(), expected.float()) < (1e-6 if dtype is torch.float32 else NARROW)


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 96)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of rows one after the other, and of heads that are a part of wider rows."""
    x = draw(*shape[:-2], shape[-2] + 1, shape[-1]).to(dtype)[..., : shape[-2], :]
    weight_D = 1 + draw(shape[-1]).to(dtype) / 4
    found = fused.rms(x.to(DEVICE), weight_D.to(DEVICE), 1e-5)
    expected = rms_reference(x, weight_D, 1e-5)
    assert relative_error(found.cpu().float(), expected.float()) < (1e-6 if dtype is torch.float32 else NARROW)


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_a_sum(dtype: torch.dtype) -> None:
    x_TD, y_TD = draw(3, 50).to(dtype)[:, :40], draw(3, 43).to(dtype)[:, 1:41]
    weight_D = 1 + draw(40).to(dtype) / 4
    total_TD, normed_TD = fused.add_rms(x_TD.to(DEVICE), y_TD.to(DEVICE), weight_D.to(DEVICE), 1e-5)
    allowed = 1e-6 if dtype is torch.float32 else NARROW
    assert relative_error(total_TD.cpu().float(), (x_TD + y_TD).float()) < allowed
    assert relative_error(normed_TD.cpu().float(), rms_reference(x_TD + y_TD, weight_D, 1e-5).float()) < allowed


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_in_place(bias: bool, dtype: torch.dtype) -> None:
    """Of rows that are a part of wider ones, at places in any order."""
    conv = CausalConv(600, 4, bias=bias).to(dtype)
    for parameter in conv.parameters():
        parameter.data.copy_(draw(*parameter.shape) / 2)
    pool, places_B, x_BW = draw(9, 3, 600).to(dtype), torch.tensor([4, 1, 7]), draw(3, 700).to(dtype)[:, :600]
    with torch.inference_mode():
        expected, left = conv(pool[places_B], x_BW.unsqueeze(1))
        kept = pool.to(DEVICE)
        found = conv.to(DEVICE).in_place(kept, places_B.to(DEVICE), x_BW.to(DEVICE))
    assert relative_error(found.cpu().float(), expected[:, 0].float()) < (1e-6 if dtype is torch.float32 else NARROW)
    assert torch.equal(kept.cpu()[places_B], left)
    others = [i for i in range(9) if i not in places_B.tolist()]
    assert torch.equal(kept.cpu()[others], pool[others])


@each_kernel
@pytest.mark.parametrize(("heads", "width", "groups", "size"), [(6, 4, 2, 5), (16, 64, 8, 128)])
def test_state_in_place(heads: int, width: int, groups: int, size: int) -> None:
    pool, places_B = draw(7, heads * width, size), torch.tensor([2, 6])
    a_H, x_BHd, dt_BH = -draw(heads).abs(), draw(2, heads + 1, width)[:, :heads], draw(2, heads).abs()
    wide = draw(2, 2 * groups * size)
    b_BGn, c_BGn = (part.unflatten(1, (groups, size)) for part in wide.chunk(2, dim=1))
    rows = (x_BHd, dt_BH, b_BGn, c_BGn)
    expected, left = ssd(a_H, pool[places_B], *(value.unsqueeze(1) for value in rows))
    kept = pool.to(DEVICE)
    found = single.ssd(kept, places_B.to(DEVICE), a_H.to(DEVICE), *(value.to(DEVICE) for value in rows))
    assert relative_error(found.cpu(), expected[:, 0]) < 1e-5
    assert relative_error(kept.cpu()[places_B], left) < 1e-6
    others = [0, 1, 3, 4, 5]
    assert torch.equal(kept.cpu()[others], pool[others])


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 38, 1100), (2, 7, 24), (5, 64, 700), (8, 130, 512)])
def test_products_of_few_rows(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """Of rows and weights that are a part of wider ones; with the gate of a feed-forward."""
    x_TI, weight_OI = draw(rows, inputs + 8).to(dtype)[:, :inputs], draw(2 * outputs, inputs + 16).to(dtype)[:, :inputs]
    bias_O, allowed = draw(2 * outputs).to(dtype), 1e-5 if dtype is torch.float32 else NARROW
    x, weight = x_TI.to(DEVICE), weight_OI.to(DEVICE)
    for bias in (None, bias_O):
        expected = F.linear(x_TI.float(), weight_OI.float(), None if bias is None else bias.float())
        found = few.product(x, weight, None if bias is None else bias.to(DEVICE))
        assert relative_error(found.cpu().float(), expected) < allowed
    gated_TO = gate(F.linear(x_TI.float(), weight_OI.float()).to(dtype), "silu").float()
    assert relative_error(few.product(x, weight, gated=True).cpu().float(), gated_TO) < allowed


@each_kernel
@pytest.mark.parametrize("coded", [None, "int8", "fp8"])
@pytest.mark.parametrize(("batch", "groups", "width"), [(1, 2, 16), (3, 1, 9), (5, 8, 80)])
def test_new_rows_to_pages(batch: int, groups: int, width: int, coded: CacheDtype | None) -> None:
    """The very bytes of the formula, what is no number included, and no others."""
    code = RowCode(coded, (width,), torch.float32)
    k_BGd, v_BGd = (draw(batch, groups + 3, width + 1)[:, i : i + groups, :width] for i in (0, 2))
    k_BGd[0, 0] *= torch.logspace(-9, 9, width)
    v_BGd[0, 0], v_BGd[-1, -1, 3], k_BGd[-1, 0, 2] = 0.0, float("nan"), float("inf")
    pool = torch.ones(batch + 3, 2, PAGE, groups, code.width).to(code.stored)
    pages_B, offsets_B = torch.randperm(batch + 3)[:batch], torch.randint(PAGE, (batch,))
    found = pool.to(DEVICE)
    keep_rows([k_BGd.to(DEVICE), v_BGd.to(DEVICE)], found, torch.cat((pages_B, offsets_B)).to(DEVICE), coded)
    for plane, new_BGd in enumerate((k_BGd, v_BGd)):
        row = code.encode(new_BGd)
        row[..., code.start + width :] = 1 if coded else row[..., code.start + width :]
        pool[:, plane][pages_B, offsets_B] = row
    read, expected = code.decode(found.cpu()), code.decode(pool)
    assert torch.equal(read.isfinite(), expected.isfinite())
    assert torch.equal(read.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0))


FULL = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
"""What products are made in: the interpreter has none of bfloat16."""


@each_kernel
@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 130, 224), (3, 7, 5), (16, 33, 290), (23, 48, 96), (70, 100, 64), (300, 40, 40)]
)
def test_products_with_codes(kind: Kind, rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """Of rows that are a part of wider ones; of so many that the matrix is made numbers first, too."""
    made = Quantised.of(kind, draw(outputs, inputs).to(dtype))
    x_TI, bias_O = draw(rows, inputs + 3).to(dtype)[:, :inputs], draw(outputs).to(dtype)
    stored = made.codes.to(DEVICE), made.scales.to(DEVICE), made.shape
    for bias in (None, bias_O):
        expected = F.linear(x_TI.float(), made.plain().float(), None if bias is None else bias.float())
        found = quantised_gpu.product(kind, *stored, x_TI.to(DEVICE), None if bias is None else bias.to(DEVICE))
        assert found.dtype == dtype
        assert relative_error(found.cpu().float(), expected) < (1e-5 if dtype is torch.float32 else 5e-3)
    assert torch.equal(quantised_gpu.numbers(kind, *stored, dtype).cpu(), made.plain())


@each_kernel
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "counts", [[1, 0, 1, 0, 0], [0, 0, 0, 0, 2], [40, 1, 0, 17, 16], [200, 3, 70, 0, 64], [0, 5, 0, 0, 0]]
)
def test_products_of_experts(kind: Kind, counts: list[int]) -> None:
    """Rows behind the last expert's belong to nobody, and change nothing."""
    experts = [Quantised.of(kind, draw(50, 70) + e) for e in range(len(counts))]
    x_NI, ends_E = draw(sum(counts) + 3, 70), torch.tensor(counts).cumsum(0).int()
    codes, scales = (torch.stack([getattr(e, name) for e in experts]).to(DEVICE) for name in ("codes", "scales"))
    found = quantised_gpu.grouped(kind, codes[0], scales[0], experts[0].shape, x_NI.to(DEVICE), ends_E.to(DEVICE))
    parts = zip(x_NI.split([*counts, 3]), experts, strict=False)
    expected = torch.cat([F.linear(rows, expert.plain()) for rows, expert in parts])
    assert relative_error(found.cpu()[: sum(counts)], expected) < 1e-5


@each_kernel
@pytest.mark.parametrize("kernel", fused.KERNELS)
def test_kernels_are_checked_before_they_are_used(kernel: str) -> None:
    fused.works.cache_clear()
    assert fused.works(torch.device(DEVICE), kernel)


@pytest.mark.parametrize("fault", [0.5, float("nan"), RuntimeError("no compiler\nat all")])
def test_kernels_that_fail_are_left_out(
    fault: float | Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def found(kernel: str, device: torch.device, dtype: torch.dtype) -> float:
        if isinstance(fault, Exception):
            raise fault
        return fault if kernel == "rope" else 0.0

    monkeypatch.setattr("zoo.components.fused_check.difference", found)
    fused.works.cache_clear()
    assert not fused.works(torch.device("cpu"), "rope")
    assert fused.works(torch.device("cpu"), "gate") is not isinstance(fault, Exception)
    fused.works.cache_clear()
    message = caplog.records[0].getMessage()
    assert "the Triton kernel for rope is left out on cpu" in message
    assert ("no compiler" if isinstance(fault, Exception) else f"off by {fault:.0e} in torch.float32") in message
    assert "at all" not in message


def test_small_operations_are_plain_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(fused.runs(torch.ones(2, 3), kernel) for kernel in fused.KERNELS)


@needs_triton
@pytest.mark.parametrize(
    ("words", "kernels"), [("auto", fused.KERNELS), ("off", ()), ("rope", ("rope",)), ("norm,gate", ("norm", "gate"))]
)
def test_kernels_are_chosen(words: str, kernels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_FUSED", words)
    assert fused.wanted.__wrapped__() == set(kernels)


def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_FUSED", "rope,norms")
    with pytest.raises(ZooError, match=r"ZOO_FUSED.*'norms'.*attention, .*'norm'"):
        fused.wanted.__wrapped__()
    # Also where no GPU would ever ask for them.
    monkeypatch.setattr(runner, "wanted", fused.wanted.__wrapped__)
    with pytest.raises(ZooError, match=r"ZOO_FUSED.*'norms'"):
        zoo.load("tiny", device="cpu")


def test_kernels_asked_for_by_name_are_not_left_out_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    for words in ("auto", "off"):
        monkeypatch.setenv("ZOO_FUSED", words)
        assert fused.wanted.__wrapped__() == set()
    monkeypatch.setenv("ZOO_FUSED", "rope,norm")
    with pytest.raises(
        ZooError, match="ZOO_FUSED: Triton is not installed; found 'rope,norm'; expected 'auto' or 'off'"
    ):
        fused.wanted.__wrapped__()


ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope": {"theta": 50.0}}
MAMBA2 = {"kind": "mamba2", "num_heads": 4, "head_dim": 8, "num_groups": 2, "state_size": 5, "conv_size": 4}
GATED: dict[str, Any] = {"kind": "gated", "hidden_dim": 160}
MIXTURE = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": GATED}
LAYERS = [
    {"mixer": ATTENTION | {"window": 24}, "ffn": GATED},
    {"mixer": MAMBA2 | {"norm_eps": 1e-5}, "ffn": MIXTURE},
    {"mixer": ATTENTION, "ffn": GATED},
]


ENGINE = Engine.__init__


def loaded(monkeypatch: pytest.MonkeyPatch, **options: Any) -> zoo.Model:
    """A small model on the CPU whose decode steps run as a GPU's do: over pages, as recorded."""
    paged = partialmethod(ENGINE, storage="pages")
    monkeypatch.setattr(Engine, "__init__", paged)
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    model = {"dim": 56, "vocab_size": 61, "norm": {"kind": "rms", "eps": 1e-5}, "layers": LAYERS}
    card = {"name": "interpreted", "context_length": 300, "model": model}
    found = zoo.load(card, weights="random", device="cpu", dtype="float32", **options)
    for name, parameter in found.module.named_parameters():
        if parameter.ndim > 1 and not parameter.is_meta:
            parameter.data.copy_(draw(*parameter.shape) * (0.2 if name.startswith("embed") else 0.1))
    return found


@each_kernel
@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu has the models")
@pytest.mark.parametrize("options", [{}, {"cache_dtype": "fp8"}, {"quantize": "int8"}, {"quantize": "int4"}], ids=str)
def test_models_by_kernels(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mechanism in the engine, interpreted, gives the tokens and log-probabilities of the formulas."""
    ask: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True, "logprobs": 1}
    prompts = [[*range(28)], [5, 9]]
    monkeypatch.setattr(quantised, "is_native", lambda: False)
    with loaded(monkeypatch, **options) as model:
        expected = model.generate(prompts, **ask)
    ran: set[str] = set()

    def runs(x: torch.Tensor, kernel: str) -> bool:
        ran.add(kernel)
        return True

    monkeypatch.setattr(fused, "runs", runs)
    with loaded(monkeypatch, **options) as model:
        found = model.generate(prompts, **ask)
    assert ran >= set(fused.KERNELS) - (set() if "quantize" in options else {"products"})
    assert len({token for c in expected for token in c.tokens}) > 3, "the model must not be trivial"
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


class Launches(TorchDispatchMode):
    """Names what a GPU would be told to run: PyTorch's kernels, and Triton's, which are functions of these modules."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        for module in (few, fused, paged):
            programs = module._kernels()
            for name in ("add", "add_rms", "gate", "keep", "multiply", "rms", "rotate", "split"):
                if hasattr(programs, name):
                    monkeypatch.setattr(programs, name, Counted(name, getattr(programs, name), self))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, made = func.overloadpacket.__name__, func._schema.returns
        views = any(value.alias_info is not None and not value.alias_info.is_write for value in made)
        if not views and not name.startswith("empty") and name != "_unsafe_view":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Counted:
    """A Triton program that tells of its launches, and not of what its interpreter does."""

    def __init__(self, name: str, program: Any, launches: Launches) -> None:
        self.name, self.program, self.launches = name, program, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            before = [*self.launches.names]
            self.program[grid](*args, **options)
            self.launches.names = [*before, self.name]

        return launch


@each_kernel
@pytest.mark.skipif(DEVICE == "cuda", reason="counts what is interpreted")
@pytest.mark.parametrize("coded", ["none", "int8"])
def test_launches_of_a_layer(coded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dense layer launches in a recorded step of three sequences."""
    monkeypatch.setattr(fused, "runs", lambda x, kernel: True)
    with loaded(monkeypatch, cache_dtype=coded) as model:
        launches, layer = Launches(monkeypatch), model.module.layers[2]
        forward, names = layer.forward, launches.names

        def counted(x_TD: torch.Tensor, *rest: Any) -> torch.Tensor:
            nonlocal names
            launches.names = []
            with launches:
                out_TD: torch.Tensor = forward(x_TD, *rest)
            names = launches.names
            return out_TD

        monkeypatch.setattr(layer, "forward", counted)
        model.generate([[1, 2], [3], [5, 9]], max_tokens=2, ignore_eos=True)
    attention = ["rms", "multiply", "rotate", "keep", "split", "add", "multiply"]
    assert names == [*attention, "add_rms", "multiply", "multiply", "add"]


@each_kernel
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_mixtures_of_codes(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel of all experts, and by PyTorch's grouped product of the plain numbers."""
    with loaded(monkeypatch) as model:
        moe = model.module.layers[1].ffn
    assert isinstance(moe, MoE)
    moe.to(DEVICE)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    for name in moe.MATRICES:
        moe.store(name, lambda weight_OI: Quantised.of(kind, weight_OI.to(DEVICE)))
    x_TD = draw(11, 56).to(DEVICE)
    with torch.inference_mode():
        choice = moe.router(x_TD)
        expected = moe._grouped(x_TD, *choice)
        monkeypatch.setattr(fused, "runs", lambda x, kernel: True)
        found = moe._grouped(x_TD, *choice)
    assert relative_error(found.cpu(), expected.cpu()) < 1e-5
