"""zoo beside transformers' `generate`, in one process and by turns, on a random checkpoint of Mistral's shape.

    python tests/benchmarks/against_transformers.py   # 1.1 B parameters, bfloat16, some ten minutes on 2 cores
    python tests/benchmarks/against_transformers.py --dim 256 --layers 2 --vocab 512   # a quick try

Both read the same files. Each figure is the median of the repeats, taken in turns (zoo, transformers, zoo, ...) so that
a drifting machine moves both. Prefill is the time to one new token; decode is the time of a run with n + 1 new tokens
less that of a run with one, over n. Transformers runs a static batch of equal prompts, which is its best case.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

import zoo
from zoo.bench import bytes_per_step, read_bandwidth, seconds

Run = Callable[[int], float]


def save_checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """A random MistralForCausalLM in the Hugging Face layout."""
    config = transformers.MistralConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.dim // args.heads,
        intermediate_size=4 * args.dim,
        vocab_size=args.vocab,
        sliding_window=None,
        max_position_embeddings=32768,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.MistralForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb.__init__(config)
    model.save_pretrained(folder)


def zoo_run(model: "zoo.Model", prompts: list[list[int]]) -> Run:
    return lambda count: seconds(lambda: model.generate(prompts, max_tokens=count, temperature=0.0, ignore_eos=True))


def peer_run(model: Any, prompts: list[list[int]]) -> Run:
    ids = torch.tensor(prompts)
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def run(count: int) -> float:
        with torch.inference_mode():
            return seconds(lambda: model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options))

    return run


def compare(ours: "zoo.Model", theirs: Any, batch: int, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """Rates of both sides for one batch size, and their ratios (over 1: zoo is faster)."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(3, args.vocab, (batch, args.prompt_tokens), generator=generator).tolist()
    runs = {"zoo": zoo_run(ours, prompts), "transformers": peer_run(theirs, prompts)}
    for run in runs.values():
        run(2)
    prefill: dict[str, list[float]] = {name: [] for name in runs}
    step: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            first = run(1)
            prefill[name].append(first)
            step[name].append((run(args.new_tokens + 1) - first) / args.new_tokens)
    rates = {
        name: {
            "prefill_tokens_per_second": batch * args.prompt_tokens / median(prefill[name]),
            "decode_tokens_per_second": batch / median(step[name]),
        }
        for name in runs
    }
    read = bytes_per_step(ours, batch, args.prompt_tokens + args.new_tokens // 2)
    return {
        "batch": batch,
        **rates,
        "prefill_ratio": median(t / z for z, t in zip(prefill["zoo"], prefill["transformers"], strict=True)),
        "decode_ratio": median(t / z for z, t in zip(step["zoo"], step["transformers"], strict=True)),
        "bandwidth_share": read / median(step["zoo"]) / bandwidth,
    }


def load_peak(folder: Path) -> dict[str, float]:
    """Peak resident memory of a process that loads the checkpoint, over the size of its weights."""
    code = (
        "import sys, torch, zoo, zoo.model, zoo.engine.engine, zoo.loading.load\n"
        "def peak():\n"
        "    with open('/proc/self/status') as status:\n"
        "        return next(1024 * int(line.split()[1]) for line in status if line.startswith('VmHWM'))\n"
        "before = peak()\n"
        "model = zoo.load(sys.argv[1], device='cpu')\n"
        "print(before, peak(), model.memory.weights)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    before, peak, weights = (int(n) for n in done.stdout.split())
    return {
        "weight_bytes": weights,
        "peak_bytes": peak,
        "interpreter_bytes": before,
        "ratio": (peak - before) / weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"dim": 2048, "layers": 16, "heads": 32, "kv-heads": 8, "vocab": 32768}
    for name, value in {**sizes, "prompt-tokens": 512, "new-tokens": 24, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(folder, args)
        peak = load_peak(folder)
        bandwidth = read_bandwidth()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        with zoo.load(folder, device="cpu", prefix_cache=False) as ours:
            results = [compare(ours, theirs, batch, args, bandwidth) for batch in args.batch]
    report = {
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "system": platform.system()},
        "versions": {
            "zoo": zoo.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "model": {n.replace("-", "_"): getattr(args, n.replace("-", "_")) for n in [*sizes, "prompt-tokens"]},
        "load": peak,
        "read_bytes_per_second": bandwidth,
        "results": results,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.write_text(text + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
