"""Every built-in card, shrunk, against the matching class of transformers.

What a family needs is data: a row of references.yaml, and of families.yaml.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.whisper.modeling_whisper import sinusoids

import zoo
from tests.parity.shrinking import CARDS, RECURRENT, WINDOW, layers_of, mixers_of, plain, reference, rows_of, shrunk
from zoo.assemble import assemble
from zoo.engine.request import Media
from zoo.loading.infer import infer_card
from zoo.loading.infer.families import families, keys_of
from zoo.loading.layouts import detect, layouts
from zoo.loading.mapping import plan_mapping
from zoo.loading.reader import TensorInfo
from zoo.registry.card import Card, load_card
from zoo.registry.resolve import resolve
from zoo.testing import relative_error, step_through

Table = dict[str, tuple[str, tuple[float, ...]]]
"""The reference and the errors of every card that was compared, for docs/parity.md."""

NATIVE = ("mistral", "zoo")
"""Families that Mistral's own layout can name."""

NATIVE_FILES = ("mistral_large4",)
"""Classes of transformers that write Mistral's own names."""

LENGTH = 19
TOLERANCE = 1e-4


def transformers_model(card: dict[str, Any]) -> Any:
    """transformers' model of the same shape: the words of families.yaml, read the other way."""
    model_type, _, inner_type = reference(card["name"]).partition("/")
    outer, row = rows_of(card["name"])
    keys = {word: keys_of(row, word) for word in row["names"]}
    settings: dict[str, Any] = {"pad_token_id": None}  # some defaults lie beyond a shrunk vocabulary
    settings |= {key: allowed[0] for key, allowed in row["only"].items()}
    settings |= {keys[word][0]: value for word, value in words(card, row).items() if keys.get(word)}
    if "state_space" in row:
        settings |= state_space_settings(card, row["state_space"])
    ropes = {
        "sliding_attention" if mixer.get("window") else "full_attention": rope_parameters(mixer)
        for mixer in [*mixers_of(card), *(node["mixer"] for node in card["model"].get("shared", ()))]
        if mixer.get("rope")
    }
    if ropes:
        settings["rope_parameters"] = ropes if "local_theta" in keys else next(iter(ropes.values()))
    if outer is not row:
        config = transformers.AutoConfig.for_model(model_type, **larger_settings(card, outer, settings, inner_type))
        return transformers.AutoModelForMultimodalLM.from_config(config)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    return class_of(config)(config)


def larger_settings(
    card: dict[str, Any], row: dict[str, Any], inner: dict[str, Any], inner_type: str
) -> dict[str, Any]:
    """What a model says that has a language model of these settings inside, and encoders beside it."""
    settings = {row["inside"]["key"]: inner | {"model_type": inner_type or row["inside"]["model_type"]}}
    settings |= {key: allowed[0] for key, allowed in row["only"].items()}
    for name, part in row["encoders"].items():
        node = card["model"][name]
        said = {"activation": "silu", **node, **node.get("projector", {})}
        flat = {
            keys_of(part, word)[0]: said[word] for word in part["names"].keys() & said.keys() if keys_of(part, word)
        }
        flat |= {key: allowed[0] for key, allowed in part["only"].items() if key.endswith("_config.model_type")}
        for path, value in flat.items():
            *groups, leaf = path.split(".")
            place = settings
            for group in groups:
                place = place.setdefault(group, {})
            place[leaf] = value
    if "vision" in row["encoders"]:
        settings.setdefault("tie_word_embeddings", inner.get("tie_word_embeddings", False))
        settings["vision_config"]["rope_parameters"]["rope_type"] = "axial"
    return settings


def class_of(config: Any) -> Any:
    """transformers' class of language models, also where its Auto classes do not know it; None where it has none."""
    known = transformers.AutoModelForCausalLM._model_mapping
    name = f"{type(config).__name__.removesuffix('Config')}ForCausalLM"
    return known[type(config)] if type(config) in known else getattr(transformers, name, None)


def opened(folder: Path) -> Any:
    """What transformers reads from a folder; None for what it only reads with an image encoder."""
    kind = class_of(transformers.AutoConfig.from_pretrained(folder))
    return kind and kind.from_pretrained(folder).eval()


def in_memory(model: Any) -> dict[str, torch.Tensor]:
    """The tensors by name; files hold what several layers share once."""
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in once}


def on_disk(model: Any) -> dict[str, torch.Tensor]:
    """The tensors as transformers writes them."""
    tensors: dict[str, torch.Tensor] = revert_weight_conversion(model, in_memory(model))
    return tensors


def words(card: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The card in the words of a row of families.yaml."""
    layers, mixers = layers_of(card), mixers_of(card)
    shared = card["model"].get("shared", [])
    attention = [m for m in [*mixers, *(node["mixer"] for node in shared)] if m["kind"] not in RECURRENT]
    ffns = [node["ffn"] for node in [*layers, *shared] if node.get("ffn")]
    return {
        "tied_embeddings": False,
        **card["model"],
        "eps": card["model"]["norm"]["eps"],
        "context_length": card["context_length"],
        "num_layers": len(layers),
        **layers[0],
        **(recurrent_words(mixers[0]) if not attention else attention_words(attention)),
        **(ffn_words(ffns) if ffns else {}),
        **(layer_words(layers, row["layer_kinds"]) if "layer_kinds" in row else {}),
        **(shared_words(shared) if shared else {}),
    }


def attention_words(mixers: list[dict[str, Any]]) -> dict[str, Any]:
    mixer, windows = mixers[0], [mixer.get("window") for mixer in mixers]
    if mixer["kind"] == "latent_attention":
        return latent_words(mixers)
    return {
        "qkv_bias": False,  # where some classes have other defaults
        "o_bias": False,
        **mixer,
        "scale_dim": round(mixer["scale"] ** -2) if "scale" in mixer else mixer["head_dim"],
        "window": max(window or 0 for window in windows) or None,
        "positions": "rope" if mixer["rope"] else "nope",
        "rope_layers": [int(mixer["rope"] is not None) for mixer in mixers],
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def latent_words(mixers: list[dict[str, Any]]) -> dict[str, Any]:
    indexer = mixers[0].get("indexer", {})
    return {
        **mixers[0],
        "num_kv_heads": mixers[0]["num_heads"],
        "rope_layers": [int(mixer["rope"] is not None) for mixer in mixers],
        "latent_sources": [mixer.get("cache", {}).get("layer", number) for number, mixer in enumerate(mixers)],
        **{f"index_{word}": value for word, value in indexer.items()},
    }


def ffn_words(ffns: list[dict[str, Any]]) -> dict[str, Any]:
    dense, mixtures = ([ffn for ffn in ffns if (ffn["kind"] == "moe") == mixture] for mixture in (False, True))
    expert = mixtures[0]["expert"] if mixtures else dense[0]
    activation = expert.get("activation", "silu")
    return {
        "activation": next(k for k, v in families()["activations"].items() if v == activation),
        "hidden_dim": (dense or [expert])[0]["hidden_dim"],
        "expert_hidden_dim": expert["hidden_dim"],
        **{name: expert[name] for name in ("gain", "limit") if name in expert},
        **(mixture_words(mixtures[0], ffns) if mixtures else {"num_experts": 0, "experts_per_token": 0}),
    }


def mixture_words(ffn: dict[str, Any], ffns: list[dict[str, Any]]) -> dict[str, Any]:
    """What mixtures say: their experts, how these are chosen, what is shared, and which layers are none."""
    router, shared = ffn.get("router", "softmax_topk"), ffn.get("shared")
    router = {"kind": router} if isinstance(router, str) else router
    types = ["sparse" if one["kind"] == "moe" else "dense" for one in ffns]
    return {
        **{name: ffn[name] for name in ("num_experts", "experts_per_token")},
        **{name: router.get(name, 1) for name in ("groups", "groups_per_token")},
        "router_scale": router.get("scale", 1.0),
        "normalize": router.get("normalize", router.get("kind") == "sigmoid"),
        "dense_layers": types.count("dense"),
        "ffn_types": types,
        "shared_experts": shared["hidden_dim"] // ffn["expert"]["hidden_dim"] if shared else 0,
        **({"shared_hidden_dim": shared["hidden_dim"]} if shared else {}),
    }


def layer_words(layers: list[dict[str, Any]], known: dict[str, list[str | None]]) -> dict[str, Any]:
    """What each layer is called where they are of several kinds, and where kinds recur."""

    def kind(layer: dict[str, Any], part: str) -> Any:
        return layer[part]["kind"] if layer.get(part) else None

    def word(layer: dict[str, Any]) -> str:
        ffn = kind(layer, "ffn")
        fits = ("ffn", ffn if ffn == "moe" else "dense") if ffn else ("shared",) if "number" in layer else (None,)
        return [name for name, kinds in known.items() if kinds[0] == kind(layer, "mixer") and kinds[1] in fits][-1]

    places = {
        "attention": [i for i, layer in enumerate(layers) if kind(layer, "mixer") == "attention"],
        "experts": [i for i, layer in enumerate(layers) if kind(layer, "ffn") == "moe"],
    }
    recurring = {f"{what}_offset": at[0] for what, at in places.items() if at}
    recurring |= {f"{what}_every": [*at, at[0] + len(layers)][1] - at[0] for what, at in places.items() if at}
    return {"layer_types": [word(layer) for layer in layers], **recurring}


def shared_words(shared: list[dict[str, Any]]) -> dict[str, Any]:
    """What is said of blocks that layers share."""
    adapted = {"adapter_rank": shared[0]["adapter_rank"], "adapt_mixer": shared[0].get("adapt_mixer", False)}
    positions = shared[0]["mixer"]["rope"] is not None
    return {"shared_blocks": len(shared), "positions": positions, **adapted}


def recurrent_words(mixer: dict[str, Any]) -> dict[str, Any]:
    return {**mixer, "bcdt_eps": mixer.get("bcdt_norm", {}).get("eps")}


def state_space_settings(card: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """What a file says of state-space mixers among other layers, and what fits where there are none."""
    unused = {"num_heads": 1, "head_dim": 2 * card["model"]["dim"]}
    mixer = next((mixer for mixer in mixers_of(card) if mixer["kind"] in RECURRENT), unused)
    return {keys_of(row, word)[0]: value for word, value in recurrent_words(mixer).items() if keys_of(row, word)}


def rope_parameters(mixer: dict[str, Any]) -> dict[str, Any]:
    """The rope of a card's mixer, and what goes with it, as transformers says it."""
    rope = mixer["rope"]
    kind = rope.get("kind", "default")
    names = families()["rope_types"][kind]
    scaling = {names[field].removesuffix("?"): rope[field] for field in names if field in rope}
    share = {"partial_rotary_factor": 0.5} if "rotary_dim" in rope else {}
    if kind == "yarn":
        scaling |= {"mscale": mixer.get("mscale", 0), "mscale_all_dim": mixer.get("mscale", 0)}
        scaling |= {key: rope[key] for key in ("attention_factor",) if key in rope}
        scaling |= {"llama_4_scaling_beta": mixer["query_scaling"]["beta"]} if "query_scaling" in mixer else {}
    return {"rope_type": kind, "rope_theta": rope["theta"], **scaling, **share}


def random_model(card: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = transformers_model(card).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.15)
    for name, buffer in model.named_buffers():
        if name in model.state_dict():
            torch.nn.init.normal_(buffer, std=0.15)
    for name, parameter in model.named_parameters():
        if name.endswith("embed_positions.weight"):
            parameter.data = sinusoids(*parameter.shape)
    return model


def with_media(card: dict[str, Any], tokens: list[int]) -> tuple[list[int], dict[str, Any], dict[str, Tensor]]:
    """For a model that hears or sees: the tokens with media in them, those by their words in `logits`, and how
    transformers takes them.
    """
    vision, audio = card["model"].get("vision"), card["model"].get("audio")
    if audio is not None:
        sound = torch.randn(audio["num_mel_bins"], 2 * audio["positions"])
        count = audio["positions"] // audio["stack"]
        return filled(tokens, audio["token"], [count]), {"audio": [sound]}, {"input_features": sound[None]}
    if vision is None or "inside" not in rows_of(card["name"])[0]:
        return filled(tokens, (vision or {"token": -1})["token"], []), {}, {}
    cell = vision["patch_size"] * vision["projector"].get("merge", 1)
    images = [torch.randn(3, rows * cell, columns * cell) for rows, columns in ((2, 3), (1, 1), (3, 1))]
    padded = torch.stack(
        [torch.nn.functional.pad(i, (0, 3 * cell - i.shape[2], 0, 3 * cell - i.shape[1])) for i in images]
    )
    sizes = torch.tensor([image.shape[1:] for image in images])
    return (
        filled(tokens, vision["token"], [6, 1, 3]),
        {"images": images},
        {"pixel_values": padded, "image_sizes": sizes},
    )


def filled(tokens: list[int], token: int, counts: list[int]) -> list[int]:
    """The tokens with places for media from the fourth on, one token between them, and none elsewhere."""
    words = [word + (word == token) for word in tokens]
    at = 3
    for count in counts:
        words[at : at + count] = [token] * count
        at += count + 1
    return words


@cache
def errors(text: str) -> tuple[float, ...]:
    """Of a full prefill, of chunks and of single tokens; once for all cards that shrink to the same."""
    card = json.loads(text)
    model = random_model(card)
    drawn = torch.randint(card["model"]["vocab_size"], (LENGTH,)).tolist()
    tokens, pieces, given = with_media(card, drawn)
    nodes = {"images": "vision", "audio": "audio"}
    media = [Media(nodes[word], piece) for word, several in pieces.items() for piece in several]
    with torch.inference_mode():
        expected_TV = model(torch.tensor([tokens]), **given).logits[0]
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert resolve(Card.from_dict(infer_card(folder))).model == resolve(Card.from_dict(card)).model
        with zoo.load(card, weights=folder, device="cpu", dtype="float32") as ours:
            steps = [step_through(ours.module, [tokens], chunk, media=[media])[0] for chunk in (5, 1)]
            whole_TV = ours.logits(tokens, **pieces)
            (Path(folder) / "config.json").unlink()  # which would be taken as it is
            again_TV = saved_again(ours, tokens, pieces, native=reference(card["name"]) in NATIVE_FILES)
        return tuple(relative_error(found_TV, expected_TV) for found_TV in (whole_TV, *steps, again_TV))


def saved_again(ours: zoo.Model, tokens: list[int], pieces: dict[str, Any], *, native: bool) -> torch.Tensor:
    """What transformers computes from what zoo saves; what zoo computes from it is the same to the last bit."""
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "saved"
        saved = ours.save(folder, layout="auto" if native else "huggingface")
        with zoo.load(folder, device="cpu") as same:
            assert torch.equal(same.logits(tokens, **pieces), ours.logits(tokens, **pieces))
        if saved.settings is None:  # tests/saving says for whom that must not be
            return ours.logits(tokens, **pieces)
        (folder / "card.yaml").unlink()  # read by config.json from here on
        assert resolve(Card.from_dict(infer_card(folder))).model == ours.plan.model
        theirs = opened(folder)
        if theirs is None:
            return ours.logits(tokens)
        with torch.inference_mode():
            logits_TV: torch.Tensor = theirs(torch.tensor([tokens])).logits[0]
        return logits_TV


@pytest.mark.parametrize("name", CARDS)
def test_shrunk_card_equals_transformers(name: str, parity_table: Table) -> None:
    card = shrunk(name)
    twin = next(other for other in CARDS if reference(other) == reference(name) and alike(shrunk(other), card))
    found = errors(json.dumps(shrunk(twin)))
    parity_table[name] = (reference(name), found)
    assert max(found) < TOLERANCE


def test_the_page_has_a_row_for_every_card() -> None:
    """docs/parity.md is written by `make parity`; its errors change with the machine, its rows with the cards."""
    page = (Path(__file__).parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")
    ]
    assert [row[:2] for row in rows] == [[name, reference(name)] for name in CARDS], "run `make parity`"
    assert all(float(error) < TOLERANCE for row in rows for error in row[2:])


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("context_length", "model"))


def native_model(mistral_inference: ModuleType, card: dict[str, Any]) -> Any:
    """mistral-inference's model of the same shape."""
    layers = layers_of(card)
    mixer, ffn = layers[0]["mixer"], layers[0]["ffn"]
    params: dict[str, Any] = {
        "dim": card["model"]["dim"],
        "vocab_size": card["model"]["vocab_size"],
        "n_layers": len(layers),
        "n_heads": mixer["num_heads"],
        "n_kv_heads": mixer["num_kv_heads"],
        "head_dim": mixer["head_dim"],
        **{word: (ffn.get("expert") or ffn)["hidden_dim"] for word in ("hidden_dim", "expert_hidden_dim")},
        "norm_eps": card["model"]["norm"]["eps"],
    }
    if ffn["kind"] == "moe":
        params["moe"] = {"num_experts": ffn["num_experts"], "num_experts_per_tok": ffn["experts_per_token"]}
    return mistral_inference.Transformer(mistral_inference.TransformerArgs.from_dict(params))


def tensors_of(name: str) -> str:
    """What says which tensors a card has: all of its model but rope."""
    return re.sub(r'"rope": \{[^}]*\}', "", json.dumps([reference(name), plain(name)["model"]], sort_keys=True))


@pytest.mark.parametrize("name", {tensors_of(name): name for name in CARDS if load_card(name).extends is None}.values())
def test_layouts_close_at_full_size(name: str, mistral_inference: ModuleType) -> None:
    """Every tensor that the two libraries have, of the same shape, and no other; without any weights."""
    card = plain(name)
    with torch.device("meta"):
        model = transformers_model(card)
        models = {"mistral" if reference(name) in NATIVE_FILES else "huggingface": on_disk(model)}
        mixer = "" if {"audio", "vision"} & card["model"].keys() else layers_of(card)[0]["mixer"]["kind"]
        if load_card(name).family in NATIVE and mixer == "attention":
            models["mistral"] = in_memory(native_model(mistral_inference, card))
        assemble(resolve(Card.from_dict(card)), torch.bfloat16)
    for layout, tensors in models.items():
        headers = {
            key: TensorInfo(key, tuple(value.shape), "BF16", Path("model.safetensors"), 0, 2 * value.numel())
            for key, value in tensors.items()
            if not (card["model"].get("tied_embeddings") and key == "lm_head.weight")
        }
        found = detect(headers, layouts().values(), "meta")
        assert found.name.startswith(layout)
        plan_mapping(resolve(Card.from_dict(card)).model, found, headers, "meta")


def test_shrinking_keeps_the_structure() -> None:
    ministral, mixtral = shrunk("ministral-8b-instruct"), shrunk("mixtral-8x22b")
    (run,) = ministral["model"]["layers"]
    assert [node["mixer"].get("window") for node in run["pattern"]] == [None, WINDOW, WINDOW, WINDOW]
    (node,) = mixtral["model"]["layers"][0]["pattern"]
    assert node["ffn"]["num_experts"] == 8
    assert node["mixer"]["num_heads"] == 6 * node["mixer"]["num_kv_heads"]
