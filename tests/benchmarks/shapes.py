"""Random models of one shape, written once and read by every side: as safetensors and as GGUF.

The folder of a shape holds `config.json` and `model.safetensors` in the Hugging Face layout and, for llama.cpp,
`bf16.gguf` with the same values, `q8_0.gguf` and `q4_0.gguf` made from it by llama.cpp's own quantiser.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo.bench.shapes import ATTENTION, card, gated

LLAMA_FILES = {"q8_0": 7, "q4_0": 2}
"""Quantised kinds by llama.cpp's number of the file type."""


@dataclass(frozen=True)
class Shape:
    """A dense model of Mistral's structure; the default has 1.1 B parameters."""

    dim: int = 2048
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 8192
    vocab: int = 32768
    context: int = 32768

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def config(self) -> dict[str, Any]:
        """The `config.json` of transformers."""
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": self.dim,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.hidden,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "sliding_window": None,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }

    def card(self, **changes: Any) -> dict[str, Any]:
        """A card of this shape, for weights that only zoo has. changes: of the layers' mixer and ffn."""
        heads = {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "head_dim": self.head_dim}
        layer = {"repeat": self.layers, "mixer": ATTENTION | heads, "ffn": gated(self.hidden)} | changes
        return card("benchmark", dim=self.dim, layers=[layer], vocab_size=self.vocab, context_length=self.context)


SHAPES = {"1b": Shape(), "tiny": Shape(dim=256, layers=2, heads=8, kv_heads=2, hidden=512, vocab=512)}


def folder_of(shape: Shape, root: Path, *, llama: bool) -> Path:
    """The shape's folder under `root`, with what is missing in it made."""
    folder = root / "-".join(map(str, asdict(shape).values()))
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(_tensors(shape)), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    if llama and not (folder / "bf16.gguf").exists():
        _write_gguf(shape, folder / "model.safetensors", folder / "bf16.gguf")
    for kind, number in LLAMA_FILES.items():
        if llama and not (folder / f"{kind}.gguf").exists():
            _quantise(folder / "bf16.gguf", folder / f"{kind}.gguf", number)
    return folder


def _tensors(shape: Shape) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def matrix(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).mul_(0.02).bfloat16()

    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", matrix(shape.vocab, shape.dim)
    for number in range(shape.layers):
        name = f"model.layers.{number}."
        yield name + "input_layernorm.weight", torch.ones(shape.dim, dtype=torch.bfloat16)
        yield name + "self_attn.q_proj.weight", matrix(query, shape.dim)
        yield name + "self_attn.k_proj.weight", matrix(key, shape.dim)
        yield name + "self_attn.v_proj.weight", matrix(key, shape.dim)
        yield name + "self_attn.o_proj.weight", matrix(shape.dim, query)
        yield name + "post_attention_layernorm.weight", torch.ones(shape.dim, dtype=torch.bfloat16)
        yield name + "mlp.gate_proj.weight", matrix(shape.hidden, shape.dim)
        yield name + "mlp.up_proj.weight", matrix(shape.hidden, shape.dim)
        yield name + "mlp.down_proj.weight", matrix(shape.dim, shape.hidden)
    yield "model.norm.weight", torch.ones(shape.dim, dtype=torch.bfloat16)
    yield "lm_head.weight", matrix(shape.vocab, shape.dim)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _write_gguf(shape: Shape, source: Path, target: Path) -> None:
    """The same values for llama.cpp, which turns neighbouring lanes of queries and keys, not halves."""
    import gguf

    writer = gguf.GGUFWriter(target.with_suffix(".part"), "llama")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    with safe_open(source, "pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no dict
            tensor, place = file.get_tensor(name), name.removesuffix(".weight")
            if place.startswith("model.layers."):
                number, place = place.removeprefix("model.layers.").split(".", 1)
                if place in ("self_attn.q_proj", "self_attn.k_proj"):
                    tensor = tensor.unflatten(0, (-1, 2, shape.head_dim // 2)).transpose(1, 2).flatten(0, 2)
                known = f"blk.{number}.{GGUF_NAMES[place]}.weight"
            else:
                known = f"{GGUF_NAMES[place]}.weight"
            if tensor.ndim == 1:
                writer.add_tensor(known, tensor.float().numpy())
            else:
                raw = tensor.contiguous().view(torch.uint8).numpy()
                writer.add_tensor(known, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.with_suffix(".part").rename(target)


def _quantise(source: Path, target: Path, number: int) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, torch.get_num_threads()
    part = target.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), params):
        raise RuntimeError(f"llama.cpp could not make {target.name}")
    part.rename(target)


def recurrent_folder(shape: Shape, root: Path) -> Path:
    """A random Mamba 2 of the shape's size and layers, as transformers saves it."""
    import transformers

    folder = root / f"mamba2-{shape.dim}-{shape.layers}-{shape.vocab}"
    if not (folder / "config.json").exists():
        heads = {"head_dim": 64, "num_heads": 2 * shape.dim // 64, "n_groups": 1, "state_size": 128}
        sizes = {"hidden_size": shape.dim, "num_hidden_layers": shape.layers, "vocab_size": shape.vocab}
        torch.manual_seed(0)
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **heads, tie_word_embeddings=False))
        model.bfloat16().save_pretrained(folder)
    return folder
