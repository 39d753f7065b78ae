"""PEFT's adapter_config.json: what it sets, what leaves the product alone, and what is refused by name.

Source: `LoraConfig` of peft 0.21 and its `get_pattern_key`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.registry.errors import WeightsError

READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"}
READ |= {"target_modules", "exclude_modules", "layers_to_transform", "base_model_name_or_path", "modules_to_save"}

INERT = {"task_type", "inference_mode", "lora_dropout", "auto_mapping", "revision", "peft_version", "layers_pattern"}
INERT |= {"runtime_config", "megatron_config", "megatron_core", "qalora_group_size", "loftq_config", "eva_config"}
INERT |= {"corda_config", "lora_ga_config", "ensure_weight_tying"}
"""Settings of training, of starting values, and of variants that other keys turn on."""

PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base's weights alone; others are to be used with a changed base."""

_PLAIN: Mapping[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": PLAIN_STARTS}


@dataclass(frozen=True)
class PeftConfig:
    """The settings that decide what is added. targets: names that must have tensors; empty when that cannot be told."""

    r: int
    alpha: float
    rslora: bool
    base: str | None
    targets: tuple[str, ...]
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, given: Mapping[str, Any], where: str) -> PeftConfig:
        """Raises WeightsError for another kind of adapter and for any setting that is not known to do nothing."""
        if str(given.get("peft_type")) != "LORA":
            raise WeightsError(
                "not a LoRA adapter",
                where=where,
                found=f"peft_type {given.get('peft_type')!r}",
                expected="peft_type 'LORA'",
            )
        _refuse_others(given, where)
        open_ended = given.get("exclude_modules") or given.get("layers_to_transform") is not None
        targets = given.get("target_modules")
        return cls(
            r=_number(given, "r", where, whole=True),
            alpha=_number(given, "lora_alpha", where),
            rslora=bool(given.get("use_rslora")),
            base=given.get("base_model_name_or_path") or None,
            targets=tuple(targets) if isinstance(targets, list) and not open_ended else (),
            ranks=given.get("rank_pattern") or {},
            alphas=given.get("alpha_pattern") or {},
        )

    def rank(self, name: str) -> int:
        """The rank of a module."""
        return self.ranks.get(_pattern(self.ranks, name), self.r)

    def scale(self, name: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski, arXiv 2312.03732)."""
        rank = self.rank(name)
        if rank < 1:
            raise WeightsError(
                f"the adapter of {name!r} has rank 0", where="adapter_config.json", expected="at least 1"
            )
        return float(self.alphas.get(_pattern(self.alphas, name), self.alpha)) / (
            math.sqrt(rank) if self.rslora else rank
        )


def _pattern(patterns: Iterable[str], name: str) -> str:
    """The first pattern that the end of a module's path matches, else the path."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), name)


def _refuse_others(given: Mapping[str, Any], where: str) -> None:
    for name, value in given.items():
        if name in READ or name in INERT:
            continue
        plain = _PLAIN.get(name, (None, False))
        if not (value in plain or (name not in _PLAIN and value in ({}, []))):
            raise WeightsError(
                f"{name} is not supported",
                where=where,
                found=repr(value)[:80],
                expected=" or ".join(map(repr, plain)),
                hint="merge the adapter with the library that trained it, and load the merged model",
            )


def _number(given: Mapping[str, Any], name: str, where: str, *, whole: bool = False) -> Any:
    value = given.get(name)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or (whole and value < 1):
        raise WeightsError(
            f"the adapter's {name} is not understood",
            where=where,
            found=repr(value),
            expected="a whole number, 1 or more" if whole else "a number",
        )
    return value
