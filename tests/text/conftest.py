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
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from zoo.text.spec import MistralChatSpec, MistralTokenizerSpec
from zoo.text.tokenizer import Tokenizer, open_tokenizer

SHIPPED = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "v3-tekken": "tekken_240718.json",
    "v3-images": "tekken_240911.json",
    "v7-images": "mistral_instruct_tokenizer_241114.model.v7m1",
}
KEPT = {"v7-tekken": 30000, "v7-audio": 30000, "v11": 30000, "v13": 30000, "v13-images": 30000, "v15": 131072}
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
    24: "[AUDIO]",
    25: "[BEGIN_AUDIO]",
    27: "[TRANSCRIBE]",
    32: "[ARGS]",
    33: "[CALL_ID]",
    34: "[THINK]",
    35: "[/THINK]",
    36: "[MODEL_SETTINGS]",
    37: "[/MODEL_SETTINGS]",
}
AUDIO = {
    "sampling_rate": 16000,
    "frame_rate": 12.5,
    "audio_encoding_config": {"num_mel_bins": 128, "hop_length": 160, "window_size": 400},
    "chunk_length_s": 30.0,
}
EFFORT = {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}


def _write_tekken(source: Path, target: Path, name: str, size: int) -> None:
    version, _, variant = name.partition("-")
    data = json.loads(source.read_bytes())
    data["config"] |= {"version": version, "default_vocab_size": size, "num_vocab_tokens": size - 1000}
    data["vocab"] = data["vocab"][: size - 1000]
    data["special_tokens"] = [
        {"rank": i, "token_str": NAMES.get(i, f"<SPECIAL_{i}>"), "is_control": True} for i in range(1000)
    ]
    if variant == "audio":
        data["audio"] = AUDIO
    if variant == "images":
        data["image"] = {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2}
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
            _write_tekken(shipped / SHIPPED["v3-tekken"], made / "tekken.json", name, KEPT[name])
        return made

    return folder


@pytest.fixture(scope="session")
def mistral(mistral_folder: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    """The tokenizer of the version named, opened once."""

    @cache
    def tokenizer(name: str) -> Tokenizer:
        return open_tokenizer(MistralTokenizerSpec(), MistralChatSpec(), mistral_folder(name))

    return tokenizer


@pytest.fixture(scope="session")
def mistral_common(mistral: Callable[[str], Tokenizer]) -> Callable[[str], Any]:
    """mistral-common's own tokenizer of the version named."""
    return lambda name: mistral(name)._codec.library  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------- Hugging Face tokenizers

CORPUS = ["Hello world, how are you today?", "The quick brown fox says hello.", "Grüße aus Zürich, naïve café"] * 3
TEMPLATE_TOKENS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]


def _byte_level() -> Library:
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=TEMPLATE_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool_call>"])
    return tokenizer


def _byte_fallback() -> Library:
    """As SentencePiece models are converted: a space sign before every text, bytes for characters not learnt."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learnt = Library(models.BPE(unk_token="<unk>"))
    learnt.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False)
    learnt.train_from_iterator(CORPUS, trainer)
    model = json.loads(learnt.to_str())["model"]
    pieces = [*TEMPLATE_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in model["vocab"] if piece not in TEMPLATE_TOKENS]
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Library(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(TEMPLATE_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _metaspace() -> Library:
    tokenizer = Library(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=TEMPLATE_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


HUGGING_FACE = {"byte level": _byte_level, "byte fallback": _byte_fallback, "metaspace": _metaspace}


@pytest.fixture(scope="session")
def hugging_face_json() -> Callable[[str], str]:
    """The text of a `tokenizer.json` of the kind named."""
    return cache(lambda kind: HUGGING_FACE[kind]().to_str())


@pytest.fixture
def hugging_face(hugging_face_json: Callable[[str], str], tmp_path: Path) -> Callable[..., Path]:
    """Makes the test's folder one with a `tokenizer.json` and a `tokenizer_config.json` with the fields given."""

    def make(kind: str = "byte level", **config: Any) -> Path:
        (tmp_path / "tokenizer.json").write_text(hugging_face_json(kind))
        fields = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
        fields = {key: value for key, value in fields.items() if value is not None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
        return tmp_path

    return make
