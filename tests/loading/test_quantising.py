"""Weights that are quantised while they are loaded: which, when, and what users are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.assemble import assemble
from zoo.components.decoder.model import Decoder
from zoo.components.kinds import INT4, INT8, KINDS, Kind, quantised
from zoo.components.matrix import values, weight_bytes
from zoo.components.quantised import Quantised
from zoo.loading import targets
from zoo.loading.files import locate
from zoo.loading.load import load_weights, random_weights
from zoo.loading.quantising import described, quantised_parts, storing_of
from zoo.registry.card import Card
from zoo.registry.errors import RequestError
from zoo.registry.resolve import Plan, resolve
from zoo.testing import relative_error

CPU = torch.device("cpu")
TOKENS = [3, 17, 5, 99, 23, 42, 7, 64, 11]
ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 24, "rope": {"theta": 1.0e4}}
GATED = {"kind": "gated", "hidden_dim": 72}
MOE = {"kind": "moe", "num_experts": 3, "experts_per_token": 2, "expert": GATED, "shared": GATED}
MAMBA = {"kind": "mamba1", "inner_dim": 136, "state_size": 6, "dt_rank": 64, "conv_size": 4}
LATENT = {
    "kind": "latent_attention",
    "num_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "nope_head_dim": 32,
    "rope_head_dim": 16,
    "v_head_dim": 32,
    "rope": {"theta": 1.0e4},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def plan_of(mixer: dict[str, Any] = ATTENTION, ffn: dict[str, Any] | None = GATED, **model: Any) -> Plan:
    sizes = {"dim": 120, "vocab_size": 110, "norm": {"kind": "rms", "eps": 1e-5}}
    layers = [{"repeat": 2, "mixer": mixer, "ffn": ffn}]
    return resolve(
        Card.from_dict({"name": "little", "context_length": 64, "model": {**sizes, "layers": layers, **model}})
    )


def drawn(plan: Plan, kind: Kind | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    module = assemble(plan, dtype)
    random_weights(module, plan, storing=storing_of(plan, kind, CPU) if kind else None)
    return module


@pytest.mark.parametrize(
    ("plan", "names"),
    [
        (plan_of(), {"mixer.qkv", "mixer.o", "ffn.gate_up", "ffn.down", "head"}),
        (plan_of(ffn=MOE), {"mixer.qkv", "mixer.o", "experts_in", "experts_down", "gate_up", "down", "head"}),
        (plan_of(MAMBA, None), {"mixer.in_proj", "mixer.out_proj", "head"}),
        (plan_of(LATENT), {"mixer.q_a", "mixer.q_b", "mixer.kv_a", "mixer.o", "ffn.gate_up", "ffn.down", "head"}),
        (plan_of(tied_embeddings=True), {"mixer.qkv", "mixer.o", "ffn.gate_up", "ffn.down"}),
    ],
    ids=["dense", "mixture", "mamba", "latent", "tied"],
)
@kinds
def test_which_matrices(plan: Plan, names: set[str], kind: Kind) -> None:
    found = quantised(plan.model, kind)
    assert {name for name in names if any(path.removesuffix(".weight").endswith(name) for path in found)} == names
    assert len(found) == sum(1 if name == "head" else 2 for name in names)
    assert all(given is (INT8 if path == "head.weight" else kind) for path, given in found.items())
    module = drawn(plan, kind)
    assert {path for path, _ in quantised_parts(module)} == set(found)


def test_encoders_keep_their_numbers() -> None:
    model = zoo.inspect("pixtral-12b-2409").plan.model
    found = quantised(model, INT4)
    assert any(name.startswith("vision.") for name in model.all_parameters())
    assert not any(name.startswith("vision.") for name in found)


@kinds
@pytest.mark.parametrize("ffn", [GATED, MOE], ids=["dense", "mixture"])
def test_loaded_matrices_are_those_of_the_plain_weights(tmp_path: Path, ffn: dict[str, Any], kind: Kind) -> None:
    plan = plan_of(ffn=ffn)
    plain = drawn(plan, dtype=torch.bfloat16)
    tensors = {tensor.name: plain.get_parameter(tensor.param)[tensor.index] for tensor in plan.model.tensors()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    module = assemble(plan, torch.bfloat16)
    load_weights(module, plan, locate(tmp_path, "zoo"), storing=storing_of(plan, kind, CPU))
    given, same = quantised(plan.model, kind), drawn(plan, kind, torch.bfloat16)
    for name, parameter in plain.named_parameters():
        for index in [()] if parameter.ndim < 3 else [(e,) for e in range(len(parameter))]:
            exact, found = parameter.detach()[index], values(module, name, index)
            expected = Quantised.of(given[name], exact).plain() if name in given else exact
            assert torch.equal(found, expected), name
            assert torch.equal(values(same, name, index), found), name
    assert weight_bytes(module) < weight_bytes(plain)


def test_experts_come_and_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stack is ever gathered, and no second matrix before the first is stored."""
    plan, most = plan_of(ffn=MOE), 0
    made = targets.Targets._make

    def counted(self: targets.Targets, unit: targets.Unit) -> torch.Tensor:
        nonlocal most
        value = made(self, unit)
        gathered = [other for other, state in self._states.items() if state.value is not None]
        most = max(most, len([other for other in gathered if self._making(other.param)]) + 1)
        assert value.ndim < 3
        return value

    monkeypatch.setattr(targets.Targets, "_make", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    drawn(plan, INT8)
    assert most == 1


@kinds
@pytest.mark.parametrize(("hidden", "gathered"), [(72, 2), (80, 0)])
def test_matrices_whose_rows_come_in_lanes_are_not_gathered(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, hidden: int, gathered: int
) -> None:
    """72 rows of gate and of up do not begin at a multiple of sixteen; 80 do."""
    found, made = [], targets.Targets._make

    def counted(self: targets.Targets, unit: targets.Unit) -> torch.Tensor:
        if self._making(unit.param):
            found.append(unit.param)
        return made(self, unit)

    monkeypatch.setattr(targets.Targets, "_make", counted)
    drawn(plan_of(ffn=GATED | {"hidden_dim": hidden}), kind)
    assert len(found) == gathered
    assert all(name.endswith("gate_up.weight") for name in found)


@kinds
@pytest.mark.parametrize("ffn", [GATED, MOE], ids=["dense", "mixture"])
def test_outputs_stay_near(ffn: dict[str, Any], kind: Kind) -> None:
    card = {"name": "little", "context_length": 64, "model": plan_of(ffn=ffn).card.model}
    common: dict[str, Any] = {"weights": "random", "device": "cpu", "dtype": "float32"}
    with zoo.load(card, **common) as plain, zoo.load(card, **common, quantize=kind.name) as model:
        error = relative_error(model.logits(TOKENS), plain.logits(TOKENS))
        assert 1e-4 < error < (0.02 if kind is INT8 else 0.2)
        assert model.memory.weights == zoo.inspect(card, dtype="float32", quantize=kind.name).weight_bytes
        assert model.memory.weights < plain.memory.weights
        alone = [model.generate([TOKENS[:n]], max_tokens=5)[0].tokens for n in (4, 7, 9)]
        together = [done.tokens for done in model.generate([TOKENS[:n] for n in (4, 7, 9)], max_tokens=5)]
        assert together == alone


def test_notes_tell_the_error() -> None:
    with zoo.load("tiny", quantize="int4", device="cpu") as model:
        notes = [note for note in model.notes if note.startswith("int4")]
        assert notes == [described(model.module)]
    assert notes[0].startswith("int4: 72 matrices in 1.2 MiB, error of the weights 8.")
    assert "; int8: 1 matrix in " in notes[0]
    assert "at most" in notes[0]


def test_notes_tell_of_missing_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module = drawn(plan_of(), INT8)
    for native in (True, False):
        monkeypatch.setattr("zoo.loading.quantising.is_native", lambda native=native: native)
        assert ("without native kernels" in described(module)) != native


def test_inspection_counts_stored_bytes() -> None:
    plain, eight, four = (zoo.inspect("mistral-7b-v0.3", quantize=kind).weight_bytes for kind in (None, "int8", "int4"))
    assert plain / eight == pytest.approx(1.962, abs=0.005)
    assert plain / four == pytest.approx(3.348, abs=0.005)
    assert zoo.inspect("mistral-7b-v0.3", quantize="int4").to_dict()["quantize"] == "int4"


@pytest.mark.parametrize("kind", ["int2", "fp8", "INT8", ""])
def test_unknown_kinds_are_refused(kind: str) -> None:
    for ask in (zoo.load, zoo.inspect):
        with pytest.raises(RequestError, match=rf"unknown kind of quantised weights.*'{kind}'.*int8, int4"):
            ask("tiny", quantize=kind)


def test_models_without_large_matrices_are_refused() -> None:
    card = {"name": "little", "context_length": 64, "model": plan_of(ATTENTION, {"kind": "gated", "hidden_dim": 8})}
    card["model"] = {
        "dim": 16,
        "vocab_size": 50,
        "norm": {"kind": "rms", "eps": 1e-5},
        "layers": [{"repeat": 1, "mixer": {**ATTENTION, "head_dim": 8}, "ffn": {"kind": "gated", "hidden_dim": 24}}],
    }
    with pytest.raises(RequestError, match=r"no matrix.*large enough.*found 1024 elements.*expected 8192"):
        zoo.load(card, weights="random", quantize="int8")


def test_other_devices_are_refused() -> None:
    with pytest.raises(RequestError, match=r"do not run on this device.*found mps; expected cpu or cuda"):
        storing_of(plan_of(), INT8, torch.device("mps"))
    storing_of(plan_of(), INT8, torch.device("cuda", 1))


def test_quantised_models_are_not_saved(tmp_path: Path) -> None:
    refused = pytest.raises(RequestError, match=r"quantised weights are not saved.*in int8.*without `quantize`")
    with zoo.load("tiny", quantize="int8", device="cpu") as model, refused:
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@kinds
def test_adapters_on_quantised_weights(tmp_path: Path, kind: Kind) -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = {"attention.wq": (96, 120), "attention.wo": (120, 96)}
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"layers.1.{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"layers.1.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.3
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora_alpha": "8"})
    card = {"name": "little", "context_length": 64, "model": plan_of().card.model}
    common: dict[str, Any] = {"weights": "random", "device": "cpu", "dtype": "float32"}
    common["adapters"] = [tmp_path / "lora.safetensors"]
    with zoo.load(card, **common) as plain, zoo.load(card, **common, quantize=kind.name) as model:
        limit = 0.02 if kind is INT8 else 0.2
        assert relative_error(model.logits(TOKENS), plain.logits(TOKENS)) < limit
        assert relative_error(model.logits(TOKENS, adapter=None), model.logits(TOKENS)) > 2 * limit
        [name] = model.adapters
        with pytest.raises(RequestError, match=rf"cannot be merged into quantised.*layers.1.mixer.* in {kind.name}"):
            model.merge_adapter(name)


def test_decoded_files_are_quantised(tmp_path: Path, native_names: Callable[..., Any]) -> None:
    """From FP8: the numbers that would have been loaded, in eight bits."""
    plan = plan_of()
    plain = drawn(plan, dtype=torch.bfloat16)
    tensors = {tensor.name: plain.get_parameter(tensor.param)[tensor.index] for tensor in plan.model.tensors()}
    for name in [name for name in tensors if "ffn" in name and name.endswith(("gate.weight", "up.weight"))]:
        tensors[name] = (tensors[name] * 1000).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.tensor(0.001)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    whole, module = assemble(plan, torch.bfloat16), assemble(plan, torch.bfloat16)
    load_weights(whole, plan, locate(tmp_path, "zoo"))
    load_weights(module, plan, locate(tmp_path, "zoo"), storing=storing_of(plan, INT8, CPU))
    decoded = whole.get_parameter("layers.1.ffn.gate_up.weight").detach()
    assert load_file(tmp_path / "model.safetensors")["layers.1.ffn.up.weight"].dtype is torch.float8_e4m3fn
    assert torch.equal(values(module, "layers.1.ffn.gate_up.weight"), Quantised.of(INT8, decoded).plain())
