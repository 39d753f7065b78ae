"""Mistral's own inference code as an oracle on the CPU, for native folders in float32.

The model, its cache and its loading are theirs, and the masks are xformers' own. Only xformers' attention kernel,
which needs CUDA, is replaced, by a softmax over all keys with the mask added.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

logging.getLogger("xformers").setLevel(logging.ERROR)  # it warns that its kernels cannot be loaded

from mistral_inference import transformer_layers  # noqa: E402
from mistral_inference.args import TransformerArgs  # noqa: E402
from mistral_inference.cache import BufferCache  # noqa: E402
from mistral_inference.transformer import Transformer  # noqa: E402


def _attention(q_BTHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, mask: Any) -> Tensor:
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHd, k_BSHd) / q_BTHd.shape[-1] ** 0.5
    # Without a mask their code lets every token see every other, so a call that has none is a mistake of the test.
    scores_BHTS += mask.materialize(scores_BHTS.shape[2:], dtype=scores_BHTS.dtype)
    return torch.einsum("bhts,bshd->bthd", scores_BHTS.softmax(-1), v_BSHd).contiguous()


transformer_layers.memory_efficient_attention = _attention


def open_folder(folder: Path, *, max_batch_size: int = 8) -> Transformer:
    """The model of a folder that holds `params.json` and `consolidated.safetensors` (or `consolidated.00.pth`)."""
    return Transformer.from_folder(folder, max_batch_size=max_batch_size, device="cpu", dtype=torch.float32)


@torch.inference_mode()
def logits(model: Transformer, prompts: Sequence[Sequence[int]], *, chunk: int | None = None) -> list[Tensor]:
    """Logits (T, V) of each prompt, all prompts together in chunks of `chunk` tokens (None: one prefill).

    With several chunks the prompts must be of one length, since their cache takes no empty sequence.
    """
    longest = max(map(len, prompts))
    size = chunk or longest
    assert size >= longest or len({len(p) for p in prompts}) == 1
    cache = _empty_cache(model, len(prompts), longest)
    rows: list[list[Tensor]] = [[] for _ in prompts]
    for start in range(0, longest, size):
        pieces = [list(p[start : start + size]) for p in prompts]
        lengths = [len(piece) for piece in pieces]
        logits_TV = model(torch.tensor([token for piece in pieces for token in piece]), seqlens=lengths, cache=cache)
        for row, part in zip(rows, logits_TV.split(lengths), strict=True):
            row.append(part)
    return [torch.cat(row) for row in rows]


@torch.inference_mode()
def greedy(model: Transformer, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The likeliest continuation, token by token through their cache."""
    cache = _empty_cache(model, 1, len(prompt) + max_tokens)
    tokens: list[int] = []
    piece = list(prompt)
    for _ in range(max_tokens):
        piece = [int(model(torch.tensor(piece), seqlens=[len(piece)], cache=cache)[-1].argmax())]
        tokens += piece
    return tokens


def _empty_cache(model: Transformer, sequences: int, tokens: int) -> BufferCache:
    args = model.args
    cache = BufferCache(args.n_layers, sequences, tokens, args.n_kv_heads, args.head_dim, args.sliding_window)
    cache.to(device=model.device, dtype=model.dtype)
    for slots in (*cache.cache_k.values(), *cache.cache_v.values()):
        slots.zero_()  # they come uninitialised, and a NaN behind the mask would reach the sum
    return cache


def write_folder(
    folder: Path, *, experts: int | None = None, pickled: bool = False, seed: int = 0, **changes: Any
) -> Path:
    """A small random checkpoint in Mistral's native form; `changes` go into `params.json`."""
    params: dict[str, Any] = {"dim": 24, "n_layers": 2, "head_dim": 16, "hidden_dim": 40, "n_heads": 4, "n_kv_heads": 2}
    params |= {"norm_eps": 1e-5, "vocab_size": 97, "rope_theta": 1e4, **changes}
    if experts:
        params["moe"] = {"num_experts": experts, "num_experts_per_tok": 2}
    with torch.device("meta"):
        model = Transformer(TransformerArgs.from_dict(params))
    draw = torch.Generator().manual_seed(seed)
    weights = {name: 0.3 * torch.randn(p.shape, generator=draw) for name, p in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    if pickled:
        torch.save(weights, folder / "consolidated.00.pth")
    else:
        save_file(weights, folder / "consolidated.safetensors")
    return folder
