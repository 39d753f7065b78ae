"""Models over several processes: the same logits and tokens as in one, no pickles, and a clean end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.devices.likes import ATTENTION, EVERYTHING, GATED, make_card
from zoo.engine.request import Completion
from zoo.model import Model
from zoo.registry.errors import RequestError
from zoo.testing import TOLERANCE, relative_error

PROMPTS = [[5, 66, 0, 31, 32, 33], [7], [9, 9, 9, 50, 51, 52, 53, 54, 55, 56, 57, 58], [20, 21, 22]]
LARGE: dict[str, Any] = {"overrides": {"model.embedding_scale": 40.0}}
"""Random weights are small: without it, every token is about as likely as the others."""


def generated(model: Model, **options: Any) -> list[Completion]:
    return model.generate(PROMPTS, max_tokens=14, ignore_eos=True, **options)


@pytest.fixture(scope="module")
def alone(everything: dict[str, Any]) -> Iterator[Model]:
    with zoo.load(everything, weights="random", dtype="float32", device="cpu", **LARGE) as model:
        yield model


@pytest.fixture(
    scope="module",
    params=[{"devices": "tp=2,pp=2,ep=2"}, {"devices": 2, "draft": make_card("guesses", EVERYTHING)}],
    ids=["mixed", "drafts"],
)
def spread(request: pytest.FixtureRequest, everything: dict[str, Any]) -> Iterator[Model]:
    options: dict[str, Any] = {"weights": "random", "dtype": "float32", "device": "cpu", **LARGE}
    with zoo.load(everything, max_batch_size=3, **options, **request.param) as model:
        yield model


def test_decode_steps_that_one_process_records_are_computed_by_all() -> None:
    """In bfloat16 and of sizes that the native kernels take."""
    attention = {**ATTENTION, "num_heads": 4, "head_dim": 32}
    card = make_card("dense", [{"repeat": 2, "mixer": attention, "ffn": {**GATED, "hidden_dim": 64}}], dim=64)
    options: dict[str, Any] = {"weights": "random", "dtype": "bfloat16", "device": "cpu", **LARGE}
    answers = []
    for devices in (None, "pp=2"):
        with zoo.load(card, devices=devices, **options) as model:
            answers.append([c.tokens for c in generated(model, temperature=0.0)])
    assert answers[0] == answers[1]


def test_logits_are_those_of_one_process(alone: Model, spread: Model) -> None:
    tokens = [5, 66, 0, 31, 32, 33, 34, 16, 17, 50, 1]
    found, expected = spread.logits(tokens), alone.logits(tokens)
    assert found.shape == (len(tokens), 67)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.usefixtures("always_guess")
def test_tokens_are_those_of_one_process(alone: Model, spread: Model) -> None:
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}):
        found, expected = generated(spread, **options), generated(alone, **options)
        assert [c.tokens for c in found] == [c.tokens for c in expected]
        assert len({t for c in found for t in c.tokens}) > 5
        assert any(c.usage.accepted_tokens for c in found) == spread.engine.guesses


def test_images_are_those_of_one_process(alone: Model, spread: Model) -> None:
    picture = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0))
    tokens = [5, *[10, 10, 10, 12], *[10, 10, 10, 13], 31, 32]
    found, expected = spread.logits(tokens, [picture]), alone.logits(tokens, [picture])
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(found, alone.logits(tokens, [-picture])) > TOLERANCE
    asked: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    answers = [model.generate([tokens], images=[picture], **asked)[0].tokens for model in (spread, alone)]
    assert answers[0] == answers[1]


def test_sounds_are_those_of_one_process(alone: Model, spread: Model) -> None:
    sound = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    tokens = [5, 11, 31, 32]
    answers = [
        [c.tokens for c in model.generate([tokens], audio=[sound], max_tokens=6, temperature=0.0, ignore_eos=True)]
        for model in (spread, alone)
    ]
    assert answers[0] == answers[1]
    found, expected = spread.logits(tokens, audio=[sound]), alone.logits(tokens, audio=[sound])
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(found, alone.logits(tokens, audio=[-sound])) > TOLERANCE


def test_hidden_states_and_scored_texts_are_those_of_one_process(alone: Model, spread: Model) -> None:
    assert relative_error(spread.engine.hidden(PROMPTS[0]), alone.engine.hidden(PROMPTS[0])) < TOLERANCE
    assert spread.score(PROMPTS[2]) == pytest.approx(alone.score(PROMPTS[2]), abs=1e-3)
    with pytest.raises(RequestError, match="67"):
        spread.score([5, 67])
    assert len(spread.generate([PROMPTS[1]], max_tokens=2)) == 1


def test_scores_are_those_of_one_process(alone: Model, spread: Model) -> None:
    asked = {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": True}
    for found, expected in zip(generated(spread, **asked), generated(alone, **asked), strict=True):
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
        assert found.prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=1e-3)


def test_a_cancelled_request_leaves_nothing(spread: Model) -> None:
    stream = spread.stream(PROMPTS[0], max_tokens=30, ignore_eos=True, temperature=0.0)
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert spread.memory.cache_used == 0
    again = spread.generate([PROMPTS[0]], max_tokens=30, ignore_eos=True, temperature=0.0)[0]
    assert again.tokens[: len(first.tokens)] == first.tokens


def test_quantised_weights_are_those_of_one_process() -> None:
    """By stages number by number; of parts along inputs, as far as scales of their own go."""
    mixer = {**ATTENTION, "num_heads": 4, "head_dim": 32}
    card = make_card(
        "wide", [{"repeat": 2, "mixer": mixer, "ffn": {**GATED, "hidden_dim": 256}}], vocab_size=256, dim=128
    )
    options: dict[str, Any] = {"weights": "random", "device": "cpu", "dtype": "float32", "quantize": "int8", **LARGE}
    found = {}
    for devices in (None, "pp=2", "tp=2"):
        with zoo.load(card, devices=devices, **options) as model:
            found[devices] = model.logits([5, 66, 0, 31, 9])
    with zoo.load(card, **options | {"quantize": None}) as model:
        plain = model.logits([5, 66, 0, 31, 9])
    assert relative_error(found["pp=2"], found[None]) < TOLERANCE
    error = relative_error(found[None], plain)
    assert relative_error(found["tp=2"], found[None]) < error
    assert relative_error(found["tp=2"], plain) < 1.1 * error
    assert error > TOLERANCE


BROKEN_PICKLE = """
import pickle

def refuse(*arguments, **options):
    raise RuntimeError("pickle was used")

for name in ("dump", "dumps", "load", "loads"):
    setattr(pickle, name, refuse)
for name in ("Pickler", "Unpickler"):
    setattr(pickle, name, type(name, (getattr(pickle, name),), {"__init__": refuse}))
"""


def test_the_command_runs_without_pickles(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN_PICKLE)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        "-c",
        "from zoo.cli import main; main()",
        "run",
        "tiny",
        "--devices",
        "2",
        "--device",
        "cpu",
        "--temperature",
        "0",
    ]
    run = subprocess.run(
        [*command, "--prompt", "How many experts does Mixtral 8x7B have?"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "8 experts" in run.stdout
    assert "2 devices (tp=2,pp=1,ep=1), 2.7 MiB of weights and" in run.stderr.splitlines()[0]
    check = "import pickle; pickle.dumps(1)"
    refused = subprocess.run(
        [sys.executable, "-c", check], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, check=False
    )
    assert b"pickle was used" in refused.stderr


def test_prefixes_are_reused_and_threads_given_back() -> None:
    before, prompt = torch.get_num_threads(), [*range(3, 60)]
    with zoo.load("tiny", devices=2, device="cpu", dtype="float32") as model:
        first, again = (model.generate([prompt], max_tokens=8)[0] for _ in range(2))
        assert first.tokens == again.tokens
        assert first.usage.cached_tokens == 0
        assert again.usage.cached_tokens > 0
        assert model.memory.cache_kept > 0
    assert torch.get_num_threads() == before
