"""Feed-forwards and routers against the oracle and against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.components.ffn.moe import MoE, moe_reference
from zoo.components.ffn.spec import ClampedSpec, GatedSpec, MLPSpec, MoESpec, SigmoidSpec, SoftmaxSpec, SoftmaxTopkSpec


def _moe_spec(experts: int = 5, chosen: int = 2) -> MoESpec:
    return MoESpec(
        dim=16,
        num_experts=experts,
        experts_per_token=chosen,
        router=SoftmaxTopkSpec(dim=16, num_experts=experts, experts_per_token=chosen),
        expert=GatedSpec(dim=16, hidden_dim=24),
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 7])
def test_gated_equals_the_oracle(
    activation: Any,
    rows: int,
    filled: Callable[..., Any],
    taken_apart: Callable[..., Any],
    oracle: ModuleType,
    close: Callable[..., None],
) -> None:
    spec = GatedSpec(dim=16, hidden_dim=24, activation=activation)
    gated, x = filled(spec), torch.randn(rows, 16)
    expected = oracle.gated(spec, taken_apart(spec, gated), x)
    close(gated(x), expected)
    with torch.inference_mode():
        close(gated(x), expected)


def test_gated_equals_transformers(filled: Callable[..., Any], close: Callable[..., None]) -> None:
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralMLP

    gated = filled(GatedSpec(dim=16, hidden_dim=24))
    theirs = MistralMLP(MistralConfig(hidden_size=16, intermediate_size=24))
    theirs.gate_proj.weight.data, theirs.up_proj.weight.data = gated.gate_up.weight.detach().chunk(2)
    theirs.down_proj.weight.data = gated.down.weight.detach()
    x = torch.randn(5, 16)
    close(gated(x), theirs(x))


@pytest.mark.parametrize("way", ["forward", "_grouped", "reference"])
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize(("experts", "chosen"), [(5, 2), (4, 1), (4, 4), (1, 1)])
def test_moe_equals_the_oracle(
    way: str,
    rows: int,
    experts: int,
    chosen: int,
    filled: Callable[..., Any],
    taken_apart: Callable[..., Any],
    oracle: ModuleType,
    close: Callable[..., None],
) -> None:
    """Three ways: expert by expert, one grouped product (as on a GPU), every expert on every token."""
    spec = _moe_spec(experts, chosen)
    moe, x = filled(spec), torch.randn(rows, 16)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "forward": moe,
        "_grouped": lambda x: moe._grouped(x, *moe.router(x)),
        "reference": lambda x: moe_reference(moe, x),
    }
    weights = {name: weight.double() for name, weight in taken_apart(spec, moe).items()}
    expected = oracle.moe(spec, weights, x.double())
    close(ways[way](x), expected)
    with torch.inference_mode():
        close(ways[way](x), expected)


def test_moe_equals_transformers(filled: Callable[..., Any], close: Callable[..., None]) -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    moe = filled(_moe_spec())
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    theirs.gate.weight.data = moe.router.weight.detach()
    theirs.experts.gate_up_proj.data = moe.experts_in.detach()
    theirs.experts.down_proj.data = moe.experts_down.detach()
    x = torch.randn(11, 16)
    close(moe(x), theirs(x[None])[0])


def test_routers_weights_sum_to_one_and_the_best_comes_first(filled: Callable[..., Any]) -> None:
    router, x = filled(_moe_spec().router), torch.randn(9, 16)
    weights, experts = router(x)
    logits = x @ router.weight.T
    assert weights.dtype is torch.float32
    assert experts.dtype is torch.int64
    torch.testing.assert_close(weights.sum(-1), torch.ones(9))
    assert torch.equal(experts[:, 0], logits.argmax(-1))
    assert (weights[:, 0] >= weights[:, 1]).all()


def test_tokens_do_not_meet_in_a_mixture(filled: Callable[..., Any], close: Callable[..., None]) -> None:
    moe, x = filled(_moe_spec()), torch.randn(9, 16)
    close(torch.cat([moe(row[None]) for row in x]), moe(x))


def test_moe_gradients_equal_the_references(filled: Callable[..., Any], close: Callable[..., None]) -> None:
    one, other = filled(_moe_spec()), filled(_moe_spec())
    x = torch.randn(9, 16)
    one(x).square().sum().backward()
    moe_reference(other, x).square().sum().backward()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        close(mine.grad, theirs.grad, "oracle")


@pytest.mark.parametrize("rows", [1, 6])
def test_moe_in_bfloat16(rows: int, filled: Callable[..., Any], close: Callable[..., None]) -> None:
    """Rounded weights and inputs, so that both choose the same experts."""
    rounded: MoE = filled(_moe_spec(), torch.bfloat16)
    x = torch.randn(rows, 16).bfloat16()
    exact = filled(_moe_spec(), torch.bfloat16).float()
    with torch.inference_mode():
        assert rounded(x).dtype is torch.bfloat16
        close(rounded(x), exact(x.float()), "bfloat16")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("groups", "taken"), [(1, 1), (3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("kind", [SoftmaxSpec, SigmoidSpec])
def test_router_equals_the_formula(
    kind: type[SoftmaxSpec | SigmoidSpec], groups: int, taken: int, normalize: bool, filled: Callable[..., Any]
) -> None:
    """Token by token, in plain numbers."""
    sizes: dict[str, Any] = {
        "dim": 16,
        "num_experts": 12,
        "experts_per_token": 3,
        "groups": groups,
        "groups_per_token": taken,
    }
    spec = kind(**sizes, normalize=normalize, scale=1.7)
    router, x_TD = filled(spec), torch.randn(9, 16)
    if kind is SigmoidSpec:
        router.bias.data.normal_(std=0.3)
    weights_TK, experts_TK = router(x_TD)
    for x, weights, experts in zip(x_TD, weights_TK.tolist(), experts_TK.tolist(), strict=True):
        logits = (router.weight.detach() @ x).double()
        scores = (logits.softmax(0) if kind is SoftmaxSpec else logits.sigmoid()).tolist()
        chosen = scores if kind is SoftmaxSpec else [s + b for s, b in zip(scores, router.bias.tolist(), strict=True)]
        best, width = (1 if kind is SoftmaxSpec else 2), 12 // groups
        totals = [sum(sorted(chosen[g * width : (g + 1) * width])[-best:]) for g in range(groups)]
        open_groups = sorted(range(groups), key=lambda g: -totals[g])[:taken]
        expected = sorted((e for e in range(12) if e // width in open_groups), key=lambda e: -chosen[e])[:3]
        assert experts == expected
        total = sum(scores[e] for e in expected) if normalize else 1.0
        assert weights == pytest.approx([1.7 * scores[e] / total for e in expected], rel=1e-5)


@pytest.mark.parametrize("rows", [1, 7])
def test_mlp_equals_the_formula(rows: int, filled: Callable[..., Any], close: Callable[..., None]) -> None:
    mlp, x = filled(MLPSpec(dim=16, hidden_dim=24, activation="relu2")), torch.randn(rows, 16)
    close(mlp(x), (x @ mlp.up.weight.T).clamp(min=0) ** 2 @ mlp.down.weight.T)


@pytest.mark.parametrize("way", ["forward", "_grouped"])
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("router", [SoftmaxTopkSpec, SoftmaxSpec, SigmoidSpec])
def test_mixture_of_other_experts_with_a_shared_one(
    router: type[SoftmaxTopkSpec | SoftmaxSpec | SigmoidSpec],
    rows: int,
    way: str,
    filled: Callable[..., Any],
    close: Callable[..., None],
) -> None:
    expert = MLPSpec(dim=16, hidden_dim=24, activation="relu2")
    sizes: dict[str, Any] = {"dim": 16, "num_experts": 5, "experts_per_token": 3}
    spec = MoESpec(**sizes, router=router(**sizes), expert=expert, shared=GatedSpec(dim=16, hidden_dim=40))
    moe, x = filled(spec), torch.randn(rows, 16)
    expected = moe_reference(moe, x)
    weights_TK, experts_TK = moe.router(x)
    by_hand = moe.shared(x).clone()
    for t in range(rows):
        for weight, e in zip(weights_TK[t], experts_TK[t].tolist(), strict=True):
            hidden = (moe.experts_in[e] @ x[t]).clamp(min=0) ** 2
            by_hand[t] += weight * (moe.experts_down[e] @ hidden)
    close(expected, by_hand)
    found = moe(x) if way == "forward" else moe._grouped(x, weights_TK, experts_TK) + moe.shared(x)
    close(found, expected)


@pytest.mark.parametrize("way", ["forward", "_grouped", "reference"])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_clamped_experts_equal_transformers(
    way: str, rows: int, filled: Callable[..., Any], close: Callable[..., None]
) -> None:
    """Inputs so large that the limits are reached on both sides."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    sizes: dict[str, Any] = {"dim": 16, "num_experts": 5, "experts_per_token": 3}
    expert = ClampedSpec(dim=16, hidden_dim=24, gain=1.702, limit=7.0)
    moe = filled(MoESpec(**sizes, router=SoftmaxTopkSpec(**sizes, bias=True), expert=expert))
    config = GptOssConfig(hidden_size=16, intermediate_size=24, num_local_experts=5, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    theirs = GptOssMLP(config)
    theirs.router.weight.data, theirs.router.bias.data = moe.router.weight.detach(), moe.router.bias.detach()
    theirs.experts.gate_up_proj.data = moe.experts_in.detach().transpose(1, 2)
    theirs.experts.gate_up_proj_bias.data = moe.experts_in_bias.detach()
    theirs.experts.down_proj.data = moe.experts_down.detach().transpose(1, 2)
    theirs.experts.down_proj_bias.data = moe.experts_down_bias.detach()
    x = 9 * torch.randn(rows, 16)
    between = moe.experts_in[0] @ x.T
    assert between.max() > 7 and between.min() < -7
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "forward": moe,
        "_grouped": lambda x: moe._grouped(x, *moe.router(x)),
        "reference": lambda x: moe_reference(moe, x),
    }
    close(ways[way](x), theirs(x[None])[0][0])


@pytest.mark.parametrize("rows", [1, 7])
def test_clamped_equals_the_formula(rows: int, filled: Callable[..., Any], close: Callable[..., None]) -> None:
    spec = ClampedSpec(dim=16, hidden_dim=24, gain=1.702, limit=0.5)
    one, x = filled(spec), torch.randn(rows, 16)
    gate, up = (x @ one.gate_up.weight[i::2].T + one.gate_up.bias[i::2] for i in range(2))
    gate, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
    hidden = gate / (1 + (-1.702 * gate).exp()) * (up + 1)
    close(one(x), hidden @ one.down.weight.T + one.down.bias)
