"""Pictures in Mistral's prompts: mistral-common writes their tokens by their sizes, and never sees their pixels."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

from zoo.images.messages import pictures_of
from zoo.images.picture import Picture
from zoo.registry.errors import TextError
from zoo.text.pictures import PictureIds

if TYPE_CHECKING:
    from zoo.text.mistral import MistralCodec

ADDRESS = "zoo:"
WITHOUT_IMAGES = ("v1", "v2")


def as_addresses(codec: MistralCodec, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each picture as an address that says its number and its size, which mistral-common then writes.

    Raises TextError for a version or file without images, and where it would cut pictures otherwise than the model.
    """
    pictures, numbers = pictures_of(messages), count()
    if not pictures:
        return messages
    _prepare(codec, pictures[0])
    return [
        {**message, "content": [_part(part, numbers) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _part(part: dict[str, Any], numbers: count[int]) -> dict[str, Any]:
    if part["type"] != "picture":
        return part
    picture: Picture = part["picture"]
    return {"type": "image_url", "image_url": f"{ADDRESS}{next(numbers)}:{picture.columns}:{picture.rows}"}


def _prepare(codec: MistralCodec, picture: Picture) -> None:
    """Has mistral-common write pictures by the sizes that their addresses say."""
    if codec.version in WITHOUT_IMAGES:
        raise TextError(f"Mistral's tokenizer {codec.version} has no images", expected="v3 or newer")
    instruct: Any = codec.library.instruct_tokenizer
    if isinstance(instruct.image_encoder, Grids):
        return
    spec, config = picture.spec, getattr(instruct.image_encoder, "image_config", None)
    ours = (spec.patch_size, spec.merge, spec.max_image_size)
    theirs = config and (config.image_patch_size, config.spatial_merge_size, config.max_image_size)
    if theirs not in (None, ours):
        raise TextError(
            "the tokenizer and the model cut images differently",
            found=f"patch, merge and largest size {theirs} in the tokenizer's file",
            expected=f"{ours}, as the card says",
        )
    instruct.image_encoder = Grids(PictureIds.of(codec.control_id))


class Grids:
    """What mistral-common asks for the tokens of an image: here by the size that its address says."""

    def __init__(self, ids: PictureIds) -> None:
        self.ids = ids

    def __call__(self, chunk: Any) -> Any:
        """The tokens, and the picture's number in place of its pixels."""
        import numpy as np
        from mistral_common.tokens.tokenizers.image import ImageEncoding

        number, columns, rows = map(int, chunk.get_url().removeprefix(ADDRESS).split(":"))
        return ImageEncoding(tokens=self.ids.row(columns, rows), image=np.array(number))
