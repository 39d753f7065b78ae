"""How far logits with a quantised cache (int8, fp8) are from those without a cache."""

from __future__ import annotations

import torch

from zoo.components.cache.store import Store, fresh_step, make_store
from zoo.components.decoder.model import Decoder
from zoo.components.step import Step
from zoo.engine.memory import Kept, Memory
from zoo.registry.spec import StateSpec

TOKENS = 64
"""Tokens of the sequence that is measured."""


def coding_notes(decoder: Decoder, dtype: torch.dtype, device: torch.device | str) -> list[str]:
    """What the codes of the model's cache save and change, in a sentence; nothing for a cache without codes."""
    spec = decoder.spec
    if spec.cache_dtype is None:
        return []
    kept = [state for state in spec.states() if state]
    plain = [state.model_copy(update={"cache_dtype": None}) for state in kept]
    share = _per_token(kept, dtype) / _per_token(plain, dtype)
    count, error = cache_error(decoder, dtype, device)
    return [
        f"cache in {spec.cache_dtype}: {share:.0%} of the bytes of {str(dtype).removeprefix('torch.')}, "
        f"logits of {count} random tokens change by {error:.2%}"
    ]


@torch.inference_mode()
def cache_error(decoder: Decoder, dtype: torch.dtype, device: torch.device | str) -> tuple[int, float]:
    """How many random tokens were computed, and the relative error of their logits: the norm of the difference between
    those through the cache and those without one, over the norm of the latter."""
    spec, device = decoder.spec, torch.device(device)
    count = min(TOKENS, spec.context_length)
    tokens_T = torch.randint(spec.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).to(device)

    def make(state: StateSpec, layers: int, budget: int | None) -> Store:
        return make_store(state, layers, dtype, device)

    memory = Memory(Kept(spec.states(), make, None), batch=1, context=count, pooled=False)
    memory.reserve(0, count)
    step = Step(torch.arange(count, device=device), [count], [0], memory.states([0], [count], [0]))
    plain_TV = decoder(tokens_T, fresh_step(spec, [count], device))
    coded_TV = decoder(tokens_T, step)
    return count, float((coded_TV - plain_TV).norm() / plain_TV.norm())


def _per_token(states: list[StateSpec], dtype: torch.dtype) -> int:
    """Bytes that a further token takes while no window is full."""
    return sum(state.nbytes(2, dtype.itemsize) - state.nbytes(1, dtype.itemsize) for state in states)
