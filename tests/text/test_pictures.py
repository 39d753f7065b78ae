"""Pictures in prompts: Mistral's chat format as mistral-common writes it, templates as processors expand them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image

from zoo.components.norm.spec import RMSSpec
from zoo.components.vision.spec import PixtralSpec, ProjectorSpec
from zoo.images.messages import with_pictures
from zoo.registry.errors import RequestError, TextError
from zoo.text.spec import HuggingFaceTokenizerSpec, TemplateChatSpec
from zoo.text.tokenizer import Tokenizer, open_tokenizer

Open = Callable[[str], Tokenizer]
ONE, TWO = Image.new("RGB", (60, 90)), Image.new("RGB", (1900, 100))


def spec(patch: int = 14, merge: int | None = 2, largest: int = 1540) -> PixtralSpec:
    norm = RMSSpec(dim=24, eps=1e-5)
    sizes: dict[str, Any] = {"dim": 24, "num_layers": 1, "num_heads": 3, "hidden_dim": 20, "theta": 1e4, "token": 10}
    projector = ProjectorSpec(in_dim=24, out_dim=16, bias=False, merge=merge)
    return PixtralSpec(**sizes, out_dim=16, patch_size=patch, max_image_size=largest, norm=norm, projector=projector)


SPECS = {"v3-images": spec(16, None, 1024), "v7-images": spec(16, None, 1024), "v13-images": spec()}


def image(source: Any = None) -> dict[str, Any]:
    return {"type": "image"} if source is None else {"type": "image", "image": source}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "last": [{"role": "user", "content": [text("What is this?"), image(ONE)]}],
    "between": [{"role": "user", "content": [text("First"), image(ONE), text("then"), image(TWO), text("?")]}],
    "turns": [
        {"role": "user", "content": [image(TWO), text("What?")]},
        {"role": "assistant", "content": "A thing."},
        {"role": "user", "content": [image(ONE), image(TWO)]},
    ],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [image(ONE), text("[IMG] Hm")]}],
}


@pytest.mark.parametrize("version", list(SPECS))
@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_chats_with_images_are_mistral_commons(
    mistral: Open, mistral_folder: Callable[[str], Path], version: str, name: str
) -> None:
    messages = CONVERSATIONS[name]
    found = mistral(version).render(with_pictures(messages, [], SPECS[version]))
    (file,) = mistral_folder(version).iterdir()
    reference: Any = MistralTokenizer.from_file(str(file))
    request: Any = ChatCompletionRequest.from_openai([theirs(message) for message in messages])
    expected = reference.encode_chat_completion(request)
    assert found.ids == expected.tokens
    assert [picture.prepared().shape for picture in found.images] == [array.shape for array in expected.images]


def theirs(message: dict[str, Any]) -> dict[str, Any]:
    """The message with pictures as mistral-common takes them."""
    from mistral_common.protocol.instruct.chunk import ImageChunk, ImageURLChunk

    def address(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        chunk = ImageChunk(image=part["image"])
        return ImageURLChunk(image_url=chunk.to_openai()["image_url"]["url"]).to_openai()

    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": [address(part) for part in content]}


def test_images_find_their_places() -> None:
    made = spec()

    def placed(messages: list[dict[str, Any]], images: list[Any]) -> list[Any]:
        found = with_pictures(messages, images, made)
        return [
            [part["picture"].content.size if part["type"] == "picture" else part["text"] for part in message["content"]]
            for message in found
            if isinstance(message["content"], list)
        ]

    words = {"role": "user", "content": "What?"}
    assert placed([words], [ONE, TWO]) == [[(60, 90), (1900, 100), "What?"]]
    assert placed([words, {"role": "assistant", "content": "x"}, words], [ONE]) == [[(60, 90), "What?"]]
    bare = {"role": "user", "content": [text("a"), image(), text("b"), image()]}
    assert placed([bare], [TWO, ONE]) == [["a", (1900, 100), "b", (60, 90)]]
    mixed = {"role": "user", "content": [image(ONE), image()]}
    assert placed([mixed], [TWO]) == [[(60, 90), (1900, 100)]]
    with pytest.raises(RequestError, match="found 2 parts that name no image, 1 images"):
        placed([bare], [ONE])
    with pytest.raises(RequestError, match="found 1 parts that name no image, 2 images"):
        placed([{"role": "user", "content": [image(), text("?")]}], [ONE, TWO])
    with pytest.raises(RequestError, match="found 2 parts that name no image, 0 images"):
        placed([bare], [])
    with pytest.raises(RequestError, match="message 1, part 2: the image cannot be read"):
        placed([{"role": "user", "content": [text("a"), image("none.png")]}], [])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "{}"}},
        {"type": "image_url", "image_url": "{}"},
        {"type": "image", "url": "{}"},
        {"type": "image", "path": "{}"},
        {"type": "image", "image": "{}"},
    ],
)
def test_every_form_of_a_part(part: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "one.png"
    ONE.save(file)
    filled = json.loads(json.dumps(part).replace("{}", file.as_posix()))
    ((found,),) = (m["content"] for m in with_pictures([{"role": "user", "content": [filled]}], [], spec()))
    assert (found["picture"].columns, found["picture"].rows) == (3, 4)


def test_what_cannot_be_written_is_refused(mistral: Open) -> None:
    one = [{"role": "user", "content": [image(ONE)]}]
    with pytest.raises(TextError, match="Mistral's tokenizer v1 has no images; expected v3 or newer"):
        mistral("v1").render(with_pictures(one, [], spec()))
    with pytest.raises(TextError, match=r"cannot write images; found no token"):
        mistral("v3").render(with_pictures(one, [], spec()))
    with pytest.raises(TextError, match=r"part 1 is an image, which this tokenizer cannot take"):
        mistral("v13").render(one)
    with pytest.raises(TextError, match=r"message 1 \(system\).*part 1 is an image, which only user and tool messages"):
        mistral("v13").render(with_pictures([{"role": "system", "content": [image(ONE)]}, *one], [], spec()))


def test_the_tokenizers_images_must_be_the_cards(mistral_folder: Callable[[str], Path]) -> None:
    from zoo.text.spec import MistralChatSpec, MistralTokenizerSpec

    tokenizer = open_tokenizer(MistralTokenizerSpec(), MistralChatSpec(), mistral_folder("v13-images"))
    with pytest.raises(TextError, match=r"found .* \(14, 2, 1540\) in the tokenizer's file; expected \(16, 1, 1024\)"):
        tokenizer.render(with_pictures([{"role": "user", "content": [image(ONE)]}], [], spec(16, None, 1024)))


def test_pictures_before_raw_text(mistral: Open) -> None:
    tokenizer = mistral("v13-images")
    (message,) = with_pictures([{"role": "user", "content": [image(ONE)]}], [], spec())
    shown = tokenizer.show([part["picture"] for part in message["content"]], "Hello")
    row = [10, 10, 10]
    assert shown.ids == [1, *row, 12, *row, 12, *row, 12, *row, 13, *tokenizer.encode("Hello", bos=False)]
    assert len(shown.images) == 1


TEMPLATE = """{{- bos_token }}{% for message in messages %}[INST]{% if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}[IMG]{% endif %}
{%- endfor %}{% endif %}[/INST]{% endfor %}"""


def test_templates_are_expanded_as_processors_do(hugging_face: Callable[..., Path]) -> None:
    folder, tokens = hugging_face(), ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = json.loads((folder / "tokenizer.json").read_text())
    first = 1 + max(config["model"]["vocab"].values())
    first = max([first, *(1 + token["id"] for token in config["added_tokens"])])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    config["added_tokens"] += [{"id": first + i, "content": name, **flags} for i, name in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = open_tokenizer(HuggingFaceTokenizerSpec(), TemplateChatSpec(), folder)
    messages = [{"role": "user", "content": [text("a [IMG] b"), image(ONE), text("c"), image(TWO)]}]
    found = tokenizer.render(with_pictures(messages, [], spec()))
    cell, row_end, end = range(first, first + 3)
    assert found.ids.count(cell) == 12 + 55 * 3
    assert found.ids.count(row_end) == 3 + 2
    assert found.ids.count(end) == 2
    assert [picture.content.size for picture in found.images] == [ONE.size, TWO.size]
