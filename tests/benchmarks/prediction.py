"""What `zoo inspect` predicts beside what is measured: dense, windowed, mixed and recurrent shapes, random weights.

    python tests/benchmarks/prediction.py                    # measures the machine first: some three minutes on 2 cores
    python tests/benchmarks/prediction.py --stored --batch 1 8 --shape dense mamba

A prediction holds where measured and predicted times differ by no more than a quarter.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.bench import measure_decode, measure_prefill, work_of
from zoo.bench.machine import profile
from zoo.costs.forecast import forecast
from zoo.costs.profile import Profile, stored

ATTENTION = {"kind": "attention", "num_heads": 16, "num_kv_heads": 4, "head_dim": 64, "rope": {"theta": 1e4}}
GATED = {"kind": "gated", "hidden_dim": 4096}
SHAPES: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "dense": (1024, [{"repeat": 16, "mixer": ATTENTION, "ffn": GATED}]),
    "windowed": (1024, [{"repeat": 16, "mixer": ATTENTION | {"window": 256}, "ffn": GATED}]),
    "mixture": (
        1024,
        [
            {
                "repeat": 8,
                "mixer": ATTENTION,
                "ffn": {
                    "kind": "moe",
                    "num_experts": 8,
                    "experts_per_token": 2,
                    "expert": {"kind": "gated", "hidden_dim": 2048},
                },
            }
        ],
    ),
    "mamba": (
        1024,
        [
            {
                "repeat": 24,
                "mixer": {
                    "kind": "mamba2",
                    "num_heads": 32,
                    "head_dim": 64,
                    "num_groups": 1,
                    "state_size": 128,
                    "conv_size": 4,
                    "norm_eps": 1e-5,
                },
                "ffn": None,
            }
        ],
    ),
    "small": (512, [{"repeat": 8, "mixer": ATTENTION | {"num_heads": 8}, "ffn": GATED | {"hidden_dim": 2048}}]),
    "large": (
        2048,
        [
            {
                "repeat": 16,
                "mixer": ATTENTION | {"num_heads": 32, "num_kv_heads": 8},
                "ffn": {"kind": "gated", "hidden_dim": 8192},
            }
        ],
    ),
}


def card(name: str) -> dict[str, Any]:
    """A card of random weights."""
    dim, layers = SHAPES[name]
    return {
        "name": name,
        "family": "shapes",
        "summary": "A shape to measure.",
        "context_length": 8192,
        "source": {"dtype": "bfloat16"},
        "text": {"features": []},
        "model": {"dim": dim, "vocab_size": 32768, "norm": {"kind": "rms", "eps": 1e-5}, "layers": layers},
    }


def compare(
    name: str, machine: Profile, batches: list[int], prompt: int, dtype: str, quantize: str | None
) -> list[dict[str, Any]]:
    """Rows of one shape."""
    rows = []
    options: dict[str, Any] = {"device": "cpu", "dtype": dtype, "quantize": quantize, "max_batch_size": max(batches)}
    options["prefix_cache"] = False
    with zoo.load(card(name), weights="random", **options) as model:
        known = forecast(machine, work_of(model))
        found = [measure_prefill(model, machine.limits, tokens=prompt, repeats=3)]
        predicted = [known.prefill(prompt)]
        for batch in batches:
            m = measure_decode(model, machine.limits, batch=batch, context=prompt if batch == 1 else 64, new_tokens=24)
            found.append(m)
            predicted.append(known.decode(batch, m.context))
        for m, p in zip(found, predicted, strict=True):
            rows.append(
                {
                    "shape": name,
                    "parameters": zoo.inspect(card(name)).parameters,
                    "kind": m.kind,
                    "batch": m.batch,
                    "context": m.context,
                    "measured_s": m.seconds,
                    "fastest_s": m.fastest,
                    "predicted_s": p.total,
                    "ratio": p.total / m.seconds,
                    "of_limit": m.of_limit,
                    "terms": p.to_dict(),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, default=["dense", "windowed", "mixture", "mamba", "small"]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--stored", action="store_true", help="use the stored profile of this machine")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a prediction does not hold")
    parser.add_argument("--quantize", choices=["int8", "int4"], help="store large matrices so")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    machine = stored("cpu") if args.stored else profile(torch.device("cpu"), lambda what: None)
    rows = []
    for name in args.shape:
        for row in compare(name, machine, args.batch, args.prompt_tokens, args.dtype, args.quantize):
            rows.append(row)
            terms = " ".join(f"{term} {value * 1e3:.1f}" for term, value in row["terms"].items())
            sys.stdout.write(
                f"{name:9} {row['kind']:8} {row['batch']:4} {row['context']:5} "
                f"measured {row['measured_s'] * 1e3:8.2f} ms predicted {row['predicted_s'] * 1e3:8.2f} ms "
                f"ratio {row['ratio']:.2f} of limit {row['of_limit']:.0%} ({terms})\n"
            )
            sys.stdout.flush()
    within = sum(0.8 <= row["ratio"] <= 1.25 for row in rows)
    sys.stdout.write(f"{within} of {len(rows)} within a quarter\n")
    if args.out:
        args.out.write_text(json.dumps({"machine": machine.model_dump(), "rows": rows}, indent=1) + "\n")
    sys.exit(args.check and within < len(rows))


if __name__ == "__main__":
    main()
