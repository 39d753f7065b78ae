"""The arithmetic of steps, against the Specs' own figures and against counting by hand."""

from __future__ import annotations

import random

import pytest

import zoo
from zoo.costs.work import Matrix, Step, Work, prefill

CARDS = ["mistral-7b-v0.1", "mixtral-8x7b", "mamba-codestral-7b", "deepseek-v3", "gpt-oss-20b", "zamba2-1.2b", "tiny"]


def work(name: str, dtype: str = "bfloat16") -> Work:
    return Work(zoo.inspect(name).plan, dtype)


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("context", [0, 3000])
def test_one_token_multiplies_what_the_specs_say(name: str, context: int) -> None:
    flops = zoo.inspect(name).flops_per_token(context)
    assert 2 * work(name).multiply_adds(Step.decode(1, context)) == pytest.approx(flops)


@pytest.mark.parametrize("name", CARDS)
def test_one_token_reads_its_matrices(name: str) -> None:
    """Two bytes for each weight that is multiplied once: half of the operations at no context, but for the states'."""
    found = work(name)
    matrices = sum(count * m.numel * m.chosen for m, count in found.matrices.items())
    narrow = sum(count * m.numel * m.chosen for m, count in found.matrices.items() if m.dtype == "float32")
    assert found.weight_bytes(Step.decode(1, 0)) == pytest.approx(2 * matrices + 2 * narrow)
    assert work(name, "float32").weight_bytes(Step.decode(1, 0)) == pytest.approx(4 * matrices)


def test_shared_blocks_are_read_by_each_layer_that_uses_them() -> None:
    found = work("zamba2-1.2b")
    parameters = found.model.all_parameters().values()
    stored = sum(p.numel for p in parameters if p.product and len(p.shape) == 2)
    passed = sum(count * m.numel for m, count in found.matrices.items())
    (shared,) = found.model.shared
    block = sum(p.numel for p in shared.all_parameters().values() if p.product)
    uses = sum(layer.kind == "sharing" for layer in found.model.layers)
    assert passed - stored == (uses - 1) * block > 0


@pytest.mark.parametrize("rows", [1, 2, 8, 40])
def test_experts_that_rows_touch(rows: int) -> None:
    """The expectation, beside counting what random choices touch."""
    draw = random.Random(rows)
    counts = [len({e for _ in range(rows) for e in draw.sample(range(16), 3)}) for _ in range(4000)]
    matrix = Matrix(10, 20, experts=16, chosen=3)
    assert matrix.touched(rows) == pytest.approx(sum(counts) / len(counts), rel=0.02)


def test_prompts_only_ask_for_their_last_logits() -> None:
    steps = [*prefill(1200, 512)]
    assert [(s.rows, s.past, s.wanted) for s in steps] == [(512, 0, 0), (512, 512, 0), (176, 1024, 1)]
    found, vocabulary = work("tiny"), zoo.inspect("tiny").plan.model.vocab_size  # type: ignore[attr-defined]
    without, with_logits = (found.multiply_adds(Step(1, 100, 0, wanted)) for wanted in (0, 100))
    dim = found.model.dim
    assert with_logits - without == 100 * vocabulary * dim


def test_windows_bound_what_is_read_and_multiplied() -> None:
    found = work("mistral-7b-v0.1")
    for cost in (found.read_bytes, found.multiply_adds):
        assert cost(Step.decode(1, 4096)) == cost(Step.decode(1, 30000)) > cost(Step.decode(1, 4000))


def test_a_batch_reads_weights_once_and_every_cache() -> None:
    found = work("mistral-7b-v0.3")
    one, eight = (found.read_bytes(Step.decode(batch, 1000)) for batch in (1, 8))
    assert eight - one == 7 * found.cache_bytes(1000) == 7 * 1000 * 131072
