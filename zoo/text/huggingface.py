"""Tokenizers of Hugging Face folders: `tokenizer.json`, with the names that `tokenizer_config.json` gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from zoo.json_file import damaged, read_object
from zoo.registry.errors import TextError
from zoo.text.detokenize import decode
from zoo.text.mistral import outside
from zoo.text.spec import HuggingFaceTokenizerSpec
from zoo.text.surface import Surface, surface_of

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

FILE = "tokenizer.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
SAMPLE = "Hello  wörld, 1 2\n\t你好 🦒 end."


class HuggingFaceCodec:
    """`library` is the tokenizers library's own object; `names` are the special tokens that templates may write."""

    kind = "huggingface"
    version = FILE
    notes: tuple[str, ...] = ()

    def __init__(self, library: Tokenizer, config: Mapping[str, Any], where: str) -> None:
        self.library = library
        self.names = {name: text for name in NAMES if (text := _content(config.get(name)))}
        self.special = {i: token for i, token in library.get_added_tokens_decoder().items() if token.special}
        self.vocabulary = HuggingFaceVocabulary(library, where)
        self.bos_id = self._id("bos_token")
        eos = self._id("eos_token")
        self.eos_ids: frozenset[int] = frozenset() if eos is None else frozenset({eos})

    @classmethod
    def open(cls, spec: HuggingFaceTokenizerSpec, folder: Path) -> Self:
        """Raises TextError: no `tokenizer.json`, a damaged one, one whose text cannot be streamed."""
        file = folder / FILE
        if not file.is_file():
            raise TextError(
                f"no {FILE}",
                where=str(folder),
                hint=f"add the checkpoint's {FILE}, or give token ids instead of text",
            )
        config = {
            **read_object(folder / "special_tokens_map.json", TextError, missing_ok=True),
            **read_object(folder / "tokenizer_config.json", TextError, missing_ok=True),
        }
        library = _read(file)
        _add_configured(library, config, str(folder / "tokenizer_config.json"))
        codec = cls(library, config, str(file))
        codec._check_decoder(str(file))
        return codec

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Ids of `text`; special tokens written in it are recognised, as the library does.

        With `bos`, the post-processor of `tokenizer.json` puts its tokens around the text. It alone decides, as in
        transformers 5, and not `add_bos_token` of `tokenizer_config.json`; a first token written in the text counts.
        """
        ids: list[int] = self.library.encode(text, add_special_tokens=bos).ids
        return self.single_bos(ids)

    def single_bos(self, ids: list[int]) -> list[int]:
        """`ids` with the beginning-of-sequence id once where it was doubled at the start."""
        doubled = 0
        while len(ids) > doubled + 1 and ids[doubled] == ids[doubled + 1] == self.bos_id:
            doubled += 1
        return ids[doubled:]

    def control_id(self, name: str) -> int | None:
        """The id of a special token; None where there is none of that name."""
        return next((number for number, token in self.special.items() if token.content == name), None)

    def fill(self, prefix: str, suffix: str) -> list[int]:
        raise TextError(f"{FILE} does not say how to ask for the middle of a text", expected="a tokenizer of Mistral's")

    def _id(self, name: str) -> int | None:
        return self.library.token_to_id(self.names[name]) if name in self.names else None

    def _check_decoder(self, where: str) -> None:
        ids = self.library.encode(SAMPLE, add_special_tokens=False).ids
        ours, theirs = decode(self, ids), self.library.decode(ids)
        if ours != theirs:
            raise TextError(
                "text cannot be streamed with this tokenizer", where=where, found=repr(ours), expected=repr(theirs)
            )


class HuggingFaceVocabulary:
    """Ids of a `tokenizer.json`. A special id that is left out does not end a character, as in the library."""

    control_ends_run = False

    def __init__(self, library: Tokenizer, where: str) -> None:
        self._library = library
        self._added = {i: token.content for i, token in library.get_added_tokens_decoder().items()}
        self._special = {i: t.content for i, t in library.get_added_tokens_decoder().items() if t.special}
        self.size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        decoder: Any = library.decoder
        self._surface: Surface = surface_of(None if decoder is None else json.loads(decoder.__getstate__()), where)
        self.each_byte = self._surface.each_byte

    def control(self, token: int) -> str | None:
        if token in self._special:
            return self._special[token]
        return None if 0 <= token < self.size and self._library.id_to_token(token) is not None else outside(token)

    def surface(self, token: int, first: bool) -> bytes:
        if token in self._added:
            return self._surface.of_added(self._added[token], first)
        return self._surface.of(self._library.id_to_token(token) or "", first)


def _read(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        library = Tokenizer.from_file(str(file))
    except Exception as fault:  # the library raises bare Exception for a file that it cannot read
        raise damaged(file, "a tokenizer", fault, TextError) from fault
    # A length stored by whoever trained it would silently cut prompts.
    library.no_truncation()
    library.no_padding()
    return library


def _add_configured(library: Tokenizer, config: Mapping[str, Any], where: str) -> None:
    """Special tokens that only `tokenizer_config.json` names, which must get the ids it gives them."""
    for number, entry in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        token = _added_token(entry, special=bool(entry.get("special")))
        known = library.get_added_tokens_decoder().get(int(number))
        if known is None or known.content != token.content or known.special != token.special:
            _add(library, token)
            if library.token_to_id(token.content) != int(number):
                raise TextError(
                    f"the token {token.content!r} has different ids",
                    where=where,
                    found=f"{number} here, {library.token_to_id(token.content)} in {FILE}",
                )
    special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    for entry in _named(config):
        text = _content(entry)
        # a name without an id, such as a padding token that nobody trained, would be an id without an embedding
        if text and text not in special and library.token_to_id(text) is not None:
            _add(library, _added_token(entry, special=True))


def _named(config: Mapping[str, Any]) -> list[Any]:
    """Everything that the configuration calls a special token."""
    extra = config.get("extra_special_tokens") or ()
    more = config.get("additional_special_tokens") or ()
    return [*(config.get(name) for name in NAMES), *(extra.values() if isinstance(extra, Mapping) else extra), *more]


def _add(library: Tokenizer, token: AddedToken) -> None:
    if token.special:
        library.add_special_tokens([token])
    else:
        library.add_tokens([token])


def _added_token(entry: Any, *, special: bool) -> AddedToken:
    from tokenizers import AddedToken

    flags = {flag: bool(entry[flag]) for flag in FLAGS if flag in entry} if isinstance(entry, Mapping) else {}
    return AddedToken(_content(entry) or "", special=special, **({"normalized": not special} | flags))


def _content(token: Any) -> str | None:
    """The text of a special token, which files give as a text or as an object with `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None
