"""Tensors into a module: values, permutations, types, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo.assemble import assemble
from zoo.components.decoder.model import Decoder
from zoo.components.quantised import ROUNDED, is_native
from zoo.loading import crew, load, reading
from zoo.loading.files import locate
from zoo.loading.layouts import read_layouts
from zoo.loading.load import load_weights, random_weights
from zoo.registry.catalog import Resource
from zoo.registry.errors import CapacityError, WeightsError
from zoo.registry.resolve import Plan
from zoo.registry.spec import Param, Part, Spec

Plans = Callable[..., Plan]
Names = Callable[[Plan], dict[str, tuple[int, ...]]]
Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]

BIASED = {"qkv_bias": True, "o_bias": True}
PARTIAL = {"rope": {"theta": 1.0e4, "rotary_dim": 16}}


def loaded(plan: Plan, path: Path, dtype: torch.dtype = torch.float32, layout: str = "auto") -> Decoder:
    module = assemble(plan, dtype)
    load_weights(module, plan, locate(path, layout))
    return module


def logical(plan: Plan, module: Decoder) -> Tensors:
    """The module's parameters taken apart into the model's tensors."""
    stored = dict(module.named_parameters())
    return {tensor.name: stored[tensor.param][tensor.index] for tensor in plan.model.tensors()}


def interleaved(tensor: torch.Tensor, head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Halves to pairs, head by head and row by row: what a native file holds for a tensor of the model."""
    found = tensor.clone()
    for head in range(0, len(tensor), head_dim):
        for i in range(rotary_dim // 2):
            found[head + 2 * i] = tensor[head + i]
            found[head + 2 * i + 1] = tensor[head + rotary_dim // 2 + i]
    return found


def native(plan: Plan, tensors: Tensors, names: Names, rotary_dim: int = 24) -> Tensors:
    """The model's tensors as a native file holds them."""
    found = {}
    for ours, theirs in zip(tensors, names(plan), strict=True):
        rotated = ".mixer.q." in ours or ".mixer.k." in ours
        found[theirs] = interleaved(tensors[ours], 24, rotary_dim) if rotated else tensors[ours].clone()
    return found


@pytest.mark.parametrize("ffn", ["dense", "moe"])
@pytest.mark.parametrize("mixer", [{}, BIASED, PARTIAL, {"rope": None}, {"num_kv_heads": 4}])
def test_native_files_are_permuted_and_fused(
    tmp_path: Path, plan_of: Plans, native_names: Names, ffn: str, mixer: dict[str, object]
) -> None:
    plan = plan_of(ffn, mixer)
    source = assemble(plan, torch.float32)
    random_weights(source, plan, seed=3)
    for name, parameter in source.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.arange(len(parameter)))
    expected = logical(plan, source)
    turned = 0 if mixer.get("rope", 1) is None else 16 if mixer is PARTIAL else 24
    save_file(native(plan, expected, native_names, turned), tmp_path / "consolidated.safetensors")
    found = logical(plan, loaded(plan, tmp_path))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_heads_larger_than_the_buffer(
    tmp_path: Path, plan_of: Plans, native_names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("moe", BIASED)
    source = assemble(plan, torch.float32)
    random_weights(source, plan, seed=3)
    expected = logical(plan, source)
    save_file(native(plan, expected, native_names), tmp_path / "consolidated.safetensors")
    for size in (1, 1000, 24 * 64 * 4 + 1):
        monkeypatch.setattr(load, "BUFFER", size)
        found = logical(plan, loaded(plan, tmp_path, torch.bfloat16))
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor.bfloat16()), (size, name)


@pytest.mark.parametrize("kind", ["per expert", "stacked in memory", "stacked in rows"])
def test_mixtures_of_every_spelling(tmp_path: Path, plan_of: Plans, native_names: Names, kind: str) -> None:
    plan = plan_of("moe")
    source = assemble(plan, torch.float32)
    random_weights(source, plan, seed=1)
    expected = logical(plan, source)
    if kind == "stacked in rows":
        tensors = {n: t for n, t in native(plan, expected, native_names).items() if "experts" not in n}
        for i in range(2):
            tensors[f"layers.{i}.block_sparse_moe.gate.weight"] = tensors.pop(f"layers.{i}.feed_forward.gate.weight")
            for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                experts = [expected[f"layers.{i}.ffn.experts.{e}.{ours}.weight"] for e in range(3)]
                blocks = [expert.T if ours == "down" else expert for expert in experts]
                tensors[f"layers.{i}.block_sparse_moe.{theirs}"] = torch.cat(blocks).contiguous()
        torch.save(tensors, tmp_path / "consolidated.00.pt")
    else:
        save_file(_hugging_face(plan, expected, kind == "stacked in memory"), tmp_path / "model.safetensors")
    found = logical(plan, loaded(plan, tmp_path))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _hugging_face(plan: Plan, tensors: Tensors, stacked: bool) -> Tensors:
    words = {
        "mixer_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn.router": "mlp.gate" if stacked else "block_sparse_moe.gate",
        "ffn.experts": "block_sparse_moe.experts",
        ".gate.weight": ".w1.weight",
        ".up.weight": ".w3.weight",
        ".down.weight": ".w2.weight",
    } | {f"mixer.{n}.": f"self_attn.{n}_proj." for n in "qkvo"}
    found = {"lm_head.weight": tensors["head.weight"], "model.embed_tokens.weight": tensors["embed.weight"]}
    for name, tensor in tensors.items():
        theirs = name
        for our, their in words.items():
            theirs = (
                theirs.replace(our, their) if not theirs.endswith(("_moe.gate.weight", "mlp.gate.weight")) else theirs
            )
        if name not in ("head.weight", "embed.weight"):
            found[f"model.{theirs}"] = tensor
    if stacked:
        found = {name: tensor for name, tensor in found.items() if "experts" not in name}
        for i in range(2):
            stored = f"layers.{i}.ffn.experts"
            both = [torch.cat([tensors[f"{stored}.{e}.{n}.weight"] for n in ("gate", "up")]) for e in range(3)]
            found[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.stack(both)
            down = [tensors[f"{stored}.{e}.down.weight"] for e in range(3)]
            found[f"model.layers.{i}.mlp.experts.down_proj"] = torch.stack(down)
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


class Turned(Spec):
    """A stack of pairs whose file holds each pair side by side and transposed."""

    module = "none:None"
    kind: str = "turned"

    def parameters(self) -> dict[str, Param]:
        parts = {f"pair.{e}.{n}": Part((e, (0, 2) if n == "a" else (2, 6))) for e in range(2) for n in "ab"}
        return {"pairs": Param((2, 6, 5), parts=parts), "scale": Param(())}


def test_pieces_that_stand_in_columns(tmp_path: Path, plan_of: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "tensors: {s: scale, p: {to: ['pair.{e}.a', 'pair.{e}.b'], transform: [stack, transpose, split]}}"
    (tmp_path / "turned.yaml").write_text(text)
    table = read_layouts({"turned": Resource("turned", tmp_path / "turned.yaml", "test")})
    pairs = torch.arange(60.0).reshape(2, 6, 5)
    tensors = {"p": pairs.transpose(1, 2).contiguous(), "s": torch.tensor(7.0)}
    save_file(tensors, tmp_path / "w.safetensors")
    for module in ("zoo.loading.files", "zoo.loading.load"):
        monkeypatch.setattr(f"{module}.layout_named", lambda name: table[name])
    monkeypatch.setattr("zoo.loading.files.layouts", lambda: table)
    for size in (1, 1000):
        monkeypatch.setattr(load, "BUFFER", size)
        module_ = torch.nn.Module()
        with torch.device("meta"):
            module_.pairs, module_.scale = (torch.nn.Parameter(torch.empty(s)) for s in ((2, 6, 5), ()))
        load_weights(module_, Plan(plan_of().card, Turned()), locate(tmp_path, "turned"))
        assert torch.equal(module_.pairs, pairs)
        assert module_.scale.item() == 7


def test_fused_projections_are_split(tmp_path: Path, plan_of: Plans) -> None:
    plan = plan_of()
    source = assemble(plan, torch.float32)
    random_weights(source, plan, seed=2)
    expected = logical(plan, source)
    tensors = {}
    for name, tensor in expected.items():
        name = name.replace("mixer_norm", "input_layernorm").replace("ffn_norm", "post_attention_layernorm")
        name = name.replace("ffn.down", "mlp.down_proj").replace("mixer.o", "self_attn.o_proj")
        if not any(part in name for part in (".mixer.", ".ffn.")):
            name = {"head.weight": "lm_head.weight", "embed.weight": "model.embed_tokens.weight"}.get(
                name, f"model.{name}"
            )
            tensors[name] = tensor.clone()
    for i in range(2):
        layer = f"layers.{i}."
        tensors[f"model.{layer}self_attn.qkv_proj.weight"] = torch.cat(
            [expected[f"{layer}mixer.{n}.weight"] for n in "qkv"]
        )
        tensors[f"model.{layer}mlp.gate_up_proj.weight"] = torch.cat(
            [expected[f"{layer}ffn.{n}.weight"] for n in ("gate", "up")]
        )
    save_file(tensors, tmp_path / "model.safetensors")
    found = logical(plan, loaded(plan, tmp_path))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16])
def test_types_are_converted_as_torch_does(
    tmp_path: Path, plan_of: Plans, native_names: Names, save: Write, there: torch.dtype, here: torch.dtype
) -> None:
    plan = plan_of()
    file = save(tmp_path / "w.safetensors", native_names(plan), there)
    tensors, found = load_file(file), logical(plan, loaded(plan, tmp_path, here))
    for name in ("tok_embeddings.weight", "layers.1.attention.wv.weight", "norm.weight"):
        ours = {"tok_embeddings.weight": "embed.weight", "norm.weight": "norm.weight"}.get(name)
        assert torch.equal(found[ours or "layers.1.mixer.v.weight"], tensors[name].to(here))


def test_values_that_float16_cannot_hold(tmp_path: Path, plan_of: Plans, native_names: Names, save: Write) -> None:
    plan = plan_of()
    tensors = load_file(save(tmp_path / "w.safetensors", native_names(plan), torch.bfloat16))
    tensors["norm.weight"][3] = 1e6
    save_file(tensors, tmp_path / "w.safetensors")
    loaded(plan, tmp_path, torch.bfloat16)
    with pytest.raises(
        WeightsError, match=r"'norm\.weight' does not fit float16; found values up to (1e\+06|9\.99e\+05)"
    ):
        loaded(plan, tmp_path, torch.float16)


def test_loading_says_how_far_it_is_and_follows_the_files(
    tmp_path: Path, plan_of: Plans, native_names: Names, save: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of()
    tensors = load_file(save(tmp_path / "w.safetensors", native_names(plan)))
    # The library writes narrower types last, so that the order of the data is not that of the names.
    save_file({name: t.half() if "layers" in name else t for name, t in tensors.items()}, tmp_path / "w.safetensors")
    files, seen, places = locate(tmp_path), [], []
    read = reading.Reader.into

    def spy(self: reading.Reader, place: torch.Tensor, info: object, offset: int) -> None:
        places.append(offset)
        read(self, place, info, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(reading.Reader, "into", spy)
    monkeypatch.setattr(crew, "WORKERS", 1)
    load_weights(assemble(plan, torch.float32), plan, files, progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [files.nbytes] * len(files.headers)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == files.nbytes
    assert places == sorted(places)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked")
def test_the_system_is_asked_for_exactly_what_is_read(
    tmp_path: Path, plan_of: Plans, native_names: Names, save: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, asked = plan_of(), bytearray((1 << 20) * b"0")
    file = save(tmp_path / "w.safetensors", native_names(plan))

    def record(descriptor: int, start: int, count: int, advice: int) -> None:
        asked[start : start + count] = count * b"1"

    monkeypatch.setattr(os, "posix_fadvise", record)
    loaded(plan, tmp_path, torch.bfloat16)
    length, size = int.from_bytes(file.read_bytes()[:8], "little"), file.stat().st_size
    assert asked == (8 + length) * b"0" + (size - 8 - length) * b"1" + ((1 << 20) - size) * b"0"


def test_nothing_is_loaded_from_files_that_do_not_fit(
    tmp_path: Path, plan_of: Plans, native_names: Names, save: Write
) -> None:
    save(tmp_path / "w.safetensors", native_names(plan_of()))
    module = assemble(plan_of("moe"), torch.float32)
    with pytest.raises(WeightsError, match=f"{tmp_path}/w.safetensors: the files and the card differ in 26 tensors"):
        load_weights(module, plan_of("moe"), locate(tmp_path))
    assert all(parameter.is_meta for parameter in module.parameters())


def test_a_file_that_shrinks_after_its_header_was_read(
    tmp_path: Path, plan_of: Plans, native_names: Names, save: Write
) -> None:
    plan = plan_of()
    file = save(tmp_path / "w.safetensors", native_names(plan))
    files = locate(tmp_path)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(WeightsError, match=r"cannot read tensor .*; found it ends 7 bytes too early"):
        load_weights(assemble(plan, torch.float32), plan, files)
    file.unlink()
    with pytest.raises(WeightsError, match="cannot read the weights; found No such file"):
        load_weights(assemble(plan, torch.float32), plan, files)


def test_memory_that_does_not_suffice(
    tmp_path: Path, plan_of: Plans, native_names: Names, save: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of()
    save(tmp_path / "w.safetensors", native_names(plan))
    module, empty = assemble(plan, torch.float32), torch.empty

    def full(*shape: object, **options: object) -> torch.Tensor:
        if shape[0] == (509, 64):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore")
        return empty(*shape, **options)  # type: ignore[no-any-return, call-overload]

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(CapacityError) as caught:
        load_weights(module, plan, locate(tmp_path))
    assert "weight: memory is full while loading the weights; found [enforce fail]" in str(caught.value)
    assert f"expected {509 * 64 * 4} bytes more on cpu" in str(caught.value)


def test_random_weights_depend_on_seed_and_name_alone(plan_of: Plans) -> None:
    plan, deeper = plan_of("moe"), plan_of("moe", {"num_kv_heads": 2})
    first, second, other = (assemble(p, torch.float32) for p in (plan, plan, deeper))
    random_weights(first, plan, seed=5)
    random_weights(second, plan, seed=6)
    random_weights(other, deeper, seed=5)
    a, b, c = logical(plan, first), logical(plan, second), logical(deeper, other)
    same = [name for name in a if a[name].shape == c[name].shape]
    assert len(same) < len(a)
    assert all(torch.equal(a[name], c[name]) for name in same)
    drawn = [name for name in a if not name.endswith("norm.weight")]
    assert not any(torch.equal(a[name], b[name]) for name in drawn)
    assert len({a[name].flatten()[0].item() for name in drawn}) == len(drawn)
    rounded = assemble(plan, torch.bfloat16)
    random_weights(rounded, plan, seed=5)
    assert all(torch.equal(t, a[name].bfloat16()) for name, t in logical(plan, rounded).items())


@pytest.mark.parametrize("drawn", [7, 83, 118, 400])
def test_rows_without_a_place_are_put_in_whole_lanes_as_they_come(drawn: int) -> None:
    numbers, put = torch.arange(37 * 5.0), []
    targets: Any = SimpleNamespace(
        lanes=lambda _: 16,
        like=lambda _: torch.empty(37, 5, dtype=torch.float64),
        put=lambda _, first, rows: put.append((first, rows.clone())),
    )
    tensor: Any = SimpleNamespace(shape=(37, 5))
    load._pour_rows(targets, tensor, numbers.split(drawn))
    assert torch.equal(torch.cat([rows for _, rows in put]), numbers.double().view(37, 5))
    ends = [first + len(rows) for first, rows in put]
    assert [first for first, _ in put] == [0, *ends[:-1]]
    assert [end % 16 for end in ends[:-1]] == [0] * (len(ends) - 1)


def test_random_weights_have_a_size_that_keeps_logits_finite(plan_of: Plans) -> None:
    plan = plan_of("dense", BIASED)
    module = assemble(plan, torch.float32)
    random_weights(module, plan)
    found = logical(plan, module)
    assert found["embed.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(found["embed.weight"].mean().item()) < 1e-3
    assert torch.equal(found["norm.weight"], torch.ones(64))
    assert torch.equal(found["layers.0.mixer.q.bias"], torch.zeros(96))


MEASURE = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from zoo.assemble import assemble
from zoo.loading.files import locate
from zoo.components.kinds import KINDS
from zoo.components.matrix import weight_bytes
from zoo.loading.load import load_weights
from zoo.loading.quantising import storing_of
from zoo.registry.card import Card
from zoo.registry.resolve import resolve

def resident(name):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024

def load(folder, dtype):
    plan = resolve(Card.from_dict(json.loads((folder / "card.json").read_text())))
    module = assemble(plan, dtype)
    stored = sys.argv[3] != "plain"
    storing = storing_of(plan, KINDS.get(sys.argv[3]), torch.device("cpu")) if stored else None
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, getattr(os, sys.argv[4]))
    load_weights(module, plan, locate(folder), storing=storing)
    return module

large, small = map(Path, sys.argv[1:3])
for dtype in (torch.bfloat16, torch.float32, torch.float16):
    if os.fork() == 0:  # a process of its own, so that neither load sees memory that the other left behind
        load(small, dtype)  # touches the pages of torch's own code, which a build with CUDA has many of
        before = resident("VmRSS")
        module = load(large, dtype)
        after, peak = resident("VmRSS") - before, resident("VmHWM") - before
        os.write(1, f"{after} {peak} {weight_bytes(module)}\\n".encode())
        os._exit(0)
    assert os.wait()[1] == 0
"""


def native_checkpoint(folder: Path, dim: int, hidden: int, vocab: int, *, coded: bool = False) -> Path:
    """In bfloat16, or the projections in FP8 by blocks.

    Of the embedding's and the head's size 2 vocab dim, and five layers of about 2.5 dim dim + 3 hidden dim."""
    layers = 5
    mixer = {"kind": "attention", "num_heads": 16, "num_kv_heads": 4, "head_dim": dim // 16, "rope": {"theta": 1e4}}
    run = {"repeat": layers, "mixer": mixer, "ffn": {"kind": "gated", "hidden_dim": hidden}}
    model = {"dim": dim, "vocab_size": vocab, "norm": {"kind": "rms", "eps": 1e-5}, "layers": [run]}
    (folder / "card.json").write_text(json.dumps({"name": "native", "context_length": 64, "model": model}))
    shapes = {"tok_embeddings.weight": (vocab, dim), "output.weight": (vocab, dim), "norm.weight": (dim,)}
    for i in range(layers):
        layer = f"layers.{i}."
        shapes |= {f"{layer}attention_norm.weight": (dim,), f"{layer}ffn_norm.weight": (dim,)}
        shapes |= {f"{layer}attention.w{n}.weight": (dim if n in "qo" else dim // 4, dim) for n in "qkvo"}
        shapes |= {f"{layer}feed_forward.w{n}.weight": (hidden, dim) for n in (1, 3)}
        shapes[f"{layer}feed_forward.w2.weight"] = (dim, hidden)
    tensors = {name: torch.full(shape, 0.01).bfloat16() for name, shape in shapes.items()}
    for name in [name for name in tensors if coded and ".w" in name.removesuffix(".weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.ones([-(-size // 128) for size in tensors[name].shape])
    save_file(tensors, folder / "w.safetensors")
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint of 200 MB in bfloat16, no tensor above an eighth of it."""
    return native_checkpoint(tmp_path_factory.mktemp("large"), 1024, 4096, 8192)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_checkpoint(tmp_path_factory.mktemp("small"), 64, 64, 64)


def coded_checkpoints(folder: Path) -> tuple[Path, Path]:
    """As `large` and `small`, in FP8."""
    folders = [folder / "large", folder / "small"]
    for made in folders:
        made.mkdir()
    return native_checkpoint(folders[0], 1024, 4096, 8192, coded=True), native_checkpoint(
        folders[1], 64, 64, 64, coded=True
    )


def peaks(large: Path, small: Path, kind: str, cold: bool = False) -> Iterator[tuple[int, int]]:
    """What loading in bfloat16, float32 and float16 took at most, and the weights' bytes: nothing else is left.

    cold: the system has nothing of the files, where they are on a disk."""
    advice = "POSIX_FADV_DONTNEED" if cold else "POSIX_FADV_NORMAL"
    command = [sys.executable, "-c", MEASURE, str(large), str(small), kind, advice]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    for line in answer.stdout.splitlines():
        after, peak, weights = map(int, line.split())
        assert 0.8 * weights < after < weights + SLACK  # what the small model left behind is used again
        yield peak, weights


SLACK = 16 << 20
"""Bytes for what threads and the allocator take beside buffers: some twelve millions are seen."""

LARGE_PAGE = 2 << 20
"""Bytes: a part of a file that is mapped reaches into a large page at either end, which counts whole."""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="measured with Linux's peak of resident memory")


@on_linux
@pytest.mark.parametrize(("coded", "cold"), [(False, False), (False, True), (True, False)])
def test_peak_memory_is_the_weights(large: Path, small: Path, coded: bool, cold: bool, tmp_path: Path) -> None:
    """Read in place from bfloat16 to bfloat16, and converted to others; decoded from FP8 to all."""
    if coded:
        large, small = coded_checkpoints(tmp_path)
    (kept, kept_weights), *converted = peaks(large, small, "plain", cold)
    assert [weights / kept_weights for _, weights in converted] == [2, 1]
    assert kept_weights > 180_000_000
    room = 2 * crew.WORKERS * load.BUFFER + SLACK  # of the mapped file, a buffer's size and a large page at its border
    assert 0.95 * kept_weights < kept < kept_weights + room
    for peak, weights in converted:
        assert 0.95 * weights < peak < weights + room


@on_linux
@pytest.mark.parametrize(
    ("kind", "coded", "cold"),
    [
        ("none", False, False),
        ("none", False, True),
        ("int8", False, False),
        ("int8", False, True),
        ("int4", False, False),
        ("int4", True, False),
    ],
)
def test_peak_memory_of_stored_weights(
    large: Path, small: Path, kind: str, coded: bool, cold: bool, tmp_path: Path
) -> None:
    """The weights as they are stored, and of each thread what it has mapped of the file and a buffer for what that
    becomes.

    PyTorch, which rounds numbers where there are no kernels, makes others on its way."""
    on_the_way = 64 * ROUNDED if kind != "none" and not is_native() else 0
    if coded:
        large, small = coded_checkpoints(tmp_path)
    for (peak, weights), size in zip(peaks(large, small, kind, cold), (2, 4, 2), strict=True):
        embedding = size * 8192 * 1024
        assert weights < {"none": size / 2 + 0.05, "int8": 0.56, "int4": 0.36}[kind] * 2 * 91_000_000 + embedding
        assert peak < weights + crew.WORKERS * (2 * load.BUFFER + LARGE_PAGE + on_the_way) + SLACK
