"""Images in requests: chunks cut them anywhere, batches and full memory change nothing, faults are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.components.build import build
from zoo.components.decoder.model import Decoder
from zoo.engine.engine import Engine
from zoo.engine.media import place, rows_of_media
from zoo.engine.request import Media, Request, SamplingParams
from zoo.registry.card import Card
from zoo.registry.errors import RequestError
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve
from zoo.testing import relative_error, step_through

IMAGE, CELL, VOCABULARY = 10, 6, 67
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def plan() -> Plan:
    norm = {"kind": "rms", "eps": 1e-5}
    mixer = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": {"theta": 50.0}}
    vision = {"kind": "pixtral", "token": IMAGE, "dim": 12, "num_layers": 2, "num_heads": 3, "hidden_dim": 20}
    vision |= {"patch_size": 3, "max_image_size": 24, "theta": 100.0, "norm": norm}
    vision |= {"projector": {"bias": True, "merge": 2, "norm": norm}}
    layers = [{"repeat": 2, "mixer": mixer, "ffn": {"kind": "gated", "hidden_dim": 20}}]
    model = {"dim": 16, "vocab_size": VOCABULARY, "norm": norm, "vision": vision, "layers": layers}
    return resolve(Card.from_dict({"name": "media-test", "context_length": 80, "model": model}))


@pytest.fixture(scope="module")
def decoder(plan: Plan) -> Decoder:
    module = build(plan.model, device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (parameter.shape[-1] ** -0.5))
    assert isinstance(module, Decoder)
    return module


@pytest.fixture
def engine(plan: Plan, decoder: Decoder) -> MakeEngine:
    return lambda **sizes: Engine(decoder, plan, **sizes)


def picture(rows: int, columns: int, seed: int = 0) -> Media:
    generator = torch.Generator().manual_seed(seed)
    return Media("vision", torch.randn(3, CELL * rows, CELL * columns, generator=generator))


PROMPT = [1, 5, *[IMAGE, IMAGE, 12] * 3, 6, IMAGE, 13, IMAGE, 12, IMAGE, 13, 20, 21]
"""An image of 3 rows of 2 cells, one of a single cell, one of 2 rows of 1, and text between and around them."""
PICTURES = [picture(3, 2), picture(1, 1, 1), picture(2, 1, 2)]


def request(prompt: list[int], media: list[Media], **options: Any) -> Request:
    return Request(prompt, SamplingParams(max_tokens=6, **options), media=media)


@pytest.mark.parametrize("chunk", [1, 3, 5, len(PROMPT)])
def test_chunks_cut_images_anywhere(decoder: Decoder, engine: MakeEngine, chunk: int) -> None:
    expected = engine().logits(PROMPT, None, PICTURES)
    (found,) = step_through(decoder, [PROMPT], chunk, media=[PICTURES])
    assert relative_error(found, expected) < 1e-5
    changed = engine().logits(PROMPT, None, [PICTURES[0], picture(1, 1, 7), PICTURES[2]])
    assert torch.equal(changed[:12], expected[:12])
    assert not torch.allclose(changed[12:], expected[12:])


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_images_in_a_batch_give_what_they_give_alone(engine: MakeEngine, chunk: int) -> None:
    asked = [
        request(PROMPT, PICTURES, prompt_logprobs=True, logprobs=0),
        request([1, 5, 6, 20], []),
        request([IMAGE, IMAGE, 3], [picture(1, 2, 3)], temperature=1.0, seed=3),
        request(PROMPT, [*PICTURES[:2], picture(2, 1, 9)], logprobs=0),
    ]
    alone = [engine().generate([one])[0] for one in asked]
    together = engine(chunk_tokens=chunk, max_batch_size=3).generate(asked)
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert alone[0].logprobs != pytest.approx(alone[3].logprobs, abs=1e-3)
    logprobs = torch.log_softmax(engine().logits(PROMPT, None, PICTURES), -1)
    expected = [float(logprobs[i, token]) for i, token in enumerate(PROMPT[1:])]
    assert together[0].prompt_logprobs is not None
    assert together[0].prompt_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_images_are_encoded_again_where_memory_was_too_small(engine: MakeEngine) -> None:
    room = engine()._memory.cost(len(PROMPT) + 6)
    asked = [request(PROMPT, PICTURES, ignore_eos=True), request(PROMPT, [*PICTURES[:2], picture(2, 1, 9)])]
    expected = [engine().generate([one])[0].tokens for one in asked]
    crowded = engine(memory_bytes=2 * room - 1, chunk_tokens=5)
    assert [c.tokens for c in crowded.generate(asked)] == expected


def test_values_are_kept_from_the_first_step_that_needs_them_to_the_last(
    plan: Plan, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encoder = decoder.get_submodule("vision")
    encode = encoder.forward

    def counted(images: list[Tensor]) -> list[Tensor]:
        calls.append(len(images))
        made: list[Tensor] = encode(images)
        return made

    monkeypatch.setattr(encoder, "forward", counted)
    placed = place(decoder.spec.encoders(), PROMPT, PICTURES)
    kept = []
    for start in range(0, len(PROMPT), 4):
        rows_of_media(decoder, [(placed, start, min(start + 4, len(PROMPT)))], torch.device("cpu"))
        kept.append([piece.values_ND is not None for piece in placed])
    assert calls == [1, 2]
    assert kept[0] == [True, False, False]
    assert kept[-1] == [False, False, False]
    assert rows_of_media(decoder, [(placed, 0, 2), ([], 4, 9)], torch.device("cpu")) is None


def test_placeholders_and_images_must_agree(engine: MakeEngine) -> None:
    for prompt, media, found in (
        ([1, IMAGE, 2], [], "1 tokens of id 10 for 0 images"),
        ([1, IMAGE, 2], PICTURES[:1], "1 tokens of id 10 for 1 image, which fill 6 places"),
        ([1, IMAGE, 2], [PICTURES[1], PICTURES[1]], r"1 tokens of id 10 for 2 images, which fill 1 \+ 1 places"),
        ([1, 2], PICTURES[1:2], "0 tokens of id 10 for 1 image"),
    ):
        with pytest.raises(RequestError, match=f"image tokens are not those of its images.*found {found}"):
            engine().generate([request(prompt, media)])
        with pytest.raises(RequestError, match=found):
            engine().logits(prompt, None, media)
    with pytest.raises(RequestError, match="no encoder for audio"):
        engine().submit(request([1], [Media("audio", torch.zeros(3))]))


def test_images_are_told_apart_by_what_they_show(engine: MakeEngine) -> None:
    other = [PICTURES[0], picture(1, 1, 7), PICTURES[2]]
    running = engine()
    prompt = [*range(20, 30), *PROMPT, *range(20, 50)]
    expected = [engine().generate([request(prompt, media, logprobs=0)])[0].logprobs for media in (PICTURES, other)]
    found = [running.generate([request(prompt, media, logprobs=0)])[0] for media in (PICTURES, other, PICTURES)]
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)
    for each, logprobs in zip(found, [*expected, expected[0]], strict=True):
        assert each.logprobs == pytest.approx(logprobs, abs=1e-5)
    assert [each.usage.cached_tokens for each in found] == [0, prompt.index(6) + 1, len(prompt) - 1]
