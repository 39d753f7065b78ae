"""Measuring a loaded model, and the machine's own limits beside it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from zoo.inspection import Inspection

if TYPE_CHECKING:
    from zoo.model import Model


@dataclass(frozen=True)
class Measurement:
    """Medians over the repeats. Rates are tokens per second of the whole batch.

    bandwidth_share: bytes of weights and cache that decode must read, per second, over `read_bandwidth`; weights count
    once per step, of a mixture only as many experts as the batch can have chosen.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    bandwidth_share: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: "Model", *, batch: int, prompt_tokens: int, new_tokens: int, repeats: int = 3, bandwidth: float | None = None
) -> Measurement:
    """Prefill and decode rates of `batch` equal prompts of random tokens, greedy, end tokens ignored.

    Decode is the time of a run with `new_tokens` + 1 new tokens less that of a run with one, over `new_tokens` steps.
    """
    generator = torch.Generator().manual_seed(0)
    high = model.module.spec.vocab_size
    prompts = torch.randint(3, high, (batch, prompt_tokens), generator=generator).tolist()

    def run(count: int) -> float:
        return seconds(lambda: model.generate(prompts, max_tokens=count, temperature=0.0, ignore_eos=True))

    run(2)
    pairs = [(run(1), run(new_tokens + 1)) for _ in range(repeats)]
    prefill = median(first for first, _ in pairs)
    step = median(whole - first for first, whole in pairs) / new_tokens
    share = None
    if bandwidth:
        share = bytes_per_step(model, batch, prompt_tokens + new_tokens // 2) / step / bandwidth
    return Measurement(batch, prompt_tokens, new_tokens, batch * prompt_tokens / prefill, batch / step, share)


def bytes_per_step(model: "Model", batch: int, context: int) -> float:
    """Bytes that one decode step of `batch` sequences with `context` cached tokens must read."""
    inspection = Inspection(model.card, model.plan, model.placement.dtype_name, None, {})
    size = model.placement.dtype.itemsize
    read = sum(p.numel * (1 - (1 - p.active) ** batch) for p in model.plan.model.all_parameters().values() if p.product)
    return read * size + batch * inspection.cache_bytes(context)


def read_bandwidth(total_bytes: int = 1 << 30, repeats: int = 5) -> float:
    """The most bytes per second that a plain torch reduction reads from main memory, all threads, best of several."""
    data = torch.ones(total_bytes // 4)
    matrix, vector = data.view(-1, 4096), torch.ones(4096)
    readers: Sequence[Callable[[], Any]] = (data.sum, lambda: matrix.mv(vector), lambda: data.dot(data))
    sizes = (total_bytes, total_bytes, total_bytes)
    best = 0.0
    for read, count in zip(readers, sizes, strict=True):
        read()
        best = max(best, count / min(seconds(read) for _ in range(repeats)))
    return best


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of `work`, the GPU's queue drained on both sides."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
