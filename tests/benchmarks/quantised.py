"""Quantised weights beside bfloat16, in one process and by turns, on random weights of Mistral's shape.

    python tests/benchmarks/quantised.py                       # 1.1 B parameters, two minutes on 2 cores
    python tests/benchmarks/quantised.py --dim 256 --layers 2  # a quick try

Prefill is the time to one new token; decode is the time of a run with n + 1 new tokens less that of a run with one,
over n. Of each, the best of the rounds is compared: a busy machine makes single rounds slower, none faster.
"""

import argparse
import sys
import time
from typing import Any

import torch

import zoo

KINDS = (None, "int8", "int4")


def card(args: argparse.Namespace) -> dict[str, Any]:
    heads = {"num_heads": args.dim // 64, "num_kv_heads": max(1, args.dim // 256), "head_dim": 64}
    ffn: dict[str, Any] = {"kind": "gated", "hidden_dim": 4 * args.dim}
    if args.experts:
        ffn = {"kind": "moe", "num_experts": args.experts, "experts_per_token": 2, "expert": ffn}
    layer = {"mixer": {"kind": "attention", **heads, "rope": {"theta": 1.0e6}}, "ffn": ffn}
    model = {"dim": args.dim, "vocab_size": 32768, "norm": {"kind": "rms", "eps": 1.0e-5}}
    model["layers"] = [{"repeat": args.layers, **layer}]
    return {"name": "measured", "context_length": 2048, "model": model}


def rates(model: zoo.Model, prompt: list[int], args: argparse.Namespace) -> tuple[float, float]:
    """Tokens per second of prefill and of decode."""

    def seconds(prompts: list[list[int]], count: int) -> float:
        start = time.perf_counter()
        model.generate(prompts, max_tokens=count, ignore_eos=True)
        return time.perf_counter() - start

    prefill = len(prompt) / seconds([prompt], 1)
    prompts = [prompt[i : i + args.context] for i in range(args.batch)]
    begun = seconds(prompts, 1)
    return prefill, args.batch * args.new_tokens / (seconds(prompts, 1 + args.new_tokens) - begun)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"dim": 2048, "layers": 16, "experts": 0, "prompt-tokens": 512, "context": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"new-tokens": 24, "batch": 1, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    models: dict[str | None, zoo.Model] = {}
    for kind in KINDS:
        start = time.perf_counter()
        models[kind] = zoo.load(
            card(args), weights="random", device="cpu", dtype="bfloat16", quantize=kind, prefix_cache=False
        )
        taken = models[kind].memory.weights / 1e9
        say(f"{kind or 'bfloat16'}: {taken:.2f} GB, loaded in {time.perf_counter() - start:.1f} s")
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, 32000, (args.prompt_tokens,), generator=draw).tolist()
    found = [{kind: rates(model, prompt, args) for kind, model in models.items()} for _ in range(args.rounds)]
    best = {kind: [max(turn[kind][i] for turn in found) for i in (0, 1)] for kind in models}
    for kind, (prefill, decode) in best.items():
        say(
            f"{kind or 'bfloat16'}: prefill {prefill:.0f} tokens/s ({prefill / best[None][0]:.2f}), "
            f"decode {decode:.1f} ({decode / best[None][1]:.2f})"
        )


if __name__ == "__main__":
    main()
