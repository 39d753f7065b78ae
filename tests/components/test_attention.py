"""Attention kernels against loops, and the mixer against transformers'."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.components.attention import kernels, memory_efficient
from zoo.components.attention.kernels import attention, attention_rows
from zoo.components.cache.fresh import FreshKV
from zoo.components.cache.store import fresh_step
from zoo.components.native import prompts
from zoo.registry.errors import ZooError

HEADS, GROUPS, WIDTH = 6, 2, 8


def _qkv(rows: int, past: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + past)
    q = torch.randn(rows, HEADS, WIDTH, generator=generator)
    k, v = torch.randn(2, GROUPS, past + rows, WIDTH, generator=generator).unbind()
    return q, k, v


def _loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: int,
    window: int | None,
    oracle: ModuleType,
    sinks: Tensor | None = None,
) -> Tensor:
    spec = SimpleNamespace(num_heads=HEADS, num_kv_heads=GROUPS, head_dim=WIDTH, scale=None, softcap=None)
    rows = []
    for t in range(len(q)):
        first = 0 if window is None else max(0, past + t - window + 1)
        keys, values = (x[:, first : past + t + 1].transpose(0, 1) for x in (k, v))
        rows.append(oracle._row(spec, q[t], keys, values, sinks).view(HEADS, WIDTH))
    return torch.stack(rows)


@pytest.mark.parametrize(("kernel", "few"), [("reference", 16), ("sdpa", 16), ("sdpa", 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 8, 100])
@pytest.mark.parametrize(("rows", "past"), [(1, 0), (1, 1), (1, 9), (4, 0), (9, 0), (4, 1), (3, 9), (9, 4)])
def test_kernels_equal_loops(
    kernel: str,
    few: int,
    window: int | None,
    rows: int,
    past: int,
    oracle: ModuleType,
    close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ZOO_ATTENTION", kernel)
    monkeypatch.setattr(kernels, "FEW", few)
    q, k, v = _qkv(rows, past)
    found = attention(q, k, v, scale=WIDTH**-0.5, past=past, window=window)
    close(found, _loops(q, k, v, past, window, oracle))


@pytest.mark.parametrize("fewest", [1, 3])
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize(("rows", "past"), [(9, 0), (9, 1), (7, 6)])
def test_blocks_equal_loops(
    fewest: int,
    block: int,
    window: int,
    rows: int,
    past: int,
    oracle: ModuleType,
    close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many rows behind a small window never see a mask of all rows by all keys, and no block has but a few rows."""
    monkeypatch.setattr(kernels, "BLOCK", block)
    monkeypatch.setattr(prompts, "FEWEST", fewest)
    lengths: list[int] = []
    real = kernels.KERNELS["auto"]

    def noted(q_THd: Tensor, *rest: Any) -> Tensor:
        lengths.append(len(q_THd))
        return real(q_THd, *rest)

    monkeypatch.setitem(kernels.KERNELS, "auto", noted)
    q, k, v = _qkv(rows, past)
    memo: kernels.Memo = {}
    found = attention(q, k, v, scale=WIDTH**-0.5, past=past, window=window, memo=memo)
    close(found, _loops(q, k, v, past, window, oracle))
    most = max(window, block) + fewest - 1
    assert sum(lengths) == rows
    assert all(min(fewest, max(window, block)) <= length <= most for length in lengths)
    assert all(x.shape[1] < most + window for x in memo.values() if isinstance(x, Tensor))


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("rows", "past"), [(1, 0), (1, 9), (9, 0), (7, 6)])
def test_sinks_equal_loops(
    kernel: str,
    window: int | None,
    rows: int,
    past: int,
    oracle: ModuleType,
    close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever kernel is chosen, and in blocks of rows."""
    monkeypatch.setenv("ZOO_ATTENTION", kernel)
    monkeypatch.setattr(kernels, "BLOCK", 4)
    monkeypatch.setattr(prompts, "FEWEST", 1)
    q, k, v = _qkv(rows, past)
    sinks = torch.linspace(-1.0, 30.0, HEADS)
    found = attention(q, k, v, scale=WIDTH**-0.5, past=past, window=window, sinks_H=sinks)
    close(found, _loops(q, k, v, past, window, oracle, sinks))


@pytest.mark.parametrize("sinks", [None, torch.linspace(-2.0, 3.0, HEADS)], ids=["", "sinks"])
@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_masked_rows_equal_single_rows(
    kernel: str, sinks: Tensor | None, close: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_ATTENTION", kernel)
    lengths = [1, 7, 4]
    parts = [_qkv(1, length - 1) for length in lengths]
    padded = [torch.stack([torch.nn.functional.pad(p[i], (0, 0, 0, 7 - p[i].shape[1])) for p in parts]) for i in (1, 2)]
    seen = torch.arange(7) < torch.tensor(lengths)[:, None]
    rows = torch.cat([q for q, _, _ in parts])
    found = attention_rows(rows, *padded, scale=0.3, seen_BS=seen, memo={}, sinks_H=sinks)
    expected = [attention(q, k, v, scale=0.3, past=k.shape[1] - 1, window=None, sinks_H=sinks) for q, k, v in parts]
    close(found, torch.cat(expected))


def test_masks_are_shared_by_layers() -> None:
    q, k, v = _qkv(3, 5)
    memo: kernels.Memo = {}
    for _ in range(2):
        attention(q, k, v, scale=1.0, past=5, window=None, memo=memo)
    assert len(memo) == 2, "the kernel and one mask"
    attention(q, k, v, scale=1.0, past=5, window=4, memo=memo)
    assert len(memo) == 3


def test_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_ATTENTION", "sdqa")
    with pytest.raises(
        ZooError, match=r"ZOO_ATTENTION: unknown attention kernel; found 'sdqa'; expected .*mean 'sdpa'"
    ):
        attention(*_qkv(2, 0), scale=1.0, past=0, window=None)


def test_kernel_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []

    def noted(q: Any, *others: Any) -> Any:
        used.append(others)
        return q

    monkeypatch.setitem(kernels.KERNELS, "reference", noted)
    monkeypatch.setenv("ZOO_ATTENTION", "reference")
    attention(*_qkv(2, 0), scale=1.0, past=0, window=None)
    assert len(used) == 1


class Fmha:
    """What xformers documents of itself: its formula, and the masks that its biases stand for."""

    class attn_bias:
        @staticmethod
        def LowerTriangularFromBottomRightMask() -> Callable[[int, int], Tensor]:
            return lambda rows, keys: torch.ones(rows, keys).tril(keys - rows).bool()

        @staticmethod
        def LowerTriangularFromBottomRightLocalAttentionMask(window: int) -> Callable[[int, int], Tensor]:
            return lambda rows, keys: torch.ones(rows, keys).tril(keys - rows).triu(keys - rows - window + 1).bool()

    @staticmethod
    def memory_efficient_attention_forward(q: Tensor, k: Tensor, v: Tensor, bias: Any, *, scale: float) -> Tensor:
        q, k, v = (x.permute(0, 2, 3, 1, 4) for x in (q * scale, k, v))
        scores = (q @ k.transpose(-1, -2)).masked_fill(~bias(q.shape[3], k.shape[3]), float("-inf"))
        return (scores.softmax(-1) @ v).permute(0, 3, 1, 2, 4)


@pytest.mark.parametrize("window", [None, 1, 3, 5])
@pytest.mark.parametrize(("rows", "past"), [(1, 0), (1, 9), (4, 0), (3, 9), (9, 4)])
def test_xformers_is_called_as_documented(
    window: int | None, rows: int, past: int, oracle: ModuleType, close: Callable[..., None]
) -> None:
    """Its kernels need a GPU; heads, groups and masks do not."""
    q, k, v = _qkv(rows, past)
    found = memory_efficient.attend(Fmha, q, k, v, WIDTH**-0.5, window)
    close(found, _loops(q, k, v, past, window, oracle))


def test_xformers_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_ATTENTION", "xformers")
    with pytest.raises(
        ZooError, match="ZOO_ATTENTION: xformers' attention runs on CUDA devices; found a tensor on cpu"
    ):
        attention(*_qkv(2, 0), scale=1.0, past=0, window=None)


def test_missing_xformers_names_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(ZooError, match=r"pip install 'zoo-inference\[xformers\]'"):
        memory_efficient.memory_efficient(on_cuda, None, None, 1.0, 0, None, {})  # type: ignore[arg-type]


def test_fresh_state_keeps_sequences_apart(close: Callable[..., None]) -> None:
    q, k, v = _qkv(7, 0)
    together = FreshKV([3, 4]).attend(q, k.transpose(0, 1), v.transpose(0, 1), scale=0.5, window=2)
    parts = [
        attention(q[part], k[:, part], v[:, part], scale=0.5, past=0, window=2) for part in (slice(0, 3), slice(3, 7))
    ]
    close(together, torch.cat(parts))


@pytest.mark.parametrize("window", [None, 5])
def test_mixer_equals_transformers(
    window: int | None, small: Callable[..., Any], filled: Callable[..., Any], close: Callable[..., None]
) -> None:
    """One layer with the same weights: projections, rope, window and head sharing."""
    from transformers import MistralConfig, MistralModel

    spec = small(mixer={"window": window})
    mixer = filled(spec.layers[0].mixer)
    config = MistralConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        sliding_window=window,
        attn_implementation="eager",
    )
    theirs = MistralModel(config)
    layer = theirs.layers[0].self_attn
    q, k, v = mixer.qkv.weight.detach().split((24, 12, 12))
    for projection, weight in ((layer.q_proj, q), (layer.k_proj, k), (layer.v_proj, v), (layer.o_proj, mixer.o.weight)):
        projection.weight.data = weight.detach()
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])), with_kwargs=True
    )
    theirs(torch.arange(13)[None] % 8)
    x, expected = seen[0]
    step = fresh_step(spec, [13])
    close(mixer(x[0].detach(), step, step.states[0]), expected[0].detach())


def test_query_scaling_equals_transformers(oracle: ModuleType) -> None:
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    from zoo.components.attention.scaling import query_scale
    from zoo.components.attention.spec import QueryScaling
    from zoo.components.step import Step

    positions = torch.tensor([0, 15, 16, 17, 47, 48, 100_000])
    found = query_scale(QueryScaling(beta=0.1, original_context=16), Step(positions, [7], [0], []))
    torch.testing.assert_close(found.flatten(), get_llama_4_attn_scale(positions[None], 0.1, 16).flatten())


@pytest.mark.parametrize("rows", [9, 12])
def test_a_window_that_hides_nothing_yet_ends_in_blocks_too(
    rows: int, oracle: ModuleType, close: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than a block and fewer than the window, by the formula."""
    monkeypatch.setattr(kernels, "BLOCK", 4)
    monkeypatch.setattr(prompts, "FEWEST", 1)
    q, k, v = _qkv(rows, 0)
    sinks = torch.linspace(-1.0, 30.0, HEADS)
    found = attention(q, k, v, scale=WIDTH**-0.5, past=0, window=12, sinks_H=sinks)
    close(found, _loops(q, k, v, 0, 12, oracle, sinks))
