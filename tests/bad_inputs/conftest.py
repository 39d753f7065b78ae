"""The desk of a user: a whole tiny checkpoint to spoil, the Python interface and the command line to spoil it before.

A case is an entry of a table FAULTS (refused with these words) or WORKS (strange, and right) of a section's test file.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import zoo
from zoo.model import Model
from zoo.registry.errors import ZooError
from zoo.registry.resolve import Plan

TESTS = Path(__file__).parent.parent


def _helpers(path: str) -> ModuleType:
    """The helpers of another area of the tests; its fixtures become this folder's too."""
    name = f"helpers_{path.replace('/', '_')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / f"{path}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


loading, text, hub_server = _helpers("loading/conftest"), _helpers("text/conftest"), _helpers("loading/hub_server")
zoo_command = _helpers("cli/conftest").zoo_command
plan_of, native_names, save, raw = loading.plan_of, loading.native_names, loading.save, loading.raw
shipped, hugging_face_json, hub = text.shipped, text.hugging_face_json, hub_server.hub

WEIGHTS, CONTEXT, WINDOW = "consolidated.safetensors", 512, 8
PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 1,
    "head_dim": 24,
    "hidden_dim": 40,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_seq_len": CONTEXT,
}
TOKENIZERS = {"v1": 32000, "v3": 32768, "v7-tekken": 1400}
"""Mistral tokenizers by version, and the vocabulary of a model that fits."""


@dataclass
class Desk:
    """One test's checkpoint `folder`, its `command` line, and a `patch` for what else it changes."""

    folder: Path
    command: Callable[..., Any]
    patch: pytest.MonkeyPatch
    checkpoint: Callable[[str], Path]
    tokenizer_json: Callable[[str], str]

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    def put(self, name: str, content: bytes | str | dict[str, Any]) -> Path:
        """Write a file of the folder; an object as JSON."""
        data = json.dumps(content) if isinstance(content, dict) else content
        (self.folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return self.folder / name

    def params(self, **changes: Any) -> None:
        """Change the folder's params.json; a value of ... takes the key out."""
        values = json.loads((self.folder / "params.json").read_text()) | changes
        self.put("params.json", {key: value for key, value in values.items() if value is not ...})

    def become(self, version: str) -> None:
        """Make the folder another checkpoint: that of a tokenizer's version."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.checkpoint(version), self.folder)

    def load(self, ref: Any = None, **options: Any) -> Model:
        """The model on the CPU in float32, unless the options say otherwise."""
        chosen = {"device": "cpu", "dtype": "float32", **options}
        return zoo.load(self.folder if ref is None else ref, **chosen)

    def refused(
        self, error: type[ZooError], words: Iterable[str], call: Callable[[], Any], *command: str, stdin: str = ""
    ) -> None:
        """The call raises `error` with these words, and the command says the same without a traceback."""
        with pytest.raises(error) as caught:
            call()
        message = str(caught.value)
        assert type(caught.value) is error
        assert [word for word in words if word not in message] == [], message
        assert "Traceback" not in message
        if command:
            found = self.command(*command, stdin=stdin)
            assert (found.code, found.out) == (2, ""), found
            assert f"zoo: {message}" in found.err

    def refuses(self, error: type[ZooError], words: Iterable[str], ref: Any = None, **options: Any) -> None:
        """Loading is refused, by `zoo.load` and by `zoo run`."""
        given = {"device": "cpu", "dtype": "float32", **options}
        flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        target = self.folder if ref is None else ref
        self.refused(
            error,
            words,
            lambda: zoo.load(target, **given),
            "run",
            str(target),
            "--prompt",
            "x",
            "--max-tokens",
            "1",
            *flags,
        )


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    plan_of: Callable[..., Plan],
    native_names: Callable[[Plan], dict[str, tuple[int, ...]]],
    save: Callable[..., Path],
    shipped: Path,
) -> Callable[[str], Path]:
    """checkpoint(version) -> a folder of Mistral's own kind, with the tokenizer named; without one for ""."""

    @cache
    def make(version: str) -> Path:
        folder = tmp_path_factory.mktemp(f"checkpoint-{version}")
        vocab = TOKENIZERS.get(version, 509)
        save(folder / WEIGHTS, native_names(plan_of(vocab_size=vocab)))
        (folder / "params.json").write_text(json.dumps({**PARAMS, "vocab_size": vocab}))
        if version.endswith("tekken"):
            source = shipped / text.SHIPPED["v3-tekken"]
            text._write_tekken(source, folder / "tekken.json", version.partition("-")[0], vocab)
        elif version:
            shutil.copy(shipped / text.SHIPPED[version], folder / f"tokenizer.model.{version}")
        return folder

    return make


@pytest.fixture(scope="session")
def tekken(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """tekken(version, vocabulary) -> a folder with that tokenizer and nothing else."""

    def make(version: str, vocab: int) -> Path:
        folder = tmp_path_factory.mktemp(version)
        text._write_tekken(shipped / text.SHIPPED["v3-tekken"], folder / "tekken.json", version, vocab)
        return folder

    return make


@pytest.fixture
def desk(
    checkpoint: Callable[[str], Path],
    zoo_command: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hugging_face_json: Callable[[str], str],
) -> Desk:
    """A desk with a checkpoint that has no tokenizer."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(checkpoint(""), tmp_path / "model"))
    return Desk(folder, zoo_command, monkeypatch, checkpoint, hugging_face_json)


@pytest.fixture(scope="session")
def opened(checkpoint: Callable[[str], Path]) -> Iterator[Callable[[str], Model]]:
    """opened(version) -> the model of `checkpoint(version)`, loaded once, in float32 on the CPU."""
    models: dict[str, Model] = {}

    def load(version: str) -> Model:
        if version not in models:
            models[version] = zoo.load(checkpoint(version), device="cpu", dtype="float32")
        return models[version]

    yield load
    for model in models.values():
        model.close()


@pytest.fixture(scope="session")
def parrot(
    checkpoint: Callable[[str], Path], opened: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """parrot(text) -> a checkpoint that says the text after [1], then ends; no token of the text may come twice.

    Every layer adds nothing, each token of the text has an embedding of its own and its follower the row of the head
    that matches it.
    """

    @cache
    def make(said: str) -> Path:
        folder = tmp_path_factory.mktemp("parrot") / "model"
        shutil.copytree(checkpoint("v7-tekken"), folder)
        tokenizer = opened("v7-tekken").tokenizer
        assert tokenizer is not None
        chain = [1, *tokenizer.encode(said, bos=False), 2]
        assert len({*chain}) == len(chain) <= PARAMS["dim"], "a token comes twice, or there are too many"
        tensors = load_file(folder / WEIGHTS)
        for name, tensor in tensors.items():
            tensor.fill_(1.0 if "norm" in name else 0.0)
        for place, (token, follower) in enumerate(pairwise(chain)):
            tensors["tok_embeddings.weight"][token, place] = 1.0
            tensors["output.weight"][follower, place] = 10.0
        save_file(tensors, folder / WEIGHTS)
        return folder

    return make
