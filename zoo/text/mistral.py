"""Mistral's tokenizers of every version, read and applied by mistral-common, from the checkpoint's own file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from zoo.json_file import damaged
from zoo.registry.errors import TextError
from zoo.text.detokenize import Vocabulary
from zoo.text.mistral_files import TokenizerFile, choose_file
from zoo.text.spec import MistralTokenizerSpec

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from sentencepiece import SentencePieceProcessor

WITHOUT_FILL = ("v1", "v2")
SPACE = "▁"
MARK = "☺"


class MistralCodec:
    """A tokenizer file opened by mistral-common. `library` is mistral-common's own object."""

    kind = "mistral"

    def __init__(self, library: MistralTokenizer[Any, Any, Any, Any, Any], notes: tuple[str, ...] = ()) -> None:
        self.library, self.notes = library, notes
        self.version: str = library.version.value
        self._raw = library.instruct_tokenizer.tokenizer
        self.vocabulary = _vocabulary(self._raw)
        self.bos_id: int | None = self._raw.bos_id
        self.eos_ids = frozenset({self._raw.eos_id})

    @classmethod
    def open(cls, spec: MistralTokenizerSpec, folder: Path) -> Self:
        """The tokenizer of `folder` in the card's version. Raises TextError as `choose_file` does."""
        file, note = choose_file(folder, spec.version)
        codec = cls(_library(file), () if note is None else (note,))
        assert codec.version == file.version
        return codec

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Ids of `text`; names of control tokens in it are ordinary characters."""
        ids: list[int] = self._raw.encode(text, bos=bos, eos=False)
        return ids

    def control_id(self, name: str) -> int | None:
        """The id of a control token; None where this vocabulary has none of that name."""
        try:
            found: int = self._raw.get_special_token(name)
        except ValueError:
            return None
        return found if self.vocabulary.control(found) == name else None

    def fill(self, prefix: str, suffix: str) -> list[int]:
        """`<s>[SUFFIX]suffix[PREFIX]prefix`, from v3 on. Raises TextError for older versions."""
        if self.version in WITHOUT_FILL:
            raise TextError(f"Mistral's tokenizer {self.version} has no fill-in-the-middle", expected="v3 or newer")
        from mistral_common.protocol.fim.request import FIMRequest

        # mistral-common cuts two ids off the suffix, which a mark before it has in the vocabularies that it ships.
        if len(self.encode(MARK, bos=False)) == 2:
            return [*self.library.encode_fim(FIMRequest(prompt=prefix, suffix=suffix)).tokens]
        before, after = (self._raw.get_special_token(name) for name in ("[PREFIX]", "[SUFFIX]"))
        return [self._raw.bos_id, after, *self.encode(suffix, bos=False), before, *self.encode(prefix, bos=False)]


class SentencePieceVocabulary:
    """Ids of a SentencePiece model. A control id between two bytes ends a character, as in the library."""

    control_ends_run = True
    each_byte = True

    def __init__(self, pieces: SentencePieceProcessor) -> None:
        self._pieces = pieces
        self.size: int = pieces.get_piece_size()
        self._unknown: bytes = pieces.decode([pieces.unk_id()]).encode()
        self._dummy_space = self._drops_first_space()

    def control(self, token: int) -> str | None:
        if not 0 <= token < self.size:
            return outside(token)
        name: str = self._pieces.id_to_piece(token)
        return name if self._pieces.is_control(token) else None

    def surface(self, token: int, first: bool) -> bytes:
        piece: str = self._pieces.id_to_piece(token)
        if self._pieces.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        if self._pieces.is_unknown(token):
            return self._unknown
        if first and self._dummy_space:
            piece = piece.removeprefix(SPACE)
        return piece.replace(SPACE, " ").encode()

    def _drops_first_space(self) -> bool:
        """Whether the model was trained with a space before every text; the library alone knows the setting."""
        spaced = next((i for i in range(self.size) if self._pieces.id_to_piece(i).startswith(SPACE)), None)
        if spaced is None:
            return False
        text: str = self._pieces.decode([spaced])
        return text != self._pieces.id_to_piece(spaced).replace(SPACE, " ")


class TekkenVocabulary:
    """Ids of a tekken file: special ids first, then byte pairs."""

    control_ends_run = True
    each_byte = False

    def __init__(self, tekken: Tekkenizer) -> None:
        self._tekken = tekken
        self.size = tekken.n_words

    def control(self, token: int) -> str | None:
        if not 0 <= token < self.size:
            return outside(token)
        return self._tekken.id_to_piece(token) if self._tekken.is_special(token) else None

    def surface(self, token: int, first: bool) -> bytes:
        return self._tekken.id_to_byte_piece(token)


def outside(token: int) -> str:
    """The name of an id that the model can produce and the tokenizer does not know."""
    return f"<id {token}>"


def _vocabulary(raw: Any) -> Vocabulary:
    from mistral_common.tokens.tokenizers.tekken import is_tekkenizer
    from sentencepiece import SentencePieceProcessor

    if is_tekkenizer(raw):
        return TekkenVocabulary(raw)
    return SentencePieceVocabulary(SentencePieceProcessor(model_file=str(raw.file_path)))


def _library(file: TokenizerFile) -> MistralTokenizer[Any, Any, Any, Any, Any]:
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    try:
        return MistralTokenizer.from_file(file.path) if file.named else _unnamed(file)
    except (MistralCommonException, ValueError, KeyError, TypeError, AttributeError, AssertionError) as fault:
        raise damaged(file.path, f"a tokenizer of version {file.version}", fault, TextError) from fault


def _unnamed(file: TokenizerFile) -> MistralTokenizer[Any, Any, Any, Any, Any]:
    """A bare `tokenizer.model` in a version of our choice; mistral-common itself would take every one for v1."""
    from mistral_common.protocol.instruct.normalize import get_normalizer
    from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
    from mistral_common.tokens.tokenizers import instruct
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    version = TokenizerVersion(file.version)
    raw = SentencePieceTokenizer(file.path, tokenizer_version=version)
    forms = {
        "v1": instruct.InstructTokenizerV1,
        "v2": instruct.InstructTokenizerV2,
        "v3": instruct.InstructTokenizerV3,
        "v7": instruct.InstructTokenizerV7,
    }
    return MistralTokenizer(
        forms[file.version](raw),
        validator=get_validator(version, mode=ValidationMode.test),
        request_normalizer=get_normalizer(version, None),
    )
