"""Images through the public functions: every way to give one, together with texts, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.model import Model
from zoo.registry.errors import RequestError

IMAGE, CELL = 10, 28
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 70, 3), dtype=np.uint8))
GRID = [IMAGE, IMAGE, IMAGE, 12, IMAGE, IMAGE, IMAGE, 13]
"""Three columns and two rows of cells."""


def card(vision: bool = True) -> dict[str, Any]:
    norm = {"kind": "rms", "eps": 1e-5}
    mixer = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": {"theta": 50.0}}
    encoder = {"kind": "pixtral", "token": IMAGE, "dim": 12, "num_layers": 1, "num_heads": 3, "hidden_dim": 20}
    encoder |= {"patch_size": 14, "max_image_size": 1540, "theta": 100.0, "norm": norm}
    encoder |= {"projector": {"bias": False, "merge": 2, "norm": norm}}
    model: dict[str, Any] = {"dim": 16, "vocab_size": 30000, "norm": norm}
    model["layers"] = [{"mixer": mixer, "ffn": {"kind": "gated", "hidden_dim": 20}}]
    features = ["chat", "vision"] if vision else ["chat"]
    text = {"tokenizer": {"kind": "mistral", "version": "v13"}, "chat": "mistral", "features": features}
    return {
        "name": "image-test",
        "context_length": 4096,
        "text": text,
        "model": model | ({"vision": encoder} if vision else {}),
    }


@pytest.fixture(scope="module")
def folder(mistral_folder: Callable[[str], Path]) -> Path:
    """A folder with a tokenizer whose file says how images are cut."""
    return mistral_folder("v13-images")


def opened(folder: Path, vision: bool = True) -> Model:
    return zoo.load(card(vision) | {"source": {"path": str(folder)}}, weights="random", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with opened(folder) as found:
        yield found


def test_every_way_to_give_an_image_is_one(model: Model, tmp_path: Path) -> None:
    file, data = tmp_path / "a.png", io.BytesIO()
    PICTURE.save(file)
    PICTURE.save(data, "PNG")
    ask = {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What?"}]}
    expected = model.chat([ask], max_tokens=3)
    for image in (PICTURE, str(file), file, data.getvalue()):
        assert model.generate("What?", images=[image], max_tokens=3)[0].tokens == expected.tokens
        assert (
            model.chat([{"role": "user", "content": "What?"}], images=[image], max_tokens=3).tokens == expected.tokens
        )
    assert list(model.stream("What?", images=[file], max_tokens=3))[-1].completion is not None
    assert expected.prompt_ids[:10] == [1, 3, *GRID]
    raw = model.generate("What?", images=[PICTURE], raw=True, max_tokens=1)[0]
    assert raw.prompt_ids == [1, *GRID, *model.encode("What?")[1:]]


def test_logits_and_scores_see_the_image(model: Model) -> None:
    tokens = [1, *GRID, 2000, 2001]
    found = model.logits(tokens, images=[PICTURE])
    other = model.logits(tokens, images=[PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    assert torch.equal(found[0], other[0])
    assert not torch.equal(found[1:], other[1:])
    prepared = torch.randn(3, 2 * CELL, 3 * CELL)
    assert model.logits(tokens, images=[prepared]).shape == (len(tokens), 30000)
    expected = torch.log_softmax(found[:-1], -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert model.score(tokens, images=[PICTURE]) == pytest.approx(expected.tolist())
    assert len(model.score("What?", images=[PICTURE])) == len(GRID) + len(model.encode("What?")) - 1


def test_images_and_texts_run_together(model: Model) -> None:
    asked: list[Any] = ["What?", "Who?", [1, *GRID, 5]]
    shares = [[PICTURE], [], [PICTURE]]
    together = model.generate(asked, images=shares, max_tokens=4)
    alone = [model.generate(p, images=own, max_tokens=4)[0] for p, own in zip(asked, shares, strict=True)]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


def test_images_that_do_not_fit_the_prompt_are_refused(model: Model) -> None:
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: model.generate(["a", "b"], images=[PICTURE]), "several prompts need a list of images for each"),
        (lambda: model.generate([1, *GRID], images=[PICTURE, PICTURE]), r"6 tokens of id 10 for 2 images, .* 6 \+ 6"),
        (lambda: model.generate([1, *GRID]), "6 tokens of id 10 for 0 images"),
        (lambda: model.logits([1, 5], images=[PICTURE]), "0 tokens of id 10 for 1 image"),
        (lambda: model.generate("a", images="a.png"), "images are given as a list; found str"),
        (lambda: model.generate("a", images=["none.png"]), "image 1: the image cannot be read"),
        (lambda: model.generate("a", images=[torch.rand(3, 28, 28) * 255]), "image 1: .*numbers are too large"),
        (lambda: model.fill("a", "b"), "not trained to fill in the middle"),
    ]
    for call, message in refused:
        with pytest.raises(RequestError, match=message):
            call()


def test_models_of_text_refuse_images(folder: Path) -> None:
    with opened(folder, vision=False) as model:
        for call in (
            lambda: model.generate("a", images=[PICTURE]),
            lambda: model.generate([1, 2], images=[PICTURE]),
            lambda: model.chat([{"role": "user", "content": "a"}], images=[PICTURE]),
            lambda: model.logits([1], images=[PICTURE]),
        ):
            with pytest.raises(RequestError, match=r"does not read images; found 1 image\(s\)"):
                call()
        part = {"type": "image_url", "image_url": {"url": "none.png"}}
        with pytest.raises(
            zoo.ZooError, match="part 1 is an image, which this tokenizer cannot take: it reads text only"
        ):
            model.chat([{"role": "user", "content": [part]}])
