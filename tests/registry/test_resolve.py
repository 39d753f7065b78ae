"""From a card to complete Specs: slots, inheritance, runs, and the errors of a card's tree."""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import Field, model_validator

from zoo.registry.card import Card
from zoo.registry.catalog import Catalog, Entry
from zoo.registry.errors import CardError, PluginError
from zoo.registry.manager import manager
from zoo.registry.plan import phrase
from zoo.registry.resolve import Plan, resolve
from zoo.registry.spec import Inherited, Slot, Spec

Change = Callable[[str, str], Card]

FFN = "ffn: {kind: gated, hidden_dim: 24}"
ROPE = "rope: {theta: 1.0e4}"
HEADS = "head_dim: 4,"
MIXER_KEYS = "kind, num_heads, num_kv_heads, head_dim, window, rope, qkv_bias, o_bias, qk_norm, "
MIXER_KEYS += "qk_norm_span, scale, softcap, sinks, query_scaling, cache"

MISTAKES = {
    "wrong type": ("dim: 16", "dim: '16'", "4: model.dim: wrong value; found the text '16'; expected an integer."),
    "fraction": ("dim: 16", "dim: 16.0", "4: model.dim: wrong value; found 16.0; expected an integer."),
    "truth": ("dim: 16", "dim: true", "4: model.dim: wrong value; found true; expected an integer."),
    "zero": ("dim: 16", "dim: 0", "4: model.dim: wrong value; found 0; expected a value greater than or equal to 1."),
    "nothing": ("dim: 16", "dim:", "4: model.dim: wrong value; found nothing (null); expected an integer."),
    "nobody inherits it": (
        "vocab_size: 32",
        "vocab_size: [32]",
        "5: model.vocab_size: wrong value; found a list of 1; expected an integer.",
    ),
    "text for a number": (
        "eps: 1.0e-5",
        "eps: no",
        "6: model.norm.eps: wrong value; found the text 'no'; expected a number.",
    ),
    "not a number": (
        ROPE,
        "rope: {theta: .nan}",
        "9: model.layers.0.mixer.rope.theta: wrong value; found the text '.nan'; expected a number.",
    ),
    "missing at the root": (
        "  dim: 16\n",
        "",
        "3: model: the key 'dim' is missing. It gives: Size of the residual stream.",
    ),
    "missing below": (
        "num_kv_heads: 2, ",
        "",
        "9: model.layers.0.mixer: the key 'num_kv_heads' is missing. "
        "It gives: Key and value heads; a divisor of num_heads.",
    ),
    "missing slot": (
        f", {ROPE}",
        "",
        "9: model.layers.0.mixer: the key 'rope' is missing. "
        "It gives: Rotary positions; null for a layer without positions.",
    ),
    "missing kind": (
        "kind: gated, ",
        "",
        "10: model.layers.0.ffn: the key 'kind' is missing; expected one of gated, clamped, mlp, moe.",
    ),
    "unknown key at the root": (
        "vocab_size",
        "vocab_sizes",
        "5: model.vocab_sizes: unknown key 'vocab_sizes'; expected one of kind, vocab_size, dim, tied_embeddings, "
        "embedding_scale, logits_divisor, "
        "logits_softcap, lerope, cache_dtype, norm, shared, layers, vision, audio. Did you mean 'vocab_size'?",
    ),
    "unknown key in a run": (
        "repeat: 2",
        "repet: 2",
        "8: model.layers.0.repet: unknown key 'repet'; expected one of repeat, pattern, kind, norm, mixer, ffn. "
        "Did you mean 'repeat'?",
    ),
    "unknown key in a slot": (
        HEADS,
        "head_dim: 4, windw: 8,",
        f"9: model.layers.0.mixer.windw: unknown key 'windw'; expected one of {MIXER_KEYS}. Did you mean 'window'?",
    ),
    "unknown key two slots deep": (
        ROPE,
        "rope: {theta: 1.0e4, thet: 2}",
        "9: model.layers.0.mixer.rope.thet: unknown key 'thet'; expected one of kind, theta, rotary_dim. "
        "Did you mean 'theta'?",
    ),
    "unknown key in plain settings": (
        HEADS,
        "head_dim: 4, query_scaling: {bta: 1.0, original_context: 3},",
        "9: model.layers.0.mixer.query_scaling.bta: unknown key 'bta'; expected one of beta, original_context. "
        "Did you mean 'beta'?",
    ),
    "missing in plain settings": (
        HEADS,
        "head_dim: 4, query_scaling: {beta: 1.0},",
        "9: model.layers.0.mixer.query_scaling: the key 'original_context' is missing. "
        "It gives: Context length in tokens below which nothing changes.",
    ),
    "inherited key": (
        "hidden_dim: 24",
        "hidden_dim: 24, dim: 16",
        "10: model.layers.0.ffn.dim: the key 'dim' is taken from the enclosing node and may not be written here; "
        "found 16. Remove 'dim'.",
    ),
    "unknown kind": (
        "kind: gated",
        "kind: gatd",
        "10: model.layers.0.ffn.kind: unknown kind of ffn; found 'gatd'; expected one of gated, clamped, mlp, moe. "
        "Did you mean 'gated'?",
    ),
    "kind of another slot": (
        "kind: gated",
        "kind: attention",
        "10: model.layers.0.ffn.kind: unknown kind of ffn; found 'attention'; expected one of gated, clamped, mlp, "
        "moe. 'attention' is a kind of mixer.",
    ),
    "kind is a number": (
        "kind: gated",
        "kind: 3",
        "10: model.layers.0.ffn.kind: wrong value; found 3; expected a kind's name.",
    ),
    "bare kind that needs more": (
        FFN,
        "ffn: gated",
        "10: model.layers.0.ffn: the key 'hidden_dim' is missing. It gives: Size between the projections.",
    ),
    "number for a node": (
        FFN,
        "ffn: 7",
        "10: model.layers.0.ffn: wrong value; found 7; expected a mapping, or a kind's name.",
    ),
    "null for a node": (
        "norm: {kind: rms, eps: 1.0e-5}",
        "norm: null",
        "6: model.norm: wrong value; found nothing (null); expected a mapping, or a kind's name.",
    ),
    "list for a node": (
        FFN,
        "ffn: [gated]",
        "10: model.layers.0.ffn: wrong value; found a list of 1; expected a mapping, or a kind's name.",
    ),
    "choice": (
        "hidden_dim: 24",
        "hidden_dim: 24, activation: silo",
        "10: model.layers.0.ffn.activation: wrong value; found 'silo'; expected 'silu', 'gelu', 'gelu_tanh' or 'relu2'"
        ". Did you mean 'silu'?",
    ),
    "cross check": (
        "num_kv_heads: 2",
        "num_kv_heads: 3",
        "9: model.layers.0.mixer: num_heads must be a multiple of num_kv_heads; found num_heads 4 and num_kv_heads 3.",
    ),
    "inherited nothing": (
        HEADS,
        "head_dim: 4, cache: window,",
        "9: model.layers.0.mixer.cache: a cache of kind 'window' needs a window on its mixer; found none.",
    ),
    "repeat 0": (
        "repeat: 2",
        "repeat: 0",
        "8: model.layers.0.repeat: wrong value; found 0; expected an integer of at least 1.",
    ),
    "repeat -1": (
        "repeat: 2",
        "repeat: -1",
        "8: model.layers.0.repeat: wrong value; found -1; expected an integer of at least 1.",
    ),
    "repeat text": (
        "repeat: 2",
        "repeat: two",
        "8: model.layers.0.repeat: wrong value; found the text 'two'; expected an integer of at least 1.",
    ),
    "repeat truth": (
        "repeat: 2",
        "repeat: true",
        "8: model.layers.0.repeat: wrong value; found true; expected an integer of at least 1.",
    ),
    "repeat bomb": ("repeat: 2", "repeat: 99999999", "8: model.layers.0: too many layers; expected at most 10000."),
    "pattern and mixer": (
        "repeat: 2",
        "pattern: [{}]",
        "9: model.layers.0.mixer: 'pattern' and 'mixer' stand in one run; expected one or the other.",
    ),
    "empty pattern": (
        "    - repeat: 2\n",
        "    - pattern: []\n    - repeat: 2\n",
        "8: model.layers.0.pattern: the list is empty; expected at least one run.",
    ),
    "run is a number": (
        "    - repeat: 2\n",
        "    - 3\n    - repeat: 2\n",
        "8: model.layers.0: wrong value; found 3; expected a mapping, or a kind's name.",
    ),
    "unknown layout": (
        "name: small",
        "name: small\nsource: {layout: mistrl}",
        "2: source.layout: unknown weight layout; found 'mistrl'; expected one of auto, mistral, huggingface, "
        "huggingface_glm4, huggingface_gpt_oss, huggingface_latent, "
        "huggingface_postnorm, zoo. "
        "Did you mean 'mistral'?",
    ),
    "unknown chat": (
        "name: small",
        "name: small\ntext: {chat: mistrl}",
        "2: text.chat: unknown kind of chat; found 'mistrl'; expected one of mistral, template, none. "
        "Did you mean 'mistral'?",
    ),
    "unknown tokenizer": (
        "name: small",
        "name: small\ntext: {tokenizer: {kind: tekken}}",
        "2: text.tokenizer.kind: unknown kind of tokenizer; found 'tekken'; expected one of mistral, huggingface.",
    ),
}


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_tree_is_placed_and_explained(old: str, new: str, message: str, changed: Change) -> None:
    with pytest.raises(CardError) as caught:
        resolve(changed(old, new))
    assert str(caught.value) == f"small.yaml:{message}"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (" []", "the list is empty; expected at least one run"),
        ("", "wrong value; found nothing (null); expected a list"),
        (" {repeat: 2}", "wrong value; found a mapping with 'repeat'; expected a list"),
        (" prenorm", "wrong value; found the text 'prenorm'; expected a list"),
    ],
)
def test_layers_must_be_a_list_of_runs(layers: str, message: str, write: Callable[..., Card], card_text: str) -> None:
    head = card_text[: card_text.index("    - repeat")].rstrip()
    with pytest.raises(CardError) as caught:
        resolve(write(f"{head}{layers}\n"))
    assert str(caught.value) == f"small.yaml:7: model.layers: {message}."


def test_a_mistake_in_an_override_names_the_override(changed: Change) -> None:
    card = changed("dim: 16", "dim: 16").with_overrides({"model.layers.0.mixer.window": "8"})
    with pytest.raises(CardError) as caught:
        resolve(card)
    assert str(caught.value) == (
        "override: model.layers.0.mixer.window: wrong value; found the text '8'; expected an integer."
    )


# -- what resolving does, on components of this file


class Leaf(Spec):
    module: ClassVar[str] = "tests:Leaf"
    kind: str = "leaf"
    width: Annotated[int, Inherited()]
    depth: Annotated[int, Inherited()] = 5
    scale: float = 1.0


class Sized(Spec):
    module: ClassVar[str] = "tests:Sized"
    kind: str = "sized"
    context_length: Annotated[int, Inherited()]
    sizes: tuple[int, ...] = ()


class Branch(Spec):
    module: ClassVar[str] = "tests:Branch"
    kind: str = "branch"
    inner: int = 3
    fallback: Annotated[Spec, Slot("part", absent="inherit")]
    chosen: Annotated[
        Spec, Slot("part", default=lambda fields: "leaf" if fields["inner"] == 3 else "sized", absent="build")
    ]
    bound: Annotated[Leaf | None, Slot("part", default="leaf", bind={"width": "inner"})] = None

    @model_validator(mode="after")
    def _check(self) -> "Branch":
        if self.inner == 13:
            raise CardError("unlucky", found=13, expected="luck")
        return self


class Tree(Spec):
    module: ClassVar[str] = "tests:Tree"
    kind: str = "tree"
    width: int = Field(description="Width.")
    fallback: Annotated[Spec, Slot("part")]
    layers: Annotated[tuple[Spec, ...], Slot("branch", default="branch", runs=True)]
    extras: Annotated[tuple[Spec, ...], Slot("part", default="leaf")] = ()


@pytest.fixture
def catalog() -> Catalog:
    def entry(slot: str, kind: str, cls: type[Spec]) -> Entry:
        return Entry(slot, kind, f"{__name__}:{cls.__name__}", "tests")

    entries = [
        entry("model", "decoder", Tree),
        entry("branch", "branch", Branch),
        entry("part", "leaf", Leaf),
        entry("part", "sized", Sized),
    ]
    return Catalog({(e.slot, e.kind): e for e in entries})


@pytest.fixture
def grow(catalog: Catalog) -> Callable[..., Any]:
    def grow(layers: list[Any], **fields: Any) -> Any:
        model = {"width": 7, "fallback": "leaf", "layers": layers, **fields}
        return resolve(Card.from_dict({"name": "t", "context_length": 64, "model": model}), catalog).model

    return grow


def test_fields_are_inherited_bound_and_defaulted(grow: Callable[..., Any]) -> None:
    tree = grow([{"bound": {"scale": 2}}])
    assert tree.kind == "decoder" and tree.fallback == Leaf(kind="leaf", width=7, depth=5)
    branch = tree.layers[0]
    assert branch.fallback == tree.fallback
    assert branch.bound == Leaf(kind="leaf", width=3, depth=5, scale=2.0)
    assert branch.chosen == Leaf(kind="leaf", width=7, depth=5)
    assert grow([{"inner": 4}]).layers[0].chosen == Sized(kind="sized", context_length=64)


def test_an_inherited_node_is_resolved_where_it_is_used(grow: Callable[..., Any]) -> None:
    tree = grow([{"fallback": {"kind": "sized", "sizes": [1, 2]}}, {}], fallback={"kind": "leaf", "scale": 3})
    assert tree.layers[0].fallback == Sized(kind="sized", context_length=64, sizes=(1, 2))
    assert tree.layers[1].fallback == Leaf(kind="leaf", width=7, depth=5, scale=3)


def test_runs_and_patterns_expand_in_order(grow: Callable[..., Any]) -> None:
    pattern = [{"inner": 1}, {"repeat": 2, "inner": 2}]
    tree = grow([{"repeat": 2, "pattern": pattern}, {"inner": 9}, "branch"])
    assert [branch.inner for branch in tree.layers] == [1, 2, 2, 1, 2, 2, 9, 3]
    assert tree.layers[1] is tree.layers[2]


def test_a_list_of_components_is_not_a_list_of_runs(grow: Callable[..., Any]) -> None:
    assert [part.kind for part in grow([{}], extras=[{"scale": 2}, "sized"]).extras] == ["leaf", "sized"]
    assert grow([{}], extras=[]).extras == ()
    with pytest.raises(CardError, match="unknown key 'repeat'; expected one of kind, scale"):
        grow([{}], extras=[{"repeat": 2}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": "7"}, "width: wrong value; found the text '7'; expected an integer."),
        ({"fallback": None}, "fallback: wrong value; found nothing (null); expected a mapping, or a kind's name."),
        ({"layers": [{"inner": 13}]}, "layers.0: unlucky; found 13; expected luck."),
        (
            {"layers": [{"bound": "sized"}]},
            "layers.0.bound: wrong value; found kind 'sized'; expected a kind of Leaf.",
        ),
        (
            {"layers": [{"bound": {"width": 1}}]},
            "layers.0.bound.width: the key 'width' is taken from the enclosing node and may not be written here; "
            "found 1. Remove 'width'.",
        ),
    ],
)
def test_faults_of_these(fields: Mapping[str, Any], message: str, grow: Callable[..., Any]) -> None:
    with pytest.raises(CardError) as caught:
        grow(**{"layers": [{}], **fields})
    assert str(caught.value) == f"card: model.{message}"


def test_an_inherited_value_that_is_wrong_is_placed_where_it_was_written(grow: Callable[..., Any]) -> None:
    with pytest.raises(CardError, match=r"^card: model\.layers\.0\.inner: wrong value; found the text 'x'"):
        grow([{"inner": "x", "bound": {}, "chosen": "leaf"}])


def test_a_component_in_a_place_that_does_not_offer_what_it_needs(catalog: Catalog) -> None:
    catalog.components["model", "decoder"] = Entry("model", "decoder", f"{__name__}:Leaf", "tests")
    card = Card.from_dict({"name": "t", "context_length": 64, "model": {}})
    with pytest.raises(CardError) as caught:
        resolve(card, catalog)
    assert str(caught.value) == "card: model: this kind needs 'width' from the nodes around it, and none has it."


def test_a_slot_that_no_plugin_fills(catalog: Catalog) -> None:
    del catalog.components["part", "leaf"], catalog.components["part", "sized"]
    card = {"name": "t", "context_length": 64, "model": {"width": 7, "fallback": "leaf", "layers": [{}]}}
    with pytest.raises(CardError) as caught:
        resolve(Card.from_dict(card), catalog)
    assert str(caught.value) == "card: model.fallback: no plugin brings a kind for the slot 'part'; found kind 'leaf'."


def test_a_component_that_cannot_be_imported_names_its_plugin(catalog: Catalog) -> None:
    catalog.components["part", "leaf"] = Entry("part", "leaf", f"{__name__}:Absent", "someone")
    card = {"name": "t", "context_length": 64, "model": {"width": 7, "fallback": "leaf", "layers": [{}]}}
    with pytest.raises(PluginError, match="plugin someone: the part 'leaf' is registered as"):
        resolve(Card.from_dict(card), catalog)


# -- the plan


@pytest.fixture
def plan(changed: Change) -> Plan:
    text = "    - mixer: {kind: attention, num_heads: 2, num_kv_heads: 2, head_dim: 4, window: 8, rope: null}\n"
    return resolve(changed("    - repeat: 2\n", f"{text}      {FFN}\n    - repeat: 2\n"))


def test_the_table_joins_equal_neighbours(plan: Plan) -> None:
    first, second = plan.table()
    assert (first.layers, second.layers, first.block) == ("0", "1-2", "prenorm")
    assert first.parts["mixer"] == (
        "attention(num_heads=2, num_kv_heads=2, head_dim=4, window=8, rope=None, cache=window)"
    )
    assert second.parts["mixer"] == (
        "attention(num_heads=4, num_kv_heads=2, head_dim=4, rope=default(theta=10000), cache=full)"
    )
    assert second.parts["ffn"] == "gated(hidden_dim=24)" and second.parts["norm"] == "rms(eps=1e-05)"


def test_equal_neighbours_from_two_runs_are_one_row(grow: Callable[..., Any], plan: Plan) -> None:
    tree = grow([{"inner": 1}, {"inner": 1}, {"inner": 2}])
    assert tree.layers[0] is not tree.layers[1]
    assert [row.layers for row in Plan(plan.card, tree).table()] == ["0-1", "2"]


def test_the_description_is_plain_and_complete(plan: Plan) -> None:
    found = json.loads(json.dumps(plan.describe()))
    assert found["name"] == "small" and "tokenizer" not in found
    layers = found["model"]["layers"]
    assert [layer["repeat"] for layer in layers] == [1, 2]
    assert layers[1]["mixer"]["dim"] == 16 and layers[1]["mixer"]["rope"]["theta"] == 1e4
    assert layers[0]["mixer"]["rope"] is None


def test_a_phrase_shows_nested_settings() -> None:
    scaled = Sized(context_length=3, sizes=(1, 2))
    assert phrase(scaled) == "sized(sizes=(1, 2))" and phrase(Leaf(width=1)) == "leaf"


def test_a_plan_knows_who_brought_its_parts(plan: Plan) -> None:
    kinds = {f"{entry.slot} {entry.kind}" for entry in plan.entries}
    assert {entry.owner for entry in plan.entries} == {"zoo.components"}
    assert kinds == {
        *("model decoder", "norm rms", "block prenorm", "mixer attention", "ffn gated"),
        *("rope default", "cache full", "cache window"),
    }


@pytest.mark.parametrize("name", sorted(manager().cards()))
def test_every_built_in_card_resolves(name: str) -> None:
    from zoo.registry.card import load_card

    card = load_card(name)
    if card.unsupported:
        with pytest.raises(CardError, match=f"zoo cannot run {name} yet: "):
            resolve(card)
        return
    plan = resolve(card)
    assert sum(1 for _ in plan.model.walk()) > 10 and plan.tokenizer is not None
