"""Latent attention of decoding sequences, by the native kernels and by torch, in one run: prints a table.

One layer's heads as DeepSeek V3 has them: queries of 128 + 64 lanes, a latent of 512, values of 128, in bfloat16. Timed
is what follows the projections: new rows are kept, queries brought into the latents' space, sums brought back. Of the
limits: the multiplications that this takes, and the bytes of the cache and of the heads' matrices, once for all.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from itertools import product
from statistics import median

import click
import torch

from zoo.bench.limits import multiply_rates
from zoo.components.attention.latent import Heads
from zoo.components.attention.spec import LatentAttentionSpec
from zoo.components.cache.code import RowCode
from zoo.components.cache.spec import CacheDtype, LatentCacheSpec
from zoo.components.cache.store import make_store
from zoo.components.native.measure import read_limit
from zoo.components.norm.spec import RMSSpec
from zoo.components.rope.spec import DefaultRopeSpec

LATENT, TURNED, PLAIN = 512, 64, 128


def heads_of(count: int) -> Heads:
    """The matrix of so many heads."""
    rope = DefaultRopeSpec(head_dim=TURNED, theta=1e4)
    cache = LatentCacheSpec(kv_lora_rank=LATENT, rope_head_dim=TURNED)
    spec = LatentAttentionSpec(
        dim=64,
        num_heads=count,
        q_lora_rank=None,
        kv_lora_rank=LATENT,
        nope_head_dim=PLAIN,
        rope_head_dim=TURNED,
        v_head_dim=PLAIN,
        norm=RMSSpec(dim=LATENT, eps=1e-6),
        rope=rope,
        cache=cache,
    )
    heads = Heads(spec).bfloat16()
    torch.nn.init.normal_(heads.weight, std=LATENT**-0.5)
    return heads


def ways(heads: Heads, batch: int, context: int, coded: CacheDtype | None) -> Iterator[Callable[[], object]]:
    """A step's work for the heads, by the native kernels, then by torch."""
    cache = LatentCacheSpec(kv_lora_rank=LATENT, rope_head_dim=TURNED, cache_dtype=coded)
    store = make_store(cache, 1, torch.bfloat16, "cpu")
    seqs, past = [*range(batch)], [context - 1] * batch
    for seq in seqs:
        store.grow(seq, context)
    [view] = store.views(seqs, past, [0] * batch)
    view.append(torch.randn(sum(past), LATENT + TURNED).bfloat16())
    q_THd = torch.randn(batch, heads.spec.num_heads, PLAIN + TURNED).bfloat16()
    new_Tm = torch.randn(batch, LATENT + TURNED).bfloat16()

    def step(lying: torch.dtype | None) -> None:
        [state] = store.views(seqs, [1] * batch, past)
        state.append(new_Tm)
        first = 0
        for cached in state.read(lying):
            heads(q_THd[first : first + cached.count], cached, None, {})
            first += cached.count

    yield lambda: step(torch.bfloat16)
    yield lambda: step(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--coded", choices=("int8", "fp8"))
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    read, multiply = read_limit() or 1, multiply_rates(torch.device("cpu"))["bfloat16"]
    told = f"{read / 1e9:.0f} GB/s read, {multiply / 1e9:.0f} G multiply-adds/s, {torch.get_num_threads()} threads"
    click.echo(f"{told}\n\n| heads | sequences | context | zoo, ms | torch, ms | ratio | of multiply | of read |")
    click.echo("|---:" * 8 + "|")
    code = RowCode(chosen.coded, (LATENT, TURNED), torch.bfloat16)
    for count, batch, context in product(chosen.heads, chosen.batches, chosen.contexts):
        heads = heads_of(count)
        with torch.inference_mode():
            own, other = timed([*ways(heads, batch, context, chosen.coded)], chosen.repeats)
        work = batch * count * (context * (2 * LATENT + TURNED) + 2 * PLAIN * LATENT)
        size = code.width * code.stored.itemsize * batch * context + heads.weight.nbytes
        times = f"{own * 1e3:.2f} | {other * 1e3:.2f} | {other / own:.1f}"
        click.echo(
            f"| {count} | {batch} | {context} | {times} | {work / multiply / own:.0%} | {size / read / own:.0%} |"
        )


def timed(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """The median time of each, by turns, after a first time."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(1 + repeats):
        for found, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return [median(found[1:]) for found in times]


if __name__ == "__main__":
    os.environ.pop("ZOO_ATTENTION", None)
    main()
