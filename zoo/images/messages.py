"""Images in conversations: parts of messages become pictures, and images given beside them find their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zoo.components.vision.spec import PixtralSpec
from zoo.images.picture import Picture, picture
from zoo.registry.errors import RequestError

KINDS = ("image", "image_url")
SOURCES = ("image", "image_url", "url", "path")
"""Where a part may say which image it is; OpenAI's form has an object with `url` in it."""


def with_pictures(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Any], spec: PixtralSpec
) -> list[Mapping[str, Any]]:
    """The messages with each image part as `{"type": "picture", "picture": Picture}`.

    images: for the parts that name none, in order; without such parts they go before the last user message's text.
    Raises RequestError and FetchError as `picture`, and where images and places for them differ in number.
    """
    bare = sum(_source(part) is None for message in messages for part in _image_parts(message))
    if bare and bare != len(images):
        raise RequestError(
            "the messages' image parts are not as many as the images",
            where="images",
            found=f"{bare} parts that name no image, {len(images)} images",
            expected="one image for each",
        )
    if images and not bare:
        messages = _with_parts(messages, len(images))
    given = iter([(image, f"image {number}") for number, image in enumerate(images, 1)])
    return [_message(number, message, given, spec) for number, message in enumerate(messages, 1)]


def _image_parts(message: Any) -> list[Mapping[str, Any]]:
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") in KINDS]


def _source(part: Mapping[str, Any]) -> Any:
    """What a part says of its image; None where it leaves that to `images`."""
    source = next((part[key] for key in SOURCES if part.get(key) is not None), None)
    return source.get("url") if isinstance(source, Mapping) else source


def _with_parts(messages: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """With `count` parts that name no image before the last user message's content."""
    last = max((i for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == "user"), default=None)
    if last is None:
        raise RequestError("there is no user message for the images", where="images", found=f"{count} images")
    content = messages[last].get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
    changed = {**messages[last], "content": [*({"type": "image"} for _ in range(count)), *parts]}
    return [*messages[:last], changed, *messages[last + 1 :]]


def _message(number: int, message: Any, given: Iterator[tuple[Any, str]], spec: PixtralSpec) -> Mapping[str, Any]:
    if not _image_parts(message):
        return message  # type: ignore[no-any-return]
    parts = [_part(number, place, part, given, spec) for place, part in enumerate(message["content"], 1)]
    return {**message, "content": parts}


def _part(number: int, place: int, part: Any, given: Iterator[tuple[Any, str]], spec: PixtralSpec) -> Any:
    if not isinstance(part, Mapping) or part.get("type") not in KINDS:
        return part
    source = _source(part)
    source, where = next(given) if source is None else (source, f"message {number}, part {place}")
    return {"type": "picture", "picture": picture(source, spec, where)}


def pictures_of(messages: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """All pictures of checked messages, in their order."""
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return [part["picture"] for part in parts if part["type"] == "picture"]
