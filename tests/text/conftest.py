"""Mistral tokenizers of every version: the files that mistral-common ships and variants made from its tekken file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from zoo.text.spec import MistralChatSpec, MistralTokenizerSpec
from zoo.text.tokenizer import CheckpointTokenizer, open_tokenizer

SHIPPED = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "v3-tekken": "tekken_240718.json",
}
KEPT = {"v7-tekken": 30000, "v11": 30000, "v13": 30000, "v15": 131072}
"""Vocabulary of the variants; the smaller ones load faster and hold the words of the tests."""

NAMES = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    10: "[IMG]",
    11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]",
    14: "[PREFIX]",
    15: "[MIDDLE]",
    16: "[SUFFIX]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]",
    32: "[ARGS]",
    33: "[CALL_ID]",
    34: "[THINK]",
    35: "[/THINK]",
    36: "[MODEL_SETTINGS]",
    37: "[/MODEL_SETTINGS]",
}
EFFORT = {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}


def _write_tekken(source: Path, target: Path, version: str, size: int) -> None:
    data = json.loads(source.read_bytes())
    data["config"] |= {"version": version, "default_vocab_size": size, "num_vocab_tokens": size - 1000}
    data["vocab"] = data["vocab"][: size - 1000]
    data["special_tokens"] = [
        {"rank": i, "token_str": NAMES.get(i, f"<SPECIAL_{i}>"), "is_control": True} for i in range(1000)
    ]
    if version == "v15":
        data["model_settings_builder"] = {"reasoning_effort": EFFORT}
    target.write_text(json.dumps(data))


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The folder of tokenizer files inside mistral-common."""
    return Path(str(files("mistral_common") / "data"))


@pytest.fixture(scope="session")
def mistral_folder(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder holding one tokenizer file of the version named, such as "v3" (SentencePiece) or "v3-tekken"."""

    @cache
    def folder(name: str) -> Path:
        made = tmp_path_factory.mktemp(name)
        if name in SHIPPED:
            shutil.copy(shipped / SHIPPED[name], made)
        else:
            _write_tekken(shipped / SHIPPED["v3-tekken"], made / "tekken.json", name.partition("-")[0], KEPT[name])
        return made

    return folder


@pytest.fixture(scope="session")
def mistral(mistral_folder: Callable[[str], Path]) -> Callable[[str], CheckpointTokenizer]:
    """The tokenizer of the version named, opened once."""

    @cache
    def tokenizer(name: str) -> CheckpointTokenizer:
        return open_tokenizer(MistralTokenizerSpec(), MistralChatSpec(), mistral_folder(name))

    return tokenizer


@pytest.fixture(scope="session")
def mistral_common(mistral: Callable[[str], CheckpointTokenizer]) -> Callable[[str], Any]:
    """mistral-common's own tokenizer of the version named."""
    return lambda name: mistral(name)._codec.library  # type: ignore[attr-defined]
