"""Finding the weights: one set out of what is in the folder, or one clear message."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from zoo.loading.files import LocalFolder, local_path, locate
from zoo.registry.errors import WeightsError

Write = Callable[..., Path]

NATIVE = {"tok_embeddings.weight": (8, 4), "norm.weight": (4,), "output.weight": (8, 4)}
HF = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,), "lm_head.weight": (8, 4)}


def fails(ref: str | Path, layout: str = "auto") -> str:
    with pytest.raises(WeightsError) as caught:
        locate(ref, layout)
    return str(caught.value)


def shard(folder: Path, save: Write, names: dict[str, tuple[int, ...]], stem: str, index: bool = True) -> list[Path]:
    """Each tensor in a file of its own, with an index."""
    total, files, weight_map = len(names), [], {}
    for number, (name, shape) in enumerate(names.items(), 1):
        file = folder / f"{stem}-{number:05d}-of-{total:05d}.safetensors"
        files.append(save(file, {name: shape}))
        weight_map[name] = file.name
    if index:
        write_index(folder, stem, weight_map)
    return files


def write_index(folder: Path, stem: str, weight_map: object) -> Path:
    file = folder / f"{stem}.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return file


def names(files: Iterable[Path]) -> list[str]:
    return [file.name for file in files]


@pytest.mark.parametrize(
    ("file", "tensors", "layout"),
    [
        ("consolidated.safetensors", NATIVE, "mistral"),
        ("model.safetensors", HF, "huggingface"),
        ("consolidated.safetensors", HF, "huggingface"),
        ("model.safetensors", NATIVE, "mistral"),
        ("my tuned model (2).safetensors", NATIVE, "mistral"),
    ],
)
def test_one_file_whose_layout_is_told_by_its_tensors(
    tmp_path: Path, save: Write, file: str, tensors: dict[str, tuple[int, ...]], layout: str
) -> None:
    save(tmp_path / file, tensors)
    found = locate(tmp_path)
    assert (found.layout, names(found.files), set(found.headers)) == (layout, [file], set(tensors))
    assert found.where == str(tmp_path / file)
    assert found.nbytes == 4 * 68
    assert found.note == f"weights: {file} (272 bytes, layout {layout})"


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(("stem", "tensors"), [("consolidated", NATIVE), ("model", HF), ("tuned", HF)])
def test_shards(tmp_path: Path, save: Write, stem: str, tensors: dict[str, tuple[int, ...]], index: bool) -> None:
    files = shard(tmp_path, save, tensors, stem, index)
    found = locate(tmp_path)
    assert list(found.files) == files
    assert set(found.headers) == set(tensors)
    assert found.note.startswith(f"weights: {stem}-00001-of-00003.safetensors and 2 more (272 bytes")
    assert found.where == str(tmp_path)


def test_a_shard_or_the_index_means_the_whole_set(tmp_path: Path, save: Write) -> None:
    files = shard(tmp_path, save, HF, "model")
    save(tmp_path / "consolidated.safetensors", NATIVE)
    assert list(locate(files[1]).files) == files
    assert list(locate(tmp_path / "model.safetensors.index.json").files) == files


def test_a_file_means_that_file(tmp_path: Path, save: Write) -> None:
    save(tmp_path / "consolidated.safetensors", NATIVE)
    file = save(tmp_path / "other.safetensors", HF)
    assert locate(file).files == (file,)


def test_archives_of_torch(tmp_path: Path) -> None:
    for number, (name, shape) in enumerate(NATIVE.items()):
        torch.save({name: torch.ones(shape)}, tmp_path / f"consolidated.{number:02d}.pt")
    found = locate(tmp_path)
    assert found.layout == "mistral"
    assert names(found.files) == ["consolidated.00.pt", "consolidated.01.pt", "consolidated.02.pt"]
    (tmp_path / "consolidated.01.pt").unlink()
    assert "1 weight file missing; found consolidated.00.pt, consolidated.02.pt; expected consolidated.01.pt" in fails(
        tmp_path
    )


def test_only_pth(tmp_path: Path) -> None:
    torch.save({name: torch.ones(shape) for name, shape in NATIVE.items()}, tmp_path / "consolidated.00.pth")
    assert names(locate(tmp_path).files) == ["consolidated.00.pth"]
    assert names(locate(tmp_path / "consolidated.00.pth").files) == ["consolidated.00.pth"]


def test_old_hugging_face_pickles_beside_what_the_trainer_left(tmp_path: Path) -> None:
    torch.save({name: torch.ones(shape) for name, shape in HF.items()}, tmp_path / "pytorch_model.bin")
    torch.save({"lr": torch.ones(1)}, tmp_path / "training_args.bin")
    torch.save({"step": torch.ones(1)}, tmp_path / "optimizer.pt")
    assert names(locate(tmp_path).files) == ["pytorch_model.bin"]
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "renamed.bin")
    assert names(locate(tmp_path).files) == ["renamed.bin"]


def both(folder: Path, save: Write) -> None:
    shard(folder, save, HF, "model")
    save(folder / "consolidated.safetensors", NATIVE)


@pytest.mark.parametrize(
    ("present", "first"),
    [(["params.json"], "mistral"), (["params.json", "config.json"], "mistral"), (["config.json"], "huggingface")],
)
def test_both_sets_and_one_is_chosen_and_said(tmp_path: Path, save: Write, present: list[str], first: str) -> None:
    both(tmp_path, save)
    for name in present:
        (tmp_path / name).write_text("{}")
    found = locate(tmp_path)
    assert found.layout == first
    other = "consolidated.safetensors" if first == "huggingface" else "model-00001-of-00003.safetensors and 2 more"
    assert found.note.endswith(f"left aside: {other}")


@pytest.mark.parametrize("layout", ["mistral", "huggingface"])
def test_both_sets_and_the_card_names_one(tmp_path: Path, save: Write, layout: str) -> None:
    both(tmp_path, save)
    assert locate(tmp_path, layout).layout == layout


def test_the_named_layout_beside_a_set_that_was_not_fetched(tmp_path: Path, save: Write) -> None:
    save(tmp_path / "consolidated.safetensors", NATIVE)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n")
    assert locate(tmp_path, "mistral").layout == "mistral"
    message = fails(tmp_path, "huggingface")
    assert "consolidated.safetensors (layout mistral), model.safetensors (a Git-LFS pointer stands where" in message


def test_both_sets_and_one_is_incomplete(tmp_path: Path, save: Write) -> None:
    both(tmp_path, save)
    (tmp_path / "params.json").write_text("{}")
    for name in ("consolidated.safetensors",):
        (tmp_path / name).unlink()
    shard(tmp_path, save, NATIVE, "consolidated")[1].unlink()
    found = locate(tmp_path)
    assert found.layout == "huggingface"
    assert "(incomplete: no consolidated-00002-of-00003.safetensors)" in found.note
    assert "1 weight file missing" in fails(tmp_path, "mistral")


def test_safetensors_before_pickles(tmp_path: Path, save: Write) -> None:
    torch.save({name: torch.ones(shape) for name, shape in NATIVE.items()}, tmp_path / "consolidated.00.pth")
    save(tmp_path / "consolidated.safetensors", NATIVE)
    assert locate(tmp_path).note.endswith("left aside: consolidated.00.pth")


def test_a_named_layout_that_is_not_there(tmp_path: Path, save: Write) -> None:
    save(tmp_path / "model.safetensors", HF)
    message = fails(tmp_path, "mistral")
    assert "no weights in layout 'mistral'; found model.safetensors (layout huggingface)" in message
    assert "unknown weight layout 'hf'" in fails(tmp_path, "hf")


def test_missing_shard(tmp_path: Path, save: Write) -> None:
    shard(tmp_path, save, HF, "model")[1].unlink()
    message = fails(tmp_path)
    assert "1 weight file missing; found model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in message
    assert "expected model-00002-of-00003.safetensors" in message


def test_index_names_an_absent_file(tmp_path: Path, save: Write) -> None:
    save(tmp_path / "model.safetensors", HF)
    write_index(tmp_path, "model", {**dict.fromkeys(HF, "model.safetensors"), "x": "model-extra.safetensors"})
    assert "1 weight file missing; found model.safetensors; expected model-extra.safetensors" in fails(tmp_path)


def test_shard_that_the_index_does_not_name(tmp_path: Path, save: Write) -> None:
    files = shard(tmp_path, save, HF, "model")
    write_index(tmp_path, "model", dict.fromkeys(HF, files[0].name))
    message = fails(tmp_path)
    assert "weight files that their index does not name; found model-00002-of-00003.safetensors" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": 1}, "such as 'model.norm.weight'; found it is in model-00002-of-00003.safetensors; exp"),
        (
            {"model.extra": 1},
            "such as 'model.extra'; found it is in no file; expected model-00001-of-00003.safetensors",
        ),
        ({"model.norm.weight": None}, "found it is in model-00002-of-00003.safetensors; expected a line of the index"),
    ],
)
def test_index_and_files_disagree(tmp_path: Path, save: Write, change: dict[str, int | None], message: str) -> None:
    files = shard(tmp_path, save, HF, "model", index=False)
    save(files[1], {"model.norm.weight": (4,), "model.layers.0.input_layernorm.weight": (4,)})
    numbers = {**dict(zip(HF, (1, 2, 3), strict=True)), "model.layers.0.input_layernorm.weight": 2, **change}
    write_index(tmp_path, "model", {name: files[n - 1].name for name, n in numbers.items() if n})
    assert "the index and the files disagree on 1 tensor, such as" in fails(tmp_path)
    assert message in fails(tmp_path)


def test_same_tensor_in_two_files(tmp_path: Path, save: Write) -> None:
    files = shard(tmp_path, save, HF, "model", index=False)
    save(files[2], {"lm_head.weight": (8, 4), "model.norm.weight": (4,)})
    assert (
        "tensor 'model.norm.weight' is in two files; found model-00002-of-00003.safetensors and "
        "model-00003-of-00003.safetensors"
    ) in fails(tmp_path)


@pytest.mark.parametrize("place", ["../w.safetensors", "/etc/passwd", "..", "a\\b.safetensors", ""])
def test_index_that_leaves_its_folder(tmp_path: Path, save: Write, place: str) -> None:
    save(tmp_path / "model.safetensors", HF)
    write_index(tmp_path, "model", {"lm_head.weight": place})
    message = fails(tmp_path)
    assert f"the index places tensor 'lm_head.weight' outside its folder; found {place!r}" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_broken_index(tmp_path: Path, save: Write, text: str) -> None:
    save(tmp_path / "model.safetensors", HF)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: not an index of weights" in fails(tmp_path)


def test_an_index_alone(tmp_path: Path) -> None:
    file = write_index(tmp_path, "model", {"a": "model-00001-of-00001.safetensors"})
    assert "an index without its weight files" in fails(file)
    assert "no weights here; found model.safetensors.index.json" in fails(tmp_path)


def test_two_sets_of_one_name(tmp_path: Path, save: Write) -> None:
    save(tmp_path / "consolidated.safetensors", NATIVE)
    shard(tmp_path, save, NATIVE, "consolidated", index=False)
    message = fails(tmp_path)
    assert "two sets of weights are both named 'consolidated.safetensors'; found consolidated-00001-of-0000" in message
    assert names(locate(tmp_path / "consolidated.safetensors").files) == ["consolidated.safetensors"]


def test_two_downloads_mixed(tmp_path: Path, save: Write) -> None:
    shard(tmp_path, save, HF, "model", index=False)
    save(tmp_path / "model-00001-of-00002.safetensors", {"model.norm.weight": (4,)})
    assert "two sets of weights are both named 'model.safetensors'" in fails(tmp_path)


def test_several_renamed_files(tmp_path: Path, save: Write) -> None:
    save(tmp_path / "a.safetensors", HF)
    save(tmp_path / "b.safetensors", HF)
    assert "several weight files, and no telling which is meant; found a.safetensors, b.safetensors" in fails(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    assert "no weights here; found an empty folder; expected consolidated*.safetensors" in fails(tmp_path)


def test_folder_without_weights_names_what_is_there(tmp_path: Path) -> None:
    for name in "abcdefg":
        (tmp_path / name).write_text("")
    assert "found a, b, c, d, e and 2 more" in fails(tmp_path)


def test_weights_one_folder_deeper(tmp_path: Path, save: Write) -> None:
    (tmp_path / "Mistral-7B").mkdir()
    save(tmp_path / "Mistral-7B" / "consolidated.safetensors", NATIVE)
    message = fails(tmp_path)
    assert "found only folders; expected consolidated*.safetensors" in message
    assert f"Do you mean {tmp_path / 'Mistral-7B'}?" in message


def test_no_such_folder_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "Mistral-7B-v0.3").mkdir()
    message = fails(tmp_path / "Mistral-7B-v03")
    assert "no such folder or file. Did you mean 'Mistral-7B-v0.3'?" in message
    assert "no such folder or file." in fails(tmp_path / "no" / "where")


def test_a_file_that_is_no_weight_file(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    message = fails(tmp_path / "params.json")
    assert "not a weight file; expected a folder, or a file that ends in .safetensors, .pth, .pt, .bin" in message
    assert f"Point at the folder {tmp_path}" in message


def test_a_path_that_is_too_long() -> None:
    assert "not a path; found File name too long" in fails("x" * 5000)


def test_link_to_a_file_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../blobs/gone")
    assert "a link to a file that is gone" in fails(tmp_path)
    assert "a link to a file that is gone" in fails(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["with spaces", "Modèle été 模型", "a" * 200, "100% [real] {x}"])
def test_paths_of_every_look(tmp_path: Path, save: Write, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / name
    folder.mkdir()
    save(folder / "consolidated.safetensors", NATIVE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for ref in (folder, str(folder), name, f"./{name}", f"~/{name}"):
        assert locate(ref).layout == "mistral"


def test_file_urls(tmp_path: Path) -> None:
    url = (tmp_path / "my model").as_uri()
    assert url.startswith("file:///")
    assert local_path(url) == tmp_path / "my model"
    assert local_path("file://here/model") == Path("here/model")
    assert local_path(f"file:{tmp_path}") == tmp_path


def test_local_folder_lists_files_only(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b").write_text("12")
    (tmp_path / "a").symlink_to("nowhere")
    assert LocalFolder(tmp_path).sizes() == {"a": 0, "b": 2}


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_torch_is_not_imported(tmp_path: Path, save: Write) -> None:
    import subprocess
    import sys

    save(tmp_path / "consolidated.safetensors", NATIVE)
    code = (
        "import sys\nfrom zoo.loading.files import locate\n"
        f"assert locate({str(tmp_path)!r}).layout == 'mistral'\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
