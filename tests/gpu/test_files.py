"""Files and a CUDA device: quantised weights decoded there, and a model saved from there, as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.components.matrix import values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIXER = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rope": {"theta": 1e4}}
LAYER = {"repeat": 2, "mixer": MIXER, "ffn": {"kind": "gated", "hidden_dim": 96}}
SIZES = {"dim": 160, "vocab_size": 101, "norm": {"kind": "rms", "eps": 1e-5}}
CARD: dict[str, Any] = {"name": "little", "context_length": 64, "model": SIZES | {"layers": [LAYER]}}


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    """Projections in FP8 by blocks of 128 x 128, those of the second layer in NVFP4, in Mistral's names."""
    with zoo.load(CARD, weights="random", device="cpu", dtype="float32") as model:
        model.save(tmp_path / "coded", layout="mistral")
    file = tmp_path / "coded" / "consolidated.safetensors"
    tensors = load_file(file)
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if ".w" in name.removesuffix(".weight")]:
        rows, columns = tensors.pop(name).shape
        if name.startswith("layers.0."):
            grid = (-(-rows // 128), -(-columns // 128))
            tensors[name] = torch.randn(rows, columns, generator=draw).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = torch.rand(grid, generator=draw) * 0.02
        else:
            bytes_RC = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=draw)
            scales = torch.rand(rows, columns // 16, generator=draw).to(torch.float8_e4m3fn)
            tensors |= {f"{name}_packed": bytes_RC, f"{name}_scale": scales}
            tensors[f"{name}_global_scale"] = torch.tensor([80.0])
    save_file(tensors, file)
    return tmp_path / "coded"


def test_decoding_and_saving_on_the_device(coded: Path, tmp_path: Path) -> None:
    with (
        zoo.load(coded, device="cpu", dtype="bfloat16") as here,
        zoo.load(coded, device="cuda", dtype="bfloat16") as there,
    ):
        for name, _ in here.module.named_parameters():
            assert torch.equal(values(here.module, name), values(there.module, name).cpu()), name
        for layout in ("mistral", "huggingface"):
            for device, model in (("cpu", here), ("cuda", there)):
                model.save(tmp_path / layout / device, layout=layout)
            one, other = (tmp_path / layout / device for device in ("cpu", "cuda"))
            for file in one.iterdir():
                assert file.read_bytes() == (other / file.name).read_bytes(), file.name
