"""zoo on a CUDA device, beside what the device can read and multiply, and beside transformers' `generate`.

    python tests/benchmarks/on_gpu.py --card mistral-7b-v0.3 --batch 1 64 256 --peer
    python tests/benchmarks/on_gpu.py --card mamba-codestral-7b --batch 1 64

Random weights of the card's real shape, bfloat16, greedy; no files are needed. Both sides have the same shape and the
same prompts, one after the other in one process. A roofline is the larger of bytes over the device's measured copy rate
and operations over its measured product rate: no program can be faster.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import zoo
from zoo.bench import bytes_per_step, seconds

Run = Callable[[list[list[int]], int], float]


def copy_rate() -> float:
    """Bytes per second that the device reads and writes in a copy, both counted."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(5))


def product_rate() -> float:
    """Operations per second of a large bfloat16 product on random numbers."""
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    a @ b
    return 2 * size**3 / min(seconds(lambda: [a @ b for _ in range(10)]) / 10 for _ in range(3))


def prompts_of(batch: int, tokens: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(3, vocabulary, (batch, tokens), generator=generator).tolist()


def rates(run: Run, prompts: list[list[int]], new_tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of a prefill with one new token, and of one decode step: medians.

    A step is the time of a run with more new tokens less that of one with fewer, both with enough of them for all
    sequences to have been read when the first one ends.
    """
    base = 1 + sum(map(len, prompts)) // 2048
    run(prompts, base + new_tokens)
    first = [run(prompts, 1) for _ in range(repeats)]
    steps = [(run(prompts, base + new_tokens) - run(prompts, base)) / new_tokens for _ in range(repeats)]
    return {
        "prefill_s": median(first),
        "prefill_tokens_per_second": sum(map(len, prompts)) / median(first),
        "step_s": median(steps),
        "decode_tokens_per_second": len(prompts) / median(steps),
    }


def zoo_run(model: "zoo.Model") -> Run:
    def run(prompts: list[list[int]], count: int) -> float:
        return seconds(lambda: model.generate(prompts, max_tokens=count, temperature=0.0, ignore_eos=True))

    return run


def peer_run(model: Any) -> Run:
    def run(prompts: list[list[int]], count: int) -> float:
        ids = torch.tensor(prompts, device="cuda")
        options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            return seconds(lambda: model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options))

    return run


def peer(card: str) -> Any:
    """transformers' model of the same shape, for the dense cards that its Mistral class has."""
    import transformers

    spec = zoo.inspect(card).plan.model
    layer: Any = spec.layers[0]  # type: ignore[attr-defined]
    config = transformers.MistralConfig(
        hidden_size=layer.mixer.dim,
        num_hidden_layers=len(spec.layers),  # type: ignore[attr-defined]
        num_attention_heads=layer.mixer.num_heads,
        num_key_value_heads=layer.mixer.num_kv_heads,
        head_dim=layer.mixer.head_dim,
        intermediate_size=layer.ffn.hidden_dim,
        vocab_size=spec.vocab_size,  # type: ignore[attr-defined]
        sliding_window=None,
        max_position_embeddings=32768,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="mistral-7b-v0.3")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="of one prompt alone; 0 leaves it out")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--peer", action="store_true", help="transformers too")
    parser.add_argument("--peer-batch", type=int, nargs="*", help="the batches that transformers runs; all by default")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "card": args.card,
        "prompt_tokens": args.prompt_tokens,
        "device": torch.cuda.get_device_name(),
        "versions": {"zoo": zoo.__version__, "torch": torch.__version__},
        "copy_bytes_per_second": copy_rate(),
        "product_flops": product_rate(),
        "zoo": {},
        "transformers": {},
    }
    torch.cuda.empty_cache()
    started = time.perf_counter()
    options = {"max_batch_size": max(args.batch), "prefix_cache": False}
    model = zoo.load(args.card, weights="random", device="cuda", dtype="bfloat16", **options)
    report["load_s"] = time.perf_counter() - started
    vocabulary = model.module.spec.vocab_size
    inspection = zoo.inspect(args.card)
    lengths = [(batch, args.prompt_tokens) for batch in args.batch]
    if args.prefill_tokens:
        lengths.append((1, args.prefill_tokens))
    for batch, tokens in lengths:
        found = rates(zoo_run(model), prompts_of(batch, tokens, vocabulary), args.new_tokens, args.repeats)
        read = bytes_per_step(model, batch, tokens + args.new_tokens // 2)
        flops = batch * inspection.flops_per_token(tokens)
        limit = max(read / report["copy_bytes_per_second"], flops / report["product_flops"])
        prefill = batch * tokens * inspection.flops_per_token(tokens // 2) / report["product_flops"]
        found |= {"of_decode_roofline": limit / found["step_s"], "of_prefill_roofline": prefill / found["prefill_s"]}
        report["zoo"][f"{batch}x{tokens}"] = found
        sys.stderr.write(f"zoo {batch}x{tokens} {json.dumps(found)}\n")
    model.close()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    if args.peer:
        theirs = peer(args.card)
        report["versions"]["transformers"] = __import__("transformers").__version__
        for batch, tokens in lengths:
            if args.peer_batch is not None and batch not in args.peer_batch:
                continue
            found = rates(peer_run(theirs), prompts_of(batch, tokens, vocabulary), args.new_tokens, 1)
            report["transformers"][f"{batch}x{tokens}"] = found
            sys.stderr.write(f"transformers {batch}x{tokens} {json.dumps(found)}\n")
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
