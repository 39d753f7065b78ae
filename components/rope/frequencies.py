"""Angles per position of each lane pair, for every kind of rope. r stands for rotary_dim.

The order of operations is that of the reference implementations: a last bit of a frequency, times a position of a
hundred thousand, moves an angle by hundredths.
"""

from __future__ import annotations

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from zoo.components.rope.spec import (
    DefaultRopeSpec,
    LinearRopeSpec,
    Llama3RopeSpec,
    LongRopeSpec,
    RopeSpec,
    YarnRopeSpec,
)

Frequencies = tuple[Tensor, float]
"""(r / 2) float32 angles per position, and the factor of cos and sin."""


def default(spec: DefaultRopeSpec) -> Frequencies:
    """theta^(-2i / r)."""
    return _plain(spec), 1.0


def linear(spec: LinearRopeSpec) -> Frequencies:
    """theta^(-2i / r) / factor."""
    return _plain(spec) / spec.factor, 1.0


def llama3(spec: Llama3RopeSpec) -> Frequencies:
    """Divides long wavelengths by `factor`, keeps short ones, blends between (the code of Llama 3.1's release)."""
    plain = _plain(spec)
    turns = spec.original_context / (2 * pi / plain)
    keep = ((turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * plain / spec.factor + keep * plain, 1.0


def yarn(spec: YarnRopeSpec) -> Frequencies:
    """Blends plain and interpolated angles by how often a lane turns in the original context (arXiv 2309.00071)."""
    low, high = _turning_lane(spec, spec.beta_fast), _turning_lane(spec, spec.beta_slow)
    if spec.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, spec.lanes - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(spec.lanes // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    plain, keep = _plain(spec), 1 - ramp
    factor = 0.1 * log(spec.factor) + 1 if spec.attention_factor is None else spec.attention_factor
    return 1 / (spec.factor * _wavelengths(spec)) * (1 - keep) + plain * keep, factor


def longrope(spec: LongRopeSpec) -> Frequencies:
    """theta^(-2i / r) / factor_i."""
    factors_r = torch.tensor(spec.factors, dtype=torch.float32, device="cpu")
    return 1 / (factors_r * _wavelengths(spec)), spec.attention_factor


def _plain(spec: RopeSpec) -> Tensor:
    return 1 / _wavelengths(spec)


def _wavelengths(spec: RopeSpec) -> Tensor:
    """Over 2 pi. Always made on the CPU, also while a model is built on the meta device."""
    exponents: Tensor = torch.arange(0, spec.lanes, 2, dtype=torch.float32, device="cpu") / spec.lanes
    return spec.theta**exponents


def _turning_lane(spec: YarnRopeSpec, turns: float) -> float:
    """The lane pair that turns `turns` times within the original context."""
    return spec.lanes * log(spec.original_context / (turns * 2 * pi)) / (2 * log(spec.theta))
