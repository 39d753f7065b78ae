from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from zoo.engine.request import Chunk, Completion, Request, SamplingParams, Timings, Usage
from zoo.registry.errors import RequestError, ZooError


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "a finite number, 0 or more"),
        ("temperature", math.nan, "a finite number, 0 or more"),
        ("temperature", math.inf, "a finite number, 0 or more"),
        ("temperature", "hot", "a finite number, 0 or more"),
        ("temperature", True, "a finite number, 0 or more"),
        ("top_p", 0, "a number above 0, at most 1"),
        ("top_p", 1.1, "a number above 0, at most 1"),
        ("top_p", math.nan, "a number above 0, at most 1"),
        ("top_k", -1, "a whole number, 0 (off) or more"),
        ("top_k", 2.0, "a whole number, 0 (off) or more"),
        ("min_p", -0.1, "a number from 0 to 1"),
        ("min_p", 1.5, "a number from 0 to 1"),
        ("max_tokens", -1, "a whole number, 0 or more, or None"),
        ("max_tokens", "8", "a whole number, 0 or more, or None"),
        ("max_tokens", 1.5, "a whole number, 0 or more, or None"),
        ("seed", 2**64, "a whole number of 64 bits, or None"),
        ("seed", 1.0, "a whole number of 64 bits, or None"),
        ("stop", [""], "texts, none of them empty"),
        ("stop", [3], "texts, none of them empty"),
        ("stop", "", "texts, none of them empty"),
        ("stop", 3, "texts, none of them empty"),
        ("stop_ids", [-1], "token ids"),
        ("stop_ids", ["a"], "token ids"),
        ("stop_ids", 7, "token ids"),
        ("logprobs", -1, "a whole number, 0 or more, or None"),
        ("logprobs", True, "a whole number, 0 or more, or None"),
        ("prompt_logprobs", 1, "True or False"),
        ("ignore_eos", "no", "True or False"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name: str, value: Any, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.where == name
    assert caught.value.found == repr(value)
    assert caught.value.expected == expected


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e9},
        {"temperature": 0},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"max_tokens": 0},
        {"seed": -1},
        {"seed": 2**64 - 1},
        {"min_p": 1},
        {"logprobs": 0},
    ],
)
def test_the_ends_of_the_ranges_are_legal(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    assert {name: getattr(params, name) for name in options} == options


def test_none_means_the_default() -> None:
    params = SamplingParams(temperature=None, top_k=None, stop=None, stop_ids=None)  # type: ignore[arg-type]
    assert params == SamplingParams()
    assert params.greedy


def test_one_stop_text_may_stand_alone() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_an_unknown_option_names_its_neighbour() -> None:
    with pytest.raises(RequestError, match=r"temprature: unknown option; expected one of .*Did you mean 'temperature'"):
        SamplingParams.from_options({"temprature": 1.0})


def test_options_become_params() -> None:
    assert SamplingParams.from_options({"top_k": 3, "seed": 5}) == SamplingParams(top_k=3, seed=5)


def test_a_request_takes_whatever_counts_as_ids() -> None:
    assert Request(torch.tensor([1, 2])).prompt == (1, 2)  # type: ignore[arg-type]
    assert Request(range(3)).prompt == (0, 1, 2)


@pytest.mark.parametrize(
    ("prompt", "where", "found"),
    [
        ("text", "prompt", "str"),
        ([1, 1.5], "prompt[1]", "1.5"),
        ([[1]], "prompt[0]", "[1]"),
        (None, "prompt", "NoneType"),
        (3, "prompt", "int"),
    ],
)
def test_a_prompt_that_is_not_ids_is_refused(prompt: Any, where: str, found: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request(prompt)
    assert str(caught.value).startswith(f"{where}: the prompt is not a sequence of token ids; found {found};")


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt: the prompt is empty; found no tokens; expected at least one token"):
        Request([])


def test_stop_texts_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(RequestError, match=r"stop: stop texts need a tokenizer; found \['x'\]; expected stop_ids"):
        Request([1], SamplingParams(stop=("x",)))


def test_completions_and_chunks_are_json(ask: Callable[..., Request]) -> None:
    completion = Completion(
        request_id="a",
        text="hé",
        tokens=[4],
        prompt_ids=[1, 2],
        finish_reason="stop",
        seed=7,
        usage=Usage(2, 1, 0),
        timings=Timings(0.0, 0.1, 0.2, 0.0),
        logprobs=[-0.5],
        top_logprobs=[{4: -0.5, 9: -1.0}],
        prompt_logprobs=[None, -2.0],
    )
    found = json.loads(json.dumps(completion.to_dict(), allow_nan=False))
    counts = {"prompt_tokens": 2, "completion_tokens": 1, "cached_tokens": 0}
    assert found["usage"] == counts | {"drafted_tokens": 0, "accepted_tokens": 0}
    assert found["top_logprobs"] == [[{"id": 4, "logprob": -0.5}, {"id": 9, "logprob": -1.0}]]
    assert {k: found[k] for k in ("text", "tokens", "prompt_ids", "prompt_tokens", "finish_reason", "seed")} == {
        "text": "hé",
        "tokens": [4],
        "prompt_ids": [1, 2],
        "prompt_tokens": 2,
        "finish_reason": "stop",
        "seed": 7,
    }
    chunk = Chunk("a", "hé", [4], [-0.5], [{4: -0.5}], "stop", completion)
    assert json.loads(json.dumps(chunk.to_dict()))["completion"] == found
    assert json.loads(json.dumps(Chunk("a", error=ZooError("broken")).to_dict()))["error"] == "broken."
