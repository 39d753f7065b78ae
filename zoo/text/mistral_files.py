"""Which tokenizer file of a folder to use, and which version of Mistral's tokenizer it holds."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from zoo.json_file import damaged
from zoo.registry.errors import TextError

VERSIONS = ("v1", "v2", "v3", "v7", "v11", "v13", "v15")
SENTENCEPIECE = re.compile(r".*\.model(?:\.(?P<version>v\d+)(?:m\d+)?)?")
TEKKEN_VERSION = re.compile(rb'"version"\s*:\s*"(v\d+)"')
NEEDED = {
    "v7": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
    "v3": ("[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
    "v2": ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
}
"""Control pieces that a SentencePiece version has and the one before lacks; a missing piece would become `<unk>`."""


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """version: the tokenizer's version. named: the file itself says it (a bare `tokenizer.model` does not)."""

    path: Path
    version: str
    tekken: bool
    named: bool


def choose_file(folder: Path, version: str | None) -> tuple[TokenizerFile, str | None]:
    """The tokenizer file for a card's `version` and a note if there was a choice.

    The version of the card decides; else tekken before SentencePiece, then the newest.
    Raises TextError: no file, a damaged file, or none of the card's version.
    """
    found = [describe(path) for path in candidates(folder)]
    if not found:
        raise TextError(
            "no Mistral tokenizer",
            where=str(folder),
            expected="tekken.json, tokenizer.model or tokenizer.model.v*",
            hint="add the checkpoint's tokenizer file, or give token ids instead of text",
        )
    fitting = [fits for file in found if (fits := as_version(file, version)) is not None]
    if not fitting:
        raise TextError(
            "the tokenizer file is not of the card's version",
            where=str(folder),
            found=", ".join(f"{file.path.name} ({file.version})" for file in found),
            expected=f"version {version}, as the card says",
        )
    chosen = max(fitting, key=lambda file: (file.tekken, VERSIONS.index(file.version), file.named))
    return chosen, _note(chosen, found, version)


def candidates(folder: Path) -> list[Path]:
    """Files in `folder` whose names say that they are Mistral tokenizers."""
    return sorted(path for path in folder.iterdir() if path.is_file() and (_is_tekken(path) or _is_sentencepiece(path)))


def describe(path: Path) -> TokenizerFile:
    """What `path` holds. Raises TextError for a damaged file or a version that is not known."""
    if _is_tekken(path):
        return TokenizerFile(path, _known(_tekken_version(path), path), tekken=True, named=True)
    match = SENTENCEPIECE.fullmatch(path.name)
    assert match is not None
    held = _sentencepiece_version(path)
    named = match["version"]
    if named is not None and not _can_be(held, _known(named, path)):
        raise TextError("the file's name and content disagree", where=str(path), found=f"the pieces of {held}")
    return TokenizerFile(path, named or held, tekken=False, named=named is not None)


def as_version(file: TokenizerFile, version: str | None) -> TokenizerFile | None:
    """The file read as the card's `version`, None if it cannot be: only a bare `tokenizer.model` leaves a choice."""
    if version is None or file.version == version:
        return file
    if file.named or not _can_be(file.version, version):
        return None
    return TokenizerFile(file.path, version, tekken=False, named=False)


def _can_be(held: str, version: str) -> bool:
    """Whether a SentencePiece file with the pieces of `held` has all that `version` needs."""
    return held == version or VERSIONS.index("v1") < VERSIONS.index(version) < VERSIONS.index(held)


def _note(chosen: TokenizerFile, found: list[TokenizerFile], version: str | None) -> str | None:
    others = [f"{file.path.name} ({file.version})" for file in found if file.path != chosen.path]
    name = f"{chosen.path.name} ({chosen.version})"
    if others:
        reason = "its version is the card's" if version else "tekken first, then the newest"
        return f"tokenizer: {name}, not {', '.join(others)}: {reason}"
    if not chosen.named and version is None:
        return f"tokenizer: {name}, the version read from its control pieces"
    return None


def _is_tekken(path: Path) -> bool:
    return "tekken" in path.name and path.suffix == ".json"


def _is_sentencepiece(path: Path) -> bool:
    return SENTENCEPIECE.fullmatch(path.name) is not None


def _known(version: str, path: Path) -> str:
    if version not in VERSIONS:
        raise TextError(
            "unknown tokenizer version",
            where=str(path),
            found=version,
            expected=f"one of {', '.join(VERSIONS)}",
            hint="a newer zoo may know it",
        )
    return version


def _tekken_version(path: Path) -> str:
    # The version stands in the first lines of fifteen megabytes; the whole is parsed only where it does not.
    with path.open("rb") as stream:
        match = TEKKEN_VERSION.search(stream.read(8192))
    if match is not None:
        return match[1].decode()
    try:
        return str(json.loads(path.read_bytes())["config"]["version"])
    except (ValueError, KeyError, TypeError) as fault:
        raise damaged(path, "a tekken tokenizer", fault, TextError) from fault


def _sentencepiece_version(path: Path) -> str:
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as fault:
        raise damaged(path, "a SentencePiece model", fault, TextError) from fault
    unknown = pieces.unk_id()
    for version, needed in NEEDED.items():
        if all(pieces.piece_to_id(name) != unknown for name in needed):
            return version
    return "v1"
