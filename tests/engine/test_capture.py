"""Recorded decode steps against steps that are planned anew: the same tokens, in any batch, through crowded caches.

On a CPU the record's steps are run, not replayed: what is tested here is that fixed tensors say all there is to say.
tests/gpu has the replays.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch

import zoo
from zoo.engine.ahead import Begun, Steps
from zoo.engine.capture import Captured, Recorded, captures, row_bucket, token_bucket
from zoo.engine.engine import Engine
from zoo.engine.request import Request, SamplingParams
from zoo.engine.runner import Runner
from zoo.engine.sequence import NOWHERE
from zoo.registry.errors import ZooError

VOCABULARY, CONTEXT = 67, 600
ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": {"theta": 50.0}}
LATENT = {"kind": "latent_attention", "num_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 14, "rope": {"theta": 50.0}}
LATENT |= {"nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 5}
INDEXER = {"kind": "lightning", "num_heads": 16, "head_dim": 6, "top_k": 20, "norm_eps": 1e-6}
READING = LATENT | {"indexer": INDEXER, "cache": {"kind": "shared", "layer": 0}}
GATED = {"kind": "gated", "hidden_dim": 20}
MOE = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": GATED}
SSM = {"num_heads": 6, "head_dim": 4, "num_groups": 2, "state_size": 5, "conv_size": 4, "norm_eps": 1e-5}
LAYERS: dict[str, list[dict[str, Any]]] = {
    "full": [{"mixer": ATTENTION, "ffn": GATED}, {"mixer": ATTENTION, "ffn": MOE}],
    "window": [{"mixer": ATTENTION | {"window": 8}, "ffn": GATED}, {"mixer": ATTENTION, "ffn": GATED}],
    "window in a full cache": [{"mixer": ATTENTION | {"window": 8, "cache": {"kind": "full"}}, "ffn": GATED}],
    "softcap": [{"mixer": ATTENTION | {"softcap": 3.0}, "ffn": GATED}],
    "sinks": [{"mixer": ATTENTION | {"sinks": True} | window, "ffn": GATED} for window in ({"window": 8}, {})],
    "latent": [{"mixer": LATENT, "ffn": GATED}, {"mixer": ATTENTION, "ffn": GATED}],
    "indexed": [{"mixer": LATENT | {"indexer": INDEXER}, "ffn": GATED}, {"mixer": READING, "ffn": GATED}],
    "mamba2": [{"mixer": {"kind": "mamba2"} | SSM, "ffn": None}],
    "hybrid": [{"mixer": {"kind": "mamba2"} | SSM, "ffn": GATED}, {"mixer": ATTENTION, "ffn": None}],
    "sharing": [{"kind": "sharing", "number": 0, "mixer": {"kind": "mamba2"} | SSM | {"norm_eps": 10.0}}] * 2,
}


def card(kind: str) -> dict[str, Any]:
    model = {"dim": 24, "vocab_size": VOCABULARY, "norm": {"kind": "rms", "eps": 1e-5}, "layers": LAYERS[kind]}
    if kind == "sharing":
        mild = ATTENTION | {"scale": 0.1}
        model["shared"] = [{"kind": "transformer", "mixer": mild, "ffn": GATED, "adapter_rank": 3}]
    return {"name": "captured", "context_length": CONTEXT, "model": model}


def prompts() -> list[list[int]]:
    return [random.Random(n).choices(range(VOCABULARY), k=n) for n in (1, 7, 9, 40, 250, 300)]


def load(kind: str, monkeypatch: pytest.MonkeyPatch, storage: Literal["slab", "pages"], **options: Any) -> zoo.Model:
    from zoo.engine.engine import Engine

    make = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *args, **sizes: make(self, *args, storage=storage, **sizes))
    model = zoo.load(card(kind), weights="random", device="cpu", dtype="float32", **options)
    for name, parameter in model.module.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        if parameter.ndim > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


@pytest.mark.parametrize("kind", LAYERS)
def test_recorded_steps_give_the_same_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask: dict[str, Any] = {"max_tokens": 20, "temperature": 0.9, "seed": 3, "ignore_eos": True, "logprobs": 2}
    with load(kind, monkeypatch, "slab") as plain:
        expected = plain.generate(prompts(), **ask)
    runs: list[int] = []
    run = Captured.run

    def counted(self: Captured, batch: Any) -> Any:
        found = run(self, batch)
        runs.append(0 if found is None else len(found))
        return found

    for batch in (1, 3, 6):
        monkeypatch.undo()
        monkeypatch.setattr(Captured, "run", counted)
        monkeypatch.setenv("ZOO_CAPTURE", "on")
        runs.clear()
        with load(kind, monkeypatch, "pages", max_batch_size=batch) as model:
            found = model.generate(prompts(), **ask)
        assert [c.tokens for c in found] == [c.tokens for c in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert max(runs) == batch, "most steps must have been recorded ones"
        assert sum(map(bool, runs)) > len(runs) // 2


@pytest.mark.parametrize("kind", ["window", "hybrid"])
def test_recording_moves_no_state(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record is made by running the step, more than once, before its first true run."""

    def run_it(self: Captured, step: Recorded) -> bool:
        step.held.fill([], [])
        step.run()
        step.run()
        return True

    ask: dict[str, Any] = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    with load(kind, monkeypatch, "slab") as plain:
        expected = plain.generate(prompts(), **ask)
    monkeypatch.undo()
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    monkeypatch.setattr(Captured, "_record", run_it)
    with load(kind, monkeypatch, "pages") as model:
        captured = model.engine._runner.captured  # type: ignore[union-attr]
        assert captured is not None
        captured.way = "graphs"
        assert [c.tokens for c in model.generate(prompts(), **ask)] == [c.tokens for c in expected]


def test_a_batch_of_prompts_is_no_recorded_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    with load("full", monkeypatch, "slab") as model:
        captured = model.engine._runner.captured  # type: ignore[union-attr]
        assert captured is not None
        model.generate([[1, 2, 3]], max_tokens=3, ignore_eos=True)
        assert not captured._steps, "no kernel reads slabs of heads of six"


def test_records_are_forgotten_when_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    with load("full", monkeypatch, "pages") as model:
        captured = model.engine._runner.captured  # type: ignore[union-attr]
        assert captured is not None
        model.generate([[1, 2, 3]], max_tokens=3, ignore_eos=True)
        assert captured._steps
        with model.engine.between_steps():
            pass
        assert not captured._steps


def test_buckets_hold_what_they_are_for() -> None:
    for n in range(1, 300):
        assert row_bucket(n) >= n
        assert row_bucket(row_bucket(n)) == row_bucket(n)
    for n in range(1, 40_000, 7):
        assert n <= token_bucket(n) <= max(n + 255, 1.125 * n)
        assert token_bucket(token_bucket(n)) == token_bucket(n)


def test_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CAPTURE", "of")
    with pytest.raises(ZooError, match=r"ZOO_CAPTURE.*'of'.*'off'"):
        captures(torch.device("cpu"))


def test_steps_run_with_the_models_device_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton starts kernels on the thread's current GPU, and graphs are recorded there."""
    entered: list[torch.device] = []
    seen: list[int] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.pop()

    for module in ("runner", "ahead"):
        monkeypatch.setattr(f"zoo.engine.{module}.on", on)
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    with load("full", monkeypatch, "pages") as model:
        hidden = model.module.hidden

        def watched(*rest: Any) -> torch.Tensor:
            seen.append(len(entered))
            return hidden(*rest)

        monkeypatch.setattr(model.module, "hidden", watched)
        model.generate([[1, 2, 3]], max_tokens=3, ignore_eos=True)
        model.logits([1, 2])
    assert len(seen) >= 4
    assert all(seen)


@pytest.mark.parametrize("kind", ["full", "latent"])
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_steps_begun_ahead_give_the_same_tokens(kind: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of all lengths, some of which end by a token, in crowded batches: nearly every step was begun before the
    tokens of the last one were known."""
    begun: list[bool] = []
    with load(kind, monkeypatch, "slab") as plain:
        end = plain.generate([prompts()[3]], max_tokens=20, ignore_eos=True)[0].tokens[7]
        ask: dict[str, Any] = {"stop_ids": (end,), "ignore_eos": True}
        limits = [ask | {"max_tokens": length} for length in (1, 2, 3, 17, 30, 30)]
        expected = [plain.generate([p], **limit)[0] for p, limit in zip(prompts(), limits, strict=True)]
    assert {c.finish_reason for c in expected} == {"length", "stop"}
    monkeypatch.undo()
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    following = Steps._next

    def counted(self: Steps, runner: Runner, step: Begun) -> Begun | None:
        assert NOWHERE not in [seq.cache for seq in step.sequences], "a step behind one that has ended"
        found = following(self, runner, step)
        begun.append(found is not None)
        return found

    monkeypatch.setattr(Steps, "_next", counted)
    with load(kind, monkeypatch, "pages", max_batch_size=batch) as model:
        requests = [Request(p, SamplingParams(**limit)) for p, limit in zip(prompts(), limits, strict=True)]
        found = model.engine.generate(requests)
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    assert sum(begun) > len(begun) // 2


def steps_of(engine: Engine) -> Steps:
    assert isinstance(engine._steps, Steps)
    return engine._steps


@pytest.mark.parametrize("kind", ["window", "mamba2"])
def test_models_that_would_not_forgive_do_not_go_ahead(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    with load(kind, monkeypatch, "pages") as model:
        assert not steps_of(model.engine).ahead


def test_what_was_begun_is_forgotten_with_the_weights_and_after_an_interruption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    with load("full", monkeypatch, "pages") as model:
        expected = model.generate(prompts(), **ask)
        engine = model.engine
        ids = [engine.submit(Request(p, SamplingParams(max_tokens=12, ignore_eos=True))) for p in prompts()]
        tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
        apply = Engine._apply
        for number in range(40):
            if number == 4:
                with engine.between_steps():
                    pass
                assert steps_of(engine)._begun is None
            if number == 6:
                monkeypatch.setattr(Engine, "_apply", _interrupted)
                with pytest.raises(KeyboardInterrupt):
                    engine.step()
                monkeypatch.setattr(Engine, "_apply", apply)
                assert steps_of(engine)._begun is None
            for chunk in engine.step():
                tokens[chunk.request_id] += chunk.tokens
    assert [*tokens.values()] == [c.tokens for c in expected]


def _interrupted(self: Engine, *rest: Any) -> None:
    raise KeyboardInterrupt


def test_what_more_than_tokens_is_asked_of_is_not_begun_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    ask: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True, "logprobs": 2}
    with load("full", monkeypatch, "pages") as plain:
        expected = plain.generate([[1, 2, 3]], **ask)[0]
    monkeypatch.undo()
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    with load("full", monkeypatch, "pages") as model:
        found = model.generate([[1, 2, 3]], **ask)[0]
    assert found.logprobs is not None
    assert found.logprobs == pytest.approx(expected.logprobs, rel=1e-4)
    assert [top.keys() for top in found.top_logprobs or ()] == [top.keys() for top in expected.top_logprobs or ()]


def test_no_step_is_begun_behind_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    steps: list[int] = []
    run = Captured.run

    def counted(self: Captured, batch: Any) -> torch.Tensor | None:
        logits_RV = run(self, batch)
        steps.extend(() if logits_RV is None else batch.past)
        return logits_RV

    monkeypatch.setattr(Captured, "run", counted)
    with load("full", monkeypatch, "pages") as model:
        model.generate([[1, 2, 3]], max_tokens=5, ignore_eos=True)
    assert steps == [3, 4, 5, 6]


def test_what_is_not_finite_is_told_by_its_position_in_steps_begun_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    with load("full", monkeypatch, "pages") as model:
        assert steps_of(model.engine).ahead
        hidden = model.module.hidden

        def broken(tokens_T: torch.Tensor, step: Any) -> torch.Tensor:
            found: torch.Tensor = hidden(tokens_T, step)
            return found.masked_fill((step.positions_T >= 6).unsqueeze(-1), torch.nan)

        monkeypatch.setattr(model.module, "hidden", broken)
        with pytest.raises(ZooError, match="position 6: the model computed logits that are not finite"):
            model.generate([[1, 2, 3]], max_tokens=9, ignore_eos=True)
