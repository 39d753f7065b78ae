"""Trains the embedded model's vocabulary on its own text and writes it as a tekken file.

    python docs/tiny/tokenizer.py --out cards/tiny

The merges are learned by the `tokenizers` library with tekken's split pattern. A tekken file ranks the 256 bytes
first and then every learned piece in the order of its merge, so that merging the lowest rank first, as tiktoken
does, builds the same pieces.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from facts import read_cards
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from text import Author
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONVERSATIONS = 20_000


def corpus(conversations: int = CONVERSATIONS) -> Iterator[str]:
    """Questions and answers to learn the pieces from."""
    author = Author(read_cards(), seed=1)
    for _ in range(conversations):
        for turn in author.conversation():
            yield turn.question
            yield turn.answer


def learn(texts: Iterable[str], size: int) -> list[bytes]:
    """`size` pieces: the 256 bytes in order, then the merges in the order in which they were learned."""
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    merged = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    unprinted = _byte_of_letter()
    pieces = [bytes(unprinted[letter] for letter in piece) for piece, _ in merged]
    return [bytes([i]) for i in range(256)] + [piece for piece in pieces if len(piece) > 1]


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes every byte as a printable letter: those that are none as letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


def tekken(pieces: list[bytes]) -> dict[str, Any]:
    """The file's content: version v7 with the special tokens that version defines, and no fillers."""
    special = [dict(token) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    config = {
        "pattern": PATTERN,
        "num_vocab_tokens": len(pieces),
        "default_vocab_size": len(pieces) + len(special),
        "default_num_special_tokens": len(special),
        "version": "v7",
    }
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(piece).decode(), "token_str": _shown(piece)}
        for i, piece in enumerate(pieces)
    ]
    return {"config": config, "vocab": vocab, "special_tokens": special}


def _shown(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write tekken.json to")
    out: Path = parser.parse_args().out
    tiny = next(card for card in read_cards() if card.id == "tiny")
    special = len(Tekkenizer.DEPRECATED_SPECIAL_TOKENS)
    content = tekken(learn(corpus(), tiny.vocab - special))
    (out / "tekken.json").write_text(json.dumps(content, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
