"""Adapters over ranks: each reads its part of the factors, and together they add what one process adds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import zoo
from tests.devices.likes import ATTENTION, EVERYTHING, LATENT, MAMBA1, MAMBA2, MIXTURE, filled, make_card, make_plan
from zoo.assemble import assemble
from zoo.components.adapter import adaptable
from zoo.components.decoder.model import Decoder
from zoo.devices.mesh import Mesh
from zoo.engine.adapters import Adapters
from zoo.engine.request import SamplingParams
from zoo.loading.fill import adapter_of
from zoo.model import Model
from zoo.registry.card import Card
from zoo.registry.errors import RequestError
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve
from zoo.testing import TOLERANCE, Rank, prefill, ranks_of, relative_error

TOKENS = [5, 66, 0, 31, 32, 33, 34, 16, 17, 50, 1]
RANK = 3


def write_adapter(folder: Path, plan: Plan, seed: int = 0, replaced: tuple[str, ...] = (), size: float = 0.3) -> Path:
    """A PEFT folder that changes every product within a block, and replaces some tensors."""
    folder.mkdir()
    whole, generator = assemble(plan, torch.float32), torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for tensor in plan.model.tensors():
        path, _, leaf = tensor.param.rpartition(".")
        name = f"base_model.model.{tensor.name.removesuffix('.weight')}"
        if tensor.name in replaced:
            tensors[f"base_model.model.{tensor.name}"] = torch.randn(tensor.shape, generator=generator)
        elif leaf == "weight" and adaptable(whole, path):
            outputs, inputs = tensor.shape
            tensors[f"{name}.lora_A.weight"] = size * torch.randn(RANK, inputs, generator=generator)
            tensors[f"{name}.lora_B.weight"] = size * torch.randn(outputs, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def adapted(plan: Plan, module: Decoder, path: Path, rank: Rank | None, merge: bool) -> Tensor:
    """Logits with the adapter: of one process, or of one rank."""
    own = module if rank is None else rank.module
    adapters = Adapters(own)
    adapters.add("a", adapter_of(path, plan=plan, module=own, part=None if rank is None else rank.part))
    if merge:
        adapters.merge("a")
    with adapters.applied([None if merge else "a"], [len(TOKENS)], torch.device("cpu")):
        return prefill(own, TOKENS)


@pytest.mark.parametrize("merge", [False, True], ids=["chosen", "merged"])
@pytest.mark.parametrize("mesh", [Mesh(2), Mesh(2, 2), Mesh(4)], ids=str)
@pytest.mark.parametrize(
    "layer",
    [
        {"mixer": {**ATTENTION, "qkv_bias": True, "o_bias": True}, "ffn": {**MIXTURE, "shared": MIXTURE["expert"]}},
        {"mixer": MAMBA1, "ffn": MIXTURE["expert"]},
        {"mixer": {**MAMBA2, "num_groups": 1}, "ffn": MIXTURE["expert"]},
        {"mixer": LATENT, "ffn": {"kind": "mlp", "hidden_dim": 12, "activation": "relu2"}},
    ],
    ids=["attention", "mamba 1", "mamba 2", "latent"],
)
def test_ranks_add_what_one_adds(tmp_path: Path, layer: dict[str, Any], mesh: Mesh, merge: bool) -> None:
    plan = make_plan(layers=[{"repeat": 2, **layer}])
    module = filled(plan)
    replaced = ("layers.0.mixer_norm.weight", "layers.1.mixer.o.bias", "embed.weight") if merge else ()
    path = write_adapter(tmp_path / "a", plan, replaced=replaced)
    ranks, before = ranks_of(plan, module, mesh), prefill(module, TOKENS)
    expected = adapted(plan, module, path, None, merge)
    with ThreadPoolExecutor(mesh.size) as pool:
        found, *_ = pool.map(lambda rank: adapted(plan, module, path, rank, merge), ranks)
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(before, expected) > 0.01


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return make_card("everything", EVERYTHING, embedding_scale=40.0)


@pytest.fixture(scope="module")
def paths(card: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    plan, folder = resolve(Card.from_dict(card)), tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / name, plan, seed=seed) for seed, name in enumerate(["one", "two"])] + [
        write_adapter(folder / "whole", plan, seed=3, replaced=("layers.3.mixer_norm.weight",))
    ]


@pytest.fixture(scope="module", params=["tp=2", "pp=2"])
def models(request: pytest.FixtureRequest, card: dict[str, Any], paths: list[Path]) -> Iterator[list[Model]]:
    options: dict[str, Any] = {"weights": "random", "dtype": "float32", "device": "cpu", "adapters": paths[:1]}
    with zoo.load(card, **options) as alone, zoo.load(card, devices=request.param, **options) as spread:
        yield [alone, spread]


def answers(model: Model, *choices: str | None) -> list[list[int]]:
    """What one batch gives whose requests choose these adapters."""
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    params = [SamplingParams(adapter=choice, **options) for choice in choices]
    asked = [model.request([place, *TOKENS], one) for place, one in enumerate(params)]
    return [completion.tokens for completion in model.engine.generate(asked)]


def test_adapters_come_go_and_are_chosen(models: list[Model], paths: list[Path]) -> None:
    alone, spread = models
    assert [model.load_adapter(paths[1]) for model in models] == ["two", "two"]
    asked = ("auto", None, "two", "one", None, "two")
    assert answers(spread, *asked) == answers(alone, *asked)
    assert answers(alone, None, None) != answers(alone, "one", "two")
    for choice in ("one", "two", None):
        assert relative_error(spread.logits(TOKENS, adapter=choice), alone.logits(TOKENS, adapter=choice)) < TOLERANCE
    for model in models:
        model.unload_adapter("two")
    with pytest.raises(RequestError, match="no adapter of this name is loaded; found 'two'"):
        answers(spread, "two")
    assert answers(spread, "auto", None) == answers(alone, "auto", None)


def test_whole_tensors_are_merged_first_on_every_rank(models: list[Model], paths: list[Path]) -> None:
    alone, spread = models
    for model in models:
        model.load_adapter(paths[2])
    with pytest.raises(RequestError, match="replaces whole tensors"):
        answers(spread, "whole")
    for model in models:
        model.merge_adapter("whole")
    assert answers(spread, None, "one") == answers(alone, None, "one")
    assert relative_error(spread.logits(TOKENS, adapter=None), alone.logits(TOKENS, adapter=None)) < TOLERANCE


def test_what_is_no_adapter_leaves_the_run_alone(models: list[Model], tmp_path: Path) -> None:
    spread = models[1]
    with pytest.raises(zoo.ZooError, match="there is no adapter in this folder"):
        spread.load_adapter(tmp_path)
    assert len(answers(spread, None)) == 1
