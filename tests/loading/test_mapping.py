"""Placing a checkpoint's tensors: strict both ways, each difference told with both names and both shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.loading.layouts import Layout, layouts, read_layouts
from zoo.loading.mapping import Comparison, compare, plan_mapping
from zoo.loading.reader import TensorInfo
from zoo.registry.catalog import Resource
from zoo.registry.errors import WeightsError
from zoo.registry.resolve import Plan
from zoo.registry.spec import Param, Part, Spec

Plans = Callable[..., Plan]
Names = Callable[[Plan], dict[str, tuple[int, ...]]]
Shapes = dict[str, tuple[int, ...]]


def headers(shapes: Shapes, dtype: str = "F32") -> dict[str, TensorInfo]:
    found, at = {}, 0
    for name, shape in shapes.items():
        found[name] = TensorInfo(name, shape, dtype, Path("w.safetensors"), at, at + 4)
        at += 4
    return found


def differences(plan: Plan, shapes: Shapes, dtype: str = "F32", layout: str = "mistral") -> Comparison:
    return compare(plan.model, layouts()[layout], headers(shapes, dtype))


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_all_of_a_native_checkpoint_is_placed(plan_of: Plans, native_names: Names, ffn: str) -> None:
    plan = plan_of(ffn)
    found = differences(plan, native_names(plan))
    assert found.problems == []
    assert set(found.placements) == {tensor.name for tensor in plan.model.tensors()}
    q = found.placements["layers.1.mixer.q.weight"]
    assert q.source.name == "layers.1.attention.wq.weight"
    assert q.interleaved == q.tensor.rotary is not None
    assert found.placements["layers.1.mixer.v.weight"].interleaved is None
    assert found.nbytes == 4 * sum(param.numel for param in plan.model.all_parameters().values())


def test_missing_names_the_tensor_its_shape_and_the_files_name(plan_of: Plans, native_names: Names) -> None:
    plan = plan_of()
    shapes = native_names(plan)
    del shapes["layers.1.feed_forward.w2.weight"]
    with pytest.raises(WeightsError) as caught:
        plan_mapping(plan.model, layouts()["mistral"], headers(shapes), "/m/w.safetensors")
    assert str(caught.value) == (
        "/m/w.safetensors: the files and the card differ in 1 tensor (layout mistral)\n"
        "  1 missing from the files: layers.1.ffn.down.weight [64, 40] (in a file: layers.1.feed_forward.w2.weight)."
    )


def test_unused_names_the_nearest(plan_of: Plans, native_names: Names) -> None:
    plan = plan_of()
    shapes = native_names(plan)
    shapes["layers.1.feed_forward.w2.wieght"] = shapes.pop("layers.1.feed_forward.w2.weight")
    texts = [str(problem) for problem in differences(plan, shapes).problems]
    assert texts[1] == (
        "in the files only: layers.1.feed_forward.w2.wieght [64, 40], did you mean 'layers.1.feed_forward.w2.weight'"
    )


def test_unused_because_the_card_has_no_such_tensor(plan_of: Plans, native_names: Names) -> None:
    plan = plan_of()
    shapes = {**native_names(plan), "layers.2.ffn_norm.weight": (64,), "layers.0.attention.wq.bias": (96,)}
    texts = [problem.text for problem in differences(plan, shapes).problems]
    assert "layers.2.ffn_norm.weight [64]" in texts
    assert (
        "layers.0.attention.wq.bias [96], which would be layers.0.mixer.q.bias, a tensor that the card has not" in texts
    )


def test_names_that_a_table_ignores_are_no_difference(plan_of: Plans, native_names: Names) -> None:
    plan = plan_of()
    assert differences(plan, {**native_names(plan), "rope.freqs": (12,)}).problems == []


def test_another_vocabulary_names_both_sizes(plan_of: Plans, native_names: Names) -> None:
    plan = plan_of(vocab_size=512)
    shapes = {**native_names(plan), "tok_embeddings.weight": (509, 64), "output.weight": (509, 64)}
    texts = [str(problem) for problem in differences(plan, shapes).problems]
    assert texts == [
        "of another shape: embed.weight (tok_embeddings.weight is [509, 64], the card says [512, 64])",
        "of another shape: head.weight (output.weight is [509, 64], the card says [512, 64])",
    ]


def test_twice(plan_of: Plans, native_names: Names) -> None:
    plan = plan_of("moe")
    shapes = {**native_names(plan), "layers.0.block_sparse_moe.gate.weight": (3, 64)}
    texts = [str(problem) for problem in differences(plan, shapes).problems]
    assert texts == [
        "given twice: layers.0.ffn.router.weight (layers.0.feed_forward.gate.weight and "
        "layers.0.block_sparse_moe.gate.weight)"
    ]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "I32"])
def test_quantised_types_are_refused_by_name(plan_of: Plans, native_names: Names, dtype: str) -> None:
    plan = plan_of()
    shapes = native_names(plan)
    infos = headers(shapes)
    infos["norm.weight"] = headers({"norm.weight": (64,)}, dtype)["norm.weight"]
    with pytest.raises(WeightsError) as caught:
        plan_mapping(plan.model, layouts()["mistral"], infos, "here")
    found = f"{dtype} without scales" if dtype == "F8_E4M3" else dtype
    assert f"1 of a type that is not read yet: norm.weight (norm.weight is {found})" in str(caught.value)
    assert str(caught.value).endswith("Use the checkpoint's bfloat16 edition.")
    assert "missing" not in str(caught.value)


def test_tied_and_untied_heads(plan_of: Plans, native_names: Names) -> None:
    tied, untied = plan_of(tied_embeddings=True), plan_of()
    shapes = native_names(tied)
    assert "output.weight" not in shapes
    assert differences(tied, shapes).problems == []
    with pytest.raises(WeightsError, match=r"head\.weight \[509, 64\].*If the head is the embedding, set") as caught:
        plan_mapping(untied.model, layouts()["mistral"], headers(shapes), "here")
    assert "tied_embeddings: true" in str(caught.value)
    assert [p.name for p in differences(tied, native_names(untied)).problems] == ["output.weight"]


def test_a_long_list_is_cut_and_counted(plan_of: Plans) -> None:
    plan = plan_of("moe")
    with pytest.raises(WeightsError) as caught:
        plan_mapping(plan.model, layouts()["mistral"], headers({"model.norm.weight": (64,)}), "here")
    total = len(list(plan.model.tensors()))
    assert f"\n  {total} missing from the files: embed.weight [509, 64] (in a file: tok_emb" in str(caught.value)
    assert f"; and {total - 5} more" in str(caught.value)
    assert "Is this the card of these weights?" in str(caught.value)


def stacked(plan: Plan, names: Names) -> Shapes:
    """The plan's tensors as the first Mixtral release names and stacks them."""
    shapes = {name: shape for name, shape in names(plan).items() if "feed_forward" not in name}
    for i in range(2):
        shapes[f"layers.{i}.block_sparse_moe.gate.weight"] = (3, 64)
        shapes |= {f"layers.{i}.block_sparse_moe.{w}": (3 * 40, 64) for w in ("w1", "w2", "w3")}
    return shapes


def test_experts_stacked_in_rows(plan_of: Plans, native_names: Names) -> None:
    plan = plan_of("moe")
    found = differences(plan, stacked(plan, native_names))
    assert found.problems == []
    down = found.placements["layers.1.ffn.experts.2.down.weight"]
    assert (down.rows, down.row_shape, down.transpose, down.columns) == ((80, 120), (64,), True, None)
    up = found.placements["layers.1.ffn.experts.1.up.weight"]
    assert (up.source.name, up.rows, up.transpose) == ("layers.1.block_sparse_moe.w3", (40, 80), False)


def test_a_stack_of_another_number_of_experts(plan_of: Plans, native_names: Names) -> None:
    plan = plan_of("moe")
    shapes = {**stacked(plan, native_names), "layers.0.block_sparse_moe.w1": (4 * 40, 64)}
    texts = [problem.text for problem in differences(plan, shapes).problems]
    assert texts == [
        "layers.0.ffn.experts.0.gate.weight (layers.0.block_sparse_moe.w1 is [160, 64], "
        "the card says [3, 40, 64] or [120, 64])"
    ]


def test_a_mixture_under_a_dense_card(plan_of: Plans, native_names: Names) -> None:
    shapes = stacked(plan_of("moe"), native_names)
    problems = differences(plan_of(), shapes).problems
    assert {problem.kind for problem in problems} == {"missing", "unused"}
    assert any("would be layers.0.ffn.experts.0.gate.weight" in problem.text for problem in problems)


class Odd(Spec):
    """A component with a stack of pairs, for the transforms that the built-in tables do not combine."""

    module = "none:None"
    kind: str = "odd"

    def parameters(self) -> dict[str, Param]:
        parts = {f"pair.{e}.{n}": Part((e, (0, 2) if n == "a" else (2, 6))) for e in range(2) for n in "ab"}
        return {"pairs": Param((2, 6, 5), parts=parts), "scale": Param(())}


def odd_layout(folder: Path, transforms: str) -> Layout:
    file = folder / "odd.yaml"
    file.write_text(f"tensors: {{s: scale, p: {{to: ['pair.{{e}}.a', 'pair.{{e}}.b'], transform: {transforms}}}}}")
    return read_layouts({"odd": Resource("odd", file, "test")})["odd"]


@pytest.mark.parametrize(
    ("transforms", "shape", "rows", "columns"),
    [
        ("[stack, split]", (2, 6, 5), [(0, 2), (2, 6), (6, 8), (8, 12)], None),
        ("[stack, split]", (12, 5), [(0, 2), (2, 6), (6, 8), (8, 12)], None),
        ("[stack, transpose, split]", (2, 5, 6), [(0, 5), (0, 5), (5, 10), (5, 10)], [(0, 2), (2, 6)] * 2),
        ("[stack, split, transpose]", (2, 5 + 5, 2), None, None),
    ],
)
def test_stack_split_and_transpose_together(
    tmp_path: Path,
    transforms: str,
    shape: tuple[int, ...],
    rows: list[tuple[int, int]] | None,
    columns: list[tuple[int, int]] | None,
) -> None:
    found = compare(Odd(), odd_layout(tmp_path, transforms), headers({"p": shape, "s": ()}))
    placed = [found.placements.get(f"pair.{e}.{n}") for e in range(2) for n in "ab"]
    if rows is None:
        assert [problem.kind for problem in found.problems] == ["shape"]
        assert "experts of one shape" in found.problems[0].text
        return
    assert found.problems == []
    assert [p and p.rows for p in placed] == rows
    expected: list[tuple[int, int] | None] = [None] * 4 if columns is None else [*columns]
    assert [p and p.columns for p in placed] == expected
    scalar = found.placements["scale"]
    assert (scalar.rows, scalar.row_shape, scalar.row_bytes) == ((0, 1), (), 4)


def test_a_layer_that_drafts_is_left_out_and_no_other(plan_of: Plans) -> None:
    leaves = ("input_layernorm.weight", "enorm.weight", "eh_proj.weight", "mlp.experts.3.up_proj.weight")
    shapes: Shapes = {f"model.layers.{i}.{leaf}": (4,) for i in (61, 62) for leaf in leaves}
    found = differences(plan_of(), shapes, layout="huggingface_latent")
    unused = [problem.name for problem in found.problems if problem.kind == "unused"]
    assert unused == [name for name in shapes if ".62." in name]
