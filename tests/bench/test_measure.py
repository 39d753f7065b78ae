"""Measuring on the embedded model: what is timed, what is left out, and that nothing is left running."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import zoo
from zoo.bench import arrivals, decode_steps, measure_decode, measure_prefill, measure_traffic, random_prompts
from zoo.bench.limits import machine_limits
from zoo.bench.suite import Options, Report, cases, fill
from zoo.components.compiled import packs
from zoo.costs.profile import Limits
from zoo.costs.work import Step, Work
from zoo.model import Model

LIMITS = Limits(read={"sum": 2e10}, multiply={"bfloat16": 1e11, "float32": 2e10}, call_s=1e-6)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with zoo.load("tiny", weights="random", device="cpu", max_batch_size=8, max_context=256) as loaded:
        yield loaded


def test_all_sequences_decode_in_the_steps_that_count(model: Model) -> None:
    """Prompts longer than a step in all: early sequences run on while late ones are read, and none ends."""
    prompts = random_prompts(model, 8, 100)
    run = decode_steps(model, prompts, 5)
    assert len(run.steps) == 5
    assert 100 < run.context < 256
    assert not model.engine.busy
    assert model.memory.cache_used == 0


def test_a_failure_leaves_nothing_running(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        try:
            decode_steps(model, random_prompts(model, 2, 10), 5)
        finally:
            monkeypatch.undo()
            model.engine.run()
    assert not model.engine.busy


def test_figures_are_beside_the_limits(model: Model) -> None:
    found = measure_decode(model, LIMITS, batch=2, context=20, new_tokens=4)
    step = Step.decode(2, found.context)
    work = Work(model.plan, model.placement.dtype_name, packed=packs())
    assert (found.read_bytes, found.multiply_adds) == (work.read_bytes(step), work.multiply_adds(step))
    assert found.tokens_per_second == pytest.approx(2 / found.seconds)
    assert found.of_read == pytest.approx(found.read_bytes / found.seconds / 2e10)
    assert found.of_limit == max(found.of_read, found.of_multiply)
    assert found.fastest <= found.seconds <= found.slowest


def test_prefill_counts_the_prompts(model: Model) -> None:
    found = measure_prefill(model, LIMITS, tokens=30, batch=2, repeats=1)
    assert found.tokens_per_second == pytest.approx(60 / found.seconds)
    assert found.of_multiply == pytest.approx(found.multiply_adds / found.seconds / 1e11)


def test_a_report_says_what_was_left_out_and_why(model: Model) -> None:
    report, told = Report("tiny", "cpu", "bfloat16", LIMITS), list[str]()
    options = Options(batches=(1, 4, 9), prompt_tokens=24, new_tokens=3, repeats=1, requests=5)
    fill(report, model, options, told.append)
    found = [(r.kind, r.batch) for r in report.results]
    assert found == [("prefill", 1), ("decode", 1), ("decode", 4), ("prefill", 1), ("decode", 1)]
    assert [left["what"] for left in report.left_out] == ["decode of 9 sequences of 24 tokens"]
    assert "--max-batch-size" in report.left_out[0]["why"]
    assert len(told) == 6
    assert report.traffic is not None
    assert report.traffic.requests == 5
    plain = report.to_dict()
    assert plain["results"][1]["batch"] == 1
    assert plain["traffic"]["most_in_flight"] <= 5


def test_prompts_that_take_too_long_are_left_out(model: Model) -> None:
    report = Report("tiny", "cpu", "bfloat16", LIMITS)
    fill(report, model, Options(batches=(1,), prompt_tokens=24, repeats=1, requests=0, longest=1e-6), lambda _: None)
    assert [r.kind for r in report.results] == ["prefill"]
    assert all("--longest" in left["why"] for left in report.left_out)


def test_a_sequence_beyond_the_context_is_left_out(model: Model) -> None:
    report = Report("tiny", "cpu", "bfloat16", LIMITS)
    fill(report, model, Options(batches=(1,), prompt_tokens=250, repeats=1, requests=0), lambda _: None)
    assert ["tokens of context" in left["why"] for left in report.left_out] == [True]


def test_an_interrupted_report_keeps_what_it_has(model: Model) -> None:
    report = Report("tiny", "cpu", "bfloat16", LIMITS)

    def interrupt(what: str) -> None:
        if what.startswith("decode of 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(report, model, Options(batches=(1, 4), prompt_tokens=24, new_tokens=3, repeats=1), interrupt)
    assert [(r.kind, r.batch) for r in report.results] == [("prefill", 1), ("decode", 1)]


def test_curves_are_points_by_batch_and_by_context(model: Model) -> None:
    found = [c for c in cases(model, Options(curves=True, batches=(), prompt_tokens=24)) if c.part != "results"]
    assert [c.batch for c in found if c.part == "batch"] == [1, 2, 4, 8, 16, 32, 64]
    assert [c.context for c in found if c.part == "context"] == [64, 128]


def test_arrivals_are_drawn_from_their_seed() -> None:
    plan = arrivals(50, 0.1, (4, 64), (2, 8), burst=10, seed=3)
    assert plan == arrivals(50, 0.1, (4, 64), (2, 8), burst=10, seed=3) != arrivals(50, 0.1, (4, 64), (2, 8), burst=10)
    assert [a.at for a in plan[:10]] == [0.0] * 10
    assert plan == sorted(plan, key=lambda a: a.at)
    assert 0.05 < plan[-1].at / 40 < 0.2
    assert all(4 <= a.prompt <= 64 and 2 <= a.answer <= 8 for a in plan)


def test_traffic_counts_every_token(model: Model) -> None:
    plan = arrivals(6, 0.002, (4, 40), (2, 8), burst=2)
    found = measure_traffic(model, plan)
    assert found.new_tokens == sum(a.answer for a in plan)
    assert found.prompt_tokens == sum(a.prompt for a in plan)
    assert found.seconds >= plan[-1].at
    assert found.first_median <= found.first_95
    assert 1 <= found.in_flight <= found.most_in_flight <= 6
    assert not model.engine.busy


def test_limits_of_this_machine() -> None:
    found = machine_limits(torch.device("cpu"), total_bytes=1 << 22, size=128, repeats=1)
    assert found.bytes_per_second > 1e8
    assert found.multiply["bfloat16"] > 1e8
    assert 1e-8 < found.call_s < 1e-3
    assert any("32 streams" in way for way in found.read)


@pytest.mark.usefixtures("always_guess")
def test_guessing_is_measured_where_a_model_guesses(model: Model) -> None:
    report, options = Report("tiny", "cpu", "bfloat16", LIMITS), Options(batches=(1,), prompt_tokens=24, new_tokens=3)
    fill(report, model, replace(options, requests=0, repeats=1), lambda _: None)
    assert report.guessing is None
    with zoo.load("tiny", device="cpu", max_context=256, draft="lookup") as guessing:
        fill(report, guessing, replace(options, requests=0, repeats=1), lambda _: None)
    found = report.to_dict()["guessing"]
    assert (found["prompt_tokens"], found["new_tokens"]) == (24, 64)
    assert 0 < found["accepted_tokens"] <= found["drafted_tokens"]
    assert found["tokens_per_second"] > 0 < found["without_drafts"]
