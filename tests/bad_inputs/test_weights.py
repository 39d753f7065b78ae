"""Weights, folders, settings and cards as users have them: faults give one message, oddities the same logits."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.components.compiled import packs
from zoo.registry.errors import CardError, RequestError, WeightsError, ZooError

if TYPE_CHECKING:
    from tests.bad_inputs.conftest import Desk
    from zoo.model import Model

WEIGHTS, INDEX = "consolidated.safetensors", "consolidated.safetensors.index.json"
HF_WEIGHTS = "model.safetensors"
SHARDS = [f"consolidated-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
WK, HEAD = "layers.1.attention.wk.weight", "output.weight"
IDS = [1, 5, 9, 200, 17, 3, 3, 77]

Tensors = dict[str, torch.Tensor]
Act = Callable[["Desk"], Any]


def steps(*acts: Act) -> Act:
    """One after the other; what the last one points at."""
    return lambda desk: [act(desk) for act in acts][-1]


def put(name: str, content: bytes | str | dict[str, Any]) -> Act:
    """Another file in the folder."""

    def act(desk: Desk) -> None:
        desk.put(name, content)

    return act


def removed(*names: str) -> Act:
    """Files of the folder taken away."""

    def act(desk: Desk) -> None:
        for name in names:
            (desk.folder / name).unlink()

    return act


def renamed(name: str) -> Act:
    """The weight file under another name."""

    def act(desk: Desk) -> None:
        desk.weights.rename(desk.folder / name)

    return act


def at(path: str) -> Act:
    """Points elsewhere; {folder} is the checkpoint. Acts that return nothing leave it at the checkpoint."""
    return lambda desk: path.format(folder=desk.folder)


def spoil(change: Callable[[bytes], bytes | str]) -> Act:
    """The weight file with other bytes."""
    return lambda desk: put(WEIGHTS, change(desk.weights.read_bytes()))(desk)


def edit(change: Callable[[Tensors], Any]) -> Act:
    """The weight file with other tensors."""

    def act(desk: Desk) -> None:
        tensors = load_file(desk.weights)
        change(tensors)
        save_file(tensors, desk.weights)

    return act


def split(desk: Desk, stem: str = "consolidated", tensors: Tensors | None = None) -> dict[str, str]:
    """The weights in three shards; what their index has to say."""
    whole = tensors or load_file(desk.weights)
    if tensors is None:
        desk.weights.unlink()
    placed: dict[str, str] = {}
    for number in range(3):
        shard = f"{stem}-0000{number + 1}-of-00003.safetensors"
        names = sorted(whole)[number::3]
        save_file({name: whole[name] for name in names}, desk.folder / shard)
        placed |= dict.fromkeys(names, shard)
    return placed


def indexed(change: Callable[[dict[str, str]], Any] = lambda index: None, without: str = "") -> Act:
    """Three shards and their index, changed; one shard may be missing."""

    def act(desk: Desk) -> None:
        placed = split(desk)
        change(placed)
        desk.put(INDEX, {"weight_map": placed})
        if without:
            (desk.folder / without).unlink()

    return act


def twice(desk: Desk) -> None:
    """Three shards without an index, one tensor in two of them."""
    split(desk)
    first, second = (load_file(desk.folder / shard) for shard in SHARDS[:2])
    save_file(second | dict([next(iter(first.items()))]), desk.folder / SHARDS[1])


class Danger:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def pickled(content: Any, cut: int | None = None) -> Act:
    """The weights as an archive of torch.save; `content` makes something else of them."""

    def act(desk: Desk) -> None:
        tensors = load_file(desk.weights)
        desk.weights.unlink()
        file = desk.folder / "consolidated.00.pth"
        torch.save(content(tensors), file)
        file.write_bytes(file.read_bytes()[:cut])

    return act


def replaced(name: str, content: bytes | str, *, given: bool = False) -> Act:
    """Another file instead of the weights; `given` points at the file itself."""
    made = steps(removed(WEIGHTS), put(name, content))
    return steps(made, at(f"{{folder}}/{name}")) if given else made


def params(**changes: Any) -> Act:
    return lambda desk: desk.params(**changes)


CONFIG = {
    "model_type": "mistral",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "intermediate_size": 40,
    "vocab_size": 509,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "sliding_window": None,
}


def config(**changes: Any) -> Act:
    """A config.json instead of params.json; a value of ... takes the key out."""

    def act(desk: Desk) -> None:
        (desk.folder / "params.json").unlink()
        desk.put("config.json", {key: value for key, value in (CONFIG | changes).items() if value is not ...})

    return act


CARD = """\
name: little
context_length: 512
model:
  dim: 64
  vocab_size: 509
  norm: {kind: rms, eps: 1.0e-5}
  layers:
    - repeat: 2
      mixer: {kind: attention, num_heads: 4, num_kv_heads: 1, head_dim: 24, rope: {theta: 1.0e4}}
      ffn: {kind: gated, hidden_dim: 40}
source: {path: .}
"""


def card(old: str, new: str, **others: str) -> Act:
    """A card file beside the weights with one text replaced, and other files."""

    def act(desk: Desk) -> Path:
        for name, content in others.items():
            desk.put(f"{name}.yaml", content)
        assert old in CARD
        return desk.put("little.yaml", CARD.replace(old, new))

    return act


MAMBA = {
    f"model.backbone.layers.{layer}.mixer.{name}": torch.ones(shape)
    for layer in (0, 1)
    for name, shape in {"A_log": (4,), "D": (4,), "in_proj.weight": (300, 64), "norm.weight": (128,)}.items()
} | {"model.backbone.embedding.weight": torch.ones(509, 64), "model.lm_head.weight": torch.ones(509, 64)}

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14483498224\n"
DIFFER = "the files and the card differ in"
AGAIN = "Fetch the file again."

FAULTS: dict[str, tuple[Act, type[ZooError], list[str]]] = {
    # Files that are no weights
    "a Git-LFS pointer": (
        spoil(lambda _: LFS),
        WeightsError,
        [f"{WEIGHTS}: a Git-LFS pointer", "76 bytes that stand for 14483498224", "`git lfs pull`", "`zoo pull`"],
    ),
    "a file of no bytes": (spoil(lambda _: b""), WeightsError, [f"{WEIGHTS}: the file is empty", "found 0 bytes"]),
    "a file cut in its header": (
        spoil(lambda data: data[:100]),
        WeightsError,
        ["cut off inside its header; found 100 bytes; expected at least", "did not finish"],
    ),
    "a file cut in its last tensor": (
        spoil(lambda data: data[:-100]),
        WeightsError,
        ["cut off inside tensor 'tok_embeddings.weight'; found", "448028 bytes; expected 448128", "did not finish"],
    ),
    "a web page": (
        spoil(lambda _: "<!DOCTYPE html><html><title>Sign in</title>"),
        WeightsError,
        ["a web page stands where the weights should be", "<!DOCTYPE html>", "a proxy or a login page".capitalize()],
    ),
    "noise": (
        spoil(lambda _: b"\xff" * 4000),
        WeightsError,
        ["not a safetensors file", "expected at most 100000000", AGAIN],
    ),
    "bytes after the last tensor": (
        spoil(lambda data: data + b"abc"),
        WeightsError,
        ["3 bytes follow its last tensor", AGAIN],
    ),
    # Shards and indexes
    "a shard missing": (
        indexed(without=SHARDS[1]),
        WeightsError,
        ["1 weight file missing", f"found {SHARDS[0]}, {SHARDS[2]}", f"expected {SHARDS[1]}", "what is there is kept"],
    ),
    "a shard missing and no index": (
        steps(split, removed(SHARDS[1])),
        WeightsError,
        ["1 weight file missing", f"expected {SHARDS[1]}"],
    ),
    "an index that names an absent file": (
        indexed(lambda index: index.update({HEAD: "consolidated-00009-of-00009.safetensors"})),
        WeightsError,
        ["1 weight file missing", "expected consolidated-00009-of-00009.safetensors"],
    ),
    "a shard that its index does not name": (
        indexed(lambda index: [index.pop(name) for name in [*index] if index[name] == SHARDS[2]]),
        WeightsError,
        [f"{INDEX}: weight files that their index does not name", f"found {SHARDS[2]}", "Remove them"],
    ),
    "a tensor that its index does not name": (
        indexed(lambda index: index.pop(HEAD)),
        WeightsError,
        ["the index and the files disagree on 1 tensor", f"'{HEAD}'", "expected a line of the index for it"],
    ),
    "an index that names the wrong shard": (
        indexed(lambda index: index.update({HEAD: SHARDS[0]})),
        WeightsError,
        ["disagree on 1 tensor", f"'{HEAD}'; found it is in {SHARDS[1]}; expected {SHARDS[0]}", "of one revision"],
    ),
    "an index that leaves its folder": (
        indexed(lambda index: index.update({HEAD: "../../etc/passwd"})),
        WeightsError,
        [f"the index places tensor '{HEAD}' outside its folder", "found '../../etc/passwd'"],
    ),
    "an index that is cut": (
        steps(split, put(INDEX, '{"weight_map": {')),
        WeightsError,
        [f"{INDEX}: not an index of weights", "expected `weight_map` in JSON"],
    ),
    "a tensor in two shards": (twice, WeightsError, ["is in two files", f"{SHARDS[0]} and {SHARDS[1]}"]),
    "a whole file beside shards of its name": (
        steps(split, put(WEIGHTS, b"")),
        WeightsError,
        [f"two sets of weights are both named '{WEIGHTS}'", SHARDS[0], "Remove one of them"],
    ),
    "two files of the user's own names": (
        steps(renamed("a.safetensors"), put("b.safetensors", b"")),
        WeightsError,
        ["no telling which is meant; found a.safetensors, b.safetensors", "Point at one of the files"],
    ),
    # Tensors
    "a tensor missing": (
        edit(lambda tensors: tensors.pop(WK)),
        WeightsError,
        [
            f"{DIFFER} 1 tensor (layout mistral)",
            f"1 missing from the files: layers.1.mixer.k.weight [24, 64] (in a file: {WK})",
        ],
    ),
    "a tensor too many": (
        edit(lambda tensors: tensors.update({"layers.2.attention.wk.weight": torch.ones(24, 64)})),
        WeightsError,
        [f"{DIFFER} 1 tensor", "1 in the files only: layers.2.attention.wk.weight [24, 64], which would be"],
    ),
    "a tensor misspelt": (
        edit(lambda tensors: tensors.update({WK.replace("wk", "wkk"): tensors.pop(WK)})),
        WeightsError,
        [f"{DIFFER} 2 tensors", "1 missing", "1 in the files only", f"did you mean '{WK}'"],
    ),
    "a tensor of another shape": (
        edit(lambda tensors: tensors.update({WK: torch.ones(64, 24)})),
        WeightsError,
        [f"1 of another shape: layers.1.mixer.k.weight ({WK} is [64, 24], the card says [24, 64])"],
    ),
    "a tensor of whole numbers": (
        edit(lambda tensors: tensors.update({HEAD: tensors[HEAD].to(torch.int8)})),
        WeightsError,
        [f"head.weight ({HEAD} is I8)", "not read yet", "Use the checkpoint's bfloat16 edition"],
    ),
    "eight-bit floats": (
        edit(lambda tensors: tensors.update({HEAD: tensors[HEAD].to(torch.float8_e4m3fn)})),
        WeightsError,
        [f"head.weight ({HEAD} is F8_E4M3 without scales)", "Use the checkpoint's bfloat16 edition"],
    ),
    "a head that is missing": (
        edit(lambda tensors: tensors.pop(HEAD)),
        WeightsError,
        [f"head.weight [509, 64] (in a file: {HEAD})", "set `model.tied_embeddings: true`"],
    ),
    # Pickles
    "an archive that could run code": (
        pickled(lambda tensors: {**tensors, "more": Danger()}),
        WeightsError,
        ["consolidated.00.pth: refused", "could run code; found posix.mkdir", "where you trust it"],
    ),
    "an archive that is cut": (
        pickled(lambda tensors: tensors, cut=3000),
        WeightsError,
        ["consolidated.00.pth: the archive is cut off or damaged; found 3000 bytes", AGAIN],
    ),
    "an archive of more than tensors": (
        pickled(lambda tensors: {"state": tensors}),
        WeightsError,
        ["not a table of tensors; found 'state' is a dict", "state_dict alone"],
    ),
    "a bare pickle": (
        replaced("consolidated.00.pth", pickle.dumps({"a": 1})),
        WeightsError,
        ["consolidated.00.pth: a bare pickle", "save it as safetensors"],
    ),
    # What stands where
    "an empty folder": (
        removed(WEIGHTS, "params.json"),
        CardError,
        ["no settings to infer a card from; found an empty folder; expected params.json or config.json"],
    ),
    "no settings": (
        removed("params.json"),
        CardError,
        ["no settings to infer a card from; found consolidated.safetensors", "Or name a card"],
    ),
    "no weights": (
        removed(WEIGHTS),
        WeightsError,
        ["no weights here; found params.json; expected cons"],
    ),
    "the folder above": (
        at("{folder}/.."),
        CardError,
        ["no settings to infer a card from; found model", "Do you mean", "model?"],
    ),
    "a folder that is not there": (at("./modle"), CardError, ["modle: there is no such card", "Did you mean 'model'?"]),
    "a file that is not there": (
        at("{folder}/consolidatet.safetensors"),
        CardError,
        ["there is no such card, folder or file", f"Did you mean '{WEIGHTS}'?"],
    ),
    "a URL of a folder that is not there": (
        at("file://{folder}x"),
        CardError,
        ["modelx: there is no such card, folder or file"],
    ),
    "a path that is too long": (at("./" + "x" * 5000), CardError, ["not a path; found File name too long"]),
    "a file of another kind": (
        steps(put("notes.txt", "remember the milk"), at("{folder}/notes.txt")),
        CardError,
        ["notes.txt:1: a card is a mapping; found the single value 'remember the milk'"],
    ),
    "a link to a file that is gone": (
        steps(removed(WEIGHTS), lambda desk: desk.weights.symlink_to("gone")),
        WeightsError,
        [f"{WEIGHTS}: a link to a file that is gone; found -> gone"],
    ),
    "a GGUF file": (
        replaced("model.gguf", "GGUF", given=True),
        WeightsError,
        ["model.gguf: GGUF files are not read yet"],
    ),
    "a folder of a GGUF file": (
        replaced("model.gguf", "GGUF"),
        WeightsError,
        ["no weights here", "GGUF files are not read yet"],
    ),
    "a card without weights": (
        card("source: {path: .}\n", ""),
        CardError,
        ["little: the card names no place to fetch weights from", "`--weights FOLDER`"],
    ),
    # Settings
    "a Mamba model under a transformer's settings": (
        lambda desk: save_file(MAMBA, desk.weights),
        WeightsError,
        [DIFFER, "layers.0.mixer.q.weight [96, 64] (in a file: ", "backbone.layers.0.mixer.A_log [4]"],
    ),
    "an unknown architecture": (
        config(model_type="mistrall"),
        CardError,
        [
            "architecture 'mistrall' is not supported yet; expected model_type mistral, mixtral",
            "Did you mean 'mistral'",
        ],
    ),
    "an architecture unsaid": (config(model_type=...), CardError, ["config.json: the key 'model_type' is missing"]),
    "an image encoder without sizes": (
        params(vision_encoder={"a": 1}),
        CardError,
        ["the key 'vision_encoder.image_token_id' is missing"],
    ),
    "quantised weights": (
        config(quantization_config={"quant_method": "awq"}),
        CardError,
        ["weights quantised by 'awq' are not read yet; found the key 'quantization_config'"],
    ),
    "an unknown key": (
        params(slidding_window=4),
        CardError,
        ["params.json: 1 key that zoo does not know; found slidding_window: 4", "Did you mean 'sliding_window'"],
    ),
    "a key missing": (params(n_heads=...), CardError, ["params.json: the key 'n_heads' is missing"]),
    "a number as text": (params(n_heads="4"), CardError, ["n_heads", 'found "4"; expected a positive whole number']),
    "a window of zero": (params(sliding_window=0), CardError, ["sliding_window", "found 0", "or null for none"]),
    "heads that do not divide": (params(n_kv_heads=3), CardError, ["num_heads 4 and num_kv_heads 3"]),
    "a head of odd size": (params(head_dim=23), CardError, ["head_dim must be even; found 23"]),
    "a width that no head divides": (
        config(head_dim=None, num_attention_heads=5),
        CardError,
        ["num_attention_heads", "found 5; expected a divisor of hidden_size, 64"],
    ),
    "an unknown rope": (
        config(rope_scaling={"type": "spiral", "factor": 2.0}),
        CardError,
        ['found "spiral"; expected one of default, linear, llama3, yarn'],
    ),
    "settings that are cut": (
        put("params.json", '{"dim": 64,\n "n_layers":'),
        CardError,
        ["params.json:2: not valid JSON; found Expecting value"],
    ),
    "settings of another model": (
        params(dim=128),
        WeightsError,
        [f"{DIFFER} 21 tensors", "and 16 more", "Is this the card of"],
    ),
    "settings of a deeper model": (
        params(n_layers=3),
        WeightsError,
        ["9 missing from the files: layers.2.", "and 4 more"],
    ),
    "settings of a larger vocabulary": (
        params(vocab_size=510),
        WeightsError,
        ["2 of another shape", "(tok_embeddings.weight is [509, 64], the card says [510, 64])"],
    ),
    # Cards
    "a tab in a card": (
        card("  dim: 64", "\tdim: 64"),
        CardError,
        ["little.yaml:4: a tab stands in the indentation; expected spaces"],
    ),
    "a key twice in a card": (
        card("  dim: 64", "  dim: 64\n  dim: 65"),
        CardError,
        ["little.yaml:5: the key 'dim' stands twice; found the first on line 4"],
    ),
    "a wrong type in a card": (
        card("dim: 64", "dim: many"),
        CardError,
        ["little.yaml:4: model.dim: wrong value; found the text 'many'; expected an integer"],
    ),
    "an unknown key in a card": (
        card("num_kv_heads", "num_kv_head"),
        CardError,
        ["little.yaml:9: model.layers.0.mixer.num_kv_head: unknown key", "Did you mean 'num_kv_heads'?"],
    ),
    "a key missing in a card": (
        card(", hidden_dim: 40", ""),
        CardError,
        ["little.yaml:10: model.layers.0.ffn: the key 'hidden_dim' is missing"],
    ),
    "a window of zero in a card": (
        card("head_dim: 24", "head_dim: 24, window: 0"),
        CardError,
        [
            "little.yaml:9: model.layers.0.mixer.window: wrong value; found 0",
            "expected a value greater than or equal to 1",
        ],
    ),
    "an unknown parent": (
        card("name: little", "name: little\nextends: mixtral-8x7"),
        CardError,
        ["little.yaml:2: extends: unknown card 'mixtral-8x7'", "Did you mean 'mixtral-8x7b'?"],
    ),
    "cards in a circle": (
        card("name: little", "name: little\nextends: other.yaml", other="name: other\nextends: little.yaml\n"),
        CardError,
        ["cards extend each other in a circle; found little extends other extends little"],
    ),
    "an unknown layout": (
        card("path: .", "path: ., layout: mistrall"),
        CardError,
        ["source.layout", "Did you mean 'mistral'?"],
    ),
    "an unknown type of the weights": (
        card("path: .", "path: ., dtype: bf16"),
        CardError,
        ["source.dtype", "Did you mean 'bfloat16'?"],
    ),
    "a tag that would run code": (
        card("dim: 64", "dim: !!python/object/apply:os.mkdir [executed]"),
        CardError,
        ["little.yaml:4: tags are not allowed in a card"],
    ),
    "a card of no lines": (
        steps(put("little.yaml", ""), at("{folder}/little.yaml")),
        CardError,
        ["little.yaml: the card is empty"],
    ),
    "a card that is no text": (
        steps(put("little.yaml", b"\xff\xfe\0"), at("{folder}/little.yaml")),
        CardError,
        ["little.yaml: not a text file"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_refused(name: str, desk: Desk) -> None:
    act, error, words = FAULTS[name]
    ref = act(desk)
    desk.refuses(error, words, ref if isinstance(ref, str | Path) else None)
    assert not Path("executed").exists()


# --- strange, and right -----------------------------------------------------------------------------------------------


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of heads in pairs (0, 1), (2, 3), ... as rows in halves, which is Hugging Face's order."""
    turned: torch.Tensor = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape).contiguous()
    return turned


def hugging_face(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Mistral's own tensors as transformers names and orders them."""
    words = {
        "tok_embeddings": "model.embed_tokens",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    found: Tensors = {}
    for name, tensor in tensors.items():
        turned = halves(tensor, 4 if "wq" in name else 1) if "wq" in name or "wk" in name else tensor
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        name = {"norm.weight": "model.norm.weight", HEAD: "lm_head.weight"}.get(name, name)
        found[name.replace("layers.", "model.layers.", 1)] = turned
    return found


def converted(desk: Desk, settings: bool = True) -> Tensors:
    """Mistral's weights, taken away, as Hugging Face's; with config.json for params.json."""
    tensors = hugging_face(load_file(desk.weights))
    desk.weights.unlink()
    if settings:
        config()(desk)
    return tensors


def zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def moved(path: str, ref: str | None = None) -> Act:
    """The checkpoint elsewhere, and how it is called there."""

    def act(desk: Desk) -> Any:
        target = desk.folder.parent / path
        target.parent.mkdir(parents=True, exist_ok=True)
        desk.folder.rename(target)
        return target if ref is None else ref.format(folder=target)

    return act


def linked(desk: Desk) -> Path:
    """Files that are links to blobs, as in the hub's cache."""
    snapshot = desk.folder.parent / "models--ann--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    for file in desk.folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    return snapshot


def at_home(desk: Desk) -> str:
    desk.patch.setenv("HOME", str(desk.folder.parent))
    return "~/model"


def tied(desk: Desk) -> None:
    """A tied model whose file holds its head all the same."""
    tensors = converted(desk, settings=False)
    config(tie_word_embeddings=True)(desk)
    save_file(tensors, desk.folder / HF_WEIGHTS)


WORKS: dict[str, tuple[Act, str]] = {
    "only consolidated": (lambda desk: None, f"weights: {WEIGHTS} ("),
    "only consolidated shards": (indexed(), f"weights: {SHARDS[0]} and 2 more"),
    "shards without an index": (split, f"weights: {SHARDS[0]} and 2 more"),
    "only .pth": (pickled(lambda tensors: tensors), "weights: consolidated.00.pth"),
    "both sets": (
        lambda desk: save_file(zeros(hugging_face(load_file(desk.weights))), desk.folder / HF_WEIGHTS),
        f"weights: {WEIGHTS} (435.8 KiB, layout mistral); left aside: {HF_WEIGHTS}",
    ),
    "both sets and settings of both": (
        steps(
            lambda desk: save_file(zeros(hugging_face(load_file(desk.weights))), desk.folder / HF_WEIGHTS),
            put("config.json", CONFIG),
        ),
        f"left aside: {HF_WEIGHTS}",
    ),
    "both sets, one of them without a shard": (
        steps(
            lambda desk: split(desk, "model", hugging_face(zeros(load_file(desk.weights)))),
            removed("model-00002-of-00003.safetensors"),
        ),
        "left aside: model-00001-of-00003.safetensors and 1 more (incomplete: no model-00002-of-00003.safetensors)",
    ),
    "only Hugging Face's": (lambda desk: save_file(converted(desk), desk.folder / HF_WEIGHTS), "layout huggingface"),
    "Hugging Face's shards": (lambda desk: split(desk, "model", converted(desk)), "layout huggingface"),
    "Mistral's settings, Hugging Face's names": (
        lambda desk: save_file(converted(desk, settings=False), desk.folder / HF_WEIGHTS),
        "layout huggingface",
    ),
    "a head beside the word that there is none": (tied, "layout huggingface"),
    "a trainer's leavings": (
        steps(put("training_args.bin", b"x"), put("optimizer.pt", b"y")),
        f"weights: {WEIGHTS} (435.8 KiB, layout mistral)",
    ),
    "frequencies that older files hold": (
        edit(lambda tensors: tensors.update({"rope.freqs": torch.ones(12)})),
        f"weights: {WEIGHTS}",
    ),
    "a file of the user's own name": (
        renamed("my best.safetensors"),
        "weights: my best",
    ),
    "a file for a folder": (at("{folder}/consolidated.safetensors"), f"weights: {WEIGHTS}"),
    "an index for a folder": (steps(indexed(), at("{folder}/" + INDEX)), f"weights: {SHARDS[0]} and 2 more"),
    "a shard for a folder": (
        steps(indexed(), at("{folder}/" + SHARDS[2])),
        f"weights: {SHARDS[0]} and 2 more",
    ),
    "settings for a folder": (at("{folder}/params.json"), f"weights: {WEIGHTS}"),
    "a path with spaces": (moved("my models/the first one"), f"weights: {WEIGHTS}"),
    "a path in other letters": (moved("modèles/数字/🦒"), f"weights: {WEIGHTS}"),
    "a long path": (moved("/".join(["a" * 200] * 8)), f"weights: {WEIGHTS}"),
    "a relative path": (at("model"), f"weights: {WEIGHTS}"),
    "a relative path with dots": (at("./model/../model/"), f"weights: {WEIGHTS}"),
    "a path from home": (at_home, f"weights: {WEIGHTS}"),
    "file: with two slashes": (at("file://model"), f"weights: {WEIGHTS}"),
    "file: with three slashes": (moved("a b", "file://{folder}"), f"weights: {WEIGHTS}"),
    "a folder named like a card": (moved("mixtral-8x7b", "./mixtral-8x7b"), f"weights: {WEIGHTS}"),
    "links, as the hub's cache makes them": (linked, f"weights: {WEIGHTS}"),
    "a window that is null": (params(sliding_window=None), f"weights: {WEIGHTS}"),
    "a window longer than the prompt": (params(sliding_window=100), f"weights: {WEIGHTS}"),
    "a card file": (card("name: little", "name: little"), f"weights: {WEIGHTS}"),
}


@pytest.fixture(scope="module")
def expected(opened: Callable[[str], Model]) -> torch.Tensor:
    """The logits of the checkpoint as it was made, whose head_dim is not dim / num_heads."""
    return opened("").logits(IDS)


@pytest.mark.parametrize("name", WORKS)
def test_right(name: str, desk: Desk, expected: torch.Tensor) -> None:
    act, said = WORKS[name]
    ref = act(desk)
    with desk.load(ref if isinstance(ref, str | Path) else None) as model:
        assert torch.allclose(model.logits(IDS), expected, atol=1e-5)
        assert any(said in note for note in model.notes), model.notes


# --- types and devices ------------------------------------------------------------------------------------------------


def test_the_wanted_set_is_named(desk: Desk, expected: torch.Tensor) -> None:
    tensors = load_file(desk.weights)
    save_file(hugging_face(tensors), desk.folder / HF_WEIGHTS)
    save_file(zeros(tensors), desk.weights)
    with desk.load(overrides={"source.layout": "huggingface"}) as model:
        assert torch.allclose(model.logits(IDS), expected, atol=1e-5)
        assert f"left aside: {WEIGHTS}" in model.notes[1]


def test_a_float32_file_takes_half_in_bfloat16(desk: Desk, expected: torch.Tensor) -> None:
    with desk.load(dtype="bfloat16") as model:
        half = zoo.inspect(desk.folder, dtype="bfloat16").weight_bytes
        assert half * 2 == zoo.inspect(desk.folder, dtype="float32").weight_bytes
        assert (0.7 * half < model.memory.weights < half) if packs() else model.memory.weights == half
        assert (model.logits(IDS) - expected).abs().max() < 0.05 * expected.abs().max()


def test_values_beyond_float16(desk: Desk) -> None:
    edit(lambda tensors: tensors.update({HEAD: tensors[HEAD] * 1e6}))(desk)
    words = [f"tensor '{HEAD}' does not fit float16", "expected at most 65504", "Load with dtype bfloat16 or float32"]
    command = ("save", str(desk.folder), str(desk.folder.parent / "saved"), "--dtype", "float16")
    desk.refused(WeightsError, words, lambda: desk.load(dtype="float16"), *command)


@pytest.mark.parametrize("dtype", ["fp8", "float8_e4m3fn", "int8", "bf16"])
def test_a_type_that_nothing_runs_in(desk: Desk, dtype: str) -> None:
    words = [f"dtype: unknown dtype; found '{dtype}'; expected auto or one of float32, bfloat16, float16"]
    desk.refuses(RequestError, words, dtype=dtype)


def old_gpu(desk: Desk) -> None:
    """A machine whose only GPU is of the generation before bfloat16."""
    desk.patch.setattr(torch.cuda, "is_available", lambda: True)
    desk.patch.setattr(torch.cuda, "device_count", lambda: 1)
    desk.patch.setattr(torch.cuda, "current_device", lambda: 0)
    desk.patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    desk.patch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


def test_bfloat16_where_the_gpu_has_none(desk: Desk) -> None:
    old_gpu(desk)
    words = [
        "dtype: this GPU does not compute in bfloat16; found Tesla T4; expected compute capability 8.0",
        "--dtype auto",
    ]
    desk.refuses(RequestError, words, device="cuda", dtype="bfloat16")


def test_bfloat16_weights_where_the_gpu_has_none(desk: Desk) -> None:
    """Chosen by itself, the type is one that the GPU has, and the choice is said."""
    from zoo.device import choose

    old_gpu(desk)
    placement = choose("auto", "auto", "bfloat16")
    assert (str(placement.device), placement.dtype) == ("cuda:0", torch.float16)
    assert placement.note == "cuda:0, float16 (the weights are bfloat16, which this device does not compute well)"
