"""A decoder written as its papers' formulas: float64, one sequence, one token, one head, one expert at a time.

It reads Specs, and checkpoint-level tensors by name; it shares no code with the modules that it judges.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def logits(spec: Any, tensors: Tensors, tokens: list[int]) -> Tensor:
    """(T, V) of one sequence."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    x = weights["embed.weight"][tokens]
    for index, layer in enumerate(spec.layers):
        part = _below(weights, f"layers.{index}.")
        mixer = latent_attention if layer.mixer.kind == "latent_attention" else attention
        x = x + mixer(layer.mixer, _below(part, "mixer."), norm(layer.norm, part["mixer_norm.weight"], x))
        feed_forward = moe if layer.ffn.kind == "moe" else gated
        x = x + feed_forward(layer.ffn, _below(part, "ffn."), norm(layer.norm, part["ffn_norm.weight"], x))
    head = weights["embed.weight" if spec.tied_embeddings else "head.weight"]
    return norm(spec.norm, weights["norm.weight"], x) @ head.T


def norm(spec: Any, weight: Tensor, x: Tensor) -> Tensor:
    return (
        torch.stack([row / math.sqrt(float((row * row).mean()) + spec.eps) for row in x.flatten(0, -2)]).view(x.shape)
        * weight
    )


def gated(spec: Any, weights: Tensors, x: Tensor) -> Tensor:
    gate = x @ weights["gate.weight"].T
    return (activation(spec.activation, gate) * (x @ weights["up.weight"].T)) @ weights["down.weight"].T


def activation(kind: str, x: Tensor) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": lambda x: x / (1 + torch.exp(-x)),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    }
    return functions[kind](x)


def moe(spec: Any, weights: Tensors, x: Tensor) -> Tensor:
    """Token by token: softmax over the logits of the chosen experts alone."""
    rows = []
    for row in x:
        scores = [float(weight @ row) for weight in weights["router.weight"]]
        chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[: spec.experts_per_token]
        total = sum(math.exp(scores[e]) for e in chosen)
        parts = [
            math.exp(scores[e]) / total * gated(spec.expert, _below(weights, f"experts.{e}."), row[None])[0]
            for e in chosen
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def attention(spec: Any, weights: Tensors, x: Tensor) -> Tensor:
    q, k, v = (_heads(spec, weights, name, x) for name in "qkv")
    if spec.qk_norm is not None:
        q, k = norm(spec.qk_norm, weights["q_norm.weight"], q), norm(spec.qk_norm, weights["k_norm.weight"], k)
    if spec.rope is not None:
        q, k = rope(spec.rope, q), rope(spec.rope, k)
    rows = []
    for t in range(len(x)):
        query = q[t] * query_scale(spec.query_scaling, t)
        first = 0 if spec.window is None else max(0, t - spec.window + 1)
        rows.append(_row(spec, query, k[first : t + 1], v[first : t + 1], weights.get("sinks")))
    y = torch.stack(rows) @ weights["o.weight"].T
    return y + weights["o.bias"] if spec.o_bias else y


def _row(spec: Any, query: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
    shared = spec.num_heads // spec.num_kv_heads
    heads = []
    for h in range(spec.num_heads):
        scale = 1 / math.sqrt(spec.head_dim) if spec.scale is None else spec.scale
        scores = [float(query[h] @ key[h // shared]) * scale for key in k]
        if spec.softcap is not None:
            scores = [spec.softcap * math.tanh(score / spec.softcap) for score in scores]
        powers = [math.exp(score) for score in scores]
        total = sum(powers) + (0.0 if sinks is None else math.exp(sinks[h]))
        heads.append(sum(p / total * value[h // shared] for p, value in zip(powers, v, strict=True)))
    return torch.cat(heads)


def latent_attention(spec: Any, weights: Tensors, x: Tensor) -> Tensor:
    """Keys and values of every head from the latents; the turned lanes of a key are the same for all heads."""
    plain, turned = spec.nope_head_dim, spec.rope_head_dim
    queries = x @ weights["q.weight"].T if spec.q_lora_rank is None else _query_latents(spec, weights, x)
    q = queries.view(len(x), spec.num_heads, plain + turned)
    q = torch.cat((q[..., :plain], rope(spec.rope, q[..., plain:])), -1)
    below = x @ weights["kv_a.weight"].T
    latents = norm(spec.norm, weights["kv_a_norm.weight"], below[:, : spec.kv_lora_rank])
    shared = rope(spec.rope, below[:, None, spec.kv_lora_rank :])
    kv = (latents @ weights["kv_b.weight"].T).view(len(x), spec.num_heads, plain + spec.v_head_dim)
    scale = (plain + turned) ** -0.5
    if spec.mscale is not None:
        scale *= (0.1 * spec.mscale * math.log(spec.rope.factor) + 1) ** 2
    rows = []
    for t in range(len(x)):
        for h in range(spec.num_heads):
            query = q[t, h] * query_scale(spec.query_scaling, t) * scale
            scores = [float(query @ torch.cat((kv[s, h, :plain], shared[s, 0]))) for s in range(t + 1)]
            total = sum(math.exp(score) for score in scores)
            rows.append(
                torch.stack([math.exp(s) / total * v for s, v in zip(scores, kv[: t + 1, h, plain:], strict=True)]).sum(
                    0
                )
            )
    return torch.stack(rows).view(len(x), -1) @ weights["o.weight"].T


def _query_latents(spec: Any, weights: Tensors, x: Tensor) -> Tensor:
    return norm(spec.norm, weights["q_a_norm.weight"], x @ weights["q_a.weight"].T) @ weights["q_b.weight"].T


def query_scale(scaling: Any, position: int) -> float:
    return 1.0 if scaling is None else 1 + scaling.beta * math.log(1 + position // scaling.original_context)


def rope(spec: Any, x: Tensor) -> Tensor:
    """Lane i and lane i + r/2 as one complex number, turned by position x frequency."""
    frequencies, factor = rope_frequencies(spec)
    half = len(frequencies)
    turned = x.clone()
    for position in range(len(x)):
        for i, frequency in enumerate(frequencies):
            number = torch.complex(x[position, :, i], x[position, :, i + half])
            number = number * factor * cmath.exp(1j * position * frequency)
            turned[position, :, i], turned[position, :, i + half] = number.real, number.imag
    return turned


def rope_frequencies(spec: Any) -> tuple[list[float], float]:
    lanes = spec.head_dim if spec.rotary_dim is None else spec.rotary_dim
    plain = [spec.theta ** (-2 * i / lanes) for i in range(lanes // 2)]
    if spec.kind == "default":
        return plain, 1.0
    if spec.kind == "linear":
        return [f / spec.factor for f in plain], 1.0
    if spec.kind == "llama3":
        return [_llama3(spec, f) for f in plain], 1.0
    factor = spec.attention_factor
    ramp = _yarn_ramp(spec, lanes)
    blended = [f / spec.factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]
    return blended, 0.1 * math.log(spec.factor) + 1 if factor is None else factor


def _llama3(spec: Any, frequency: float) -> Any:
    wavelength = 2 * math.pi / frequency
    if wavelength > spec.original_context / spec.low_freq_factor:
        return frequency / spec.factor
    if wavelength < spec.original_context / spec.high_freq_factor:
        return frequency
    share = spec.original_context / wavelength - spec.low_freq_factor
    share /= spec.high_freq_factor - spec.low_freq_factor
    return (1 - share) * frequency / spec.factor + share * frequency


def _yarn_ramp(spec: Any, lanes: int) -> list[float]:
    def lane(turns: float) -> float:
        return lanes * math.log(spec.original_context / (2 * math.pi * turns)) / (2 * math.log(spec.theta))

    low, high = lane(spec.beta_fast), lane(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, lanes - 1)
    width = high - low if high != low else 0.001
    return [min(max((i - low) / width, 0.0), 1.0) for i in range(lanes // 2)]


def _heads(spec: Any, weights: Tensors, name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    if spec.qkv_bias:
        y = y + weights[f"{name}.bias"]
    return y.view(len(x), -1, spec.head_dim)


def _below(weights: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
